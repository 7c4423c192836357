"""What a notebook trains, supervised and by rewards, and what has come of it, to be compared."""

from pathlib import Path
from typing import Any

import tensafe_nb as tn
from tests.parity.serving import eventually


def supervised(service: tn.ServiceClient, seed: int, steps: int = 4) -> tuple[tn.TrainingClient, str]:
    """Fit an adapter, with what is held out and checkpoints."""
    tc = service.create_training_client(
        lora_config=tn.LoRAConfig(rank=2, dropout=0.1), optimizer={"learning_rate": 1e-2}, seed=seed
    )
    batches = [tn.BatchData([[5 + seed + row, 6 + row, 7, 8, 9 + row] for row in range(3)]) for _ in range(3)]
    run = tc.fit(batches, steps=steps, eval_batches=batches[:1], eval_every=2, checkpoint_every=2, show=False)
    assert run.result().state == "FINISHED", run.result()
    return tc, run.run_id


def by_rewards(service: tn.ServiceClient, seed: int, steps: int = 2) -> tuple[tn.TrainingClient, str]:
    """Teach an adapter by what it is rewarded for."""
    tc = service.create_training_client(
        model_ref="builtin:sums",
        lora_config=tn.LoRAConfig(rank=2),
        optimizer={"learning_rate": 3e-3},
        seed=seed,
    )
    algo = tn.rlvr.PPO("grpo", ppo_epochs=2, kl_coef=0.05)
    trainer = tn.rlvr.RLVRTrainer(
        tc, tn.datasets.sums(8, seed=1), "exact_match", algo,
        prompts_per_step=2, group_size=3, max_new_tokens=4, seed=seed,
    )  # fmt: skip
    run = trainer.run(steps=steps, show=False)
    assert run.result().state == "FINISHED", run.result()
    return tc, run.run_id


def what_came_of(
    service: tn.ServiceClient, tc: tn.TrainingClient, run_id: str, folder: Path
) -> dict[str, Any]:
    """Return weights, curves and rollouts, bit for bit."""
    saved = tc.save_state().result()
    exported = service.export_adapter(saved.artifact_id, folder / tc.training_client_id)
    channel: Any = tc._channel
    # `history` waits 5 s for what runs told to come back; behind a bad network on a busy machine it may take longer
    eventually(
        lambda: (
            not getattr(channel, "_outbox", ()) and channel.history.last_seq >= getattr(channel, "_owed", 0)
        )
    )
    history = tc.history
    curves = {
        name: [array.tolist() for array in history.series(name)]
        for name in history.names
        if not name.startswith("time/")
    }
    rollouts = {step: trajectories_of(batch) for step, batch in tn.load_run(run_id).rollouts().items()}
    scored = tc.compute_logprobs(tn.BatchData([[5, 6, 7, 8, 9]])).result().logprobs.tolist()
    weights = (exported / "adapter_model.safetensors").read_bytes()
    return {
        "weights": weights, "curves": curves, "rollouts": rollouts, "logprobs": scored, "step": tc.step,
        "checkpoints": len(service.list_artifacts(tc.training_client_id)),
    }  # fmt: skip


def trajectories_of(batch: Any) -> Any:
    return [
        (group.prompt, [(one.response, one.tokens, one.logprobs, one.reward) for one in group.rollouts])
        for group in batch.groups
    ]
