"""The privacy statement says everything it has to, in Markdown and in JSON, and nothing that is not so."""

import json
import math

from tensafe_nb.config import DPConfig
from tensafe_nb.privacy import accounting
from tensafe_nb.privacy.ledger.statement import PrivacyStatement
from tests.unit.privacy.homes import ACCOUNT, DELTA, Home, step, turn

CONFIG = DPConfig(dataset_size=1_000, expected_batch_size=10)


def test_it_says_what_was_charged_and_what_that_means(home: Home) -> None:
    ledger = home.ledger()
    for number in range(1, 11):
        ledger.charge(step(number))
    statement = PrivacyStatement.of(ledger, CONFIG)
    text = statement.to_markdown()
    history = [(1.0, 0.01, 10)]
    assert statement.epsilon == statement.epsilon_rdp == accounting.epsilon_rdp(1.0, 0.01, 10, DELTA)
    assert statement.epsilon_prv == accounting.epsilon_prv(history, DELTA)
    assert statement.epsilon_gaussian is None
    replaced = accounting.epsilon_of_account(history, 0.0, DELTA, "rdp", "replace_one").value
    assert statement.epsilon_replace_one == replaced > statement.epsilon
    head = ledger.state().head
    assert head is not None
    for said in (
        "one example",
        "one example more than the other",
        "replaced by another",
        "poisson",
        "toolkit sampler",
        "1000 | 10 | 0.01 | 1 | 0.5",
        f"{statement.epsilon:.4g} at δ = 1e-05",
        "by RDP",
        f"{statement.epsilon_prv:.4g}",
        f"{replaced:.4g}",
        "opacus ",
        "chacha20/1",
        "the training client tc-1 and everything forked from it",
        head["record_hash"],
        "operator's view",
        "Other runs",
        "Stopping early",
        "Hyperparameter search",
        "server",
        "Floating-point",
    ):
        assert said in text, said
    assert "Void" not in text


def test_it_uses_no_adjective_beside_an_epsilon(home: Home) -> None:
    ledger = home.ledger("dataset:mails")
    ledger.charge(step(1))
    text = PrivacyStatement.of(ledger, CONFIG).to_markdown().lower()
    for word in ("strong", "weak", "good", "safe", "secure", "excellent", "moderate", "proven", "meaningful"):
        assert word not in text.split(), word
    assert "dataset_id 'mails'" in text


def test_json_and_markdown_come_from_one_object(home: Home) -> None:
    ledger = home.ledger()
    ledger.charge(step(1))
    ledger.charge(turn(2, "a"))
    statement = PrivacyStatement.of(ledger, CONFIG)
    plain = json.loads(json.dumps(statement.to_dict(), allow_nan=False))
    assert plain["epsilon"] == statement.epsilon
    assert plain["ledger_head"] == dict(ledger.state().head or {})
    assert [one["mode"] for one in plain["mechanisms"]] == ["poisson", "worst_case"]
    assert plain["account"] == ACCOUNT and plain["outside"]
    assert statement._repr_markdown_() == str(statement) == statement.to_markdown()


def test_worst_case_steps_are_stated_by_the_exact_formula(home: Home) -> None:
    ledger = home.ledger()
    ledger.charge(turn(1, "a"))
    statement = PrivacyStatement.of(ledger, CONFIG.replace(sampling="worst_case"))
    assert statement.epsilon == statement.epsilon_gaussian == accounting.epsilon_gaussian(1.0, DELTA)
    assert statement.epsilon_replace_one == accounting.epsilon_gaussian(2.0, DELTA)
    assert (statement.epsilon_rdp, statement.epsilon_prv) == (None, None)
    assert "gradients of one example are zero" in statement.to_markdown()
    assert "by the exact Gaussian formula" in statement.to_markdown()


def test_every_event_that_made_it_void_is_listed(home: Home) -> None:
    ledger = home.ledger()
    ledger.charge(step(1, noise_multiplier=0.0))
    ledger.void("a step without noise,\nasked for | by the user")
    ledger.join("dataset:b")
    statement = PrivacyStatement.of(ledger, CONFIG)
    text = statement.to_markdown()
    assert (statement.epsilon, statement.epsilon_rdp, statement.epsilon_replace_one) == (None, None, None)
    assert len(statement.void) == 2
    assert "there is no guarantee" in text and "(sigma = 0)" in text
    assert "a step without noise, asked for \\| by the user" in text
    assert "joined to it for good: dataset:b" in text
    json.dumps(statement.to_dict(), allow_nan=False)


def test_a_claim_that_was_not_lowered_says_so(home: Home) -> None:
    by_rdp = home.ledger()
    for number in range(1, 21):
        by_rdp.charge(step(number))
    statement = PrivacyStatement.of(home.ledger(accountant_type="prv"), CONFIG)
    assert statement.epsilon == by_rdp.state().total_epsilon
    assert "not below what was claimed before" in statement.to_markdown()


def test_an_untouched_account_has_spent_nothing(home: Home) -> None:
    statement = PrivacyStatement.of(home.ledger(), CONFIG)
    assert (statement.epsilon, statement.steps, statement.opened_at, statement.ledger_head) == (
        0.0,
        0,
        None,
        None,
    )
    assert "ε = 0" in statement.to_markdown()


def test_a_broken_ledger_is_stated_as_void(home: Home) -> None:
    home.ledger().charge(step(1))
    path = home.log.path
    path.write_bytes(path.read_bytes().replace(b'"q":0.01', b'"q":0.001'))
    ledger = home.again().ledger()
    assert ledger.state().total_epsilon == math.inf
    statement = PrivacyStatement.of(ledger, CONFIG)
    assert statement.epsilon is None
    assert "audit log" in statement.to_markdown()
