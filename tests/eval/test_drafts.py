import pytest
import torch

from mmtp.decode.drafts import HeadDrafts
from mmtp.decode.engine import Engine
from mmtp.decode.rows import Row
from mmtp.decode.sample import Sampling
from mmtp.eval.decoding import Prompt
from mmtp.eval.drafts import SpoiledHead, draft, propagation, uninformed
from mmtp.models.heads.base import HeadConfig, Places
from mmtp.models.heads.depth import DepthHead
from mmtp.models.heads.parallel import ParallelHead
from mmtp.models.heads.sequential import SequentialHead
from mmtp.models.heads.shared import SharedHead
from mmtp.models.heads.synchronized import SynchronizedHead
from mmtp.models.unified import UnifiedModel
from mmtp.stream.vocab import Special
from mmtp.types import Modality
from tests.models.common import BACKBONE, LAYOUT

HEADS = [
    ParallelHead.Config(mtp_depth=2),
    SequentialHead.Config(mtp_depth=2),
    SharedHead.Config(mtp_depth=2),
    DepthHead.Config(mtp_depth=2),
    SynchronizedHead.Config(mtp_depth=2, vertical=3),
]
ASKED = [Special.BOS, Special.USER, 40, 41, Special.END, Special.ASSISTANT]
# From text into text, and through a picture and out of it.
PROMPTS = [Prompt("text", ASKED, 10), Prompt("image", [*ASKED, 50, Special.BOI, LAYOUT.dim(3), LAYOUT.dim(4)], 18)]


def engine(head: HeadConfig) -> Engine:
    torch.manual_seed(0)
    model = UnifiedModel.Config(layout=LAYOUT, backbone=BACKBONE, head=head).build().eval()
    torch.nn.init.normal_(model.embedding.table.weight, std=0.3)
    return Engine(model, exact=True, draft_cost=0, drafts=HeadDrafts())


@pytest.mark.parametrize(("head", "temperature"), [*((head, 1.0) for head in HEADS), (HEADS[-1], 0.0)])
def test_spoiled_drafts_of_a_medium_move_no_token(head: HeadConfig, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    drafted, take = list[int](), Row.take_draft
    monkeypatch.setattr(Row, "take_draft", lambda row, draft, *given: (drafted.append(draft.token), take(row, draft, *given))[1])
    tried, sampling = engine(head), Sampling(temperature=temperature, seed=3)
    plain = [
        tried.generate(p.tokens, Sampling(temperature=temperature, seed=3 + i), p.max_new_tokens, False) for i, p in enumerate(PROMPTS)
    ]
    before = draft(tried, PROMPTS, sampling)
    assert before.tokens == [run.new_tokens for run in plain]
    own = drafted.copy()
    drafted.clear()
    found = propagation(tried, PROMPTS, sampling, [Modality.TEXT, Modality.IMAGE], before)
    assert [f.modality for f in found] == [Modality.TEXT, Modality.IMAGE]
    assert all(f.equal for f in found)
    assert own and drafted != own * 2  # they were others
    assert not isinstance(tried.model.head, SpoiledHead)


def test_what_is_spoiled_is_one_medium() -> None:
    out, kinds = torch.ones(1, 3, 8), torch.tensor([[Modality.TEXT.index, Modality.IMAGE.index, Modality.TEXT.index]])
    places = Places(torch.zeros(1, 3, 3, dtype=torch.long), kinds, kinds, torch.ones(1, 1, 3, 3, dtype=torch.bool))
    head = engine(SequentialHead.Config(mtp_depth=1)).model.head
    for modality, kept in ((Modality.TEXT, [False, True, False]), (Modality.IMAGE, [True, False, True]), (None, [False] * 3)):
        for random in (True, False):
            assert (SpoiledHead(head, modality, random)._spoil(out, places) == 1).all(2)[0].tolist() == kept


def test_a_moved_token_shows() -> None:
    class Lossy(Engine):
        """Takes what was drafted for truth, as a lossy scheme does now and then."""

        def generate(self, prefix, sampling=None, max_new_tokens=512, speculative=True, stop=(), vectors=None, constraint=None):
            run = super().generate(prefix, sampling, max_new_tokens, speculative, stop, vectors, constraint)
            if isinstance(self.model.head, SpoiledHead) and self.model.head.modality is Modality.IMAGE:
                run.tokens[-1] += 1
            return run

    tried = Lossy(engine(SequentialHead.Config(mtp_depth=1)).model)
    found = propagation(tried, PROMPTS[:1], Sampling(), [Modality.TEXT, Modality.IMAGE])
    assert [f.equal for f in found] == [True, False]


def test_drafts_that_know_nothing_stand_by_chance() -> None:
    """Uniform drafts drawn with the target's noise stand more often than one in 40, and less often than good ones."""
    tried = engine(SequentialHead.Config(mtp_depth=1))
    found = uninformed(tried, PROMPTS[1:] * 2, Sampling(temperature=1.0))
    share = found.share("image")
    assert share is not None and 0 < share < 0.6
    assert found.share("audio") is None
