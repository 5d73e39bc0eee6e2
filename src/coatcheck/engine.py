"""Store, settings, clock and randomness bound together: every operation as one `async def`.

Decides nothing about sessions (operations and core do) but owns what lives as long as the process: the id keys, the
server key, activity that waits for its batch, sign-ins whose outcome nobody knows, and publishing events. What it
knows of tokens is how long those of an ended session must be denied; the rest is `issuer.py`'s. It must never know
which store it has or which framework calls it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import wraps
from typing import Any, Concatenate, Final, ParamSpec, TypedDict, TypeVar, cast

from coatcheck.core.access_token import RESERVED_CLAIMS, AccessToken
from coatcheck.core.activity import activity_due
from coatcheck.core.admission import cause_of
from coatcheck.core.binding import Surveyor
from coatcheck.core.denylist import denial_us
from coatcheck.core.filter import SessionFilter
from coatcheck.core.freshness import FOR_EVER, NEVER, BoundedTable, Line
from coatcheck.core.ids import (
    HANDLE_BYTES,
    KEY_OF,
    SECRET_BYTES,
    IdKeys,
    SessionId,
    SessionRef,
    mint_session_id,
    owner_of,
    parse_session_id,
    parse_sid,
    random_tag,
    sid_of,
    subject_tag,
    successor_of,
)
from coatcheck.core.near_session import NearSession
from coatcheck.core.network import family_of
from coatcheck.core.ports import (
    REASON_SUPERSEDED,
    Activity,
    Changes,
    Choice,
    Committed,
    Created,
    Loaded,
    SessionStore,
    TokenStore,
    Waits,
)
from coatcheck.core.profiles import OutagePolicy
from coatcheck.core.refresh_token import LAST_GENERATION, RefreshToken, mint_refresh_token, parse_refresh_token
from coatcheck.core.refresh_token import SECRET_BYTES as REFRESH_SECRET_BYTES
from coatcheck.core.session import (
    SECOND_US,
    Authentication,
    Authority,
    NewSession,
    StoredSession,
    decode_authority,
    encode_authority,
)
from coatcheck.core.sign_in import SignIn
from coatcheck.deadlines import outside, within
from coatcheck.errors import (
    ConfigurationError,
    PlaceRefused,
    RefreshInvalid,
    SessionEnded,
    SessionGone,
    StepUpRequired,
    StoreUnavailable,
    TokenInvalid,
    Unconfirmed,
    ValueRefused,
)
from coatcheck.events import Event, EventKind
from coatcheck.issuer import Exchanged, Issuer, refusal_of
from coatcheck.journal import Journal, SignOut
from coatcheck.operations import commit as committing
from coatcheck.operations import keys as key_work
from coatcheck.operations import revoke as revoking
from coatcheck.operations.login import OldSession, SignedIn, SignInRefused, login
from coatcheck.operations.place import Judged, judge_place, prove_place
from coatcheck.operations.resume import NotResumed, Resumed, Resumption, open_copy, reopen, resume
from coatcheck.operations.rotate import NewId, rotate
from coatcheck.operations.take_up import go_on
from coatcheck.operations.tokens import NotRefreshed, Refreshed
from coatcheck.operations.tokens import refresh as exchange_refresh
from coatcheck.places import Binding, ClientPlace
from coatcheck.primitives.seal import NONCE_SIZE
from coatcheck.settings import SessionLimit, Settings, TokenSettings, reach_of, told_after
from coatcheck.sign_outs import SignOuts
from coatcheck.stores.near import NearStore
from coatcheck.system import System

log: Final = logging.getLogger("coatcheck")

P = ParamSpec("P")
T = TypeVar("T")

MAX_WAITING: Final = 100_000
TOUCHES_AT_ONCE: Final = 1_000
"""Sessions whose use is noted by one command: what waits after an outage may be too much for one deadline."""

MAX_UNKNOWN: Final = 1_000
MAX_USER_AGENT: Final = 256
MAX_OPENED: Final = 1_024
MAX_OPENED_OCTETS: Final = 2_048
KEY_CHECK_SECONDS: Final = 30.0
SWEEP_SECONDS: Final = 60.0
SWEEP_LIMIT: Final = 500
TICKS_TO_UPKEEP: Final = 3
_TELL_SECONDS: Final = 1.0
REASON_ELSEWHERE: Final = "other_place"
"""Reason of a session that was ended because it was used away from its place (`binding.on_mismatch` `revoke`)."""


def _asks(
    work: Callable[Concatenate[Engine, P], Awaitable[T]],
) -> Callable[Concatenate[Engine, P], Coroutine[Any, Any, T]]:
    """This asks the store: when it is away, whoever asks next carries out first what this node has promised."""

    @wraps(work)
    async def asks(engine: Engine, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await work(engine, *args, **kwargs)
        except StoreUnavailable as lost:
            if not isinstance(lost, Unconfirmed):
                engine.note_failure()
            raise

    return asks


class Engine:
    """One application's sessions over one store. Safe to share between threads, tasks and event loops."""

    def __init__(
        self,
        store: SessionStore,
        settings: Settings,
        system: System,
        *,
        waits: Waits,
        on_event: Callable[[Event], None] | None,
        poke: Callable[[], None],
    ) -> None:
        self.store = store
        self.near = store if isinstance(store, NearStore) else None
        """The near copies in front of the store, where there are any."""
        self.waits = waits
        self.settings = settings
        # What was used shortly before this node took up its limits may not have been noted yet.
        self._life = replace(settings.life, since_us=system.now_us())
        self.system = system
        self._on_event = on_event
        self._poke = poke
        self._keys: IdKeys | None = None
        self._server_key = settings.server_key
        self._waiting: dict[SessionRef, Activity] = {}
        self._unknown: dict[SessionRef, None] = {}
        self._owed: dict[str, tuple[str, str | None]] = {}
        self._keys_checked = 0.0
        self._sweep_at: float | None = None
        self._sealed_until = 0.0
        self._ticks = 0
        self._open = False
        self._sign_outs: SignOuts | None = None
        if settings.journal is not None:
            deadline = settings.store_deadline.total_seconds()
            journal = Journal(settings.journal, settings.namespace)
            self._sign_outs = SignOuts(journal, waits=waits, deadline=deadline)
        self._told_outage = NEVER
        self._met = 1
        self._lost: Line | None = None
        # Copies that were opened lately: to be opened again for the next request of the same page. Never an id.
        self._opened: BoundedTable[tuple[NearSession, StoredSession, Authority]] = BoundedTable(MAX_OPENED)
        self._sids: BoundedTable[str] = BoundedTable(MAX_OPENED)
        # After a failure nothing is answered before what waits in the journal has been carried out.
        self._was_away = False
        self.binding: Final = (
            Binding(Surveyor(settings.binding, settings.geography), system.random(16))
            if settings.binding.compares
            else None
        )
        """What compares the places of requests; None where the settings compare nothing."""
        self.device_cookie: Final = (settings.device_cookie or "").encode("ascii", "replace")
        self._longest_us = 0
        self._verifier_lease = 0.0
        self.tokens: Issuer | None = None
        # Near copies pass every verb on, also those that the store behind does not have.
        self._keeps_tokens = hasattr(store if self.near is None else self.near.behind, "rotate_refresh")
        self.refresh_left: Final = (
            settings.refresh_cookie.wire_name if settings.tokens is None and self._keeps_tokens else None
        )
        """Name of a cookie that browsers may still have from when tokens were on, while they are off."""
        if settings.tokens is not None:
            if not self._keeps_tokens:
                raise ConfigurationError("store: keeps sessions only; tokens need one that keeps refresh families too")
            self.tokens = Issuer(self._token_store, settings, settings.tokens, system)

    # -- life of the process ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connect and learn the store's keys; nothing to do when that was done. Raises: StoreUnavailable,
        ConfigurationError."""
        if self._open:
            return
        await self.store.open()
        await self._learn_keys()
        if self.tokens is not None:
            self._publish_all(await self.tokens.start(self._server_key))
        await self._carry_out_sign_outs()
        self._open = True
        if not self.store.shared:
            log.warning("coatcheck: sessions are kept in this process; no other process will know them")
        if self._server_key is None:
            log.warning(
                "coatcheck: no server_key is set, so a rotated session id ends at once instead of after %g s",
                self.settings.rotation_alias.total_seconds(),
            )

    async def close(self) -> None:
        """Write what waits and let go of the store. Whoever asks afterwards opens it again."""
        if not self._open:
            return
        self._open = False
        try:
            await self.maintain()
        except StoreUnavailable as lost:
            log.warning("coatcheck: last activity could not be written at close: %s", lost.detail)
        await self.store.close()

    async def ready(self) -> IdKeys:
        """The store's id keys; connects on first use."""
        if not self._open:
            await self.start()
        if self._was_away:
            await self._carry_out_sign_outs()
            self._was_away = False
        if self.near is not None and self.near.met > self._met:
            # Perhaps another store than before, with other keys or none.
            met = self.near.met
            await self._learn_keys()
            self._met = met
        return self.keys

    async def _keys_to_mint(self) -> IdKeys:
        """The keys of ids, for somebody who is about to make one: nobody gets an id under keys that the store lacks."""
        keys = await self.ready()
        lost = None if self.near is None else self.near.lost
        if lost is not None and lost is not self._lost:
            await self._learn_keys()
            self._lost = lost
            return self.keys
        return keys

    @property
    def keys(self) -> IdKeys:
        """The id keys. Raises: RuntimeError before the first contact with the store."""
        if self._keys is None:
            raise RuntimeError("the store has not been asked for its keys yet")
        return self._keys

    @property
    def knows_keys(self) -> bool:
        """Whether the store has been asked for the keys of ids."""
        return self._keys is not None

    @property
    def issuer(self) -> Issuer:
        """What makes and checks tokens. Raises: ConfigurationError where tokens are off."""
        if self.tokens is None:
            raise ConfigurationError("tokens are off: set Settings(tokens=TokenSettings())")
        return self.tokens

    def _token_store(self) -> TokenStore:
        # Looked up at each call: tests wrap the store of a running engine.
        return cast(TokenStore, self.store)

    async def maintain(self) -> None:
        """Write waiting activity, end sign-ins whose outcome was unknown, look whether the store is still the same.

        Called once a second while something waits. Raises: StoreUnavailable; what could not be written waits on.
        """
        if self._keys is None:
            return
        await self._carry_out_sign_outs()
        await self._write_activity()
        for ref in list(self._unknown):
            await self.store.revoke(ref, reason=REASON_SUPERSEDED, deny_us=await self._deny_us())
            self._unknown.pop(ref, None)
        for subject, (reason, keep_sid) in list(self._owed.items()):
            await self.revoke_subject(subject, reason, keep_sid)
            self._owed.pop(subject, None)
        now = self.system.elapsed()
        if now - self._keys_checked >= KEY_CHECK_SECONDS:
            await self._learn_keys()
        if self._sweep_at is not None and now >= self._sweep_at:
            await self._sweep(now)

    async def _write_activity(self) -> None:
        waiting, self._waiting = list(self._waiting.values()), {}
        for start in range(0, len(waiting), TOUCHES_AT_ONCE):
            try:
                await self.store.touch(waiting[start : start + TOUCHES_AT_ONCE])
            except BaseException:
                for activity in waiting[start:]:
                    self._wait(activity)
                raise

    async def tick(self) -> None:
        """What a keeper does several times a second: keep the lease, and every third time `maintain`."""
        if self.near is not None and self._open:
            await self.near.beat()
        self._ticks += 1
        if self._ticks % TICKS_TO_UPKEEP == 0 and (
            self.has_work or self._sweep_at is not None or self._keeps_sign_outs
        ):
            await self.maintain()

    @property
    def has_work(self) -> bool:
        """Whether something waits to be written: activity, a sign-in nobody knows the outcome of, a sign-out."""
        return bool(self._waiting or self._unknown or self._owed or self._keeps_sign_outs)

    @property
    def _keeps_sign_outs(self) -> bool:
        return self._sign_outs is not None and self._sign_outs.may_wait

    @property
    def wants_upkeep(self) -> bool:
        """Whether `tick` should be called again: something waits, a sweep is due within a minute, or the lease is to
        be kept."""
        keeps_lease = self._open and self.near is not None and self.near.wants_beat
        return self.has_work or self._sweep_at is not None or keeps_lease

    async def _sweep(self, now: float) -> None:
        removed = await self.store.sweep(limit=SWEEP_LIMIT)
        if removed >= SWEEP_LIMIT:
            # More is left than one call may take: what ends must not come faster than what is cleaned up.
            self._sweep_at = now
        else:
            # Once more when a sealed successor was still within its window.
            self._sweep_at = now + SWEEP_SECONDS if now < self._sealed_until else None

    def _sweep_later(self) -> None:
        # Whoever leaves something behind cleans up: a process that only reads never sweeps.
        if self._sweep_at is None:
            self._sweep_at = self.system.elapsed() + SWEEP_SECONDS
        self._wake()

    async def _learn_keys(self) -> None:
        # A store that was emptied gets the keys back that this node knows: whoever signed in since is no forgery then.
        keys = await self.store.id_keys(self._keys or IdKeys(self.system.random(32), self.system.random(32)))
        if self._keys is not None and keys.pack() != self._keys.pack():
            self._sids = BoundedTable(MAX_OPENED)
        self._keys = keys
        self._keys_checked = self.system.elapsed()
        if self._server_key is None:
            self._server_key = await self.store.local_key(self.system.random(32))
        if self.tokens is None and self._keeps_tokens:
            # Another application on this store may issue tokens of our sessions: their end must be told as well.
            _, ring = await key_work.read(self._token_store())
            self._longest_us = denial_us(ring.longest) if ring.longest else 0
            self._verifier_lease = ring.verifier_lease

    @property
    def reach(self) -> timedelta:
        """How late after a revoke anybody may still accept the session: a near copy for the lease, and where somebody
        issues access tokens, a verifier for its own lease beyond that."""
        verifiers = timedelta(0)
        if self.tokens is not None:
            verifiers = told_after(self.tokens.ring.verifier_lease)
        elif self._longest_us:
            verifiers = told_after(self._verifier_lease)
        return verifiers if self.near is None else max(reach_of(self.settings), verifiers)

    async def _deny_us(self) -> int:
        """How long access tokens of a session that ends now must be denied; 0 where nobody issues any."""
        await self.ready()
        return await self._longest_denial()

    async def _longest_denial(self) -> int:
        if self.tokens is not None:
            # Another server may issue longer tokens by now.
            await self.keep_keys()
            return self.tokens.deny_us
        if self.system.elapsed() - self._keys_checked >= KEY_CHECK_SECONDS:
            await self._learn_keys()
        return self._longest_us

    # -- one session -----------------------------------------------------------------------------------------------

    def note_failure(self) -> None:
        """The store did not answer."""
        self._was_away = True

    def peek(self, value: bytes) -> NearSession | None:
        """The session behind a cookie value, if this process knows it and may believe it now. Asks nobody."""
        # After a failure the store is asked first: another process of this node may have promised a sign-out.
        return None if self._was_away else self.store.peek(value)

    def reopen(self, near: NearSession, value: bytes) -> Resumed:
        """The whole of what `peek` found."""
        if self.near is None:
            raise RuntimeError("what was peeked came from a near copy, and there is none")
        key = value[KEY_OF]
        known = self._opened.get(key)
        if known is None or known[0] is not near:
            known = near, *open_copy(self.near.opened(near, key.decode("ascii")), limits=self.settings.life)
            if len(near.packed) <= MAX_OPENED_OCTETS:
                self._opened.put(key, known)
        # Its check was verified when the copy was made, and the copy was found by the digest of the whole.
        id_ = SessionId(value.decode("ascii"), known[1].ref)
        now_us = self.near.store_clock_us()
        return Resumed(id=id_, session=known[1], authority=known[2], seen_us=near.seen_us, now_us=now_us)

    async def resume(
        self,
        value: bytes,
        *,
        outage: OutagePolicy | None = None,
        consistent: bool = False,
        place: Callable[[], ClientPlace] | None = None,
    ) -> Resumption:
        """The session behind a cookie value, whatever bytes it is. `outage`: what to do when the store is away, if
        not what the settings say. `consistent`: as the store has it now, not as this process knew it a moment ago.
        `place`: where the request comes from, to be judged where the settings compare places; None for whoever only
        wants to end it. Raises: StoreUnavailable."""
        # What was signed out on this node is over, whether or not the store can be asked.
        presented = None if self._keys is None else parse_session_id(self._keys, value)
        over = self._signed_out(presented)
        if over is not None:
            return over
        try:
            keys = await self.ready()
            presented = parse_session_id(keys, value)
            if presented is None:
                self.publish(self._event("session_id.forged", data={"octets": len(value), **_from(place)}))
                return NotResumed(why="unknown")
            # Not the near copy, for whoever cannot wait for a lease.
            anew = self.near.load_anew if consistent and self.near is not None else None
            limits, key = self._life, self._server_key
            found = await resume(self.store, keys, presented, limits=limits, server_key=key, load=anew)
            if place is not None and isinstance(found, Resumed):
                found = await self._at(found, place)
        except StoreUnavailable as lost:
            self._was_away = True
            if consistent:
                raise
            known = await self._through_outage(lost, value, self.settings.outage if outage is None else outage)
            return known if place is None or isinstance(known, NotResumed) else await self._at(known, place)
        if isinstance(found, NotResumed):
            if consistent and self.near is not None:
                self.near.changed(presented.ref.handle)
            self._publish_all(found.events)
            return found
        if not found.wants_proof:
            # Whoever has a copy of a cookie must not keep its session alive by asking.
            await self._note_activity(found)
        if self.near is not None:
            # Whoever keeps the lease sleeps while nobody asks.
            self._wake()
        # Signed out while this was being read: the promise counts.
        return self._signed_out(presented) or found

    async def _at(self, found: Resumed, place: Callable[[], ClientPlace]) -> Resumption:
        """What is left of a session for a request from this place. Raises: StoreUnavailable."""
        binding = self.binding
        if binding is None or not found.session.owner:
            return found
        here = place()
        if not here.mark:
            # No request: a job, a script.
            return found
        try:
            judged = await judge_place(
                self.store,
                binding.surveyor,
                found,
                binding.seen(here),
                sid=self.sid(found.session.ref),
                limits=self.settings.record,
                again=self._again(found.id, found.session.digest),
            )
        except ValueError as broken:
            self.publish(
                Event(
                    kind="session.record_unreadable",
                    at=found.now_us / SECOND_US,
                    sid=self.sid(found.session.ref),
                    data={"detail": str(broken)[:200]},
                )
            )
            return NotResumed(why="unknown")
        self._publish_all(judged.events)
        if isinstance(judged, NotResumed):
            return replace(judged, events=())
        return await self._carry_out_decision(judged, here)

    async def _carry_out_decision(self, judged: Judged, here: ClientPlace) -> Resumption:
        found = judged.found
        match judged.outcome:
            case "allow" | "notify":
                if self.near is not None and judged.kept and not found.through_outage:
                    self.near.note_place(found.session, here.mark)
                return found
            case "step_up":
                self._leave_unused(found)
                return replace(found, wants_proof=True)
            case "block":
                self._leave_unused(found)
                return NotResumed(why="elsewhere", at_us=judged.until_us, lives_as=found.session.ref)
            case "revoke":
                await self.revoke(found.session.ref, REASON_ELSEWHERE)
                return NotResumed(why="ended", reason=REASON_ELSEWHERE, at_us=found.now_us)

    def _leave_unused(self, found: Resumed) -> None:
        session = found.session
        due = activity_due(seen_us=found.seen_us, now_us=found.now_us, idle_us=session.idle_us)
        if self.near is not None and due != "no":
            # Else the next one from the right place would believe that somebody is noting it, and whoever asks all the
            # time from a wrong one could let the session of its owner die of idleness.
            self.near.note_due(session.ref)

    def _again(self, id_: SessionId, digest: str | None = None) -> Callable[[], Awaitable[Resumption]]:
        """Reads a session anew, past every copy. `digest`: of the id, where nobody has that."""
        load = self.store.load if self.near is None else self.near.load_anew

        async def by_digest(ref: SessionRef, of_id: str) -> Loaded:
            return await load(ref, of_id if digest is None else digest)

        async def read() -> Resumption:
            limits, key = self._life, self._server_key
            return await resume(self.store, self.keys, id_, limits=limits, server_key=key, load=by_digest)

        return read

    @_asks
    async def step_up(self, id_: SessionId, place: ClientPlace, *, amr: tuple[str, ...], acr: str | None) -> Resumed:
        """The subject of this session has proven himself at this place: it goes on under a new id, and what was asked
        of the place is met. The old id is dead at once. With `wants_proof` the new id holds, and the place is asked
        once more: that it was proven could not be written. Raises: PlaceRefused, SessionGone, StoreUnavailable,
        ValueRefused."""
        await self.ready()
        # As the store has it now: what another node has decided meanwhile counts, and is not written over.
        found = await self._again(id_)()
        if isinstance(found, Resumed):
            found = await self._at(found, lambda: place)
        if isinstance(found, NotResumed):
            if found.why == "elsewhere":
                raise PlaceRefused(found.at_us / SECOND_US)
            raise SessionGone(cause_of(found.reason)[0] or found.why)
        at = self.system.now_us() / SECOND_US
        proofs = tuple(Authentication(method=method, at=at) for method in amr)
        kept = tuple(each for each in found.authority.authentications if each.method not in amr)
        authority = replace(
            found.authority,
            authentications=(*kept, *proofs),
            amr=tuple(dict.fromkeys((*found.authority.amr, *amr))),
            acr=found.authority.acr if acr is None else acr,
            # In the command that kills the old id: no refresh token from before outlives it.
            proofs=found.authority.proofs + 1,
        )
        done = await self.rotate(found.id, found.session.subject, authority)
        session = replace(
            found.session, version=done.version, digest=done.id.digest, authority=encode_authority(authority)
        )
        now = replace(found, id=done.id, session=session, authority=authority, wants_proof=False)
        if self.binding is None or not place.mark:
            return now
        try:
            if done.version != found.session.version + 1:
                # Somebody wrote between the read and the new id, perhaps about a place: that is not written over.
                newer = await self._again(done.id)()
                if isinstance(newer, NotResumed):
                    raise SessionGone(cause_of(newer.reason)[0] or newer.why)
                now = newer
            return await prove_place(
                self.store,
                self.binding.surveyor,
                now,
                self.binding.seen(place),
                limits=self.settings.record,
                again=self._again(done.id),
            )
        except StoreUnavailable as lost:
            # The old id is dead: the browser must get the new one whatever became of the rest.
            log.warning("coatcheck: a place was proven, and is asked once more: %s", lost.detail)
            return replace(now, wants_proof=True)

    def has_promised(self, value: bytes | None) -> bool:
        """Whether the end of this cookie's session waits on this node for the store."""
        presented = None if value is None or self._keys is None else parse_session_id(self._keys, value)
        return self._signed_out(presented) is not None

    def _signed_out(self, presented: SessionId | None) -> NotResumed | None:
        kept = None if presented is None or self._sign_outs is None else self._sign_outs.of(presented.ref)
        return None if kept is None else NotResumed(why="ended", reason=kept.reason, at_us=kept.at_us)

    async def _through_outage(self, lost: StoreUnavailable, value: bytes, policy: OutagePolicy) -> Resumption:
        """What the profile says about a store that is away; where it says `refuse`, `lost` is raised again."""
        presented = None if self._keys is None else parse_session_id(self._keys, value)
        if policy == "refuse" or (policy == "near" and (presented is None or self.near is None)):
            raise lost
        now = self.system.elapsed()
        if now >= self._told_outage + _TELL_SECONDS:
            self._told_outage = now
            self.publish_kind("store.unavailable", policy=policy)
        if policy == "anonymous" or presented is None or self.near is None:
            return NotResumed(why="unavailable")
        grace = self.settings.outage_grace.total_seconds()
        known = self.near.through_outage(presented.ref, presented.digest, grace=grace)
        if known is None or (self._sign_outs is not None and await self._sign_outs.is_kept(presented.ref)):
            raise lost
        return reopen(presented, known, limits=self.settings.life, through_outage=True)

    def vouches_until(self, ref: SessionRef) -> float:
        """Until when (`System.elapsed`) an answer that may have come from a near copy counts: what the copy itself
        rests on. Infinite where there is none: then the store has answered."""
        if self.near is None:
            return FOR_EVER
        return self.near.vouches_until(ref, grace=self.settings.outage_grace.total_seconds())

    def new_session_id(self, keys: IdKeys, tag: int | None = None) -> SessionId:
        """A fresh id; without a tag it lives anywhere."""
        random = self.system.random(HANDLE_BYTES + SECRET_BYTES + 2)
        return mint_session_id(
            keys,
            tag=random_tag(random[-2:]) if tag is None else tag,
            handle=random[:HANDLE_BYTES],
            secret=random[HANDLE_BYTES : HANDLE_BYTES + SECRET_BYTES],
        )

    @_asks
    async def create_anonymous(self, fields: Mapping[str, str], place: ClientPlace) -> tuple[SessionId, Created]:
        """Keep fields for somebody who is not signed in."""
        keys = await self._keys_to_mint()
        id_ = self.new_session_id(keys)
        new = self._new(
            id_,
            subject=None,
            authority=Authority(tenant=self.settings.tenant, **_where(place)),
            fields=fields,
        )
        created, event = await committing.create_anonymous(self.store, keys, new, limits=self.settings.record)
        self.publish(event)
        self._sweep_later()
        return id_, created

    @_asks
    async def login(
        self,
        wanted: SignIn,
        place: ClientPlace,
        old: OldSession | None,
        *,
        limit: SessionLimit,
        replaces: SessionRef | None = None,
        choice: Choice | None = None,
    ) -> tuple[SignedIn, Authority] | SignInRefused:
        """Sign a subject in under a limit; see `operations.login`."""
        keys = await self._keys_to_mint()
        octets = sum(len(name.encode()) + len(text.encode()) for name, text in wanted.fields.items())
        if octets > self.settings.max_field_octets or len(wanted.fields) > self.settings.max_fields:
            raise committing.too_large(self.settings.record)
        id_ = self.new_session_id(keys, subject_tag(keys, self.settings.tenant, wanted.subject))
        at = self.system.now_us() / SECOND_US
        authority = Authority(
            tenant=self.settings.tenant,
            profile=self.settings.profile,
            profile_version=self.settings.profile_version,
            authentications=tuple(Authentication(method=method, at=at) for method in wanted.amr),
            acr=wanted.acr,
            amr=wanted.amr,
            scopes=wanted.scopes,
            claims=wanted.claims,
            persistent=wanted.persistent,
            device_id=wanted.device_id or place.device,
            **_where(place),
        )
        self._check_authority(wanted.subject, authority)
        new = self._new(id_, subject=wanted.subject, authority=authority, fields=wanted.fields)
        try:
            outcome = await login(
                self.store,
                keys,
                id_=id_,
                new=new,
                old=old,
                maximum=limit.maximum,
                on_limit=limit.on_reached,
                replaces=replaces,
                choice=choice,
                network=place.address,
                device=wanted.device_id,
                country=self._country_of(place.address),
                deny_us=await self._deny_us(),
            )
        except BaseException:
            # No answer, a second command that failed twice, a request cancelled half-way: whatever came into being
            # belongs to nobody. Ending what never was is harmless.
            self._end_later(id_.ref)
            raise
        self._publish_all(outcome.events)
        self._sweep_later()
        return outcome if isinstance(outcome, SignInRefused) else (outcome, authority)

    @_asks
    async def commit(self, ref: SessionRef, changes: Changes, expected: int | None) -> Committed:
        """Merge changed fields."""
        return await committing.commit(self.store, ref, changes, limits=self.settings.record, expected=expected)

    @_asks
    async def rotate(self, old: SessionId, subject: str, authority: Authority | None) -> NewId:
        """Give the session a new id, with new privileges or with the old ones."""
        keys = await self.ready()
        if authority is not None:
            self._check_authority(subject, authority)
        outcome = await rotate(
            self.store,
            keys,
            old=old,
            new=successor_of(keys, old, secret=self.system.random(SECRET_BYTES)),
            server_key=self._server_key,
            nonce=self.system.random(NONCE_SIZE),
            alias_us=int(self.settings.rotation_alias.total_seconds() * SECOND_US),
            authority=None if authority is None else encode_authority(authority),
        )
        self._publish_all(outcome.events)
        self._sealed_until = self.system.elapsed() + self.settings.rotation_alias.total_seconds()
        self._sweep_later()
        return outcome

    @_asks
    async def revoke(self, ref: SessionRef, reason: str) -> int:
        """End one session; returns how many ended (0 or 1)."""
        keys = await self.ready()
        self._waiting.pop(ref, None)
        with within(None, urgent=True):
            ending = await revoking.revoke_session(self.store, keys, ref, reason=reason, deny_us=await self._deny_us())
        self._publish_all(ending.events)
        return ending.ended

    async def revoke_unsent(self, ref: SessionRef) -> None:
        """End a session whose cookie never reached the browser; if the store is away, as soon as it is back."""
        # Noted first: the request may be cancelled while the revoke is on its way.
        self._end_later(ref)
        try:
            await self.revoke(ref, REASON_SUPERSEDED)
        except StoreUnavailable as lost:
            log.warning("coatcheck: a session without a browser is ended later: %s", lost.detail)
        else:
            self._unknown.pop(ref, None)

    # -- sign-outs while the store is away ---------------------------------------------------------------------------

    async def sign_out_later(self, refs: Iterable[SessionRef], reason: str, *, away: bool = True) -> bool:
        """Keep a sign-out that the store could not take: refused on this node from now on, and everywhere once this
        node has reached the store. `away`: whether that is why. False where there is no journal. Raises:
        StoreUnavailable where it cannot be kept.
        """
        if self._sign_outs is None:
            return False
        at_us = self.system.now_us()
        sign_outs = [SignOut(ref=ref, reason=reason, at_us=at_us) for ref in refs]
        if not sign_outs:
            # Nothing that was ever ours: there is nothing to end.
            return True
        await self._sign_outs.keep(sign_outs)
        self._was_away = self._was_away or away
        for each in sign_outs:
            self._waiting.pop(each.ref, None)
            if self.near is not None:
                self.near.changed(each.ref.handle)
        self.publish_kind("session.sign_out_kept", sessions=len(sign_outs))
        self._wake()
        return True

    async def _carry_out_sign_outs(self) -> None:
        """What waits in this node's journal, before anything else is answered. Raises: StoreUnavailable."""
        if self._sign_outs is None:
            return
        try:
            await self._sign_outs.carry_out(self._carry_out)
        except Unconfirmed as lost:
            # The store has it, and answers nobody who was signed out; it stays in the journal until replicas have it.
            log.warning("coatcheck: a kept sign-out waits for replicas: %s", lost.detail)

    async def _carry_out(self, kept: SignOut) -> None:
        with within(None, urgent=True):
            ending = await revoking.revoke_session(
                self.store, self.keys, kept.ref, reason=kept.reason, deny_us=await self._longest_denial()
            )
        self._publish_all(ending.events)

    # -- tokens ----------------------------------------------------------------------------------------------------

    @_asks
    async def issue(self, session: StoredSession, authority: Authority, audience: str | None) -> Exchanged:
        """Tokens of a session; see `issuer.Issuer.issue`."""
        issuer, keys = self.issuer, await self.ready()
        await self.keep_keys()
        issued = await issuer.issue(keys, session, authority, audience=audience)
        self._publish_all(issued.events)
        return issued

    @_asks
    async def refresh(self, value: bytes, audience: str | None) -> Exchanged:
        """Exchange a refresh token. What a request is to be given, `judge_refresh` judges first.

        Raises: RefreshInvalid, RefreshReused, SessionEnded, ValueRefused, StoreUnavailable."""
        issuer, keys = self.issuer, await self.ready()
        await self.keep_keys()
        done = await issuer.refresh(keys, value, audience=audience)
        self._publish_all(done.events)
        if isinstance(done, NotRefreshed):
            raise await self._not_refreshed(done)
        self._waiting.pop(done.session.ref, None)
        self._sealed_until = self.system.elapsed() + issuer.grace_seconds
        self._sweep_later()
        return done

    @_asks
    async def take_up(self, value: bytes, place: Callable[[], ClientPlace]) -> Resumed:
        """Spend a refresh token, whether or not tokens are on, and let its session go on under a new id; see
        `operations.take_up`. Where the place is refused the token has been spent, and the id is as it was.

        Raises: RefreshInvalid, RefreshReused, SessionEnded, SessionGone, StepUpRequired, PlaceRefused,
        StoreUnavailable."""
        await self.ready()
        if self._server_key is None:
            raise RefreshInvalid("there is no server_key: nobody can tell what its session goes on with")
        presented, done = await self.spend(value)
        await self.judge_refresh(done, place)
        found, events = await go_on(self.store, self.keys, presented, done, server_key=self._server_key)
        self._publish_all(events)
        return found

    @_asks
    async def spend(self, value: bytes) -> tuple[RefreshToken, Refreshed]:
        """Exchange a refresh token of a session and hand nothing out; what was presented, and what it came to. Raises:
        RefreshInvalid, RefreshReused, SessionEnded, StoreUnavailable."""
        keys = await self.ready()
        presented = parse_refresh_token(keys, value) if self._keeps_tokens else None
        if presented is None or presented.generation >= LAST_GENERATION or presented.family.session is None:
            raise RefreshInvalid("not a refresh token of a session")
        grace = TokenSettings.reuse_grace if self.settings.tokens is None else self.settings.tokens.reuse_grace
        secret = self.system.random(REFRESH_SECRET_BYTES)
        done = await exchange_refresh(
            self._token_store(),
            keys,
            presented=presented,
            successor=mint_refresh_token(keys, presented.family, generation=presented.generation + 1, secret=secret),
            # Without one the successor is sealed for nobody: a shared store that has none forgives no second coming.
            server_key=self._server_key or self.system.random(32),
            nonce=self.system.random(NONCE_SIZE),
            grace_us=int(grace.total_seconds()) * SECOND_US,
            client="",
            key="",
            limits=self._life,
            deny_us=await self._deny_us(),
        )
        self._publish_all(done.events)
        if isinstance(done, NotRefreshed):
            raise await self._not_refreshed(done)
        self._waiting.pop(done.session.ref, None)
        self._sealed_until = self.system.elapsed() + grace.total_seconds()
        self._sweep_later()
        return presented, done

    async def _not_refreshed(self, done: NotRefreshed) -> RefreshInvalid | SessionEnded:
        log.info("coatcheck: a refresh was refused: %s %s", done.why, done.reason)
        if done.outlived is not None:
            await self.revoke(done.outlived, done.reason)
        return refusal_of(done)

    @_asks
    async def judge_refresh(self, done: Exchanged | Refreshed, place: Callable[[], ClientPlace]) -> None:
        """Whether a request from this place may have what an exchange came to: nothing if so. Raises: StepUpRequired,
        PlaceRefused, SessionEnded, StoreUnavailable."""
        if self.binding is None:
            return
        now_us = self.system.now_us()
        found = await self._at(
            Resumed(
                # Whoever came with a refresh token has no session id; nothing here leads to one.
                id=SessionId("", done.session.ref),
                session=done.session,
                authority=decode_authority(done.session.authority),
                seen_us=now_us,
                now_us=now_us,
            ),
            place,
        )
        if isinstance(found, Resumed):
            if found.wants_proof:
                raise StepUpRequired("a refresh token came from another place than its session")
            return
        if found.why == "elsewhere":
            raise PlaceRefused(found.at_us / SECOND_US)
        if found.why == "replaced":
            raise StoreUnavailable("the id of the session changed while its place was judged")
        raise SessionEnded(found.reason or found.why, found.at_us / SECOND_US)

    async def keep_keys(self) -> None:
        """Read the key ring again if that is due, and rotate if that is. Raises: StoreUnavailable."""
        self._publish_all(await self.issuer.upkeep())

    @_asks
    async def verify(self, token: bytes) -> AccessToken:
        """Check an access token, the store included. Raises: TokenInvalid, StoreUnavailable."""
        issuer, keys = self.issuer, await self.ready()
        await self.keep_keys()
        found = await issuer.verify(keys, token)
        ref = None if found.sid is None else parse_sid(keys, found.sid)
        if ref is not None and self._sign_outs is not None and self._sign_outs.of(ref) is not None:
            raise TokenInvalid("signed out on this node while the store was away")
        return found

    @_asks
    async def deny_token(self, token: bytes) -> AccessToken:
        """Deny one access token of ours, whether or not it has expired. Raises: TokenInvalid, StoreUnavailable."""
        issuer = self.issuer
        await self.ready()
        found = issuer.inspect(token)
        self.publish(await issuer.deny(found.id, expires_at=found.expires_at))
        return found

    def _check_authority(self, subject: str, authority: Authority) -> None:
        # At sign-in rather than when a token is minted: there somebody can still do something about it.
        if self.tokens is None:
            return
        taken = sorted(RESERVED_CLAIMS & set(authority.claims))
        if taken:
            raise ValueRefused(f"claims: {taken[0]} is a registered claim of access tokens; choose another name")
        self.tokens.check_fits(subject, authority)

    # -- administration --------------------------------------------------------------------------------------------

    async def revoke_sid(self, sid: str, reason: str) -> int:
        """End the session with this public handle; 0 when there is none."""
        keys = await self.ready()
        ref = parse_sid(keys, sid)
        return 0 if ref is None else await self.revoke(ref, reason)

    @_asks
    async def revoke_subject(self, subject: str, reason: str, keep_sid: str | None) -> int:
        """End all sessions of a subject but one. Raises: ValueRefused for a `keep_sid` that was never ours."""
        keys = await self.ready()
        keep = None if keep_sid is None else parse_sid(keys, keep_sid)
        if keep_sid is not None and keep is None:
            raise ValueRefused("keep_sid: not a session of this store")
        with within(None, urgent=True):
            ending = await revoking.revoke_subject(
                self.store,
                keys,
                tenant=self.settings.tenant,
                subject=subject,
                reason=reason,
                keep=keep,
                deny_us=await self._deny_us(),
            )
        self._publish_all(ending.events)
        return ending.ended

    def owe_revocation(self, subject: str, reason: str, keep_sid: str | None) -> None:
        """End a subject's sessions as soon as the store is back: the reason for it has already been written."""
        self._owed[subject] = (reason, keep_sid)
        self._wake()

    @_asks
    async def revoke_where(self, filter_: SessionFilter, reason: str) -> int:
        """End all sessions the filter means."""
        keys = await self.ready()
        tenant, cut_us, deny_us = self.settings.tenant, await self.store.ping(), await self._deny_us()
        ended, more = 0, True
        cursor: str | None = None
        while more:
            try:
                ending, cursor = await revoking.revoke_page(
                    self.store,
                    keys,
                    filter_,
                    tenant=tenant,
                    reason=reason,
                    cut_us=cut_us,
                    after=cursor,
                    deny_us=deny_us,
                )
            except revoking.HalfDone as lost:
                self._publish_all(lost.ending.events)
                raise
            self._publish_all(ending.events)
            ended, more = ended + ending.ended, cursor is not None
        return ended

    @_asks
    async def find(self, filter_: SessionFilter, after: str | None, limit: int) -> revoking.Found:
        """One page of sessions."""
        keys = await self.ready()
        return await revoking.find(self.store, keys, filter_, tenant=self.settings.tenant, after=after, limit=limit)

    # -- events ----------------------------------------------------------------------------------------------------

    def publish(self, event: Event) -> None:
        """Tell whoever listens. The listener must not block; what it raises is logged and goes no further."""
        log.info("coatcheck: %s", event.kind, extra={"coatcheck": event.envelope()})
        if self._on_event is None:
            return
        try:
            with outside():
                # What a listener starts outlives the request, and its deadline is not theirs.
                self._on_event(event)
        except Exception:
            # The one place where an exception of the application ends: it must not undo what has already happened.
            log.exception("coatcheck: the on_event listener failed on %s", event.kind)

    def publish_kind(self, kind: EventKind, **data: str | int | float | bool) -> None:
        """Tell about something that concerns no session yet."""
        self.publish(self._event(kind, data=data))

    def _publish_all(self, events: Iterable[Event]) -> None:
        for event in events:
            self.publish(event)

    def _event(self, kind: EventKind, *, data: Mapping[str, str | int | float | bool]) -> Event:
        return Event(kind=kind, at=self.system.now_us() / SECOND_US, data=data)

    # -- inside ----------------------------------------------------------------------------------------------------

    def sid(self, ref: SessionRef) -> str:
        """The public handle of a session."""
        key = f"{ref.tag}.{ref.handle}"
        known = self._sids.get(key)
        if known is None:
            known = sid_of(self.keys, ref)
            self._sids.put(key, known)
        return known

    def _country_of(self, address: str | None) -> str | None:
        geography = self.settings.geography
        return None if geography is None or address is None else geography.locate(address).country

    def _new(
        self, id_: SessionId, *, subject: str | None, authority: Authority, fields: Mapping[str, str]
    ) -> NewSession:
        life = self.settings.life
        return NewSession(
            ref=id_.ref,
            digest=id_.digest,
            owner=owner_of(self.settings.tenant, subject),
            subject=subject or "",
            idle_us=life.idle_us,
            absolute_us=life.absolute_us,
            authority=encode_authority(authority),
            fields=fields,
        )

    async def _note_activity(self, found: Resumed) -> None:
        session = found.session
        due = activity_due(seen_us=found.seen_us, now_us=found.now_us, idle_us=session.idle_us)
        if due == "no":
            return
        activity = Activity(ref=session.ref, owner=session.owner, seen_us=found.now_us)
        if due == "batch":
            self._wait(activity)
            return
        try:
            await self.store.touch([activity])
        except StoreUnavailable as lost:
            # The session was read and lives; that its use cannot be written must not stop the request.
            log.warning("coatcheck: activity is written later: %s", lost.detail)
            self._wait(activity)

    def _wait(self, activity: Activity) -> None:
        known = self._waiting.get(activity.ref)
        if known is None and len(self._waiting) >= MAX_WAITING:
            return
        if known is None or known.seen_us < activity.seen_us:
            self._waiting[activity.ref] = activity
        self._wake()

    def _end_later(self, ref: SessionRef) -> None:
        if len(self._unknown) < MAX_UNKNOWN:
            self._unknown[ref] = None
        else:
            log.warning("coatcheck: too many sessions wait to be ended; one more dies by its timeouts alone")
        self._wake()

    def _wake(self) -> None:
        # While closing, what waits was handed to the last upkeep: nothing may start again behind it.
        if self._open:
            self._poke()


class _Where(TypedDict):
    user_agent: str
    networks: dict[str, str]


def _from(place: Callable[[], ClientPlace] | None) -> dict[str, str]:
    """The address a request came from, for an event; nothing where it is not known."""
    address = None if place is None else place().address
    return {} if address is None else {"network": address}


def _where(place: ClientPlace) -> _Where:
    networks = {} if place.address is None else {family_of(place.address): place.address}
    return {"user_agent": place.user_agent[:MAX_USER_AGENT], "networks": networks}
