from __future__ import annotations

import asyncio
import json
import logging
import os
import pty
import sqlite3
import subprocess
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from coatcheck import Coatcheck, IssuedTokens, Settings, TokenInvalid, TokenSettings
from coatcheck.core.access_token import MAX_LEEWAY, AccessToken, new_jti
from coatcheck.core.key_ring import KeyRing, unpack_ring
from coatcheck.core.ports import Standing
from coatcheck.places import ClientPlace
from coatcheck.server.audit import AuditLog
from coatcheck.server.cli.output import moment
from coatcheck.server.cli.token import why_refused
from coatcheck.server.clients import Clients
from coatcheck.server.database import open_database
from coatcheck.system import REAL, System
from coatcheck.testing import FakeSystem
from tests.server.command_parts import COMMAND, answer, call, clean_environment, refused, run, serving
from tests.servers.valkey import ValkeySingle

DATABASE = Path(".coatcheck/coatcheck.db")
STORE = f"sqlite:///{DATABASE}"
NO_RING = "no key ring yet: no server with a token profile has used this store"
ISSUER = "https://id.example"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working directory with a database and a server key, and no setting from outside; loggers are as before."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("COATCHECK_"):
            monkeypatch.delenv(name)
    logger = logging.getLogger("coatcheck")
    level = logger.level
    answer("migrate")
    answer("client", "list")
    yield
    logger.setLevel(level)


@contextmanager
def server(
    store: str = STORE,
    system: System = REAL,
    server_key: bytes | None = None,
    namespace: str = "coatcheck",
    **more: Any,
) -> Iterator[Coatcheck]:
    """What hands out tokens: a server with a token profile."""
    settings = Settings(
        public_url=ISSUER,
        namespace=namespace,
        idle_timeout=timedelta(days=7),
        absolute_timeout=timedelta(days=30),
        server_key=server_key or Path(".coatcheck/server.key").read_bytes(),
        tokens=TokenSettings(audiences=("orders",), **more),
    )
    with Coatcheck(store, settings=settings, system=system) as coat:
        yield coat


def issue(coat: Coatcheck, *, audience: str | None = None, **more: Any) -> IssuedTokens:
    session = coat.session(None, place=ClientPlace(address="203.0.113.7"))
    session.login("50", **more)
    return session.tokens(audience=audience, carrier="body")


def issued(**more: Any) -> IssuedTokens:
    with server() as coat:
        return issue(coat, **more)


def ring() -> KeyRing:
    with sqlite3.connect(DATABASE) as connection:
        rows = connection.execute("select packed from coatcheck_ring").fetchall()
    connection.close()
    return unpack_ring(rows[0][0]) if rows else KeyRing()


def audited() -> list[str]:
    async def read() -> list[str]:
        database = open_database(STORE)
        await database.open()
        try:
            return [str(entry.envelope["type"]) for entry in await AuditLog(database).read(limit=1000)]
        finally:
            await database.close()

    return asyncio.run(read())


def changed(token: str, part: int, **members: object) -> str:
    """The token with other members in its header (0) or claims (1), and its old signature."""
    parts = token.split(".")
    raw = json.loads(urlsafe_b64decode(parts[part] + "=="))
    parts[part] = urlsafe_b64encode(json.dumps({**raw, **members}).encode()).decode().rstrip("=")
    return ".".join(parts)


def flipped(token: str, at: int) -> str:
    return f"{token[:at]}{'A' if token[at] != 'A' else 'B'}{token[at + 1 :]}"


# -- without a ring ------------------------------------------------------------------------------------------------


def test_before_the_first_ring_looking_says_so_and_makes_none() -> None:
    listed = run("key", "list")
    assert (listed.exit_code, listed.stdout, listed.stderr) == (0, "", f"{NO_RING}\n")
    assert answer("key", "list") == {"keys": []}
    for words in (("key", "retire", "x", "--yes"), ("token", "inspect"), ("token", "deny")):
        assert refused(*words, stdin="a.b.c", status=1) == f"coatcheck: {NO_RING}"
    assert ring() == KeyRing()


