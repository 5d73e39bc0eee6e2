"""The verbs and where each one lives; errors as one line and an exit status.

Decides the exit status: 0 done, 1 it could not be done, 2 the request or a setting is wrong. No trace ever reaches
the terminal for a foreseen failure. It must import no verb before that verb is used.
"""

from __future__ import annotations

import errno
from importlib import import_module
from typing import Any, Final

import click

from coatcheck import __version__
from coatcheck.errors import CoatcheckError, ConfigurationError, StoreUnavailable
from coatcheck.server.cli.output import Failed, Refused

# Module and summary; the summary stands here so that `--help` need not import the module.
VERBS: Final = {
    "init": ("init", "Write a small project that works: one file, a key and a test."),
    "serve": ("serve", "Run the server."),
    "user": ("user", "Add, list, disable and unlock people."),
    "session": ("session", "List sessions and end them."),
    "token": ("token", "Look at tokens and deny them."),
    "key": ("key", "Make keys, and look after those that sign."),
    "client": ("client", "Let services follow what is denied."),
    "profile": ("profile", "List the profiles, show one, compare two."),
    "risk": ("risk", "See what rules about risk would have done."),
    "migrate": ("migrate", "Bring the database up to this release."),
    "doctor": ("doctor", "Look for what is wrong or weak, and say the cure."),
    "config": ("config", "Show and check the settings."),
    "proxy-config": ("proxy_config", "Print the configuration of a gateway in front."),
    "demo": ("demo", "Watch a session end on several nodes at once."),
    "version": ("version", "Say which release this is."),
}


class Verbs(click.Group):
    """A group whose verbs are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all verbs."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one verb."""
        if cmd_name not in VERBS:
            return None
        module = import_module(f"coatcheck.server.cli.{VERBS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the verbs into the help text."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in VERBS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a verb; what it raises on purpose becomes one line and a status."""
        try:
            return super().invoke(ctx)
        except CoatcheckError as wrong:
            asked_wrongly = isinstance(wrong, ConfigurationError) or 400 <= wrong.status < 500
            cure = "; `coatcheck doctor` looks at each part" if isinstance(wrong, StoreUnavailable) else ""
            raise (Refused if asked_wrongly else Failed)(f"{wrong.detail}{cure}") from wrong
        except OSError as wrong:
            if wrong.errno == errno.EPIPE:
                raise
            where = f"{wrong.filename}: " if wrong.filename else ""
            raise Refused(f"{where}{wrong.strerror or wrong}") from wrong


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  coatcheck serve
  coatcheck user add minsu --role admin
  coatcheck session revoke --user minsu --reason "stolen laptop"

\b
Settings come from flags, then COATCHECK_* in the environment (COATCHECK_DATABASE, and
COATCHECK_SERVER_KEY_FILE for a secret in a file), then coatcheck.toml, then defaults.""",
)
@click.version_option(__version__, "-V", "--version", message="coatcheck %(version)s")
def coatcheck() -> None:
    """Login state: sign in once, stay signed in on every server, end it everywhere at once."""
