"""`coatcheck key`: the key that servers share, and the ring of keys that sign access tokens.

Decides that looking at the ring never changes it, and that a key is added by the ring's own algorithm: a verb runs
without the server's flags, and a ring that took this one's defaults for the server's would end every access token. It
must never print or ask for a private key.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import click

from coatcheck.server.cli.options import WHERE, gathered, setting_flags
from coatcheck.server.cli.output import Failed, Refused, emit, json_option, moment, table, talk
from coatcheck.system import REAL

if TYPE_CHECKING:
    from coatcheck.core.key_ring import KeyRing, RingKey
    from coatcheck.server.service import Service
    from coatcheck.server.settings import ServerSettings

NO_RING: Final = "no key ring yet: no server with a token profile has used this store"

_SECOND_US: Final = 1_000_000


@click.group()
def key() -> None:
    """Make keys, and look after those that sign."""


@key.command(
    epilog="""\b
Example:
  (umask 077 && coatcheck key new > server.key)
  COATCHECK_SERVER_KEY_FILE=server.key coatcheck serve --store redis://cache …"""
)
@json_option
def new(as_json: bool) -> None:
    """Make a server key, for servers that share a store."""
    made = REAL.random(32).hex()
    emit({"server_key": made}, made, as_json=as_json)
    talk("Give every server of one store this key, by COATCHECK_SERVER_KEY_FILE; it is kept nowhere else.")


@key.command("list")
@setting_flags(*WHERE)
@json_option
def list_(as_json: bool, **flags: Any) -> None:
    """List the keys of access tokens: which signs, which will, which only verify."""
    from coatcheck.core.key_ring import newest_first
    from coatcheck.server.cli.work import run

    ring, now = run(_look(gathered(flags).settings))
    found = newest_first(ring.keys)
    emit(
        {"keys": [_facts(ring, each, now) for each in found]},
        *table(
            ("KID", "ALGORITHM", "STATE", "PUBLISHED", "SIGNS FROM", "VERIFIES UNTIL"),
            [
                (
                    each.kid,
                    each.algorithm,
                    ring.state(each, now),
                    moment(each.published_at),
                    moment(each.signs_at),
                    _until(ring.verifies_until(each)),
                )
                for each in found
            ],
        ),
        as_json=as_json,
    )
    if not found:
        talk(NO_RING)


@key.command(
    epilog="""\b
Servers rotate by themselves; this is for a day when you do not want to wait for them. A key that
leaked is not rotated but retired: coatcheck key retire KID"""
)
@setting_flags(*WHERE, "token_algorithm")
@json_option
def rotate(as_json: bool, **flags: Any) -> None:
    """Publish a new key, which signs as soon as every verifier can have fetched it."""
    from coatcheck.server.cli.work import run

    found = gathered(flags)
    is_chosen = found.sources["token_algorithm"] != "default"  # noqa: S105 - the name of a setting
    ring, made, now = run(_rotate(found.settings, found.settings.token_algorithm if is_chosen else None))
    when = "signs from now on" if made.signs_at <= now else f"signs from {moment(made.signs_at)}"
    emit({"key": _facts(ring, made, now)}, f"published {made.kid} ({made.algorithm}); it {when}", as_json=as_json)


