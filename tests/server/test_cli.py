# ruff: noqa: S104 - 0.0.0.0 is here to be refused

from __future__ import annotations

import asyncio
import json
import logging
import os
import pty
import re
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import click
import pytest

from coatcheck import __version__
from coatcheck.server.audit import AuditLog
from coatcheck.server.cli.config import redacted
from coatcheck.server.cli.output import printable, table
from coatcheck.server.cli.root import VERBS, coatcheck
from coatcheck.server.database import open_database
from coatcheck.server.settings import SECRETS
from coatcheck.settings import parse_server_key
from tests.server.command_parts import (
    COMMAND,
    OTHER_PASSWORD,
    PASSWORD,
    answer,
    clean_environment,
    process,
    refused,
    run,
    sign_in,
)
from tests.servers.valkey import ValkeySingle

STORE = "sqlite:///.coatcheck/coatcheck.db"
SERVER = ["0001_accounts", "0002_clients", "0003_audit_subject", "0004_risk_history"]
SESSIONS = ["0001_sessions", "0002_tokens"]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test has an empty working directory and no setting from outside; loggers are as before."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("COATCHECK_"):
            monkeypatch.delenv(name)
    logger = logging.getLogger("coatcheck")
    level = logger.level
    yield
    logger.setLevel(level)


def add(name: str = "minsu", *more: str) -> str:
    made = answer("user", "add", name, "--password-stdin", *more, stdin=f"{PASSWORD}\n")
    return str(made["user"]["id"])


def events() -> list[dict[str, object]]:
    async def read() -> list[dict[str, object]]:
        database = open_database(STORE)
        await database.open()
        try:
            return [dict(entry.envelope) for entry in await AuditLog(database).read(limit=1000)]
        finally:
            await database.close()

    return asyncio.run(read())


def leaves(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from leaves(below, (*path, name))
    else:
        yield path, command


# -- the whole -----------------------------------------------------------------------------------------------------


def test_help_loads_nothing_but_click() -> None:
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "from coatcheck.server.cli import main\n"
        "sys.argv = ['coatcheck', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "roots = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(roots - sys.stdlib_module_names), file=sys.stderr)\n"
        "print('asyncio' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert "Commands:" in done.stdout
    assert done.stderr.splitlines() == ["['click', 'coatcheck']", "False"]


