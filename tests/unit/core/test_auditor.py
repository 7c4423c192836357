"""The audit record of an operation: written whatever it was asked and however it ended, and no handle left waiting."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tensafe_nb as tn
from tensafe_nb.core.auditor import Auditor, Description
from tensafe_nb.errors import StorageError
from tensafe_nb.store.audit.log import AuditLog, outcome_of

BATCH = {"input_ids": [[5, 6, 7, 8]]}


def nested(levels: int) -> Any:
    inner: Any = 1
    for level in range(levels):
        inner = [inner] if level % 2 else {"in": inner}
    return inner


def in_itself() -> Any:
    ring: list[Any] = [1]
    ring += [ring, ring]
    return ring


def shared(levels: int) -> Any:
    inner: Any = [0]
    for _ in range(levels):
        inner = [inner, inner]  # 2 ** levels paths through `levels` lists
    return inner


class Unspeakable:
    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__


class Liar(Mapping[str, int]):
    def __getitem__(self, key: str) -> int:
        raise OSError("gone")

    def __iter__(self) -> Iterator[str]:
        yield "a"

    def __len__(self) -> int:
        return 1


ODD = {
    "nested": nested(3000),
    "in itself": in_itself(),
    "a thousand paths": shared(40),
    "a huge number": 10**5000,
    "not a number": float("nan"),
    "a long double": np.longdouble(0.5),
    "long doubles": np.zeros(2, np.longdouble),
    "no date": np.datetime64("nat", "s"),
    "objects": np.array([Unspeakable(), 1], dtype=object),
    "a structure": np.zeros(1, dtype=[("a", "i4")]),
    "a tensor": torch.zeros(2),
    "unspeakable": Unspeakable(),
    "unspeakable keys": {Unspeakable(): 1, (1, 2): 2, None: 3},
    "half a character": "\ud800",
    "bytes": b"\xff",
    "a complex number": 1j,
    "a set": {1, 2},
    "a mapping that fails": Liar(),
    "a class": Unspeakable,
    "a type with an odd name": type("My Error[int]", (), {})(),
}


def test_a_loss_keyword_of_any_kind_is_put_on_record_and_the_client_goes_on(
    service: tn.ServiceClient,
) -> None:
    tc = service.create_training_client(model_ref="builtin:sums", lora_config=tn.LoRAConfig(rank=2))

    def loss(outputs: Any, batch: Any, odd: Any = None) -> Any:
        return -outputs.logprobs.mean()

    for step, (name, value) in enumerate(ODD.items(), start=1):
        with contextlib.suppress(tn.TGTinkerError):  # refused, or taken: either is an answer
            tc.forward_backward(BATCH, loss_fn=loss, loss_kwargs={"odd": value}).result(timeout=60)
        tc.forward_backward(BATCH).result(timeout=60)
        assert tc.optim_step().result(timeout=60).step == step, name
    assert service.verify_audit_log().ok


def odd(name: str) -> Any:
    return ODD[name]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.sampled_from(["a long double", "objects", "unspeakable", "a mapping that fails"]).map(odd),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=4)
        | st.tuples(inner, inner)
    ),
    max_leaves=20,
)


@given(VALUES)
@settings(deadline=None, max_examples=60)
def test_every_value_has_a_description_that_json_takes(value: Any) -> None:
    json.dumps(Description().of(value), allow_nan=False)


@pytest.mark.parametrize("name", ODD)
def test_every_odd_value_has_a_description_that_json_takes(name: str) -> None:
    assert json.dumps(Description().of(ODD[name]), allow_nan=False)


def test_different_values_are_described_differently() -> None:
    values = [
        0,
        0.0,
        "0",
        None,
        [],
        {},
        [0],
        {"0": 0},
        np.zeros(1),
        np.zeros(1, np.float32),
        10**30,
        -(10**30),
    ]
    told = [repr(Description().of(value)) for value in values]
    assert len(set(told)) == len(told)


def test_an_error_of_an_odd_class_is_recorded_under_the_name_of_its_nearest_ancestor() -> None:
    odd = type("My Error[int]", (tn.ValidationError,), {})("x")
    assert outcome_of(odd) == {
        "success": False,
        "error_code": "validation_error",
        "error_class": "ValidationError",
    }
    assert outcome_of(type("an error", (Exception,), {})())["error_class"] == "Exception"
    assert outcome_of(None)["success"] is True


def test_a_handle_ends_though_the_auditor_itself_fails(
    service: tn.ServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    tc = service.create_training_client(model_ref="builtin:sums", lora_config=tn.LoRAConfig(rank=2))
    tc.forward_backward(BATCH).result(timeout=60)

    def broken(self: AuditLog, **fields: Any) -> None:
        raise RuntimeError("nobody thought of this")

    with monkeypatch.context() as patched:
        patched.setattr(AuditLog, "append", broken)
        handles = [tc.forward_backward(BATCH), tc.sample("12+", max_new_tokens=1), tc.optim_step()]
        for handle in handles:
            handle.exception(timeout=60)
            assert handle.done()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of the worker
@pytest.mark.parametrize("failure", [OSError("full"), RuntimeError("odd"), MemoryError()])
def test_after_the_auditor_failed_every_later_call_has_a_handle_that_ends(
    service: tn.ServiceClient, failure: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    tc = service.create_training_client(model_ref="builtin:sums", lora_config=tn.LoRAConfig(rank=2))
    tc.forward_backward(BATCH).result()

    def fail(*_: Any, **__: Any) -> None:
        raise failure

    with monkeypatch.context() as patched:
        patched.setattr(Auditor, "record", fail)
        with contextlib.suppress(tn.TGTinkerError):
            tc.optim_step().result()
        for _ in range(2):
            with pytest.raises(tn.TGTinkerError):
                tc.forward_backward(BATCH).result()


def test_a_pull_that_the_disk_refuses_is_logged_as_failed(
    service: tn.ServiceClient, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tc = service.create_training_client(model_ref="builtin:sums", lora_config=tn.LoRAConfig(rank=2))
    saved = tc.save_state().result()
    with pytest.raises(StorageError):
        service.pull_artifact(saved.artifact_id, to=tmp_path / "no such folder" / "x")
    refused = service.get_audit_logs(limit=1)[0]
    assert (refused.operation, refused.success, refused.error_code) == (
        "pull_artifact",
        False,
        "storage_error",
    )

    from tensafe_nb.store.artifacts.artifacts import ArtifactStore

    def interrupted(self: ArtifactStore, artifact_id: str) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ArtifactStore, "pull", interrupted)
        service.pull_artifact(saved.artifact_id)
    assert service.get_audit_logs(limit=1)[0].success is False
