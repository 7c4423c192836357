"""A column of a chat: a training client under a name, and how it reads a conversation."""

import bisect
from collections.abc import Callable
from typing import Any, Protocol

from tensafe_nb.chats.turns import TurnAnswer, prompt_of, read_before
from tensafe_nb.config import SamplingConfig, TrainingConfig
from tensafe_nb.data.labels import encode_prompt
from tensafe_nb.events import Event
from tensafe_nb.futures import Pieces
from tensafe_nb.history.log import RunHistory
from tensafe_nb.protocol.results import ClientStatus, Prompt, RunStatus


class Talker(Protocol):
    """A training client, as far as it talks."""

    @property
    def training_client_id(self) -> str: ...
    @property
    def config(self) -> TrainingConfig: ...
    @property
    def status(self) -> ClientStatus: ...
    @property
    def history(self) -> RunHistory: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def context(self) -> int | None: ...
    def stream(self, prompt: Prompt, sampling: SamplingConfig | None = None) -> Pieces: ...
    def watch(self, subscriber: Callable[[Event], None]) -> Callable[[], None]: ...


class ChatColumn:
    """A training client under a name.

    Attributes:
        name: Above its answers.
        client: Who answers.
        templated: Whether its model has a chat template; None until the model is loaded. Without one it continues the
            text as it stands.
    """

    def __init__(self, name: str, client: Talker) -> None:
        self.name, self.client = name, client
        self.templated: bool | None = None
        self._tokenizer: Any = None
        self._context: int | None = None

    def learn(self) -> None:
        """Wait for the model to be loaded, and see how it reads; at once where that is known.

        Raises:
            TGTinkerError: It could not be loaded.
        """
        if self.templated is None:
            self._tokenizer, self._context = self.client.tokenizer, self.client.context
            self.templated = getattr(self._tokenizer, "chat_template", None) is not None

    def draw(self, answer: TurnAnswer, sampling: SamplingConfig) -> Pieces:
        """Have an answer drawn: the oldest turns that do not fit into the model's context are left out."""
        before = read_before(answer.turn, answer.column)

        def prompt_from(first: int) -> Prompt:
            return prompt_of(answer.turn, before[first:], bool(self.templated))

        if self._context is not None:
            most = self._context - min(sampling.max_new_tokens, self._context // 2)  # tokens of the prompt

            def length(first: int) -> int:
                return len(encode_prompt(self._tokenizer, prompt_from(first)))

            lowest = self._left_out_before(answer)
            if length(lowest) > most:
                turns = range(lowest, len(before))
                lowest += bisect.bisect_left(turns, True, key=lambda first: length(first) <= most)
            answer.left_out = lowest
            room = self._context - length(lowest)
            if 0 < room < sampling.max_new_tokens:
                sampling = sampling.replace(max_new_tokens=room)
        return self.client.stream(prompt_from(answer.left_out), sampling)

    @staticmethod
    def _left_out_before(answer: TurnAnswer) -> int:
        """Return how many turns were left out for the answer before: a conversation only grows."""
        before = answer.turn.before[answer.column]
        return 0 if before is None or not before.is_read else before.left_out

    @property
    def about(self) -> str:
        """The model, what is trained of it, and how far, in a few words."""
        config, step = self.client.config, self.client.history.state.step
        adapter = f"LoRA r{config.lora_config.rank}" if config.lora_config else "all weights"
        return f"{config.model_ref} · {adapter} · step {step}"

    @property
    def trouble(self) -> str:
        """Why it cannot answer, if it cannot."""
        state = self.client.history.state
        match self.client.status:
            case ClientStatus.TERMINATED:
                return f"{self.client.training_client_id} is closed: it answers no more."
            case ClientStatus.ERROR:
                return f"{self.client.training_client_id} failed: {state.reason or 'its worker has ended'}"
        return f"the line to its server is {state.line.state}: {state.line.reason}" if state.line else ""

    @property
    def remarks(self) -> list[str]:
        """What must be known of how it reads and what it costs."""
        found = []
        if self.templated is False:
            found.append("no chat template: it continues the text as it stands, without roles")
        dp = self.client.config.dp_config
        if dp is not None and dp.enabled:
            found.append("differential privacy: talking spends no ε")
        return found

    def waiting(self, answer: TurnAnswer) -> str:
        """Say what an answer without a first token waits for."""
        if answer.handle is None:
            return "the model is being loaded"
        position = answer.handle.queue_position
        if position is None:
            return "reading"
        state = self.client.history.state
        running, run = state.queue.first, state.latest_run
        behind = [f"{running.operation}, which is running"] if running else []
        behind += [f"{position} more" if behind else f"{position} operations"] if position else []
        words = f"waits for its turn behind {', and '.join(behind)}" if behind else "waits for its turn"
        if run is None or run.state is not RunStatus.RUNNING:
            return words
        of = "" if run.planned_steps is None else f" of {run.planned_steps}"
        return f"{words} (run {run.run_id.rpartition('/')[2]}: step {run.steps_done}{of})"
