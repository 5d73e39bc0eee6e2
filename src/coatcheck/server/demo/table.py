"""What was measured as a table and as JSON: one row a node. Decides how a delay is written, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from coatcheck.server.demo.measuring import Round, Stage, Tally

HEADS: Final = ("node", "process", "rounds", "last", "median", "worst", "lost", "answered from")


def milliseconds(seconds: float | None) -> str:
    """A delay as people read it; "-" when there is none."""
    return "-" if seconds is None else f"{seconds * 1000:.2f} ms"


def rows(stage: Stage) -> list[tuple[str, ...]]:
    """The table without its heads."""
    return [_row(tally, stage.lease) for tally in stage.tallies.values()]


def line_of(done: Round) -> str:
    """One round as a line."""
    delays = ", ".join(
        f"node {each.node}{' (cut)' if each.is_cut else ''} "
        + ("LOST" if each.delay is None else milliseconds(each.delay))
        for each in done.seen
    )
    return f"round {done.number}: ended on node {done.ended_on} in {milliseconds(done.took)}; refused by {delays}"


def verdict(stage: Stage) -> str:
    """What it comes to."""
    measured = sum(len(tally.delays) for tally in stage.tallies.values())
    text = f"sessions ended: {len(stage.rounds)}, refusals measured: {measured}, refusals lost: {stage.lost}"
    if stage.cut is not None:
        text += f"; node {stage.cut.number} heard nothing and refused within the lease of {stage.lease:g} s"
    return text if not stage.lost else f"{text.partition(';')[0]}: a node accepted a session that was over"


def as_json(kind: str, stage: Stage) -> Mapping[str, object]:
    """Everything, in milliseconds. `kind`: of the store."""
    return {
        "store": kind,
        "lease_ms": stage.lease * 1000,
        "rounds": len(stage.rounds),
        "lost": stage.lost,
        "nodes": [
            {
                "node": tally.node,
                "process": tally.pid,
                "feed": "cut" if tally.is_cut else "heard",
                "rounds": len(tally.delays),
                "last_ms": _number(tally.last),
                "median_ms": _number(tally.middle),
                "worst_ms": _number(tally.worst),
                "lost": tally.lost,
                "warm_checks": tally.warm_checks,
                "commands_asked": tally.warm_commands,
            }
            for tally in stage.tallies.values()
        ],
        "each": [
            {
                "round": done.number,
                "ended_on": done.ended_on,
                "revoke_ms": _number(done.took),
                "delays_ms": {str(each.node): _number(each.delay) for each in done.seen},
            }
            for done in stage.rounds
        ],
    }


def _row(tally: Tally, lease: float) -> tuple[str, ...]:
    source = "near copy" if not tally.warm_commands else "the store"
    answered = f"{source}, {tally.warm_commands} commands"
    return (
        str(tally.node),
        str(tally.pid),
        str(len(tally.delays)),
        milliseconds(tally.last),
        milliseconds(tally.middle),
        milliseconds(tally.worst),
        str(tally.lost),
        f"{answered}; feed cut, lease {lease:g} s" if tally.is_cut else answered,
    )


def _number(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)
