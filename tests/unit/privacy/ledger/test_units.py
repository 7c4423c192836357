"""One kind of privacy unit per account: examples, people and prompt groups never add up to one epsilon."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensafe_nb as tn
from tensafe_nb.errors import PrivacyUnitError
from tests.unit.engine.private import TOKEN_CE, CountingAccount, examples, private_engine
from tests.unit.privacy.homes import Home, step, turn

UNITS = ["example", "user", "prompt group"]


@pytest.mark.parametrize("mode", [step, turn])
@pytest.mark.parametrize(("first", "second"), [(a, b) for a in UNITS for b in UNITS if a != b])
def test_a_second_kind_of_unit_is_refused_and_nothing_is_charged(
    home: Home, mode: Any, first: str, second: str
) -> None:
    ledger = home.ledger()
    ledger.charge(mode(1, unit=first))
    with pytest.raises(PrivacyUnitError, match="one epsilon cannot be true of both"):
        home.again().ledger().charge(mode(2, unit=second))
    assert ledger.state().steps == 1
    ledger.charge(mode(2, unit=first))


def test_a_void_account_promises_nothing_to_anybody_and_takes_both(home: Home) -> None:
    ledger = home.ledger()
    ledger.charge(step(1, unit="user"))
    ledger.void("given up")
    ledger.charge(step(2, unit="example"))
    assert ledger.state().steps == 2


def test_loading_a_state_that_was_trained_for_another_unit_is_refused_and_joins_nothing(
    home: Home, tmp_path: Path
) -> None:
    people, rows = home.ledger("dataset:people"), home.ledger("dataset:rows")
    people.charge(step(1, unit="user")), rows.charge(step(1))
    carried = json.loads(json.dumps(people.carried()))
    for ledger in (rows, Home(tmp_path / "there").ledger("dataset:rows")):
        if ledger is not rows:
            ledger.charge(step(1))
        with pytest.raises(PrivacyUnitError, match="one epsilon cannot be true of both"):
            ledger.adopt(carried, carried["head"])
        assert ledger.state().joined == () and ledger.state().void is None
    fresh = Home(tmp_path / "fresh").ledger("dataset:rows")
    fresh.adopt(carried, carried["head"])
    assert fresh.state().steps == 1


def test_an_account_in_which_version_0_1_mixed_units_is_void_and_says_why(home: Home) -> None:
    ledger = home.ledger()
    ledger.charge(step(1, unit="user"))
    record = home.log.entries(operation="dp_charge")[0]
    assert record is not None
    entry = dict(next(r.dp for r in home.tenant.records() if r.record_hash == record.record_hash))
    home.tenant.append(entry | {"unit": "example"}, training_client_id="tc-1")
    found = home.again().ledger().state()
    assert found.void is not None and "example, user" in found.void
    assert found.total_epsilon == np.inf


def test_within_one_step_people_and_examples_do_not_mix_either() -> None:
    engine = private_engine(CountingAccount())
    engine.forward_backward(examples((4, 5), unit_ids=np.array([0, 0])), TOKEN_CE)
    with pytest.raises(PrivacyUnitError, match="privacy unit is one user, and these rows' is one example"):
        engine.forward_backward(examples((4, 5)), TOKEN_CE)
    engine.forward_backward(examples((4, 5)), TOKEN_CE)  # the step was dropped: another may begin
    assert engine.optim_step().step == 1


def test_a_client_is_told_where_it_trains(service: tn.ServiceClient) -> None:
    tc = service.create_training_client(
        model_ref="builtin:sums",
        lora_config=tn.LoRAConfig(rank=2),
        batch_size=2,
        dp_config=tn.DPConfig(dataset_size=4),
    )
    rows = [{"prompt": f"{a}+3=", "completion": str(a + 3)} for a in range(10, 18)]
    (people,) = tc.dp_batches(rows, steps=1, unit_ids=[n % 4 for n in range(8)])
    tc.forward_backward(people), tc.optim_step().result()
    (single,) = tc.dp_batches(rows, steps=1)
    tc.forward_backward(single)
    with pytest.raises(PrivacyUnitError, match="void_privacy"):
        tc.optim_step().result()
    assert tc.privacy_statement().unit == "user" and tc.privacy_statement().steps == 1
