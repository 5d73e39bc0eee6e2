"""Access tokens: JWTs as RFC 9068 describes them, minted and verified by one strict rule.

Decides what an access token of ours says and which texts are one. The order of `verify_access_token` is the rule:
nothing of a token is believed, and of its claims nothing is even parsed, before its signature is right; the key decides
the algorithm, never the token; every token has exactly one spelling that is accepted. It must never follow an address
or use a key found in a token, read a clock, draw randomness or wait for anything. Whether a token has been revoked is
not decided here.

    jti   kind(1) tag(2) random(15)   18 bytes, 24 characters; the tag says where its session lives

Left out on purpose: `alg` none, `crit`, compression, encryption, detached payloads and any other member of the header.
Tokens bound to a key (`cnf`, RFC 9449) are refused until the proof is checked too: as bearer tokens they would be worth
more to a thief than to their owner.
"""

from __future__ import annotations

import json
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Final, Literal, NoReturn, TypeAlias

import msgspec
from msgspec import UNSET, Meta, UnsetType

from coatcheck.core.values import Json, decode_value
from coatcheck.errors import ConfigurationError, TokenInvalid, ValueRefused
from coatcheck.primitives.jwk import SigningKey, VerifyingKey, decode_base64url, encode_base64url

MAX_TOKEN: Final = 8192
"""Octets of a token; what is longer is refused unread, and not minted."""
MAX_LEEWAY: Final = 60
MAX_LIFETIME: Final = 86_400
"""Seconds from `iat` to `exp` at most, the most that settings allow. A token for ten years is a mistake, whoever signed
it: nobody keeps a denylist that long."""

RESERVED_CLAIMS: Final = frozenset(
    {
        # What we write ourselves (RFC 7519 s4.1, RFC 9068 s2.2).
        *("iss", "sub", "aud", "client_id", "jti", "sid", "iat", "nbf", "exp", "scope", "auth_time", "acr", "amr"),
        # What changes who may use a token, or for whom (RFC 7800, RFC 8693, OpenID Connect Core s2).
        *("cnf", "act", "may_act", "azp"),
        # What belongs to tokens of another kind: id_token, logout token, DPoP proof, introspection answer.
        *("nonce", "at_hash", "c_hash", "s_hash", "sub_jwk", "events", "toe", "txn", "htm", "htu", "ath"),
        *("token_introspection", "active", "token_type"),
        # Members of a header, which have no meaning here and must get none.
        *("alg", "typ", "kid", "crit"),
    }
)
"""Names that an application's claims cannot have, because they mean something to whoever verifies a token."""

Cause: TypeAlias = Literal[
    "size",
    "shape",
    "header",
    "unknown_key",
    "algorithm",
    "spelling",
    "signature",
    "duplicate_member",
    "claims",
    "issuer",
    "audience",
    "expired",
    "not_yet_valid",
]
"""Why a token was refused (`TokenInvalid.cause`), for logs and metrics."""

_KIND_JTI: Final = 0x41
_JTI_SHAPE: Final = re.compile(r"[A-Za-z0-9_-]{24}")
_SCOPE: Final = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+(?: [\x21\x23-\x5b\x5d-\x7e]+)*")
_BASE64URL: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_MAX_HEADER: Final = 512
_MAX_HEADERS_KEPT: Final = 64

_Text = Annotated[str, Meta(min_length=1, max_length=1024)]
# 2^53: what every JSON reader of the world holds exactly (RFC 7493 s2.2).
_Seconds = Annotated[int, Meta(ge=0, le=2**53)]


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessToken:
    """What a verified access token says. Times are Unix seconds by the issuer's clock.

    `claims` are the application's own, as `mint_access_token` was given them; `auth_time` is 0 when the token does not
    say, which is never fresh. The text of the token is not kept here.
    """

    issuer: str
    subject: str
    audience: tuple[str, ...]
    client_id: str
    id: str
    sid: str | None
    issued_at: int
    expires_at: int
    scopes: tuple[str, ...]
    auth_time: float
    acr: str | None
    amr: tuple[str, ...]
    claims: Mapping[str, Json]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRules:
    """What a verifier accepts: tokens of exactly one issuer, for one of its own audiences.

    `leeway` is the tolerated clock difference, 0 to 60 s; every second of it lengthens the life of each token.
    Raises: ConfigurationError.
    """

    issuer: str
    audiences: frozenset[str]
    leeway: int = 0

    def __post_init__(self) -> None:
        if not self.issuer:
            raise ConfigurationError("issuer: the URL that tokens name as `iss` is missing")
        # A text is a collection of letters, too: "api" must not mean the audiences "a", "p" and "i".
        if not isinstance(self.audiences, frozenset) or not self.audiences or not all(self.audiences):
            raise ConfigurationError("audiences: a set with at least one name is needed, else any token would do")
        if not 0 <= self.leeway <= MAX_LEEWAY:
            raise ConfigurationError(f"leeway: 0 to {MAX_LEEWAY} s, not {self.leeway}")


