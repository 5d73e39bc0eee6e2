"""The front door: `./run WORD ...` prepares the checkout's environment, then does what the word says.

Check names run the project's checks, any other word is handed to the `coatcheck` command line.
Only the standard library is imported, because this file runs before anything is installed.
It must never change a file of the repository, except that `lock` rewrites the locks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

import locks
from environment import CannotPrepare, Environment, refusal, say

ROOT: Final = Path(__file__).resolve().parent.parent
USAGE_ERROR: Final = 2
_PYTHON_FOLDERS: Final = ("src", "tests", "tools", "bench", "lab", "examples")

_HELP: Final = """\
usage: ./run serve [options]            the server, on http://127.0.0.1:8000
       ./run CHECK [CHECK ...] [options of the last one]
       ./run WORD ...                   is coatcheck WORD ... (user, session, migrate, doctor, ...)

checks
{checks}

The first run makes .venv and installs what is missing from hash-pinned locks; later runs install
again only when a lock, pyproject.toml or Python has changed. PYTHON=python3.13 ./run ... chooses
the interpreter. ./run --help shows this; .venv/bin/coatcheck --help shows the command line of coatcheck.
"""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One program to run for a check, with variables added to its environment."""

    arguments: tuple[str, ...]
    variables: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Check:
    """A named check: what it is for, whether words may follow it, and its commands."""

    summary: str
    takes_options: bool
    commands: Callable[[Sequence[str], Path], list[Command]]


@dataclass(frozen=True, kw_only=True)
class Checks:
    """Run these checks in this order; `options` belong to the last."""

    names: tuple[str, ...]
    options: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """Hand these words to `coatcheck`."""

    words: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ShowHelp:
    """Print what `./run` can do."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """The words make no sense together; `reason` is one line."""

    reason: str


Request = Checks | CommandLine | ShowHelp | Refused


def parse(words: Sequence[str], known: Mapping[str, Check]) -> Request:
    """What the words after `./run` ask for.

    Check names may follow each other. From the first word that is none, everything belongs to the
    last check named, so `./run lint test -k types` is two checks and not three.
    """
    if not words or words[0] in ("-h", "--help"):
        return ShowHelp()
    names: list[str] = []
    for word in words:
        if word not in known:
            break
        names.append(word)
    options = tuple(words[len(names) :])
    if not names:
        return CommandLine(words=options)
    if options and not known[names[-1]].takes_options:
        return Refused(reason=f"{names[-1]} takes no options, so {options[0]!r} has no meaning here.")
    return Checks(names=tuple(names), options=options)


def checks_of(root: Path) -> dict[str, Check]:
    """The checks that this checkout offers; one whose folder is not there is not offered."""
    offered = {
        "lint": Check(summary="ruff: rules and formatting", takes_options=False, commands=_lint),
        "types": Check(summary="mypy --strict and basedpyright", takes_options=False, commands=_types),
        "imports": Check(summary="import-linter: the layer contract", takes_options=False, commands=_imports),
        "test": Check(
            summary="pytest on real servers; --full for the long runs, other options go to pytest",
            takes_options=True,
            commands=_test,
        ),
        "bench": Check(summary="benchmarks; options go to them", takes_options=True, commands=_bench),
        "lock": Check(
            summary="resolve requirements/*.in into their locks again; --upgrade takes newer versions",
            takes_options=True,
            commands=_lock,
        ),
    }
    if not (root / "bench" / "__main__.py").is_file():
        del offered["bench"]
    return offered


def _command(*arguments: str, **variables: str) -> Command:
    return Command(arguments=arguments, variables=variables)


def _lint(_options: Sequence[str], _root: Path) -> list[Command]:
    return [_command("ruff", "check", "."), _command("ruff", "format", "--check", ".")]


def _types(_options: Sequence[str], root: Path) -> list[Command]:
    folders = [folder for folder in _PYTHON_FOLDERS if (root / folder).is_dir()]
    return [_command("mypy", *folders), _command("basedpyright", *folders)]


def _imports(_options: Sequence[str], _root: Path) -> list[Command]:
    return [_command("lint-imports")]


def _test(options: Sequence[str], _root: Path) -> list[Command]:
    """pytest over two workers; tests that share a real server name the group they run in."""
    full = {"COATCHECK_TEST_FULL": "1"} if "--full" in options else {}
    passed = [option for option in options if option != "--full"]
    # A debugger needs the terminal, which a worker process does not have.
    alone = "--pdb" in passed or any(option.startswith(("-n", "--numprocesses")) for option in passed)
    workers = [] if alone else ["-n", "2", "--dist", "loadgroup"]
    return [_command("python", "-m", "pytest", *workers, *passed, **full)]


def _bench(options: Sequence[str], _root: Path) -> list[Command]:
    return [_command("python", "-m", "bench", *options)]


def _lock(options: Sequence[str], root: Path) -> list[Command]:
    upgrade = "--upgrade" in options
    uv = Path("uv")
    return [_command(*locks.compile_command(root, uv, name, upgrade=upgrade)) for name in locks.ORDER]


def run_checks(request: Checks, environment: Environment, known: Mapping[str, Check]) -> int:
    """Run every check, also after one has failed; 0 when all passed, 1 otherwise."""
    import subprocess

    if any(name != "lock" for name in request.names):
        environment.prepare("dev")
    failed: list[str] = []
    for position, name in enumerate(request.names, start=1):
        if name == "lock":
            environment.prepare_installer()
        options = request.options if position == len(request.names) else ()
        for command in known[name].commands(options, environment.root):
            say(" ".join([f"{name}:", *command.arguments]))
            program = str(environment.program(command.arguments[0]))
            done = subprocess.run(
                [program, *command.arguments[1:]],
                cwd=environment.root,
                env={**environment.variables(os.environ), **command.variables},
                check=False,
            )
            if done.returncode != 0 and name not in failed:
                failed.append(name)
    if failed:
        say(f"failed: {' '.join(failed)}")
        return 1
    say(f"passed: {' '.join(request.names)}")
    return 0


def run_command_line(request: CommandLine, environment: Environment) -> NoReturn:
    """Become `coatcheck WORD ...`: signals, terminal and exit status are its own."""
    environment.prepare("serve")
    program = str(environment.program("coatcheck"))
    arguments = [program, *request.words]
    if sys.platform == "win32":
        import subprocess

        # On Windows an exec returns to the shell at once, so this process waits instead.
        done = subprocess.run(arguments, env=environment.variables(os.environ), check=False)
        sys.exit(done.returncode)
    os.execve(program, arguments, environment.variables(os.environ))


def help_text(known: Mapping[str, Check]) -> str:
    """The text of `./run --help`."""
    return _HELP.format(checks="\n".join(f"  {name:<9} {check.summary}" for name, check in known.items()))


def main(words: Sequence[str]) -> int:
    """Carry out `./run WORDS`; 0 fine, 1 a check failed, 2 the request or the machine is not ready."""
    reason = refusal(sys.version_info[:2], sys.executable)
    if reason is not None:
        say(reason)
        return USAGE_ERROR
    known = checks_of(ROOT)
    environment = Environment(ROOT)
    request = parse(words, known)
    try:
        match request:
            case ShowHelp():
                print(help_text(known), end="")
                return 0
            case Refused():
                say(f"{request.reason} See ./run --help.")
                return USAGE_ERROR
            case Checks():
                return run_checks(request, environment, known)
            case CommandLine():
                run_command_line(request, environment)
    except CannotPrepare as failure:
        say(str(failure))
        return USAGE_ERROR
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
