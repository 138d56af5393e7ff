"""What each tenant may do, from a file that operators change while the service runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from serve.messages import LOCAL_TENANT, Share
from serve.section import Section

Tenant = Annotated[str, Field(pattern=r"^[\w.@:+-]{1,128}$")]
"""Name of a tenant; it is in logs and usage records."""


class TenantPolicy(Section):
    """What a tenant may do.

    Attributes:
        weight: Its part of the generators' time when there is not enough for all, relative to the others'.
        max_sessions: Sessions that may have a generator at a time; further ones wait.
        max_queued: Sessions that may wait; further ones are refused.
        max_session_s: Longest session; the service's own limit holds as well.
        prompts_per_minute: Prompts of all its sessions together, first ones included.
        operator: Whether it may list all sessions, look at each and end it.
        banned: Whether it is refused; its running sessions are ended.
    """

    weight: PositiveFloat = 1.0
    max_sessions: Annotated[int, Field(ge=0)] | None = None
    max_queued: Annotated[int, Field(ge=0)] | None = None
    max_session_s: PositiveFloat | None = None
    prompts_per_minute: PositiveInt | None = None
    operator: bool = False
    banned: bool = False

    def share(self, tenant: str) -> Share:
        """Return what admission needs of it."""
        return Share(tenant, self.weight, self.max_sessions, self.max_queued)


class TenantsFile(Section):
    """The file.

    Attributes:
        default: For tenants that are not listed.
        unlisted: Whether tenants that are not listed are served; ``local``, which no credentials name, always is.
        tenants: By name.
    """

    default: TenantPolicy = TenantPolicy()
    unlisted: Literal["serve", "refuse"] = "serve"
    tenants: Mapping[Tenant, TenantPolicy] = Field(default_factory=dict)

    def policy(self, tenant: str) -> TenantPolicy:
        """Return what a tenant may do; one that is refused is as good as banned."""
        listed = self.tenants.get(tenant)
        if listed is not None:
            return listed
        if self.unlisted == "refuse" and tenant != LOCAL_TENANT:
            return self.default.model_copy(update={"banned": True, "operator": False})
        return self.default
