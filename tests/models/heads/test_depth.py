import pytest
import torch

from mmtp.decode.drafts import HeadDrafts
from mmtp.decode.engine import Engine
from mmtp.decode.sample import Sampling
from mmtp.models.heads.base import Places
from mmtp.models.heads.depth import DepthHead
from mmtp.models.loss import LossConfig
from mmtp.models.unified import UnifiedModel
from mmtp.nn.attention import document_mask
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.packing import collate
from mmtp.stream.template import Turn, encode_document
from mmtp.stream.vocab import MediaEntry, Special, TextEntry, VocabLayout
from mmtp.testing.heads import BACKBONE, check_head
from mmtp.types import Modality, Segment

LAYOUT = VocabLayout(TextEntry("words", 4), (MediaEntry(Modality.AUDIO, "sounds", codebook_sizes=(12, 12, 12)),), 4)
GRAMMAR = StreamGrammar(LAYOUT)
RULE = torch.arange(12).roll(5)
SMALL = DepthHead.Config(mtp_depth=2, width=48, num_layers=1)


def sound(generator: torch.Generator, frames: int = 8) -> Segment:
    """Frames of three codebooks: the first is random, the others follow from the one before."""
    first = torch.randint(0, 12, (frames,), generator=generator)
    return Segment(Modality.AUDIO, torch.stack((first, RULE[first], RULE[RULE[first]])))


@pytest.fixture(scope="module")
def trained() -> UnifiedModel:
    torch.manual_seed(0)
    model = UnifiedModel.Config(layout=LAYOUT, backbone=BACKBONE, head=SMALL).build()
    generator, optimizer = torch.Generator().manual_seed(0), torch.optim.AdamW(model.parameters(), lr=8e-3, weight_decay=0)
    for _ in range(50):
        documents = [encode_document(LAYOUT, (Turn("assistant", (sound(generator),)),)) for _ in range(6)]
        batch = collate([(d.tokens, d.target_mask) for d in documents], GRAMMAR, 64)
        optimizer.zero_grad()
        model.loss(batch, LossConfig(mtp_weight=1.0)).total.backward()
        optimizer.step()
    return model.eval()


def test_codebooks_of_a_new_frame_follow_from_those_before_it(trained: UnifiedModel) -> None:
    document = encode_document(LAYOUT, (Turn("assistant", (sound(torch.Generator().manual_seed(9)),)),))
    batch = collate([(document.tokens, document.target_mask)], GRAMMAR, len(document.tokens))
    info = GRAMMAR.analyse(document.tokens)
    first = torch.from_numpy(info.codebook == 0).nonzero()[:, 0]
    states = trained(batch)
    for offset in (1, 2):  # at the anchor before a frame, offset k reads its codebooks 0 to k-1 and predicts codebook k
        low, high = LAYOUT.code_range(Modality.AUDIO, offset)
        logits = states[offset][0, first - 1] @ trained.unembedding.weight[low:high].T
        assert (logits.argmax(1) + low).tolist() == batch.tokens[0, first + offset].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_frames_are_drafted_and_the_stream_is_that_of_plain_decoding(trained: UnifiedModel, temperature: float) -> None:
    engine, prefix = Engine(trained, exact=True, draft_cost=0, drafts=HeadDrafts()), [Special.BOS, Special.ASSISTANT, Special.BOA]
    plain, fast = (engine.generate(prefix, Sampling(seed=3, temperature=temperature), 60, speculative) for speculative in (False, True))
    assert fast.tokens == plain.tokens
    assert fast.stats.passes < 0.7 * plain.stats.passes


def test_an_anchor_reads_its_own_state_and_the_tokens_after_it_alone() -> None:
    head = DepthHead(SMALL, BACKBONE, (Modality.TEXT,)).eval()
    hidden, embedded = torch.randn(2, 1, 9, BACKBONE.width)
    flat = torch.zeros(1, 9, dtype=torch.long)
    places = Places(torch.zeros(1, 9, 3, dtype=torch.long), flat, flat, document_mask(flat))
    before = head(hidden, embedded, places)
    for moved, reached in ((hidden, [{4}, {4}]), (embedded, [{3}, {2, 3}])):
        moved[:, 4] += 1
        after = head(hidden, embedded, places)
        found = [set((a != b).any(-1)[0].nonzero()[:, 0].tolist()) for a, b in zip(before, after, strict=True)]
        assert found == reached
        before = after


def test_drafting_costs_one_anchor_a_pass_however_long_the_prompt(trained: UnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    anchors, draft = [], DepthHead.draft

    def counted(self, depth, state, *rest):
        anchors.append(state.shape[1])
        return draft(self, depth, state, *rest)

    monkeypatch.setattr(DepthHead, "draft", counted)
    prefix = [Special.BOS, Special.USER, *[LAYOUT.text_range[0]] * 30, Special.END, Special.ASSISTANT, Special.BOA]
    Engine(trained, draft_cost=0, drafts=HeadDrafts()).generate(prefix, Sampling(seed=1), 30)
    assert len(anchors) > 4 and set(anchors) == {1}


def test_other_sizes_keep_the_contract_too() -> None:
    check_head(DepthHead.Config(mtp_depth=3, width=24, num_heads=2, num_layers=1))


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="width 250 of head 'depth' is no even multiple of its num_heads, 4"):
        DepthHead.Config(width=250)
