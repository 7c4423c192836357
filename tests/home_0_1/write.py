"""Writes the home folder beside this file, as tensafe_nb 0.1 does: with everything a home can hold.

It was run once, on the code of commit 8ccdff8 (0.1.0), and is kept so that what lies here can be explained:

    git worktree add --detach /tmp/v01 8ccdff8
    PYTHONPATH=/tmp/v01 python tests/home_0_1/write.py

Later versions read what it wrote and never write it again. `expected.json` holds what 0.1 itself read back.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
HOME = HERE / "home"
MODEL = "small-llama"  # a reference relative to the folder that work is done in
PASSPHRASE = "the passphrase of a test"
KEK = "dGhlIGtleSBvZiBhIHRlc3QsIDMyIGJ5dGVzIGxvbmc="
ROWS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in (1, 2, 3, 4) for b in (3, 5)]
SCORED = {
    "input_ids": [[3, 12, 5, 13, 7, 1], [4, 5, 12, 6, 13, 8]],
    "labels": [[12, 5, 13, 7, 1, -100], [5, 12, 6, 13, 8, 1]],
}
STEP = {"input_ids": [[5, 12, 5, 13, 9, 1]], "labels": [[12, 5, 13, 9, 1, -100]]}
BATCHES = [SCORED, STEP, {"input_ids": [[2, 12, 9, 13, 9, 1]]}, {"input_ids": [[11, 12, 2, 13, 11, 1]]}]
LORA = {"rank": 2, "alpha": 4, "target_modules": ["q_proj", "down_proj"]}
BASE = {"model_ref": MODEL, "lora_config": LORA, "dtype": "float32"}  # the same on every processor
DP = {"dataset_size": len(ROWS), "noise_multiplier": 1.0, "expected_batch_size": 2, "target_epsilon": None}


def main() -> None:
    os.chdir(HERE)
    os.environ["TENSAFE_HOME"] = str(HOME)
    for written in (HOME, HERE / MODEL):
        shutil.rmtree(written, ignore_errors=True)
    make_model()
    import tensafe_nb as tn

    with tn.ServiceClient() as service:
        expected = Writer(tn, service).write()
    expected["sealed by others"] = seal_with_other_keys(tn)
    kill_a_run()
    expected["keys"] = [[info.key_id, info.retired] for info in keys().infos() if info.source == "file"]
    with tn.ServiceClient() as service:
        check = service.verify_audit_log()
        expected["audit"] = {"ok": check.ok, "records": check.records, "head": check.head}
        expected["artifacts"] = sorted(found.artifact_id for found in service.list_artifacts())
    expected["runs"] = [describe(record) for record in tn.list_runs()]
    read_back(tn, expected["states"])
    lines = [f'"{name}": {json.dumps(found, ensure_ascii=False)}' for name, found in expected.items()]
    (HERE / "expected.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def make_model() -> None:
    """A random Llama of some 700 weights with the tokenizer of builtin:sums."""
    import torch
    import transformers

    import tensafe_nb

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=14,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(MODEL)
    assets = Path(tensafe_nb.__file__).parent / "engine" / "assets" / "sums"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(assets / name, MODEL)


def describe(record: Any) -> dict[str, Any]:
    """What a record and its history say."""
    history = record.history
    return {
        "run_id": record.run_id,
        "state": str(record.state),
        "step": record.step,
        "planned_steps": record.planned_steps,
        "reason": record.reason,
        "last_checkpoint": record.last_checkpoint,
        "curve": record.curve,
        "events": dict(sorted(Counter(type(event).__name__ for event in history.events()).items())),
        "last": {name: history[name].tolist()[-1] for name in history.names},
        "points": {name: len(history[name]) for name in history.names},
    }


class Writer:
    """Everything that one service writes."""

    def __init__(self, tn: Any, service: Any) -> None:
        self.tn, self.service = tn, service
        self.states: dict[str, dict[str, Any]] = {}
        self.rollouts: dict[str, list[list[Any]]] = {}

    def write(self) -> dict[str, Any]:
        self.supervised()
        keys().new()  # what was sealed so far needs the older key
        self.full_weights()
        self.half_precision()
        self.value_head_and_reference()
        self.reinforcement()
        self.private()
        return {"states": self.states, "rollouts": self.rollouts}

    def client(self, **fields: Any) -> Any:
        fields = {"optimizer": {"learning_rate": 1e-2}, "batch_size": 2} | fields
        return self.service.create_training_client(**BASE | fields)

    def note(self, name: str, saved: Any, **facts: Any) -> None:
        self.states[name] = {
            "artifact_id": saved.artifact_id,
            "name": saved.name,
            "step": saved.step,
            "content_hash": saved.content_hash,
            "metadata": dict(saved.metadata),
        } | facts

    # without privacy

    def supervised(self) -> None:
        tc = self.client(lora_config={"rank": 2, "dropout": 0.1})
        run = tc.fit(BATCHES, eval_batches=[SCORED], eval_every=2, checkpoint_every=2, show=False)
        run.result()
        for saved in reversed(self.service.list_artifacts()):
            self.note(f"of a run at step {saved.step}", saved, run=run.run_id)
        self.fails(tc)
        self.stops(tc)
        self.note("LoRA", tc.save_state(metadata={"epoch": 1, "tags": ["a", None, 0.5]}).result())
        self.note("named by its user", tc.save_state(name="best ✓").result())
        part = tc.save_state(include_optimizer=False).result()
        self.note("without optimiser", part)
        tc.forward_backward(SCORED).result()
        self.note("in the middle of accumulation", tc.save_state().result())
        fork = tc.fork(part.artifact_id, optimizer={"learning_rate": 1e-3})
        fork.forward(SCORED).result()
        tc.load_state(part.artifact_id).result()
        self.note("pushed back", self.there_and_back(tc.save_state(name="travelled").result()))
        self.service.delete_artifact(tc.save_state(name="deleted").artifact_id)
        fork.close(), tc.close()

    def fails(self, tc: Any) -> None:
        def broken() -> Iterator[Any]:
            yield SCORED
            raise KeyError("column 'text'")

        run = tc.fit(broken(), show=False)
        with contextlib.suppress(self.tn.FutureFailedError):
            run.result()
        assert run.state == "FAILED"

    def stops(self, tc: Any) -> None:
        def endless() -> Iterator[Any]:
            while True:
                if tc.step >= 8:
                    run.pause()
                yield SCORED

        run = tc.fit(endless(), show=False)
        paused(tc, run)
        run.step(1)
        paused(tc, run)
        run.stop()
        run.result()

    def there_and_back(self, saved: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            sealed = self.service.pull_artifact(saved.artifact_id, to=Path(folder) / "sealed.bin")
            self.service.delete_artifact(saved.artifact_id)
            return self.service.push_artifact(sealed)

    def full_weights(self) -> None:
        for name in ("adamw", "sgd", "adafactor"):
            tc = self.client(
                lora_config=None,
                optimizer={"name": name, "learning_rate": 1e-2, "schedule": "cosine", "total_steps": 4},
            )
            for _ in range(2):
                tc.forward_backward(SCORED), tc.optim_step().result()
            if name == "sgd":
                tc.freeze_reference().result()
            self.note(f"all weights, {name}", tc.save_state().result(), reference=name == "sgd")
            tc.close()

    def half_precision(self) -> None:
        tc = self.client(dtype="bfloat16")
        tc.forward_backward(SCORED), tc.optim_step().result()
        self.note("bfloat16", tc.save_state().result())
        tc.close()

    def value_head_and_reference(self) -> None:
        tc = self.client(value_head=True)
        tc.forward_backward(SCORED), tc.optim_step(), tc.freeze_reference()
        tc.forward_backward(SCORED), tc.optim_step().result()
        self.note(
            "value head and frozen reference",
            tc.save_state().result(),
            reference_logprobs=tc.compute_logprobs(SCORED, reference=True).logprobs.tolist(),
        )
        tc.close()

    def reinforcement(self) -> None:
        tn = self.tn
        for name, algo, fields in (
            ("REINFORCE with a running mean", tn.rlvr.REINFORCE(baseline="ema", mask_truncated=False), {}),
            (
                "PPO with a value head",
                tn.rlvr.PPO("ppo_value", ppo_epochs=2, mask_truncated=False, value_head={"warmup": 1}),
                {"value_head": True},
            ),
        ):
            tc = self.client(**fields)
            run = trainer_of(tn, tc, algo).run(steps=3, checkpoint_every=2, show=False)
            run.result()
            for saved in self.service.list_artifacts(tc.training_client_id):
                self.note(f"{name}, step {saved.step}", saved, run=run.run_id)
            self.rollouts[run.run_id] = rollouts_of(tn, tc.training_client_id)
            tc.close()

    # with privacy

    def private(self) -> None:
        self.keep("poisson", self.drawn, {"target_epsilon": 30.0})
        self.keep("poisson, prv", self.drawn, {"accountant_type": "prv"})
        self.keep("poisson, a user is a unit", self.drawn_by_user, {"dataset_size": 4})
        self.keep("named data set", self.drawn, {"dataset_id": "letters"})
        self.keep("named data set, another client", self.drawn, {"dataset_id": "letters"})
        self.keep("worst case", self.own_batches, {"sampling": "worst_case", "dataset_size": None})
        self.keep(
            "prompt groups", self.private_reinforcement, {"sampling": "worst_case", "dataset_size": None}
        )
        self.keep("guarantee given up", self.void, {})
        self.keep("budget spent", self.until_refused, {"target_epsilon": 6.0})

    def keep(self, name: str, train: Callable[[Any], None], changes: dict[str, Any]) -> None:
        tc = self.client(dp_config=DP | changes)
        train(tc)
        fork = tc.fork(optimizer={"learning_rate": 1e-3}) if name == "poisson" else None
        if fork is not None:
            self.drawn(fork)
        saved = tc.save_state().result()
        self.note(f"private: {name}", saved)
        for client in (fork, tc):
            if client is not None:
                client.close()

    def drawn(self, tc: Any) -> None:
        tc.fit(tc.dp_batches(ROWS, steps=2), show=False).result()

    def drawn_by_user(self, tc: Any) -> None:
        users = [f"user {number // 2}" for number in range(len(ROWS))]
        tc.fit(tc.dp_batches(ROWS, steps=2, unit_ids=users), show=False).result()

    def own_batches(self, tc: Any) -> None:
        tc.fit(tc.batches(ROWS), epochs=1, checkpoint_every=4, show=False).result()

    def private_reinforcement(self, tc: Any) -> None:
        algo = self.tn.rlvr.REINFORCE(baseline="rloo", mask_truncated=False)
        run = trainer_of(self.tn, tc, algo).run(steps=2, checkpoint_every=2, show=False)
        run.result()
        self.rollouts[run.run_id] = rollouts_of(self.tn, tc.training_client_id)

    def void(self, tc: Any) -> None:
        self.drawn(tc)
        tc.void_privacy("the rows are public by now").result()

    def until_refused(self, tc: Any) -> None:
        result = tc.fit(tc.dp_batches(ROWS, steps=100), show=False).result()
        assert "the budget is 6" in result.reason


def read_back(tn: Any, states: dict[str, dict[str, Any]]) -> None:
    """Load every state from a copy of the home, and write down how it scores, what it claims, how it goes on."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TENSAFE_HOME"] = str(shutil.copytree(HOME, Path(folder) / "home"))
        with tn.ServiceClient() as service:
            for facts in states.values():
                with service.restore(facts["artifact_id"]) as tc:
                    private = tc.config.dp_config is not None
                    facts |= {"logprobs": scores(tc)} | (claims(tc) if private else going_on(tc))
            with service.restore(states["private: poisson"]["artifact_id"]) as tc:
                tc.fit(tc.dp_batches(ROWS, steps=1), show=False).result()
                states["private: poisson"]["after a step"] = tc.privacy_statement().epsilon


