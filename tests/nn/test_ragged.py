"""Passes of which padding is left out, beside those of which it is not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp.decode.cache import KVCache
from mmtp.models.backbone import Backbone
from mmtp.nn.ragged import APART, MOST, Ragged
from tests.nn.test_native import START, backbone

WIDTHS = [[5, 0, 1, 3], [2, 1, 3, 0, 40], [0, 33]]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 3))
def test_what_is_packed_comes_back_to_its_place(widths: list[int], more: int) -> None:
    width = max(1, *widths) + more
    ragged = Ragged.of(widths, width, torch.device("cpu"))
    assert (ragged is None) == (sum(widths) > MOST * width * len(widths))
    if ragged is None:
        return
    x = torch.rand(len(widths), width, 2, 3) + 1
    packed, inside = ragged.pack(x), torch.arange(width) < torch.tensor(widths)[:, None]
    assert torch.equal(packed, x[inside].unsqueeze(0))
    assert torch.equal(ragged.spread(packed), x * inside[..., None, None])
    bands = [(x[band.lanes, : band.ragged.width], packed[:, band.tokens], band.ragged) for band in ragged.bands]
    assert torch.equal(torch.cat([part.pack(own) for own, _, part in bands], 1), packed)
    assert torch.equal(torch.cat([mine for _, mine, _ in bands], 1), packed)
    assert [lane for band in ragged.bands for lane in range(*band.lanes.indices(len(widths)))] == list(range(len(widths)))
    area = sum(own.shape[0] * own.shape[1] for own, _, _ in bands)
    assert len(bands) == 1 or area <= APART * len(widths) * width


def run(net: Backbone, widths: list[int], compiled: bool, x: torch.Tensor, leave_out: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    """States of the tokens of every lane, and what the cache then holds."""
    c, lanes = net.config, len(x)
    cache = KVCache(c.depth, lanes, c.num_kv_heads, c.head_dim, 2 * START, compiled=compiled)
    cache.storage.normal_(generator=torch.Generator().manual_seed(1))
    cache.lengths = [START - 9 * lane for lane in range(lanes)]
    positions = torch.tensor([[(length + i, i, 2 * i) for i in range(x.shape[1])] for length in cache.lengths])
    with torch.inference_mode():
        states = net(x, positions, cache.begin(x.shape[1], widths if leave_out else None), cache.layers)
    assert (cache.ragged is not None) == leave_out
    for lane, count in enumerate(widths):  # what a pass writes behind its tokens nobody reads
        cache.storage[:, :, lane, :, cache.lengths[lane] + count :] = 0
    return [state[:count] for state, count in zip(states, widths, strict=True)], cache.storage


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("size", ["qwen", "llama"])
@pytest.mark.parametrize("widths", WIDTHS)
def test_tokens_get_what_they_get_beside_padding(widths: list[int], size: str, compiled: bool) -> None:
    net = backbone(size)
    x = torch.randn(len(widths), max(widths), net.config.width, generator=torch.Generator().manual_seed(2))
    (found, held), (wanted, kept) = (run(net, widths, compiled, x, leave_out) for leave_out in (True, False))
    if compiled:
        assert torch.equal(held, kept) and all(map(torch.equal, found, wanted))
    else:
        torch.testing.assert_close(held, kept, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=5), st.sampled_from(["qwen", "llama"]))
def test_compiled_passes_touch_nothing_that_is_padding(widths: list[int], size: str) -> None:
    net, width = backbone(size), max(1, *widths)
    c, lanes = net.config, len(widths)
    cache = KVCache(c.depth, lanes, c.num_kv_heads, c.head_dim, 2 * START, compiled=True)
    cache.lengths = [START] * lanes
    x = torch.full((lanes, width, c.width), float("nan"))
    inside = torch.arange(width) < torch.tensor(widths)[:, None]
    x[inside] = 1.0
    with torch.inference_mode():
        states = net(x, torch.zeros(lanes, width, 3, dtype=torch.long), cache.begin(width, widths), cache.layers)
    if cache.ragged is not None:
        assert states[inside].isfinite().all() and states[~inside].isnan().all()
        assert not cache.storage[..., START + width :, :].any() and cache.storage.isfinite().all()
        for lane, count in enumerate(widths):
            assert not cache.storage[:, :, lane, :, START + count :].any()
