"""A real model, SmolLM2-135M-Instruct: training, losses, sampling and memory against what one would write or call.

The model is what `TENSAFE_SMOLLM2` names, a folder in transformers' format or a GGUF file, else the GGUF file that
`make models` fetched. Without one, the rows are skipped and say so.
"""

import inspect
import json
import os
import re
import string
import tempfile
import textwrap
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

import tensafe_nb as tn
from bench import llama_peer, rl, startup, training, trl_peer, workload
from bench.harness import (
    LARGER,
    ROOT,
    Row,
    Skipped,
    Taken,
    Target,
    as_it_says,
    beside,
    fresh_process,
    paired,
    stopwatch,
)
from bench.sampling import asked_together
from tensafe_nb.config import Precision
from tensafe_nb.engine.models import load as models

MODELS = ROOT / "build" / "models"
LLAMA_PYTHON = ROOT / ".venv-llama" / "bin" / "python"
ROWS, TOKENS, RANK, ALPHA = 4, 128, 16, 32
PROMPTS, NEW_TOKENS = 16, 64
BATCHES, PAIRS, LONGEST = 2, 4, 192  # of docstrings: batches in a row, pairs of a batch, tokens of a pair
SECONDS, AT_LEAST = 20, 5
NAME = f"SmolLM2-135M-Instruct LoRA r{RANK}"
WITHOUT_LLAMA = "llama.cpp is not here: run `make llama-cpp`, which builds it in some ten minutes"
SAMPLING = "sampling with the adapter attached, through the client; logprobs come with it"
STEP = "forward_backward + optim_step through the client"


def all_labelled() -> Row:
    """Issue 26: at least 1.1 times the speed by hand."""
    batch = _full()
    with _client("float32") as tc:
        ours, by_hand = workload.step_through(tc, batch), training.by_hand(_peft_model(), batch)
        assert abs(ours() - by_hand()) < 1e-3, "the two sides do not compute the same loss"
        taken = paired(ours, by_hand, seconds=SECONDS, at_least=AT_LEAST, warmup=1)
    return Row(
        what=STEP,
        peer="the same loop by hand in torch + PEFT",
        precision="fp32",
        sizes=f"{NAME}, {ROWS}×{TOKENS}, every position labelled, fused AdamW",
        taken=taken,
        target=Target("≥", 1.1),
    )


def in_bf16() -> Row:
    """Issue 26: at least twice the speed of fp32, on a processor that is made for it."""
    if not models.multiplies_bf16(torch.device("cpu")):
        raise Skipped("this processor does not multiply matrices in bf16; `dtype='auto'` takes fp32 here")
    batch = _full()
    with _client("bfloat16") as half, _client("float32") as single:
        sides = workload.step_through(half, batch), workload.step_through(single, batch)
        taken = paired(*sides, seconds=SECONDS, at_least=AT_LEAST, warmup=1)
    return Row(
        what=f"{STEP}, in bf16",
        peer="the same in fp32",
        precision="bf16 compute with fp32 adapters; fp32",
        sizes=f"{NAME}, {ROWS}×{TOKENS}, every position labelled, fused AdamW",
        taken=taken,
        target=Target("≥", 2),
    )


def docstring_pairs() -> Row:
    """Issue 26: at least twice the speed of `Trainer`."""
    with _client("float32") as tc:
        batches = [_batch(part) for part in _docstrings(tc.tokenizer)]

        def ours() -> float:
            losses = [(tc.forward_backward(batch), tc.optim_step())[0] for batch in batches]
            return tc.refresh().step + losses[-1].result().loss

        taken = paired(ours, _trainer(batches), seconds=SECONDS, at_least=4, warmup=1)
    labelled = sum(int((batch.labels != -100).sum()) for batch in batches)
    share = labelled / sum(batch.labels.size for batch in batches)
    return Row(
        what=f"{BATCHES} steps on function signatures and their docstrings, prompts masked, ragged",
        peer="`transformers.Trainer` + PEFT on the same batches, without logging or saving",
        precision="fp32",
        sizes=f"{NAME}, {PAIRS} pairs a batch, at most {LONGEST} tokens, {share:.0%} of the positions labelled",
        taken=taken,
        target=Target("≥", 2),
    )


def token_ce() -> Row:
    """Issue 9: at most the time of `cross_entropy` on full logits."""
    ours, full = _losses()
    assert abs(ours() - full()) < 1e-4, "the two sides do not compute the same loss"
    return Row(
        what="`token_ce` on hidden states, forward and backward",
        peer="head on every position, `cross_entropy` on full logits",
        precision="fp32",
        sizes=_SHARE,
        taken=paired(ours, full, seconds=SECONDS, at_least=AT_LEAST),
        compares=LARGER,
        target=Target("≤", 1.0),
    )


