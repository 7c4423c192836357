"""Every error that leaves the package.

TGTinkerError
├── ValidationError (ValueError)            something the caller gave does not fit; says what, where, what next
│   └── PrivacyUnitError                    a batch or loss whose rows cannot be told apart: no privacy
├── ModelLoadError                          a model_ref that cannot be loaded; the client is in ERROR
├── NonFiniteLossError                      a loss, gradient or logit that is NaN or infinite; weights untouched
├── InsufficientMemoryError                 an operation that did not fit; the client lives on
├── ClusterError                            no replica of a training client is left, or none can be started
├── ClientClosedError                       an operation after close()
├── QueueFullError                          too many operations are waiting
├── RewardError                             a reward function that failed on a rollout
├── StorageError                            the home folder could not be written or read; what was there is intact
├── DecryptionError                         a wrong key or an altered file: one message for both; nothing was loaded
│   └── KeyUnavailableError                 the key that would open it is not here; says which one that is
├── EncryptionContextError                  an encrypted message or its keys do not fit; nothing was computed in clear
├── AuditLogError                           the audit log cannot be read or continued
│   └── LedgerError                         the privacy ledger cannot be written or read: nothing more is spent
├── DPBudgetExceededError                   the next step would spend more than the privacy budget; weights untouched
├── NotFoundError (LookupError)
│   ├── TrainingClientNotFoundError
│   ├── RunNotFoundError
│   └── ArtifactNotFoundError
├── ServerConnectionError (ConnectionError)  the server does not answer; what waits fails, results can be fetched later
├── AuthenticationError                     the server takes no such token
└── FutureError
    ├── FutureTimeoutError (TimeoutError)   waiting took too long; the operation goes on
    ├── FutureCancelledError                the operation was cancelled
    └── FutureFailedError                   the operation failed; `__cause__` says why
"""

import copy
import difflib
import functools
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any, TypeVar

C = TypeVar("C", bound=type)
_everything = False  # whether IPython shows every frame


def full_tracebacks(show: bool = True) -> None:
    """Show every frame of this package's errors in IPython and Jupyter, or, with False, your own again.

    By default an error of ours shows the lines of your own code that led to it, and what it says; where it was caused
    inside a function that you gave us, a loss for instance, also the lines of that function. Errors of others, and
    programs outside IPython, show what Python shows, whatever is set here.

    Example:
        >>> tn.full_tracebacks()  # everything
        >>> tn.full_tracebacks(False)  # your own frames, as in the beginning
    """
    global _everything
    if not isinstance(show, bool):
        raise ValidationError(f"full_tracebacks(show) is True or False, not a {type(show).__name__}.")
    _everything = show


class TGTinkerError(Exception):
    """Base of every error of this package.

    Args:
        message: What happened, where, and what to do next.
        code: Stable machine-readable name; the class's own by default.
        details: Plain data about the failure.
        request_id: The operation it belongs to, if any.
    """

    code = "error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        details: Mapping[str, Any] | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.details = dict(details or {})
        self.request_id = request_id

    def __reduce__(self) -> tuple[Any, ...]:
        made_anew = partial(type(self), code=self.code, details=self.details, request_id=self.request_id)
        return made_anew, (self.message,)

    def __str__(self) -> str:
        return self.message

    @property
    def _render_traceback_(self) -> Callable[[], list[str]]:
        """What IPython calls, where there is such a thing, in place of its own traceback."""
        if _everything:
            raise AttributeError("full_tracebacks() is on: IPython shows all there is")
        return partial(short_traceback, self)


def short_traceback(error: TGTinkerError) -> list[str]:
    """Return the traceback of an error as IPython shows it, of which only the frames of the user's own code are left.

    What caused it is named in a line where the message does not say it, with the user's own frames in it if there are.
    """
    shown = sys.modules["IPython"].get_ipython().InteractiveTB
    alone = copy.copy(error)
    alone.__dict__.update(vars(error))  # its notes, too
    alone.__cause__ = None  # no chain: it is told below
    own, hidden = users_frames(error.__traceback__)
    lines: list[str] = shown.structured_traceback(type(error), alone, own, tb_offset=0)
    if shown.mode == "Minimal":
        return lines
    message = len(shown.get_exception_only(type(error), alone))
    said = [str(error)]
    told = [f"    [{hidden} more of tensafe_nb: tn.full_tracebacks() shows all]\n"] if hidden else []
    for cause, how in causes_of(error):
        words = f"{type(cause).__name__}: {cause}"
        frames, _ = users_frames(cause.__traceback__)
        if frames is not None:
            entries = shown.structured_traceback(type(cause), Exception(), frames, tb_offset=0)
            head = next(i for i, entry in enumerate(entries) if "Traceback (most recent call last)" in entry)
            told += [f"{how} {words}, raised in\n", *map(readable, entries[head + 1 : -1])]
        elif not any(str(cause) and str(cause) in earlier for earlier in said):
            told.append(f"{how} {words}\n")
        said.append(str(cause))
    return [*lines[:-message], *told, *lines[-message:]]


