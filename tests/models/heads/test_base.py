import pytest
import torch

from mmtp.models.heads.base import Places, hide_vectors, mask_vectors
from mmtp.models.heads.sequential import SequentialHead
from mmtp.models.loss import LossConfig
from mmtp.models.unified import UnifiedModel
from mmtp.registry import REGISTRY
from mmtp.testing import ConformanceError, check_head
from mmtp.testing.heads import BACKBONE, LAYOUT, check_vectors, example_batch


@pytest.mark.parametrize("name", REGISTRY.names("head"))
def test_every_registered_head_keeps_the_contract(name: str) -> None:
    check_head(REGISTRY.resolve("head", name).Config())


@pytest.mark.parametrize("continuous", ["embeddings", "masked"])
@pytest.mark.parametrize("name", ["sequential", "synchronized"])
def test_heads_draft_as_they_learnt_whatever_they_read_in_place_of_vectors(name: str, continuous: str) -> None:
    check_vectors(REGISTRY.resolve("head", name).Config(mtp_depth=2, continuous=continuous))


def test_what_heads_read_in_place_of_vectors() -> None:
    embedded, mask = torch.randn(1, 5, 4), torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    vectors, placeholder = torch.tensor([[False, True, True, False, False]]), torch.arange(4.0)
    kinds = torch.zeros(1, 5, dtype=torch.long)
    places = Places(kinds.unsqueeze(2).expand(-1, -1, 3), kinds, kinds, mask)
    assert hide_vectors("embeddings", embedded, places, vectors, placeholder) == (embedded, places)
    read, same = hide_vectors("placeholder", embedded, places, vectors, placeholder)
    assert torch.equal(read[0, 1], placeholder) and torch.equal(read[0, [0, 3, 4]], embedded[0, [0, 3, 4]]) and same is places
    read, masked = hide_vectors("masked", embedded, places, vectors, placeholder)
    assert torch.equal(read[0, 2], placeholder)
    assert masked.mask[0, 0].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]]
    window = mask_vectors(mask[:, :, 2:4], vectors, torch.tensor([2]))
    assert torch.equal(window, masked.mask[:, :, 2:4])


@pytest.mark.parametrize("name", sorted(set(REGISTRY.names("head")) - {"next"}))
def test_every_head_learns_all_offsets_of_one_batch(name: str) -> None:
    torch.manual_seed(0)
    config = REGISTRY.resolve("head", name).Config(mtp_depth=2)
    model = UnifiedModel.Config(layout=LAYOUT, backbone=BACKBONE, head=config).build()
    batch, optimizer = example_batch(3), torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    losses = []
    for _ in range(80):
        out = model.loss(batch, LossConfig(mtp_weight=1.0, detach=False))
        optimizer.zero_grad()
        out.total.backward()
        optimizer.step()
        losses.append({key: out.sums[key] / out.counts[key] for key in out.sums})
    assert {offset for _, offset in losses[0]} == {0, 1, 2}
    assert all(losses[-1][key] < 0.3 * losses[0][key] for key in losses[0]), losses[-1]


class Peeking(SequentialHead):
    """A head that reads one token too far ahead."""

    class Config(SequentialHead.Config):
        pass

    def forward(self, hidden, embedded, places, anchors=None):
        return super().forward(hidden, embedded.roll(-1, 1), places, anchors)


def test_a_head_that_looks_ahead_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REGISTRY, "_families", {k: dict(v) for k, v in REGISTRY._families.items()})
    REGISTRY.register("head", "peeking", f"{__name__}:Peeking")
    monkeypatch.setattr(Peeking.Config, "owner", classmethod(lambda cls: Peeking))
    with pytest.raises(ConformanceError, match="lies further ahead"):
        check_head(Peeking.Config(mtp_depth=1))


def test_a_head_whose_drafts_differ_from_training_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    draft = SequentialHead.draft

    def off(self, depth, state, embedded, places, caches):
        state, out = draft(self, depth, state, embedded, places, caches)
        return state, out + 0.01 * torch.ones_like(out)

    monkeypatch.setattr(SequentialHead, "draft", off)
    with pytest.raises(ConformanceError, match=r"offset \+1: drafting differs from training"):
        check_head(SequentialHead.Config(mtp_depth=2))
