"""A group of replicas against one engine: the same numbers, whatever is lost on the way."""

import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import tensafe_nb as tn
from tensafe_nb.cluster.local_places import ThreadPlace
from tensafe_nb.events import Alarm, ReplicasChanged
from tensafe_nb.widgets.feed.feed import Feed, Standing
from tensafe_nb.widgets.still.words import Subject, rows_of
from tests.unit.cluster.groups import CONFIG, Threads

RELATIVE = 1e-6


@pytest.fixture
def made() -> Iterator[Callable[..., tuple[tn.TrainingClient, Threads]]]:
    """Makes training clients on groups."""
    services = []

    def make(engines: int = 2, **changes: Any) -> tuple[tn.TrainingClient, Threads]:
        cluster = Threads(engines)
        services.append(tn.ServiceClient(cluster=cluster))
        return services[-1].create_training_client(**CONFIG | changes), cluster

    yield make
    for service in services:
        service.close()
        assert [
            place for places in service._transport._engines.made for place in places.places if not place.lost
        ] == []


def ragged(rows: int = 7, width: int = 12, seed: int = 0, **extras: Any) -> tn.BatchData:
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 200, (rows, width))
    mask = np.arange(width) < rng.integers(3, width + 1, rows)[:, None]
    return tn.BatchData(ids, mask, **extras)


def trained(tc: tn.TrainingClient, steps: int = 3) -> list[Any]:
    """Take some steps of two batches each; return what each said."""
    told: list[Any] = []
    for number in range(steps):
        for batch in (ragged(seed=number), ragged(rows=3, seed=100 + number)):
            result = tc.forward_backward(batch).result()
            told += [result.loss, result.grad_norm]
        stepped = tc.optim_step().result()
        told += [stepped.grad_norm, stepped.param_delta_norm]
    return told


@pytest.mark.parametrize("engines", [1, 2, 3])
def test_a_group_computes_what_one_engine_computes(
    made: Any, tc_alone: tn.TrainingClient, engines: int
) -> None:
    group, _ = made(engines)
    assert trained(group) == pytest.approx(trained(tc_alone), rel=RELATIVE)
    whole = ragged()
    one, other = (
        group.forward(whole, return_logprobs=True).result(),
        tc_alone.forward(whole, return_logprobs=True).result(),
    )
    assert one.loss == pytest.approx(other.loss, rel=RELATIVE)
    np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=1e-4, atol=1e-5)
    scored, alone = (client.compute_logprobs(whole).result() for client in (group, tc_alone))
    np.testing.assert_allclose(scored.logprobs, alone.logprobs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scored.entropy, alone.entropy, rtol=1e-4, atol=1e-5)
    assert scored.policy_version == alone.policy_version == 3


@pytest.fixture
def tc_alone() -> Iterator[tn.TrainingClient]:
    with tn.ServiceClient() as service:
        yield service.create_training_client(**CONFIG)


@pytest.mark.parametrize(
    ("prompts", "samples"), [(["a", "b", "a", "c", "a"], 3), (["a"], 5), (["a", "a"], 2), (["a", "b"], 1)]
)
@pytest.mark.parametrize("engines", [2, 3])
def test_rows_are_drawn_as_one_engine_draws_them_however_they_are_divided(
    made: Any, tc_alone: tn.TrainingClient, engines: int, prompts: list[str], samples: int
) -> None:
    group, _ = made(engines)
    for _ in range(2):  # without a seed: the group counts its calls itself
        drawn, alone = (
            client.sample(prompts, num_samples=samples, max_new_tokens=6).result().sequences
            for client in (group, tc_alone)
        )
        found, expected = ([(s.prompt_index, s.tokens, s.seed) for s in rows] for rows in (drawn, alone))
        assert found == expected