def claims(tc: Any) -> dict[str, Any]:
    statement = tc.privacy_statement()
    return {
        "unit": statement.unit,
        "steps": statement.steps,
        "epsilon": statement.epsilon,
        "claimed_by": statement.claimed_by,
        "void": [reason for reason, _ in statement.void],
    }


def going_on(tc: Any) -> dict[str, Any]:
    tokens = [list(sequence.tokens) for sequence in sampled(tc)]
    tc.forward_backward(STEP)
    grad_norm = tc.optim_step().grad_norm
    return {"sampled": tokens, "grad_norm": grad_norm, "logprobs after a step": scores(tc)}


def trainer_of(tn: Any, tc: Any, algo: Any) -> Any:
    prompts = [{"prompt": row["prompt"], "answer": row["completion"]} for row in ROWS]
    return tn.rlvr.RLVRTrainer(
        tc,
        prompts,
        share_of_answer,
        algo,
        prompts_per_step=2,
        group_size=3,
        max_new_tokens=3,
        eval_prompts=prompts[:2],
        reward_timeout=None,
        seed=1,
    )


def share_of_answer(prompt: str, response: str, meta: Any = None) -> float:
    """How much of the answer's digits are there: seldom the same for all of a group."""
    return sum(digit in response for digit in meta["answer"]) / 2 + 0.1 * len(response)


