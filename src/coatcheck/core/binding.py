"""Whether a request comes from the place its session was signed in at, and what was decided about other places.

Decides what a place is (network, family of the user agent, device cookie), which of it counts (`BindingPolicy`), and
when it is another one: at every request, not at sign-in alone (ASVS 8.2.4). Decides too how decisions about other
places are kept, so that one of them holds on every node (SEMANTICS 8). The order of the comparison:

    a trait that counts differs, or is gone              Mismatch
    the address is of a family not seen before           NewFamily: told, and never refused (happy eyeballs, RFC 8305)
    otherwise                                            Match

A trait that was not recorded at sign-in cannot differ. A place is packed into a few octets; a near copy that keeps
those of the last request that matched answers the next one by one equality. A place is a hint and never a proof: who
has copied a cookie may have copied the device cookie beside it, and anybody can send any user agent. Nothing here may
ever let somebody in; it can only ask for more. This file must never read a clock, look a name up or ask a store.
"""

from __future__ import annotations

from base64 import b64decode, urlsafe_b64encode
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, Literal, TypeAlias, get_args

import msgspec

from coatcheck.core.freshness import BoundedTable
from coatcheck.core.geo import Geography
from coatcheck.core.user_agent import MAX_FAMILY_CHARACTERS, MAX_USER_AGENT_CHARACTERS, agent_family
from coatcheck.core.values import RESERVED
from coatcheck.errors import ConfigurationError, ValueRefused

NetworkRule = Literal["off", "exact", "prefix", "asn", "country"]
Outcome = Literal["allow", "notify", "step_up", "block", "revoke"]
"""What follows, from the mildest to the sternest: nothing; the owner is told; the password is asked for again; the
place is refused for a while and the session's own place is asked for the password; the session is over."""

OUTCOMES: Final[tuple[Outcome, ...]] = get_args(Outcome)
Trait = Literal["network", "user_agent", "device"]
Family = Literal["4", "6"]

MAX_ADDRESS_CHARACTERS: Final = 64
MAX_DEVICE_CHARACTERS: Final = 64
MAX_PLACES: Final = 8
"""Places of one session about which a decision is kept."""

PLACES_FIELD: Final = f"{RESERVED}places"
"""The field of a session that holds them."""

MAX_PLACES_OCTETS: Final = 2048
"""What that field takes at most."""

OBSERVE_EVERY_US: Final = 60_000_000
"""One `observe` for a place and so many microseconds."""

