import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mmtp.config import ConfigError, build_config
from mmtp.tokenizers.quantizers import BSQ, LFQ


@pytest.mark.parametrize(("bits", "group_bits", "groups"), [(12, 9, 2), (9, 9, 1), (18, 9, 2), (13, 9, 13), (14, 7, 2), (10, 12, 1)])
def test_groups_are_the_fewest_that_fit(bits, group_bits, groups):
    assert LFQ.Config(bits=bits, group_bits=group_bits).groups == groups


@pytest.mark.parametrize("group_bits", [2, 4, 8])
def test_every_code_has_latents_of_its_own(group_bits):
    quantizer = LFQ(LFQ.Config(bits=8, group_bits=group_bits), dim=8).eval()
    latents = quantizer.lookup(torch.arange(256)[None, :, None])
    distances = torch.cdist(latents, latents)[0] + torch.eye(256)
    assert distances.min() > 1e-3


def test_spheres():
    quantizer = BSQ(BSQ.Config(bits=8, group_bits=4), dim=6).eval()
    bits = quantizer.lfq.indices_to_codes(torch.tensor([[[0, 15]]]), project_out=False)
    torch.testing.assert_close(bits[0, 0], torch.tensor([-0.5] * 4 + [0.5] * 4))  # unit length in each group of four


@pytest.mark.parametrize("kind", [LFQ, BSQ])
def test_all_codes_come_into_use(kind):
    quantizer = kind(kind.Config(bits=8, group_bits=4), dim=16)
    mix, optimizer = torch.randn(6, 16), torch.optim.AdamW(quantizer.parameters(), lr=1e-2)
    for _ in range(200):
        latents = torch.randn(1, 512, 6) @ mix + 2.0  # off centre: at first most bits are the same everywhere
        out = quantizer(latents)
        optimizer.zero_grad()
        (F.mse_loss(out.latents, latents) + out.loss).backward()
        optimizer.step()
    ids = quantizer.eval()(torch.randn(1, 8000, 6) @ mix + 2.0).ids
    assert len(ids.unique()) > 128


def test_bits_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="bits 40: 1 to 24"):
        build_config("quantizer", {"type": "lfq", "bits": 40})
    with pytest.raises(ConfigError, match="bits 14: 1 to 12"):
        build_config("quantizer", {"type": "residual-lfq", "bits": 14})


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that comes up."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def test_the_entropy_loss_is_not_over_all_codes_at_once():
    """Over all codes, a step of 4,096 latents with 2^14 of them took 9 s, and with 2^18 it does not fit into memory."""
    quantizer, latents = LFQ(LFQ.Config(bits=18), dim=8), torch.randn(1, 64, 8)
    with Largest() as largest:
        quantizer(latents)
    assert largest.numel <= 64 * 2 * 2**9
    with Largest() as largest:
        LFQ(LFQ.Config(bits=12, group_bits=12), dim=8)(latents)
    assert largest.numel >= 64 * 2**12
