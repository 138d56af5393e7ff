"""The subcommands that run the service and talk to it; each module has ``add_arguments`` and ``run``."""
