"""`coatcheck demo`: watch a session end in several processes at once, with the delay of each.

Decides how it is shown: a table that is drawn over itself on a terminal, plain lines elsewhere.
"""

from __future__ import annotations

import logging
import shutil
import sys
from typing import TYPE_CHECKING

import click

from coatcheck.errors import StoreUnavailable
from coatcheck.server.cli.output import Failed, Refused, emit, json_option, printable, table, talk
from coatcheck.server.cli.work import run

if TYPE_CHECKING:
    from coatcheck.server.demo.measuring import Stage

_PAUSE_SECONDS = 0.2


@click.command(
    epilog="""\b
Examples:
  coatcheck demo
  coatcheck demo --store redis://127.0.0.1 --nodes 8
  coatcheck demo --cut            # one node hears nothing: the lease
  coatcheck demo --page           # and a page with a button"""
)
@click.option("--nodes", metavar="NUMBER", type=int, default=4, help="Processes, each a node.  [4]")
@click.option("--rounds", metavar="NUMBER", type=int, default=20, help="Sessions to end.  [20]")
@click.option(
    "--store", metavar="URL", default=None, help="Any store but memory:.  [a SQLite file, removed afterwards]"
)
@click.option("--lease", metavar="SECONDS", type=float, default=1.0, help="How long a node goes without news.  [1]")
@click.option("--cut", is_flag=True, help="The last node hears nothing of the store: its lease ends the session.")
@click.option("--page", is_flag=True, help="Also serve a page on this machine, for ten minutes or until Ctrl-C.")
@click.option("--port", metavar="NUMBER", type=int, default=0, help="Port of the page; 0 takes a free one.  [0]")
@json_option
def demo(
    nodes: int, rounds: int, store: str | None, lease: float, cut: bool, page: bool, port: int, as_json: bool
) -> None:
    """Show that a session is known to several processes and ended in all of them at once."""
    from coatcheck.server.demo.nodes import DemoFailed
    from coatcheck.server.demo.show import Plan, Told, perform
    from coatcheck.server.demo.table import as_json as measured
    from coatcheck.server.demo.table import verdict

    is_terminal = sys.stdout.isatty() and not as_json
    plan = Plan(
        store=store,
        nodes=nodes,
        rounds=rounds,
        lease=lease,
        cut=cut,
        port=port if page else None,
        pause=_PAUSE_SECONDS if is_terminal or page else 0.0,
    )
    screen = _Screen(is_terminal=is_terminal, is_silent=as_json)
    # Its pool tells every attempt; what became of them is told once.
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)
    try:
        shown = run(perform(plan, Told(ready=screen.ready, warm=screen.warm, step=screen.step)))
    except StoreUnavailable as away:
        raise Refused(f"{away.detail}; see that it runs and is the right address, or leave --store out") from away
    except DemoFailed as broken:
        raise Failed(str(broken)) from broken
    stage = screen.stage
    if stage is None or not (shown or stage.rounds):
        raise Failed("stopped before anything was measured")
    if not screen.is_drawn:
        screen.draw()
    emit(measured(plan.kind, stage), verdict(stage), as_json=as_json)
    if not shown:
        raise Failed(f"stopped after {len(stage.rounds)} of {rounds} rounds")
    if stage.lost:
        raise click.exceptions.Exit(1)


class _Screen:
    """Where the rounds are shown."""

    def __init__(self, *, is_terminal: bool, is_silent: bool) -> None:
        self.stage: Stage | None = None
        self.is_drawn = False
        """Whether the table is on the screen already."""
        self._is_terminal = is_terminal
        self._is_silent = is_silent
        self._told = 0

    def ready(self, stage: Stage, address: str | None) -> None:
        """The nodes run."""
        self.stage = stage
        if address is not None:
            # Also beside JSON, where it is the only way to the page.
            talk(f"The page: {address}")
        if not self._is_silent:
            pids = ", ".join(str(node.pid) for node in stage.nodes)
            click.echo(f"{len(stage.nodes)} processes over one store: {pids}")

    def warm(self, stage: Stage) -> None:
        """Every node has been asked for the first session."""
        if self._is_silent:
            return
        for tally in stage.tallies.values():
            click.echo(
                f"node {tally.node} knows the session: {tally.warm_checks} checks, "
                f"commands asked = {tally.warm_commands}"
            )
        sys.stdout.flush()

    def step(self, stage: Stage) -> None:
        """Something was measured."""
        if self._is_silent:
            return
        if self._is_terminal:
            if stage.rounds or stage.refused:
                self.draw()
            return
        from coatcheck.server.demo.table import line_of

        for done in stage.rounds[self._told :]:
            click.echo(line_of(done))
        self._told = len(stage.rounds)
        sys.stdout.flush()

    def draw(self) -> None:
        """The table; on a terminal over the one before."""
        if self.stage is None or self._is_silent:
            return
        from coatcheck.server.demo.table import HEADS, rows

        lines = table(HEADS, rows(self.stage))
        if self._is_terminal:
            # One line of the table is one of the terminal, or the cursor would not find back.
            width = max(20, shutil.get_terminal_size().columns - 1)
            lines = tuple(line[:width] for line in lines)
            if self.is_drawn:
                click.echo(f"\x1b[{len(lines)}F\x1b[J", nl=False)
            self.is_drawn = True
        for line in lines:
            click.echo(printable(line))
        sys.stdout.flush()
