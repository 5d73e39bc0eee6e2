"""An access token of a minute for the service behind a gateway, signed by the key ring of this server.

Decides its audience (the one that is configured, never the server itself), its life and its time: it counts from a
moment at which the session was certainly known to live, never from the moment of signing (SEMANTICS 5). A `Verifier`
accepts it as it accepts any other token of this issuer, and refuses it when the session has ended. It must never hand
out a refresh token, and never sign for whom only a near copy through an outage speaks.
"""

from __future__ import annotations

from typing import Final

from coatcheck.core.access_token import mint_access_token, new_jti
from coatcheck.core.ids import parse_sid
from coatcheck.core.key_ring import RingKey, unseal_key
from coatcheck.core.session import SECOND_US, encode_claims
from coatcheck.engine import Engine
from coatcheck.errors import LoginRequired, StoreUnavailable
from coatcheck.issuer import JTI_BYTES
from coatcheck.operations.keys import check_unsealed
from coatcheck.primitives.jwk import SigningKey, unpack_signing_key
from coatcheck.session import AsyncSession, Principal

LIFETIME: Final = 60
"""Seconds. A request to the service behind is over by then; a stolen token soon is."""


class ForwardTokens:
    """Mints them. One for a whole process."""

    def __init__(self, engine: Engine, audience: str) -> None:
        self._engine = engine
        self._audience = audience
        self._signers: dict[str, SigningKey] = {}

    async def mint(self, session: AsyncSession, principal: Principal) -> str:
        """A token for who is asking on this request; asks the store for its keys every few seconds at most.

        Raises: LoginRequired when less than a second of the session is left, StoreUnavailable in an outage,
        ValueRefused for claims that fit no token, ConfigurationError when the ring was sealed under another key.
        """
        if session.through_outage:
            raise StoreUnavailable("no token is signed for a session that cannot be asked for")
        engine, tokens = self._engine, self._engine.settings.tokens
        ref = parse_sid(engine.keys, principal.sid)
        if tokens is None or ref is None:
            raise LoginRequired("this session has no handle that a token could name")
        await engine.keep_keys()
        ring = engine.issuer.ring
        issued_at = self._known_alive_us() // SECOND_US
        # Not longer than other tokens: an end is denied for as long as the longest of those lives.
        wanted = min(LIFETIME, int(tokens.access_lifetime.total_seconds()))
        expires_at = min(issued_at + ring.lifetime(wanted, issued_at), int(session.expires_at or 0))
        if expires_at <= issued_at:
            raise LoginRequired("less than a second of the session is left")
        return mint_access_token(
            # This server's clock may have made the only key in the store's future.
            self._signer(ring.signing(issued_at) or ring.keys[0]),
            issuer=engine.settings.issuer,
            subject=principal.subject,
            audience=self._audience,
            client_id=tokens.client_id,
            sid=principal.sid,
            jti=new_jti(ref.tag, engine.system.random(JTI_BYTES)),
            issued_at=issued_at,
            expires_at=expires_at,
            scopes=principal.scopes,
            auth_time=int(principal.auth_time),
            acr=principal.acr,
            amr=principal.amr,
            claims=encode_claims(principal.claims),
        )

    def _known_alive_us(self) -> int:
        """A moment of the store's clock at which the session certainly lived: a copy is never believed longer than a
        lease after the store was heard of."""
        engine = self._engine
        heard = engine.near is not None and engine.near.reads > 0
        now_us = engine.near.store_clock_us() if engine.near is not None and heard else engine.system.now_us()
        return now_us - int(engine.settings.lease.total_seconds() * SECOND_US)

    def _signer(self, key: RingKey) -> SigningKey:
        known = self._signers.get(key.kid)
        if known is None:
            sealed_under = self._engine.settings.server_key or b""
            packed = check_unsealed(unseal_key(key, server_key=sealed_under), key)
            # One key signs at a time: what signed before is not kept.
            known = unpack_signing_key(packed, kid=key.kid, algorithm=key.algorithm)
            self._signers = {key.kid: known}
        return known