def token_ce_memory() -> Row:
    """Issue 9: at most half the memory."""
    return _memory(
        "`token_ce`, forward and backward", "`cross_entropy` on full logits", "losses", _SHARE, 0.5
    )


def step_memory() -> Row:
    """Issue 9: at most 0.8 of the memory."""
    sizes = f"{NAME}, {ROWS}×{TOKENS}, every position labelled"
    return _memory(STEP, "the same loop by hand in torch + PEFT", "steps", sizes, 0.8)


def step_memory_recomputed() -> Row:
    """Issue 26: at most half the memory."""
    sizes = f"{NAME}, {ROWS}×{TOKENS}, every position labelled"
    peer = "the same loop by hand in torch + PEFT"
    return _memory(f"{STEP}, `gradient_checkpointing=True`", peer, "recomputed", sizes, 0.5)


def sampling() -> Row:
    """Issue 26: at least three times the speed of `generate`."""
    return _sampling(PROMPTS, Target("≥", 3))


def sampling_one_row() -> Row:
    """Issue 26: at least 2.5 times the speed of `generate`."""
    return _sampling(1, Target("≥", 2.5))


def sampling_requests() -> Row:
    """Issue 26: sixteen who ask at the same time."""
    with _client("float32") as tc:
        return asked_together(tc, NAME, SECONDS)


def sampling_bf16() -> Row:
    """Issue 26: at least three times the speed of `generate`."""
    if not models.multiplies_bf16(torch.device("cpu")):
        raise Skipped(
            "this processor does not multiply matrices in bf16; `precision='auto'` takes another one here"
        )
    return _sampling(PROMPTS, Target("≥", 3), "bfloat16")


def sampling_one_row_int8() -> Row:
    """Issue 26: at least 2.5 times the speed of `generate`."""
    return _sampling(1, Target("≥", 2.5), "int8")


def rl_update() -> Row:
    """Issue 22: at most 0.6 of the time."""
    return _rl_update("exact", 0.6)


def rl_update_auto() -> Row:
    """Issue 26: at most 0.4 of the time."""
    return _rl_update("auto", 0.4)


def _rl_update(precision: Literal["exact", "auto"], limit: float) -> Row:
    """Measure two pairs of updates, after one to warm up."""
    work = trl_peer.Work(
        model_ref=folder(),
        name="SmolLM2-135M-Instruct",
        rank=RANK,
        prompts=4,
        group=4,
        tokens=64,
        updates=1,
        reward="share_of_vowels",
        precision=precision,
    )
    return rl.against_trl(work, loads=1, seconds=0, warmup=1, at_least=2, limit=limit)


def gguf_again() -> Row:
    """Issue 26: at most 3 s."""
    file = str(gguf_file())
    converted = import_module("tensafe_nb.engine.models.gguf").converted(Path(file))
    return Row(
        what="a training client of a GGUF file that was converted before, from `import tensafe_nb` to `ready()`, "
        "once torch is imported",
        peer="`from_pretrained` of the converted folder and `get_peft_model`, from the import of transformers on",
        precision="fp32",
        sizes="SmolLM2-135M-Instruct LoRA r8, in a fresh process",
        taken=startup.begun(file, str(converted)),
        target=Target("≤", 3.0, "ours"),
    )


def sampling_llama_cpp() -> Row:
    """Issue 26: at least 0.6 of the speed of llama.cpp, whose weights have fewer bits."""
    file = gguf_file()
    if not LLAMA_PYTHON.exists():
        raise Skipped(WITHOUT_LLAMA)
    (prompt,) = _prompts(1)
    settings = tn.SamplingConfig(max_new_tokens=NEW_TOKENS, ignore_end=True, precision="int8")
    with _client("float32") as tc, beside(LLAMA_PYTHON, "-m", llama_peer.__name__, file) as llama:
        taken = paired(
            lambda: stopwatch(lambda: tc.sample([prompt], settings).result()),
            lambda: tuple(llama([prompt, NEW_TOKENS])),
            seconds=SECONDS,
            at_least=AT_LEAST,
            watch=as_it_says,
        )
    return Row(
        what=SAMPLING,
        peer="llama.cpp (`llama-cpp-python`) on the same GGUF file, without adapter",
        precision="int8, adapter in fp32; Q4_1",
        sizes=_sampled(1),
        taken=taken,
        target=Target("≥", 0.6),
    )


def sampling_by_llama_cpp() -> Row:
    """Issue 26: at least 0.95 of llama.cpp's own speed."""
    return _by_llama_cpp(adapted=True)


def sampling_a_base_by_llama_cpp() -> Row:
    """Issue 26: at least 0.95 of llama.cpp's own speed."""
    return _by_llama_cpp(adapted=False)


_SHARE = f"hidden states of {ROWS}×{TOKENS}, SmolLM2's head of 49,152 tokens, frozen, 25 % labelled"


