"""Which access tokens are refused although they verify, and how that is told to others.

Decides the kinds of entries, how long each must live, whether one token is denied, and what a page of the revocation
feed may hold. An entry names a session, a token, a subject or a key, never the text of a token: one token has many
texts, its `jti` has one. Nothing here can take a denial back: entries of one kind merge into the stricter of both, a
snapshot only takes the place of the old list when it is complete, and otherwise entries end by their time alone. It
must never read a clock or fetch anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Final, TypeAlias, assert_never

import msgspec

from coatcheck.core.access_token import MAX_LEEWAY, AccessToken
from coatcheck.core.ids import SessionRef
from coatcheck.core.ports import Denial

MAX_PAGE_OCTETS: Final = 4 * 1024 * 1024
"""A page of the feed is not longer; looked at before it is parsed."""

MAX_PAGE_ENTRIES: Final = 1000
"""Entries one page may hold."""

PAGE_ENTRIES: Final = 400
"""Entries a verifier asks for: so many with the longest names still fit into `MAX_PAGE_OCTETS`."""

MAX_ENTRIES: Final = 1_000_000
"""Entries one list may hold, about 200 MB. A verifier that is told more vouches for nothing, rather than for some."""

_MICRO: Final = 1_000_000


# -- how long entries live -----------------------------------------------------------------------------------------


def denial_us(longest: int) -> int:
    """How long a session, subject, client or everybody must stay denied so that no token of theirs is left.

    `longest` is the longest lifetime of any access token ever issued, in seconds; the answer is in microseconds from
    the revoke, and counts the leeway of the most tolerant verifier.
    """
    return (longest + MAX_LEEWAY) * _MICRO


KEYS_AT_MOST: Final = 3600
"""No verifier keeps published keys longer than this many seconds without asking again."""


def key_denial_us(longest: int) -> int:
    """How long a withdrawn key must stay denied: until no verifier can have it cached and no token of it is left."""
    return denial_us(longest) + KEYS_AT_MOST * _MICRO


def token_denial_until_us(expires_at: int) -> int:
    """Until when one token must stay denied: its `exp` (Unix seconds) and the largest leeway, in Unix microseconds."""
    return (expires_at + MAX_LEEWAY) * _MICRO


# -- entries -------------------------------------------------------------------------------------------------------

_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]


class _Entry(msgspec.Struct, frozen=True, kw_only=True):
    until: float


class SessionDenied(_Entry, frozen=True, kw_only=True, tag_field="kind", tag="sid"):
    """Every token of one session, until `until` (Unix seconds, as in all kinds)."""

    sid: _Text


class TokenDenied(_Entry, frozen=True, kw_only=True, tag_field="kind", tag="jti"):
    """One token. Ids are unique within an issuer, so the issuer belongs to the name."""

    iss: _Text
    jti: _Text


class SubjectCut(_Entry, frozen=True, kw_only=True, tag_field="kind", tag="sub"):
    """Every token of a subject issued before `not_before` (Unix seconds, as in all cuts)."""

    sub: _Text
    not_before: float


class ClientCut(_Entry, frozen=True, kw_only=True, tag_field="kind", tag="client_sub"):
    """Every token that one client got for one subject before `not_before`."""

    # Empty for the first party (RFC 6749 appendix A.1 allows it).
    client_id: Annotated[str, msgspec.Meta(max_length=1024)]
    sub: _Text
    not_before: float


class EveryoneCut(_Entry, frozen=True, kw_only=True, tag_field="kind", tag="all"):
    """Every token issued before `not_before`."""

    not_before: float


class KeyDenied(_Entry, frozen=True, kw_only=True, tag_field="kind", tag="kid"):
    """Every token a key has signed: the key was lost, or is not trusted any more."""

    kid: _Text


Entry: TypeAlias = SessionDenied | TokenDenied | SubjectCut | ClientCut | EveryoneCut | KeyDenied


def entry_of(denial: Denial, *, issuer: str, sid_of: Callable[[SessionRef], str]) -> dict[str, object]:
    """One entry of a store as the feed tells it. `sid_of` gives the `sid` that tokens of a session carry."""
    until = denial.until_us / _MICRO
    not_before = denial.not_before_us / _MICRO
    match denial.kind:
        case "sid":
            tag, _, handle = denial.id.partition(".")
            return {"kind": "sid", "sid": sid_of(SessionRef(int(tag, 16), handle)), "until": until}
        case "jti":
            return {"kind": "jti", "iss": issuer, "jti": denial.id, "until": until}
        case "sub":
            return {"kind": "sub", "sub": denial.id, "not_before": not_before, "until": until}
        case "client_sub":
            client, _, subject = denial.id.partition("\n")
            return {
                "kind": "client_sub",
                "client_id": client,
                "sub": subject,
                "not_before": not_before,
                "until": until,
            }
        case "all":
            return {"kind": "all", "not_before": not_before, "until": until}
        case "kid":
            return {"kind": "kid", "kid": denial.id, "until": until}
        case _:
            assert_never(denial.kind)


# -- a page of the feed --------------------------------------------------------------------------------------------


class PageRefused(ValueError):
    """Octets that are no page of the feed; the text says why and repeats nothing of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedPage:
    """`cursor` goes back in as `after`. `lag`: how many seconds the teller may be behind. `longest`: seconds that no
    token of this issuer lives longer than. `unknown`: kinds that a later release tells of; they decide nothing here.
    """

    cursor: str
    more: bool
    lag: float
    longest: float
    entries: tuple[Entry, ...]
    unknown: frozenset[str]


