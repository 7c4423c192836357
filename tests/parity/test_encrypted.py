"""An adapter that is applied to ciphertexts, in this process and behind a server: the same numbers, the same errors."""

import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import tensafe_nb as tn
from tensafe_nb.privacy.encrypted import scheme
from tensafe_nb.transports.encrypted import adapter, halves
from tests.parity.serving import Serving, core_of, engine_of

BOUND = 1e-5  # of the largest entry
LAST = tn.LoRAConfig(rank=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[3])
PROMPTS = ["def add(a, b):", "abs(x)\n"]
TOKENS = 8  # of a ciphertext: few keys, which are quickly made


def trained(service: tn.ServiceClient, lora: tn.LoRAConfig = LAST, **fields: Any) -> tn.TrainingClient:
    tc = service.create_training_client(lora_config=lora, **fields)
    tc.ready().result()
    dice = torch.Generator().manual_seed(1)
    for parameter in engine_of(tc).parameters:  # B begins as 0: let the adapter matter
        torch.nn.init.normal_(parameter, std=0.05, generator=dice)
    return tc


@pytest.fixture
def tc(service: tn.ServiceClient) -> tn.TrainingClient:
    return trained(service)


@pytest.fixture
def he(tc: tn.TrainingClient) -> Iterator[adapter.HEAdapter]:
    with tc.he_adapter(modules=["q_proj", "v_proj"], tokens=TOKENS) as he:
        yield he


def in_clear(tc: tn.TrainingClient, module: str, x: Any, layer: int = 3) -> Any:
    (found,) = (
        m
        for name, m in engine_of(tc).model.causal.named_modules()
        if name.endswith(f"{layer}.self_attn.{module}")
    )
    a, b = (one["default"].weight.detach().double().numpy() for one in (found.lora_A, found.lora_B))
    return found.scaling["default"] * np.asarray(x) @ a.T @ b.T


def plain_logits(tc: tn.TrainingClient, prompt: str) -> Any:
    with torch.no_grad():
        ids = torch.tensor([tc.tokenizer(prompt)["input_ids"]])
        return engine_of(tc).model.causal(input_ids=ids).logits[0].numpy()


def error(found: Any, exact: Any) -> float:
    return float(np.abs(np.asarray(found) - exact).max() / np.abs(exact).max())


def activations(tokens: int, width: int = 160) -> Any:
    return np.random.default_rng(0).normal(size=(tokens, width))


def step(tc: tn.TrainingClient) -> None:
    tc.forward_backward(tn.BatchData([[5, 6, 7, 8]]))
    tc.optim_step().result()


def test_one_upload_gives_what_each_modules_adapter_adds(
    tc: tn.TrainingClient, he: adapter.HEAdapter, transport: str
) -> None:
    x = activations(11)
    handle = he(x)
    both = handle.result()
    assert "q_proj" in handle._repr_html_(), "a cell may end with it"
    with pytest.raises(tn.ValidationError, match=r'There are several: result\["q_proj"\]'):
        _ = both.delta
    assert list(both.deltas) == ["q_proj", "v_proj"] and both.tokens == 11
    for module in both.deltas:
        assert error(both[module], in_clear(tc, module, x)) <= BOUND, module
    one = he[-1, "v_proj"](torch.from_numpy(x).requires_grad_()).result()
    assert error(one, in_clear(tc, "v_proj", x)) <= BOUND, "the result is the array, for numpy"
    assert np.array_equal(1 + one, one.delta + 1) and np.array_equal(np.abs(one * 2), np.abs(2 * one.delta))
    assert one.delta.shape == (11, 160) and one.policy_version == tc.policy_version
    notes = {both.note, one.note, he.note}
    words = f"{both!r} {he!r} {he._repr_html_()} {both._repr_html_()}"
    if transport == "embedded":
        assert notes == {"demonstration: both halves in one process"}
        assert words.count("demonstration: both halves in one process") == 4
    else:
        assert notes == {None} and "demonstration" not in words


