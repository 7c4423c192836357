"""Hosts of generators: state between turns, a limit for each; what one that hangs costs its neighbours is nothing."""

import asyncio
import random
import re
import threading

import pytest

from tensafe_nb.errors import ClientClosedError
from tensafe_nb.rlvr import Outcome, RolloutEnded, Turn, environment
from tensafe_nb.rlvr.environments.hosts import HereHost, ProcessHost, host_of
from tensafe_nb.rlvr.environments.stage import Cue

TIMEOUT = 1.0


@environment
def speaks(row):
    said = yield f"{row['n']}: {random.random()}"
    times = 1
    while said != "end":
        if said == "hang":
            threading.Event().wait()
        if said == "die":
            import os

            os._exit(3)
        if said == "raise":
            raise KeyError("lost")
        said = yield Turn(f"{said} {times} {random.random()}", reward=times)
        times += 1
    return Outcome(random.random(), {"times": times})


def begin(count):
    return [Cue(n, "begin", {"n": n}, seed=n) for n in range(count)]


def say(*words):
    return [Cue(n, "said", word) for n, word in enumerate(words)]


@pytest.fixture
def in_processes():
    host = host_of(speaks, TIMEOUT)
    assert isinstance(host, ProcessHost)
    yield host
    host.close()


def test_a_process_says_what_a_call_here_says(in_processes):
    here = host_of(speaks, None)
    assert isinstance(here, HereHost)
    for cues in (begin(3), say("a", "b", "c"), say("d", "end", "e"), [Cue(0, "said", "end")]):
        assert in_processes.play(cues) == here.play(cues)


def test_random_numbers_of_a_conversation_are_its_own(in_processes):
    alone = host_of(speaks, None)
    first, _, third = in_processes.play(begin(3))
    (same,) = alone.play([Cue(2, "begin", {"n": 2}, seed=2)])
    assert same == third
    assert first.told.split()[1] != third.told.split()[1]
    state = random.getstate()
    alone.play([Cue(2, "said", "x")])
    assert random.getstate() == state, "those of the notebook are left as they were"


def test_what_hangs_or_dies_or_raises_ends_alone_and_the_others_go_on(in_processes):
    here = host_of(speaks, None)
    here.play(begin(6)), in_processes.play(begin(6))
    here.play(say(*"abcdef")), in_processes.play(say(*"abcdef"))
    hung, raised, dead, *rest = in_processes.play(say("hang", "raise", "die", "x", "y", "end"))
    assert (hung.error, hung.timed_out) == ("took longer than 1 s and was ended", True)
    assert raised.error == "KeyError: 'lost' (line 13 of speaks: raise KeyError(\"lost\"))"
    assert dead.error == "the process of the environment ended during this turn"
    assert rest == here.play([Cue(3, "said", "x"), Cue(4, "said", "y"), Cue(5, "said", "end")])
    assert in_processes.play([Cue(3, "said", "z")]) == here.play([Cue(3, "said", "z")])


def test_one_that_tells_something_else_when_it_is_played_again_is_not_gone_on_with():
    @environment
    def remembers(row):
        import os

        said = yield str(os.getpid())
        if said == "die":
            os._exit(3)
        yield "more"

    host = host_of(remembers, TIMEOUT)
    host._houses = host._houses[:1]
    host.play(begin(2))
    dead, other = host.play(say("die", "x"))
    host.close()
    assert "ended during this turn" in dead.error
    assert "played again, it told something else" in other.error


def test_a_rollout_that_is_over_can_still_get_a_reward():
    @environment
    def lenient(row):
        try:
            yield "go on"
        except RolloutEnded as ended:
            return Outcome(0.25, meta={"why": ended.reason})

    @environment
    def strict(row):
        yield "go on"

    for made, reason in ((lenient, "length"), (strict, "length"), (strict, "turns")):
        host = host_of(made, None)
        host.play(begin(1))
        (reply,) = host.play([Cue(0, "over", reason)])
        if made is lenient:
            assert (reply.reward, reply.meta, reply.error) == (0.25, {"why": "length"}, None)
        else:
            assert (reply.reward, reply.error is None) == (None, reason == "length")


def test_async_generators_are_awaited_together_and_yield_their_outcome():
    @environment
    async def judged(row):
        said = yield str(row["n"])
        if said == "hang":
            await asyncio.sleep(60)
        if said == "meet":
            await asyncio.wait_for(row["barrier"].wait(), 5)
        if said == "nothing":
            return
        yield Outcome(float(row["n"]), {"said": len(said)})

    host = host_of(judged, 0.3)
    barrier = asyncio.Barrier(2)
    assert [
        r.told for r in host.play([Cue(n, "begin", {"n": n, "barrier": barrier}) for n in range(4)])
    ] == list("0123")
    first, hung, other, nothing = host.play(say("meet", "hang", "meet", "nothing"))
    host.close()
    assert (first.reward, first.parts, other.reward) == (0.0, {"said": 4.0}, 2.0)
    assert hung.error == "took longer than 0.3 s and was cancelled"
    assert "yields it last, as rlvr.Outcome(reward)" in nothing.error


def test_what_cannot_be_sent_runs_on_a_thread_with_a_warning():
    lock = threading.Lock()

    @environment
    def locked(row):
        with lock:
            pass
        said = yield "a"
        return len(said)

    with pytest.warns(UserWarning, match="The environment 'locked' cannot be sent to another process"):
        host = host_of(locked, TIMEOUT)
    host.play(begin(2))
    assert [reply.reward for reply in host.play(say("b", "cc"))] == [1, 2]
    host.close()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (3, "it yielded '3': return it, as the reward; what is told is a text"),
        (None, "it yielded 'None'; what is told is a text, a list of messages"),
        (Turn("a", reward=float("nan")), "reward='nan': a finite number is expected"),
        ([], "it yielded '\\[\\]'"),
    ],
)
def test_what_cannot_be_told_is_an_error_of_its_conversation(told, message):
    @environment
    def odd(row):
        yield told

    (reply,) = host_of(odd, None).play(begin(1))
    assert re.search(message, reply.error), reply.error


def test_a_host_that_is_closed_in_mid_turn_says_so(in_processes):
    in_processes.play(begin(1))
    closing = threading.Timer(0.2, in_processes.close)
    closing.start()
    with pytest.raises(ClientClosedError, match="were closed while it played"):
        in_processes.play(say("hang"))
    closing.join()
