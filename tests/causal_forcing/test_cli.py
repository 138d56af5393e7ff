"""The command line finds its subcommands, and turns every error into one line and an exit status."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from types import SimpleNamespace

import pytest

from causal_forcing import cli, errors
from causal_forcing.version import __version__


def command_that(outcome: object) -> SimpleNamespace:
    """Return a subcommand whose run raises the outcome, or returns it."""

    def run(args: Namespace) -> object:
        if isinstance(outcome, BaseException):
            raise outcome
        return args.status if outcome is None else outcome

    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("--status", type=int, default=0)

    return SimpleNamespace(add_arguments=add_arguments, run=run)


@pytest.fixture
def outcome_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(outcome: object, *words: str) -> tuple[int, str]:
        monkeypatch.setattr(cli.Command, "load", lambda _self: command_that(outcome))
        return cli.main(["generate", *words]), capsys.readouterr().err

    return run


def test_a_subcommand_gets_its_options_and_gives_the_status(outcome_of) -> None:
    assert outcome_of(None, "--status", "7") == (7, "")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (
            errors.InvalidRequest("height", 50, "must be a multiple of 16"),
            2,
            "height: got 50; must be a multiple of 16",
        ),
        (errors.SessionStateError("no prompt", reason="NO_PROMPT"), 1, "no prompt (NO_PROMPT)"),
        (errors.BadCheckpoint("truncated"), 1, "truncated (BAD_CHECKPOINT)"),
        (errors.OutOfMemory("12 GB needed"), 1, "12 GB needed (OUT_OF_MEMORY)"),
        (OSError(28, "No space left on device"), 1, "OSError: [Errno 28] No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_one_line_without_a_traceback(outcome_of, error: BaseException, status: int, message: str) -> None:
    assert outcome_of(error) == (status, f"causal-forcing generate: {message}\n")


@pytest.mark.parametrize(
    ("module", "extra"), [("torch", "server"), ("ray.serve", "server"), ("av", "media"), ("torchao", "fp8")]
)
def test_a_missing_module_names_the_extra_that_brings_it(outcome_of, module: str, extra: str) -> None:
    status, message = outcome_of(ModuleNotFoundError(f"No module named {module!r}", name=module))
    assert status == 1
    assert f"pip install 'causal-forcing-serve[{extra}]'" in message


@pytest.mark.parametrize("error", [ValueError("a bug"), ModuleNotFoundError("No module named 'x'", name="x")])
def test_a_bug_keeps_its_traceback(outcome_of, error: Exception) -> None:
    with pytest.raises(type(error)):
        outcome_of(error)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown and command.summary in shown for name, command in cli.COMMANDS.items())


@pytest.mark.parametrize("words", [[], ["dance"], ["--loud"]])
def test_an_unknown_command_is_a_usage_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    assert "usage: causal-forcing" in capsys.readouterr().err


def test_version_from_a_fresh_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "causal_forcing.cli", "--version"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == f"causal-forcing {__version__}\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_exists_and_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert importlib.util.find_spec(cli.COMMANDS[name].module) is not None
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    assert f"usage: causal-forcing {name}" in capsys.readouterr().out
