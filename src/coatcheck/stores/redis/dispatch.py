"""Carries commands to the primaries that serve them: grouping, redirections, scripts a server forgot, failovers.

Decides what is asked again: only what a node refused to carry out, or what never reached one; a write that may have
happened is reported as such and left to the caller. It must never retry for longer than the deadline of the verb.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from coatcheck.deadlines import time_left
from coatcheck.errors import OutcomeUnknown, StoreUnavailable, Unconfirmed
from coatcheck.stores.options import StoreOptions
from coatcheck.stores.redis.driver import Driver, Refused, Word
from coatcheck.stores.redis.nodes import Address, NodeFailed, Reply, nodes_of, parse_target

# Redirections and refusals that one verb follows: enough for a slot that moves twice while a script is not loaded.
_ROUNDS: Final = 6
_TRYAGAIN_SECONDS: Final = 0.02
_LAST_TRY_SECONDS: Final = 0.25
# What WAIT leaves of the time, so that its answer still arrives: a server looks ten times a second who waited enough.
_ANSWER_SECONDS: Final = 0.15
# WAIT speaks for what its own connection wrote last. A verb that is repeated may have nothing left to write: then the
# moment at which the key goes is written again, which needs no room and changes nothing. What was written before it on
# this server, by whomever, has reached who has that.
_TOUCH: Final = "local left = redis.call('PTTL', KEYS[1]) if left > 0 then redis.call('PEXPIRE', KEYS[1], left) end"


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script and its SHA-1, by which a server knows it."""

    source: str
    sha: str


@dataclass(frozen=True, slots=True)
class Call:
    """One command for the primary of a slot; with a script the command is its EVALSHA.

    `divisible`: its caller can ask for the keys one by one, so a slot on its way ends it at once with `SlotMoves`.
    `confirm`: what it writes counts only when `StoreOptions.replicas` have it; a key that it leaves where it was.
    """

    slot: int
    words: tuple[Word, ...]
    script: Script | None = None
    divisible: bool = False
    confirm: Word | None = None


class SlotMoves(Exception):
    """A divisible call met a slot that is on its way to another node; nothing was carried out."""


