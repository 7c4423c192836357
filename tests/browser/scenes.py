"""States of the panel, each made in a moment by a training client that only publishes: for looks and access."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tensafe_nb.config import DPConfig, LoRAConfig, SamplingConfig, TrainingConfig
from tensafe_nb.events import Alarm, Metrics, PrivacySpent, ReplicasChanged, Rollouts, RunStep
from tensafe_nb.protocol.results import RunStatus
from tensafe_nb.rlvr.rollouts.trajectories import RolloutGroup, Trajectory, TrajectoryBatch, TurnRecord
from tensafe_nb.widgets import LossCurve
from tensafe_nb.widgets.feed.feed import Feed
from tensafe_nb.widgets.live.base import LiveWidget
from tensafe_nb.widgets.live.dashboard import Dashboard

from ..widgets.conftest import FakeClient, FakeRun, HandFlusher

W = TypeVar("W", bound=LiveWidget)
LONG = "a_name_that_nobody_would_type_by_hand_but_a_sweep_does_" * 3
TEXTS = (
    ("17+25=", ["42", "32", "42\n", "I think it is 41, since seven and five are twelve. " * 4]),
    ("מה בירת צרפת? ענה במילה אחת", ["פריז", "לונדון", "\u202eevil", "پاریس\u200cها"]),
    ("Name three animals 🐈", ["🐈 🐕 👩‍👩‍👧", "🇫🇷 cat", "日本語の犬", ""]),
    ("2+2=", ["4", "4", "4", "4"]),
    (LONG, [LONG, "x", "y", "z"]),
)


HELD_OUT = (("17+25=", "42"), ("3*4=", "12"), (LONG, LONG), ("מה בירת צרפת?", "פריז"))


class Scene:
    """A client, its feed, and what happens to them."""

    def __init__(self, folder: Path, config: TrainingConfig | None = None) -> None:
        folder.mkdir(parents=True)
        FakeClient.config, kept = config or FakeClient.config, FakeClient.config
        try:
            self.client = FakeClient(folder / "events.jsonl")
        finally:
            FakeClient.config = kept
        self.client.config = config or kept
        self.client.tokenizer = Letters()
        self.feed = Feed(self.client, HandFlusher())
        self.dice = random.Random(0)
        self.run: FakeRun | None = None

    def start(self, planned: int | None = 120, curve: str | None = None) -> "Scene":
        self.run = FakeRun(planned_steps=planned, curve=curve)
        self.client.start(self.run)
        return self

    def end(self, state: RunStatus = RunStatus.FINISHED, reason: str | None = None) -> "Scene":
        assert self.run is not None
        self.client.turn(self.run, state, reason)
        return self

    def losses(
        self, steps: int, *, checkpoints: int = 0, loss: Callable[[int], float] | None = None
    ) -> "Scene":
        """Take steps of supervised training."""
        assert self.run is not None
        for step in range(1, steps + 1):
            noise = self.dice.gauss(0, 0.12)
            value = loss(step) if loss else 1.2 + 3 * math.exp(-step / 30) + noise
            held_out = {"eval/loss": value + 0.1} if step % 20 == 0 else {}
            self.client.step += 1
            self.client.publish(
                _metrics(step, {"loss": value, "grad_norm": 1 + abs(noise) * 3, "tokens": 640, **held_out})
            )
            self.client.publish(_step(self.run, step))
            if checkpoints and step % checkpoints == 0:
                self.client.save(f"art-0{step}", step)
        return self

    def rewards(self, steps: int, *, texts: bool = True) -> "Scene":
        """Take steps of reinforcement learning, with rollouts of the last ones."""
        assert self.run is not None
        for step in range(1, steps + 1):
            self.client.step += 1
            good = 1 / (1 + math.exp(-(step - 30) / 12))
            noise = self.dice.gauss(0, 0.05)
            right, wrong = max(0.0, good - 0.2 + noise), max(0.0, 0.8 - good + noise)
            values = {
                "reward": good + noise, "group/reward_std": 0.5 * math.sqrt(max(0, good * (1 - good))),
                "by_group/frac_all_good": right, "by_group/frac_all_bad": wrong,
                "by_group/frac_mixed": 1 - right - wrong, "completions/mean_length": 4 + noise,
                "completions/clipped_ratio": 0.0, "entropy": 1.5 - good + noise, "policy/approx_kl": 0.0,
                "grad_norm": 0.4 + noise, "param_delta_norm": 0.002 * (1 + noise),
            }  # fmt: skip
            if step % 20 == 0:
                values["eval/reward"] = good
                self.evaluate(step, step // 15)
            self.client.publish(_metrics(step, values))
            self.client.publish(_step(self.run, step))
            if texts and step > steps - 3:
                self.rollouts(step)
        return self

    def rollouts(self, step: int) -> None:
        assert self.run is not None
        groups: list[RolloutGroup] = []
        for number, (prompt, answers) in enumerate(TEXTS[-3:] + TEXTS[:2]):
            made = [
                Trajectory(
                    prompt, text, reward=None if text == "y" else float(text.strip() in ("42", "4", "פריז")),
                    reward_parts={"right": 1.0, "short": 0.5}, tokens=[ord(c) for c in text], policy_version=step,
                    reward_error="ValueError: no <b>number</b>" if text == "y" else None,
                    finish_reason="length" if len(text) > 100 else "stop",
                )
                for text in answers
            ]  # fmt: skip
            scored = [one.reward for one in made if one.reward is not None]
            for one in made:
                one.advantage = None if one.reward is None else one.reward - sum(scored) / len(scored)
            groups.append(RolloutGroup(f"p{number}", prompt, made))
        self.write(step, groups)

    def conversations(self, step: int) -> "Scene":
        """Write rollouts in which a calculator was called, rightly, wrongly or not at all."""
        groups: list[RolloutGroup] = []
        for number, ask in enumerate(("What is 17 + 25?", LONG)):
            told = [
                spoken(ask, [(CALL, "17 + 25", "42"), ("42", None, None)], 1.0, [0.2, None]),
                spoken(ask, [(CALL[:-20], "?", BAD), ("It is 41.", None, None)], 0.0, [-0.1, None]),
                spoken(ask, [("مئة", None, None)], None, [None]),
            ]  # fmt: skip
            told[2].reward_error = "ValueError: no number"
            told[1].advantage = [-0.5 - 0.01 * at for at in range(len(told[1].tokens))]
            groups.append(RolloutGroup(f"talk-{number}", ask, told))
        self.write(step, groups)
        self.write(step, groups, held_out=True)
        self.write(step - 1, groups, held_out=True)
        return self

    def evaluate(self, step: int, good: int) -> None:
        """Answer the held-out prompts, so many of them rightly."""
        assert self.run is not None
        groups = []
        for number, (prompt, answers) in enumerate(
            (("17+25=", "42"), ("3×4=", "12"), (LONG, LONG), ("מה בירת צרפת?", "פריז"))
        ):
            texts = [
                answers if number < good else "no idea",
                answers if number < good - 1 else "I do not know. " * 5,
            ]
            made = [
                Trajectory(
                    prompt,
                    text,
                    reward=float(text == answers),
                    policy_version=step,
                    tokens=[ord(c) for c in text],
                )
                for text in texts
            ]
            groups.append(RolloutGroup(f"held-{number}", prompt, made))
        self.write(step, groups, held_out=True)

    def write(self, step: int, groups: list[RolloutGroup], *, held_out: bool = False) -> None:
        assert self.run is not None
        number = self.run.run_id.rpartition("/")[2]
        path = (
            self.client.history.path.parent
            / "rollouts"
            / number
            / f"{'held-out' if held_out else 'step'}-{step}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        TrajectoryBatch(groups, SamplingConfig()).save(path)
        event = Rollouts(
            run_id=self.run.run_id, step=step, rollouts=20, path=f"{number}/{path.name}", held_out=held_out
        )
        self.client.publish(event)

    def spend(self, **changes: Any) -> "Scene":
        spent = PrivacySpent(
            step=40, epsilon_spent=0.1, total_epsilon=1.84, delta=1e-5, target_epsilon=8.0, accountant="rdp",
            adjacency="add/remove one", projected_step=13_623,
        )  # fmt: skip
        self.client.publish(replace(spent, **changes))
        return self

    def replica(self, change: str, replicas: int, name: str = "") -> "Scene":
        """Let something happen to one of three replicas."""
        self.client.publish(
            ReplicasChanged(change=change, replicas=replicas, wanted=3, name=name, reason="it was killed")
        )
        if change == "LOST":
            self.client.publish(
                Alarm(
                    run_id="tc-1/1", step=self.client.step, name="replica_lost", level="amber",
                    message=f"{name} is gone (it was killed); {replicas} of 3 go on.",
                    remedy="Nothing else is lost: another is being started in its place.",
                )
            )  # fmt: skip
        return self

    def alarm(self, level: str, step: int) -> "Scene":
        self.client.publish(
            Alarm(
                run_id="tc-1/1", step=step, name="no_signal", level=level, message="90 % of the groups have no signal.",
                remedy="Give prompts that are neither too easy nor too hard.",
            )
        )  # fmt: skip
        return self

    def panel(self, **traits: Any) -> Dashboard:
        return self.shown_by(Dashboard(self.feed, **traits))

    def shown_by(self, widget: W) -> W:
        """Return the widget, which keeps this client for as long as it is there."""
        widget.scene = self  # type: ignore[attr-defined]
        return widget


BAD = "Error: <b>no</b> JSON\n\u202eevil"
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "17 + 25"}}\n</tool_call>'


def spoken(
    ask: str,
    said: Sequence[tuple[str, str | None, str | None]],
    reward: float | None,
    rewards: Sequence[float | None],
) -> Trajectory:
    """Return a conversation: what the policy says, the expression that it calls a calculator with, what it is told."""
    turns, text = [TurnRecord("user", ask)], ""
    for (words, expression, result), own in zip(said, rewards, strict=True):
        called = {"name": "calculator", "arguments": {"expression": expression}, "ok": expression != "?"}
        meta = {"calls": [called]} if expression else {}
        turns.append(TurnRecord("assistant", words, len(text), len(text) + len(words), True, own, meta))
        text += words
        if result is not None:
            told = f"<|tool|>{result}<|end|>"
            turns.append(
                TurnRecord("tool", result, len(text), len(text) + len(told), meta={"name": "calculator"})
            )
            text += told
    mask = [
        int(any(turn.trained and turn.start <= at < turn.stop for turn in turns)) for at in range(len(text))
    ]
    parts = {"tools/calls": float(len(said) - 1), "tools/errors": float(reward == 0)}
    return Trajectory(
        ask, text, tokens=[ord(c) for c in text], mask=mask, turns=turns, reward=reward, reward_parts=parts,
        policy_version=3, advantage=None if reward is None else reward - 0.5,
    )  # fmt: skip


class Letters:
    """A tokenizer whose tokens are the letters."""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


def _step(run: FakeRun, step: int) -> Any:
    run.steps_done = step
    return RunStep(run_id=run.run_id, done=step, duration=0.4)


def _metrics(step: int, values: dict[str, float]) -> Any:
    return Metrics(step=step, values=values)


def compared(folder: Path) -> LiveWidget:
    """Return six runs on one chart, with long names."""
    scenes = [
        Scene(folder / str(number))
        .start()
        .losses(60, loss=lambda step, rate=number + 1: 1 + 3 * math.exp(-step * rate / 40))
        for number in range(6)
    ]
    names = [f"lr=1e-{number} {LONG if number == 2 else ''}" for number in range(6)]
    curve = LossCurve(*(scene.feed for scene in scenes), labels=names)
    for scene in scenes:
        scene.shown_by(curve)
    return curve


PRIVATE = TrainingConfig(
    lora_config=LoRAConfig(rank=8), dp_config=DPConfig(dataset_size=400, target_epsilon=8.0)
)
SCENES: dict[str, Callable[[Path], LiveWidget]] = {
    "empty": lambda folder: Scene(folder).panel(),
    "begun": lambda folder: Scene(folder).start().panel(),
    "one-point": lambda folder: Scene(folder).start().losses(1).panel(),
    "running": lambda folder: Scene(folder).start().losses(60, checkpoints=20).panel(),
    "cluster": lambda folder: (
        Scene(folder).start().replica("STARTED", 3).losses(40).replica("LOST", 2, "replica 1 (process 4711)")
        .replica("JOINED", 3, "replica 4 (process 4812)").replica("LOST", 2, "replica 3 (process 4713)")
        .panel()
    ),
    "paused": lambda folder: Scene(folder).start().losses(60).end(RunStatus.PAUSED).panel(),
    "finished": lambda folder: Scene(folder).start().losses(120, checkpoints=30).end().panel(),
    "failed": lambda folder: (
        Scene(folder).start().losses(40).end(RunStatus.FAILED, f"CUDA is out of memory: {LONG}").panel()
    ),
    "flat": lambda folder: Scene(folder).start().losses(60, loss=lambda n: 2.3 + 1e-7 * (n % 3)).panel(),
    "zero": lambda folder: Scene(folder).start().losses(60, loss=lambda _: 0.0).panel(),
    "broken": lambda folder: (
        Scene(folder).start().losses(60, loss=lambda n: 3 / n if n % 9 else math.nan).alarm("red", 54)
        .panel(log_scale=True)
    ),
    "reward": lambda folder: (
        Scene(folder).start(curve="reward").rewards(60).alarm("amber", 7).alarm("amber", 44).panel()
    ),
    "reward-finished": lambda folder: (
        Scene(folder).start(curve="reward").rewards(60).end().panel(selected_step=59)
    ),
    "conversations": lambda folder: (
        Scene(folder).start(curve="reward").rewards(60, texts=False).conversations(60).panel()
    ),
    "private": lambda folder: Scene(folder, PRIVATE).start().losses(40).spend().panel(),
    "spent": lambda folder: (
        Scene(folder, PRIVATE).start().losses(40).spend(total_epsilon=7.99, refused=True)
        .end(RunStatus.STOPPED, "the budget is 8").panel()
    ),
    "void": lambda folder: (
        Scene(folder, PRIVATE).start().losses(40).spend(total_epsilon=math.inf, void="Noise was off.").panel()
    ),
    "compared": compared,
}  # fmt: skip
