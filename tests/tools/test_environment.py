"""The environment is made again when something changed, by one start at a time, and never made smaller."""

import json
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import environment
from environment import CannotPrepare, Environment, Selection, Stamp, Work, decide, read_stamp, refusal

DEV = Stamp(selection="dev", python="CPython 3.11.7", root="/here", lock="d1", project="p1")
SERVE = replace(DEV, selection="serve", lock="s1")


def _current(selection: Selection) -> Stamp:
    return DEV if selection == "dev" else SERVE


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 14), (4, 0)])
def test_python_from_3_11_on_is_accepted(version: tuple[int, int]) -> None:
    assert refusal(version, "python") is None


@pytest.mark.parametrize("version", [(3, 10), (3, 9), (2, 7)])
def test_an_older_python_is_refused_by_name(version: tuple[int, int]) -> None:
    reason = refusal(version, "/some/python")
    assert reason is not None
    assert "3.11" in reason
    assert "/some/python" in reason


def test_an_unchanged_environment_needs_nothing() -> None:
    assert decide(DEV, _current, "dev") is None
    assert decide(SERVE, _current, "serve") is None


def test_serving_from_a_development_environment_installs_nothing() -> None:
    assert decide(DEV, _current, "serve") is None


def test_a_stale_development_environment_stays_one_when_serving() -> None:
    assert decide(replace(DEV, lock="d0"), _current, "serve") == Work(stamp=DEV, create=False, install=True)


def test_checks_enlarge_a_serving_environment() -> None:
    assert decide(SERVE, _current, "dev") == Work(stamp=DEV, create=False, install=True)


def test_no_stamp_means_install_everything() -> None:
    assert decide(None, _current, "serve") == Work(stamp=SERVE, create=False, install=True)


def test_a_changed_pyproject_only_links_again() -> None:
    assert decide(replace(DEV, project="p0"), _current, "dev") == Work(stamp=DEV, create=False, install=False)


@pytest.mark.parametrize("stale", [replace(DEV, python="CPython 3.12.1"), replace(DEV, root="/moved")])
def test_another_interpreter_or_a_moved_tree_makes_it_from_nothing(stale: Stamp) -> None:
    assert decide(stale, _current, "dev") == Work(stamp=DEV, create=True, install=True)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b'{"selection": "dev"',
        json.dumps({**asdict(DEV), "more": "x"}).encode(),
        json.dumps({**asdict(DEV), "selection": "all"}).encode(),
    ],
)
def test_a_damaged_stamp_counts_as_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "stamp.json"
    path.write_bytes(content)
    assert read_stamp(path) is None


def test_a_written_stamp_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "stamp.json"
    path.write_text(json.dumps(asdict(DEV)))
    assert read_stamp(path) == DEV
    assert read_stamp(tmp_path / "missing.json") is None


def test_programs_find_the_environment_first(tmp_path: Path) -> None:
    made = Environment(tmp_path)
    inner = made.variables({"PATH": "/usr/bin", "PYTHONHOME": "/elsewhere", "LANG": "C"})
    assert inner["PATH"].startswith(str(made.scripts))
    assert inner["PATH"].endswith("/usr/bin")
    assert inner["VIRTUAL_ENV"] == str(tmp_path / ".venv")
    assert inner["LANG"] == "C"
    assert "PYTHONHOME" not in inner


@pytest.mark.parametrize(
    "output",
    [
        "Failed to establish a new connection: [Errno -3] Temporary failure in name resolution",
        "Failed to establish a new connection: [Errno 101] Network is unreachable",
        "urlopen error [Errno 11001] getaddrinfo failed",
        "error: Failed to fetch\n  Caused by: error sending request\n  Caused by: dns error",
    ],
)
def test_a_missing_network_is_recognised(output: str) -> None:
    assert environment.is_network_failure(output)


@pytest.mark.parametrize(
    "output",
    [
        "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.",
        "ERROR: No matching distribution found for msgspec==99",
        "OSError: [Errno 28] No space left on device",
    ],
)
def test_other_failures_are_not_blamed_on_the_network(output: str) -> None:
    assert not environment.is_network_failure(output)


