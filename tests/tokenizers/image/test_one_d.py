from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmtp import hub
from mmtp.cli import run
from mmtp.config import ConfigError, build_config
from mmtp.data.loader import ShardDataset
from mmtp.data.media import read_image, to_uint8
from mmtp.stream.grammar import StreamGrammar
from mmtp.testing import check_tokenizer
from mmtp.tokenizers.image.grid import ImageCodesError, ImageShapeError
from mmtp.types import Codes, Modality


def test_conforms(one_d, noise):
    check_tokenizer(one_d, noise((16, 24), (16, 24), (16, 24)))


def test_every_code_sees_the_whole_picture_and_every_pixel_all_codes(one_d):
    pixels = torch.rand(1, 3, 16, 24, requires_grad=True)
    one_d.encoder(pixels)[..., 3].square().sum().backward()
    assert (pixels.grad != 0).all()
    latents = torch.randn(1, 24, 1, 5, requires_grad=True)
    one_d.decoder(latents)[..., 9, 14].square().sum().backward()
    assert (latents.grad != 0).all()


def test_order_of_codes_counts(one_d, noise):
    codes = one_d.encode(noise((16, 24)))
    turned = Codes(codes.ids.flip(-1), codes.lengths, codes.sizes)
    assert not torch.equal(one_d.decode(codes)[0], one_d.decode(turned)[0])


def test_pictures_of_another_size_are_refused(one_d, noise):
    words = "16 pixels high and 25 wide given, this tokenizer takes pictures 16 pixels high and 24 wide only: resize or crop to that"
    with pytest.raises(ImageShapeError, match=f"^picture 1: {words}$"):
        one_d.encode(noise((16, 24), (16, 25)))
    for call in (lambda: one_d.grid((16, 25)), lambda: one_d.num_tokens((16, 25)), lambda: one_d(torch.rand(1, 3, 16, 25))):
        with pytest.raises(ImageShapeError, match=f"^{words}$"):
            call()


def test_codes_of_another_grid_are_refused(one_d):
    with pytest.raises(ImageCodesError, match=r"picture 0: a grid of \[1, 4\] codes given, \[1, 5\] is this tokenizer's"):
        one_d.decode(Codes(torch.zeros(1, 3, 1, 4, dtype=torch.long), torch.tensor([[1, 4]])))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": [256, 250]}, r"size \[256, 250\]: multiples of patch 16 are wanted"),
        ({"num_latents": 0}, "num_latents 0 must be at least 1"),
    ],
)
def test_configuration_names_what_is_wrong(change, words):
    with pytest.raises(ConfigError, match=words):
        build_config("tokenizer", {"type": "image-1d", **change})


def test_from_files_to_streams_and_back(one_d, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A folder of pictures through ``mmtp tokenize`` and ``mmtp decode``; one of another size is named in quarantine."""
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)).save(photos / f"{i}.png")
    Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(photos / "square.png")
    hub.save_pretrained(one_d, tmp_path / "img")
    assert run(["tokenize", str(photos), "--out", str(out), "--tokenizer", str(tmp_path / "img"), "--workers", "1"]) == 0
    assert "3 ok, 1 quarantined (not-encodable 1)" in capsys.readouterr().out.replace("_", "-")
    assert "takes pictures 16 pixels high and 24 wide only" in (out / "quarantine.jsonl").read_text()

    dataset = ShardDataset(out)
    grammar = StreamGrammar(dataset.layout)
    pictures = [read_image(photos / f"{i}.png") for i in range(3)]
    codes = one_d.encode(pictures)
    for i, row in enumerate(dataset):
        (span,) = grammar.spans(row.tokens)
        assert (span.modality, tuple(span.grid)) == (Modality.IMAGE, (1, 5))
        np.testing.assert_array_equal(grammar.codes(row.tokens, span), codes.item(i).numpy())

    assert run(["decode", str(out), "--out", str(tmp_path / "files"), "--tokenizer", str(tmp_path / "img")]) == 0
    for i, wanted in enumerate(one_d.decode(codes)):
        np.testing.assert_array_equal(to_uint8(read_image(tmp_path / f"files/{i}.png")), to_uint8(wanted))


def test_a_stream_that_does_not_know_the_size_gives_the_whole_picture(one_d):
    """Decoders without the size of a picture take grid * downsampling, which is rounded up: 5 * 5 pixels for a width of 24."""
    ids = torch.zeros(1, 3, 1, 5, dtype=torch.long)
    sizes = torch.tensor([[n * d for n, d in zip((1, 5), one_d.spec.downsampling, strict=True)]])
    for codes in (Codes(ids, torch.tensor([[1, 5]])), Codes(ids, torch.tensor([[1, 5]]), sizes)):
        assert one_d.decode(codes)[0].shape == (3, 16, 24)
