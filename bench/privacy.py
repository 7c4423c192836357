"""What privacy costs beside the training itself: a step's time and memory, against the same without and by Opacus."""

import contextlib
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import tensafe_nb as tn
from bench import workload
from bench.harness import LARGER, Row, Taken, Target, fresh_process, paired, stopwatch
from tensafe_nb.privacy.tickets import sealed, ticket
from tensafe_nb.protocol.batch import TICKET

ROWS, TOKENS = 8, 64
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LLAMA = "random Llama h=576, 10 layers, vocabulary 8192, LoRA r8 on q,k,v,o"
SIGMA, LIMIT = 1.0, 1.0


def step_tiny() -> Row:
    """Issue 26: at most 1.12 of the time without."""
    return _step("builtin:tiny", "all-linear", workload.MODEL, seconds=8)


def step_llama() -> Row:
    """Issue 26: at most 1.12 of the time without."""
    with random_llama() as folder:
        return _step(folder, ATTENTION, LLAMA, seconds=8)


def step_all_weights() -> Row:
    """Issue 26: at most 2 times the time without."""
    return _step("builtin:tiny", None, "builtin:tiny, all weights", seconds=7, limit=2.0)


def step_opacus() -> Row:
    """Our private step beside the one that Opacus makes of the same model through its own PrivacyEngine."""
    with random_llama() as folder, tn.ServiceClient() as service:
        batch = workload.full(ROWS, TOKENS)
        ours = private_step(client(service, folder, ATTENTION, private=True), batch)
        by_opacus = opacus_step(folder, batch)
        taken = paired(ours, by_opacus, seconds=8)
    return Row(
        what="private step through the client, the ledger's record included",
        peer="Opacus: PrivacyEngine.make_private (GradSampleModule, DPOptimizer), no ledger",
        precision="fp32",
        sizes=f"{LLAMA}, {ROWS}×{TOKENS}",
        taken=taken,
    )


def memory() -> Row:
    """Issue 8: at most 1.15 of the peak without."""
    with random_llama() as folder:
        ours, peer = ([peak_in_its_own_process(folder, private)] for private in (True, False))
    return Row(
        what="largest resident memory of a process that takes 5 private steps",
        peer="the same steps without privacy",
        precision="fp32",
        sizes=f"{LLAMA}, {ROWS}×{TOKENS}",
        unit="MiB",
        taken=Taken(ours, peer),
        compares=LARGER,
        target=Target("≤", 1.15),
    )


def accounting_step() -> Row:
    """Issue 8: at most 1 ms."""
    from tensafe_nb.privacy.ledger.account import Ledger

    with tempfile.TemporaryDirectory(prefix="tensafe-bench-privacy-") as folder:
        ledger, charge = Ledger(_log(Path(folder)), "client:tc-1", delta=1e-5), _charge()
        for _ in range(20):
            ledger.charge(charge)
        ledger.projected_step(charge, 8.0)

        def account() -> None:
            ledger.quote(charge)
            ledger.projected_step(charge, 8.0)

        taken = Taken([stopwatch(account)[0] for _ in range(2_000)][100:])
    return Row(
        what="RDP accounting of a step: the ledger looked at, epsilon after it, the last step of the budget",
        peer="",
        sizes="the vector of (σ, q) at hand; 158 orders",
        taken=taken,
        target=Target("≤", 1e-3, "ours"),
    )


def _step(model_ref: str, modules: Any, model: str, seconds: float, limit: float = 1.12) -> Row:
    batch = workload.full(ROWS, TOKENS)
    with tn.ServiceClient() as service:
        private, open_ = (client(service, model_ref, modules, private=p) for p in (True, False))
        taken = paired(private_step(private, batch), workload.step_through(open_, batch), seconds=seconds)
    return Row(
        what="forward_backward + optim_step with differential privacy, the ledger's record included",
        peer="the same step without",
        precision="fp32",
        sizes=f"{model}, {ROWS}×{TOKENS}",
        taken=taken,
        compares=LARGER,
        target=Target("≤", limit),
    )


