"""llama.cpp itself as the sampler: beside what is trained, and what it leaves behind; `make llama-cpp-parity`."""

import gc
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import tensafe_nb as tn
from tensafe_nb import rlvr
from tensafe_nb.engine.engine import Engine
from tensafe_nb.engine.models import gguf
from tensafe_nb.engine.models.load import ASSETS
from tensafe_nb.engine.sampling import llama_cpp
from tests.parity.serving import engine_of, serving_thread
from tests.unit.engine.models.test_gguf import write_gguf

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed here: make llama-cpp-parity")
pytestmark = [pytest.mark.soak]

SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # far from a uniform distribution
    "eos_token_id": 1,
    "bos_token_id": 0,
    "pad_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "llama-tied": lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama-biased": lambda: transformers.LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "llama-wide": lambda: transformers.LlamaConfig(**SHAPE, head_dim=32),
    "llama3": lambda: transformers.LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "llama-linear": lambda: transformers.LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}
    ),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=32),
}
NEAR = 0.03  # keys, values and products in float16, of a model with large logits; with wrong places it is 1 and more
PROMPTS = [[5, 6, 7, 300, 41], [8, 2000], list(range(9, 40))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    def make(kind: str) -> str:
        folder = tmp_path_factory.getbasetemp() / f"llama-cpp-{kind}"
        if not folder.exists():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]())
            for name, p in model.named_parameters():
                if "bias" in name:
                    torch.nn.init.normal_(p, std=0.1)
            model.save_pretrained(folder)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(ASSETS / "tiny" / name, folder)
        return str(folder)

    return make


def engine_with_adapter(model_ref: str, **lora: Any) -> Engine:
    settings = {"rank": 4, "alpha": 8, **lora}
    engine = Engine(
        tn.TrainingConfig(
            model_ref=model_ref, device="cpu", dtype="float32", lora_config=tn.LoRAConfig(**settings)
        )
    )
    trained(engine)
    return engine


def trained(engine: Engine, size: float = 0.1) -> None:
    stream = torch.Generator().manual_seed(0)
    for name, weight in engine.model.trainable:
        if ".lora_B." in name:
            weight.data = torch.randn(weight.shape, generator=stream) * size


def draw(of: Engine, prompts: Any = PROMPTS, **fields: Any) -> list[Any]:
    asked = {"max_new_tokens": 24, "seed": 7, "engine": "llama.cpp", **fields}
    return list(of.sample(prompts, tn.SamplingConfig(**asked)).sequences)


def off(engine: Engine, sequences: list[Any]) -> np.ndarray:
    """Return by how much each drawn token's logprob differs from the one under the weights that are trained."""
    longest = max(len(s.prompt_tokens) + len(s.tokens) for s in sequences)
    ids, mask, labels = (np.full((len(sequences), longest), fill) for fill in (0, 0, -100))
    for row, s in enumerate(sequences):
        whole, start = [*s.prompt_tokens, *s.tokens], len(s.prompt_tokens)
        ids[row, : len(whole)], mask[row, : len(whole)] = whole, 1
        labels[row, start - 1 : len(whole) - 1] = s.tokens
    scored = engine.compute_logprobs(tn.BatchData(ids, mask, labels)).logprobs
    return np.concatenate([s.raw_logprobs for s in sequences]) - scored[labels != -100]


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_says_of_a_base_in_float16_with_its_adapter_what_is_trained(folders: Any, kind: str) -> None:
    engine = engine_with_adapter(folders(kind))
    drawn = draw(engine, ignore_end=True)
    assert np.abs(off(engine, drawn)).max() < NEAR


def test_a_gguf_file_is_sampled_as_it_is_and_agrees_with_what_was_read_from_it(tmp_path: Path) -> None:
    engine = engine_with_adapter(str(write_gguf(tmp_path / "tiny.gguf")))
    assert engine.model.gguf_file == tmp_path / "tiny.gguf"
    drawn = draw(engine, ignore_end=True)
    assert np.abs(off(engine, drawn)).max() < NEAR


def test_its_greedy_tokens_are_those_of_torch(folders: Any) -> None:
    engine = engine_with_adapter(folders("llama"))
    ours, theirs = (draw(engine, temperature=0, engine=name) for name in ("torch", "llama.cpp"))
    assert [s.tokens for s in ours] == [s.tokens for s in theirs]


def test_a_row_is_the_same_whatever_its_batch_mates_and_when_those_end(folders: Any) -> None:
    engine = engine_with_adapter(folders("llama"))
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    together = draw(engine, prompts, num_samples=30, stop=["e"], max_new_tokens=40)
    assert len({len(s.tokens) for s in together}) > 5 and len(together) == 90 > llama_cpp.MOST_ROWS
    for index, prompt in enumerate(prompts):
        alone = draw(engine, [prompt], num_samples=30, stop=["e"], max_new_tokens=40)
        same = [
            a.tokens == b.tokens for a, b in zip(alone, together[30 * index : 30 * index + 30], strict=True)
        ]
        assert np.mean(same) > 0.9  # sums of other orders, rounded: now and then another token wins


