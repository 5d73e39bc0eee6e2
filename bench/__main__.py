"""`./run bench [GROUP …] [--full] [--out DIR]`: run benchmarks and print their tables; all groups without a name."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from bench.harness import environment, save, show

GROUPS = ("cookies", "imports", "logins", "requests", "rotations", "tokens")


def main() -> None:
    parser = argparse.ArgumentParser(prog="./run bench", description=__doc__)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], help="which questions; all without a name")
    parser.add_argument("--full", action="store_true", help="more rounds")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="directory for the JSON files")
    arguments = parser.parse_args()
    rounds = 31 if arguments.full else 9
    facts = environment()
    print(f"{facts['date']}, CPython {facts['python']}, {facts['machine']}\n")
    for group in arguments.groups or GROUPS:
        results = import_module(f"bench.{group}").run(rounds=rounds, full=arguments.full)
        for result in results:
            print(show(result))
        print(f"({save(results, arguments.out, group)})\n")


if __name__ == "__main__":
    main()
