"""Run as a script: the client's half of an encrypted adapter, which then waits with its activations in memory."""

import sys

import numpy as np

import tensafe_nb as tn

seed, tokens, width = map(int, sys.argv[2:])
x = np.random.default_rng(seed).normal(size=(tokens, width))
with tn.ServiceClient() as service:  # TENSAFE_BASE_URL, TENSAFE_API_KEY
    tc = service.get_training_client(sys.argv[1])
    with tc.he_adapter(modules=["q_proj", "v_proj"], tokens=64) as he:
        deltas = [he(x).result()["q_proj"] for _ in range(2)]
        assert np.allclose(*deltas, atol=1e-4 * np.abs(deltas[0]).max()) and np.abs(deltas[0]).max() > 0
        single = x.astype(np.float32)  # as a model would have them
        print("done", flush=True)
        sys.stdin.readline()
    service.get_training_client(sys.argv[1]).leave()
