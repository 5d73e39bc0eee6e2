"""What the demonstration tells a node and what the node answers: one JSON object a line, over its pipes.

Decides the form alone. Times are seconds on the boot-time clock of the machine, which all its processes share. A store
URL and a session id come over the pipe and never as an argument: arguments can be read by everybody on the machine.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import msgspec


class Begin(msgspec.Struct, tag=True, kw_only=True):
    """The first line: which store, and what to remove if the demonstration dies before it says `Stop`."""

    store: str
    namespace: str
    lease: float
    server_key: str
    scratch: str | None


class SignIn(msgspec.Struct, tag=True):
    """Sign the sample user in."""


class Warm(msgspec.Struct, tag=True, kw_only=True):
    """Ask for this session until it is answered from the near copy, then count what many more checks cost."""

    id: str


class Watch(msgspec.Struct, tag=True, kw_only=True):
    """Check this session until it is refused, at most for `seconds`. Answered twice: at once, and at the end."""

    id: str
    seconds: float


class Revoke(msgspec.Struct, tag=True, kw_only=True):
    """End this session, and check it here."""

    id: str
    sid: str


class Cut(msgspec.Struct, tag=True):
    """From now on nothing the store tells reaches this node."""


class Mend(msgspec.Struct, tag=True):
    """Let the store be heard again."""


class Stop(msgspec.Struct, tag=True):
    """The demonstration is over and cleans up by itself."""


Order: TypeAlias = SignIn | Warm | Watch | Revoke | Cut | Mend | Stop


class Ready(msgspec.Struct, tag=True, kw_only=True):
    """This node has reached its store."""

    pid: int


class Failed(msgspec.Struct, tag=True, kw_only=True):
    """It could not be done; `why` is one line."""

    why: str


class Done(msgspec.Struct, tag=True):
    """It is done."""


class SignedIn(msgspec.Struct, tag=True, kw_only=True):
    """The secret id and the public handle of the new session."""

    id: str
    sid: str


class Warmed(msgspec.Struct, tag=True, kw_only=True):
    """How many checks were made, how many the near copy answered, and how often the store was asked for it."""

    checks: int
    near: int
    commands: int


class Watching(msgspec.Struct, tag=True):
    """The session is accepted here, and is being checked."""


class Watched(msgspec.Struct, tag=True, kw_only=True):
    """What the checks found.

    `refused_at`: when the first refusal was at hand; None when there was none. `accepted_at`: when the last check
    began that was answered with yes. `near` of the `checks` before the refusal were answered from the near copy, and
    the store was asked `commands` times, the refusal included. `again`: acceptances after the refusal; one is too many.
    """

    refused_at: float | None
    accepted_at: float
    checks: int
    near: int
    commands: int
    again: int


class Revoked(msgspec.Struct, tag=True, kw_only=True):
    """When the revoke was about to be sent, when it was answered, and whether this node refused the session then."""

    sent_at: float
    answered_at: float
    refused: bool


Answer: TypeAlias = Ready | Failed | Done | SignedIn | Warmed | Watching | Watched | Revoked

_ENCODER: Final = msgspec.json.Encoder()
_BEGIN: Final[msgspec.json.Decoder[Begin]] = msgspec.json.Decoder(Begin)
_ORDER: Final[msgspec.json.Decoder[Order]] = msgspec.json.Decoder(Order)
_ANSWER: Final[msgspec.json.Decoder[Answer]] = msgspec.json.Decoder(Answer)


def line_of(message: Begin | Order | Answer) -> bytes:
    """A message as it goes over the pipe."""
    return _ENCODER.encode(message) + b"\n"


def read_begin(line: bytes) -> Begin:
    """The first line of a node. Raises: msgspec.DecodeError."""
    return _BEGIN.decode(line)


def read_order(line: bytes) -> Order:
    """A later line of a node. Raises: msgspec.DecodeError."""
    return _ORDER.decode(line)


def read_answer(line: bytes) -> Answer:
    """What a node says. Raises: msgspec.DecodeError."""
    return _ANSWER.decode(line)
