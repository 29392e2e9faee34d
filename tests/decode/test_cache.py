import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp.decode.cache import BLOCK, FIRST_CAPACITY, CacheFullError, KVCache


def write(cache: KVCache, width: int, value: float) -> tuple[torch.Tensor, torch.Tensor]:
    rows = len(cache.lengths)
    mask = cache.begin(width)
    keys, _ = cache.layers[0].update(torch.full((rows, 1, width, 2), value), torch.full((rows, 1, width, 2), -value))
    return keys, mask


def test_rollback_is_a_pointer_and_what_lies_beyond_is_not_seen() -> None:
    cache = KVCache(1, 1, 1, 2, 1000)
    write(cache, 5, 1.0)
    cache.commit([2])
    keys, mask = write(cache, 1, 2.0)
    assert keys[0, 0, :6, 0].tolist() == [1, 1, 2, 1, 1, 0]
    assert mask[0, 0, 0].nonzero().flatten().tolist() == [0, 1, 2]
    assert mask.shape[-1] == BLOCK


def test_rows_have_their_own_lengths() -> None:
    cache = KVCache(1, 3, 1, 2, 1000)
    write(cache, 4, 1.0)
    cache.commit([4, 1, 0])
    keys, mask = write(cache, 2, 2.0)
    assert keys[:, 0, :7, 0].tolist() == [[1, 1, 1, 1, 2, 2, 0], [1, 2, 2, 1, 0, 0, 0], [2, 2, 1, 1, 0, 0, 0]]
    assert mask.sum(-1)[:, 0].tolist() == [[5, 6], [2, 3], [1, 2]]


def test_grows_without_losing_what_it_holds() -> None:
    cache = KVCache(2, 1, 1, 2, 5000)
    before = cache.storage.numel()
    write(cache, FIRST_CAPACITY, 1.0)
    cache.commit([FIRST_CAPACITY])
    keys, _ = write(cache, 3, 2.0)
    assert cache.storage.numel() == 2 * before
    assert keys[0, 0, : FIRST_CAPACITY + 3, 0].tolist() == [1.0] * FIRST_CAPACITY + [2.0] * 3


@pytest.mark.parametrize("held", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("rows", [1, 3])
def test_fewer_bits_hold_a_token_by_itself(held: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    cache, plain = (KVCache(1, rows, 2, 8, 1000, stored=kind) for kind in (held, None))
    keys, values = torch.randn(rows, 2, 9, 8) * torch.logspace(-3, 3, 9)[:, None], torch.zeros(rows, 2, 9, 8)
    for first, width, kept in ((0, 5, 2), (2, 7, 7)):  # three tokens of the first pass are rolled back
        for one in (cache, plain):
            one.begin(width)
            one.layers[0].update(keys[:, :, first : first + width], values[:, :, first : first + width])
            one.commit([kept] * rows)
    (found, zeros), (wanted, _) = cache.layers[0].read(), plain.layers[0].read()
    error = (found - wanted)[:, :, :9].abs().amax(-1) / wanted[:, :, :9].abs().amax(-1)
    assert 0 < error.max() <= (1 / 254 if held == torch.int8 else 1 / 256) * 1.01
    assert found.dtype == torch.float32 and not zeros.any()
    alone = KVCache(1, rows, 2, 8, 1000, stored=held)
    alone.begin(1)
    alone.layers[0].update(keys[:, :, 3:4], values[:, :, 3:4])
    assert torch.equal(alone.layers[0].read()[0][:, :, 0], found[:, :, 3])
    assert cache.storage.nbytes == plain.storage.nbytes * (12 / 32 if held == torch.int8 else 1 / 2)


def test_says_when_it_is_full() -> None:
    cache = KVCache(1, 1, 1, 2, 10)
    write(cache, 8, 1.0)
    cache.commit([8])
    with pytest.raises(CacheFullError, match="context of 10 tokens is full: 8 are in it and 3 more do not fit"):
        cache.begin(3)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 90), st.sampled_from([8, 64]), st.integers(1, 2))
def test_a_window_sees_what_it_would_of_all_and_holds_no_more_than_it_needs(
    data: st.DataObject, window: int, block: int, rows: int
) -> None:
    cache = KVCache(1, rows + 1, 1, 1, 5000, block=block, window=window)
    cache.focus(0, rows)
    widths = [data.draw(st.integers(1, 50)) for _ in range(40)]
    for width in widths:
        mask = cache.begin(width)
        places = torch.tensor(cache.lengths)[:, None] + torch.arange(width)
        keys, _ = cache.layers[0].update(*(places[:, None, :, None].float(),) * 2)
        for row in range(rows):
            for i in range(width):
                end = cache.lengths[row] + i + 1
                assert keys[row, 0, mask[row, 0, i], 0].tolist() == list(range(max(0, end - window), end))
        cache.commit([data.draw(st.integers(0, width)) for _ in range(rows)])
    assert cache.capacity <= max(FIRST_CAPACITY, window + max(widths) + 2 * block)
    source, length = rows - 1, cache.lengths[rows - 1]
    for shorter in (length, length // 2):
        if not cache.keeps(source, shorter):
            assert shorter < length
            continue
        cache.copy(source, rows, shorter)
        cache.swap(0, rows)
        cache.swap(0, rows)
        cache.focus(rows, 1)
        mask = cache.begin(3)
        keys, _ = cache.layers[0].update(*(torch.arange(shorter, shorter + 3.0)[None, None, :, None],) * 2)
        for i in range(3):
            seen = list(range(max(0, shorter + i + 1 - window), shorter + i + 1))
            assert keys[0, 0, mask[0, 0, i], 0].tolist() == seen
        cache.focus(0, rows)