def readable(entry: str) -> str:
    """Return a frame of a traceback; the arguments of one that an earlier thread has left are not known any more."""
    return entry.replace("***failed resolving arguments***", "…")


def causes_of(error: BaseException) -> Iterator[tuple[BaseException, str]]:
    """Yield what an error was raised from, and that from which that was raised, and how each is to be introduced."""
    seen = {id(error)}
    while True:
        how = "Caused by" if error.__cause__ is not None else "While handling"
        found = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if found is None or id(found) in seen:
            return
        seen.add(id(found))
        yield found, how
        error = found


def users_frames(trace: TracebackType | None) -> tuple[TracebackType | None, int]:
    """Return a traceback of those frames that are the user's own code, and how many others follow the first of them."""
    entries = []
    while trace is not None:
        entries.append(trace)
        trace = trace.tb_next
    own = [number for number, entry in enumerate(entries) if is_users(entry.tb_frame.f_code)]
    found = None
    for number in reversed(own):
        entry = entries[number]
        found = TracebackType(found, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return found, len(entries) - own[0] - len(own) if own else len(entries)


def is_users(code: CodeType) -> bool:
    """Whether code stands in a cell or file of the user's: neither in this package, nor in one that was installed."""
    name = code.co_filename
    if name.startswith("<"):
        return name.startswith(("<ipython-input", "<stdin>"))
    return not name.startswith(_installed()) and not {"site-packages", "dist-packages"} & {*Path(name).parts}


@functools.cache
def _installed() -> tuple[str, ...]:
    places = sysconfig.get_paths()
    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    return (str(Path(__file__).parent), *(places[kind] for kind in kinds))


class ValidationError(TGTinkerError, ValueError):
    """Input that does not fit: a shape, a name, a value."""

    code = "validation_error"


class PrivacyUnitError(ValidationError):
    """A batch, loss or model in which one privacy unit cannot be told from another, or a draw that was altered."""

    code = "privacy_unit"


class ModelLoadError(TGTinkerError):
    """The model a client was asked for could not be loaded. Nothing is ever put in its place."""

    code = "model_load_error"


class NonFiniteLossError(TGTinkerError):
    """A loss, a gradient or what a model says of the next token was NaN or infinite; no weight has moved."""

    code = "non_finite_loss"


class InsufficientMemoryError(TGTinkerError):
    """An operation needed more memory than there is; the client stays usable."""

    code = "insufficient_memory"


class ClusterError(TGTinkerError):
    """No replica of a training client on a cluster is left, or none can be started; the client is in ERROR."""

    code = "cluster"


class ClientClosedError(TGTinkerError):
    """An operation was given to a client that has been closed."""

    code = "client_closed"


class QueueFullError(TGTinkerError):
    """The queue holds as many waiting operations as it may."""

    code = "queue_full"


class RewardError(TGTinkerError):
    """A reward function raised or returned something that is not a score."""

    code = "reward_error"


class StorageError(TGTinkerError):
    """The home folder could not be written or read: a full disk, a missing right. What was there before is intact."""

    code = "storage_error"


class DecryptionError(TGTinkerError):
    """A sealed file did not open: a wrong key, or a file that was altered. Nothing of it was used."""

    code = "decryption_error"


class KeyUnavailableError(DecryptionError):
    """The key that is needed is not here; `details["key_ids"]` lists the keys that would open the file."""

    code = "key_unavailable"


class EncryptionContextError(TGTinkerError):
    """An encrypted message was altered, replayed or made for other keys, or encryption is not to be had here.

    Nothing of it was used, and nothing is computed in clear instead.
    """

    code = "encryption_context"


class AuditLogError(TGTinkerError):
    """The audit log cannot be read or continued."""

    code = "audit_log_error"


class LedgerError(AuditLogError):
    """The privacy ledger cannot be written or read; the step that it was to pay for was not taken."""

    code = "ledger_error"


class DPBudgetExceededError(TGTinkerError):
    """The next step would spend more than the budget. No weight has moved; the client stays usable.

    `details` holds `current_epsilon` (spent, without the refused step), `max_epsilon`, `next_epsilon` and `step`.
    """

    code = "dp_budget_exceeded"


class NotFoundError(TGTinkerError, LookupError):
    """Something was asked for by an id that nothing has."""

    code = "not_found"


class TrainingClientNotFoundError(NotFoundError):
    """No training client has this id."""

    code = "training_client_not_found"


class RunNotFoundError(NotFoundError):
    """No recorded run has this id."""

    code = "run_not_found"


class ArtifactNotFoundError(NotFoundError):
    """No stored artifact has this id or name."""

    code = "artifact_not_found"


class FutureError(TGTinkerError):
    """Something about waiting for an operation."""

    code = "future_error"


class FutureTimeoutError(FutureError, TimeoutError):
    """The result was not there in time. The operation itself goes on."""

    code = "future_timeout"


class FutureCancelledError(FutureError):
    """The operation was cancelled before it completed."""

    code = "future_cancelled"


class FutureFailedError(FutureError):
    """The operation failed with a foreign exception, or because one it depends on failed."""

    code = "future_failed"


LONGEST_NAME = 200  # characters that are compared


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest known name, or the list of all, for an error message."""
    options = sorted(known)
    folded = {option.casefold(): option for option in options}
    close = difflib.get_close_matches(
        name[:LONGEST_NAME].casefold(), folded, n=1
    )  # its time grows with the square
    if close:
        return f" Did you mean {folded[close[0]]!r}?"
    return f" Known: {', '.join(options) or 'none'}."


def near_misses(**instead: str) -> Callable[[C], C]:
    """Class decorator: an attribute that a class does not have is refused with what does it, or with the nearest.

    Args:
        instead: How other libraries call it, and what it is here.
    """

    def decorate(cls: C) -> C:
        cls.__getattr__ = NearMisses(instead)  # type: ignore[attr-defined]  # here, where type checkers do not see it
        return cls

    return decorate


class NearMisses:
    """A `__getattr__` that only refuses.

    Asked of the class it is None, as if there were none: IPython completes behind a dot only where that runs no code.
    """

    def __init__(self, instead: Mapping[str, str]) -> None:
        self.instead = instead

    def __get__(self, owner: object, cls: type) -> Callable[[str], Any] | None:
        return None if owner is None else partial(self.refuse, cls)

    def refuse(self, cls: type, name: str) -> Any:
        plain = f"{cls.__name__!r} object has no attribute {name!r}"
        if name.startswith("_") or hasattr(cls, name):  # Python asks, or a property of ours has failed
            raise AttributeError(plain)
        hint = nearest(name, [known for known in dir(cls) if not known.startswith("_")])
        if name in self.instead:
            hint = f" It is {self.instead[name]}."
        elif hint.startswith(" Known: "):
            hint = " Press Tab behind the dot to see what it has."
        raise AttributeError(f"{plain}.{hint}")


class ServerConnectionError(TGTinkerError, ConnectionError):
    """The server did not answer within the patience there is."""

    code = "server_connection"


class AuthenticationError(TGTinkerError):
    """The server takes no such token."""

    code = "unauthorized"


def error_of_code(
    code: str, message: str, details: Mapping[str, Any] | None = None, request_id: str | None = None
) -> TGTinkerError:
    """Return the error that a server sent: of the class whose code it has, or of the family."""
    classes = [TGTinkerError]
    for cls in classes:  # grows while it is walked: every class below
        classes += cls.__subclasses__()
    known = SPECIAL.get(code, code)
    cls = next((cls for cls in classes if vars(cls).get("code") == known), TGTinkerError)
    return cls(message, code=code, details=details, request_id=request_id)


SPECIAL = {  # codes that a server tells apart, by the code of the class that a caller catches
    "too_many": "queue_full",
    "too_many_waiting": "queue_full",
    "forbidden": "validation_error",
    "too_large": "validation_error",
    "draining": "server_connection",
}
