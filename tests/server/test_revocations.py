"""What verifiers fetch: published keys, pages of what is denied, and the stream."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
from base64 import urlsafe_b64decode
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from coatcheck.core.access_token import MAX_LEEWAY
from coatcheck.core.denylist import MAX_PAGE_ENTRIES, PAGE_ENTRIES, read_page
from coatcheck.core.ports import Denial
from coatcheck.errors import CursorLost, StoreUnavailable
from coatcheck.server import revocations
from coatcheck.server.revocations import STREAM_SECONDS, FeedStream
from coatcheck.server.serving import DRAIN_SECONDS
from coatcheck.server.token_endpoints import FEED_PATH, JWKS_PATH, MAX_CURSOR_CHARACTERS
from tests.server.command_parts import PASSWORD, Server, call, process, serving
from tests.server.conftest import MakeSite, Site

LIFETIME = 15 * 60
SECOND_US = 1_000_000
PRIVATE = {"d", "p", "q", "dp", "dq", "qi", "oth", "k"}
LEASE = 1.0
PATIENCE = 10
BODY_LOGIN = {"username": "minsu", "carrier": "body", "password": PASSWORD}


class Feed:
    """A verifier of a site: it asks with its credential."""

    def __init__(self, site: Site, name: str = "shop") -> None:
        self.site = site
        self.credential: str = site.call(site.service.clients.add, name)

    def get(self, after: str | None = None, **query: str | int) -> Any:
        asked = {**({} if after is None else {"after": after}), **query}
        return self.site.client().get(FEED_PATH, params=asked, headers=self.headers)

    def page(self, after: str | None = None, **query: str | int) -> Any:
        answer = self.get(after, **query)
        assert answer.status_code == 200, answer.text
        read_page(answer.content)
        return answer.json()

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.credential}"}


@pytest.fixture
def feed(b2c: Site) -> Feed:
    return Feed(b2c)


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing happens by waiting here: what is told in time was told because something happened.
    monkeypatch.setattr(revocations, "POLL_SECONDS", 3600)
    monkeypatch.setattr(revocations, "KEEP_ALIVE_SECONDS", 3600)


def sign_in(site: Site, subject: str = "minsu") -> str:
    """A session with tokens; its public handle."""

    async def made() -> str:
        session = site.service.coat.session(None)
        await session.login(subject)
        await session.tokens(carrier="body")
        assert session.sid is not None
        return session.sid

    sid: str = site.call(made)
    return sid


def revoke(site: Site, sid: str) -> None:
    assert site.call(site.service.coat.revoke_session, sid, reason="test").ended == 1


def sids(page: Any) -> list[str]:
    return [entry["sid"] for entry in page["entries"] if entry["kind"] == "sid"]


# Keys.


def test_published_keys_may_be_kept_and_hold_nothing_private(b2c: Site) -> None:
    answer = b2c.client().get(JWKS_PATH)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/jwk-set+json")
    assert answer.headers["cache-control"] == "public, max-age=300"
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "set-cookie" not in answer.headers
    (key,) = answer.json()["keys"]
    assert (key["kty"], key["crv"], key["alg"], key["use"]) == ("EC", "P-256", "ES256", "sig")
    assert key["kid"]
    assert not PRIVATE & set(key)


@pytest.mark.parametrize("algorithm", ["ES256", "EdDSA", "RS256"])
def test_no_algorithm_publishes_a_private_member(make_site: MakeSite, algorithm: str) -> None:
    site = make_site(profile="b2c", token_algorithm=algorithm)
    (key,) = site.client().get(JWKS_PATH).json()["keys"]
    assert key["alg"] == algorithm
    assert not PRIVATE & set(key)


def test_a_secret_key_is_never_published(make_site: MakeSite) -> None:
    site = make_site(profile="b2c", token_algorithm="HS256")
    site.add_user("minsu")
    assert site.client().get(JWKS_PATH).json() == {"keys": []}
    access = site.client().post("/api/login", json=BODY_LOGIN).json()["access_token"]
    assert site.client().get("/api/me", headers={"authorization": f"Bearer {access}"}).status_code == 200


def test_unchanged_keys_are_not_sent_again(b2c: Site) -> None:
    client = b2c.client()
    etag = client.get(JWKS_PATH).headers["etag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        answer = client.get(JWKS_PATH, headers={"if-none-match": known})
        assert (answer.status_code, answer.content) == (304, b""), known
        assert (answer.headers["etag"], answer.headers["cache-control"]) == (etag, "public, max-age=300")
    for other in ('"other"', etag.strip('"'), f"{etag}x", "", f'"{"x" * 2000}", {etag}'):
        assert client.get(JWKS_PATH, headers={"if-none-match": other}).status_code == 200, other


def test_a_rotated_key_is_published_before_it_signs_and_listed_while_its_tokens_live(b2c: Site) -> None:
    def kids() -> list[str]:
        return [key["kid"] for key in b2c.client().get(JWKS_PATH).json()["keys"]]

    def signed_by() -> str:
        answer = b2c.client().post("/api/login", json=BODY_LOGIN)
        head: str = answer.json()["access_token"].partition(".")[0]
        return str(json.loads(_decoded(head))["kid"])

    b2c.add_user("minsu")
    issuer = b2c.service.coat.engine.issuer
    (old,) = kids()
    etag = b2c.client().get(JWKS_PATH).headers["etag"]
    new, _ = b2c.call(issuer.rotate_key)
    assert kids() == [old, new]
    assert b2c.client().get(JWKS_PATH, headers={"if-none-match": etag}).status_code == 200
    tokens = b2c.service.coat.settings.tokens
    assert tokens is not None
    ahead = tokens.publish_ahead.total_seconds()
    assert ahead > 300, "longer than anybody may keep the keys"
    b2c.clock.advance(ahead - 1)
    assert signed_by() == old
    b2c.clock.advance(1)
    assert signed_by() == new
    b2c.clock.advance(LIFETIME + MAX_LEEWAY - 31)
    assert kids() == [old, new], "its last token may be accepted still"
    b2c.clock.advance(32)
    assert kids() == [new]


def test_a_withdrawn_key_is_gone_at_once_and_the_feed_says_so(b2c: Site, feed: Feed) -> None:
    issuer = b2c.service.coat.engine.issuer
    (old,) = [key["kid"] for key in b2c.client().get(JWKS_PATH).json()["keys"]]
    b2c.call(issuer.retire_key, old)
    assert old not in b2c.client().get(JWKS_PATH).text
    assert [entry["kid"] for entry in feed.page()["entries"]] == [old]


def test_keys_are_told_while_the_store_is_away(b2c: Site) -> None:
    assert b2c.client().get(JWKS_PATH).status_code == 200
    b2c.store.off = None
    b2c.clock.advance(31)
    assert b2c.client().get(JWKS_PATH).status_code == 200


@pytest.mark.parametrize("path", [JWKS_PATH, FEED_PATH])
def test_where_the_profile_hands_out_no_tokens_there_is_nothing_for_verifiers(site: Site, path: str) -> None:
    credential = site.call(site.service.clients.add, "shop")
    answer = site.client().get(path, headers={"authorization": f"Bearer {credential}"})
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


@pytest.mark.parametrize("path", [JWKS_PATH, FEED_PATH])
def test_verifiers_only_read(b2c: Site, path: str) -> None:
    answer = b2c.client().post(path)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


# Who may read the feed.


def test_the_feed_needs_the_credential_of_a_client(b2c: Site, feed: Feed) -> None:
    b2c.add_user("minsu")
    access = b2c.client().post("/api/login", json=BODY_LOGIN).json()["access_token"]
    good = feed.credential
    wrong = [
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Bearer {good[:-1]}",
        f"Bearer {good}A",
        f"Bearer {good[:-1]}{'A' if good[-1] != 'A' else 'B'}",
        f"Bearer {good.swapcase()}",
        f"Bearer {good} {good}",
        f"Bearer {good}, Bearer {good}",
        f"Basic {good}",
        good,
        f"Bearer {access}",
        f"Bearer {'x' * 10_000}",
        f"Bearer {'é' * 22}",
    ]
    for value in wrong:
        headers = {} if value is None else {b"authorization": value.encode()}
        for accept in ("*/*", "text/event-stream"):
            answer = b2c.client().get(FEED_PATH, headers={**headers, b"accept": accept.encode()})
            assert (answer.status_code, answer.json()["code"]) == (401, "invalid_token"), value
            assert answer.headers["www-authenticate"].startswith("Bearer")
            assert "set-cookie" not in answer.headers
    twice = b2c.client().get(FEED_PATH, headers=[("authorization", f"Bearer {good}")] * 2)
    assert twice.status_code == 401
    for value in (f"Bearer {good}", f"bearer {good}", f"Bearer   {good} "):
        assert b2c.client().get(FEED_PATH, headers={"authorization": value}).status_code == 200


def test_a_credential_in_the_address_counts_for_nothing(b2c: Site, feed: Feed) -> None:
    assert b2c.client().get(FEED_PATH, params={"access_token": feed.credential}).status_code == 401


def test_a_session_reads_no_feed_and_a_client_opens_no_session(b2c: Site, feed: Feed) -> None:
    b2c.add_user("haneul", role="admin")
    assert b2c.signed_in("haneul").get(FEED_PATH).status_code == 401
    assert b2c.client().get("/api/me", headers=feed.headers).status_code == 401


def test_a_removed_client_is_out_at_the_next_request(b2c: Site, feed: Feed) -> None:
    assert feed.get().status_code == 200
    assert b2c.call(b2c.service.clients.remove, "shop")
    assert feed.get().status_code == 401


def test_a_database_that_is_away_lets_nobody_in(b2c: Site, feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*_: object) -> None:
        raise StoreUnavailable("database: away", retry_after=3)

    monkeypatch.setattr(b2c.service.database, "fetch", away)
    assert feed.get().status_code == 503


# Pages.


def test_a_page_of_an_empty_log_has_a_cursor_to_go_on_from(b2c: Site, feed: Feed) -> None:
    answer = feed.get()
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    body = answer.json()
    assert body == {"cursor": body["cursor"], "more": False, "lag": 0.0, "longest": LIFETIME, "entries": []}
    assert feed.page(body["cursor"]) == body


def test_an_ended_session_is_told_until_no_token_of_it_can_live(b2c: Site, feed: Feed) -> None:
    sid = sign_in(b2c)
    b2c.clock.advance(0.25)
    revoke(b2c, sid)
    until = b2c.clock.now_us() / 1e6 + LIFETIME + MAX_LEEWAY
    first = feed.page()
    assert first["entries"] == [{"kind": "sid", "sid": sid, "until": until}]
    assert feed.page(first["cursor"])["entries"] == []
    b2c.clock.advance(LIFETIME + MAX_LEEWAY - 0.000001)
    assert sids(feed.page()) == [sid]
    b2c.clock.advance(0.000001)
    assert feed.page()["entries"] == []


def test_a_longer_life_of_tokens_is_remembered_after_it_was_shortened(make_site: MakeSite) -> None:
    first = make_site(profile="b2c", access_lifetime=timedelta(hours=1))
    assert Feed(first).page()["longest"] == 3600
    second = make_site(profile="b2c", access_lifetime=timedelta(minutes=5))
    second.clock.advance(60)
    assert Feed(second, "other").page()["longest"] == 3600


def test_a_longer_life_that_another_server_began_is_told(make_site: MakeSite) -> None:
    first = make_site(profile="b2c")
    feed = Feed(first)
    assert feed.page()["longest"] == LIFETIME
    make_site(profile="b2c", access_lifetime=timedelta(hours=1))
    first.clock.advance(30)
    assert feed.page()["longest"] == 3600


@pytest.mark.parametrize("by", ["logout", "administrator", "everybody", "operator", "limit", "other sessions", "again"])
def test_whoever_ends_a_session_the_feed_tells_it(b2c: Site, feed: Feed, by: str) -> None:
    user = b2c.add_user("minsu")
    b2c.add_user("haneul", role="admin")
    client = b2c.signed_in("minsu")
    sid = client.get("/api/me").json()["session"]["sid"]
    cursor = feed.page()["cursor"]
    b2c.clock.advance(1)
    if by == "logout":
        client.post("/api/logout")
    elif by in ("administrator", "everybody"):
        chosen = {"sid": sid} if by == "administrator" else {"all": True}
        b2c.signed_in("haneul").post("/api/admin/revoke", json={"reason": "test", **chosen})
    elif by == "operator":
        revoke(b2c, sid)
    elif by == "limit":
        for _ in range(b2c.service.coat.settings.admission.maximum):
            sign_in(b2c, user.id)
    elif by == "other sessions":
        b2c.signed_in("minsu").request("DELETE", "/api/sessions", params={"scope": "others"})
    else:
        client.post("/api/login", json={"username": "minsu", "password": PASSWORD})
    assert sid in sids(feed.page(cursor))


def test_a_single_token_is_told_by_its_issuer_and_name(b2c: Site, feed: Feed) -> None:
    b2c.add_user("minsu")
    access = b2c.client().post("/api/login", json=BODY_LOGIN).json()["access_token"]
    b2c.call(b2c.service.coat.deny_token, access)
    (entry,) = feed.page()["entries"]
    claims = json.loads(_decoded(access.split(".")[1]))
    assert entry == {"kind": "jti", "iss": b2c.base_url, "jti": claims["jti"], "until": claims["exp"] + MAX_LEEWAY}


def test_a_snapshot_is_read_in_pages_and_followed_without_a_gap(b2c: Site, feed: Feed) -> None:
    ended = [sign_in(b2c) for _ in range(5)]
    for sid in ended:
        revoke(b2c, sid)
    seen: list[str] = []
    page = feed.page(limit=2)
    sizes = [len(page["entries"])]
    seen += sids(page)
    while page["more"]:
        page = feed.page(page["cursor"], limit=2)
        sizes.append(len(page["entries"]))
        seen += sids(page)
    assert (seen, sizes) == (ended, [2, 2, 1])
    later = sign_in(b2c)
    revoke(b2c, later)
    assert sids(feed.page(page["cursor"])) == [later]
    assert sids(feed.page()) == [*ended, later]


@pytest.mark.parametrize("limit", ["0", "-1", "1.5", "x", "", "٣", "1e3", "9" * 7, " 1", "+1"])
def test_a_limit_that_is_none_is_refused(feed: Feed, limit: str) -> None:
    answer = feed.get(limit=limit)
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")


def test_a_page_is_never_longer_than_a_verifier_reads(b2c: Site, feed: Feed) -> None:
    async def deny() -> None:
        until = b2c.clock.now_us() + 60 * SECOND_US
        for number in range(MAX_PAGE_ENTRIES + 1):
            # The longest name there is, of characters that become six in JSON.
            name = f"{number:04}".ljust(1024, "\x01")
            await b2c.service.store.deny(0, Denial(kind="sub", id=name, until_us=until, not_before_us=1))

    b2c.call(deny)
    answer = feed.get()
    assert len(read_page(answer.content).entries) == PAGE_ENTRIES
    assert len(feed.get(limit=999_999).json()["entries"]) == MAX_PAGE_ENTRIES


def test_a_cursor_that_leads_nowhere_begins_again(b2c: Site, feed: Feed) -> None:
    revoke(b2c, sign_in(b2c))
    identity, _, position = feed.page()["cursor"].partition(".")
    assert int(position) >= 1
    lost = [
        "x",
        ".",
        identity,
        f"{identity}.",
        f".{position}",
        f"{identity}.{'9' * 18}",
        f"{identity}.{'9' * 64}",
        f"{identity}.{int(position) + 1}",
        f"{identity}.-1",
        f"{identity}.x",
        f"{identity}.1.0",
        f"{identity}. 1",
        f"{identity}.１",
        f"{identity}.\x00",
        f"{identity.upper()}x.{position}",
        f"{'0' * len(identity)}.{position}",
        "é.1",
        "' or 1=1 --",
    ]
    for cursor in lost:
        for accept in ("*/*", "text/event-stream"):
            headers = {**feed.headers, "accept": accept}
            answer = b2c.client().get(FEED_PATH, params={"after": cursor}, headers=headers)
            assert (answer.status_code, answer.json()["code"]) == (410, "cursor_lost"), cursor
    for cursor in ("", "x" * (MAX_CURSOR_CHARACTERS + 1)):
        answer = feed.get(cursor)
        assert (answer.status_code, answer.json()["code"]) == (400, "bad_request"), cursor


def test_a_cursor_is_good_at_every_server_of_a_store_and_at_no_other(make_site: MakeSite, tmp_path: Path) -> None:
    first, second = make_site(profile="b2c"), make_site(profile="b2c", seed=b"two")
    other = make_site(profile="b2c", seed=b"three", store=f"sqlite:///{tmp_path}/other.db")
    feed = Feed(first)
    sid = sign_in(first)
    cursor = feed.page()["cursor"]
    revoke(second, sid)
    assert sids(second.client().get(FEED_PATH, params={"after": cursor}, headers=feed.headers).json()) == [sid]
    elsewhere = other.client().get(FEED_PATH, params={"after": cursor}, headers=feed.headers)
    assert (elsewhere.status_code, elsewhere.json()["code"]) == (410, "cursor_lost")


def test_a_server_whose_store_is_away_vouches_for_nothing(b2c: Site, feed: Feed) -> None:
    cursor = feed.page()["cursor"]
    b2c.store.off = frozenset({"denials"})
    for accept in ("*/*", "text/event-stream"):
        for query in ({}, {"after": cursor}):
            answer = b2c.client().get(FEED_PATH, params=query, headers={**feed.headers, "accept": accept})
            assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
            assert answer.headers["retry-after"] == "3"
    assert not b2c.service.revocations._streams
    b2c.store.off = frozenset()
    assert feed.page(cursor)["cursor"] == cursor


def test_the_head_of_a_stream_does_not_wait_for_its_end(b2c: Site, feed: Feed) -> None:
    answer = b2c.client().head(FEED_PATH, headers={**feed.headers, "accept": "text/event-stream"})
    assert (answer.status_code, answer.content) == (200, b"")
    assert not b2c.service.revocations._streams


def test_the_feed_holds_no_secret_id_and_no_token(b2c: Site, feed: Feed) -> None:
    b2c.add_user("minsu")
    client = b2c.signed_in("minsu")
    secrets = [*client.cookies.values()]
    client.post("/api/logout")
    text = feed.get().text
    assert not [secret for secret in secrets if secret[8:30] in text]


# The stream.


class Reader:
    """One reader of a stream, inside the server's event loop."""

    def __init__(self, stream: FeedStream) -> None:
        self.stream = stream
        self.events: AsyncIterator[bytes] = stream.events
        self.cursor = ""

    async def next(self) -> Any:
        async with asyncio.timeout(PATIENCE):
            raw = (await anext(self.events)).decode()
        if raw.startswith(":"):
            assert raw == ":\n\n"
            return None
        kind, name, data, *rest = raw.split("\n")
        assert (kind, rest) == ("event: revoked", ["", ""])
        page = json.loads(data.removeprefix("data: "))
        read_page(data.removeprefix("data: ").encode())
        self.cursor = name.removeprefix("id: ")
        assert self.cursor == page["cursor"]
        return page

    async def until_end(self) -> list[Any]:
        pages = []
        try:
            while True:
                pages.append(await self.next())
        except StopAsyncIteration:
            return pages


