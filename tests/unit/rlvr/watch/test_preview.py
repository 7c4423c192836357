"""A reward, looked at before it trains anything."""

from tensafe_nb.config import SamplingConfig
from tensafe_nb.rlvr import MockRolloutSampler, TrajectoryBatch, resolve_reward
from tensafe_nb.rlvr.rewards.reward import Part
from tensafe_nb.rlvr.rollouts.trajectories import RolloutGroup
from tensafe_nb.rlvr.watch.preview import preview_reward
from tests.unit.rlvr.functions import batch_of, length, make_awkward, rollouts


def test_a_preview_shows_the_spread_the_best_the_worst_and_the_errors():
    batch = batch_of(["a", "bb", "raise"], ["cccc", "cccc", "<b>"])
    preview = preview_reward(make_awkward(), batch)
    assert preview.counts == (1, 1, 1, 2)
    assert preview.edges == (1.0, 2.0, 3.0, 4.0)
    assert [t.response for t in preview.best] == ["cccc", "<b>", "bb"], "equal texts once"
    assert [t.response for t in preview.worst] == ["a", "bb", "<b>"]
    assert preview.errors == {"KeyError: 'missing' (line 4 of awkward: return {}[\"missing\"])": 1}
    assert preview.groups_with_signal == 1.0
    assert preview.rollouts.mean_reward == 2.8
    assert all(t.reward is None for t in batch)
    assert "5 scored, 0 abstained, 1 errors" in repr(preview)
    assert "████" in repr(preview)
    html = preview._repr_html_()
    assert "&lt;b&gt;" in html
    assert "<b>" not in html


def test_a_preview_names_rollouts_that_are_rewarded_but_miss_the_true_aim():
    parts = [Part("keyword_contains", 1.0), Part("exact_match", 0.0, true=True)]
    reward = resolve_reward("composite", parts=parts)
    group = RolloutGroup("p", "q", rollouts("7", "7 or 8", "8", "9", answer="7", keywords=["7"]))
    preview = preview_reward(reward, TrajectoryBatch([group], SamplingConfig()))
    assert [t.response for t in preview.suspects] == ["7 or 8"]
    assert "suspect: 1  'q' → '7 or 8'" in repr(preview)


def test_a_preview_of_what_scores_nothing_still_shows_why():
    preview = preview_reward(
        lambda prompt, response: 1 / 0, MockRolloutSampler().generate_trajectories(["q"])
    )
    assert preview.counts == ()
    assert "ZeroDivisionError" in repr(preview)
    assert "ZeroDivisionError" in preview._repr_html_()


def test_many_different_rewards_fall_into_ten_bins():
    preview = preview_reward(length, batch_of(["x" * n for n in range(40)]), timeout=None)
    assert len(preview.counts) == 10
    assert sum(preview.counts) == 40
