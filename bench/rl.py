"""An update of reinforcement learning, reward included, against TRL's; and what of a step is none of its parts."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from itertools import pairwise
from operator import add

import tensafe_nb as tn
from bench import trl_peer, workload
from bench.harness import LARGER, ROOT, Row, Taken, Target, Turn, as_it_says, beside, paired, stopwatch
from tensafe_nb.datasets import sums
from tensafe_nb.events import Event, Metrics, OperationFinished, RunState, RunStep
from tensafe_nb.rlvr import PPO, EnvironmentSampler, RLVRTrainer

TRL_PYTHON = ROOT / ".venv-trl" / "bin" / "python"
LOADS = 2  # where its weights happen to lie in memory makes a model faster or slower: load it anew
TURN_ROWS, TURN_GROUP, TURN_TOKENS = 16, 8, 24  # of conversations; the context is 64
STEPS, WARMUP = 80, 10  # of the run whose steps are taken apart
SUMS = trl_peer.Work(
    model_ref="builtin:sums",
    name="builtin:sums",
    rank=workload.RANK,
    prompts=16,
    group=8,
    tokens=8,
    updates=5,
    reward="begins_with_answer",
)


def update() -> Row:
    """Issue 26: at most half the time."""
    return against_trl(SUMS, LOADS, seconds=12, limit=0.5)


def against_trl(
    work: trl_peer.Work, loads: int, seconds: float, warmup: int = 2, at_least: int = 4, limit: float = 0.6
) -> Row:
    """Measure an update; both sides are loaded so often, and warmed up by so many pairs each time."""
    taken = reduce(add, [_pairs(work, seconds / loads, warmup, at_least) for _ in range(loads)])
    peer = "`trl.GRPOTrainer`, same model, prompts, reward and optimiser, without logging"
    return Row(
        what="an update by RLVRTrainer (GRPO): sample, score, train; rollouts, metrics and alarms kept",
        peer=peer if taken.peer else f"{peer}: not measured, run `make trl-parity` first",
        precision=f"fp32{'' if work.precision == 'exact' else ', ours sampled in fewer bits'}",
        sizes=f"{work.sizes}, one pass, no KL",
        taken=taken,
        compares=LARGER,
        target=Target("≤", limit) if taken.peer else None,
    )


def _pairs(work: trl_peer.Work, seconds: float, warmup: int, at_least: int) -> Taken:
    """Load both sides and take pairs; ours alone where there is no TRL."""
    with _ours(work) as ours:
        if not TRL_PYTHON.exists():
            return Taken([ours()[0] for _ in range(5)][2:])
        with beside(TRL_PYTHON, "-m", trl_peer.__name__, work.as_argument()) as trl:
            return paired(
                ours,
                lambda: _each(trl(work.updates), work.updates),
                seconds=seconds,
                at_least=at_least,
                warmup=warmup,
                watch=as_it_says,
            )


def environments() -> Row:
    """Issue 22: at most 1.1 times single-turn sampling of the same tokens, each turn by itself."""
    rows = [{"sums": [first, second]} for first, second in pairwise(sums(TURN_ROWS + 1, seed=trl_peer.SEED))]
    how = {"group_size": TURN_GROUP, "fixed_length": True}
    with tn.ServiceClient() as service:
        tc = service.create_training_client(model_ref="builtin:sums", dtype="float32", device="cpu")
        single = tn.SamplingConfig(max_new_tokens=TURN_TOKENS, ignore_end=True)
        with EnvironmentSampler(tc, "sums", max_new_tokens=TURN_TOKENS, **how) as turns:
            said = list(turns.generate_trajectories(rows))
            first = [rollout.prompt_tokens for rollout in said]
            second = [rollout.prompt_tokens + rollout.tokens[:-TURN_TOKENS] for rollout in said]
            taken = paired(
                lambda: turns.generate_trajectories(rows),
                lambda: [tc.sample(prompts, single).result() for prompts in (first, second)],
                seconds=7,
            )
    return Row(
        what="conversations of two turns with an environment in its processes (CPU: without these)",
        peer="`tc.sample` of the same prompts: the first turn's, then the second's with all before it",
        precision="fp32",
        sizes=f"builtin:sums, {TURN_ROWS} rows × {TURN_GROUP} rollouts × 2 turns × {TURN_TOKENS} tokens",
        taken=taken,
        compares=LARGER,
        target=Target("≤", 1.1),
    )


def overhead() -> Row:
    """Issue 6: at most 5 %."""
    return _share(
        "share of a step of RLVRTrainer outside `time/sample`, `time/reward` and `time/update`",
        lambda event: sum(_timed(event, part) for part in ("time/sample", "time/reward", "time/update")),
        Target("≤", 5, "ours"),
    )


def waiting() -> Row:
    """The same, told more strictly: batches, advantages, packing and the queue count too."""
    return _share(
        "share of a step of RLVRTrainer in which neither engine nor reward works",
        lambda event: (
            event.duration if isinstance(event, OperationFinished) else _timed(event, "time/reward")
        ),
    )


def _share(what: str, seconds_of: Callable[[Event], float], target: Target | None = None) -> Row:
    with tn.ServiceClient() as service:
        trainer = _trainer(service, SUMS)
        trainer.run(steps=STEPS, show=False).result()
        shares = list(_left_over(trainer.training_client.history.events(), seconds_of))
    return Row(
        what=what, peer="", precision="fp32", sizes=SUMS.sizes, unit="%", taken=Taken(shares), target=target
    )


def _left_over(events: Iterable[Event], seconds_of: Callable[[Event], float]) -> Iterator[float]:
    """Give for each step with an update, the first few apart, the percentage that `seconds_of` does not explain."""
    explained, updated = 0.0, False
    for event in events:
        explained += seconds_of(event)
        updated |= isinstance(event, OperationFinished) and event.operation == "optim_step"
        if isinstance(event, RunStep):
            if updated and event.done > WARMUP:
                yield 100 * (1 - explained / event.duration)
            explained, updated = 0.0, False


def _timed(event: Event, part: str) -> float:
    return event.values.get(part, 0.0) if isinstance(event, Metrics) else 0.0


def _trainer(service: tn.ServiceClient, work: trl_peer.Work) -> RLVRTrainer:
    tc = service.create_training_client(
        model_ref=work.model_ref,
        lora_config=tn.LoRAConfig(rank=work.rank, alpha=2 * work.rank),
        optimizer={
            "name": "adamw",
            "learning_rate": trl_peer.LEARNING_RATE,
            "weight_decay": trl_peer.WEIGHT_DECAY,
            "max_grad_norm": trl_peer.MAX_GRAD_NORM,
        },
        dtype="float32",
        device="cpu",
    )
    return RLVRTrainer(
        tc,
        sums(trl_peer.DATA, seed=trl_peer.SEED),
        trl_peer.REWARDS[work.reward],
        PPO("grpo"),
        prompts_per_step=work.prompts,
        group_size=work.group,
        max_new_tokens=work.tokens,
        fixed_length=True,
        chat="never",
        precision=work.precision,
        seed=trl_peer.SEED,
    )


@contextlib.contextmanager
def _ours(work: trl_peer.Work) -> Iterator[Turn]:
    """Run a trainer that rests between turns."""
    with tn.ServiceClient() as service:
        trainer, rests = _trainer(service, work), threading.Event()

        def watch(event: Event) -> None:
            if isinstance(event, RunState) and event.state in ("PAUSED", "FAILED"):
                rests.set()

        trainer.training_client.subscribe(watch)
        run = trainer.run(steps=10**6, show=False)
        run.pause()
        rests.wait()

        def go_on() -> None:
            rests.clear()
            run.step(work.updates)
            rests.wait()
            if run.state.ended:
                run.result()  # raises what made it fail

        yield lambda: _each(stopwatch(go_on), work.updates)
        run.stop()
        run.result()


def _each(times: Sequence[float], updates: int) -> tuple[float, float]:
    wall, cpu = times
    return wall / updates, cpu / updates
