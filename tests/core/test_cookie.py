"""The cookie on the wire: what is found in hostile headers, what is written, what is refused."""

from __future__ import annotations

import inspect
import re
from dataclasses import FrozenInstanceError, fields, replace
from datetime import timedelta
from typing import Any, SupportsIndex, assert_never, assert_type, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from coatcheck.core.cookie import (
    MAX_AGE_LIMIT,
    MAX_ATTRIBUTE_BYTES,
    MAX_COOKIE_BYTES,
    MAX_PAIR_BYTES,
    CookieLookup,
    CookieSettings,
    Duplicated,
    Found,
    Missing,
    Oversized,
    find_cookie,
    render_delete_cookie,
    render_set_cookie,
    sole_value,
)
from coatcheck.errors import ConfigurationError, CookieTooLarge, ValueRefused

NAME = b"__Host-Http-session"
ID = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEF_"
BROWSER_HEADER = (
    b"_ga=GA1.2.1234567890.1700000000; theme=dark; locale=ko-KR; "
    + NAME
    + b"="
    + ID
    + b"; csrftoken=abcdefghijklmnopqrstuvwxyz; _fbp=fb.1.1700000000000.1; banner=off"
)
COOKIE_OCTETS = "".join(chr(octet) for octet in range(0x21, 0x7F) if chr(octet) not in '",;\\')


def found(value: bytes) -> Found:
    return Found(value=value)


class TestTheQuickLook:
    """`sole_value` spares the usual request the close look. Where it answers, it must answer the same: a difference
    between two parsers is what cookie tossing and smuggled cookies live on."""

    @pytest.mark.parametrize("header", [BROWSER_HEADER, NAME + b"=v", b"a=b; " + NAME + b"= v ;c=d", NAME + b"="])
    def test_the_usual_header_needs_no_close_look(self, header: bytes) -> None:
        assert found(cast(bytes, sole_value(header, NAME))) == find_cookie([header], NAME)

    @pytest.mark.parametrize(
        "header",
        [
            b"",
            b"a=b",
            b"x" + NAME + b"=v",
            b" " + NAME + b"=v",
            b"a=b;" + NAME + b"=v",
            b"a=b;\xa0" + NAME + b"=v",
            NAME,
            NAME + b" =v",
            NAME + b"=v; " + NAME + b"=w",
            b"a=" + NAME + b"; " + NAME + b"=v",
            NAME + b"=" + NAME,
        ],
    )
    def test_whatever_looks_different_is_left_to_the_close_look(self, header: bytes) -> None:
        assert sole_value(header, NAME) is None

    @pytest.mark.parametrize("spare", [0, 1])
    def test_a_header_over_the_limit_is_left_to_the_close_look(self, spare: int) -> None:
        header = NAME + b"=v; a="
        header += b"x" * (MAX_COOKIE_BYTES - len(header) + spare)
        assert sole_value(header, NAME) == (b"v" if spare == 0 else None)

    @given(st.lists(st.sampled_from([NAME, ID, b"=", b";", b" ", b"\t", b"; ", b"a", b"\xa0", b'"']), max_size=12))
    def test_it_never_answers_otherwise_than_the_close_look(self, parts: list[bytes]) -> None:
        header = b"".join(parts)
        value = sole_value(header, NAME)
        assert value is None or find_cookie([header], NAME) == found(value)


