import dataclasses

import pytest
import torch

from mmtp.models.heads.base import Places
from mmtp.models.heads.synchronized import SynchronizedHead
from mmtp.models.unified import UnifiedModel
from mmtp.nn.attention import document_mask
from mmtp.testing.heads import BACKBONE, LAYOUT, check_head
from mmtp.types import Modality

TEXT, IMAGE = Modality.TEXT.index, Modality.IMAGE.index
WORDS = slice(0, 4)
PICTURE = slice(4, 10)


def head_of(**values) -> SynchronizedHead:
    torch.manual_seed(0)
    config = SynchronizedHead.Config(mtp_depth=2, **values)
    return SynchronizedHead(config, BACKBONE, (Modality.TEXT, Modality.IMAGE)).eval()


def stream(length: int = 10) -> tuple[torch.Tensor, torch.Tensor, Places]:
    """Four words, and a picture after them."""
    torch.manual_seed(1)
    hidden, embedded = torch.randn(2, 1, length, BACKBONE.width)
    modality = torch.full((1, length), IMAGE)
    modality[:, WORDS] = TEXT
    positions = torch.arange(length)[None, :, None].expand(1, -1, 3)
    places = Places(positions, modality.roll(-1, 1), modality, document_mask(torch.zeros(1, length, dtype=torch.long)))
    return hidden, embedded, places


def gradient_of_words(head: SynchronizedHead) -> torch.Tensor:
    """What reaches the hidden states of the words from the drafts of the last codes, whose state passes through no word."""
    hidden, embedded, places = stream()
    hidden.requires_grad_()
    head(hidden, embedded, places)[1][:, 6].sum().backward()
    assert hidden.grad is not None
    return hidden.grad[:, WORDS].abs().amax()


def test_words_reach_the_drafts_of_codes_through_the_gate_alone():
    head = head_of()
    assert gradient_of_words(head) == 0
    assert head.gates is not None
    with torch.no_grad():
        head.gates.fill_(0.5)
    assert gradient_of_words(head) > 0
    assert gradient_of_words(head_of(exchange="none")) == 0
    assert gradient_of_words(head_of(exchange="common")) > 0


def test_a_closed_gate_learns():
    head = head_of()
    hidden, embedded, places = stream()
    sum(out[:, :7].square().sum() for out in head(hidden, embedded, places)).backward()
    assert head.gates is not None and head.gates.grad is not None
    assert head.gates.grad[1, 0].abs() > 0  # codes that read words
    assert head.gates.grad.diagonal().abs().sum() == 0  # one's own bank has no gate


def test_an_empty_bank_gives_nothing():
    head = head_of()
    with torch.no_grad():
        head.gates.fill_(0.5)
    hidden, embedded, places = stream()
    words = dataclasses.replace(places, modality=torch.full_like(places.modality, TEXT), banks=torch.full_like(places.banks, TEXT))
    open_, closed = head(hidden, embedded, words), head_of(exchange="none")(hidden, embedded, words)
    for a, b in zip(open_, closed, strict=True):
        torch.testing.assert_close(a, b)
    nowhere = dataclasses.replace(places, banks=torch.full_like(places.banks, TEXT))
    assert all(out.isfinite().all() for out in head(hidden, embedded, nowhere))


@pytest.mark.parametrize("exchange", ["none", "common"])
def test_what_is_compared_with_keeps_the_contract_too(exchange):
    check_head(SynchronizedHead.Config(mtp_depth=2, exchange=exchange))


def test_a_head_that_predicts_rows_keeps_the_contract_too():
    check_head(SynchronizedHead.Config(mtp_depth=2, vertical=3))


def test_less_than_no_rows_are_refused():
    with pytest.raises(ValueError, match="vertical -1 is below 0"):
        SynchronizedHead.Config(vertical=-1)


def test_open_gates_keep_the_contract(monkeypatch):
    real = SynchronizedHead.__init__

    def opened(self, *values, **named):
        real(self, *values, **named)
        torch.nn.init.constant_(self.gates, 0.7)

    monkeypatch.setattr(SynchronizedHead, "__init__", opened)
    check_head(SynchronizedHead.Config(mtp_depth=3))


def test_the_model_has_a_bank_for_every_modality_of_its_vocabulary():
    model = UnifiedModel.Config(layout=LAYOUT, backbone=BACKBONE, head=SynchronizedHead.Config()).build()
    assert model.head.modality.num_embeddings == len(LAYOUT.modalities) == 2
    assert model.head.gates.shape == (2, 2)
