import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mmtp.nn.linear import LEAST, Linear, pack_linears

SIZES = [(256, 256), (128, 768), (768, 128), (192, 1001)]


def packed(i: int, o: int, dtype: torch.dtype, bias: bool = False) -> Linear:
    torch.manual_seed(0)
    linear = Linear(i, o, bias=bias).to(dtype)
    pack_linears(linear)
    assert linear.weight.numel() >= LEAST
    return linear


@pytest.mark.parametrize(("i", "o"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gives_what_an_unpacked_one_gives(i: int, o: int, dtype: torch.dtype) -> None:
    linear = packed(i, o, dtype, bias=True)
    x = torch.randn(2, 5, i, dtype=dtype)
    with torch.inference_mode():
        found = linear(x)
    wanted = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    error = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]  # measured at most: 9e-7 in float32, 8e-3 in bfloat16
    torch.testing.assert_close(found.double(), wanted, atol=error, rtol=error)


@given(rows=st.integers(1, 70), size=st.sampled_from(SIZES), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_row_gets_the_same_numbers_beside_any_others(rows: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    linear = packed(*size, dtype)
    x = torch.randn(70, size[0], dtype=dtype)
    with torch.inference_mode():
        assert torch.equal(linear(x)[:rows], linear(x[:rows]))


def test_follows_its_weight() -> None:
    linear = packed(256, 256, torch.float32)
    x = torch.randn(3, 256)
    with torch.inference_mode():
        before = linear(x)
    with torch.no_grad():
        linear.weight.mul_(2)
    with torch.inference_mode():
        assert torch.equal(linear(x), 2 * before)
    linear.load_state_dict({"weight": linear.weight.detach() / 4})
    with torch.inference_mode():
        assert torch.equal(linear(x), before / 2)
    linear.bfloat16()
    with torch.inference_mode():
        assert linear(x.bfloat16()).dtype == torch.bfloat16


def test_copies_have_weights_of_their_own() -> None:
    linear = packed(256, 256, torch.float32)
    x = torch.randn(3, 256)
    with torch.inference_mode():
        before = linear(x)
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        with torch.no_grad():
            other.weight.zero_()
        with torch.inference_mode():
            assert not other(x).any()
            assert torch.equal(linear(x), before)


def test_learns_as_any_other() -> None:
    linear, x = packed(256, 256, torch.float32), torch.randn(3, 256)
    linear(x).sum().backward()
    torch.testing.assert_close(linear.weight.grad, x.sum(0).expand(256, -1))