class TestFinding:
    @pytest.mark.parametrize(
        ("headers", "expected"),
        [
            ([], Missing()),
            ([b""], Missing()),
            ([b"a=b; c=d"], Missing()),
            ([BROWSER_HEADER], found(ID)),
            ([NAME + b"=v"], found(b"v")),
            ([b"a=b;" + NAME + b"=v"], found(b"v")),
            ([b";" + NAME + b"=v"], found(b"v")),
            ([b";;; " + NAME + b"=v;;"], found(b"v")),
            ([NAME + b"="], found(b"")),
            ([NAME + b"=a=b=="], found(b"a=b==")),
            ([b"\t " + NAME + b" \t=\t v \t; x=y"], found(b"v")),
        ],
    )
    def test_a_cookie_is_found_by_its_whole_name(self, headers: list[bytes], expected: CookieLookup) -> None:
        assert find_cookie(headers, NAME) == expected

    def test_several_cookie_headers_are_read_as_one(self) -> None:
        assert find_cookie([b"a=b", NAME + b"=v", b"c=d"], NAME) == found(b"v")
        assert find_cookie([b"a=" + NAME, b"=v"], NAME) == Missing()

    @pytest.mark.parametrize(
        "headers",
        [
            [NAME + b"=a; " + NAME + b"=b"],
            [NAME + b"=a; " + NAME + b"=a"],
            [NAME + b"=a;" + NAME + b"="],
            [NAME + b"=a; x=y; " + NAME + b" =b"],
            [NAME + b"=a", NAME + b"=b"],
            [NAME + b"=a", b"x=y", b"\t" + NAME + b"=b"],
        ],
    )
    def test_a_cookie_carried_twice_counts_as_none(self, headers: list[bytes]) -> None:
        """Tossing: a sibling host or a script plants a twin, and the order of the two proves nothing."""
        assert find_cookie(headers, NAME) == Duplicated()

    @pytest.mark.parametrize(
        "header",
        [
            b"x" + NAME + b"=v",
            b"x-" + NAME + b"=v",
            NAME + b"x=v",
            NAME + b"-x=v",
            b"x=" + NAME + b"=v",
            b"x= " + NAME + b"=v",
            b"x=1 " + NAME + b"=v",
            b"x=1," + NAME + b"=v",
            b"x=1\n" + NAME + b"=v",
            b"x " + NAME + b"=v",
            NAME + b" x=v",
            NAME.lower() + b"=v",
            NAME.upper() + b"=v",
            b'x="1, ' + NAME + b'=v"',
            b"$Version=1," + NAME + b"=v",
            b"%5F%5FHost-Http-session=v",
            b'"' + NAME + b'"=v',
        ],
    )
    def test_another_cookie_that_merely_contains_the_name_is_not_ours(self, header: bytes) -> None:
        assert find_cookie([header], NAME) == Missing()
        assert find_cookie([header + b"; " + NAME + b"=ours"], NAME) == found(b"ours")
        assert find_cookie([NAME + b"=ours; " + header], NAME) == found(b"ours")

    @pytest.mark.parametrize("header", [b"=" + NAME + b"=v", b"= " + NAME + b"=v", NAME, b" " + NAME + b" ", b"=v"])
    def test_a_nameless_cookie_belongs_to_no_name_cve_2023_23934(self, header: bytes) -> None:
        assert find_cookie([header], NAME) == Missing()
        assert find_cookie([header + b"; a=b"], NAME) == Missing()

    @pytest.mark.parametrize(
        "blank",
        [bytes([octet]) for octet in range(256) if octet not in b" \t;"]
        + [b"\xc2\xa0", b"\xe2\x80\x83", b"\xef\xbb\xbf"],
    )
    def test_no_octet_but_space_and_tab_is_trimmed_so_that_a_prefix_is_never_forged(self, blank: bytes) -> None:
        """A sibling host may set b"\\xa0__Host-sid"; a parser that strips more takes it for ours."""
        for header in (
            blank + NAME + b"=v",
            b"a=b; " + blank + NAME + b"=v",
            b"a=b;" + blank + b" " + NAME + b"=v",
        ):
            assert find_cookie([header], NAME) == Missing()
        if blank != b"=":
            assert find_cookie([NAME + blank + b"=v"], NAME) == Missing()
        assert find_cookie([NAME + b"=" + blank], NAME) == found(blank)

    @pytest.mark.parametrize("value", [b'"v"', b'"v', b'"\\073"', b"%22", b"v\x00", b"\xff\xfe", b"a,b"])
    def test_a_value_is_handed_on_as_it_came_and_never_unquoted(self, value: bytes) -> None:
        assert find_cookie([b"a=b; " + NAME + b"=" + value], NAME) == found(value)

    def test_quotes_do_not_hide_a_semicolon(self) -> None:
        assert find_cookie([b'a="x; ' + NAME + b'=v"'], NAME) == found(b'v"')
        assert find_cookie([NAME + b'="x; y"'], NAME) == found(b'"x')

    def test_headers_joined_by_a_comma_give_no_id(self) -> None:
        """Some WSGI servers join repeated headers so; a wrong split would let one cookie pose as another."""
        assert find_cookie([b"a=b," + NAME + b"=v"], NAME) == Missing()
        assert find_cookie([NAME + b"=v," + NAME + b"=w"], NAME) == found(b"v," + NAME + b"=w")

    def test_headers_of_exactly_the_limit_are_read_and_one_octet_more_is_not(self) -> None:
        ours = NAME + b"=v; x="
        assert MAX_COOKIE_BYTES == 16_384
        full = ours + b"a" * (MAX_COOKIE_BYTES - len(ours))
        assert find_cookie([full], NAME) == found(b"v")
        assert find_cookie([full + b"a"], NAME) == Oversized()
        halves = [full[: len(ours)], full[len(ours) + 1 :]]
        assert find_cookie(halves, NAME) == found(b"v")
        assert find_cookie([*halves, b""], NAME) == Oversized()

    def test_the_value_does_not_show_in_the_repr(self) -> None:
        assert "secret" not in repr(find_cookie([NAME + b"=secret"], NAME))

    @pytest.mark.parametrize("outcome", [found(b"v"), Missing(), Duplicated(), Oversized()])
    def test_an_outcome_cannot_be_changed(self, outcome: CookieLookup) -> None:
        # An attribute that does not exist is refused by the slots, with a TypeError on CPython 3.11.
        with pytest.raises((FrozenInstanceError, TypeError)):
            outcome.value = b"w"  # type: ignore[misc, union-attr] # pyright: ignore[reportAttributeAccessIssue]

    def test_the_outcomes_are_a_closed_union(self) -> None:
        outcome = find_cookie([BROWSER_HEADER], NAME)
        assert_type(outcome, Found | Missing | Duplicated | Oversized)
        match outcome:
            case Found(value=value):
                assert_type(value, bytes)
            case Missing() | Duplicated() | Oversized():
                pytest.fail("the cookie is there")
            case _:
                assert_never(outcome)


