"""What does the check itself cost: warm, cold, in memory, and when the store grows?

`lookup` holds the check against one look into a dictionary, `place` against a check that compares the place of the
request as well, `cold` counts and times what is read from the store,
`shares` asks what a request costs when half of the sessions are cold, or all of them after a feed came back,
`stored` and `copies` weigh sessions in Valkey and in a node, `growth` asks whether a request gets dearer with the
sessions there are. All over Valkey on loopback, which understates what a trip costs and so what a near copy saves.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from hashlib import sha256
from itertools import cycle
from random import Random
from typing import Any

import hiredis
from redis.asyncio import ConnectionPool
from redis.asyncio import Redis as AsyncRedis
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from bench.harness import Answer, Candidate, Figure, Figures, Result, compare, with_notes
from bench.traffic import (
    SESSIONS,
    NotMeasured,
    asgi_runner,
    cookie_pair,
    forged,
    receive,
    scope_of,
    short_subject,
    sign_in_async,
    subject,
    with_cookie,
)
from coatcheck import AsyncCoatcheck, AsyncSession, Settings
from coatcheck.blocking import run_blocking
from coatcheck.core.binding import BindingPolicy
from coatcheck.core.ids import KEY_OF
from coatcheck.stores.near import NearStore
from coatcheck.web import asgi
from coatcheck.web.exchange import Exchange, Headers, place_of
from tests.servers.ports import LOOPBACK
from tests.servers.valkey import ValkeySingle

PARTS = ("lookup", "place", "cold", "shares", "stored", "copies", "growth")

COPIES = 200_000
TRACED = 50_000
WEIGHED = 20_000
AT_ONCE = 50
COLD = 2_000
MOST_LOADED = 100_000
RECORD = b"r" * 300
PROXY = "203.0.113.7"
DEVICE = "__Host-device"


def run(*, rounds: int, full: bool, part: str) -> list[Answer]:
    """One part's tables."""
    with ExitStack() as stack:
        match part:
            case "lookup":
                return [_lookup(stack, max(rounds, 21))]
            case "place":
                return _place(stack, max(rounds, 21))
            case "cold":
                return _cold(stack, max(rounds, 15))
            case "shares":
                return [_shares(stack, max(rounds, 15))]
            case "stored":
                return [_in_store(stack)]
            case "copies":
                return [_in_node(stack)]
            case _:
                sizes = (10_000, 100_000, 1_000_000) if full else (10_000, 100_000)
                return _growth(stack, sizes, max(rounds, 15))


# -- what is ours, in one place -------------------------------------------------------------------------------------


def check_of(coat: AsyncCoatcheck) -> Callable[[bytes], object]:
    """The check alone, as the middlewares call it: octets of a cookie in, a session or None out, no waiting."""
    return coat.engine.peek


def copies_held(coat: AsyncCoatcheck) -> int:
    """How many near copies this node keeps."""
    return len(_near(coat).table)


def forget_copies(coat: AsyncCoatcheck) -> None:
    """What a node does when anything may have changed: none of its copies counts any more."""
    _near(coat).emptied()


def _near(coat: AsyncCoatcheck) -> NearStore:
    if coat.engine.near is None:
        raise NotMeasured("this store is asked at every request: there is no near copy to measure")
    return coat.engine.near


def place_check_of(coat: AsyncCoatcheck) -> Callable[[bytes, Headers], bool]:
    """The check, and the comparison with the place of the last request of the session, as a request makes them."""
    engine = coat.engine

    def check(token: bytes, headers: Headers) -> bool:
        near = engine.peek(token)
        return near is not None and near.place == place_of(engine, headers, PROXY).mark

    return check


def settings() -> Settings:
    """As an application would have them, but with room for all the copies that are counted here."""
    return Settings(namespace="bench", server_key=b"k" * 32, near_copies=COPIES, near_octets=1024 * COPIES)


def bound() -> Settings:
    """With all that can count of a place: the network behind a proxy, the family of the browser, a device cookie."""
    policy = BindingPolicy(network="prefix", user_agent=True, device=True, on_mismatch="block")
    return replace(settings(), binding=policy, device_cookie=DEVICE, trusted_proxies=(PROXY,))


