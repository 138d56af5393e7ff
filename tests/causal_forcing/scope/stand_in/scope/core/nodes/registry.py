"""Pipelines and other nodes by name."""

from typing import Any, ClassVar


class NodeRegistry:
    """All registered nodes."""

    _nodes: ClassVar[dict[str, Any]] = {}

    @classmethod
    def register(cls, node_class: Any) -> None:
        """Add a node under its own id, or under the one that its parameters give."""
        cls._nodes[node_class.node_type_id or node_class.get_config_class().pipeline_id] = node_class

    @classmethod
    def get(cls, node_type_id: str) -> Any:
        """Return a node class, or None."""
        return cls._nodes.get(node_type_id)
