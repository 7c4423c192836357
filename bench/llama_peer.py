"""llama.cpp's side of sampling one row. A program of its own, run by `.venv-llama/bin/python` (`make llama-cpp`).

Its arguments are a GGUF file, and that of an adapter, if there is to be one. It reads a line with token ids and how
many more to draw, draws them from the whole distribution at temperature 1, and answers with seconds and CPU seconds;
and so on until its standard input ends.
"""

import json
import os
import sys
import time
from itertools import islice
from typing import Any

ADAPTER_SCALE = 0.02  # of the B that both sides sample with


def main() -> None:
    from llama_cpp import Llama

    file, *adapter = sys.argv[1:]
    threads = int(os.environ["OMP_NUM_THREADS"])
    more = {"lora_path": adapter[0]} if adapter else {}
    model: Any = Llama(file, n_ctx=256, n_threads=threads, n_threads_batch=threads, verbose=False, **more)
    for line in sys.stdin:
        prompt, new_tokens = json.loads(line)
        started = time.perf_counter(), time.process_time()
        model.reset()
        drawn = model.generate(prompt, top_k=0, top_p=1.0, min_p=0.0, temp=1.0, repeat_penalty=1.0)
        assert len(list(islice(drawn, new_tokens))) == new_tokens
        print(json.dumps([time.perf_counter() - started[0], time.process_time() - started[1]]), flush=True)


if __name__ == "__main__":
    main()
