"""DPO and IPO through the engine: the reference computed or brought along, in parts, private, and what is refused."""

import math

import numpy as np
import pytest

import tensafe_nb as tn
from tensafe_nb.data import batches
from tensafe_nb.engine.engine import Engine
from tensafe_nb.errors import ValidationError
from tensafe_nb.losses import resolve_loss
from tensafe_nb.protocol.losses import OF_PAIRS
from tests.close import assert_close

CONFIG = tn.TrainingConfig(
    model_ref="builtin:tiny",
    lora_config=tn.LoRAConfig(rank=4),
    optimizer=tn.OptimizerConfig(learning_rate=3e-3),
)
PAIRS = [
    {"prompt": "abs(x)\n", "chosen": "Return the absolute value.", "rejected": "No idea."},
    {"prompt": "len(x)\n", "chosen": "Return the number of items.", "rejected": "I do not know it."},
    {"prompt": "ord(c)\n", "chosen": "Return a code.", "rejected": "Who knows?"},
]


@pytest.fixture(scope="module")
def trained():
    """An engine whose adapter has left zero, and a batch of pairs."""
    engine = Engine(CONFIG)
    batch = next(iter(batches(PAIRS, engine.model.tokenizer, batch_size=3, shuffle=False)))
    for _ in range(2):
        engine.forward_backward(batch, resolve_loss("dpo"))
        engine.optim_step()
    return engine, batch


@pytest.mark.parametrize(("name", "at_first"), [("dpo", math.log(2)), ("ipo", 25.0)])
def test_before_the_first_step_model_and_reference_are_one(name, at_first):
    engine = Engine(CONFIG)
    batch = next(iter(batches(PAIRS, engine.model.tokenizer, batch_size=3)))
    result = engine.forward(batch, resolve_loss(name))
    assert result.loss == pytest.approx(at_first, abs=1e-6)
    assert (result.metrics["reward_margin"], result.metrics["accuracy"]) == (0, 0)


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_the_loss_is_its_equation_on_what_the_model_and_its_base_say(trained, name):
    engine, batch = trained
    model = engine.compute_logprobs(batch).logprobs.sum(1)
    reference = engine.compute_logprobs(batch, reference=True).logprobs.sum(1)
    ahead = (model - reference)[0::2] - (model - reference)[1::2]
    tokens = (batch.labels != -100).sum(1)
    mean_ahead = ((model - reference) / tokens)[0::2] - ((model - reference) / tokens)[1::2]
    expected = {"dpo": np.log1p(np.exp(-0.3 * ahead)).mean(), "ipo": ((mean_ahead - 1 / 0.6) ** 2).mean()}
    result = engine.forward(batch, resolve_loss(name, beta=0.3))
    assert result.loss == pytest.approx(expected[name], rel=1e-4)
    assert result.metrics["reward_margin"] == pytest.approx(0.3 * ahead.mean(), rel=1e-4)
    assert result.metrics["accuracy"] == 1


def test_a_stored_reference_gives_the_loss_of_the_computed_one(trained):
    engine, batch = trained
    reference = engine.compute_logprobs(batch, reference=True).logprobs.sum(1)
    rows = [
        {**row, "ref_chosen_logps": float(c), "ref_rejected_logps": float(r)}
        for row, c, r in zip(PAIRS, reference[0::2], reference[1::2], strict=True)
    ]
    stored = next(iter(batches(rows, engine.model.tokenizer, batch_size=3, shuffle=False)))
    loss = resolve_loss("dpo", beta=0.5)
    assert_close(stored.extras["reference_logprobs"], reference)
    assert engine.forward(stored, loss).loss == pytest.approx(engine.forward(batch, loss).loss, abs=1e-5)


def test_parts_of_a_batch_add_up_to_the_whole(trained):
    engine, batch = trained
    whole = engine.forward_backward(batch, resolve_loss("dpo"))
    engine.discard_gradients()
    parts = [
        engine.forward_backward(batch.rows(start, start + 2), resolve_loss("dpo")) for start in (0, 2, 4)
    ]
    assert np.mean([part.loss for part in parts]) == pytest.approx(whole.loss, abs=1e-5)
    assert parts[-1].grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)
    engine.discard_gradients()


def test_smoothing_believes_a_preference_a_little_less_and_robust_corrects_for_it(trained):
    engine, batch = trained

    def loss(**kwargs):
        return engine.forward(batch, resolve_loss("dpo", **kwargs)).loss

    right, smooth, robust = loss(), loss(label_smoothing=0.1), loss(label_smoothing=0.1, robust=True)
    wrong = (smooth - 0.9 * right) / 0.1
    assert robust == pytest.approx((0.9 * right - 0.1 * wrong) / 0.8, rel=1e-4)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([PAIRS[0] | {"ref_chosen_logps": -3.0}], "and not 'ref_rejected_logps'"),
        ([PAIRS[0] | {"ref_chosen_logps": 3.0, "ref_rejected_logps": -1.0}], "0 or below"),
        (
            [PAIRS[0] | {"ref_chosen_logps": -3.0, "ref_rejected_logps": -1.0}, PAIRS[1]],
            "all pairs need them, or none",
        ),
    ],
)
def test_a_stored_reference_that_does_not_fit_is_refused(trained, rows, message):
    with pytest.raises(ValidationError, match=message):
        batches(rows, trained[0].model.tokenizer)


