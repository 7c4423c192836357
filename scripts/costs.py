"""Where the time goes: of a real model, by torch's profiler, and of a private step, by its stages.

`python -m scripts.costs FOLDER_OR_GGUF`: a step of LoRA training (4 × 128 tokens, every position labelled) and decoding
(16 rows), in float32 on one thread. `python -m scripts.costs --private`: private steps of builtin:tiny (8 × 64 tokens)
beside the same without privacy, ledger left out; with a model, steps of all its weights (4 × 128 tokens), and their
memory. Prints CPU milliseconds and shares, so that the next thing to make quicker can be seen.
"""

import argparse
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

import tensafe_nb as tn
from tensafe_nb.engine.canaries import Unpaid
from tensafe_nb.engine.engine import Engine
from tensafe_nb.engine.private_step import PrivateStep
from tensafe_nb.engine.sampling.copies import copies_of
from tensafe_nb.engine.sampling.decoding import BLOCK, LARGE, Decoder
from tensafe_nb.losses import resolve_loss
from tensafe_nb.privacy.tickets import ticket
from tensafe_nb.protocol.batch import TICKET

ROWS, TOKENS = 4, 128
PRIVATE_SHAPE, TURNS, FEW_TURNS = (8, 64), 30, 2
DECODED, PROMPT, NEW_TOKENS = 16, 8, 64
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "mkldnn::_linear_pointwise")


def main() -> None:
    parser = argparse.ArgumentParser("python -m scripts.costs", description=__doc__)
    parser.add_argument("model_ref", nargs="?", help="a folder in transformers' format, or a GGUF file")
    parser.add_argument(
        "--private", action="store_true", help="private steps: of builtin:tiny, or of all weights of a model"
    )
    asked = parser.parse_args()
    model_ref = asked.model_ref
    if model_ref is None and not asked.private:
        parser.error("name a model, or --private")
    torch.set_num_threads(1)
    if asked.private:
        if model_ref is None:
            _private("builtin:tiny", PRIVATE_SHAPE, TURNS, tn.LoRAConfig(rank=8, alpha=16))
            _private("builtin:tiny", PRIVATE_SHAPE, TURNS, None)
        else:
            _private(model_ref, (ROWS, TOKENS), FEW_TURNS, None)
        return
    lora = tn.LoRAConfig(rank=16, alpha=32)
    engine = Engine(tn.TrainingConfig(model_ref=model_ref, lora_config=lora, dtype="float32", device="cpu"))
    _show(f"a training step, {ROWS}×{TOKENS} tokens", _profiled(engine, _step(engine), 3))
    print(f"\na piece of two tokens takes the time of {_piece(engine):.0f} of many")
    with torch.no_grad():
        prompts = np.random.default_rng(0).integers(3, engine.model.vocab_size, (DECODED, PROMPT)).tolist()
        copies = copies_of(engine.model, NEW_TOKENS, DECODED)
        decoder = Decoder(engine.model, prompts, [1] * DECODED, NEW_TOKENS, None, copies)
        token = _profiled(engine, lambda: decoder.feed(decoder.logits.argmax(-1)), 20)
    _show(f"a token of {DECODED} rows, on copies of the weights, without the draw", token)


