"""RLVR on a real model: 15 updates teach SmolLM2-135M to answer with one JSON object.

The reward is the built-in `json_schema`: 1 for a JSON object, alone or in a fenced block, else 0. What is printed
before and after is the mean reward on words that were never trained on, four answers to each, drawn with the same
random numbers.

    make models
    .venv/bin/python -m scripts.rlvr_json
"""

import argparse
import time

import torch

import tensafe_nb as tn
from scripts.models import smollm2
from tensafe_nb import rlvr

ASK = 'Describe "{}" as one JSON object with the keys "name" and "kind". Answer with the JSON only.'
TRAINED = """apple bicycle guitar rose salmon winter hammer Mars Paris lion violin oak rain coffee train Berlin tiger
    piano tulip bread river Venus shovel summer bus eagle carrot chair gold Rome drum snow"""
HELD_OUT = "banana Tokyo flute wolf pine boat tea Saturn spring saw silver cheese storm trout table daisy"
SCHEMA = {"type": "object"}


def main() -> None:
    """Train, and print the held-out reward before and after."""
    options = _options()
    with tn.ServiceClient() as service:
        tc = service.create_training_client(
            model_ref=str(smollm2()),
            lora_config=tn.LoRAConfig(rank=16, alpha=32),
            optimizer={"learning_rate": options.learning_rate, "max_grad_norm": 1.0},
            dtype=options.dtype,
            seed=options.seed,
        )
        trainer = rlvr.RLVRTrainer(
            tc,
            [_chat(word) for word in TRAINED.split()],
            rlvr.resolve_reward("json_schema", schema=SCHEMA),
            rlvr.REINFORCE("rloo", mask_truncated=False),  # answers that do not end are the fault to mend
            prompts_per_step=options.prompts,
            group_size=options.group,
            max_new_tokens=options.tokens,
            eval_prompts=[_chat(word) for word in HELD_OUT.split()],
            eval_samples=4,
            seed=options.seed,
        )
        assert tc.tokenizer  # the model is loaded: that is not timed
        began = time.perf_counter()
        run = trainer.run(steps=options.steps, show=False)
        run.result()
        took = time.perf_counter() - began
        rewards = tc.history["eval/reward"]
        print("step rewards", [round(float(value), 2) for value in tc.history["reward"]])
        print(
            f"held-out mean reward {rewards[0]:.3f} before, {rewards[-1]:.3f} after {options.steps} updates: "
            f"{rewards[-1] - rewards[0]:+.3f}; {took:.0f} s on {torch.get_num_threads()} thread(s)"
        )
        for word in HELD_OUT.split()[:4]:
            greedy = tc.sample(_chat(word), max_new_tokens=options.tokens, temperature=0).result()
            print(f"{word}: {greedy.texts[0]!r}")


def _chat(word: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": ASK.format(word)}]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    return parser.parse_args()


if __name__ == "__main__":
    main()
