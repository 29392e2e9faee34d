"""The contract, over every registered quantizer."""

import copy
import pickle

import pytest
import torch

from mmtp.config import build_config
from mmtp.registry import REGISTRY
from mmtp.tokenizers.quantizers import (
    BSQ,
    FSQ,
    IBQ,
    LFQ,
    VQ,
    MultiScaleVQ,
    Quantizer,
    QuantizerConfig,
    ResidualFSQ,
    ResidualLFQ,
    ResidualVQ,
    SimVQ,
)

CONFIGS = [
    BSQ.Config(bits=6, group_bits=3),
    FSQ.Config(levels=(5, 4, 3)),
    IBQ.Config(codebook_size=32, codebook_dim=8),
    LFQ.Config(bits=6),
    LFQ.Config(bits=6, group_bits=2),
    MultiScaleVQ.Config(scales=(1, 2, 4), codebook_size=32, codebook_dim=4, convolutions=2),
    ResidualFSQ.Config(num_codebooks=3, levels=(5, 4, 3)),
    ResidualLFQ.Config(num_codebooks=3, bits=4),
    ResidualVQ.Config(num_codebooks=3, codebook_size=16, codebook_dim=4),
    SimVQ.Config(codebook_size=32),
    VQ.Config(codebook_size=32, codebook_dim=4),
    VQ.Config(codebook_size=32, codebook_dim=6, cosine=False, rotation_trick=False),
]


@pytest.fixture(params=CONFIGS, ids=lambda config: type(config).__qualname__)
def config(request):
    return request.param


@pytest.fixture
def quantizer(config):
    """In evaluation mode, after the few steps in which a codebook starts."""
    built = config.build(dim=6)
    for _ in range(3):
        built(torch.randn(4, 16, 6))
    return built.eval()


def test_every_registered_quantizer_is_tested():
    assert {type(config) for config in CONFIGS} == {REGISTRY.resolve("quantizer", name).Config for name in REGISTRY.names("quantizer")}


def test_contract(quantizer):
    assert isinstance(quantizer, Quantizer)
    latents = torch.randn(2, 16, 6)
    out = quantizer(latents)
    assert out.ids.dtype == torch.int64
    assert out.ids.shape == (2, sum(n * n for n in quantizer.scales) or 16, len(quantizer.codebook_sizes))
    assert torch.all(out.ids >= 0)
    assert torch.all(out.ids < torch.tensor(quantizer.codebook_sizes))
    assert out.latents.shape == latents.shape
    assert out.loss.shape == ()
    torch.testing.assert_close(quantizer.lookup(out.ids), out.latents, atol=1e-6, rtol=0)


def test_evaluation_changes_nothing(quantizer):
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    latents = torch.randn(2, 16, 6)
    first, second = quantizer(latents), quantizer(latents)
    assert torch.equal(first.ids, second.ids)
    assert torch.equal(first.latents, second.latents)
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_encoding_does_not_start_a_codebook(config):
    """The library's own k-means start runs in evaluation mode too, on whatever is encoded first."""
    fresh = config.build(dim=6).eval()
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    latents = torch.randn(4, 16, 6)
    out = fresh(latents)
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())
    assert torch.equal(fresh(latents[:1]).ids, out.ids[:1])
    torch.testing.assert_close(fresh.lookup(out.ids), out.latents, atol=1e-6, rtol=0)
    fresh.train()(latents)
    state = fresh.state_dict()
    for name in before:
        if name.endswith("initted") and not before[name]:
            assert state[name] or isinstance(config, ResidualVQ.Config)  # of which dropout has left out some
            assert bool(state[name]) == bool(state[name.replace("initted", "embed")].any())


def test_copies_and_saved_ones_wait_for_training_too():
    fresh = copy.deepcopy(VQ(VQ.Config(codebook_size=8, codebook_dim=2), dim=6)).eval()
    assert not fresh(torch.randn(1, 16, 6)).ids.any()
    loaded = pickle.loads(pickle.dumps(fresh))
    assert not loaded(torch.randn(1, 16, 6)).ids.any()
    assert loaded.train()(torch.randn(4, 16, 6)).ids.any()


def test_codes_do_not_depend_on_the_batch(quantizer):
    latents = torch.randn(32, 16, 6)
    together = quantizer(latents).ids
    for step in (1, 8):
        assert torch.equal(torch.cat([quantizer(part).ids for part in latents.split(step)]), together)


def test_the_loss_trains_what_stands_before_and_after(config):
    quantizer = config.build(dim=6)
    latents = torch.randn(4, 16, 6, requires_grad=True)
    out = quantizer(latents)
    (out.latents.square().mean() + out.loss).backward()
    assert latents.grad.abs().sum() > 0
    assert all(p.grad is not None for p in quantizer.parameters())


def test_float32_whatever_surrounds_it(quantizer):
    latents = torch.randn(4, 16, 6)
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantizer(latents)
    outside = quantizer(latents)
    assert torch.equal(inside.ids, outside.ids)
    assert inside.latents.dtype == torch.float32


def test_weights_round_trip(config, quantizer):
    other = config.build(dim=6).eval()
    other.load_state_dict(quantizer.state_dict())
    latents = torch.randn(4, 16, 6)
    assert torch.equal(other(latents).ids, quantizer(latents).ids)


def test_configuration_round_trip(config):
    data = config.to_dict()
    assert build_config("quantizer", data) == config
    assert isinstance(config, QuantizerConfig)
