"""The model that a canary audit trains: each canary is a token whose gradient is along a weight of its own.

It takes the same road as any model: `forward_backward` and `optim_step` of an engine with this DPConfig.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tensafe_nb.config import OptimizerConfig, TrainingConfig
from tensafe_nb.engine.engine import Engine
from tensafe_nb.engine.models.load import LoadedModel
from tensafe_nb.errors import ValidationError
from tensafe_nb.losses import resolve_loss
from tensafe_nb.privacy.audit_canary import PrivacyAudit, audit_of, check_audit
from tensafe_nb.privacy.tickets import DrawRegister, ticket
from tensafe_nb.protocol.batch import Array, BatchData

SIZE = 10.0  # norm of a canary's gradient before the clip, in units of C: far above, so that the clip acts
CLIENT = "audit"


class CanaryModel(nn.Module):
    """A linear read-out w of one-hot tokens: the gradient of w·x_i is x_i = size · e_i."""

    def __init__(self, canaries: int, size: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(canaries, canaries, _weight=size * torch.eye(canaries), _freeze=True)
        self.readout = nn.Linear(canaries, 1, bias=False)
        nn.init.zeros_(self.readout.weight)
        self.config = SimpleNamespace(to_dict=dict, max_position_embeddings=None)

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        """Return hidden states (B, T, m) and logits (B, T, 1), as a decoder and a model with a head do."""
        hidden = self.tokens(input_ids)
        return SimpleNamespace(last_hidden_state=hidden, hidden_states=(hidden,), logits=self.readout(hidden))

    def get_decoder(self) -> "CanaryModel":
        """Return itself: there is nothing but the embedding."""
        return self

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the one-hot tokens."""
        return self.tokens

    def get_output_embeddings(self) -> nn.Linear:
        """Return the read-out."""
        return self.readout


class Unpaid:
    """Pays for nothing: no data of anybody's is trained on."""

    draws: DrawRegister | None = None

    def epsilon(self) -> float:
        """Return 0."""
        return 0.0

    def charge(
        self,
        step: int,
        participants: Mapping[str, int],
        unit: str,
        *,
        noised: bool,
        draw: int | None = None,
    ) -> None:
        """Let the step pass."""


def audit(config: TrainingConfig, canaries: int, steps: int) -> PrivacyAudit:
    """Train on canaries with the clip, noise and sampling mode of a configuration, and compare who was in.

    Every canary that the coin put in takes part in every step: what is audited is clip, sum, noise and step, at the
    claim √T / σ, without amplification by sampling.

    Raises:
        ValidationError: The configuration has no differential privacy, or no noise.
    """
    dp = config.dp_config
    if dp is None or not dp.enabled:
        raise ValidationError("privacy_audit: this training client trains without differential privacy.")
    check_audit(canaries, steps, dp.noise_multiplier)
    engine = canary_engine(config, canaries)
    included = np.random.default_rng().random(canaries) < 0.5
    for step in range(steps):
        engine.forward_backward(canary_batch(np.flatnonzero(included), step), resolve_loss(readout))
        engine.optim_step()
    unit = dp.max_grad_norm / config.expected_units
    weights = engine.model.causal.readout.weight.detach()[0].double().numpy()
    return audit_of(-weights / unit, included, steps=steps, noise_multiplier=dp.noise_multiplier)


def canary_engine(config: TrainingConfig, canaries: int) -> Engine:
    """Return an engine that trains the read-out by plain gradient descent, as privately as a configuration says."""
    dp = config.dp_config
    assert dp is not None
    plain = OptimizerConfig(name="sgd", momentum=0.0, learning_rate=1.0, weight_decay=0.0)
    config = TrainingConfig(
        model_ref="canaries",
        optimizer=plain,
        dp_config=dp.replace(target_epsilon=None, expected_batch_size=config.expected_units),
        micro_batch_tokens=config.micro_batch_tokens,
    )
    model = CanaryModel(canaries, SIZE * dp.max_grad_norm)
    loaded = LoadedModel(model, None, None, torch.device("cpu"), torch.float32, split=True)
    engine = Engine(config, loaded)
    engine.train_privately(Unpaid(), CLIENT)
    return engine


def readout(outputs: Any, batch: Any) -> Tensor:
    """Return (B,) what the read-out says of each row's token: its gradient by the weights is the token."""
    rows: Tensor = outputs.full_logits[:, 0, 0]
    return rows


def canary_batch(tokens: Array, step: int) -> BatchData:
    """Return one row of one token for each canary, with the ticket of a whole draw."""
    ids = tokens[:, None]
    return BatchData(
        ids,
        labels=np.zeros_like(ids),
        extras={"example_ids": tokens, "dp_ticket": ticket(CLIENT, 0, step, np.arange(len(tokens)))},
    )
