"""How many refresh tokens can be exchanged in a second, each written durably before it is answered?

One process, so one core, exchanges tokens of 64 sessions: one at a time (what a user waits for), and 32 at once (what
a server gets through). Every exchange rotates: the grace is 0. The whole face is measured: parsing, one store command,
sealing the successor, minting and signing (ES256) the access token. Valkey runs beside it with its append-only file,
synced every second as most run it, and before every answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.harness import Candidate, Result, compare
from coatcheck import AsyncCoatcheck, Settings, TokenSettings
from tests.servers.valkey import ValkeySingle

SESSIONS = 64
AT_ONCE = 32
REPEAT = 640


def run(*, rounds: int, full: bool) -> list[Result]:
    loop = asyncio.new_event_loop()
    with ExitStack() as stack:
        stack.callback(loop.close)
        directory = Path(stack.enter_context(TemporaryDirectory()))
        candidates: list[Candidate] = []
        for name, sync in (("every second", "everysec"), ("before every answer", "always")):
            valkey = stack.enter_context(ValkeySingle())
            valkey.nodes[0].ask("CONFIG", "SET", "appendfsync", sync)
            fleet = Fleet(loop, valkey.url)
            stack.callback(fleet.close)
            candidates += [
                Candidate(name=f"Valkey synced {name}, {AT_ONCE} at once", run=fleet.many(AT_ONCE), repeat=REPEAT),
                Candidate(name=f"Valkey synced {name}, one by one", run=fleet.many(1), repeat=REPEAT // 4),
            ]
        fleet = Fleet(loop, f"sqlite:///{directory / 'bench.db'}")
        stack.callback(fleet.close)
        candidates += [
            Candidate(name=f"SQLite, {AT_ONCE} at once", run=fleet.many(AT_ONCE), repeat=REPEAT),
            Candidate(name="SQLite, one by one", run=fleet.many(1), repeat=REPEAT // 4),
        ]
        found = compare("Exchange of a refresh token, whole", candidates, rounds=rounds)
    rates = {f"a second, {row.name}": f"{1_000_000 / row.median_us:.0f}" for row in found.rows}
    return [Result(question=found.question, rows=found.rows, rounds=found.rounds, facts=rates)]


class Fleet:
    """Sessions whose refresh tokens are exchanged in turn."""

    def __init__(self, loop: asyncio.AbstractEventLoop, url: str) -> None:
        self._loop = loop
        self._coat = AsyncCoatcheck(
            url,
            settings=Settings(
                public_url="https://id.example.test",
                server_key=b"k" * 32,
                tokens=TokenSettings(reuse_grace=timedelta(0)),
            ),
        )
        self._tokens: list[str] = loop.run_until_complete(self._sign_in())

    def many(self, at_once: int) -> Callable[[int], None]:
        async def turn(count: int) -> None:
            due = iter(range(count))

            async def worker(first: int) -> None:
                place = first
                for _ in due:
                    issued = await self._coat.refresh(self._tokens[place])
                    self._tokens[place] = issued.refresh_token or ""
                    place = (place + at_once) % SESSIONS

            await asyncio.gather(*(worker(each) for each in range(at_once)))

        return lambda count: self._loop.run_until_complete(turn(count))

    def close(self) -> None:
        self._loop.run_until_complete(self._coat.close())

    async def _sign_in(self) -> list[str]:
        found = []
        for number in range(SESSIONS):
            session = self._coat.session(None)
            await session.login(f"u{number}", claims={"role": "user"})
            found.append((await session.tokens(carrier="body")).refresh_token or "")
        return found