def test_more_samples_than_it_decodes_together_take_turns(folders: Any) -> None:
    engine = engine_with_adapter(folders("llama"))
    drawn = draw(engine, [[5, 6, 7], [8]], num_samples=150, max_new_tokens=3, ignore_end=True)
    assert [s.prompt_index for s in drawn] == [0] * 150 + [1] * 150
    assert len({s.tokens for s in drawn}) > 100
    drawn = draw(engine, [[5, 6, 7]], num_samples=67, max_new_tokens=2)  # a prime
    assert len(drawn) == 67


def test_long_prompts_are_read_in_parts(folders: Any) -> None:
    engine = engine_with_adapter(folders("llama"))
    prompts = [[(7 * place + row) % 2000 for place in range(250)] for row in range(4)]
    drawn = draw(engine, prompts, max_new_tokens=5, ignore_end=True)
    assert np.abs(off(engine, drawn)).max() < NEAR


def test_pieces_stops_and_likeliest_tokens_are_those_of_any_sample(folders: Any) -> None:
    engine = engine_with_adapter(folders("llama"))
    pieces: list[Any] = []
    asked = tn.SamplingConfig(
        max_new_tokens=20,
        seed=3,
        engine="llama.cpp",
        temperature=0.7,
        top_p=0.9,
        top_logprobs=3,
        stop=("a", "o"),
    )
    whole = engine.sample(PROMPTS, asked, tell=pieces.append)
    for number, s in enumerate(whole.sequences):
        assert "".join(p.text for p in pieces if p.sequence == number) == s.text
        assert s.finish_reason in ("stop", "stop_string", "length") and len(s.top_logprobs) == len(s.tokens)
    assert engine.sample(PROMPTS, asked).sequences == whole.sequences


def test_a_cancelled_sample_ends_between_two_tokens_and_the_next_one_is_whole(folders: Any) -> None:
    engine = engine_with_adapter(folders("llama"))

    def tick(done: int, total: int) -> None:
        if done == 5:
            raise tn.FutureCancelledError("enough")

    with pytest.raises(tn.FutureCancelledError):
        engine.sample(PROMPTS, tn.SamplingConfig(engine="llama.cpp"), tick)
    assert draw(engine) == draw(engine)


