"""What an application asks for when it signs somebody in.

Decides the bounds of subject, claims, scopes, methods and of what may be carried over from an anonymous session, so
that nothing unbounded or malformed reaches a record or, later, a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from coatcheck.core.session import check_subject, encode_claims
from coatcheck.core.values import check_name
from coatcheck.errors import ValueRefused

MAX_KEPT_FIELDS: Final = 16
MAX_SCOPES: Final = 64
MAX_METHODS: Final = 8
MAX_CLAIMS: Final = 32
MAX_CLAIM_OCTETS: Final = 4096
MAX_DEVICE_CHARACTERS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SignIn:
    """A checked wish to sign in; claims and fields are already encoded."""

    subject: str
    claims: Mapping[str, str]
    scopes: tuple[str, ...]
    amr: tuple[str, ...]
    acr: str | None
    persistent: bool
    fields: Mapping[str, str]
    device_id: str | None = None


def sign_in(
    subject: str,
    claims: Mapping[str, object],
    scopes: Sequence[str],
    amr: Sequence[str],
    acr: str | None,
    persistent: bool,
    device_id: str | None = None,
) -> SignIn:
    """Check what an application asked for. Raises: TypeError, ValueRefused."""
    if isinstance(scopes, str) or len(scopes) > MAX_SCOPES or not all(_is_token(scope) for scope in scopes):
        raise ValueRefused(
            f"scopes: a tuple of at most {MAX_SCOPES}, without spaces or control characters (RFC 6749 s3.3)"
        )
    methods = check_amr(amr)
    if device_id is not None and not (_is_token(device_id) and len(device_id) <= MAX_DEVICE_CHARACTERS):
        raise ValueRefused(f"device: at most {MAX_DEVICE_CHARACTERS} characters, no spaces or control characters")
    return SignIn(
        subject=check_subject(subject),
        claims=check_claims(claims),
        scopes=tuple(scopes),
        amr=methods,
        acr=acr,
        persistent=persistent,
        fields={},
        device_id=device_id,
    )


def check_amr(amr: Sequence[str]) -> tuple[str, ...]:
    """The methods of one proof. Raises: ValueRefused."""
    if isinstance(amr, str) or not 1 <= len(amr) <= MAX_METHODS or not all(_is_token(method) for method in amr):
        raise ValueRefused(f"amr: a tuple of 1 to {MAX_METHODS} method names, as in RFC 8176")
    return tuple(amr)


def check_claims(claims: Mapping[str, object]) -> dict[str, str]:
    """Claims in their stored form. Raises: ValueRefused for a bad name or value, too many, or too much."""
    encoded = encode_claims({check_name(name): value for name, value in claims.items()})
    octets = sum(len(name.encode()) + len(text) for name, text in encoded.items())
    if len(encoded) > MAX_CLAIMS or octets > MAX_CLAIM_OCTETS:
        raise ValueRefused(
            f"claims: at most {MAX_CLAIMS}, and {MAX_CLAIM_OCTETS} octets together; they travel in every access token"
        )
    return encoded


def _is_token(text: object) -> bool:
    return (
        isinstance(text, str)
        and 1 <= len(text) <= 128
        and text.isascii()
        and text.isprintable()
        and not set(text) & set(' "\\')
    )


def check_keep(keep: Sequence[str]) -> tuple[str, ...]:
    """The fields that may be carried through a sign-in; an attacker may have chosen their values."""
    if isinstance(keep, str) or len(keep) > MAX_KEPT_FIELDS:
        raise ValueRefused(f"keep: a tuple of at most {MAX_KEPT_FIELDS} field names")
    return tuple(check_name(name) for name in keep)