class _Claims(msgspec.Struct, kw_only=True, omit_defaults=True, gc=False):
    """The claims we read, with their types and bounds; a member that is null is refused like any other wrong type."""

    iss: _Text
    sub: _Text
    aud: _Text | Annotated[list[_Text], Meta(min_length=1, max_length=32)]
    # RFC 6749 appendix A.1 allows the empty text; the first party has it.
    client_id: Annotated[str, Meta(max_length=1024)]
    jti: Annotated[str, Meta(min_length=1, max_length=128)]
    iat: _Seconds
    exp: _Seconds
    nbf: _Seconds | UnsetType = UNSET
    sid: _Text | UnsetType = UNSET
    scope: str | UnsetType = UNSET
    auth_time: _Seconds | Annotated[float, Meta(ge=0, le=2**53)] | UnsetType = UNSET
    acr: _Text | UnsetType = UNSET
    amr: Annotated[list[_Text], Meta(max_length=32)] | UnsetType = UNSET


_OURS: Final = frozenset(_Claims.__struct_fields__)
_encoder: Final = msgspec.json.Encoder()
_decoder: Final = msgspec.json.Decoder()
_claims_decoder: Final = msgspec.json.Decoder(_Claims)
# Everything that reading or writing JSON of unknown content raises.
_UNREADABLE: Final = (msgspec.MsgspecError, ValueError, OverflowError, RecursionError)
# Headers whose signature was right, by their exact bytes: only our own issuer can put anything in here.
_headers: Final[dict[bytes, tuple[str, str]]] = {}


def mint_access_token(
    key: SigningKey,
    *,
    issuer: str,
    subject: str,
    audience: str | tuple[str, ...],
    client_id: str,
    sid: str | None,
    jti: str,
    issued_at: int,
    expires_at: int,
    scopes: tuple[str, ...],
    auth_time: int,
    acr: str | None,
    amr: tuple[str, ...],
    claims: Mapping[str, str],
) -> str:
    """Sign an access token (RFC 9068). Times are Unix seconds; `claims` maps names to texts of `core.values`.

    Nothing is signed that `verify_access_token` would not read. Raises: ValueRefused when a claim has a registered
    name (`RESERVED_CLAIMS`), a value is out of bounds, or the token would pass `MAX_TOKEN`.
    """
    standard = _Claims(
        iss=issuer,
        sub=subject,
        aud=audience if isinstance(audience, str) else list(audience),
        client_id=client_id,
        jti=jti,
        iat=issued_at,
        exp=expires_at,
        sid=UNSET if sid is None else sid,
        scope=" ".join(scopes) if scopes else UNSET,
        auth_time=auth_time,
        acr=UNSET if acr is None else acr,
        amr=list(amr) if amr else UNSET,
    )
    try:
        payload = _encoder.encode(standard)
        _claims_decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeEncodeError, OverflowError) as refused:
        raise ValueRefused("a standard claim of an access token is out of bounds") from refused
    if (scopes and not _are_scopes(scopes)) or not 0 < expires_at - issued_at <= MAX_LIFETIME:
        raise ValueRefused(f"an access token has scopes of RFC 6749 s3.3 and lives 1 to {MAX_LIFETIME} s")
    if claims:
        payload = _splice(payload, claims)
    signed = key.header + b"." + encode_base64url(payload)
    token = signed + b"." + encode_base64url(key.sign(signed))
    if len(token) > MAX_TOKEN:
        raise ValueRefused(f"an access token has at most {MAX_TOKEN} octets, this one would have {len(token)}")
    return token.decode("ascii")


