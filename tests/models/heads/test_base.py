import pytest
import torch

from mmtp.models.heads.sequential import SequentialHead
from mmtp.registry import REGISTRY
from mmtp.testing import ConformanceError, check_head


@pytest.mark.parametrize("name", REGISTRY.names("head"))
def test_every_registered_head_keeps_the_contract(name: str) -> None:
    check_head(REGISTRY.resolve("head", name).Config())


class Peeking(SequentialHead):
    """A head that reads one token too far ahead."""

    class Config(SequentialHead.Config):
        pass

    def forward(self, hidden, embedded, positions, mask):
        return super().forward(hidden, embedded.roll(-1, 1), positions, mask)


def test_a_head_that_looks_ahead_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(REGISTRY, "_families", {k: dict(v) for k, v in REGISTRY._families.items()})
    REGISTRY.register("head", "peeking", f"{__name__}:Peeking")
    monkeypatch.setattr(Peeking.Config, "owner", classmethod(lambda cls: Peeking))
    with pytest.raises(ConformanceError, match="lies further ahead"):
        check_head(Peeking.Config(mtp_depth=1))


def test_a_head_whose_drafts_differ_from_training_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    draft = SequentialHead.draft

    def off(self, depth, state, embedded, positions, mask, caches):
        state, out = draft(self, depth, state, embedded, positions, mask, caches)
        return state, out + 0.01 * torch.ones_like(out)

    monkeypatch.setattr(SequentialHead, "draft", off)
    with pytest.raises(ConformanceError, match="offset 1: drafting differs from training"):
        check_head(SequentialHead.Config(mtp_depth=2))
