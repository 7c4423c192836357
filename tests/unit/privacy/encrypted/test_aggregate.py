"""The mean of updates that the server could not read, and what a round refuses."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest

from tensafe_nb.errors import EncryptionContextError, ValidationError
from tensafe_nb.privacy.encrypted import Aggregator, Cohort, CohortMember, Layout
from tensafe_nb.privacy.encrypted.aggregate import GRID, Tensors
from tensafe_nb.privacy.encrypted.scheme import scheme_of


def updates(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    dice = np.random.default_rng(seed)
    a = dice.normal(size=(2, 30)).astype(np.float32)
    return [
        {
            "q.lora_A": a,
            "q.lora_B": dice.normal(size=(50, 2)) / 50,
            "v.lora_B": dice.normal(size=(70, 2)) / 50,
        }
        for _ in range(count)
    ]


def round_of(given: list[dict[str, np.ndarray]]) -> tuple[Cohort, Aggregator, list[CohortMember]]:
    frozen = ["lora_A"] if any("lora_A" in name for name in given[0]) else []
    cohort = Cohort(Layout.of(given[0], frozen), members=len(given))
    members = [CohortMember(cohort.secret_bytes(), number) for number in range(len(given))]
    return cohort, Aggregator(cohort.public_bundle()), members


def test_the_mean_is_that_in_clear_on_a_grid() -> None:
    given = updates(3)
    _, server, members = round_of(given)
    for member, update in zip(members, given, strict=True):
        server.add(member.encrypt(update))
    total = server.total()
    for member in members:
        mean = member.decrypt(total)
        assert set(mean) == {"q.lora_B", "v.lora_B"}
        for name, values in mean.items():
            assert values.dtype == np.float32
            assert np.abs(values - np.mean([one[name] for one in given], axis=0)).max() < 1e-6
            assert (values / GRID == np.round(values / GRID)).all(), "raw CKKS values tell of the secret key"


def test_a_sum_at_the_edge_of_what_is_taken_does_not_wrap_around() -> None:
    edge = np.full(8192, 4095.9)
    edge[::3] *= -1
    given = [{"w": edge}, {"w": edge}]
    cohort, server, members = round_of(given)
    for member, update in zip(members, given, strict=True):
        server.add(member.encrypt(update))
    assert np.abs(members[0].decrypt(server.total())["w"] - edge).max() < 1e-3  # float32 has 24 bits
    with pytest.raises(ValidationError, match="too large"):
        CohortMember(cohort.secret_bytes(), 1).encrypt({"w": edge * 1.001})


def test_members_count_by_their_weights_which_the_server_does_not_see() -> None:
    given, weights = updates(3), [1.0, 0.25, 0.5]
    _, server, members = round_of(given)
    for member, update, weight in zip(members, given, weights, strict=True):
        server.add(member.encrypt(update, weight=weight))
    mean = members[0].decrypt(server.total())
    exact = np.average([one["q.lora_B"] for one in given], axis=0, weights=weights)
    assert np.abs(mean["q.lora_B"] - exact).max() < 1e-6


def test_with_one_frozen_a_the_mean_of_the_bs_is_the_mean_of_the_products() -> None:
    given = updates(3)
    _, server, members = round_of(given)
    for member, update in zip(members, given, strict=True):
        server.add(member.encrypt(update))
    mean = members[1].decrypt(server.total())
    a = given[0]["q.lora_A"]
    products = np.mean([one["q.lora_B"] @ one["q.lora_A"] for one in given], axis=0)
    assert np.abs(mean["q.lora_B"] @ a - products).max() < 1e-6
    given[1]["q.lora_A"] = a + 1e-6
    with pytest.raises(ValidationError, match="frozen tensors"):
        round_of(updates(2))[2][0].encrypt(given[1])


def test_an_update_is_clipped_and_noised_by_its_member() -> None:
    given = updates(2)
    for one in given:
        one["q.lora_B"] *= 100
    _, server, members = round_of(given)
    for member, update in zip(members, given, strict=True):
        server.add(member.encrypt(update, clip=0.5))
    mean = members[0].decrypt(server.total())
    flat = [Layout.of(one, ["lora_A"]).flat(one) for one in given]
    exact = np.mean([row * 0.5 / np.linalg.norm(row) for row in flat], axis=0)
    assert np.abs(np.concatenate([values.ravel() for values in mean.values()]) - exact).max() < 1e-6

    zero = [{"w": np.zeros(20_000)} for _ in range(2)]
    cohort = Cohort(Layout.of(zero[0]), members=2)
    server = Aggregator(cohort.public_bundle())
    members = [CohortMember(cohort.secret_bytes(), number) for number in range(2)]
    for member, update in zip(members, zero, strict=True):
        server.add(member.encrypt(update, clip=0.5, noise_multiplier=2.0))
    noise = members[0].decrypt(server.total())["w"]
    assert noise.std() == pytest.approx(2.0 * 0.5 / 2, rel=0.05), (
        "sigma C in the sum, half of it in the mean of two"
    )


def test_the_sum_is_not_given_out_before_all_are_in_it_and_each_is_in_it_once() -> None:
    given = updates(3)
    _, server, members = round_of(given)
    first = members[0].encrypt(given[0])
    server.add(first)
    with pytest.raises(ValidationError, match=r"\[1, 2\] are missing"):
        server.total()
    with pytest.raises(EncryptionContextError, match="in already"):
        server.add(first)
    with pytest.raises(ValidationError, match="encrypted already"):
        members[0].encrypt(given[0])


def test_an_update_that_was_altered_or_is_of_another_round_leaves_the_sum_as_it_was() -> None:
    given = updates(2)
    cohort, server, members = round_of(given)
    _, _, others = round_of(given)
    server.add(members[0].encrypt(given[0]))
    good = members[1].encrypt(given[1])
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 1
    few = cohort.connection.seal("update", 1, {}, [])
    junk = cohort.connection.seal("update", 1, {}, [b"junk"])
    nobody = cohort.connection.seal("update", 2, {}, [b"junk"])
    for wrong in (bytes(bad), others[1].encrypt(given[1]), few, junk, nobody, b"", bytes(10**6)):
        with pytest.raises(EncryptionContextError):
            server.add(wrong)
    server.add(good)
    exact = np.mean([one["q.lora_B"] for one in given], axis=0)
    assert np.abs(members[0].decrypt(server.total())["q.lora_B"] - exact).max() < 1e-6


def test_a_round_can_be_stopped_between_ciphertexts_and_goes_on_as_if_it_had_not_begun() -> None:
    given = [{"w": np.full(18_000, float(n))} for n in range(2)]  # of three ciphertexts
    cohort = Cohort(Layout.of(given[0]), members=2)
    server = Aggregator(cohort.public_bundle())
    members = [CohortMember(cohort.secret_bytes(), number) for number in range(2)]
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 2:
            raise InterruptedError

    for member, update in zip(members, given, strict=True):
        with pytest.raises(InterruptedError):
            member.encrypt(update, tick=stop)
        encrypted = member.encrypt(update)
        with pytest.raises(InterruptedError):
            server.add(encrypted, tick=stop)
        server.add(encrypted)
    with pytest.raises(InterruptedError):
        members[0].decrypt(server.total(), tick=stop)
    assert np.abs(members[0].decrypt(server.total())["w"] - 0.5).max() < 1e-6
    assert seen == [(0, 3), (1, 3), (2, 3)] * 5


def test_a_total_of_others_is_refused() -> None:
    given = updates(2)
    cohort, server, members = round_of(given)
    with pytest.raises(EncryptionContextError):
        members[0].decrypt(cohort.connection.seal("total", 1, {}, []))
    for member, update in zip(members, given, strict=True):
        server.add(member.encrypt(update))
    other = round_of(given)[2][0]
    with pytest.raises(EncryptionContextError, match="another connection"):
        other.decrypt(server.total())


def test_the_server_of_a_round_holds_no_key_of_the_scheme() -> None:
    given = updates(2)
    cohort, server, _ = round_of(given)
    seal = scheme_of(cohort.parameters).seal
    able = (seal.SecretKey, seal.Decryptor, seal.KeyGenerator, seal.Encryptor)
    assert not any(isinstance(value, able) for value in vars(server).values())
    assert cohort._secret[100:200] not in cohort.public_bundle() and cohort._secret.hex() not in repr(cohort)


@pytest.mark.parametrize(
    ("update", "options", "words"),
    [
        ({"w": np.zeros(3)}, {}, "differs"),
        ({"w": np.zeros(4), "v": np.zeros(1)}, {}, "differs"),
        ({"w": np.full(4, np.nan)}, {}, "NaN"),
        ({"w": np.full(4, 1e5)}, {}, "too large"),
        ({"w": np.zeros(4)}, {"weight": 0}, "weight"),
        ({"w": np.zeros(4)}, {"weight": 1.5}, "weight"),
        ({"w": np.zeros(4)}, {"clip": -1}, "clip"),
        ({"w": np.zeros(4)}, {"noise_multiplier": 1.0}, "clip="),
        ({"w": np.zeros(4)}, {"noise_multiplier": 1.0, "clip": 1.0, "weight": 0.5}, "weight=1"),
    ],
)
def test_updates_that_do_not_fit_are_refused(update: Tensors, options: dict[str, float], words: str) -> None:
    cohort = Cohort(Layout.of({"w": np.zeros(4)}), members=2)
    with pytest.raises(ValidationError, match=words):
        CohortMember(cohort.secret_bytes(), 0).encrypt(update, **options)


def test_cohorts_and_members_that_cannot_be_are_refused() -> None:
    layout = Layout.of({"w": np.zeros(4)})
    for members in (1, 5000, "3", True):
        with pytest.raises(ValidationError, match="2 to 4096"):
            Cohort(layout, members=members)  # type: ignore[arg-type]
    for tensors in ({}, {"lora_A": np.zeros(3)}):
        with pytest.raises(ValidationError, match="to average"):
            Layout.of(tensors, frozen=["lora_A"])
    cohort = Cohort(layout, members=2)
    with pytest.raises(ValidationError, match="0 to 1"):
        CohortMember(cohort.secret_bytes(), 2)
    for wrong in (b"{}", b"[]", b"\xff", cohort.public_bundle()):
        with pytest.raises(EncryptionContextError, match="secret_bytes"):
            CohortMember(wrong, 0)


def test_what_a_newcomer_gives_by_mistake_is_answered_in_our_words() -> None:
    import torch

    update = {"q.lora_A": np.ones((2, 3)), "q.lora_B": np.ones((4, 2))}
    cohort = Cohort(Layout.of(update, frozen="lora_A"), members=2)
    assert cohort.layout == Layout.of(update, frozen=["lora_A"]), "a text is one name"
    member, server = CohortMember(cohort.secret_bytes(), 0), Aggregator(cohort.public_bundle())
    mistakes: list[tuple[Any, str]] = [
        (lambda: Layout.of([1, 2]), "arrays by name"),
        (lambda: Layout.of({"w": "x"}), "'w' of an update has numbers"),
        (lambda: Layout.of({"w": [[1], [1, 2]]}), "'w' of an update has numbers"),
        (lambda: Layout.of(update, frozen=["lora_a"]), r"\['lora_a'\]: no tensor has this"),
        (lambda: Cohort(update, members=2), r"Layout.of\(update\). This is a dict"),
        (lambda: member.encrypt([1, 2]), "update"),
        (lambda: member.encrypt({"q.lora_B": update["q.lora_B"]}), "no tensor has this"),
        (lambda: member.encrypt({**update, "q.lora_B": np.ones((4, 2)) * 1j}), "complex"),
        (lambda: member.encrypt(update, weight="a"), "weight='a' must be a number"),
        (lambda: member.encrypt(update, weight=np.nan), "weight=nan must be a number"),
        (lambda: member.encrypt(update, clip="1"), "clip='1' must be a number"),
        (lambda: member.encrypt(update, tick=3), "tick=3 must be a function"),
        (lambda: Aggregator(cohort.public_bundle(), keys=3), r"wrap\(\) and unwrap"),
    ]
    for mistake, words in mistakes:
        with pytest.raises(ValidationError, match=words):
            mistake()
    for one in (cohort, member, server):
        for spread in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(ValidationError, match="neither copied nor pickled"):
                spread(one)
    half = {
        name: torch.tensor(values, dtype=torch.bfloat16, requires_grad=True)
        for name, values in update.items()
    }
    server.add(member.encrypt(half))  # of torch, in any type
    with pytest.raises(EncryptionContextError, match="exchange bytes"):
        server.add(pickle.loads(pickle.dumps(update)))
    with pytest.raises(EncryptionContextError, match="was not parsed"):
        server.add(bytes(10**6))
