"""Losses and rewards that a document registers are forgotten after it."""

import pytest


@pytest.fixture(autouse=True)
def _registries_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from tensafe_nb.losses import base
    from tensafe_nb.rlvr.rewards import reward as rewards

    for registry in (base._LOSSES, rewards._REWARDS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
