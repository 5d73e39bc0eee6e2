"""Locks hold pins and hashes alone, agree with pyproject, and `serve` is a part of `dev`."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from locks import ORDER, compile_command, lock_path, locked_names, normalised

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
HASH = "    --hash=sha256:" + "a" * 64


def _pins(name: str) -> dict[str, Version]:
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", lock_path(ROOT, name).read_text("utf-8"), re.M)
    return {normalised(package): Version(version) for package, version in found}


def _requirements(name: str) -> list[Requirement]:
    extras = ["server", "redis", "postgres"] if name == "serve" else list(EXTRAS)
    texts = [*PROJECT["project"]["dependencies"], *(text for extra in extras for text in EXTRAS[extra])]
    return [Requirement(text) for text in texts + (PROJECT["dependency-groups"]["dev"] if name == "dev" else [])]


@pytest.mark.parametrize("name", ORDER)
def test_a_lock_holds_nothing_but_pins_and_hashes(name: str) -> None:
    text = lock_path(ROOT, name).read_text("utf-8")
    assert locked_names(text) == set(_pins(name))
    assert "://" not in text
    assert "index" not in re.sub(r"^[^\s=]+==", "", text, flags=re.M)


@pytest.mark.parametrize("name", ["serve", "dev"])
def test_a_lock_holds_every_requirement_of_pyproject(name: str) -> None:
    pins = _pins(name)
    for requirement in _requirements(name):
        assert pins[normalised(requirement.name)] in requirement.specifier, requirement


def test_a_development_environment_can_serve() -> None:
    assert _pins("serve").items() <= _pins("dev").items()


def test_the_package_itself_is_never_locked() -> None:
    assert all("coatcheck" not in _pins(name) for name in ORDER)


def test_the_build_backend_is_locked_for_serving() -> None:
    backends = [Requirement(text).name for text in PROJECT["build-system"]["requires"]]
    assert set(backends) <= set(_pins("serve"))


def test_requirements_have_lower_bounds_only() -> None:
    for requirement in _requirements("dev"):
        operators = [bound.operator for bound in requirement.specifier]
        assert operators == [">="], f"{requirement}: a cap takes the choice from the application"


@pytest.mark.parametrize(
    "hostile",
    [
        "--index-url https://example.invalid/simple\n",
        "--extra-index-url https://example.invalid/simple\n",
        "-i https://example.invalid/simple\n",
        "--find-links wheels\n",
        "-r other.lock\n",
        "-e .\n",
        ".\n",
        "# a comment with https://example.invalid\n",
        f"six @ https://example.invalid/six.whl \\\n{HASH}\n",
        "six==1.16.0\n",
        "six>=1.16.0\n",
        f"six>=1.16.0 \\\n{HASH}\n",
        f"six==1.16.0 --index-url https://example.invalid \\\n{HASH}\n",
        "six==1.16.0 \\\n    --hash=md5:" + "a" * 32 + "\n",
        "six==1.16.0 \\\n    --hash=sha256:" + "a" * 63 + "\n",
        "six==1.16.0 \\\n",
        f"six==1.16.0 \\\n{HASH} \\\n",
        f"six==1.16.0 \\\n{HASH} \\\nseven==1.0 \\\n{HASH}\n",
        f"{HASH}\n",
        f"six==1.16.0 \\\n\n{HASH}\n",
    ],
)
def test_anything_else_in_a_lock_is_refused(hostile: str) -> None:
    with pytest.raises(ValueError, match=r"requirement|hash"):
        locked_names(hostile)


def test_a_pin_may_carry_a_marker_and_several_hashes() -> None:
    text = f"Uv_Loop==0.23.0 ; sys_platform != 'win32' \\\n{HASH} \\\n{HASH}\nsix==1.16.0 \\\n{HASH}\n"
    assert locked_names(text) == {"uv-loop", "six"}


@pytest.mark.parametrize("name", ORDER)
def test_locking_asks_for_hashes_and_writes_no_address(name: str) -> None:
    command = compile_command(ROOT, Path("uv"), name, upgrade=False)
    assert {"--universal", "--generate-hashes", "--no-header", "--no-annotate"} <= set(command)
    assert "--upgrade" not in command
    assert str(ROOT) not in " ".join(command)
    assert "--upgrade" in compile_command(ROOT, Path("uv"), name, upgrade=True)
    assert (ROOT / "requirements" / f"{name}.in").is_file()
