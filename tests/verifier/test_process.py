"""A verifier in its process: what importing it loads, and what a fork leaves of it."""

from __future__ import annotations

import subprocess
import sys
import textwrap


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_it_loads_three_packages_and_no_store_engine_or_event_loop() -> None:
    out = run(
        """
        import sys
        before = set(sys.modules)
        import coatcheck.verifier
        loaded = {name for name in set(sys.modules) - before}
        top = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names
        print(*sorted(name for name in top if not name.startswith("_")))
        print(*sorted({".".join(name.split(".")[:2]) for name in loaded if name.startswith("coatcheck.")}))
        print(*sorted({"asyncio", "anyio", "sqlite3"} & loaded))
        """
    ).splitlines()
    # The last one is loaded by these three where it is installed.
    # cryptography reads bcrypt where something else has installed it.
    assert set(out[0].split()) <= {"bcrypt", "coatcheck", "cryptography", "joserfc", "msgspec", "typing_extensions"}
    assert set(out[1].split()) == {
        "coatcheck.core",
        "coatcheck.errors",
        "coatcheck.primitives",
        "coatcheck.system",
        "coatcheck.verifier",
    }
    assert out[2] == ""


FORK = """
    import os, threading
    from coatcheck.errors import FeedSilent
    from coatcheck.primitives.jwk import generate_signing_key
    from coatcheck.testing import FakeSystem
    from tests.verifier.issuer import Bench, Desk, Issuer

    class Quiet(Desk):
        def __init__(self):
            self.changed, self.done = threading.Condition(), []

    def silent(verifier, text):
        try:
            verifier.verify(text)
        except FeedSilent:
            return True
        return False

    issuer = Issuer(generate_signing_key("ES256", random=os.urandom))
    bench = Bench(issuer, Quiet())
    verifier = bench.ready()
    idle = bench.verifier()
    text = bench.mint()
    verifier.verify(text)
    issuer.wait_stream()
"""


def test_a_fork_empties_the_verifier_and_starts_it_anew() -> None:
    out = run(
        textwrap.dedent(FORK)
        + textwrap.dedent(
            """
            said, says = os.pipe()
            # The child cannot hear the issuer while the parent holds its answers back: nothing may be accepted.
            go = threading.Event()
            issuer.on_poll = lambda handler: go.wait(20) and issuer.give_page(handler)
            pid = os.fork()
            if pid == 0:
                code = 0
                if verifier.status.cached or not silent(verifier, text):
                    code |= 1
                os.write(says, b"x")
                if not verifier.wait_until_ready(20) or verifier.verify(text).subject != "50":
                    code |= 2
                if idle.status.running or not silent(idle, text):
                    code |= 4
                verifier.close()
                os._exit(code)
            os.read(said, 1)
            go.set()
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            # The parent's own connections still work: the child let go of its copies without a word.
            before = issuer.count("poll")
            bench.jump(2.0)
            issuer.wait_asked("poll", before + 1)
            print(verifier.verify(text).subject, verifier.status.running)
            verifier.close()
            issuer.close()
            """
        )
    )
    assert out.split() == ["0", "50", "True"]


def test_leaving_without_closing_neither_hangs_nor_complains() -> None:
    assert run(textwrap.dedent(FORK) + "print('end')\n").split() == ["end"]