def test_without_click_the_command_line_names_the_extra_that_brings_it() -> None:
    code = (
        "import sys\n"
        "sys.modules['click'] = None\n"
        "import importlib.abc\n"
        "class Missing(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'click': raise ModuleNotFoundError('no click', name='click')\n"
        "del sys.modules['click']\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from coatcheck.server.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 2
    assert done.stderr == "coatcheck: the command line needs its parts: pip install 'coatcheck[server]'\n"


def test_every_verb_has_json_and_help_and_no_flag_for_a_secret() -> None:
    found = dict(leaves(coatcheck))
    assert {path[0] for path in found} == set(VERBS)
    for path, command in found.items():
        flags = {spelling for parameter in command.params for spelling in parameter.opts}
        assert "--json" in flags, path
        assert not flags & {f"--{name.replace('_', '-')}" for name in SECRETS} | flags & {"--password"}, path
        helped = run(*path, "--help")
        assert helped.exit_code == 0
        assert command.help


@pytest.mark.parametrize("verb", ["import", "lab"])
def test_verbs_that_are_not_built_are_absent(verb: str) -> None:
    assert run(verb).exit_code == 2
    assert f"  {verb} " not in run("--help").output


@pytest.mark.parametrize(
    "words", [("nope",), ("user",), ("user", "add"), ("serve", "--nope"), ("session", "revoke"), ("user", "list", "x")]
)
def test_words_that_mean_nothing_end_with_status_2(words: tuple[str, ...]) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_version_is_said_in_three_ways() -> None:
    assert run("version").stdout == run("--version").stdout == f"coatcheck {__version__}\n"
    assert answer("version")["coatcheck"] == __version__


def test_a_missing_database_is_an_error_and_makes_nothing() -> None:
    for words in (("user", "list"), ("session", "list"), ("user", "disable", "minsu"), ("session", "revoke", "x")):
        assert "--home or --database" in refused(*words)
    assert list(Path.cwd().iterdir()) == []


def test_a_database_that_does_not_answer_is_one_line_and_status_1(tmp_path: Path) -> None:
    done = process("user", "list", "--database", "postgresql://minsu:sesame@127.0.0.1:1/x", directory=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = [each for each in done.stderr.splitlines() if each.startswith("coatcheck: ")]
    assert "coatcheck doctor" in line
    assert "Traceback" not in done.stderr
    assert "sesame" not in done.stderr


def test_a_file_that_is_no_database_is_one_line() -> None:
    Path("x.db").write_text("this is a letter and no database, whatever its name says\n" * 20)
    assert "x.db" in refused("user", "list", "--database", "sqlite:///x.db", status=1)


def test_a_work_that_leaves_no_trace_in_the_audit_log_does_not_end_well() -> None:
    add()
    with sqlite3.connect(".coatcheck/coatcheck.db") as connection:
        connection.execute("drop table coatcheck_audit")
    connection.close()
    line = refused("user", "add", "yuna", "--password-stdin", stdin=PASSWORD, status=1)
    assert "audit log" in line
    assert [each["name"] for each in answer("user", "list")["users"]] == ["minsu", "yuna"]


# -- user ----------------------------------------------------------------------------------------------------------


def test_a_user_is_added_once_whatever_the_spelling() -> None:
    result = run("user", "add", "minsu", "--role", "admin", "--password-stdin", stdin=f"{PASSWORD}\r\n")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "added minsu (admin)\n", "")
    assert stat.S_IMODE(Path(".coatcheck").stat().st_mode) == 0o700
    assert "already" in refused("user", "add", "MINSU", "--password-stdin", stdin=PASSWORD, status=1)
    (only,) = answer("user", "list")["users"]
    assert (only["name"], only["role"], only["disabled"], only["failures"]) == ("minsu", "admin", False, 0)
    assert events()[-1]["type"] == "account.created"
    assert events()[-1]["data"] == {"role": "admin", "by": "command_line"}


@pytest.mark.parametrize("name", ["", " ", "two words", "a" * 129, "line\nfeed", "\x1b[31mred", "zero\u200bwidth"])
def test_a_name_that_cannot_be_had_is_refused_before_anything_is_made(name: str) -> None:
    refused("user", "add", "--password-stdin", "--", name, stdin=PASSWORD)
    assert not Path(".coatcheck").exists()


@pytest.mark.parametrize(
    ("stdin", "told"),
    [
        ("", "nothing else"),
        ("\n", "nothing else"),
        (f"{PASSWORD}\n{PASSWORD}\n", "nothing else"),
        (b"\xff" * 20, "UTF-8"),
        ("a" * 16385, "too long"),
        ("short", "at least 15"),
        ("a" * 1025, "at most 1024"),
        ("aaaaaaaaaaaaaaaaaaaa", "repeats"),
        ("minsuminsuminsu1234", "name"),
    ],
)
def test_a_password_that_cannot_be_had_is_refused_with_its_reason(stdin: str | bytes, told: str) -> None:
    assert told in refused("user", "add", "minsu", "--password-stdin", stdin=stdin)
    assert run("user", "list").stdout == ""


def test_without_a_terminal_the_password_must_come_by_password_stdin() -> None:
    add()
    assert "--password-stdin" in refused("user", "add", "yuna")
    assert "--password-stdin" in refused("user", "password", "minsu")


def test_a_terminal_is_asked_twice_and_shows_nothing(tmp_path: Path) -> None:
    def typed(*lines: str) -> tuple[int, str]:
        ours, theirs = pty.openpty()
        child = subprocess.Popen(
            [*COMMAND, "user", "add", "minsu"],
            cwd=tmp_path,
            env=clean_environment(),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        shown, waiting = b"", list(lines)
        # A terminal whose other end was closed says so by an error.
        with suppress(OSError):
            while piece := os.read(ours, 4096):
                shown += piece
                if waiting and shown.rstrip(b" ").endswith(b":"):
                    os.write(ours, waiting.pop(0).encode() + b"\n")
                    shown += b"|"
        os.close(ours)
        return child.wait(timeout=30), shown.decode()

    status, shown = typed(PASSWORD, OTHER_PASSWORD, PASSWORD, PASSWORD)
    assert status == 0, shown
    assert "do not match" in shown
    assert "added minsu" in shown
    assert PASSWORD not in shown
    assert OTHER_PASSWORD not in shown


def test_disabling_ends_all_sessions_of_that_user_and_says_how_many() -> None:
    minsu, yuna = add("minsu"), add("yuna")
    for subject in (minsu, minsu, yuna):
        sign_in(STORE, subject)
    result = run("user", "disable", "Minsu")
    assert result.stdout == "disabled minsu; 2 sessions ended\n"
    assert [each["user"] for each in answer("session", "list")["sessions"]] == ["yuna"]
    assert [each["type"] for each in events()][-3:] == ["account.disabled", "session.ended", "session.ended"]
    assert answer("user", "disable", "minsu")["ended"] == 0
    assert "disabled" in run("user", "list").stdout
    assert answer("user", "enable", "minsu")["user"]["disabled"] is False


def test_unlocking_clears_the_failures() -> None:
    add()
    with sqlite3.connect(".coatcheck/coatcheck.db") as connection:
        connection.execute("update coatcheck_users set failures = 101")
    connection.close()
    assert answer("user", "list")["users"][0]["failures"] == 101
    assert answer("user", "unlock", "minsu")["user"]["failures"] == 0


def test_a_new_password_ends_all_sessions() -> None:
    sign_in(STORE, add())
    before = answer("user", "list")["users"][0]["password_changed_at"]
    result = run("user", "password", "minsu", "--password-stdin", stdin=OTHER_PASSWORD)
    assert result.stdout == "minsu has a new password; 1 session ended\n"
    assert answer("user", "list")["users"][0]["password_changed_at"] > before
    assert "account.password_changed" in [each["type"] for each in events()]
    assert "at least 15" in refused("user", "password", "minsu", "--password-stdin", stdin="short")


@pytest.mark.parametrize("verb", ["disable", "enable", "unlock", "password"])
def test_a_name_nobody_has_is_status_1(verb: str) -> None:
    add()
    more = ("--password-stdin",) if verb == "password" else ()
    assert "nobody has the name yuna" in refused("user", verb, "yuna", *more, stdin=PASSWORD, status=1)


def test_an_empty_list_says_what_to_do_and_prints_no_data() -> None:
    run("migrate")
    result = run("user", "list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "set-up link" in result.stderr
    assert answer("user", "list") == {"users": []}


# -- session -------------------------------------------------------------------------------------------------------


def test_a_list_of_sessions_never_holds_an_id_nor_what_a_browser_made_up() -> None:
    sid, secret = sign_in(STORE, add(), user_agent="evil\x1b[2J Firefox/1.0 (Windows NT 10.0)")
    shown = run("session", "list")
    assert sid in shown.stdout
    assert "minsu" in shown.stdout
    assert "203.0.113.7" in shown.stdout
    as_json = run("session", "list", "--json").stdout
    for output in (shown.output, as_json):
        assert secret not in output
        assert "\x1b" not in output
    assert json.loads(as_json)["sessions"][0]["user"] == "minsu"


def test_a_list_can_be_of_one_user_and_says_when_there_is_more() -> None:
    minsu, yuna = add("minsu"), add("yuna")
    for subject in (minsu, yuna, yuna):
        sign_in(STORE, subject)
    assert {each["user"] for each in answer("session", "list", "--user", "yuna")["sessions"]} == {"yuna"}
    cut = run("session", "list", "--limit", "2")
    assert "more than 2" in cut.stderr
    whole = answer("session", "list", "--limit", "3")
    assert (len(whole["sessions"]), whole["more"]) == (3, False)
    assert "nobody has the name" in refused("session", "list", "--user", "nobody", status=1)


def test_one_session_is_ended_by_its_handle_and_ending_it_again_is_fine() -> None:
    subject = add()
    sid, _ = sign_in(STORE, subject)
    kept, _ = sign_in(STORE, subject)
    assert answer("session", "revoke", sid, "--reason", "stolen laptop") == {"ended": 1}
    assert [each["sid"] for each in answer("session", "list")["sessions"]] == [kept]
    assert run("session", "revoke", sid).stdout == "0 sessions ended\n"
    assert events()[-1]["sid"] == sid
    assert events()[-1]["data"] == {"reason": "stolen laptop"}


def test_a_mistyped_handle_does_not_look_like_an_ended_session() -> None:
    sid, _ = sign_in(STORE, add())
    for wrong in ("x", sid[:-1], f"{sid[:-1]}{'a' if sid[-1] != 'a' else 'b'}"):
        assert "no session of this store" in refused("session", "revoke", wrong)


def test_all_sessions_of_a_user_or_of_everybody_are_ended() -> None:
    minsu, yuna = add("minsu"), add("yuna")
    for subject in (minsu, minsu, yuna):
        sign_in(STORE, subject)
    assert answer("session", "revoke", "--user", "minsu") == {"ended": 2}
    assert "--yes" in refused("session", "revoke", "--all")
    assert len(answer("session", "list")["sessions"]) == 1
    assert answer("session", "revoke", "--all", "--yes") == {"ended": 1}
    assert answer("session", "list")["sessions"] == []


def test_a_revoke_means_exactly_one_thing() -> None:
    for words in (("x", "--all"), ("x", "--user", "y"), ("--all", "--user", "y"), ()):
        result = run("session", "revoke", *words)
        assert result.exit_code == 2
        assert "exactly one" in result.stderr


@pytest.mark.parametrize("reason", ["", "a" * 201, "two\nlines"])
def test_a_reason_that_cannot_be_kept_is_refused(reason: str) -> None:
    assert "reason" in refused("session", "revoke", "--all", "--yes", "--reason", reason)


def test_sessions_in_the_servers_memory_are_out_of_reach_and_it_is_said() -> None:
    add()
    result = run("session", "list", "--store", "memory:")
    assert result.exit_code == 0
    assert "memory" in result.stderr


# -- key, migrate, config ------------------------------------------------------------------------------------------


def test_a_new_key_is_a_server_key_and_stands_alone_on_stdout() -> None:
    first, second = run("key", "new"), run("key", "new")
    assert re.fullmatch(r"[0-9a-f]{64}\n", first.stdout)
    assert first.stdout != second.stdout
    assert len(parse_server_key(first.stdout)) == 32
    assert "COATCHECK_SERVER_KEY_FILE" in first.stderr
    parse_server_key(answer("key", "new")["server_key"])


def test_looking_at_a_file_that_is_not_there_lists_everything_and_makes_nothing() -> None:
    looked = run("migrate", "--check")
    assert looked.exit_code == 1
    assert looked.stdout.splitlines() == [
        *(f"server: missing {each}" for each in SERVER),
        *(f"store: missing {each}" for each in SESSIONS),
    ]
    assert run("migrate", "--dry-run").exit_code == 0
    assert list(Path.cwd().iterdir()) == []
    assert answer("migrate") == {"applied": {"server": SERVER, "store": SESSIONS}}
    assert answer("migrate", "--check") == {"missing": {"server": [], "store": []}}
    again = run("migrate")
    assert (again.stdout, again.stderr) == ("", "the database is up to date\n")


def test_store_and_database_in_two_files_are_both_brought_up() -> None:
    flags = ("--store", "sqlite:///sessions.db")
    assert answer("migrate", "--check", *flags, status=1)["missing"]["store"] == SESSIONS
    answer("migrate", *flags)
    assert answer("migrate", "--check", *flags)["missing"] == {"server": [], "store": []}
    assert "does not exist" in refused("migrate", "--store", "sqlite:///no/where.db")


@pytest.mark.servers
def test_postgresql_is_brought_up_by_migrate_alone(postgres_database: str, namespace: str) -> None:
    flags = ("--database", postgres_database, "--namespace", namespace)
    assert "coatcheck migrate" in refused("user", "add", "minsu", "--password-stdin", *flags, stdin=PASSWORD)
    assert answer("migrate", "--check", *flags, status=1)["missing"].keys() == {"server", "store"}
    looked = answer("migrate", "--dry-run", *flags)["missing"]
    assert looked["server"]
    assert looked["store"]
    assert answer("migrate", *flags)["applied"] == looked
    assert answer("migrate", "--check", *flags)["missing"] == {"server": [], "store": []}
    made = answer("user", "add", "minsu", "--password-stdin", *flags, stdin=PASSWORD)
    assert made["user"]["name"] == "minsu"
    assert answer("session", "list", *flags)["sessions"] == []


@pytest.mark.servers
def test_users_in_a_file_and_sessions_in_valkey_work_together(valkey_single: ValkeySingle, namespace: str) -> None:
    flags = ("--store", valkey_single.url, "--namespace", namespace)
    made = answer("user", "add", "minsu", "--password-stdin", *flags, stdin=PASSWORD)
    assert made["user"]["name"] == "minsu"
    assert answer("session", "list", *flags)["sessions"] == []
    assert answer("user", "disable", "minsu", *flags)["ended"] == 0


def test_config_show_tells_values_and_sources_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("coatcheck.toml").write_text('name = "Door"\nmetrics_token = "sesame-1"\n')
    Path("key").write_text("ab" * 32)
    monkeypatch.setenv("COATCHECK_SERVER_KEY_FILE", "key")
    monkeypatch.setenv("COATCHECK_STORE", "redis://:sesame-2@cache:6379/0?password=sesame-3")
    words = ("config", "show", "--database", "postgresql://door:sesame-4@db/x", "--trusted-proxy", "10.0.0.1")
    found = answer(*words)["settings"]
    assert found["name"] == {"value": "Door", "source": "file"}
    assert found["server_key"] == {"value": "(set)", "source": "environment"}
    assert found["metrics_token"] == {"value": "(set)", "source": "file"}
    assert found["database"] == {"value": "postgresql://door:***@db/x", "source": "flag"}
    assert found["store"]["value"] == "redis://:***@cache:6379/0?password=***"
    assert found["trusted_proxies"] == {"value": ["10.0.0.1"], "source": "flag"}
    assert found["port"] == {"value": 8000, "source": "default"}
    for output in (run(*words).output, run(*words, "--json").output):
        assert "sesame" not in output
        assert "abab" not in output


@pytest.mark.parametrize(
    "url",
    [
        "redis://:sesame@cache",
        "redis://sesame@cache",
        "redis+sentinel://:sesame@a:1,b:2/main/0?sentinel_password=sesame",
        "postgresql:///x?password=sesame&sslmode=require",
        "postgresql://door:ses#ame-sesame@db/x",
        "postgresql://door:sesame?x@db/x",
        "postgresql://door:sesame/x@db/x",
        "redis://[sesame",
        "rediss://cache#sesame",
    ],
)
def test_a_url_is_shown_without_its_password(url: str) -> None:
    assert "ses" not in redacted(url).replace("sslmode", "")


@pytest.mark.parametrize("url", ["sqlite:///a@b.db", "memory:", "redis://cache:6379/1", "https://id.example"])
def test_a_url_without_a_password_is_shown_as_it_is(url: str) -> None:
    assert redacted(url) == url


def test_config_check_finds_what_serve_would_refuse_and_makes_nothing() -> None:
    assert answer("config", "check")["status"] == "ok"
    for words in (
        ("--host", "0.0.0.0"),
        ("--idle-timeout", "0"),
        ("--namespace", "A"),
        ("--store", "mysql://x"),
        ("--database", "redis://x"),
        ("--public-url", "https://id.example/path"),
        ("--trusted-origin", "not an origin"),
        ("--store-deadline", "61"),
    ):
        refused("config", "check", *words)
    result = run("config", "check", env={"COATCHECK_SERVER_KEY": "sesame"})
    assert result.exit_code == 2
    assert "sesame" not in result.output
    assert list(Path.cwd().iterdir()) == []


# -- what is printed -----------------------------------------------------------------------------------------------


def test_control_characters_reach_no_terminal() -> None:
    assert printable("a\x1b[2J\nb\u202e") == "a\\x1b[2J\\nb\\u202e"
    assert printable("민수 ok") == "민수 ok"
    assert table(("A", "B"), [("1\n2", "3")]) == ("A     B", "1\\n2  3")
    assert table(("A",), []) == ()
