"""Style, icon and scripts: kept for ever under a name that changes with them."""

from __future__ import annotations

import re

import pytest

from coatcheck.primitives.digest import sha256_text
from coatcheck.server.static_files import StaticFile, load_static_files
from tests.server.conftest import BROWSER, COOKIE, MakeSite, Site

NAMES = ("back.js", "coatcheck.css", "coatcheck.js", "icon.svg", "session.js")
FILES = load_static_files()


def imports_of(file: StaticFile) -> list[str]:
    """Whatever a script names behind `import` or `from`."""
    text = re.sub(r"/\*(?:.|\n)*?\*/|^\s*//[^\n]*$", "", file.octets.decode(), flags=re.MULTILINE)
    return re.findall(r"""(?:\bfrom|\bimport)\s*\(?\s*["']([^"']+)["']""", text)


def test_every_file_is_there_under_a_name_with_its_digest() -> None:
    assert set(FILES) == set(NAMES)
    for name, file in FILES.items():
        stem, ending = name.split(".")
        assert file.address == f"/static/{stem}.{sha256_text(file.octets)[:12]}.{ending}"
    assert len({file.address for file in FILES.values()}) == len(FILES)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("coatcheck.css", "text/css; charset=utf-8"),
        ("coatcheck.js", "text/javascript; charset=utf-8"),
        ("icon.svg", "image/svg+xml"),
    ],
)
def test_a_file_is_served_as_what_it_is_and_may_be_kept_for_ever(site: Site, name: str, kind: str) -> None:
    answer = site.client().get(FILES[name].address)
    assert (answer.status_code, answer.content) == (200, FILES[name].octets)
    assert answer.headers["content-type"] == kind
    assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_script_imports_others_by_the_address_they_are_served_at(site: Site) -> None:
    known = {file.address for file in FILES.values()}
    for name in NAMES:
        if name.endswith(".js"):
            assert set(imports_of(FILES[name])) <= known, name
    assert imports_of(FILES["session.js"]) == [FILES["coatcheck.js"].address]
    for address in imports_of(FILES["session.js"]):
        assert site.client().get(address).status_code == 200


def test_a_page_loads_the_session_script_where_tokens_are_handed_out_and_only_files_that_exist(
    make_site: MakeSite,
) -> None:
    for profile in ("admin", "b2c"):
        site = make_site(profile=profile)
        site.add_user(f"minsu-{profile}")
        text = site.at_account(f"minsu-{profile}").get("/account").text
        linked = set(re.findall(r'(?:src|href)="(/static/[^"]+)"', text))
        assert linked <= {file.address for file in FILES.values()}
        assert FILES["coatcheck.css"].address in linked
        assert (FILES["session.js"].address in linked) == (profile == "b2c")


@pytest.mark.parametrize(
    "path",
    [
        "/static/",
        "/static",
        "/static/coatcheck.css",
        "/static/session.js",
        "/static/coatcheck.000000000000.css",
        "/static/nothing",
        "/static/%00",
        "/static/..%2f..%2fapi.py",
        "/static/%2e%2e/api.py",
        "/static/..%5capi.py",
        "/static//etc/passwd",
        "/static/" + "x" * 5000,
        FILES["coatcheck.css"].address + "/",
        FILES["coatcheck.css"].address.upper(),
        FILES["coatcheck.css"].address + "%00",
    ],
)
def test_every_other_name_is_a_404_and_never_a_file(site: Site, path: str) -> None:
    assert site.client().get(path).status_code == 404


def test_files_are_only_read(site: Site) -> None:
    address = FILES["icon.svg"].address
    assert site.client().head(address).status_code == 200
    answer = site.client().post(address)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


def test_a_file_looks_at_no_cookie_and_asks_no_store(site: Site) -> None:
    site.add_user("minsu")
    client = site.signed_in("minsu")
    site.store.off = None
    answer = client.get(FILES["coatcheck.js"].address, headers=BROWSER)
    assert answer.status_code == 200
    assert "set-cookie" not in answer.headers
    assert "cookie" not in answer.headers.get("vary", "").lower()
    assert client.cookies[COOKIE]
