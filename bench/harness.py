"""Measure candidates side by side: interleaved round by round, medians, ratios against the first one.

The machines are small and noisy. One round runs every candidate once, in an order that changes from round to round;
what is reported is the median over the rounds and the median of the per-round ratios, which move far less than
absolute times.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("coatcheck", "starlette", "flask", "starsessions", "redis", "psycopg", "msgspec", "argon2-cffi", "uvicorn")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Something to run `repeat` times; `run(n)` does it n times and returns nothing."""

    name: str
    run: Callable[[int], None]
    repeat: int = 200


@dataclass(frozen=True, kw_only=True)
class Row:
    """One candidate's figures, in microseconds an operation; `ratio` is against the first candidate."""

    name: str
    median_us: float
    low_us: float
    high_us: float
    ratio: float
    over_us: float
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The answer to one question."""

    question: str
    rows: tuple[Row, ...]
    rounds: int
    facts: Mapping[str, Any] = field(default_factory=dict)


def compare(question: str, candidates: Sequence[Candidate], *, rounds: int, cpu: bool = False) -> Result:
    """Run all candidates in each of `rounds` rounds. `cpu`: count processor time instead of the wall clock."""
    clock = time.process_time_ns if cpu else time.perf_counter_ns
    order = list(candidates)
    shuffle = random.Random(20261123)
    times: dict[str, list[float]] = {each.name: [] for each in candidates}
    for each in candidates:
        each.run(max(1, each.repeat // 10))
    gc.collect()
    gc.freeze()
    try:
        for _ in range(rounds):
            shuffle.shuffle(order)
            for each in order:
                begun = clock()
                each.run(each.repeat)
                times[each.name].append((clock() - begun) / each.repeat / 1000)
    finally:
        gc.unfreeze()
    base = times[candidates[0].name]
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
                over_us=statistics.median(a - b for a, b in zip(own, base, strict=True)),
            )
        )
    return Result(question=question, rows=tuple(rows), rounds=rounds)


def show(result: Result) -> str:
    """A table in Markdown."""
    lines = [
        f"### {result.question}",
        "",
        f"Medians of {result.rounds} interleaved rounds; ratios are medians of the per-round ratios.",
        "",
        "| candidate | µs | range | × first | µs over first |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.name} | {row.median_us:.1f} | {row.low_us:.1f}-{row.high_us:.1f} "
        f"| {row.ratio:.2f} | {row.over_us:.1f} |"
        for row in result.rows
    ]
    lines += [f"\n{name}: {value}" for name, value in result.facts.items()]
    return "\n".join(lines) + "\n"


def environment() -> dict[str, Any]:
    """What the figures were taken on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except ModuleNotFoundError:
            continue
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "packages": versions,
    }


def save(results: Sequence[Result], directory: Path, name: str) -> Path:
    """One JSON a question group, with versions."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    body = {
        "environment": environment(),
        "argv": sys.argv[1:],
        "results": [
            {
                "question": each.question,
                "rounds": each.rounds,
                "facts": dict(each.facts),
                "rows": [asdict(row) for row in each.rows],
            }
            for each in results
        ],
    }
    path.write_text(json.dumps(body, indent=2) + "\n")
    return path