def test_the_model_says_what_the_plaintext_adapter_says(
    tc: tn.TrainingClient, he: adapter.HEAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    model = he.model()
    found = model.logits(PROMPTS).result()
    plain = [plain_logits(tc, prompt) for prompt in PROMPTS]
    errors = [error(one, exact) for one, exact in zip(found.logits, plain, strict=True)]
    with capsys.disabled():
        print(f" relative error of the logits {max(errors):.0e} ", end="")
    assert max(errors) <= BOUND
    with engine_of(tc).model.peft.disable_adapter():
        assert all(
            error(plain_logits(tc, p), one) > 100 * BOUND for p, one in zip(PROMPTS, plain, strict=True)
        )
    scores = model.score(PROMPTS).result()
    for prompt, ids, logprobs in zip(PROMPTS, scores.tokens_of, scores.logprobs, strict=True):
        assert list(ids) == tc.tokenizer(prompt)["input_ids"]
        exact = torch.from_numpy(plain_logits(tc, prompt)).double().log_softmax(-1)[:-1]
        assert np.allclose(logprobs, exact.gather(1, torch.tensor(ids[1:])[:, None])[:, 0], atol=1e-4)
    assert found.tokens == sum(map(len, scores.tokens_of)), (
        "padding is not encrypted, and q and v share an upload"
    )


@pytest.mark.transports("embedded", soak="http")
def test_what_is_generated_is_what_the_client_samples(tc: tn.TrainingClient, he: adapter.HEAdapter) -> None:
    drawn = {"max_new_tokens": 3, "temperature": 0.8, "seed": 5}
    found = he.model().generate(PROMPTS, **drawn).result()
    assert found.texts == tc.sample(PROMPTS, **drawn).result().texts
    (_, second, _), *_ = (sequence.tokens for sequence in found.sequences)
    ended = he.model().generate(PROMPTS[:1], **drawn, stop_tokens=[second]).result().sequences[0]
    assert (len(ended.tokens), ended.finish_reason) == (2, "stop")


def test_once_the_weights_move_on_calls_are_refused_until_refreshed_with_the_same_keys(
    tc: tn.TrainingClient, he: adapter.HEAdapter
) -> None:
    x = activations(2)
    before = he(x).result()
    client = he._halves._open[he.parts[0].shape].client
    step(tc)
    with pytest.raises(
        tn.EncryptionContextError, match=r"policy_version \d was opened, .* at \d.*he\.refresh\(\)"
    ):
        he(x).result()
    assert he.refresh().result().policy_version == tc.policy_version == he.policy_version
    after = he(x).result()
    assert after.policy_version == before.policy_version + 1
    assert (
        error(after["q_proj"], in_clear(tc, "q_proj", x)) <= BOUND < error(after["q_proj"], before["q_proj"])
    )
    assert he._halves._open[he.parts[0].shape].client is client


@pytest.mark.transports("embedded", soak="http")
def test_an_adapter_that_moved_on_before_the_first_call_is_not_silently_another(
    tc: tn.TrainingClient, he: adapter.HEAdapter
) -> None:
    step(tc)
    with pytest.raises(tn.EncryptionContextError, match="was trained on"):
        he(activations(1)).result()
    he.refresh().result()
    assert he(activations(1)).result().policy_version == tc.policy_version


@pytest.mark.transports("embedded", soak="http")
def test_calls_queue_tell_their_progress_and_can_be_cancelled(
    tc: tn.TrainingClient, he: adapter.HEAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(halves, "MOST_MESSAGE", 600_000)  # 8 tokens at a time
    reached, opened = threading.Event(), threading.Event()
    answered = halves.Halves._answered

    def slow(self: Any, part: Any, x: Any, tick: Callable[[int, int], None]) -> Any:
        reached.set()
        assert opened.wait(60)
        return answered(self, part, x, tick)

    monkeypatch.setattr(halves.Halves, "_answered", slow)
    running, waiting, last = (he(activations(tokens)) for tokens in (24, 1, 1))
    assert reached.wait(60)
    assert (running.state, running.progress) == ("RUNNING", (0, 24))
    assert (waiting.queue_position, last.queue_position) == (1, 2)
    assert waiting.cancel() and waiting.state == "CANCELLED"
    threading.Thread(target=running.cancel).start()
    while not running._promise.cancel_requested:
        pass
    opened.set()
    assert isinstance(running.exception(60), tn.FutureCancelledError)
    assert last.result(60).tokens == 1


@pytest.mark.transports("http", soak="embedded")
def test_a_connection_that_is_gone_is_opened_again_with_keys_of_its_own(
    tc: tn.TrainingClient, he: adapter.HEAdapter
) -> None:
    x = activations(3)
    he(x).result()
    first = he._halves._open[he.parts[0].shape]
    core_of(tc).connections.expire(-1.0)  # as a server does with one that is idle, or one that is killed
    assert error(he(x).result()["q_proj"], in_clear(tc, "q_proj", x)) <= BOUND
    second = he._halves._open[he.parts[0].shape]
    assert second.connection_id != first.connection_id and second.client.context != first.client.context


@pytest.mark.transports("http", soak="embedded")
def test_leaving_the_context_drops_the_keys_at_both_ends(tc: tn.TrainingClient) -> None:
    with tc.he_adapter(modules="q_proj", tokens=TOKENS) as he:
        he(activations(1)).result()
        assert len(core_of(tc).connections.open) == 1
    assert not core_of(tc).connections.open and not he._halves._open
    with pytest.raises(tn.ClientClosedError, match=r"its keys are gone. Make a new one: tc\.he_adapter"):
        he(activations(1))
    with pytest.raises(tn.ValidationError, match="keys of a connection, which never leave"):
        pickle.dumps(he)
    he.close()
    assert "closed" in repr(he)


@pytest.mark.transports("http", soak="embedded")
def test_closing_the_training_client_closes_its_encrypted_adapters(tc: tn.TrainingClient) -> None:
    he = tc.he_adapter(modules="q_proj", tokens=TOKENS)
    he(activations(1)).result()
    core = core_of(tc)
    tc.close()
    assert not core.connections.open
    with pytest.raises(tn.ClientClosedError):
        he(activations(1))


@pytest.mark.transports("embedded", soak="http")
def test_several_layers_and_inputs_are_named(service: tn.ServiceClient) -> None:
    lora = tn.LoRAConfig(
        rank=2, target_modules=["q_proj", "v_proj", "o_proj", "up_proj"], layers_to_transform=[2, 3]
    )
    tc = trained(service, lora)
    with tc.he_adapter(layers=[-2, -1], tokens=TOKENS) as he:
        assert [part.modules for part in he.parts] == 2 * [("o_proj",), ("q_proj", "v_proj"), ("up_proj",)]
        x = activations(2)
        assert error(he[2, "o_proj"](x).result(), in_clear(tc, "o_proj", x, layer=2)) <= BOUND
        assert error(he[-1, "q_proj"](x).result(), in_clear(tc, "q_proj", x)) <= BOUND
        assert len(core_of(tc).connections.open) == 2, "one for each shape, whatever the layer"
        for ask, words in (
            (lambda: he(x), r"read different inputs.*Name a layer and a module, such as he\[2, 'o_proj'\]"),
            (
                lambda: he[-1],
                r"read different inputs, and one call has one: layer 3 o_proj, layer 3 q_proj and",
            ),
            (lambda: he[2.0], r"he\[2\.0\]: that was not chosen"),
            (lambda: he[2, "o_prj"], r"he\[2, 'o_prj'\]: that was not chosen"),
            (lambda: he[-1, "o_proj"](np.zeros((2, 160)) * 1j), "numbers.*complex"),
            (
                lambda: he[0, "q_proj"],
                r"that was not chosen\. There is layer 2 o_proj, layer 2 q_proj and v_proj",
            ),
            (lambda: he[-1, "k_proj"], "that was not chosen"),
            (lambda: he[9], "that was not chosen"),
            (lambda: he[-1, "o_proj"](np.zeros((2, 7))), r"\(S, 160\)"),
            (lambda: he[-1, "o_proj"](np.full((2, 160), np.nan)), "NaN"),
        ):
            with pytest.raises(tn.ValidationError, match=words):
                ask()
    with (
        tc.he_adapter(modules=["q_proj"], tokens=TOKENS) as he,
        pytest.raises(
            tn.ValidationError,
            match=r"trains model\.layers\.2\.mlp\.up_proj, .* 2 more as well, which is not on",
        ),
    ):
        he.model()


REFUSED: list[tuple[dict[str, Any], type[tn.TGTinkerError], str]] = [
    ({"layers": []}, tn.ValidationError, "layers=.* must be numbers of layers"),
    ({"layers": "last"}, tn.ValidationError, "layers='last' must be"),
    ({"layers": [4]}, tn.ValidationError, "has 4 layers, 0 to 3; there is no 4"),
    ({"layers": [0]}, tn.ValidationError, "layer 0 has no adapter"),
    ({"modules": ["q_prj"]}, tn.ValidationError, "no adapted module 'q_prj'. Did you mean 'q_proj'"),
    ({"modules": []}, tn.ValidationError, "modules=.* must be names"),
    ({"modules": [3]}, tn.ValidationError, r"modules=\[3\] must be"),
    ({"tokens": 7}, tn.ValidationError, "one of 1, 8, 64, 512"),
    ({"params": "n8192-d3"}, tn.EncryptionContextError, "no parameter set.*Did you mean 'n8192-d2'"),
    ({"params": "n8192-sum"}, tn.EncryptionContextError, "no parameter set"),
]


@pytest.mark.transports("http", soak="embedded")
def test_what_cannot_be_had_is_said_at_once(tc: tn.TrainingClient) -> None:
    for given, kind, words in REFUSED:
        with pytest.raises(kind, match=words):
            tc.he_adapter(**given)


@pytest.mark.transports("http", soak="embedded")
def test_a_client_without_adapter_has_nothing_to_apply(service: tn.ServiceClient) -> None:
    with pytest.raises(tn.ValidationError, match="trains all weights, and there is no adapter"):
        service.create_training_client(model_ref="builtin:sums").he_adapter()


@pytest.mark.transports("embedded", soak="http")
def test_another_base_is_not_taken_for_that_of_the_adapter(he: adapter.HEAdapter) -> None:
    with pytest.raises(tn.ValidationError, match=r"'builtin:sums' here is not the one.*he\.model\(base=…\)"):
        he.model(base="builtin:sums")


@pytest.mark.transports("embedded")
def test_without_tenseal_nothing_is_computed_and_the_line_that_installs_it_is_said(
    tc: tn.TrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tenseal", None)
    with pytest.raises(
        tn.EncryptionContextError, match=r"pip install tenseal\. Nothing is ever computed in clear"
    ):
        tc.he_adapter()


@pytest.mark.transports("embedded")
def test_the_cost_is_estimated_before_any_key_of_the_connection_is_made(
    tc: tn.TrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tc.he_adapter(tokens=TOKENS) as he:
        monkeypatch.setattr(halves, "HEClient", lambda *_, **__: pytest.fail("a key was made"))
        cost = he.cost(tokens=64)
        assert cost.upload_kb > 0 and cost.galois_mb > 0 and str(cost).startswith("estimate")
        assert scheme.library()


@pytest.mark.transports("embedded")
def test_a_faint_module_beside_a_loud_one_keeps_its_digits(
    tc: tn.TrainingClient, he: adapter.HEAdapter
) -> None:
    for name, parameter in engine_of(tc).model.trainable:
        if "v_proj" in name:
            parameter.data.mul_(1e-4)
    x = activations(3)
    assert error(he(x).result()["v_proj"], in_clear(tc, "v_proj", x)) <= BOUND


@pytest.mark.transports("http")
def test_a_server_that_restarts_between_two_calls_is_asked_again(
    tc: tn.TrainingClient, he: adapter.HEAdapter, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = activations(2)
    he(x).result()
    monkeypatch.setattr(serving.service, "draining", True)
    asked = he(x)
    while he._halves._open[he.parts[0].shape].client._sent < 3:  # it was refused, and encrypted anew
        pass
    monkeypatch.setattr(serving.service, "draining", False)
    assert error(asked.result()["q_proj"], in_clear(tc, "q_proj", x)) <= BOUND
