from pathlib import Path

import pytest
import torch

from mmtp.eval.probes import Labelled, ProbeError, linear_probe, nearest, probe, probe_table, readout_cosine, retrieval
from mmtp.hub import from_pretrained
from mmtp.models.teachers import Teacher, TeacherConfig
from mmtp.models.two_towers import TwoTowers
from mmtp.tokenizers.continuous.vit import TimmViT


def clusters(count, seed):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centres = torch.tensor([[4.0, 0, 0, 1], [0, 4.0, 0, 1], [0, 0, 4.0, 1]])
    return centres[labels] + torch.randn(count, 4, generator=draw), labels


@pytest.mark.parametrize("reader", [nearest, linear_probe])
def test_labels_are_read_from_features(reader):
    (bank, labels), (queries, wanted) = clusters(90, 0), clusters(60, 1)
    assert (reader(bank, labels, queries) == wanted).float().mean() > 0.9
    shuffled = labels[torch.randperm(90, generator=torch.Generator().manual_seed(0))]
    assert (reader(bank, shuffled, queries) == wanted).float().mean() < 0.6


def test_the_nearest_neighbour_alone_is_the_nearest():
    bank, labels = torch.eye(3), torch.tensor([2, 0, 1])
    assert nearest(bank, labels, torch.tensor([[0.1, 5.0, 0.0], [0.0, 0.2, 0.3]]), 1).tolist() == [0, 1]


def test_what_is_linear_is_read_and_noise_is_not():
    draw = torch.Generator().manual_seed(0)
    x, other = (torch.randn(40, 5, 8, generator=draw) for _ in range(2))
    y = x @ torch.randn(8, 3, generator=draw) + 2
    assert readout_cosine(x[:30], y[:30], x[30:], y[30:]) > 0.999
    assert abs(readout_cosine(other[:30], y[:30], other[30:], y[30:])) < 0.4


def labelled(count, seed):
    """Colours as labels, with noise."""
    draw = torch.Generator().manual_seed(seed)
    names = ("red", "green", "blue")
    pictures = 0.3 * torch.rand(count, 3, 16, 16, generator=draw)
    for i in range(count):
        pictures[i, i % 3] += 0.6
    return Labelled.of((picture, names[i % 3], f"a {names[i % 3]} one" if i % 2 else "") for i, picture in enumerate(pictures))


def test_a_tokenizer_stands_beside_its_untrained_self_and_its_teachers():
    torch.manual_seed(3)
    options = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 8, "img_size": 16, "reg_tokens": 1}
    tokenizer = TimmViT.Config(model="vit_tiny_patch16_224", options=options, prefix=True).build().eval()
    teacher = Teacher(TeacherConfig(network="tokenizer:image-fsq-f8"), Path(), torch.device("cpu"))
    state = torch.get_rng_state()
    found = probe(tokenizer, "mine", labelled(30, 0), labelled(12, 1), [teacher])
    assert torch.equal(torch.get_rng_state(), state)
    assert [(p.name, p.width) for p in found] == [("mine", 24), ("the same, untrained", 24), ("teacher image-fsq-f8", 128)]
    assert all(p.neighbours == p.linear == 1 for p in found)
    assert all(0 < p.cosines["image-fsq-f8"] < 1 for p in found[:2])
    assert found[0].cosines != found[1].cosines
    assert probe_table(found, "x").rows[2][-1] is None


def test_pictures_and_captions_find_each_other():
    torch.manual_seed(0)
    options = {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 8, "img_size": 16}
    tokenizer = TimmViT.Config(model="vit_tiny_patch16_224", options=options).build().eval()
    towers = TwoTowers.Config(text="text-bpe-4k", picture_width=24, width=32, depth=1, dim=8).build().eval()
    found = retrieval(tokenizer, towers, labelled(12, 0))
    assert (found["pictures"], found["captions"]) == (6, 3)
    assert found["picture_to_text@5"] == found["text_to_picture@10"] == 1  # there are but 3 captions and 6 pictures

    class Knowing(TwoTowers):  # pictures and captions by their colour
        def embed_features(self, values):
            return values.mean(1)

        def embed_texts(self, texts):
            return torch.stack([means[text] for text in texts])

    held_out = labelled(12, 0)
    vectors = tokenizer.encode(list(held_out.pictures)).values.mean(1)
    vectors = vectors - vectors.mean(0)
    means = {c: vectors[[i for i, d in enumerate(held_out.captions) if d == c]].mean(0) for c in set(held_out.captions) - {""}}
    perfect = retrieval(tokenizer, Knowing(towers.config), held_out)
    assert perfect["picture_to_text@1"] == perfect["text_to_picture@1"] == 1
    with pytest.raises(ProbeError, match="no held-out picture has a caption"):
        retrieval(tokenizer, towers, Labelled(held_out.pictures, held_out.labels, ("",) * 12))


def test_what_cannot_be_probed_is_named():
    with pytest.raises(ProbeError, match="this one is none"):
        probe(from_pretrained("image-fsq-f8"), "x", labelled(6, 0), labelled(3, 1))
    other = Labelled(labelled(3, 1).pictures, ("a", "b", "c"), ("", "", ""))
    with pytest.raises(ProbeError, match="no label of the held-out"):
        probe(from_pretrained("image-fsq-f8"), "x", labelled(6, 0), other)
    with pytest.raises(ProbeError, match="no picture has the label"):
        Labelled.of([])
