"""The sealed artifacts of one tenant: saved, found, opened, checked, moved and rewrapped."""

import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from tensafe_nb.errors import ArtifactNotFoundError, DecryptionError, KeyUnavailableError, ValidationError
from tensafe_nb.protocol.results import SaveStateResult
from tensafe_nb.store.artifacts.folder import ArtifactFolder, hash_of, id_of, is_named, missing
from tensafe_nb.store.artifacts.header import check_schema, claimed_id, describe, describe_file, listed, unfit
from tensafe_nb.store.disk import Draft, Files, disk_errors
from tensafe_nb.store.keys.keyring import Keys, refused
from tensafe_nb.store.sealed.envelope import Opened, content_hash, open_sealed, read_header, seal
from tensafe_nb.store.sealed.payload import Manifest, PartStream, PayloadStream, checked, payload
from tensafe_nb.store.sealed.rotation import rotate
from tensafe_nb.store.sealed.tensors import TensorPart

Artifacts: TypeAlias = list[SaveStateResult]  # inside the class, `list` is a method

_BLOCK = 4 << 20


@dataclass(frozen=True, slots=True)
class StoredArtifact:
    """An artifact whose header and table of contents are authentic.

    Attributes:
        info: What `list` says of it.
        header: Its authentic header fields.
        metadata: The user's own.
    """

    info: SaveStateResult
    header: Mapping[str, Any]
    metadata: Mapping[str, Any]
    _manifest: Manifest = field(repr=False)
    _opened: Opened = field(repr=False)

    def parts(self) -> Iterator[tuple[str, int, PartStream]]:
        """Yield (name, size, stream) of each part, in order; asking for the next one ends the one before.

        Every chunk is authenticated as it comes, whether the part is read or not. Only who has come to the end knows
        that all of the artifact is what was sealed: where it raises, what was read must be thrown away. Who cannot
        throw it away calls `check` first. One iteration at a time.

        Raises:
            DecryptionError: The artifact was altered.
        """
        with disk_errors(f"read {self.info.artifact_id}"):
            stream = PayloadStream(self._opened)
            Manifest.read(stream)
            for name, size in self._manifest.parts:
                part = PartStream(stream, size)
                yield name, size, part
                part.finish()

    def check(self) -> None:
        """Read it to its end, keeping nothing.

        Raises:
            DecryptionError: The artifact was altered.
        """
        with disk_errors(f"read {self.info.artifact_id}"):
            checked(self._opened)


