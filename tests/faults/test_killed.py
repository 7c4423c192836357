"""A server that is killed in the middle of anything goes on where it was: nothing is lost, nothing is done twice."""

import itertools
import os
from pathlib import Path
from typing import Any

import pytest

import tensafe_nb as tn
from tensafe_nb.events import OperationFinished, OperationStarted
from tests.faults.killing import Killer, Nursery, killed_server
from tests.faults.programs import Program, same
from tests.parity.serving import eventually

OFTEN = {"MOST_OPERATIONS": 6, "SHARE": 0}  # automatic checkpoints in the middle of what little is done


def undergo(nursery: Nursery, seed: int, steps: int, home: Path, most: int = 1_000) -> int:
    """Run a program on a server that is killed again and again, and beside it undisturbed; return the kills."""
    with (
        killed_server(nursery, home, bounds=OFTEN) as server,
        tn.ServiceClient(server.url, server.token) as service,
        tn.ServiceClient() as embedded,
    ):
        killed = Program(service, seed, steps)
        with Killer(server, killed.tc, seed, most) as killer:
            killed.run()
        undisturbed = Program(embedded, seed, steps, killed.cancelled)
        undisturbed.run()
        same(undisturbed, killed)
        names = [artifact.name for artifact in service.list_artifacts()]
        saves = [h for h in killed.handles if h.operation == "save_state" and h.exception() is None]
        assert len(names) == len(saves) == len(set(names))
        assert service.verify_audit_log().ok
    print(f"seed {seed}: {killer.kills} kills, ready again within {max(server.seconds[1:], default=0):.1f} s")
    return killer.kills


@pytest.mark.faults
def test_a_server_killed_in_the_middle_comes_to_the_same_bit_for_bit(
    nursery: Nursery, tmp_path: Path
) -> None:
    assert undergo(nursery, 1, 8, tmp_path / "server", most=3) == 3


@pytest.mark.faults
def test_samples_that_were_drawn_together_are_drawn_again_and_told_of_once(
    nursery: Nursery, tmp_path: Path
) -> None:
    def asked(service: tn.ServiceClient) -> tuple[tn.TrainingClient, list[Any]]:
        tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
        lengths = (300, 5, 400, 250)  # their seeds are the client's, in this order
        return tc, [tc.sample("def ", max_new_tokens=most, ignore_end=True) for most in lengths]

    with (
        killed_server(nursery, tmp_path / "server") as server,
        tn.ServiceClient(server.url, server.token) as service,
        tn.ServiceClient() as embedded,
    ):
        tc, handles = asked(service)
        handles[1].result()
        server.begin_again()
        for handle, other in zip(handles, asked(embedded)[1], strict=True):
            assert handle.result().sequences[0].tokens == other.result().sequences[0].tokens
        told = [type(event) for event in tc.history.events()]
        assert [told.count(kind) for kind in (OperationStarted, OperationFinished)] == [4, 4]


@pytest.mark.faults
def test_private_training_is_paid_for_once_and_what_was_lost_says_so(
    nursery: Nursery, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(10, 30) for b in (3, 5)]
    dp = tn.DPConfig(dataset_size=len(rows), noise_multiplier=1.0, target_epsilon=None)
    with (
        killed_server(nursery, tmp_path / "server") as server,
        tn.ServiceClient(server.url, server.token) as service,
    ):
        tc = service.create_training_client(
            model_ref="builtin:sums", lora_config=tn.LoRAConfig(rank=2), batch_size=4, dp_config=dp
        )
        taken = 0
        for number, draw in enumerate(tc.dp_batches(rows, steps=6)):
            handles = [tc.forward_backward(draw), tc.optim_step()]
            if number % 2 == 0:
                handles[number // 2 % 2].result()  # the gradient is there, or the step
                server.begin_again()
            errors = [handle.exception() for handle in handles]
            taken += errors[1] is None
            assert all(error is None or "lost" in str(error) for error in errors), errors
            assert tc.step == taken == tc.refresh().step  # no step that was told of is lost
        spent, at_most = tc.privacy_statement().epsilon, tc.what_if(steps=6).epsilon
        assert spent is not None and spent == pytest.approx(at_most)  # six draws: each was paid for, once
        assert tc.refresh().dp_metrics is not None
        server.begin_again()
        tc.ready().result()
        assert tc.privacy_statement().epsilon == spent and tc.refresh().step == taken


@pytest.mark.faults
def test_a_kernel_that_died_attaches_from_another_machine_and_sees_everything(
    nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = tn.BatchData([[5, 6, 7, 8]])
    with killed_server(nursery, tmp_path / "server", bounds=OFTEN) as server:
        with tn.ServiceClient(server.url, server.token) as service:
            tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
            run = tc.fit([batch] * 9, show=False)
            eventually(lambda: tc.step >= 4)
            with tn.ServiceClient(server.url, server.token) as beside:  # another kernel of the same home
                twin = beside.get_training_client(tc.training_client_id)
                server.begin_again()
                twin.forward(batch).result()  # no gradients, which a step of the run would take
            run.result()
            losses, step = tc.history["loss"].tolist(), tc.step
            assert step == 9 == len(losses)
        monkeypatch.setenv("TENSAFE_HOME", str(tmp_path / "another machine"))
        server.begin_again()
        with tn.ServiceClient(server.url, server.token) as service:
            again = service.get_training_client(tc.training_client_id)
            assert again.step == step
            eventually(lambda: len(again.history["loss"]) == step)
            assert again.history["loss"].tolist() == losses and len(again.history.state.runs) == 1
            again.forward_backward(batch)
            assert again.optim_step().result().step == step + 1


@pytest.mark.faults
def test_when_the_server_stays_away_everything_that_waits_fails_after_the_patience(
    nursery: Nursery, tmp_path: Path
) -> None:
    with (
        killed_server(nursery, tmp_path / "server") as server,
        tn.ServiceClient(server.url, server.token, patience=1.0) as service,
    ):
        tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
        tc.ready().result()
        waiting = [tc.sample("abc", max_new_tokens=100) for _ in range(20)]
        run = tc.fit([tn.BatchData([[5, 6, 7]])] * 3, show=False)
        server.kill()
        waiting.append(tc.forward_backward(tn.BatchData([[5, 6, 7]])))
        errors = [handle.exception(30) for handle in waiting]
        assert isinstance(errors[-1], tn.errors.ServerConnectionError)
        assert all(error is None or isinstance(error, tn.errors.ServerConnectionError) for error in errors)
        with pytest.raises(tn.errors.TGTinkerError):
            run.result(30)
        server.begin()


@pytest.mark.soak
@pytest.mark.timeout(7_200)
def test_a_server_killed_two_hundred_times_comes_to_the_same_bit_for_bit(
    nursery: Nursery, tmp_path: Path
) -> None:
    kills = 0
    wanted = int(os.environ.get("TSNB_KILLS", "200"))
    for seed in itertools.count(100):
        kills += undergo(nursery, seed, 12, tmp_path / str(seed))
        print(f"seed {seed}: {kills} kills so far", flush=True)
        if kills >= wanted:
            return
