"""Compiled passes beside those of torch."""

import copy
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp.decode.cache import KVCache
from mmtp.models.backbone import Backbone, BackboneConfig
from mmtp.nn import native
from mmtp.nn.native import NativeError

SIZES = {
    "qwen": BackboneConfig(width=96, depth=3, num_heads=4, num_kv_heads=2, head_dim=32, mlp_width=160),
    # Nothing of this one is a multiple of what a processor multiplies at a time.
    "llama": BackboneConfig(width=40, depth=2, num_heads=3, num_kv_heads=1, head_dim=10, mlp_width=44, qk_norm=False),
    "wide": BackboneConfig(width=128, depth=1, num_heads=2, num_kv_heads=2, head_dim=64, mlp_width=272),
}
START = 70


def backbone(size: str) -> Backbone:
    torch.manual_seed(0)
    net = Backbone(SIZES[size])
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return net.eval()


def run(net: Backbone, x: torch.Tensor, compiled: bool, starts: list[int], block: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """States of a pass, and what the cache holds after it; before it, all lanes hold the same numbers, drawn at random."""
    c = net.config
    cache = KVCache(c.depth, len(x), c.num_kv_heads, c.head_dim, 2 * START, block=block, compiled=compiled)
    held = (c.depth, 2, 1, c.num_kv_heads, START, c.head_dim)
    cache.storage[..., :START, :] = torch.randn(held, generator=torch.Generator().manual_seed(1))
    cache.lengths = list(starts)
    width = x.shape[1]
    positions = torch.tensor([[(s + i, (s + i) % 7, 2 * i) for i in range(width)] for s in starts])
    with torch.inference_mode():
        return net(x, positions, cache.begin(width), cache.layers), cache.storage[..., : START + width, :]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("width", [1, 2, 5, 13])
def test_gives_what_torch_gives(size: str, width: int) -> None:
    net = backbone(size)
    x = torch.randn(2, width, net.config.width, generator=torch.Generator().manual_seed(2))
    for found, wanted in zip(run(net, x, True, [START, 11]), run(net, x, False, [START, 11]), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)  # measured at most: 2e-5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("width", [1, 2, 5, 13])
def test_weights_in_bfloat16_multiply_what_is_rounded_to_it(size: str, width: int) -> None:
    net = backbone(size).bfloat16()
    x = torch.randn(2, width, net.config.width, generator=torch.Generator().manual_seed(2))
    found, held = run(net, x, True, [START, 11])
    assert found.dtype == held.dtype == torch.float32
    reference = copy.deepcopy(net).float()
    for layer in reference.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(lambda _, given: (given[0].bfloat16().float(),))
    for one, other in zip((found, held), run(reference, x, False, [START, 11]), strict=True):
        # What lies between two numbers of bfloat16 may be rounded to either.
        torch.testing.assert_close(one, other, atol=0.02 * float(other.abs().max()), rtol=0)  # measured at most: 0.004
    exact = run(copy.deepcopy(net).float(), x, True, [START, 11])[0]
    assert not torch.equal(found, exact)
    packed = native.laid_out(net.blocks[0].get_parameter("mlp.gate_up.weight").detach())
    rounded, given = native.linear(x[0], packed, 7, True), native.linear(x[0].bfloat16().float(), packed, 7)
    torch.testing.assert_close(rounded, given, atol=1e-4, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(SIZES)),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 14),
    st.integers(0, 13),
    st.integers(0, START),
    st.sampled_from([64, 256]),
)
def test_a_position_gets_the_same_bits_in_every_pass(size: str, dtype: torch.dtype, width: int, first: int, start: int, block: int) -> None:
    net = backbone(size).to(dtype)
    x = torch.randn(3, width, net.config.width, generator=torch.Generator().manual_seed(3))
    together, _ = run(net, x, True, [START, start, 0])
    first = min(first, width - 1)
    alone, _ = run(net, x[:1, : first + 1], True, [START], block)
    assert torch.equal(together[0, : first + 1], alone[0])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("width", [1, 4, 13])
