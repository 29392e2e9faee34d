"""The refiner: what it reads, its file, and the same by compiled kernels."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mmtp import hub
from mmtp.models.refiner import EPS, Refiner, RefinerError
from mmtp.models.unified import UnifiedModel
from tests.models.common import model

WIDTH = 48


def random_refiner(width: int = WIDTH, hidden: int = 20, scale: float = 0.5, seed: int = 0) -> Refiner:
    """One that changes states; its weights are exact in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2 * hidden, 4 * width), (2, 2 * hidden), (width, hidden))
    weights = ((scale * torch.randn(shape, generator=generator)).bfloat16().float() for shape in shapes)
    return Refiner(*weights, media=("image", "audio"))


def refining() -> UnifiedModel:
    """A model that has one."""
    net = model(depth=1)
    net.refiner = random_refiner()
    return net


def _given(count: int, seed: int = 1) -> list[torch.Tensor]:
    return list(torch.randn(4, count, WIDTH, generator=torch.Generator().manual_seed(seed)))


def test_a_new_one_leaves_states_as_they_are() -> None:
    state, *others = _given(3)
    assert torch.equal(Refiner.begin(WIDTH, 20)(state, *others, torch.tensor([True, False, True])), state)
    one, other = (Refiner.begin(WIDTH, 20, seed) for seed in (1, 2))
    assert not torch.equal(one.told, other.told)


def test_it_is_a_gated_layer_over_what_it_is_told() -> None:
    refiner, (state, read, before, token) = random_refiner(), _given(5)
    left = torch.tensor([True, False, False, True, True])
    found = refiner(state, read, before, token, left)
    for i in range(5):
        told = torch.cat([each[i] / (each[i].square().mean() + EPS).sqrt() for each in (state, read, before, token)])
        up = refiner.told @ told + refiner.kind[int(left[i])]
        wanted = state[i] + refiner.outward @ (F.silu(up[:20]) * up[20:])
        torch.testing.assert_close(found[i], wanted, rtol=1e-4, atol=1e-4)


def test_it_comes_with_the_model(tmp_path: Path) -> None:
    net, refiner = model(depth=0), random_refiner()
    net.refiner = refiner
    folder = hub.save_pretrained(net, tmp_path / "model")
    again = hub.from_pretrained(folder).refiner
    assert all(torch.equal(one, other) for one, other in zip(again.parameters, refiner.parameters, strict=True))
    assert again.media == {"image", "audio"}
    net.refiner = None
    assert hub.from_pretrained(hub.save_pretrained(net, folder)).refiner is None


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "refiner.safetensors"
    random_refiner().save(path)
    assert Refiner.load(path, WIDTH).outward.shape[0] == WIDTH
    with pytest.raises(RefinerError, match="is of a model of another width than 64"):
        Refiner.load(path, 64)
    save_file(dict(zip(("told", "kind", "outward"), random_refiner().parameters, strict=True)), path)
    with pytest.raises(RefinerError, match=r"is damaged \('media'\)"):
        Refiner.load(path, WIDTH)
    save_file({"told": torch.zeros(2, 2)}, path)
    with pytest.raises(RefinerError, match=r"refiner.safetensors: is damaged .*mmtp refiner"):
        Refiner.load(path, WIDTH)
    path.write_bytes(b"no tensors")
    with pytest.raises(RefinerError, match="is damaged"):
        Refiner.load(path, WIDTH)


def test_it_goes_where_the_model_is() -> None:
    refiner = random_refiner()
    assert refiner.to(torch.device("cpu"), torch.float32) is refiner
    other = refiner.to(torch.device("cpu"), torch.bfloat16)
    assert other.told.dtype == torch.bfloat16 and other.media == refiner.media
