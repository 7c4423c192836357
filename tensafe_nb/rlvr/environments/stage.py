"""The stage on which generators live between turns: in a process of their own, or where there is none, here.

A cue goes in (begin, what the policy said, that it says no more), a reply comes out: what is told next, the outcome,
or an error as text. Both are plain data. This file runs in the processes and imports nothing heavy.
"""

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from tensafe_nb.errors import ValidationError
from tensafe_nb.rlvr.environments.environment import Environment, Outcome, RolloutEnded, Turn
from tensafe_nb.rlvr.rewards.conventions import failed, number_of
from tensafe_nb.rlvr.scoring.shipping import arrived

Plain = (str, int, float, bool, type(None))


class Cue(NamedTuple):
    """What happens to one conversation.

    Attributes:
        number: Of the conversation, on its stage.
        kind: "begin" with the row, "said" with the policy's words, "over" with the reason, "forget" with nothing.
        value: The row, the words, or the reason.
        seed: Of the conversation's random numbers, where it begins.
    """

    number: int
    kind: str
    value: Any = None
    seed: int = 0


class Reply(NamedTuple):
    """What an environment replies to a cue: it tells something, or it is over.

    Attributes:
        told: A text, or messages; None when it is over.
        reward: Of the turn before where it tells something; of the outcome where it is over.
        parts: Of the outcome.
        meta: Of the turn before, or of the outcome.
        error: Why there is no outcome.
        timed_out: It ran out of time.
    """

    told: Any = None
    reward: float | None = None
    parts: dict[str, float] | None = None
    meta: dict[str, Any] | None = None
    error: str | None = None
    timed_out: bool = False

    @property
    def over(self) -> bool:
        return self.told is None


@contextmanager
def seeded(seed: int, *, alone: bool) -> Iterator[None]:
    """Let Python's and NumPy's global generators begin at a seed; those of everybody else here go on as if never asked.

    A state to be kept from turn to turn would cost more than all the rest of one: each turn has a seed of its own.
    """
    numpy = sys.modules.get("numpy.random")
    outside = None if alone else (random.getstate(), None if numpy is None else numpy.get_state())
    random.seed(seed)
    if numpy is not None:
        numpy.seed(seed % 2**32)
    try:
        yield
    finally:
        if outside is not None:
            random.setstate(outside[0])
            if outside[1] is not None:
                sys.modules["numpy.random"].set_state(outside[1])


@dataclass(slots=True)
class Playing:
    """A conversation under way: its generator, its seed, and how often it had its turn."""

    generator: Any
    seed: int
    turns: int = 0

    def dice(self, alone: bool) -> AbstractContextManager[None]:
        """Return the random numbers of its next turn."""
        self.turns += 1
        return seeded(self.seed + self.turns - 1, alone=alone)


class Stage:
    """The conversations of one environment that are under way in this process.

    Args:
        environment: Whose.
        original: The same as `shipped` writes it: each conversation then has a copy of its own.
        alone: Nobody else in this process draws random numbers.
    """

    def __init__(
        self, environment: Environment, original: bytes | None = None, *, alone: bool = False
    ) -> None:
        self._environment, self._original, self._alone = environment, original, alone
        self._playing: dict[int, Playing] = {}

    def again(self, *, alone: bool = False) -> "Stage":
        """Return an empty stage for the same environment."""
        return Stage(self._environment, self._original, alone=alone)

    def begun(self, cue: Cue) -> Any:
        """Return the generator of a conversation that begins."""
        chosen: Environment = self._environment if self._original is None else arrived(self._original)
        return chosen(dict(cue.value))

    def play(self, cue: Cue) -> Reply:
        """Let one conversation go on; what its generator raises becomes text."""
        number = cue.number
        try:
            if cue.kind == "begin":
                self._close(number)
                self._playing[number] = Playing(self.begun(cue), cue.seed)
            if cue.kind == "forget" or number not in self._playing:
                self._close(number)
                return Reply()
            one = self._playing[number]
            with one.dice(self._alone):
                reply = advanced(one.generator, cue)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # user code may raise anything: kept as text, counted
            reply = Reply(error=failed(error).error)
        if reply.over:
            self._close(number)
        return reply

    def answered(self, unit: Sequence[Any]) -> list[Any]:
        """Do the same for a process's pipe: one cue, as a list, to a reply as a list."""
        return list(self.play(Cue(*unit)))

    def _close(self, number: int) -> None:
        one = self._playing.pop(number, None)
        if one is not None:
            try:
                with one.dice(self._alone):
                    one.generator.close()
            except Exception:  # noqa: BLE001  # it is over: nobody is left to be told
                pass


def advanced(generator: Any, cue: Cue) -> Reply:
    """Let a generator go on to its next yield, or its end."""
    try:
        match cue.kind:
            case "begin":
                return told_or_over(next(generator))
            case "said":
                return told_or_over(generator.send(cue.value))
        return after_the_end(generator.throw(RolloutEnded(cue.value)), cue.value)
    except StopIteration as end:
        return outcome(end.value)
    except RolloutEnded as ended:
        if cue.kind != "over":
            raise
        return not_caught(ended)


def told_or_over(value: Any) -> Reply:
    """Read what an environment yielded: a text, messages, a `Turn`, or, of an async one, its `Outcome`."""
    if isinstance(value, Outcome):
        return outcome(value)
    turn = value if isinstance(value, Turn) else Turn(value)
    reward = None if turn.reward is None else number_of(turn.reward)
    if turn.reward is not None and reward is None:
        raise ValidationError(
            f"it yielded a Turn with reward={str(turn.reward)[:80]!r}: a finite number is expected"
        )
    told = turn.text
    if isinstance(told, Mapping):
        told = [told]
    chat = isinstance(told, list | tuple) and told and all(isinstance(one, Mapping) for one in told)
    if not isinstance(told, str) and not chat:
        hint = ": return it, as the reward" if number_of(told) is not None else ""
        raise ValidationError(
            f"it yielded {str(told)[:80]!r}{hint}; what is told is a text, a list of messages, or a Turn of either"
        )
    return Reply(told if isinstance(told, str) else plain(told), reward, meta=plain(dict(turn.meta)) or None)


def outcome(value: Any) -> Reply:
    """Read what an environment returned: a number, None, or an `Outcome`."""
    given = value if isinstance(value, Outcome) else Outcome(value)
    reward = None if given.reward is None else number_of(given.reward)
    if given.reward is not None and reward is None:
        raise ValidationError(
            f"it returned {str(given.reward)[:80]!r}, expected a finite number, None or an Outcome"
        )
    parts = {str(name): part for name, value in given.parts.items() if (part := number_of(value)) is not None}
    return Reply(None, reward, parts or None, plain(dict(given.meta)) or None)


def after_the_end(value: Any, reason: str) -> Reply:
    """Read what came out of a generator that was told that the rollout is over: an outcome, or another question."""
    reply = told_or_over(value)
    return reply if reply.over else not_caught(RolloutEnded(reason))


def not_caught(ended: RolloutEnded) -> Reply:
    """Return the reply for a conversation that ended before its environment did: it has no reward."""
    if ended.reason == "turns":
        return Reply(
            error="it wanted another turn when max_turns were over: return before, raise max_turns, or catch "
            "rlvr.RolloutEnded around the yield and return a reward"
        )
    return Reply()


def plain(value: Any) -> Any:
    """Return what JSON knows; of anything else, its text."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Plain):
        return value
    return value.item() if hasattr(value, "item") and getattr(value, "size", 1) == 1 else str(value)