def verify_access_token(
    token: str | bytes, keys: Mapping[str, VerifyingKey], rules: TokenRules, *, now: float | None
) -> AccessToken:
    """Read an access token, after proving that it is ours, for us, and valid at `now` (Unix seconds).

    With `now=None` times are not judged: for whoever inspects a token, never for accepting one.
    Refused when `now` has reached `exp` + leeway, or has not reached `nbf` or `iat` within the leeway. Waits for
    nothing and connects to nowhere. Raises: TokenInvalid, and nothing else, whatever comes in.
    Source: RFC 9068 s4, RFC 8725.
    """
    whole = _bounded(token)
    # One look at the alphabet: what is left must be the two dots.
    if whole.translate(None, _BASE64URL) != b"..":
        _refuse("shape")
    signed, _, signature_text = whole.rpartition(b".")
    header, _, payload_text = signed.partition(b".")
    if not header or not payload_text or not signature_text:
        _refuse("shape")

    known = _headers.get(header)
    kid, algorithm = known or _parse_header(header)
    key = keys.get(kid)
    if key is None:
        _refuse("unknown_key")
    if key.algorithm != algorithm:
        _refuse("algorithm")
    signature = decode_base64url(signature_text)
    if signature is None:
        _refuse("spelling")
    if not key.verify(signed, signature):
        _refuse("signature")
    if known is None:
        _keep_header(header, kid, algorithm)

    payload = decode_base64url(payload_text)
    if payload is None:
        _refuse("spelling")
    members = _unique_members(payload, "claims")
    found = _typed(payload)
    scopes = _scopes_of(found)
    claims = _own_claims(members)

    if found.iss != rules.issuer:
        _refuse("issuer")
    audience = (found.aud,) if isinstance(found.aud, str) else tuple(found.aud)
    if rules.audiences.isdisjoint(audience):
        _refuse("audience")
    if now is not None:
        _judge(found.exp, found.iat if found.nbf is UNSET else max(found.iat, found.nbf), rules, now)
    return AccessToken(
        issuer=found.iss,
        subject=found.sub,
        audience=audience,
        client_id=found.client_id,
        id=found.jti,
        sid=None if found.sid is UNSET else found.sid,
        issued_at=found.iat,
        expires_at=found.exp,
        scopes=scopes,
        auth_time=0.0 if found.auth_time is UNSET else float(found.auth_time),
        acr=None if found.acr is UNSET else found.acr,
        amr=() if found.amr is UNSET else tuple(found.amr),
        claims=claims,
    )


def judge_times(token: AccessToken, rules: TokenRules, *, now: float) -> None:
    """Judge the times of a token that was read with `now=None`, by another clock. Raises: TokenInvalid."""
    _judge(token.expires_at, token.issued_at, rules, now)


def _judge(expires_at: int, valid_from: int, rules: TokenRules, now: float) -> None:
    # Written so that a `now` that is no number refuses.
    if not now < expires_at + rules.leeway:
        _refuse("expired")
    if not now + rules.leeway >= valid_from:
        _refuse("not_yet_valid")


def new_jti(tag: int, random: bytes) -> str:
    """The name of a token, from the tag of its session (0 to 65535) and 15 fresh random bytes."""
    return urlsafe_b64encode(bytes((_KIND_JTI,)) + tag.to_bytes(2, "big") + random[:15]).decode("ascii")


def tag_of_jti(jti: str) -> int | None:
    """Where the session of a token lives; `None` when it was never a name of ours."""
    if not _JTI_SHAPE.fullmatch(jti):
        return None
    raw = urlsafe_b64decode(jti)
    return int.from_bytes(raw[1:3], "big") if raw[0] == _KIND_JTI else None


# Minting.


def _splice(payload: bytes, claims: Mapping[str, str]) -> bytes:
    parts = [payload[:-1]]
    for name, text in claims.items():
        if name in RESERVED_CLAIMS:
            raise ValueRefused(f"`{name}` is a registered claim; an application's claim needs another name")
        try:
            member, octets = _encoder.encode(name), text.encode("utf-8")
            # Each text must be one whole value: spliced in unread, `1,"admin":true` would be two claims.
            value, unique = _read_json(octets)
            _own_value(value)
        except _UNREADABLE as broken:
            raise ValueRefused("a claim is not an encoded value") from broken
        if not unique:
            raise ValueRefused("a claim names a member twice")
        parts.append(member + b":" + octets)
    return b",".join(parts) + b"}"


