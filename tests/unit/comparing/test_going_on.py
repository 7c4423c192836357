"""A comparison that ended in the middle goes on, and ends as one that was never stopped."""

import threading
from typing import Any

import pytest
import torch

import tensafe_nb as tn
from tensafe_nb.comparing.records import Kept, KeptLane
from tests.unit.comparing.conftest import scripted


def curves(one: Any) -> list[Any]:
    """Return what each arm measured with each seed, and where."""
    return [(t.arm, t.seed, t.steps.tolist(), t.values.tolist()) for t in one.standings().tracks]


def test_from_their_checkpoints_runs_end_as_if_nothing_had_happened(service: tn.ServiceClient) -> None:
    left = {1e-3: 3, 1e-2: 3}  # calls until something breaks, once

    def arm(
        service: tn.ServiceClient, seed: int, learning_rate: float, resume_from: str | None = None
    ) -> Any:
        def loss(outputs: Any, batch: Any) -> Any:
            left[learning_rate] -= 1
            if left[learning_rate] == 0:
                raise RuntimeError("the disk was full")
            return torch.nn.functional.cross_entropy(outputs.logits, batch["labels"])

        tc = service.create_training_client(
            lora_config={"rank": 1}, optimizer={"learning_rate": learning_rate}, seed=seed
        )
        batches = [tn.BatchData([[3, 4, 5 + n]]) for n in range(4)]
        return tc.fit(batches, loss_fn=loss, checkpoint_every=2, resume_from=resume_from, show=False)

    how: dict[str, Any] = {"seeds": 1, "vary": {"learning_rate": list(left)}, "last": 3, "show": False}
    begun = tn.compare(arm, **how, service=service, name="rates")
    with pytest.raises(tn.ValidationError, match="all 2 runs failed"):
        begun.result()
    on = tn.compare(arm, **how, service=service, resume_from="rates")
    whole = tn.compare(arm, **how, service=service)
    assert str(on.result().differences[0]) == str(whole.result().differences[0])
    assert (on.comparison_id, on.name, on.state) == (begun.comparison_id, "rates", "FINISHED")
    again = tn.load_comparison("rates")
    assert curves(on) == curves(whole) == curves(again) and repr(again.result()) == repr(on.result())
    assert [lane.earlier[0][1] for lane in again.kept.lanes] == [2, 2]
    with pytest.raises(tn.ValidationError, match="rates is complete: load_comparison"):
        tn.compare(arm, **how, service=service, resume_from="rates")


def test_what_had_ended_stays_and_what_saved_nothing_begins_anew(service: tn.ServiceClient) -> None:
    began: list[tuple[int, int]] = []

    def idea(service: tn.ServiceClient, seed: int, gain: int) -> Any:
        began.append((seed, gain))
        if began.count((1, 2)) == 1 and (seed, gain) == (1, 2):
            raise RuntimeError("the disk was full")
        return scripted(service, lambda step: gain * step + seed, 2)

    how: dict[str, Any] = {"seeds": 3, "vary": {"gain": [1, 2]}, "service": service, "show": False}
    first = tn.compare(idea, **how)
    assert first.result().differences[0].by.seeds == 2
    on = tn.compare(idea, **how, resume_from=first.comparison_id).result()
    assert len(began) == 7 and began[-1] == (1, 2)
    assert on.differences[0].by.seeds == 3 and on["gain=2"].value.mean == 2 * 2 + 1


def idea(service: tn.ServiceClient, seed: int, gain: float) -> Any:
    raise AssertionError("nothing is started")


def keep(**changes: Any) -> None:
    """Keep a comparison that was stopped at step 2 of 4."""
    lanes = tuple(KeptLane(f"gain={n}", 0, None, "STOPPED", 2, None, 0) for n in (1, 2))
    told = {"reason": None, "metric": "reward", "window": 1, "higher": True, "planned": 4, "baseline": None}
    arms = {"gain=1": {"gain": 1}, "gain=2": {"gain": 2}}
    given = {"state": "STOPPED", "given_up": {}, "parents": {}, "arms": arms, **told, **changes}
    Kept(comparison_id="cmp-1", name="gains", started_at=0.0, lanes=lanes, **given).write()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"seeds": 2}, "had the arms gain=1, gain=2 and the seeds 0: go on with just these"),
        ({"vary": {"gain": [1, 3]}}, "had the arms gain=1, gain=2"),
        ({"metric": "loss"}, "metric was 'reward' when gains began"),
        ({"last": 2}, "last was 1 when"),
        ({"better": "lower"}, "better was 'higher' when .* A measure chosen after a look"),
        ({"steps": 8}, "steps was None when gains began, and is 8 now"),
        ({"resume_from": "gain"}, "no comparison 'gain'.*Did you mean 'gains'"),
    ],
)
def test_it_goes_on_as_it_began_or_not_at_all(asked: dict[str, Any], words: str) -> None:
    keep()
    how = {"seeds": 1, "vary": {"gain": [1, 2]}, "resume_from": "gains", "show": False, **asked}
    with pytest.raises((tn.ValidationError, tn.RunNotFoundError), match=words):
        tn.compare(idea, **how)


def test_arms_forked_in_mid_race_do_not_come_back(service: tn.ServiceClient) -> None:
    keep(parents={"gain=2": ("gain=1", 1)})
    with pytest.raises(
        tn.ValidationError, match=r"'gain=2' was forked in mid-race.*load_comparison\('cmp-1'\)"
    ):
        tn.compare(idea, seeds=1, vary={"gain": [1, 2]}, resume_from="gains", show=False)


def test_one_whose_process_is_gone_is_told_from_one_under_way(service: tn.ServiceClient) -> None:
    keep(state="RUNNING")
    assert tn.load_comparison("gains").state == "INTERRUPTED"
    opened = threading.Event()

    def held(service: tn.ServiceClient, seed: int, gain: float) -> Any:
        assert opened.wait(60)
        return scripted(service, lambda step: gain + seed, 2)

    how: dict[str, Any] = {"seeds": 1, "vary": {"gain": [1, 2]}, "service": service, "show": False}
    on = tn.compare(held, **how, resume_from="gains")
    assert tn.load_comparison("gains").state == "RUNNING"  # no run has begun
    with pytest.raises(tn.ValidationError, match="gains is still under way"):
        tn.compare(held, **how, resume_from="gains")
    opened.set()
    assert on.result()["gain=2"].value.mean == 2 and tn.load_comparison("gains").state == "FINISHED"
