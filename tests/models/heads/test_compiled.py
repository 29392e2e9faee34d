"""Compiled steps of draft heads beside those of torch."""

from dataclasses import replace

import pytest
import torch

from mmtp.decode.cache import KVCache
from mmtp.models.heads.base import BlockConfig, Places
from mmtp.models.heads.parallel import ParallelHead
from mmtp.models.heads.sequential import SequentialHead
from mmtp.models.heads.shared import SharedHead
from mmtp.models.heads.synchronized import SynchronizedHead
from mmtp.types import Modality
from tests.models.common import BACKBONE

MODALITIES = (Modality.TEXT, Modality.IMAGE, Modality.AUDIO)
HEADS = {
    "parallel": ParallelHead.Config(mtp_depth=2),
    "sequential": SequentialHead.Config(mtp_depth=3, mlp_width=40),
    "shared": SharedHead.Config(mtp_depth=2),
    "synchronized": SynchronizedHead.Config(mtp_depth=2, vertical=3),
    "alone": SynchronizedHead.Config(mtp_depth=2, exchange="none"),
    "common": SynchronizedHead.Config(mtp_depth=2, exchange="common"),
}


@torch.inference_mode()
def drafted(config: BlockConfig, compiled: bool, lanes: int = 2, newest: tuple[int, ...] | None = None) -> list[torch.Tensor]:
    """States of all offsets in two rounds, at three and at two new anchors; the second lane begins with more tokens than the first."""
    torch.manual_seed(0)
    head = config.build(backbone=BACKBONE, modalities=MODALITIES).eval()
    for weight in head.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    cache = KVCache(head.num_caches, lanes, BACKBONE.num_kv_heads, BACKBONE.head_dim, 100, compiled=compiled)
    cache.lengths = [0, 3][:lanes]
    kinds = torch.tensor([m.index for m in MODALITIES])
    found = []
    for width in (3, 2):
        x = torch.randn(1 + head.mtp_depth, 2, width, BACKBONE.width)[:, :lanes]
        picked = torch.randint(0, 2, (2, width))[:lanes]
        banks = kinds[torch.randint(0, 2, (2, 64))[:lanes]]  # of the third kind there is no key
        mask, state, begins = cache.begin(width), x[0], torch.tensor(cache.lengths)[:, None, None]
        for k in range(1, head.mtp_depth + 1):
            positions = begins + torch.arange(width)[:, None] + torch.tensor([k, 2 * k, 1])
            places = Places(positions, kinds[(picked + k) % 3], banks, mask, newest)
            state, out = head.draft(k, state, x[k], places, cache.layers)
            found += [state, out]
            if k == 1 and getattr(head, "vertical", 0):
                found.append(head.below(x[0], x[k], replace(places, newest=None), cache.layers))
        cache.commit([width] * lanes)
    return found


@pytest.mark.parametrize("name", HEADS)
def test_gives_what_torch_gives(name: str) -> None:
    found, wanted = drafted(HEADS[name], True), drafted(HEADS[name], False)
    assert len(found) == len(wanted) >= 8
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)  # measured at most: 1e-5


@pytest.mark.parametrize("newest", [(1, 0), (1,)])
@pytest.mark.parametrize("name", HEADS)
def test_newest_anchors_get_the_same_bits_without_others(name: str, newest: tuple[int, ...]) -> None:
    alone, every = (drafted(HEADS[name], True, len(newest), which) for which in (newest, None))
    for one, other in zip(alone, every, strict=True):
        assert torch.equal(one[range(len(newest)), newest], other[range(len(newest)), newest])


@pytest.mark.parametrize("name", HEADS)
def test_a_lane_gets_the_same_bits_alone(name: str) -> None:
    for one, other in zip(drafted(HEADS[name], True), drafted(HEADS[name], True, lanes=1), strict=True):
        assert torch.equal(one[:1], other)