class _Recorded(Environment):
    """An environment whose interpreter and installation are pretended; both can be steered."""

    def __init__(self, root: Path, installing: Callable[[], object] = lambda: None) -> None:
        super().__init__(root)
        self.installations = 0
        self._installing = installing

    def _is_usable(self) -> bool:
        return self.python.exists()

    def _create(self) -> None:
        self.scripts.mkdir(parents=True)
        self.python.touch()

    def _run(self, command: list[str]) -> bool:
        if "sync" in command:
            self.installations += 1
            self._installing()
        return True


def _checkout(folder: Path) -> Path:
    pin = f"six==1.16.0 \\\n    --hash=sha256:{'0' * 64}\n"
    (folder / "requirements").mkdir()
    for name in ("installer", "serve", "dev"):
        (folder / "requirements" / f"{name}.lock").write_text(pin)
    (folder / "pyproject.toml").write_text("[project]\n")
    return folder


def test_a_second_start_installs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = _Recorded(_checkout(tmp_path))
    made.prepare("dev")
    steps = capsys.readouterr().err.splitlines()
    assert [step.split("]")[0] for step in steps] == [f"run: [{number}/4" for number in (1, 2, 3, 4)]
    made.prepare("dev")
    made.prepare("serve")
    assert made.installations == 1
    assert capsys.readouterr().err == ""


def test_a_changed_lock_installs_again(tmp_path: Path) -> None:
    made = _Recorded(_checkout(tmp_path))
    made.prepare("dev")
    lock = tmp_path / "requirements" / "dev.lock"
    lock.write_text(lock.read_text().replace("1.16.0", "1.17.0"))
    made.prepare("serve")
    assert made.installations == 2
    stamp = read_stamp(tmp_path / ".venv" / "coatcheck-stamp.json")
    assert stamp is not None
    assert stamp.selection == "dev"


def test_an_installation_that_is_cut_off_is_seen_as_none(tmp_path: Path) -> None:
    def cut_off() -> None:
        raise KeyboardInterrupt

    made = _Recorded(_checkout(tmp_path), installing=cut_off)
    with pytest.raises(KeyboardInterrupt):
        made.prepare("dev")
    again = _Recorded(tmp_path)
    again.prepare("dev")
    assert again.installations == 1


def test_two_starts_at_once_install_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first_installs, second_waits = threading.Event(), threading.Event()

    def hold() -> None:
        first_installs.set()
        assert second_waits.wait(30)

    def heard(text: str) -> None:
        if "another ./run" in text:
            second_waits.set()

    monkeypatch.setattr(environment, "say", heard)
    first, second = _Recorded(_checkout(tmp_path), installing=hold), _Recorded(tmp_path)
    threads = [threading.Thread(target=first.prepare, args=("dev",))]
    threads[0].start()
    assert first_installs.wait(30)
    threads.append(threading.Thread(target=second.prepare, args=("dev",)))
    threads[1].start()
    for thread in threads:
        thread.join(30)
    assert (first.installations, second.installations) == (1, 0)


def test_a_python_without_venv_is_one_line_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CannotPrepare, match=r"apt install python3\.\d+-venv") as failure:
        Environment(_checkout(tmp_path)).prepare("serve")
    assert "\n" not in str(failure.value)


def test_a_checkout_without_its_lock_says_which_file_is_missing(tmp_path: Path) -> None:
    (_checkout(tmp_path) / "requirements" / "dev.lock").unlink()
    with pytest.raises(CannotPrepare, match=r"dev\.lock is missing"):
        _Recorded(tmp_path).prepare("dev")


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("Temporary failure in name resolution", "cannot be reached"),
        ("THESE PACKAGES DO NOT MATCH THE HASHES", r"install\.log"),
    ],
)
def test_a_failed_installation_is_one_line_with_the_cure(tmp_path: Path, output: str, reason: str) -> None:
    made = Environment(_checkout(tmp_path))
    made.scripts.mkdir(parents=True)
    made.python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\necho "{output}"\nexit 1\n')
    made.python.chmod(0o755)
    with pytest.raises(CannotPrepare, match=reason) as failure:
        made.prepare("serve")
    assert "\n" not in str(failure.value)
