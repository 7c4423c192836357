"""The line between client and core: plain data along it, several clients at its end, nothing of the core handed out."""

import gc
import inspect
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import tensafe_nb as tn
from tensafe_nb.core.bus import EventBus
from tensafe_nb.events import Alarm, Forked, Metrics, OperationFinished, Rollouts, StatusChanged
from tensafe_nb.futures import Promise
from tensafe_nb.protocol.codec import decode, encode
from tensafe_nb.protocol.results import StateSource, TrainingClientInfo
from tensafe_nb.transports.base import Channel, Transport


def parts(annotation: Any) -> Iterator[Any]:
    """Yield an annotation and everything inside it."""
    yield annotation
    for inner in typing.get_args(annotation):
        yield from (
            parts(inner) if not isinstance(inner, list) else [part for one in inner for part in parts(one)]
        )


@pytest.mark.parametrize("line", [Channel, Transport])
def test_no_bus_no_promise_and_but_for_subscribers_no_callable_is_part_of_the_line(line: type) -> None:
    members = {name: member for name, member in vars(line).items() if not name.startswith("_")}
    assert all(inspect.isfunction(member) or isinstance(member, property) for member in members.values())
    for name, member in members.items():
        hints = typing.get_type_hints(member.fget if isinstance(member, property) else member)
        crossing = {part for hint in hints.values() for part in parts(hint)}
        assert not crossing & {EventBus, Promise}, name
        calls = [part for part in crossing if typing.get_origin(part) is Callable]
        assert name == "subscribe" or not calls


def test_a_client_is_attached_to_by_its_id_and_outlives_the_first_that_held_it(
    service: tn.ServiceClient,
) -> None:
    first = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
    name = first.training_client_id
    transport = service._transport
    channel = transport.attach(name)
    first.ready().result()
    del first
    gc.collect()
    assert channel.info().status == "READY"
    again = service.get_training_client(name)
    assert again.training_client_id == name and again.optim_step().exception() is not None
    channel.detach()
    assert again.status == tn.ClientStatus.READY


def test_the_runs_of_a_client_that_attached_are_counted_on_from_those_before(
    service: tn.ServiceClient, batch: tn.BatchData
) -> None:
    tc = service.create_training_client(lora_config=tn.LoRAConfig(rank=2))
    tc.fit([batch], steps=1, show=False).result()
    name = tc.training_client_id
    channel = service._transport.attach(name)
    del tc
    gc.collect()
    again = service.get_training_client(name)
    run = again.fit([batch], steps=1, show=False)
    run.result()
    channel.detach()
    assert run.run_id == f"{name}/2"
    assert [record.run_id for record in tn.list_runs()] == [f"{name}/1", f"{name}/2"]


def test_an_unknown_id_and_a_closed_client_cannot_be_attached_to(service: tn.ServiceClient) -> None:
    tc = service.create_training_client()
    with pytest.raises(tn.TrainingClientNotFoundError, match=f"Known: .*{tc.training_client_id}"):
        service._transport.attach("tc-none")
    tc.close()
    with pytest.raises(tn.TrainingClientNotFoundError):
        service._transport.attach(tc.training_client_id)


def test_the_core_ends_with_the_last_client(service: tn.ServiceClient) -> None:
    tc = service.create_training_client()
    channel = service._transport.attach(tc.training_client_id)
    name = tc.training_client_id
    tc.ready().result()
    seen: list[str] = []
    channel.subscribe(lambda event: seen.append(type(event).__name__))
    del tc
    gc.collect()
    assert channel.info().status == "READY" and seen == []
    channel.detach()
    with pytest.raises(tn.TrainingClientNotFoundError):
        while True:  # until its thread has seen it
            service._transport.attach(name).detach()


@pytest.mark.parametrize(
    "event",
    [
        StatusChanged(status="READY"),
        OperationFinished(future_id="fut-1", operation="sample", duration=1.0),
        Forked(parent="a", artifact_id="b", child="c", step=0),
        Metrics(step=1, values={"loss": 1.0}),
        tn.events.Event(),
    ],
)
def test_what_only_the_core_can_tell_is_refused(tc: tn.TrainingClient, event: tn.events.Event) -> None:
    before = tc.history.last_seq
    with pytest.raises(tn.ValidationError, match="publish"):
        tc.publish(event)
    assert [told for told in tc.history.events(before) if type(told) is type(event)] == []


def test_what_runs_tell_is_numbered_by_the_core(tc: tn.TrainingClient) -> None:
    tc.ready().result()
    told = [
        tc.publish(Metrics(step=1, values={"loss": 1.0}, run_id="mine")),
        tc.publish(Alarm(run_id="mine", step=1, name="nan", level="red", message="m", remedy="r")),
        tc.publish(Rollouts(run_id="mine", step=1, rollouts=2, path="1/step-1.jsonl")),
    ]
    assert [event.seq for event in told] == list(range(told[0].seq, told[0].seq + 3))
    assert list(tc.history.events(after=told[0].seq - 1)) == told


def test_a_source_is_plain_data_that_names_one_state() -> None:
    source = StateSource(future_id="fut-1", parent="tc-1")
    assert decode(encode(source)) == source
    for wrong in ({}, {"artifact_id": "a", "future_id": "f", "parent": "p"}, {"future_id": "f"}):
        with pytest.raises(tn.ValidationError, match="A source is"):
            StateSource(**wrong)


def test_the_core_finds_a_state_that_is_still_being_written_by_its_future(tc: tn.TrainingClient) -> None:
    saved = tc.save_state()
    transport = tc._transport
    child = transport.create(tc.config, StateSource(future_id=saved.future_id, parent=tc.training_client_id))
    ready = child.ready().result()
    assert ready.source == StateSource(future_id=saved.future_id, parent=tc.training_client_id)
    assert [event.artifact_id for event in child.history.events(kinds=(Forked,))] == [saved.artifact_id]
    with pytest.raises(tn.ValidationError, match="name the artifact"):
        transport.create(tc.config, StateSource(future_id="fut-gone", parent=tc.training_client_id))


def test_ready_is_a_handle_like_any_other(service: tn.ServiceClient) -> None:
    tc = service.create_training_client()
    handle = tc.ready()
    assert isinstance(handle, tn.FutureHandle) and handle.operation == "ready"
    assert isinstance(handle.result(), TrainingClientInfo) and handle.device == "cpu"
    assert handle.cancel() is False and handle.trained_parameters > 0
    nowhere = service.create_training_client(model_ref="./nowhere")
    with pytest.raises(tn.ModelLoadError):
        nowhere.ready().result()


def test_one_record_tells_everything_that_a_property_shows(tc: tn.TrainingClient) -> None:
    info = tc.ready().result()
    assert (info.step, info.policy_version, info.queue_depth, info.source) == (
        tc.step,
        tc.policy_version,
        0,
        None,
    )
    assert (info.context, info.dp_metrics, info.status) == (tc.context, None, "READY")
    assert decode(encode(info)) == info
