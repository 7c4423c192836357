"""An encrypted adapter as a notebook holds it: activations are encrypted here, and applied where the adapter is.

    he(x) ─▶ queue ─▶ one thread: encrypt ─▶ EncryptedLine.apply ─▶ decrypt ─▶ the handle's result

Keys are made at the first call, for one connection, and live on no disk.
"""

import asyncio
import hashlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from tensafe_nb.config import SamplingConfig, TrainingConfig, joins
from tensafe_nb.data import read_prompts
from tensafe_nb.display import Facts, as_given, table
from tensafe_nb.errors import ValidationError
from tensafe_nb.futures import FutureHandle
from tensafe_nb.privacy.encrypted import HECost
from tensafe_nb.privacy.encrypted.client import checked_activations
from tensafe_nb.privacy.encrypted.cost import estimate_all
from tensafe_nb.privacy.encrypted.packing import packings_of
from tensafe_nb.privacy.encrypted.parameters import parameters_named
from tensafe_nb.privacy.encrypted.scheme import Vector, library
from tensafe_nb.protocol.encrypted import EncryptedOffer, EncryptedPart
from tensafe_nb.protocol.results import Prompt
from tensafe_nb.store.home import Home
from tensafe_nb.transports.base import Channel
from tensafe_nb.transports.encrypted.calls import CallQueue, Tick
from tensafe_nb.transports.encrypted.halves import MAX_ABS, Halves, Traffic
from tensafe_nb.transports.encrypted.results import HELogits, HEResult, HESample, HEScores

R = TypeVar("R")

DEMONSTRATION = "demonstration: both halves in one process"
MOST_TOKENS = 1 << 16  # of one call


