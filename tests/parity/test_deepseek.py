"""Our MTP modules against MtpLayer of transformers around Qwen3's block, tiny random weights. Worst case measured: 1.3e-6 of 5."""

import pytest
import torch

from mmtp.models.deepseek import from_deepseek
from mmtp.models.heads.base import Places
from mmtp.models.heads.sequential import SequentialHead
from mmtp.models.qwen3 import backbone_config
from mmtp.nn.attention import document_mask
from mmtp.types import Modality

transformers = pytest.importorskip("transformers")
layers = pytest.importorskip("transformers.modeling_layers")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not hasattr(layers, "MtpLayer"), reason="this transformers has no MtpLayer"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def test_their_modules_in_our_head() -> None:
    from transformers.models.qwen3 import modeling_qwen3 as qwen3

    config = transformers.Qwen3Config(
        vocab_size=100, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        head_dim=16, max_position_embeddings=256, rope_theta=50000.0, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(1)
    theirs = [layers.MtpLayer(config, qwen3.Qwen3DecoderLayer, qwen3.Qwen3RMSNorm, k).eval() for k in range(2)]
    for module in theirs:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else torch.nn.init.normal_(parameter, 1.0, 0.2)
    state = {
        f"model.layers.{3 + k}.{name.replace('mtp_block.', '').replace('post_norm.', 'shared_head.norm.')}": value
        for k, module in enumerate(theirs)
        for name, value in module.state_dict().items()
    }
    sizes = backbone_config(config.to_dict())
    ours = SequentialHead(SequentialHead.Config(mtp_depth=2), sizes, (Modality.TEXT,)).eval()
    ours.load_state_dict(from_deepseek(state, sizes))
    hidden, embedded = torch.randn(2, 1, 20, 48)
    ids, flat = torch.arange(20)[None], torch.zeros(1, 20, dtype=torch.long)
    seen = document_mask(flat)
    places = Places(ids[..., None].expand(-1, -1, 3), flat, flat, seen)
    rotary = qwen3.Qwen3RotaryEmbedding(config)(hidden, ids)
    mask = torch.zeros(1, 1, 20, 20).masked_fill(~seen, float("-inf"))
    with torch.no_grad():
        for k, module in enumerate(theirs):
            wanted = module(embedded, hidden, rotary, mask, ids, None)
            _, found = ours._run(k + 1, hidden, embedded, places, None)
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
