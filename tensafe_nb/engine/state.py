"""The state of an engine as named tensors and plain facts, and back; a state that does not fit moves nothing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tensafe_nb.config import LoRAConfig, TrainingConfig
from tensafe_nb.engine.models.bases import frozen_hash
from tensafe_nb.engine.models.load import LoadedModel
from tensafe_nb.errors import ValidationError
from tensafe_nb.store.sealed.payload import PartStream
from tensafe_nb.store.sealed.tensors import TensorPart, read_entries

PARTS = (WEIGHTS, MOMENTS, WINDOW, REFERENCE) = (  # of an artifact
    "model.safetensors",
    "optimizer.safetensors",
    "accumulation.safetensors",
    "reference.safetensors",
)
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
Tensors: TypeAlias = dict[str, Tensor]


@dataclass(slots=True)
class EngineState:
    """What has to come back so that training goes on as if it had never stopped.

    Attributes:
        facts: Step, window, random streams, configuration: plain data.
        weights: Trained weights by parameter name.
        optimizer: Moments by "state.<number of the parameter>.<name>"; None when left out.
        gradients: Sums of an open accumulation window by parameter name.
        reference: Frozen weights of the reference policy; None where the base is the reference.
    """

    facts: dict[str, Any]
    weights: Tensors
    optimizer: Tensors | None
    gradients: Tensors = field(default_factory=dict)
    reference: Tensors | None = None

    @classmethod
    def of_parts(cls, facts: dict[str, Any], parts: Mapping[str, Tensors]) -> "EngineState":
        """Put a state together from its facts and the parts of an artifact that `read_part` has read."""
        return cls(facts, parts[WEIGHTS], parts.get(MOMENTS), parts.get(WINDOW, {}), parts.get(REFERENCE))

    def parts(self) -> dict[str, TensorPart]:
        """Return the tensors as parts of an artifact; what is empty or absent is left out."""
        tensors = zip(
            PARTS, (self.weights, self.optimizer, self.gradients or None, self.reference), strict=True
        )
        return {name: tensor_part(part) for name, part in tensors if part is not None}


def tensor_part(tensors: Mapping[str, Tensor]) -> TensorPart:
    """Return tensors as a part of an artifact; each is copied to the CPU when its turn comes."""
    return TensorPart(
        [(name, NAMES[t.dtype], tuple(t.shape), partial(bytes_of, t)) for name, t in tensors.items()]
    )


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, on the CPU and contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def read_part(stream: PartStream, size: int) -> Tensors:
    """Return the tensors of a part: what is in the file is opened into them."""
    entries = read_entries(stream, size)
    # on the CPU, whatever the user's default device is: what is filled must be the tensor, not a copy of it
    tensors = {e.name: torch.empty(e.shape, dtype=DTYPES[e.dtype], device="cpu") for e in entries}
    stream.fill([bytes_of(tensor) for tensor in tensors.values()])
    return tensors


def check(
    facts: Mapping[str, Any], config: TrainingConfig, base: str, artifact_id: str, *, with_moments: bool
) -> None:
    """Refuse a state that was saved by a client of another model, adapter or optimiser.

    Args:
        facts: Of the state.
        config: What is trained here.
        base: The fingerprint of the model here.
        artifact_id: Where the state lies.
        with_moments: Whether the optimiser's moments are to be taken over too.

    Raises:
        ValidationError: Lists every difference; `details["differences"]` holds them as well.
    """
    saved = TrainingConfig(**facts["config"])
    found = list(differences(saved, config, same_base=facts["base"] == base))
    if with_moments and saved.optimizer.name != config.optimizer.name:
        found.append(("optimizer.name", saved.optimizer.name, config.optimizer.name))
    if found:
        listed = "; ".join(f"{name}: {there!r} there, {here!r} here" for name, there, here in found)
        raise ValidationError(
            f"The checkpoint {artifact_id!r} does not fit this training client ({listed}). Nothing was loaded. "
            f"Create a client with the checkpoint's configuration: service.restore({artifact_id!r}).",
            details={"differences": [list(difference) for difference in found]},
        )


def fingerprint(model: LoadedModel) -> str:
    """Return a hash that tells base models apart; see `frozen_hash`."""
    return frozen_hash(model.causal, values=model.peft is not None)


def differences(
    saved: TrainingConfig, here: TrainingConfig, *, same_base: bool
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the fields that keep a state from fitting: name, value when it was saved, value here."""
    there, mine = saved.lora_config, here.lora_config
    if (there is None) != (mine is None):
        yield "lora_config", _adapter_name(there), _adapter_name(mine)
    elif not same_base:
        same_name = saved.model_ref == here.model_ref
        note = " (other weights under the same name)" if same_name else ""
        yield "model_ref", saved.model_ref, here.model_ref + note
    if saved.resize_embeddings != here.resize_embeddings:
        yield "resize_embeddings", saved.resize_embeddings, here.resize_embeddings
    if saved.value_head != here.value_head:
        yield "value_head", saved.value_head, here.value_head
    if there is not None and mine is not None:
        for name in LoRAConfig.model_fields:
            if name != "dropout" and getattr(there, name) != getattr(mine, name):
                yield f"lora_config.{name}", getattr(there, name), getattr(mine, name)


def _adapter_name(lora: LoRAConfig | None) -> str:
    return "all weights" if lora is None else f"LoRA of rank {lora.rank}"


def check_tensors(own: Mapping[str, Tensor], state: EngineState) -> None:
    """Refuse a state whose tensors are not those of a model's own weights, by name and shape."""
    expected = {name: tuple(p.shape) for name, p in own.items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.weights.items()}
    others = [*state.gradients.items(), *(state.reference or {}).items()]
    strays = {n for n, t in others if expected.get(n) != tuple(t.shape)}
    wrong = sorted({n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n)} | strays)
    if wrong:
        name = wrong[0]
        raise ValidationError(
            f"{len(wrong)} tensors of the checkpoint do not fit the model; the first is {name!r}: "
            f"{found.get(name, 'missing')} there, {expected.get(name, 'none')} here. Nothing was loaded."
        )
