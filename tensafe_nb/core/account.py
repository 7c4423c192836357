"""What pays for a training client's private steps: its configuration, put to the ledger."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from tensafe_nb.config import TrainingConfig
from tensafe_nb.events import PrivacySpent
from tensafe_nb.privacy import noise
from tensafe_nb.privacy.ledger.account import Ledger
from tensafe_nb.privacy.ledger.charges import Charge, LedgerLog, Spent, account_name
from tensafe_nb.privacy.ledger.statement import PrivacyStatement
from tensafe_nb.privacy.tickets import DrawRegister

logger = logging.getLogger(__name__)

ADJACENCY = {
    "poisson": "add or remove one privacy unit",
    "worst_case": "blank one privacy unit, the schedule stays",
}
EVIDENCE = {"poisson": "toolkit sampler", "worst_case": "example ids"}
NOISE = f"{noise.NAME} (version {noise.VERSION})"


class PrivacyAccount:
    """The account of one training client.

    Args:
        log: Where the ledger's records are.
        config: Of the training client; it has a DPConfig.
        client_id: The training client.
    """

    def __init__(self, log: LedgerLog, config: TrainingConfig, client_id: str) -> None:
        assert config.dp_config is not None
        self._dp, self._config, self._client_id = config.dp_config, config, client_id
        self.draws: DrawRegister = log.draws
        size = self._dp.dataset_size
        if size is not None and self._dp.target_delta >= 1 / size:
            logger.warning(
                "DPConfig: target_delta=%g is not below 1 / dataset_size = %g: a mechanism that gives one example away "
                "whole could claim it. Choose it well below.",
                self._dp.target_delta, 1 / size,
            )  # fmt: skip
        self.ledger = Ledger(
            log,
            account_name(self._dp.dataset_id, client_id),
            delta=self._dp.target_delta,
            accountant_type=self._dp.accountant_type,
        )

    def spent(self) -> Spent:
        """Return how the account stands."""
        return self.ledger.state()

    def epsilon(self) -> float:
        """Return what is spent so far; infinite where there is no guarantee."""
        return self.spent().total_epsilon

    def enter_draw(self, unit: str) -> int:
        """Number a Poisson draw that is about to be made: from now on it is owed."""
        return self.draws.enter(self.ledger.account, self._charge(0, {}, unit, noised=True))

    def charge(
        self,
        step: int,
        participants: Mapping[str, int],
        unit: str,
        *,
        noised: bool,
        draw: int | None = None,
    ) -> None:
        """Pay for a step; see `Ledger.charge`."""
        charge = self._charge(step, participants, unit, noised)
        self.ledger.charge(charge, target_epsilon=self._dp.target_epsilon, draw=draw)

    def void(self, reason: str) -> None:
        """Give the guarantee up, for good."""
        self.ledger.void(reason, training_client_id=self._client_id)

    def carried(self) -> dict[str, Any]:
        """Return what a checkpoint takes along."""
        return self.ledger.carried()

    def adopt(self, carried: Mapping[str, Any]) -> None:
        """Take over what a checkpoint carried; its account is joined to this one."""
        self.ledger.adopt(carried, carried.get("head"), training_client_id=self._client_id)

    def statement(self) -> PrivacyStatement:
        """Return the privacy statement."""
        return PrivacyStatement.of(self.ledger, self._dp)

    def event(self, step: int, epsilon_before: float, *, refused: bool = False) -> PrivacySpent:
        """Return how the account stands after a step, as an event."""
        spent = self.spent()
        gained = spent.total_epsilon - epsilon_before
        return PrivacySpent(
            step=step,
            epsilon_spent=gained if math.isfinite(gained) else 0.0,
            total_epsilon=spent.total_epsilon,
            delta=self._dp.target_delta,
            target_epsilon=self._dp.target_epsilon,
            accountant=spent.accountant,
            adjacency=ADJACENCY[self._dp.sampling],
            projected_step=self._projected(step),
            refused=refused,
            void=spent.void,
        )

    def _projected(self, step: int) -> int | None:
        charge = self._charge(step + 1, {"": 1}, "example", noised=True)
        return self.ledger.projected_step(charge, self._dp.target_epsilon)

    def _charge(self, step: int, participants: Mapping[str, int], unit: str, noised: bool) -> Charge:
        dp = self._dp
        return Charge(
            mode=dp.sampling,
            noise_multiplier=dp.noise_multiplier if noised else 0.0,
            max_grad_norm=dp.max_grad_norm,
            expected_batch_size=self._config.expected_units,
            dataset_size=dp.dataset_size,
            participants=participants if dp.sampling == "worst_case" else {},
            unit=unit,
            noise_source=NOISE,
            sampling=EVIDENCE[dp.sampling],
            step=step,
            training_client_id=self._client_id,
        )
