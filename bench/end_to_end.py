"""How many requests a second does a whole server answer when it has to know who is asking?

uvicorn with uvloop and httptools, one process on the first core, its load from the other; Valkey beside the load.
Bursts of all servers are interleaved, 1,000 sessions take turns on 32 connections. `uvicorn` asks the application
directly, `nginx` asks it for every static file by `auth_request` (an empty 204 lets it through), `workers` is `uvicorn`
with four processes, for the full run. Load comes from wrk where it is installed, else from a client of our own.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import jwt

from bench.harness import Rate, Rates, time_is_up
from bench.peers import SECRET, token_claims
from bench.served import settings
from bench.traffic import (
    BROWSER,
    SESSIONS,
    NotMeasured,
    Pairs,
    cookie_pair,
    forged,
    sign_in_async,
    subject,
    with_bearer,
    with_cookie,
)
from coatcheck import AsyncCoatcheck
from tests.servers.nginx import Nginx
from tests.servers.ports import LOOPBACK, reserve_port
from tests.servers.processes import Child, accepts
from tests.servers.valkey import ValkeySingle

PARTS = ("uvicorn", "nginx")
ONLY_FULL = ("workers",)

CONNECTIONS = 32
ROOT = Path(__file__).resolve().parents[1]
TITLES = {
    "bare": "bare Starlette",
    "coatcheck": "Coatcheck, valkey",
    "signed": "Starlette SessionMiddleware (signed cookie)",
    "pyjwt": "PyJWT HS256 bearer",
    "starsessions": "starsessions, valkey",
}
LUA = """\
local requests, place = {}, 0
for each in io.open("%s", "rb"):read("*a"):gmatch("[^%%z]+") do requests[#requests + 1] = each end
request = function()
  place = place %% #requests + 1
  return requests[place]
end
done = function(summary, latency)
  local failed = summary.errors
  io.write(string.format(
    '\\n{"requests": %%d, "seconds": %%f, "p50_ms": %%f, "p99_ms": %%f, "refused": %%d, "lost": %%d}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    failed.status, failed.connect + failed.read + failed.write + failed.timeout))
end
"""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A server that is up, and the requests of people who are signed in there."""

    name: str
    port: int
    requests: Path
    signed_in: Sequence[Pairs]
    forged: Pairs | None


def run(*, rounds: int, full: bool, part: str) -> list[Rates]:
    """One table."""
    with ExitStack() as stack:
        bench = Bench(stack, workers=4 if part == "workers" else 1)
        if part == "nginx":
            targets = bench.behind_nginx(("bare", "coatcheck", "pyjwt", "starsessions"))
            return [measure(bench, "Behind nginx auth_request, one worker", targets, full=full)]
        targets = [bench.serve(kind) for kind in ("bare", "coatcheck", "signed", "pyjwt", "starsessions")]
        question = f"uvicorn, {bench.workers} process{'es' if bench.workers > 1 else ''}"
        return [measure(bench, question, targets, full=full)]


def measure(
    bench: Bench, question: str, targets: Sequence[Target], *, full: bool, facts: Mapping[str, Any] | None = None
) -> Rates:
    """Interleaved bursts against servers that are up; the first one is what the others are held against."""
    seconds, bursts = (3.0, 15) if full else (2.0, 7)
    for target in targets:
        # Everybody asks before the first burst counts.
        bench.burst(target, 1.0)
    rows, done = _bursts(bench, targets, bursts, seconds)
    said = {**bench.facts(), "burst": f"{seconds:g} s", **(facts or {})}
    return Rates(question=question, rows=rows, rounds=done, facts=said)


class Bench:
    """Servers, sessions and load of one table."""

    def __init__(self, stack: ExitStack, *, workers: int) -> None:
        self._stack = stack
        self.workers = workers
        self._directory = Path(stack.enter_context(TemporaryDirectory()))
        self._wrk = shutil.which("wrk")
        if self._wrk is None:
            print(
                "\n*** wrk IS NOT INSTALLED (Debian and Ubuntu: apt install wrk). The load comes from a client in\n"
                "*** Python instead, which may be busier than the servers: ratios may be flatter than they are.\n",
                flush=True,
            )
        cores = sorted(os.sched_getaffinity(0))
        # One core for the server, the other for everything else; more processes than that share all.
        self._server_cores = cores[:1] if workers == 1 else cores
        self._other_cores = cores[1:] or cores
        self.valkey = stack.enter_context(ValkeySingle())
        for pid in self.valkey.pids:
            os.sched_setaffinity(pid, self._other_cores)

    def facts(self) -> dict[str, Any]:
        """How the load was made."""
        said = "a client in Python, because wrk is not installed: ratios may be flatter than they are"
        if self._wrk is not None:
            version = subprocess.run([self._wrk, "-v"], capture_output=True, text=True, check=False)
            said = " ".join((version.stdout or version.stderr).split()[:2])
        return {
            "load": f"{said}, 1 thread, {CONNECTIONS} connections, {SESSIONS} sessions in turn",
            "cores": f"server {self._server_cores}, load and Valkey {self._other_cores}",
            "store": self.valkey.version,
        }

    def serve(self, kind: str) -> Target:
        """Start an application, sign 1,000 people in, and see that it knows who is who."""
        port = self.port()
        words = [sys.executable, "-m", "bench.served", kind, self.valkey.url, str(port), str(self.workers)]
        self.start(words, port)
        asked = kind.startswith("auth-")
        good, bad = self.credentials(kind.removeprefix("auth-"), port)
        answer = (204, "") if asked else (200, subject(0))
        return self.target(TITLES.get(kind, kind), port, good, bad, answer=answer, refusal="")

    def behind_nginx(self, kinds: Sequence[str]) -> list[Target]:
        """A static file behind each of these, and one that nobody is asked about."""
        folder = self._directory / "www"
        folder.mkdir()
        (folder / "me").write_text(subject(0))
        upstreams = {kind: self.serve(f"auth-{kind}") for kind in kinds}
        ports = {kind: self.port() for kind in (*kinds, "open")}
        blocks = [_server_block(folder, ports["open"], None)]
        blocks += [_server_block(folder, ports[kind], upstreams[kind].port) for kind in kinds]
        nginx = self._stack.enter_context(Nginx("\n".join(blocks), ports=tuple(ports.values())))
        for pid in nginx.pids:
            os.sched_setaffinity(pid, self._server_cores)
        titles = {**TITLES, "bare": "an endpoint that answers 204 to all"}
        targets = [
            self.target(titles[kind], ports[kind], upstreams[kind].signed_in, upstreams[kind].forged) for kind in kinds
        ]
        anybody = upstreams[kinds[0]].signed_in
        return [*targets, self.target("nginx alone, nobody is asked", ports["open"], anybody, None)]

    def credentials(self, kind: str, port: int, headers: Pairs = ()) -> tuple[Sequence[Pairs], Pairs | None]:
        """The requests of 1,000 people who are signed in, and a forged one where that means something.

        Where a peer signs people in itself, it is asked to, with these `headers`.
        """
        match kind:
            case "bare":
                return [with_cookie(f"seen={number % 10}") for number in range(SESSIONS)], None
            case "coatcheck":
                pairs = asyncio.run(self._our_cookies())
            case "pyjwt":
                tokens = [jwt.encode(token_claims(number), SECRET, algorithm="HS256") for number in range(SESSIONS)]
                return [with_bearer(token) for token in tokens], with_bearer(forged(tokens[0]))
            case _:
                pairs = _logins(port, headers)
        return [with_cookie(pair) for pair in pairs], with_cookie(forged(pairs[0]))

    def port(self) -> int:
        """A port of our own."""
        reserved = reserve_port()
        self._stack.callback(reserved.release)
        return reserved.port

    def start(self, words: Sequence[str | Path], port: int, environment: Mapping[str, str] | None = None) -> None:
        """Start a server on its core, and wait until it accepts."""
        with _pinned(self._server_cores):
            # The child begins where its parent is.
            child = Child(words, log=self._directory / f"{port}.log", directory=ROOT, environment=environment)
        self._stack.callback(child.stop)
        child.await_ready(lambda: accepts(port))

    def target(
        self,
        name: str,
        port: int,
        signed_in: Sequence[Pairs],
        forged: Pairs | None,
        *,
        answer: tuple[int, str] | None = None,
        refusal: str | None = None,
    ) -> Target:
        """A server that is up, checked: `answer` (the subject) to who is signed in, 401 to a forged credential.

        `refusal` is the body of the latter, if it matters. Raises: NotMeasured.
        """
        expected = answer or (200, subject(0))
        said = _ask(port, signed_in[0])
        if said != expected:
            raise NotMeasured(f"{name}: answered {said[0]} {said[1][:80]!r} instead of {expected}")
        if forged is not None:
            status, body = _ask(port, forged)
            if status != 401 or subject(0) in body or body != (body if refusal is None else refusal):
                raise NotMeasured(f"{name}: answered {status} {body[:80]!r} to a credential that is wrong")
        path = self._directory / f"{port}.requests"
        path.write_bytes(b"\0".join(_octets(headers, "/me") for headers in signed_in))
        return Target(name=name, port=port, requests=path, signed_in=signed_in, forged=forged)

    def burst(self, target: Target, seconds: float) -> dict[str, float]:
        """Requests for so long; what came of them. Raises: NotMeasured when one was refused or lost."""
        if self._wrk is None:
            words = [sys.executable, "-m", "bench.load", target.port, CONNECTIONS, seconds, target.requests]
        else:
            script = target.requests.with_suffix(".lua")
            script.write_text(LUA % target.requests)
            words = [self._wrk, "-t1", f"-c{CONNECTIONS}", f"-d{max(1, round(seconds))}s", "-s", script]
            words.append(f"http://{LOOPBACK}:{target.port}/me")
        with _pinned(self._other_cores):
            # The child begins where its parent is.
            said = subprocess.run([str(word) for word in words], cwd=ROOT, capture_output=True, text=True, check=True)
        found: dict[str, float] = json.loads(said.stdout.strip().splitlines()[-1])
        if found["refused"] or found["lost"]:
            raise NotMeasured(f"{target.name}: {found['refused']:.0f} refused, {found['lost']:.0f} lost under load")
        return found

    async def _our_cookies(self) -> list[str]:
        coat = AsyncCoatcheck(self.valkey.url, settings=settings())
        await coat.start()
        try:
            return [cookie_pair(coat, value) for value in await sign_in_async(coat, range(SESSIONS))]
        finally:
            await coat.close()


def _bursts(bench: Bench, targets: Sequence[Target], rounds: int, seconds: float) -> tuple[tuple[Rate, ...], int]:
    order, shuffle = list(targets), Random(20261123)
    rates: dict[str, list[float]] = {each.name: [] for each in targets}
    p50: dict[str, list[float]] = {each.name: [] for each in targets}
    p99: dict[str, list[float]] = {each.name: [] for each in targets}
    done = 0
    while done < rounds and not (done >= 3 and time_is_up()):
        shuffle.shuffle(order)
        for each in order:
            found = bench.burst(each, seconds)
            rates[each.name].append(found["requests"] / found["seconds"])
            p50[each.name].append(found["p50_ms"])
            p99[each.name].append(found["p99_ms"])
        done += 1
    base = rates[targets[0].name]
    return (
        tuple(
            Rate(
                name=each.name,
                median=statistics.median(rates[each.name]),
                low=min(rates[each.name]),
                high=max(rates[each.name]),
                ratio=statistics.median(a / b for a, b in zip(rates[each.name], base, strict=True)),
                p50_ms=statistics.median(p50[each.name]),
                p99_ms=statistics.median(p99[each.name]),
            )
            for each in targets
        ),
        done,
    )


def _server_block(folder: Path, port: int, upstream: int | None) -> str:
    asked = "" if upstream is None else "auth_request /_auth;"
    inner = (
        ""
        if upstream is None
        else f"""
        location = /_auth {{
            internal;
            proxy_pass http://auth_{port}/me;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_pass_request_body off;
            proxy_set_header Content-Length "";
        }}"""
    )
    pool = "" if upstream is None else f"upstream auth_{port} {{ server {LOOPBACK}:{upstream}; keepalive 64; }}"
    return f"""
    {pool}
    server {{
        listen {LOOPBACK}:{port} backlog=512;
        keepalive_requests 100000000;
        root {folder};
        default_type text/plain;
        location / {{ {asked} }}{inner}
    }}"""


@contextmanager
def _pinned(cores: Sequence[int]) -> Any:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _octets(headers: Pairs, path: str) -> bytes:
    lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers), "", ""]
    return "\r\n".join(lines).encode()


def _ask(port: int, headers: Pairs, path: str = "/me") -> tuple[int, str]:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=10)
    try:
        connection.request("GET", path, headers=dict(headers))
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def _logins(port: int, headers: Pairs) -> list[str]:
    """The cookies of 1,000 people, from a peer's own sign-in."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=10)
    pairs = []
    try:
        for number in range(SESSIONS):
            connection.request("GET", f"/login/{subject(number)}", headers=dict((*BROWSER, *headers)))
            answer = connection.getresponse()
            answer.read()
            pairs.append((answer.getheader("set-cookie") or "").split(";")[0])
    finally:
        connection.close()
    return pairs