_REMEMBERED: Final = 4096
_DEVICE_OCTETS: Final = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class BindingPolicy:
    """What of a place counts during a session, and what follows when it is another one.

    `network`: `exact` the address itself (breaks when a phone changes cells, and each day with IPv6 privacy addresses);
    `prefix` its /24 or /64; `asn` and `country` need a table of addresses, and fall back to the prefix for an address
    that is not in it. `user_agent`: family of browser and system, without versions. `device`: the device cookie.
    `block_for`: seconds for which `block` refuses a place. The default compares nothing.
    """

    network: NetworkRule = "off"
    user_agent: bool = False
    device: bool = False
    on_mismatch: Outcome = "notify"
    block_for: int = 900

    def __post_init__(self) -> None:
        if self.network not in get_args(NetworkRule):
            raise ConfigurationError(f"binding.network: one of {', '.join(get_args(NetworkRule))}")
        if self.on_mismatch not in OUTCOMES or self.on_mismatch == "allow":
            raise ConfigurationError(f"binding.on_mismatch: one of {', '.join(OUTCOMES[1:])}")
        if not 1 <= self.block_for <= 86_400:
            raise ConfigurationError("binding.block_for: 1 to 86400 seconds")

    @property
    def compares(self) -> bool:
        """Whether anything is compared at all."""
        return self.network != "off" or self.user_agent or self.device


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A place as one policy sees it. Empty: not known, or of no account.

    `four` and `six` are the keys of the network in each address family (a request has one, a session up to two);
    `agent` is the family of the user agent in ASCII; `device` is what of the device's id counts.
    """

    four: bytes = b""
    six: bytes = b""
    agent: bytes = b""
    device: bytes = b""

    def pack(self) -> bytes:
        """The octets of this place: equal exactly when the places are. At most `MAX_PLACE_OCTETS`, mostly below 40."""
        parts = (self.four, self.six, self.agent, self.device)
        return bytes(map(len, parts)) + b"".join(parts)


def unpack_place(packed: bytes) -> Place:
    """The place of these octets. Raises: ValueError for octets that `pack` cannot have made."""
    lengths = packed[:4]
    if len(lengths) < 4 or len(packed) != 4 + sum(lengths) or any(map(int.__gt__, lengths, _LONGEST)):
        raise ValueError("not a packed place")
    parts: list[bytes] = []
    start = 4
    for length in lengths:
        parts.append(packed[start : start + length])
        start += length
    four, six, agent, device = parts
    if not agent.isascii():
        raise ValueError("not a packed place")
    return Place(four=four, six=six, agent=agent, device=device)


# -- reading a place -----------------------------------------------------------------------------------------------


class Surveyor:
    """Reads places as one policy sees them.

    Keeps what it has read of addresses and user agents (at most 4,096 of each): parsing an address takes longer than
    the whole check of a session. Threads may share one.
    """

    def __init__(self, policy: BindingPolicy, geography: Geography | None = None) -> None:
        """Raises: ConfigurationError for a rule that needs a table of addresses where there is none."""
        if policy.network in ("asn", "country") and geography is None:
            raise ConfigurationError(
                f"binding.network: {policy.network} needs a table of addresses; give one, or prefix"
            )
        self.policy: Final = policy
        self._geography = geography
        self._networks: BoundedTable[tuple[bytes, bytes]] = BoundedTable(_REMEMBERED)
        self._agents: BoundedTable[bytes] = BoundedTable(_REMEMBERED)

    def seen(self, address: str | None, user_agent: str, device: str | None) -> Place:
        """The place of a request. `address` comes from `core.network.client_address`, `device` from a device cookie
        whose check was verified; what is no address counts as none."""
        four, six = self._network(address)
        return Place(four=four, six=six, agent=self._agent(user_agent), device=self._device(device))

    def recorded(self, networks: Mapping[str, str], user_agent: str, device: str | None) -> Place:
        """The place of a session, from what its record holds (`core.session.Authority`): recorded in full, so that a
        stricter policy applies to sessions that are alive."""
        return Place(
            four=self._network(networks.get("4"))[0],
            six=self._network(networks.get("6"))[1],
            agent=self._agent(user_agent),
            device=self._device(device),
        )

    def _network(self, address: str | None) -> tuple[bytes, bytes]:
        if address is None or self.policy.network == "off":
            return b"", b""
        # Bounded before it is parsed or kept; the longest form of an address, with a zone, is shorter.
        if len(address) > MAX_ADDRESS_CHARACTERS:
            return b"", b""
        known = self._networks.get(address)
        if known is None:
            known = _network_keys(address, self.policy.network, self._geography)
            self._networks.put(address, known)
        return known

    def _agent(self, user_agent: str) -> bytes:
        if not self.policy.user_agent:
            return b""
        text = user_agent[:MAX_USER_AGENT_CHARACTERS]
        known = self._agents.get(text)
        if known is None:
            known = agent_family(text).encode("ascii")
            self._agents.put(text, known)
        return known

    def _device(self, device: str | None) -> bytes:
        return device_key(device) if self.policy.device and device is not None else b""


def device_key(device: str) -> bytes:
    """What of a device's id counts: 72 bits of its digest; empty for one too long to be ours."""
    if not device or len(device) > MAX_DEVICE_CHARACTERS:
        return b""
    return sha256(device.encode("utf-8", "surrogatepass")).digest()[:_DEVICE_OCTETS]


def _network_keys(address: str, rule: NetworkRule, geography: Geography | None) -> tuple[bytes, bytes]:
    try:
        parsed = ip_address(address)
    except ValueError:
        return b"", b""
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is not None:
        # ::ffff:203.0.113.7 is the same client as 203.0.113.7.
        parsed = parsed.ipv4_mapped
    key = _network_key(parsed, rule, geography)
    return (key, b"") if parsed.version == 4 else (b"", key)