class HEAdapter:
    """A training client's adapter that its core applies to activations it cannot read; `tc.he_adapter()` makes it.

    Calls run in their order on a thread of their own, beside the queue of the training client. Keys are made at the
    first of them, and dropped by `close()` or at the end of a `with`. It serves the weights as they were when it was
    made; once they have moved on, calls are refused until `refresh()`.

    Example:
        >>> he = tc.he_adapter(layers=[-1], modules=["q_proj"])
        >>> print(he.cost(tokens=64))
        >>> delta = (await he(x)).delta  # (S, d_in) → (S, d_out)
    """

    def __init__(
        self,
        owner: Any,
        channel: Channel,
        layers: Sequence[int] | int,
        modules: Sequence[str] | str | None,
        tokens: int | str,
        params: str,
    ) -> None:
        library()  # without tenseal, here
        parameters_named(params, "lora")
        packings_of(tokens)
        chosen, names = numbers_of(layers), names_of(modules)
        self._owner = owner  # which lives as long as this does
        line = channel.encrypted
        self._halves = Halves(line, chosen, names, params, tokens, line.offer(chosen, names))
        self._name = channel.training_client_id
        self._calls = CallQueue(f"tsnb-he-{self._name}", self._name, self._halves.drop)
        self._sampled = 0
        weakref.finalize(self, self._calls.end_soon).atexit = False

    # calls

    def __call__(self, x: Any) -> FutureHandle[HEResult]:
        """Apply the adapter to (S, d_in) activations: of the one layer that was chosen, see `he[layer]`.

        Raises:
            ValidationError: Several layers, or several inputs of one, were chosen; or activations that do not fit.
        """
        return self._only(self._halves.offer.parts)(x)

    def __getitem__(self, key: Any) -> "HEModules":
        """Return what can be called of it: `he[-1]` a layer, `he[-1, "q_proj"]` or `he["q_proj"]` a module."""
        layer, module = key if isinstance(key, tuple) and len(key) == 2 else (key, None)
        if isinstance(layer, str) and module is None:
            layer, module = None, layer
        offer = self._halves.offer
        numbers = tuple(range(offer.depth)) if layer is None else ()
        if type(layer) is int and -offer.depth <= layer < offer.depth:
            numbers = (layer % offer.depth,)
        parts = [part for part in offer.parts if part.layer in numbers]
        parts = [part for part in parts if module is None or module in part.modules]
        if not parts:
            asked = ", ".join(map(as_given, key)) if isinstance(key, tuple) else as_given(key)
            raise ValidationError(f"he[{asked}]: that was not chosen. There is {listed(offer.parts)}.")
        return self._only(parts, module)

    def _only(self, parts: Sequence[EncryptedPart], module: str | None = None) -> "HEModules":
        if len(parts) > 1:
            raise ValidationError(
                f"These read different inputs, and one call has one: {listed(parts)}. Name a layer and a module, such "
                f"as he[{parts[0].layer}, {module or parts[0].modules[0]!r}](x)."
            )
        return HEModules(self, parts[0], module)

    def _submit(
        self, operation: str, work: Callable[["HEAdapter", Tick], R], kind: type[R]
    ) -> FutureHandle[R]:
        # a call that waits keeps the adapter, and so its keys
        return self._calls.submit(operation, lambda tick: work(self, tick), kind)

    def _said(self, before: Traffic) -> dict[str, Any]:
        said = self._halves.traffic.since(before)
        return {**said, "policy_version": self.policy_version, "note": self.note}

    # about it

    def cost(self, tokens: int = 64) -> HECost:
        """Estimate one pass of so many tokens through all that was chosen; no key of yours is made for it.

        The times are those of this machine, also of what the server does.
        """
        halves = self._halves
        shapes = [part.shape for part in halves.offer.parts]
        return estimate_all(shapes, tokens, halves.params, packing=halves.tokens)

    @property
    def policy_version(self) -> int:
        """Version of the weights that are applied."""
        return self._halves.offer.policy_version

    @property
    def parts(self) -> tuple[EncryptedPart, ...]:
        """What is applied: modules of a layer that read one input, together."""
        return self._halves.offer.parts

    @property
    def note(self) -> str | None:
        """What a reader should know: that this is a demonstration, where both halves are in one process."""
        return DEMONSTRATION if self._halves.line.is_demonstration else None

    def refresh(self) -> FutureHandle[EncryptedOffer]:
        """Go on with the weights as they are now, behind the calls that wait; the keys stay."""
        return self._submit("he_refresh", lambda he, _: he._halves.refresh(), EncryptedOffer)

    # a model

    def model(self, base: str | None = None, *, device: str | None = None) -> "HEAdapterModel":
        """Return the whole model: its base runs here, in the clear, and the chosen layers' adapters there.

        The base is loaded in this process, which needs torch, and is compared with the one the adapter is for.

        Args:
            base: Folder or hub id of the base here; None takes the training client's `model_ref`.
            device: Of the base; None takes "auto", or what the training client of this process has.

        Raises:
            ValidationError: The training client has adapters elsewhere, which are not here; or another base.
            ModelLoadError: The base cannot be loaded.
        """
        return HEAdapterModel(self, base, device)

    # the end

    def close(self) -> None:
        """Cancel what waits, and drop the keys, here and at the other end; idempotent."""
        self._calls.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        await asyncio.to_thread(self.close)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _memo: object) -> Self:
        return self

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise ValidationError("An HEAdapter holds the keys of a connection, which never leave this process.")

    def __repr__(self) -> str:
        state = ", closed" if self._calls.closed else ""
        words = f"; {self.note}" if self.note else ""
        return (
            f"<HEAdapter of {self._name}, {listed(self.parts)}, {self._halves.params}, policy_version "
            f"{self.policy_version}{state}{words}>"
        )

    def _facts(self) -> Facts:
        halves = self._halves
        facts: dict[str, object] = {"training client": self._name, "chosen": listed(self.parts)}
        facts |= {"parameters": halves.params, "policy_version": self.policy_version}
        facts |= {"tokens": halves.traffic.tokens, "upload_bytes": halves.traffic.upload_bytes}
        facts |= {"download_bytes": halves.traffic.download_bytes}
        return facts | ({"note": self.note} if self.note else {})

    def _repr_html_(self) -> str:
        return table("HEAdapter", self._facts())


