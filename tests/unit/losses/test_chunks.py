"""Large vocabularies: logits a chunk at a time, with the same values and gradients and a fraction of the memory."""

import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import tensafe_nb as tn
from tensafe_nb.engine.engine import Engine
from tensafe_nb.engine.models.load import ASSETS
from tensafe_nb.losses import LossOutputs, resolve_loss
from tensafe_nb.losses.views import CHUNK, chunk_rows
from tests.close import assert_close

VOCABULARY, WIDTH = 49_152, 64
FLOAT = 4  # bytes


class Memory(TorchDispatchMode):
    """Adds up the bytes of the storages that are alive, and keeps the highest sum and the largest storage."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.largest = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_iter(answer):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given | self._known:
                self._count(tensor.untyped_storage())
        return answer

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        weakref.finalize(storage, self._free, key, size)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        self.largest = max(self.largest, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def model_output(positions: int, trained: bool, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=dtype).requires_grad_(trained)
    labels = torch.randint(0, VOCABULARY, (1, positions))
    return {
        "hidden": torch.randn(1, positions, WIDTH, dtype=dtype, requires_grad=True),
        "head": head,
        "labels": labels,
        "attention_mask": torch.ones_like(labels),
        "head_is_frozen": not trained,
    }


def loss_and_gradients(given: dict[str, Any], rows: int | None, **options: Any) -> list[Tensor]:
    outputs = LossOutputs(**given, chunk_rows=rows)
    value = resolve_loss("token_ce", **options)(
        outputs, {"labels": given["labels"][0], "input_ids": given["labels"]}
    )
    wanted = [given["hidden"], *(p for p in given["head"].parameters() if p.requires_grad)]
    mean = value.total / value.weight
    return [mean, *torch.autograd.grad(mean, wanted)]


def test_the_memory_that_a_test_counts_is_the_memory_there_is() -> None:
    with Memory() as memory:
        one = torch.ones(1000)
        view = one[10:].view(-1)
        two = one + 1
        del one, two
        assert (memory.alive, memory.peak, memory.largest) == (4000, 8000, 4000)
        del view
    assert memory.alive == 0


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_a_chunk_bounds_the_memory_of_token_ce_on_49152_tokens(trained: bool) -> None:
    rows = chunk_rows(VOCABULARY, WIDTH, head_is_frozen=not trained)
    chunk = rows * VOCABULARY * FLOAT
    assert chunk <= CHUNK * FLOAT
    head = VOCABULARY * WIDTH * FLOAT * trained  # a trained head has a gradient
    positions = 2 * rows
    inputs = (VOCABULARY + 8 * positions) * WIDTH * FLOAT  # the head, and states with their gradients
    chunked, plain = (memory_of(positions, trained, of) for of in (rows, None))
    assert chunked.largest <= chunk
    assert chunked.peak <= 3.1 * chunk + inputs + 3 * head
    assert plain.largest >= 2 * chunk
    assert plain.peak >= 1.5 * chunked.peak


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_more_positions_need_not_a_logit_more(trained: bool) -> None:
    fewer, more = (memory_of(positions, trained, rows=16) for positions in (64, 128))
    assert more.peak - fewer.peak <= 64 * 10 * WIDTH * FLOAT < 64 * VOCABULARY * FLOAT / 50


def memory_of(positions: int, trained: bool, rows: int | None) -> Memory:
    with Memory() as memory:
        loss_and_gradients(model_output(positions, trained), rows)
    return memory


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"ignore_index": 7}])
def test_chunks_change_neither_loss_nor_gradients(options: dict[str, Any], trained: bool) -> None:
    given = model_output(100, trained)
    given["labels"][0, :10] = 7
    plain, chunked = (loss_and_gradients(given, rows, **options) for rows in (None, 32))
    reference = F.cross_entropy(given["head"](given["hidden"])[0], given["labels"][0], **options)
    assert_close(chunked[0], reference)
    assert_close(chunked[1:], plain[1:], within=1e-4)  # what is left of 49,152 terms that cancel


def test_chunked_gradients_hold_up_to_finite_differences_whatever_is_made_of_the_values() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([[1, 2, 0, 3, -100]])
    weights = torch.randn(4, dtype=torch.float64)
    for frozen in (True, False):
        head = nn.Linear(3, 4, dtype=torch.float64).requires_grad_(not frozen)

        def weighted(hidden: Tensor, head: nn.Module = head, frozen: bool = frozen) -> Tensor:
            outputs = LossOutputs(
                hidden, head, labels, torch.ones_like(labels), chunk_rows=3, head_is_frozen=frozen
            )
            return (outputs.logprobs * weights).square().sum()

        hidden = torch.randn(1, 5, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(weighted, (hidden,))


def test_without_gradients_chunks_are_computed_and_forgotten() -> None:
    given = model_output(300, trained=False)
    with torch.no_grad(), Memory() as memory:
        value = LossOutputs(**given, chunk_rows=100).logprobs
    assert memory.largest <= 100 * VOCABULARY * FLOAT
    assert_close(value, LossOutputs(**given).logprobs)


def test_a_function_of_the_logits_must_return_one_value_for_each_position() -> None:
    outputs = LossOutputs(**model_output(4, trained=False), chunk_rows=2)
    with pytest.raises(tn.ValidationError, match=r"returned shape \(2, 49152\) for 2 positions: .* \(2,\)"):
        outputs.map_logits(lambda logits, labels: logits)


@pytest.mark.parametrize(
    ("positions", "sizes"),
    [(10, [10]), (12, [12]), (13, [7, 6]), (22, [11, 11]), (23, [8, 8, 7]), (30, [10, 10, 10])],
)
def test_chunks_are_alike_and_at_most_a_quarter_larger_than_asked_for(
    positions: int, sizes: list[int]
) -> None:
    asked: list[int] = []

    def counted(logits: Tensor, labels: Tensor) -> Tensor:
        asked.append(len(logits))
        return logits.sum(1)

    head = nn.Linear(2, 3).requires_grad_(False)
    labels = torch.zeros(1, positions, dtype=torch.long)
    hidden = torch.ones(1, positions, 2, requires_grad=True)
    outputs = LossOutputs(hidden, head, labels, labels + 1, chunk_rows=10, head_is_frozen=True)
    assert len(outputs.map_logits(counted)) == positions
    assert asked == sizes


def test_a_trained_head_takes_chunks_no_smaller_than_itself() -> None:
    assert chunk_rows(49_152, 576, head_is_frozen=True) == CHUNK // 49_152 == 170
    assert chunk_rows(49_152, 576, head_is_frozen=False) == 576
    assert chunk_rows(10**9, 1, head_is_frozen=True) == 1


# through the engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model of width 64 with 49,152 tokens."""
    import transformers

    folder: Path = tmp_path_factory.mktemp("large-vocabulary")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "tiny" / name, folder)
    return str(folder)


