"""A step's conversations, played turn by turn: all that are live are sampled together, in the order of their rows."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import dropwhile, takewhile
from typing import Any, Protocol

from tensafe_nb.config import SamplingConfig
from tensafe_nb.data.labels import check_context
from tensafe_nb.data.layouts import refuse_media
from tensafe_nb.data.messages import is_chat, template_options
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.futures import FutureHandle
from tensafe_nb.protocol.results import Prompt
from tensafe_nb.rlvr.environments.environment import Environment
from tensafe_nb.rlvr.environments.stage import Cue, Reply
from tensafe_nb.rlvr.environments.transcript import ChatScript, Scripts, Transcript, UnfitTemplateError
from tensafe_nb.rlvr.policy import PRIVATE, PolicyClient
from tensafe_nb.rlvr.rewards.builtin.shaping import overlong
from tensafe_nb.rlvr.rollouts.trajectories import RolloutGroup, Trajectory, TrajectoryBatch

Wait = Callable[[FutureHandle[Any]], Any]  # returns a handle's result: `run.wait` can be interrupted


class Host(Protocol):
    """Where generators live: makes their cues, each within a time limit, and returns the answers in order."""

    def play(self, cues: Sequence[Cue]) -> list[Reply]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class RowItem:
    """A row that an environment is given.

    Attributes:
        row: Its columns. A text or a chat is the column `prompt`, which an environment need not have.
        options: What the chat template takes beside the messages, tools for instance; they stay columns as well.
    """

    row: dict[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: Any) -> "RowItem":
        """Read a dict of columns, a text or a list of chat messages.

        Raises:
            ValidationError: It is none of these.
        """
        if isinstance(spec, str) or is_chat(spec):
            spec = {"prompt": spec}
        if not isinstance(spec, Mapping):
            raise ValidationError(
                f"a row of an environment is a dict of columns, a text or a list of messages, not {as_given(spec)}."
            )
        row = {str(name): value for name, value in spec.items()}
        refuse_media(row)
        return cls(row, template_options(row))

    @property
    def row_id(self) -> str:
        """A name that depends on its columns alone."""
        written = json.dumps(self.row, sort_keys=True, default=str)
        return hashlib.sha256(written.encode()).hexdigest()[:12]


def number_from(*facts: object) -> int:
    """Return 48 bits that depend on all that is given, and on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(facts).encode(), digest_size=6).digest(), "big")


@dataclass(slots=True)
class Game:
    """One conversation: its generator's number on the stage, its transcript, and what came of it."""

    number: int
    row: dict[str, Any]
    row_id: str
    stream: int  # of the policy's random numbers
    seed: int  # of the environment's
    transcript: Transcript
    outcome: Reply | None = None

    def prompt(self) -> Prompt:
        """Return what the policy is asked: all that was said so far, as tokens."""
        options = self.transcript.script.options
        chat = {} if options is None else {"chat": options}
        return {"tokens": [*self.transcript.prompt, *self.transcript.tokens], "stream": self.stream, **chat}

    def trajectory(self, version: int | None, environment: Environment, identity: str) -> Trajectory:
        """Return the conversation as a rollout; its reward is the outcome's and those of its turns."""
        said = self.transcript
        first = list(takewhile(lambda turn: turn.role != "assistant", said.turns))
        chat = isinstance(said.script, ChatScript)
        rollout = Trajectory(
            "\n".join(turn.text for turn in first),
            shown(said),
            self.row,
            said.prompt,
            said.tokens,
            said.logprobs,
            said.raw_logprobs,
            finish_reason=said.finish_reason,
            policy_version=version,
            seed=self.seed,
            prompt_id=self.row_id,
            mask=said.mask,
            entropy=said.nats / said.length if said.nats is not None and said.length else None,
            messages=[{"role": turn.role, "content": turn.text, **turn.meta} for turn in first]
            if chat
            else None,
            turns=said.turns,
        )
        settle(rollout, self.outcome or Reply(), environment, identity)
        return rollout


def shown(said: Transcript) -> str:
    """Return all that was said after the first words, as one text; the environment's lines begin with their role."""
    behind = dropwhile(lambda turn: turn.role != "assistant", said.turns)
    return "\n".join(
        turn.text if turn.role == "assistant" else f"[{turn.role}] {turn.text}" for turn in behind
    )


def settle(trajectory: Trajectory, outcome: Reply, environment: Environment, version: str) -> None:
    """Give a rollout the reward of its conversation: the outcome's, and those of its turns.

    Where a long turn is punished, the longest is: it is a turn that is cut at `max_new_tokens`.
    """
    turns = trajectory.turns or []
    reward = outcome.reward
    if reward is not None:
        reward += sum(turn.reward for turn in turns if turn.reward is not None)
    parts = {} if reward is None else {environment.name: reward}
    parts |= {f"{environment.name}/{name}": value for name, value in (outcome.parts or {}).items()}
    if reward is not None and environment.overlong is not None:
        longest = max((turn.stop - turn.start for turn in turns if turn.trained), default=0)
        most, cache = environment.overlong
        parts["overlong"] = overlong("", "", max_length=most, cache=cache, tokens=range(longest))
        reward += parts["overlong"]
    if turns and outcome.meta:
        turns[-1].meta |= outcome.meta
    trajectory.reward, trajectory.reward_error = reward, outcome.error
    trajectory.reward_parts, trajectory.reward_version = parts or None, version


