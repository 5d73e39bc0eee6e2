"""The journal of a node: what it keeps, in which order it is carried out, what is left when a process is killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from coatcheck import Coatcheck, Settings
from coatcheck.blocking import run_blocking
from coatcheck.core.ids import SessionRef
from coatcheck.errors import StoreUnavailable
from coatcheck.journal import MOST, Journal, SignOut
from coatcheck.sign_outs import SignOuts
from coatcheck.stores.open import waits_of

ROOT = Path(__file__).resolve().parents[1]
KEY = b"k" * 32
WAIT = 60.0


def sign_out(number: int, *, at_us: int | None = None, reason: str = "logout") -> SignOut:
    return SignOut(
        ref=SessionRef(number % 65536, f"{number:016d}"), reason=reason, at_us=number if at_us is None else at_us
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A place that does not exist yet."""
    return tmp_path / "home" / "journal"


@pytest.fixture
def journal(directory: Path) -> Journal:
    """An empty journal."""
    return Journal(directory, "app")


def file_of(directory: Path) -> Path:
    (path,) = directory.glob("*.db")
    return path


def execute(directory: Path, statement: str) -> None:
    with closing(sqlite3.connect(file_of(directory))) as connection, connection:
        connection.execute(statement)


def test_what_was_kept_waits_oldest_first_and_whole(journal: Journal) -> None:
    late, early = sign_out(65535, at_us=2, reason="by_user"), sign_out(0, at_us=1)
    journal.add([late])
    journal.add([early])
    assert journal.waiting() == (early, late)


def test_a_journal_that_nobody_used_leaves_no_trace(journal: Journal, directory: Path) -> None:
    assert journal.waiting() == ()
    assert not directory.exists()


def test_the_same_session_waits_once_with_what_was_said_first(journal: Journal) -> None:
    journal.add([sign_out(1, at_us=5), sign_out(1, at_us=6, reason="by_user")])
    journal.add([sign_out(1, at_us=7, reason="by_user")])
    assert journal.waiting() == (sign_out(1, at_us=5),)


def test_what_is_done_waits_no_more_and_the_rest_does(journal: Journal) -> None:
    journal.add([sign_out(1), sign_out(2), sign_out(3)])
    journal.done([sign_out(1), sign_out(3)])
    assert journal.waiting() == (sign_out(2),)
    journal.done([sign_out(1), sign_out(9)])
    assert journal.waiting() == (sign_out(2),)


def test_one_session_can_be_asked_for(journal: Journal) -> None:
    assert not journal.holds(sign_out(1).ref)
    journal.add([sign_out(1)])
    assert journal.holds(sign_out(1).ref)
    assert not journal.holds(sign_out(2).ref)
    journal.done([sign_out(1)])
    assert not journal.holds(sign_out(1).ref)


def test_every_change_changes_the_stamp(journal: Journal, directory: Path) -> None:
    seen = [journal.stamp()]
    journal.add([sign_out(1)])
    seen.append(journal.stamp())
    assert Journal(directory, "app").stamp() == seen[-1]
    journal.waiting()
    assert journal.stamp() == seen[-1]
    Journal(directory, "app").add([sign_out(2)])
    seen.append(journal.stamp())
    journal.done([sign_out(1)])
    seen.append(journal.stamp())
    assert seen[0] is None
    assert len(set(seen)) == len(seen)


def test_another_process_of_the_node_sees_what_waits_and_another_name_space_does_not(
    journal: Journal, directory: Path
) -> None:
    journal.add([sign_out(1)])
    assert Journal(directory, "app").waiting() == (sign_out(1),)
    assert Journal(directory, "other").waiting() == ()