@dataclass(frozen=True, slots=True)
class HEModules:
    """Modules of one layer that read one input: called with it, they return what their adapters add.

    Attributes:
        adapter: Whose they are.
        part: They, and how they are stacked.
        module: The only one that is wanted; the others of the part are computed with it all the same.
    """

    adapter: HEAdapter
    part: EncryptedPart
    module: str | None

    def __call__(self, x: Any) -> FutureHandle[HEResult]:
        """Queue an encrypted call for (S, d_in) activations: numbers, or a tensor.

        Raises:
            ValidationError: Another shape, or values that are not finite or too large.
        """
        given = x.detach().cpu().float() if hasattr(x, "detach") else x
        activations = checked_activations(given, self.part.shape[0], MAX_ABS, MOST_TOKENS).copy()
        part, module = self.part, self.module

        def work(he: HEAdapter, tick: Tick) -> HEResult:
            before = replace(he._halves.traffic)
            deltas = he._halves.call(part, activations, tick)
            wanted = deltas if module is None else {module: deltas[module]}
            return HEResult(wanted, **he._said(before))

        return self.adapter._submit("he_apply", work, HEResult)

    def __repr__(self) -> str:
        d_in, d_out, rank = self.part.shape
        named = self.module or " and ".join(self.part.modules)
        return f"<layer {self.part.layer}, {named}: {d_in} → r{rank} → {d_out}>"


class HEAdapterModel:
    """A model whose base runs here and whose chosen layers have their adapters elsewhere; `he.model()` makes it."""

    def __init__(self, he: HEAdapter, base: str | None, device: str | None) -> None:
        offer = he._halves.offer
        if offer.elsewhere:
            few = ", ".join(offer.elsewhere[:5]) + (
                f" and {len(offer.elsewhere) - 5} more" if offer.elsewhere[5:] else ""
            )
            raise ValidationError(
                f"he.model(): the client trains {few} as well, which is not on this side: without it the model would "
                f"be another one. Choose all that it adapts (layers=…, modules=None), or train an adapter of those "
                f"layers alone: LoRAConfig(target_modules=…, layers_to_transform=…)."
            )
        config: TrainingConfig = he._owner.config
        here = he._halves.line.is_demonstration
        device = device or (config.device if here else "auto")
        of_base = TrainingConfig(
            model_ref=base or config.model_ref,
            dtype=config.dtype,
            device=device,  # type: ignore[arg-type]
            ignore_weights=config.ignore_weights,
            resize_embeddings=config.resize_embeddings,
        )
        try:
            from tensafe_nb.engine.models import encrypted
        except ImportError as error:
            raise ValidationError(
                f"he.model() runs the base model in this process, which needs torch and what stands on it ({error}): "
                f"pip install tensafe_nb, with its dependencies. he(x) needs none of it."
            ) from error
        self._he, self._seed = he, config.seed
        self._logprobs_of = encrypted.logprobs_of
        self._model = encrypted.EncryptedModel(of_base, Home.of_environment(), offer.parts, offer.base)

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        return self._model.model.tokenizer

    def logits(self, prompts: Prompt | Sequence[Prompt]) -> FutureHandle[HELogits]:
        """Compute what the model says behind each token of some prompts: texts, chats, or token ids."""
        ids = self._model.encoded(read_prompts(prompts), 0)

        def work(he: HEAdapter, tick: Tick) -> HELogits:
            before = replace(he._halves.traffic)
            found = tuple(one.copy() for one in self._model.logits(ids, apply_of(he, tick), tick))
            return HELogits(found, **he._said(before))

        return self._he._submit("he_logits", work, HELogits)

    def score(self, prompts: Prompt | Sequence[Prompt]) -> FutureHandle[HEScores]:
        """Compute the log-probability of each token of some prompts behind those before it."""
        ids = self._model.encoded(read_prompts(prompts), 0)

        def work(he: HEAdapter, tick: Tick) -> HEScores:
            before = replace(he._halves.traffic)
            said = self._model.logits(ids, apply_of(he, tick), tick)
            logprobs = tuple(self._logprobs_of(one, own) for one, own in zip(said, ids, strict=True))
            return HEScores(tuple(map(tuple, ids)), logprobs, **he._said(before))

        return self._he._submit("he_score", work, HEScores)

    @joins(SamplingConfig, "sampling")
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingConfig | None = None,
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        num_samples: int = 1,
        stop: str | Sequence[str] | None = (),
        seed: int | None = None,
        ignore_end: bool = False,
    ) -> FutureHandle[HESample]:
        """Draw completions, as `tc.sample` does: one encrypted call for each token and each chosen input.

        Args:
            prompts: Texts, chats, or token ids.
            sampling: How to draw; its fields are the keywords.
            max_new_tokens: Longest completion, in tokens.
            temperature: Divides the logits; 0 takes the most likely token.
            top_p: Keep the smallest set of tokens whose probability reaches this.
            top_k: Keep the k most likely tokens; 0 keeps all.
            num_samples: Completions per prompt.
            stop: Strings that end a completion; they are cut from its text.
            seed: Fixes every row's random stream; None takes the next one.
            ignore_end: Go on past end tokens.
        """
        assert sampling is not None  # the keywords are in it
        asked, read = sampling, read_prompts(prompts)
        self._model.encoded(read, asked.max_new_tokens)
        drawn = asked.seed
        if drawn is None:
            self._he._sampled += 1
            own = f"{self._seed}/he/{self._he._sampled}".encode()
            drawn = int.from_bytes(hashlib.blake2b(own, digest_size=6).digest(), "big")

        def work(he: HEAdapter, tick: Tick) -> HESample:
            before = replace(he._halves.traffic)
            found = self._model.sample(read, asked, drawn, apply_of(he, tick), tick)
            return HESample(tuple(found), **he._said(before))

        return self._he._submit("he_generate", work, HESample)

    def __repr__(self) -> str:
        return f"<HEAdapterModel of {self._he!r}>"


