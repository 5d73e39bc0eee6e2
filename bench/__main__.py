"""`./run bench [GROUP …] [--full] [--again] [--out DIR]`: run benchmarks and print their tables.

All groups without a name. The default run keeps to 15 minutes on two cores: a group that has used up its share of
them runs fewer rounds. `--full` takes hours and may be stopped and started again: what is finished is printed from its
file and not measured again, unless `--again`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from bench.harness import environment, load, save, share, show
from bench.traffic import NotMeasured

# Seconds of the default run; their sum stays below 15 minutes with what starting servers takes.
GROUPS: Mapping[str, float] = {
    "cookies": 20,
    "imports": 30,
    "logins": 40,
    "peers": 100,
    "check": 220,
    "end_to_end": 140,
    "requests": 100,
    "revocations": 60,
    "fill_race": 5,
    "login_storm": 35,
    "rotations": 45,
    "tokens": 50,
}
ONLY_FULL = ("express",)


def main() -> int:
    parser = argparse.ArgumentParser(prog="./run bench", description=__doc__)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, *ONLY_FULL, []], help="which questions; all if none")
    parser.add_argument("--full", action="store_true", help="everything, with more rounds: hours, and resumable")
    parser.add_argument("--again", action="store_true", help="with --full: measure again what is finished")
    parser.add_argument(
        "--out", type=Path, help="directory for JSON files; default build/bench, with --full build/bench/full"
    )
    arguments = parser.parse_args()
    full: bool = arguments.full
    out: Path = arguments.out or Path("build/bench/full" if full else "build/bench")
    missing: list[str] = []
    began = time.monotonic()
    facts = environment()
    print(f"{facts['date']}, CPython {facts['python']}, {facts['machine']}, {facts['processor']}\n")
    for group in arguments.groups or (*GROUPS, *(ONLY_FULL if full else ())):
        module = import_module(f"bench.{group}")
        parts: tuple[str, ...] = (*getattr(module, "PARTS", ()), *(getattr(module, "ONLY_FULL", ()) if full else ()))
        seconds = None if full else GROUPS.get(group)
        group_began = time.monotonic()
        for place, part in enumerate(parts or ("",), 1):
            name = f"{group}-{part}" if part else group
            # What one part leaves over is for those that follow.
            left = None if seconds is None else seconds * place / max(1, len(parts)) - time.monotonic() + group_began
            with share(left):
                try:
                    run_part(module, part, name, out, full=full, again=arguments.again)
                except NotMeasured as why:
                    print(f"### {name}: NOT MEASURED: {why}\n", flush=True)
                    missing.append(name)
    print(f"({time.monotonic() - began:.0f} s in all)")
    return 1 if missing else 0


def run_part(module: object, part: str, name: str, out: Path, *, full: bool, again: bool) -> None:
    """Measure one part, print its tables and keep them; or print what a full run has kept."""
    kept = out / f"{name}.json"
    if full and not again and kept.exists():
        where, results = load(kept)
        for result in results:
            print(show(result, where))
        print(f"({kept}: finished before, not measured again)\n", flush=True)
        return
    began = time.monotonic()
    run = getattr(module, "run")  # noqa: B009
    rounds = 31 if full else 9
    results = run(rounds=rounds, full=full, part=part) if part else run(rounds=rounds, full=full)
    for result in results:
        print(show(result))
    print(f"({save(results, out, name)}, {time.monotonic() - began:.0f} s)\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
