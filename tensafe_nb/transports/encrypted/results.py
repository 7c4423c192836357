"""What an encrypted adapter and its model answer, with what went over the line for it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import NDArray

from tensafe_nb.display import as_given, shown
from tensafe_nb.errors import ValidationError
from tensafe_nb.protocol.results import SampledSequence


@shown
@dataclass(frozen=True, slots=True, eq=False)
class HEResult(NDArrayOperatorsMixin):
    """What an encrypted adapter adds to the outputs of its modules.

    Attributes:
        deltas: (S, d_out) by module, float64. numpy takes the result for the array where there is one.
        policy_version: Of the weights.
        tokens: That were encrypted.
        upload_bytes: Of the ciphertexts that went out.
        download_bytes: Of those that came back.
        note: "demonstration: both halves in one process", where that is so; else None.
    """

    deltas: Mapping[str, NDArray[np.float64]]
    policy_version: int
    tokens: int
    upload_bytes: int
    download_bytes: int
    note: str | None

    @property
    def delta(self) -> NDArray[np.float64]:
        """(S, d_out) of the one module that was asked for."""
        if len(self.deltas) != 1:
            raise ValidationError(
                f'There are several: result["{next(iter(self.deltas))}"], of {list(self.deltas)}.'
            )
        return next(iter(self.deltas.values()))

    def __getitem__(self, module: str) -> NDArray[np.float64]:
        if module not in self.deltas:
            raise ValidationError(f"result[{as_given(module)}]: there are the modules {list(self.deltas)}.")
        return self.deltas[module]

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        return getattr(ufunc, method)(*(one.delta if one is self else one for one in inputs), **options)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.delta, dtype=dtype) if copy else np.asarray(self.delta, dtype=dtype)


@shown
@dataclass(frozen=True, slots=True, eq=False)
class HELogits:
    """What the model says of prompts.

    Attributes:
        logits: (T, V) of each prompt, float32.
        policy_version: Of the weights.
        tokens: That were encrypted, for each of the chosen layers anew.
        upload_bytes: Of the ciphertexts that went out.
        download_bytes: Of those that came back.
        note: As of HEResult.
    """

    logits: tuple[NDArray[np.float32], ...]
    policy_version: int
    tokens: int
    upload_bytes: int
    download_bytes: int
    note: str | None

    def next_tokens(self, k: int = 5) -> list[list[int]]:
        """Return the k likeliest tokens behind each prompt, the likeliest first."""
        return [[int(token) for token in np.argsort(-one[-1], kind="stable")[:k]] for one in self.logits]


@shown
@dataclass(frozen=True, slots=True, eq=False)
class HEScores:
    """How likely the model finds prompts.

    Attributes:
        tokens_of: The tokens of each prompt.
        logprobs: Of each prompt, the log-probability of each of its tokens but the first.
        policy_version: Of the weights.
        tokens: That were encrypted, for each of the chosen layers anew.
        upload_bytes: Of the ciphertexts that went out.
        download_bytes: Of those that came back.
        note: As of HEResult.
    """

    tokens_of: tuple[tuple[int, ...], ...]
    logprobs: tuple[NDArray[np.float64], ...]
    policy_version: int
    tokens: int
    upload_bytes: int
    download_bytes: int
    note: str | None

    @property
    def totals(self) -> list[float]:
        """The log-probability of each prompt."""
        return [float(one.sum()) for one in self.logprobs]

    @property
    def perplexities(self) -> list[float]:
        """Of each prompt; that of a single token is not defined, and NaN."""
        return [math.exp(-one.mean()) if len(one) else math.nan for one in self.logprobs]


@shown
@dataclass(frozen=True, slots=True, eq=False)
class HESample:
    """What was drawn.

    Attributes:
        sequences: As of `tc.sample`.
        policy_version: Of the weights.
        tokens: That were encrypted, for each of the chosen layers anew.
        upload_bytes: Of the ciphertexts that went out.
        download_bytes: Of those that came back.
        note: As of HEResult.
    """

    sequences: tuple[SampledSequence, ...]
    policy_version: int
    tokens: int
    upload_bytes: int
    download_bytes: int
    note: str | None

    @property
    def texts(self) -> list[str]:
        """The completions' texts, in order."""
        return [sequence.text for sequence in self.sequences]
