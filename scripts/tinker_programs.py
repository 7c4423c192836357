"""Programs on the unmodified tinker SDK and its cookbook, run in their environments by `scripts.tinker_parity`.

Each is a function that asserts what it checks, prints what it measured, and finds the server in TINKER_BASE_URL.
"""

import asyncio
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tinker
from tinker import types

MODEL = "tiny"  # a folder where this runs
ROWS = ((5, 6, 7, 8), (9, 10, 11, 12, 13), (20, 21, 22))


def done(made: Any) -> Any:
    """Return a client, of whichever SDK: newer ones give a future of it."""
    return made.result() if hasattr(made, "result") else made


def datum(tokens: Sequence[int], weight: float = 1.0, **inputs: Any) -> Any:
    given = {"target_tokens": list(tokens[1:]), "weights": [weight] * (len(tokens) - 1)} | inputs
    return types.Datum(model_input=types.ModelInput.from_ints(list(tokens[:-1])), loss_fn_inputs=given)


def client(service: Any, **options: Any) -> Any:
    return done(service.create_lora_training_client(base_model=MODEL, rank=8, seed=1, **options))


def logprobs_of(output: Any) -> list[np.ndarray]:
    return [each["logprobs"].to_numpy() for each in output.loss_fn_outputs]


def contract() -> None:
    """Create, train, save, load, sample, score: on each SDK."""
    service = tinker.ServiceClient()
    tc, data = client(service), [datum(row) for row in ROWS]
    losses = []
    for _ in range(4):  # submitted before either is awaited
        loss, step = (
            tc.forward_backward(data, "cross_entropy"),
            tc.optim_step(types.AdamParams(learning_rate=3e-3)),
        )
        losses.append(loss.result().metrics["loss:sum"])
        step.result()
    assert losses == sorted(losses, reverse=True), losses
    state = tc.save_state("state").result().path
    again = done(service.create_training_client_from_state_with_optimizer(state))
    now, there = (each.forward(data, "cross_entropy").result() for each in (tc, again))
    assert math.isclose(now.metrics["loss:sum"], there.metrics["loss:sum"], rel_tol=1e-5)
    path = tc.save_weights_for_sampler("weights").result().path
    samplers = (
        done(service.create_sampling_client(model_path=path)),
        done(tc.save_weights_and_get_sampling_client()),
    )
    prompt = types.ModelInput.from_ints(list(ROWS[1]))
    for sampler in samplers:
        scored = np.array(sampler.compute_logprobs(prompt).result()[1:])
        assert np.abs(scored - logprobs_of(now)[1]).max() < 1e-4
        drawn = sampler.sample(prompt, 2, types.SamplingParams(max_tokens=4, seed=1)).result()
        assert len(drawn.sequences) == 2 and len(drawn.sequences[0].tokens) <= 4
    assert tc.get_info().model_data.model_name == MODEL
    print(f"SDK {tinker.__version__}: loss:sum {losses[0]:.3f} -> {losses[-1]:.3f}")


def numerics() -> None:
    """Sampler, forward and plain transformers agree; losses are sums; chunks change nothing."""
    import torch
    from transformers import AutoModelForCausalLM

    service = tinker.ServiceClient()
    tc, data = client(service), [datum(row) for row in ROWS]
    found = logprobs_of(tc.forward(data, "cross_entropy").result())
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    off = 0.0
    for row, own in zip(ROWS, found, strict=True):
        with torch.no_grad():
            scores = model(torch.tensor([row])).logits[0, :-1].log_softmax(-1)
        off = max(
            off, float(np.abs(scores.gather(1, torch.tensor(row[1:])[:, None])[:, 0].numpy() - own).max())
        )
    sampler = done(service.create_sampling_client(base_model=MODEL))
    drawn = sampler.sample(
        types.ModelInput.from_ints(list(ROWS[0])), 1, types.SamplingParams(max_tokens=6, seed=1)
    )
    sequence = drawn.result().sequences[0]
    whole = (*ROWS[0], *map(int, sequence.tokens))
    again = logprobs_of(tc.forward([datum(whole)], "cross_entropy").result())[0][-len(sequence.tokens) :]
    sampled = float(np.abs(np.array(sequence.logprobs) - again).max())
    assert off < 1e-4 and sampled < 1e-4, (off, sampled)

    def norm(batches: Sequence[Sequence[Any]]) -> tuple[float, float]:
        sums = [tc.forward_backward(list(batch), "cross_entropy") for batch in batches]
        step = tc.optim_step(types.AdamParams(learning_rate=0.0))
        metrics = step.result().metrics
        return sum(each.result().metrics["loss:sum"] for each in sums), metrics["unclipped_grad_l2:mean"]

    one, twice, parts = norm([data]), norm([data + data]), norm([data[:1], data[1:]])
    assert math.isclose(twice[0], 2 * one[0], rel_tol=1e-5) and math.isclose(
        twice[1], 2 * one[1], rel_tol=1e-4
    )
    assert math.isclose(parts[0], one[0], rel_tol=1e-5) and math.isclose(parts[1], one[1], rel_tol=1e-4)
    print(f"logprobs off by at most {off:.1e} from transformers, {sampled:.1e} between sampler and forward")


