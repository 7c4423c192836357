"""Declarations of losses, as plain data: by them a client refuses a wrong name or batch without torch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from tensafe_nb.config import LossConfig
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError, nearest
from tensafe_nb.protocol.batch import TICKET, BatchData
from tensafe_nb.protocol.codec import tagged
from tensafe_nb.protocol.operations import Forward, ForwardBackward, Operation

R = TypeVar("R")
ALWAYS_ALLOWED = frozenset(
    {"example_ids", "unit_ids", "record_id", TICKET}
)  # travel with a batch, no loss reads them

OF_PAIRS = ("margin_ranking", "contrastive", "dpo", "ipo")  # of those built in

FOREIGN = {  # what losses are called elsewhere
    "cross_entropy": "token_ce",
    "crossentropy": "token_ce",
    "cross_entropy_loss": "token_ce",
    "ce": "token_ce",
    "nll": "token_ce",
    "nll_loss": "token_ce",
    "sft": "token_ce",
    "causal_lm": "token_ce",
    "mse_loss": "mse",
    "l2": "mse",
    "infonce": "contrastive",
    "info_nce": "contrastive",
    "dpo_loss": "dpo",
    "ipo_loss": "ipo",
    "margin": "margin_ranking",
    "margin_ranking_loss": "margin_ranking",
    "reinforce": "policy_reinforce",
    "importance_sampling": "policy_is",
    "ppo": "policy_clip",
    "cispo": "policy_cispo",
}
_OF_YOUR_OWN = "It is not built in: write it as a function, and give it to @tn.register_loss"
ELSEWHERE = {  # what is called a loss elsewhere, and is none here
    "orpo": f"{_OF_YOUR_OWN}('orpo', group=2), so that a pair of rows stays together.",
    "kto": f"{_OF_YOUR_OWN}('kto').",
    "kl": "KL is a term of the losses of policies: loss_kwargs={'kl': {'coef': 0.01, 'estimator': 'k3'}}.",
    "grpo": "It is an algorithm, not a loss: RLVRTrainer(…, algo='grpo').",
}


def no_such_loss(name: str, known: Iterable[str]) -> ValidationError:
    """Return the error about the name of a loss, with what that means here, or else the nearest name."""
    folded, known = name.casefold().replace("-", "_"), list(known)
    meant = f" Here it is {FOREIGN[folded]!r}." if FOREIGN.get(folded) in known else ""
    advice = meant or (f" {ELSEWHERE[folded]}" if folded in ELSEWHERE else nearest(name, known))
    return ValidationError(f"There is no loss named {as_given(name)}.{advice}")


@tagged("loss_declaration")
@dataclass(frozen=True, slots=True)
class LossDeclaration:
    """A loss as its server declares it.

    Attributes:
        name: What it is registered as.
        keywords: Keywords it takes.
        required: Those of them it cannot do without.
        group: So many rows, one after the other, belong together.
        extras: Batch entries it needs besides; None accepts any.
        optional_extras: Batch entries it uses when they are there.
    """

    name: str
    keywords: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    group: int = 1
    extras: tuple[str, ...] | None = None
    optional_extras: tuple[str, ...] = ()

    def check_keywords(self, given: Mapping[str, Any]) -> None:
        """Refuse keywords that it has not, and the lack of those it needs.

        Raises:
            ValidationError: With the nearest spelling.
        """
        for keyword in given:
            if keyword not in self.keywords:
                raise ValidationError(
                    f"The loss {as_given(self.name)} has no keyword "
                    f"{as_given(keyword)}.{nearest(keyword, self.keywords)}"
                )
        for keyword in self.required:
            if keyword not in given:
                raise ValidationError(
                    f"The loss {as_given(self.name)} cannot be called without {keyword}=…. Keywords are given by "
                    f"loss_kwargs or resolve_loss."
                )

    def check_batch(self, batch: BatchData) -> None:
        """Refuse groups that are not whole, entries that are missing or would be dropped silently.

        Raises:
            ValidationError: Says which.
        """
        if len(batch) % self.group:
            raise ValidationError(
                f"The loss {as_given(self.name)} takes rows in groups of {self.group}, one after the other; "
                f"the batch has {len(batch)}. tensafe_nb.data.batches lays out pairs."
            )
        self.check_extras(set(batch.extras))

    def check_extras(self, names: set[str]) -> None:
        """Refuse what the loss would silently drop, and the lack of what it needs."""
        if self.extras is None:
            return
        known = {*self.extras, *self.optional_extras}
        for name in sorted(names - known - ALWAYS_ALLOWED):
            raise ValidationError(
                f"The loss {as_given(self.name)} does not use the batch entry {as_given(name)}.{nearest(name, known)}"
            )
        for name in sorted(set(self.extras) - names):
            raise ValidationError(
                f"The loss {as_given(self.name)} needs the batch entry {as_given(name)}; the batch has {sorted(names)}."
            )


def by_name(operation: Operation[R]) -> Operation[R]:
    """Return an operation whose loss, if it was resolved from a name, is that name with its keywords: to be sent."""
    loss: Any = getattr(operation, "loss_fn", None)
    spec = getattr(loss, "spec", None)
    if not isinstance(operation, ForwardBackward | Forward) or not isinstance(spec, str):
        return operation
    named: Any = replace(operation, loss_fn=spec, loss_kwargs={**loss.kwargs, **operation.loss_kwargs})
    return named  # type: ignore[no-any-return]


def check_loss(operation: Operation[Any], default: LossConfig, losses: Mapping[str, LossDeclaration]) -> None:
    """Refuse an operation whose loss a server does not know, or whose batch does not fit it.

    Raises:
        ValidationError: What, and the nearest spelling.
    """
    if not isinstance(operation, ForwardBackward | Forward):
        return
    asked, bound = operation.loss_fn, {}
    if asked is None:
        asked, bound = default.type, default.kwargs
    if not isinstance(asked, str) or (":" in asked and asked not in losses):
        raise ValidationError(
            f"The loss {as_given(asked)} is a function of this process, and a server does not run code that it is "
            f"sent. Take a registered name ({', '.join(sorted(losses))}), or train embedded: ServiceClient()."
        )
    if asked not in losses:
        raise no_such_loss(asked, losses)
    losses[asked].check_keywords({**bound, **operation.loss_kwargs})
    losses[asked].check_batch(operation.batch)
