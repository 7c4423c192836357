"""A training client that only talks: the test decides what it says, and when."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from tensafe_nb.chats.chat import ModelChat
from tensafe_nb.config import SamplingConfig, TrainingConfig
from tensafe_nb.events import Event
from tensafe_nb.futures import Pieces, Promise, handle_of
from tensafe_nb.history.state import ClientState
from tensafe_nb.protocol.results import ClientStatus, Prompt, SampledPiece, SampledSequence, SampleResult


@dataclass
class Asked:
    """A sample that is under way."""

    prompt: Prompt
    sampling: SamplingConfig
    promise: Promise[SampleResult] = field(default_factory=Promise)

    def say(self, *texts: str) -> None:
        """Hand out pieces."""
        self.promise.start()
        for text in texts:
            self.promise.add_piece(SampledPiece(0, text, (7,), (-0.5,), (-0.25,)))

    def end(self, finish_reason: str = "stop") -> None:
        self.promise.start()
        text = "".join(piece.text for piece in self.promise.pieces)
        sequence = SampledSequence(0, text, (1,), (7,), (-0.5,), (-0.25,), finish_reason, 0, None)
        self.promise.succeed(SampleResult((sequence,), 3))

    def fail(self, error: Exception) -> None:
        self.promise.start()
        self.promise.fail(error)


class FakeTalker:
    """A training client that answers nothing by itself.

    Args:
        name: Its id.
        template: Its model's chat template; None for a model without one.
        most_kept: So many prompts of the latest are remembered.
    """

    def __init__(self, name: str = "tc-1", template: str | None = "a template", most_kept: int = 100) -> None:
        self.training_client_id = name
        self.config = TrainingConfig(model_ref="builtin:tiny")
        self.status = ClientStatus.READY
        self.history: Any = SimpleNamespace(state=ClientState(entered=ClientStatus.READY))
        self.tokenizer: Any = SimpleNamespace(chat_template=template)
        self.context: int | None = None
        self.asked: list[Asked] = []
        self._most_kept = most_kept
        self.watchers: list[Callable[[Event], None]] = []

    def stream(self, prompt: Prompt, sampling: SamplingConfig | None = None) -> Pieces:
        assert sampling is not None
        asked = Asked(prompt, sampling)
        self.asked = [*self.asked, asked][-self._most_kept :]
        handle = handle_of(
            asked.promise, "sample", self.training_client_id, SampleResult, cancel=asked.promise.cancel
        )
        return Pieces(handle, asked.promise)

    def watch(self, subscriber: Callable[[Event], None]) -> Callable[[], None]:
        self.watchers.append(subscriber)
        return lambda: self.watchers.remove(subscriber)

    def answer(self, *texts: str) -> None:
        """Answer what was asked last."""
        self.asked[-1].say(*texts)
        self.asked[-1].end()


def chat_with(*talkers: FakeTalker, **options: Any) -> ModelChat:
    """Return a chat with talkers, all of whom are known to be loaded."""
    chat = ModelChat({talker.training_client_id: talker for talker in talkers}, **options)
    for column in chat.speakers:
        column.learn()
    return chat


def told(chat: ModelChat, said: str, *answers: str, talkers: Sequence[FakeTalker]) -> None:
    """Say something, and have each talker answer at once."""
    chat.say(said)
    for talker, answer in zip(talkers, answers, strict=True):
        talker.answer(answer)
