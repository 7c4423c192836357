"""How far fewer bits are from the policy that trains: `python -m scripts.precision FOLDER_OR_GGUF`.

Samples answers to chat prompts in each precision, scores them under the trained weights, and prints by how much the
log-probabilities differ: what an update of reinforcement learning corrects for. The adapter is random, of usual size.
"""

import argparse

import numpy as np
import torch

import tensafe_nb as tn
from tensafe_nb.engine.engine import Engine
from tensafe_nb.protocol.results import SampledSequence

QUESTIONS = (
    "Write a short story about a lighthouse keeper.",
    "What is 12 times 7?",
    "Explain photosynthesis to a child.",
    "List three uses for a brick.",
)
SAMPLES, NEW_TOKENS, CAP = 4, 64, 2.0


def main() -> None:
    parser = argparse.ArgumentParser("python -m scripts.precision", description=__doc__)
    parser.add_argument("model_ref", help="a folder in transformers' format, or a GGUF file")
    model_ref = parser.parse_args().model_ref
    torch.set_num_threads(1)
    lora = tn.LoRAConfig(rank=16, alpha=32)
    engine = Engine(tn.TrainingConfig(model_ref=model_ref, lora_config=lora, dtype="float32", device="cpu"))
    torch.manual_seed(0)
    for name, weight in engine.model.trainable:
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.01)
    print("| precision | tokens | mean of the difference | largest | KL | largest ratio | ratios above 2 |")
    print("|---|---|---|---|---|---|---|")
    for precision in ("exact", "bfloat16", "int8"):
        print(_line(engine, precision), flush=True)


def _line(engine: Engine, precision: str) -> str:
    sampling = tn.SamplingConfig(max_new_tokens=NEW_TOKENS, num_samples=SAMPLES, seed=1).replace(
        precision=precision
    )
    prompts = [[{"role": "user", "content": question}] for question in QUESTIONS]
    drawn = engine.sample(prompts, sampling).sequences
    off = np.concatenate([_difference(engine, sequence) for sequence in drawn])  # log π_train − log π_sampled
    kl, ratio = np.mean(np.expm1(off) - off), np.exp(off)
    size, above = np.abs(off), np.mean(ratio > CAP)
    cells = f"{size.mean():.4f} | {size.max():.2f} | {kl:.5f} | {ratio.max():.2f} | {above:.2%}"
    return f"| {precision} | {len(off)} | {cells} |"


def _difference(engine: Engine, sequence: SampledSequence) -> np.ndarray:
    ids, start = [*sequence.prompt_tokens, *sequence.tokens], len(sequence.prompt_tokens) - 1
    labels = [*([-100] * start), *sequence.tokens, -100]
    scored = engine.compute_logprobs(tn.BatchData([ids], labels=[labels])).logprobs
    return np.asarray(scored[0, start:-1] - sequence.raw_logprobs)


if __name__ == "__main__":
    main()