def _by_llama_cpp(*, adapted: bool) -> Row:
    """Let llama.cpp draw one row for both sides, in programs of their own: ours is a training client."""
    file, (prompt,) = gguf_file(), _prompts(1)
    if not LLAMA_PYTHON.exists():
        raise Skipped(WITHOUT_LLAMA)
    with tempfile.TemporaryDirectory() as folder:
        adapter = [Path(folder) / "adapter.gguf"] if adapted else []
        with beside(LLAMA_PYTHON, "-m", "bench.llama_ours", file, *adapter) as ours:
            ours([prompt, NEW_TOKENS])  # once it has answered, the adapter is written
            with beside(LLAMA_PYTHON, "-m", llama_peer.__name__, file, *adapter) as theirs:
                taken = paired(
                    lambda: tuple(ours([prompt, NEW_TOKENS])),
                    lambda: tuple(theirs([prompt, NEW_TOKENS])),
                    seconds=SECONDS,
                    at_least=AT_LEAST,
                    watch=as_it_says,
                )
    which = "the same adapter" if adapted else "no adapter (of the client, one that adds nothing yet)"
    return Row(
        what="sampling through the client with `engine='llama.cpp'`; logprobs and entropy come with it",
        peer=f"llama.cpp (`llama-cpp-python`) by itself, on the same GGUF file with {which}",
        precision="Q4_1",
        sizes=_sampled(1),
        taken=taken,
        target=Target("≥", 0.95),
    )


def _sampling(rows: int, target: Target, precision: Precision = "exact") -> Row:
    with _client("float32") as tc:
        prompts = _prompts(rows)
        settings = tn.SamplingConfig(max_new_tokens=NEW_TOKENS, ignore_end=True, precision=precision)
        peer, ids = _peft_model().eval(), torch.tensor(prompts)
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": True, "top_k": 0}

        def generate() -> Any:
            return peer.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options
            )

        taken = paired(
            lambda: tc.sample(prompts, settings).result(), generate, seconds=SECONDS, at_least=3, warmup=1
        )
    return Row(
        what=SAMPLING,
        peer="`peft_model.generate(do_sample=True, top_k=0)`",
        precision="fp32" if precision == "exact" else f"{precision}, with the adapter in fp32; fp32",
        sizes=_sampled(rows),
        taken=taken,
        target=target,
    )


def _prompts(rows: int) -> list[list[int]]:
    return [[(7 * row + 11 * place) % 40_000 + 100 for place in range(8)] for row in range(rows)]


def _sampled(rows: int) -> str:
    return f"{NAME}, {rows} prompt(s) of 8 tokens × {NEW_TOKENS} new tokens"


def _memory(what: str, peer: str, kind: str, sizes: str, limit: float) -> Row:
    """Measure each side's growth in a fresh process: what the allocator keeps from the one would hide the other."""
    folder()  # converted once, here
    ours, theirs = (
        [fresh_process(f"from bench import real; print(real.growth({kind!r}, {side}))")] for side in (0, 1)
    )
    return Row(
        what=f"growth of resident memory to the peak: {what}",
        peer=peer,
        precision="fp32",
        sizes=sizes,
        unit="MiB",
        taken=Taken(ours, theirs),
        compares=LARGER,
        target=Target("≤", limit),
    )


def growth(kind: str, side: int) -> str:
    """Return the MiB by which the peak of a few repetitions exceeds what is resident before, as JSON."""
    if kind == "losses":
        return json.dumps(_grown(_losses()[side]))
    if side == 1:
        return json.dumps(_grown(training.by_hand(_peft_model(), _full())))
    with _client("float32", gradient_checkpointing=kind == "recomputed") as tc:
        return json.dumps(_grown(workload.step_through(tc, _full())))


def _grown(action: Callable[[], object]) -> float:
    """Linux keeps the peak of the resident size, and sets it back when asked to."""
    status, before = Path("/proc/self/status"), _kib("VmRSS")
    if not status.exists():
        raise RuntimeError("the peak of the resident memory is read from /proc: Linux only")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        action()
    return (_kib("VmHWM") - before) / 1024


