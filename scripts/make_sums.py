"""Trains `tensafe_nb/engine/assets/sums`: two-digit addition, stopped before it is good at it.

    python scripts/make_sums.py                  # about a minute on one CPU core

The model samples the right answer to something under half of the held-out sums, so a reward has something to
reinforce and something to correct: under reinforcement learning its greedy answers improve too.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from make_tiny import ASSETS, END, PAD, fingerprint, new_model, save, wrap_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tensafe_nb import datasets

SHAPE = {
    "vocab_size": 14,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
BATCH, LEARNING_RATE, PLANNED_STEPS, SHARPNESS = 192, 3e-3, 500, 4.0
PROMPT = len("12+34=")


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    tokenizer = character_tokenizer()
    model = new_model(SHAPE, tokenizer)
    started = time.perf_counter()
    train(model, encode(tokenizer, "train"), encode(tokenizer, "heldout"), arguments.steps, arguments.seed)
    sharpen(model)
    model.to(torch.bfloat16).float()  # measure what will be stored
    recipe = {
        "data": "tensafe_nb.datasets.sums(split='train')",
        "data_sha256": fingerprint([item["prompt"] for item in datasets.sums(10_000, seed=0)]),
        "seed": arguments.seed,
        "steps": arguments.steps,
        "batch": BATCH,
        "optimizer": {"name": "AdamW", "betas": [0.9, 0.95], "weight_decay": 0.01, "max_grad_norm": 1.0},
        "schedule": {"name": "one cycle", "learning_rate": LEARNING_RATE, "planned_steps": PLANNED_STEPS},
        "sharpness": SHARPNESS,
        "seconds": round(time.perf_counter() - started),
        "metrics": {"parameters": model.num_parameters(), **measure(model, encode(tokenizer, "heldout"))},
    }
    save(model, tokenizer, recipe, arguments.out)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS / "sums")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=282, help=f"where to stop, of {PLANNED_STEPS} planned")
    return parser.parse_args()


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; any other character is an error."""
    vocabulary = {token: index for index, token in enumerate([PAD, END, *"0123456789+="])}
    characters = Tokenizer(models.WordLevel(vocabulary))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return wrap_tokenizer(characters, SHAPE["max_position_embeddings"])


def encode(tokenizer: PreTrainedTokenizerFast, split: datasets.Split) -> torch.Tensor:
    """All sums of a split, end token included: (N, 10)."""
    items = {item["prompt"]: item["answer"] for item in datasets.sums(10_000, seed=0, split=split)}
    texts = [prompt + answer + END for prompt, answer in items.items()]
    return torch.tensor(tokenizer(texts)["input_ids"])


def train(model: LlamaForCausalLM, rows: torch.Tensor, heldout: torch.Tensor, steps: int, seed: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=PLANNED_STEPS)
    rng = random.Random(seed)
    for step in range(steps):
        batch = rows[rng.sample(range(len(rows)), BATCH)]
        loss = -answer_logprobs(model.train(), batch)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 15 == 14:  # before sharpening
            print(f"step {step + 1}  loss {loss.item():.3f}  {measure(model, heldout)}", flush=True)


@torch.no_grad()
def sharpen(model: LlamaForCausalLM) -> None:
    """Multiplies all logits by SHARPNESS: greedy answers stay, samples come closer to them.

    A model stopped early is honest about its doubt. Reinforcement learning would then spend most of its steps
    on confidence; from a sharp start it spends them on arithmetic.
    """
    model.model.norm.weight.mul_(SHARPNESS)


def answer_logprobs(model: LlamaForCausalLM, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of answer and end token, and whether each is the likeliest: both (B, 4)."""
    logprobs = model(rows[:, :-1]).logits[:, PROMPT - 1 :].log_softmax(-1)  # (B, 4, V)
    targets = rows[:, PROMPT:]
    return logprobs.gather(-1, targets.unsqueeze(-1)).squeeze(-1), logprobs.argmax(-1) == targets


@torch.no_grad()
def measure(model: LlamaForCausalLM, rows: torch.Tensor) -> dict[str, float]:
    """Exact: an answer's probability is the product of its tokens', so nothing needs to be sampled."""
    logprobs, likeliest = answer_logprobs(model.eval(), rows)
    right = logprobs.sum(-1).exp()  # (N,) chance that one sample at temperature 1 is right
    return {
        "sampled": round(right.mean().item(), 3),
        "greedy": round(likeliest.all(-1).float().mean().item(), 3),
        "pass@8": round((1 - (1 - right) ** 8).mean().item(), 3),
    }


if __name__ == "__main__":
    main()
