"""What an estimate leaves untouched, what it says, and when it refuses."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import tensafe_nb as tn
from tensafe_nb.engine import estimate as estimate_of
from tensafe_nb.engine.engine import Engine
from tensafe_nb.engine.estimate import estimate
from tensafe_nb.engine.models import memory
from tensafe_nb.losses import resolve_loss
from tests.unit.engine.private import private_engine

CONFIGS = {
    "an adapter with dropout": {"lora_config": {"rank": 4, "dropout": 0.1}},
    "all weights": {"model_ref": "builtin:sums"},
    "an adapter in bf16": {"lora_config": {"rank": 4}, "dtype": "bfloat16"},
    "plain sgd with a value head": {
        "optimizer": {"name": "sgd"},
        "value_head": True,
        "model_ref": "builtin:sums",
    },
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_of, "AT_LEAST", 1)
    monkeypatch.setattr(estimate_of, "SECONDS", 0)


def trained(fields: dict[str, Any], batch: tn.BatchData, *, estimating: bool) -> tuple[Any, ...]:
    engine = Engine(tn.TrainingConfig(device="cpu", **fields))
    seen: list[Any] = []
    for _ in range(3):
        for _ in range(2):
            if estimating:
                estimate(engine, 4, 8)
            seen.append(engine.forward_backward(batch, resolve_loss("token_ce")))
        if estimating:
            estimate(engine, 4, 8)
        seen.append(engine.optim_step())
        seen.append(engine.sample([[5, 6, 7]], tn.SamplingConfig(max_new_tokens=4)).sequences)
    return seen, [p.detach().clone() for p in engine.parameters], torch.get_rng_state()


@pytest.mark.parametrize("name", CONFIGS)
def test_training_is_bit_for_bit_the_same_with_estimates_in_between(name: str, batch: tn.BatchData) -> None:
    torch.manual_seed(0)
    batch = tn.BatchData(batch.input_ids % 15, labels=batch.labels.clip(max=14))
    plain, weights, random = trained(CONFIGS[name], batch, estimating=False)
    torch.manual_seed(0)
    told, others, random_then = trained(CONFIGS[name], batch, estimating=True)
    assert told == plain
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    assert torch.equal(random, random_then)


def test_an_estimate_takes_no_place_in_the_queue_and_tells_no_event(
    tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    tc.forward_backward(batch).result()
    seen = len(list(tc.history.events()))
    found = tc.estimate(batch_size=4, length=16)
    assert (found.batch_size, found.length, found.micro_batches) == (4, 16, 1)
    assert len(list(tc.history.events())) == seen
    assert tc.optim_step().result().step == 1  # the open window is still open


def test_an_estimate_waits_for_the_operation_that_runs(tc: tn.TrainingClient, batch: tn.BatchData) -> None:
    reached, opened, done = threading.Event(), threading.Event(), threading.Event()

    def gate(outputs: Any, batch: Any) -> Any:
        reached.set()
        assert opened.wait()
        return outputs.logits.mean()

    running = tc.forward_backward(batch, loss_fn=gate)
    assert reached.wait()
    asking = threading.Thread(target=lambda: (tc.estimate(2, 8), done.set()))
    asking.start()
    assert not running.done() and not done.is_set()
    opened.set()
    asking.join()
    assert done.is_set() and running.result().loss


def test_the_parts_of_the_memory_add_up() -> None:
    engine = Engine(tn.TrainingConfig(model_ref="builtin:sums", device="cpu"))
    found = estimate(engine, 4, 8)
    numbers = found.trained_parameters
    assert found.gradient_bytes == 4 * numbers
    assert found.optimizer_bytes == pytest.approx(8 * numbers, rel=0.01)
    assert found.weight_bytes >= 4 * numbers
    parts = found.weight_bytes + found.optimizer_bytes + found.gradient_bytes + found.activation_bytes
    assert found.memory_bytes == pytest.approx(parts, abs=4)
    assert found.needed_bytes == pytest.approx(found.memory_bytes - found.weight_bytes, abs=4)
    assert found.tokens_per_second == pytest.approx(32 / found.seconds_per_step)
    assert "seconds_per_step" in found._repr_html_()


def test_what_is_allocated_already_is_not_needed_again(batch: tn.BatchData) -> None:
    engine = Engine(tn.TrainingConfig(device="cpu"))
    before = estimate(engine, 2, 8)
    engine.forward_backward(batch, resolve_loss("token_ce"))
    engine.optim_step()
    assert before.needed_bytes - estimate(engine, 2, 8).needed_bytes == pytest.approx(
        before.optimizer_bytes, rel=0.01
    )


def test_memory_worked_out_from_small_probes_is_what_the_whole_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tn.TrainingConfig(device="cpu", lora_config=tn.LoRAConfig(rank=4)))
    whole = estimate(engine, 8, 64)
    for tokens in (256, 64, 32):  # of half the rows; of one row; of part of a row
        monkeypatch.setattr(estimate_of, "PROBE_TOKENS", tokens)
        monkeypatch.setattr(estimate_of, "LONGEST_PROBE", tokens)
        assert estimate(engine, 8, 64).activation_bytes == pytest.approx(whole.activation_bytes, rel=0.05)


def test_smaller_micro_batches_take_less_memory_and_the_gradients_stay_beside_them() -> None:
    config = tn.TrainingConfig(model_ref="builtin:sums", device="cpu")
    whole = estimate(Engine(config), 16, 16)
    split = estimate(Engine(config.change(micro_batch_tokens=64)), 16, 16)
    assert (whole.micro_batches, split.micro_batches) == (1, 4)
    assert split.activation_bytes < 0.5 * whole.activation_bytes
    assert split.gradient_bytes == whole.gradient_bytes


def test_sizes_are_taken_from_the_configuration_and_the_context() -> None:
    engine = Engine(tn.TrainingConfig(model_ref="builtin:sums", batch_size=2, gradient_accumulation_steps=3))
    found = estimate(engine)
    assert (found.batch_size, found.length) == (6, min(512, engine.model.context or 512))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch_size": 0}, "batch_size is a whole number from 1; it is 0"),
        ({"length": 2.5}, r"length=2\.5 must be a whole number"),
        ({"length": 10**6}, "more than the .* tokens that the model was made for"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tc: tn.TrainingClient, sizes: Any, message: str) -> None:
    with pytest.raises(tn.ValidationError, match=message):
        tc.estimate(**sizes)


def test_a_private_step_is_estimated_and_nothing_is_spent(service: tn.ServiceClient) -> None:
    dp = tn.DPConfig(noise_multiplier=1.0, dataset_size=100)
    tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=4, dropout=0.1), dp_config=dp)
    rows = [{"prompt": f"{a}+3=", "completion": str(a + 3)} for a in range(10, 30)]
    (draw,) = tc.dp_batches(rows, steps=1)
    tc.forward_backward(draw).result()
    found = tc.estimate(batch_size=4, length=16)
    assert found.seconds_per_step > 0 and found.trained_parameters == tc.refresh().trained_parameters
    assert tc.privacy_statement().steps == 0
    assert tc.optim_step().result().step == 1, "the open step is as it was"


@pytest.mark.parametrize("lora", [tn.LoRAConfig(rank=4), None])
def test_a_private_estimate_counts_a_gradient_for_each_row_and_float64_noise(lora: Any) -> None:
    plain = estimate(Engine(tn.TrainingConfig(lora_config=lora)), 8, 32)
    private = private_engine(lora=lora or False, batch_size=8)
    few, many = estimate(private, 2, 32), estimate(private, 8, 32)
    size = 4 * many.trained_parameters
    apart = [one.memory_bytes - one.optimizer_bytes for one in (many, plain)]  # the one has no moments
    assert apart[0] >= apart[1] and many.gradient_bytes == size
    assert many.needed_bytes - few.needed_bytes >= 6 * size or lora is None
    assert many.needed_bytes >= 4 * size


def test_what_is_taken_one_at_a_time_is_estimated_so(random_model: Any) -> None:
    found = estimate(private_engine(model_ref=random_model("opt"), lora=False, dtype="float32"), 4, 16)
    assert found.micro_batches == 4


def test_a_closed_client_says_so(tc: tn.TrainingClient) -> None:
    assert tc.tokenizer
    tc.close()
    with pytest.raises(tn.ClientClosedError, match="estimate"):
        tc.estimate()


@pytest.mark.parametrize(
    ("free", "advice"),
    [
        (0.5, r"micro_batch_tokens=\d+ in TrainingConfig would fit"),
        (0.01, "Not even one row of 64 tokens fits"),
        (0.0, "Gradients and optimiser alone do not fit"),
    ],
)
def test_a_step_that_will_not_fit_is_refused_with_numbers_and_what_would(
    free: float, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(tn.TrainingConfig(device="cpu", lora_config=tn.LoRAConfig(rank=4)))
    found = estimate(engine, 16, 64)
    lasting = found.gradient_bytes + found.optimizer_bytes
    there = int(lasting + free * found.activation_bytes) if free else 1000
    monkeypatch.setattr(memory, "available", lambda device: there)
    with pytest.raises(
        tn.InsufficientMemoryError, match=rf"needs about .* GiB more on cpu.*{advice}"
    ) as refused:
        estimate(engine, 16, 64)
    assert refused.value.details == {"needed_bytes": found.needed_bytes, "available_bytes": there}


def test_the_advice_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tn.TrainingConfig(device="cpu", lora_config=tn.LoRAConfig(rank=4))
    found = estimate(Engine(config), 16, 64)
    monkeypatch.setattr(memory, "available", lambda device: found.needed_bytes // 2)
    with pytest.raises(tn.InsufficientMemoryError) as refused:
        estimate(Engine(config), 16, 64)
    tokens = int(str(refused.value).partition("micro_batch_tokens=")[2].split()[0])
    assert estimate(Engine(config.change(micro_batch_tokens=tokens)), 16, 64).micro_batches > 1


def test_available_memory_is_the_machines_or_what_the_containers_limit_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo, limit, used = (tmp_path / name for name in ("meminfo", "max", "current"))
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    monkeypatch.setattr(memory, "MEMORY_FILES", (limit, used))
    cpu = torch.device("cpu")
    assert memory.available(cpu) is None
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    assert memory.available(cpu) == 5000 * 1024
    limit.write_text("max\n"), used.write_text("1024\n")
    assert memory.available(cpu) == 5000 * 1024
    limit.write_text("4096\n")
    assert memory.available(cpu) == 3072
