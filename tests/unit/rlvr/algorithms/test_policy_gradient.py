"""REINFORCE: its options, the batch it builds, and what it queues; the engine is not needed for any of it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tensafe_nb.config import SamplingConfig
from tensafe_nb.errors import FutureFailedError, QueueFullError, ValidationError
from tensafe_nb.futures import Promise, combine, completed
from tensafe_nb.protocol.codec import decode, encode
from tensafe_nb.protocol.results import ForwardBackwardResult, LogprobsResult, OptimStepResult
from tensafe_nb.rlvr import (
    REINFORCE,
    MockRolloutSampler,
    REINFORCEConfig,
    RolloutGroup,
    Trajectory,
    TrajectoryBatch,
    UpdateResult,
)
from tensafe_nb.rlvr.algorithms.packing import pack, unpack

METRICS = {"tokens": 4.0, "entropy_sum": 2.0, "logprob_sum": -8.0, "approx_kl_sum": 0.0}


class CharacterTokenizer:
    eos_token_id = 1

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": ([2] if add_special_tokens else []) + [ord(letter) for letter in text]}


class RecordingClient:
    """Takes every operation and says what a core would."""

    training_client_id = "tc-test"
    capabilities = frozenset({"base_reference"})
    step = 7
    policy_version = 9
    tokenizer = CharacterTokenizer()

    def __init__(self):
        self.operations = []

    def forward_backward(self, batch, loss_fn, loss_kwargs):
        self.operations.append(("forward_backward", batch, loss_fn, loss_kwargs))
        return self.done(ForwardBackwardResult(-0.5, 1.5, 4, METRICS))

    def optim_step(self):
        self.operations.append(("optim_step",))
        return self.done(OptimStepResult(8, 1e-3, 1.25, 10, 0.125))

    def compute_logprobs(self, batch, reference=False, *, temperature=1.0):
        self.operations.append(("compute_logprobs", batch))
        return self.done(LogprobsResult(np.zeros(batch.shape), np.zeros(batch.shape), 10))

    def publish(self, event):
        self.operations.append(("publish", event))
        return event

    def done(self, result):
        return completed(result, operation="test", training_client_id=self.training_client_id)


def policy_batch(batch, config):
    """Return what an update sends."""
    client = RecordingClient()
    REINFORCE(config).update(batch, client)
    return next(operation[1] for operation in client.operations if operation[0] == "forward_backward")


def trajectory(reward, tokens=(5, 1), **fields):
    """A rollout of the client's present policy, with what its sampler knew."""
    known = {"policy_version": 9, "logprobs": [0.0] * len(tokens), "entropy": 0.75} | fields
    return Trajectory("p", "r", prompt_tokens=[3, 4], tokens=list(tokens), reward=reward, **known)


def batch_of(*groups, max_new_tokens=4, **sampling):
    made = [
        RolloutGroup(f"g{number}", "p", [r if isinstance(r, Trajectory) else trajectory(r) for r in rollouts])
        for number, rollouts in enumerate(groups)
    ]
    return TrajectoryBatch(made, SamplingConfig(max_new_tokens=max_new_tokens, **sampling))


def update(batch, client=None, **options):
    return REINFORCE(**options).update(batch, client or RecordingClient()).result()


def advantages_of(batch):
    return [trajectory.advantage for trajectory in batch]


def test_the_guides_options_mean_baseline_and_scale():
    assert REINFORCEConfig(use_baseline=False).effective_baseline(8) == "none"
    assert REINFORCEConfig(use_baseline=True).effective_baseline(2) == "rloo"
    assert REINFORCEConfig(use_baseline=True).effective_baseline(1) == "ema"
    assert REINFORCEConfig(baseline="group").effective_baseline(8) == "group"
    assert REINFORCEConfig().effective_scale == "none"
    assert REINFORCEConfig(scale="group").effective_scale == "group"
    assert REINFORCEConfig(normalize_advantages=True).effective_scale == "batch"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_baseline": False, "baseline": "rloo"}, "contradicts"),
        ({"normalize_advantages": True, "scale": "group"}, "scale='batch'"),
        ({"entropy_coeff": 0.1}, "Did you mean 'entropy_coef'"),
        ({"entropy_coef": -0.1}, "greater than or equal to 0"),
        ({"baseline": "value"}, "baseline"),
    ],
)
def test_options_that_contradict_each_other_or_do_not_exist_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        REINFORCEConfig(**options)


def test_fields_given_by_name_go_on_top_of_a_config():
    algo = REINFORCE(REINFORCEConfig(baseline="group"), entropy_coef=0.5)
    assert (algo.config.baseline, algo.config.entropy_coef) == ("group", 0.5)
    assert "baseline='group'" in repr(algo)


