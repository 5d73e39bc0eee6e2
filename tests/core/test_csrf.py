"""The cross-origin check: what browsers really send, and what attackers would like us to believe."""

from __future__ import annotations

from typing import Any, assert_never, assert_type

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatcheck.core.csrf import (
    MAX_ORIGIN_BYTES,
    SAFE_METHODS,
    Decision,
    OriginPolicy,
    Passed,
    Refusal,
    Refused,
    check_origin,
)
from coatcheck.errors import ConfigurationError

SHOP = OriginPolicy(public_origins=frozenset({"https://shop.test"}))
UNSAFE = [
    "POST",
    "PUT",
    "PATCH",
    "DELETE",
    "CONNECT",
    "TRACE",
    "QUERY",
    "post",
    "get",
    "Get",
    "head",
    "",
    "GET ",
    "\xe9",
]


def ask(
    policy: OriginPolicy = SHOP,
    *,
    site: bytes | None = None,
    origin: bytes | None = None,
    method: str = "POST",
    websocket: bool = False,
    scheme: str = "https",
    host: bytes | None = b"shop.test",
) -> Decision:
    return check_origin(
        policy,
        method=method,
        websocket=websocket,
        sec_fetch_site=() if site is None else (site,),
        origin=() if origin is None else (origin,),
        scheme=scheme,
        host=host,
    )


def refused(reason: Refusal) -> Refused:
    return Refused(reason=reason)


BROWSER_MATRIX = [
    # what the user or the attacker did, Sec-Fetch-Site, Origin, decision for an unsafe request to https://shop.test
    ("our own form or fetch", b"same-origin", b"https://shop.test", Passed()),
    ("our own form under Referrer-Policy: no-referrer", b"same-origin", b"null", Passed()),
    ("our own form, no Origin at all", b"same-origin", None, Passed()),
    ("a typed URL or a bookmark", b"none", None, Passed()),
    ("a form POST from evil.test", b"cross-site", b"https://evil.test", refused(Refusal.CROSS_SITE)),
    (
        "the same under no-referrer or from a sandboxed frame",
        b"cross-site",
        b"null",
        refused(Refusal.CROSS_SITE),
    ),
    (
        "iframe, fetch or sendBeacon from evil.test",
        b"cross-site",
        b"https://evil.test",
        refused(Refusal.CROSS_SITE),
    ),
    ("an attacker's request without Origin", b"cross-site", None, refused(Refusal.CROSS_SITE)),
    ("a sibling host", b"same-site", b"https://api.shop.test", refused(Refusal.SAME_SITE)),
    ("a sibling host under no-referrer", b"same-site", b"null", refused(Refusal.SAME_SITE)),
    ("another port of our host", b"same-site", b"https://shop.test:8443", refused(Refusal.SAME_SITE)),
    ("http page of our own name, schemeful", b"cross-site", b"http://shop.test", refused(Refusal.CROSS_SITE)),
    ("our form, bounced by evil.test with a 307", b"cross-site", b"null", refused(Refusal.CROSS_SITE)),
    ("our link, bounced by evil.test", b"cross-site", None, refused(Refusal.CROSS_SITE)),
    ("no Sec-Fetch on plain http, our page", None, b"https://shop.test", Passed()),
    ("no Sec-Fetch on plain http, evil.test", None, b"http://evil.test", refused(Refusal.ORIGIN_FOREIGN)),
    ("no Sec-Fetch, downgraded page of our name", None, b"http://shop.test", refused(Refusal.ORIGIN_FOREIGN)),
    ("no Sec-Fetch, sibling host", None, b"https://api.shop.test", refused(Refusal.ORIGIN_FOREIGN)),
    ("no Sec-Fetch, no-referrer or sandboxed frame", None, b"null", refused(Refusal.ORIGIN_NULL)),
    ("curl, a mobile app, a server", None, None, Passed()),
]


