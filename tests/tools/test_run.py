"""The front door reads its words one way only, and finds an interpreter that can run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import run

KNOWN = run.checks_of(run.ROOT)
REQUIRED_CHECKS = ("lint", "types", "imports", "test", "lock")


def test_every_promised_check_is_offered() -> None:
    assert set(REQUIRED_CHECKS) <= set(KNOWN)


def test_a_check_whose_folder_is_missing_is_not_offered(tmp_path: Path) -> None:
    assert "bench" not in run.checks_of(tmp_path)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__main__.py").touch()
    assert "bench" in run.checks_of(tmp_path)


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["--help", "serve"]])
def test_nothing_or_help_shows_the_help(words: list[str]) -> None:
    assert run.parse(words, KNOWN) == run.ShowHelp()


@pytest.mark.parametrize(
    ("words", "names", "options"),
    [
        (["lint"], ("lint",), ()),
        (["lint", "types", "imports", "test"], ("lint", "types", "imports", "test"), ()),
        (["test", "-k", "cookie"], ("test",), ("-k", "cookie")),
        (["lint", "test", "tests/core", "-x"], ("lint", "test"), ("tests/core", "-x")),
        (["test", "lint"], ("test", "lint"), ()),
        (["lock", "--upgrade"], ("lock",), ("--upgrade",)),
    ],
)
def test_check_names_follow_each_other_and_options_go_to_the_last(
    words: list[str], names: tuple[str, ...], options: tuple[str, ...]
) -> None:
    assert run.parse(words, KNOWN) == run.Checks(names=names, options=options)


def test_a_check_name_after_an_option_is_a_value_of_it() -> None:
    assert run.parse(["test", "-k", "types"], KNOWN) == run.Checks(names=("test",), options=("-k", "types"))


@pytest.mark.parametrize("words", [["lint", "--fix"], ["test", "types", "src"], ["lint", "serve"]])
def test_options_for_a_check_that_takes_none_are_refused(words: list[str]) -> None:
    assert isinstance(run.parse(words, KNOWN), run.Refused)


@pytest.mark.parametrize("words", [["serve"], ["user", "add", "ann"], ["--version"], ["serve", "test"]])
def test_any_other_word_goes_to_the_command_line_unchanged(words: list[str]) -> None:
    assert run.parse(words, KNOWN) == run.CommandLine(words=tuple(words))


def test_a_refused_request_ends_with_status_two_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["lint", "--fix"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_help_names_every_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in KNOWN)


def test_full_is_told_by_a_variable_and_not_to_pytest() -> None:
    [command] = KNOWN["test"].commands(["--full", "-x"], run.ROOT)
    assert command.variables == {"COATCHECK_TEST_FULL": "1"}
    assert "--full" not in command.arguments
    assert command.arguments[-1] == "-x"


def test_tests_run_on_two_workers_unless_told_otherwise() -> None:
    [usual] = KNOWN["test"].commands([], run.ROOT)
    assert usual.arguments[3:] == ("-n", "2", "--dist", "loadgroup")
    for option in ("-n0", "-n", "--numprocesses=4", "--pdb"):
        [chosen] = KNOWN["test"].commands([option], run.ROOT)
        assert chosen.arguments[3:] == (option,)


posix_only = pytest.mark.skipif(os.name == "nt", reason="the shell script is the front door of POSIX systems")


def _front_door(folder: Path, interpreters: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a copy of `run` that finds only these interpreters, each a shell script."""
    (folder / "tools").mkdir()
    script = folder / "run"
    script.write_bytes((run.ROOT / "run").read_bytes())
    programs = folder / "programs"
    programs.mkdir()
    for name in ("dirname", "sh"):
        real = next(Path(part) / name for part in ("/usr/bin", "/bin") if (Path(part) / name).exists())
        (programs / name).symlink_to(real)
    for name, text in interpreters.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    return subprocess.run(
        [str(programs / "sh"), str(script), "serve", "a b"],
        env={"PATH": str(programs)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


_WORKS = 'if [ "$1" = -S ]; then exit 0; fi; echo "$0 $*"'
_TOO_OLD = 'if [ "$1" = -S ]; then exit 1; fi; echo must not run'


@posix_only
def test_an_interpreter_that_is_too_old_is_passed_over(tmp_path: Path) -> None:
    done = _front_door(tmp_path, {"python3.12": _TOO_OLD, "python3.11": _WORKS, "python3": _TOO_OLD})
    programs = tmp_path / "programs"
    assert done.stdout.strip() == f"{programs}/python3.11 {tmp_path}/tools/run.py serve a b"


@posix_only
def test_no_interpreter_ends_with_status_two_and_names_the_cure(tmp_path: Path) -> None:
    done = _front_door(tmp_path, {"python3": _TOO_OLD})
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert "install it" in line


@posix_only
def test_the_front_door_works_from_a_folder_with_spaces(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    done = _front_door(folder, {"python3": _WORKS})
    assert f"{folder}/tools/run.py" in done.stdout


@posix_only
def test_the_help_needs_nothing_installed(tmp_path: Path) -> None:
    for name in ("run.py", "environment.py", "locks.py"):
        (tmp_path / name).write_bytes((run.ROOT / "tools" / name).read_bytes())
    done = subprocess.run(
        [sys.executable, "-S", "-E", str(tmp_path / "run.py"), "--help"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout.startswith("usage: ./run")
