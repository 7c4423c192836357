"""What may be given as a loss, what it may return, and how it is registered from a notebook's cells."""

import functools
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tensafe_nb as tn
from tensafe_nb.config import LossConfig
from tensafe_nb.engine.engine import Engine
from tensafe_nb.losses import Loss, LossOutputs, get_registered_losses, register_loss, resolve_loss
from tensafe_nb.losses import base as contract
from tensafe_nb.losses.base import declared_losses
from tensafe_nb.protocol.losses import ELSEWHERE, FOREIGN, check_loss
from tensafe_nb.protocol.operations import ForwardBackward
from tests.close import assert_close

ROWS, LABELLED = 2, 3
BATCH = {"input_ids": torch.zeros(ROWS, 4), "labels": torch.tensor([0, 1, 2])}


@pytest.fixture(autouse=True)
def _registry_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract._LOSSES, "_entries", dict(contract._LOSSES._entries))


def leaf(*shape: int) -> torch.Tensor:
    return torch.ones(shape, requires_grad=True)


def returning(value: Any) -> Loss:
    def mine(outputs: Any, batch: Any) -> Any:
        return value

    return resolve_loss(mine)


def focal(outputs: LossOutputs, batch: Any, gamma: float = 2.0, **kwargs: Any) -> dict[str, Any]:
    """Cross entropy in which tokens that are already likely count less: -(1 - p)^gamma log p (Lin et al. 2017)."""
    probability = outputs.logprobs.exp()
    loss = -((1 - probability) ** gamma) * outputs.logprobs
    return {"loss": loss.mean(), "metrics": {"sharpness": gamma, "p_mean": probability.mean()}}


# what a loss may be


def test_a_callable_a_name_and_a_dotted_path_give_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("a_projects_losses")
    module.focal = focal  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_projects_losses", module)
    register_loss("focal")(focal)
    for spec in (focal, "focal", "a_projects_losses:focal", resolve_loss(focal)):
        assert resolve_loss(spec, gamma=3).function is focal
        assert resolve_loss(spec, gamma=3).kwargs == {"gamma": 3}


def test_the_built_in_losses_are_registered() -> None:
    assert set(get_registered_losses()) >= {"token_ce", "margin_ranking", "contrastive", "mse", "policy_clip"}


def test_keywords_bound_first_can_be_overridden_when_binding_again_and_at_the_call() -> None:
    seen = []

    def mine(outputs: Any, batch: Any, gamma: float = 1.0, alpha: float = 0.0) -> torch.Tensor:
        seen.append((gamma, alpha))
        return leaf()

    loss = resolve_loss(mine, gamma=2.0, alpha=5.0)
    for call in (
        loss,
        loss.bind(gamma=3.0),
        resolve_loss(loss, gamma=4.0),
        functools.partial(loss, gamma=6.0),
    ):
        call(None, BATCH)
    assert seen == [(2.0, 5.0), (3.0, 5.0), (4.0, 5.0), (6.0, 5.0)]
    assert repr(loss) == "<Loss mine(gamma=2.0, alpha=5.0)>"


@pytest.mark.parametrize("name", ["gama", "gamma_"])
def test_an_unknown_keyword_is_refused_with_the_nearest_spelling_also_by_a_function_that_takes_any(
    name: str,
) -> None:
    with pytest.raises(tn.ValidationError, match=f"no keyword '{name}'. Did you mean 'gamma'"):
        resolve_loss(focal, **{name: 1.0})
    with pytest.raises(tn.ValidationError, match=f"no keyword '{name}'. Did you mean 'gamma'"):
        resolve_loss(focal)(None, BATCH, **{name: 1.0})


def test_outputs_and_batch_are_not_keywords() -> None:
    with pytest.raises(tn.ValidationError, match="no keyword 'batch'"):
        resolve_loss(focal, batch=1)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda outputs: leaf(),
            r"cannot be called as <lambda>\(outputs, batch\): too many positional arguments",
        ),
        (
            torch.nn.CrossEntropyLoss(),
            r"CrossEntropyLoss is a loss of an input and a target.* loss\(outputs\.logits, batch\['labels'\]\)",
        ),
        (
            lambda outputs, batch, *, low: leaf(),
            r"missing a required (keyword-only )?argument: 'low'.*loss_kwargs",
        ),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_with_the_batch(function: Any, message: str) -> None:
    with pytest.raises(tn.ValidationError, match=message):
        resolve_loss(function).check(tn.BatchData([[1, 2]]))