class TestBrowserMatrix:
    @pytest.mark.parametrize(("what", "site", "origin", "decision"), BROWSER_MATRIX)
    @pytest.mark.parametrize(("method", "websocket"), [("POST", False), ("DELETE", False), ("GET", True)])
    def test_what_browsers_send_is_decided_as_observed(
        self,
        what: str,
        site: bytes | None,
        origin: bytes | None,
        decision: Decision,
        method: str,
        websocket: bool,
    ) -> None:
        assert ask(site=site, origin=origin, method=method, websocket=websocket) == decision, what

    @pytest.mark.parametrize("method", sorted(SAFE_METHODS))
    def test_a_safe_method_passes_from_everywhere(self, method: str) -> None:
        for _, site, origin, _ in BROWSER_MATRIX:
            assert ask(site=site, origin=origin, method=method) == Passed()

    def test_only_get_head_and_options_are_safe(self) -> None:
        assert {"GET", "HEAD", "OPTIONS"} == SAFE_METHODS

    @pytest.mark.parametrize("method", UNSAFE)
    def test_every_other_method_is_looked_at_in_exact_case(self, method: str) -> None:
        assert ask(method=method, site=b"cross-site") == refused(Refusal.CROSS_SITE)
        assert ask(method=method, origin=b"https://evil.test") == refused(Refusal.ORIGIN_FOREIGN)

    @pytest.mark.parametrize("method", ["GET", "CONNECT"])
    def test_a_websocket_handshake_is_looked_at_whatever_its_method(self, method: str) -> None:
        """Cross-site WebSocket hijacking: the handshake is a GET and carries the victim's cookies."""
        evil = b"https://evil.test"
        assert ask(method=method, websocket=True, origin=evil) == refused(Refusal.ORIGIN_FOREIGN)
        assert ask(method=method, websocket=True, origin=evil, site=b"cross-site") == refused(Refusal.CROSS_SITE)
        assert ask(method=method, websocket=True, origin=b"https://shop.test", site=b"same-origin") == Passed()
        assert ask(method=method, websocket=True, origin=b"https://shop.test") == Passed()
        assert ask(method=method, websocket=True) == Passed()


class TestFetchSite:
    @pytest.mark.parametrize(
        "site",
        [b"", b"Same-Origin", b"SAME-ORIGIN", b"same-origin ", b" none", b"same-origin, same-origin",
         b"same-origin,none", b'"same-origin"', b"same-origin;x=y", b"same_origin", b"\xff", b"same-origin\n",
         b"x" * 100_000],
    )  # fmt: skip
    def test_an_unknown_value_is_refused(self, site: bytes) -> None:
        assert ask(site=site, origin=b"https://shop.test") == refused(Refusal.FETCH_SITE_UNKNOWN)

    @pytest.mark.parametrize(
        "values", [(b"same-origin", b"same-origin"), (b"same-origin", b"cross-site"), (b"none",) * 9]
    )
    def test_a_repeated_header_is_refused(self, values: tuple[bytes, ...]) -> None:
        decision = check_origin(
            SHOP, method="POST", websocket=False, sec_fetch_site=values, origin=(), scheme="https", host=None
        )
        assert decision == refused(Refusal.FETCH_SITE_REPEATED)

    @pytest.mark.parametrize("site", [(), (b"same-origin",)])
    def test_a_repeated_origin_is_refused(self, site: tuple[bytes, ...]) -> None:
        decision = check_origin(
            SHOP,
            method="POST",
            websocket=False,
            sec_fetch_site=site,
            origin=(b"https://shop.test", b"https://shop.test"),
            scheme="https",
            host=None,
        )
        assert decision == refused(Refusal.ORIGIN_REPEATED)

    def test_a_public_origin_does_not_overrule_what_the_browser_says(self) -> None:
        assert ask(site=b"cross-site", origin=b"https://shop.test") == refused(Refusal.CROSS_SITE)
        assert ask(site=b"same-site", origin=b"https://shop.test") == refused(Refusal.SAME_SITE)


class TestTrustedOrigins:
    POLICY = OriginPolicy(
        public_origins=frozenset({"https://shop.test"}),
        trusted_origins=frozenset({"https://app.test", "capacitor://localhost"}),
    )

    @pytest.mark.parametrize("site", [None, b"cross-site", b"same-site"])
    @pytest.mark.parametrize("origin", [b"https://app.test", b"https://app.test:443", b"capacitor://localhost"])
    def test_a_listed_origin_passes(self, site: bytes | None, origin: bytes) -> None:
        assert ask(self.POLICY, site=site, origin=origin) == Passed()
        assert ask(self.POLICY, site=site, origin=origin, method="GET", websocket=True) == Passed()

    @pytest.mark.parametrize(
        "origin",
        [None, b"null", b"https://evil.test", b"https://app.test.evil.test", b"http://app.test", b"https://app.test:8443",
         b"https://x.app.test", b"https://app.test/", b"capacitor://evil", b"capacitor://localhost:443"],
    )  # fmt: skip
    def test_every_other_origin_is_refused(self, origin: bytes | None) -> None:
        assert ask(self.POLICY, site=b"cross-site", origin=origin) == refused(Refusal.CROSS_SITE)
        if origin is not None:
            assert isinstance(ask(self.POLICY, origin=origin), Refused)

    def test_trust_does_not_need_a_public_origin(self) -> None:
        policy = OriginPolicy(trusted_origins=frozenset({"https://app.test"}))
        assert ask(policy, origin=b"https://app.test") == Passed()
        assert ask(policy, origin=b"https://app.test", host=None) == Passed()
        assert ask(policy, origin=b"https://shop.test") == Passed()
        assert ask(policy, origin=b"https://evil.test") == refused(Refusal.ORIGIN_FOREIGN)


