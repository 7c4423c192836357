"""What careless hands give: refused with a reason, or taken for what it is; never a claim about the wrong thing."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tensafe_nb as tn
from tensafe_nb.errors import PrivacyUnitError, ValidationError
from tensafe_nb.privacy.tickets import ticket
from tensafe_nb.protocol.batch import TICKET
from tests.unit.engine.private import CLIENT, TOKEN_CE, CountingAccount, examples, private_engine

ROWS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(10, 20) for b in (3, 5)]
POISSON = {"sampling": "poisson", "dataset_size": 100, "noise_multiplier": 1.0}


@pytest.fixture
def tc(service: tn.ServiceClient) -> tn.TrainingClient:
    dp = tn.DPConfig(dataset_size=len(ROWS), target_epsilon=None)
    return service.create_training_client(
        model_ref="builtin:sums", lora_config=tn.LoRAConfig(rank=2), batch_size=4, dp_config=dp
    )


@pytest.mark.parametrize(
    "names",
    [[math.nan] * 20, [None] * 20, np.zeros((20, 2)), [1.0] * 20, [True] * 20, [[1]] * 20, "x" * 20, 5],
    ids=lambda names: str(names)[:12],
)
def test_owners_are_named_by_whole_numbers_or_texts(tc: tn.TrainingClient, names: Any) -> None:
    with pytest.raises(ValidationError, match="unit_ids"):
        tc.dp_batches(ROWS, unit_ids=names, steps=1)


@pytest.mark.parametrize("names", [np.arange(20), [f"owner {n}" for n in range(20)]])
def test_owners_may_be_an_array_or_texts(tc: tn.TrainingClient, names: Any) -> None:
    assert "20 units" in repr(tc.dp_batches(ROWS, unit_ids=names, steps=1))


@pytest.mark.parametrize("name", ["example_ids", "unit_ids"])
@pytest.mark.parametrize(
    "ids", [[math.nan, 1], [1.0, 2.0], [True, False], [[1, 2], [3, 4]]], ids=lambda ids: str(ids)
)
def test_an_id_that_may_read_otherwise_in_another_batch_is_refused(name: str, ids: Any) -> None:
    batch = examples((4, 5), **{name: np.asarray(ids)})
    with pytest.raises(PrivacyUnitError, match=f"{name} must be"):
        private_engine().forward_backward(batch, TOKEN_CE)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda mark: mark[:, 0],
        lambda mark: mark[:, :5],
        lambda mark: mark[:, :0],
        lambda mark: mark[:, :, None],
        lambda mark: mark + 0.5,
        lambda mark: mark.astype(str),
    ],
)
def test_a_ticket_of_another_form_is_refused_and_the_draw_may_come_again(spoil: Callable[[Any], Any]) -> None:
    engine = private_engine(dp=POISSON)
    mark = ticket(CLIENT, 7, 0, np.arange(2))
    with pytest.raises(PrivacyUnitError, match="is not a draw's"):
        engine.forward_backward(examples((4, 5), **{TICKET: spoil(mark)}), TOKEN_CE)
    engine.forward_backward(examples((4, 5), **{TICKET: mark}), TOKEN_CE)
    assert engine.optim_step().step == 1


@pytest.mark.parametrize("mark", [[[1, 2, 3]], np.zeros((0, 6), int)])
def test_nothing_needs_a_whole_ticket(mark: Any) -> None:
    with pytest.raises(PrivacyUnitError, match="is not a draw's"):
        private_engine(dp=POISSON).forward_backward(tn.BatchData((), extras={TICKET: mark}), TOKEN_CE)
    with pytest.raises(ValidationError, match=TICKET):
        tn.BatchData((), extras={TICKET: "x"})


def test_owners_written_onto_a_draw_of_examples_make_no_claim_about_users() -> None:
    engine = private_engine(dp=POISSON)
    drawn = examples((4, 5), unit_ids=np.zeros(2, int), **{TICKET: ticket(CLIENT, 7, 0, np.arange(2))})
    with pytest.raises(PrivacyUnitError, match="made by other units"):
        engine.forward_backward(drawn, TOKEN_CE)


def test_an_empty_draw_of_users_is_charged_as_one_of_users() -> None:
    account = CountingAccount()
    engine = private_engine(account, dp=POISSON)
    for number, unit in enumerate(("user", "example")):
        mark = ticket(CLIENT, 7, number, np.array([], int), unit)
        engine.forward_backward(tn.BatchData.nothing(mark), TOKEN_CE), engine.optim_step()
    assert [charge[2] for charge in account.charges] == ["user", "example"]


def test_an_empty_draw_is_no_batch_to_evaluate(tc: tn.TrainingClient) -> None:
    nothing = tn.BatchData.nothing(ticket(tc.training_client_id, 7, 0, np.array([], int)))
    for call in (tc.forward, tc.compute_logprobs):
        with pytest.raises(ValidationError, match="drew nothing"):
            call(nothing).result()  # type: ignore[operator]


@pytest.mark.parametrize(
    "plan",
    [
        {"expected_batch_size": 0},
        {"expected_batch_size": 2.5},
        {"dataset_size": 0},
        {"dataset_size": True},
        {"target_epsilon": "2"},
        {"noise_multiplier": "2"},
        {"epochs": "2"},
        {"epochs": math.nan},
    ],
    ids=str,
)
def test_a_plan_that_is_none_is_refused(tc: tn.TrainingClient, plan: Any) -> None:
    with pytest.raises(ValidationError):
        tc.what_if(**plan)


@pytest.mark.parametrize("sizes", [{"canaries": 500.5}, {"canaries": "x"}, {"steps": True}], ids=str)
def test_an_audit_counts_in_whole_numbers(tc: tn.TrainingClient, sizes: Any) -> None:
    with pytest.raises(ValidationError, match="whole number"):
        tc.privacy_audit(**sizes)
