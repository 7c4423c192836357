"""TRL's side of an update of reinforcement learning, and what both sides share.

A program of its own, run by `.venv-trl/bin/python`: TRL has a Python environment of its own. It reads how many
updates to take, takes them, and answers with seconds and CPU seconds; and so on until its standard input ends.
Imports nothing heavy before it runs: the processes that call our reward read this file too.
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal, TextIO

DATA, SEED = 4096, 0
LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = (
    1e-5,
    0.01,
    1.0,
)  # a policy that hardly moves: every update is alike


def begins_with_answer(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Reward what begins with the answer: completions go on to their full length."""
    return [float(text.startswith(right)) for text, right in zip(completions, answer, strict=True)]


def share_of_vowels(completions: list[str], **_: Any) -> list[float]:
    """Reward vowels: no two answers of a group have as many, so that we train on all of them, as TRL does anyway."""
    return [sum(letter in "aeiouAEIOU" for letter in text) / max(1, len(text)) for text in completions]


REWARDS = {reward.__name__: reward for reward in (begins_with_answer, share_of_vowels)}


@dataclass(frozen=True)
class Work:
    """An update that both sides take.

    Args:
        model_ref: As ours names a model: a built-in, or a folder.
        name: What the table calls it.
        rank: Of the adapter on every linear layer; its alpha is twice that.
        prompts: Of an update.
        group: Completions of each prompt.
        tokens: Of each completion.
        updates: In a row, before the other side has its turn.
        reward: One of `REWARDS`.
        precision: In which ours samples; TRL has float32.
    """

    model_ref: str
    name: str
    rank: int
    prompts: int
    group: int
    tokens: int
    updates: int
    reward: str
    precision: Literal["exact", "auto"] = "exact"

    @property
    def sizes(self) -> str:
        shape = f"{self.prompts} prompts × {self.group} completions × {self.tokens} tokens"
        return f"{self.name} LoRA r{self.rank}, {shape}"

    def as_argument(self) -> str:
        return json.dumps(asdict(self))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not disturb
    with tempfile.TemporaryDirectory(prefix="trl-peer-") as folder:
        _trainer(Work(**json.loads(sys.argv[1])), folder, answers).train()


def _trainer(work: Work, folder: str, answers: TextIO) -> Any:
    """Return a GRPOTrainer in its fastest plain settings: all at once, one pass, no KL, nothing written."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from transformers.utils import logging
    from trl import GRPOConfig, GRPOTrainer

    from bench import workload
    from tensafe_nb.datasets import sums
    from tensafe_nb.engine.models.load import ASSETS

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    logging.set_verbosity_error()
    model = ASSETS / work.model_ref.removeprefix("builtin:")  # a folder's whole path stays what it is
    options = GRPOConfig(
        output_dir=folder,
        max_steps=10**6,
        per_device_train_batch_size=work.prompts * work.group,
        num_generations=work.group,
        max_completion_length=work.tokens,
        generation_kwargs={"min_new_tokens": work.tokens},
        loss_type="grpo",
        beta=0.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        optim="adamw_torch_fused",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=SEED,
    )
    return GRPOTrainer(
        model=workload.plain_model(str(model)),
        reward_funcs=REWARDS[work.reward],
        args=options,
        train_dataset=Dataset.from_list(sums(DATA, seed=SEED)),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        peft_config=LoraConfig(
            r=work.rank, lora_alpha=2 * work.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[_turns(answers)],
    )


def _turns(answers: TextIO) -> Any:
    """Return the callback that stops between two updates until it is told how many to take."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        left = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._next(control)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.left -= 1
            if not self.left:
                now = time.perf_counter(), time.process_time()
                answers.write(json.dumps([now[0] - self.started[0], now[1] - self.started[1]]) + "\n")
                self._next(control)

        def _next(self, control: Any) -> None:
            line = sys.stdin.readline()
            control.should_training_stop = not line
            self.left = int(line or 0)
            self.started = time.perf_counter(), time.process_time()

    return Turns()


if __name__ == "__main__":
    main()
