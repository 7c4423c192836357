"""The base of every live widget: what a page says goes into an inbox, what it is told comes from `tsnb-view`."""

import logging
from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from tensafe_nb.widgets.feed import Source, feed_of
from tensafe_nb.widgets.wire import Outbox

logger = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"


def esm(*names: str) -> str:
    """Join ES modules of `static/` into one: a page loads a widget's code as a blob, from which nothing can import."""
    lines = (
        line for name in names for line in (STATIC / f"{name}.js").read_text(encoding="utf-8").splitlines()
    )
    return "\n".join(line for line in lines if not line.startswith(("import {", "export {"))) + "\n"


def css(name: str) -> str:
    """Return a style sheet of `static/`."""
    return (STATIC / f"{name}.css").read_text(encoding="utf-8")


def view_bundle(widget: anywidget.AnyWidget) -> dict[str, Any]:
    """Return the output that mounts a view of a widget."""
    view = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
    return {"application/vnd.jupyter.widget-view+json": view}


class LiveWidget(anywidget.AnyWidget):
    """A widget fed by custom messages, so that its state, which notebooks may save, stays constant in size.

    Args:
        source: The training run or training client to show.
        traits: Initial values of public traits.
    """

    smoothing = traitlets.Float(
        0.8, min=0.0, max=0.999, help="Weight of the past in the smoothed curve, 0 for none."
    ).tag(sync=True)

    title = traitlets.Unicode(help="What is trained, in a few words.").tag(sync=True)

    def __init__(self, source: Source, **traits: Any) -> None:
        self.feed = feed_of(source)
        title = f"{self.feed.client.training_client_id} · {self.feed.description}"
        super().__init__(title=title, **traits)
        self._greeted = False
        self.pages = 0  # mounted so far; 0: no page ever said hello
        self._outbox = Outbox()
        self._inbox: deque[dict[str, Any]] = deque()
        self.on_msg(self._on_message)
        self.feed.watch(self)

    @property
    def shown(self) -> Sequence[str]:
        """The series to send: the curve and its held-out twin."""
        return self.feed.curve, f"eval/{self.feed.curve}"

    @property
    def live(self) -> bool:
        return bool(self._inbox) or not self.feed.over

    def flush(self) -> float | None:
        """Answer the page, then send it what is new; called by `tsnb-view` only."""
        try:
            while self._inbox:
                self._answer(self._inbox.popleft())
            if not self.pages:
                return None
            if self._greeted:  # the badge comes before a long history
                self._greeted = False
                self.send_status()
            for content, buffers in self._outbox.messages(self.feed.client.history, self.shown):
                self.send(content | self.stamp(), buffers)
            return self.send_status()
        except Exception as error:
            logger.exception("a widget could not be brought up to date")
            self.send({"t": "error", "text": f"The panel stumbled: {type(error).__name__}: {error}"})
            return None

    @abstractmethod
    def send_status(self) -> float | None:
        """Tell the page what else changed; return the seconds after which to be called again."""

    def stamp(self) -> dict[str, Any]:
        """Return what every stretch of a curve carries: when its last point was measured, in Unix milliseconds."""
        return {"at": round(self.feed.measured_at * 1000)}

    def obey(self, command: str) -> None:
        """Carry out what a button asks for.

        Raises:
            ValueError: There is no such command, or not now.
        """
        raise ValueError(f"This widget does not know {command!r}.")

    def greet(self, mounted: bool) -> None:
        """A page is new (`mounted`) or missed something: what it was told before does not count."""
        self.pages += mounted
        self._greeted = True
        self._outbox.start_over()

    def _on_message(self, _widget: object, content: dict[str, Any], _buffers: object) -> None:
        self._inbox.append(content)
        self.feed.view.wake(self, urgent=True)

    def _answer(self, content: dict[str, Any]) -> None:
        match content:
            case {"t": "hello"}:
                self.greet(mounted=bool(content.get("mount")))
            case {"t": "do", "do": str(command), "n": int(number)}:
                self.send({"t": "ack", "n": number, "why": self._refusal(command)})
            case _:
                logger.warning("a page sent what no widget understands: %r", content)

    def _refusal(self, command: str) -> str | None:
        try:
            self.obey(command)
        except ValueError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001  # whoever clicked must be told, whatever it was
            return f"{type(error).__name__}: {error}"
        return None
