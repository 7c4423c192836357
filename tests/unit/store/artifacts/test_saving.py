"""Artifacts saved and opened: what comes back is what was saved."""

import os
import stat
import subprocess
import sys
import tempfile
from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensafe_nb.errors import (
    ArtifactNotFoundError,
    TGTinkerError,
    ValidationError,
)
from tensafe_nb.store.artifacts.artifacts import ArtifactStore
from tensafe_nb.store.keys.keyring import Keys
from tensafe_nb.store.sealed.envelope import CHUNK
from tensafe_nb.store.sealed.payload import MAX_MANIFEST
from tensafe_nb.store.sealed.tensors import TensorPart, read_tensors
from tests.unit.store.artifacts.stores import PARTS, contents, file_of, save
from tests.unit.store.faults import Unsynced
from tests.unit.store.lives import HEADER

# saving and opening


def test_what_is_saved_is_listed_verified_and_opened_as_it_was(store: ArtifactStore) -> None:
    saved = save(store, metadata={"why": "a test", "loss": 0.5}, name="first")
    assert (saved.artifact_type, saved.step, saved.model_ref, saved.saved_by) == (
        "checkpoint", 3, "builtin:tiny", "tc-1",
    )  # fmt: skip
    assert saved.metadata == {"why": "a test", "loss": 0.5}
    assert saved.encryption.algorithm == "AES-256-GCM"
    assert store.list() == [saved]
    assert store.get("first") == store.get(saved.artifact_id) == store.verify(saved.artifact_id) == saved
    with store.open(saved.artifact_id) as artifact:
        assert artifact.info == saved
        assert artifact.metadata == saved.metadata
        assert artifact.header["artifact_id"] == saved.artifact_id
        assert [name for name, _, _ in artifact.parts()] == list(PARTS)
        assert contents(artifact) == PARTS


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=200)


@settings(max_examples=25)
@given(
    st.dictionaries(st.from_regex(r"[a-z0-9]{1,8}\.bin", fullmatch=True), st.binary(max_size=60), max_size=4),
    st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), json_values, max_size=3),
    st.none() | texts,
)
def test_any_parts_metadata_and_name_come_back(
    parts: dict[str, bytes], metadata: dict[str, Any], name: str | None
) -> None:
    with tempfile.TemporaryDirectory() as home:
        keys = Keys(Path(home) / "keys", announce=lambda text: None)
        store = ArtifactStore(Path(home) / "artifacts", keys, files=Unsynced())
        try:
            saved = save(store, parts, metadata=metadata, name=name)
        except ValidationError:
            with pytest.raises(UnicodeEncodeError):  # half a character: no UTF-8 can say it
                repr_of(metadata).encode()
            return
        assert (saved.name, saved.metadata) == (name, metadata)
        with store.open(saved.artifact_id) as artifact:
            assert contents(artifact) == parts
            assert list(contents(artifact)) == list(parts)
        if name is not None:
            assert store.resolve(name) == saved.artifact_id


def repr_of(value: Any) -> str:
    if isinstance(value, dict):
        return "".join(map(repr_of, [*value, *value.values()]))
    return "".join(map(repr_of, value)) if isinstance(value, list) else str(value)


