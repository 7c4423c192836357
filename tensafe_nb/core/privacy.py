"""Privacy in the core: each private client pays for its steps from an account, and no account is forgotten.

A client without differential privacy that took over private weights carries their account along: its first step on
them ends that account's guarantee, for everybody who shares it.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

from tensafe_nb.config import TrainingConfig
from tensafe_nb.engine.engine import Engine
from tensafe_nb.errors import ValidationError
from tensafe_nb.events import PrivacySpent
from tensafe_nb.privacy import noise
from tensafe_nb.privacy.ledger.account import Ledger, without_tables
from tensafe_nb.privacy.ledger.charges import Charge, LedgerLog, Spent, account_name
from tensafe_nb.privacy.ledger.statement import PrivacyStatement
from tensafe_nb.privacy.tickets import DrawRegister
from tensafe_nb.protocol.results import DPMetrics, OptimStepResult, VoidPrivacyResult

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
        # delta >= 1/N permits (0, delta): publish each example with probability delta, and one is expected to be out.
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
        # A step like those before it; under worst-case accounting, that of one unit which takes part each time.
        next_charge = self._charge(step + 1, {"": 1}, "example", noised=True)
        return PrivacySpent(
            step=step,
            epsilon_spent=gained if math.isfinite(gained) else 0.0,
            total_epsilon=spent.total_epsilon,
            delta=self._dp.target_delta,
            target_epsilon=self._dp.target_epsilon,
            accountant=spent.accountant,
            adjacency=ADJACENCY[self._dp.sampling],
            projected_step=self.ledger.projected_step(next_charge, self._dp.target_epsilon),
            refused=refused,
            void=spent.void,
        )

    def _charge(self, step: int, participants: Mapping[str, int], unit: str, noised: bool) -> Charge:
        dp = self._dp
        return Charge(
            mode=dp.sampling,
            noise_multiplier=dp.noise_multiplier if noised else 0.0,
            max_grad_norm=dp.max_grad_norm,
            expected_batch_size=self._config.expected_units,
            dataset_size=dp.dataset_size,
            participants=participants if dp.sampling == "worst_case" else {},  # who was drawn stays secret
            unit=unit,
            noise_source=NOISE,
            sampling=EVIDENCE[dp.sampling],
            step=step,
            training_client_id=self._client_id,
        )


class Guarantee:
    """The privacy guarantee of one training client, or its absence.

    Args:
        log: Where the ledger's records are.
        config: Of the training client.
        client_id: The training client.
    """

    def __init__(self, log: LedgerLog, config: TrainingConfig, client_id: str) -> None:
        self._log, self._client_id = log, client_id
        private = config.dp_config is not None and config.dp_config.enabled
        self.account = PrivacyAccount(log, config, client_id) if private else None
        self.metrics: DPMetrics | None = None
        self._inherited: Mapping[str, Any] | None = None

    def attach(self, engine: Engine) -> None:
        """Let an engine train privately, on this account."""
        if self.account is not None:
            engine.train_privately(self.account, self._client_id)

    def carried(self) -> Mapping[str, Any] | None:
        """Return what a checkpoint takes along: the account of the weights in it."""
        return self._inherited if self.account is None else self.account.carried()

    def take_over(self, carried: Mapping[str, Any] | None) -> None:
        """Answer for weights that are about to be loaded.

        Raises:
            ValidationError: This client is private, and the weights come with no account: what they hold of the data
                is unknown.
            LedgerError: The ledger cannot be read or written.
        """
        if self.account is None:
            self._inherited = None if carried is None else without_tables(carried)
        elif carried is None:
            raise ValidationError(
                "These weights were trained without differential privacy: no noise covers what they hold of their "
                "data. Nothing was loaded. If that data is public, export them "
                "(service.export_adapter(…, merged=True)) and take the folder as model_ref of a private client."
            )
        else:
            self.account.adopt(carried)

    def take_back(self, carried: Mapping[str, Any] | None) -> None:
        """Go on with the account of this client's own weights: of private ones the ledger itself has all of it."""
        if self.account is None:
            self.take_over(carried)

    def before_step(self) -> None:
        """End the guarantee of an inherited account: a step without noise is about to be taken on its weights."""
        if self.account is None and self._inherited is not None:
            ledger = Ledger(self._log, str(self._inherited["account"]), delta=1e-5)
            reason = f"{self._client_id} went on from its weights without differential privacy"
            ledger.void(reason, training_client_id=self._client_id)
            self._inherited = None

    def void(self, reason: str) -> VoidPrivacyResult:
        """Give the guarantee up.

        Raises:
            ValidationError: There is none.
        """
        if self.account is None:
            raise ValidationError("void_privacy(): this client trains without differential privacy.")
        self.account.void(reason)
        return VoidPrivacyResult(reason, math.inf)

    def enter_draw(self, unit: str) -> tuple[int, bytes]:
        """Number a Poisson draw that is about to be made, and return the key of its ticket's hashes.

        Raises:
            ValidationError: There is no account to charge it to.
        """
        if self.account is None:
            raise ValidationError("dp_batches(): this client trains without differential privacy.")
        return self.account.enter_draw(unit), self.account.draws.key

    def statement(self) -> PrivacyStatement:
        """Return the privacy statement.

        Raises:
            ValidationError: There is nothing to state.
        """
        if self.account is None:
            raise ValidationError(
                "privacy_statement(): this client trains without differential privacy, and claims none."
            )
        return self.account.statement()

    def after_step(self, result: OptimStepResult) -> list[PrivacySpent]:
        """Return what to tell of a step."""
        self.metrics = result.dp_metrics
        if self.account is None or result.dp_metrics is None:
            return []
        before = result.dp_metrics.total_epsilon - result.dp_metrics.epsilon_spent
        return [self.account.event(result.step, before)]

    def standing(self, step: int, *, refused: bool = False) -> list[PrivacySpent]:
        """Return what to tell of how things stand without a step."""
        if self.account is None:
            return []
        return [self.account.event(step, self.account.epsilon(), refused=refused)]
