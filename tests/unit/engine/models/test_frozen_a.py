"""FFA-LoRA: B is trained, A stays as it was drawn, and both are kept."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import tensafe_nb as tn
from tensafe_nb.engine import state as states
from tensafe_nb.engine.engine import Engine
from tensafe_nb.engine.estimate import estimate
from tensafe_nb.engine.models.adapter_folders import OF_TRAINING
from tests.close import assert_close
from tests.parity.serving import engine_of
from tests.unit.engine.models.test_reading import CONFIGS, saved
from tests.unit.engine.private import TOKEN_CE, clipped_sum, examples, one_at_a_time, private_engine

FROZEN = tn.LoRAConfig(rank=4, freeze_a=True)
BATCH = tn.BatchData([[5, 6, 7, 8], [9, 10, 11, 12]])
QUICK = {"optimizer": {"learning_rate": 0.1}, "device": "cpu"}


def factors(engine: Engine) -> tuple[dict[str, Any], dict[str, Any]]:
    named = {n: p.detach().clone() for n, p in engine.model.causal.named_parameters() if ".lora_" in n}
    a, b = ({n: p for n, p in named.items() if f".lora_{factor}." in n} for factor in "AB")
    return a, b


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def learnt(engine: Engine, steps: int = 2) -> Engine:
    for _ in range(steps):
        engine.forward_backward(BATCH, TOKEN_CE)
        engine.optim_step()
    return engine


@pytest.mark.parametrize("more", [{}, {"dropout": 0.3}, {"bias": "lora_only"}], ids=str)
def test_b_is_trained_and_a_stays_bit_for_bit(more: dict[str, Any]) -> None:
    engine = Engine(tn.TrainingConfig(lora_config=FROZEN.replace(**more), **QUICK))
    (a, b), trained = factors(engine), [name for name, _ in engine.model.trainable]
    assert len(a) == len(b) > 0 and not any(".lora_A." in name for name in trained)
    learnt(engine)
    assert same(factors(engine)[0], a)
    assert not any(torch.equal(now, b[name]) for name, now in factors(engine)[1].items())


def test_its_gradients_are_those_that_b_has_beside_a_trained_a() -> None:
    frozen, whole = (
        Engine(tn.TrainingConfig(lora_config=FROZEN.replace(freeze_a=freeze), **QUICK))
        for freeze in (True, False)
    )
    assert same(factors(frozen)[0], factors(whole)[0]), "the seed draws the same A"
    gradients = []
    for engine in (frozen, whole):
        engine.forward_backward(BATCH, TOKEN_CE)
        named = engine.model.causal.named_parameters()
        gradients.append({n: p.grad for n, p in named if ".lora_B." in n})
    assert same(*gradients)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_privately_each_rows_gradient_is_that_of_b_alone(dropout: float) -> None:
    engine = private_engine(
        lora=FROZEN.replace(dropout=dropout), dp={"max_grad_norm": 1e3}, noise=None, dtype="float32"
    )
    a, rows = factors(engine)[0], examples((5, 9, 3))
    if not dropout:
        assert_close(clipped_sum(engine, rows), one_at_a_time(engine, rows, 1e3))
    engine.forward_backward(rows, TOKEN_CE)
    engine.optim_step()
    assert same(factors(engine)[0], a)


def test_scoring_by_the_base_does_not_let_a_be_trained_afterwards() -> None:
    engine = Engine(tn.TrainingConfig(lora_config=FROZEN, **QUICK))
    a, trained = factors(engine)[0], [name for name, _ in engine.model.trainable]
    engine.compute_logprobs(BATCH, reference=True)  # PEFT turns an adapter off and on for it
    assert [name for name, _ in engine.model.trainable] == trained
    assert same(factors(learnt(engine))[0], a)
    engine.freeze_reference()
    engine.compute_logprobs(BATCH, reference=True)
    assert [name for name, _ in engine.model.trainable] == trained


def test_half_the_gradients_and_moments_are_estimated_and_none_of_the_inputs_is_kept() -> None:
    frozen, whole = (
        estimate(Engine(tn.TrainingConfig(lora_config=FROZEN.replace(freeze_a=freeze), **QUICK)), 4, 32)
        for freeze in (True, False)
    )
    assert frozen.gradient_bytes < 0.7 * whole.gradient_bytes
    assert frozen.optimizer_bytes < 0.7 * whole.optimizer_bytes
    assert frozen.activation_bytes <= whole.activation_bytes


@pytest.mark.transports("embedded", soak="http")
def test_a_checkpoint_holds_a_and_goes_on_bit_for_bit(service: tn.ServiceClient, batch: tn.BatchData) -> None:
    settings: dict[str, Any] = {"lora_config": FROZEN, "optimizer": {"learning_rate": 1e-2}}
    tc = service.create_training_client(**settings)
    tc.forward_backward(batch), tc.optim_step()
    saved = tc.save_state()
    expected = [tc.forward_backward(batch), tc.optim_step(), tc.forward(batch)][-1].loss
    other = service.create_training_client(**settings, seed=1)  # its own A is another one
    other.load_state(saved.artifact_id)
    assert [other.forward_backward(batch), other.optim_step(), other.forward(batch)][-1].loss == expected
    again = service.restore(saved.artifact_id)
    assert again.config.lora_config.freeze_a
    assert [again.forward_backward(batch), again.optim_step(), again.forward(batch)][-1].loss == expected
    plain = service.create_training_client(lora_config=tn.LoRAConfig(rank=4))
    with pytest.raises(tn.ValidationError, match=r"lora_config\.freeze_a: True there, False here"):
        plain.load_state(saved.artifact_id).result()


def test_a_fork_has_an_a_of_its_own(service: tn.ServiceClient) -> None:
    tc = service.create_training_client(lora_config=FROZEN)
    other = service.create_training_client(lora_config=FROZEN, seed=1).save_state()
    tc.ready().result()
    before = factors(engine_of(tc))
    fork = tc.fork()
    fork.load_state(other.artifact_id).result()
    assert same(factors(engine_of(tc))[0], before[0]) and same(factors(engine_of(tc))[1], before[1])
    assert not same(factors(engine_of(fork))[0], before[0])
    fork.forward_backward(BATCH), fork.optim_step().result()
    assert fork.config.lora_config.freeze_a


def test_a_state_from_before_the_field_loads_and_trains_both() -> None:
    engine = Engine(tn.TrainingConfig(lora_config=tn.LoRAConfig(rank=4), **QUICK))
    state = engine.capture(include_optimizer=True)
    del state.facts["config"]["lora_config"]["freeze_a"]
    frozen = engine.config.replace(lora_config=FROZEN)
    states.check(state.facts, engine.config, engine.fingerprint, "art-old", with_moments=True)
    engine.restore(state)
    with pytest.raises(tn.ValidationError, match="freeze_a: False there, True here"):
        states.check(state.facts, frozen, engine.fingerprint, "art-old", with_moments=True)


# of patterns that PEFT 0.21 makes itself, where it doubles the rank of fused experts
@pytest.mark.filterwarnings(r"ignore:The following (rank|alpha)_pattern keys .*gate_up_proj:RuntimeWarning")
@pytest.mark.parametrize("shape", ["llama", "gpt2", pytest.param("mixtral", marks=pytest.mark.soak)])
def test_an_export_is_a_whole_adapter_for_peft_and_whoever_goes_on_from_it_says_what_is_trained(
    shape: str, service: tn.ServiceClient, tmp_path: Path
) -> None:
    base = saved(tmp_path / "base", CONFIGS[shape]())
    tc = service.create_training_client(
        model_ref=str(base),
        lora_config=FROZEN.replace(rank=2),
        optimizer={"learning_rate": 1e-2},
        dtype="float32",
    )
    tc.forward_backward(BATCH), tc.optim_step()
    after = tc.forward(BATCH).loss
    exported = str(service.export_adapter(tc.save_state().artifact_id, tmp_path / "exported"))
    loaded = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), exported)
    ids = torch.tensor(BATCH.input_ids)
    assert loaded.eval()(ids, labels=ids).loss.item() == pytest.approx(after, rel=1e-5)
    both = service.create_training_client(model_ref=exported, dtype="float32")
    alone = service.create_training_client(
        model_ref=exported, lora_config={"freeze_a": True}, dtype="float32"
    )
    for client, freeze in ((both, False), (alone, True)):
        assert client.forward(BATCH).loss == pytest.approx(after, rel=1e-5)
        assert client.config.lora_config is not None and client.config.lora_config.freeze_a is freeze
        a = factors(engine_of(client))[0]
        client.forward_backward(BATCH), client.optim_step().result()
        assert same(factors(engine_of(client))[0], a) is freeze


def test_an_embedding_whose_a_begins_at_zero_is_refused() -> None:
    lora = FROZEN.replace(target_modules=("embed_tokens", "q_proj"))
    with pytest.raises(
        tn.ValidationError, match=r"cannot adapt the embedding 'model.embed_tokens'.*modules_to_save"
    ):
        Engine(tn.TrainingConfig(lora_config=lora, **QUICK))
    whole = FROZEN.replace(target_modules=("q_proj",), modules_to_save=("embed_tokens",))
    trained = [n for n, _ in Engine(tn.TrainingConfig(lora_config=whole, **QUICK)).model.trainable]
    assert any("embed_tokens" in name for name in trained)


def test_what_is_of_training_and_not_of_an_adapter_is_a_field() -> None:
    assert set(tn.LoRAConfig.model_fields) >= OF_TRAINING
