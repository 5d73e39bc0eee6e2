"""The contract between use cases and stores: sessions, rate limits, tokens, and a feed of what changed.

Decides what a store promises; `stores/conformance/` proves it. The rules that hold for every verb:

- A verb is one atomic command. Absence is a value, failure is an exception (`StoreUnavailable`, or `OutcomeUnknown`
  for a write whose answer never came). Every verb ends within the store's deadline.
- Inside a verb the store's clock decides, in Unix microseconds; the answer carries it as `now_us`.
- A record is *alive* while `now_us < absolute_us` and `now_us < seen_us + idle_us` (`core.session.cause_of_death`).
  A record past a deadline behaves as ended with reason `absolute_timeout` or `idle_timeout` in every verb but `load`.
- A revoke replaces the record under its own key by a tombstone (reason and time). No verb but `sweep` removes a
  tombstone before `TOMBSTONE_US` have passed, and none ever turns it back into a record.
- Repeating a verb with the same arguments is safe: the handle of a new session serves as its operation id.
- Bytes that cannot be read back are `Unreadable`, never an exception and never somebody's session.

A store belongs to one colour when it is opened. In the blocking colour no verb ever suspends. Everything here is
data and signatures: this file must never contain a rule of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol, TypeAlias, TypeVar

from coatcheck.core.freshness import Line
from coatcheck.core.ids import IdKeys, SessionRef
from coatcheck.core.near_session import NearSession
from coatcheck.core.refresh_token import FamilyRef, NewFamily, StoredFamily
from coatcheck.core.session import NewSession, StoredSession

T = TypeVar("T")

Colour = Literal["blocking", "async"]
OnLimit = Literal["allow", "evict_oldest", "refuse", "ask"]

TOMBSTONE_US: Final = 24 * 3600 * 1_000_000
"""How long a tombstone lives at least, unless the session's absolute deadline comes first."""

REASON_SUPERSEDED: Final = "superseded"
"""Reason of a tombstone left by a sign-in that replaced the session. It is never shown as an end."""

REASON_EVICTED: Final = "session_limit"
"""Reason of a tombstone left by `admit` when a newer session took the place."""

CLOCK_STEP_SECONDS: Final = 2.0
"""By how much a store's clock may jump, against this machine's, before what was learned from it is asked again."""

REASON_REUSED: Final = "refresh_reused"
"""Reason of a tombstone left where a consumed refresh token was presented again."""

MAX_FAMILIES: Final = 20
"""Families one session may have at once; one more ends the oldest of them."""

DenialKind = Literal["sid", "jti", "sub", "client_sub", "all", "kid"]


class Signal(Protocol):
    """Something that happens once, and that any number of callers may wait for."""

    def give(self) -> None:
        """It has happened."""
        ...

    async def wait(self, seconds: float) -> bool:
        """Wait until it has happened, at most so long; whether it has."""
        ...


class Waits(Protocol):
    """The only waits that operations and stores may use; one implementation a colour."""

    def lock(self) -> AbstractAsyncContextManager[None]:
        """A new lock, not re-entrant."""
        ...

    def mutex(self) -> AbstractContextManager[object]:
        """A new lock for a few statements that never wait. Threads of either colour may share it."""
        ...

    def signal(self) -> Signal:
        """A new signal."""
        ...

    def deadline(self, seconds: float) -> AbstractAsyncContextManager[None]:
        """Bound what is awaited inside. Raises: OutcomeUnknown when the time has passed (asynchronous colour;
        blocking drivers carry the deadline on their socket)."""
        ...

    async def aside(self, work: Callable[[], T]) -> T:
        """Do something that waits for a disk where it holds up nobody else."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait so many seconds."""
        ...


