"""What the panel's buttons call, without a panel: cancel what waits, fork with a word to both sides, alarms."""

import tensafe_nb as tn
from tensafe_nb.events import Alarm, Forked, MockTookPart
from tensafe_nb.losses import register_loss
from tensafe_nb.protocol.results import FutureStatus
from tensafe_nb.rlvr import REINFORCE, MockRolloutSampler
from tests.parity.serving import Gate, eventually


def test_what_waits_is_cancelled_and_the_client_stays_usable(
    tc: tn.TrainingClient, batch: tn.BatchData, gate: Gate
) -> None:
    running = tc.forward_backward(batch, loss_fn=gate.name)
    gate.reached.wait()
    eventually(lambda: running.state is FutureStatus.RUNNING)
    handles = [tc.forward_backward(batch) for _ in range(30)]
    assert tc.cancel_pending() == 30
    assert {handle.state for handle in handles} == {FutureStatus.CANCELLED}
    assert tc.cancel_pending() == 0
    gate.opened.set()
    assert tc.forward(batch).result().loss > 0


def test_a_fork_is_told_on_both_sides(tc: tn.TrainingClient, batch: tn.BatchData) -> None:
    tc.forward_backward(batch)
    tc.optim_step()
    child = tc.fork()
    child.forward(batch).result()
    told = [list(client.history.events(kinds=[Forked])) for client in (tc, child)]
    assert [[(e.parent, e.child, e.step) for e in events if isinstance(e, Forked)] for events in told] == [
        [(tc.training_client_id, child.training_client_id, 1)]
    ] * 2


def test_a_step_tells_how_many_tokens_it_was_made_of(tc: tn.TrainingClient, batch: tn.BatchData) -> None:
    results = [tc.forward_backward(batch), tc.forward_backward(batch)]
    tc.optim_step().result()
    assert tc.history["tokens"].tolist() == [sum(result.tokens_processed for result in results)]
    assert len(tc.history.moments()) == 1
    steps, seconds = tc.history.clock()
    assert steps.tolist() == [1] and seconds.tolist() == [0.0]


def test_a_run_that_moves_no_weight_raises_an_alarm(service: tn.ServiceClient, batch: tn.BatchData) -> None:
    @register_loss("that_says_nothing", overwrite=True)
    def that_says_nothing(outputs, batch):
        return outputs.logprobs.sum() * 0.0

    tc = service.create_training_client(
        optimizer={"learning_rate": 1e-3, "weight_decay": 0.0}, loss={"type": "that_says_nothing"}
    )
    tc.fit([batch], steps=4, show=False).result()
    alarms = [event for event in tc.history.events(kinds=[Alarm]) if isinstance(event, Alarm)]
    assert [(alarm.name, alarm.level) for alarm in alarms] == [("no_learning", "red")]


def test_training_on_made_up_rollouts_leaves_a_mark_in_the_history(service: tn.ServiceClient) -> None:
    tc = service.create_training_client(model_ref="builtin:sums")
    batch = MockRolloutSampler(group_size=2).generate_trajectories(["12+34=", "40+02="])
    for number, trajectory in enumerate(batch):
        trajectory.response, trajectory.reward = str(number), float(number % 2)
    REINFORCE().update(batch, tc).result()
    assert len(list(tc.history.events(kinds=[MockTookPart]))) == 1