def optimizer_state() -> None:
    """A warm resume repeats the next losses, a cold one does not."""
    service = tinker.ServiceClient()
    tc, data = client(service), [datum(row) for row in ROWS]

    def train(model: Any, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            loss = model.forward_backward(data, "cross_entropy")
            model.optim_step(types.AdamParams(learning_rate=1e-2)).result()
            found.append(loss.result().metrics["loss:sum"])
        return found

    train(tc, 3)
    path = tc.save_state("here").result().path
    unbroken = train(tc, 3)
    warm = train(done(service.create_training_client_from_state_with_optimizer(path)), 3)
    cold = train(done(service.create_training_client_from_state(path)), 3)
    assert np.allclose(unbroken, warm, rtol=1e-5) and not np.allclose(unbroken[1:], cold[1:], rtol=1e-4)
    print(f"unbroken {unbroken[-1]:.4f}, warm {warm[-1]:.4f}, cold {cold[-1]:.4f}")


def custom_loss() -> None:
    """A loss of the user's own, DPO-like, moves the weights as its derivative with respect to the logprobs does."""
    import torch

    service = tinker.ServiceClient()
    data = [datum(row) for row in ROWS[:2]]

    def loss(_: Any, logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        margin = logprobs[0].sum() - logprobs[1].sum()
        return -torch.nn.functional.logsigmoid(0.1 * margin), {"margin": float(margin)}

    adam = types.AdamParams(learning_rate=1e-2, eps=1e-4)
    custom, by_hand = client(service), client(service)
    told = custom.forward_backward_custom(data, loss).result()
    norm = custom.optim_step(adam).result().metrics["unclipped_grad_l2:mean"]
    leaves = [
        torch.tensor(own, requires_grad=True)
        for own in logprobs_of(by_hand.forward(data, "cross_entropy").result())
    ]
    loss(None, leaves)[0].backward()
    weighted = [datum(row, weights=(-leaf.grad).tolist()) for row, leaf in zip(ROWS, leaves, strict=False)]
    by_hand.forward_backward(weighted, "cross_entropy").result()
    expected = by_hand.optim_step(adam).result().metrics["unclipped_grad_l2:mean"]
    after = [logprobs_of(each.forward(data, "cross_entropy").result()) for each in (custom, by_hand)]
    off = max(float(np.abs(one - other).max()) for one, other in zip(*after, strict=True))
    assert math.isclose(norm, expected, rel_tol=1e-5) and off < 1e-4 and "margin" in told.metrics
    print(f"gradient norm {norm:.4f}, logprobs after a step off by at most {off:.1e}")


def private() -> None:
    """Differential privacy is asked for by the optimizer; epsilon comes back; without noise and clip it is plain."""
    from tinker.types.optimizer import OptimizerConfigBase

    service = tinker.ServiceClient()
    data = [datum(row, example_id=np.array([number])) for number, row in enumerate(ROWS)]

    def steps(tc: Any, given: Any, count: int) -> list[dict[str, float]]:
        found = []
        for _ in range(count):
            tc.forward_backward(given, "cross_entropy").result()
            found.append(tc.optim_step(types.AdamParams(learning_rate=1e-2)).result().metrics)
        return found

    noisy = OptimizerConfigBase(type="dp_adamw", noise_multiplier=1.0, max_grad_norm=0.5, target_epsilon=50.0)
    epsilons = [metrics["dp_epsilon"] for metrics in steps(client(service, optimizer=noisy), data, 3)]
    assert 0 < epsilons[0] < epsilons[1] < epsilons[2], epsilons
    open_end = OptimizerConfigBase(
        type="dp_adamw", noise_multiplier=0.0, max_grad_norm=1e6, expected_batch_size=1, target_epsilon=None
    )
    plain, same = client(service), client(service, optimizer=open_end)
    without = [datum(row) for row in ROWS]
    norms = [
        [each["unclipped_grad_l2:mean"] for each in steps(*arguments, 2)]
        for arguments in ((plain, without), (same, data))
    ]
    assert np.allclose(*norms, rtol=1e-3), norms
    print(f"dp_epsilon {', '.join(f'{epsilon:.3f}' for epsilon in epsilons)}; gradient norms {norms}")


def faults() -> None:
    """A user's error fails its request alone; a server that is busy for long is waited for in silence."""
    service = tinker.ServiceClient()
    tc, data = client(service), [datum(row) for row in ROWS]
    try:
        tc.forward_backward([datum(ROWS[0], target_tokens=[1])], "cross_entropy").result()
        raise AssertionError("a datum of the wrong length was taken")
    except tinker.RequestFailedError as error:
        print(f"{type(error).__name__}: {error}"[:120])
    tc.forward_backward(data, "cross_entropy").result()
    long = [datum([5 + n % 50 for n in range(200)]) for _ in range(64)]
    began = time.monotonic()
    tc.forward(long, "cross_entropy").result()
    each = time.monotonic() - began
    busy = [tc.forward(long, "cross_entropy") for _ in range(int(45 / each) + 1)]
    last = tc.optim_step(types.AdamParams())
    last.result()
    print(f"waited {time.monotonic() - began:.0f} s for the last of {len(busy) + 2} operations")
    assert all(each.result() for each in busy)


def before_the_end() -> None:
    """Train and save; then `scripts.tinker_parity` kills the server, and `after_the_end` goes on."""
    tc = client(tinker.ServiceClient())
    tc.forward_backward([datum(ROWS[0])], "cross_entropy").result()
    tc.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    Path("kept.json").write_text(json.dumps({"path": tc.save_state("kept").result().path}))
    Path("ready").touch()
    while Path("ready").exists():
        time.sleep(0.05)
    try:
        tc.forward_backward([datum(ROWS[0])], "cross_entropy").result(timeout=120)
        print("the model goes on where it was")
    except Exception as error:  # noqa: BLE001  # whichever it is, it must come
        print(f"{type(error).__name__}: {error}"[:160])


def after_the_end() -> None:
    """A checkpoint is there after the server was killed."""
    service = tinker.ServiceClient()
    tc = done(
        service.create_training_client_from_state_with_optimizer(
            json.loads(Path("kept.json").read_text())["path"]
        )
    )
    loss = tc.forward_backward([datum(ROWS[0])], "cross_entropy").result().metrics["loss:sum"]
    print(f"resumed at loss:sum {loss:.3f}")


def hello(count: int = 20) -> None:
    """Time pipelined toy steps; `scripts.tinker_parity` times the same through our own client."""
    tc, data = client(tinker.ServiceClient()), [datum(row) for row in ROWS]
    best = math.inf
    for _ in range(4):
        began, handles = time.perf_counter(), []
        for _ in range(count):
            handles.append(tc.forward_backward(data, "cross_entropy"))
            handles.append(tc.optim_step(types.AdamParams(learning_rate=1e-3)))
        for handle in handles:
            handle.result()
        best = min(best, time.perf_counter() - began)
    print(json.dumps({"seconds": best}))


# the cookbook


def conversations(folder: Path) -> Any:
    from tinker_cookbook.supervised.data import FromConversationFileBuilder
    from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig

    folder.mkdir(exist_ok=True)
    file = folder / "conversations.jsonl"
    chats = [
        [{"role": "user", "content": f"{n} + 1 ="}, {"role": "assistant", "content": f"{n + 1}"}]
        for n in range(64)
    ]
    file.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=MODEL, renderer_name="role_colon", max_length=128, batch_size=4
    )
    return FromConversationFileBuilder(common_config=common, file_path=str(file))


def supervised() -> None:
    """The cookbook's supervised.train: the loss falls, and a run that was broken off goes on as an unbroken one."""
    from tinker_cookbook.supervised import train

    def run(log: str, steps: int) -> list[float]:
        config = train.Config(
            log_path=log,
            model_name=MODEL,
            recipe_name="parity",
            renderer_name="role_colon",
            dataset_builder=conversations(Path("chats")),
            learning_rate=1e-3,
            lr_schedule="constant",
            num_epochs=2,
            lora_rank=8,
            save_every=10,
            eval_every=0,
            max_steps=steps,
            submit_ahead=0,  # else a checkpoint holds the step that was submitted before it
        )
        asyncio.run(train.main(config))
        rows = [json.loads(line) for line in (Path(log) / "metrics.jsonl").read_text().splitlines()]
        return [row["train_mean_nll"] for row in rows if "train_mean_nll" in row]

    unbroken = run("whole", 20)
    shutil.copytree("whole", "broken")  # as it stood after its tenth step
    kept = Path("whole/checkpoints.jsonl").read_text().splitlines()[0]
    assert json.loads(kept)["batch"] == 10
    Path("broken/checkpoints.jsonl").write_text(f"{kept}\n")
    steps = Path("whole/metrics.jsonl").read_text().splitlines()
    Path("broken/metrics.jsonl").write_text("\n".join(steps[:10]) + "\n")
    resumed = run("broken", 20)
    assert unbroken[-1] < unbroken[0] - 0.5, unbroken
    assert len(resumed) == 20 and np.allclose(unbroken, resumed, rtol=2e-3), (unbroken, resumed)
    print(
        f"train_mean_nll {unbroken[0]:.3f} -> {unbroken[-1]:.3f} in 20 steps; resumed at 10: {resumed[-1]:.3f}"
    )


def reinforcement() -> None:
    """The cookbook's rl.train on a reward for one token: it rises, and sampler and trainer agree."""
    import chz
    from tinker_cookbook.rl import train
    from tinker_cookbook.rl.types import Env, EnvGroupBuilder, RLDataset, RLDatasetBuilder, StepResult

    class OneToken(Env):
        async def initial_observation(self) -> Any:
            return types.ModelInput.from_ints([5, 6, 7, 8]), []

        async def step(self, action: Any, **_: Any) -> Any:
            reward = float(action[0] % 2 == 0)
            return StepResult(
                reward=reward,
                episode_done=True,
                next_observation=types.ModelInput.empty(),
                next_stop_condition=[],
                metrics={},
            )

    class Group(EnvGroupBuilder):
        async def make_envs(self) -> Any:
            return [OneToken() for _ in range(8)]

    class Groups(RLDataset):
        def get_batch(self, index: int) -> Any:
            return [Group() for _ in range(4)]

        def __len__(self) -> int:
            return 12

    @chz.chz
    class Builder(RLDatasetBuilder):
        async def __call__(self) -> Any:
            return Groups(), None

    for loss in ("importance_sampling", "ppo"):
        config = train.Config(
            learning_rate=3e-3,
            dataset_builder=Builder(),
            model_name=MODEL,
            recipe_name="parity",
            renderer_name="role_colon",
            max_tokens=1,
            log_path=f"rl-{loss}",
            eval_every=0,
            save_every=0,
            lora_rank=8,
            loss_fn=loss,
            compute_post_kl=True,
        )
        asyncio.run(train.main(config))
        rows = [json.loads(line) for line in Path(f"rl-{loss}/metrics.jsonl").read_text().splitlines()]
        rewards = [row["env/all/reward/total"] for row in rows if "env/all/reward/total" in row]
        kl = max(abs(row["optim/kl_sample_train_v1"]) for row in rows if "optim/kl_sample_train_v1" in row)
        first, last = np.mean(rewards[:3]), np.mean(rewards[-3:])
        assert last > first + 0.15 and kl < 1e-3, (rewards, kl)
        print(
            f"{loss}: reward {first:.2f} -> {last:.2f} in {len(rewards)} steps, |kl_sample_train_v1| <= {kl:.1e}"
        )


def notebook() -> None:
    """The notebook on the SDK, from top to bottom."""
    import nbformat
    from nbclient import NotebookClient

    path = Path(__file__).parent.parent / "notebooks" / "13_tinker_sdk.ipynb"
    read = nbformat.read(path, as_version=4)
    NotebookClient(read, timeout=240, kernel_name="python3", extra_arguments=["--log-level=ERROR"]).execute(
        cwd=str(path.parent)
    )
    said = "".join(
        output.get("text", "") for cell in read.cells if cell.cell_type == "code" for output in cell.outputs
    )
    assert "the same tokens: True" in said and "8 steps" in said, said
    print("notebook: " + said.strip().splitlines()[-1])


if __name__ == "__main__":
    os.environ["TINKER_TELEMETRY"] = "0"
    globals()[sys.argv[1]]()