def test_a_state_of_many_chunks_is_streamed_in_order(store: ArtifactStore) -> None:
    numbers = array("I", range(CHUNK // 2))  # two chunks and, with the header, a bit
    tensors = TensorPart([("a", "U32", (len(numbers),), numbers), ("b", "U8", (3,), b"abc")])
    saved = save(store, {"first.bin": bytes(CHUNK), "model.safetensors": tensors, "last.bin": b"end"})
    with store.open(saved.artifact_id) as artifact:
        for name, size, stream in artifact.parts():
            if name == "model.safetensors":
                assert size == tensors.size
                found = {tensor: bytes(data) for tensor, _, _, data in read_tensors(stream, size)}
                assert found == {"a": numbers.tobytes(), "b": b"abc"}
            else:
                assert stream.read() == {"first.bin": bytes(CHUNK), "last.bin": b"end"}[name]


def test_a_part_ends_where_it_ends_and_when_the_next_is_asked_for(store: ArtifactStore) -> None:
    saved = save(store, {"a": b"12345", "b": b"", "c": b"678"})
    with store.open(saved.artifact_id) as artifact:
        parts = artifact.parts()
        _, _, first = next(parts)
        assert (first.read(2), first.readable()) == (b"12", True)
        _, _, empty = next(parts)
        assert (empty.read(), empty.read(1)) == (b"", b"")
        _, _, last = next(parts)
        assert (last.read(99), last.read(1)) == (b"678", b"")
        with pytest.raises(ValueError, match="closed"):
            first.read(1)
        assert list(parts) == []


def test_an_artifact_may_have_no_parts(store: ArtifactStore) -> None:
    with store.open(save(store, {}).artifact_id) as artifact:
        assert contents(artifact) == {}


def test_nothing_is_on_the_disk_before_the_first_save(store: ArtifactStore, folder: Path) -> None:
    assert (store.list(), store.damaged(), store.rotate(), store.needing("key-1")) == ([], [], 0, [])
    store.recover()
    for call in (store.get, store.delete, store.pull, store.verify):
        with pytest.raises(ArtifactNotFoundError):
            call("art-1")
    assert not folder.exists()


@pytest.mark.skipif(os.name != "posix", reason="rights of files")
def test_only_the_owner_may_enter(store: ArtifactStore, folder: Path) -> None:
    save(store)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent)} == {0o700}


def test_nothing_of_the_content_is_readable_in_the_file(store: ArtifactStore, folder: Path) -> None:
    saved = save(store, metadata={"secret": "plain-metadata"}, name="plain-name")
    data = file_of(folder, saved).read_bytes()
    assert not [word for word in (b"weights", b"model.bin", b"plain-metadata", b"plain-name") if word in data]
    assert b"builtin:tiny" in data


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"metadata": {"loss": float("nan")}}, "JSON"),
        ({"metadata": {"model": object()}}, "JSON"),
        ({"metadata": {"half a character": "\ud800"}}, "JSON"),
        ({"metadata": {"long": "x" * MAX_MANIFEST}}, "bytes"),
        ({"name": ""}, "1 to 200"),
        ({"name": "x" * 201}, "1 to 200"),
        ({"created_at": "today"}, "created_at"),
        ({"artifact_type": None}, "artifact_type"),
        ({"parts": {"../evil": b""}}, "evil"),
        ({"parts": {"": b""}}, "''"),
        ({"parts": {".hidden": b""}}, "hidden"),
        ({"parts": {"model.safetensors": TensorPart([("w", "F32", (2,), bytes(7))])}}, "8 bytes"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_leaves_no_trace(
    store: ArtifactStore, folder: Path, settings: dict[str, Any], words: str
) -> None:
    parts = settings.pop("parts", PARTS)
    with pytest.raises(ValidationError, match=words):
        save(store, parts, **settings)
    assert not folder.exists() or [path.name for path in folder.iterdir()] == [".lock"]


@pytest.mark.parametrize("field", sorted(HEADER))
def test_a_header_that_lacks_a_field_is_refused_by_its_name(store: ArtifactStore, field: str) -> None:
    header = {name: value for name, value in HEADER.items() if name != field}
    with pytest.raises(ValidationError, match=field):
        store.save(PARTS, header=header)


# rotating


def test_every_error_of_the_store_is_of_the_family(store: ArtifactStore, tmp_path: Path) -> None:
    for attempt in (lambda: store.get("x"), lambda: store.push(tmp_path), lambda: save(store, name="")):
        with pytest.raises(TGTinkerError):
            attempt()


def test_the_store_imports_neither_torch_nor_an_engine() -> None:
    code = (
        "import sys, tensafe_nb.store.artifacts.artifacts, tensafe_nb.store.sealed.tensors;"
        "print([n for n in sys.modules if n in ('torch', 'safetensors', 'tensafe_nb.engine', 'pickle5')])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
