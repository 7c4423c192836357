"""What can only be seen on a GPU, in at most six minutes: does it compute the same, how fast, in how much memory.

    make gpu                                            # on the first CUDA GPU; prints a table in Markdown
    python -m scripts.gpu --device cpu --size tiny      # the same steps on a CPU in seconds, for the tests

Numbers are compared with the CPU's, both in float32: a thousandth apart at most, relative to their size. Times are
medians after a warm-up, and memory is the most that torch's allocator held. The model is a Llama with random weights.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TENSAFE_NB_RENDERER", "text")
os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # before torch: threads that wait take no core from others

import numpy as np
import torch

import tensafe_nb as tn

PARITY = 1e-3
SECONDS = 360  # what the whole may take
LORA = {"rank": 8, "alpha": 16}
TOKENS = np.random.default_rng(0).integers(5, 900, (4, 48))


@dataclass(frozen=True)
class Size:
    """A random Llama and the work that it is given."""

    hidden: int
    layers: int
    inner: int
    vocabulary: int
    rows: int
    length: int
    new_tokens: int
    repeats: int


SIZES = {
    "1b": Size(2048, 20, 5632, 32_768, rows=8, length=512, new_tokens=64, repeats=5),  # 1.1e9 parameters
    "tiny": Size(32, 2, 64, 4096, rows=2, length=16, new_tokens=4, repeats=2),
}


@dataclass(frozen=True)
class Line:
    """A figure, and whether it is as it must be; None where nothing is asked of it."""

    what: str
    figure: str
    right: bool | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=SIZES, default="1b")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print(
            "There is no CUDA GPU here: torch sees none. Nothing was run and nothing measured.",
            file=sys.stderr,
        )
        return 2
    began = time.perf_counter()
    with home():
        lines = [line for part in PARTS for line in part(chosen.device, SIZES[chosen.size])]
    seconds = time.perf_counter() - began
    in_time = seconds <= SECONDS if chosen.device == "cuda" else None
    lines.append(Line(f"all of this, at most {SECONDS} s", f"{seconds:.0f} s", in_time))
    print(table(chosen.device, chosen.size, lines))
    return 0 if all(line.right is not False for line in lines) else 1


@contextlib.contextmanager
def home() -> Iterator[None]:
    """Keep what is written in a folder that goes away."""
    before = os.environ.get("TENSAFE_HOME")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TENSAFE_HOME"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["TENSAFE_HOME"]
            else:
                os.environ["TENSAFE_HOME"] = before


def table(device: str, size: str, lines: Sequence[Line]) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    marks = {True: "yes", False: "NO", None: "–"}
    rows = [f"| {line.what} | {line.figure} | {marks[line.right]} |" for line in lines]
    when = time.strftime("%Y-%m-%d", time.gmtime())
    return "\n".join(
        [
            f"`make gpu`: {name}, {size}, torch {torch.__version__}, {when}.",
            "",
            "| what | figure | as it must be |",
            "|---|---|---|",
            *rows,
        ]
    )


# does it compute the same?


def parity(device: str, size: Size) -> Iterator[Line]:
    """Train the built-in model on the CPU and on the device, and compare what comes out."""
    for name, lora in (("LoRA", LORA), ("all weights", None)):
        with tn.ServiceClient() as service:
            there, here = (trained(service, where, lora) for where in (device, "cpu"))
        for what in here:
            apart = distance(there[what], here[what])
            yield Line(f"{name}: {what}, apart from the CPU's", f"{apart:.1e}", apart <= PARITY)


def trained(service: tn.ServiceClient, device: str, lora: Any) -> dict[str, Any]:
    tc = service.create_training_client(
        lora_config=lora, device=device, dtype="float32", optimizer={"name": "sgd", "learning_rate": 1e-3}
    )
    first = tc.forward_backward(tn.BatchData(TOKENS))
    found: dict[str, Any] = {"loss": first.loss, "gradient norm": first.grad_norm}
    tc.optim_step()
    for _ in range(2):
        tc.forward_backward(tn.BatchData(TOKENS)), tc.optim_step()
    found["logprobs after three steps"] = tc.forward(tn.BatchData(TOKENS), return_logprobs=True).logprobs
    greedy = tc.sample([row[:8].tolist() for row in TOKENS], max_new_tokens=8, temperature=0, ignore_end=True)
    found["logprobs of a sample"] = [sequence.logprobs for sequence in greedy.sequences]
    tc.close()
    return found


def sampling_agrees(device: str, size: Size) -> Iterator[Line]:
    """Compare what the sampler says of its tokens with what training says of them."""
    with tn.ServiceClient() as service:
        tc = service.create_training_client(lora_config=LORA, device=device, dtype="float32")
        worst = 0.0
        for sequence in tc.sample([row[:8].tolist() for row in TOKENS], max_new_tokens=16).sequences:
            ids = [*sequence.prompt_tokens, *sequence.tokens]
            scored = tc.compute_logprobs(tn.BatchData([ids])).logprobs[0]
            start = len(sequence.prompt_tokens) - 1
            found = scored[start : start + len(sequence.tokens)]
            worst = max(worst, distance(found, sequence.raw_logprobs))
    yield Line("logprobs of sampler and training, apart", f"{worst:.1e}", worst <= PARITY)


def resume(device: str, size: Size) -> Iterator[Line]:
    """Save, go on, restore, go on: dropout and sampling draw from generators of the device, which must come back."""
    with tn.ServiceClient() as service:
        tc = service.create_training_client(
            lora_config=LORA | {"dropout": 0.3}, device=device, dtype="float32"
        )
        tc.forward_backward(tn.BatchData(TOKENS)), tc.optim_step()
        saved = tc.save_state().result()
        expected = goes_on(tc)
        losses, tokens = goes_on(service.restore(saved.artifact_id))
    apart = distance(losses, expected[0])
    yield Line("losses with dropout after a restore, apart", f"{apart:.1e}", apart <= PARITY)
    yield Line("tokens sampled after a restore, the same", str(tokens == expected[1]), tokens == expected[1])


def goes_on(tc: tn.TrainingClient) -> tuple[list[float], list[Any]]:
    losses = []
    for _ in range(3):
        losses.append(tc.forward_backward(tn.BatchData(TOKENS)).loss)
        tc.optim_step()
    return losses, [s.tokens for s in tc.sample(["def ", "import "], max_new_tokens=12).sequences]


def distance(found: Any, expected: Any) -> float:
    """Return the largest difference, relative to the largest number, or to 1 if that is larger: logprobs near 0."""
    first, second = flat(found), flat(expected)
    if first.shape != second.shape:
        return float("inf")
    return float(np.abs(first - second).max() / max(1.0, np.abs(second).max()))


def flat(given: Any) -> np.ndarray:
    if isinstance(given, list | tuple):  # of rows, each of its own length
        return np.concatenate([flat(one) for one in given])
    return np.asarray(given, dtype=np.float64).ravel()


# how fast, in how much?


def speed(device: str, size: Size) -> Iterator[Line]:
    """Take steps, sample and update with a model of the given size, adapters in float32 over a base in bf16."""
    with tempfile.TemporaryDirectory() as folder, tn.ServiceClient() as service:
        parameters = make_model(Path(folder), size, device)
        yield Line("the model, parameters", f"{parameters:.2e}")
        forget_peak(device)
        tc = service.create_training_client(
            model_ref=folder,
            lora_config=LORA,
            device=device,
            dtype="bfloat16" if device == "cuda" else "float32",
            optimizer={"learning_rate": 1e-4},
        )
        yield from step(tc, device, size)
        yield from sample(tc, device, size)
        yield from update(tc, device, size)


def make_model(folder: Path, size: Size, device: str) -> int:
    """Write a random Llama with the tokenizer of the built-in model; return how many weights it has."""
    import transformers

    from tensafe_nb.engine.models.load import ASSETS

    config = transformers.LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=max(2, size.hidden // 128),
        num_key_value_heads=max(1, size.hidden // 512),
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    with torch.device(device):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "tiny" / name, folder)
    return sum(parameter.numel() for parameter in model.parameters())


def step(tc: tn.TrainingClient, device: str, size: Size) -> Iterator[Line]:
    batch = tn.BatchData(np.random.default_rng(1).integers(5, 900, (size.rows, size.length)))
    estimate = tc.estimate(batch_size=size.rows, length=size.length)

    def one() -> None:
        tc.forward_backward(batch)
        tc.optim_step().result()

    forget_peak(device)
    seconds = median(one, size.repeats)
    rate = f"{batch.input_ids.size / seconds:,.0f} tokens/s"
    yield Line(f"a step of {size.rows}×{size.length} tokens", f"{seconds:.3f} s, {rate}")
    yield Line("its estimate", f"{estimate.seconds_per_step:.3f} s, {estimate.memory_bytes / 2**30:.2f} GiB")
    yield Line("memory of a step, at most", peak(device))


def sample(tc: tn.TrainingClient, device: str, size: Size) -> Iterator[Line]:
    prompts = [row[:8].tolist() for row in TOKENS]
    drawn = tn.SamplingConfig(max_new_tokens=size.new_tokens, num_samples=4, ignore_end=True)
    seconds = median(lambda: tc.sample(prompts, drawn).result(), size.repeats)
    rows = len(prompts) * 4
    rate = f"{rows * size.new_tokens / seconds:,.0f} tokens/s"
    yield Line(f"{rows} samples of {size.new_tokens} tokens", f"{seconds:.3f} s, {rate}")


def update(tc: tn.TrainingClient, device: str, size: Size) -> Iterator[Line]:
    """Time updates, each on fresh rollouts with made-up rewards."""
    sampler = tn.rlvr.PolicySampler(tc, 4, size.new_tokens, seed=0, chat="never", fixed_length=True)
    algo, taken = tn.rlvr.REINFORCE(baseline="rloo", mask_truncated=False), []
    forget_peak(device)
    for _ in range(size.repeats + 1):
        batch = sampler.generate_trajectories(["def ", "import ", "class ", "x = "])
        for number, trajectory in enumerate(batch):
            trajectory.reward = float(number % 3)
        began = time.perf_counter()
        algo.update(batch, tc).result()
        taken.append(time.perf_counter() - began)
    seconds = statistics.median(taken[1:])
    yield Line(f"an RL update on {len(batch)} rollouts of {size.new_tokens} tokens", f"{seconds:.3f} s")
    yield Line("memory of an RL update, at most", peak(device))


def median(work: Callable[[], object], repeats: int) -> float:
    """Return the median of the seconds that some work takes, once it has been done for nothing."""
    work()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> str:
    return (
        f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if device == "cuda" else "not counted on a CPU"
    )


PARTS = (parity, sampling_agrees, resume, speed)


if __name__ == "__main__":
    sys.exit(main())
