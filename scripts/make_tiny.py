"""Trains `tensafe_nb/engine/assets/tiny`: a language model of the standard library's help pages.

    python scripts/make_tiny.py                  # about ten minutes on one CPU core

It never sees what `datasets.docstring_pairs` returns, so fine-tuning on the pairs has something to teach.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import random
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tensafe_nb import datasets

ASSETS = Path(__file__).parents[1] / "tensafe_nb" / "engine" / "assets"
END, PAD = "<|end|>", "<|pad|>"  # END closes a text; a text may also start from it, so it serves as bos too
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 160,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "max_position_embeddings": 512,
}
BATCH, LENGTH, LEARNING_RATE, WEIGHT_DECAY = 8, 256, 3e-3, 0.1
VALIDATION_TEXTS = 64


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    texts = datasets.pretraining_texts()
    random.Random(arguments.seed).shuffle(texts)
    tokenizer = train_tokenizer(texts)
    encoded = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    print(f"{len(texts)} texts, {sum(map(len, encoded))} tokens")
    model = new_model(SHAPE, tokenizer)
    started = time.perf_counter()
    train(model, encoded[VALIDATION_TEXTS:], arguments.steps, arguments.seed)
    model.to(torch.bfloat16).float()  # measure what will be stored
    recipe = {
        "data": "tensafe_nb.datasets.pretraining_texts()",
        "data_sha256": fingerprint(texts),
        "module_lists_sha256": fingerprint([*datasets.TRAIN_MODULES, "|", *datasets.HELDOUT_MODULES]),
        "texts": len(texts),
        "tokens": sum(map(len, encoded)),
        "seed": arguments.seed,
        "steps": arguments.steps,
        "batch": [BATCH, LENGTH],
        "optimizer": {
            "name": "AdamW",
            "betas": [0.9, 0.95],
            "weight_decay": WEIGHT_DECAY,
            "max_grad_norm": 1.0,
        },
        "schedule": {"name": "one cycle", "learning_rate": LEARNING_RATE},
        "seconds": round(time.perf_counter() - started),
        "metrics": measure(model, tokenizer, encoded[:VALIDATION_TEXTS]),
    }
    save(model, tokenizer, recipe, arguments.out)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS / "tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1600)
    return parser.parse_args()


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # every byte has a token, so any text can be encoded
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"],
        special_tokens=[PAD, END],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return wrap_tokenizer(bpe, SHAPE["max_position_embeddings"], chat_template=CHAT_TEMPLATE)


def wrap_tokenizer(tokenizer: Tokenizer, max_length: int, **options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        **options,
    )


def new_model(shape: dict[str, int], tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        **shape,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, encoded: list[list[int]], steps: int, seed: int) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    rng, started = random.Random(seed), time.perf_counter()
    model.train()
    for step in range(steps):
        rows = torch.tensor(draw_rows(encoded, rng))  # (B, T)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(
                f"step {step + 1}  loss {loss.item():.3f}  {time.perf_counter() - started:.0f} s", flush=True
            )


def draw_rows(encoded: list[list[int]], rng: random.Random) -> list[list[int]]:
    """Rows of texts in random order. Half start with a text, as prompts do; half start within one."""
    rows = []
    for _ in range(BATCH):
        first = rng.choice(encoded)
        row = first[rng.randrange(len(first)) if rng.random() < 0.5 else 0 :]
        if rng.random() < 0.25:
            row = first[-1:] + first
        while len(row) < LENGTH:
            row = row + rng.choice(encoded)
        rows.append(row[:LENGTH])
    return rows


def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, validation: list[list[int]]
) -> dict[str, float]:
    pairs = datasets.docstring_pairs("heldout")
    prompts = [tokenizer(pair["prompt"])["input_ids"] for pair in pairs]
    completions = [tokenizer(pair["completion"] + END)["input_ids"] for pair in pairs]
    return {
        "parameters": model.num_parameters(),
        "validation_loss": mean_loss(model, [ids[:1] for ids in validation], [ids[1:] for ids in validation]),
        "heldout_pairs_loss": mean_loss(model, prompts, completions),
    }


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, prompts: list[list[int]], completions: list[list[int]]) -> float:
    """Mean over all completion tokens; a text is cut at the context length."""
    model.eval()
    total, count = 0.0, 0
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([(prompt + completion)[: SHAPE["max_position_embeddings"]]])  # (1, T)
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()
        count += len(logits)
    return round(total / count, 3)


def fingerprint(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: dict[str, Any], out: Path
) -> None:
    """Everything `from_pretrained` needs, in bf16, and how it was made."""
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=pad)
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out, save_jinja_files=False)
    recipe = {"python": platform.python_version(), "torch": torch.__version__, **recipe}
    (out / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    print(json.dumps(recipe["metrics"]))


if __name__ == "__main__":
    main()
