"""What a call will cost: counts and bytes are those of the call itself. Its times are held in soak and bench."""

import pytest

from tensafe_nb.errors import EncryptionContextError, ValidationError
from tensafe_nb.privacy.encrypted import estimate
from tests.unit.privacy.encrypted.halves import activations, connected


@pytest.mark.parametrize("packing", [1, 8, 64])
def test_counts_and_bytes_of_an_estimate_are_those_of_the_call(packing: int) -> None:
    shape, tokens = (300, 200, 6), packing + 1
    cost = estimate(shape, tokens, packing=packing)
    client, server = connected(shape, tokens=packing)
    request = client.encrypt(activations(tokens, 300))
    reply = server.apply(request)
    assert (cost.rotations, cost.multiplications) == (server.counts.rotations, server.counts.multiplications)
    assert cost.upload_kb == pytest.approx(len(request) / 1e3, rel=0.03)
    assert cost.download_kb == pytest.approx(len(reply) / 1e3, rel=0.03)
    assert cost.galois_mb == pytest.approx(len(client.public_bundle()) / 1e6, rel=0.03)


def test_an_estimate_says_that_it_is_one_and_what_a_token_costs() -> None:
    cost = estimate((576, 576, 8), 64)
    assert str(cost).startswith("estimate for 64 token(s), 64 a ciphertext: server ")
    assert cost.per_token.upload_kb == cost.upload_kb / 64
    assert cost.per_token.galois_mb == cost.galois_mb
    assert cost.per_token.tokens == 1


def test_the_issues_figures_for_bytes() -> None:
    one = estimate((576, 576, 8), 64).per_token
    assert one.upload_kb <= 50 and one.download_kb <= 20


def test_what_cannot_be_estimated_is_refused() -> None:
    for tokens in (0, 4097, 1.0, True):
        with pytest.raises(ValidationError, match="1 to 4096"):
            estimate((8, 8, 1), tokens)  # type: ignore[arg-type]
    with pytest.raises(EncryptionContextError, match="Did you mean 'n8192-d2'"):
        estimate((8, 8, 1), 1, "n8192-d3")
