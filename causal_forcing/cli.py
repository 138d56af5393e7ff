"""The command `causal-forcing`: a table of subcommands, each imported only when it is called.

Importing this module needs neither torch nor ray, so that a client of the service installs without them.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, cast

from causal_forcing import startup  # noqa: F401 (its clock starts here, before anything heavy)
from causal_forcing.errors import CausalForcingError, InvalidRequest
from causal_forcing.version import __version__

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class CommandModule(Protocol):
    """What the module of a subcommand offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of the subcommand."""

    def run(self, args: argparse.Namespace) -> int:
        """Do the work and return the exit status."""


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        module: Name of its :class:`CommandModule`.
        summary: One line for the help.
    """

    module: str
    summary: str

    def load(self) -> CommandModule:
        """Return its module, imported."""
        return cast(CommandModule, importlib.import_module(self.module))


COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "demo": Command("serve.commands.demo", "run the whole service once on this machine and write a video"),
        "serve": Command("serve.commands.serve", "run the service until Ctrl-C"),
        "stream": Command("serve.commands.stream", "receive a video from a running service"),
        "sessions": Command("serve.commands.sessions", "see and end the sessions of a running service"),
        "status": Command("serve.commands.status", "say whether a service is well, what it runs, and who waits"),
        "config": Command(
            "serve.commands.config", "check or show a service's configuration, or make a cluster's of it"
        ),
        "drain": Command(
            "serve.commands.drain", "take this machine out of its cluster; its sessions end by themselves"
        ),
        "generate": Command("causal_forcing.commands.generate", "generate a video in this process"),
        "download": Command("causal_forcing.commands.download", "fetch the weights of a preset"),
        "convert": Command("causal_forcing.commands.convert", "rewrite a checkpoint as safetensors"),
        "inspect": Command("causal_forcing.commands.inspect", "say what a weight file holds"),
        "evaluate": Command("causal_forcing.commands.evaluate", "score a checkpoint of the embedded model's world"),
        "doctor": Command("causal_forcing.commands.doctor", "say what this machine can run, and what it lacks"),
        "parity": Command("causal_forcing.commands.parity", "compare the engine with golden tensors"),
    }
)
"""All subcommands by name."""

EXTRAS: Mapping[str, str] = MappingProxyType(
    {
        "PIL": "media",
        "av": "media",
        "numpy": "media",
        "tqdm": "media",
        "huggingface_hub": "server",
        "prometheus_client": "server",
        "ray": "server",
        "safetensors": "server",
        "tokenizers": "server",
        "torch": "server",
        "transformers": "server",
        "torchao": "fp8",
    }
)
"""The extra that installs a module which the base install does not have."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status: 0, 1 failed, 2 wrong request, 130 interrupted.

    Args:
        argv: Words after the program's name; None takes them from the process.
    """
    parser = _build_parser()
    options = parser.parse_args(argv)
    name: str = options.command
    try:
        command = COMMANDS[name].load()
        subparser = argparse.ArgumentParser(prog=f"{parser.prog} {name}", description=COMMANDS[name].summary)
        command.add_arguments(subparser)
        return command.run(subparser.parse_args(options.arguments))
    except KeyboardInterrupt:
        return _fail(name, "interrupted", EXIT_INTERRUPTED)
    except InvalidRequest as error:
        return _fail(name, error.message, EXIT_USAGE)
    except CausalForcingError as error:
        return _fail(name, f"{error.message} ({error.reason})", EXIT_FAILED)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        hint = f"pip install 'causal-forcing-serve[{extra}]'"
        return _fail(name, f"needs the module {error.name}, which is not installed; try: {hint}", EXIT_FAILED)
    except OSError as error:  # a full disk, a closed port: the user's machine, not our code
        return _fail(name, f"{type(error).__name__}: {error}", EXIT_FAILED)


def _build_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    table = "\n".join(f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="causal-forcing",
        description="Streams endless, promptable video.",
        epilog=f"commands:\n{table}\n\n`causal-forcing COMMAND --help` lists the options of one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its options")
    return parser


def _fail(command: str, message: str, status: int) -> int:
    print(f"causal-forcing {command}: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