def _network_key(address: IPv4Address | IPv6Address, rule: NetworkRule, geography: Geography | None) -> bytes:
    if rule == "exact":
        return b"x" + address.packed
    if rule != "prefix" and geography is not None:
        # Without its zone, which names an interface of ours.
        where = geography.locate(str(address).partition("%")[0])
        if rule == "asn" and where.asn is not None:
            return b"a" + where.asn.to_bytes(4, "big")
        if rule == "country" and where.country is not None:
            return b"c" + where.country.encode("ascii")
    return b"p" + address.packed[: 3 if address.version == 4 else 8]


_LONGEST: Final = (
    1 + 4,
    1 + 16,
    MAX_FAMILY_CHARACTERS,
    _DEVICE_OCTETS,
)
MAX_PLACE_OCTETS: Final = 4 + sum(_LONGEST)
"""The longest packed place."""


# -- comparing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Nothing that counts differs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewFamily:
    """Everything else matches, and the address is of a family this session has not been seen in: record it and tell
    the owner. It is never refused."""

    family: Family


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """What differs, in the order network, user agent, device; at least one."""

    traits: tuple[Trait, ...]


Comparison: TypeAlias = Match | NewFamily | Mismatch


def compare(policy: BindingPolicy, recorded: Place, seen: Place) -> Comparison:
    """Whether a request comes from where its session belongs; both places as a surveyor of this policy reads them."""
    differ: list[Trait] = []
    family: Family | None = None
    if policy.network != "off" and (recorded.four or recorded.six):
        if seen.four and not recorded.four:
            family = "4"
        elif seen.six and not recorded.six:
            family = "6"
        # An address that cannot be told any more is no reason to believe that it is the same.
        elif (
            not (seen.four or seen.six) or seen.four not in (b"", recorded.four) or seen.six not in (b"", recorded.six)
        ):
            differ.append("network")
    elif policy.network != "off" and (seen.four or seen.six):
        family = "4" if seen.four else "6"
    if policy.user_agent and recorded.agent and seen.agent != recorded.agent:
        differ.append("user_agent")
    if policy.device and recorded.device and seen.device != recorded.device:
        differ.append("device")
    if differ:
        return Mismatch(traits=tuple(differ))
    return Match() if family is None else NewFamily(family=family)


def explain_mismatch(recorded: Place, seen: Place, found: NewFamily | Mismatch) -> dict[str, str | int | float | bool]:
    """What an event tells about it: names, networks and families. Of a device only whether there was one."""
    if isinstance(found, NewFamily):
        return {"new_family": found.family, "network": network_text(seen.four or seen.six)}
    told: dict[str, str | int | float | bool] = {"differs": " ".join(found.traits)}
    if "network" in found.traits:
        told["network_recorded"] = network_text(recorded.six if seen.six else recorded.four or recorded.six)
        told["network"] = network_text(seen.four or seen.six)
    if "user_agent" in found.traits:
        told["agent_recorded"] = recorded.agent.decode("ascii")
        told["agent"] = seen.agent.decode("ascii") or "none"
    if "device" in found.traits:
        told["device"] = "another" if seen.device else "none"
    return told


def network_text(key: bytes) -> str:
    """The key of a network as people read it: "203.0.113.0/24", "AS64496", "KR"; "unknown" for none."""
    if not key:
        return "unknown"
    kind, value = key[:1], key[1:]
    if kind == b"a":
        return f"AS{int.from_bytes(value, 'big')}"
    if kind == b"c":
        return value.decode("ascii", "replace")
    whole = 4 if len(value) <= 4 else 16
    text = str(ip_address(value.ljust(whole, b"\0")))
    return text if kind == b"x" else f"{text}/{len(value) * 8}"


