"""A notebook in which every field that can hold a text holds markup: its cells, as a person would type them."""

EVIL = "<script>window.fired=1</script><img src=x onerror=\"window.fired='img'\">"
WORLD = f"""\
import tensafe_nb as tn
from pathlib import Path
from tensafe_nb import rlvr
from tensafe_nb.events import Alarm, Metrics
EVIL = {EVIL!r}
SIGN = "<img src=x onerror=window.fired=3>"  # short enough for names of files
folder = Path.cwd() / SIGN.replace("/", "")
service = tn.ServiceClient()
private = service.create_training_client(
    model_ref="builtin:tiny", lora_config=tn.LoRAConfig(rank=2), batch_size=4,
    dp_config=tn.DPConfig(dataset_size=12, dataset_id=EVIL, target_epsilon=None))
rows = [{{"prompt": f"{{n}}" + EVIL, "completion": EVIL}} for n in range(12)]
draw = next(draw for draw in private.dp_batches(rows, steps=99) if len(draw))
private.forward_backward(draw); await private.optim_step()
await private.void_privacy(EVIL)
tc = service.create_training_client(model_ref="builtin:tiny", lora_config=tn.LoRAConfig(rank=2), batch_size=4)
ids = tc.tokenizer.encode(EVIL)

class Algorithm(rlvr.REINFORCE):
    def update(self, batch, training_client):
        for rollout in batch:  # as if the model had answered with it
            rollout.response, rollout.tokens = EVIL, list(ids)
            rollout.logprobs, rollout.raw_logprobs, rollout.mask = [-1.0] * len(ids), None, None
        return super().update(batch, training_client)

calls = []
def reward(prompt, response, meta=None):
    calls.append(response)
    if len(calls) % 4 == 1:
        raise ValueError(EVIL)
    return {{"score": float(len(calls) % 3), EVIL: 1.0}}

reward.__name__ = reward.__qualname__ = EVIL
trainer = rlvr.RLVRTrainer(
    tc, [{{"prompt": EVIL + str(n), "answer": EVIL, EVIL: EVIL}} for n in range(4)], reward,
    Algorithm(baseline="group", mask_truncated=False), group_size=4, prompts_per_step=2,
    max_new_tokens=3, reward_timeout=None)
run = trainer.run(steps=2, show=False)
await run
run.remark(EVIL)
tc.publish(Metrics(step=2, values={{EVIL: 1.0, "loss": 2.0}}, run_id=run.run_id))
tc.publish(Alarm(run_id=run.run_id, step=2, name=EVIL, level="red", message=EVIL, remedy=EVIL))
saved = await tc.save_state(name=EVIL, metadata={{EVIL: EVIL, "nested": [{{EVIL: EVIL}}]}})
rlvr.register_preset(EVIL, rlvr.PPOConfig(), overwrite=True)
failed = tc.forward({{"input_ids": [[10**6, 1]]}})
failed.exception();
"""
SHOWN = (
    "tc",
    "from IPython.display import display\n"
    "display(saved, service, service.list_artifacts(), service.get_audit_logs(limit=5), tn.list_runs(), failed)",
    "display(private.privacy_statement(), tc.config.replace(model_ref=EVIL), private.config.dp_config)",
    "display(tn.BatchData([[1, 2]], **{EVIL: [[1, 2]]}), trainer.store.last(1)[0][1], run.result())",
    "seen = rlvr.preview_reward(reward, trainer.store.last(1)[0][1], timeout=None)\n"
    "display(seen, rlvr.PPO(EVIL), tn.load_run(run.run_id))",
    "for call in (lambda: tn.load_run(EVIL), lambda: tn.OptimizerConfig(**{EVIL: 1}), lambda: rlvr.PPO(EVIL + '!'),\n"
    "             lambda: service.get_artifact(SIGN), lambda: tn.data.read_rows(folder)):\n"
    "    try:\n        call()\n    except tn.TGTinkerError as error:\n        print(error)",
    "run.freeze(samples=4)",
)  # fmt: skip