@key.command(
    epilog="""\b
Examples:
  coatcheck key retire KID        # a key that leaked; `coatcheck key list` shows the KIDs
  coatcheck key retire --all      # the server key leaked or is lost, or another kind of algorithm is wanted"""
)
@click.argument("kid", required=False)
@click.option("--all", "everything", is_flag=True, help="Every key; the next server that starts makes a new ring.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@setting_flags(*WHERE)
@json_option
def retire(kid: str | None, everything: bool, yes: bool, as_json: bool, **flags: Any) -> None:
    """Withdraw a key at once, as when it has leaked: its access tokens are refused everywhere."""
    from coatcheck.server.cli.work import run

    if (kid is None) != everything:
        raise click.UsageError("Give exactly one of KID and --all.")
    settings = gathered(flags).settings
    ring, now = run(_look(settings))
    if not ring.keys:
        raise Failed(NO_RING)
    if kid is None:
        _ask("every access token of this store is refused; clients refresh and go on", yes, as_json, "Withdraw all?")
        ended = run(_retire_all(settings))
        emit(
            {"retired": ended},
            f"withdrew {len(ended)} key{'' if len(ended) == 1 else 's'}; servers begin a new ring within seconds",
            as_json=as_json,
        )
        return
    known = ring.find(kid)
    if known is None:
        raise Refused(f"{kid} is no key of the ring; `coatcheck key list` shows them")
    meaning = "every access token signed with it is refused, here and at every verifier; clients refresh and go on"
    _ask(f"{kid} ({known.algorithm}, {ring.state(known, now)}): {meaning}", yes, as_json, "Withdraw it?")
    heir = run(_retire(settings, ring, kid))
    signing = "no key signs until the next one's time has come" if heir is None else f"{heir} signs"
    emit({"retired": kid, "signing": heir}, f"withdrew {kid}; {signing}", as_json=as_json)


def _ask(meaning: str, yes: bool, as_json: bool, question: str) -> None:
    if yes:
        return
    if as_json or not sys.stdin.isatty():
        raise Refused(f"{meaning}; say --yes as well")
    talk(f"{meaning}.")
    click.confirm(question, abort=True, err=True)


@asynccontextmanager
async def looking(settings: ServerSettings) -> AsyncIterator[tuple[Service, KeyRing]]:
    """The service without an issuer of its own, and the ring as it stands; empty where there is none.

    Nothing is made, rotated or dropped. Raises: ConfigurationError, StoreUnavailable.
    """
    from coatcheck.errors import ConfigurationError
    from coatcheck.operations.keys import read
    from coatcheck.server.cli.work import working
    from coatcheck.server.upgrade import embedded_file

    file = embedded_file(settings.store_url)
    if settings.store is not None and file is not None and not file.exists():
        raise ConfigurationError(f"store: {file} is not there yet; is --store right?")
    async with working(_as_profile("admin", settings), sessions=True) as service:
        yield service, (await read(service.store))[1]


def _as_profile(name: str, settings: ServerSettings) -> ServerSettings:
    """The settings under another profile, sessions lasting as long as they did."""
    from dataclasses import replace

    from coatcheck.core.profiles import PROFILES

    profile = PROFILES[settings.profile]
    return replace(
        settings,
        profile=name,
        idle_timeout=profile.idle_timeout if settings.idle_timeout is None else settings.idle_timeout,
        absolute_timeout=profile.absolute_timeout if settings.absolute_timeout is None else settings.absolute_timeout,
        access_lifetime=profile.access_lifetime if settings.access_lifetime is None else settings.access_lifetime,
    )


def _issuing(settings: ServerSettings, ring: KeyRing, chosen: str | None = None) -> ServerSettings:
    """The settings with tokens on, which say of algorithm and lifetime what the ring says already."""
    from dataclasses import replace
    from datetime import timedelta

    from coatcheck.core.key_ring import newest_first
    from coatcheck.core.profiles import PROFILES

    if settings.store_url.lower().startswith("memory:"):
        raise Refused("store: memory: is out of this command's reach; keys of a server's memory end with the server")
    if not PROFILES[settings.profile].carries_tokens:
        settings = _as_profile("b2c", settings)
    if not ring.keys:
        return settings
    return replace(
        settings,
        token_algorithm=chosen or newest_first(ring.keys)[0].algorithm,
        access_lifetime=timedelta(seconds=ring.longest) or settings.access_lifetime,
    )


async def _look(settings: ServerSettings) -> tuple[KeyRing, float]:
    async with looking(settings) as (service, ring):
        return ring, _now(service)


async def _rotate(settings: ServerSettings, chosen: str | None) -> tuple[KeyRing, RingKey, float]:
    from coatcheck.core.key_ring import newest_first
    from coatcheck.server.cli.work import working

    ring, now = await _look(settings)
    waiting = ring.waiting(now)
    if waiting is not None:
        raise Failed(f"{waiting.kid} is published already and signs from {moment(waiting.signs_at)}; wait for that")
    if chosen is not None and any((each.algorithm == "HS256") != (chosen == "HS256") for each in ring.keys):
        raise Refused(
            "token_algorithm: HS256 and keys of another kind never stand in one ring; a server that is started with "
            "the other algorithm begins a new ring, and every access token ends"
        )
    known = {each.kid for each in ring.keys}
    async with working(_issuing(settings, ring, chosen), sessions=True) as service:
        issuer = service.coat.engine.issuer
        # Who opens a ring makes its first key and does what is due, as any server: then that is the new key.
        made = next((each for each in newest_first(issuer.ring.keys) if each.kid not in known), None)
        if made is None:
            kid, events = await issuer.rotate_key()
            for event in events:
                service.coat.engine.publish(event)
            made = issuer.ring.find(kid)
        if made is None:
            raise Failed("the new key was withdrawn meanwhile")
        return issuer.ring, made, _now(service)


async def _retire(settings: ServerSettings, ring: KeyRing, kid: str) -> str | None:
    from coatcheck.server.cli.work import working

    async with working(_issuing(settings, ring), sessions=True) as service:
        issuer = service.coat.engine.issuer
        for event in await issuer.retire_key(kid):
            service.coat.engine.publish(event)
        heir = issuer.ring.signing(_now(service))
        return None if heir is None else heir.kid


async def _retire_all(settings: ServerSettings) -> list[str]:
    from coatcheck.core.denylist import key_denial_us
    from coatcheck.core.ports import Denial
    from coatcheck.events import Event
    from coatcheck.operations.keys import retire_all

    async with looking(settings) as (service, ring):
        now_us = service.system.now_us()
        for each in ring.keys:
            # Verifiers first: who repeats this after a failure finds the ring as it was.
            denial = Denial(kind="kid", id=each.kid, until_us=now_us + key_denial_us(ring.longest))
            await service.store.deny(0, denial)
        await retire_all(service.store)
        for each in ring.keys:
            service.coat.engine.publish(Event(kind="key.withdrawn", at=now_us / _SECOND_US, data={"kid": each.kid}))
        return [each.kid for each in ring.keys]


def _facts(ring: KeyRing, each: RingKey, now: float) -> dict[str, object]:
    return {
        "kid": each.kid,
        "algorithm": each.algorithm,
        "state": ring.state(each, now),
        "published_at": each.published_at,
        "signs_at": each.signs_at,
        "verifies_until": ring.verifies_until(each),
    }


def _until(seconds: int | None) -> str:
    return "-" if seconds is None else moment(seconds)


def _now(service: Service) -> float:
    return service.system.now_us() / _SECOND_US
