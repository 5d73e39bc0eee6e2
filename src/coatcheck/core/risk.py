"""What looks like somebody else: rules as data, and what they say to one observation.

Decides which rule judges what, when it speaks, and what follows when several do:

    an observation     is judged by
    sign_in            new_device  new_country  impossible_travel  velocity
    sign_in_failed     velocity
    request            new_device  new_country  impossible_travel
    id_forged          id_guessing
    refresh_reused     refresh_reuse

The sternest outcome of the rules that speak is the decision; each one that speaks is a reason, in the order of
`SIGNALS`, with the figures it was judged by. What is not known is not judged: a missing country is no new one. The same
rules, history and observation always give the same decision. No reason holds a secret, an address or a text that a
client wrote. Decides too what of that holds at the door (`at_the_door`): whoever is refused waits, and a browser that
the account knows is never refused (SEMANTICS 8). Time is handed in; this file must never read a clock, keep a history
or carry a decision out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final, Literal, TypeAlias, cast, get_args

from coatcheck.core.binding import OUTCOMES, Outcome, severity
from coatcheck.core.geo import NOWHERE, Location, least_distance_km
from coatcheck.errors import ConfigurationError

Signal = Literal["new_device", "new_country", "impossible_travel", "velocity", "id_guessing", "refresh_reuse"]
SIGNALS: Final[tuple[Signal, ...]] = get_args(Signal)
Kind = Literal["sign_in", "sign_in_failed", "request", "id_forged", "refresh_reused"]
Figure: TypeAlias = str | int | float | bool

SPEED_KMH: Final = 900.0
"""As fast as an airliner."""

MINIMUM_KM: Final = 100.0
"""Tables of addresses are wrong by as much within one city and its surroundings."""

MAX_BLOCK_SECONDS: Final = 86_400
MAX_ATTEMPTS: Final = 100
MAX_WINDOW_SECONDS: Final = 86_400.0
MAX_DEVICES: Final = 32
MAX_COUNTRIES: Final = 32
MAX_REFUSALS: Final = 16
EVERYWHERE: Final = "*"
"""In a refusal, every place: what is counted for an account cannot be told apart by where it came from."""

_MAX_SPEED_KMH: Final = 999_999.9

_JUDGED_BY: Final[Mapping[Kind, tuple[Signal, ...]]] = {
    "sign_in": ("new_device", "new_country", "impossible_travel", "velocity"),
    "sign_in_failed": ("velocity",),
    "request": ("new_device", "new_country", "impossible_travel"),
    "id_forged": ("id_guessing",),
    "refresh_reused": ("refresh_reuse",),
}
_COUNTED: Final[Mapping[Kind, Signal]] = {
    "sign_in": "velocity",
    "sign_in_failed": "velocity",
    "id_forged": "id_guessing",
}


# -- rules ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What follows when it speaks. `block_for`: seconds for which the place is refused; `block` needs them, `revoke`
    may have them (the session is over, and a new sign-in from there is refused as well)."""

    outcome: Outcome = "notify"
    block_for: int = 0

    def check(self, name: str) -> None:
        """Raises: ConfigurationError, which names the member and the cure."""
        if not isinstance(self.outcome, str) or self.outcome not in OUTCOMES or self.outcome == "allow":
            raise ConfigurationError(
                f"risk.{name}.outcome: one of {', '.join(OUTCOMES[1:])}; to switch it off, leave out"
            )
        if type(self.block_for) is not int or not 0 <= self.block_for <= MAX_BLOCK_SECONDS:
            raise ConfigurationError(f"risk.{name}.block_for: whole seconds, 0 to {MAX_BLOCK_SECONDS}")
        if self.outcome == "block" and self.block_for == 0:
            raise ConfigurationError(f"risk.{name}.block_for: block needs the seconds it lasts")
        if self.block_for and severity(self.outcome) < severity("block"):
            raise ConfigurationError(f"risk.{name}.block_for: only with block or revoke")


@dataclass(frozen=True, slots=True, kw_only=True)
class TravelRule(Rule):
    """Somebody was at two places at least `minimum_km` apart, and faster than `speed_kmh`.

    Distances are the least that the table's radii allow. `same_operator_counts`: whether also when both addresses
    belong to one network operator; a phone's address is often registered where its operator is.
    """

    outcome: Outcome = "step_up"
    speed_kmh: float = SPEED_KMH
    minimum_km: float = MINIMUM_KM
    same_operator_counts: bool = False

    def check(self, name: str) -> None:
        """See `Rule.check`."""
        # By name: slots make a new class, which the short form of super() does not know.
        Rule.check(self, name)
        _check_number(f"risk.{name}.speed_kmh", self.speed_kmh, 1, 100_000)
        _check_number(f"risk.{name}.minimum_km", self.minimum_km, 0, 20_000)
        if type(self.same_operator_counts) is not bool:
            raise ConfigurationError(f"risk.{name}.same_operator_counts: true or false")


