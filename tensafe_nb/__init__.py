"""Train language models from a notebook: awaitable operations, live curves, verifiable rewards, privacy.

Names load when first used, so that `import tensafe_nb` is quick and loads no torch.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "ServiceClient": "service",
    "TrainingClient": "client",
    "chat": "client",
    "ModelChat": "chats.chat",
    "LocalCluster": "cluster.clusters",
    "RayCluster": "cluster.clusters",
    "TrainingConfig": "config",
    "LoRAConfig": "config",
    "OptimizerConfig": "config",
    "StepConfig": "config",
    "SamplingConfig": "config",
    "LossConfig": "config",
    "DPConfig": "config",
    "Recipe": "recipes.recipe",
    "load_config": "recipes.recipe",
    "BatchData": "protocol.batch",
    "ClientStatus": "protocol.results",
    "FutureStatus": "protocol.results",
    "RunStatus": "protocol.results",
    "FutureHandle": "futures",
    "enable_nested_asyncio": "futures",
    "TrainingRun": "runs.run",
    "list_runs": "runs.listing",
    "plot_runs": "runs.listing",
    "diff_runs": "runs.diff",
    "load_run": "runs.record",
    "compare": "comparing.comparison",
    "list_comparisons": "comparing.records",
    "load_comparison": "comparing.records",
    "check": "classroom.checking",
    "replay": "widgets.replay",
    "save_page": "widgets.page",
    **dict.fromkeys(
        (
            "TGTinkerError",
            "ValidationError",
            "ModelLoadError",
            "NonFiniteLossError",
            "InsufficientMemoryError",
            "ClusterError",
            "ClientClosedError",
            "QueueFullError",
            "RewardError",
            "StorageError",
            "DecryptionError",
            "KeyUnavailableError",
            "EncryptionContextError",
            "AuditLogError",
            "LedgerError",
            "PrivacyUnitError",
            "DPBudgetExceededError",
            "ServerConnectionError",
            "AuthenticationError",
            "NotFoundError",
            "TrainingClientNotFoundError",
            "RunNotFoundError",
            "ArtifactNotFoundError",
            "FutureError",
            "FutureTimeoutError",
            "FutureCancelledError",
            "FutureFailedError",
            "full_tracebacks",
        ),
        "errors",
    ),
}
_MODULES = ("data", "datasets", "losses", "rlvr", "widgets", "events", "errors")

__all__ = ["__version__", *_HOMES, *_MODULES]

if TYPE_CHECKING:
    from tensafe_nb import data, datasets, errors, events, losses, rlvr, widgets
    from tensafe_nb.chats.chat import ModelChat
    from tensafe_nb.classroom.checking import check
    from tensafe_nb.client import TrainingClient, chat
    from tensafe_nb.cluster.clusters import LocalCluster, RayCluster
    from tensafe_nb.comparing.comparison import compare
    from tensafe_nb.comparing.records import list_comparisons, load_comparison
    from tensafe_nb.config import (
        DPConfig,
        LoRAConfig,
        LossConfig,
        OptimizerConfig,
        SamplingConfig,
        StepConfig,
        TrainingConfig,
    )
    from tensafe_nb.errors import (
        ArtifactNotFoundError,
        AuditLogError,
        AuthenticationError,
        ClientClosedError,
        ClusterError,
        DecryptionError,
        DPBudgetExceededError,
        EncryptionContextError,
        FutureCancelledError,
        FutureError,
        FutureFailedError,
        FutureTimeoutError,
        InsufficientMemoryError,
        KeyUnavailableError,
        LedgerError,
        ModelLoadError,
        NonFiniteLossError,
        NotFoundError,
        PrivacyUnitError,
        QueueFullError,
        RewardError,
        RunNotFoundError,
        ServerConnectionError,
        StorageError,
        TGTinkerError,
        TrainingClientNotFoundError,
        ValidationError,
        full_tracebacks,
    )
    from tensafe_nb.futures import FutureHandle, enable_nested_asyncio
    from tensafe_nb.protocol.batch import BatchData
    from tensafe_nb.protocol.results import ClientStatus, FutureStatus, RunStatus
    from tensafe_nb.recipes.recipe import Recipe, load_config
    from tensafe_nb.runs.diff import diff_runs
    from tensafe_nb.runs.listing import list_runs, plot_runs
    from tensafe_nb.runs.record import load_run
    from tensafe_nb.runs.run import TrainingRun
    from tensafe_nb.service import ServiceClient
    from tensafe_nb.widgets.page import save_page
    from tensafe_nb.widgets.replay import replay


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"tensafe_nb.{_HOMES[name]}"), name)
    if name in _MODULES:
        return import_module(f"tensafe_nb.{name}")
    message = f"module 'tensafe_nb' has no attribute {name!r}{_instead(name)}"
    raise AttributeError(
        message, name=name, obj=None
    )  # with the module, Python would add what it thinks is nearest


def _instead(name: str) -> str:
    """Return where a public name is, or which is the nearest."""
    if name.startswith("_") or find_spec(f"tensafe_nb.{name}"):  # what Python asks before it imports a module
        return ""
    from tensafe_nb.errors import nearest

    for module in _MODULES:
        if name in getattr(import_module(f"tensafe_nb.{module}"), "__all__", ()):
            return f": it is tensafe_nb.{module}.{name}."
    return f".{nearest(name, __all__)}"


def __dir__() -> list[str]:
    return sorted(__all__)