def _kib(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


def _losses() -> tuple[Callable[[], float], Callable[[], float]]:
    from tensafe_nb.losses import LossOutputs, resolve_loss
    from tensafe_nb.losses.views import chunk_rows

    head = _plain().get_output_embeddings().requires_grad_(False)
    batch = workload.full(ROWS, TOKENS, labelled=0.25)
    hidden = torch.randn(ROWS, TOKENS, head.in_features, generator=torch.Generator().manual_seed(0))
    labels, mask = torch.from_numpy(batch.labels), torch.from_numpy(batch.attention_mask)
    loss, rows = resolve_loss("token_ce"), chunk_rows(head.out_features, head.in_features, True)

    def ours() -> float:
        states = hidden.clone().requires_grad_()
        outputs = LossOutputs(states, head, labels, mask, chunk_rows=rows, head_is_frozen=True)
        value = loss(outputs, {"input_ids": labels, "labels": labels[labels != -100]})
        (value.total / value.weight).backward()
        return value.total.item() / value.weight

    def full() -> float:
        states = hidden.clone().requires_grad_()
        value = F.cross_entropy(head(states).flatten(0, 1), labels.flatten())
        value.backward()
        return value.item()

    return ours, full


def _full() -> tn.BatchData:
    return workload.full(ROWS, TOKENS)


@contextmanager
def _client(dtype: str, **fields: Any) -> Iterator[tn.TrainingClient]:
    with tn.ServiceClient() as service:
        tc = service.create_training_client(
            model_ref=folder(),
            lora_config=tn.LoRAConfig(rank=RANK, alpha=ALPHA),
            optimizer={
                "name": "adamw",
                "learning_rate": workload.LEARNING_RATE,
                "weight_decay": workload.WEIGHT_DECAY,
            },
            dtype=dtype,
            device="cpu",
            **fields,
        )
        assert tc.tokenizer
        yield tc


def _plain() -> Any:
    model = workload.plain_model(folder())
    for weight in model.parameters():
        weight.sum()  # the file is mapped: what nobody has read yet would count as growth later
    return model


def _peft_model() -> Any:
    return training.adapted(_plain(), RANK, ALPHA)


@cache
def folder() -> str:
    """Return the model's folder in transformers' format.

    Raises:
        Skipped: There is no model.
    """
    named = os.environ.get("TENSAFE_SMOLLM2")
    found = Path(named) if named else _fetched()
    if found is None or not found.exists():
        raise Skipped(
            "SmolLM2 is not here: run `make models`, or set TENSAFE_SMOLLM2 to its folder or GGUF file"
        )
    if found.is_dir():
        return str(found)
    gguf = import_module("tensafe_nb.engine.models.gguf")
    return str(gguf.converted(found))


def gguf_file() -> Path:
    """Return the file that `make models` fetched.

    Raises:
        Skipped: It is not here.
    """
    found = _fetched()
    if found is None:
        raise Skipped("the GGUF file of SmolLM2 is not here: run `make models`")
    return found


def _fetched() -> Path | None:
    return next(iter(sorted(MODELS.glob("SmolLM2-135M-Instruct*.gguf"))), None)


def _docstrings(tokenizer: Any) -> list[list[tuple[list[int], int]]]:
    """Return batches of (tokens, how many of them are the prompt): documented functions of the standard library."""
    found = []
    for module in (textwrap, string, json, re, inspect):
        for name, function in sorted(vars(module).items()):
            if isinstance(function, types.FunctionType) and function.__doc__:
                prompt = tokenizer(f"def {name}{inspect.signature(function)}:\n").input_ids
                answer = tokenizer(inspect.cleandoc(function.__doc__)).input_ids
                found.append(((prompt + answer)[:LONGEST], min(len(prompt), LONGEST - 1)))
    step = len(found) // (BATCHES * PAIRS)  # of every length and module some
    chosen = found[::step][: BATCHES * PAIRS]
    return [chosen[start : start + PAIRS] for start in range(0, len(chosen), PAIRS)]


def _batch(pairs: list[tuple[list[int], int]]) -> tn.BatchData:
    width = max(len(tokens) for tokens, _ in pairs)
    rows = [tokens + [0] * (width - len(tokens)) for tokens, _ in pairs]
    mask = [[1] * len(tokens) + [0] * (width - len(tokens)) for tokens, _ in pairs]
    labels = [
        [tokens[t + 1] if prompt <= t + 1 < len(tokens) else -100 for t in range(width)]
        for tokens, prompt in pairs
    ]
    return tn.BatchData(rows, mask, labels)


def _trainer(batches: list[tn.BatchData]) -> Callable[[], Any]:
    """Return a function that trains on the batches by `Trainer`, which shifts labels itself and pads as we do."""
    from transformers import Trainer, TrainingArguments

    rows = [row for batch in batches for row in _unshifted(batch)]
    model = _peft_model()
    settings = TrainingArguments(
        output_dir=os.environ["TENSAFE_HOME"],
        per_device_train_batch_size=PAIRS,
        max_steps=BATCHES,
        learning_rate=workload.LEARNING_RATE,
        weight_decay=workload.WEIGHT_DECAY,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=settings, train_dataset=rows, data_collator=_stacked)

    def train() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return trainer.train()

    return train


def _unshifted(batch: tn.BatchData) -> Iterator[dict[str, torch.Tensor]]:
    for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True):
        moved = torch.full((len(ids),), -100)
        moved[1:] = torch.from_numpy(labels[:-1])
        yield {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask), "labels": moved}


def _stacked(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