class _Page(msgspec.Struct):
    cursor: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    more: bool
    lag: Annotated[float, msgspec.Meta(ge=0)]
    longest: Annotated[float, msgspec.Meta(gt=0)]
    entries: list[msgspec.Raw]


class _Kind(msgspec.Struct):
    kind: Annotated[str, msgspec.Meta(max_length=64)]


_page_decoder: Final = msgspec.json.Decoder(_Page)
_kind_decoder: Final = msgspec.json.Decoder(_Kind)
_entry_decoder: Final = msgspec.json.Decoder(Entry)
_KINDS: Final = frozenset({"sid", "jti", "sub", "client_sub", "all", "kid"})


def read_page(data: bytes) -> FeedPage:
    """Read one page of the feed. Raises: PageRefused, and nothing else, whatever comes.

    One bad entry of a known kind refuses the page: whoever left it out would vouch for the token it denies.
    """
    # Before parsing: a huge answer must cost as little as a wrong one.
    if len(data) > MAX_PAGE_OCTETS:
        raise PageRefused(f"it is longer than {MAX_PAGE_OCTETS} octets")
    try:
        page = _page_decoder.decode(data)
        if len(page.entries) > MAX_PAGE_ENTRIES:
            raise PageRefused(f"it holds more than {MAX_PAGE_ENTRIES} entries")
        # The cursor becomes part of an address, where a control character or a space would start something new.
        if not (page.cursor.isascii() and page.cursor.isprintable() and " " not in page.cursor):
            raise PageRefused("its cursor is not visible ASCII")
        entries: list[Entry] = []
        unknown: set[str] = set()
        for raw in page.entries:
            kind = _kind_decoder.decode(raw).kind
            if kind in _KINDS:
                entries.append(_entry_decoder.decode(raw))
            else:
                unknown.add(kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as broken:
        # The parser's own text names members and types, never values.
        raise PageRefused("it is not a page of the feed") from broken
    return FeedPage(
        cursor=page.cursor,
        more=page.more,
        lag=page.lag,
        longest=page.longest,
        entries=tuple(entries),
        unknown=frozenset(unknown),
    )


# -- the list ------------------------------------------------------------------------------------------------------


class DenylistFull(Exception):
    """More entries than `MAX_ENTRIES`: what is left out would be accepted, so nothing may be."""


@dataclass(frozen=True, slots=True)
class _Cut:
    not_before: float
    until: float


class Denylist:
    """The entries of one issuer. One thread adds and prunes; any number may ask at the same time."""

    __slots__ = ("_clients", "_everyone", "_issuer", "_keys", "_limit", "_sessions", "_subjects", "_tokens")

    def __init__(self, issuer: str, *, limit: int = MAX_ENTRIES) -> None:
        self._issuer: Final = issuer
        self._limit: Final = limit
        self._sessions: Final[dict[str, float]] = {}
        self._tokens: Final[dict[str, float]] = {}
        self._keys: Final[dict[str, float]] = {}
        self._subjects: Final[dict[str, _Cut]] = {}
        self._clients: Final[dict[tuple[str, str], _Cut]] = {}
        self._everyone: _Cut | None = None

    def __len__(self) -> int:
        named = len(self._sessions) + len(self._tokens) + len(self._keys) + len(self._subjects) + len(self._clients)
        return named + (self._everyone is not None)

    def add(self, entry: Entry) -> None:
        """Deny what the entry names. Repeating is safe, in any order. Raises: DenylistFull."""
        match entry:
            case SessionDenied():
                _lengthen(self._sessions, entry.sid, entry.until)
            case TokenDenied():
                # Ids of another issuer name none of the tokens that are checked here.
                if entry.iss == self._issuer:
                    _lengthen(self._tokens, entry.jti, entry.until)
            case KeyDenied():
                _lengthen(self._keys, entry.kid, entry.until)
            case SubjectCut():
                self._subjects[entry.sub] = _stricter(self._subjects.get(entry.sub), entry)
            case ClientCut():
                both = (entry.client_id, entry.sub)
                self._clients[both] = _stricter(self._clients.get(both), entry)
            case EveryoneCut():
                self._everyone = _stricter(self._everyone, entry)
            case _:
                assert_never(entry)
        if len(self) > self._limit:
            raise DenylistFull(f"more than {self._limit} entries are denied")

    def why(self, token: AccessToken, *, now: float) -> str | None:
        """Why a verified token must not be accepted (`sid`, `jti`, `sub`, `client_sub` or `all`), or `None`.

        `now` is Unix seconds. Keys are not looked at: a denied key is not among those that verify (`denies_key`).
        """
        sid = token.sid
        if sid is not None and now < self._sessions.get(sid, now):
            return "sid"
        if now < self._tokens.get(token.id, now):
            return "jti"
        issued, subject = token.issued_at, token.subject
        if _cut_off(self._subjects.get(subject), issued, now):
            return "sub"
        if self._clients and _cut_off(self._clients.get((token.client_id, subject)), issued, now):
            return "client_sub"
        if _cut_off(self._everyone, issued, now):
            return "all"
        return None

    def denies_key(self, kid: str, *, now: float) -> bool:
        """Whether nothing this key has signed is accepted any more."""
        return now < self._keys.get(kid, now)

    def prune(self, *, now: float) -> int:
        """Forget the entries whose time is over (at exactly `until` it is); returns how many."""
        before = len(self)
        for ends in (self._sessions, self._tokens, self._keys):
            for name in [name for name, until in ends.items() if until <= now]:
                del ends[name]
        for subject in [name for name, cut in self._subjects.items() if cut.until <= now]:
            del self._subjects[subject]
        for both in [name for name, cut in self._clients.items() if cut.until <= now]:
            del self._clients[both]
        if self._everyone is not None and self._everyone.until <= now:
            self._everyone = None
        return before - len(self)


def _lengthen(ends: dict[str, float], name: str, until: float) -> None:
    ends[name] = max(until, ends.get(name, until))


def _stricter(known: _Cut | None, entry: SubjectCut | ClientCut | EveryoneCut) -> _Cut:
    if known is None:
        return _Cut(entry.not_before, entry.until)
    return _Cut(max(known.not_before, entry.not_before), max(known.until, entry.until))


def _cut_off(cut: _Cut | None, issued: int, now: float) -> bool:
    return cut is not None and issued < cut.not_before and now < cut.until


# -- following -----------------------------------------------------------------------------------------------------


class FeedReader:
    """Where one follower of the feed stands: its cursor, the list in force, and a snapshot that is being read.

    The list in force is never shorter than what was told: while a snapshot is read, all that comes counts at once, and
    the old entries count until the snapshot is complete. `version` is raised *after* each change; whoever reads it
    before asking the list and keeps it beside the answer knows when to ask again. One thread writes.
    """

    __slots__ = ("_building", "_issuer", "_limit", "cursor", "denied", "longest", "version")

    def __init__(self, issuer: str, *, limit: int = MAX_ENTRIES) -> None:
        self._issuer: Final = issuer
        self._limit: Final = limit
        self.cursor: str | None = None
        """Goes into the next question as `after`; `None` asks for a snapshot."""
        self.denied: Denylist = self._empty()
        self.longest = float("inf")
        """Seconds; no token of this issuer lives longer, and no denial has to."""
        self.version = 0
        self._building: Denylist | None = self._empty()

    @property
    def is_complete(self) -> bool:
        """Whether the list in force is all there is to know; false from `lose` to the end of the next snapshot."""
        return self._building is None

    def lose(self) -> None:
        """The cursor means nothing any more: read a snapshot, and keep the old entries until it is there."""
        self.cursor, self._building = None, self._empty()

    def take(self, page: FeedPage) -> bool:
        """Take the answer to a question with `cursor`; returns whether the list is complete and current with it.

        Raises: PageRefused for a page that leads nowhere, DenylistFull; the same question must then be asked again.
        """
        if page.more and page.cursor == self.cursor:
            raise PageRefused("it goes on where it began")
        self._add(page)
        self.cursor = page.cursor
        if not page.more and self._building is not None:
            self.denied, self._building = self._building, None
        if page.longest != self.longest:
            self.longest = page.longest
            self.version += 1
        return not page.more

    def take_pushed(self, page: FeedPage) -> None:
        """Take what came without a question: it denies at once, and proves nothing about what did not come."""
        self._add(page)

    def _add(self, page: FeedPage) -> None:
        try:
            for entry in page.entries:
                self.denied.add(entry)
                if self._building is not None:
                    self._building.add(entry)
        finally:
            # Also when the list is full: what fitted in counts.
            self.version += bool(page.entries)

    def _empty(self) -> Denylist:
        return Denylist(self._issuer, limit=self._limit)
