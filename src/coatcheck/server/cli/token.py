"""`coatcheck token`: what a token says, whether it would be accepted now, and refusing one.

Decides that of a text only what our signature or our check vouches for is told, and that nothing of a text that is not
ours is repeated. It must never print a token, and never spend one: a refresh token is looked at, not exchanged.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import click

from coatcheck.server.cli.options import WHERE, gathered, setting_flags
from coatcheck.server.cli.output import Failed, Refused, emit, json_option, moment, talk

if TYPE_CHECKING:
    from coatcheck.core.access_token import AccessToken, TokenRules
    from coatcheck.core.key_ring import KeyRing
    from coatcheck.core.ports import Standing
    from coatcheck.primitives.jwk import VerifyingKey
    from coatcheck.server.service import Service
    from coatcheck.server.settings import ServerSettings

_SECOND_US: Final = 1_000_000
_MAX_STDIN: Final = 64 * 1024

# By `TokenInvalid.cause`; whatever is not here is refused only after the signature was right.
_NOT_OURS: Final = {
    "size": "it is longer than any token of ours",
    "shape": "it is neither an access token (three parts with dots) nor a refresh token (88 characters)",
    "header": "its header is not one of our access tokens'",
    "unknown_key": "its key is not in the ring: another issuer's, withdrawn, or dropped after its last token expired",
    "algorithm": "its header names another algorithm than its key has",
    "spelling": "it is not spelled as we spell tokens, so it was cut or changed",
    "signature": "the signature is not ours, so it was changed or made by somebody else",
    "check": "it has the shape of a refresh token, but its check is not ours",
}

_word = click.argument("words", nargs=-1, metavar="[TOKEN|-]")
_OTHERS_SEE: Final = """\b
Send the token on standard input: arguments can be seen by everybody on this machine, and a shell
keeps them."""


@click.group()
def token() -> None:
    """Look at tokens and deny them."""


@token.command(
    epilog=f"""{_OTHERS_SEE}

\b
Examples:
  coatcheck token inspect < token.txt
  xclip -o | coatcheck token inspect --json"""
)
@_word
@setting_flags(*WHERE)
@json_option
def inspect(words: tuple[str, ...], as_json: bool, **flags: Any) -> None:
    """Tell what an access or refresh token says; status 1 when it would not be accepted now."""
    from coatcheck.server.cli.work import run

    settings = gathered(flags).settings
    facts, lines = run(_inspect(settings, _read(words)))
    emit(facts, *lines, as_json=as_json)
    if facts["accepted"] is False:
        raise click.exceptions.Exit(1)


@token.command(
    epilog=f"""{_OTHERS_SEE} The name of a token (its jti) is no secret.

\b
Examples:
  coatcheck token deny < token.txt
  coatcheck token deny JTI

\b
To end a person's refresh tokens as well, end the session: coatcheck session revoke SID"""
)
@click.argument("words", nargs=-1, metavar="[TOKEN|JTI|-]")
@setting_flags(*WHERE)
@json_option
def deny(words: tuple[str, ...], as_json: bool, **flags: Any) -> None:
    """Refuse one access token until it would have expired; its session goes on."""
    from coatcheck.server.cli.work import run

    settings = gathered(flags).settings
    jti, until = run(_deny(settings, _read(words)))
    if until is None:
        talk("it has expired: nobody accepts it any more, so there is nothing to deny")
    emit(
        {"jti": jti, "denied": until is not None, "until": until},
        *(() if until is None else (f"denied {jti} until {moment(until)}, when it has expired everywhere",)),
        as_json=as_json,
    )


def _read(words: tuple[str, ...]) -> bytes:
    """The text somebody gave, without the white space around it. Raises: UsageError, Refused."""
    if len(words) > 1:
        # Said here: click would repeat the second word, which may be the token.
        raise click.UsageError("Give one token, or none to read it from standard input.")
    if words and words[0] != "-":
        given = words[0].encode("utf-8", "replace")
    elif sys.stdin.isatty():
        given = str(click.prompt("Token", hide_input=True, err=True)).encode("utf-8", "replace")
    else:
        given = sys.stdin.buffer.read(_MAX_STDIN)
    given = given.strip()
    if not given:
        raise Refused("standard input must hold the token, or give it as an argument")
    return given


# -- inspect -------------------------------------------------------------------------------------------------------


async def _inspect(settings: ServerSettings, value: bytes) -> tuple[dict[str, object], list[str]]:
    from coatcheck.core.refresh_token import REFRESH_TOKEN_CHARACTERS
    from coatcheck.errors import TokenInvalid
    from coatcheck.server.cli.key import NO_RING, looking

    async with looking(settings) as (service, ring):
        if not ring.keys:
            raise Failed(NO_RING)
        try:
            if len(value) == REFRESH_TOKEN_CHARACTERS and b"." not in value:
                return await _inspect_refresh(service, value)
            found, kid = _ours(value, _verifying(service, ring))
        except TokenInvalid as refused:
            return _strange(refused.cause)
        return await _inspect_access(service, settings, found, kid)