class Node:
    """One node over one Valkey, and the sessions that were signed in there."""

    def __init__(
        self,
        stack: ExitStack,
        loop: asyncio.AbstractEventLoop,
        valkey: ValkeySingle | None = None,
        chosen: Settings | None = None,
    ) -> None:
        self.valkey = stack.enter_context(ValkeySingle()) if valkey is None else valkey
        self.loop = loop
        self.coat = AsyncCoatcheck(self.valkey.url, settings=chosen or settings())
        self.values: list[str] = []
        loop.run_until_complete(self.coat.start())
        stack.callback(lambda: loop.run_until_complete(self.coat.close()))

    def fill(
        self, count: int, *, per_subject: int = 1, whole: bool = True, name: Callable[[int], str] = short_subject
    ) -> None:
        """More sessions, `count` in all. `whole`: with the claims and fields of the reference."""
        numbers = [number // per_subject for number in range(len(self.values), count)]
        self.values += self.loop.run_until_complete(sign_in_async(self.coat, numbers, bare=not whole, name=name))

    def load(self, values: Sequence[str]) -> None:
        """Read sessions into the node, 50 under way at a time."""
        self.loop.run_until_complete(read_all(self.coat, values))

    def warm(self, values: Sequence[str]) -> None:
        """Read sessions until this node has a copy of each. Raises: NotMeasured when it does not come to that.

        Once is not always enough: the feed may not be up yet, or still be telling of the sign-ins themselves. Of a
        million sign-ins the first are so long ago that their use is to be noted again: they are known all the same.
        """
        known = _near(self.coat).table.known
        cold = list(values)
        for _ in range(50):
            self.load(cold)
            self.rest()
            cold = [value for value in values if known(value.encode()[KEY_OF]) is None]
            if not cold:
                return
        raise NotMeasured(f"{len(cold)} of {len(values)} sessions that were read 50 times are not known")

    def rest(self) -> None:
        """Let the loop turn, as it does between a server's requests."""
        self.loop.run_until_complete(asyncio.sleep(0.002))

    def memory(self) -> int:
        """Octets that Valkey has in use."""
        return int(self.valkey.nodes[0].ask_fields("INFO", "memory")["used_memory"])


async def read_all(coat: AsyncCoatcheck, values: Sequence[str], at_once: int = AT_ONCE) -> None:
    """Load each session once, through the public face."""
    due = iter(values)

    async def worker() -> None:
        for value in due:
            await read_one(coat, value)

    await asyncio.gather(*(worker() for _ in range(at_once)))


async def read_one(coat: AsyncCoatcheck, value: str) -> None:
    """Load one session and ask whose it is."""
    session = coat.session(value)
    await session.load()
    if session.subject is None:
        raise NotMeasured("nobody is signed in: the benchmark measures nothing")


def _loop(stack: ExitStack) -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    stack.callback(loop.close)
    return loop


# -- the check alone ------------------------------------------------------------------------------------------------


def _lookup(stack: ExitStack, rounds: int) -> Result:
    node = Node(stack, _loop(stack))
    node.fill(SESSIONS)
    check = check_of(node.coat)
    node.warm(node.values)
    tokens = [value.encode() for value in node.values]
    if any(check(forged(value).encode()) for value in node.values):
        raise NotMeasured("a forged id is known")
    table = {sha256(token).digest(): number for number, token in enumerate(tokens, 1)}
    unknown = 0

    def by_digest() -> Callable[[int], None]:
        turn, get = cycle(tokens), table.get

        def many(count: int) -> None:
            for _ in range(count):
                token = next(turn)
                if get(sha256(token).digest()) is None:
                    raise NotMeasured("the dictionary does not know its own token")

        return many

    def checked() -> Callable[[int], None]:
        turn = cycle(tokens)

        def many(count: int) -> None:
            nonlocal unknown
            for _ in range(count):
                token = next(turn)
                if check(token) is None:
                    unknown += 1

        return many

    found = compare(
        "The check alone, against a look into a dictionary by digest",
        [
            Candidate(name="dict.get(sha256(token).digest())", run=by_digest(), repeat=20_000, prepare=node.rest),
            Candidate(name="Coatcheck check, warm", run=checked(), repeat=20_000, prepare=node.rest),
        ],
        rounds=rounds,
        facts={"sessions in turn": SESSIONS, "near copies": copies_held(node.coat)},
    )
    return with_notes(found, {"Coatcheck check, warm": f"{unknown} of {rounds * 20_000 + 2_000} were not known"})


# -- the check and the place of the request --------------------------------------------------------------------------


def _place(stack: ExitStack, rounds: int) -> list[Answer]:
    loop = _loop(stack)
    plain = Node(stack, loop)
    plain.fill(SESSIONS)
    compared = Node(stack, loop, plain.valkey, bound())
    turn = [value.encode() for value in plain.values]
    for node in (plain, compared):
        node.warm(plain.values)
    # Signed in where nothing was compared, they belong to no place yet: a first request each tells.
    for value in plain.values:
        loop.run_until_complete(_asked(compared, _from_browser(compared, value)))
    check, placed = check_of(plain.coat), place_check_of(compared.coat)
    requests: list[tuple[bytes, Headers]] = []

    def arrive() -> None:
        """Requests as a server hands them on: no two share an octet string, so each is hashed anew."""
        requests[:] = [(bytes(bytearray(value)), _from_browser(compared, value.decode())) for value in turn]
        compared.warm(plain.values)
        loop.run_until_complete(_all_asked(compared, plain.values))
        plain.warm(plain.values)

    wrong = 0

    def alone(count: int) -> None:
        for token, _headers in requests[:count]:
            if check(token) is None:
                raise NotMeasured("a warm session is not known")

    def both(count: int) -> None:
        nonlocal wrong
        for token, headers in requests[:count]:
            wrong += not placed(token, headers)

    def through(node: Node) -> Callable[[int], None]:
        def many(count: int) -> None:
            engine = node.coat.engine
            for _token, headers in requests[:count]:
                exchange = Exchange(engine, AsyncSession, headers=headers, method="GET", scheme="https", peer=PROXY)
                run_blocking(exchange.session.load())
                if exchange.session.subject is None:
                    raise NotMeasured("nobody is signed in: the benchmark measures nothing")

        return many

    facts = {"sessions in turn": SESSIONS, "compared": "network behind a proxy (/24), family of the browser, device"}
    count = len(turn)
    tables = [
        compare(
            "The check of a warm session, and with the place of its request",
            [
                Candidate(name="session check", run=alone, repeat=count, prepare=arrive),
                Candidate(name="session check and place", run=both, repeat=count, prepare=arrive),
            ],
            rounds=rounds,
            facts=facts,
        ),
        compare(
            "The same as a gateway does it: cookie found, session made, loaded, asked who",
            [
                Candidate(name="without places", run=through(plain), repeat=count, prepare=arrive),
                Candidate(name="with places", run=through(compared), repeat=count, prepare=arrive),
            ],
            rounds=rounds,
            facts=facts,
        ),
    ]
    tables[0] = with_notes(tables[0], {"session check and place": f"{wrong} did not match"})
    arrive()
    with compared.valkey.record() as sent:
        through(compared)(count)
    row = Figure(name=f"{count} warm requests from their own places", value=len(sent), unit="commands")
    return [*tables, Figures(question="Commands that the comparison of places sends to the store", rows=(row,))]


def _from_browser(node: Node, value: str) -> Headers:
    """The headers of a request of one of our sessions, behind a proxy, each of them new."""
    pairs = (*with_cookie(f"{cookie_pair(node.coat, value)}; {DEVICE}={'d' * 40}"), ("x-forwarded-for", "198.51.100.7"))
    return [(bytes(bytearray(name.encode())), bytes(bytearray(text.encode()))) for name, text in pairs]


async def _asked(node: Node, headers: Headers) -> None:
    exchange = Exchange(node.coat.engine, AsyncSession, headers=headers, method="GET", scheme="https", peer=PROXY)
    await exchange.session.load()
    if exchange.session.subject is None:
        raise NotMeasured("nobody is signed in: the benchmark measures nothing")


async def _all_asked(node: Node, values: Sequence[str]) -> None:
    for value in values:
        await _asked(node, _from_browser(node, value))


# -- cold reads -----------------------------------------------------------------------------------------------------


class Floor(asyncio.Protocol):
    """As little client as a GET can have: one connection, requests written as they come, answers in order."""

    def __init__(self) -> None:
        self._reader = hiredis.Reader()
        self._waiting: deque[asyncio.Future[object]] = deque()
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while (answer := self._reader.gets()) is not False:
            self._waiting.popleft().set_result(answer)

    async def get(self, key: bytes) -> object:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        self._transport.write(b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n" % (len(key), key))
        return await future

    def close(self) -> None:
        self._transport.close()


def _cold(stack: ExitStack, rounds: int) -> list[Answer]:
    loop = _loop(stack)
    node = Node(stack, loop)
    node.fill(COLD)
    keys = [f"record:{number}" for number in range(COLD)]
    client = AsyncRedis(connection_pool=ConnectionPool.from_url(node.valkey.url, max_connections=AT_ONCE))
    stack.callback(lambda: loop.run_until_complete(client.aclose()))
    loop.run_until_complete(_put(client, keys))
    _, floor = loop.run_until_complete(
        loop.create_connection(Floor, LOOPBACK, int(node.valkey.url.rpartition(":")[2].partition("/")[0]))
    )
    stack.callback(floor.close)

    def cool() -> None:
        forget_copies(node.coat)
        node.rest()

    def in_turn(items: Sequence[Any], once: Callable[[Any], Any], at_once: int) -> Callable[[int], None]:
        async def many(count: int) -> None:
            due = iter(items[:count])

            async def worker() -> None:
                for item in due:
                    await once(item)

            await asyncio.gather(*(worker() for _ in range(at_once)))

        return lambda count: loop.run_until_complete(many(count))

    async def ours(value: str) -> None:
        await read_one(node.coat, value)

    readers: tuple[tuple[str, Sequence[Any], Callable[[Any], Any]], ...] = (
        ("redis-py asyncio GET", keys, client.get),
        ("Coatcheck, cold session", node.values, ours),
        ("GET with the least client there can be", [key.encode() for key in keys], floor.get),
    )
    tables: list[Answer] = []
    for at_once, repeat in ((1, 500), (AT_ONCE, COLD)):
        found = compare(
            f"A cold read, {at_once} at a time",
            [
                Candidate(name=name, run=in_turn(items, once, at_once), repeat=repeat, prepare=cool)
                for name, items, once in readers
            ],
            rounds=rounds,
            facts={"octets of a GET's answer": len(RECORD), "store": node.valkey.version},
        )
        tables.append(found)
    cool()
    counted = [
        Figure(name="1 request for a cold session", value=_commands(node, [node.values[0]]), unit="commands"),
    ]
    for many in (2, AT_ONCE, 500):
        cool()
        name = f"{many} requests at once for one cold session"
        counted.append(Figure(name=name, value=_commands(node, [node.values[1]] * many, many), unit="commands"))
    cool()
    name = f"{AT_ONCE} requests at once for {AT_ONCE} cold sessions"
    counted.append(Figure(name=name, value=_commands(node, node.values[:AT_ONCE], AT_ONCE), unit="commands"))
    node.warm(node.values[:SESSIONS])
    name = f"{SESSIONS} requests for {SESSIONS} warm sessions"
    counted.append(Figure(name=name, value=_commands(node, node.values[:SESSIONS]), unit="commands"))
    tables.append(Figures(question="Commands that reads send to the store", rows=tuple(counted)))
    return tables


def _commands(node: Node, values: Sequence[str], at_once: int = 1) -> int:
    with node.valkey.record() as sent:
        node.loop.run_until_complete(read_all(node.coat, values, at_once))
    return len(sent)


async def _put(client: AsyncRedis, keys: Sequence[str]) -> None:
    for key in keys:
        await client.set(key, RECORD)


# -- requests that miss ---------------------------------------------------------------------------------------------


def _shares(stack: ExitStack, rounds: int) -> Result:
    loop = _loop(stack)
    node = Node(stack, loop)
    node.fill(SESSIONS)

    def with_warm(every: int) -> Callable[[], None]:
        def prepare() -> None:
            forget_copies(node.coat)
            if every:
                node.warm(node.values[::every])
            node.rest()

        return prepare

    candidates = [Candidate(name="bare Starlette", run=_bare(loop), repeat=SESSIONS, prepare=node.rest)]
    for name, every in (("all warm", 1), ("every second one cold", 2), ("all cold, as after a feed came back", 0)):
        candidates.append(
            Candidate(name=name, run=_requests(node, node.values), repeat=SESSIONS, prepare=with_warm(every))
        )
    return compare(
        "A request, one after the other, by how many sessions are warm",
        candidates,
        rounds=rounds,
        facts={"sessions in turn": SESSIONS, "store": node.valkey.version},
    )


# -- memory ---------------------------------------------------------------------------------------------------------


def _in_store(stack: ExitStack) -> Figures:
    rows = []
    allocator = version = ""
    for per_subject, name in ((1, short_subject), (3, short_subject), (1, subject)):
        node = Node(stack, _loop(stack))
        # Whatever exists once: scripts, client buffers, keys of the store itself.
        node.fill(200, per_subject=per_subject, name=name)
        node.rest()
        before, had = node.memory(), len(node.values)
        node.fill(had + WEIGHED, per_subject=per_subject, name=name)
        node.rest()
        rows.append(
            Figure(
                name=f"a session in Valkey, {per_subject} of each subject of {len(name(0))} octets",
                value=(node.memory() - before) / WEIGHED,
                unit="octets",
                note="difference of used_memory",
            )
        )
        allocator, version = node.valkey.nodes[0].ask_fields("INFO", "memory")["mem_allocator"], node.valkey.version
    return Figures(
        question="Memory of a session in the store",
        rows=tuple(rows),
        facts={
            "sessions": WEIGHED,
            "of each": "a subject, 3 short claims, 2 fields; with its index",
            "store": f"{version}, allocator {allocator}",
        },
    )


def _in_node(stack: ExitStack) -> Figures:
    gc.collect()
    # What was there before the node is not looked at again: what is timed below is its own share.
    gc.freeze()
    try:
        node = Node(stack, _loop(stack))
        check = check_of(node.coat)
        node.fill(COPIES)
        # A tuple of texts is nothing that a collection looks at; a list of them would be timed with the copies.
        values = tuple(node.values)
        node.values.clear()
        # With it the connection that copies are read over is there before anything is weighed.
        node.warm(values[:1])
        gc.collect()
        empty_ms = _collection_ms()
        tracemalloc.start()
        before, had = tracemalloc.get_traced_memory()[0], copies_held(node.coat)
        node.load(values[:TRACED])
        gc.collect()
        taken = (tracemalloc.get_traced_memory()[0] - before) / max(1, copies_held(node.coat) - had)
        tracemalloc.stop()
        node.load(values[TRACED:])
        held = copies_held(node.coat)
        full_ms = _collection_ms()
    finally:
        gc.unfreeze()
    sample = [value.encode() for value in values[-SESSIONS:]]
    known = 0
    for _ in range(500):
        # A loop that was held up for longer than the lease has to hear from the store first.
        node.rest()
        known = sum(check(token) is not None for token in sample)
        if known:
            break
    begun = time.perf_counter()
    forget_copies(node.coat)
    flush_ms = (time.perf_counter() - begun) * 1000
    if any(check(token) is not None for token in sample):
        raise NotMeasured("a copy was still believed after the flush")
    rows = (
        Figure(name="near copies", value=held, unit="", note=f"{known} of the last {SESSIONS} read were believed"),
        Figure(name="a session in a node", value=taken, unit="octets", note=f"tracemalloc, {TRACED:,} read"),
        Figure(name="full gc.collect() with the copies", value=full_ms, unit="ms", note="median of 31, processor time"),
        Figure(
            name="full gc.collect() before they were read",
            value=empty_ms,
            unit="ms",
            note="median of 31, processor time",
        ),
        Figure(name="all copies forgotten at once", value=flush_ms, unit="ms", note="as when the store was emptied"),
    )
    return Figures(
        question="Near copies in a node",
        rows=rows,
        facts={
            "sessions read": f"{COPIES:,}",
            "of each": "a subject of 8 octets, 3 short claims, 2 fields",
            "collections": "of the node alone, without what the process held before it (gc.freeze)",
        },
    )


def _collection_ms() -> float:
    """What one full collection takes of the processor: a neighbour's turn is no part of it."""
    times = []
    for _ in range(31):
        begun = time.process_time_ns()
        gc.collect()
        times.append((time.process_time_ns() - begun) / 1e6)
    return statistics.median(times)


# -- growth ---------------------------------------------------------------------------------------------------------


def _growth(stack: ExitStack, sizes: Sequence[int], rounds: int) -> list[Answer]:
    loop = _loop(stack)
    warm = [Candidate(name="bare Starlette", run=_bare(loop), repeat=1_000)]
    cold: list[Candidate] = []
    notes: dict[str, str] = {}
    facts: dict[str, Any] = {}
    for size in sizes:
        node = Node(stack, loop)
        node.fill(size, whole=False)
        chosen = Random(size).sample(node.values, min(size, MOST_LOADED))
        node.warm(chosen)
        name = f"{size:,} sessions"
        warm.append(Candidate(name=name, run=_requests(node, chosen), repeat=1_000, prepare=node.rest))
        notes[name] = f"{len(chosen):,} of them in turn, {copies_held(node.coat):,} near copies"
        cold.append(_cold_reads(stack, node, Random(-size).sample(node.values, COLD), name))
        facts[name] = f"{node.memory() / 1e6:.0f} MB in {node.valkey.version}"
    requests = compare("A request, by sessions in the store: warm", warm, rounds=rounds, facts=facts)
    question = f"A cold read, {AT_ONCE} at a time, by sessions in the store"
    return [with_notes(requests, notes), compare(question, cold, rounds=rounds, facts=facts)]


def _bare(loop: asyncio.AbstractEventLoop) -> Callable[[int], None]:
    async def me(request: Request) -> Response:
        return PlainTextResponse(subject(0))

    return asgi_runner(loop, Starlette(routes=[Route("/me", me)]), [with_cookie("seen=1")])


def _requests(node: Node, values: Sequence[str]) -> Callable[[int], None]:
    """Requests that are made as they are needed: a hundred thousand of them are too many to keep."""

    async def me(request: Request) -> Response:
        session = asgi.session_of(request.scope)
        await session.load()
        return PlainTextResponse(session.subject or "", status_code=200 if session.subject else 401)

    app = Starlette(routes=[Route("/me", me)], middleware=[Middleware(asgi.CoatcheckMiddleware, coat=node.coat)])
    template = scope_of(with_cookie(cookie_pair(node.coat, "@")))
    *others, (name, line) = template["headers"]
    before, _, after = line.partition(b"@")
    turn = cycle([value.encode() for value in values])

    async def judge(message: Any) -> None:
        if message.get("status", 200) != 200:
            raise NotMeasured(f"answered {message['status']} to a session that is signed in")

    async def many(count: int) -> None:
        for _ in range(count):
            headers = [*others, (name, before + next(turn) + after)]
            await app({**template, "headers": headers}, receive, judge)

    return lambda count: node.loop.run_until_complete(many(count))


def _cold_reads(stack: ExitStack, node: Node, values: Sequence[str], name: str) -> Candidate:
    # A node of its own, so that emptying it leaves the warm one as it is.
    other = Node(stack, node.loop, node.valkey)

    def many(count: int) -> None:
        node.loop.run_until_complete(read_all(other.coat, values[:count]))

    def cool() -> None:
        forget_copies(other.coat)
        other.rest()

    return Candidate(name=name, run=many, repeat=COLD, prepare=cool)