def test_directory_and_file_are_the_owner_s_alone(journal: Journal, directory: Path) -> None:
    journal.add([sign_out(1)])
    for path in (directory, *directory.iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path


def test_the_bound_is_exact(journal: Journal, directory: Path) -> None:
    journal.add([sign_out(0)])
    execute(
        directory,
        "insert into sign_outs with recursive n(i) as (select 1 union all select i + 1 from n "
        f"where i < {MOST - 2}) select printf('%016d', i), 0, 'logout', i from n",
    )
    with pytest.raises(StoreUnavailable, match="full"):
        journal.add([sign_out(200_000), sign_out(200_001)])
    journal.add([sign_out(200_000)])
    with pytest.raises(StoreUnavailable, match="full"):
        journal.add([sign_out(200_001)])
    waiting = journal.waiting()
    assert len(waiting) == MOST
    assert sign_out(200_001) not in waiting
    journal.done(waiting[:1])
    journal.add([sign_out(200_001)])


def _is_a_file(directory: Path) -> None:
    directory.parent.mkdir()
    directory.write_text("in the way")


def _holds_a_directory(directory: Path) -> None:
    (directory / "sign-outs-app.db").mkdir(parents=True)


def _is_rubbish(directory: Path) -> None:
    directory.mkdir(parents=True)
    (directory / "sign-outs-app.db").write_bytes(b"not a database at all" * 100)


def _has_another_table(directory: Path) -> None:
    directory.mkdir(parents=True)
    with closing(sqlite3.connect(directory / "sign-outs-app.db")) as connection, connection:
        connection.execute("create table sign_outs (another text)")


def _is_a_dead_link(directory: Path) -> None:
    directory.parent.mkdir()
    directory.symlink_to(directory.parent / "nowhere" / "at" / "all")


@pytest.mark.parametrize("spoil", [_is_a_file, _holds_a_directory, _is_rubbish, _has_another_table, _is_a_dead_link])
def test_a_journal_that_cannot_be_used_says_so_and_keeps_nothing(
    journal: Journal, directory: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(directory)
    with pytest.raises(StoreUnavailable, match=r"journal: sign-outs-app\.db"):
        journal.add([sign_out(1)])


def test_the_text_for_the_client_names_no_file(journal: Journal, directory: Path) -> None:
    _is_a_file(directory)
    with pytest.raises(StoreUnavailable) as refused:
        journal.add([sign_out(1)])
    assert "sign-outs" not in refused.value.title
    assert str(directory.parent) not in refused.value.title


def test_threads_that_sign_out_together_are_all_kept(journal: Journal) -> None:
    start = threading.Barrier(8)
    failed: list[BaseException] = []

    def leave(first: int) -> None:
        start.wait(WAIT)
        try:
            for number in range(first, first + 5):
                journal.add([sign_out(number)])
        except StoreUnavailable as lost:
            failed.append(lost)

    threads = [threading.Thread(target=leave, args=(first,)) for first in range(0, 40, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert failed == []
    assert len(journal.waiting()) == 40


# -- a process that is killed ----------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from coatcheck import Coatcheck, Settings, SessionEnded
from coatcheck.errors import StoreUnavailable

database, journal = sys.argv[1:]
settings = Settings(server_key=b"k" * 32, journal=Path(journal))
coat = Coatcheck(f"sqlite:///{database}", settings=settings)
signed_in = coat.session(None)
signed_in.login("ann")
cookie = signed_in.cookie_action.id.text

async def away(*args, **kwargs):
    raise StoreUnavailable("away")

behind = coat.engine.near.behind
behind.load = behind.revoke = behind.touch = behind.id_keys = away
session = coat.session(cookie)
session.logout()
assert session.logout_pending
print(cookie, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_sign_out_survives_a_killed_process_and_the_next_one_carries_it_out_first(
    tmp_path: Path, directory: Path
) -> None:
    database = tmp_path / "app.db"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(database), str(directory)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    cookie = killed.stdout.strip()
    assert len(Journal(directory, "coatcheck").waiting()) == 1
    assert cookie[20:].encode() not in file_of(directory).read_bytes()
    url = f"sqlite:///{database}"
    with Coatcheck(url, settings=Settings(server_key=KEY)) as elsewhere:
        assert elsewhere.session(cookie).subject == "ann", "no other node knows yet"
        with Coatcheck(url, settings=Settings(server_key=KEY, journal=directory)) as again:
            # Started, and nobody has asked it anything yet.
            assert Journal(directory, "coatcheck").waiting() == ()
            ended = again.session(cookie).ended
            assert ended is not None
            assert ended.reason == "logout"
    with Coatcheck(url, settings=Settings(server_key=KEY)) as fresh:
        assert not fresh.session(cookie).is_signed_in


HALF_WRITTEN = """
import os, signal, sqlite3, sys
from pathlib import Path
import coatcheck.journal as journals
from coatcheck.core.ids import SessionRef

class Dying:
    def __init__(self, connection):
        self.connection = connection
    def execute(self, statement, *more):
        if statement == "commit":
            os.kill(os.getpid(), signal.SIGKILL)
        return self.connection.execute(statement, *more)
    def __getattr__(self, name):
        return getattr(self.connection, name)

journal = journals.Journal(Path(sys.argv[1]), "app")
journal.add([journals.SignOut(ref=SessionRef(1, "0" * 15 + "1"), reason="logout", at_us=1)])
connect = sqlite3.connect
sqlite3.connect = lambda *a, **k: Dying(connect(*a, **k))
journal.add([journals.SignOut(ref=SessionRef(2, "0" * 15 + "2"), reason="logout", at_us=2)])
"""


def test_a_process_killed_while_it_writes_harms_nothing_that_was_kept(journal: Journal, directory: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", HALF_WRITTEN, str(directory)], cwd=ROOT, capture_output=True, timeout=WAIT, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert journal.waiting() == (sign_out(1),)
    journal.add([sign_out(3)])
    assert journal.waiting() == (sign_out(1), sign_out(3))


# -- a process that forks ----------------------------------------------------------------------------------------------


def test_a_child_that_was_forked_while_a_thread_carried_out_does_it_itself(journal: Journal) -> None:
    """Prefork servers: that thread does not exist in the child, and nobody there would ever end its work."""
    sign_outs = SignOuts(journal, waits=waits_of("blocking"), deadline=0.1)
    run_blocking(sign_outs.keep([sign_out(1)]))
    begun, go_on = threading.Event(), threading.Event()

    async def slowly(kept: SignOut) -> None:
        begun.set()
        go_on.wait(WAIT)

    thread = threading.Thread(target=lambda: run_blocking(sign_outs.carry_out(slowly)))
    thread.start()
    try:
        assert begun.wait(WAIT)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                ended: list[SignOut] = []

                async def end(kept: SignOut) -> None:
                    ended.append(kept)

                run_blocking(sign_outs.carry_out(end))
                status = 0 if ended == [sign_out(1)] else 2
            finally:
                os._exit(status)
        _, how = os.waitpid(child, 0)
    finally:
        go_on.set()
        thread.join(WAIT)
    assert os.waitstatus_to_exitcode(how) == 0
    assert journal.waiting() == ()


# -- order -------------------------------------------------------------------------------------------------------------


def test_whoever_comes_while_somebody_carries_out_waits_for_him(journal: Journal) -> None:
    sign_outs = SignOuts(journal, waits=waits_of("blocking"), deadline=WAIT)
    run_blocking(sign_outs.keep([sign_out(1), sign_out(2)]))
    begun, go_on = threading.Event(), threading.Event()
    ended: list[int] = []

    async def end(kept: SignOut) -> None:
        begun.set()
        assert go_on.wait(WAIT)
        ended.append(kept.ref.tag)

    def carry_out() -> None:
        run_blocking(sign_outs.carry_out(end))
        done.append(list(ended))

    done: list[list[int]] = []
    threads = [threading.Thread(target=carry_out) for _ in range(3)]
    threads[0].start()
    assert begun.wait(WAIT)
    for thread in threads[1:]:
        thread.start()
    assert done == []
    go_on.set()
    for thread in threads:
        thread.join(WAIT)
    assert done == [[1, 2]] * 3
    assert not sign_outs.may_wait


def test_whoever_waits_too_long_for_another_is_told_to_come_back(journal: Journal) -> None:
    sign_outs = SignOuts(journal, waits=waits_of("blocking"), deadline=0.01)
    run_blocking(sign_outs.keep([sign_out(1)]))
    begun, go_on = threading.Event(), threading.Event()

    async def end(kept: SignOut) -> None:
        begun.set()
        assert go_on.wait(WAIT)

    thread = threading.Thread(target=lambda: run_blocking(sign_outs.carry_out(end)))
    thread.start()
    assert begun.wait(WAIT)
    with pytest.raises(StoreUnavailable):
        run_blocking(sign_outs.carry_out(end))
    go_on.set()
    thread.join(WAIT)
    run_blocking(sign_outs.carry_out(end))


def may_wait(sign_outs: SignOuts) -> bool:
    return sign_outs.may_wait


def test_a_session_is_refused_from_the_moment_it_was_kept_until_the_store_has_it(journal: Journal) -> None:
    sign_outs = SignOuts(journal, waits=waits_of("blocking"), deadline=WAIT)
    one, other = sign_out(1), sign_out(2)
    run_blocking(sign_outs.keep([one]))
    assert (sign_outs.of(one.ref), sign_outs.of(other.ref)) == (one, None)
    assert may_wait(sign_outs)
    mate = SignOuts(journal, waits=waits_of("blocking"), deadline=WAIT)
    assert mate.of(one.ref) is None
    assert run_blocking(mate.is_kept(one.ref))
    assert may_wait(mate)

    async def end(kept: SignOut) -> None:
        assert sign_outs.of(kept.ref) is not None

    run_blocking(sign_outs.carry_out(end))
    assert sign_outs.of(one.ref) is None
    assert not may_wait(sign_outs)
    assert not run_blocking(mate.is_kept(one.ref))
    run_blocking(mate.carry_out(end))
    assert not may_wait(mate)