HOSTILE_ORIGINS = [
    b"",
    b" ",
    b"NULL",
    b"null ",
    b"*",
    b"shop.test",
    b"//shop.test",
    b"https:shop.test",
    b"https:/shop.test",
    b"https://",
    b"https://shop.test/",
    b"https://shop.test/path",
    b"https://shop.test?x",
    b"https://shop.test#x",
    b"https://shop.test.",
    b"https://.shop.test",
    b"https://shop..test",
    b"https://shop.test:",
    b"https://shop.test:0",
    b"https://shop.test:0443",
    b"https://shop.test:+443",
    b"https://shop.test:443:443",
    b"https://shop.test:65536",
    b"https://shop.test:99999",
    b"https://shop.test:000000000443",
    b"https://shop.test:\xd9\xa4\xd9\xa4\xd9\xa3",
    b"https://shop.test@evil.test",
    b"https://evil.test@shop.test",
    b"https://user:pw@shop.test",
    b"https://evil.test\\@shop.test",
    b"https://shop.test\\",
    b"https://evil.test#@shop.test",
    b"https://evil.test https://shop.test",
    b"https://shop.test https://evil.test",
    b"https://shop.test, https://shop.test",
    b"https://shop.test,https://evil.test",
    b" https://shop.test",
    b"https://shop.test ",
    b"https://shop.test\n",
    b"https://shop.test\r\nX: y",
    b"https://shop.test\x00",
    b"https://shop.test\x00.evil.test",
    b"https://shop.test\xa0",
    b"https://shop\xe3\x80\x82test",
    b"https://\xef\xbd\x93hop.test",
    b"https://shop.te\xc5\xbft",
    b"https://shop%2etest",
    b"https://[shop.test]",
    b"https://[::1",
    b"https://[::g]",
    b"https://[:::]",
    b"https://[1::2::3]",
    b"https://[::1%25eth0]",
    b"1https://shop.test",
    b"\xff\xfe",
    b"https://" + b"a" * 100_000,
    b"https://" + b"a." * 50_000 + b"test",
]


