"""The story's steps with tokens: each attack succeeds against the naive application and fails against Coatcheck."""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
from joserfc import jwk, jws
from starlette.testclient import TestClient

from coatcheck import AsyncCoatcheck, Settings, TokenSettings
from coatcheck.core.ports import DenialPage
from coatcheck.testing import FakeSystem
from examples.story import ch10_jwt, ch11_denylist, ch12_refresh

RIGHT = {"username": "ratia", "password": "secret"}
WRONG = {"username": "ratia", "password": "guess"}
DASHBOARD = {"message": "Dashboard data", "user": {"userId": 50, "role": "admin"}}
REFRESH = "__Host-Http-refresh"
SITE = "https://shop.test"
# The order of the curve P-256.
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551

Visit = Callable[[Any], TestClient]


@pytest.fixture
def clock() -> FakeSystem:
    return FakeSystem()


@pytest.fixture
def visit() -> Iterator[Visit]:
    """Browsers that come to an application; each has a cookie jar of its own."""
    with ExitStack() as leaving:
        yield lambda app: leaving.enter_context(TestClient(app, base_url=SITE))


def seconds(clock: FakeSystem) -> Callable[[], float]:
    return lambda: clock.now_us() / 1_000_000


def make_coat(clock: FakeSystem, store: str = "memory:") -> AsyncCoatcheck:
    return AsyncCoatcheck(store, settings=Settings(public_url=SITE, tokens=TokenSettings()), system=clock)


def long_coat(clock: FakeSystem, store: str = "memory:") -> AsyncCoatcheck:
    return AsyncCoatcheck(store, settings=ch12_refresh.settings(SITE), system=clock)


def signed_in(client: TestClient) -> str:
    answer = client.post("/login", json=RIGHT)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["accessToken"])


def look(client: TestClient, token: str) -> int:
    """What the dashboard answers to who has nothing but this token."""
    client.cookies.clear()
    return client.get("/dashboard", headers={"authorization": f"Bearer {token}"}).status_code


def segments(token: str) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    header, payload, signature = (urlsafe_b64decode(part + "==") for part in token.split("."))
    return json.loads(header), json.loads(payload), signature