class Meter(bytes):
    """A header that counts the octets which are looked at or copied."""

    work: int = 0

    def find(self, sub: Any, start: Any = 0, end: Any = None) -> int:
        at = super().find(sub, start, end)
        self.work += (len(self) if at < 0 else at + len(sub)) - min(start, len(self)) + 1
        return at

    def rfind(self, sub: Any, start: Any = 0, end: Any = None) -> int:
        at = super().rfind(sub, start, end)
        self.work += (len(self) if end is None else end) - max(at, start) + 1
        return at

    def __getitem__(self, key: SupportsIndex | slice) -> Any:
        part = super().__getitem__(cast("slice", key))
        self.work += len(part)
        return part


HOSTILE_SHAPES = [
    NAME,
    NAME + b";",
    NAME + b"=",
    b"x" + NAME + b"=1;",
    b" " + NAME,
    NAME + b" ",
    b" ",
    b"\t \t" + NAME + b"\t \t;",
    b";",
    b"=",
    b"=;",
    b'"',
    b'"\\073',
    b'a="\\"',
    NAME[:-1],
    NAME[0:1],
    b"x=" + NAME + b"=;",
    b"\\",
]


class TestLinearTime:
    @pytest.mark.parametrize("shape", HOSTILE_SHAPES)
    @pytest.mark.parametrize("size", [1024, 4096, MAX_COOKIE_BYTES])
    def test_a_hostile_header_costs_work_in_proportion_to_its_size_cve_2024_7592(self, shape: bytes, size: int) -> None:
        """Work is counted, not timed: every octet is looked at a handful of times at most."""
        header = Meter((shape * size)[:size])
        find_cookie([header], NAME)
        assert header.work <= 5 * size

    def test_the_meter_notices_quadratic_work(self) -> None:
        header = Meter(b"a" * 1024)
        for at in range(1024):
            header.find(b"b", at)
        assert header.work > 5 * 1024

    @pytest.mark.parametrize("shape", HOSTILE_SHAPES)
    def test_a_header_of_64_kilobytes_or_more_is_not_looked_into_at_all(self, shape: bytes) -> None:
        for size in (64 * 1024, 1024 * 1024):
            header = Meter((shape * size)[:size])
            assert find_cookie([header], NAME) == Oversized()
            assert header.work == 0

    def test_very_many_cookie_headers_are_bounded_too(self) -> None:
        assert find_cookie([b""] * 100_000, NAME) == Oversized()


