"""Our backbone against transformers' Qwen3, Llama and Mistral, both ways, on tiny random weights. Measured worst case: 2e-6 (float32)."""

import pytest
import torch

from mmtp.models.backbone import Backbone
from mmtp.models.qwen3 import backbone_config, from_qwen3, to_qwen3
from mmtp.nn.attention import document_mask
from mmtp.nn.block import init_weights

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
WINDOW = {"sliding_window": 7}
QWEN_WINDOW = WINDOW | {"use_sliding_window": True, "max_window_layers": 0}
KINDS = {
    "qwen3": ("Qwen3", {}, {}),
    "qwen3, window": ("Qwen3", {}, QWEN_WINDOW),
    "llama": ("Llama", {}, {}),
    "llama3": ("Llama", LLAMA3, {}),
    "mistral": ("Mistral", {}, WINDOW),
}


def theirs(kind: str, tie: bool) -> torch.nn.Module:
    name, scaling, window = KINDS[kind]
    rope = {"rope_parameters": scaling | {"rope_theta": 50000.0}} if scaling else {"rope_theta": 50000.0}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=100, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=512, tie_word_embeddings=tie, attn_implementation="eager", **rope, **window,
    )  # fmt: skip
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else torch.nn.init.normal_(parameter, 1.0, 0.2)
    return model


def ours(state: dict, config: object, tokens: torch.Tensor) -> torch.Tensor:
    sizes = backbone_config(config.to_dict())
    weights, embedding, unembedding = from_qwen3(state, sizes)
    backbone = Backbone(sizes).eval()
    backbone.load_state_dict(weights)
    b, s = tokens.shape
    positions = torch.arange(s)[None, :, None].expand(b, s, 3)
    hidden = backbone(embedding[tokens], positions, document_mask(torch.zeros(b, s, dtype=torch.long), window=sizes.window))
    return backbone.norm(hidden) @ unembedding.T


@pytest.mark.parametrize(
    ("kind", "tie"), [("qwen3", True), ("qwen3", False), ("qwen3, window", True), ("llama", True), ("llama3", False), ("mistral", False)]
)
def test_their_weights_in_our_backbone(kind: str, tie: bool) -> None:
    model = theirs(kind, tie)
    tokens = torch.randint(0, 100, (2, 40))
    with torch.no_grad():
        wanted = model(tokens).logits
        found = ours(model.state_dict(), model.config, tokens)
    scale = wanted.abs().max()
    torch.testing.assert_close(found / scale, wanted / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_our_weights_in_their_model(kind: str) -> None:
    model = theirs(kind, False)
    sizes = backbone_config(model.config.to_dict())
    backbone = Backbone(sizes)
    init_weights(backbone, sizes.depth, std=0.2)
    embedding, unembedding = torch.randn(100, 48), torch.randn(100, 48)
    exported = to_qwen3(backbone.state_dict(), sizes, embedding, unembedding)
    assert model.load_state_dict(exported)
    tokens = torch.randint(0, 100, (1, 30))
    with torch.no_grad():
        wanted = ours(exported, model.config, tokens)
        found = model(tokens).logits
    scale = wanted.abs().max()
    torch.testing.assert_close(found / scale, wanted / scale, atol=1e-5, rtol=0)
