"""The session record and when it is alive.

Decides what a session consists of (schema 1, complete, docs/decisions/0001-formats.md), how its opaque part is
encoded, and the one rule of life: a session is alive while the store's clock is before both deadlines. Stores apply
the same rule inside their verbs; the conformance suite holds them to it. It must never read a clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal, cast

import msgspec

from coatcheck.core.activity import FLUSH_SECONDS, QUIET_SHARE
from coatcheck.core.ids import SessionRef
from coatcheck.core.values import Json, decode_value, encode_value
from coatcheck.errors import ValueRefused

SCHEMA: Final = 1
SECOND_US: Final = 1_000_000
MAX_REASON_CHARACTERS: Final = 200
MAX_SUBJECT_BYTES: Final = 255

Death = Literal["idle_timeout", "absolute_timeout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Authentication:
    """One proof that was given: its method (RFC 8176 name), when (Unix seconds), and the level it reached."""

    method: str
    at: float
    level: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundKey:
    """A key the user agent or client holds (DBSC or DPoP), as recorded on the session."""

    kind: Literal["dbsc", "dpop"]
    algorithm: str
    thumbprint: str
    public_jwk: Mapping[str, str]
    since: float
    state: str
    challenges: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Authority:
    """What a session proves and where it was given: fixed at sign-in, changed only by a rotation of the id.

    `claims` maps names to encoded values (`core.values`). `networks` holds one current address per family, under
    `"4"` and `"6"`. `proofs` counts how often the subject has proven himself since the sign-in: a refresh token from
    before the last time is dead (`core.refresh_token.Grant`). `unknown` keeps members written by a newer release, so
    that an older one does not lose them.
    """

    tenant: str = ""
    profile: str = ""
    profile_version: int = 0
    authentications: tuple[Authentication, ...] = ()
    acr: str | None = None
    amr: tuple[str, ...] = ()
    scopes: tuple[str, ...] = ()
    claims: Mapping[str, str] = field(default_factory=dict)
    device_id: str | None = None
    user_agent: str = ""
    networks: Mapping[str, str] = field(default_factory=dict)
    keys: tuple[BoundKey, ...] = ()
    binding: Literal["none", "pending", "required"] = "none"
    persistent: bool = False
    proofs: int = 0
    unknown: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSession:
    """One session as a store keeps it. Times are Unix microseconds by the store's clock.

    `authority` is opaque text to a store; `fields` maps names to encoded values; `idle_us` is the allowed silence;
    `absolute_us` is a point in time. `auth_us` is 0 and `owner` is empty for an anonymous session.
    """

    schema: int
    version: int
    ref: SessionRef
    digest: str
    owner: str
    subject: str
    created_us: int
    auth_us: int
    idle_us: int
    absolute_us: int
    authority: str
    fields: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSession:
    """A session to be created. The store adds the times: `absolute_us` is a length here, not a point in time."""

    ref: SessionRef
    digest: str
    owner: str
    subject: str
    idle_us: int
    absolute_us: int
    authority: str
    fields: Mapping[str, str]

    def at(self, created_us: int) -> StoredSession:
        """The record as of its creation; an owned session was authenticated at that moment."""
        return StoredSession(
            schema=SCHEMA,
            version=1,
            ref=self.ref,
            digest=self.digest,
            owner=self.owner,
            subject=self.subject,
            created_us=created_us,
            auth_us=created_us if self.owner else 0,
            idle_us=self.idle_us,
            absolute_us=created_us + self.absolute_us,
            authority=self.authority,
            fields=dict(self.fields),
        )


def cause_of_death(session: StoredSession, *, seen_us: int, now_us: int) -> Death | None:
    """Why a record that still exists is no longer alive, or `None` while it is.

    Alive means strictly before both deadlines: at the very microsecond of a deadline the session is over.
    """
    if now_us >= session.absolute_us:
        return "absolute_timeout"
    if now_us >= seen_us + session.idle_us:
        return "idle_timeout"
    return None


def tightened(session: StoredSession, *, idle_us: int, absolute_us: int) -> StoredSession:
    """The record under the stricter of its own limits and today's settings: tightening applies at once."""
    absolute = min(session.absolute_us, session.created_us + absolute_us)
    if idle_us >= session.idle_us and absolute == session.absolute_us:
        return session
    return replace(session, idle_us=min(session.idle_us, idle_us), absolute_us=absolute)


def last_use_us(session: StoredSession, *, seen_us: int, since_us: int) -> int:
    """The latest moment before `since_us` at which a session may have been used without a note of it in the store.

    Uses are written lazily, by a share of the idle timeout that held then (`core.activity`). Where a shorter one holds
    since `since_us`, `seen_us` says too little: nobody who was active a minute before may be signed out for it.
    """
    unwritten_us = session.idle_us // QUIET_SHARE + int(FLUSH_SECONDS * SECOND_US)
    return max(seen_us, min(seen_us + unwritten_us, since_us))