def by_regex(headers: list[bytes], name: bytes) -> CookieLookup:
    """An oracle that shares no code with the parser."""
    whole = b";".join(headers)
    hits = re.findall(rb"(?:\A|;)[ \t]*" + re.escape(name) + rb"[ \t]*=[ \t]*([^;]*)", whole)
    if len(hits) > 1:
        return Duplicated()
    return Found(value=re.sub(rb"[ \t]+\Z", b"", hits[0])) if hits else Missing()


HOSTILE_PIECES = st.sampled_from(
    [
        NAME,
        NAME,
        b"=",
        b"=",
        b";",
        b";",
        b" ",
        b"\t",
        b"\xa0",
        b"\x0b",
        b"\x00",
        b"\r\n",
        b'"',
        b"\\",
        b",",
        b"x",
        b"__Host-",
        b"Http-session",
    ]
)
HOSTILE_HEADERS = st.lists(st.lists(HOSTILE_PIECES, max_size=24).map(b"".join), max_size=4)
ANY_HEADERS = st.lists(st.binary(max_size=200), max_size=4)
VALUES = st.text(alphabet=COOKIE_OCTETS, max_size=200)
OTHER_PAIRS = st.lists(
    st.tuples(
        st.text(alphabet=COOKIE_OCTETS.replace("=", ""), max_size=12).filter(lambda name: name != NAME.decode()),
        st.sampled_from(
            [NAME.decode(), f"{NAME.decode()}=evil", f" {NAME.decode()}=evil", f"a={NAME.decode()}=", "", "v"]
        ),
    ).map("=".join),
    max_size=5,
).map(lambda pairs: [pair.encode() for pair in pairs])


class TestFindingProperties:
    @given(st.one_of(ANY_HEADERS, HOSTILE_HEADERS), st.one_of(st.just(NAME), st.binary(max_size=8)))
    @example([b"", b"="], b"")
    @example([b";;"], b"")
    def test_no_bytes_make_it_raise_or_hang(self, headers: list[bytes], name: bytes) -> None:
        assert isinstance(find_cookie(headers, name), Found | Missing | Duplicated)

    @given(HOSTILE_HEADERS)
    def test_it_agrees_with_an_independent_oracle(self, headers: list[bytes]) -> None:
        assert find_cookie(headers, NAME) == by_regex(headers, NAME)

    @given(st.lists(st.sampled_from([b"aa", b"a", b"=", b";", b" "]), max_size=30).map(b"".join))
    def test_a_name_that_overlaps_itself_is_found_as_well(self, header: bytes) -> None:
        assert find_cookie([header], b"aa") == by_regex([header], b"aa")

    @given(VALUES, OTHER_PAIRS, OTHER_PAIRS)
    def test_what_is_written_is_found_again_among_any_other_cookies(
        self, value: str, before: list[bytes], after: list[bytes]
    ) -> None:
        pair = render_set_cookie(CookieSettings(), value).split(b";")[0]
        assert find_cookie([b"; ".join([*before, pair, *after])], NAME) == found(value.encode())
        assert find_cookie([*before, pair, *after], NAME) == found(value.encode())

    @given(OTHER_PAIRS)
    def test_the_name_inside_other_values_is_never_a_hit(self, pairs: list[bytes]) -> None:
        assert find_cookie([b"; ".join(pairs)], NAME) == Missing()

    @given(st.binary(min_size=1, max_size=6).filter(lambda junk: not set(junk) & set(b";") and junk.strip(b" \t")))
    def test_a_forged_prefix_is_never_found(self, junk: bytes) -> None:
        assert find_cookie([junk + NAME + b"=v"], NAME) == Missing()
        assert find_cookie([b"a=b; " + junk + NAME + b"=v"], NAME) == Missing()

    @given(VALUES, VALUES, OTHER_PAIRS, st.sampled_from([b"", b" ", b"\t", b" \t "]))
    def test_a_duplicate_is_always_detected(self, one: str, two: str, between: list[bytes], blank: bytes) -> None:
        pairs = [NAME + b"=" + one.encode(), *between, blank + NAME + blank + b"=" + two.encode()]
        assert find_cookie([b";".join(pairs)], NAME) == Duplicated()
        assert find_cookie(pairs, NAME) == Duplicated()


