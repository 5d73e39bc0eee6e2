"""One asynchronous face over a shared store in several event loops: connections of an ended loop are not used again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import cast

from coatcheck import AsyncCoatcheck
from coatcheck.session import SendCookie


async def sign_in(coat: AsyncCoatcheck) -> str:
    session = coat.session(None)
    await session.login("50")
    return cast(SendCookie, session.cookie_action).id.text


async def look(coat: AsyncCoatcheck, cookie: str) -> str | None:
    session = coat.session(cookie)
    await session.load()
    session["looks"] = cast(int, session.get("looks", 0)) + 1
    await session.commit()
    return f"{session.subject} {session['looks']!r}"


def through_three_loops(make: Callable[[], AsyncCoatcheck]) -> list[str | None]:
    coat = make()
    cookie = asyncio.run(sign_in(coat))
    seen = [asyncio.run(look(coat, cookie)) for _ in range(3)]
    asyncio.run(coat.close())
    return seen


def test_a_sqlite_file_serves_several_loops(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'sessions.db'}"
    assert through_three_loops(lambda: AsyncCoatcheck(url)) == ["50 1", "50 2", "50 3"]