def check_subject(subject: object) -> str:
    """Return a subject that may sign in: text of 1 to 255 octets. Raises: TypeError, ValueRefused."""
    if not isinstance(subject, str):
        raise TypeError(f"a subject is text, not {type(subject).__name__}: pass str(user.id), the same text every time")
    try:
        size = len(subject.encode("utf-8"))
    except UnicodeEncodeError as broken:
        raise ValueRefused("a subject must be valid Unicode") from broken
    if not 1 <= size <= MAX_SUBJECT_BYTES or "\x00" in subject:
        raise ValueRefused(f"a subject has 1 to {MAX_SUBJECT_BYTES} octets and no NUL")
    return subject


def check_reason(reason: object) -> str:
    """Return a reason that may be kept and shown: 1 to 200 printable characters. Raises: ValueRefused."""
    if not isinstance(reason, str) or not 1 <= len(reason) <= MAX_REASON_CHARACTERS or not reason.isprintable():
        raise ValueRefused(f"a reason has 1 to {MAX_REASON_CHARACTERS} printable characters")
    return reason


def encode_claims(claims: Mapping[str, object]) -> dict[str, str]:
    """Claims in their stored form. Raises: ValueRefused."""
    return {name: encode_value(value) for name, value in claims.items()}


def decode_claims(claims: Mapping[str, str]) -> dict[str, Json]:
    """Claims as the application gave them."""
    return {name: decode_value(text) for name, text in claims.items()}


def encode_authority(authority: Authority) -> str:
    """The opaque text a store keeps: every member that is not its default, and those that a newer release wrote."""
    members: dict[str, object] = {
        "tenant": authority.tenant,
        "profile": authority.profile,
        "profile_version": authority.profile_version,
        "authentications": tuple((each.method, each.at, each.level) for each in authority.authentications),
        "acr": authority.acr,
        "amr": authority.amr,
        "scopes": authority.scopes,
        "claims": authority.claims,
        "device_id": authority.device_id,
        "user_agent": authority.user_agent,
        "networks": authority.networks,
        "keys": tuple(
            (key.kind, key.algorithm, key.thumbprint, key.public_jwk, key.since, key.state, key.challenges)
            for key in authority.keys
        ),
        "binding": authority.binding,
        "persistent": authority.persistent,
        "proofs": authority.proofs,
    }
    # Most members are at their default in most sessions; writing them would cost 100 octets in every record.
    told = {name: value for name, value in members.items() if value != _DEFAULTS[name]}
    return msgspec.json.encode({**authority.unknown, **told}).decode("utf-8")


def decode_authority(text: str) -> Authority:
    """Read the opaque text. Raises: ValueError on bytes that no release could have written."""
    members: Mapping[str, msgspec.Raw] = {}
    try:
        wire: _Wire = _known_decoder.decode(text)
    except (msgspec.DecodeError, RecursionError):
        # Seldom: a newer release wrote it, or nobody did.
        try:
            wire = _authority_decoder.decode(text)
            members = _members_decoder.decode(text)
        except (msgspec.DecodeError, RecursionError) as broken:
            raise ValueError("not an authority") from broken
    return Authority(
        tenant=wire.tenant,
        profile=wire.profile,
        profile_version=wire.profile_version,
        authentications=tuple(Authentication(method=m, at=at, level=n) for m, at, n in wire.authentications),
        acr=wire.acr,
        amr=wire.amr,
        scopes=wire.scopes,
        claims=wire.claims,
        device_id=wire.device_id,
        user_agent=wire.user_agent,
        networks=wire.networks,
        keys=tuple(
            BoundKey(
                kind=kind,
                algorithm=algorithm,
                thumbprint=thumbprint,
                public_jwk=jwk,
                since=since,
                state=state,
                challenges=challenges,
            )
            for kind, algorithm, thumbprint, jwk, since, state, challenges in wire.keys
        ),
        binding=wire.binding,
        persistent=wire.persistent,
        proofs=wire.proofs,
        unknown={name: cast(object, value) for name, value in members.items() if name not in _KNOWN},
    )


class _Wire(msgspec.Struct, frozen=True):
    tenant: str = ""
    profile: str = ""
    profile_version: int = 0
    authentications: tuple[tuple[str, float, int], ...] = ()
    acr: str | None = None
    amr: tuple[str, ...] = ()
    scopes: tuple[str, ...] = ()
    claims: dict[str, str] = msgspec.field(default_factory=dict)
    device_id: str | None = None
    user_agent: str = ""
    networks: dict[str, str] = msgspec.field(default_factory=dict)
    keys: tuple[tuple[Literal["dbsc", "dpop"], str, str, dict[str, str], float, str, tuple[str, ...]], ...] = ()
    binding: Literal["none", "pending", "required"] = "none"
    persistent: bool = False
    proofs: int = 0


class _KnownWire(_Wire, frozen=True, forbid_unknown_fields=True):
    pass


_KNOWN: Final = frozenset(_Wire.__struct_fields__)
_DEFAULTS: Final[dict[str, object]] = msgspec.structs.asdict(_Wire())
_known_decoder = msgspec.json.Decoder(_KnownWire)
_authority_decoder = msgspec.json.Decoder(_Wire)
_members_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
