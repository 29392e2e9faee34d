import pytest
import torch

from mmtp.models.heads.sequential import SequentialHead
from mmtp.models.loss import LossConfig
from mmtp.models.unified import UnifiedModel
from mmtp.registry import REGISTRY
from mmtp.testing import ConformanceError, check_head
from mmtp.testing.heads import BACKBONE, LAYOUT, example_batch


@pytest.mark.parametrize("name", REGISTRY.names("head"))
def test_every_registered_head_keeps_the_contract(name: str) -> None:
    check_head(REGISTRY.resolve("head", name).Config())


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