class TestOrigin:
    @pytest.mark.parametrize("origin", HOSTILE_ORIGINS)
    def test_a_hostile_origin_never_matches_by_accident(self, origin: bytes) -> None:
        assert ask(origin=origin) == refused(Refusal.ORIGIN_MALFORMED)
        assert ask(OriginPolicy(), origin=origin) == refused(Refusal.ORIGIN_MALFORMED)
        assert ask(origin=origin, site=b"cross-site") == refused(Refusal.CROSS_SITE)

    @pytest.mark.parametrize(
        "origin",
        [b"https://shop.test.evil.test", b"https://evilshop.test", b"https://shopxtest", b"https://shop.test:444",
         b"http://shop.test:443", b"https://shop.test:80", b"wss://shop.test", b"ftp://shop.test",
         b"https://shop", b"https://test", b"https://127.0.0.1", b"https://shop.test:65535"],
    )  # fmt: skip
    def test_another_origin_is_foreign_however_similar(self, origin: bytes) -> None:
        assert ask(origin=origin) == refused(Refusal.ORIGIN_FOREIGN)

    @pytest.mark.parametrize(
        "origin",
        [b"https://shop.test", b"https://shop.test:443", b"HTTPS://SHOP.TEST", b"https://Shop.Test:443"],
    )
    @pytest.mark.parametrize("public", ["https://shop.test", "https://SHOP.test:443", "HTTPS://shop.test"])
    def test_case_and_default_port_are_one_origin(self, origin: bytes, public: str) -> None:
        assert ask(OriginPolicy(public_origins=frozenset({public})), origin=origin) == Passed()

    def test_a_port_that_is_not_the_default_of_its_scheme_is_kept(self) -> None:
        policy = OriginPolicy(
            public_origins=frozenset({"http://shop.test:80", "https://shop.test:8443", "http://[::0001]:65535"})
        )
        for origin in (
            b"http://shop.test",
            b"https://shop.test:8443",
            b"http://[::1]:65535",
            b"http://[0:0:0:0:0:0:0:1]:65535",
        ):
            assert ask(policy, origin=origin) == Passed()
        for origin in (
            b"https://shop.test",
            b"http://shop.test:8443",
            b"http://[::1]",
            b"http://[::2]:65535",
        ):
            assert ask(policy, origin=origin) == refused(Refusal.ORIGIN_FOREIGN)

    def test_an_origin_of_exactly_the_limit_is_read_and_one_octet_more_is_not(self) -> None:
        assert MAX_ORIGIN_BYTES == 512
        host = b"a" * (MAX_ORIGIN_BYTES - len(b"https://"))
        policy = OriginPolicy(public_origins=frozenset({"https://" + host.decode()}))
        assert ask(policy, origin=b"https://" + host) == Passed()
        assert ask(policy, origin=b"https://" + host + b"a") == refused(Refusal.ORIGIN_MALFORMED)

    def test_the_host_is_never_asked_when_public_origins_are_configured(self) -> None:
        """A forged or rebound Host would otherwise make evil.test its own origin."""
        assert ask(origin=b"https://evil.test", host=b"evil.test") == refused(Refusal.ORIGIN_FOREIGN)
        assert ask(origin=b"https://shop.test", host=b"10.0.0.7:8000", scheme="http") == Passed()
        assert ask(origin=b"https://shop.test", host=None) == Passed()


class TestHostFallback:
    NONE = OriginPolicy()

    @pytest.mark.parametrize(
        ("scheme", "host", "origin"),
        [
            ("https", b"shop.test", b"https://shop.test"),
            ("https", b"shop.test:443", b"https://shop.test"),
            ("http", b"SHOP.test:80", b"http://shop.test"),
            ("http", b"127.0.0.1:8000", b"http://127.0.0.1:8000"),
            ("http", b"localhost:8000", b"http://localhost:8000"),
            ("http", b"[::1]:8000", b"http://[::1]:8000"),
            ("wss", b"shop.test", b"https://shop.test"),
            ("ws", b"localhost:8000", b"http://localhost:8000"),
        ],
    )
    def test_scheme_and_host_make_our_origin(self, scheme: str, host: bytes, origin: bytes) -> None:
        assert ask(self.NONE, scheme=scheme, host=host, origin=origin) == Passed()

    @pytest.mark.parametrize(
        ("scheme", "host", "origin"),
        [
            ("https", b"shop.test", b"http://shop.test"),
            ("http", b"shop.test", b"https://shop.test"),
            ("http", b"localhost:8000", b"http://localhost:3000"),
            ("http", b"localhost:8000", b"http://127.0.0.1:8000"),
            ("http", b"localhost:8000", b"http://localhost"),
            ("https", b"api.shop.test", b"https://shop.test"),
            ("wss", b"shop.test", b"wss://shop.test"),
        ],
    )
    def test_all_three_of_scheme_host_and_port_must_agree(self, scheme: str, host: bytes, origin: bytes) -> None:
        assert ask(self.NONE, scheme=scheme, host=host, origin=origin) == refused(Refusal.ORIGIN_FOREIGN)

    @pytest.mark.parametrize(
        ("scheme", "host"),
        [
            ("https", None),
            ("https", b""),
            ("https", b"shop.test/"),
            ("https", b"user@shop.test"),
            ("https", b"shop.test, shop.test"),
            ("https", b"shop.test."),
            ("https", b"shop.test\xff"),
            ("https", b"a" * 100_000),
            ("HTTPS", b"shop.test"),
            ("", b"shop.test"),
            ("ftp", b"shop.test"),
            ("https://shop.test", b"shop.test"),
        ],
    )
    def test_an_unusable_host_refuses_instead_of_guessing(self, scheme: str, host: bytes | None) -> None:
        assert ask(self.NONE, scheme=scheme, host=host, origin=b"https://shop.test") == refused(Refusal.HOST_UNUSABLE)

    def test_the_browser_matrix_holds_without_configuration_too(self) -> None:
        for what, site, origin, decision in BROWSER_MATRIX:
            assert ask(self.NONE, site=site, origin=origin) == decision, what


