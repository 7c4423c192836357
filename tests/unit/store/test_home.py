"""Where things are kept: one value, made of the environment once, a share of it for each tenant."""

from pathlib import Path

import pytest

import tensafe_nb as tn
from tensafe_nb.store.home import Home


def test_the_environment_says_where_home_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSAFE_HOME", str(tmp_path / "elsewhere"))
    assert Home.of_environment() == Home(tmp_path / "elsewhere", "local")
    monkeypatch.delenv("TENSAFE_HOME")
    assert Home.of_environment().root.name == "tensafe_nb"


def test_a_tenant_has_folders_of_its_own_and_keys_and_models_are_shared(tmp_path: Path) -> None:
    mine, yours = Home(tmp_path), Home(tmp_path, "class-7")
    assert mine.event_log("tc-1") == tmp_path / "runs" / "tc-1" / "events.jsonl"
    for folder in ("runs", "artifacts", "audit", "ledger"):
        assert getattr(mine, folder)() != getattr(yours, folder)()
        assert getattr(mine, folder)() not in getattr(yours, folder)().parents
    assert (mine.keys(), mine.models()) == (yours.keys(), yours.models())


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "-x", "x" * 65, "é", "a\0"])
def test_a_name_that_can_be_no_folder_is_no_tenant(tmp_path: Path, name: str) -> None:
    with pytest.raises(tn.ValidationError, match="The tenant"):
        Home(tmp_path, name)


def test_a_service_keeps_the_home_it_was_made_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: tn.BatchData
) -> None:
    with tn.ServiceClient() as service:
        home = Home.of_environment()
        monkeypatch.setenv("TENSAFE_HOME", str(tmp_path / "other"))
        tc = service.create_training_client()
        tc.save_state().result()
        assert tc.history.path == home.event_log(tc.training_client_id)
    assert not (tmp_path / "other").exists()
