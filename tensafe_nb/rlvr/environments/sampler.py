"""A sampler whose rollouts are conversations with an environment."""

import random
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, get_args

from tensafe_nb.checks import checked
from tensafe_nb.config import Precision, SamplingConfig, SamplingEngine, check_engine
from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError
from tensafe_nb.rlvr.environments.environment import EnvironmentSpec, resolve_environment
from tensafe_nb.rlvr.environments.hosts import host_of
from tensafe_nb.rlvr.environments.play import Host, RowItem, Wait, play
from tensafe_nb.rlvr.environments.transcript import Scripts
from tensafe_nb.rlvr.policy import PRIVATE, PolicyClient
from tensafe_nb.rlvr.rollouts.prompts import Chat, PromptSpec, prompt_specs
from tensafe_nb.rlvr.rollouts.trajectories import TrajectoryBatch
from tensafe_nb.rlvr.scoring.processes import crew_of


class EnvironmentSampler:
    """Samples groups of conversations between a training client's current weights and an environment.

    Args:
        training_client: Whose policy speaks.
        environment: What it speaks with: an environment, a generator function, a registered name.
        group_size: Rollouts per row.
        max_new_tokens: Longest turn, in tokens.
        temperature: Divides the logits; 1 samples the policy itself.
        stop: Strings that end a turn.
        fixed_length: Every turn has `max_new_tokens`, and none counts as cut.
        chat: "auto" makes a text the message of a user where the model has a chat template, and sends it as it is where
            it has none; "never" sends it as it is; "always" insists on a template.
        seed: Makes the rollouts repeatable; None draws one for each batch.
        timeout: Seconds the environment may take for each turn; None calls it here, without a limit.
        processes: In which it plays, as for `Scorer`; conversations are divided among all of them.
        cluster: Where these are, if not on this machine, as for `Scorer`.
        precision: Of the weights that sample, as for `PolicySampler`.
        engine: What computes, likewise.

    Example:
        >>> sampler = EnvironmentSampler(tc, guess, group_size=8, max_new_tokens=8)
        >>> batch = sampler.generate_trajectories([{"n": 7}])
        >>> [turn.text for turn in batch[0].turns]
    """

    @checked
    def __init__(
        self,
        training_client: PolicyClient,
        environment: EnvironmentSpec,
        group_size: int = 8,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        *,
        stop: str | Sequence[str] | None = (),
        fixed_length: bool = False,
        chat: Chat = "auto",
        seed: int | None = None,
        timeout: float | None = 5.0,
        processes: int | None = None,
        cluster: Any = None,
        precision: Precision = "exact",
        engine: SamplingEngine = "torch",
    ) -> None:
        if chat not in get_args(Chat):
            raise ValidationError(
                f"chat={as_given(chat)} must be one of {', '.join(map(repr, get_args(Chat)))}."
            )
        self.environment = resolve_environment(environment)
        self.sampling = SamplingConfig(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            num_samples=group_size,
            stop=stop,  # type: ignore[arg-type]  # it takes a text and None too
            ignore_end=fixed_length,
            alone=True,
            precision=precision,
            engine=engine,
        )
        if engine != "torch":
            check_engine(self.sampling, training_client.config)
        self.chat, self.timeout = chat, timeout
        self._crew = crew_of("EnvironmentSampler: ", processes, cluster)
        self._client, self._seed = training_client, seed
        self._host: Host | None = None
        self._hosted: object = None  # what the host was made for
        self.draws = 0  # batches drawn so far: all there is to save

    def __repr__(self) -> str:
        client = self._client.training_client_id
        return f"EnvironmentSampler({client}, {self.environment!r}, {self.sampling!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate_trajectories(self, rows: Sequence[PromptSpec]) -> TrajectoryBatch:
        """Play and wait.

        Args:
            rows: Dicts of columns, of which `prompt` need not be one; a text or a chat is the column `prompt`.

        Raises:
            ValidationError: A row that is none of these, or a chat template that does not do for several turns.
        """
        return self.rollouts(prompt_specs(rows, read=RowItem.of), lambda handle: handle.result())

    def rollouts(self, rows: Sequence[PromptSpec], wait: Wait) -> TrajectoryBatch:
        """Play a conversation of each row as often as a group is large; `wait` waits for the policy."""
        seed = random.SystemRandom().getrandbits(48)
        if self._seed is not None:
            seed = random.Random(f"{self._seed}/{self.draws}").getrandbits(48)
        self.draws += 1
        return self.play(rows, self.sampling, seed, wait)

    def play(self, rows: Sequence[Any], sampling: SamplingConfig, seed: int, wait: Wait) -> TrajectoryBatch:
        """Play with another sampling and seed than its own, as evaluation does."""
        items = [RowItem.of(row) for row in rows]
        scripts = Scripts(self._client.tokenizer, self.chat)
        return play(self._client, self.environment, self._hosting(), items, sampling, scripts, seed, wait)

    def close(self) -> None:
        """End the processes of the environment, and whoever waits for them. Again: nothing."""
        host, self._host = self._host, None
        if host is not None:
            host.close()

    def hosting(self) -> Host:
        """Return a new host; for a model that trains privately, one in which no conversation knows of another."""
        private = PRIVATE in self._client.capabilities
        return host_of(self.environment, self.timeout, self._crew, apart=private)

    def _hosting(self) -> Host:
        """Return where generators live, made anew when the environment or what its code uses has changed."""
        hosted = self.environment.identity.digest
        if self._host is None or self._hosted != hosted:
            self.close()
            self._host, self._hosted = self.hosting(), hosted
        return self._host
