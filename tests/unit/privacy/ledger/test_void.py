"""Accounts that are void, and accounts that are joined, for good."""

import math

import pytest

from tensafe_nb.errors import (
    DPBudgetExceededError,
    ValidationError,
)
from tensafe_nb.privacy.ledger.charges import account_name
from tests.unit.privacy.homes import Home, step
from tests.unit.privacy.ledger.accounts import epsilon_of, records_in


def test_a_void_account_stays_void_and_has_no_budget_any_more(home: Home) -> None:
    ledger = home.ledger()
    ledger.charge(step(1))
    ledger.void("trained on without noise")
    spent = ledger.state()
    assert (spent.total_epsilon, spent.void) == (math.inf, "trained on without noise")
    charged = ledger.charge(step(2), target_epsilon=1.0)
    assert (charged.total_epsilon, charged.epsilon_spent) == (math.inf, 0.0)
    assert ledger.projected_step(step(3), 1.0) is None
    assert home.again().ledger().state().void == "trained on without noise"
    with pytest.raises(ValidationError, match="Say why"):
        ledger.void(" ")


def test_a_step_without_noise_is_infinite_for_good(home: Home) -> None:
    ledger = home.ledger()
    charged = ledger.charge(step(1, noise_multiplier=0.0))
    assert (charged.total_epsilon, charged.epsilon_spent) == (math.inf, math.inf)
    ledger.charge(step(2))
    spent = home.again().ledger().state()
    assert spent.total_epsilon == math.inf and spent.void is not None and "without noise" in spent.void
    assert home.log.entries(operation="dp_charge")[1].dp_metrics is not None
    assert home.log.verify().ok


def test_a_step_without_noise_does_not_fit_into_any_budget(home: Home) -> None:
    with pytest.raises(DPBudgetExceededError):
        home.ledger().charge(step(1, noise_multiplier=0.0), target_epsilon=8.0)
    assert home.ledger().state().total_epsilon == 0.0


def test_accounts_are_joined_for_good_and_in_both_directions(home: Home) -> None:
    one, other, third = (home.ledger(f"dataset:{name}") for name in "abc")
    one.charge(step(1))
    other.charge(step(1))
    assert one.state().total_epsilon == epsilon_of(1)
    one.join("dataset:b")
    one.join("dataset:b")
    third.join("dataset:b")
    assert one.state().joined == ("dataset:b", "dataset:c")
    assert [ledger.state().total_epsilon for ledger in (one, other, third)] == [epsilon_of(2)] * 3
    assert sum(record["kind"] == "dp_join" for record in records_in(home)) == 2
    third.void("gone")
    assert one.state().void == other.state().void == "gone"


def test_accounts_are_named_by_data_set_or_by_client() -> None:
    assert account_name("mails", "tc-1") == "dataset:mails"
    assert account_name(None, "tc-1") == "client:tc-1"
