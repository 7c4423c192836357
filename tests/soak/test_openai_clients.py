"""OpenAI's own package and lm-evaluation-harness, unmodified, against a server; `make openai-parity` installs them."""

import asyncio
import json
import math
import os
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tensafe_nb as tn
from tests.parity.serving import Serving, serving_thread

openai = pytest.importorskip("openai", reason="OpenAI's package is not installed here: make openai-parity")
lm_eval = pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is not installed here: make openai-parity"
)

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore")]  # theirs

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "openai.md"
CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    with serving_thread(tmp_path / "server") as serving:
        yield serving


@pytest.fixture
def service(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> Iterator[tn.ServiceClient]:
    token = serving.tokens.mint("ada")
    monkeypatch.setenv("OPENAI_BASE_URL", f"{serving.url}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", token)
    with tn.ServiceClient(serving.url, token) as service:
        yield service
    serving.end()


@pytest.fixture
def tc(service: tn.ServiceClient) -> tn.TrainingClient:
    return service.create_training_client(lora_config=tn.LoRAConfig(rank=2))


def test_openais_package_asks_streams_and_reads_errors(tc: tn.TrainingClient, serving: Serving) -> None:
    client, model = openai.OpenAI(max_retries=0), tc.training_client_id
    assert [entry.id for entry in client.models.list()] == [model]
    asked: Any = {"model": model, "messages": CHAT, "max_tokens": 8, "seed": 1}
    (drawn,) = tc.sample(CHAT, max_new_tokens=8, seed=1, top_logprobs=2).sequences
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == drawn.text and answer._request_id.startswith("req-")
    assert [one.logprob for one in answer.choices[0].logprobs.content] == list(drawn.raw_logprobs)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[-1].usage == answer.usage
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == drawn.text
    with client.chat.completions.stream(**asked) as stream:
        assert [event.type for event in stream][-1] == "content.done"
        assert stream.current_completion_snapshot.choices[0].message.content == drawn.text
    text = client.completions.create(model=model, prompt="def ", max_tokens=4, echo=True, logprobs=1, seed=1)
    assert text.choices[0].text.startswith("def ") and text.choices[0].logprobs.token_logprobs[0] is None
    for wrong, error in (
        ({"model": "none"}, openai.NotFoundError),
        ({"presence_penalty": 1}, openai.BadRequestError),
        ({"max_tokens": 10_000}, openai.BadRequestError),
    ):
        with pytest.raises(error) as raised:
            client.chat.completions.create(**{**asked, **wrong})
        assert raised.value.code and raised.value.request_id.startswith("req-")
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(api_key="sk-none", max_retries=0).models.list()


def test_openais_package_may_leave_and_ask_many_at_a_time(tc: tn.TrainingClient) -> None:
    asked: Any = {"model": tc.training_client_id, "messages": CHAT, "max_tokens": 16}

    async def ask() -> list[str]:
        client = openai.AsyncOpenAI(max_retries=0)
        async with await client.chat.completions.create(
            **{**asked, "max_tokens": 400}, stream=True
        ) as stream:
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    break
        coming = [client.chat.completions.create(**asked, seed=seed) for seed in range(16)]
        return [answer.choices[0].message.content for answer in await asyncio.gather(*coming)]

    answers = asyncio.run(ask())
    assert answers == [tc.sample(CHAT, max_new_tokens=16, seed=seed).texts[0] for seed in range(16)]


def test_the_program_on_the_page_runs(
    tc: tn.TrainingClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (program,) = re.findall(
        r'^```python title="ask.py"\n(.*?)^```', PAGE.read_text(), re.DOTALL | re.MULTILINE
    )
    monkeypatch.setenv("MODEL", tc.training_client_id)
    (tmp_path / "ask.py").write_text(program)
    runpy.run_path(str(tmp_path / "ask.py"))
    answer, _, streamed = capsys.readouterr().out.partition("\n[")
    assert answer.rpartition(" ")[0] == streamed.partition("]\n")[2]


TASK = """
task: sums_on_disk
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def write_task(folder: Path) -> None:
    """Write a task of 64 sums with four answers each, of which one is right."""
    rows = []
    for number, row in enumerate(tn.datasets.sums(64, seed=3, split="heldout")):
        right = int(row["answer"])
        others = [f"{(right + shift) % 200:03d}" for shift in (1, 199, 10)]
        choices = [*others[: number % 4], row["answer"], *others[number % 4 :]]
        rows.append({"prompt": row["prompt"], "choices": choices, "label": number % 4})
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(TASK.format(data=data, cache=folder / "cache"))


def evaluated(folder: Path, kind: str, **arguments: Any) -> tuple[float, list[list[tuple[float, bool]]]]:
    """Return the accuracy of a model, and the log-probability of each answer of each row, and if it is greedy."""
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        kind, model_args=arguments, tasks=["sums_on_disk"], task_manager=tasks, bootstrap_iters=0
    )
    samples = sorted(found["samples"]["sums_on_disk"], key=lambda sample: sample["doc_id"])
    return found["results"]["sums_on_disk"]["acc,none"], [sample["filtered_resps"] for sample in samples]


def test_an_adapter_is_as_accurate_as_its_export(
    service: tn.ServiceClient, serving: Serving, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tc = service.create_training_client(
        model_ref="builtin:sums", lora_config=tn.LoRAConfig(rank=8), optimizer={"learning_rate": 1e-3}
    )
    rows = [{"prompt": row["prompt"], "completion": row["answer"]} for row in tn.datasets.sums(960, seed=1)]
    tc.save_state(name="before").result()
    tc.fit(tc.batches(rows), steps=60, show=False).result()
    tc.save_state(name="after").result()
    write_task(tmp_path)
    for name in ("before", "after"):
        export = service.export_adapter(name, tmp_path / name, merged=True)
        own, theirs = evaluated(tmp_path, "hf", pretrained=str(export), device="cpu", dtype="float32")
        found, ours = evaluated(
            tmp_path,
            "local-completions",
            model=name,
            base_url=f"{os.environ['OPENAI_BASE_URL']}/completions",
            tokenizer=str(export),
            tokenizer_backend="huggingface",
            num_concurrent=4,
            max_length=64,
        )
        apart = [
            abs(one - other)
            for row, its in zip(ours, theirs, strict=True)
            for (one, _), (other, _) in zip(row, its, strict=True)
        ]
        with capsys.disabled():
            print(
                f"\n{name}: accuracy {found:.3f}, of the export {own:.3f}; logprobs apart by {max(apart):.1e}"
            )
        assert found == own and max(apart) < 1e-4 and not math.isnan(max(apart))
        assert [[greedy for _, greedy in row] for row in ours] == [
            [greedy for _, greedy in row] for row in theirs
        ]