# -- what verbs answer ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """A record that exists under the presented digest. Whether it has expired is the caller's rule to apply."""

    session: StoredSession
    seen_us: int
    now_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Aliased:
    """The presented id was rotated a moment ago; `sealed` holds its successor, readable by the old id's holder."""

    session: StoredSession
    seen_us: int
    now_us: int
    sealed: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A tombstone: the session was ended at `at_us` for `reason`. Answered whatever digest was presented."""

    reason: str
    at_us: int
    now_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Absent:
    """No such session. `replaced`: the session lives, but under another id (the alias has run out)."""

    why: Literal["unknown", "replaced"]
    now_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """Stored bytes that are not a session: treat as absent, and tell the operator."""

    detail: str
    now_us: int


Loaded: TypeAlias = Live | Aliased | Ended | Absent | Unreadable


@dataclass(frozen=True, slots=True, kw_only=True)
class Created:
    """The record as it was written."""

    session: StoredSession
    now_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """The record as it was written, and the handles of the sessions that had to give way."""

    session: StoredSession
    evicted: tuple[SessionRef, ...]
    now_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitReached:
    """Nothing was written: so many sessions of this owner are alive."""

    alive: tuple[SessionRef, ...]
    now_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """The changes are in the record, which is at `version` now."""

    version: int
    now_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """`expected` was asked for and the record is at another version; nothing was written."""

    version: int
    now_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Oversized:
    """The merged record would pass a limit; nothing was written."""

    now_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gone:
    """There is nothing alive to write to: ended, expired, replaced, never there or unreadable. Nothing was written."""

    reason: str
    now_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotated:
    """The new id is the session's id now."""

    version: int
    now_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Converged:
    """Another rotation of the same id came first; `sealed` holds the successor it chose."""

    sealed: bytes
    now_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Alive:
    """`expire_idle` found that the session was used since; it stays."""

    seen_us: int
    now_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Revoked:
    """`ended` is whether this call ended it (false when it was gone before, or never there)."""

    ended: bool
    now_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RevokedMany:
    """The sessions this call ended; those of the owner that were gone before are not in it."""

    ended: tuple[SessionRef, ...]
    now_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """An alive session with the time of its last activity, as lists return it."""

    session: StoredSession
    seen_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPage:
    """Alive sessions and where to go on; `cursor` is `None` at the end. A page may be empty and still go on."""

    sessions: tuple[Seen, ...]
    cursor: str | None
    now_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """Answer of a rate limit: allowed or not, what is left, and seconds until the next attempt may pass."""

    allowed: bool
    remaining: int
    retry_after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyCreated:
    """The family as it was written, and the session it belongs to."""

    family: StoredFamily
    session: StoredSession | None
    now_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyRotated:
    """The successor is the current token now. `seen_us` is the session's last activity before this call (0 without a
    session)."""

    family: StoredFamily
    session: StoredSession | None
    seen_us: int
    now_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyKept:
    """The presented token is current and younger than the grace: it stays the current one."""

    family: StoredFamily
    session: StoredSession | None
    seen_us: int
    now_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyReplayed:
    """The immediate predecessor, within the grace. `sealed` holds the successor; `None` once that has been used."""

    family: StoredFamily
    session: StoredSession | None
    seen_us: int
    sealed: bytes | None
    now_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyReused:
    """A consumed token was presented again: this call ended the family, and `session` if it is not `None`."""

    family: StoredFamily
    session: SessionRef | None
    now_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyEnded:
    """The family or its session was over before this call."""

    reason: str
    at_us: int
    now_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WrongHolder:
    """Another client, or another key, than the family was granted to. Nothing was written."""

    now_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyUnknown:
    """No such family, or a token of it that was never issued. Nothing was written."""

    now_us: int


