"""What a step and a sample can be asked for beyond the usual: settings, log-probabilities, stored weights."""

from functools import partial

import numpy as np
import pytest

import tensafe_nb as tn
from tensafe_nb.engine.sampling import llama_cpp
from tests.close import assert_close

BATCH = {"input_ids": [[5, 6, 7, 8], [9, 10, 11, 12]]}
PROMPTS = [[5, 6, 7, 8], [9]]
LORA = tn.LoRAConfig(rank=4)


def scores(tc: tn.TrainingClient, *row: int) -> list[float]:
    found = tc.forward({"input_ids": [row]}, return_logprobs=True).result().logprobs
    assert found is not None
    return [float(value) for value in found[0, :-1]]


def test_a_training_pass_gives_the_logprobs_of_its_labels(service: tn.ServiceClient) -> None:
    tc = service.create_training_client(lora_config=LORA, micro_batch_tokens=4)
    plain = tc.forward_backward(BATCH).result()
    found = tc.forward_backward(BATCH, return_logprobs=True).result()
    assert plain.logprobs is None and plain == found  # the same loss, the same gradient twice: a mean
    assert_close(found.logprobs, tc.forward(BATCH, return_logprobs=True).logprobs)
    policy = BATCH | {"advantages": np.ones((2, 4)), "weights": np.full((2, 4), 0.5)}
    tc.optim_step(learning_rate=0).result()
    other = tc.forward_backward(policy, "policy_reinforce", return_logprobs=True).result()
    assert_close(other.logprobs, found.logprobs)


def test_activations_that_are_computed_again_give_the_same_step(service: tn.ServiceClient) -> None:
    again, kept = (
        service.create_training_client(lora_config=LORA, gradient_checkpointing=on) for on in (True, False)
    )
    assert again.config.gradient_checkpointing
    assert again.forward_backward(BATCH).result() == kept.forward_backward(BATCH).result()


def test_a_private_training_pass_gives_them_too(service: tn.ServiceClient) -> None:
    private = tn.DPConfig(sampling="worst_case", target_epsilon=None)
    tc = service.create_training_client(lora_config=LORA, dp_config=private)
    own = BATCH | {"example_ids": [1, 2]}
    found = tc.forward_backward(own, return_logprobs=True).result()
    assert_close(found.logprobs, tc.forward(BATCH, return_logprobs=True).logprobs, 1e-4)
    assert tc.optim_step(learning_rate=0.5).result().learning_rate == 0.5


