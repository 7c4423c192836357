"""`python -m scripts.estimate_check [folder of a real model]`: what `tc.estimate()` says, beside what is then measured.

Each configuration in a process of its own. Time: estimates and steps in turns, medians, as the machine may be shared.
Memory: what the allocator hands out during a real step, by torch's profiler, on top of weights and moments.
"""

import json
import sys
import tempfile
from pathlib import Path
from statistics import median

from bench.harness import fresh_process

ROUNDS = 5
LORA = {"rank": 16, "alpha": 32}


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="tensafe-estimate-") as folder:
        print("| configuration | rows × tokens | s a step: estimated, measured | MiB: estimated, measured |")
        print("|---|---|---|---|")
        for name, ref, lora, rows, tokens in configurations(folder):
            code = (
                "from scripts import estimate_check; "
                f"print(estimate_check.measured({ref!r}, {lora!r}, {rows}, {tokens}))"
            )
            print(_line(name, rows, tokens, fresh_process(code)), flush=True)


def configurations(folder: str) -> list[tuple[str, str, dict[str, int] | None, int, int]]:
    found: list[tuple[str, str, dict[str, int] | None, int, int]] = [
        ("builtin:tiny LoRA r16", "builtin:tiny", LORA, 8, 64),
        ("builtin:tiny, all weights", "builtin:tiny", None, 16, 96),
        ("builtin:sums LoRA r16", "builtin:sums", LORA, 128, 12),
        ("random Llama, width 576, LoRA r16", _random_llama(Path(folder) / "llama"), LORA, 8, 128),
    ]
    if len(sys.argv) > 1:
        found.append((f"{Path(sys.argv[1]).name} LoRA r16", sys.argv[1], LORA, 4, 128))
    return found


def _random_llama(folder: Path) -> str:
    """Write a Llama of SmolLM2's widths, four layers deep, with the tiny model's tokenizer."""
    code = f"""
import json, shutil, torch, transformers
from pathlib import Path
from tensafe_nb.engine.models.load import ASSETS
torch.manual_seed(0)
config = transformers.LlamaConfig(vocab_size=2048, hidden_size=576, intermediate_size=1536, num_hidden_layers=4,
    num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=512)
transformers.LlamaForCausalLM(config).save_pretrained({str(folder)!r})
for name in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copy(ASSETS / "tiny" / name, Path({str(folder)!r}) / name)
print(json.dumps(None))
"""
    fresh_process(code)
    return str(folder)


def measured(ref: str, lora: dict[str, int] | None, rows: int, tokens: int) -> str:
    """Return estimated and measured seconds and bytes of one configuration, as JSON."""
    import torch

    import tensafe_nb as tn
    from tensafe_nb.engine.engine import Engine
    from tensafe_nb.engine.estimate import estimate
    from tensafe_nb.losses import resolve_loss

    torch.set_num_threads(1)
    adapter = tn.LoRAConfig(**lora) if lora else None
    engine = Engine(tn.TrainingConfig(model_ref=ref, lora_config=adapter, dtype="float32", device="cpu"))
    ids, labels = torch.randint(0, engine.model.vocab_size, (2, rows, tokens)).numpy()
    batch, loss = tn.BatchData(ids, labels=labels), resolve_loss("token_ce")

    def step() -> None:
        engine.forward_backward(batch, loss)
        engine.optim_step()

    first, said, took = estimate(engine, rows, tokens), [], []
    step()
    for _ in range(ROUNDS):
        said.append(estimate(engine, rows, tokens).seconds_per_step)
        took.append(_seconds(step))
    ratios = [estimated / real for estimated, real in zip(said, took, strict=True)]
    return json.dumps(
        {
            "seconds": (median(said), median(took), median(ratios)),
            "bytes": (first.memory_bytes, _peak_of(engine, step)),
        }
    )


def _seconds(action: object) -> float:
    from bench.harness import stopwatch

    return median(stopwatch(action)[0] for _ in range(3))  # type: ignore[arg-type]


def _peak_of(engine: object, step: object) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()  # type: ignore[operator]
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    model = engine.model.causal  # type: ignore[attr-defined]
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _lasting(model)}
    moments = [t for state in engine.optimizer.torch.state.values() for t in state.values()]  # type: ignore[attr-defined]
    return peak + sum(kept.values()) + sum(t.numel() * t.element_size() for t in moments)


def _lasting(model: object) -> list[object]:
    return [*model.parameters(), *model.buffers()]  # type: ignore[attr-defined]


def _line(name: str, rows: int, tokens: int, found: dict[str, list[float]]) -> str:
    estimated, real, ratio = found["seconds"]
    said, held = found["bytes"]
    return (
        f"| {name} | {rows}×{tokens} | {estimated:.3f}, {real:.3f} ({ratio - 1:+.0%}) | "
        f"{said / 2**20:.0f}, {held / 2**20:.0f} ({said / held - 1:+.0%}) |"
    )


if __name__ == "__main__":
    main()
