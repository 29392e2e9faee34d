import pytest
import timm
import torch
from timm.models import save_for_hf

from mmtp import from_pretrained, save_pretrained
from mmtp.config import ConfigError, build_config
from mmtp.testing import check_tokenizer
from mmtp.tokenizers.base import EncodeOnlyError
from mmtp.tokenizers.continuous.vit import TimmViT
from mmtp.tokenizers.image.grid import ImageShapeError, ImageValueError
from mmtp.tokenizers.pretrained.base import PretrainedError

TINY = {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 4}
MODELS = {
    "vit_tiny_patch16_224": {"img_size": 16, "reg_tokens": 1},
    "vit_base_patch16_siglip_224": {"img_size": 16},
    "eva02_tiny_patch14_224": {"img_size": 16},
    "deit_tiny_distilled_patch16_224": {"img_size": 16},
    "naflexvit_base_patch16_gap": {"pos_embed_grid_size": [4, 4]},
    "naflexvit_base_patch16_par_gap": {"pos_embed_grid_size": [4, 4], "class_token": True},
}
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def build(name: str, **fields):
    torch.manual_seed(0)
    return TimmViT.Config(model=name, options=TINY | MODELS[name], mean=MEAN, std=STD, **fields).build().eval()


def pictures(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.rand(3, h, w, generator=torch.Generator().manual_seed(100 * h + w)) for h, w in sizes]


def normalised(picture: torch.Tensor) -> torch.Tensor:
    return (picture[None] - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "naflexvit_base_patch16_par_gap"])
def test_conforms(name):
    check_tokenizer(build(name, prefix=True), pictures((17, 30), (1, 1), (16, 16), (24, 16)))


@pytest.mark.parametrize(
    ("name", "layer", "norm"),
    [("vit_tiny_patch16_224", -1, True), ("vit_tiny_patch16_224", 0, False), *((name, 1, True) for name in MODELS)],
)
@torch.no_grad()
def test_features_are_those_of_timm(name, layer, norm):
    built = build(name, layer=layer, norm=norm)
    torch.manual_seed(0)
    dynamic = {} if name.startswith("naflex") else {"dynamic_img_size": True}
    theirs = timm.create_model(name, num_classes=0, **dynamic, **TINY, **MODELS[name]).eval()
    theirs.load_state_dict(built.model.state_dict(), strict=False)
    (picture,) = pictures((12, 20))
    (expected,) = theirs.forward_intermediates(
        normalised(picture), indices=[layer % 3], norm=norm, output_fmt="NLC", intermediates_only=True
    )
    torch.testing.assert_close(built.encode([picture]).values, expected, atol=2e-6, rtol=1e-5)
    assert len(built.model.blocks) == layer % 3 + 1


def test_positions_and_prefix():
    given = pictures((9, 7), (4, 4))
    without, with_prefix = (build("vit_tiny_patch16_224", prefix=prefix).encode(given) for prefix in (False, True))
    assert without.lengths.tolist() == [6, 1]
    assert with_prefix.lengths.tolist() == [8, 3]
    assert without.coordinates[0].tolist() == [[r, c] for r in range(3) for c in range(2)]
    assert with_prefix.coordinates[1].tolist() == [[-1, -1], [-1, -1], [0, 0], *[[0, 0]] * 5]
    assert torch.equal(with_prefix.item(0)[2:], without.item(0))
    assert without.sizes.tolist() == [[9, 7], [4, 4]]


@pytest.mark.parametrize("name", MODELS)
def test_a_ragged_batch_in_training_is_each_picture_by_itself(name):
    """NaFlex models mask the padding of one pass; gradients are those of separate passes too."""
    built, given = build(name), pictures((16, 16), (5, 23), (16, 16), (1, 1))
    together = built(given)
    assert not together.values[~together.mask].any()
    together.values.square().sum().backward()
    gradients = {key: p.grad.clone() for key, p in built.named_parameters() if p.grad is not None}
    built.zero_grad()
    for i, picture in enumerate(given):
        alone = built([picture])
        torch.testing.assert_close(together.item(i), alone.item(0), atol=1e-6, rtol=1e-5)
        assert torch.equal(together.coordinates[i, : together.lengths[i]], alone.coordinates[0])
        alone.values.square().sum().backward()
    assert gradients
    for key, parameter in built.named_parameters():
        if key in gradients:
            torch.testing.assert_close(gradients[key], parameter.grad, atol=2e-5, rtol=1e-4)


def test_a_batch_is_a_list_of_pictures():
    built, given = build("vit_tiny_patch16_224"), torch.stack(pictures((8, 12), (8, 12)))
    assert torch.equal(built(given).values, built(list(given)).values)


def test_order_of_patches_counts():
    """Patches in another order are another picture, to the position embeddings."""
    built, (picture,) = build("naflexvit_base_patch16_gap"), pictures((8, 8))
    turned = picture.unflatten(1, (2, 4)).unflatten(3, (2, 4)).transpose(1, 3).flatten(3, 4).flatten(1, 2)
    first, second = (built.encode([p]).values[0].view(2, 2, -1) for p in (picture, turned))
    assert (first.transpose(0, 1) - second).abs().max() > 1e-4