def _strange(cause: str) -> tuple[dict[str, object], list[str]]:
    why = _NOT_OURS.get(cause)
    if why is not None:
        return {"ours": False, "accepted": False, "why": [why]}, [f"nothing more can be told of it: {why}"]
    why = f"our key signed it, but it is no access token that we would make ({cause})"
    return {"ours": True, "accepted": False, "why": [why]}, [f"nothing more can be told of it: {why}"]


async def _inspect_refresh(service: Service, value: bytes) -> tuple[dict[str, object], list[str]]:
    from coatcheck.core.ids import sid_of
    from coatcheck.core.refresh_token import parse_refresh_token
    from coatcheck.errors import TokenInvalid

    keys = service.coat.engine.keys
    found = parse_refresh_token(keys, value)
    if found is None:
        raise TokenInvalid("check")
    ref = found.family.session
    # No access token has the empty name, so this tells of the session alone.
    standing = None if ref is None else await service.store.standing(ref, "")
    why = [] if standing is None or standing.why is None else [_ended(standing)]
    sid = None if ref is None else sid_of(keys, ref)
    facts: dict[str, object] = {
        "kind": "refresh",
        "ours": True,
        # Whether it is the current one only an exchange can tell, which would spend it.
        "accepted": False if why else None,
        "why": why,
        "sid": sid,
        "generation": found.generation,
    }
    lines = [
        f"accepted now:  no: {why[0]}" if why else "accepted now:  only an exchange can tell, and that would spend it",
        "kind:          refresh token; its check is ours",
        f"session:       {sid or '- (its family stands alone)'}",
        f"generation:    {found.generation}",
    ]
    return facts, lines


async def _inspect_access(
    service: Service, settings: ServerSettings, found: AccessToken, kid: str
) -> tuple[dict[str, object], list[str]]:
    import json

    from coatcheck.core.ids import parse_sid
    from coatcheck.core.values import encode_value

    ref = None if found.sid is None else parse_sid(service.coat.engine.keys, found.sid)
    standing = None if ref is None else await service.store.standing(ref, found.id)
    now = (await service.store.ping() if standing is None else standing.now_us) / _SECOND_US
    ours = None if settings.public_url is None else settings.browser_url
    why = why_refused(found, standing, issuer=ours, now=now)
    facts: dict[str, object] = {
        "kind": "access",
        "ours": True,
        "accepted": not why,
        "why": why,
        "expired": now >= found.expires_at,
        "standing": "unknown" if standing is None else standing.why,
        "kid": kid,
        "issuer": found.issuer,
        "subject": found.subject,
        "audience": list(found.audience),
        "client_id": found.client_id,
        "jti": found.id,
        "sid": found.sid,
        "issued_at": found.issued_at,
        "expires_at": found.expires_at,
        "scopes": list(found.scopes),
        "auth_time": found.auth_time,
        "acr": found.acr,
        "amr": list(found.amr),
        "claims": {name: json.loads(encode_value(value)) for name, value in found.claims.items()},
    }
    rows = [
        ("accepted now", "yes" if not why else f"no: {'; '.join(why)}"),
        ("kind", "access token; the signature is ours"),
        ("key", kid),
        ("issuer", found.issuer),
        ("subject", found.subject),
        ("audience", ", ".join(found.audience)),
        ("client", found.client_id or "-"),
        ("jti", found.id),
        ("session", found.sid or "-"),
        ("issued", moment(found.issued_at)),
        ("expires", moment(found.expires_at)),
        ("scopes", " ".join(found.scopes) or "-"),
        ("signed in", moment(found.auth_time) if found.auth_time else "-"),
        ("acr", found.acr or "-"),
        ("amr", " ".join(found.amr) or "-"),
        *((f"claim {name}", encode_value(value)) for name, value in found.claims.items()),
    ]
    width = max(len(name) for name, _ in rows)
    return facts, [f"{name}:{' ' * (width - len(name))}  {text}" for name, text in rows]


def why_refused(found: AccessToken, standing: Standing | None, *, issuer: str | None, now: float) -> list[str]:
    """Every reason why a token of ours would not be accepted at `now` (Unix seconds, the store's clock).

    `standing` is `None` for a session that is none of this store; `issuer` is `None` where it is not known.
    """
    why = []
    if now >= found.expires_at:
        why.append(f"it expired at {moment(found.expires_at)}")
    if now < found.issued_at:
        why.append(f"it is valid from {moment(found.issued_at)} only; compare the clocks")
    if standing is None:
        why.append("its session is none of this store")
    elif standing.why is not None:
        why.append(_ended(standing))
    if issuer is not None and found.issuer != issuer:
        why.append(f"its issuer is not {issuer}, which public_url says we are")
    return why


