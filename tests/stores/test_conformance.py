"""Every store keeps every promise of the contract, in both colours."""

from __future__ import annotations

from types import ModuleType

import pytest

from coatcheck.stores import conformance
from coatcheck.stores.conformance import CHECKS, NEEDS_BYTES, TOKEN_CHECKS, Check, run_check
from tests.stores.conftest import Place

ALL = (*CHECKS, *TOKEN_CHECKS)


def _name(check: Check) -> str:
    return check.__name__.removeprefix("check_")


@pytest.mark.parametrize("check", ALL, ids=_name)
def test_store(check: Check, place: Place, seed: int) -> None:
    bench = place.bench(seed=seed)
    if check in NEEDS_BYTES and bench.corrupt is None:
        # Only a store that keeps objects instead of bytes may leave this out.
        assert place.backend.name == "memory", f"{place}: the bench cannot corrupt what is stored"
        return
    place.run(run_check(check, bench))


def test_no_check_is_forgotten() -> None:
    written = {
        name
        for module in vars(conformance).values()
        if isinstance(module, ModuleType)
        for name in vars(module)
        if name.startswith("check_")
    }
    assert written == {check.__name__ for check in ALL}
    assert len(written) == len(ALL)


def test_every_check_says_what_it_promises() -> None:
    for check in ALL:
        assert check.__doc__, check.__name__
