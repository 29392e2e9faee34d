import pytest
import timm
import torch
from safetensors.torch import save_file

from mmtp.config import ConfigError, build_config
from mmtp.hub import save_pretrained
from mmtp.models.teachers import Teacher, TeacherConfig

CPU = torch.device("cpu")
CONV = {
    "type": "image-conv",
    "patch": 4,
    "widths": [8],
    "encoder_blocks": [1],
    "decoder_blocks": [1],
    "quantizer": {"type": "fsq", "levels": [5, 5]},
}
VIT = {"type": "timm-vit", "model": "vit_tiny_patch16_224"}
OPTIONS = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 4, "img_size": 16, "reg_tokens": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("teachers")
    save_pretrained(build_config("tokenizer", CONV).build(), root / "conv")
    save_pretrained(build_config("tokenizer", VIT | {"options": OPTIONS, "prefix": True}).build(), root / "vit")
    for name in ("test_resnet", "test_vit"):
        save_file(timm.create_model(name, pretrained=False).state_dict(), root / f"{name}.safetensors")
    return root


@pytest.mark.parametrize(
    ("values", "shape"),
    [
        ({"network": "timm:test_resnet", "weights": "test_resnet.safetensors", "stage": 2}, (2, 48, 2, 2)),
        ({"network": "timm:test_resnet", "weights": "test_resnet.safetensors", "stage": -3, "size": 32}, (2, 48, 4, 4)),
        ({"network": "timm:test_vit", "weights": "test_vit.safetensors", "size": 160}, (2, 64, 10, 10)),
        ({"network": "tokenizer:conv"}, (2, 8, 4, 4)),
        ({"network": "tokenizer:vit"}, (2, 24, 4, 4)),
    ],
)
def test_every_kind_gives_a_map_and_is_brought_to_the_grid(root, values, shape):
    teacher = Teacher(TeacherConfig(**values), root, CPU)
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    found = teacher.map(pictures)
    assert found.shape == shape and not found.requires_grad
    same = teacher.features(pictures, shape[2:])
    torch.testing.assert_close(same, found.flatten(2).transpose(1, 2))
    assert teacher.features(pictures, (3, 5)).shape == (2, 15, shape[1])
    halves = teacher.features(torch.cat([pictures[:1], pictures[:1].flip(3)]), shape[2:])
    assert not torch.allclose(halves[0], halves[1])


def test_a_tokenizer_of_patches_gives_them_in_place(root):
    teacher = Teacher(TeacherConfig(network="tokenizer:vit"), root, CPU)
    picture = torch.rand(1, 3, 16, 16)
    latents = teacher._model.encode(list(picture))
    grid = {tuple(c): v for c, v in zip(latents.coordinates[0].tolist(), latents.values[0], strict=True) if c[0] >= 0}
    found = teacher.map(picture * 2 - 1)[0]
    for (row, column), value in grid.items():
        torch.testing.assert_close(found[:, row, column], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"network": "timm:test_resnet", "weights": "test_resnet.safetensors", "stage": 9}, "stage 9: timm:test_resnet has stages 0 to 4"),
        ({"network": "timm:test_resnet", "weights": "gone.safetensors"}, "cannot be loaded"),
        ({"network": "tokenizer:text-bpe-4k"}, "gives no map of features"),
        ({"network": "tokenizer:nothing"}, "nothing: no such path or zoo entry"),
    ],
)
def test_teachers_that_cannot_teach(root, values, message):
    with pytest.raises(ValueError, match=message) as error:
        Teacher(TeacherConfig(**values), root, CPU).map(torch.zeros(1, 3, 16, 16))
    assert "\n" not in str(error.value)
    assert isinstance(error.value, ConfigError) or "nothing" in message
