"""GGUF files: the model and the tokenizer that went into them, converted once, and nothing left of a failure."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tensafe_nb as tn
from tensafe_nb.engine.models import gguf
from tensafe_nb.engine.models import load as models
from tensafe_nb.engine.models.load import ASSETS
from tensafe_nb.store.home import Home
from tests.forking import Forker

TEXT = 'def main():\n    return "two  words", 42\n'


def write_gguf(path: Path, pre: str = "default", **extra: int) -> Path:
    """Write builtin:tiny as a GGUF file, the way llama.cpp's converter lays it out."""
    from gguf import GGUFWriter

    config = json.loads((ASSETS / "tiny/config.json").read_text())
    bpe = json.loads((ASSETS / "tiny/tokenizer.json").read_text())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    for name, token in (("bos", 1), ("eos", 1), ("pad", 0)):
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_chat_template(json.loads((ASSETS / "tiny/tokenizer_config.json").read_text())["chat_template"])
    for name, value in extra.items():
        writer.add_uint16(name.replace("_", "."), value)
    for name, tensor in _tensors(config["num_attention_heads"]):
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(heads: int) -> Any:
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny", dtype=torch.float32)
    yield "token_embd.weight", model.model.embed_tokens.weight.detach().numpy()
    yield "output_norm.weight", model.model.norm.weight.detach().numpy()
    for number, layer in enumerate(model.model.layers):
        for theirs, ours in names.items():
            weight = layer.get_submodule(theirs).weight.detach().numpy()
            if ours in ("attn_q", "attn_k"):  # llama.cpp keeps the two halves of a rotation beside each other
                rows, columns = weight.shape
                weight = (
                    weight.reshape(heads, 2, rows // heads // 2, columns)
                    .swapaxes(1, 2)
                    .reshape(rows, columns)
                )
            yield f"blk.{number}.{ours}.weight", np.ascontiguousarray(weight)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def load(model_ref: Any, **fields: Any) -> models.LoadedModel:
    return models.load(tn.TrainingConfig(model_ref=str(model_ref), device="cpu", dtype="float32", **fields))


@torch.no_grad()
def logits(model: models.LoadedModel) -> torch.Tensor:
    return model.causal(torch.tensor([[5, 6, 7, 8, 300, 301]])).logits


def folders() -> list[str]:
    return sorted(path.name for path in Home.of_environment().models().iterdir() if path.is_dir())


def test_a_gguf_file_becomes_the_model_and_the_tokenizer_that_went_into_it(tiny: Path) -> None:
    converted, original = load(tiny), load("builtin:tiny")
    assert torch.equal(logits(converted), logits(original))
    assert converted.tokenizer(TEXT)["input_ids"] == original.tokenizer(TEXT)["input_ids"]
    messages = [{"role": "user", "content": "hello"}]
    said = [
        model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for model in (converted, original)
    ]
    assert said[0] == said[1] == "User: hello\nAssistant:"
    assert converted.end_tokens == original.end_tokens and converted.context == original.context


def test_a_content_is_converted_once_whatever_its_file_is_called(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = gguf.converted(tiny)
    monkeypatch.setattr(gguf, "write_draft", lambda *_: pytest.fail("converted again"))
    copy = Path(shutil.copy(tiny, tmp_path / "tiny.gguf"))
    assert gguf.converted(tiny) == gguf.converted(copy) == first
    with copy.open("ab") as file:
        file.write(b"more")
    with pytest.raises(pytest.fail.Exception, match="converted again"):
        gguf.converted(copy)
    monkeypatch.setattr(gguf, "VERSION", 0)
    with pytest.raises(pytest.fail.Exception, match="converted again"):
        gguf.converted(tiny)


def test_the_converted_folder_is_an_ordinary_one(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = gguf.converted(tiny)
    bar = capfd.readouterr().err
    assert "Converting tiny.gguf, once" in bar and bar.endswith("\r") and "de-quantizing" not in bar
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(plain.config, "quantization_config")
    assert AutoTokenizer.from_pretrained(folder).chat_template


CONVERTS_AND_HANGS = """
import sys, time
from pathlib import Path
from tensafe_nb.engine.models import gguf

def hang(*_):
    print("written", flush=True)
    time.sleep(600)

gguf.Files.replace = hang  # everything is written; only the name is missing
gguf.converted(Path(sys.argv[1]))
"""


def test_a_killed_conversion_leaves_nothing_that_looks_whole(
    tiny: Path, forker: Forker, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    os.mkfifo(told)
    process = forker.begin(CONVERTS_AND_HANGS, str(tiny), out=str(told))
    with told.open() as fifo:
        assert fifo.readline() == "written\n"
    os.kill(process, signal.SIGKILL)
    assert forker.status_of(process) == -signal.SIGKILL
    (left,) = folders()
    assert left.endswith(gguf.DRAFT)
    folder = gguf.converted(tiny)
    assert folders() == [folder.name], "the next one sweeps"
    assert torch.equal(logits(load(folder)), logits(load("builtin:tiny")))


def test_a_conversion_that_fails_leaves_nothing(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil._ntuple_diskusage(10**9, 10**9, 1000)  # type: ignore[attr-defined]
    monkeypatch.setattr(gguf.shutil, "disk_usage", lambda _: full)
    with pytest.raises(tn.StorageError, match=r"needs 0.0 GB under .*models.*0.0 GB are free.*TENSAFE_HOME"):
        gguf.converted(tiny)
    assert folders() == []


def test_a_file_that_is_no_gguf_or_is_cut_off_is_named(tiny: Path, tmp_path: Path) -> None:
    for content in (b"", b"no such thing", tiny.read_bytes()[:100_000]):
        path = tmp_path / "broken.gguf"
        path.write_bytes(content)
        with pytest.raises(tn.ModelLoadError, match=r"broken.gguf' could not be converted: .*complete"):
            gguf.converted(path)
    assert folders() == []


def test_a_part_of_a_model_is_refused_with_the_command_that_joins_them(tmp_path: Path) -> None:
    with pytest.raises(tn.ModelLoadError, match=r"one of 3 parts.*llama-gguf-split --merge"):
        gguf.converted(write_gguf(tmp_path / "part.gguf", split_count=3))


def test_a_missing_package_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(tn.ModelLoadError, match=r"needs the package gguf.*pip install gguf"):
        gguf.converted(tiny)


def test_texts_are_split_as_the_file_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(write_gguf(tmp_path / "smollm.gguf", pre="smollm"))
    pieces = model.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  42")
    assert [piece for piece, _ in pieces] == ["a", "ĠĠ", "4", "2"]
    assert "pre-tokenizer" not in caplog.text
    load(write_gguf(tmp_path / "strange.gguf", pre="strange"))
    assert "pre-tokenizer 'strange', which is not known here" in caplog.text