def client(service: tn.ServiceClient, model_ref: str, modules: Any, *, private: bool) -> tn.TrainingClient:
    """Return a client whose model is loaded; without modules to adapt, it trains all weights."""
    lora = (
        tn.LoRAConfig(rank=workload.RANK, alpha=workload.ALPHA, target_modules=modules) if modules else None
    )
    dp = tn.DPConfig(noise_multiplier=SIGMA, max_grad_norm=LIMIT, dataset_size=10_000, target_epsilon=None)
    tc = service.create_training_client(
        model_ref=model_ref,
        lora_config=lora,
        optimizer={"learning_rate": workload.LEARNING_RATE, "weight_decay": workload.WEIGHT_DECAY},
        batch_size=ROWS,
        dtype="float32",
        device="cpu",
        dp_config=dp if private else None,
    )
    assert tc.tokenizer
    return tc


def private_step(tc: tn.TrainingClient, batch: tn.BatchData) -> Callable[[], float]:
    """Return one private step; each gets the batch as a Poisson draw of its own."""

    def step() -> float:
        number, key = tc._channel.enter_draw("example")
        mark = sealed(ticket(tc.training_client_id, 0, number, np.arange(ROWS)), batch, key)
        return workload.step_through(tc, batch.labelled_with(**{TICKET: mark}))()

    return step


def opacus_step(folder: str, batch: tn.BatchData) -> Callable[[], float]:
    """Return the private step that Opacus's users write."""
    import peft
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset
    from transformers import AutoModelForCausalLM

    adapter = peft.LoraConfig(
        r=workload.RANK,
        lora_alpha=workload.ALPHA,
        target_modules=list(ATTENTION),
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), adapter)
    model.train()
    rows = [torch.from_numpy(array) for array in (batch.input_ids, batch.attention_mask, batch.labels)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=workload.LEARNING_RATE, weight_decay=workload.WEIGHT_DECAY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its generator of random numbers, which is not secure
        model, optimizer, loader = PrivacyEngine().make_private(
            module=model,
            optimizer=optimizer,
            data_loader=DataLoader(TensorDataset(*rows), batch_size=ROWS),
            noise_multiplier=SIGMA,
            max_grad_norm=LIMIT,
            poisson_sampling=False,
        )

    def step() -> float:
        ((input_ids, mask, labels),) = loader
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        by_token = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # (B, T), -100 gives 0
        loss = (by_token.sum(1) / (labels != -100).sum(1)).mean()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of hooks on a module whose inputs need no gradient
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def peak_in_its_own_process(folder: str, private: bool) -> float:
    """Return MiB."""
    found: float = fresh_process(f"from bench import privacy; print(privacy.peak({folder!r}, {private}))")
    return found


def peak(folder: str, private: bool) -> float:
    """Take 5 steps and return the largest MiB that this process has had; on Linux."""
    batch = workload.full(ROWS, TOKENS)
    with tn.ServiceClient() as service:
        tc = client(service, folder, ATTENTION, private=private)
        step = private_step(tc, batch) if private else workload.step_through(tc, batch)
        for _ in range(5):
            step()
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (kib,) = (
        line.split()[1] for line in lines if line.startswith("VmHWM")
    )  # getrusage's comes from the parent
    return int(kib) / 1024


@contextlib.contextmanager
def random_llama() -> Iterator[str]:
    """Make a folder with a random model of 40 million weights."""
    import transformers

    from tensafe_nb.engine.models.load import ASSETS

    with tempfile.TemporaryDirectory(prefix="tensafe-bench-llama-") as folder:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=8192,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=10,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ASSETS / "tiny" / name, folder)
        yield folder


def _log(folder: Path) -> Any:
    from tensafe_nb.core.ledger import TenantLedger
    from tensafe_nb.store.audit.log import AuditLog
    from tensafe_nb.store.keys.keyring import Keys
    from tensafe_nb.store.sealed.tables import SealedTables

    keys = Keys(folder / "keys", "file", announce=lambda _: None)
    return TenantLedger(AuditLog(folder / "audit", keys), SealedTables(folder / "ledger", keys))


def _charge() -> Any:
    from tensafe_nb.privacy.ledger.charges import Charge

    return Charge(
        mode="poisson",
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=100,
        dataset_size=10_000,
        noise_source="bench",
        sampling="bench",
        step=1,
        training_client_id="tc-1",
    )
