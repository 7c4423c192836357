"""Run as a script where torch cannot be imported: all that a notebook does against a server."""

import sys
from typing import Any

REFUSED = ("torch", "peft", "opacus", "tenseal", "accelerate", "gguf", "cryptography", "fastapi", "uvicorn")
REFUSED += ("tensafe_nb.engine", "tensafe_nb.losses", "tensafe_nb.core", "tensafe_nb.server")


class Without:
    """A finder of modules in an environment that has none of these packages."""

    def __init__(self, finder: Any) -> None:
        self._finder = finder

    def find_spec(self, name: str, *more: Any) -> Any:
        refused = any(name == package or name.startswith(f"{package}.") for package in REFUSED)
        return None if refused else self._finder.find_spec(name, *more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]

import tensafe_nb as tn  # noqa: E402

assert tn.ServiceClient.__name__ == "ServiceClient"
with tn.ServiceClient() as service:  # TENSAFE_BASE_URL, TENSAFE_API_KEY
    tc = service.create_training_client(
        model_ref="builtin:sums", lora_config=tn.LoRAConfig(rank=4), optimizer={"learning_rate": 3e-3}
    )
    rows = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(10, 26)]
    run = tc.fit(tc.batches(rows), steps=5, checkpoint_every=5, show=False)
    assert run.result().steps == 5 and len(tc.history["loss"]) == 5
    print("text", tc.sample("12+34=", max_new_tokens=4).texts)

    def reward(prompt: str, response: str) -> float:
        return float(response[:1] > "2")

    trainer = tn.rlvr.RLVRTrainer(
        tc, tn.datasets.sums(16, seed=1), reward, prompts_per_step=4, group_size=4, max_new_tokens=4
    )
    learned = trainer.run(steps=3, show=False).result()
    assert learned.state == "FINISHED" and learned.steps_done == 3, learned
    assert len(tc.history["reward"]) == 3
    assert tc.compute_logprobs(tn.BatchData([[5, 6, 7]])).result().logprobs.shape == (1, 3)
    (saved, *_) = service.list_artifacts()
    assert service.restore(saved.artifact_id).ready().result().status == "READY"
    assert len(tn.list_runs()) == 2
    try:
        tc.he_adapter()
    except tn.EncryptionContextError as error:
        assert "pip install tenseal" in str(error) and "in clear" in str(error), error
    else:
        raise AssertionError("it has no tenseal")
    html = tc.dashboard()._repr_mimebundle_()
    assert html
    for call in (
        lambda: tc.forward_backward(tn.BatchData([[5, 6]]), "token_cee"),
        lambda: tc.forward_backward(tn.BatchData([[5, 6]]), loss_fn=lambda outputs, batch: 0),
    ):
        try:
            call()
        except tn.ValidationError as error:
            print(error)
        else:
            raise AssertionError("not refused")
    tc.close()
loaded = sorted({name for name in sys.modules if name in REFUSED})
assert loaded == [], loaded
print("modules", *sorted({name.partition(".")[0] for name in sys.modules}))
