"""Many short samples of a small model, as reinforcement learning draws them, and the requests of many."""

from collections.abc import Callable

from transformers import AutoTokenizer

import tensafe_nb as tn
from bench import workload
from bench.harness import Row, Target, paired
from tensafe_nb.engine.models.load import ASSETS

PROMPTS, SAMPLES, TOKENS = 128, 8, 4
REQUESTS, LENGTH = 16, 64


def sums() -> Row:
    """Issue 9: at least 1.5 times the speed of `generate`."""
    prompts = [f"{10 + number % 90}+{99 - number % 90}=" for number in range(PROMPTS)]
    with tn.ServiceClient() as service:
        ours, peer = _through_the_client(service, prompts), _generate(prompts)
        assert len(ours()) == len(peer()) == PROMPTS * SAMPLES
        taken = paired(ours, peer, seconds=8)
    return Row(
        what="sampling, texts to texts, through the client; logprobs come with it",
        peer="tokenise, transformers `generate(do_sample=True, top_k=0)`, decode",
        precision="fp32",
        sizes=f"builtin:sums, {PROMPTS} prompts × {SAMPLES} samples × {TOKENS} tokens",
        taken=taken,
        target=Target("≥", 1.5),
    )


def requests() -> Row:
    """Issue 26: sixteen who ask at the same time."""
    with tn.ServiceClient() as service:
        tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=16), dtype="float32", device="cpu")
        return asked_together(tc, "builtin:tiny LoRA r16", seconds=8)


def asked_together(tc: tn.TrainingClient, name: str, seconds: float) -> Row:
    """Return the row of requests that are submitted at once, beside the same that wait for each other."""
    prompts = [[(7 * row + 11 * place) % 200 + 100 for place in range(24)] for row in range(REQUESTS)]
    sampling = tn.SamplingConfig(max_new_tokens=LENGTH, ignore_end=True)

    def at_once() -> None:
        for handle in [tc.sample([prompt], sampling) for prompt in prompts]:
            handle.result()

    def one_by_one() -> None:
        for prompt in prompts:
            tc.sample([prompt], sampling).result()

    return Row(
        what=f"{REQUESTS} requests to one client, submitted at once, until all are answered",
        peer="the same requests, each submitted when the one before it is answered",
        precision="fp32",
        sizes=f"{name}, prompts of 24 tokens × {LENGTH} new tokens",
        taken=paired(at_once, one_by_one, seconds=seconds, at_least=2, warmup=1),
    )


def _through_the_client(service: tn.ServiceClient, prompts: list[str]) -> Callable[[], list[str]]:
    tc = service.create_training_client(model_ref="builtin:sums", dtype="float32", device="cpu")
    assert tc.tokenizer  # the model is loaded: transformers cannot load two at once
    sampling = tn.SamplingConfig(max_new_tokens=TOKENS, num_samples=SAMPLES)
    return lambda: tc.sample(prompts, sampling).result().texts


def _generate(prompts: list[str]) -> Callable[[], list[str]]:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "sums", padding_side="left")
    model = workload.plain_model("sums").eval()

    def texts() -> list[str]:
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        drawn = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            top_k=0,
            num_return_sequences=SAMPLES,
            max_new_tokens=TOKENS,
        )
        completions = drawn[:, inputs["input_ids"].shape[1] :]
        return list(tokenizer.batch_decode(completions, skip_special_tokens=True))

    return texts