class TestSettings:
    def test_the_default_is_the_strongest_cookie_that_a_link_still_reaches(self) -> None:
        settings = CookieSettings()
        assert render_set_cookie(settings, "v") == (b"__Host-Http-session=v; Path=/; Secure; HttpOnly; SameSite=Lax")
        assert settings.wire_name == NAME

    def test_every_attribute_is_written(self) -> None:
        settings = CookieSettings(
            name="__Secure-sid",
            domain="shop.example",
            path="/app",
            same_site="None",
            max_age=timedelta(hours=1),
            partitioned=True,
        )
        assert render_set_cookie(settings, "v") == (
            b"__Secure-sid=v; Path=/app; Domain=shop.example; Secure; HttpOnly; SameSite=None; Partitioned"
            b"; Max-Age=3600"
        )

    def test_a_plain_cookie_for_a_loopback_host_carries_neither_secure_nor_a_prefix(self) -> None:
        settings = CookieSettings(name="coatcheck_session", secure=False, http_only=False, same_site="Strict")
        assert render_set_cookie(settings, "v") == b"coatcheck_session=v; Path=/; SameSite=Strict"

    def test_settings_are_frozen_and_compare_by_value(self) -> None:
        settings = CookieSettings()
        render_set_cookie(settings, "v")
        assert settings == CookieSettings()
        assert hash(settings) == hash(CookieSettings())
        with pytest.raises(FrozenInstanceError):
            settings.secure = False  # type: ignore[misc]
        assert b"SameSite=Strict" in render_set_cookie(replace(settings, same_site="Strict"), "v")

    @pytest.mark.parametrize(
        ("field", "cure", "changes"),
        [
            ("same_site", "secure=True", {"name": "sid", "same_site": "None", "secure": False}),
            ("partitioned", "secure=True", {"name": "sid", "partitioned": True, "secure": False}),
            ("secure", "secure=True", {"name": "__Secure-sid", "secure": False}),
            ("secure", "secure=True", {"name": "__Host-sid", "secure": False}),
            ("path", 'path="/"', {"name": "__Host-sid", "path": "/app"}),
            ("domain", "domain=None", {"name": "__Host-sid", "domain": "shop.example"}),
            ("secure", "secure=True", {"name": "__Http-sid", "secure": False}),
            ("http_only", "http_only=True", {"name": "__Http-sid", "http_only": False}),
            ("secure", "secure=True", {"name": "__Host-Http-sid", "secure": False}),
            ("http_only", "http_only=True", {"name": "__Host-Http-sid", "http_only": False}),
            ("path", 'path="/"', {"name": "__Host-Http-sid", "path": "/app"}),
            ("domain", "domain=None", {"name": "__Host-Http-sid", "domain": "shop.example"}),
            ("same_site", "Strict, Lax or None", {"same_site": "lax"}),
            ("same_site", "Strict, Lax or None", {"same_site": None}),
        ],
    )
    def test_a_contradiction_is_refused_and_the_detail_names_field_and_cure(
        self, field: str, cure: str, changes: dict[str, Any]
    ) -> None:
        with pytest.raises(ConfigurationError) as refused:
            CookieSettings(**changes)
        assert refused.value.detail.startswith(f"cookie.{field}: ")
        assert cure in refused.value.detail

    @pytest.mark.parametrize("name", ["__secure-sid", "__SECURE-sid", "__host-sid", "__HOST-HTTP-sid", "__hTTP-sid"])
    def test_a_prefix_binds_in_any_case_as_it_does_in_browsers(self, name: str) -> None:
        CookieSettings(name=name)
        with pytest.raises(ConfigurationError, match=r"cookie\.secure"):
            CookieSettings(name=name, secure=False)

    @pytest.mark.parametrize("name", ["__Hostsid", "_Host-sid", "x__Host-sid", "__Secure", "Http-sid"])
    def test_a_name_that_only_resembles_a_prefix_is_free(self, name: str) -> None:
        CookieSettings(name=name, secure=False, http_only=False, path="/app", domain="shop.example")

    @pytest.mark.parametrize("octet", [chr(octet) for octet in range(0x21)] + list('()<>@,;:\\"/[]?={}\x7f\x80\xa0é세'))
    def test_no_field_lets_an_octet_through_that_would_write_another_attribute_or_header(self, octet: str) -> None:
        """CVE-2026-0672, CVE-2026-3644, CVE-2026-16052 and tornado before 6.5.5: CR, LF, `;` in a field."""
        for name in (f"sid{octet}", f"{octet}sid", f"s{octet}d", octet):
            with pytest.raises(ConfigurationError, match=r"cookie\.name"):
                CookieSettings(name=name)
        for domain in (f"shop.example{octet}", f"{octet}shop.example", f"shop{octet}example"):
            with pytest.raises(ConfigurationError, match=r"cookie\.domain: "):
                CookieSettings(name="sid", domain=domain)
        if octet == ";" or not "!" <= octet <= "~":
            for path in (f"/app{octet}", f"/{octet}app", f"{octet}/app"):
                with pytest.raises(ConfigurationError, match=r"cookie\.path: "):
                    CookieSettings(name="sid", path=path)
        with pytest.raises(ConfigurationError, match=r"cookie\.same_site"):
            CookieSettings(same_site=cast("Any", f"Lax{octet}"))

    @pytest.mark.parametrize(
        "changes",
        [
            {"name": ""},
            {"name": "sid\n"},
            {"domain": ""},
            {"domain": ".shop.example"},
            {"domain": "shop.example."},
            {"domain": "shop..example"},
            {"domain": "shop.example\n"},
            {"path": ""},
            {"path": "app"},
            {"path": "/app\n"},
            {"path": "/; Domain=evil.example"},
            {"path": "/\r\nSet-Cookie: sid=evil"},
        ],
    )
    def test_a_malformed_field_is_refused(self, changes: dict[str, Any]) -> None:
        merged: dict[str, Any] = {"name": "sid"} | changes
        with pytest.raises(ConfigurationError, match=rf"cookie\.{next(iter(changes))}: "):
            CookieSettings(**merged)

    def test_an_attribute_of_1024_octets_passes_and_1025_are_refused(self) -> None:
        path, domain = "/" + "p" * (MAX_ATTRIBUTE_BYTES - 1), "d" * MAX_ATTRIBUTE_BYTES
        assert MAX_ATTRIBUTE_BYTES == 1024
        CookieSettings(name="sid", path=path, domain=domain)
        with pytest.raises(ConfigurationError, match=r"cookie\.path: "):
            CookieSettings(name="sid", path=path + "p")
        with pytest.raises(ConfigurationError, match=r"cookie\.domain: "):
            CookieSettings(name="sid", domain=domain + "d")

    def test_a_name_that_fills_the_cookie_passes_and_a_longer_one_is_refused(self) -> None:
        CookieSettings(name="n" * MAX_PAIR_BYTES)
        with pytest.raises(ConfigurationError, match=r"cookie\.name"):
            CookieSettings(name="n" * (MAX_PAIR_BYTES + 1))

    @pytest.mark.parametrize("life", [timedelta(seconds=1), MAX_AGE_LIMIT, timedelta(days=400)])
    def test_a_life_from_one_second_to_400_days_passes(self, life: timedelta) -> None:
        expected = b"; Max-Age=%d" % life.total_seconds()
        assert render_set_cookie(CookieSettings(max_age=life), "v").endswith(expected)
        assert render_set_cookie(CookieSettings(), "v", max_age=life).endswith(expected)

    @pytest.mark.parametrize(
        "life",
        [
            timedelta(0),
            timedelta(seconds=-1),
            timedelta(microseconds=999_999),
            timedelta(days=400, microseconds=1),
            timedelta.max,
            timedelta.min,
        ],
    )
    def test_a_life_that_would_delete_the_cookie_or_be_cut_by_the_browser_is_refused(self, life: timedelta) -> None:
        with pytest.raises(ConfigurationError, match=r"cookie\.max_age"):
            CookieSettings(max_age=life)
        with pytest.raises(ConfigurationError, match=r"cookie\.max_age"):
            render_set_cookie(CookieSettings(), "v", max_age=life)

    def test_every_field_has_its_documentation(self) -> None:
        source = inspect.getsource(CookieSettings)
        for each in fields(CookieSettings):
            assert re.search(rf'^    {each.name}: .*\n    """', source, re.MULTILINE), each.name