def _are_scopes(scopes: tuple[str, ...]) -> bool:
    return all(" " not in scope and _SCOPE.fullmatch(scope) for scope in scopes)


# Verifying.


def _refuse(cause: Cause) -> NoReturn:
    # Raised outside of any `except`, so that no traceback carries parts of a token.
    raise TokenInvalid(cause)


def _bounded(token: object) -> bytes:
    if not isinstance(token, (str, bytes)):
        _refuse("shape")
    if len(token) > MAX_TOKEN:
        _refuse("size")
    if isinstance(token, bytes):
        return token
    if not token.isascii():
        _refuse("shape")
    return token.encode("ascii")


def _parse_header(header: bytes) -> tuple[str, str]:
    """`kid` and `alg` of a header with exactly our three members, each once, and the type of an access token."""
    if len(header) > _MAX_HEADER:
        _refuse("header")
    plain = decode_base64url(header)
    if plain is None:
        _refuse("spelling")
    members = _unique_members(plain, "header")
    kid, algorithm = members.get("kid"), members.get("alg")
    # A closed set: `crit`, `b64`, `zip`, `enc`, `jwk`, `jku`, `x5u`, `x5c` and what comes next are all refused.
    # Without the type, an id_token or a logout token of the same issuer would pass (RFC 8725 s3.11).
    if len(members) != 3 or members.get("typ") != "at+jwt":
        _refuse("header")
    if not isinstance(kid, str) or not isinstance(algorithm, str):
        _refuse("header")
    return kid, algorithm


def _keep_header(header: bytes, kid: str, algorithm: str) -> None:
    if len(_headers) >= _MAX_HEADERS_KEPT:
        _headers.clear()
    _headers[header] = (kid, algorithm)


def _read_json(text: bytes) -> tuple[object, bool]:
    """One JSON value, and whether no object in it names a member twice: readers disagree on which one would count.

    Raises: what `_UNREADABLE` lists.
    """
    value = _decoder.decode(text)
    # What we wrote is written the same way again, and a repeated member never is. Other spellings of JSON are legal,
    # too; then the slow reader counts.
    return value, _encoder.encode(value) == text or _counted(text)


def _counted(text: bytes) -> bool:
    unique = True

    def count(pairs: list[tuple[str, object]]) -> None:
        nonlocal unique
        unique = unique and len({name for name, _ in pairs}) == len(pairs)

    json.loads(text.decode("utf-8"), object_pairs_hook=count)
    return unique


def _unique_members(text: bytes, otherwise: Cause) -> dict[str, object]:
    try:
        found, unique = _read_json(text)
    except _UNREADABLE:
        found, unique = None, True
    if not unique:
        _refuse("duplicate_member")
    if not isinstance(found, dict):
        _refuse(otherwise)
    return found


def _typed(payload: bytes) -> _Claims:
    try:
        found = _claims_decoder.decode(payload)
    except _UNREADABLE:
        found = None
    if found is None or not 0 < found.exp - found.iat <= MAX_LIFETIME:
        _refuse("claims")
    return found


def _scopes_of(found: _Claims) -> tuple[str, ...]:
    if found.scope is UNSET:
        return ()
    if not _SCOPE.fullmatch(found.scope):
        _refuse("claims")
    return tuple(found.scope.split(" "))


def _own_claims(members: dict[str, object]) -> Mapping[str, Json]:
    """What the application put in. Refuses a token with a registered member that we would have to understand."""
    own: dict[str, Json] = {}
    readable = True
    try:
        for name, value in members.items():
            if name not in _OURS:
                own[name] = _own_value(value)
    except _UNREADABLE:
        readable = False
    # A registered member limits the token (`cnf`) or belongs to another kind of token (`nonce`, `events`).
    if not readable or not RESERVED_CLAIMS.isdisjoint(own):
        _refuse("claims")
    return MappingProxyType(own)


def _own_value(value: object) -> Json:
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    return decode_value(_encoder.encode(value).decode("utf-8"))