@pytest.mark.parametrize("size", [(64, 64), (1, 10_000), (10_000, 1), (30, 200), (17, 16)])
def test_larger_pictures_are_scaled_to_the_budget(size):
    built = build("naflexvit_base_patch16_gap", max_patches=16)
    rows, columns = built.grid(size)
    assert 8 <= rows * columns <= 16
    if min(size) > 16:  # else a patch is the least there is
        assert 0.5 < (rows / columns) / (size[0] / size[1]) < 2
    assert built.encode(pictures(size)).lengths.tolist() == [rows * columns]


def test_what_fits_the_budget_is_not_scaled():
    (picture,) = pictures((15, 14))
    padded = torch.nn.functional.pad(picture[None], (0, 2, 0, 1), mode="replicate")[0]
    free, bounded = build("vit_tiny_patch16_224", max_patches=None), build("vit_tiny_patch16_224", max_patches=16)
    assert torch.equal(free.encode([picture]).values, bounded.encode([picture]).values)
    assert torch.equal(free.encode([picture]).values, free.encode([padded]).values)
    assert free.grid((400, 400)) == (100, 100)


def test_loads_what_timm_saved_and_keeps_it_without_timm(tmp_path):
    torch.manual_seed(1)
    options = TINY | {"img_size": 16, "reg_tokens": 2}
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=7, dynamic_img_size=True, **options).eval()
    theirs.pretrained_cfg |= {"mean": MEAN, "std": STD, "num_classes": 7}
    save_for_hf(theirs, tmp_path / "theirs", model_args=options, safe_serialization=True)
    built = TimmViT.from_pretrained_model(tmp_path / "theirs", layer=1)
    assert built.config.model == "vit_tiny_patch16_224" and built.config.options["reg_tokens"] == 2
    assert built.config.mean == MEAN and built.config.std == STD
    (picture,) = pictures((12, 8))
    with torch.no_grad():
        (expected,) = theirs.forward_intermediates(normalised(picture), indices=[1], norm=True, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(built.encode([picture]).values, expected, atol=2e-6, rtol=1e-5)
    loaded = from_pretrained(save_pretrained(built, tmp_path / "ours"))
    assert torch.equal(loaded.encode([picture]).values, built.encode([picture]).values)
    assert loaded.spec.fingerprint == built.spec.fingerprint
    file = tmp_path / "theirs" / "model.safetensors"
    with pytest.raises(PretrainedError, match=r"cannot be loaded by timm"):  # seven classes, where timm's own have a thousand
        TimmViT.from_pretrained_model("vit_tiny_patch16_224", weights=file, options=options)


def test_loads_a_file_of_weights(tmp_path):
    torch.manual_seed(1)
    theirs = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, img_size=16, **TINY).eval()
    torch.save(theirs.state_dict(), tmp_path / "vit.pt")
    built = TimmViT.from_pretrained_model("vit_tiny_patch16_224", weights=tmp_path / "vit.pt", options=TINY | {"img_size": 16})
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in built.model.state_dict().items())
    state = theirs.state_dict()
    del state["blocks.0.norm1.weight"]
    torch.save(state, tmp_path / "short.pt")
    with pytest.raises(PretrainedError, match="short.pt: cannot be loaded by timm"):
        TimmViT.from_pretrained_model("vit_tiny_patch16_224", weights=tmp_path / "short.pt", options=TINY | {"img_size": 16})


@pytest.mark.parametrize(
    ("picture", "error", "words"),
    [
        (torch.zeros(3, 0, 4), ImageShapeError, "picture 1: "),
        (torch.zeros(1, 4, 4), ImageShapeError, "picture 1: "),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), ImageShapeError, "picture 1: torch.uint8"),
        (torch.full((3, 4, 4), torch.nan), ImageValueError, "picture 1: channel 0 of row 0, column 0 is nan"),
    ],
)
def test_bad_pictures_are_refused_by_number(picture, error, words):
    with pytest.raises(error, match=words):
        build("vit_tiny_patch16_224").encode([torch.zeros(3, 4, 4), picture])


def test_no_pictures_no_latents():
    latents = build("vit_tiny_patch16_224").encode([])
    assert (len(latents), tuple(latents.values.shape), tuple(latents.coordinates.shape)) == (0, (0, 0, 24), (0, 0, 2))


def test_there_is_no_way_back():
    built = build("vit_tiny_patch16_224")
    with pytest.raises(EncodeOnlyError, match="TimmViT has no decoder"):
        built.decode(built.encode(pictures((4, 4))))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "vit_tiny_patch16_244"}, "did you mean 'vit_tiny_patch16_224'"),
        ({"model": "resnet18"}, "model 'resnet18': does not take these options"),
        (
            {"model": "swin_tiny_patch4_window7_224", "options": {"embed_dim": 8, "depths": [1], "num_heads": [1]}},
            "is a SwinTransformer; a vision transformer is wanted",
        ),
        ({"options": TINY | {"nonsense": 1}}, "nonsense"),
        ({"options": {"num_classes": 3}}, "options.num_classes: is set by TimmViT itself"),
        ({"options": TINY, "layer": 3}, "layer 3: vit_tiny_patch16_224 has 3 layers, -3 to 2"),
        ({"max_patches": 0}, "max_patches 0: at least 1"),
        ({"std": [1, 0, 1]}, "std .*numbers above 0"),
    ],
)
def test_configuration_names_what_is_wrong(change, words):
    with pytest.raises(ConfigError, match=words):
        build_config("tokenizer", {"type": "timm-vit", "model": "vit_tiny_patch16_224", **change}).build()