def apply_of(he: HEAdapter, tick: Tick) -> Callable[[EncryptedPart, Vector], dict[str, Vector]]:
    """Return what a model's layers ask, which tells no progress of its own."""
    return lambda part, x: he._halves.call(part, x, lambda _done, _total: tick(0, 0))


def listed(parts: Sequence[EncryptedPart]) -> str:
    """Say which modules of which layers there are."""
    return ", ".join(f"layer {part.layer} {' and '.join(part.modules)}" for part in parts)


def numbers_of(layers: Sequence[int] | int) -> tuple[int, ...]:
    """Return the numbers of layers as they were asked for.

    Raises:
        ValidationError: They are none.
    """
    given: tuple[Any, ...] = tuple(layers) if isinstance(layers, Sequence | np.ndarray) else (layers,)
    given = tuple(int(layer) if isinstance(layer, np.integer) else layer for layer in given)
    if not given or not all(type(layer) is int for layer in given):
        raise ValidationError(
            f"he_adapter: layers={as_given(layers)} must be numbers of layers, such as [-1] for the last one."
        )
    return given


def names_of(modules: Sequence[str] | str | None) -> tuple[str, ...] | None:
    """Return the names of modules as they were asked for; None for all.

    Raises:
        ValidationError: They are none.
    """
    if modules is None:
        return None
    given = (
        (modules,) if isinstance(modules, str) else tuple(modules) if isinstance(modules, Sequence) else ()
    )
    if not given or not all(isinstance(name, str) and name for name in given):
        raise ValidationError(
            f'he_adapter: modules={as_given(modules)} must be names such as ["q_proj", "v_proj"], or None for all that '
            f"is adapted."
        )
    return tuple(dict.fromkeys(given))
