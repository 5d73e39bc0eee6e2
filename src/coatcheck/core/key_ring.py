"""The key ring: one signing key, several verifying ones, and when each changes its state.

Decides the life of a key: *published* (verifiers may fetch it, nobody signs with it yet), *signing*, *retired* (a
newer key signs, tokens of this one still verify until the longest of them has expired), and gone. A key signs only
after every verifier could have fetched it; the first key of an empty ring signs at once, because nobody can hold an
older set. It knows private keys as sealed bytes only. It must never read a clock, draw randomness or make a key.

The ring is one document in the store, replaced by compare-and-set, so that of many servers that rotate at once one
wins. Times are whole Unix seconds.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, Literal

import msgspec

from coatcheck.core.access_token import MAX_LEEWAY
from coatcheck.primitives.jwk import Algorithm
from coatcheck.primitives.seal import seal, unseal

MAX_KEYS: Final = 16
"""Keys in one ring; a rotation that would pass it is refused."""

LEARNING_SECONDS: Final = 60
"""By then every application on the store has looked at the ring again, those without tokens included."""

KeyState = Literal["published", "signing", "retired"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RingKey:
    """One key. `sealed` holds its private part, readable with the server key alone."""

    kid: str
    algorithm: Algorithm
    sealed: bytes
    published_at: int
    signs_at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRing:
    """The keys, oldest first, and what every server of the store must know of the others' tokens.

    `longest` is the longest life of any access token ever issued, in seconds; since `raised_at` it is that, before it
    was `before`. `verifier_lease` is the longest lease of any verifier, in seconds.
    """

    keys: tuple[RingKey, ...] = ()
    longest: int = 0
    before: int = 0
    raised_at: int = 0
    verifier_lease: float = 0.0

    def lifetime(self, wanted: int, now: float) -> int:
        """How long a token that is minted now may live. A longer life than any before counts only when every server
        has had the time to learn of it: else one that has not would deny the token for too short a time."""
        is_news = wanted > self.before > 0 and now < self.raised_at + LEARNING_SECONDS
        return min(wanted, self.before) if is_news else wanted

    def signing(self, now: float) -> RingKey | None:
        """The key that signs at this moment: the latest whose time has come."""
        return max((key for key in self.keys if key.signs_at <= now), key=_signs_at, default=None)

    def waiting(self, now: float) -> RingKey | None:
        """The published key that is going to sign next, if there is one."""
        return min((key for key in self.keys if key.signs_at > now), key=_signs_at, default=None)

    def state(self, key: RingKey, now: float) -> KeyState:
        """What a key of this ring is at this moment."""
        if key.signs_at > now:
            return "published"
        return "signing" if key == self.signing(now) else "retired"

    def verifies_until(self, key: RingKey) -> int | None:
        """When the last token of a key has expired everywhere; `None` while it is not known that it signs no more."""
        newer = [other.signs_at for other in self.keys if other.signs_at > key.signs_at]
        return min(newer) + self.longest + MAX_LEEWAY if newer else None

    def find(self, kid: str) -> RingKey | None:
        """The key of this name."""
        return next((key for key in self.keys if key.kid == kid), None)


def added(ring: KeyRing, key: RingKey, *, now: float, ahead: int) -> KeyRing:
    """The ring with one more key, which signs `ahead` seconds after now, or at once if nothing else signs.

    Raises: ValueError when a key is waiting already, or there are `MAX_KEYS`.
    """
    if ring.waiting(now) is not None:
        raise ValueError("a published key is waiting to sign already")
    kept = trimmed(ring, now=now)
    if len(kept.keys) >= MAX_KEYS:
        raise ValueError(f"the ring holds {MAX_KEYS} keys already")
    at = int(now)
    signs_at = at if ring.signing(now) is None else at + ahead
    return replace(kept, keys=(*kept.keys, replace(key, published_at=at, signs_at=signs_at)))


def withdrawn(ring: KeyRing, kid: str, *, now: float) -> KeyRing:
    """The ring without a key: its tokens verify no more. What signs next does so at once.

    Raises: ValueError when there is no such key, or it is the only one that could sign.
    """
    key = ring.find(kid)
    if key is None:
        raise ValueError("no such key in the ring")
    rest = replace(ring, keys=tuple(other for other in ring.keys if other != key))
    if rest.signing(now) is not None and ring.signing(now) != key:
        return rest
    heir = rest.waiting(now)
    if heir is None:
        raise ValueError("it is the only key that signs: add another one first")
    return replace(rest, keys=tuple(replace(k, signs_at=int(now)) if k == heir else k for k in rest.keys))


def trimmed(ring: KeyRing, *, now: float) -> KeyRing:
    """The ring without keys whose last token has expired."""

    def needed(key: RingKey) -> bool:
        until = ring.verifies_until(key)
        return until is None or now < until

    return replace(ring, keys=tuple(filter(needed, ring.keys)))


def noted(ring: KeyRing, *, lifetime: int, verifier_lease: float, now: float) -> KeyRing:
    """The ring, knowing that tokens may live this long and that verifiers may hear this late."""
    if lifetime > ring.longest:
        ring = replace(ring, longest=lifetime, before=ring.longest, raised_at=int(now))
    return replace(ring, verifier_lease=max(ring.verifier_lease, verifier_lease))


def is_rotation_due(ring: KeyRing, *, now: float, period: int, ahead: int, algorithm: Algorithm) -> bool:
    """Whether a new key should be published now, so that it signs when the present one has signed for `period`."""
    signing = ring.signing(now)
    if signing is None:
        return True
    if ring.waiting(now) is not None:
        return False
    return signing.algorithm != algorithm or now >= signing.signs_at + period - ahead


def is_mixed(ring: KeyRing, algorithm: Algorithm) -> bool:
    """Whether the ring holds keys of the other family, symmetric or not: the two never stand in one ring, or a public
    key could be taken for a secret (CVE-2022-29217)."""
    return any((key.algorithm == "HS256") != (algorithm == "HS256") for key in ring.keys)


def newest_first(keys: Iterable[RingKey]) -> list[RingKey]:
    """Keys as people read them: what signs latest comes first."""
    return sorted(keys, key=_signs_at, reverse=True)


def seal_key(packed: bytes, *, kid: str, server_key: bytes, nonce: bytes) -> bytes:
    """Encrypt a private key for the store; `nonce` is 12 fresh random bytes."""
    return seal(packed, secret=server_key, salt=b"coatcheck/key-ring", context=_context(kid), nonce=nonce)


def unseal_key(key: RingKey, *, server_key: bytes) -> bytes | None:
    """The private key, or `None` when it was sealed under another server key, or changed."""
    return unseal(key.sealed, secret=server_key, salt=b"coatcheck/key-ring", context=_context(key.kid))


def pack_ring(ring: KeyRing) -> bytes:
    """The stored form, version 1."""
    keys = [
        _Key(
            kid=key.kid,
            alg=key.algorithm,
            sealed=b64encode(key.sealed).decode("ascii"),
            published_at=key.published_at,
            signs_at=key.signs_at,
        )
        for key in ring.keys
    ]
    return msgspec.json.encode(
        _Ring(
            v=1,
            longest=ring.longest,
            before=ring.before,
            raised_at=ring.raised_at,
            verifier_lease=ring.verifier_lease,
            keys=keys,
        )
    )


def unpack_ring(packed: bytes) -> KeyRing:
    """Read the stored form. Raises: ValueError on bytes that `pack_ring` could not have written."""
    try:
        wire = _decoder.decode(packed)
        keys = [
            RingKey(
                kid=key.kid,
                algorithm=key.alg,
                sealed=b64decode(key.sealed, validate=True),
                published_at=key.published_at,
                signs_at=key.signs_at,
            )
            for key in wire.keys
        ]
    except (msgspec.DecodeError, RecursionError, ValueError) as broken:
        raise ValueError("not a key ring of this release") from broken
    if wire.v != 1 or len({key.kid for key in keys}) != len(keys):
        raise ValueError("not a key ring of this release")
    return KeyRing(
        keys=tuple(keys),
        longest=wire.longest,
        before=wire.before,
        raised_at=wire.raised_at,
        verifier_lease=wire.verifier_lease,
    )


class _Key(msgspec.Struct, frozen=True, kw_only=True):
    kid: str
    alg: Algorithm
    sealed: str
    published_at: int
    signs_at: int


class _Ring(msgspec.Struct, frozen=True, kw_only=True):
    v: int
    longest: int
    before: int
    raised_at: int
    verifier_lease: float
    keys: list[_Key]


_decoder: Final = msgspec.json.Decoder(_Ring)


def _context(kid: str) -> bytes:
    return b"coatcheck/key/1/" + kid.encode("utf-8", "surrogatepass")


def _signs_at(key: RingKey) -> int:
    return key.signs_at
