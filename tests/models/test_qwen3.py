from dataclasses import replace

import pytest
import torch

from mmtp.models.backbone import Backbone, BackboneConfig
from mmtp.models.qwen3 import Qwen3Error, backbone_config, from_qwen3, to_qwen3
from mmtp.types import Modality

CONFIG = BackboneConfig(width=32, depth=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48)


def test_there_and_back_changes_nothing() -> None:
    state = Backbone(CONFIG).state_dict()
    table = torch.randn(10, 32)
    back, embedding, unembedding = from_qwen3(to_qwen3(state, CONFIG, table, table), CONFIG)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)
    assert torch.equal(embedding, table)
    assert torch.equal(unembedding, table)


def test_says_which_weight_is_missing_and_which_field_does_not_fit() -> None:
    table = torch.randn(10, 32)
    state = to_qwen3(Backbone(CONFIG).state_dict(), CONFIG, table, table)
    del state["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(Qwen3Error, match=r"no 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        from_qwen3(state, CONFIG)
    own = replace(CONFIG, modality_specific="norms")
    with pytest.raises(Qwen3Error, match="modality_specific = 'norms': Qwen3's layout has no place"):
        to_qwen3(Backbone(own, tuple(Modality)).state_dict(), own, table, table)
    with pytest.raises(Qwen3Error, match="attention_bias: True is not supported"):
        backbone_config({"attention_bias": True})