def _ended(standing: Standing) -> str:
    if standing.why == "denied":
        return "it was denied"
    if standing.why == "unknown":
        return "its session is not there any more"
    at = f" at {moment(standing.at_us / _SECOND_US)}" if standing.at_us else ""
    return f"its session ended{at}: {standing.why}"


# -- deny ----------------------------------------------------------------------------------------------------------


async def _deny(settings: ServerSettings, value: bytes) -> tuple[str, float | None]:
    """The token's name and until when it is denied, Unix seconds; `None` when it has expired everywhere."""
    from coatcheck.core.access_token import MAX_LEEWAY, tag_of_jti
    from coatcheck.core.ids import sid_of
    from coatcheck.core.refresh_token import parse_refresh_token
    from coatcheck.errors import TokenInvalid
    from coatcheck.issuer import Issuer
    from coatcheck.server.cli.key import NO_RING, looking
    from coatcheck.settings import TokenSettings

    async with looking(settings) as (service, ring):
        if not ring.keys:
            raise Failed(NO_RING)
        now = await service.store.ping() / _SECOND_US
        refresh = parse_refresh_token(service.coat.engine.keys, value)
        if refresh is not None:
            ref = refresh.family.session
            sid = "SID" if ref is None else sid_of(service.coat.engine.keys, ref)
            raise Refused(f"that is a refresh token; end its session instead: coatcheck session revoke {sid}")
        jti = value.decode("ascii", "replace")
        if tag_of_jti(jti) is not None:
            # When it expires is not known: no token of ours lives longer than the longest.
            expires_at = int(now) + 1 + ring.longest
        else:
            try:
                found, _ = _ours(value, _verifying(service, ring))
            except TokenInvalid as refused:
                raise Refused(
                    f"that is no access token of ours: {_NOT_OURS.get(refused.cause, refused.cause)}"
                ) from refused
            jti, expires_at = found.id, found.expires_at
        until = expires_at + MAX_LEEWAY
        if now >= until:
            return jti, None
        # Not started: to deny needs no key, and a ring that is in disorder must not be in the way.
        issuer = Issuer(lambda: service.store, service.coat.settings, TokenSettings(), service.system)
        service.coat.engine.publish(await issuer.deny(jti, expires_at=expires_at))
        return jti, until


# -- what is ours --------------------------------------------------------------------------------------------------


def _verifying(service: Service, ring: KeyRing) -> dict[str, VerifyingKey]:
    """The keys of the ring by which its tokens are verified. Raises: ConfigurationError."""
    from coatcheck.core.key_ring import unseal_key
    from coatcheck.errors import ConfigurationError
    from coatcheck.operations.keys import check_unsealed
    from coatcheck.primitives.jwk import unpack_signing_key

    server_key = service.coat.settings.server_key
    if server_key is None:
        raise ConfigurationError(
            "server_key: the keys in the store are sealed; give this command the servers' key by "
            "COATCHECK_SERVER_KEY_FILE"
        )
    verifying = {}
    for each in ring.keys:
        packed = check_unsealed(unseal_key(each, server_key=server_key), each)
        verifying[each.kid] = unpack_signing_key(packed, kid=each.kid, algorithm=each.algorithm).verifying
    return verifying


def _ours(value: bytes, keys: dict[str, VerifyingKey]) -> tuple[AccessToken, str]:
    """An access token that one of these keys signed, for whatever issuer and audience and at whatever time, and the
    key's name. Raises: TokenInvalid."""
    from coatcheck.core.access_token import verify_access_token

    rules, issued_at = _as_it_says(value)
    found = verify_access_token(value, keys, rules, now=issued_at)
    return found, str(_member(value, 0, "kid"))


def _as_it_says(value: bytes) -> tuple[TokenRules, float]:
    """Rules that accept what the token itself names. They are read before the signature and believed only after it:
    the same octets are verified next."""
    from coatcheck.core.access_token import TokenRules

    issuer, audience, issued_at = (_member(value, 1, name) for name in ("iss", "aud", "iat"))
    named = audience if isinstance(audience, list) else [audience]
    audiences = frozenset(each for each in named if isinstance(each, str) and each)
    return (
        TokenRules(issuer=issuer if isinstance(issuer, str) and issuer else "-", audiences=audiences or frozenset("-")),
        issued_at if isinstance(issued_at, int) else 0,
    )


def _member(value: bytes, part: int, name: str) -> object:
    """A member of the header (0) or of the claims (1), or `None` where none can be read."""
    import msgspec

    from coatcheck.core.access_token import MAX_TOKEN
    from coatcheck.primitives.jwk import decode_base64url

    parts = value.split(b".")
    if len(parts) != 3 or len(value) > MAX_TOKEN or not value.isascii():
        return None
    octets = decode_base64url(parts[part]) if parts[part] else None
    try:
        members = None if octets is None else msgspec.json.decode(octets)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return members.get(name) if isinstance(members, dict) else None