@dataclass(frozen=True, slots=True, kw_only=True)
class CountRule(Rule):
    """`attempts` or more within `window` seconds, this one included. What is exactly `window` old counts no more."""

    outcome: Outcome = "block"
    block_for: int = 900
    attempts: int = 20
    window: float = 600.0

    def check(self, name: str) -> None:
        """See `Rule.check`."""
        Rule.check(self, name)
        if type(self.attempts) is not int or not 2 <= self.attempts <= MAX_ATTEMPTS:
            raise ConfigurationError(f"risk.{name}.attempts: 2 to {MAX_ATTEMPTS}")
        _check_number(f"risk.{name}.window", self.window, 1, MAX_WINDOW_SECONDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Every rule; None: switched off.

    `new_device`: a browser that is not known to this account; its first one is not new. `new_country`: the same of
    countries. `velocity`: sign-ins of one account, those that failed included. `id_guessing`: session ids that were
    never ours, from one network. `refresh_reuse`: a consumed refresh token was presented again.
    """

    new_device: Rule | None = field(default_factory=Rule)
    new_country: Rule | None = field(default_factory=lambda: Rule(outcome="step_up"))
    impossible_travel: TravelRule | None = field(default_factory=TravelRule)
    velocity: CountRule | None = field(default_factory=CountRule)
    id_guessing: CountRule | None = field(default_factory=CountRule)
    refresh_reuse: Rule | None = field(default_factory=lambda: Rule(outcome="revoke"))

    def __post_init__(self) -> None:
        for name in SIGNALS:
            rule: Rule | None = getattr(self, name)
            if rule is not None:
                rule.check(name)


def parse_rules(tables: Mapping[str, object]) -> Rules:
    """Rules from tables of plain values, as a TOML file has them: only the rules that are named are on.

    Raises: ConfigurationError, which names the table and the member.
    """
    found: dict[str, Rule | None] = dict.fromkeys(SIGNALS)
    for name, table in tables.items():
        kind = _KINDS.get(name)
        if kind is None:
            raise ConfigurationError(f"risk.{_shown(name)}: no rule of this name; there are {', '.join(SIGNALS)}")
        if not isinstance(table, Mapping):
            raise ConfigurationError(f'risk.{name}: a table, such as [{name}] with outcome = "notify"')
        members = sorted(each.name for each in fields(kind))
        unknown = next((str(member) for member in table if member not in members), None)
        if unknown is not None:
            raise ConfigurationError(f"risk.{name}.{_shown(unknown)}: no member; there are {', '.join(members)}")
        given: dict[str, Any] = dict(table)
        if kind is CountRule and given.get("outcome", "block") not in ("block", "revoke"):
            # The default of what is not used any more must not contradict what is given.
            given.setdefault("block_for", 0)
        found[name] = kind(**given)
    return Rules(**cast(dict[str, Any], found))


_KINDS: Final[Mapping[str, type[Rule]]] = {
    "new_device": Rule,
    "new_country": Rule,
    "impossible_travel": TravelRule,
    "velocity": CountRule,
    "id_guessing": CountRule,
    "refresh_reuse": Rule,
}


def _shown(name: str) -> str:
    return ascii(name[:40])[1:-1]


def _check_number(name: str, value: object, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ConfigurationError(f"{name}: {least:g} to {most:g}")


# -- what is judged -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One thing that happened, to one account or (`id_forged`) from one network. `at` is Unix seconds.

    `device` is the id of the device cookie, "" for a browser without one, None where that is not known. `place` stands
    for the network it came from, in whatever form, "" where that is not known: a refusal holds for it.
    """

    kind: Kind
    at: float
    device: str | None = None
    location: Location = NOWHERE
    place: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Browsers that the account does not know are refused at `place` until `until` (Unix seconds), and not then."""

    place: str
    until: float


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What is remembered of one account or network, bounded. Oldest first.

    `located` is the last place with a position and `located_at` when that was; `counts` holds the times of what is
    counted, by the rule that counts it. `refused` holds the places that were refused lately.
    """

    devices: tuple[str, ...] = ()
    countries: tuple[str, ...] = ()
    located: Location | None = None
    located_at: float = 0.0
    counts: Mapping[Signal, tuple[float, ...]] = field(default_factory=dict)
    refused: tuple[Refusal, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """One rule that spoke, what it asks for, and the figures it was judged by."""

    signal: Signal
    outcome: Outcome
    figures: Mapping[str, Figure]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What follows. `allow` has no reason. `block_for`: seconds for which the place is refused, 0 for not at all.
    `instead_of`: what the rules ask for, where something milder is done."""

    outcome: Outcome
    block_for: int
    reasons: tuple[Reason, ...]
    instead_of: Outcome | None = None


def decide(rules: Rules, history: History, observation: Observation) -> Decision:
    """Judge an observation by what was remembered before it. A rule that is made sterner, more easily spoken or
    switched on never makes the outcome milder, nor `block_for` shorter."""
    reasons: list[Reason] = []
    spoken: list[Rule] = []
    for signal in _JUDGED_BY[observation.kind]:
        rule, figures = _judge(signal, rules, history, observation)
        if rule is not None and figures is not None:
            reasons.append(Reason(signal=signal, outcome=rule.outcome, figures=figures))
            spoken.append(rule)
    if not spoken:
        return Decision(outcome="allow", block_for=0, reasons=())
    return Decision(
        outcome=max((rule.outcome for rule in spoken), key=severity),
        block_for=max(rule.block_for for rule in spoken),
        reasons=tuple(reasons),
    )


def remember(history: History, observation: Observation, decision: Decision) -> History:
    """The history for what comes next. Attempts always count; a device, a country or a position is remembered only if
    nothing more than a notice followed, or else a thief who was refused would be known the second time.

    Whoever proves himself afterwards is remembered by calling this again with `ACCEPTED`, without counting twice.
    """
    counted = _COUNTED.get(observation.kind) if decision is not ACCEPTED else None
    if counted is not None:
        # More than the highest number of any rule are never needed.
        times = sorted((*history.counts.get(counted, ()), observation.at))[-MAX_ATTEMPTS:]
        history = replace(history, counts={**history.counts, counted: tuple(times)})
    if severity(decision.outcome) > severity("notify") or observation.kind not in ("sign_in", "request"):
        return history
    where = observation.location
    if observation.device:
        history = replace(history, devices=_latest(history.devices, observation.device, MAX_DEVICES))
    if where.country is not None:
        history = replace(history, countries=_latest(history.countries, where.country, MAX_COUNTRIES))
    if where.position is not None and (history.located is None or observation.at >= history.located_at):
        history = replace(history, located=where, located_at=observation.at)
    return history


ACCEPTED: Final = Decision(outcome="allow", block_for=0, reasons=())
"""Somebody has proven himself: for `remember`, after a decision that asked for it."""


def explain(observation: Observation, decision: Decision) -> dict[str, Figure]:
    """The data of the event that tells of a decision: outcome, the names of the rules, and their figures."""
    told: dict[str, Figure] = {
        "judged": observation.kind,
        "outcome": decision.outcome,
        "reasons": " ".join(reason.signal for reason in decision.reasons),
    }
    if decision.instead_of is not None:
        told["instead_of"] = decision.instead_of
    if decision.block_for:
        told["block_for"] = decision.block_for
    for reason in decision.reasons:
        for name, value in reason.figures.items():
            told[f"{reason.signal}.{name}"] = value
    return told


# -- at the door ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What holds for one observation. `decision` is None where nothing was decided, because a refusal stands.
    `refused_until`: Unix seconds until which a sign-in is refused; 0: it is let in. `history`: what is remembered."""

    decision: Decision | None
    refused_until: float
    history: History


def at_the_door(rules: Rules, history: History, observation: Observation) -> Verdict:
    """What holds for a sign-in whose password was right this moment (`sign_in`), for one whose was not, and for a
    refresh token that came again. First row that fits:

        a failure, while every place is refused      nothing; it is not even counted, or whoever goes on failing
                                                     could keep a refusal alive for ever
        an unknown browser, while its place is so     refused until then; nothing is decided anew
        otherwise                                    `decide`, and what it asks for where it may be done

    A browser that the account knows is never refused: what would refuse it asks for the password, which was given this
    moment. A failure, which anybody can cause, ends no session. Whoever is let in is remembered.
    """
    known = bool(observation.device) and observation.device in history.devices
    standing = [each for each in history.refused if observation.at < each.until]
    everywhere = any(each.place == EVERYWHERE for each in standing)
    if everywhere and observation.kind == "sign_in_failed":
        return Verdict(decision=None, refused_until=0.0, history=history)
    signs_in = observation.kind == "sign_in"
    here = [each.until for each in standing if each.place in (EVERYWHERE, observation.place)]
    if signs_in and not known and here:
        counted = history if everywhere else remember(history, observation, _REFUSED)
        return Verdict(decision=None, refused_until=max(here), history=counted)
    judged_by = replace(rules, velocity=None) if everywhere else rules
    decision = _spare(decide(judged_by, history, observation), observation.kind, known=known)
    after = remember(history, observation, decision)
    if everywhere:
        after = replace(after, counts=history.counts)
    until = observation.at + decision.block_for if decision.block_for else 0.0
    if until:
        whole = any(reason.signal in _EVERYWHERE for reason in decision.reasons)
        refusal = Refusal(place=EVERYWHERE if whole else observation.place, until=until)
        after = replace(after, refused=_refuse(standing, refusal))
    elif len(standing) < len(history.refused):
        after = replace(after, refused=tuple(standing))
    if signs_in and not until:
        after = remember(after, observation, ACCEPTED)
    return Verdict(decision=decision, refused_until=until if signs_in else 0.0, history=after)


_EVERYWHERE: Final[frozenset[Signal]] = frozenset({"velocity", "refresh_reuse"})
_REFUSED: Final = Decision(outcome="block", block_for=0, reasons=())


def _spare(decision: Decision, kind: Kind, *, known: bool) -> Decision:
    if kind == "sign_in_failed" and decision.outcome == "revoke":
        milder: Outcome = "block" if decision.block_for else "notify"
        return replace(decision, outcome=milder, instead_of="revoke")
    if kind == "sign_in" and known and decision.outcome == "block":
        return replace(decision, outcome="step_up", block_for=0, instead_of="block")
    if kind == "sign_in" and known:
        return replace(decision, block_for=0)
    return decision


def _refuse(standing: list[Refusal], new: Refusal) -> tuple[Refusal, ...]:
    """The refusals with a new one. One place has one; where there is no room, what ends first gives way."""
    longest = max((each.until for each in standing if each.place == new.place), default=0.0)
    others = sorted((each for each in standing if each.place != new.place), key=_end)
    return (*others[-(MAX_REFUSALS - 1) :], replace(new, until=max(longest, new.until)))


def _end(refusal: Refusal) -> float:
    return refusal.until


# -- each rule -----------------------------------------------------------------------------------------------------


def _judge(
    signal: Signal, rules: Rules, history: History, observation: Observation
) -> tuple[Rule | None, dict[str, Figure] | None]:
    """The rule and, when it speaks, its figures."""
    match signal:
        case "new_device":
            return rules.new_device, _new_device(history, observation)
        case "new_country":
            return rules.new_country, _new_country(history, observation)
        case "impossible_travel":
            rule = rules.impossible_travel
            return rule, None if rule is None else _impossible_travel(rule, history, observation)
        case "velocity":
            return rules.velocity, _counted(rules.velocity, signal, history, observation)
        case "id_guessing":
            return rules.id_guessing, _counted(rules.id_guessing, signal, history, observation)
        case "refresh_reuse":
            return rules.refresh_reuse, {}


def _new_device(history: History, observation: Observation) -> dict[str, Figure] | None:
    if observation.device is None or not history.devices or observation.device in history.devices:
        return None
    return {"known": len(history.devices)}


def _new_country(history: History, observation: Observation) -> dict[str, Figure] | None:
    country = observation.location.country
    if country is None or not history.countries or country in history.countries:
        return None
    return {"country": country, "before": history.countries[-1]}


def _impossible_travel(rule: TravelRule, history: History, observation: Observation) -> dict[str, Figure] | None:
    before, now = history.located, observation.location
    distance = None if before is None else least_distance_km(before, now)
    if before is None or distance is None or distance < rule.minimum_km:
        return None
    if not rule.same_operator_counts and now.asn is not None and now.asn == before.asn:
        return None
    # Two clocks may disagree by a little, and an event may come late: backwards is as far as forwards.
    seconds = abs(observation.at - history.located_at)
    speed = distance * 3600 / seconds if seconds > 0 else math.inf
    if distance <= 0 or speed <= rule.speed_kmh:
        return None
    return {
        "km": round(distance, 1),
        "seconds": round(seconds, 1),
        # A number that JSON can write.
        "kmh": round(min(speed, _MAX_SPEED_KMH), 1),
    }


def _counted(
    rule: CountRule | None, signal: Signal, history: History, observation: Observation
) -> dict[str, Figure] | None:
    if rule is None:
        return None
    times = history.counts.get(signal, ())
    count = 1 + sum(observation.at - rule.window < at <= observation.at for at in times)
    return None if count < rule.attempts else {"attempts": count, "window": rule.window}


def _latest(kept: tuple[str, ...], value: str, most: int) -> tuple[str, ...]:
    return (*(each for each in kept if each != value), value)[-most:]
