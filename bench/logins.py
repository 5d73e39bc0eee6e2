"""How much does a sign-in cost beyond the password hash it cannot do without?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from argon2.low_level import Type, hash_secret, verify_secret

from bench.harness import Candidate, Result, compare
from coatcheck import Coatcheck, Settings
from coatcheck.core.names import UserName, parse_user_name
from coatcheck.core.passwords import Password, PasswordPolicy, parse_password
from coatcheck.core.ports import RateLimit
from coatcheck.core.throttle import ThrottlePolicy
from coatcheck.server.service import Service, build
from coatcheck.server.settings import ServerSettings
from coatcheck.server.sign_in import Caller, sign_in

PASSWORD = "a long enough phrase for a benchmark"
_OPEN = RateLimit(attempts=10**9, period=1.0)


def run(*, rounds: int, full: bool) -> list[Result]:
    loop = asyncio.new_event_loop()
    with TemporaryDirectory() as directory:
        home = Path(directory) / "home"
        service = build(ServerSettings(home=home))
        object.__setattr__(
            service,
            "throttle",
            ThrottlePolicy(unknown_devices=_OPEN, known_device=_OPEN, known_devices=_OPEN, network=_OPEN),
        )
        loop.run_until_complete(_prepare(service))
        sessions = Coatcheck(f"sqlite:///{home / 'sessions.db'}", settings=Settings())
        try:
            return [
                compare(
                    "Sign in with a password (SQLite, argon2id 19 MiB t=2 p=1)",
                    [
                        Candidate(name="bare argon2 verify", run=_bare(), repeat=5),
                        Candidate(name="coatcheck sign-in, whole", run=_whole(loop, service), repeat=5),
                        Candidate(name="coatcheck session.login alone", run=_session(sessions), repeat=50),
                    ],
                    rounds=rounds,
                )
            ]
        finally:
            sessions.close()
            loop.run_until_complete(service.close())
            loop.close()


async def _prepare(service: Service) -> None:
    await service.open()
    secret = parse_password(PASSWORD, policy=PasswordPolicy())
    name = parse_user_name("somebody")
    if not isinstance(secret, Password) or not isinstance(name, UserName):
        raise RuntimeError("the benchmark's own account is refused")
    await service.accounts.create_user(name, role="user", password_hash=await service.hasher.hash(secret))


def _bare() -> Callable[[int], None]:
    stored = hash_secret(PASSWORD.encode(), b"s" * 16, 2, 19 * 1024, 1, 32, Type.ID)

    def many(count: int) -> None:
        for _ in range(count):
            verify_secret(stored, PASSWORD.encode(), Type.ID)

    return many


def _whole(loop: asyncio.AbstractEventLoop, service: Service) -> Callable[[int], None]:
    caller = Caller(address="203.0.113.7", forged_address=False, device=None)

    async def once() -> Any:
        session = service.coat.session(None)
        return await sign_in(service, session, caller, name="somebody", password=PASSWORD)

    def many(count: int) -> None:
        for _ in range(count):
            loop.run_until_complete(once())

    return many


def _session(coat: Coatcheck) -> Callable[[int], None]:
    def many(count: int) -> None:
        for _ in range(count):
            coat.session(None).login("50", claims={"role": "user"})

    return many
