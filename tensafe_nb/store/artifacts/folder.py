"""The folder of artifacts: names of its files, and the lock that says who may change them when.

A file is called `<artifact id>.<content hash>.tsnb`. Nothing but the key slot at its beginning ever changes, so the
name says what must be in it, and a listing need not read gigabytes to tell. One lock guards the folder: shared while
files are looked at, copied, given their name or removed; exclusive while a rotation overwrites key slots. It is not
held while an artifact is sealed or its content is read.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tensafe_nb.errors import ArtifactNotFoundError, nearest
from tensafe_nb.locks import held
from tensafe_nb.store.disk import Draft, Files, disk_errors, make_folder, sweep_drafts
from tensafe_nb.store.sealed.rotation import JOURNAL, replay

_ID = re.compile(r"art-[0-9a-z-]{1,64}")
_FILE = re.compile(rf"{_ID.pattern}\.[0-9a-f]{{64}}\.tsnb")
_LONGEST_HINT = 400
ORDER = ".order"  # one id a line, in the order in which artifacts came in


class ArtifactFolder:
    """A folder of sealed files. It is made when the first draft is."""

    def __init__(self, path: Path, files: Files) -> None:
        self.path = path
        self.files = files

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Keep rotations out, after finishing one that a crash cut off."""
        while self.path.is_dir():
            with held(self._lock, exclusive=False):
                if not (self.path / JOURNAL).exists():
                    yield
                    return
            self.recover()
        yield

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep everyone out, after finishing a rotation that a crash cut off."""
        if not self.path.is_dir():
            yield
            return
        with held(self._lock, exclusive=True):
            replay(self.files, self.path)
            yield

    def recover(self) -> None:
        """Finish a rotation that a crash cut off, if there is one."""
        with disk_errors("finish an interrupted key rotation"), self.exclusive():
            pass

    @contextmanager
    def draft(self) -> Iterator[Draft]:
        """Give a new file to write, after sweeping away those of processes that died."""
        make_folder(self.files, self.path)
        with held(self._lock, exclusive=True, wait=False) as alone:
            if alone:
                sweep_drafts(self.files, self.path)
        with self.shared():  # nobody sweeps between its making and its locking
            draft = Draft(self.files, self.path)
        with draft:
            yield draft

    def all(self) -> Sequence[Path]:
        """Return every file that could be an artifact, whatever it is called."""
        return sorted(self.path.glob("art-*.tsnb"))

    def named(self) -> Sequence[Path]:
        """Return every file that is called as an artifact should be."""
        return [path for path in self.all() if is_named(path)]

    def place(self, artifact_id: str, content_hash: str) -> Path:
        """Return where an artifact with this content belongs."""
        return self.path / f"{artifact_id}.{content_hash.removeprefix('sha256:')}.tsnb"

    def present(self, artifact_id: str) -> Sequence[Path]:
        """Return the files with this id: one, unless somebody put another there by hand."""
        if not is_id(artifact_id):
            return []
        return [path for path in sorted(self.path.glob(f"{artifact_id}.*.tsnb")) if is_named(path)]

    def find(self, artifact_id: str) -> Path:
        """Return the file with this id.

        Raises:
            ArtifactNotFoundError: There is none.
        """
        if present := self.present(artifact_id):
            return present[0]
        raise missing(artifact_id, (id_of(path) for path in self.named()))

    def enter(self, artifact_id: str) -> None:
        """Give an artifact the next place in the folder's own order, before it gets its name; under the lock.

        No clock can be trusted with "newest": one that is set back would put today's checkpoint behind last week's.
        """
        with self.files.append(self.path / ORDER) as file:
            file.write(f"\n{artifact_id}\n".encode())  # the first break ends what a crash left half-written
            self.files.fsync(file)

    def order(self) -> Mapping[str, int]:
        """Return the place of each artifact that has entered since there is an order; the newest has the largest."""
        try:
            entered = (self.path / ORDER).read_bytes().split()
        except FileNotFoundError:
            return {}
        return {artifact_id.decode(errors="replace"): place for place, artifact_id in enumerate(entered)}

    @property
    def _lock(self) -> Path:
        return self.path / ".lock"


def is_id(text: object) -> bool:
    """Whether this could be the id of an artifact: nothing else ever becomes part of a path."""
    return isinstance(text, str) and _ID.fullmatch(text) is not None


def is_named(path: Path) -> bool:
    """Whether a file is called as an artifact should be."""
    return _FILE.fullmatch(path.name) is not None


def id_of(path: Path) -> str:
    """Return the id in a file's name."""
    return path.name.split(".")[0]


def hash_of(path: Path) -> str:
    """Return the content hash in a file's name."""
    return f"sha256:{path.name.split('.')[1]}"


def missing(wanted: str, known: Iterable[str]) -> ArtifactNotFoundError:
    """Return the error for what is not there, with what is close to it."""
    hint = nearest(str(wanted), known)
    if len(hint) > _LONGEST_HINT:
        hint = " list_artifacts() shows all there are."
    return ArtifactNotFoundError(f"There is no artifact {wanted!r}.{hint}")
