"""Exports: whole, or not there."""

from pathlib import Path
from typing import Any

import pytest

import tensafe_nb as tn
from tensafe_nb.core import export


def test_an_export_that_fails_leaves_nothing_and_says_why(
    service: tn.ServiceClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
    state = tc.save_state().result().artifact_id
    write = export.write_folder

    def fail(error: Exception) -> Any:
        def written(*args: Any, **options: Any) -> None:
            write(*args, **options)
            raise error

        return written

    for error in (
        OSError(28, "No space left on device"),
        UnboundLocalError("active_adapters"),
        RuntimeError("odd"),
    ):
        monkeypatch.setattr(export, "write_folder", fail(error))
        with pytest.raises(tn.StorageError, match=r"cannot be written \(.*Nothing is left of it"):
            service.export_adapter(state, tmp_path / "new" / "deeper" / "out", merged=True)
        assert not (tmp_path / "new").exists()
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(tn.StorageError):
            service.export_adapter(state, tmp_path / "empty")
        assert list((tmp_path / "empty").iterdir()) == []
    assert [p.name for p in tmp_path.iterdir() if "exporting" in p.name] == []
    monkeypatch.setattr(export, "write_folder", write)
    assert service.export_adapter(state, tmp_path / "new" / "deeper" / "out").is_dir()
    assert (service.export_adapter(state, tmp_path / "empty") / "adapter_config.json").is_file()


def test_an_export_has_its_name_only_once_it_is_whole(
    service: tn.ServiceClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
    state = tc.save_state().result().artifact_id
    seen: list[bool] = []
    write = export.write_folder
    monkeypatch.setattr(
        export,
        "write_folder",
        lambda *args, **options: (write(*args, **options), seen.append((tmp_path / "out").exists())),
    )
    service.export_adapter(state, tmp_path / "out", merged=True)
    assert seen == [False]
    with pytest.raises(tn.ValidationError, match="not an empty folder"):
        service.export_adapter(state, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "write_folder", write)
    assert service.export_adapter(state, "relative").resolve() == tmp_path / "relative"