class Dispatcher:
    """Sends commands to the right primaries, within the deadline. Any number of threads, tasks, loops and forks."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        """Raises: ConfigurationError."""
        self.target: Final = parse_target(url)
        """What the URL says."""
        target = self.target
        self._options = options
        self._nodes = nodes_of(target)
        self._driver = Driver(target, options)
        self._sentinels = target.shape == "sentinel"
        self.spread: Final = target.shape == "cluster"
        """Whether keys of different slots are at different nodes, out of one script's reach."""

    def until(self) -> float:
        """The moment of the monotonic clock by which a verb that starts now has ended.

        Raises: StoreUnavailable when its request has used up its time.
        """
        return time.monotonic() + time_left(self._options.deadline)

    async def perform(
        self,
        calls: Sequence[Call],
        *,
        write: bool,
        until: float | None = None,
        answered: Callable[[Address], None] | None = None,
    ) -> list[Reply]:
        """Carry out commands, pipelined per node, and return their answers in order.

        `answered` is told which node each answer comes from, before the caller has it.

        Raises: StoreUnavailable; OutcomeUnknown for a `write` that may have happened. Where one of several nodes
        fails, the calls to the others are still made. OutcomeUnknown also where replicas did not confirm what a `Call`
        wants confirmed: it was written, and a failover may forget it. SlotMoves: see `Call`.
        """
        end = self.until() if until is None else until
        tasks = [_Task(number, call) for number, call in enumerate(calls)]
        work = _Work(write=write, until=end, tasks=tasks, answered=answered)
        rounds = 0
        while rounds < _ROUNDS:
            await self._round(work)
            if not work.tasks:
                if work.failure is not None:
                    raise work.failure
                return [work.answers[number] for number in range(len(calls))]
            # A slot that is on its way is waited for almost as long as the verb may last; other refusals are counted.
            if not any(task.wait for task in work.tasks):
                rounds += 1
            elif time.monotonic() + _LAST_TRY_SECONDS >= work.until:
                break
        if work.failure is not None:
            raise work.failure
        gave_up = StoreUnavailable(f"redis: gave up: {work.refused and work.refused.text}")
        raise gave_up from (work.refused.cause if work.refused is not None else None)

    async def at(
        self, address: Address, *commands: Sequence[Word], until: float, sentinel: bool = False
    ) -> list[Reply]:
        """Carry out commands that change nothing of a session at one node. Raises: StoreUnavailable."""
        try:
            answers = await self._driver.exchange(address, commands, until, sentinel=sentinel)
        except NodeFailed as failed:
            raise _failure(failed, write=False) from failed.__cause__
        replies: list[Reply] = []
        for answer in answers:
            if isinstance(answer, Refused):
                raise StoreUnavailable(f"redis: {answer.text}") from answer.cause
            replies.append(answer)
        return replies

    async def primaries(self, until: float) -> Sequence[tuple[int, Address]]:
        """Every primary with its first slot. Raises: StoreUnavailable."""
        try:
            return await self._nodes.primaries(self._ask, until)
        except NodeFailed as failed:
            raise _failure(failed, write=False) from failed.__cause__

    async def primary(self, slot: int, until: float) -> Address:
        """The primary of a slot. Raises: StoreUnavailable."""
        try:
            return await self._nodes.primary_of(slot, self._ask, until)
        except NodeFailed as failed:
            raise _failure(failed, write=False) from failed.__cause__

    async def recheck(self, until: float) -> Address | None:
        """Whom a sentinel names as primary now; `None` where none can say, or there are none."""
        return await self._nodes.recheck(self._ask, until)

    def doubt(self, address: Address) -> None:
        """This node failed, or is not what it was: who serves its slots is asked again."""
        self._nodes.doubt(address)

    def forget(self, address: Address) -> None:
        """Another server answers at this address now: no connection made until now is used again."""
        self._driver.forget(address)

    async def close(self) -> None:
        """Close every connection; one in use is closed by its user. May be used again."""
        await self._driver.close()

    async def _round(self, work: _Work) -> None:
        """Send every pending call once; those that need another try are left in `work.tasks`."""
        groups: dict[Address, list[_Task]] = {}
        for task in work.tasks:
            try:
                address = task.asked or await self._nodes.primary_of(task.call.slot, self._ask, work.until)
            except NodeFailed as failed:
                if work.failure is not None:
                    raise work.failure from work.failure.__cause__
                raise _failure(failed, write=False) from failed.__cause__
            groups.setdefault(address, []).append(task)
        work.tasks = []
        for done, (address, group) in enumerate(groups.items()):
            now = time.monotonic()
            # A node that is away leaves its share of the time to the others.
            share = now + (work.until - now) / (len(groups) - done)
            try:
                work.tasks += await self._at_node(address, group, work, share)
            except StoreUnavailable as unavailable:
                work.failure = work.failure or unavailable
        if any(task.wait for task in work.tasks):
            await self._options.waits.sleep(max(0.0, min(_TRYAGAIN_SECONDS, work.until - time.monotonic())))

    async def _at_node(self, address: Address, group: list[_Task], work: _Work, until: float) -> list[_Task]:
        """Send a node its calls; those it did not carry out, for a reason that another try cures, are returned."""
        commands = [command for task in group for command in (*task.commands(), *self._proof(task, until))]
        try:
            replies = iter(await self._driver.exchange(address, commands, until))
        except NodeFailed as failed:
            elsewhere = self._nodes.doubt(address)
            late = time.monotonic() >= until
            if failed.sent or late or not elsewhere or any(task.failed for task in group):
                raise _failure(failed, write=work.write) from failed.__cause__
            for task in group:
                task.failed, task.asked = True, None
            return group
        again: list[_Task] = []
        for task in group:
            answer = [next(replies) for _ in task.commands()]
            proof = [next(replies) for _ in self._proof(task, until)]
            refused = next((each for each in answer if isinstance(each, Refused)), None)
            last = answer[-1]
            if refused is not None and task.call.divisible and refused.code in ("ASK", "TRYAGAIN"):
                raise SlotMoves(refused.text)
            if refused is None and not isinstance(last, Refused):
                work.answers[task.number] = last
                if work.answered is not None:
                    work.answered(address)
                work.failure = work.failure or self._unconfirmed(address, proof)
            elif refused is not None and self._cured(task, address, refused):
                work.refused = refused
                again.append(task)
            elif refused is not None:
                unavailable = StoreUnavailable(f"redis: {refused.text}")
                unavailable.__cause__ = refused.cause
                work.failure = work.failure or unavailable
        return again

    def _proof(self, task: _Task, until: float) -> list[Sequence[Word]]:
        """What has to go behind a call, on its connection, so that its replicas are waited for."""
        if task.call.confirm is None or not self._options.replicas:
            return []
        left = until - time.monotonic()
        milliseconds = max(1, int(max(left / 2, left - _ANSWER_SECONDS) * 1000))
        asking: list[Sequence[Word]] = [] if task.asked is None else [("ASKING",)]
        return [*asking, ("EVAL", _TOUCH, 1, task.call.confirm), ("WAIT", self._options.replicas, milliseconds)]

    def _unconfirmed(self, address: Address, proof: Sequence[Reply | Refused]) -> StoreUnavailable | None:
        """Why what was carried out does not count."""
        if not proof:
            return None
        refused = next((each for each in proof if isinstance(each, Refused)), None)
        if refused is not None:
            unconfirmed = Unconfirmed(f"redis: done, but whether replicas have it cannot be asked: {refused.text}")
            unconfirmed.__cause__ = refused.cause
            return unconfirmed
        confirmed, wanted = proof[-1] if isinstance(proof[-1], int) else 0, self._options.replicas
        if confirmed >= wanted:
            return None
        return Unconfirmed(
            f"redis: {confirmed} of {wanted} replicas of {address[0]}:{address[1]} confirmed it, and a failover may "
            "forget it: repeat it"
        )

    def _cured(self, task: _Task, address: Address, refused: Refused) -> bool:
        """Whether the node carried out nothing and another try, as arranged here, may succeed."""
        asked, task.asked, task.load, task.wait = task.asked, None, False, False
        match refused.code:
            case "NOSCRIPT":
                task.asked, task.load = asked, True
                return task.call.script is not None
            case "MOVED" if refused.elsewhere is not None:
                self._nodes.moved(task.call.slot, refused.elsewhere)
                return True
            case "ASK":
                task.asked = refused.elsewhere
                return True
            case "TRYAGAIN":
                task.asked, task.wait = asked, True
                return True
            case "READONLY":
                # A primary that was deposed: once, or a group without any primary would be asked in circles.
                elsewhere = self._nodes.doubt(address)
                again, task.failed = elsewhere and not task.failed, True
                return again
            case "CLUSTERDOWN" | "MASTERDOWN":
                self._nodes.doubt(address)
                return False
            case _:
                return False

    async def _ask(self, address: Address, words: Sequence[str], until: float) -> Reply:
        (answer,) = await self._driver.exchange(address, [words], until, sentinel=self._sentinels)
        if isinstance(answer, Refused):
            raise NodeFailed(answer.text, sent=False) from answer.cause
        return answer


@dataclass(slots=True)
class _Task:
    """A call on its way: what has to go before it, and where it was told to go."""

    number: int
    call: Call
    load: bool = False
    wait: bool = False
    failed: bool = False
    asked: Address | None = None

    def commands(self) -> list[Sequence[Word]]:
        before: list[Sequence[Word]] = []
        if self.load and self.call.script is not None:
            before.append(("SCRIPT", "LOAD", self.call.script.source))
        if self.asked is not None:
            # Holds for the one command after it.
            before.append(("ASKING",))
        return [*before, self.call.words]


@dataclass(slots=True, kw_only=True)
class _Work:
    """The calls of one verb, what was answered so far, the first failure and the last refusal that was cured."""

    write: bool
    until: float
    tasks: list[_Task]
    answered: Callable[[Address], None] | None
    answers: dict[int, Reply] = field(default_factory=dict)
    failure: StoreUnavailable | None = None
    refused: Refused | None = None


def _failure(failed: NodeFailed, *, write: bool) -> StoreUnavailable:
    if failed.sent and write:
        return OutcomeUnknown(f"redis: no answer, the write may have happened: {failed}")
    return StoreUnavailable(f"redis: {failed}")
