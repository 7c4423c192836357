"""How long a notebook waits before its first line."""

from functools import partial

from bench.harness import ROOT, Row, Taken, Target, as_it_says, fresh_process, paired

IMPORT = """
import sys, time
started, cpu_started = time.perf_counter(), time.process_time()
{statement}
print([time.perf_counter() - started, time.process_time() - cpu_started])
assert {may_load_torch} or "torch" not in sys.modules, "{statement} has loaded torch"
"""

CLIENT = """
import time, torch
started, cpu_started = time.perf_counter(), time.process_time()
import tensafe_nb as tn
service = tn.ServiceClient()
tc = service.create_training_client(model_ref={model_ref!r}, lora_config=tn.LoRAConfig(rank=8), dtype="float32")
tc.ready().result()
print([time.perf_counter() - started, time.process_time() - cpu_started])
service.close()
"""
MODEL = """
import time, torch
started, cpu_started = time.perf_counter(), time.process_time()
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained({folder!r})
model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
print([time.perf_counter() - started, time.process_time() - cpu_started])
"""


def package() -> Row:
    """Issue 2: at most 0.5 s, and no torch."""
    return Row(
        what="`import tensafe_nb` in a fresh process; asserts that torch stays out",
        peer="`import torch`",
        taken=_in_turns("import tensafe_nb", "import torch"),
        target=Target("≤", 0.5, "ours"),
    )


def clients() -> Row:
    """What the row above leaves out, since names load when first used."""
    names = "ServiceClient, TrainingConfig, LoRAConfig, BatchData"
    return Row(
        what="the same with the names of a first cell, which load when first used; torch stays out",
        peer="`import numpy, pydantic`",
        taken=_in_turns(f"from tensafe_nb import {names}", "import numpy, pydantic"),
        target=Target("≤", 0.15, "ours"),
    )


def ready() -> Row:
    """Issue 26: at most 1.5 s once torch is there."""
    return Row(
        what="a training client of a built-in model, from `import tensafe_nb` to `ready()`, once torch is imported",
        peer="`from_pretrained` and `get_peft_model`, from the import of transformers and PEFT on",
        precision="fp32",
        sizes="`builtin:tiny` LoRA r8, in a fresh process",
        taken=begun("builtin:tiny", str(ROOT / "tensafe_nb/engine/assets/tiny")),
        target=Target("≤", 1.5, "ours"),
    )


def begun(model_ref: str, folder: str) -> Taken:
    """Measure how long the first client of a process takes, and a peer's model of the same weights, torch aside."""
    return paired(
        lambda: fresh_process(CLIENT.format(model_ref=model_ref)),
        lambda: fresh_process(MODEL.format(folder=folder)),
        seconds=0,
        at_least=2,
        warmup=1,
        watch=as_it_says,
    )


def _in_turns(ours: str, peer: str) -> Taken:
    return paired(
        partial(_import, ours),
        partial(_import, peer),
        seconds=3,
        warmup=1,
        watch=lambda import_: import_(),  # the new process holds the watch itself
    )


def _import(statement: str) -> tuple[float, float]:
    code = IMPORT.format(statement=statement, may_load_torch=statement == "import torch")
    wall, cpu = fresh_process(code)
    return wall, cpu
