"""Keep the key ring in order: the first key, rotation when it is due, withdrawal of a key that leaked.

Decides only the loop around the rules of `core.key_ring`: read, decide, replace if nobody else did meanwhile, and
begin again if somebody did. Of many servers that rotate at once one wins, and all go on with the ring that stands.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from coatcheck.core.key_ring import (
    KeyRing,
    RingKey,
    added,
    is_mixed,
    is_rotation_due,
    noted,
    pack_ring,
    trimmed,
    unpack_ring,
    withdrawn,
)
from coatcheck.core.ports import TokenStore
from coatcheck.errors import ConfigurationError, StoreUnavailable, ValueRefused
from coatcheck.primitives.jwk import Algorithm

_TRIES: Final = 20

MakeKey = Callable[[Algorithm], RingKey]
"""Makes a sealed key of an algorithm; its times are set by the ring."""

Opens = Callable[[RingKey], object]
"""Opens a key of the ring, or raises ConfigurationError: who cannot open what stands there must not add to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RingRules:
    """Seconds: how long a token lives, how long a key signs, how long before that it is published, how late verifiers
    may hear."""

    algorithm: Algorithm
    lifetime: int
    period: int
    ahead: int
    verifier_lease: float


async def read(store: TokenStore) -> tuple[int, KeyRing]:
    """The ring as it stands, with its version; version 0 and empty where there is none yet.

    Raises: StoreUnavailable, also for bytes that no release could have written: a damaged ring is restored from a
    backup or removed by an operator, never replaced in passing.
    """
    stored = await store.read_ring()
    if stored is None:
        return 0, KeyRing()
    try:
        return stored[0], unpack_ring(stored[1])
    except ValueError as broken:
        raise StoreUnavailable("the key ring in the store cannot be read; restore a backup") from broken


async def upkeep(
    store: TokenStore, rules: RingRules, make: MakeKey, opens: Opens, *, now: float
) -> tuple[KeyRing, tuple[str, ...]]:
    """The ring after whatever was due: a key at all, a rotation, a longer token life noted, old keys dropped.

    Returns the ring and the `kid`s this call added. Usually one store command, two when something was due. Nothing is
    written unless every key of the ring can be opened here. Raises: ConfigurationError for another server key or a
    ring of the other kind of algorithm, StoreUnavailable.
    """

    def change(ring: KeyRing) -> KeyRing:
        if is_mixed(ring, rules.algorithm):
            raise ConfigurationError(
                f"tokens.algorithm: {rules.algorithm} never stands in one ring with the {ring.keys[0].algorithm} keys "
                "of this store; use the same kind on every server, or end the old ring and all its access tokens with "
                "`coatcheck key retire --all`"
            )
        _open_all(ring, opens)
        ring = noted(trimmed(ring, now=now), lifetime=rules.lifetime, verifier_lease=rules.verifier_lease, now=now)
        if is_rotation_due(ring, now=now, period=rules.period, ahead=rules.ahead, algorithm=rules.algorithm):
            # A full ring means that servers disagree about the algorithm; it must not stop any of them.
            with contextlib.suppress(ValueError):
                ring = added(ring, make(rules.algorithm), now=now, ahead=rules.ahead)
        return ring

    return await _replace(store, change)


async def rotate_key(
    store: TokenStore, rules: RingRules, make: MakeKey, opens: Opens, *, now: float
) -> tuple[KeyRing, tuple[str, ...]]:
    """Publish a new key, which signs as soon as every verifier could have fetched it.

    Raises: ValueRefused when one is waiting already, ConfigurationError, StoreUnavailable.
    """

    def change(ring: KeyRing) -> KeyRing:
        _open_all(ring, opens)
        return added(ring, make(rules.algorithm), now=now, ahead=rules.ahead)

    return await _replace(store, change)


async def retire_key(
    store: TokenStore, rules: RingRules, make: MakeKey, *, kid: str, now: float
) -> tuple[KeyRing, tuple[str, ...]]:
    """Withdraw a key at once: no token of it verifies from the next look at the ring on. What follows signs at once.

    Raises: ValueRefused when there is no such key, StoreUnavailable.
    """

    def change(ring: KeyRing) -> KeyRing:
        key = ring.find(kid)
        if key is not None and ring.signing(now) == key and ring.waiting(now) is None:
            ring = added(ring, make(rules.algorithm), now=now, ahead=rules.ahead)
        return withdrawn(ring, kid, now=now)

    return await _replace(store, change)


async def retire_all(store: TokenStore) -> KeyRing:
    """End the ring: no token of it verifies any more, and whoever issues next begins a new one. What is known of token
    lives stays. Needs no server key, so it is the way out when that is lost. Raises: StoreUnavailable."""
    ring, _ = await _replace(store, lambda ring: replace(ring, keys=()))
    return ring


def _open_all(ring: KeyRing, opens: Opens) -> None:
    for key in ring.keys:
        opens(key)


async def _replace(store: TokenStore, change: Callable[[KeyRing], KeyRing]) -> tuple[KeyRing, tuple[str, ...]]:
    for _ in range(_TRIES):
        version, ring = await read(store)
        try:
            wanted = change(ring)
        except ValueError as refused:
            raise ValueRefused(f"key: {refused}") from refused
        if wanted == ring:
            return ring, ()
        if await store.write_ring(pack_ring(wanted), expected=version):
            known = {key.kid for key in ring.keys}
            return wanted, tuple(key.kid for key in wanted.keys if key.kid not in known)
    raise StoreUnavailable("the key ring is being changed by too many at once")


def check_unsealed(packed: bytes | None, key: RingKey) -> bytes:
    """The private key. Raises: ConfigurationError when this server's key is not the one it was sealed under."""
    if packed is None:
        raise ConfigurationError(
            f"server_key: signing key {key.kid[:16]} in the store was sealed under another server key; give every "
            "server of this store the same one"
        )
    return packed
