"""A tool run on SmolLM2-135M: how often it calls the calculator, and what it is rewarded, before and after.

    make models
    python -m scripts.tool_use            # some minutes on two CPU cores; --steps 0 leaves out GRPO

The model was never trained to call tools. It is told of the calculator and asked (nothing comes of it), shown a few
dozen conversations in which the calculator is called (supervised, on the policy's turns), and then rewarded (GRPO).
What is asked are sums of two-digit numbers, and held-out ones for every line that is printed.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

import tensafe_nb as tn
from scripts.models import MISSING, find_smollm2
from tensafe_nb import rlvr

ENV = rlvr.tool_environment(
    [rlvr.tools.calculator], "numeric_match", max_turns=2, describe=False, name="calc"
)
TOLD = rlvr.tool_environment([rlvr.tools.calculator], "numeric_match", max_turns=2, name="calc")
CALL = '<tool_call>\n{{"name": "calculator", "arguments": {{"expression": "{} + {}"}}}}\n</tool_call>'


def main() -> None:
    arguments = parse_arguments()
    path = find_smollm2()
    if path is None:
        raise SystemExit(MISSING)
    train, held_out = rows(512, 1), rows(16, 2)
    config = tn.TrainingConfig(
        model_ref=str(path),
        lora_config=tn.LoRAConfig(rank=16, alpha=32),
        optimizer=tn.OptimizerConfig(learning_rate=arguments.learning_rate, max_grad_norm=1.0),
        dtype="float32",
        batch_size=16,
    )
    with tn.ServiceClient() as service:
        tc = service.create_training_client(config)
        tc.ready().result()
        report("told of it in words", tc, TOLD, held_out)
        report("not told", tc, ENV, held_out)
        shown = [demonstration(row) for row in train[: arguments.demonstrations]]
        begun = time.perf_counter()
        for batch in tc.batches(shown):
            tc.forward_backward(batch)
            tc.optim_step().result()
        seconds = time.perf_counter() - begun
        report(f"after {len(shown)} demonstrations ({seconds:.0f} s)", tc, ENV, held_out)
        if arguments.steps:
            trainer = rlvr.RLVRTrainer(
                tc, train[arguments.demonstrations :], algo="grpo", environment=ENV,
                prompts_per_step=8, group_size=4, max_new_tokens=48,
            )  # fmt: skip
            begun = time.perf_counter()
            run = trainer.run(steps=arguments.steps, show=False)
            run.result()
            seconds = time.perf_counter() - begun
            report(f"after {arguments.steps} steps of GRPO ({seconds:.0f} s)", tc, ENV, held_out)
            print("reward by step:", " ".join(f"{value:.2f}" for value in tc.history["reward"]))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demonstrations", type=int, default=96, help="conversations that it is shown")
    parser.add_argument("--steps", type=int, default=10, help="of GRPO")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    return parser.parse_args()


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Return sums, with their answers; held-out ones share no pair with the others."""
    dice = np.random.default_rng(seed)
    drawn = dice.integers(10, 100, (8 * count, 2)).tolist()
    wanted = [(a, b) for a, b in drawn if ((a * 31 + b) % 10 == 0) == (seed == 2)]
    return [
        {"prompt": f"What is {a} + {b}?", "answer": str(a + b), "a": a, "b": b} for a, b in wanted[:count]
    ]


def demonstration(row: dict[str, Any]) -> dict[str, Any]:
    """Return a conversation in which the calculator is called, as a row of training."""
    asked = {name: row[name] for name in ("prompt", "answer")}
    played = rlvr.rehearse(ENV, asked, [CALL.format(row["a"], row["b"]), row["answer"]])
    return {"messages": [{"role": one["role"], "content": one["content"]} for one in played.messages]}


def report(what: str, tc: tn.TrainingClient, env: rlvr.Environment, held_out: list[dict[str, Any]]) -> None:
    """Print how conversations on held-out sums go."""
    begun = time.perf_counter()
    with rlvr.EnvironmentSampler(tc, env, group_size=4, max_new_tokens=48, seed=0) as sampler:
        batch = sampler.generate_trajectories(held_out)
    seconds = time.perf_counter() - begun
    parts = [t.reward_parts or {} for t in batch]
    called = [p["calc/calls"] for p in parts]
    valid = sum(called) - sum(p["calc/errors"] for p in parts)
    share = f"{valid / sum(called):4.0%}" if sum(called) else "   —"
    print(
        f"{what:36s} reward {batch.mean_reward:.2f}   conversations with a call {np.mean(np.array(called) > 0):4.0%}   "
        f"valid calls {share}   ({len(batch)} conversations in {seconds:.0f} s)",
        flush=True,
    )


if __name__ == "__main__":
    main()
