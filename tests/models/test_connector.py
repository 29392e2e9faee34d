from dataclasses import replace

import pytest
import torch

from mmtp.config import ConfigError, build_config
from mmtp.models.connector import ConnectorError, Projector, Resampler, merge_cells
from mmtp.registry import REGISTRY
from mmtp.types import Latents

WIDTH, OUT = 12, 16
CONFIGS = {
    "linear": Projector.Config(layers=1),
    "mlp": Projector.Config(),
    "merged": Projector.Config(merge=2),
    "resampler": Resampler.Config(num_queries=5, depth=2, num_heads=2),
}


def latents(*grids: tuple[int, int], padding: float = 0.0, extra: int = 0) -> Latents:
    """Items of these grids, with ``extra`` positions of padding more than the longest needs, all filled with ``padding``."""
    most = max((h * w for h, w in grids), default=0) + extra
    values, coordinates = torch.full((len(grids), most, WIDTH), padding), torch.zeros(len(grids), most, 2, dtype=torch.long)
    for i, (h, w) in enumerate(grids):
        values[i, : h * w] = torch.randn(h * w, WIDTH, generator=torch.Generator().manual_seed(10 * h + w))
        coordinates[i, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
    return Latents(values, coordinates, torch.tensor([h * w for h, w in grids]))


@pytest.fixture(params=CONFIGS)
def connector(request):
    torch.manual_seed(0)
    built = CONFIGS[request.param].build(width=WIDTH, out_width=OUT)
    for parameter in built.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)  # as they are built, attention writes next to nothing
    return built


def test_every_registered_connector_is_tested():
    assert {REGISTRY.name_of(config.owner()) for config in CONFIGS.values()} == {("connector", n) for n in REGISTRY.names("connector")}


def test_what_comes_out(connector):
    out = connector(latents((4, 6), (3, 5), (1, 1)))
    expected = {"Projector": [24, 15, 1], "Resampler": [5, 5, 5]}[type(connector).__name__]
    if connector.config == CONFIGS["merged"]:
        expected = [6, 6, 1]
    assert out.lengths.tolist() == expected
    assert out.values.shape == (3, max(expected), OUT) and out.coordinates.shape == (3, max(expected), 2)
    assert not out.values[~out.mask].any()


@pytest.mark.parametrize("junk", [7.0, torch.nan, torch.inf])
def test_padding_changes_nothing(connector, junk):
    grids = (4, 6), (3, 5), (1, 1)
    padded = connector(latents(*grids, padding=junk, extra=3))
    for i, grid in enumerate(grids):
        torch.testing.assert_close(padded.item(i), connector(latents(grid)).item(0), atol=1e-6, rtol=1e-5)


def test_padding_gets_no_gradient_and_every_weight_gets_one(connector):
    given = latents((4, 6), (3, 5), padding=1.0)
    values = given.values.requires_grad_()
    connector(given).values.square().sum().backward()
    assert not values.grad[~given.mask].any()
    assert (values.grad[given.mask] != 0).any(-1).all()
    assert all(p.grad is not None and p.grad.any() for p in connector.parameters())


def test_order_does_not_matter_but_places_do():
    torch.manual_seed(0)
    resampler = CONFIGS["resampler"].build(width=WIDTH, out_width=OUT)
    for parameter in resampler.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    given, order = latents((3, 4)), torch.randperm(12)
    out = resampler(given).values
    both = replace(given, values=given.values[:, order], coordinates=given.coordinates[:, order])
    torch.testing.assert_close(resampler(both).values, out, atol=1e-5, rtol=1e-5)
    assert (resampler(replace(given, values=given.values[:, order])).values - out).abs().max() > 1e-2


def test_an_item_without_vectors_is_the_queries_alone():
    resampler = CONFIGS["resampler"].build(width=WIDTH, out_width=OUT)
    given = replace(latents((2, 2), (2, 2)), lengths=torch.tensor([4, 0]))
    out = resampler(given)
    assert out.lengths.tolist() == [5, 5] and out.values.isfinite().all()


def test_cells_are_merged_with_their_neighbours():
    given = latents((3, 4), (2, 2))
    merged = merge_cells(given, 2)
    assert merged.lengths.tolist() == [4, 1]
    assert merged.coordinates.tolist() == [[[0, 0], [0, 1], [1, 0], [1, 1]], [[0, 0]] + [[0, 0]] * 3]
    plane = given.values[0].view(3, 4, WIDTH)
    assert torch.equal(merged.values[0, 1], torch.cat([plane[0, 2], plane[0, 3], plane[1, 2], plane[1, 3]]))
    assert torch.equal(merged.values[0, 2], torch.cat([plane[2, 0], plane[2, 1], torch.zeros(2 * WIDTH)]))
    assert torch.equal(merged.values[1, 0], given.values[1, :4].flatten())


def test_merging_follows_places_not_order():
    given, order = latents((3, 4)), torch.randperm(12)
    turned = replace(given, values=given.values[:, order], coordinates=given.coordinates[:, order])
    assert torch.equal(merge_cells(turned, 2).values, merge_cells(given, 2).values)


def test_merging_is_pixel_shuffle():
    given = latents((4, 6))
    plane = given.values.view(1, 4, 6, WIDTH).permute(0, 3, 1, 2)
    expected = torch.nn.functional.pixel_unshuffle(plane, 2).flatten(2).transpose(1, 2)  # channel first, then place
    merged = merge_cells(given, 2).values.unflatten(2, (4, WIDTH)).transpose(2, 3).flatten(2)
    assert torch.equal(merged, expected)


def test_what_has_no_place_is_not_merged():
    given = latents((2, 2))
    with pytest.raises(ConnectorError, match="class token, registers"):
        merge_cells(replace(given, coordinates=given.coordinates - 1), 2)


def test_latents_of_another_width_are_refused(connector):
    given = latents((2, 2))
    with pytest.raises(ConnectorError, match="latents are 11 wide, this connector reads 12"):
        connector(replace(given, values=given.values[..., :11]))


@pytest.mark.parametrize("config", CONFIGS.values())
def test_configuration_comes_back_from_plain_values(config):
    assert build_config("connector", config.to_dict()) == config


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("projector", {"layers": 3}, "layers 3: 1 or 2"),
        ("projector", {"merge": 0}, "merge 0: at least 1"),
        ("resampler", {"depth": 0}, "depth 0: at least 1"),
    ],
)
def test_configuration_names_what_is_wrong(name, change, words):
    with pytest.raises(ConfigError, match=words):
        build_config("connector", {"type": name, **change})


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ConnectorError, match="a width of 18: a multiple of 4 and of num_heads 8"):
        Resampler.Config().build(width=WIDTH, out_width=18)
