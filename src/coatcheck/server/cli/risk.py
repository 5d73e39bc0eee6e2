"""`coatcheck risk`: what rules would have done.

Decides which events of the audit log are observations, and whose history each one belongs to. They are judged as a
running server judges them (`core.risk.at_the_door`), so that its own rules decide over its own past what they decided
then. A replay changes nothing: it reads, and prints decisions with their figures. It must never print an address, nor
what a client wrote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from coatcheck.server.cli.options import WHERE, gathered, setting_flags
from coatcheck.server.cli.output import emit, json_option, moment, table, talk

if TYPE_CHECKING:
    from coatcheck.core.geo import Geography
    from coatcheck.core.risk import Decision, History, Kind, Observation, Rules
    from coatcheck.server.settings import ServerSettings

MAX_HISTORIES: Final = 100_000
_KINDS: Final[dict[str, Kind]] = {
    "session.signed_in": "sign_in",
    "login.failed": "sign_in_failed",
    "refresh.reused": "refresh_reused",
}


@click.group()
def risk() -> None:
    """See what rules about risk would have done."""


@risk.command(
    epilog="""\b
Examples:
  coatcheck risk replay
  coatcheck risk replay --rules rules.toml --geo city.mmdb --geo asn.mmdb --json"""
)
@click.option(
    "--rules",
    "rules_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    default=None,
    help="Rules as TOML, one table each.  [the setting risk_rules; else every rule, as this release has it]",
)
@click.option(
    "--geo",
    "geo_files",
    metavar="FILE",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A table of addresses (.mmdb); may be repeated.",
)
@click.option(
    "--limit", type=click.IntRange(1, 1_000_000), default=1000, show_default=True, help="List at most so many."
)
@setting_flags(*WHERE)
@json_option
def replay(rules_file: Path | None, geo_files: tuple[Path, ...], limit: int, as_json: bool, **flags: Any) -> None:
    """Judge the past events of the audit log by rules; nothing is changed."""
    from coatcheck.core.risk import Rules, explain
    from coatcheck.server.cli.work import run
    from coatcheck.server.risk_rules import read_rules

    settings = gathered(flags).settings
    rules_file = rules_file or settings.risk_rules
    rules = Rules() if rules_file is None else read_rules(rules_file)
    done = run(_replay(settings, rules, geo_files or tuple(Path(each) for each in settings.geo), limit))
    outcomes = {name: number for name, number in sorted(done.outcomes.items()) if name != "allow"}
    emit(
        {
            "read": done.read,
            "judged": done.judged,
            "without_place": done.without_place,
            "refused": done.refused,
            "outcomes": outcomes,
            "decisions": [
                {
                    "position": each.position,
                    "at": each.observation.at,
                    "sid": each.sid,
                    "subject": each.subject,
                    **explain(each.observation, each.decision),
                }
                for each in done.listed
            ],
            "more": done.more,
        },
        *table(
            ("AT", "SUBJECT", "EVENT", "WOULD", "BECAUSE"),
            [
                (
                    moment(each.observation.at),
                    each.subject or "-",
                    each.observation.kind,
                    each.decision.outcome + (f" {each.decision.block_for} s" if each.decision.block_for else ""),
                    "; ".join(
                        " ".join((reason.signal, *(f"{name}={value}" for name, value in reason.figures.items())))
                        for reason in each.decision.reasons
                    ),
                )
                for each in done.listed
            ],
        ),
        as_json=as_json,
    )
    talk(
        f"{done.judged} of {done.read} events judged: "
        + (", ".join(f"{number} {name}" for name, number in outcomes.items()) or "nothing would have followed")
    )
    if done.refused:
        talk(f"{done.refused} sign-ins would have met a refusal that stood already; they are taken for not made")
    if done.without_place:
        talk(
            f"{done.without_place} sign-ins do not tell where from or on which device; no rule about places judged them"
        )
    if done.more:
        talk(f"there are more than {limit}; --limit lists more of them")


@dataclass(frozen=True, kw_only=True)
class _Judged:
    position: int
    sid: str | None
    subject: str | None
    observation: Observation
    decision: Decision


@dataclass(kw_only=True)
class _Done:
    read: int = 0
    judged: int = 0
    without_place: int = 0
    refused: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    listed: list[_Judged] = field(default_factory=list)
    more: bool = False


async def _replay(settings: ServerSettings, rules: Rules, geo_files: tuple[Path, ...], limit: int) -> _Done:
    from coatcheck.core.freshness import BoundedTable
    from coatcheck.core.risk import History, at_the_door
    from coatcheck.server.audit import MAX_READ
    from coatcheck.server.cli.work import working
    from coatcheck.server.geo_file import geography_of

    done = _Done()
    histories: BoundedTable[History] = BoundedTable(MAX_HISTORIES)
    with geography_of(geo_files) if geo_files else nullcontext() as geography:
        async with working(settings) as service:
            after = 0
            while entries := await service.audit.read(after=after, limit=MAX_READ):
                after = entries[-1].position
                for entry in entries:
                    done.read += 1
                    found = _observed(entry.envelope, geography)
                    if found is None:
                        continue
                    whose, observation = found
                    done.judged += 1
                    if observation.kind == "sign_in" and observation.device is None and not _network(entry.envelope):
                        done.without_place += 1
                    history = histories.get(whose) or History()
                    verdict = at_the_door(rules, history, observation)
                    histories.put(whose, verdict.history)
                    decision = verdict.decision
                    if decision is None:
                        done.refused += verdict.refused_until > 0
                        continue
                    done.outcomes[decision.outcome] += 1
                    if decision.outcome == "allow":
                        continue
                    if len(done.listed) >= limit:
                        done.more = True
                        continue
                    done.listed.append(
                        _Judged(
                            position=entry.position,
                            sid=_text(entry.envelope.get("sid")),
                            subject=_text(entry.envelope.get("subject")),
                            observation=observation,
                            decision=decision,
                        )
                    )
    return done


def _observed(envelope: Mapping[str, object], geography: Geography | None) -> tuple[str, Observation] | None:
    """Whose history it belongs to, and the observation; None for an event that is none."""
    from coatcheck.core.geo import Location
    from coatcheck.core.network import network_of
    from coatcheck.core.risk import Observation

    kind, at = _kind(envelope), envelope.get("at")
    if kind is None or isinstance(at, bool) or not isinstance(at, (int, float)):
        return None
    network, subject = _network(envelope), _text(envelope.get("subject"))
    if kind == "id_forged":
        whose = None if network is None else f"network:{network_of(network)}"
    else:
        whose = None if subject is None else f"subject:{subject}"
    if whose is None:
        return None
    where = Location(country=_text(_data(envelope).get("country")))
    if geography is not None and network is not None:
        where = geography.locate(network)
    return whose, Observation(
        kind=kind,
        at=float(at),
        device=_text(_data(envelope).get("device")),
        location=where,
        place="" if network is None else network_of(network),
    )


def _kind(envelope: Mapping[str, object]) -> Kind | None:
    """What an event is to the rules; None for nothing."""
    from coatcheck.server.risk_watch import WHY_BLOCKED
    from coatcheck.server.sign_in import WHY_WRONG

    kind, why = _KINDS.get(str(envelope.get("type"))), _data(envelope).get("why", WHY_WRONG)
    if kind != "sign_in_failed" or why == WHY_WRONG:
        return kind
    # A sign-in with the right password that a rule refused. Other failures are none at the door.
    return "sign_in" if why == WHY_BLOCKED else None


def _data(envelope: Mapping[str, object]) -> Mapping[str, object]:
    data = envelope.get("data")
    return data if isinstance(data, Mapping) else {}


def _network(envelope: Mapping[str, object]) -> str | None:
    """The address an event tells; None for none, or for something that is no address."""
    from ipaddress import ip_address

    told = _text(_data(envelope).get("network"))
    try:
        return None if told is None else str(ip_address(told[:64]))
    except ValueError:
        return None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
