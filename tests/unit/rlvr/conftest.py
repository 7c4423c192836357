"""A training client, and an event for its runs."""

import threading

import pytest

from tensafe_nb.events import RunState
from tests.unit.rlvr.trainers import CONFIG


@pytest.fixture
def client(service):
    return service.create_training_client(CONFIG)


@pytest.fixture
def paused(client):
    """An event that is set whenever a run of the client has come to rest."""
    happened = threading.Event()
    client.subscribe(lambda event: isinstance(event, RunState) and event.state == "PAUSED" and happened.set())
    return happened