def test_an_update_queues_one_gradient_and_one_step_and_returns_their_results_as_one():
    client, batch = RecordingClient(), batch_of([1, 0], [1, 1], temperature=0.5)
    handle = REINFORCE(entropy_coef=0.25).update(batch, client)
    names = [operation for operation, *_ in client.operations]
    assert names == [
        "forward_backward",
        "optim_step",
        "compute_logprobs",
    ]  # the last measures how far it moved
    assert client.operations[0][2:] == ("policy_reinforce", {"temperature": 0.5, "entropy_coef": 0.25})
    result = handle.result()
    assert result == UpdateResult(
        step=8,
        policy_version=10,
        mean_reward=0.75,
        policy_loss=-0.5,
        entropy=0.75,
        grad_norm=1.25,
        param_delta_norm=0.125,
        tokens=4,
        epochs_run=1,
        metrics={
            "policy/epochs_run": 1.0,
            "entropy_trained": 0.5,
            "completions/masked_ratio": 0.0,
            "staleness/mean": 0.0,
            "staleness/max": 0.0,
        },
    )
    assert handle.approx_kl == 0.0  # lent, as in the guide
    assert decode(encode(result)) == result


def test_the_update_fills_in_every_trajectorys_advantage():
    batch = batch_of([1, 0], [0.5, None])
    update(batch)
    assert advantages_of(batch) == [1, -1, 0, 0]


def test_without_two_rollouts_per_prompt_the_baseline_is_a_running_mean():
    algo, client = REINFORCE(), RecordingClient()
    first, second = batch_of([1], [0]), batch_of([1], [1])
    algo.update(first, client)
    algo.update(second, client)
    assert advantages_of(first) == [1, -1]
    assert advantages_of(second) == [0.5, 0.5]


def test_rows_that_teach_nothing_are_left_out_but_stay_in_the_denominators():
    batch = batch_of([1, 0], [1, 1])
    update(batch)
    data = policy_batch(batch, REINFORCEConfig())
    assert len(data) == 2
    assert data.extras["weights"].max() == 1 / (4 * 4)  # four rollouts of at most four tokens
    with_entropy = policy_batch(batch, REINFORCEConfig(entropy_coef=0.1))
    assert len(with_entropy) == 4
    assert np.array_equal(with_entropy.extras["weights"][:2], data.extras["weights"])


def test_truncated_rollouts_are_masked_but_count_in_the_baseline():
    batch = batch_of([trajectory(1), trajectory(0, tokens=(5, 6, 7), finish_reason="length")])
    update(batch)
    assert advantages_of(batch) == [1, -1]
    masked = policy_batch(batch, REINFORCEConfig(aggregation="token_mean"))
    assert len(masked) == 1
    assert masked.extras["weights"].sum() == pytest.approx(1)  # Σm is taken after masking
    assert len(policy_batch(batch, REINFORCEConfig(mask_truncated=False))) == 2


def test_a_row_holds_prompt_and_completion_with_labels_already_shifted():
    rollout = trajectory(1, tokens=(5, 6, 1), advantage=2.0)
    weights, values = np.array([[0.5] * 3, [0.25, 0, 0]]), np.array([[1.0, 2, 3], [4, 0, 0]])
    rows = [rollout, trajectory(0, tokens=(1,), advantage=-1.0)]
    data = pack(rows, {"weights": weights, "advantages": values})
    assert data.input_ids.tolist() == [[3, 4, 5, 6], [3, 4, 0, 0]]
    assert data.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert data.labels.tolist() == [[-100, 5, 6, 1], [-100, 1, -100, -100]]
    assert data.extras["advantages"].tolist() == [[0, 1, 2, 3], [0, 4, 0, 0]]
    assert unpack(rows, data.extras["advantages"], 3).tolist() == values.tolist()
    assert data.extras["weights"].tolist() == [[0, 0.5, 0.5, 0.5], [0, 0.25, 0, 0]]


@pytest.mark.parametrize("baseline", ["rloo", "group"])
def test_without_signal_nothing_is_queued_and_the_result_says_so(baseline):
    client = RecordingClient()
    handle = REINFORCE(baseline=baseline).update(batch_of([1, 1], [0, 0]), client)
    assert handle.done()
    assert client.operations == []
    assert (handle.skipped, handle.step, handle.policy_version) == ("no signal", 7, 9)
    assert handle.result().mean_reward == 0.5


def test_when_all_that_would_teach_is_truncated_nothing_is_queued_either():
    cut = {"finish_reason": "length"}
    client = RecordingClient()
    with pytest.warns(UserWarning, match="max_new_tokens=4"):
        result = update(batch_of([trajectory(1, **cut), trajectory(0, **cut)]), client, entropy_coef=0.1)
    assert (result.skipped, client.operations) == ("all truncated", [])


