"""`tensafe-nb artifacts | keys | audit`: what a person can find out and do without a notebook."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import tensafe_nb as tn
from tensafe_nb.cli import main as cli
from tensafe_nb.protocol.results import SaveStateResult

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = cli.main(list(arguments))
        except SystemExit as error:
            status = int(error.code or 0)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def saved(service: tn.ServiceClient, tc: tn.TrainingClient, batch: tn.BatchData) -> SaveStateResult:
    tc.forward_backward(batch), tc.optim_step()
    return tc.save_state(name="first", metadata={"note": "hello ✓"}).result()


def test_list_shows_what_there_is(run: Run, saved: SaveStateResult) -> None:
    status, out, _ = run("artifacts", "list")
    assert status == 0
    assert re.search(rf"{saved.artifact_id} .* step +1 .* builtin:tiny .*first .*hello ✓", out)


def test_an_empty_home_says_how_to_fill_it(run: Run) -> None:
    assert "tc.save_state()" in run("artifacts", "list")[1]
    assert "the first save makes one" in run("keys", "list")[1]


def test_verify_reads_everything_and_a_flipped_byte_is_bad(
    run: Run, saved: SaveStateResult, tmp_path: Path
) -> None:
    assert run("artifacts", "verify")[:2] == (0, f"ok   {saved.artifact_id}  {saved.content_hash}\n")
    (path,) = (tmp_path / "home" / "artifacts").rglob("*.tsnb")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    status, out, _ = run("artifacts", "verify", saved.artifact_id)
    assert status == 1 and out.startswith(f"BAD  {saved.artifact_id}: ") and "altered" in out
    assert run("artifacts", "verify")[0] == 1


@pytest.mark.parametrize("pulled", [False, True], ids=["by name", "a file"])
def test_decrypt_writes_the_parts_in_the_clear(
    run: Run, saved: SaveStateResult, service: tn.ServiceClient, tmp_path: Path, pulled: bool
) -> None:
    from safetensors.numpy import load_file

    target = "first"
    if pulled:
        target = str(service.pull_artifact("first", to=tmp_path / "checkpoint.bin"))
        service.delete_artifact("first")
    status, out, _ = run("artifacts", "decrypt", target, "--to", "clear")
    assert status == 0 and "in the clear" in out
    folder = tmp_path / "clear"
    assert sorted(path.name for path in folder.iterdir()) == [
        "metadata.json",
        "model.safetensors",
        "optimizer.safetensors",
        "trainer.json",
    ]
    assert json.loads((folder / "metadata.json").read_text()) == {"note": "hello ✓"}
    assert json.loads((folder / "trainer.json").read_text())["step"] == 1
    assert any("lora_A" in name for name in load_file(folder / "model.safetensors"))
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())
    assert run("artifacts", "decrypt", target, "--to", "clear")[0] == 1, "nothing is overwritten"


def test_decrypt_explains_itself(run: Run) -> None:
    _, out, _ = run("artifacts", "--help")
    assert "list" in out and "decrypt" in out and "ids or names" in out
    _, out, _ = run("artifacts", "decrypt", "--help")
    assert "id, name, or the path of a sealed file" in out and "TENSAFE_PASSPHRASE" in out


def test_export_writes_a_peft_folder(run: Run, saved: SaveStateResult, tmp_path: Path) -> None:
    assert run("artifacts", "export", "first", "--to", "adapter")[0] == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_without_the_key_nothing_opens_and_the_message_names_it(
    run: Run, saved: SaveStateResult, tmp_path: Path
) -> None:
    (tmp_path / "home" / "keys" / "local-keys.json").unlink()
    assert "its key is not here" in run("artifacts", "list")[1]
    status, _, err = run("artifacts", "decrypt", saved.artifact_id, "--to", "clear")
    assert status == 1 and saved.encryption.key_id in err
    assert not (tmp_path / "clear").exists()


def test_keys_are_listed_made_and_rotated(
    run: Run, saved: SaveStateResult, service: tn.ServiceClient
) -> None:
    old = saved.encryption.key_id
    assert re.search(rf"{old}  file .* seals new artifacts", run("keys", "list")[1])
    assert run("keys", "new")[0] == 0
    status, out, _ = run("keys", "rotate")
    new = service.get_artifact("first").encryption.key_id
    assert status == 0 and out.startswith(f"1 artifacts now open with {new}")
    listed = run("keys", "list")[1]
    assert re.search(rf"{new} .* seals new artifacts", listed) and re.search(rf"{old} ", listed)
    status, _, err = run("keys", "forget", new)
    assert status == 1 and "Make a new one first" in err
    status, out, _ = run("keys", "forget", old)
    assert status == 0 and old in out and old not in run("keys", "list")[1]
    assert service.restore("first").load_state("first").step == 1
    assert service.verify_audit_log().ok


def test_the_audit_log_is_verified_against_anchors_and_checkpoints(
    run: Run, saved: SaveStateResult, service: tn.ServiceClient, tmp_path: Path
) -> None:
    sealed = service.pull_artifact("first", to=tmp_path / "checkpoint.bin")
    head = service.verify_audit_log().head
    assert head is not None
    status, out, _ = run("audit", "verify", "--anchor", head, "--artifact", str(sealed))
    assert status == 0 and out.startswith("ok: ") and out.count("anchor found") == 2
    (log,) = (tmp_path / "home" / "audit").rglob("audit.jsonl")
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:1] + lines[2:]))
    status, out, _ = run("audit", "verify")
    assert status == 1 and out.startswith("NOT OK")
    copy = tmp_path / "copy.jsonl"
    copy.write_text("".join(lines))
    assert run("audit", "verify", str(copy), "--anchor", head)[0] == 0
    assert run("audit", "verify", "nowhere.jsonl")[0] == 1


def test_a_path_that_cannot_be_used_is_one_message(run: Run, saved: SaveStateResult) -> None:
    for command in (
        ("artifacts", "decrypt", "first", "--to", "/proc/nowhere"),
        ("audit", "verify", "--artifact", "missing.bin"),
    ):
        status, _, err = run(*command)
        assert status == 1 and err.startswith("tensafe-nb ") and err.count("\n") == 1
