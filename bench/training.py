"""One training step through the client against the loop that one would write by hand."""

import warnings
from collections.abc import Callable
from functools import reduce
from operator import add

import peft
import torch
import torch.nn.functional as F

import tensafe_nb as tn
from bench import workload
from bench.harness import LARGER, Row, Taken, Target, paired

ROWS, TOKENS = 8, 64
LOADS = 4  # where its weights happen to lie in memory makes a model up to 10 % faster or slower: load it anew


def all_labelled() -> Row:
    """Issue 2: at least 0.97 of the speed by hand. Without padding and with every label, nothing can be saved."""
    batch = workload.full(ROWS, TOKENS)
    return _step(batch, f"{ROWS}×{TOKENS}, every position labelled", 12, Target("≥", 0.97))


def ragged() -> Row:
    batch = workload.ragged(ROWS, TOKENS)
    return _step(batch, f"{ROWS} × {TOKENS // 2} to {TOKENS}, padded on the right, every token labelled", 6)


def quarter_labelled() -> Row:
    batch = workload.full(ROWS, TOKENS, labelled=0.25)
    return _step(batch, f"{ROWS}×{TOKENS}, 25 % of the positions labelled", 6)


def recomputed() -> Row:
    """No target: what computing activations again takes."""
    batch = workload.full(ROWS, TOKENS)
    with tn.ServiceClient() as service:
        again, kept = (
            workload.step_through(workload.tiny_client(service, gradient_checkpointing=on), batch)
            for on in (True, False)
        )
        assert again() == kept(), "the two sides do not compute the same loss"
        taken = paired(again, kept, seconds=6)
    return Row(
        what="forward_backward + optim_step through the client, `gradient_checkpointing=True`",
        peer="the same without",
        precision="fp32",
        sizes=f"{workload.MODEL}, {ROWS}×{TOKENS}, every position labelled, fused AdamW",
        taken=taken,
        compares=LARGER,
    )


def _step(batch: tn.BatchData, shape: str, seconds: float, target: Target | None = None) -> Row:
    parts = [_pairs(batch, seconds / LOADS) for _ in range(LOADS)]
    return Row(
        what="forward_backward + optim_step through the client",
        peer="the same loop by hand in torch + PEFT",
        precision="fp32",
        sizes=f"{workload.MODEL}, {shape}, fused AdamW",
        taken=reduce(add, parts),
        target=target,
    )


def _pairs(batch: tn.BatchData, seconds: float) -> Taken:
    """Load both sides and take pairs."""
    with tn.ServiceClient() as service:
        ours = workload.step_through(workload.tiny_client(service), batch)
        peer = by_hand(adapted(workload.plain_model("tiny"), workload.RANK, workload.ALPHA), batch)
        assert abs(ours() - peer()) < 1e-4, "the two sides do not compute the same loss"
        return paired(ours, peer, seconds=seconds)


def by_hand(model: torch.nn.Module, batch: tn.BatchData) -> Callable[[], float]:
    """Return one step on the same model with the same settings, which reads the loss as a number too."""
    model.train()
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=workload.LEARNING_RATE,
        weight_decay=workload.WEIGHT_DECAY,
        fused=True,
    )
    input_ids, attention_mask, labels = map(
        torch.from_numpy, (batch.input_ids, batch.attention_mask, batch.labels)
    )

    def step() -> float:
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def adapted(model: torch.nn.Module, rank: int, alpha: float) -> torch.nn.Module:
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own about tied weights
        return peft.get_peft_model(model, settings)
