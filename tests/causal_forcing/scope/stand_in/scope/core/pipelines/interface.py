"""The base class of pipelines."""


class Pipeline:
    """A node that makes a batch of frames at each call."""

    node_type_id = ""

    @classmethod
    def get_config_class(cls):
        """Return the class of the parameters."""
        raise NotImplementedError

    def prepare(self, **kwargs):
        """Return what input the next call needs."""
        return

    def shutdown(self):
        """Give everything back."""
