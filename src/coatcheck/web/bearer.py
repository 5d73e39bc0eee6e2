"""The access token of one request: which header it came in, and what a service without a store makes of it.

Decides what counts as a bearer (RFC 6750 s2.1: one `Authorization` header, nothing in a form or a query, where logs
would keep it) and what a request without one is told. It must never see a cookie.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from coatcheck.core.access_token import AccessToken
from coatcheck.errors import ConfigurationError, LoginRequired, ScopesMissing
from coatcheck.session import Principal, principal_of
from coatcheck.verifier import Verifier
from coatcheck.web.paths import is_excluded, is_sensitive


def bearer_of(values: Sequence[bytes]) -> bytes | None:
    """The token in the `Authorization` headers of a request; `None` without any, empty for what is no bearer.

    An empty token is refused like a forged one: another scheme, or two headers, is a credential we do not accept.
    """
    if not values:
        return None
    scheme, _, token = values[0].partition(b" ")
    if len(values) != 1 or scheme.lower() != b"bearer":
        return b""
    return token.strip(b" ")


@dataclass(slots=True)
class Bearer:
    """The bearer of one request, checked when somebody asks and once only.

    `verify(sensitive=True)` is for acts that must not rest on a list of revocations older than the feed lease.
    """

    verifier: Verifier
    presented: bytes | None = field(repr=False)
    _token: AccessToken | None = None

    def verify(self, *, sensitive: bool = False) -> AccessToken:
        """The access token. Raises: LoginRequired without one, TokenInvalid, FeedSilent (503)."""
        if self.presented is None:
            raise LoginRequired(bearer=True)
        if self._token is None or sensitive:
            self._token = self.verifier.verify(self.presented, sensitive=sensitive)
        return self._token

    def principal(self, *, sensitive: bool = False) -> Principal:
        """Who is asking. Raises: as `verify`."""
        return principal_of(self.verify(sensitive=sensitive))

    @property
    def optional_principal(self) -> Principal | None:
        """Who is asking, or None without a token. Raises: TokenInvalid for a bad one, FeedSilent."""
        return None if self.presented is None else self.principal()


class VerifierGateway:
    """What the gateways of a service without a store share: which requests are let in."""

    def __init__(
        self,
        verifier: Verifier,
        *,
        optional: bool,
        exclude: Iterable[str],
        sensitive: Iterable[str],
    ) -> None:
        if not isinstance(verifier, Verifier):
            raise ConfigurationError("verifier: a Verifier")
        self.verifier: Verifier = verifier
        self.optional: bool = optional
        self.exclude: tuple[str, ...] = tuple(exclude)
        self.sensitive: tuple[str, ...] = tuple(sensitive)

    def leaves_alone(self, path: str) -> bool:
        """Whether a path is none of this gateway's business."""
        return is_excluded(path, self.exclude)

    def bearer(self, values: Sequence[bytes]) -> Bearer:
        """The bearer of a request with these `Authorization` headers, not looked at yet."""
        self.verifier.start()
        return Bearer(self.verifier, bearer_of(values))

    def check(self, bearer: Bearer, path: str) -> None:
        """Let a request in. Raises: LoginRequired, TokenInvalid, FeedSilent."""
        if not self.optional:
            bearer.verify(sensitive=is_sensitive(path, self.sensitive))


def require_scopes(principal: Principal, scopes: Iterable[str]) -> Principal:
    """The principal, if it has all of them. Raises: ScopesMissing."""
    missing = tuple(scope for scope in scopes if scope not in principal.scopes)
    if missing:
        raise ScopesMissing(missing)
    return principal