async def opened(site: Site, cursor: str | None = None, **more: Any) -> Reader:
    return Reader(await site.service.revocations.stream(cursor, client="orders", **more))


async def following(site: Site, *, cursor: str | None = None) -> tuple[Reader, asyncio.Task[Any], Any]:
    """A reader that has had the backlog and waits for news, with the reader of the log at work."""
    reader = await opened(site, cursor)
    backlog = await reader.next()
    pending = asyncio.ensure_future(reader.next())
    await settled(lambda: site.service.revocations._following)
    return reader, pending, backlog


def running() -> list[str]:
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name() == "coatcheck-revocations"]


async def settled(question: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not question():  # noqa: ASYNC110 - each turn of the loop takes another task one step further
            await asyncio.sleep(0)


def test_a_stream_begins_with_the_backlog_and_tells_a_revoke_at_once(b2c: Site) -> None:
    old, fresh = sign_in(b2c), sign_in(b2c)
    revoke(b2c, old)

    async def watch() -> tuple[Any, Any]:
        reader, pending, backlog = await following(b2c)
        await b2c.service.coat.revoke_session(fresh, reason="test")
        news = await pending
        await reader.stream.close()
        await settled(lambda: not running())
        return backlog, news

    backlog, news = b2c.call(watch)
    assert sids(backlog) == [old]
    assert sids(news) == [fresh]


def test_a_stream_goes_on_from_a_cursor_in_pages_of_the_wanted_size(b2c: Site, feed: Feed) -> None:
    cursor = feed.page()["cursor"]
    ended = [sign_in(b2c) for _ in range(5)]
    for sid in ended:
        revoke(b2c, sid)

    async def watch() -> list[list[str]]:
        reader = await opened(b2c, cursor, limit=2)
        found = [sids(await reader.next()) for _ in range(3)]
        await reader.stream.close()
        return found

    assert b2c.call(watch) == [ended[:2], ended[2:4], ended[4:]]


def test_what_is_denied_between_the_backlog_and_the_first_look_is_not_lost(b2c: Site) -> None:
    sid = sign_in(b2c)

    async def watch() -> list[str]:
        reader = await opened(b2c)
        await reader.next()
        await b2c.service.coat.revoke_session(sid, reason="test")
        news = sids(await reader.next())
        await reader.stream.close()
        return news

    assert b2c.call(watch) == [sid]


def test_readers_that_come_later_miss_nothing_either(b2c: Site) -> None:
    one, two, three = (sign_in(b2c) for _ in range(3))

    async def watch() -> tuple[set[str], set[str]]:
        coat = b2c.service.coat
        first, pending, _ = await following(b2c)
        await coat.revoke_session(one, reason="test")
        second = await opened(b2c)
        await coat.revoke_session(two, reason="test")
        seen = [set(sids(await pending)), set(sids(await second.next()))]
        await coat.revoke_session(three, reason="test")
        for number, reader in enumerate((first, second)):
            while three not in seen[number]:
                seen[number] |= set(sids(await reader.next()))
            await reader.stream.close()
        return seen[0], seen[1]

    assert b2c.call(watch) == ({one, two, three}, {one, two, three})


def test_an_old_log_is_not_told_again_to_those_who_have_it(b2c: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revocations, "PAGE_ENTRIES", 2)
    ended = [sign_in(b2c) for _ in range(7)]
    for sid in ended:
        revoke(b2c, sid)
    fresh = sign_in(b2c)

    async def watch() -> tuple[list[str], list[str]]:
        reader = await opened(b2c, limit=100)
        backlog = sids(await reader.next())
        pending = asyncio.ensure_future(reader.next())
        await b2c.service.coat.revoke_session(fresh, reason="test")
        news = sids(await pending)
        await reader.stream.close()
        return backlog, news

    assert b2c.call(watch) == (ended, [fresh])


def test_a_silent_stream_is_kept_alive(b2c: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revocations, "KEEP_ALIVE_SECONDS", 0.001)

    async def watch() -> list[Any]:
        reader = await opened(b2c)
        await reader.next()
        found = [await reader.next() for _ in range(3)]
        await reader.stream.close()
        return found

    assert b2c.call(watch) == [None, None, None]


def test_a_stream_ends_when_the_store_is_away_for_a_lease_and_not_before(
    b2c: Site, caplog: pytest.LogCaptureFixture
) -> None:
    sid = sign_in(b2c)

    async def watch() -> list[Any]:
        feed = b2c.service.revocations
        reader, pending, _ = await following(b2c)
        asked: list[int] = []
        page = feed.page

        async def counted(cursor: str | None, *, limit: int) -> Any:
            asked.append(limit)
            return await page(cursor, limit=limit)

        feed.page = counted  # type: ignore[method-assign]
        b2c.store.off = frozenset({"denials"})
        b2c.clock.advance(LEASE - 0.001)
        feed.wake()
        await settled(lambda: len(asked) >= 1)
        await asyncio.sleep(0)
        assert not pending.done(), "it may be back in time"
        b2c.store.off = frozenset()
        await b2c.service.coat.revoke_session(sid, reason="test")
        assert sids(await pending) == [sid]
        b2c.store.off = frozenset({"denials"})
        b2c.clock.advance(LEASE)
        feed.wake()
        left = await reader.until_end()
        await settled(lambda: not running())
        assert not feed._streams
        return left

    assert b2c.call(watch) == []
    assert any("closed" in record.getMessage() for record in caplog.records)


def test_a_stream_ends_when_the_store_hangs_for_a_lease(b2c: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revocations, "FEED_SERVER_LEASE_SECONDS", 0.01)

    async def watch() -> list[Any]:
        reader, pending, _ = await following(b2c)

        async def hangs(*_: object, **__: object) -> None:
            await asyncio.Event().wait()

        b2c.service.revocations.page = hangs  # type: ignore[assignment,method-assign]
        b2c.service.revocations.wake()
        with pytest.raises(StopAsyncIteration):
            await pending
        return await reader.until_end()

    assert b2c.call(watch) == []


def test_a_stream_ends_when_the_log_was_set_back(b2c: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async def watch() -> None:
        _, pending, _ = await following(b2c)

        async def lost(*_: object, **__: object) -> None:
            raise CursorLost("restored")

        b2c.service.revocations.page = lost  # type: ignore[assignment,method-assign]
        b2c.service.revocations.wake()
        with pytest.raises(StopAsyncIteration):
            await pending
        await settled(lambda: not running())

    b2c.call(watch)


def test_a_reader_of_the_log_that_fails_takes_its_streams_along(b2c: Site, caplog: pytest.LogCaptureFixture) -> None:
    async def watch() -> None:
        _, pending, _ = await following(b2c)

        async def broken(*_: object, **__: object) -> None:
            raise RuntimeError("a mistake of ours")

        b2c.service.revocations.page = broken  # type: ignore[assignment,method-assign]
        b2c.service.revocations.wake()
        with pytest.raises(StopAsyncIteration):
            await pending
        await settled(lambda: not running())

    b2c.call(watch)
    assert [record for record in caplog.records if record.levelno == logging.ERROR and record.exc_info]


def test_after_an_outage_a_new_stream_goes_on_where_the_old_one_ended(b2c: Site) -> None:
    sid = sign_in(b2c)

    async def watch() -> list[str]:
        reader, pending, _ = await following(b2c)
        b2c.store.off = frozenset({"denials"})
        b2c.clock.advance(LEASE)
        b2c.service.revocations.wake()
        with pytest.raises(StopAsyncIteration):
            await pending
        with pytest.raises(StoreUnavailable):
            await b2c.service.revocations.stream(reader.cursor, client="orders")
        b2c.store.off = frozenset()
        await b2c.service.coat.revoke_session(sid, reason="test")
        again, waiting, backlog = await following(b2c, cursor=reader.cursor)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await again.stream.close()
        return sids(backlog)

    assert b2c.call(watch) == [sid]


def test_a_slow_reader_loses_its_stream_and_nothing_else(b2c: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revocations, "MAX_BEHIND", 2)
    ended = [sign_in(b2c) for _ in range(4)]

    async def watch() -> tuple[list[str], list[Any], list[str]]:
        feed, coat = b2c.service.revocations, b2c.service.coat
        fast, pending, _ = await following(b2c)
        slow = await opened(b2c)
        await slow.next()
        seen: list[str] = []
        for sid in ended:
            await coat.revoke_session(sid, reason="test")
            seen += sids(await pending)
            pending = asyncio.ensure_future(fast.next())
        assert len(feed._streams) == 1
        told = await slow.until_end()
        assert len(feed._streams) == 1, "the others go on"
        rest = json.loads((await feed.page(slow.cursor, limit=100)).octets)
        pending.cancel()
        await asyncio.gather(pending, return_exceptions=True)
        await fast.stream.close()
        return seen, told, sids(rest)

    seen, told, rest = b2c.call(watch)
    assert seen == ended
    assert [sid for page in told for sid in sids(page)] + rest == ended


def test_one_stream_too_many_is_turned_away_and_a_closed_one_makes_room(
    b2c: Site, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revocations, "MAX_STREAMS", 2)
    first = b2c.call(opened, b2c)
    b2c.call(opened, b2c)
    answer = b2c.client().get(FEED_PATH, headers={**feed.headers, "accept": "text/event-stream"})
    assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
    assert feed.get().status_code == 200, "pages go on"
    b2c.call(first.stream.close)
    b2c.call(opened, b2c)
    b2c.call(b2c.service.revocations.stop)


class Connection:
    """One HTTP request to the application, whose client can leave."""

    def __init__(self, site: Site, headers: dict[str, str]) -> None:
        self._app = site.app
        self._gone = asyncio.Event()
        self._asked = False
        self.sent: list[Any] = []
        self.told = asyncio.Event()
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": FEED_PATH,
            "raw_path": FEED_PATH.encode(),
            "query_string": b"",
            "headers": [(name.encode(), text.encode()) for name, text in headers.items()],
            "client": ("127.0.0.1", 50_000),
            "server": ("127.0.0.1", 8000),
            "state": {},
        }

    def leave(self) -> None:
        self._gone.set()

    async def run(self) -> None:
        await self._app(self._scope, self._receive, self._send)

    async def _receive(self) -> Any:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        if message["type"] == "http.response.body":
            self.told.set()


@pytest.mark.parametrize("how", ["leaves", "is cancelled", "was never there"])
def test_a_client_that_is_gone_leaves_no_place_and_no_task_behind(b2c: Site, feed: Feed, how: str) -> None:
    async def watch() -> list[Any]:
        connection = Connection(b2c, {**feed.headers, "accept": "text/event-stream"})
        if how == "was never there":
            connection.leave()
        task = asyncio.ensure_future(connection.run())
        async with asyncio.timeout(PATIENCE):
            if how == "is cancelled":
                await connection.told.wait()
                task.cancel()
            elif how == "leaves":
                await connection.told.wait()
                connection.leave()
            await asyncio.gather(task, return_exceptions=True)
        assert not b2c.service.revocations._streams
        await settled(lambda: not running())
        return connection.sent

    sent = b2c.call(watch)
    if how != "was never there":
        start = sent[0]
        headers = dict(start["headers"])
        assert start["status"] == 200
        assert headers[b"content-type"].startswith(b"text/event-stream")
        assert (headers[b"cache-control"], headers[b"x-accel-buffering"]) == (b"no-store", b"no")
        assert sent[1]["body"].startswith(b"event: revoked\nid: ")


def test_a_stream_that_was_never_begun_gives_its_place_back(b2c: Site) -> None:
    async def watch() -> None:
        stream = await b2c.service.revocations.stream(None, client="orders")
        assert len(b2c.service.revocations._streams) == 1
        await stream.close()
        assert not b2c.service.revocations._streams

    b2c.call(watch)


def test_one_client_cannot_take_every_place(b2c: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coatcheck.server.revocations.MAX_STREAMS_PER_CLIENT", 2)

    async def watch() -> None:
        feed = b2c.service.revocations
        streams = [await feed.stream(None, client="orders") for _ in range(2)]
        with pytest.raises(StoreUnavailable, match="orders"):
            await feed.stream(None, client="orders")
        streams.append(await feed.stream(None, client="billing"))
        for each in streams:
            await each.close()

    b2c.call(watch)


def test_a_stream_ends_after_a_while_so_that_its_client_is_looked_at_again(
    b2c: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revocations, "KEEP_ALIVE_SECONDS", 0.001)

    async def watch() -> None:
        reader, pending, _ = await following(b2c)
        assert await pending is None, "a comment"
        b2c.clock.advance(STREAM_SECONDS)
        assert len(await reader.until_end()) <= 1

    b2c.call(watch)


def test_a_server_that_stops_ends_every_stream_and_begins_none(b2c: Site) -> None:
    async def watch() -> None:
        feed = b2c.service.revocations
        _, pending, _ = await following(b2c)
        late = await opened(b2c)
        await feed.stop()
        with pytest.raises(StopAsyncIteration):
            await pending
        assert len(await late.until_end()) == 1, "what was read before"
        assert not running()
        assert not feed._streams
        with pytest.raises(StoreUnavailable):
            await feed.stream(None, client="orders")

    b2c.call(watch)


# A server as people run it.


@contextmanager
def streamed(server: Server, directory: Path) -> Iterator[Callable[[bytes], None]]:
    """A stream of a server process, from its backlog on; `streamed(...)(text)` waits until the text has come."""
    added = process("client", "add", "shop", "--json", directory=directory)
    assert added.returncode == 0, added.stderr
    head = (
        f"GET {FEED_PATH} HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: text/event-stream\r\n"
        f"authorization: Bearer {json.loads(added.stdout)['feed_credential']}\r\n\r\n"
    )
    got = b""
    port = int(server.address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(head.encode())

        def wait_for(text: bytes) -> None:
            nonlocal got
            while text not in got:
                piece = connection.recv(65536)
                assert piece, got
                got += piece

        wait_for(b"event: revoked")
        assert got.startswith(b"HTTP/1.1 200 ")
        yield wait_for


@pytest.mark.timeout(120)
def test_what_another_process_ends_arrives_over_a_real_socket(tmp_path: Path) -> None:
    with serving("--profile", "b2c", directory=tmp_path) as server, streamed(server, tmp_path) as wait_for:
        made = process("user", "add", "minsu", "--password-stdin", directory=tmp_path, stdin=PASSWORD)
        assert made.returncode == 0, made.stderr
        status, told, _ = call(server.address, "/api/login", BODY_LOGIN)
        assert status == 200
        sid = told["session"]["sid"]
        ended = process("session", "revoke", sid, "--json", directory=tmp_path)
        assert json.loads(ended.stdout) == {"ended": 1}
        wait_for(sid.encode())
        wait_for(b"\n:\n\n")


@pytest.mark.timeout(120)
def test_an_open_stream_does_not_hold_back_a_server_that_was_asked_to_stop(tmp_path: Path) -> None:
    with serving("--profile", "b2c", directory=tmp_path) as server:
        with streamed(server, tmp_path):
            server.child.send(signal.SIGTERM)
            # Well below the time that requests under way are given.
            assert server.child._process.wait(timeout=DRAIN_SECONDS / 2) == 0
        log = server.child.log.read_text()
        assert "Cancel" not in log
        assert "Traceback" not in log


def _decoded(part: str) -> bytes:
    return urlsafe_b64decode(part + "=" * (-len(part) % 4))