def test_streamed_texts_are_told_once_also_where_another_replica_draws_them_again(made: Any) -> None:
    group, cluster = made(2)
    group.ready().result()
    cluster.lose_one_at("sample", after=True)
    handle = group.sample(["a", "b", "c"], num_samples=2, max_new_tokens=8, seed=1, stream=True)
    texts = dict.fromkeys(range(6), "")
    for piece in handle.pieces():
        texts[piece.sequence] += piece.text
    assert list(texts.values()) == [sequence.text for sequence in handle.result().sequences]


def drawn(tc: tn.TrainingClient) -> float:
    """Return a number that two draws have in common only if they are equal."""
    sequences = tc.sample(["a", "b"], max_new_tokens=4, seed=3).result().sequences
    return float(int("".join(f"{token:05}" for s in sequences for token in s.tokens)) % 1_000_003)


VERBS: dict[str, Callable[[tn.TrainingClient], Any]] = {
    "contribute": lambda tc: tc.forward_backward(ragged()).result().grad_norm,
    "absorb": lambda tc: tc.forward_backward(ragged()).result().grad_norm,
    "optim_step": lambda tc: tc.optim_step().result().param_delta_norm,
    "evaluate": lambda tc: tc.forward(ragged()).result().loss,
    "compute_logprobs": lambda tc: float(tc.compute_logprobs(ragged()).result().logprobs.sum()),
    "encode": lambda tc: drawn(tc),
    "sample": lambda tc: drawn(tc),
    "freeze_reference": lambda tc: tc.freeze_reference().result().reference_version,
    "capture": lambda tc: tc.save_state(name="kept").result().step,
    "restore": lambda tc: tc.load_state("first").result().step,
}


CASES = [
    *((method, False) for method in VERBS),
    # behind an answer that nobody else gives, it is as between two operations
    *((method, True) for method in VERBS.keys() - {"evaluate", "compute_logprobs", "encode", "capture"}),
]
UNDISTURBED: dict[str, list[Any]] = {}  # by method


def answers(tc: tn.TrainingClient, method: str, lose: Callable[[], None]) -> list[Any]:
    """Return what a verb and the step behind it say of a client that has lost a replica, or none."""
    tc.save_state(name="first")
    tc.forward_backward(ragged(seed=9)).result()
    lose()
    found = [VERBS[method](tc)]
    if method != "optim_step":
        tc.optim_step() if method != "restore" else tc.forward_backward(ragged(seed=8))
    tc.forward_backward(ragged(seed=5))
    return [*found, tc.optim_step().result().param_delta_norm]


@pytest.mark.parametrize(("method", "after"), sorted(CASES))
def test_a_replica_that_is_lost_costs_an_operation_nothing_but_time(
    made: Any, method: str, after: bool
) -> None:
    """In each phase of each verb; the numbers are those of a group that has lost nobody."""
    if method not in UNDISTURBED:
        tc, _ = made(2)
        UNDISTURBED[method] = answers(tc, method, lambda: None)
        assert [event.change for event in tc.history.events(kinds=[ReplicasChanged])] == ["STARTED"]
    tc, cluster = made(2)
    disturbed = answers(tc, method, lambda: cluster.lose_one_at(method, after=after))
    assert [event.change for event in tc.history.events(kinds=[ReplicasChanged])][:2] == ["STARTED", "LOST"]
    assert disturbed == pytest.approx(UNDISTURBED[method], rel=RELATIVE)


def test_a_replica_that_was_lost_is_replaced_by_one_that_knows_all_that_the_others_know(made: Any) -> None:
    tc, cluster = made(2)
    trained(tc, steps=1)
    tc.forward_backward(ragged(seed=7)).result()  # an open window, which the newcomer takes over too
    cluster.living[0].lose()
    seen: list[str] = []
    while "JOINED" not in seen:  # it comes between two operations, as soon as it is there
        tc.forward(ragged()).result()
        seen = [event.change for event in tc.history.events(kinds=[ReplicasChanged])]
    assert seen == ["STARTED", "LOST", "JOINED"]
    survivor = next(place for place in cluster.living)
    survivor.lose()  # the newcomer goes on alone
    alone = tn.ServiceClient()
    other = alone.create_training_client(**CONFIG)
    trained(other, steps=1)
    other.forward_backward(ragged(seed=7))
    assert tc.optim_step().result().param_delta_norm == pytest.approx(
        other.optim_step().result().param_delta_norm, rel=RELATIVE
    )
    alone.close()