def test_a_loss_that_is_a_partial_an_object_or_a_method_works() -> None:
    class Scaled:
        def __call__(self, outputs: Any, batch: Any, scale: float = 1.0) -> torch.Tensor:
            return scale * leaf()

        def method(self, outputs: Any, batch: Any, scale: float = 1.0) -> torch.Tensor:
            return scale * leaf()

    for function in (functools.partial(Scaled(), scale=1.0), Scaled(), Scaled().method):
        assert resolve_loss(function, scale=2.0)(None, BATCH).total == 2.0 * LABELLED


def test_a_client_runs_a_function_a_name_and_a_path_and_refuses_at_the_call(
    tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    result = tc.forward_backward(batch, focal, {"gamma": 0.5}).result()
    assert result.metrics["sharpness"] == 0.5
    assert result.loss == tc.forward(batch, "tests.unit.losses.test_contract:focal", {"gamma": 0.5}).loss
    with pytest.raises(tn.ValidationError, match="Did you mean 'token_ce'"):
        tc.forward_backward(batch, "token_cee")
    with pytest.raises(tn.ValidationError, match="Did you mean 'gamma'"):
        tc.forward_backward(batch, focal, {"gama": 0.5})


# what a loss may return


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (3.0, r"returned float: return a tensor, or \{"),
        (None, r"returned NoneType: return a tensor"),
        ({"metrics": {}}, r"returned NoneType: return a tensor"),
        (leaf(LABELLED + 1), r"returned shape \(4,\): return a scalar mean, or one value per row \(2,\)"),
        (leaf(ROWS, 1), r"returned shape \(2, 1\)"),
        (leaf().detach(), r"carries no gradient. Was it detached"),
        (
            {"loss": leaf(), "metric": {}},
            r"returned an entry 'metric': .* 'metrics'. Did you mean 'metrics'\?\.$",
        ),
        ({"loss": leaf(), "metrics": 3}, r"returned metrics of type int: return \{name: number\}"),
        ({"loss": leaf(), "metrics": {"p": "high"}}, r"returned the metric 'p' as 'high': expected a number"),
        ({"loss": leaf(), "metrics": {"p": leaf(2)}}, r"returned the metric 'p' as tensor"),
        (
            {"loss": leaf(), "metrics": {"loss": 1.0}},
            r"returned a metric 'loss': every step has a curve of that name",
        ),
        ({"loss": leaf(), "weight": -1.0}, r"returned the weight -1.0: it must be a finite number ≥ 0"),
        ({"loss": leaf(), "weight": float("nan")}, r"returned the weight nan"),
        ({"loss": leaf(), "weight": "2"}, r"returned the weight as '2': expected a number"),
        ({"loss": leaf(ROWS), "weight": 2}, r"returned a weight beside one value per row"),
    ],
)
def test_what_a_loss_may_not_return_is_refused_by_name(returned: Any, message: str) -> None:
    with pytest.raises(tn.ValidationError, match=f"The loss 'mine' (returned|does not).*{message}|{message}"):
        returning(returned)(None, BATCH)


def test_a_scalar_weighs_as_many_labelled_tokens_and_one_value_per_row_as_many_rows() -> None:
    assert returning(leaf())(None, BATCH)[:2] == (LABELLED, LABELLED)
    assert returning({"loss": leaf(), "weight": 5})(None, BATCH)[:2] == (5, 5)
    assert returning(leaf(ROWS))(None, BATCH)[:2] == (ROWS, ROWS)
    register_loss("by rows", per="row")(lambda outputs, batch: leaf())
    assert resolve_loss("by rows")(None, BATCH)[:2] == (ROWS, ROWS)


def test_metrics_may_be_python_numpy_or_torch_numbers() -> None:
    metrics = {
        "a": 1,
        "b": np.float32(0.5),
        "c": torch.tensor([2.0]),
        "d": leaf(),
        "e": True,
        "f": np.int64(3),
    }
    value = returning({"loss": leaf(), "metrics": metrics})(None, BATCH)
    assert value.metrics == {"a": 1, "b": 0.5, "c": 2, "d": 1, "e": 1, "f": 3}
    assert {type(number) for number in value.metrics.values()} == {float}


def test_no_gradient_is_asked_for_where_none_is_computed() -> None:
    with torch.no_grad():
        assert returning(leaf().detach())(None, BATCH).weight == LABELLED


