import torch

from mmtp.nn.block import Block, init_weights
from mmtp.nn.rope import Rope


def tiny() -> Block:
    return Block(width=12, num_heads=2, num_kv_heads=1, head_dim=6, mlp_width=20)


def angles(x: torch.Tensor):
    return Rope(6, 100.0)(torch.arange(x.shape[1])[None, :, None].expand(len(x), -1, 3))


def test_names_of_weights_are_those_that_checkpoints_hold():
    names = {name.split(".")[0] for name in tiny().state_dict()}
    assert names == {"attention_norm", "attention", "mlp_norm", "mlp"}


def test_without_a_mask_every_position_sees_every_other():
    block, x = tiny(), torch.randn(1, 5, 12)
    changed = x.clone()
    changed[:, 3] += 1
    assert ((block(x, angles(x), None) - block(changed, angles(x), None)).abs().amax(-1) > 1e-6).all()
    causal = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    assert torch.equal(block(x, angles(x), causal)[:, :3], block(changed, angles(x), causal)[:, :3])


def test_what_writes_into_the_residual_stream_starts_smaller():
    block = Block(width=96, num_heads=4, num_kv_heads=4, head_dim=24, mlp_width=128)
    init_weights(block, depth=8)
    for written, read in ((block.attention.out, block.attention.qkv), (block.mlp.down, block.mlp.gate_up)):
        assert 3.5 < read.weight.std() / written.weight.std() < 4.5
