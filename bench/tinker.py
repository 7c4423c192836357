"""What the protocol of the tinker SDK adds: its pipelined steps beside those of our own client, on one server."""

import os

import tensafe_nb as tn
from bench import workload
from bench.harness import LARGER, ROOT, Row, Skipped, Taken, Target, beside, paired
from bench.remote import served

VERSION = "0.38.0"
STEPS, ROWS, TOKENS = 20, 4, 32


def pipelined_steps() -> Row:
    """Issue 24: at most 1.3."""
    python = ROOT / f".venv-tinker-{VERSION}" / "bin" / "python"
    if not python.exists():
        raise Skipped("needs the tinker SDK: make tinker-parity")
    with served("--tinker") as (service, _):
        tc = workload.tiny_client(service)
        for name, value in address_of(service).items():
            os.environ[name] = value
        with beside(python, ROOT / "scripts" / "tinker_programs.py", "turns") as ask:
            taken = paired(lambda: ask(STEPS), lambda: steps_of(tc), seconds=10, at_least=6, warmup=2)
        tc.close()
    return Row(
        what=f"{STEPS} pipelined steps of the tinker SDK {VERSION} against a server, to the last result",
        peer="the same steps through our own client",
        precision="fp32",
        sizes=f"{workload.MODEL}, {ROWS}×{TOKENS}, each target's logprob with every step",
        taken=Taken(taken.ours, taken.peer),  # the CPU of the SDK is another process's
        compares=LARGER,
        target=Target("≤", 1.3),
    )


def steps_of(tc: tn.TrainingClient) -> None:
    """Queue all steps as the SDK does, and wait for the results."""
    batch = {"input_ids": [list(range(5, 5 + TOKENS))] * ROWS}
    handles = []
    for _ in range(STEPS):
        handles.append(tc.forward_backward(batch, return_logprobs=True))
        handles.append(tc.optim_step(learning_rate=1e-4))
    for handle in handles:
        handle.result()


def address_of(service: tn.ServiceClient) -> dict[str, str]:
    """Return how the SDK finds the server that a client of ours has found."""
    requests = service._transport._requests  # type: ignore[attr-defined]
    token = requests._options["headers"]["authorization"].removeprefix("Bearer ")
    return {
        "TINKER_BASE_URL": f"{requests.url}/tinker",
        "TINKER_API_KEY": f"tml-{token}",
        "TINKER_MODEL": "builtin:tiny",
        "OMP_NUM_THREADS": "1",
    }