@pytest.mark.parametrize("lora", [tn.LoRAConfig(rank=2, alpha=2), None], ids=["LoRA", "all weights"])
def test_the_engine_takes_chunks_of_a_large_vocabulary_and_finds_the_same_gradients(
    folder: str, lora: Any
) -> None:
    engine = Engine(tn.TrainingConfig(model_ref=folder, lora_config=lora, dtype="float32", device="cpu"))
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (4, 100))  # 396 labels: more than a chunk
    batch = tn.BatchData(ids)
    with Memory() as memory:
        result = engine.forward_backward(batch, resolve_loss("token_ce"))
    assert memory.largest <= CHUNK * FLOAT
    found = [p.grad / engine.window.divisor for p in engine.parameters]
    engine.discard_gradients()
    logits = engine.model.causal(input_ids=torch.from_numpy(ids)).logits
    reference = F.cross_entropy(logits[:, :-1].flatten(0, 1), torch.from_numpy(ids)[:, 1:].flatten())
    expected = torch.autograd.grad(reference, engine.parameters)
    assert_close(result.loss, reference)
    assert_close(found, expected)


def test_a_bfloat16_model_takes_chunks_too(folder: str) -> None:
    config = tn.TrainingConfig(
        model_ref=folder, lora_config=tn.LoRAConfig(rank=2), dtype="bfloat16", device="cpu"
    )
    engine = Engine(config)
    batch = tn.BatchData(np.random.default_rng(0).integers(3, VOCABULARY, (4, 100)))
    result = engine.forward_backward(batch, resolve_loss("token_ce"))
    whole = engine.forward(batch, resolve_loss(whole_cross_entropy))
    assert result.loss == pytest.approx(whole.loss, rel=1e-3)
    assert result.grad_norm > 0


def whole_cross_entropy(outputs: LossOutputs, batch: Any) -> Tensor:
    return F.cross_entropy(outputs.logits, batch["labels"])
