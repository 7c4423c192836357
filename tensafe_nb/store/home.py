"""The home folder of one tenant: the one place that knows where things are kept."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from tensafe_nb.display import as_given
from tensafe_nb.errors import ValidationError

TENANT = "local"  # who trains in the process itself
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Home:
    """The folder under which the toolkit keeps everything, as one tenant sees it. Made once, and handed down.

    Args:
        root: The folder.
        tenant: Whose share of it.

    Raises:
        ValidationError: A tenant whose name cannot be that of a folder.
    """

    root: Path
    tenant: str = TENANT

    def __post_init__(self) -> None:
        if not FOLDER_NAME.fullmatch(self.tenant):
            raise ValidationError(
                f"The tenant {as_given(self.tenant)} must be named by 1 to 64 letters, digits, dots, hyphens and "
                f"underscores, and begin with a letter or digit: folders are named after it."
            )

    @classmethod
    def of_environment(cls) -> "Home":
        """Return the home folder of this process: TENSAFE_HOME, else the platform's folder for a user's data."""
        chosen = os.environ.get("TENSAFE_HOME")
        return cls(Path(chosen).expanduser() if chosen else Path(platformdirs.user_data_dir("tensafe_nb")))

    def runs(self) -> Path:
        """Return the folder that holds one folder per training client."""
        return (self.root if self.tenant == TENANT else self.root / "tenants" / self.tenant) / "runs"

    def comparisons(self) -> Path:
        """Return the folder of what is kept of comparisons: which runs they are made of."""
        return self.runs().with_name("comparisons")

    def event_log(self, training_client_id: str) -> Path:
        """Return the path of a training client's event log; the rollouts of its runs lie in a folder beside it."""
        return self.runs() / training_client_id / "events.jsonl"

    def journal(self, training_client_id: str) -> Path:
        """Return the folder from which a server brings a training client back."""
        return self.runs() / training_client_id / "journal"

    def journals(self) -> list[Path]:
        """Return the journals that there are."""
        return sorted(self.runs().glob("*/journal"))

    def sealed_beside_runs(self) -> list[Path]:
        """Return the journals that there are, those that were set aside as damaged, too."""
        return sorted(self.runs().glob("*/journal*"))

    def event_logs(self) -> list[Path]:
        """Return the event logs that there are."""
        return sorted(self.runs().glob("*/events.jsonl"))

    def keys(self) -> Path:
        """Return the folder of the local key file and of the salts of passphrases, which serve all tenants."""
        return self.root / "keys"

    def artifacts(self) -> Path:
        """Return the folder of the sealed artifacts."""
        return self.root / "artifacts" / self.tenant

    def answers(self) -> Path:
        """Return the folder of what a server has answered of late: a request that is sent again gets it once more."""
        return self.root / "answers" / self.tenant

    def audit(self) -> Path:
        """Return the folder of the audit log."""
        return self.root / "audit" / self.tenant

    def ledger(self) -> Path:
        """Return the folder of the sealed tables that the privacy ledger keeps beside the audit log."""
        return self.root / "ledger" / self.tenant

    def judgements(self) -> Path:
        """Return the folder of what judges have answered: the same question is not asked again."""
        return self.root / "judgements" / self.tenant

    def models(self) -> Path:
        """Return the folder of models that were converted from GGUF files, for all tenants."""
        return self.root / "models"
