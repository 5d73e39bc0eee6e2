"""Processes that fork after the store was opened: a shared store goes on in both, memory refuses loudly."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path


def run(script: str, *arguments: str) -> str:
    # A fork of the test process would take its threads' locks along: the fork happens in a process of its own.
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_sqlite_store_goes_on_in_parent_and_child(tmp_path: Path) -> None:
    out = run(
        """
        import os, sys
        from coatcheck import Coatcheck
        coat = Coatcheck(f"sqlite:///{sys.argv[1]}")
        session = coat.session(None)
        session.login("50")
        cookie = session.cookie_action.id.text
        pid = os.fork()
        if pid == 0:
            child = coat.session(cookie)
            assert child.subject == "50"
            child["from"] = "child"
            child.commit()
            coat.session(None).login("51")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        again = coat.session(cookie)
        print(again.subject, again["from"], len(coat.list_sessions("51").items))
        coat.revoke_subject("50", reason="x")
        print(coat.session(cookie).subject)
        coat.close()
        """,
        str(tmp_path / "sessions.db"),
    )
    assert out.split() == ["50", "child", "1", "None"]


def test_memory_refuses_in_the_child() -> None:
    # Parent and child would each believe that their copy is the truth: a logout in one is not seen in the other.
    out = run(
        """
        import os
        from coatcheck import Coatcheck, ConfigurationError
        coat = Coatcheck("memory:")
        session = coat.session(None)
        session.login("50")
        cookie = session.cookie_action.id.text
        pid = os.fork()
        if pid == 0:
            try:
                coat.session(cookie).subject
            except ConfigurationError as refused:
                os._exit(0 if "forked" in refused.detail else 3)
            os._exit(4)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), coat.session(cookie).subject)
        """
    )
    assert out.split() == ["0", "50"]


def test_the_keeper_starts_anew_in_the_child() -> None:
    out = run(
        """
        import os, sys, threading
        from coatcheck.keeper import BlockingKeeper
        done = threading.Event()
        async def work():
            done.set()
        keeper = BlockingKeeper(work, lambda: not done.is_set())
        keeper.poke()
        assert done.wait(20)
        pid = os.fork()
        if pid == 0:
            done.clear()
            keeper.poke()
            os._exit(0 if done.wait(20) else 3)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        """
    )
    assert out.split() == ["0"]
