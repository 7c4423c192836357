"""Clients that the algorithms are tested with: an engine without queue and thread, and what an update sends to it."""

import torch

from tensafe_nb.config import OptimizerConfig, TrainingConfig
from tensafe_nb.engine.engine import Engine
from tensafe_nb.futures import completed
from tensafe_nb.losses import resolve_loss
from tensafe_nb.rlvr import REINFORCE

TINY = TrainingConfig(model_ref="builtin:tiny", optimizer=OptimizerConfig(learning_rate=1e-3))


class EngineClient:
    """The policy client's verbs straight on an engine: no queue, no thread, weights in reach."""

    training_client_id = "tc-engine"

    def __init__(self, config=TINY):
        self.engine = Engine(config)
        self.operations = []
        self.batches = []
        self.capabilities = {"base_reference"} if config.lora_config else set()
        self.capabilities |= {"value_head"} if config.value_head else set()

    step = property(lambda self: self.engine.step)
    policy_version = property(lambda self: self.engine.policy_version)
    tokenizer = property(lambda self: self.engine.model.tokenizer)

    def sample(self, prompts, sampling):
        return self._done("sample", self.engine.sample(prompts, sampling))

    def forward_backward(self, batch, loss_fn, loss_kwargs):
        self.batches.append((batch, loss_fn, loss_kwargs))
        loss = resolve_loss(loss_fn, **loss_kwargs)
        loss.check(batch)
        return self._done("forward_backward", self.engine.forward_backward(batch, loss))

    def optim_step(self):
        return self._done("optim_step", self.engine.optim_step())

    def compute_logprobs(self, batch, reference=False, *, temperature=1.0):
        name = "reference_logprobs" if reference else "logprobs"
        return self._done(name, self.engine.compute_logprobs(batch, temperature, reference))

    def freeze_reference(self):
        return self._done("freeze_reference", self.engine.freeze_reference())

    def weights(self):
        return {name: p.detach().clone() for name, p in self.engine.model.causal.named_parameters()}

    def gradient(self):
        """Return what has been accumulated, flattened."""
        return torch.cat(
            [p.grad.flatten() for p in self.engine.model.causal.parameters() if p.grad is not None]
        )

    def _done(self, operation, result):
        self.operations.append(operation)
        return completed(result, operation=operation, training_client_id=self.training_client_id)


def policy_batch(batch, config):
    """Return what an update sends."""
    client = EngineClient()
    REINFORCE(config).update(batch, client)
    return client.batches[0][0]
