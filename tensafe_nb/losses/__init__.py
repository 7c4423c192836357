"""Loss functions: `resolve_loss`, `register_loss`, and what a loss sees."""

from tensafe_nb.losses import builtin, policy  # noqa: F401  # fills the registry
from tensafe_nb.losses.base import (
    Loss,
    get_registered_losses,
    register_loss,
    resolve_loss,
)
from tensafe_nb.losses.views import LossOutputs

__all__ = ["Loss", "LossOutputs", "get_registered_losses", "register_loss", "resolve_loss"]
