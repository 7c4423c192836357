"""The steps of `make gpu`, on a CPU with a tiny model: so that the script works when a GPU is at hand."""

import numpy as np
import pytest
import torch

from scripts import gpu


def test_all_of_it_runs_on_a_cpu_with_a_tiny_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu", "--size", "tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert lines[0].startswith("`make gpu`: CPU, tiny, torch ")
    assert {line.count("|") for line in rows} == {4}
    assert sum(line.endswith("| yes |") for line in rows) == 8 + 1 + 2
    assert not [line for line in rows if line.endswith("| NO |")]
    for what in ("a step of 2×16 tokens", "16 samples of 4 tokens", "an RL update on 16 rollouts"):
        assert any(what in line for line in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    shown = capsys.readouterr()
    assert "no CUDA GPU" in shown.err and shown.out == ""


def test_what_differs_is_said_and_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "PARTS", (lambda *_: [gpu.Line("loss, apart", "2.0e-02", False)],))
    assert gpu.main(["--device", "cpu", "--size", "tiny"]) == 1
    assert "| loss, apart | 2.0e-02 | NO |" in capsys.readouterr().out


def test_a_distance_is_relative_to_the_largest_number() -> None:
    assert gpu.distance(np.array([[100.0, 1.0]]), np.array([[101.0, 1.0]])) == pytest.approx(1 / 101)
    assert gpu.distance([(0.5,), (0.25, 0.0)], [(0.5,), (0.25, 0.125)]) == 0.125
    assert gpu.distance(1.0, 1.0) == 0
    assert gpu.distance([1.0], [1.0, 2.0]) == float("inf")


def test_the_model_to_be_measured_has_about_a_billion_weights() -> None:
    size = gpu.SIZES["1b"]
    layer = size.hidden * (2 * size.hidden + 2 * size.hidden // 4) + 3 * size.hidden * size.inner
    assert 0.9e9 < size.layers * layer + 2 * size.vocabulary * size.hidden < 1.2e9