class TestPolicy:
    @pytest.mark.parametrize("field", ["public_origins", "trusted_origins"])
    @pytest.mark.parametrize(
        "origin",
        ["null", "*", "", "shop.test", "https://*.shop.test", "https://shop.test/", "https://shop.test.",
         "https://b\xfccher.test", "https://shop.test:0", "https://shop.test:65536", "https://shop.test\n",
         "https://\ud800.test", "https://[::1", "https://[::x]"],
    )  # fmt: skip
    def test_what_is_not_an_origin_is_refused_and_the_detail_names_field_and_cure(
        self, field: str, origin: str
    ) -> None:
        values: dict[str, Any] = {field: frozenset({origin})}
        with pytest.raises(ConfigurationError) as raised:
            OriginPolicy(**values)
        assert raised.value.detail.startswith(f"{field}: ")
        assert "scheme://host[:port]" in raised.value.detail

    def test_a_password_in_an_origin_is_not_repeated(self) -> None:
        with pytest.raises(ConfigurationError) as raised:
            OriginPolicy(trusted_origins=frozenset({"https://user:secret@shop.test"}))
        assert "secret" not in str(raised.value)

    def test_a_public_origin_is_a_web_origin(self) -> None:
        with pytest.raises(ConfigurationError, match="public_origins: must begin with https"):
            OriginPolicy(public_origins=frozenset({"capacitor://localhost"}))

    def test_a_text_in_place_of_a_set_is_refused(self) -> None:
        text: Any = "https://shop.test"
        with pytest.raises(ConfigurationError):
            OriginPolicy(public_origins=text)

    def test_the_reasons_are_stable(self) -> None:
        assert [str(reason) for reason in Refusal] == [
            "cross_site",
            "same_site",
            "fetch_site_unknown",
            "fetch_site_repeated",
            "origin_repeated",
            "origin_null",
            "origin_malformed",
            "origin_foreign",
            "host_unusable",
        ]

    def test_the_decision_is_a_closed_union(self) -> None:
        decision = ask(site=b"cross-site")
        assert_type(decision, Passed | Refused)
        match decision:
            case Refused(reason=reason):
                assert_type(reason, Refusal)
            case Passed():
                pytest.fail("another site has sent it")
            case _:
                assert_never(decision)


ANY_VALUES = st.lists(
    st.one_of(st.binary(max_size=60), st.sampled_from([b"same-origin", b"none", b"null", b"https://shop.test"])),
    max_size=3,
)
POLICIES = st.sampled_from([SHOP, OriginPolicy(), TestTrustedOrigins.POLICY])


class TestProperties:
    @given(
        POLICIES,
        st.text(max_size=8),
        st.booleans(),
        ANY_VALUES,
        ANY_VALUES,
        st.text(max_size=8),
        st.binary(max_size=40) | st.none(),
    )
    def test_no_input_makes_it_raise(
        self,
        policy: OriginPolicy,
        method: str,
        websocket: bool,
        site: list[bytes],
        origin: list[bytes],
        scheme: str,
        host: bytes | None,
    ) -> None:
        decision = check_origin(
            policy,
            method=method,
            websocket=websocket,
            sec_fetch_site=site,
            origin=origin,
            scheme=scheme,
            host=host,
        )
        assert isinstance(decision, Passed | Refused)

    @given(st.binary(max_size=80), st.binary(max_size=40))
    def test_only_our_own_spellings_of_an_origin_pass(self, origin: bytes, host: bytes) -> None:
        ours = origin.lower() in (b"https://shop.test", b"https://shop.test:443")
        assert (ask(origin=origin, host=host) == Passed()) is ours

    @given(st.sampled_from([b"https://shop.test", b"https://shop.test:443"]), st.data())
    def test_one_octet_more_in_an_origin_never_passes(self, origin: bytes, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(origin)))
        octet = data.draw(st.binary(min_size=1, max_size=1))
        changed = origin[:at] + octet + origin[at:]
        assert isinstance(ask(origin=changed), Refused)

    @given(st.binary(max_size=40).filter(lambda site: site not in (b"same-origin", b"none")), POLICIES)
    def test_nothing_but_same_origin_and_none_passes_without_trust(self, site: bytes, policy: OriginPolicy) -> None:
        assert isinstance(ask(policy, site=site, origin=b"https://shop.test"), Refused)
