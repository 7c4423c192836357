"""Recorded conversations, judged by an environment: it is told what the policy said, and nothing is sampled."""

from collections.abc import Sequence
from itertools import groupby
from types import TracebackType
from typing import Any, Self

from tensafe_nb.data.messages import messages_of
from tensafe_nb.errors import ValidationError
from tensafe_nb.rlvr.environments.environment import Environment
from tensafe_nb.rlvr.environments.hosts import host_of
from tensafe_nb.rlvr.environments.play import settle
from tensafe_nb.rlvr.environments.stage import Cue, Reply
from tensafe_nb.rlvr.rewards.conventions import TrainerState, Verdict
from tensafe_nb.rlvr.rollouts.trajectories import Trajectory, TurnRecord
from tensafe_nb.rlvr.scoring.processes import crew_of
from tensafe_nb.rlvr.scoring.scorer import BEFORE, Scorer, ScoreReport, function_reports


class Replayer:
    """Scores rollouts as `Scorer` does, by playing their environment over what was said in them.

    A conversation of which the environment tells something else than it did stays unscored, with an error that says so:
    what the policy said was no answer to that.

    Args:
        environment: What judges.
        timeout: Seconds it may take for each turn; None calls it here, without a limit.
        processes: In which it plays, as for `Scorer`.
        cluster: Where these are, as for `Scorer`.
    """

    def __init__(
        self,
        environment: Environment,
        timeout: float | None,
        processes: int | None = None,
        cluster: Any = None,
    ) -> None:
        self.reward = environment
        self._host = host_of(environment, timeout, crew_of("Replayer: ", processes, cluster))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def score(self, trajectories: Sequence[Trajectory], state: TrainerState = BEFORE) -> ScoreReport:
        """Fill in rewards, those of turns and their metas, and `reward_error` where the environment failed."""
        records = [RecordedPlay(number, trajectory) for number, trajectory in enumerate(trajectories)]
        live = [record for record in records if record.outcome is None]
        cues = [record.first_cue() for record in live]
        while live:
            answers = self._host.play(cues)
            next_cues = [record.next_cue(answer) for record, answer in zip(live, answers, strict=True)]
            pairs = [(r, cue) for r, cue in zip(live, next_cues, strict=True) if cue is not None]
            live, cues = [r for r, _ in pairs], [cue for _, cue in pairs]
        self._host.play([Cue(record.number, "forget") for record in records if record.left_open])
        version = self.reward.version
        for record in records:
            settle(record.trajectory, record.outcome or Reply(), self.reward, version)
        return report(self.reward, trajectories)

    def close(self) -> None:
        """End the processes of the environment. Again: nothing."""
        self._host.close()


class RecordedPlay:
    """One recorded conversation, on its way through the environment again."""

    def __init__(self, number: int, trajectory: Trajectory) -> None:
        self.number, self.trajectory = number, trajectory
        self.outcome: Reply | None = None
        self.left_open = False
        turns = trajectory.turns or []
        # what was told and what was said, by turns
        self._steps = [list(each) for _, each in groupby(turns, lambda turn: turn.role == "assistant")]
        self._at = 0
        if trajectory.turns is None:
            self.outcome = Reply(error="it is a single answer, not a conversation with an environment")

    def first_cue(self) -> Cue:
        return Cue(self.number, "begin", self.trajectory.meta, self.trajectory.seed or 0)

    def next_cue(self, answer: Reply) -> Cue | None:
        """Take in what the environment answers; return what happens next, None when it is over."""
        recorded = self._steps[self._at : self._at + 1]
        cut = self.trajectory.finish_reason == "length"
        if answer.over:
            more = self._at < len(self._steps) and answer.error is None
            early = Reply(
                error=f"it ended after turn {self._at // 2}, and the conversation that is recorded went on"
            )
            self.outcome = early if more else answer
            return None
        if self._at:
            spoken: TurnRecord = self._steps[self._at - 1][-1]
            spoken.reward = answer.reward
            spoken.meta |= answer.meta or {}
        if not recorded:  # it would go on, and the policy never answered
            self._at += 1
            return Cue(self.number, "over", "length" if cut else "turns")
        if told_of(answer) != [(turn.role, turn.text) for turn in recorded[0]]:
            self.left_open = True
            self.outcome = Reply(
                error=f"in turn {self._at // 2 + 1} it tells something else than is recorded: what was said does not "
                f"answer it"
            )
            return None
        if self._at + 1 >= len(self._steps):  # told, and no room was left for an answer
            self._at += 1
            return Cue(self.number, "over", "length" if cut else "turns")
        said = self._steps[self._at + 1][0]
        self._at += 2
        return Cue(self.number, "said", said.text)


def told_of(answer: Reply) -> list[tuple[str, str]]:
    """Return role and text of the messages that are told."""
    if isinstance(answer.told, str):
        return [("user", answer.told)]
    try:
        told = messages_of(answer.told, "what the environment tells")
    except ValidationError:
        return []
    return [(message["role"], message["content"] or "") for message in told]


def report(environment: Environment, trajectories: Sequence[Trajectory]) -> ScoreReport:
    """Return what came of conversations that have their rewards already."""
    name = environment.name
    verdicts: list[Verdict] = []
    punished: list[Verdict] = []
    for trajectory in trajectories:
        given = dict(trajectory.reward_parts or {})
        own, error = given.pop(name, None), trajectory.reward_error
        punished.append(Verdict(given.pop("overlong", None)))
        parts = {key.removeprefix(f"{name}/"): value for key, value in given.items()}
        verdicts.append(Verdict(own, parts, error, error is not None and "took longer" in error))
    functions = function_reports(name, verdicts)
    if environment.overlong is not None:
        functions |= function_reports("overlong", punished)
    return ScoreReport(
        scored=sum(verdict.score is not None for verdict in verdicts),
        abstained=sum(verdict.score is None and verdict.error is None for verdict in verdicts),
        errors=sum(verdict.error is not None for verdict in verdicts),
        timeouts=sum(verdict.timed_out for verdict in verdicts),
        functions=functions,
        version=next((t.reward_version for t in trajectories if t.reward_version), "") or "",
        true=environment.true,
    )


def scorer_of(
    reward: Any, timeout: float | None, processes: int | None = None, cluster: Any = None
) -> Scorer | Replayer:
    """Return what scores rollouts by a reward, or by an environment."""
    kind = Replayer if isinstance(reward, Environment) else Scorer
    return kind(reward, timeout, processes, cluster)