def test_an_adapter_is_handed_over_once_for_each_version(
    folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    write = llama_cpp.write_gguf_adapter
    monkeypatch.setattr(llama_cpp, "write_gguf_adapter", lambda *args: (given.append(args), write(*args)))
    with tn.ServiceClient() as service:
        tc = service.create_training_client(
            model_ref=folders("llama"),
            lora_config=tn.LoRAConfig(rank=4),
            optimizer={"learning_rate": 0.05},
            dtype="float32",
        )
        asked = {"prompts": [[5, 6, 7]], "engine": "llama.cpp", "seed": 1, "max_new_tokens": 16}
        first = tc.sample(**asked).result().sequences
        assert given == []  # it adds nothing yet
        saved = tc.save_state()
        for _ in range(3):
            tc.forward_backward(tn.BatchData([[5, 6, 7, 8, 9]]))
            tc.optim_step()
        then = tc.sample(**asked).result()
        assert then.policy_version == 3 and then.sequences != first
        assert tc.sample(**asked).result().sequences == then.sequences and len(given) == 1
        assert np.abs(off(engine_of(tc), list(then.sequences))).max() < 0.1
        tc.load_state(saved.artifact_id).result()
        assert tc.sample(**asked).result().sequences == first


def test_clients_share_a_base_and_the_last_one_to_close_frees_it_and_no_file_is_left(folders: Any) -> None:
    def handed_over() -> tuple[int, list[str]]:
        """Return how much of files in memory is mapped, and which are open."""
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:base" in line]
        opened = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        return len(mapped), [name for name in opened if "memfd:adapter" in name or "memfd:base" in name]

    gc.collect()
    assert llama_cpp.BASES.all() == [] and handed_over() == (0, [])
    with tn.ServiceClient() as service:
        clients = [
            service.create_training_client(model_ref=folders("llama"), lora_config=tn.LoRAConfig(rank=rank))
            for rank in (2, 4)
        ]
        for tc in clients:
            tc.load_adapter({n: t + 0.1 for n, t in tc.read_adapter().result().tensors.items()}).result()
            tc.sample([[5, 6]], engine="llama.cpp", max_new_tokens=2).result()
        assert len(llama_cpp.BASES.all()) == 1 and handed_over() == (1, [])
        clients[0].close()
        clients[1].sample([[5, 6]], engine="llama.cpp", max_new_tokens=2).result()
        gc.collect()
        assert len(llama_cpp.BASES.all()) == 1
    gc.collect()
    assert llama_cpp.BASES.all() == [] and handed_over() == (0, [])


def test_a_server_samples_with_it_and_so_does_one_without_a_training_client(
    tmp_path: Path,
) -> None:
    with (
        serving_thread(tmp_path) as serving,
        tn.ServiceClient(serving.url, api_key=serving.tokens.mint("someone")) as service,
    ):
        model_ref = "builtin:tiny"
        tc = service.create_training_client(model_ref=model_ref, lora_config=tn.LoRAConfig(rank=2))
        asked = {"engine": "llama.cpp", "max_new_tokens": 8, "seed": 2}
        ours = tc.sample([[5, 6, 7]], **asked).result()
        saved = tc.save_state()
        stored = service.sample([[5, 6, 7]], artifact_id=saved.artifact_id, **asked).result()
        assert stored.sequences[0].tokens == ours.sequences[0].tokens
        bare = service.sample([[5, 6, 7]], model_ref=model_ref, **asked).result()
        assert len(bare.sequences[0].tokens) > 0


@pytest.mark.real_model
def test_smollm2_is_as_far_from_what_is_trained_as_it_is_known_to_be() -> None:
    file = Path(__file__).parents[2] / "build/models/SmolLM2-135M-Instruct.Q4_1.gguf"
    for model_ref, most in ((str(file), 0.02), (str(gguf.converted(file)), 1e-4)):
        engine = engine_with_adapter(model_ref, rank=16, alpha=32)
        trained(engine, 0.02)
        prompts = [[(7 * row + 11 * place) % 40_000 + 100 for place in range(8)] for row in range(8)]
        found = off(engine, draw(engine, prompts, ignore_end=True, max_new_tokens=48))
        divergence = float(np.mean(np.exp(-found) - 1 + found))  # k3 (Schulman 2020)
        print(
            f"{Path(model_ref).name}: KL {divergence:.2g} nats a token, |difference| {np.abs(found).mean():.4f}"
        )
        assert divergence < most


def test_reinforcement_learning_corrects_for_what_differs_and_shows_it(folders: Any) -> None:
    with tn.ServiceClient() as service:
        tc = service.create_training_client(
            model_ref=folders("llama"), lora_config=tn.LoRAConfig(rank=4), dtype="float32"
        )
        rollouts = rlvr.PolicySampler(tc, 8, 6, engine="llama.cpp", seed=0, chat="never", fixed_length=True)
        algo = rlvr.REINFORCE()
        for _ in range(2):
            batch = rollouts.generate_trajectories(["a", "b"])
            for number, trajectory in enumerate(batch):
                trajectory.reward = float(number % 2)
            updated = algo.update(batch, tc).result()
            assert "sampled in llama.cpp, corrected by tis_cap=2" in updated.notes
            metrics = updated.metrics
            assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=0.02)
            assert 0 < metrics["sampling/mismatch_kl"] < 1e-3


def test_each_replica_of_a_cluster_samples_with_it(folders: Any) -> None:
    with tn.ServiceClient(cluster=tn.LocalCluster(2)) as service:
        tc = service.create_training_client(
            model_ref=folders("llama"), lora_config=tn.LoRAConfig(rank=2), dtype="float32"
        )
        drawn = tc.sample([[5, 6], [7, 8, 9]], engine="llama.cpp", max_new_tokens=6, seed=4).result()
    with tn.ServiceClient() as service:
        tc = service.create_training_client(
            model_ref=folders("llama"), lora_config=tn.LoRAConfig(rank=2), dtype="float32"
        )
        alone = tc.sample([[5, 6], [7, 8, 9]], engine="llama.cpp", max_new_tokens=6, seed=4).result()
    assert [s.tokens for s in drawn.sequences] == [s.tokens for s in alone.sequences]


def test_a_run_of_rewards_samples_with_it_and_is_evaluated_without() -> None:
    with tn.ServiceClient() as service:
        tc = service.create_training_client(
            model_ref="builtin:sums", lora_config=tn.LoRAConfig(rank=4), optimizer={"learning_rate": 1e-3}
        )
        sums = tn.datasets.sums(16, seed=0)
        trainer = rlvr.RLVRTrainer(
            tc,
            sums,
            "exact_match",
            "grpo",
            engine="llama.cpp",
            prompts_per_step=4,
            group_size=4,
            max_new_tokens=4,
            eval_prompts=sums[:4],
        )
        trainer.run(steps=2, show=False).result()
        assert tc.history["sampling/importance_sampling_ratio/mean"][-1] == pytest.approx(1, abs=0.02)