def test_a_step_takes_settings_of_its_own_and_the_next_is_as_configured(service: tn.ServiceClient) -> None:
    configured = {"name": "adamw", "learning_rate": 0.01, "max_grad_norm": 0.5}
    other = {"learning_rate": 0.02, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.1}
    tc = service.create_training_client(lora_config=LORA, optimizer=configured)
    twin = service.create_training_client(
        lora_config=LORA, optimizer=configured | other | {"max_grad_norm": None}
    )
    tc.forward_backward(BATCH), twin.forward_backward(BATCH)
    changed = tc.optim_step(**other, max_grad_norm=0).result()
    assert changed == twin.optim_step().result() and changed.learning_rate == 0.02
    tc.forward_backward(BATCH), twin.forward_backward(BATCH)
    as_before = tn.StepConfig(learning_rate=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    assert tc.optim_step().result() == twin.optim_step(step=as_before, max_grad_norm=0.5).result()


def test_a_setting_that_the_optimiser_does_not_have_is_refused_at_once(service: tn.ServiceClient) -> None:
    tc = service.create_training_client(optimizer={"name": "sgd"})
    with pytest.raises(tn.ValidationError, match="belong to adamw and adam"):
        tc.optim_step(betas=(0.9, 0.99))
    with pytest.raises(tn.ValidationError, match=r"StepConfig\.learning_rate"):
        tc.optim_step(learning_rate=-1.0)


def test_a_sample_says_how_likely_its_prompts_and_the_other_tokens_were(service: tn.ServiceClient) -> None:
    tc = service.create_training_client(lora_config=LORA)
    asked = {"max_new_tokens": 3, "num_samples": 2, "ignore_end": True, "seed": 1}
    plain = tc.sample(PROMPTS, **asked).result()
    found = tc.sample(PROMPTS, **asked, prompt_logprobs=True, top_prompt_logprobs=2, top_logprobs=10).result()
    assert [s.tokens for s in plain.sequences] == [s.tokens for s in found.sequences]
    assert plain.prompt_logprobs == plain.top_prompt_logprobs == plain.sequences[0].top_logprobs == ()
    assert found.prompt_logprobs[1] == (None,) and found.top_prompt_logprobs[1] == ((),)
    first, *rest = found.prompt_logprobs[0]
    assert first is None
    assert_close(rest, scores(tc, *PROMPTS[0]))
    assert all(
        likeliest[0][1] >= own for likeliest, own in zip(found.top_prompt_logprobs[0][1:], rest, strict=True)
    )
    for drawn in found.sequences:
        own = scores(tc, *drawn.prompt_tokens, *drawn.tokens)[-3:]
        assert_close(drawn.raw_logprobs, own)
        for token, logprob, likeliest in zip(
            drawn.tokens, drawn.raw_logprobs, drawn.top_logprobs, strict=True
        ):
            assert len(likeliest) == 10 and [v for _, v in likeliest] == sorted(
                (v for _, v in likeliest), reverse=True
            )
            assert dict(likeliest).get(token, logprob) == pytest.approx(logprob, abs=1e-5)
    greedy = tc.sample(PROMPTS[:1], max_new_tokens=2, temperature=0, top_logprobs=1).result().sequences[0]
    assert [likeliest[0][0] for likeliest in greedy.top_logprobs] == list(greedy.tokens)


def test_an_engine_that_is_not_where_the_model_is_is_refused_with_what_to_do(
    service: tn.ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    tc = service.create_training_client(lora_config=LORA)
    monkeypatch.setattr(llama_cpp, "version", lambda _: "0.0")
    for ask in (tc.sample, partial(service.sample, model_ref="builtin:tiny")):
        with pytest.raises(tn.ValidationError, match=r"in version 0.0.*tensafe_nb\[llama-cpp\]"):
            ask(PROMPTS, engine="llama.cpp").result()
    assert len(tc.sample(PROMPTS, max_new_tokens=1).result().sequences) == len(PROMPTS)


def test_a_sample_says_in_which_precision_it_was_drawn(service: tn.ServiceClient) -> None:
    tc = service.create_training_client(lora_config=LORA, device="cpu")
    fields = {"max_new_tokens": 2, "seed": 1}
    drawn = {
        name: tc.sample(PROMPTS, precision=name, **fields).result() for name in ("exact", "int8", "auto")
    }
    assert {name: result.precision for name, result in drawn.items()} == {
        "exact": "exact",
        "int8": "int8",
        "auto": "exact",  # of a small model nothing is gained
    }
    assert drawn["auto"].sequences == drawn["exact"].sequences != drawn["int8"].sequences
    with pytest.raises(tn.ValidationError, match="precision"):
        tc.sample(PROMPTS, precision="int3")  # type: ignore[arg-type]


def test_stored_weights_are_sampled_without_a_training_client(service: tn.ServiceClient) -> None:
    tc = service.create_training_client(lora_config=LORA, optimizer={"learning_rate": 0.1})
    asked = {"max_new_tokens": 4, "seed": 3, "ignore_end": True, "prompt_logprobs": True}
    base = tc.sample(PROMPTS, **asked).result()
    saved = []
    for name in ("first", "tinker://run/weights/second"):
        tc.forward_backward(BATCH), tc.optim_step()
        saved.append((tc.sample(PROMPTS, **asked), tc.save_state(name=name, include_optimizer=False)))
    expected = [sample.result() for sample, _ in saved]
    assert expected[0] != expected[1]
    ids = [checkpoint.artifact_id for _, checkpoint in saved]
    tc.close()
    for _ in range(2):  # the weights of one and of the other are put in, again and again
        found = [
            service.sample(PROMPTS, artifact_id=name, **asked).result()
            for name in (ids[0], "tinker://run/weights/second")
        ]
        assert service.get_artifact("tinker://run/weights/second").artifact_id == ids[1]
        assert found == expected
    as_it_is = service.sample(PROMPTS, model_ref="builtin:tiny", **asked).result()
    assert as_it_is.sequences == base.sequences and as_it_is.policy_version == 0
    logged = service.get_audit_logs(operation="sample", limit=2)
    assert [entry.artifact_ids_consumed for entry in logged] == [(), (ids[1],)]


def test_what_is_not_there_is_not_sampled_from(service: tn.ServiceClient) -> None:
    with pytest.raises(tn.ArtifactNotFoundError):
        service.restore("tinker://no/such/path")
    with pytest.raises(tn.ArtifactNotFoundError):
        service.sample("a", artifact_id="nothing").result()
    for neither_or_both in ({}, {"artifact_id": "a", "model_ref": "builtin:tiny"}):
        with pytest.raises(tn.ValidationError, match="one of them"):
            service.sample("a", **neither_or_both)
    handle = service.sample([[1, 2], [3, 4]], model_ref="builtin:tiny", max_new_tokens=400, num_samples=16)
    handle.cancel()
    if handle.done():
        assert str(handle.state) in ("CANCELLED", "COMPLETED")