class ArtifactStore:
    """Saves, finds, opens and rewraps the artifacts in a folder. Nothing is written before the first save.

    Several threads and processes may use one folder at a time. Whatever the operating system refuses is a
    `StorageError`; a file that is not what it was when it was sealed is a `DecryptionError`.

    Args:
        folder: Where they are.
        keys: Seal and open them.
        tenant: Whose they are.
        files: How the disk is touched.

    Example:
        >>> store = ArtifactStore(home.artifacts("local"), Keys(home.keys()))
        >>> saved = store.save({"trainer.json": b"{}"}, header=header, name="before the sweep")
        >>> with store.open(store.resolve("before the sweep")) as artifact:
        ...     parts = {name: stream.read() for name, size, stream in artifact.parts()}
    """

    def __init__(self, folder: Path, keys: Keys, tenant: str = "local", files: Files | None = None) -> None:
        self._folder = ArtifactFolder(folder, files or Files())
        self._keys = keys
        self._tenant = tenant
        self._manifests: dict[str, Manifest] = {}  # by file name: it stands for the content

    def save(
        self,
        parts: Mapping[str, bytes | TensorPart],
        *,
        header: Mapping[str, Any],
        metadata: Mapping[str, Any] | None = None,
        name: str | None = None,
        artifact_type: str = "checkpoint",
        created_at: float | None = None,
        artifact_id: str | None = None,
    ) -> SaveStateResult:
        """Seal parts as a new artifact. When this returns it is on the disk; when it raises nothing was added.

        Args:
            parts: By name, in the order in which they will be read.
            header: Readable without a key: training_client, step, base_model, revision, ledger_head, schema.
            metadata: The user's own JSON, sealed.
            name: The user's own, sealed. Two artifacts may have the same; the newest is meant.
            artifact_type: Readable without a key.
            created_at: Unix seconds; now by default.
            artifact_id: A new one by default.

        Raises:
            ValidationError: The header lacks a field, the metadata is not JSON, or a name is none.
            KeyUnavailableError: There is no key to seal it with.
            StorageError: The disk is full or refuses. Earlier artifacts are intact.
        """
        manifest = Manifest.of(parts, metadata, name)
        fields = {
            **header,
            "artifact_id": artifact_id or new_id(),
            "artifact_type": artifact_type,
            "tenant": self._tenant,
            "created_at": time.time() if created_at is None else created_at,
        }
        if wrong := unfit(fields):
            raise ValidationError(f"The header of an artifact needs {', '.join(wrong)}.")
        with disk_errors("save the artifact"), self._folder.draft() as draft:
            sealed = seal(draft.file, fields, payload(manifest, parts), self._keys)
            draft.sync()  # gigabytes, before the lock is taken
            target = self._folder.place(fields["artifact_id"], sealed.content_hash)
            with self._folder.shared():
                self._folder.enter(fields["artifact_id"])
                draft.publish(target)
        self._manifests[target.name] = manifest
        return listed(fields, sealed.key_id, sealed.size_bytes, sealed.content_hash, manifest)

    @contextmanager
    def open(self, artifact_id: str) -> Iterator[StoredArtifact]:
        """Give an artifact's parts to be read, once: what they hold is checked as it comes, see `StoredArtifact.parts`.

        Raises:
            ArtifactNotFoundError: There is none of this id.
            KeyUnavailableError: The key that opens it is not here.
            DecryptionError: It was cut or swapped, or altered where it says what is in it.
        """
        with self._opened(artifact_id) as (file, path, opened):
            with disk_errors(f"read {artifact_id}"):
                manifest = Manifest.read(PayloadStream(opened))
                info = describe(file, path, opened.header, manifest)
            check_schema(info, opened.header)
            yield StoredArtifact(info, opened.header.fields, manifest.metadata, manifest, opened)

    def list(self) -> Artifacts:
        """Return every artifact, newest first: in the order in which they came into this store, whatever the clock.

        Those that 0.1 wrote come last, by their time.
        Of each only the beginning is read: what is listed is authentic where its key is here, but whether the file
        is whole only `verify` and `open` tell. Without the key, metadata and name are None and the rest is what the
        file says of itself. Files that cannot be listed are left to `damaged`.
        """
        found = [info for _, info in self._scan() if isinstance(info, SaveStateResult)]
        with disk_errors("list the artifacts"):
            order = self._folder.order()
        return sorted(
            found, key=lambda info: (-order.get(info.artifact_id, -1), -info.created_at, info.artifact_id)
        )

    def damaged(self) -> Sequence[tuple[Path, str]]:
        """Return the files that look like artifacts and cannot be listed, and why."""
        return [(path, reason) for path, reason in self._scan() if isinstance(reason, str)]

    def holds(self, artifact_id: str) -> bool:
        """Whether there is an artifact of this id."""
        return bool(self._folder.present(artifact_id))

    def get(self, id_or_name: str) -> SaveStateResult:
        """Return what `list` says of one artifact.

        Raises:
            ArtifactNotFoundError: Nothing is called so.
        """
        artifact_id = self.resolve(id_or_name)
        with disk_errors(f"read {artifact_id}"), self._folder.shared(), _deleted_meanwhile(artifact_id):
            return self._described(self._folder.find(artifact_id))

    def resolve(self, id_or_name: str) -> str:
        """Return the id that is meant: an id that exists, else that of the newest artifact with this name.

        Raises:
            ArtifactNotFoundError: Nothing is called so; names what is close.
        """
        if self._folder.present(id_or_name):
            return id_or_name
        stored = self.list()
        names = {info.name: info.artifact_id for info in reversed(stored) if info.name}  # the newest wins
        if id_or_name in names:
            return names[id_or_name]
        raise missing(id_or_name, [*names, *(info.artifact_id for info in stored)])

    def needing(self, key_id: str) -> Sequence[str]:
        """Return the ids of the artifacts that a key is needed for: before that key is forgotten."""
        return [info.artifact_id for info in self.list() if info.encryption.key_id == key_id]

    def pull(self, artifact_id: str) -> bytes:
        """Return the sealed file, whole.

        Raises:
            ArtifactNotFoundError: There is none of this id.
        """
        with disk_errors(f"read {artifact_id}"), self._folder.shared(), _deleted_meanwhile(artifact_id):
            return self._folder.find(artifact_id).read_bytes()

    def pull_to(self, artifact_id: str, path: Path) -> Path:
        """Copy the sealed file to a path and return it; into a folder, under the artifact's id.

        Raises:
            ArtifactNotFoundError: There is none of this id.
        """
        target = path / f"{artifact_id}.tsnb" if path.is_dir() else path
        with disk_errors(f"copy {artifact_id} to {target}"), self._folder.shared():
            with _deleted_meanwhile(artifact_id):
                file = self._folder.find(artifact_id).open("rb")
            with file, Draft(self._folder.files, target.parent) as draft:
                shutil.copyfileobj(file, draft.file, _BLOCK)
                draft.publish(target)
        return target

    def push(self, path: Path) -> SaveStateResult:
        """Take in a sealed file; where its key is here, only after all of it was checked.

        Raises:
            DecryptionError: It is no sealed file, or was altered.
            ValidationError: Another artifact has its id.
        """
        with disk_errors(f"take in {path}"), path.open("rb") as source, self._folder.draft() as draft:
            shutil.copyfileobj(source, draft.file, _BLOCK)
            target = self._folder.place(claimed_id(read_header(draft.file)), self._whole(draft.file))
            draft.sync()
            with self._folder.exclusive():
                if any(path != target for path in self._folder.present(id_of(target))):
                    raise ValidationError(
                        f"There is an artifact {id_of(target)} with another content here. Both cannot have this id: "
                        f"delete_artifact removes the one that is here."
                    )
                if not self._is_whole(target):  # absent, or damaged and now repaired
                    if not target.exists():
                        self._folder.enter(id_of(target))
                    draft.publish(target)
                return self._described(target)

    def delete(self, artifact_id: str) -> None:
        """Remove an artifact for good. Whoever has it open can read on.

        Raises:
            ArtifactNotFoundError: There is none of this id.
        """
        with disk_errors(f"delete {artifact_id}"), self._folder.shared(), _deleted_meanwhile(artifact_id):
            path = self._folder.find(artifact_id)
            self._folder.files.unlink(path)
            self._folder.files.fsync_folder(self._folder.path)
        self._manifests.pop(path.name, None)

    def verify(self, artifact_id: str) -> SaveStateResult:
        """Read an artifact to its end and check all of it.

        Raises:
            ArtifactNotFoundError: There is none of this id.
            KeyUnavailableError: The key that opens it is not here, so nothing can be said about it.
            DecryptionError: It was altered, cut or swapped.
        """
        with self._opened(artifact_id) as (file, path, opened), disk_errors(f"read {artifact_id}"):
            manifest, found = checked(opened)
            if found != hash_of(path):
                raise refused("file name")
            return describe(file, path, opened.header, manifest)

    def rotate(self) -> int:
        """Rewrap every artifact to the primary key and return how many were.

        The contents, ids and hashes stay. It may be interrupted at any moment and run again. An artifact that does
        not open is left as it is, with a warning in the log.

        Raises:
            StorageError: The disk refuses. No artifact is lost.
        """
        with disk_errors("rewrap the artifacts"), self._folder.exclusive():
            return rotate(self._folder.files, self._folder.path, self._folder.named(), self._keys)

    def recover(self) -> None:
        """Finish a rotation that a crash cut off. Every other call does this first, by itself."""
        self._folder.recover()

    # one file

    @contextmanager
    def _opened(self, artifact_id: str) -> Iterator[tuple[BinaryIO, Path, Opened]]:
        """Open a file and authenticate its header. Behind the key slot, rotations change nothing: no lock is kept."""
        with ExitStack() as stack:
            with disk_errors(f"read {artifact_id}"), self._folder.shared(), _deleted_meanwhile(artifact_id):
                path = self._folder.find(artifact_id)
                file = stack.enter_context(path.open("rb"))
                opened = open_sealed(file, self._keys)
            yield file, path, opened

    def _scan(self) -> Sequence[tuple[Path, SaveStateResult | str]]:
        with disk_errors("list the artifacts"), self._folder.shared():
            seen = [(path, self._described_or_why_not(path)) for path in self._folder.all()]
        return [(path, described) for path, described in seen if described is not None]

    def _described_or_why_not(self, path: Path) -> SaveStateResult | str | None:
        if not is_named(path):
            return "The store does not name its files so. push_artifact takes it in, if it is an artifact."
        try:
            return self._described(path)
        except FileNotFoundError:  # deleted a moment ago
            return None
        except (DecryptionError, OSError) as error:
            return str(error)

    def _described(self, path: Path) -> SaveStateResult:
        with path.open("rb") as file:
            try:
                opened = open_sealed(file, self._keys)
            except KeyUnavailableError:
                return describe(file, path, read_header(file), None)
            # a name holds the hash of the content, so what was read under it once need not be decrypted again
            manifest = self._manifests.get(path.name) or Manifest.read(PayloadStream(opened))
            self._manifests[path.name] = manifest
            return describe(file, path, opened.header, manifest)

    def _whole(self, file: BinaryIO) -> str:
        """Check as much of a file as the keys that are here allow, and return its content hash."""
        try:
            return checked(open_sealed(file, self._keys))[1]
        except KeyUnavailableError:
            return content_hash(file)

    def _is_whole(self, path: Path) -> bool:
        try:
            with path.open("rb") as file:
                return self._whole(file) == hash_of(path)
        except (DecryptionError, FileNotFoundError):
            return False


def new_id() -> str:
    """Return an id that no artifact has."""
    return f"art-{secrets.token_hex(16)}"


@contextmanager
def open_file(path: Path, keys: Keys) -> Iterator[StoredArtifact]:
    """Open a sealed file wherever it lies, as `ArtifactStore.open` opens one of its own; all of it is checked first.

    Raises:
        KeyUnavailableError: The key that opens it is not here.
        DecryptionError: It is no artifact, or was altered or cut.
        StorageError: It cannot be read.
    """
    with ExitStack() as stack:
        with disk_errors(f"read {path}"):
            file = stack.enter_context(path.open("rb"))
            opened = open_sealed(file, keys)
            manifest, found = checked(opened)
            info = describe_file(file, opened.header, found, manifest)
        check_schema(info, opened.header)
        yield StoredArtifact(info, opened.header.fields, manifest.metadata, manifest, opened)


@contextmanager
def _deleted_meanwhile(artifact_id: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as err:
        raise ArtifactNotFoundError(f"The artifact {artifact_id!r} was deleted a moment ago.") from err