def scores(tc: Any) -> Any:
    return tc.forward(SCORED, return_logprobs=True).logprobs.tolist()


def sampled(tc: Any) -> Any:
    return tc.sample(["1+3=", "2+5="], max_new_tokens=6).sequences


def rollouts_of(tn: Any, training_client_id: str, home: Path = HOME) -> list[list[Any]]:
    files = sorted((home / "runs" / training_client_id / "rollouts").rglob("*.jsonl"))
    return [
        [[t.prompt, t.response, t.reward, list(t.tokens)] for t in tn.rlvr.TrajectoryBatch.load(file)]
        for file in files
    ]


def paused(tc: Any, run: Any) -> None:
    import threading

    rested = threading.Event()
    forget = tc.subscribe(lambda event: rested.set() if getattr(event, "state", "") == "PAUSED" else None)
    assert run.state == "PAUSED" or rested.wait(60)
    forget()


def keys() -> Any:
    from tensafe_nb.store.home import Home
    from tensafe_nb.store.keys.keyring import Keys

    return Keys(Home.of_environment().keys(), "file")


def seal_with_other_keys(tn: Any) -> dict[str, Any]:
    found = {}
    for source, name, value in (
        ("env", "TENSAFE_KEK", KEK),
        ("passphrase", "TENSAFE_PASSPHRASE", PASSPHRASE),
    ):
        os.environ[name] = value
        with tn.ServiceClient(key_source=source) as service:
            tc = service.create_training_client(**BASE)
            saved = tc.save_state(name=source, include_optimizer=False).result()
            found[source] = {"artifact_id": saved.artifact_id, "logprobs": scores(tc)}
        del os.environ[name]
    return found


def kill_a_run() -> None:
    """A process that dies in the middle of a run."""
    code = f"""
import os, signal, tensafe_nb as tn
tc = tn.ServiceClient().create_training_client(**{BASE!r})
def killer():
    for _ in range(3):
        yield {STEP!r}
    tc.forward({STEP!r}).result()
    os.kill(os.getpid(), signal.SIGKILL)
tc.fit(killer(), steps=9, checkpoint_every=2, show=False).result()
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9


if __name__ == "__main__":
    main()