class TestWriting:
    def test_name_and_value_of_4096_octets_pass_and_4097_are_refused_where_they_are_written(self) -> None:
        settings = CookieSettings()
        room = MAX_PAIR_BYTES - len(settings.name)
        assert MAX_PAIR_BYTES == 4096
        assert render_set_cookie(settings, "v" * room).startswith(NAME + b"=" + b"v" * room + b";")
        with pytest.raises(CookieTooLarge) as refused:
            render_set_cookie(settings, "v" * (room + 1))
        assert "4097" in refused.value.detail
        assert "vvv" not in refused.value.detail

    @pytest.mark.parametrize(
        "character",
        [chr(octet) for octet in range(256) if chr(octet) not in COOKIE_OCTETS] + ["세", "\ud800"],
    )
    def test_a_character_that_cannot_stand_in_a_value_is_refused_without_showing_the_value(
        self, character: str
    ) -> None:
        """CVE-2026-0672 and its kin: CR, LF or `;` in a value writes the attacker's headers or attributes."""
        for value in (character, f"secret{character}", f"{character}secret", f"secret{character}secret"):
            with pytest.raises(ValueRefused) as refused:
                render_set_cookie(CookieSettings(), value)
            assert "secret" not in str(refused.value)
            assert refused.value.__cause__ is None
            assert refused.value.__context__ is None

    def test_every_cookie_octet_is_written_as_it_is(self) -> None:
        assert render_set_cookie(CookieSettings(name="sid"), COOKIE_OCTETS).startswith(
            b"sid=" + COOKIE_OCTETS.encode() + b";"
        )

    def test_a_life_given_for_one_cookie_takes_the_place_of_the_settings(self) -> None:
        persistent = CookieSettings(max_age=timedelta(days=7))
        assert render_set_cookie(persistent, "v").endswith(b"; Max-Age=604800")
        assert render_set_cookie(persistent, "v", max_age=timedelta(seconds=90.9)).endswith(b"SameSite=Lax; Max-Age=90")

    def test_a_session_cookie_names_no_lifetime(self) -> None:
        written = render_set_cookie(CookieSettings(), "v")
        assert b"Max-Age" not in written
        assert b"Expires" not in written

    @pytest.mark.parametrize(
        "settings",
        [
            CookieSettings(),
            CookieSettings(max_age=timedelta(days=1)),
            CookieSettings(name="sid", domain="shop.example", path="/app", secure=False, http_only=False),
            CookieSettings(name="__Secure-sid", same_site="None", partitioned=True, domain="shop.example"),
            CookieSettings(name="__Host-sid", same_site="Strict", http_only=False),
        ],
    )
    def test_deleting_uses_the_attributes_of_setting(self, settings: CookieSettings) -> None:
        """R15: a `__Host-` cookie deleted without Secure and Path=/ stays in the browser."""

        def attributes(written: bytes) -> list[bytes]:
            lifetime = (b"Max-Age=", b"Expires=")
            return [part for part in written.split(b"; ")[1:] if not part.startswith(lifetime)]

        deleted = render_delete_cookie(settings)
        assert attributes(deleted) == attributes(render_set_cookie(settings, "v"))
        assert deleted.startswith(settings.wire_name + b"=; ")
        assert deleted.endswith(b"; Max-Age=0; Expires=Thu, 01 Jan 1970 00:00:00 GMT")
        assert deleted.count(b"Max-Age") == 1

    @given(st.text(max_size=60))
    def test_any_text_is_written_whole_or_refused_with_our_own_error(self, value: str) -> None:
        try:
            written = render_set_cookie(CookieSettings(), value)
        except ValueRefused:
            assert set(value) - set(COOKIE_OCTETS)
        else:
            assert written == NAME + b"=" + value.encode() + b"; Path=/; Secure; HttpOnly; SameSite=Lax"

    @given(st.text(max_size=12), st.text(max_size=12) | st.none(), st.text(max_size=12).map("/".__add__))
    def test_any_settings_write_one_line_of_known_attributes_or_are_refused(
        self, name: str, domain: str | None, path: str
    ) -> None:
        try:
            settings = CookieSettings(name=name, domain=domain, path=path)
        except ConfigurationError:
            return
        first, *attributes = render_set_cookie(settings, "v").split(b";")
        assert first == name.encode() + b"=v"
        known = {b" Path", b" Domain", b" Secure", b" HttpOnly", b" SameSite"}
        assert {part.split(b"=")[0] for part in attributes} <= known
        assert all(0x20 <= octet < 0x7F for part in attributes for octet in part)
