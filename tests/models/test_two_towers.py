import pytest
import torch

from mmtp.config import ConfigError
from mmtp.hub import HubError, from_pretrained, save_pretrained
from mmtp.models.two_towers import TwoTowers

VALUES = {"text": "text-bpe-4k", "picture_width": 12, "width": 32, "depth": 2, "dim": 8, "length": 6}


@pytest.fixture(scope="module")
def towers():
    torch.manual_seed(0)
    return TwoTowers.Config(**VALUES).build().eval()


@torch.no_grad()
def test_padding_does_not_change_a_text(towers):
    texts = ["a dog", "", "a red circle on a green ground, seen from far away and from above"]
    together = towers.embed_texts(texts)
    alone = torch.cat([towers.embed_texts([text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    assert (together @ together.T).fill_diagonal_(0).max() < 0.999


@torch.no_grad()
def test_what_lies_beyond_the_length_is_cut_off_and_order_counts(towers):
    a, b, c = towers.embed_texts(["1 2 3 4 5 6 7 8", "1 2 3 4 5 6 9 9", "3 2 1 4 5 6 7 8"])
    torch.testing.assert_close(a, b)
    assert not torch.allclose(a, c, atol=1e-4)


@torch.no_grad()
def test_it_is_saved_and_loaded(towers, tmp_path):
    again = from_pretrained(save_pretrained(towers, tmp_path / "towers"))
    values = torch.randn(3, 5, 12)
    assert torch.equal(again.embed_features(values), towers.embed_features(values))
    assert torch.equal(again.embed_texts(["a dog"]), towers.embed_texts(["a dog"]))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"width": 40}, ConfigError, "width 40: a multiple of 32"),
        ({"depth": 0}, ConfigError, "at least 1 is wanted"),
        ({"text": "text-bpe-4x"}, HubError, "did you mean 'text-bpe-4k'"),
    ],
)
def test_towers_that_cannot_be(values, error, message):
    with pytest.raises(error, match=message):
        TwoTowers.Config.from_dict(VALUES | values).build()
