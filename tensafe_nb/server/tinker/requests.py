"""The JSON requests of the protocol; what a newer SDK may add is left unread."""

from collections.abc import Mapping
from typing import Any, Literal

import pydantic

from tensafe_nb.errors import ValidationError

Name = pydantic.Field(min_length=1, max_length=200)


class WireRequest(pydantic.BaseModel):
    """Base of all requests."""

    model_config = pydantic.ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    @classmethod
    def read(cls, data: Any) -> "Any":
        """Check what came.

        Raises:
            ValidationError: It does not fit; says where.
        """
        try:
            return cls.model_validate(data)
        except pydantic.ValidationError as error:
            told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
            raise ValidationError(f"The request does not read: {told}.") from error


class SessionRequest(WireRequest):
    """create_session, session_heartbeat."""

    session_id: str = ""
    user_metadata: Mapping[str, Any] | None = None


class LoraRequest(WireRequest):
    """What of a model to adapt."""

    rank: int = pydantic.Field(gt=0)
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class ModelRequest(WireRequest):
    """create_model."""

    session_id: str
    model_seq_id: int
    base_model: str
    user_metadata: Mapping[str, Any] | None = None
    lora_config: LoraRequest | None = None
    optimizer_config: Mapping[str, Any] = {"type": "adamw"}


class AdamRequest(WireRequest):
    """The settings of one step."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class StepRequest(WireRequest):
    """optim_step."""

    model_id: str
    seq_id: int
    adam_params: AdamRequest | None = None
    optimizer_params: Mapping[str, Any] | None = None


class SaveRequest(WireRequest):
    """save_weights, save_weights_for_sampler."""

    model_id: str
    seq_id: int
    path: str | None = pydantic.Field(default=None, max_length=100, pattern=r"^[A-Za-z0-9_.-]+$")
    sampling_session_seq_id: int | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    ttl_seconds: int | None = pydantic.Field(default=None, gt=0)
    overwrite: bool = False
    user_metadata: Mapping[str, Any] | None = None


class LoadRequest(WireRequest):
    """load_weights, in place or as a model's first request."""

    path: str
    optimizer: bool
    model_id: str | None = None
    seq_id: int | None = None
    session_id: str | None = None
    model_seq_id: int | None = None
    base_model: str | None = None
    user_metadata: Mapping[str, Any] | None = None
    optimizer_config: Mapping[str, Any] | None = None


class SamplerRequest(WireRequest):
    """create_sampling_session."""

    session_id: str
    sampling_session_seq_id: int
    base_model: str | None = None
    model_path: str | None = None


class ChunkRequest(WireRequest):
    """A part of a prompt."""

    type: str = "encoded_text"
    tokens: tuple[int, ...] = ()


class PromptRequest(WireRequest):
    """A prompt."""

    chunks: tuple[ChunkRequest, ...]


class SamplingParams(WireRequest):
    """How to draw."""

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | tuple[str, ...] | tuple[int, ...] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class SampleRequest(WireRequest):
    """asample."""

    sampling_session_id: str
    seq_id: int | None = None
    num_samples: int = 1
    prompt: PromptRequest
    sampling_params: SamplingParams
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: Any = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
