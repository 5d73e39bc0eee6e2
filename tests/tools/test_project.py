"""What pyproject says of the package is what the package says of itself."""

import tomllib
from pathlib import Path

import coatcheck

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_the_version_is_the_same_in_both_places() -> None:
    assert PROJECT["version"] == coatcheck.__version__


def test_the_licence_is_named_and_shipped() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text("utf-8")


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(coatcheck.__file__).parent / "py.typed").is_file()
