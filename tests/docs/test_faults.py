"""The page about faults names every test of the fault file, once, with the stores it runs on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coatcheck import Settings
from tests.docs.test_reference import REFERENCE, rows
from tests.system import near_parts, test_near_faults

PAGE = (REFERENCE / "faults.md").read_text("utf-8")
STORES = {
    "SQLite": "sqlite",
    "PostgreSQL": "postgres",
    "Valkey": "valkey",
    "Sentinel": "sentinel",
    "Cluster": "cluster",
}
HEADING = ("fault", *STORES, "what a reader does", "test")
# Tests that make their store themselves, and so name it nowhere else.
OWN_STORE = {
    "test_a_database_that_is_restored_from_a_backup": {"postgres"},
    "test_an_old_primary_that_needs_its_replica_is_believed_for_one_lease": {"sentinel"},
    "test_an_old_primary_that_needs_no_replica_is_believed_until_the_sides_meet": {"sentinel"},
}


def described() -> dict[str, set[str]]:
    """The stores of each test, as the page has them."""
    found: dict[str, set[str]] = {}
    for row in rows(PAGE, *HEADING):
        cells = dict(zip(HEADING, row, strict=True))
        name = cells["test"].strip("`")
        assert name not in found, f"{name} stands there twice"
        found[name] = {store for column, store in STORES.items() if cells[column] != "-"}
    return found


def harmed() -> Iterator[tuple[str, Any]]:
    for name, value in vars(test_near_faults).items():
        if name.startswith("test_"):
            yield name, value


def stores_of(name: str, test: Any) -> set[str]:
    for mark in getattr(test, "pytestmark", ()):
        if mark.name == "parametrize" and mark.args[0] == "stage":
            return {str(each.values[0]) for each in mark.args[1]}
    return OWN_STORE[name]


def test_every_fault_is_described_with_its_stores_and_no_other() -> None:
    assert described() == {name: stores_of(name, test) for name, test in harmed()}


def test_every_durable_store_is_harmed_in_several_ways() -> None:
    for store in STORES.values():
        assert sum(store in stores for stores in described().values()) >= 5, store


def test_the_times_that_are_promised_are_those_that_are_judged_by() -> None:
    text = " ".join(PAGE.split())
    assert "the default lease of one second" in text
    assert Settings().lease.total_seconds() == near_parts.LEASE_SECONDS == 1
    assert "within two seconds of the end" in text
    assert near_parts.RECOVERY_SECONDS == 2


def test_the_commands_lead_to_the_fault_file_and_other_files_that_are_named_exist() -> None:
    root = Path(__file__).resolve().parents[2]
    for path in set(re.findall(r"tests/[\w/]+\.py", PAGE)):
        assert (root / path).is_file(), path
