import json

import pytest
import torch

from mmtp.testing.decoders import decoder
from scripts.bench_decode import PROMPT, WIDTHS, exported, main, read_per_token


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_decoding_is_timed_beside_transformers_and_passes_by_width(tmp_path, capsys):
    pytest.importorskip("transformers")
    main(["--model", "tiny", "--batch", "1", "2", "--tokens", "3", "--rounds", "1", "--json", str(tmp_path / "costs.json")])
    costs = json.loads((tmp_path / "costs.json").read_text())
    ways = ("mmtp", "compiled", "dynamic", "static")
    assert [(cost["way"], cost["batch"]) for cost in costs["decoding"]] == [(way, b) for b in (1, 2) for way in ways]
    passes = [f"{width}, {way}" for way in ways[:2] for width in WIDTHS]
    assert [(cost["way"], cost["batch"]) for cost in costs["passes"]] == [(each, b) for b in (1, 2) for each in passes]
    assert all(cost["median"] > 0 for part in costs.values() for cost in part)
    assert all(cost["bandwidth"] > 0 for cost in costs["decoding"])
    assert "| static | 2 |" in capsys.readouterr().out


def test_what_has_to_be_read_for_a_token_is_weights_words_and_half_of_what_is_held():
    net = decoder("tiny", "bfloat16")
    size = net.config.backbone
    words = net.config.layout.text_range
    held = 2 * (PROMPT + 1 + 5) * size.depth * 2 * size.num_kv_heads * size.head_dim
    weights = net.num_parameters() - net.embedding.table.weight.numel()
    special = read_per_token(net, 2, 10) / 2 - weights - held - (words[1] - words[0]) * size.width
    assert 0 <= special < 10 * size.width  # words may be followed by a few ids that are none


def test_refuses_to_compare_other_weights(monkeypatch):
    pytest.importorskip("transformers")
    net = decoder("tiny", "float32")
    whole = net.backbone.state_dict
    monkeypatch.setattr(net.backbone, "state_dict", lambda: {k: 2 * v if "down" in k else v for k, v in whole().items()})
    with pytest.raises(ValueError, match="other logits"):
        exported(net)
