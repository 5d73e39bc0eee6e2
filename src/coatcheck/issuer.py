"""What one application does with tokens: mint and check access tokens, exchange refresh tokens, keep the key ring.

Decides nothing about tokens (core and operations do) but owns what lives as long as the process: the key ring as it
was last read, the keys opened from it, and how long a revoked session's access tokens must be denied. It must never
know a request or a cookie, and it never signs with a key that verifiers could not have fetched yet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

import msgspec

from coatcheck.core.access_token import (
    MAX_LEEWAY,
    AccessToken,
    TokenRules,
    judge_times,
    mint_access_token,
    new_jti,
    tag_of_jti,
    verify_access_token,
)
from coatcheck.core.admission import cause_of
from coatcheck.core.denylist import denial_us, key_denial_us, token_denial_until_us
from coatcheck.core.ids import SID_CHARACTERS, IdKeys, parse_sid, sid_of
from coatcheck.core.key_ring import (
    KeyRing,
    RingKey,
    seal_key,
    unseal_key,
)
from coatcheck.core.ports import Denial, DenialPage, PositionLost, TokenStore
from coatcheck.core.refresh_token import (
    FAMILY_BYTES,
    FIRST_GENERATION,
    LAST_GENERATION,
    SECRET_BYTES,
    FamilyRef,
    Grant,
    NewFamily,
    RefreshToken,
    encode_grant,
    family_of_session,
    mint_refresh_token,
    parse_refresh_token,
)
from coatcheck.core.session import SECOND_US, Authority, StoredSession, tightened
from coatcheck.errors import (
    ConfigurationError,
    RefreshInvalid,
    RefreshReused,
    SessionEnded,
    StoreUnavailable,
    TokenInvalid,
    ValueRefused,
)
from coatcheck.events import Event, EventKind
from coatcheck.operations import keys as key_work
from coatcheck.operations import tokens as token_work
from coatcheck.operations.keys import RingRules
from coatcheck.operations.tokens import NotRefreshed
from coatcheck.primitives.digest import sha256_text
from coatcheck.primitives.jwk import Algorithm, SigningKey, VerifyingKey, generate_signing_key, unpack_signing_key
from coatcheck.primitives.seal import NONCE_SIZE
from coatcheck.settings import Settings, TokenSettings
from coatcheck.system import System

log: Final = logging.getLogger("coatcheck")

RING_SECONDS: Final = 5.0
"""How old the ring may be before it is read again."""

JTI_BYTES: Final = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuedTokens:
    """What a client gets, and whose it is. `refresh_token` is `None` when a cookie carries it, or the client keeps the
    one it has.

    Times are Unix seconds by the store's clock.
    """

    access_token: str = field(repr=False)
    refresh_token: str | None = field(repr=False)
    issued_at: int
    expires_at: int
    scopes: tuple[str, ...]
    subject: str
    sid: str
    token_type: str = "Bearer"  # noqa: S105 - its type, not a token

    @property
    def expires_in(self) -> int:
        """Seconds until the access token expires, from when it was issued."""
        return max(0, self.expires_at - self.issued_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchanged:
    """Tokens that were granted, and the session they belong to. `is_new`: the refresh token is another one than was
    presented."""

    tokens: IssuedTokens
    session: StoredSession
    is_new: bool
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedKeys:
    """The JWKS document and its entity tag."""

    document: bytes
    etag: str
    max_age: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    ring: KeyRing
    signers: dict[str, SigningKey]
    verifiers: dict[str, VerifyingKey]
    read_at: float


class Issuer:
    """The tokens of one application over one store. Safe to share between threads, tasks and event loops."""

    def __init__(
        self, store: Callable[[], TokenStore], settings: Settings, tokens: TokenSettings, system: System
    ) -> None:
        self._store = store
        self._settings = settings
        self._tokens = tokens
        self._system = system
        # What was used shortly before this node took up its limits may not have been noted yet.
        self._life = replace(settings.life, since_us=system.now_us())
        self._server_key = b""
        self._opened: _Opened | None = None
        audience = tokens.audience or settings.issuer
        self._audience = audience
        self._may_ask = frozenset({audience, *tokens.audiences})
        self._checks = TokenRules(
            issuer=settings.issuer,
            audiences=frozenset({audience}),
            leeway=int(tokens.leeway.total_seconds()),
        )
        self._ours = TokenRules(issuer=settings.issuer, audiences=self._may_ask)
        self._ring_rules = RingRules(
            algorithm=tokens.algorithm,
            lifetime=int(tokens.access_lifetime.total_seconds()),
            period=int(tokens.key_period.total_seconds()),
            ahead=int(tokens.publish_ahead.total_seconds()),
            verifier_lease=tokens.verifier_lease.total_seconds(),
        )

    # -- keys ------------------------------------------------------------------------------------------------------

    async def start(self, server_key: bytes | None) -> tuple[Event, ...]:
        """Read the ring, and make its first key if nobody has. Raises: StoreUnavailable, ConfigurationError."""
        if server_key is None:
            raise ConfigurationError(
                "server_key: tokens on a shared store need one, the same on every server: it seals signing keys and "
                "successors of refresh tokens; make one with `coatcheck key new`"
            )
        self._server_key = server_key
        return await self._upkeep()

    async def upkeep(self) -> tuple[Event, ...]:
        """Read the ring again if that is due, and rotate if that is. Raises: StoreUnavailable, ConfigurationError."""
        if self._opened is not None and self._system.elapsed() - self._opened.read_at < RING_SECONDS:
            return ()
        return await self._upkeep()

    @property
    def ring(self) -> KeyRing:
        """The ring as it was last read."""
        return self._keys.ring

    async def rotate_key(self) -> tuple[str, tuple[Event, ...]]:
        """Publish a new key; returns its `kid`. Raises: ValueRefused when one is waiting already, StoreUnavailable."""
        ring, new = await key_work.rotate_key(
            self._store(), self._ring_rules, self._make_key, self._opener, now=self._now()
        )
        self._open(ring)
        return new[0], self._key_events("key.published", new)

    async def retire_key(self, kid: str) -> tuple[Event, ...]:
        """Withdraw a key at once, here and at every verifier. Raises: ValueRefused, StoreUnavailable."""
        until = self._system.now_us() + key_denial_us(self.ring.longest)
        # Verifiers first: who repeats this after a failure finds the key still in the ring.
        if self.ring.find(kid) is None:
            raise ValueRefused("key: no such key in the ring")
        await self._store().deny(0, Denial(kind="kid", id=kid, until_us=until))
        ring, new = await key_work.retire_key(self._store(), self._ring_rules, self._make_key, kid=kid, now=self._now())
        self._open(ring)
        return (*self._key_events("key.published", new), *self._key_events("key.withdrawn", (kid,)))

    def published(self) -> PublishedKeys:
        """The keys that verifiers may fetch; none for HS256, whose key is a secret."""
        document = msgspec.json.encode(
            {"keys": [key.public_jwk() for key in self._keys.verifiers.values() if key.algorithm != "HS256"]}
        )
        max_age = int(self._tokens.keys_max_age.total_seconds())
        return PublishedKeys(document=document, etag=f'"{sha256_text(document)[:22]}"', max_age=max_age)

    async def _upkeep(self) -> tuple[Event, ...]:
        try:
            ring, new = await key_work.upkeep(
                self._store(), self._ring_rules, self._make_key, self._opener, now=self._now()
            )
        except (StoreUnavailable, ConfigurationError) as wrong:
            if self._opened is None:
                raise
            log.warning("coatcheck: the key ring could not be looked after: %s", wrong.detail)
            # What was read before still signs and verifies. Not every request has to find out that the store is away.
            self._opened = replace(self._opened, read_at=self._system.elapsed())
            return ()
        self._open(ring)
        return self._key_events("key.published", new)

    def _open(self, ring: KeyRing) -> None:
        known = self._opened
        signers: dict[str, SigningKey] = {}
        for key in ring.keys:
            signer = None if known is None else known.signers.get(key.kid)
            signers[key.kid] = self._unseal(key) if signer is None else signer
        self._opened = _Opened(
            ring=ring,
            signers=signers,
            verifiers={kid: signer.verifying for kid, signer in signers.items()},
            read_at=self._system.elapsed(),
        )

    def _opener(self, key: RingKey) -> object:
        known = None if self._opened is None else self._opened.signers.get(key.kid)
        return self._unseal(key) if known is None else known

    def _unseal(self, key: RingKey) -> SigningKey:
        packed = key_work.check_unsealed(unseal_key(key, server_key=self._server_key), key)
        return unpack_signing_key(packed, kid=key.kid, algorithm=key.algorithm)

    def _make_key(self, algorithm: Algorithm) -> RingKey:
        made = generate_signing_key(algorithm, random=self._system.random)
        while made.kid.startswith("-"):
            # On a command line it would be taken for an option.
            made = generate_signing_key(algorithm, random=self._system.random)
        sealed = seal_key(made.pack(), kid=made.kid, server_key=self._server_key, nonce=self._system.random(NONCE_SIZE))
        return RingKey(kid=made.kid, algorithm=algorithm, sealed=sealed, published_at=0, signs_at=0)

    @property
    def _keys(self) -> _Opened:
        if self._opened is None:
            raise RuntimeError("the key ring has not been read yet")
        return self._opened

    def _key_events(self, kind: EventKind, kids: tuple[str, ...]) -> tuple[Event, ...]:
        return tuple(Event(kind=kind, at=self._now(), data={"kid": kid}) for kid in kids)

    def _now(self) -> float:
        return self._system.now_us() / SECOND_US

    @property
    def grace_seconds(self) -> float:
        """How long a sealed successor may be kept."""
        return self._tokens.reuse_grace.total_seconds()

    # -- issuing ---------------------------------------------------------------------------------------------------

    async def issue(
        self, keys: IdKeys, session: StoredSession, authority: Authority, *, audience: str | None
    ) -> Exchanged:
        """Begin a refresh family of a session and mint its first access token: one store command.

        Raises: SessionGone, ValueRefused for an audience that is not in the settings, StoreUnavailable.
        """
        self.check_audience(audience)
        family = family_of_session(session.ref, random=self._system.random(FAMILY_BYTES))
        token = self._refresh_token(keys, family, FIRST_GENERATION)
        life = self._settings.life
        new = NewFamily(
            ref=family,
            digest=token.digest,
            owner=session.owner,
            subject=session.subject,
            client="",
            key="",
            grant=encode_grant(Grant(scopes=authority.scopes, proofs=authority.proofs)),
            idle_us=life.idle_us,
            absolute_us=life.absolute_us,
        )
        begun = await token_work.begin_family(self._store(), new)
        if begun.session is None:
            raise StoreUnavailable("the store began a family of a session and did not name the session")
        limited = tightened(begun.session, idle_us=life.idle_us, absolute_us=life.absolute_us)
        tokens = self._mint(
            keys, limited, authority, scopes=authority.scopes, audience=audience, now_us=begun.now_us, token=token
        )
        event = Event(
            kind="token.issued",
            at=begun.now_us / SECOND_US,
            sid=sid_of(keys, session.ref),
            subject=session.subject,
            data={"audience": audience or self._audience},
        )
        return Exchanged(tokens=tokens, session=limited, is_new=True, events=(event,))

    def check_fits(self, subject: str, authority: Authority) -> None:
        """That an access token of these could be minted: found out before they are written, not at a refresh.

        Raises: ValueRefused.
        """
        now = int(self._now())
        signing = self._keys.ring.signing(now) or self._keys.ring.keys[0]
        mint_access_token(
            self._keys.signers[signing.kid],
            issuer=self._settings.issuer,
            subject=subject,
            audience=max(self._may_ask, key=len),
            client_id=self._tokens.client_id,
            sid="x" * SID_CHARACTERS,
            jti=new_jti(0, b"x" * JTI_BYTES),
            issued_at=now,
            expires_at=now + self._ring_rules.lifetime,
            scopes=authority.scopes,
            auth_time=now,
            acr=authority.acr,
            amr=authority.amr,
            claims=authority.claims,
        )

    async def refresh(self, keys: IdKeys, value: bytes, *, audience: str | None) -> Exchanged | NotRefreshed:
        """Exchange a refresh token, whatever bytes it is: one store command, none for an invented one.

        Raises: ValueRefused for an audience that is not in the settings, StoreUnavailable.
        """
        self.check_audience(audience)
        presented = parse_refresh_token(keys, value)
        if presented is None or presented.generation >= LAST_GENERATION:
            return NotRefreshed(why="unknown")
        done = await token_work.refresh(
            self._store(),
            keys,
            presented=presented,
            successor=self._refresh_token(keys, presented.family, presented.generation + 1),
            server_key=self._server_key,
            nonce=self._system.random(NONCE_SIZE),
            grace_us=int(self._tokens.reuse_grace.total_seconds()) * SECOND_US,
            client="",
            key="",
            limits=self._life,
            deny_us=self.deny_us,
        )
        if isinstance(done, NotRefreshed):
            return done
        scopes = tuple(scope for scope in done.grant.scopes if scope in done.authority.scopes)
        tokens = self._mint(
            keys, done.session, done.authority, scopes=scopes, audience=audience, now_us=done.now_us, token=done.token
        )
        return Exchanged(tokens=tokens, session=done.session, is_new=done.how != "kept", events=done.events)

    def _mint(
        self,
        keys: IdKeys,
        session: StoredSession,
        authority: Authority,
        *,
        scopes: tuple[str, ...],
        audience: str | None,
        now_us: int,
        token: RefreshToken | None,
    ) -> IssuedTokens:
        # By the time of the store's answer, never of the signing: a revoke in between must not be outlived.
        issued_at = now_us // SECOND_US
        lifetime = self._keys.ring.lifetime(self._ring_rules.lifetime, issued_at)
        expires_at = min(issued_at + lifetime, session.absolute_us // SECOND_US)
        if expires_at <= issued_at:
            # Less than a second is left, and tokens count in seconds.
            raise SessionEnded("absolute_timeout", session.absolute_us / SECOND_US)
        opened = self._keys
        signing = opened.ring.signing(issued_at)
        if signing is None:
            # This server's clock made the only key in the store's future.
            signing = opened.ring.keys[0]
        sid = sid_of(keys, session.ref)
        text = mint_access_token(
            opened.signers[signing.kid],
            issuer=self._settings.issuer,
            subject=session.subject,
            audience=audience or self._audience,
            client_id=self._tokens.client_id,
            sid=sid,
            jti=new_jti(session.ref.tag, self._system.random(JTI_BYTES)),
            issued_at=issued_at,
            expires_at=expires_at,
            scopes=scopes,
            auth_time=session.auth_us // SECOND_US,
            acr=authority.acr,
            amr=authority.amr,
            claims=authority.claims,
        )
        return IssuedTokens(
            access_token=text,
            refresh_token=None if token is None else token.text,
            issued_at=issued_at,
            expires_at=expires_at,
            scopes=scopes,
            subject=session.subject,
            sid=sid,
        )

    def _refresh_token(self, keys: IdKeys, family: FamilyRef, generation: int) -> RefreshToken:
        return mint_refresh_token(keys, family, generation=generation, secret=self._system.random(SECRET_BYTES))

    def check_audience(self, audience: str | None) -> None:
        """Raises: ValueRefused for a service that is not in the settings."""
        if audience is not None and audience not in self._may_ask:
            raise ValueRefused("audience: not one of tokens.audiences")

    # -- checking --------------------------------------------------------------------------------------------------

    async def verify(self, keys: IdKeys, token: str | bytes) -> AccessToken:
        """Check an access token of ours, and ask the store whether its session lives and it was not denied.

        Raises: TokenInvalid, StoreUnavailable.
        """
        rules = self._checks
        found = verify_access_token(token, self._keys.verifiers, rules, now=None)
        if self._now() >= found.expires_at + rules.leeway + MAX_LEEWAY:
            # Whatever this server's clock may be off by: no need to ask for what is long over.
            raise TokenInvalid("expired")
        ref = None if found.sid is None else parse_sid(keys, found.sid)
        if ref is None:
            raise TokenInvalid("its sid is not one of this store")
        standing = await self._store().standing(ref, found.id)
        # The store's clock made the times of the token, so it judges them; this server's may be seconds behind.
        judge_times(found, rules, now=standing.now_us / SECOND_US)
        if standing.why is not None:
            raise TokenInvalid(f"its session or itself was ended: {standing.why}")
        return found

    def inspect(self, token: str | bytes) -> AccessToken:
        """An access token as it was issued here, for whatever audience: time and denylist are not judged.

        Raises: TokenInvalid.
        """
        return verify_access_token(token, self._keys.verifiers, self._ours, now=None)

    # -- denying ---------------------------------------------------------------------------------------------------

    @property
    def deny_us(self) -> int:
        """How long access tokens of a session must be denied after its end, in microseconds (SEMANTICS 5)."""
        return denial_us(self._keys.ring.longest)

    async def deny(self, jti: str, *, expires_at: int | None = None) -> Event:
        """Deny one access token until no verifier would accept it anyway. Raises: ValueRefused, StoreUnavailable."""
        tag = tag_of_jti(jti)
        if tag is None:
            raise ValueRefused("jti: not one of ours")
        now_us = self._system.now_us()
        until = now_us + self.deny_us if expires_at is None else token_denial_until_us(expires_at)
        await self._store().deny(tag, Denial(kind="jti", id=jti, until_us=until))
        return Event(kind="token.denied", at=now_us / SECOND_US, data={"jti": jti})

    async def denials(self, *, after: str | None, limit: int) -> DenialPage | PositionLost:
        """The denylist in the order it was made. Raises: StoreUnavailable."""
        return await self._store().denials(after=after, limit=limit)


def refusal_of(done: NotRefreshed) -> RefreshInvalid | SessionEnded:
    """The error a client gets for an exchange that was refused."""
    if done.why == "reused":
        return RefreshReused()
    if done.why == "ended":
        reason, network = cause_of(done.reason)
        return SessionEnded(reason, done.at_us / SECOND_US, network)
    return RefreshInvalid(done.why)