def test_weights_that_bfloat16_can_hold_are_held_so_and_change_no_bit(size: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = backbone(size)
    with torch.no_grad():
        for weight in net.parameters():
            weight.copy_(weight.bfloat16())
    x = torch.randn(2, width, net.config.width, generator=torch.Generator().manual_seed(7))
    linear = net.blocks[0].get_parameter("mlp.gate_up.weight").detach()
    packed = native.laid_out(linear)
    found, product = run(net, x, True, [START, 11])[0], native.linear(x[0], packed, len(linear))
    monkeypatch.setattr(native, "exact", lambda weight: False)
    whole = native.laid_out(linear)
    assert packed.dtype == torch.bfloat16 and whole.dtype == torch.float32
    assert torch.equal(product, native.linear(x[0], whole, len(linear)))
    assert torch.equal(found, run(copy.deepcopy(net), x, True, [START, 11])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    net, before = backbone("qwen").to(dtype), torch.get_num_threads()
    x = torch.randn(1, 4, 96, generator=torch.Generator().manual_seed(4))
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(run(net, x, True, [START])[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_follows_weights_that_change() -> None:
    net = backbone("wide")
    x = torch.randn(1, 3, 128, generator=torch.Generator().manual_seed(5))
    before, _ = run(net, x, True, [START])
    with torch.no_grad():
        net.blocks[0].get_parameter("mlp.down.weight").mul_(2)
    after, _ = run(net, x, True, [START])
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, run(net, x, False, [START])[0], atol=1e-4, rtol=1e-4)


def test_the_input_is_left_as_it_is() -> None:
    net = backbone("wide")
    x = torch.randn(1, 3, 128)
    kept = x.clone()
    run(net, x, True, [START])
    assert torch.equal(x, kept)


def test_extreme_numbers_end_in_none_that_are_not() -> None:
    net = backbone("qwen")
    x = 1e4 * torch.randn(1, 3, 96, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_(20)
    found, wanted = run(net, x, True, [START])[0], run(net, x, False, [START])[0]
    assert found.isfinite().all()
    torch.testing.assert_close(found / wanted.abs().max(), wanted / wanted.abs().max(), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("compiler", "said"), [("no-such-compiler", "install g\\+\\+ or set CXX"), ("false", "'false' fails")])
def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, compiler: str, said: str) -> None:
    monkeypatch.setenv("CXX", compiler)
    native.library.cache_clear()
    try:
        with pytest.raises(NativeError, match=said):
            native.library()
    finally:
        native.library.cache_clear()


def test_a_folder_that_cannot_be_written_to_is_no_hindrance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    native.library.cache_clear()
    try:
        assert native.library().mmtp_panel() > 0
    finally:
        native.library.cache_clear()
    assert list(tmp_path.glob("mmtp-*/native-*.so"))


@pytest.mark.parametrize(
    "source",
    [
        'extern "C" long mmtp_panel(void) { return 8; }',  # as it was before there was a number
        'extern "C" long mmtp_layout(void) { return 2000088112144; }',
    ],
)
def test_kernels_of_another_version_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str) -> None:
    (tmp_path / "native.cpp").write_text(source)
    monkeypatch.setattr(native, "SOURCE", tmp_path / "native.cpp")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    try:
        with pytest.raises(NativeError, match=r"native\.cpp: is of another version of mmtp than this process runs; start it anew"):
            native.library()
    finally:
        native.library.cache_clear()


def test_says_what_is_not_compiled() -> None:
    assert not backbone("qwen").uncompiled
    assert "cross-attention" in Backbone(replace(SIZES["qwen"], cross_attention_every=1)).uncompiled
    assert not backbone("qwen").bfloat16().uncompiled
    assert "weights in torch.float64 on the CPU" in backbone("qwen").double().uncompiled
