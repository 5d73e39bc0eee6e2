"""The public proof that a store keeps the contract of `core.ports`.

Decides what every store must show, ours and anybody's: `CHECKS` is a list of coroutines, each a promise; `TOKEN_CHECKS`
holds those of `TokenStore` and of `deny_us`. For each check make two stores on one fresh name space, build a `Bench`,
and run `run_check(check, bench)`: awaited in the asynchronous colour, through `coatcheck.blocking.run_blocking` in the
blocking one. A check must never know which store it is asking.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeAlias

from coatcheck.stores.conformance import (
    counting,
    creation,
    ending,
    listing,
    reading,
    rotation,
    standing,
    tokens,
    writing,
)
from coatcheck.stores.conformance.bench import Bench, Clock, ContractBroken
from coatcheck.stores.conformance.colours import together

__all__ = [
    "CHECKS",
    "NEEDS_BYTES",
    "TOKEN_CHECKS",
    "Bench",
    "Check",
    "Clock",
    "ContractBroken",
    "run_check",
    "together",
]

Check: TypeAlias = Callable[[Bench], Coroutine[Any, Any, None]]

CHECKS: Final[tuple[Check, ...]] = (
    *creation.CHECKS,
    *reading.CHECKS,
    *writing.CHECKS,
    *rotation.CHECKS,
    *ending.CHECKS,
    *listing.CHECKS,
    *counting.CHECKS,
    *standing.CHECKS,
)

TOKEN_CHECKS: Final[tuple[Check, ...]] = tokens.CHECKS
"""What a store shows beyond `CHECKS` when it keeps refresh families, the denylist and the key ring."""

NEEDS_BYTES: Final[frozenset[Check]] = frozenset((*standing.NEEDS_BYTES, *tokens.NEEDS_BYTES))
"""Checks that need `Bench.corrupt`; a store that keeps no bytes leaves them out."""


async def run_check(check: Check, bench: Bench) -> None:
    """Open both stores, run the check, close them. Raises: ContractBroken, and what the stores raise."""
    try:
        for store in (bench.store, bench.other):
            await store.open()
        await check(bench)
    finally:
        for store in (bench.other, bench.store):
            await store.close()