def test_an_entropy_bonus_is_a_reason_to_step_without_any_signal():
    client = RecordingClient()
    update(batch_of([1, 1]), client, entropy_coef=0.1)
    assert [name for name, *_ in client.operations] == ["forward_backward", "optim_step", "compute_logprobs"]


def test_a_batch_without_rewards_is_refused_with_the_line_that_is_missing():
    with pytest.raises(ValidationError, match=r"traj\.reward = reward_fn"):
        update(batch_of([None, None]))


def test_rewards_of_a_reward_model_are_read_as_numbers_and_anything_else_is_named():
    batch = batch_of([np.array([1.0]), np.float32(0)])
    update(batch)
    assert [rollout.reward for rollout in batch] == [1.0, 0.0] and type(batch[0].reward) is float
    for wrong in ("1", np.zeros(2)):
        with pytest.raises(ValidationError, match=r"The reward of rollout 1 is .*: one number is expected"):
            update(batch_of([0, wrong]))
    with pytest.raises(ValidationError, match="training_client=None must be a training client"):
        REINFORCE().update(batch_of([1, 0]), None)


def test_greedy_rollouts_are_refused():
    with pytest.raises(ValidationError, match="temperature=1"):
        update(batch_of([1, 0], temperature=0))


@pytest.mark.parametrize("options", [{"baseline": "rloo"}, {"baseline": "group"}, {"scale": "group"}])
def test_comparing_a_rollout_with_its_group_needs_a_group(options):
    with pytest.raises(ValidationError, match="group_size ≥ 2"):
        update(batch_of([1, 0], [1]), **{"baseline": "none"} | options)


def test_mock_rollouts_are_tokenised_with_an_end_token_and_flagged():
    batch = MockRolloutSampler(max_new_tokens=5, group_size=16).generate_trajectories(["a"])
    assert 0 < batch.clipped_ratio < 1
    for number, rollout in enumerate(batch):
        rollout.reward = float(number)
    result = update(batch)
    assert result.notes == ("off-policy: mock data",)
    for rollout in batch:
        assert rollout.prompt_tokens == [2, ord("a")]
        letters = [ord(letter) for letter in rollout.response]
        assert rollout.tokens == (letters if rollout.truncated else [*letters, 1])


def test_real_rollouts_are_never_tokenised_again():
    batch = batch_of([1, 0])
    assert update(batch).notes == ()
    assert [rollout.tokens for rollout in batch] == [[5, 1], [5, 1]]


def test_a_text_that_has_no_tokens_is_refused():
    group = RolloutGroup(
        "g", "p", [Trajectory("p", "", reward=float(n), policy_version="mock") for n in range(2)]
    )
    with pytest.raises(ValidationError, match="no tokens"):
        update(TrajectoryBatch([group], SamplingConfig()))


def test_a_text_that_the_tokenizer_cannot_read_is_refused_with_its_reason():
    class DigitsOnly(CharacterTokenizer):
        def __call__(self, text, add_special_tokens=True):
            raise Exception("Missing [UNK] token")  # what the tokenizers library does

    client = RecordingClient()
    client.tokenizer = DigitsOnly()
    batch = MockRolloutSampler().generate_trajectories(["a"])
    batch[0].reward = 1.0
    with pytest.raises(ValidationError, match=r"cannot read 'a': Missing"):
        update(batch, client)


def test_when_the_queue_is_full_half_an_update_is_taken_back():
    class FullClient(RecordingClient):
        def forward_backward(self, *_, **__):
            pending = Promise()
            self.gradient = combine(
                [_handle(pending)],
                lambda results: results[0],
                operation="x",
                result_type=ForwardBackwardResult,
            )
            return self.gradient

        def optim_step(self):
            raise QueueFullError("full")

    client = FullClient()
    with pytest.raises(QueueFullError):
        update(batch_of([1, 0]), client)
    assert client.gradient.done()


def _handle(promise):
    from tensafe_nb.futures import FutureHandle

    return FutureHandle(
        promise,
        operation="forward_backward",
        future_id="f-1",
        training_client_id="tc-test",
        result_type=ForwardBackwardResult,
        cancel=promise.cancel,
        position=lambda: None,
    )


def test_an_update_runs_where_torch_cannot_be_imported():
    without_torch = (
        f"import sys; sys.modules['torch'] = None; sys.path.insert(0, {str(Path(__file__).parent)!r});"
        "import test_policy_gradient as t; assert t.update(t.batch_of([1, 0])).step == 8"
    )
    subprocess.run([sys.executable, "-c", without_torch], check=True)


def test_a_failing_operation_fails_the_update():
    class FailingClient(RecordingClient):
        def optim_step(self):
            promise = Promise()
            promise.fail(RuntimeError("broken"))
            return _handle(promise)

    with pytest.raises(FutureFailedError, match="broken"):
        update(batch_of([1, 0]), FailingClient())
