"""Each page: what it shows, what its forms do, and what it never shows."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from coatcheck.server.forms import MAX_FORM
from coatcheck.server.one_time import LIFE_US
from coatcheck.server.rendering import STATIC, moment
from tests.server.conftest import COOKIE, NEW_PASSWORD, PASSWORD, MakeSite, Site, spoil_journal
from tests.server.page_parts import Seen, rows_of

LOGIN = {"username": "minsu", "password": PASSWORD}
SET_UP = {"username": "haneul", "password": PASSWORD, "again": PASSWORD}
CHANGE = {"current": PASSWORD, "new": NEW_PASSWORD, "again": NEW_PASSWORD}


@pytest.fixture
def minsu(site: Site) -> TestClient:
    """A browser signed in as `minsu`."""
    site.add_user("minsu")
    return site.at_account("minsu")


# What all pages have.


def page_set_up(site: Site) -> str:
    return site.browser().get(site.set_up_path()).text


def page_signed_in(path: str) -> Callable[[Site], str]:
    def look(site: Site) -> str:
        site.add_user("minsu")
        return site.at_account("minsu").get(path).text

    return look


def page_wrong(site: Site) -> str:
    return site.browser().post("/login", data={"username": "minsu", "password": "x"}).text


PAGES: dict[str, Callable[[Site], str]] = {
    "unready": lambda site: site.browser().get("/").text,
    "sign_in": lambda site: site.browser().get("/login?next=/account").text,
    "refused": page_wrong,
    "set_up": page_set_up,
    "set_up_gone": lambda site: site.browser().get("/setup/x").text,
    "start": page_signed_in("/"),
    "already": page_signed_in("/login"),
    "account": page_signed_in("/account"),
    "not_found": lambda site: site.browser().get("/nothing").text,
}


@pytest.mark.parametrize("name", PAGES)
def test_every_page_is_complete_accessible_and_needs_no_script(site: Site, name: str) -> None:
    text = PAGES[name](site)
    seen = Seen(text)
    assert text.startswith("<!doctype html>\n")
    assert seen.all("html") == [{"lang": "en"}]
    assert len(seen.all("h1")) == len(seen.all("title")) == len(seen.all("main")) == 1
    assert re.search(r"<title>[^<]+ · Coatcheck</title>", text)
    # The content security policy refuses what stands inline; the one script only guards the back button.
    assert seen.all("script") in ([], [{"src": STATIC["back.js"].address}])
    assert seen.all("style") == []
    assert not any(attribute in attributes for _, attributes in seen.tags for attribute in ("style", "onclick"))
    labelled = {each["for"] for each in seen.all("label")}
    for field in seen.all("input"):
        assert field.get("type") == "hidden" or field.get("aria-hidden") == "true" or field["id"] in labelled
        assert "onpaste" not in field
        assert field.get("autocomplete") != "off"
    assert all(form["method"] == "post" for form in seen.all("form"))
    ids = [attributes["id"] for _, attributes in seen.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    linked = [file for file in STATIC.values() if file.address in text]
    assert len(linked) >= 2
    assert len(text.encode()) + sum(len(file.octets) for file in linked) < 20_000


@pytest.mark.parametrize("path", ["/", "/login", "/setup/x", "/nothing", "/account"])
def test_no_page_is_kept_by_any_cache(minsu: TestClient, path: str) -> None:
    answer = minsu.get(path)
    assert answer.headers.get_list("cache-control") == ["no-store"]
    assert answer.headers["content-type"] == "text/html; charset=utf-8"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/", "거의 준비되었습니다"),
        ("/login", "로그인"),
        ("/setup/x", "사용할 수 없는 링크"),
        ("/x", "아무것도 없습니다"),
    ],
)
def test_pages_are_korean_for_whoever_asks_for_it(site: Site, path: str, words: str) -> None:
    answer = site.browser(accept_language="ko-KR,ko;q=0.9,en;q=0.8").get(path)
    assert words in answer.text
    assert Seen(answer.text).all("html") == [{"lang": "ko"}]
    assert answer.headers["content-language"] == "ko"


def test_the_account_is_korean_too(site: Site) -> None:
    site.add_user("minsu")
    text = site.at_account("minsu", accept_language="ko").get("/account").text
    for words in ("로그인된 곳", "Linux의 Chrome", "지금 이 기기", "2027년 1월 15일 08:00 UTC"):
        assert words in text


def test_pages_carry_the_name_the_operator_chose_escaped(make_site: MakeSite) -> None:
    site = make_site(name="A & B <script>")
    assert "A &amp; B &lt;script&gt;</title>" in site.browser().get("/login").text


# The start page and the set-up link.


def test_the_first_administrator_stays_in_whatever_cookie_his_browser_had_of_before(make_site: MakeSite) -> None:
    site = make_site(profile="bank")
    browser = site.browser()
    stale = f"{site.service.device_cookie.wire_name.decode()}=of-another-installation"
    typed = {"username": "root", "password": PASSWORD, "again": PASSWORD}
    made = browser.post(site.set_up_path(), data=typed, headers={"cookie": stale})
    assert made.status_code == 303
    assert browser.get("/api/me").status_code == 200


def test_before_anybody_exists_the_start_page_says_where_the_link_is(site: Site) -> None:
    text = site.browser().get("/").text
    assert "setup-link" in text
    assert "/setup/" in text
    assert not re.search(r"[A-Za-z0-9_-]{44}", text)


def test_the_set_up_link_makes_the_administrator_and_signs_him_in(site: Site) -> None:
    browser, path = site.browser(), site.set_up_path()
    assert browser.get(path).status_code == 200
    answer = browser.post(path, data=SET_UP)
    assert (answer.status_code, answer.headers["location"]) == (303, "/account")
    assert "haneul" in browser.get("/account").text
    assert "as an administrator" in browser.get("/").text
    assert browser.get("/api/me").json()["user"]["role"] == "admin"
    assert {name.split("=")[0] for name in answer.headers.get_list("set-cookie")} == {COOKIE, "coatcheck_device"}


def test_a_used_link_is_gone(site: Site) -> None:
    path = site.set_up_path()
    site.browser().post(path, data=SET_UP)
    for answer in (site.browser().get(path), site.browser().post(path, data={**SET_UP, "username": "second"})):
        assert answer.status_code == 404
        assert "does not work" in answer.text
    assert "You are not signed in" in site.browser().get("/").text


@pytest.mark.parametrize("token", ["x", "A" * 44, "%00", "%2e%2e", "cQ" + "A" * 42, "a" * 5000])
def test_an_invented_link_is_gone_and_costs_no_hash(site: Site, token: str) -> None:
    assert site.browser().get(f"/setup/{token}").status_code == 404
    assert site.browser().post(f"/setup/{token}", data=SET_UP).status_code == 404
    assert not site.call(site.service.accounts.has_administrator)


@pytest.mark.parametrize(("microseconds", "status"), [(LIFE_US - 1, 200), (LIFE_US, 404)])
def test_a_link_ends_exactly_after_its_life(site: Site, microseconds: int, status: int) -> None:
    path = site.set_up_path()
    site.clock.step_clock(microseconds / 1e6)
    assert site.browser().get(path).status_code == status


def test_looking_at_the_link_does_not_spend_it(site: Site) -> None:
    path = site.set_up_path()
    for method in ("GET", "HEAD", "GET"):
        assert site.browser().request(method, path).status_code == 200
    assert site.browser().post(path, data=SET_UP).status_code == 303


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ({"username": ""}, "Please type a name"),
        ({"username": "two words"}, "A name has no spaces"),
        ({"username": "x" * 129}, "too long"),
        ({"username": "a\u202eb"}, "cannot be used"),
        ({"password": "short", "again": "short"}, "at least 15 characters"),
        ({"password": "haneulcoatcheck1", "again": "haneulcoatcheck1"}, "your name"),
        ({"again": "something else entirely"}, "not the same"),
    ],
)
def test_a_mistake_on_the_set_up_page_costs_no_link(site: Site, typed: dict[str, str], words: str) -> None:
    browser, path = site.browser(), site.set_up_path()
    answer = browser.post(path, data={**SET_UP, **typed})
    assert answer.status_code == 422
    assert words in answer.text
    assert PASSWORD not in answer.text
    assert browser.post(path, data=SET_UP).status_code == 303


def test_a_name_that_is_taken_costs_no_link(site: Site) -> None:
    site.add_user("Haneul")
    browser, path = site.browser(), site.set_up_path()
    assert "has this name already" in browser.post(path, data=SET_UP).text
    assert browser.post(path, data={**SET_UP, "username": "other"}).status_code == 303


# Forms nobody sends by mistake.


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"username=minsu&username=other&password=x", "application/x-www-form-urlencoded", 400),
        (b"&".join(b"f%d=1" % n for n in range(9)), "application/x-www-form-urlencoded", 400),
        (b"username=%ff&password=x", "application/x-www-form-urlencoded", 400),
        (b"username=\xff&password=x", "application/x-www-form-urlencoded", 400),
        (b"", "application/x-www-form-urlencoded", 401),
        (b"username=%00&password=%00", "application/x-www-form-urlencoded", 401),
        (b"%%%=&&&==%zz", "application/x-www-form-urlencoded", 401),
        (b"a" * (MAX_FORM + 1), "application/x-www-form-urlencoded", 413),
        (b'{"username":"minsu"}', "application/json", 415),
        (b"username=minsu", "text/plain", 415),
        (b"--x\r\n", "multipart/form-data; boundary=x", 415),
        (b"username=minsu", "", 415),
    ],
)
def test_a_hostile_form_is_refused_in_a_page(site: Site, body: bytes, kind: str, status: int) -> None:
    answer = site.browser().post("/login", content=body, headers={"content-type": kind})
    assert answer.status_code == status
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "set-cookie" not in answer.headers


def test_three_of_the_longest_passwords_fit_into_the_form(site: Site, minsu: TestClient) -> None:
    longest, next_one = "🦦" * 1024, "🦊" * 1024
    first = minsu.post("/account/password", data={"current": PASSWORD, "new": longest, "again": longest})
    second = minsu.post("/account/password", data={"current": longest, "new": next_one, "again": next_one})
    assert (first.status_code, second.status_code) == (303, 303)


@pytest.mark.parametrize("path", ["/login", "/logout", "/account/password", "/account/sessions/end-others"])
def test_a_form_on_another_site_is_refused_in_a_page(site: Site, minsu: TestClient, path: str) -> None:
    site.at_account("minsu")
    answer = minsu.post(path, data=LOGIN, headers={"sec-fetch-site": "cross-site"})
    assert answer.status_code == 403
    assert "came from another site" in answer.text
    assert len(rows_of(minsu.get("/account").text)) == 2


@pytest.mark.parametrize("path", ["/logout", "/account/sessions/end", "/account/sessions/end-others"])
def test_nothing_happens_by_looking(minsu: TestClient, path: str) -> None:
    answer = minsu.get(path)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert minsu.get("/account").status_code == 200


# The store is away.


@pytest.mark.parametrize("path", ["/", "/login", "/account"])
def test_pages_say_that_the_service_is_busy_and_sign_nobody_out(site: Site, minsu: TestClient, path: str) -> None:
    site.store.off = None
    answer = minsu.get(path)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "3")
    assert "The service is busy" in answer.text
    assert "set-cookie" not in answer.headers
    site.store.off = frozenset()
    assert minsu.get("/account").status_code == 200


def test_signing_out_while_the_store_is_away_says_what_is_true(site: Site, minsu: TestClient) -> None:
    spoil_journal(site)
    site.store.off = None
    answer = minsu.post("/logout")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "could not record it" in answer.text
    assert "Max-Age=0" in answer.headers["set-cookie"]
    assert COOKIE not in minsu.cookies


# Style and times.


@pytest.fixture
def files() -> list[str]:
    return [file.address for file in STATIC.values()]


def test_the_linked_files_may_be_kept_for_ever_because_their_name_changes(site: Site, files: list[str]) -> None:
    for address in files:
        answer = site.browser().get(address)
        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("name", ["coatcheck.css", "x", "..%2f__init__.py", "%2e%2e/pages.py", "coatcheck.css%00"])
def test_nothing_else_is_served_as_a_file(site: Site, name: str) -> None:
    assert site.browser().get(f"/static/{name}").status_code == 404


def test_the_style_asks_nobody_else_for_anything() -> None:
    style = STATIC["coatcheck.css"].octets.decode()
    assert "url(" not in style
    assert "@import" not in style


@pytest.mark.parametrize(("seconds", "machine"), [(0.0, "1970-01-01T00:00:00Z"), (1.9999, "1970-01-01T00:00:01Z")])
def test_times_are_cut_to_the_second_and_never_in_the_future(seconds: float, machine: str) -> None:
    assert moment(seconds, "en").machine == machine
