from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp.tokenizers.image.tiling import Tiling, windows


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 90), size=st.integers(1, 24), unit=st.integers(1, 4), data=st.data())
def test_windows_cover_the_axis_and_share_it_out(count, size, unit, data):
    overlap = data.draw(st.integers(0, size - 1))
    fade = data.draw(st.sampled_from([1, max(1, overlap * unit)]))
    found = list(windows(count, size, overlap, fade, unit))
    assert (found[0].start, found[-1].stop) == (0, count * unit)
    assert all(w.stop - w.start == min(size, count) * unit and w.start % unit == 0 for w in found)
    assert all(a.start < b.start and a.stop - b.start >= overlap * unit for a, b in pairwise(found))
    total = torch.zeros(count * unit)
    for window in found:
        total[window.range] += window.weights
        assert window.weights.min() >= 0
    torch.testing.assert_close(total, torch.ones(count * unit))


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 90), halo=st.integers(0, 6), room=st.integers(1, 9))
def test_with_a_hard_seam_a_place_has_its_halo_on_both_sides(count, halo, room):
    for window in windows(count, 2 * halo + room, 2 * halo):
        assert set(window.weights.tolist()) <= {0.0, 1.0}
        taken = window.weights.nonzero()[:, 0] + window.start
        assert window.start == 0 or taken.min() - window.start >= halo
        assert window.stop == count or window.stop - 1 - taken.max() >= halo


def test_windows_are_as_few_as_can_be():
    assert [(w.start, w.stop) for w in windows(20, 8, 2)] == [(0, 8), (6, 14), (12, 20)]
    assert [(w.start, w.stop) for w in windows(21, 8, 2)] == [(0, 8), (4, 12), (8, 16), (13, 21)]
    assert len(list(windows(8, 8, 7))) == 1


def test_blended_windows_fade_linearly():
    first, second = windows(12, 8, 4, 4)
    torch.testing.assert_close(first.weights, torch.tensor([1, 1, 1, 1, 0.875, 0.625, 0.375, 0.125]))
    torch.testing.assert_close(second.weights, first.weights.flip(0))


def test_tiles_are_windows_along_both_axes():
    tiling = Tiling(side=4, encoder_overlap=0, decoder_overlap=2, blend=True)
    tiles = list(tiling.tiles(3, 8, tiling.encoder_overlap, 1))
    assert [((t.start, t.stop), (s.start, s.stop)) for t, s in tiles] == [((0, 3), (0, 4)), ((0, 3), (4, 8))]
    assert [(s.start, s.stop) for _, s in tiling.tiles(3, 8, tiling.decoder_overlap, 5)] == [(0, 20), (10, 30), (20, 40)]
