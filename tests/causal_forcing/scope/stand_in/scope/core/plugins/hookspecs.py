"""The hook that plugins implement."""

import pluggy

hookspec = pluggy.HookspecMarker("scope")


class ScopeHookSpec:
    """Hooks of Scope."""

    @hookspec
    def register_pipelines(self, register):
        """Register pipeline classes with the callback."""