@pytest.mark.parametrize("within", [False, True], ids=["between two operations", "within one"])
def test_with_the_last_replica_the_client_fails_and_says_how_to_go_on(made: Any, within: bool) -> None:
    tc, cluster = made(2)
    saved = tc.save_state().result()
    if within:
        cluster.made[0].lose_at("contribute", most=2)
    else:
        for place in cluster.living:
            place.lose()
    with pytest.raises(tn.ClusterError, match=r"All replicas .* service\.restore"):
        tc.forward_backward(ragged()).result()
    assert tc.status is tn.ClientStatus.ERROR
    with pytest.raises(tn.ClusterError):
        tc.optim_step().result()
    with tn.ServiceClient() as other:
        assert other.restore(saved.artifact_id).ready().result().step == 0


def test_the_loss_of_a_replica_is_an_alarm_and_the_state_says_how_many_are_left(made: Any) -> None:
    tc, cluster = made(3)
    tc.ready().result()
    cluster.living[0].lose()
    tc.forward(ragged()).result()
    state = tc.history.state
    assert state.replicas is not None
    assert (state.replicas.replicas, state.replicas.wanted) in {(2, 3), (3, 3)}
    standing = Standing.read(state, None, 0.0)
    assert standing.replicas in {
        "2 of 3 replicas, each computes about 1/2 of a batch · 1 lost, 0 joined",
        "3 of 3 replicas, each computes about 1/3 of a batch · 1 lost, 1 joined",
    }
    feed = Feed(tc)
    said = dict(rows_of(Subject((feed,)), [feed.standing()], steering=False))["replicas"]
    assert re.search(r"of 3 replicas, .*; replica \d", said)
    (alarm,) = tc.history.events(kinds=[Alarm])
    assert alarm.name == "replica_lost"
    assert "replica 1" in alarm.message


def test_an_operation_that_is_cancelled_stops_on_all_replicas_and_its_window_is_dropped(made: Any) -> None:
    tc, cluster = made(2, micro_batch_tokens=16)
    tc.ready().result()
    reached, requested = threading.Event(), threading.Event()

    def watch(place: ThreadPlace, method: str) -> None:
        if method == "contribute":
            reached.set()
            requested.wait()

    cluster.living[0].watch = watch
    handle = tc.forward_backward(ragged(rows=64))
    reached.wait()
    cancelling = threading.Thread(target=handle.cancel)  # it waits until the operation has ended
    cancelling.start()
    while not handle._promise.cancel_requested:
        time.sleep(0.001)
    requested.set()
    cancelling.join()
    with pytest.raises(tn.FutureCancelledError):
        handle.result()
    with pytest.raises(tn.FutureFailedError, match="cancelled"):
        tc.optim_step().result()
    tc.forward_backward(ragged()).result()
    assert tc.optim_step().result().step == 1


def test_a_loss_that_fails_in_one_share_fails_the_operation_and_nothing_has_moved(made: Any) -> None:
    tc, _ = made(2)
    wrong = ragged()
    wrong.input_ids[6, 0] = 10**6
    with pytest.raises(tn.ValidationError, match="10000"):
        tc.forward_backward(wrong).result()
    with pytest.raises(tn.FutureFailedError):
        tc.optim_step().result()
    assert tc.forward_backward(ragged()).result().loss > 0
    assert tc.optim_step().result().step == 1


def test_a_function_of_the_notebook_is_a_loss_on_every_replica(made: Any) -> None:
    def brier(outputs: Any, batch: Any) -> Any:
        return (1 - outputs.logprobs.exp()).square().mean()

    tc, _ = made(2)
    with tn.ServiceClient() as service:
        alone = service.create_training_client(**CONFIG)
        assert tc.forward_backward(ragged(), brier).result().loss == pytest.approx(
            alone.forward_backward(ragged(), brier).result().loss, rel=RELATIVE
        )