@pytest.mark.parametrize(
    "words", [("key", "list"), ("key", "rotate"), ("token", "inspect", "x"), ("client", "add", "x"), ("client", "list")]
)
def test_in_a_wrong_directory_nothing_looks_empty_and_nothing_is_made(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "--home or --database" in refused(*words)
    assert list(Path.cwd().iterdir()) == []


def test_a_store_file_that_is_not_there_is_not_made_by_looking() -> None:
    assert "--store" in refused("key", "list", "--store", "sqlite:///other.db")
    assert not Path("other.db").exists()


# -- key -----------------------------------------------------------------------------------------------------------


def test_the_first_rotation_makes_a_key_that_signs_at_once_and_the_next_one_waits() -> None:
    first = answer("key", "rotate")["key"]
    assert (first["algorithm"], first["state"], first["verifies_until"]) == ("ES256", "signing", None)
    second = answer("key", "rotate")["key"]
    assert second["state"] == "published"
    assert second["signs_at"] - second["published_at"] == int(TokenSettings().publish_ahead.total_seconds())
    assert [each["kid"] for each in answer("key", "list")["keys"]] == [second["kid"], first["kid"]]
    assert second["kid"] in refused("key", "rotate", status=1)
    assert len(ring().keys) == 2
    assert audited() == ["key.published", "key.published"]


def test_a_list_of_keys_tells_times_and_states_and_no_private_byte() -> None:
    with server() as coat:
        made = issue(coat)
    (key,) = ring().keys
    shown = run("key", "list")
    heads, line = shown.stdout.splitlines()
    assert heads.split("  ")[0] == "KID"
    assert line.split()[:3] == [key.kid, "ES256", "signing"]
    assert line.count(moment(key.signs_at)) == 2
    as_json = run("key", "list", "--json").stdout
    assert json.loads(as_json)["keys"][0].keys() == {
        "kid", "algorithm", "state", "published_at", "signs_at", "verifies_until"
    }  # fmt: skip
    for output in (shown.output, as_json):
        assert key.sealed.hex() not in output
        assert urlsafe_b64encode(key.sealed).decode()[:20] not in output
        assert "sealed" not in output
        assert made.access_token not in output


@pytest.mark.parametrize("algorithm", ["HS256", "EdDSA"])
def test_a_verb_without_the_servers_flags_leaves_a_ring_of_another_algorithm_as_it_is(algorithm: Any) -> None:
    # The server was started with --token-algorithm; this command knows nothing of it.
    with server(algorithm=algorithm, access_lifetime=timedelta(minutes=5)) as coat:
        token = issue(coat).access_token
        before = ring()
        answer("key", "list")
        assert answer("token", "inspect", stdin=token)["accepted"] is True
        answer("token", "deny", stdin=issue(coat).access_token)
        assert ring() == before
        assert answer("key", "rotate")["key"]["algorithm"] == algorithm
        assert {each.algorithm for each in ring().keys} == {algorithm}
        assert ring().longest == 300
        assert coat.verify(token).subject == "50"


def test_a_rotation_never_mixes_kinds_of_keys() -> None:
    issued()
    before = ring()
    assert "HS256" in refused("key", "rotate", "--token-algorithm", "HS256")
    assert ring() == before
    assert answer("key", "rotate", "--token-algorithm", "EdDSA")["key"]["algorithm"] == "EdDSA"


@pytest.mark.parametrize("profile", ["admin", "b2c"])
def test_the_profile_and_timeouts_of_the_settings_do_not_matter(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COATCHECK_PROFILE", profile)
    monkeypatch.setenv("COATCHECK_ABSOLUTE_TIMEOUT", "604800" if profile == "b2c" else "3600")
    token = issued().access_token
    assert answer("key", "rotate")["key"]["state"] == "published"
    assert answer("token", "inspect", stdin=token)["accepted"] is True
    assert len(answer("key", "list")["keys"]) == 2


def test_a_leaked_key_is_withdrawn_at_once_and_its_tokens_with_it() -> None:
    with server() as coat:
        token = issue(coat).access_token
        (old,) = ring().keys
        heir = answer("key", "retire", old.kid, "--yes")["signing"]
        (only,) = ring().keys
        assert (only.kid, only.kid == old.kid) == (heir, False)
        told = run("token", "inspect", stdin=token)
        assert (told.exit_code, told.stdout.count("\n")) == (1, 1)
        assert "withdrawn" in told.stdout
        with sqlite3.connect(DATABASE) as connection:
            rows = connection.execute("select kind, id from coatcheck_denials").fetchall()
        connection.close()
        assert ("kid", old.kid) in rows
    with server() as coat, pytest.raises(TokenInvalid):
        coat.verify(token)
    assert "key.withdrawn" in audited()


def test_withdrawing_a_key_asks_first_and_means_exactly_one_key() -> None:
    issued()
    (key,) = ring().keys
    line = refused("key", "retire", key.kid)
    assert "--yes" in line
    assert "refused" in line
    assert "--yes" in refused("key", "retire", key.kid, "--json")
    for wrong in (key.kid[:-1], "nope", "\x1b[2J"):
        assert "no key of the ring" in refused("key", "retire", "--yes", "--", wrong)
    for words in (("--yes",), (key.kid, "--all", "--yes")):
        result = run("key", "retire", *words)
        assert (result.exit_code, "exactly one of KID and --all" in result.stderr) == (2, True)
    assert [each.kid for each in ring().keys] == [key.kid]


def test_keys_of_a_servers_memory_are_out_of_reach() -> None:
    assert "memory" in run("key", "list", "--store", "memory:").stderr
    result = run("key", "rotate", "--store", "memory:")
    assert result.exit_code == 2
    assert "memory" in result.stderr


# -- token inspect -------------------------------------------------------------------------------------------------


def test_an_accepted_token_is_told_whole_and_never_repeated() -> None:
    token = issued(claims={"role": "admin"}, scopes=("read",), amr=("pwd",), acr="2", audience="orders").access_token
    told = answer("token", "inspect", stdin=f"  {token}\n")
    assert (told["accepted"], told["why"], told["ours"], told["standing"]) == (True, [], True, None)
    assert (told["issuer"], told["subject"], told["audience"]) == (ISSUER, "50", ["orders"])
    assert (told["claims"], told["scopes"], told["amr"], told["acr"]) == ({"role": "admin"}, ["read"], ["pwd"], "2")
    assert told["expires_at"] - told["issued_at"] == 900
    assert told["kid"] == ring().keys[0].kid
    plain = run("token", "inspect", token)
    assert plain.exit_code == 0
    assert "accepted now:  yes" in plain.stdout
    assert 'claim role:    "admin"' in plain.stdout
    for output in (plain.output, json.dumps(told)):
        for part in token.split("."):
            assert part not in output


@pytest.mark.parametrize("words", [(), ("-",)])
def test_a_token_comes_by_standard_input(words: tuple[str, ...]) -> None:
    assert answer("token", "inspect", *words, stdin=issued().access_token)["accepted"] is True
    assert "standard input" in refused("token", "inspect", *words, stdin=" \n")


def test_help_says_who_can_see_an_argument() -> None:
    for verb in ("inspect", "deny"):
        assert "everybody on this machine" in run("token", verb, "--help").output


def test_a_token_is_not_repeated_when_there_is_a_word_too_many() -> None:
    for verb in ("inspect", "deny"):
        result = run("token", verb, "Bearer", "eyJhbGciOi.secret.secret")
        assert result.exit_code == 2
        assert "secret" not in result.output


def test_an_expired_token_says_when_and_that_is_status_1() -> None:
    past = FakeSystem(start_us=(int(time.time()) - 1000) * 1_000_000)
    with server(system=past) as coat:
        token = issue(coat).access_token
    told = answer("token", "inspect", stdin=token, status=1)
    assert (told["ours"], told["expired"], told["standing"]) == (True, True, None)
    assert "expired at" in run("token", "inspect", stdin=token).stdout


def test_a_token_of_an_ended_session_says_why() -> None:
    with server() as coat:
        made = issue(coat)
        coat.revoke_session(made.sid, reason="stolen laptop")
    told = answer("token", "inspect", stdin=made.access_token, status=1)
    assert told["standing"] == "stolen laptop"
    assert "its session ended at" in told["why"][0]


def test_a_token_of_another_issuer_than_the_public_url_would_not_be_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    token = issued().access_token
    monkeypatch.setenv("COATCHECK_PUBLIC_URL", ISSUER)
    assert answer("token", "inspect", stdin=token)["accepted"] is True
    monkeypatch.setenv("COATCHECK_PUBLIC_URL", "https://other.example")
    assert "https://other.example" in answer("token", "inspect", stdin=token, status=1)["why"][0]


FOUND = AccessToken(
    issuer=ISSUER,
    subject="50",
    audience=(ISSUER,),
    client_id="first-party",
    id="x",
    sid="y",
    issued_at=1000,
    expires_at=1900,
    scopes=(),
    auth_time=1000.0,
    acr=None,
    amr=(),
    claims={},
)


@pytest.mark.parametrize(
    ("now", "why", "issuer", "reasons"),
    [
        (1000, None, None, 0),
        (999.999999, None, None, 1),
        (1899.999999, None, None, 0),
        (1900, None, None, 1),
        (1500, "denied", None, 1),
        (1900, "logout", None, 2),
        (1500, None, ISSUER, 0),
        (1900, "unknown", "https://other.example", 3),
    ],
)
def test_every_reason_is_told_exactly_at_its_limit(
    now: float, why: str | None, issuer: str | None, reasons: int
) -> None:
    standing = Standing(why=why, at_us=0, now_us=0)
    assert len(why_refused(FOUND, standing, issuer=issuer, now=now)) == reasons


def test_a_session_of_another_store_vouches_for_nothing() -> None:
    assert "none of this store" in why_refused(FOUND, None, issuer=None, now=1500)[0]


def test_forged_and_foreign_texts_get_one_line_and_nothing_of_them_is_told() -> None:
    token = issued(claims={"role": "user"}).access_token
    header, payload, signature = token.split(".")
    hostile = {
        "changed claims": changed(token, 1, role="admin"),
        "alg none": f"{changed(token, 0, alg='none').split('.')[0]}.{payload}.",
        "an algorithm that is not the key's": changed(token, 0, alg="HS256"),
        "a key of its own": changed(token, 0, jwk={"kty": "oct", "k": "AA"}),
        "an unknown key": changed(token, 0, kid="nope"),
        "no text for a kid": changed(token, 0, kid=7),
        "a changed signature": flipped(token, len(token) - 10),
        "cut off": token[:-1],
        "padded": f"{token}==",
        "two of them": f"{token}\n{token}",
        "claims that are no JSON": f"{header}.{'A' * 40}.{signature}",
        "claims that are deep": f"{header}.{urlsafe_b64encode(b'[' * 3000).decode().rstrip('=')}.{signature}",
        "an odd letter": f"{header}.A.{signature}",
        "no claims": f"{header}..{signature}",
        "an audience that is no text": changed(token, 1, aud=[None, {}, ""], iss=7, iat="x"),
        "a huge number": changed(token, 1, iat=10**400),
        "too long": "a." * 5000,
        "longer than is read": "a" * 100_000,
        "words": "sesame open",
        "letters": "민수.민수.민수",
        "88 characters": "A" * 88,
        "control characters": "\x1b[2J.\x1b[2J.x",
    }
    for name, text in hostile.items():
        result = run("token", "inspect", stdin=text)
        assert (result.exit_code, result.stdout.count("\n"), result.stderr) == (1, 1, ""), (name, result.output)
        assert result.stdout.startswith("nothing more can be told of it: "), name
        assert "\x1b" not in result.stdout
        assert "admin" not in result.stdout
        told = answer("token", "inspect", stdin=text, status=1)
        assert (told["ours"], told["accepted"], len(told["why"])) == (False, False, 1), name
        assert told.keys() == {"ours", "accepted", "why"}


def test_bytes_that_are_no_text_are_no_token() -> None:
    issued()
    assert run("token", "inspect", stdin=b"\xff\xfe.\xff.\x00").exit_code == 1
    assert "no access token of ours" in refused("token", "deny", stdin=b"\xff\xfe.\xff.\x00")


def test_a_refresh_token_tells_its_session_and_generation_and_is_not_spent() -> None:
    with server() as coat:
        made = issue(coat)
        assert made.refresh_token is not None
        expected = {
            "kind": "refresh",
            "ours": True,
            "accepted": None,
            "why": [],
            "sid": made.sid,
            "generation": 1,
        }
        told = answer("token", "inspect", stdin=made.refresh_token)
        assert told == answer("token", "inspect", stdin=made.refresh_token) == expected
        plain = run("token", "inspect", stdin=made.refresh_token)
        assert plain.exit_code == 0
        for output in (plain.output, json.dumps(told)):
            assert made.refresh_token not in output
            assert made.refresh_token[20:28] not in output
        assert coat.refresh(made.refresh_token).sid == made.sid
        coat.revoke_session(made.sid, reason="logout")
        ended = answer("token", "inspect", stdin=made.refresh_token, status=1)
        assert (ended["accepted"], ended["sid"]) == (False, made.sid)
        assert "logout" in ended["why"][0]
        for at in (0, 1, 10, 23, 30, 87):
            forged = answer("token", "inspect", stdin=flipped(made.refresh_token, at), status=1)
            assert (forged["ours"], "sid" in forged) == (False, False)


# -- token deny ----------------------------------------------------------------------------------------------------


def test_a_denied_token_is_refused_until_it_has_expired_and_its_session_goes_on() -> None:
    with server() as coat:
        made = issue(coat)
        found = coat.verify(made.access_token)
        told = answer("token", "deny", stdin=made.access_token)
        assert told == {"jti": found.id, "denied": True, "until": found.expires_at + MAX_LEEWAY}
        with pytest.raises(TokenInvalid):
            coat.verify(made.access_token)
        assert made.refresh_token is not None
        assert coat.verify(coat.refresh(made.refresh_token).access_token).sid == made.sid
    assert answer("token", "inspect", stdin=made.access_token, status=1)["why"] == ["it was denied"]
    assert "token.denied" in audited()
    again = run("token", "deny", made.access_token)
    assert again.exit_code == 0
    assert found.id in again.stdout
    assert made.access_token not in again.output


def test_a_token_is_denied_by_its_name_for_as_long_as_any_token_lives() -> None:
    with server(access_lifetime=timedelta(hours=2)) as coat:
        made = issue(coat)
        jti = coat.verify(made.access_token).id
        told = answer("token", "deny", jti)
        assert told["until"] >= made.expires_at + MAX_LEEWAY
        with pytest.raises(TokenInvalid):
            coat.verify(made.access_token)


def test_a_token_of_another_audience_is_denied_too() -> None:
    assert answer("token", "deny", stdin=issued(audience="orders").access_token)["denied"] is True


def test_what_has_expired_everywhere_needs_no_denial() -> None:
    past = FakeSystem(start_us=(int(time.time()) - 900 - MAX_LEEWAY - 1) * 1_000_000)
    with server(system=past) as coat:
        token = issue(coat).access_token
    result = run("token", "deny", stdin=token)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "nothing to deny" in result.stderr
    assert "token.denied" not in audited()


def test_what_is_no_access_token_of_ours_is_not_denied() -> None:
    made = issued()
    assert made.refresh_token is not None
    line = refused("token", "deny", stdin=made.refresh_token)
    assert f"coatcheck session revoke {made.sid}" in line
    for wrong in (changed(made.access_token, 1, sub="51"), "nope", new_jti(7, bytes(15))[:-1], "b" * 24, made.sid):
        line = refused("token", "deny", stdin=wrong)
        assert "no access token of ours" in line
        assert wrong not in line
    assert "token.denied" not in audited()


# -- client --------------------------------------------------------------------------------------------------------


def test_a_credential_is_shown_once_alone_on_standard_output() -> None:
    added = run("client", "add", "orders")
    assert added.exit_code == 0
    credential = added.stdout.removesuffix("\n")
    assert len(credential) == 44
    assert "feed_credential" in added.stderr
    assert credential not in added.stderr
    listed = run("client", "list")
    assert listed.stdout.splitlines()[1].startswith("orders ")
    for output in (listed.output, run("client", "list", "--json").output, run("client", "add", "orders").output):
        assert credential not in output
    assert found(credential) == "orders"
    other = answer("client", "add", "billing")["feed_credential"]
    assert other != credential
    assert [each["name"] for each in answer("client", "list")["clients"]] == ["billing", "orders"]
    assert answer("client", "remove", "orders") == {"removed": "orders"}
    assert (found(credential), found(other)) == (None, "billing")


def found(credential: str) -> str | None:
    async def look() -> str | None:
        database = open_database(STORE)
        await database.open()
        try:
            client = await Clients(database, system=REAL).find(credential)
        finally:
            await database.close()
        return None if client is None else client.name

    return asyncio.run(look())


def test_clients_that_cannot_be_are_refused() -> None:
    answer("client", "add", "orders")
    assert "taken" in refused("client", "add", "orders")
    for name in ("", "two words", "a" * 65, "\x1b[31mred", "-"):
        refused("client", "add", "--", name)
    assert "no client has the name" in refused("client", "remove", "billing", status=1)
    assert len(answer("client", "list")["clients"]) == 1


def test_an_empty_list_of_clients_says_what_to_do() -> None:
    result = run("client", "list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "client add" in result.stderr


# -- a terminal and a server ---------------------------------------------------------------------------------------


def typed(*words: str, line: str) -> tuple[int, str]:
    """A command on a terminal where somebody types one line at the first question; what the terminal showed."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [*COMMAND, *words], env=clean_environment(), stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    shown, waiting = b"", [line]
    # A terminal whose other end was closed says so by an error.
    with suppress(OSError):
        while piece := os.read(ours, 4096):
            shown += piece
            if waiting and shown.rstrip(b" ").endswith(b":"):
                os.write(ours, waiting.pop().encode() + b"\n")
    os.close(ours)
    return child.wait(timeout=30), shown.decode()


def test_a_terminal_is_asked_before_a_key_is_withdrawn() -> None:
    issued()
    (key,) = ring().keys
    status, shown = typed("key", "retire", key.kid, line="n")
    assert status == 1
    assert "refused, here and at every verifier; clients refresh" in shown
    assert [each.kid for each in ring().keys] == [key.kid]
    status, shown = typed("key", "retire", key.kid, line="y")
    assert status == 0, shown
    assert key.kid not in [each.kid for each in ring().keys]


def test_a_token_typed_on_a_terminal_is_not_shown() -> None:
    token = issued().access_token
    status, shown = typed("token", "inspect", line=token)
    assert status == 0, shown
    assert token.split(".")[2] not in shown


def test_a_running_server_and_the_commands_mean_the_same_keys_clients_and_denials(tmp_path: Path) -> None:
    with serving("--profile", "b2c", "--token-algorithm", "EdDSA", directory=tmp_path) as running:
        _, published, _ = call(running.address, "/.well-known/jwks.json")
        (key,) = answer("key", "list")["keys"]
        assert (key["kid"], key["algorithm"]) == (published["keys"][0]["kid"], "EdDSA")
        credential = answer("client", "add", "orders")["feed_credential"]
        bearer = {"authorization": f"Bearer {credential}"}
        assert call(running.address, "/revocations")[0] == 401
        jti = new_jti(7, bytes(15))
        answer("token", "deny", jti)
        status, page, _ = call(running.address, "/revocations", headers=bearer)
        assert status == 200
        assert jti in json.dumps(page)
        answer("client", "remove", "orders")
        assert call(running.address, "/revocations", headers=bearer)[0] == 401


# -- a shared store ------------------------------------------------------------------------------------------------


@pytest.mark.servers
def test_on_a_shared_store_the_servers_key_is_needed_for_what_is_sealed_and_for_nothing_else(
    valkey_single: ValkeySingle, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--store", valkey_single.url, "--namespace", namespace)
    Path("server.key").write_text(run("key", "new").stdout)
    monkeypatch.setenv("COATCHECK_SERVER_KEY_FILE", "server.key")
    answer("migrate", *flags)
    with server(
        valkey_single.url, server_key=bytes.fromhex(Path("server.key").read_text()), namespace=namespace
    ) as coat:
        made = issue(coat)
        assert answer("token", "inspect", *flags, stdin=made.access_token)["accepted"] is True
        monkeypatch.delenv("COATCHECK_SERVER_KEY_FILE")
        (key,) = answer("key", "list", *flags)["keys"]
        assert key["state"] == "signing"
        for words in (("token", "inspect"), ("key", "rotate"), ("key", "retire", key["kid"], "--yes")):
            line = refused(*words, *flags, stdin=made.access_token)
            assert "server_key" in line
        jti = coat.verify(made.access_token).id
        # In an emergency, the name of a token is enough.
        assert answer("token", "deny", jti, *flags)["denied"] is True
        with pytest.raises(TokenInvalid):
            coat.verify(made.access_token)
        Path("server.key").write_text(run("key", "new").stdout)
        monkeypatch.setenv("COATCHECK_SERVER_KEY_FILE", "server.key")
        assert "another server key" in refused("token", "inspect", *flags, stdin=made.access_token)
        # The way out when the server key is lost: every signing key goes, and nothing has to be opened for it.
        monkeypatch.delenv("COATCHECK_SERVER_KEY_FILE")
        assert "--yes" in refused("key", "retire", "--all", *flags)
        assert answer("key", "retire", "--all", "--yes", *flags)["retired"] == [key["kid"]]
        assert answer("key", "list", *flags)["keys"] == []
        assert "no key ring" in run("key", "retire", "--all", "--yes", *flags).stderr
    with server(valkey_single.url, server_key=b"n" * 32, namespace=namespace) as coat:
        assert coat.verify(issue(coat).access_token).subject
        with pytest.raises(TokenInvalid):
            coat.verify(made.access_token)
