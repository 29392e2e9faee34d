from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from mmtp.tokenizers.quantizers import ResidualFSQ, ResidualLFQ, ResidualVQ

CONFIGS = [
    ResidualVQ.Config(num_codebooks=4, codebook_size=64),
    ResidualFSQ.Config(num_codebooks=4, levels=(5, 5, 5)),
    ResidualLFQ.Config(num_codebooks=4, bits=6, entropy=0.01),
]


@pytest.fixture(params=CONFIGS, ids=lambda config: type(config).__qualname__)
def config(request):
    return request.param


def trained(config):
    quantizer = config.build(dim=12)
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=1e-2)
    for _ in range(200):
        latents = torch.randn(1, 512, 12)
        out = quantizer(latents)
        optimizer.zero_grad()
        (F.mse_loss(out.latents, latents) + out.loss).backward()
        optimizer.step()
    return quantizer.eval()


def test_every_further_codebook_comes_nearer(config):
    quantizer, latents = trained(config), torch.randn(1, 2000, 12)
    out = quantizer(latents)
    errors = [F.mse_loss(quantizer.lookup(out.ids[..., :k]), latents) for k in range(1, 5)]
    assert all(later < earlier for earlier, later in pairwise(errors))
    torch.testing.assert_close(quantizer.lookup(out.ids), out.latents, atol=1e-6, rtol=0)


def test_dropout_leaves_out_the_last_codebooks(config):
    quantizer = config.build(dim=12)
    dropped = [quantizer(torch.randn(1, 64, 12)).ids < 0 for _ in range(30)]
    assert all(torch.equal(d, d.sort(-1).values) and not d[..., 0].any() for d in dropped)
    assert len({int(d[0, 0].sum()) for d in dropped}) == 4  # none to three are left out
    quantizer.eval()
    assert torch.all(quantizer(torch.randn(1, 64, 12)).ids >= 0)


def test_without_dropout_every_step_has_all_codebooks(config):
    whole = type(config)(**{**vars(config), "dropout": False}).build(dim=12)
    assert all(torch.all(whole(torch.randn(1, 64, 12)).ids >= 0) for _ in range(30))
    whole.eval()
    ids = whole(torch.randn(1, 64, 12)).ids
    assert whole.lookup(ids[..., :2]).shape == (1, 64, 12)


def test_codebooks_that_training_has_not_reached_add_nothing():
    quantizer = ResidualVQ(ResidualVQ.Config(num_codebooks=4, codebook_size=16), dim=12)
    latents = torch.randn(1, 512, 12)
    while not (quantizer(latents).ids[0, 0] < 0).any():
        quantizer = ResidualVQ(ResidualVQ.Config(num_codebooks=4, codebook_size=16), dim=12)
    quantizer.eval()
    reached = sum(bool(layer._codebook.initted) for layer in quantizer.vq.layers)
    assert 1 <= reached < 4
    out = quantizer(latents)
    assert not out.ids[..., reached:].any()
    torch.testing.assert_close(quantizer.lookup(out.ids[..., :reached]), out.latents, atol=1e-6, rtol=0)