def test_dropout_is_drawn_by_share_so_that_who_takes_over_draws_the_same(made: Any) -> None:
    found = []
    for loses in (False, True):
        tc, cluster = made(2, lora_config=tn.LoRAConfig(rank=4, dropout=0.5))
        trained(tc, steps=1)
        if loses:
            cluster.lose_one_at("contribute")
        found.append(tc.forward_backward(ragged()).result().grad_norm)
    assert found[1] == pytest.approx(found[0], rel=RELATIVE)


def test_a_checkpoint_of_a_group_goes_on_in_one_engine_and_back(
    made: Any, tc_alone: tn.TrainingClient
) -> None:
    two, _ = made(2)
    trained(two, steps=2)
    two.sample(["a"], max_new_tokens=2).result()
    two.forward_backward(ragged(seed=3))
    saved = two.save_state().result()
    three, _ = made(3)
    after = []
    for client in (two, three, tc_alone):
        client.load_state(saved.artifact_id)
        drawn = client.sample(["a", "b"], max_new_tokens=4).result().sequences
        after.append([client.optim_step().result().param_delta_norm, *(t for s in drawn for t in s.tokens)])
    assert after[1] == pytest.approx(after[0], rel=RELATIVE)
    assert after[2] == pytest.approx(after[0], rel=RELATIVE)


def test_a_run_and_a_run_with_rewards_work_unmodified(made: Any) -> None:
    tc, cluster = made(2, model_ref="builtin:sums")
    run = tc.fit(
        tc.batches([{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(16)]), steps=3, show=False
    )
    run.result()
    assert tc.step == 3
    trainer = tn.rlvr.RLVRTrainer(
        tc,
        [{"prompt": "1+2=", "answer": "3"}, {"prompt": "2+2=", "answer": "4"}],
        reward="exact_match",
        algo="grpo",
        group_size=4,
        max_new_tokens=3,
    )
    cluster.living[0].lose()
    assert trainer.run(steps=2, show=False).result().state == "FINISHED"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dp_config": {"sampling": "poisson", "dataset_size": 100, "noise_multiplier": 1.0}}, "one process"),
        ({"device": "cuda"}, "gpus=1"),
    ],
)
def test_what_a_group_cannot_train_is_refused_in_the_call(
    made: Any, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(tn.ValidationError, match=says):
        made(2, **changes)


@pytest.mark.parametrize(
    ("cluster", "says"),
    [
        (lambda: tn.ServiceClient(cluster=2), "LocalCluster"),
        (lambda: tn.ServiceClient(cluster=tn.LocalCluster), "LocalCluster"),
        (lambda: tn.ServiceClient("http://127.0.0.1:9", cluster=tn.LocalCluster()), "serve --cluster"),
        (lambda: tn.LocalCluster(engines=0), "engines=0"),
        (lambda: tn.LocalCluster(gpus=-1), "gpus=-1"),
    ],
)
def test_a_cluster_that_is_none_is_refused(cluster: Callable[[], Any], says: str) -> None:
    with pytest.raises(tn.ValidationError, match=says):
        cluster()


def test_a_model_that_cannot_be_loaded_puts_the_client_in_error(made: Any) -> None:
    tc, _ = made(2, model_ref="builtin:none")
    with pytest.raises(tn.ModelLoadError, match="no built-in model"):
        tc.ready().result()
    assert tc.status is tn.ClientStatus.ERROR


def test_the_estimate_of_a_group_is_that_of_a_share(made: Any) -> None:
    tc, _ = made(2)
    found = tc.estimate(batch_size=8, length=16)
    assert (found.batch_size, found.length) == (8, 16)
    assert found.tokens_per_second == pytest.approx(8 * 16 / found.seconds_per_step)