# -- what was decided about other places ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownPlace:
    """One place (packed) and what was decided about it at `decided_us`; times are Unix microseconds of the store.

    `allow`: somebody has proven himself there. A `block` refuses until `until_us`; at that very moment it has run out,
    and the next request is decided anew. `seen_us` is when it was last observed.
    """

    place: bytes
    outcome: Outcome
    decided_us: int
    until_us: int
    seen_us: int

    def has_run_out(self, now_us: int) -> bool:
        """Whether the decision does not count any more."""
        return self.outcome == "block" and now_us >= self.until_us


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """What was decided about the places of one session, the latest decision last.

    `challenged_us`: when a place was last refused. The place the session belongs to is then asked for the password as
    well, until somebody has proven himself there: of two who hold one cookie nobody can say which one is the owner.
    `networks`: address families that appeared after sign-in, with the address each appeared with.
    """

    known: tuple[KnownPlace, ...] = ()
    challenged_us: int = 0
    networks: tuple[tuple[Family, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """The answer of an observation. `decided` is true for exactly one of any number of simultaneous callers: that one
    tells the owner. `full`: there is no room to keep the decision, so it holds for this request alone, and nobody is
    told once more."""

    places: Places
    outcome: Outcome
    until_us: int
    decided: bool
    full: bool = False


def observe(places: Places, place: bytes, *, outcome: Outcome, now_us: int, block_us: int) -> Observed:
    """Decide about a place, once for everybody. First row that fits:

        somebody has proven himself there, and `outcome` is no more than `step_up`   allow
        it is known, its decision has not run out and is as stern as `outcome`        the decision that stands
        it is known otherwise                                                         `outcome`, kept in its place
        there is room, or another place asks for nothing any more                     `outcome`, kept
        otherwise                                                                     `outcome`, not kept (`full`)

    So a mild decision never replaces a sterner one, whichever node comes first. A decision that stands moves `seen_us`,
    once in `OBSERVE_EVERY_US`. What gives way is what the owner was only told of, what was proven or has run out, of
    these the one seen longest ago: a place that is refused must not be forgotten by visiting eight others. Nothing
    gives way within `OBSERVE_EVERY_US` of being seen: who changes his user agent with each request would write each
    time.
    Raises: ValueRefused for octets that are no place.
    """
    if not 4 <= len(place) <= MAX_PLACE_OCTETS:
        raise ValueRefused("a place has the octets that Place.pack gives it")
    known = next((each for each in places.known if each.place == place), None)
    if known is not None and _stands(known, outcome, now_us):
        if now_us >= known.seen_us + OBSERVE_EVERY_US:
            moved = replace(known, seen_us=now_us)
            places = replace(places, known=tuple(moved if each is known else each for each in places.known))
        return Observed(places=places, outcome=known.outcome, until_us=known.until_us, decided=False)
    until_us = now_us + block_us if outcome == "block" else 0
    before = places
    if outcome == "block":
        places = replace(places, challenged_us=now_us)
    gives_way = known
    if known is None and len(places.known) >= MAX_PLACES:
        idle = [
            each for each in places.known if _asks_nothing(each, now_us) and now_us >= each.seen_us + OBSERVE_EVERY_US
        ]
        if not idle:
            # Nothing is written for a place that cannot be kept: else every request from it would write.
            places = before if before.challenged_us else places
            return Observed(places=places, outcome=outcome, until_us=until_us, decided=False, full=True)
        gives_way = min(idle, key=_last_seen)
    fresh = KnownPlace(place=place, outcome=outcome, decided_us=now_us, until_us=until_us, seen_us=now_us)
    return Observed(places=_keep(places, fresh, gives_way), outcome=outcome, until_us=until_us, decided=True)


def add_family(places: Places, family: Family, address: str) -> tuple[Places, bool]:
    """Record an address family that appeared for the first time; true for exactly one of any number of callers.

    Who comes second compares again: with what the first one recorded, it may be a mismatch.
    """
    if any(known == family for known, _ in places.networks):
        return places, False
    return replace(places, networks=(*places.networks, (family, address[:MAX_ADDRESS_CHARACTERS]))), True


def prove(places: Places, place: bytes, *, matches: bool, family: Family | None, now_us: int) -> Places:
    """Whoever is at this place has given the password again: it is one of the owner's from now on.

    `matches`: it is the place the session belongs to (`compare`), with an address of this `family`. A network that
    was only told of then stays no longer, unless it is this one: nobody has proven anything there. A refused place
    cannot prove anything while it is refused. The other places stay as they were decided. The caller gives the session
    a new id in the same step: a copied cookie must not gain from it.
    """
    if matches:
        return replace(places, challenged_us=0, networks=tuple(each for each in places.networks if each[0] == family))
    if refusal_of(places, place, now_us=now_us) is not None:
        return places
    gives_way = known = next((each for each in places.known if each.place == place), None)
    if known is None and len(places.known) >= MAX_PLACES:
        # Room in any case: with eight copies of a cookie nobody may keep the owner from proving himself.
        gives_way = min(places.known, key=lambda each: (not _asks_nothing(each, now_us), _is_block(each), each.seen_us))
    proven = KnownPlace(place=place, outcome="allow", decided_us=now_us, until_us=0, seen_us=now_us)
    return _keep(places, proven, gives_way)


def refusal_of(places: Places, place: bytes, *, now_us: int) -> KnownPlace | None:
    """The decision that refuses a place and has not run out; None where nothing does."""
    known = next((each for each in places.known if each.place == place), None)
    if known is None or severity(known.outcome) < severity("block") or known.has_run_out(now_us):
        return None
    return known


def decision_at(places: Places, place: bytes, *, matches: bool, least: Outcome, now_us: int) -> Outcome | None:
    """What holds for a request from this place with nothing asked of a store; None: it has to be observed.

    `least` is the policy's `on_mismatch`: where that was milder when the place was decided about, it is decided anew.
    """
    if matches:
        return "step_up" if places.challenged_us else "allow"
    known = next((each for each in places.known if each.place == place), None)
    return known.outcome if known is not None and _stands(known, least, now_us) else None


def pack_places(places: Places) -> str:
    """The text that a session keeps of its places, at most `MAX_PLACES_OCTETS`."""
    known = [
        (urlsafe_b64encode(each.place).decode("ascii"), each.outcome, each.decided_us, each.until_us, each.seen_us)
        for each in places.known
    ]
    return _encoder.encode((places.challenged_us, places.networks, known)).decode("utf-8")


def unpack_places(text: str) -> Places:
    """What `pack_places` made; nothing is known of no text. Raises: ValueError for any other text."""
    if not text:
        return Places()
    if len(text) > MAX_PLACES_OCTETS:
        raise ValueError("places: too long")
    try:
        challenged_us, networks, known = _decoder.decode(text)
        places = Places(
            known=tuple(
                KnownPlace(
                    place=b64decode(place, altchars=b"-_", validate=True),
                    outcome=outcome,
                    decided_us=decided_us,
                    until_us=until_us,
                    seen_us=seen_us,
                )
                for place, outcome, decided_us, until_us, seen_us in known
            ),
            challenged_us=challenged_us,
            networks=networks,
        )
    except (msgspec.MsgspecError, ValueError) as broken:
        raise ValueError("places: not what was written") from broken
    if any(not 4 <= len(each.place) <= MAX_PLACE_OCTETS for each in places.known):
        raise ValueError("places: octets that are no place")
    return places


def severity(outcome: Outcome) -> int:
    """How stern an outcome is: its position in `OUTCOMES`."""
    return OUTCOMES.index(outcome)


def _stands(known: KnownPlace, outcome: Outcome, now_us: int) -> bool:
    if known.outcome == "allow":
        return severity(outcome) <= severity("step_up")
    return not known.has_run_out(now_us) and severity(known.outcome) >= severity(outcome)


def _asks_nothing(known: KnownPlace, now_us: int) -> bool:
    return severity(known.outcome) <= severity("notify") or known.has_run_out(now_us)


def _is_block(known: KnownPlace) -> bool:
    return known.outcome == "block"


def _last_seen(known: KnownPlace) -> int:
    return known.seen_us


def _keep(places: Places, fresh: KnownPlace, gives_way: KnownPlace | None) -> Places:
    return replace(places, known=(*(each for each in places.known if each is not gives_way), fresh))


_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[
    tuple[int, tuple[tuple[Family, str], ...], tuple[tuple[str, Outcome, int, int, int], ...]]
] = msgspec.json.Decoder(tuple[int, tuple[tuple[Family, str], ...], tuple[tuple[str, Outcome, int, int, int], ...]])
