"""The reference policy: weights that stay as they were, for a KL penalty to pull towards."""

import contextlib
from collections.abc import Iterator, Mapping

from torch import Tensor

from tensafe_nb.config import LoRAConfig
from tensafe_nb.engine.models.bases import FACTOR_A
from tensafe_nb.engine.models.load import LoadedModel
from tensafe_nb.errors import ValidationError


class Reference:
    """The base under an adapter that began at zero; or, once frozen, a copy of the trained weights.

    Args:
        model: The model in training.
        lora: Its adapter; None when all weights are trained.
    """

    def __init__(self, model: LoadedModel, lora: LoRAConfig | None) -> None:
        self._model, self._lora = model, lora
        self.weights: dict[str, Tensor] | None = None
        self.version = 0

    def freeze(self, version: int) -> None:
        """Copy the trained weights, and the A beside a trained B, as they are now; `version` is theirs."""
        self.weights = {
            name: p.detach().clone()
            for name, p in self._model.causal.named_parameters()
            if p.requires_grad or FACTOR_A in name  # a frozen A may be loaded anew
        }
        self.version = version

    def restore(self, weights: Mapping[str, Tensor] | None, version: int) -> None:
        """Take the copy of a checkpoint, or none."""
        device = self._model.device
        self.weights = None if weights is None else {name: t.to(device) for name, t in weights.items()}
        self.version = version

    @contextlib.contextmanager
    def in_place(self, who: str = "compute_logprobs(reference=True)") -> Iterator[None]:
        """Let the model speak with the reference's weights for a while.

        Args:
            who: Asks for it, in an error.

        Raises:
            ValidationError: There is no reference.
        """
        if self.weights is not None:
            with self._swapped(self.weights):
                yield
            return
        self.check_base(who)
        # an adapter begins at B = 0: the base by itself is the policy before its first step
        frozen = [p for p in self._model.causal.parameters() if not p.requires_grad]
        try:
            with self._model.peft.disable_adapter():  # type: ignore[union-attr]
                yield
        finally:
            for parameter in frozen:  # PEFT lets all of an adapter be trained when it comes back
                parameter.requires_grad_(False)

    def check_base(self, who: str) -> None:
        """Refuse to take the base for the reference where training changes it, or there is no adapter to leave out.

        Raises:
            ValidationError: It is none; says how to make one.
        """
        how = "Call tc.freeze_reference() where the reference is to be the weights of that moment."
        if self._lora is None or self._model.peft is None:
            raise ValidationError(
                f"{who}: there is no reference: all weights are trained, and no copy is kept. {how}"
            )
        if self._lora.bias != "none":
            raise ValidationError(
                f"{who}: LoRAConfig.bias={self._lora.bias!r} trains the model's own biases "
                f"too, so that the base is not kept. {how}"
            )

    @contextlib.contextmanager
    def _swapped(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        parameters = {n: p for n, p in self._model.causal.named_parameters() if n in weights}
        # pointers are swapped, nothing is copied: the optimiser keeps its parameters, and the copy its tensors
        own = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = weights[name]
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = own[name]
