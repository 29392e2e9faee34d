import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp.config import ConfigError, build_config
from mmtp.tokenizers.quantizers import FSQ


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


def test_levels_that_cannot_be_are_refused():
    for name in ("fsq", "residual-fsq"):
        with pytest.raises(ConfigError, match=r"levels \[8, 2\]: each must be at least 3"):
            build_config("quantizer", {"type": name, "levels": [8, 2]})