RefreshOutcome: TypeAlias = (
    FamilyRotated | FamilyKept | FamilyReplayed | FamilyReused | FamilyEnded | WrongHolder | FamilyUnknown
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What the store knows about an access token: `why` it must not be accepted any more, or `None`."""

    why: str | None
    at_us: int
    now_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Denial:
    """One entry of the denylist. It decides nothing after `until_us`.

    `id` by kind: `sid` the session as `session_denial_id` writes it; `jti` the token's; `kid` the key's; `sub` the
    subject; `client_sub` the client id, a line feed and the subject; `all` empty. The last three deny what was
    issued before `not_before_us`; for the others it is 0.
    """

    kind: DenialKind
    id: str
    until_us: int
    not_before_us: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DenialPage:
    """Entries that still decide something, in the order they were made. `position` goes back in as `after`."""

    entries: tuple[Denial, ...]
    position: str
    more: bool
    now_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionLost:
    """`after` is no position of this log, or lies ahead of it (a restored store): begin again."""

    now_us: int


def session_denial_id(ref: SessionRef) -> str:
    """How a denied session is named in the log: four hexadecimal digits of its tag, a dot, its handle."""
    return f"{ref.tag:04x}.{ref.handle}"


# -- what verbs take -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What one commit does to the fields: names to set (encoded values) and names to delete."""

    put: Mapping[str, str] = field(default_factory=dict)
    delete: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordLimits:
    """`octets` counts names and encoded values of all fields together; `fields` counts the fields."""

    octets: int
    fields: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """The session was used at `seen_us`. `owner` names the index it is in."""

    ref: SessionRef
    owner: str
    seen_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimit:
    """At most `attempts` in any `period` seconds, regained evenly (generic cell rate algorithm)."""

    attempts: int
    period: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What somebody chose at a limit: to end `ending`, having been shown `shown`, the sessions alive then. Handles."""

    shown: frozenset[str]
    ending: frozenset[str]


class SessionStore(Protocol):
    """Sessions: create, load, commit, end, list. See the module's text for what holds for every verb."""

    @property
    def colour(self) -> Colour:
        """Which face may use this store."""
        ...

    @property
    def shared(self) -> bool:
        """Whether other processes see the same sessions. A store that is not shared says so at start."""
        ...

    async def open(self) -> None:
        """Connect. Safe to call again. Raises: StoreUnavailable, MigrationRequired."""
        ...

    async def close(self) -> None:
        """Let go of every connection and thread. The store may be opened again."""
        ...

    async def ping(self) -> int:
        """One round trip; returns the store's clock in Unix microseconds."""
        ...

    async def id_keys(self, candidate: IdKeys) -> IdKeys:
        """The keys of this store's ids: the stored ones, or `candidate` if there were none.

        Of many first callers at once exactly one candidate wins and all receive it. Never changes afterwards.
        """
        ...

    async def local_key(self, candidate: bytes) -> bytes | None:
        """The 32-byte server key, where the store is embedded: made once and kept *outside* the stored data.

        `None` on a shared store: there the operator sets one, or rotation has no alias.
        """
        ...

    def peek(self, value: bytes) -> NearSession | None:
        """The session of these octets of a cookie, if it is known here and to be believed now: never waits, does no
        I/O that could. `None` means: ask `load`. A store without a near copy knows nothing."""
        ...

    async def create(self, new: NewSession) -> Created:
        """Write a session that must be new. `created_us` is later than every `revoke_owner` of its owner.

        The same handle with the same digest again is the same call repeated and answers alike; the same handle with
        another digest raises StoreUnavailable (2**96 handles: somebody's random source is broken).
        """
        ...

    async def admit(
        self,
        new: NewSession,
        *,
        maximum: int,
        on_limit: OnLimit,
        supersedes: SessionRef | None = None,
        choice: Choice | None = None,
        reason: str = REASON_EVICTED,
        deny_us: int = 0,
    ) -> Admitted | LimitReached:
        """Create under a limit, exactly: never more than `maximum` alive sessions of this owner afterwards.

        `supersedes` is an older session of the same owner that this one replaces: it is ended with
        `REASON_SUPERSEDED` in the same command and does not count. `allow` always creates. `evict_oldest` ends the
        oldest (by creation) with `reason` until the new one fits. `refuse` and `ask` write nothing when the limit is
        reached.

        With a `choice` the four answers do not count: exactly the sessions of `ending` are ended with `reason` and the
        new one is created, if those that count are exactly `shown`, `ending` is among them, and the new one fits then;
        else nothing is written (`LimitReached`). So whoever chose has seen every session that lives on beside his.

        Exact under any number of simultaneous calls. Repeats answer like the first call. `deny_us`: see `revoke`, for
        every session this call ends.
        """
        ...

    async def load(self, ref: SessionRef, digest: str) -> Loaded:
        """Read the session, its last activity and its tombstone, in one command that writes nothing.

        Of a session that is past a deadline the last activity may read earlier than it was, never later.
        """
        ...

    async def commit(
        self, ref: SessionRef, changes: Changes, *, limits: RecordLimits, expected: int | None = None
    ) -> Committed | Conflict | Oversized | Gone:
        """Merge fields into an alive record: per field the last writer wins, other fields are untouched.

        Raises the version by one. Never creates. With `expected` it writes only over that version.
        """
        ...

    async def touch(self, activities: Sequence[Activity]) -> None:
        """Move last activity forward, never back, never beyond the store's clock, and only on alive sessions.

        Does not change the record or its version. Atomic per session, not per batch.
        """
        ...

    async def rotate_id(
        self,
        ref: SessionRef,
        *,
        old_digest: str,
        new_digest: str,
        sealed: bytes,
        alias_us: int,
        authority: str | None = None,
    ) -> Rotated | Converged | Gone:
        """Let a new id take the old one's place.

        With `authority` the privileges change too: the old id is dead at once and there is no alias. Without it the
        old id is answered with `sealed` for `alias_us` (0: no alias), and of simultaneous rotations of one id the
        first wins and the others converge on its successor. The alias is not kept longer than `alias_us`.
        """
        ...

    async def expire_idle(self, ref: SessionRef) -> Alive | Gone:
        """End a session whose idle timeout has passed, after reading its last activity again; leaves a tombstone."""
        ...

    async def revoke(self, ref: SessionRef, *, reason: str, deny_us: int = 0) -> Revoked:
        """End one session, its families with it, and leave a tombstone. The first reason stays.

        With `deny_us` the same command also puts the session on the denylist until `now_us + deny_us` (`TokenStore`),
        whether or not this call ended it: a repeated call must be able to make up for one that was cut off.
        """
        ...

    async def revoke_owner(
        self, tag: int, owner: str, *, reason: str, keep: SessionRef | None = None, deny_us: int = 0
    ) -> RevokedMany:
        """End every session of a subject created until now (but `keep`), those being created at once included:
        a session whose `created_us` is not after this call's cut is never answered alive again. Families of the owner
        that stand alone end too. `deny_us`: see `revoke`, for every session this call ends."""
        ...

    async def list_by_owner(self, tag: int, owner: str, *, after: str | None, limit: int) -> StoredPage:
        """Alive sessions of a subject, oldest first. Never lists the dead. Raises: ValueRefused on a bad cursor."""
        ...

    async def scan(self, *, after: str | None, limit: int) -> StoredPage:
        """Alive sessions of everybody, in the store's own order, each at least once if alive throughout.

        For administration, never on a request path. Raises: ValueRefused on a cursor this store did not give.
        """
        ...

    async def sweep(self, *, limit: int) -> int:
        """Remove up to `limit` records and tombstones that no longer decide anything; returns how many."""
        ...


class RateLimits(Protocol):
    """Counters that refuse. Keys are the caller's, at most 200 characters; stores hash or escape them."""

    async def hit(self, key: str, limit: RateLimit, *, cost: int = 1) -> Hit:
        """Take `cost` attempts if there is room; exactly `attempts` pass out of any number at once."""
        ...

    async def clear(self, key: str) -> None:
        """Forget the attempts under this key."""
        ...


class TokenStore(Protocol):
    """Refresh families, the denylist and the sealed key ring. What the module's text says holds for these verbs too.

    A family that belongs to a session lives under that session: no verb answers it once the session is over, and
    whatever ends the session removes its families in the same command.
    """

    async def create_family(self, new: NewFamily) -> FamilyCreated | Gone:
        """Begin a family with its first token (generation 1, `new.digest`).

        `Gone` when it belongs to a session that is not alive. A session keeps at most `MAX_FAMILIES`; one more drops
        those that are over, and if that is not enough the oldest. The same reference with the same digest again answers
        alike while that token is the current one of a family that was not ended; else it raises StoreUnavailable.
        """
        ...

    async def rotate_refresh(
        self,
        ref: FamilyRef,
        *,
        generation: int,
        digest: str,
        successor: str,
        sealed: bytes,
        grace_us: int,
        client: str,
        key: str,
        deny_us: int = 0,
    ) -> RefreshOutcome:
        """Exchange a refresh token; of any number at once exactly one successor comes into being. First row that fits:

            the session it belongs to is not there                   FamilyUnknown
            the session is over                                      FamilyEnded(the session's reason)
            the family is not there                                  FamilyUnknown
            client or key differ                                     WrongHolder
            the family was ended                                     FamilyEnded(its reason)
            it stands alone and its owner was cut off since          FamilyEnded(the cut's reason)
            now >= absolute_us, or now >= rotated_us + idle_us       FamilyEnded(absolute_timeout or idle_timeout)
            current generation, current digest, younger than grace   FamilyKept; a sealed successor is deleted
            current generation, current digest                       FamilyRotated
            current generation otherwise, or a later generation      FamilyUnknown
            predecessor's digest, and `successor` is current         FamilyRotated (the same call again)
            predecessor's digest, within its grace                   FamilyReplayed
            predecessor's generation, another digest                 FamilyUnknown
            any older generation, or the predecessor after its grace FamilyReused

        "Younger than grace": `now < rotated_us + grace_us`; the predecessor's grace ends `grace_us` after the rotation
        that consumed it (as that call gave it). A rotation sets `rotated_us` to now and raises the generation by one.
        `FamilyRotated`, `FamilyKept` and `FamilyReplayed` move the session's last activity to now. `FamilyReused` ends
        the family with `REASON_REUSED`, and, for the first party (`client` is empty), its session with the same reason
        in the same command (`deny_us` as in `revoke`). An ended family is kept until it would have ended anyway.
        """
        ...

    async def standing(self, ref: SessionRef, jti: str) -> Standing:
        """Whether an access token of this session may still be accepted, in one command that writes nothing.

        `why` is "denied" for a `jti` on the denylist, else why the session is not alive ("unknown" when it is not
        there), else `None`. The id the session was created with does not matter.
        """
        ...

    async def deny(self, tag: int, denial: Denial) -> None:
        """Put one entry on the denylist; `tag` places it (for a `jti` its session's, else 0). Repeating is safe."""
        ...

    async def denials(self, *, after: str | None, limit: int) -> DenialPage | PositionLost:
        """The denylist in the order of commits; `after=None` begins at its start. Entries past `until_us` are left out.

        Whoever follows `position` misses nothing: an entry never appears behind a position that was given out.
        """
        ...

    async def read_ring(self) -> tuple[int, bytes] | None:
        """The sealed key ring with its version, or `None` before there is one."""
        ...

    async def write_ring(self, packed: bytes, *, expected: int) -> bool:
        """Replace the ring (at most 256 KiB) if it is still at `expected`, 0 before there is one; it is at
        `expected + 1` then."""
        ...


class Listener(Protocol):
    """Who is told by a feed. Every call returns at once, may come from any thread, and is made *before* anything that
    happened later is confirmed."""

    def changed(self, handle: str) -> None:
        """The session with this handle was written, ended or removed, whoever did it."""
        ...

    def cut_off(self, tag: int) -> None:
        """All sessions of a subject with this tag were ended at once."""
        ...

    def emptied(self) -> None:
        """Anything may have changed: the store was emptied, or a message could not be understood."""
        ...


class Feed(Protocol):
    """What changed in a store, for near copies. One line for each primary.

    A line is confirmed only by an answer of the connection that carries its messages, after everything that was told
    before that answer has reached the listener, and from the moment the question was sent. It is cut when that
    connection ends, when the store behind it is another one, when its clock was stepped by more than
    `CLOCK_STEP_SECONDS`, and after a fork; messages may then have been missed. Nothing here raises: a feed that cannot
    be had is a line that is not there, and every check reads the store.
    """

    def line(self, tag: int) -> Line | None:
        """The unbroken line that tells of sessions with this tag; its lease may have run out."""
        ...

    def slot(self, tag: int) -> int:
        """Which of the line's marks speaks for this tag; 0 where there are none."""
        ...

    def drain(self) -> None:
        """Tell the listener what has arrived, without waiting. For threads; an event loop does it by itself."""
        ...

    async def renew(self, tag: int) -> Line | None:
        """One question to the primary of this tag, connecting if need be; the line if it was answered.

        One at a time: while another caller is at it, or shortly after it failed, `None` at once. Ends well within the
        store's deadline, so that a feed that hangs never costs a request its answer from the store.
        """
        ...

    async def beat(self) -> None:
        """Confirm every line whose lease is to be kept, and try to have those that are broken again."""
        ...

    async def close(self) -> None:
        """Cut the lines and let go of the connections. Used again, it connects again."""
        ...


class FedStore(Protocol):
    """A store that tells what changed."""

    def feed(self, listener: Listener, *, lease: float) -> Feed:
        """A feed for one near copy. `lease` in seconds: how long a confirmation of a line counts. Connects when it is
        first asked for something."""
        ...


class Store(SessionStore, RateLimits, TokenStore, FedStore, Protocol):
    """Everything a backend of this release offers."""
