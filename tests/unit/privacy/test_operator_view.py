"""What stays at home: files for the operator's eyes only, and an audit log that tells no draw's size."""

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

import tensafe_nb as tn
from tensafe_nb.store.home import Home

ROWS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(10, 20) for b in (3, 5)]


def records() -> list[dict[str, Any]]:
    path = Home.of_environment().audit() / "audit.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def trained(service: tn.ServiceClient, pieces: bool) -> tn.TrainingClient:
    tc = service.create_training_client(
        model_ref="builtin:sums",
        lora_config=tn.LoRAConfig(rank=2),
        batch_size=10,
        dp_config=tn.DPConfig(dataset_size=20, target_epsilon=None),
    )
    for draw in tc.dp_batches(ROWS, steps=6):
        size = 1 if pieces else max(1, len(draw))
        for start in range(0, max(1, len(draw)), size):
            tc.forward_backward(draw.rows(start, min(len(draw), start + size)) if len(draw) else draw)
        tc.optim_step().result()
    tc.save_state().result()
    return tc


@pytest.mark.parametrize("pieces", [False, True])
def test_no_entry_tells_the_size_of_a_draw(service: tn.ServiceClient, pieces: bool) -> None:
    tc = trained(service, pieces)
    mine = [record for record in records() if record["training_client_id"] == tc.training_client_id]
    names = [record["operation"] for record in mine]
    assert names == ["forward_backward", "dp_charge", "optim_step"] * 6 + ["save_state"], (
        "however many calls there were"
    )
    for record in mine:
        assert record["request_size_bytes"] == 0 and record["duration_ms"] == 0
        for moment in ("started_at", "completed_at", "ts"):
            assert record[moment] % 86_400 == 0, "the day, and no more"
    assert len({record["request_hash"] for record in mine}) == 1
    assert service.verify_audit_log().ok
    assert len(service.get_audit_logs(operation="optim_step")) == 6


def test_what_fails_is_still_on_record(service: tn.ServiceClient) -> None:
    tc = trained(service, pieces=False)
    (draw,) = tc.dp_batches(ROWS, steps=1)
    tc.forward_backward(draw).result()
    with pytest.raises(tn.errors.PrivacyUnitError):
        tc.forward_backward(draw).result()
    failed = service.get_audit_logs(operation="forward_backward", limit=1)[0]
    assert not failed.success and failed.error_message == "PrivacyUnitError"


def test_a_client_without_privacy_is_on_record_as_before(service: tn.ServiceClient) -> None:
    tc = service.create_training_client(model_ref="builtin:sums", lora_config=tn.LoRAConfig(rank=2))
    for _ in range(2):
        tc.forward_backward({"input_ids": [[5, 6, 7, 8]]}).result()
    entries = service.get_audit_logs(operation="forward_backward")
    assert len(entries) == 2 and all(entry.request_size_bytes > 0 for entry in entries)
    assert all(entry.started_at % 86_400 for entry in entries)


@pytest.mark.skipif(sys.platform == "win32", reason="no file modes")
def test_every_file_of_the_home_is_for_its_owner_alone(service: tn.ServiceClient) -> None:
    umask = os.umask(0o000)
    try:
        trained(service, pieces=False)
        policy = service.create_training_client(
            model_ref="builtin:sums",
            batch_size=2,
            dp_config=tn.DPConfig(sampling="worst_case", target_epsilon=None),
        )
        trainer = tn.rlvr.RLVRTrainer(
            policy,
            [{"prompt": "12+34=", "answer": "046"}, {"prompt": "55+11=", "answer": "066"}],
            "exact_match",
            tn.rlvr.REINFORCE(baseline="rloo", mask_truncated=False),
            prompts_per_step=2,
            group_size=2,
            max_new_tokens=3,
        )
        trainer.run(steps=1, checkpoint_every=1, show=False).result()
    finally:
        os.umask(umask)
    files = [path for path in Path(Home.of_environment().root).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".jsonl", ".tsnb", ".json"}
    open_to_others = [str(p) for p in files if stat.S_IMODE(p.stat().st_mode) & 0o077]
    assert not open_to_others


def test_the_statement_names_the_operators_view_file_by_file(service: tn.ServiceClient) -> None:
    tc = trained(service, pieces=False)
    outside = " ".join(tc.privacy_statement().outside)
    for name in ("event log", "rollouts", "pictures", "audit log", "How long steps took"):
        assert name in outside, name
