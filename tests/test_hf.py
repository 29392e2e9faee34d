"""Checkpoints of transformers: where they are looked for, and what is said of those that cannot be read."""

import json
from pathlib import Path

import pytest
import torch

from mmtp import hf
from mmtp.hf import Checkpoint, save_checkpoint
from mmtp.hub import HubError, find, from_pretrained, is_language_model
from mmtp.tokenizers.text import TextTokenizer


def saved(folder: Path, **changes: object) -> Path:
    """Two weights in two files, a configuration and a tokenizer."""
    files = {"tokenizer.json": TextTokenizer.train([], 256).content}
    save_checkpoint(folder, {"model_type": "llama", **changes}, {"a": torch.rand(8), "b": torch.rand(8)}, files)
    return folder


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "MAX_SHARD_BYTES", 40)


def test_several_files_are_one_state(tmp_path: Path) -> None:
    folder = saved(tmp_path / "some")
    assert {path.name for path in folder.glob("model*")} == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)} | {hf.INDEX}
    checkpoint = Checkpoint(f"transformers:{folder}")
    assert checkpoint.weights().keys() == {"a", "b"} and checkpoint.config == {"model_type": "llama"}
    assert json.loads((folder / hf.INDEX).read_text())["metadata"] == {"total_size": 64}


def test_a_name_gives_the_text_tokenizer(tmp_path: Path) -> None:
    name = f"transformers:{saved(tmp_path / 'some')}"
    tokenizer = from_pretrained(name)
    assert isinstance(tokenizer, TextTokenizer) and tokenizer.spec == TextTokenizer.train([], 256).spec
    with pytest.raises(HubError, match="some: is a model in transformers' format; .* write transformers:/"):
        from_pretrained(tmp_path / "some")
    with pytest.raises(HubError, match=r"is a language model of transformers; it can be a text tokenizer \(--text\)"):
        find(name)
    assert is_language_model("smollm2") and not is_language_model("transformers:") and not is_language_model("text-bpe-4k")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "some")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(HubError, match="has no model-00002-of-00002.safetensors; weights are read from safetensors"):
        Checkpoint(f"transformers:{folder}").weights()
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"damaged")
    with pytest.raises(HubError, match="model-00002-of-00002.safetensors: is damaged"):
        Checkpoint(f"transformers:{folder}").weights()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(HubError, match="tokenizer.json cannot be read"):
        from_pretrained(f"transformers:{folder}")
    (folder / "config.json").unlink()
    with pytest.raises(HubError, match="has no config.json"):
        _ = Checkpoint(f"transformers:{folder}").config
    with pytest.raises(HubError, match="is no folder of a model, no GGUF file and no Hub id"):
        Checkpoint(f"transformers:{tmp_path}/none/at/all")
    with pytest.raises(HubError, match="its weights are quantized"):
        _ = Checkpoint(f"transformers:{saved(tmp_path / 'other', quantization_config={'quant_method': 'fp8'})}").config