def play(
    client: PolicyClient,
    environment: Environment,
    host: Host,
    items: Sequence[RowItem],
    sampling: SamplingConfig,
    scripts: Scripts,
    seed: int,
    wait: Wait,
) -> TrajectoryBatch:
    """Play `sampling.num_samples` conversations of each row, to their ends.

    Args:
        client: Whose policy speaks.
        environment: What it speaks with.
        host: Where the environment's generators live.
        items: The rows.
        sampling: How each turn is drawn.
        scripts: How what is told becomes tokens.
        seed: Of all random numbers, the policy's and the environment's. A rollout's own depend on it, on its row, and
            on its number among the rollouts of equal rows: not on what else is sampled.
        wait: Waits for a sample.
    """
    meeting = Meeting(client, environment, host, sampling.replace(num_samples=1, seed=seed), scripts)
    seen: Counter[str] = Counter()
    games: list[Game] = []
    columns, options = environment.told_with(scripts.template)
    for item in items:
        row_id = item.row_id
        for _ in range(sampling.num_samples):
            stream = number_from(row_id, seen[row_id])
            transcript = Transcript(scripts.script({**options, **item.options}))
            own = number_from(seed, stream)
            games.append(Game(len(games), {**item.row, **columns}, row_id, stream, own, transcript))
            seen[row_id] += 1
    version = meeting.play_out(games, wait)
    identity, size = environment.version, sampling.num_samples
    groups = []
    for number, item in enumerate(items):
        rollouts = [
            game.trajectory(version, environment, identity)
            for game in games[number * size : (number + 1) * size]
        ]
        prompt = next((rollout.prompt for rollout in rollouts if rollout.prompt), "")
        groups.append(RolloutGroup(item.row_id, prompt, rollouts, item.row, version, seed))
    private = PRIVATE in client.capabilities
    sampling = sampling.as_drawn(meeting.sampling.precision)
    return TrajectoryBatch(groups, sampling, private, environment.longest(sampling.max_new_tokens))


@dataclass(slots=True)
class Meeting:
    """Where policy and environment meet: one round after the other, until every conversation is over."""

    client: PolicyClient
    environment: Environment
    host: Host
    sampling: SamplingConfig  # of one turn
    scripts: Scripts

    def play_out(self, games: Sequence[Game], wait: Wait) -> int | None:
        """Play all games to their ends; return the version of the weights that spoke first."""
        version: int | None = None
        live = self.answer(games, [Cue(game.number, "begin", game.row, game.seed) for game in games])
        while live:
            sampled = wait(self.client.sample([game.prompt() for game in live], sampling=self.sampling))
            version = sampled.policy_version if version is None else version
            self.sampling = self.sampling.as_drawn(sampled.precision)  # "auto" chooses once
            for game, said in zip(live, sampled.sequences, strict=True):
                game.transcript.hear(said)
            said_by = zip(live, sampled.sequences, strict=True)
            live = self.answer(live, [Cue(game.number, "said", said.text) for game, said in said_by])
        return version

    def answer(self, games: Sequence[Game], cues: Sequence[Cue]) -> list[Game]:
        """Let the environment make its cues, and write down what it tells, or how it ends.

        Returns:
            The games in which the policy speaks next.
        """
        over: list[Cue] = []
        forgotten: list[Cue] = []
        for game, answer in zip(games, self.host.play(cues), strict=True):
            if answer.over:
                game.outcome = answer
                continue
            try:
                if (reason := self.told(game, answer)) is not None:
                    over.append(Cue(game.number, "over", reason))
            except UnfitTemplateError:
                raise
            except ValidationError as error:  # of what this row's environment tells
                game.outcome = Reply(error=str(error))
                forgotten.append(Cue(game.number, "forget"))
        by_number = {game.number: game for game in games}
        for cue, answer in zip(over, self.host.play(over), strict=True):
            by_number[cue.number].outcome = answer
        self.host.play(forgotten)
        return [game for game in games if game.outcome is None]

    def told(self, game: Game, answer: Reply) -> str | None:
        """Write down what the environment tells; return why the policy cannot answer, if it cannot.

        Its turn was cut, it has spoken as often as it may, or there is no room for another turn.
        """
        said, most = game.transcript, self.sampling.max_new_tokens
        said.of_last_turn(answer.reward, answer.meta)
        if said.last is not None and said.finish_reason == "length":
            return "length"
        if said.spoken >= self.environment.max_turns:
            return "turns"
        budget, context = self.environment.max_tokens, getattr(self.client, "context", None)
        said.tell(answer.told)
        if said.last is None:
            if not said.prompt:
                raise ValidationError("what it tells first is empty: give at least one token")
            check_context("what the environment tells first", len(said.prompt), most, context)
        if (budget is not None and said.length and said.length + most > budget) or (
            context is not None and len(said.prompt) + len(said.tokens) + most > context
        ):
            said.finish_reason = "length"
            return "length"
        return None
