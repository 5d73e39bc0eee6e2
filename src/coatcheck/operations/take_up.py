"""Take a session up again from its refresh token: it goes on under a new id.

    1 the refresh token is genuine, current, ours    operations.tokens.refresh        one store command
    2 its session may go on from here                the caller, between the two
    3 the session has the id that follows            go_on                            one store command, or none

Decides which id that is (`core.taking_up`) and what somebody gets who comes second. It never begins a family and never
mints a token. Of any number of exchanges of one refresh token, at once or one after the other within its grace, on one
server or several with one server key, all that are answered are answered with one id. Whoever fails between the two
commands repeats the whole: the token leads to the same id until its grace is over.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from coatcheck.core.admission import cause_of
from coatcheck.core.ids import IdKeys, SessionId, sid_of
from coatcheck.core.ports import Converged, Gone, Rotated, SessionStore
from coatcheck.core.refresh_token import RefreshToken
from coatcheck.core.session import SECOND_US, StoredSession
from coatcheck.core.taking_up import session_id_of
from coatcheck.errors import RefreshInvalid, SessionGone
from coatcheck.events import Event
from coatcheck.operations.resume import Resumed
from coatcheck.operations.tokens import Refreshed

_REPLACED: Final = "replaced"


async def go_on(
    store: SessionStore, keys: IdKeys, presented: RefreshToken, done: Refreshed, *, server_key: bytes
) -> tuple[Resumed, tuple[Event, ...]]:
    """Let the session of an exchanged refresh token go on under the id that follows from it; the old one is dead at
    once.

    Raises: RefreshInvalid where somebody has gone on with the successor already, SessionGone when the session ended
    or another id took its place meanwhile, StoreUnavailable.
    """
    if done.token is None:
        raise RefreshInvalid("its successor has been used")
    session = done.session

    def follows(token: RefreshToken) -> SessionId:
        return session_id_of(keys, token, session.ref, authority=session.authority, server_key=server_key)

    # Within its grace a current token is not rotated, and then the id follows from itself: an exchange a moment ago
    # may have made that one.
    wanted, earlier = follows(done.token), follows(presented)
    for known in (wanted, earlier):
        if session.digest == known.digest:
            return _taken(done, known, session.version), ()
    outcome = await _replace(store, session, wanted)
    if isinstance(outcome, Rotated):
        event = Event(kind="session.rotated", at=outcome.now_us / SECOND_US, sid=sid_of(keys, session.ref))
        return _taken(done, wanted, outcome.version), (event,)
    if isinstance(outcome, Gone) and outcome.reason == _REPLACED:
        # Perhaps by the earlier id, between the two commands. This writes nothing: the new id is its own predecessor.
        outcome = await _replace(store, replace(session, digest=earlier.digest), earlier)
        if isinstance(outcome, Rotated):
            return _taken(done, earlier, outcome.version), ()
    raise SessionGone(cause_of(outcome.reason)[0] if isinstance(outcome, Gone) else _REPLACED)


async def _replace(store: SessionStore, session: StoredSession, new: SessionId) -> Rotated | Converged | Gone:
    # With its authority, though that stays as it is: then nothing leads on from the old id.
    return await store.rotate_id(
        session.ref,
        old_digest=session.digest,
        new_digest=new.digest,
        sealed=b"",
        alias_us=0,
        authority=session.authority,
    )


def _taken(done: Refreshed, id_: SessionId, version: int) -> Resumed:
    return Resumed(
        id=id_,
        session=replace(done.session, digest=id_.digest, version=version),
        authority=done.authority,
        seen_us=done.now_us,
        now_us=done.now_us,
    )