def test_a_row_that_is_cut_has_no_stored_reference(trained):
    row = PAIRS[0] | {"ref_chosen_logps": -3.0, "ref_rejected_logps": -1.0}
    with pytest.raises(ValidationError, match="that of the whole"):
        batches([row], trained[0].model.tokenizer, max_length=6, truncate=True)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"beta": "x"}, "beta='x' must be above 0"),
        ({"beta": 0}, "beta=0 must be above 0"),
        ({"label_smoothing": 0.5}, "at one half a preference says nothing"),
    ],
)
def test_options_without_a_meaning_are_refused(trained, kwargs, message):
    engine, batch = trained
    with pytest.raises(ValidationError, match=message):
        engine.forward(batch, resolve_loss("dpo", **kwargs))


def test_a_model_trained_whole_needs_a_reference_that_one_has_frozen():
    engine = Engine(CONFIG.replace(lora_config=None))
    batch = next(iter(batches(PAIRS, engine.model.tokenizer, batch_size=3)))
    with pytest.raises(ValidationError, match=r"the loss 'dpo': there is no reference.*freeze_reference\(\)"):
        engine.forward_backward(batch, resolve_loss("dpo"))
    engine.freeze_reference()
    assert engine.forward_backward(batch, resolve_loss("dpo")).loss == pytest.approx(math.log(2), abs=1e-6)


def test_fit_learns_a_preference_and_draws_its_accuracy_and_margin(service):
    tc = service.create_training_client(CONFIG.replace(batch_size=3))
    run = tc.fit(
        tc.batches(PAIRS),
        loss_fn="dpo",
        loss_kwargs={"beta": 0.2},
        steps=6,
        eval_batches=tc.batches(PAIRS),
        show=False,
    )
    run.result()
    assert tc.history["accuracy"][[0, -1]].tolist() == [0, 1]
    assert tc.history["reward_margin"][-1] > 1
    assert tc.history["eval/loss"][-1] < 0.3 < tc.history["eval/loss"][0]
    assert tc.history["eval/accuracy"][-1] == 1


def test_rows_that_are_no_pairs_are_refused_by_every_loss_of_pairs(service):
    tc = service.create_training_client(CONFIG)
    rows = tc.batches(["abs(x)", "len(x)"])
    with pytest.raises(
        ValidationError, match=r"'dpo' takes pairs, and the rows of batches are none.*'rejected'"
    ):
        tc.fit(rows, loss_fn="dpo", show=False)
    poisson = tn.DPConfig(noise_multiplier=1.0, dataset_size=2)
    private = service.create_training_client(CONFIG.replace(batch_size=1, dp_config=poisson))
    draws = private.dp_batches(["abs(x)", "len(x)"], unit_ids=["a", "a"])
    with pytest.raises(ValidationError, match="'dpo' takes pairs, and the rows of batches are none"):
        private.fit(draws, loss_fn="dpo", show=False)
    assert private.dp_batches([{"prompt": "2+2=", "chosen": "4", "rejected": "5"}]).group == 2
    paired = {name for name in tn.losses.get_registered_losses() if resolve_loss(name).declares.group == 2}
    assert set(OF_PAIRS) == {
        name for name in paired if resolve_loss(name).function.__module__.startswith("tensafe_nb")
    }


def test_a_private_pair_is_one_unit_and_its_reference_comes_from_itself(service):
    private = service.create_training_client(
        CONFIG.replace(
            batch_size=3,
            dp_config=tn.DPConfig(
                noise_multiplier=1.0, max_grad_norm=1.0, dataset_size=3, sampling="worst_case"
            ),
        )
    )
    for batch in private.batches(PAIRS):
        result = private.forward_backward(batch, "dpo").result()
    assert result.loss == pytest.approx(math.log(2), abs=1e-5)
    step = private.optim_step().result()
    assert step.dp_metrics.noise_applied
    assert step.dp_metrics.grad_norm_after_clip <= 1 + 1e-6


def test_a_loss_of_ones_own_can_ask_for_the_reference(trained):
    engine, batch = trained

    @tn.losses.register_loss("mean_log_ratio", per="row", extras=(), reference=True, overwrite=True)
    def mean_log_ratio(outputs, batch):
        return (outputs.sequence_logprobs - batch["reference_logprobs"]).mean()

    model, base = (engine.compute_logprobs(batch, reference=r).logprobs.sum(1) for r in (False, True))
    assert engine.forward(batch, resolve_loss("mean_log_ratio")).loss == pytest.approx(
        (model - base).mean(), rel=1e-4
    )