def _private(model_ref: str, shape: tuple[int, int], turns: int, lora: tn.LoRAConfig | None) -> None:
    dp, before = tn.DPConfig(dataset_size=10_000, target_epsilon=None), _mib("VmRSS")
    fields = {"model_ref": model_ref, "lora_config": lora, "dtype": "float32", "device": "cpu"}
    private = Engine(tn.TrainingConfig(**fields, batch_size=shape[0], dp_config=dp))
    private.train_privately(Unpaid(), "costs")
    of = private.training_step
    assert isinstance(of, PrivateStep)
    stages = (
        (of.gradients, "_of_many_units", "forward and backward pass"),
        (of.sum, "add", "norms, and the sum of clipped gradients"),
        (of.sum, "release", "noise, in float64"),
    )
    taken: dict[str, float] = defaultdict(float)
    for owner, method, name in stages:
        setattr(owner, method, _watched(getattr(owner, method), name, taken))
    ids = np.random.default_rng(0).integers(3, private.model.vocab_size, shape)
    batch, loss = tn.BatchData(ids, labels=np.roll(ids, -1, 1)), resolve_loss("token_ce")
    draws = iter(range(2 + turns))

    def privately() -> float:
        started = time.process_time()
        marks = ticket("costs", 0, next(draws), np.arange(len(batch)))
        private.forward_backward(batch.labelled_with(**{TICKET: marks}), loss), private.optim_step()
        return time.process_time() - started

    privately(), privately()  # which way gradients are told apart is found out, and moments are made
    peak = _mib("VmHWM") - before
    taken.clear()
    plain = Engine(tn.TrainingConfig(**fields))

    def openly() -> float:
        started = time.process_time()
        plain.forward_backward(batch, loss), plain.optim_step()
        return time.process_time() - started

    openly()
    steps, others = zip(*((privately(), openly()) for _ in range(turns)), strict=True)
    whole, without = (float(np.median(some)) * 1e3 for some in (steps, others))
    trained = "all weights" if lora is None else f"LoRA r{lora.rank}"
    print(f"\na private step of {Path(model_ref).name}, {trained}, {shape[0]}×{shape[1]} tokens: ", end="")
    print(f"{whole:.0f} ms of CPU time, {whole / without:.2f} times the step without")
    for name, seconds in taken.items():
        print(f"  {seconds / turns * 1e3:7.1f} ms  {name}")
    print(f"  {without:7.1f} ms  the step without privacy")
    if model_ref != "builtin:tiny":
        print(f"  {peak:7.0f} MiB  held at the peak, the model included")


def _mib(name: str) -> float:
    """Return what Linux says of this process's memory."""
    (kib,) = re.findall(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(kib) / 1024


def _watched(action: Callable[..., Any], name: str, taken: dict[str, float]) -> Callable[..., Any]:
    def watched(*args: Any) -> Any:
        started = time.process_time()
        found = action(*args)
        taken[name] += time.process_time() - started
        return found

    return watched


def _piece(engine: Engine) -> float:
    """Return how many tokens of a large batch take the time of a batch that has next to none."""
    small, large = (_seconds(_forward_backward(engine, *shape)) for shape in ((1, 2), (ROWS, TOKENS)))
    return small / (large / (ROWS * TOKENS))


def _seconds(action: Callable[[], object]) -> float:
    taken = []
    for _ in range(5):
        started = time.process_time()
        action()
        taken.append(time.process_time() - started)
    return min(taken)


def _step(engine: Engine) -> Callable[[], None]:
    forward_backward = _forward_backward(engine, ROWS, TOKENS)

    def step() -> None:
        forward_backward()
        engine.optim_step()

    return step


def _forward_backward(engine: Engine, rows: int, tokens: int) -> Callable[[], object]:
    ids = np.random.default_rng(0).integers(3, engine.model.vocab_size, (rows, tokens))
    batch, loss = tn.BatchData(ids, labels=np.roll(ids, -1, 1)), resolve_loss("token_ce")
    return lambda: engine.forward_backward(batch, loss)


def _profiled(engine: Engine, action: Callable[[], Any], times: int) -> dict[str, float]:
    """Return the milliseconds of each kind of work in one of several repetitions."""
    action()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as taken:
        for _ in range(times):
            action()
    found: dict[str, float] = defaultdict(float)
    for event in taken.key_averages(group_by_input_shape=True):
        kind = _kind(event.key, str(event.input_shapes), _head_sizes(engine))
        found[kind] += event.self_cpu_time_total / 1e3 / times
    return found


def _head_sizes(engine: Engine) -> tuple[str, ...]:
    vocabulary = engine.model.vocab_size
    blocks = (f"[{vocabulary // BLOCK}, ",) if vocabulary >= LARGE else ()
    return f"{vocabulary}", *blocks  # whole, or block by block


def _kind(name: str, shapes: str, head: tuple[str, ...]) -> str:
    if name in PRODUCTS:
        return (
            "the head's matrix products"
            if any(size in shapes for size in head)
            else "the layers' matrix products"
        )
    if "scaled_dot_product" in name:
        return "attention"
    if head[0] in shapes:
        return "what else is as large as the vocabulary"
    return "everything else: norms, positions, activations, Python"


def _show(title: str, costs: Mapping[str, float]) -> None:
    total = sum(costs.values())
    print(f"\n{title}: {total:.0f} ms of CPU time")
    for kind, cost in sorted(costs.items(), key=lambda item: -item[1]):
        print(f"  {cost:7.1f} ms  {cost / total:4.0%}  {kind}")


if __name__ == "__main__":
    main()