def respelled(token: str) -> list[str]:
    """Other texts of one HS256 token: padding, and spare bits of its last character."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    last = alphabet.index(token[-1])
    return [f"{token}=", *(token[:-1] + alphabet[last ^ spare] for spare in (1, 2, 3))]


def twin(token: str) -> str:
    """The same ES256 token with the other one of its two signatures."""
    signed, _, text = token.rpartition(".")
    raw = urlsafe_b64decode(text + "==")
    other = (ORDER - int.from_bytes(raw[32:], "big")).to_bytes(32, "big")
    return f"{signed}.{urlsafe_b64encode(raw[:32] + other).decode().rstrip('=')}"


# -- step 10 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["naive", "coatcheck"])
def test_step_10_both_give_the_articles_answers(kind: str, clock: FakeSystem, visit: Visit) -> None:
    client = visit(ch10_jwt.naive() if kind == "naive" else ch10_jwt.on_coatcheck(make_coat(clock)))
    assert client.get("/dashboard").status_code == 401
    assert client.post("/login", json=WRONG).json() == {"message": "Authentication failed"}
    answer = client.post("/login", json=RIGHT)
    assert list(answer.json()) == ["accessToken"]
    assert "set-cookie" not in answer.headers, "the token is all there is"
    held = {"authorization": f"Bearer {answer.json()['accessToken']}"}
    assert client.get("/dashboard", headers=held).json() == DASHBOARD
    assert client.post("/logout", headers=held).json() == {"message": "Logout complete"}


def test_step_10_a_token_is_signed_and_not_encrypted(clock: FakeSystem, visit: Visit) -> None:
    for app in (ch10_jwt.naive(), ch10_jwt.on_coatcheck(make_coat(clock))):
        _, claims, _ = segments(signed_in(visit(app)))
        assert claims["role"] == "admin", "whoever holds the text reads it"


def test_step_10_a_naive_token_outlives_its_logout(clock: FakeSystem, visit: Visit) -> None:
    client = visit(ch10_jwt.naive(clock=seconds(clock)))
    token = signed_in(client)
    client.post("/logout", headers={"authorization": f"Bearer {token}"})
    assert look(client, token) == 200, "nobody can take it back"
    clock.advance(ch10_jwt.LIFETIME - 1)
    assert look(client, token) == 200
    clock.advance(1)
    assert look(client, token) == 403


def test_step_10_with_coatcheck_a_logout_ends_the_token_and_so_does_an_operator(
    clock: FakeSystem, visit: Visit
) -> None:
    coat = make_coat(clock)
    client = visit(ch10_jwt.on_coatcheck(coat))
    stolen, kept = signed_in(client), signed_in(client)
    client.post("/logout", headers={"authorization": f"Bearer {stolen}"})
    assert (look(client, stolen), look(client, kept)) == (401, 200)
    assert client.portal is not None
    client.portal.call(lambda: coat.revoke_subject("50", reason="suspicious activity"))
    assert look(client, kept) == 401, "without anybody having its text"


def test_step_10_a_key_that_is_a_phrase_is_guessed_from_one_token(clock: FakeSystem, visit: Visit) -> None:
    guesses = [b"secret", b"changeme", b"jwt-secret", b"super-secret-key-change-in-production"]

    def guessed(token: str) -> bytes | None:
        now = seconds(clock)()
        return next((key for key in guesses if ch10_jwt.verify(token, now=now, key=key) is not None), None)

    client = visit(ch10_jwt.naive(clock=seconds(clock)))
    key = guessed(signed_in(client))
    assert key is not None, "tried offline, without one request"
    forged = ch10_jwt.sign({"userId": 1, "role": "owner", "exp": 2**40}, key=key)
    held = {"authorization": f"Bearer {forged}"}
    assert client.get("/dashboard", headers=held).json()["user"] == {"userId": 1, "role": "owner"}

    other = visit(ch10_jwt.on_coatcheck(make_coat(clock)))
    token = signed_in(other)
    assert segments(token)[0]["alg"] == "ES256"
    assert guessed(token) is None
    assert look(other, forged) == 401


def test_step_10_a_bad_token_is_a_403_there_and_a_401_with_the_reason_here(clock: FakeSystem, visit: Visit) -> None:
    bad = {"authorization": "Bearer a.b.c"}
    assert visit(ch10_jwt.naive()).get("/dashboard", headers=bad).status_code == 403
    answer = visit(ch10_jwt.on_coatcheck(make_coat(clock))).get("/dashboard", headers=bad)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Bearer error="invalid_token"')


# -- step 11 -------------------------------------------------------------------------------------------------------


def test_step_11_the_naive_blacklist_stops_the_text_and_not_the_token(clock: FakeSystem, visit: Visit) -> None:
    client = visit(ch11_denylist.naive(clock=seconds(clock)))
    token = signed_in(client)
    client.post("/logout", headers={"authorization": f"Bearer {token}"})
    assert look(client, token) == 403
    assert [look(client, other) for other in respelled(token)] == [200, 200, 200, 200], "it walks past"


def test_step_11_a_token_of_coatcheck_has_one_spelling_and_is_denied_by_name(clock: FakeSystem, visit: Visit) -> None:
    client = visit(ch11_denylist.on_coatcheck(make_coat(clock)))
    token = signed_in(client)
    others = [f"{token}=", twin(token), *respelled(token)]
    assert [look(client, other) for other in others] == [401] * len(others), "refused while the token is good"
    assert look(client, token) == 200
    client.post("/logout", headers={"authorization": f"Bearer {token}"})
    assert [look(client, other) for other in (token, *others)] == [401] * (len(others) + 1)


def test_step_11_the_twin_of_an_es256_signature_verifies_in_the_libraries_we_tried(
    clock: FakeSystem, visit: Visit
) -> None:
    coat = make_coat(clock)
    token = twin(signed_in(visit(ch11_denylist.on_coatcheck(coat))))
    (key,) = json.loads(coat.engine.issuer.published().document)["keys"]
    public = jwt.PyJWK(key)
    assert jwt.decode(token, public.key, algorithms=["ES256"], audience=SITE, options={"verify_iat": False})
    read = jws.deserialize_compact(token, jwk.ECKey.import_key(key), algorithms=["ES256"])
    assert json.loads(read.payload)["sub"] == "50"


def test_step_11_the_naive_blacklist_misses_the_logins_other_tokens_and_never_shrinks(
    clock: FakeSystem, visit: Visit
) -> None:
    app = ch11_denylist.naive(clock=seconds(clock))
    client = visit(app)
    first = signed_in(client)
    clock.advance(1)
    second = signed_in(client)
    client.post("/logout", headers={"authorization": f"Bearer {first}"})
    assert look(client, second) == 200, "who stole that one stays"
    clock.advance(ch10_jwt.LIFETIME)
    assert app.state.blacklist == {first}, "it has expired long ago"


def test_step_11_one_denied_token_leaves_the_session_and_a_denial_ends_with_its_token(
    clock: FakeSystem, visit: Visit
) -> None:
    coat = make_coat(clock)
    client = visit(ch11_denylist.on_coatcheck(coat))
    token, other = signed_in(client), signed_in(client)
    assert client.post("/deny", headers={"authorization": f"Bearer {token}"}).status_code == 200
    assert (look(client, token), look(client, other)) == (401, 200)

    def entries() -> int:
        assert client.portal is not None
        page = client.portal.call(lambda: coat.engine.issuer.denials(after=None, limit=10))
        assert isinstance(page, DenialPage)
        return len(page.entries)

    assert entries() == 1
    # Its quarter of an hour, and a minute for the verifier whose clock is furthest behind.
    clock.advance(16 * 60)
    assert entries() == 0


def test_step_11_without_a_token_nothing_is_denied(clock: FakeSystem, visit: Visit) -> None:
    client = visit(ch11_denylist.on_coatcheck(make_coat(clock)))
    assert client.post("/deny").status_code == 401


# -- step 12 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["naive", "coatcheck"])
def test_step_12_the_articles_diagram_plays(kind: str, clock: FakeSystem, visit: Visit) -> None:
    app = (
        ch12_refresh.naive(clock=seconds(clock))
        if kind == "naive"
        else ch12_refresh.on_coatcheck(AsyncCoatcheck("memory:", settings=ch12_refresh.settings(SITE), system=clock))
    )
    browser, api = visit(app), visit(app)
    assert browser.post("/refresh").status_code == 401
    assert browser.post("/login", json=WRONG).status_code == 401
    token = signed_in(browser)
    assert look(api, token) == 200
    clock.advance(15 * 60)
    # The diagram says 401, the article's code says 403.
    assert look(api, token) == (403 if kind == "naive" else 401)
    renewed = browser.post("/refresh").json()["accessToken"]
    assert look(api, renewed) == 200
    assert browser.post("/logout").json() == {"message": "Logout complete"}
    assert browser.post("/refresh").status_code == 401


def test_step_12_both_keep_the_refresh_token_from_scripts(clock: FakeSystem, visit: Visit) -> None:
    naive = visit(ch12_refresh.naive()).post("/login", json=RIGHT)
    assert "HttpOnly" in naive.headers["set-cookie"]
    ours = visit(ch12_refresh.on_coatcheck(long_coat(clock))).post("/login", json=RIGHT)
    (line,) = [each for each in ours.headers.get_list("set-cookie") if each.startswith(f"{REFRESH}=")]
    assert {"HttpOnly", "Secure", "SameSite=Strict", "Path=/"} <= set(line.split("; "))
    assert list(ours.json()) == ["accessToken"]


def test_step_12_a_copied_naive_refresh_token_is_good_for_seven_days_beside_its_owners(
    clock: FakeSystem, visit: Visit
) -> None:
    app = ch12_refresh.naive(clock=seconds(clock))
    owner, thief = visit(app), visit(app)
    signed_in(owner)
    thief.cookies.set("refreshToken", owner.cookies["refreshToken"])
    for _ in range(6):
        clock.advance(timedelta(days=1))
        assert (owner.post("/refresh").status_code, thief.post("/refresh").status_code) == (200, 200)


@pytest.mark.parametrize("first", ["owner", "thief"])
def test_step_12_with_coatcheck_the_copy_is_noticed_whoever_comes_first(
    first: str, clock: FakeSystem, visit: Visit
) -> None:
    app = ch12_refresh.on_coatcheck(long_coat(clock))
    owner, thief, api = visit(app), visit(app), visit(app)
    signed_in(owner)
    thief.cookies.set(REFRESH, owner.cookies[REFRESH], domain="shop.test")
    early, late = (owner, thief) if first == "owner" else (thief, owner)
    clock.advance(60)
    renewed = early.post("/refresh")
    assert renewed.status_code == 200
    clock.advance(60)
    told = late.post("/refresh")
    assert (told.status_code, told.json()["code"]) == (401, "refresh_reused")
    over = early.post("/refresh")
    assert (over.status_code, over.json()["code"], over.json()["reason"]) == (401, "session_ended", "refresh_reused")
    assert look(api, renewed.json()["accessToken"]) == 401, "nor does what the thief got go on"


def test_step_12_two_tabs_at_once_are_no_theft(clock: FakeSystem, visit: Visit) -> None:
    app = ch12_refresh.on_coatcheck(long_coat(clock))
    one, other = visit(app), visit(app)
    signed_in(one)
    other.cookies.set(REFRESH, one.cookies[REFRESH], domain="shop.test")
    clock.advance(60)
    assert (one.post("/refresh").status_code, other.post("/refresh").status_code) == (200, 200)
    assert one.cookies[REFRESH] == other.cookies[REFRESH], "both have the one successor"


def test_step_12_a_naive_logout_leaves_the_access_token_and_ours_does_not(clock: FakeSystem, visit: Visit) -> None:
    for app, after in (
        (ch12_refresh.naive(clock=seconds(clock)), 200),
        (ch12_refresh.on_coatcheck(long_coat(clock)), 401),
    ):
        browser, api = visit(app), visit(app)
        token = signed_in(browser)
        assert look(api, token) == 200
        browser.post("/logout")
        assert look(api, token) == after


def test_step_12_who_reads_the_naive_store_is_signed_in_as_everybody(
    clock: FakeSystem, visit: Visit, tmp_path: Path
) -> None:
    app = ch12_refresh.naive(clock=seconds(clock))
    signed_in(visit(app))
    reader = visit(app)
    (read,) = app.state.refresh_tokens
    reader.cookies.set("refreshToken", read)
    assert reader.post("/refresh").status_code == 200

    browser = visit(ch12_refresh.on_coatcheck(long_coat(clock, f"sqlite:///{tmp_path / 'story.db'}")))
    access = signed_in(browser)
    clock.advance(60)
    first = browser.cookies[REFRESH]
    assert browser.post("/refresh").status_code == 200
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert len(kept) > 1000
    for secret in (access, first, browser.cookies[REFRESH]):
        assert secret.encode() not in kept
