"""Hosts of generators: where an environment's conversations live between turns."""

from collections.abc import Sequence

from tensafe_nb.rlvr.environments.environment import Environment
from tensafe_nb.rlvr.environments.play import Host
from tensafe_nb.rlvr.environments.stage import Cue, Reply, Stage


class HereHost:
    """Generators that live in this process and are called on this thread, without a limit.

    Args:
        environment: Whose.
    """

    def __init__(self, environment: Environment) -> None:
        self._stage = Stage(environment)

    def play(self, cues: Sequence[Cue]) -> list[Reply]:
        """Make each cue."""
        return [self._stage.play(cue) for cue in cues]

    def close(self) -> None:
        """End nothing: there is nothing to end."""


def host_of(environment: Environment, timeout: float | None) -> Host:
    """Choose where an environment's generators live."""
    return HereHost(environment)
