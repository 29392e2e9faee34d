import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp.types import Batch, Codes, Latents, Modality, Segment, TokenizerSpec


def test_modalities_keep_their_numbers():
    # Shards store these; a new modality goes to the end.
    assert [(m.value, m.index) for m in Modality] == [("text", 0), ("image", 1), ("audio", 2), ("video", 3)]
    assert Modality("image") is Modality.IMAGE


def test_spec_counts_its_codebooks():
    assert TokenizerSpec(modality=Modality.AUDIO, codebook_sizes=(8, 8, 4)).num_codebooks == 3
    assert TokenizerSpec(modality=Modality.IMAGE, latent_dim=16).num_codebooks == 0


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4))
def test_stacking_keeps_every_item(grids):
    items = [torch.randint(0, 9, (1, 2, *grid)) for grid in grids]
    singles = [Codes(ids, torch.tensor([grid]), torch.tensor([[8 * n for n in grid]])) for ids, grid in zip(items, grids, strict=True)]
    stacked = Codes.stack(singles)
    assert len(stacked) == len(grids)
    for i, ids in enumerate(items):
        assert torch.equal(stacked.item(i), ids[0])
        assert stacked.sizes[i].tolist() == [8 * n for n in grids[i]]
    assert int(stacked.ids.sum()) == sum(int(ids.sum()) for ids in items)  # padding is 0


def test_stacking_drops_sizes_that_not_all_have():
    with_sizes = Codes(torch.zeros(1, 1, 2, dtype=torch.long), torch.tensor([[2]]), torch.tensor([[16]]))
    without = Codes(torch.zeros(1, 1, 3, dtype=torch.long), torch.tensor([[3]]))
    assert Codes.stack([with_sizes, without]).sizes is None


def test_segment_shape_is_its_grid():
    assert Segment(Modality.TEXT, torch.zeros(5, dtype=torch.long)).shape == (5,)
    assert Segment(Modality.IMAGE, torch.zeros(2, 3, 4, dtype=torch.long)).shape == (3, 4)
    assert Segment(Modality.IMAGE, features=torch.zeros(3, 4, 16)).shape == (3, 4)


def test_batch_moves_whole():
    tokens = torch.zeros(1, 3, dtype=torch.long)
    batch = Batch(tokens, torch.zeros(1, 3, 3, dtype=torch.long), tokens, tokens, tokens.bool(), meta={"epoch": 2})
    moved = batch.to("meta")
    assert moved.tokens.device.type == moved.positions.device.type == moved.loss_mask.device.type == "meta"
    assert moved.features is None
    assert moved.meta == {"epoch": 2}


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_latents_of_different_lengths_are_padded_with_zeros(lengths):
    values, coordinates = [torch.rand(n, 3) + 1 for n in lengths], [torch.randint(1, 9, (n, 2)) for n in lengths]
    latents = Latents.pad(values, coordinates, [(8, n) for n in lengths])
    assert len(latents) == len(lengths) and latents.lengths.tolist() == lengths
    assert latents.sizes.tolist() == [[8, n] for n in lengths]
    for i, vectors in enumerate(values):
        assert torch.equal(latents.item(i), vectors)
        assert torch.equal(latents.coordinates[i, : lengths[i]], coordinates[i])
    assert torch.equal(latents.mask, (latents.values != 0).any(-1))