def test_a_loss_that_is_not_finite_stops_at_the_engine(tc: tn.TrainingClient, batch: tn.BatchData) -> None:
    broken = tc.forward_backward(batch, lambda outputs, batch: (outputs.logprobs * float("inf")).mean())
    with pytest.raises(tn.NonFiniteLossError, match=r"'<lambda>' is -inf in rows 0 to 1"):
        broken.result()


def test_a_losss_metrics_reach_the_result_the_events_and_the_history(
    tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    first, second = tc.forward_backward(batch, focal), tc.forward_backward(batch, focal)
    tc.optim_step().result()
    assert first.metrics["p_mean"] == second.metrics["p_mean"] > 0
    assert tc.history["p_mean"].tolist() == pytest.approx([first.metrics["p_mean"]])
    assert tc.history["sharpness"].tolist() == [2.0]


# registering from a notebook's cells

CELL = """
@register_loss("live")
def live(outputs, batch, power={power}):
    return outputs.logprobs.square().mean() * power
"""


@pytest.fixture
def notebook() -> Iterator[dict[str, Any]]:
    """The names of a notebook: IPython runs its cells as the module `__main__`."""
    yield {"__name__": "__main__", "register_loss": register_loss}


def test_a_cell_that_is_edited_and_run_again_replaces_its_loss(notebook: dict[str, Any]) -> None:
    for power in (1, 2):
        exec(CELL.format(power=power), notebook)
        assert resolve_loss("live").function is notebook["live"]
        assert resolve_loss("live").function.__defaults__ == (power,)
    assert get_registered_losses().count("live") == 1


def test_operations_submitted_before_the_edit_keep_the_function_they_were_submitted_with(
    notebook: dict[str, Any], tc: tn.TrainingClient, batch: tn.BatchData
) -> None:
    exec(CELL.format(power=1), notebook)
    before = tc.forward(batch, "live")
    exec(CELL.format(power=2), notebook)
    after = tc.forward(batch, "live")
    assert after.loss == pytest.approx(2 * before.loss)


def test_a_cell_cannot_take_the_name_of_another_function_unless_told_to(notebook: dict[str, Any]) -> None:
    renamed = CELL.replace("def live", "def other").format(power=1)
    exec(CELL.format(power=1), notebook)
    with pytest.raises(tn.ValidationError, match=r"'live' is taken by __main__\.live.*overwrite=True"):
        exec(renamed, notebook)
    with pytest.raises(
        tn.ValidationError, match=r"'token_ce' is taken by tensafe_nb\.losses\.builtin\.token_ce"
    ):
        exec(CELL.replace('"live"', '"token_ce"').format(power=1), notebook)
    exec(renamed.replace('"live"', '"live", overwrite=True'), notebook)
    assert resolve_loss("live").function is notebook["other"]


def test_a_registered_function_keeps_what_it_declares_when_given_itself() -> None:
    @register_loss("paired", group=2, splittable=False, extras=("scores",))
    def paired(outputs: Any, batch: Any) -> torch.Tensor:
        return leaf()

    assert resolve_loss(paired).declares == resolve_loss("paired").declares
    assert resolve_loss(paired).declares.group == 2
    with pytest.raises(tn.ValidationError, match=r"group=0 must be at least 1"):
        register_loss("none", group=0)
    with pytest.raises(tn.ValidationError, match=r"'bound' is a bound method"):
        register_loss("bound")([].append)


# what a loss is asked about


@pytest.mark.parametrize(
    ("name", "batch", "message"),
    [
        ("margin_ranking", tn.BatchData([[1, 2]] * 3), r"groups of 2, one after the other; the batch has 3"),
        ("contrastive", tn.BatchData([[1, 2]]), r"groups of 2.*data\.batches lays out pairs"),
        ("mse", tn.BatchData([[1, 2]]), r"'mse' needs the batch entry 'targets'"),
        (
            "token_ce",
            tn.BatchData([[1, 2]], targets=[1.0]),
            r"'token_ce' does not use the batch entry 'targets'",
        ),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_before_anything_is_computed(
    name: str, batch: tn.BatchData, message: str
) -> None:
    with pytest.raises(tn.ValidationError, match=message):
        resolve_loss(name).check(batch)


@pytest.mark.parametrize(
    ("group", "splittable", "pieces"), [(1, True, 8), (2, True, 4), (4, True, 2), (2, False, 1)]
)
def test_groups_stay_whole_however_small_the_micro_batches(group: int, splittable: bool, pieces: int) -> None:
    seen: list[list[int]] = []

    @register_loss("looking", group=group, splittable=splittable)
    def looking(outputs: Any, batch: Any) -> torch.Tensor:
        seen.append(batch["input_ids"][:, 0].tolist())
        return outputs.logprobs.mean()

    engine = Engine(tn.TrainingConfig(micro_batch_tokens=1, lora_config=tn.LoRAConfig(rank=1)))
    engine.forward_backward(tn.BatchData([[row, 9] for row in range(8)]), resolve_loss("looking"))
    assert len(seen) == pieces
    assert all(len(rows) % group == 0 for rows in seen)
    assert [row for rows in seen for row in rows] == list(range(8))


def test_a_loss_per_row_is_asked_about_rows_without_labels_and_a_loss_per_token_is_not() -> None:
    rows = {"token": 0, "row": 0}

    def counting(outputs: LossOutputs, batch: Any, per: str) -> torch.Tensor:
        rows[per] += len(batch["input_ids"])
        return outputs.embeddings.mean()

    engine = Engine(tn.TrainingConfig(micro_batch_tokens=1, lora_config=tn.LoRAConfig(rank=1)))
    batch = tn.BatchData([[1, 2], [3, 4]], labels=[[2, -100], [-100, -100]])
    for per in ("token", "row"):
        register_loss("counting", per=per, overwrite=True)(counting)
        engine.forward_backward(batch, resolve_loss("counting", per=per))
    assert rows == {"token": 1, "row": 2}


# a whole loss, against plain torch


@pytest.mark.parametrize("tokens", [16_384, 8])
@pytest.mark.parametrize("lora", [None, tn.LoRAConfig(rank=4)], ids=["all weights", "LoRA"])
def test_the_gradient_of_a_focal_loss_is_the_one_plain_torch_computes(lora: Any, tokens: int) -> None:
    engine = Engine(tn.TrainingConfig(lora_config=lora, micro_batch_tokens=tokens))
    for _, parameter in engine.model.trainable:
        torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(1))
    batch = tn.BatchData(
        [[5, 6, 7, 8], [9, 10, 11, 0], [12, 13, 0, 0]], [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]
    )
    result = engine.forward_backward(batch, resolve_loss(focal, gamma=1.5))
    found = [p.grad.clone() / engine.window.divisor for p in engine.parameters]
    engine.discard_gradients()

    logits = engine.model.causal(input_ids=torch.from_numpy(batch.input_ids)).logits.flatten(0, 1)
    labels = torch.from_numpy(batch.labels).flatten()
    cross_entropy = F.cross_entropy(logits, labels, reduction="none")[labels != -100]
    reference = ((1 - (-cross_entropy).exp()) ** 1.5 * cross_entropy).mean()
    expected = torch.autograd.grad(reference, engine.parameters)
    assert_close(result.loss, reference)
    assert_close(found, expected)
    # p = exp(−cross entropy): an error of a logprob of size 10 is one of p, relatively
    assert_close(result.metrics["p_mean"], (-cross_entropy).exp().mean(), within=1e-4)
    assert cross_entropy.mean().item() > result.loss


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("cross_entropy", "Here it is 'token_ce'."),
        ("Cross-Entropy", "Here it is 'token_ce'."),
        ("nll", "Here it is 'token_ce'."),
        ("ppo", "Here it is 'policy_clip'."),
        ("DPO-loss", "Here it is 'dpo'."),
        ("orpo", "@tn.register_loss('orpo', group=2)"),
        ("kl", "loss_kwargs={'kl': {'coef': 0.01, 'estimator': 'k3'}}"),
        ("grpo", "RLVRTrainer(…, algo='grpo')"),
        ("token_cee", "Did you mean 'token_ce'?"),
    ],
)
def test_the_name_that_a_loss_has_elsewhere_leads_to_ours(name: str, advice: str) -> None:
    with pytest.raises(tn.ValidationError, match=re.escape(advice)):
        resolve_loss(name)
    operation = ForwardBackward(tn.BatchData([[1, 2]]), name, {})
    with pytest.raises(tn.ValidationError, match=re.escape(advice)):
        check_loss(operation, LossConfig(), {one.name: one for one in declared_losses()})


def test_every_name_from_elsewhere_leads_to_a_loss_that_there_is() -> None:
    assert set(FOREIGN.values()) <= set(get_registered_losses())
    assert not (set(FOREIGN) | set(ELSEWHERE)) & set(get_registered_losses())
