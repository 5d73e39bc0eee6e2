"""The session id that a refresh token is turned into.

Decides one thing: the id follows from the refresh token. Whoever exchanges one token twice (two tabs, an answer that
was lost, two servers at once) gets one id both times, so no second exchange can make the first one's cookie worthless.
It also follows from the server key, which is never in the store, and from what the session proves: an id that died
when that changed does not come back. It must never draw randomness: the token holds enough of it.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode

from coatcheck.core.ids import SECRET_BYTES, IdKeys, SessionId, SessionRef, mint_session_id
from coatcheck.core.refresh_token import RefreshToken
from coatcheck.primitives.digest import keyed


def session_id_of(
    keys: IdKeys, token: RefreshToken, session: SessionRef, *, authority: str, server_key: bytes
) -> SessionId:
    """The id under which a session goes on for the holder of this refresh token. `authority` is as a store has it."""
    secret = keyed(
        token.text.encode("ascii") + authority.encode("utf-8"), key=server_key, size=SECRET_BYTES, purpose=b"cc-taken"
    )
    return mint_session_id(keys, tag=session.tag, handle=urlsafe_b64decode(session.handle), secret=secret)
