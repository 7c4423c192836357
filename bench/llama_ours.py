"""Our side of sampling one row by llama.cpp: a program of its own, run by `.venv-llama/bin/python` (`make llama-cpp`).

Its arguments are a GGUF file, and where to write the adapter that it samples with; without that, the adapter is as it
began. It answers lines as `llama_peer` does: a training client draws, and its log-probabilities come with the tokens.
"""

import json
import sys
from pathlib import Path

import numpy as np

import tensafe_nb as tn
from bench.harness import stopwatch
from bench.llama_peer import ADAPTER_SCALE
from tensafe_nb.engine.engine import Engine
from tensafe_nb.engine.models.export import write_gguf_adapter


def main() -> None:
    file, *adapter = sys.argv[1:]
    config = tn.TrainingConfig(
        model_ref=file, lora_config=tn.LoRAConfig(rank=16, alpha=32), dtype="float32", device="cpu"
    )
    tensors = {}
    if adapter:
        engine, stream = Engine(config), np.random.default_rng(0)
        for name, weight in engine.read_adapter().tensors.items():
            if "lora_B" in name:
                tensors[name] = ADAPTER_SCALE * stream.standard_normal(weight.shape, np.float32)
        engine.load_adapter(tensors)
        write_gguf_adapter(engine.model, Path(adapter[0]))
        del engine
    with tn.ServiceClient() as service:
        tc = service.create_training_client(config)
        if tensors:
            tc.load_adapter(tensors).result()
        for line in sys.stdin:
            prompt, new_tokens = json.loads(line)
            asked = tn.SamplingConfig(max_new_tokens=new_tokens, ignore_end=True, engine="llama.cpp")
            print(json.dumps(stopwatch(lambda: tc.sample([prompt], asked).result())), flush=True)  # noqa: B023


if __name__ == "__main__":
    main()
