import json

import pytest
import torch

from mmtp import hub
from mmtp.config import ConfigError
from mmtp.models.presets import preset
from mmtp.stream.vocab import VocabLayout
from mmtp.testing.fakes import BlockTokenizer

pytestmark = pytest.mark.usefixtures("block_registered")


@pytest.fixture
def tokenizer():
    tokenizer = BlockTokenizer.Config(block=4).build()
    tokenizer.gain[0] = 0.5
    return tokenizer


def test_what_is_saved_is_loaded_again(tmp_path, tokenizer):
    hub.save_pretrained(tokenizer, tmp_path / "new" / "folder")
    loaded = hub.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == tokenizer.config
    assert torch.equal(loaded.gain, tokenizer.gain)
    assert not loaded.training
    record = json.loads((tmp_path / "new" / "folder" / "config.json").read_text())
    assert record == {"mmtp": record["mmtp"], "family": "tokenizer", "type": "block", "block": 4, "levels": 5}


def test_half_precision_on_disk_is_float32_in_memory(tmp_path, tokenizer):
    hub.save_pretrained(tokenizer, tmp_path, dtype="float16")
    assert hub.from_pretrained(tmp_path).gain.dtype == torch.float32


def test_large_weights_are_split_and_stale_files_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "MAX_SHARD_BYTES", 2**16 + 5000)
    state = {f"w{i}": torch.randn(1000) for i in range(4)} | {"tied": torch.zeros(1)}
    hub.save_weights(state, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir())[0] == "model-00001-of-00004.safetensors"
    assert all(torch.equal(state[k], v) for k, v in hub.load_weights(tmp_path).items())
    hub.save_weights({"w0": state["w0"]}, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_shared_weights_are_written_once(tmp_path):
    weight = torch.randn(3)
    hub.save_weights({"a": weight, "b": weight}, tmp_path)
    assert list(hub.load_weights(tmp_path)) == ["a"]


def test_a_model_with_shared_weights_is_loaded_again(tmp_path, tokenizer):
    model = preset("tiny", VocabLayout.of({"block": tokenizer})).build()
    assert model.config.tie_embeddings
    hub.save_pretrained(model, tmp_path)
    loaded = hub.from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert loaded.unembedding.weight is loaded.embedding.table.weight


def test_damaged_weights_are_named(tmp_path, tokenizer):
    hub.save_pretrained(tokenizer, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(hub.HubError, match=r"model\.safetensors: is damaged"):
        hub.from_pretrained(tmp_path)


def test_weights_that_do_not_fit_are_named(tmp_path, tokenizer):
    hub.save_pretrained(tokenizer, tmp_path)
    hub.save_weights({"gain": torch.ones(5)}, tmp_path)
    with pytest.raises(hub.HubError, match="weights do not fit config.json"):
        hub.from_pretrained(tmp_path)


def test_an_unknown_key_of_a_configuration_is_named(tmp_path, tokenizer):
    hub.save_pretrained(tokenizer, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"blok": 3}))
    with pytest.raises(ConfigError, match=r"config\.json: unknown key 'blok'; did you mean 'block'?"):
        hub.from_pretrained(tmp_path)


def test_names_are_looked_for_in_the_zoo_first(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(hub, "zoo_root", lambda family: tmp_path / hub.ZOO_FOLDERS[family])
    folder = hub.save_pretrained(tokenizer, tmp_path / "tokenizers" / "block-4")
    assert hub.zoo_entries("tokenizer") == ["block-4"]
    assert list(hub.iter_zoo()) == [("tokenizer", folder)]
    assert hub.find("block-4") == folder
    with pytest.raises(hub.HubError, match="did you mean 'block-4'?"):
        hub.find("blok-4")
    with pytest.raises(hub.HubError, match="the zoo holds: block-4"):
        hub.find("zzzzzz")


def test_a_folder_that_was_not_saved_is_refused(tmp_path):
    with pytest.raises(hub.HubError, match=r"has no config\.json"):
        hub.find(tmp_path)


def test_a_hub_id_without_the_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(hub.HubError, match=r"pip install 'mmtp\[hf\]'"):
        hub.find("owner/name")


def test_a_hub_id_is_one_more_folder(tmp_path, monkeypatch, tokenizer):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    hub.save_pretrained(tokenizer, tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, allow_patterns: str(tmp_path))
    assert torch.equal(hub.from_pretrained("owner/name").gain, tokenizer.gain)


def test_the_fingerprint_follows_configuration_weights_and_files(tokenizer):
    state = tokenizer.state_dict()
    prints = {
        hub.fingerprint(tokenizer.config, state),
        hub.fingerprint(BlockTokenizer.Config(block=8), state),
        hub.fingerprint(tokenizer.config, {"gain": state["gain"] + 1e-6}),
        hub.fingerprint(tokenizer.config, {"other": state["gain"]}),
        hub.fingerprint(tokenizer.config, state, {"vocab.txt": b"a"}),
        hub.fingerprint(tokenizer.config, state, {"vocab.txt": b"b"}),
    }
    assert len(prints) == 6
    assert hub.fingerprint(tokenizer.config, state) == hub.fingerprint(tokenizer.config, dict(state))


def test_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub.os, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        hub.write_text(path, "new")
    assert path.read_text() == "old"
