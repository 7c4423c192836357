"""SmolLM2-135M-Instruct from its GGUF file: against plain transformers and PEFT, and through everything a user does."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import tensafe_nb as tn
from scripts.models import MISSING, find_smollm2
from tensafe_nb import rlvr
from tensafe_nb.engine.engine import Engine
from tensafe_nb.engine.models import gguf
from tensafe_nb.engine.models import load as models
from tensafe_nb.losses import resolve_loss
from tensafe_nb.store.home import Home

GGUF = find_smollm2()
pytestmark = [
    pytest.mark.soak,
    pytest.mark.real_model,
    pytest.mark.skipif(GGUF is None, reason=MISSING),
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft asks transformers
]

LORA = tn.LoRAConfig(rank=16, alpha=32)
ROWS = [
    {"prompt": "abs(x)\n", "completion": "Return the absolute value of the argument."},
    {"prompt": "len(x)\n", "completion": "Return the number of items in a container."},
    {"prompt": "min(a, b)\n", "completion": "Return the smaller of its arguments."},
    {"prompt": "ord(c)\n", "completion": "Return the Unicode code point of a character."},
]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TOKEN_CE = resolve_loss("token_ce")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the file is converted to, once for all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSAFE_HOME", str(tmp_path_factory.mktemp("home")))
        began = time.perf_counter()
        folder = gguf.converted(Path(str(GGUF)))
    print(f"\nconverted in {time.perf_counter() - began:.1f} s")
    return folder


@pytest.fixture(autouse=True)
def _converted_before(converted: Path, _own_home: None) -> None:
    Home.of_environment().root.mkdir()
    Home.of_environment().models().symlink_to(converted.parent)


@pytest.fixture
def real(service: tn.ServiceClient) -> Iterator[Any]:
    def create(**fields: Any) -> tn.TrainingClient:
        return service.create_training_client(
            **({"model_ref": str(GGUF), "lora_config": LORA, "dtype": "float32", "batch_size": 4} | fields)
        )

    return create


@pytest.fixture(scope="module")
def engine(converted: Path) -> Engine:
    engine = Engine(
        tn.TrainingConfig(model_ref=str(converted), lora_config=LORA, dtype="float32", device="cpu")
    )
    for _, parameter in engine.model.trainable:  # LoRA's B starts at zero: give every weight a gradient
        torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(1))
    return engine


@pytest.fixture(scope="module")
def plain(converted: Path, engine: Engine) -> Any:
    """The same model and adapter by transformers and PEFT alone."""
    base = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    settings = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, settings).eval()
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(engine.model.peft))
    return model


def train(tc: tn.TrainingClient, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        for batch in tc.batches(ROWS):
            losses.append(tc.forward_backward(batch))
            tc.optim_step()
    return [loss.result().loss for loss in losses]


def weights(tc: tn.TrainingClient) -> list[torch.Tensor]:
    return [p.detach().clone() for p in tc._channel._executor.engine.parameters]  # type: ignore[attr-defined]


def test_the_second_load_takes_no_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "write_draft", lambda *_: pytest.fail("converted again"))
    for _ in range(2):
        began = time.perf_counter()
        model = models.load(tn.TrainingConfig(model_ref=str(GGUF), lora_config=LORA))
        print(f"loaded in {time.perf_counter() - began:.2f} s, computing in {model.compute_dtype}")
    assert model.split and model.context == 8192


def test_the_converted_weights_are_what_transformers_reads_from_the_file(converted: Path) -> None:
    path = Path(str(GGUF))
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    kept = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32).state_dict()
    assert read.state_dict().keys() == kept.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in read.state_dict().items())
    assert "quantization_config" not in (converted / "config.json").read_text()


def test_chat_messages_go_through_the_files_own_template(real: Any) -> None:
    tc = real()
    drawn = tc.sample(QUESTION, max_new_tokens=24, temperature=0).result().sequences[0]
    shown = tc.tokenizer.decode(drawn.prompt_tokens)
    assert shown.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert shown.endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    print(repr(drawn.text))
    assert "Paris" in drawn.text


def test_loss_and_gradients_equal_plain_transformers_and_peft(engine: Engine, plain: Any) -> None:
    batch = next(iter(tn.data.batches(ROWS, engine.model.tokenizer, batch_size=4)))
    loss = engine.forward_backward(batch, TOKEN_CE).loss
    found = {name: p.grad / engine.window.divisor for name, p in engine.model.trainable}
    engine.discard_gradients()
    logits = plain(
        torch.from_numpy(batch.input_ids), attention_mask=torch.from_numpy(batch.attention_mask)
    ).logits
    expected = F.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(batch.labels).flatten(), ignore_index=-100
    )
    expected.backward()
    theirs = {
        name.removeprefix("base_model.model."): p.grad
        for name, p in plain.named_parameters()
        if p.requires_grad
    }
    plain.zero_grad()
    assert found.keys() == theirs.keys()
    largest = max(float((found[name] - theirs[name]).abs().max()) for name in found)
    print(f"loss differs by {abs(loss - expected.item()):.1e}, gradients by at most {largest:.1e}")
    assert abs(loss - expected.item()) <= 1e-5 and largest <= 1e-5


def test_greedy_text_equals_generate(engine: Engine, plain: Any) -> None:
    prompts = [QUESTION, "Once upon a time", "def add(a, b):"]
    for ours in engine.sample(prompts, tn.SamplingConfig(max_new_tokens=24, temperature=0)).sequences:
        ids = torch.tensor([list(ours.prompt_tokens)])
        theirs = plain.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
        )
        assert list(ours.tokens) == theirs[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    "fields",
    [{}, {"dtype": "bfloat16"}, {"lora_config": None}, {"lora_config": None, "dtype": "bfloat16"}],
    ids=["LoRA", "LoRA bf16", "all weights", "all weights bf16"],
)
def test_training_steps_lower_the_loss(real: Any, fields: dict[str, Any]) -> None:
    rate = 1e-3 if fields.get("lora_config", LORA) else 1e-4
    losses = train(real(optimizer={"learning_rate": rate}, **fields), 4)
    print([round(loss, 3) for loss in losses])
    assert losses[-1] < losses[0] - 0.3


def test_a_checkpoint_comes_back_exactly_and_goes_on_as_if_never_stopped(real: Any) -> None:
    tc = real(optimizer={"learning_rate": 1e-3})
    train(tc, 2)
    saved = tc.save_state().result()
    gone_on = train(tc, 2), weights(tc)
    again = real(optimizer={"learning_rate": 1e-3})
    again.load_state(saved.artifact_id).result()
    resumed = train(again, 2), weights(again)
    assert gone_on[0] == resumed[0]
    assert all(torch.equal(a, b) for a, b in zip(gone_on[1], resumed[1], strict=True))


def test_an_exported_adapter_gives_the_same_logits_in_plain_peft(
    service: tn.ServiceClient, real: Any, converted: Path, tmp_path: Path
) -> None:
    tc = real(optimizer={"learning_rate": 1e-3})
    train(tc, 2)
    saved = tc.save_state().result().artifact_id
    adapter = service.export_adapter(saved, tmp_path / "adapter")
    merged = service.export_adapter(saved, tmp_path / "merged", merged=True)
    ids = torch.tensor([tc.tokenizer("max(a, b)\nReturn the larger")["input_ids"]])
    with torch.no_grad():
        ours = tc._channel._executor.engine.model.causal(ids).logits
        base = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
        assert torch.equal(peft.PeftModel.from_pretrained(base, adapter).eval()(ids).logits, ours)
        whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(ids).logits
    difference = float((whole - ours).abs().max())
    print(f"merged, the logits differ by at most {difference:.1e}")
    assert difference <= 1e-3, "adding the adapter to the weights rounds once"


def test_a_private_step_is_clipped_noised_and_charged(real: Any) -> None:
    dp = tn.DPConfig(dataset_size=40, noise_multiplier=1.0, target_epsilon=None)
    tc = real(lora_config=tn.LoRAConfig(rank=4), optimizer={"learning_rate": 1e-3}, dp_config=dp)
    before = None
    for draw in tc.dp_batches(ROWS * 10, steps=2):
        tc.forward_backward(draw)
        stepped = tc.optim_step().result()
        assert stepped.param_delta_norm > 0 and stepped.dp_metrics.noise_applied
        before, spent = (before or 0.0), stepped.dp_metrics.total_epsilon
        assert spent > before
        before = spent
    print(tc.privacy_statement().epsilon)


def test_a_step_of_rlvr_moves_the_weights(real: Any) -> None:
    tc = real(dtype="auto", optimizer={"learning_rate": 1e-4})

    def brief(prompt: str, response: str) -> float:
        return -len(response) / 100

    trainer = rlvr.RLVRTrainer(
        tc,
        [QUESTION, [{"role": "user", "content": "Name a colour."}]],
        brief,
        rlvr.REINFORCE("rloo", mask_truncated=False),
        prompts_per_step=2,
        group_size=3,
        max_new_tokens=12,
        reward_timeout=None,
    )
    result = trainer.run(steps=2, show=False).result()
    assert (result.state, tc.step) == ("FINISHED", 2)
    assert all(np.isfinite(tc.history["param_delta_norm"])) and min(tc.history["param_delta_norm"]) > 0


def test_encrypted_adapters_of_the_last_two_layers_give_the_plaintexts_five_likeliest_next_tokens(
    real: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = tn.LoRAConfig(rank=8, target_modules=["q_proj", "v_proj"], layers_to_transform=[28, 29])
    tc = real(lora_config=lora, optimizer={"learning_rate": 2e-2})
    train(tc, 6)
    model = tc._channel._executor.engine.model
    prompts = [
        QUESTION,
        "abs(x)\n",
        "The three primary colours are red,",
        "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
        "Water boils at a temperature of",
    ]
    began = time.perf_counter()
    with tc.he_adapter(layers=[-2, -1], modules=["q_proj", "v_proj"]) as he:
        encrypted = he.model()
        found = encrypted.logits(prompts).result()
        text = encrypted.generate(QUESTION, max_new_tokens=4, temperature=0).result().texts
    took = time.perf_counter() - began
    assert text == tc.sample(QUESTION, max_new_tokens=4, temperature=0).result().texts

    def likeliest(ids: Any) -> tuple[Any, list[int]]:
        with torch.no_grad():
            logits = model.causal(input_ids=torch.tensor([ids])).logits[0].numpy()
        return logits, np.argsort(-logits[-1], kind="stable")[:5].tolist()

    errors, moved = [], 0
    ids = [list(one) for one in encrypted._model.encoded(prompts, 0)]
    for own, logits, five in zip(ids, found.logits, found.next_tokens(5), strict=True):
        plain, expected = likeliest(own)
        assert five == expected, tc.tokenizer.decode(own)
        errors.append(float(np.abs(logits - plain).max() / np.abs(plain).max()))
        with model.peft.disable_adapter():
            moved += likeliest(own)[1] != expected
    assert moved >= 3, "the adapter matters"
    assert max(errors) <= 1e-5
    with capsys.disabled():
        print(
            f"\n{len(prompts)} prompts of {sum(map(len, ids))} tokens and 4 drawn ones in {took:.1f} s: relative error "
            f"{max(errors):.1e}, {found.upload_bytes / found.tokens / 1e3:.0f} kB up and "
            f"{found.download_bytes / found.tokens / 1e3:.0f} kB down for each token and layer; without the adapter "
            f"{moved} of {len(prompts)} have other tokens"
        )
