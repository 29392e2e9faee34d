import pytest
import torch

from mmtp.tokenizers.image.transformer import PatchEmbedding, PatchPixels, Transformer, TransformerConfig, plane

TINY = TransformerConfig(width=24, depth=2, num_heads=2, mlp_width=32)


def test_positions_are_in_reading_order():
    assert plane(2, 3, torch.device("cpu")).tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]]


def test_patches_are_in_reading_order_and_go_back_to_their_place():
    embedding, pixels = PatchEmbedding(2, 12), PatchPixels(TINY, 2)
    torch.nn.init.eye_(embedding.linear.weight)
    torch.nn.init.zeros_(embedding.linear.bias)
    pixels.head = torch.nn.Identity()
    picture = torch.rand(2, 3, 4, 6)
    vectors = embedding(picture)
    assert vectors.shape == (2, 6, 12)
    torch.testing.assert_close(vectors[0, 4].reshape(3, 2, 2), picture[0, :, 2:, 2:4])
    torch.testing.assert_close(pixels(vectors, 2), picture)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_axis_of_positions_counts(axis):
    transformer = Transformer(TINY)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter) if parameter.ndim > 1 else None
    x, positions = torch.randn(1, 4, 24), torch.zeros(4, 3, dtype=torch.long)
    moved = positions.clone()
    moved[2, axis] = 3
    assert (transformer(x, positions) - transformer(x, moved)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"depth": 0}, "depth 0: at least 1 is wanted"),
        ({"num_heads": 5}, "num_heads 5: width 24 must divide into heads of an even width of at least 6"),
        ({"num_heads": 8}, "num_heads 8: width 24"),
        ({"width": 26}, "num_heads 2: width 26"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        TransformerConfig(**{"width": 24, "depth": 2, "num_heads": 2, "mlp_width": 32} | change)
