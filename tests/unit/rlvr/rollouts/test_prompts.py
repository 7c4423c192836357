"""Prompts, dealt to the steps of a run."""

from tensafe_nb.rlvr.rollouts.prompts import PromptCursor


def test_every_prompt_is_dealt_once_before_any_comes_again():
    cursor = PromptCursor([f"p{n}" for n in range(5)], count=3, seed=0)
    dealt = [prompt for _ in range(5) for prompt in cursor.take()]
    epochs = [dealt[start : start + 5] for start in (0, 5, 10)]
    assert all(sorted(epoch) == ["p0", "p1", "p2", "p3", "p4"] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_order_of_prompts_depends_on_the_seed_and_the_position_alone():
    def dealt(seed, position=0):
        cursor = PromptCursor([str(n) for n in range(50)], count=10, seed=seed)
        cursor.position = position
        return cursor.take()

    assert dealt(0) == dealt(0) != dealt(1)
    going_on = PromptCursor([str(n) for n in range(50)], count=10, seed=0)
    going_on.take()
    assert going_on.take() == dealt(0, position=10)


def test_more_prompts_per_step_than_there_are_takes_several_epochs_at_once():
    assert sorted(PromptCursor(["a", "b"], count=5, seed=0).take())[1:4] in (["a", "a", "b"], ["a", "b", "b"])
