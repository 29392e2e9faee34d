from dataclasses import replace

import pytest
import torch

from mmtp.models.backbone import Backbone, BackboneConfig
from mmtp.models.qwen3 import Qwen3Error, backbone_config, checkpoint_config, from_qwen3, to_qwen3
from mmtp.nn.rope import RopeScaling
from mmtp.types import Modality

CONFIG = BackboneConfig(width=32, depth=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48)


SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
LLAMA = replace(CONFIG, qk_norm=False, rope_theta=5e5, rope_scaling=SCALING)


@pytest.mark.parametrize("config", [CONFIG, LLAMA, replace(CONFIG, window=9), replace(LLAMA, window=9)])
def test_there_and_back_changes_nothing(config: BackboneConfig) -> None:
    assert backbone_config(checkpoint_config(config)) == config
    state = Backbone(config).state_dict()
    table = torch.randn(10, 32)
    back, embedding, unembedding = from_qwen3(to_qwen3(state, config, table, table), config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)
    assert torch.equal(embedding, table)
    assert torch.equal(unembedding, table)


def test_says_which_weight_is_missing_or_has_no_place() -> None:
    table = torch.randn(10, 32)
    state = to_qwen3(Backbone(CONFIG).state_dict(), CONFIG, table, table)
    del state["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(Qwen3Error, match=r"no 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        from_qwen3(state, CONFIG)
    own = replace(CONFIG, modality_specific="norms")
    with pytest.raises(Qwen3Error, match="modality_specific = 'norms': Qwen3's layout has no place"):
        to_qwen3(Backbone(own, tuple(Modality)).state_dict(), own, table, table)
    with pytest.raises(Qwen3Error, match="cross_attention_every = 1: Qwen3's layout has no place"):
        to_qwen3({}, replace(CONFIG, cross_attention_every=1), table, table)
    biased = to_qwen3(Backbone(CONFIG).state_dict(), CONFIG, table, table) | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}
    with pytest.raises(Qwen3Error, match=r"weight 'model\.layers\.0\.self_attn\.q_proj\.bias', for which"):
        from_qwen3(biased, CONFIG)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attention_bias": True}, "attention_bias: True is not supported, False is"),
        ({"mlp_bias": True}, "mlp_bias: True is not supported"),
        ({"model_type": "gemma3"}, "model_type: 'gemma3' is not supported; 'qwen3', 'llama', 'mistral' are"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type: 'yarn' is not supported"),
    ],
)
def test_says_which_field_is_not_supported(change: dict, said: str) -> None:
    with pytest.raises(Qwen3Error, match=said):
        backbone_config(checkpoint_config(CONFIG) | change)


def test_says_which_field_is_missing() -> None:
    fields = checkpoint_config(CONFIG)
    del fields["hidden_size"]
    with pytest.raises(Qwen3Error, match="hidden_size: is missing"):
        backbone_config(fields)


def test_cross_attention_is_not_exported() -> None:
    table, crossed = torch.randn(10, 32), replace(CONFIG, cross_attention_every=1)
    with pytest.raises(Qwen3Error, match="cross_attention_every = 1: Qwen3's layout has no place"):
        to_qwen3(Backbone(crossed).state_dict(), crossed, table, table)


def test_a_window_is_that_of_all_layers_or_refused() -> None:
    qwen, mistral = (checkpoint_config(replace(CONFIG, window=9, qk_norm=qk_norm)) for qk_norm in (True, False))
    assert (qwen["model_type"], mistral["model_type"], mistral["architectures"]) == ("qwen3", "mistral", ["MistralForCausalLM"])
    assert backbone_config(qwen | {"layer_types": None}).window == 9
    assert backbone_config(qwen | {"layer_types": None, "max_window_layers": 2}).window == 0
    assert backbone_config(qwen | {"use_sliding_window": False}).window == 0
    assert backbone_config(mistral | {"sliding_window": None}).window == 0
    for some in ({"layer_types": None, "max_window_layers": 1}, {"layer_types": ["full_attention", "sliding_attention"]}):
        with pytest.raises(Qwen3Error, match="sliding_window: 1 of 2 layers have none, and here all have it or none has"):
            backbone_config(qwen | some)
