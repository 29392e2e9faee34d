import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp.config import ConfigError, build_config
from mmtp.registry import REGISTRY
from mmtp.tokenizers.quantizers import FSQ, VQ, Quantizer, QuantizerConfig

CONFIGS = [FSQ.Config(levels=(5, 4, 3)), VQ.Config(codebook_size=32, codebook_dim=4)]


@pytest.fixture(params=CONFIGS, ids=lambda config: type(config).__qualname__)
def config(request):
    return request.param


def test_every_registered_quantizer_is_tested():
    assert {type(config) for config in CONFIGS} == {REGISTRY.resolve("quantizer", name).Config for name in REGISTRY.names("quantizer")}


def test_contract(config):
    quantizer = config.build(dim=6)
    assert isinstance(quantizer, Quantizer)
    quantizer(torch.randn(2, 40, 6))  # a codebook that starts with k-means starts here
    quantizer.eval()
    latents = torch.randn(2, 7, 6)
    out = quantizer(latents)
    assert out.ids.dtype == torch.int64
    assert out.ids.shape == (2, 7, 1)
    assert 0 <= int(out.ids.min()) <= int(out.ids.max()) < quantizer.codebook_sizes[0]
    assert out.latents.shape == latents.shape
    torch.testing.assert_close(quantizer.lookup(out.ids), out.latents, atol=1e-6, rtol=0)


def test_gradients_pass_straight_through(config):
    quantizer = config.build(dim=6)
    latents = torch.randn(2, 40, 6, requires_grad=True)
    out = quantizer(latents)
    (out.latents.square().mean() + out.loss).backward()
    assert latents.grad.abs().sum() > 0


def test_float32_whatever_surrounds_it(config):
    quantizer = config.build(dim=6)
    latents = torch.randn(2, 40, 6)
    quantizer(latents)
    quantizer.eval()
    with torch.autocast("cpu", torch.bfloat16):
        inside = quantizer(latents)
    outside = quantizer(latents)
    assert torch.equal(inside.ids, outside.ids)
    assert inside.latents.dtype == torch.float32


def test_configuration_round_trip(config):
    data = config.to_dict()
    assert build_config("quantizer", data) == config
    assert isinstance(config, QuantizerConfig)


@settings(deadline=None, max_examples=20)
@given(levels=st.lists(st.integers(3, 9), min_size=1, max_size=5))
def test_every_fsq_code_is_the_code_of_its_own_latents(levels):
    quantizer = FSQ(FSQ.Config(levels=tuple(levels)), dim=len(levels)).eval()
    size = quantizer.codebook_sizes[0]
    ids = torch.arange(min(size, 3000))[None, :, None]
    codes = quantizer.lookup(ids)
    assert codes.abs().max() <= 1
    # The library's scalar levels are what tanh-bounded latents are rounded to, so latents inside the bound map back.
    half = torch.tensor([n // 2 for n in levels])
    low = torch.tensor([-(n // 2) for n in levels]) / half
    assert torch.all(codes >= low - 1e-6)
    assert len(codes[0].unique(dim=0)) == ids.shape[1]


def test_fsq_uses_most_of_its_codes_on_spread_latents():
    quantizer = FSQ(FSQ.Config(), dim=5).eval()
    ids = quantizer(torch.randn(1, 60_000, 5) * 1.2).ids
    assert quantizer.codebook_sizes == (4375,)
    assert len(ids.unique()) > 0.9 * 4375


def test_vq_defaults_do_not_collapse():
    quantizer = VQ(VQ.Config(codebook_size=128), dim=16)
    centres = torch.randn(200, 16)
    for _ in range(60):
        latents = centres[torch.randint(200, (512,))] + 0.05 * torch.randn(512, 16)
        quantizer(latents[None])
    quantizer.eval()
    assert len(quantizer((centres[torch.randint(200, (4000,))] + 0.05 * torch.randn(4000, 16))[None]).ids.unique()) > 100


def test_levels_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match=r"levels \[8, 2\]: each must be at least 3"):
        build_config("quantizer", {"type": "fsq", "levels": [8, 2]})
