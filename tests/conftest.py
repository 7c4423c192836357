"""What every test gets: its own home folder, one torch thread, no network beyond loopback, no leaked thread.

Nothing here is shared between processes: with pytest-xdist each worker has folders and models of its own.
"""

import gc
import os
import signal
import socket
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

# before torch: two spinning threads on a busy machine cost more
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TENSAFE_NB_RENDERER", "text")

import hypothesis
import pytest

import tensafe_nb as tn
from tests.forking import Forker

# Every run tries the same examples, however slow the machine is: pytest's own timeout is the only deadline there is.
hypothesis.settings.register_profile(
    "tests",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,  # a client that all examples of a test share is meant
    ],
)
hypothesis.settings.load_profile("tests")

# A shell has it ignored in what it starts in the background, and some tests interrupt a cell.
signal.signal(signal.SIGINT, signal.default_int_handler)

LOOPBACK = ("127.", "localhost", "::1", "/")

TESTS_BETWEEN_WHOLE_COLLECTIONS = 200

_tests_run = 0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, Any, Any]:
    """Take what imports and tests have left behind out of the collector's sight.

    Whenever a client is closed, and before another one loads its model, circles are looked for. Among the million
    objects of torch, transformers and pytest that takes a quarter of a second; among those of a test, nothing.
    """
    global _tests_run
    result = yield
    _tests_run += 1
    if _tests_run % TESTS_BETWEEN_WHOLE_COLLECTIONS == 1:
        gc.unfreeze()  # what a module or a session shared, and has let go of, is in circles too
    elif not any(gc.get_count()[1:]):
        return result  # it left next to nothing
    gc.collect()
    gc.freeze()
    return result


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSAFE_HOME", str(tmp_path / "home"))


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Refuse connections beyond this machine, as a laptop without network would."""
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        host = address if isinstance(address, str | bytes) else address[0]
        if not str(host).startswith(LOOPBACK):
            raise OSError(f"the tests have no network: {host}")
        connect(self, address)

    def guarded_resolve(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host and not str(host).startswith(LOOPBACK):
            raise socket.gaierror(f"the tests have no network: {host}")
        return resolve(host, *args, **kwargs)

    socket.socket.connect = guarded_connect  # type: ignore[method-assign, assignment]
    socket.getaddrinfo = guarded_resolve
    yield
    socket.socket.connect, socket.getaddrinfo = connect, resolve  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def _no_leaked_thread() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("tsnb-"):
            thread.join(timeout=60)  # what ends by itself may take a moment; what leaks fails
    assert [t.name for t in threading.enumerate() if t.name.startswith("tsnb-")] == []


@pytest.fixture(scope="session")
def forker() -> Iterator[Forker]:
    """Runs scripts in processes of their own."""
    forker = Forker({name: value for name, value in os.environ.items() if not name.startswith("TENSAFE_")})
    yield forker
    forker.close()


@pytest.fixture
def service() -> Iterator[tn.ServiceClient]:
    with tn.ServiceClient() as service:
        yield service


@pytest.fixture
def tc(service: tn.ServiceClient) -> tn.TrainingClient:
    """A LoRA client on the built-in model."""
    return service.create_training_client(
        lora_config=tn.LoRAConfig(rank=4), optimizer={"learning_rate": 1e-2}
    )


@pytest.fixture
def batch() -> tn.BatchData:
    return tn.BatchData(
        input_ids=[[5, 6, 7, 8], [9, 10, 11, 12]],
        labels=[[6, 7, 8, -100], [10, 11, 12, -100]],
    )


ARCHITECTURES = ("llama", "gpt2", "qwen2", "gemma2", "phi")


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that makes a folder with a random model of an architecture, with the tiny tokenizer."""
    import shutil

    import torch
    import transformers

    from tensafe_nb.engine.models.load import ASSETS

    made: dict[str, str] = {}
    shape = {
        "vocab_size": 2048,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "eos_token_id": 1,
        "bos_token_id": 0,
        "pad_token_id": 2,
    }
    configs = {
        "llama": lambda: transformers.LlamaConfig(**shape),
        "qwen2": lambda: transformers.Qwen2Config(**shape),
        "gemma2": lambda: transformers.Gemma2Config(**shape, head_dim=16, sliding_window=64),
        "phi": lambda: transformers.PhiConfig(**(shape | {"num_key_value_heads": 2})),
        "opt": lambda: transformers.OPTConfig(
            vocab_size=2048,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=128,
            dropout=0.0,
            attention_dropout=0.0,
        ),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=2048,
            n_embd=32,
            n_layer=2,
            n_head=2,
            n_positions=128,
            eos_token_id=1,
            bos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
    }

    def make(architecture: str) -> str:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            torch.manual_seed(0)
            config = configs[architecture]()
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(ASSETS / "tiny" / name, folder)
            made[architecture] = str(folder)
        return made[architecture]

    return make
