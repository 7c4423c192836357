"""Many short samples of a small model, as reinforcement learning draws them."""

from collections.abc import Callable

from transformers import AutoTokenizer

import tensafe_nb as tn
from bench import workload
from bench.harness import Row, Target, paired
from tensafe_nb.engine.models.load import ASSETS

PROMPTS, SAMPLES, TOKENS = 128, 8, 4


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
