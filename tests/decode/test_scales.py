"""Pictures that are written scale by scale: one pass per scale, and the choices that the training path gives."""

from dataclasses import replace

import pytest
import torch

from mmtp.decode.by_medium import DraftsByMedium
from mmtp.decode.drafts import Drafts, HeadDrafts
from mmtp.decode.engine import Engine
from mmtp.decode.sample import Noise, Sampling, choose
from mmtp.decode.stats import Generation
from mmtp.models.unified import UnifiedModel
from mmtp.stream.vocab import Special
from mmtp.types import Batch, Modality
from tests.models.common import BACKBONE
from tests.models.test_next_scale import CELLS, ENDS, FIRST, GRAMMAR, LAYOUT, SCALES, writer

OPEN = [Special.BOI, LAYOUT.dim(1), LAYOUT.dim(CELLS)]
PROMPT = [Special.BOS, Special.USER, 35, 36, Special.END, Special.ASSISTANT, *OPEN]
CODES = slice(len(PROMPT), len(PROMPT) + CELLS)


def as_trained(tokens: list[int]) -> Batch:
    """A stream as training reads it, all of it a target."""
    info = GRAMMAR.analyse(torch.tensor(tokens))
    return Batch(
        tokens=torch.tensor([tokens]),
        positions=torch.from_numpy(info.positions)[None],
        document_ids=torch.zeros(1, len(tokens), dtype=torch.long),
        slots=torch.from_numpy(info.slots)[None],
        loss_mask=torch.ones(1, len(tokens), dtype=torch.bool),
    )


def wanted(net: UnifiedModel, tokens: list[int], sampling: Sampling) -> torch.Tensor:
    """Logits of all codes where those of the scales before each are as they are, in a forward pass over the stream and one to guide."""
    low, high = LAYOUT.code_range(Modality.IMAGE)
    streams = (tokens[: CODES.stop], [Special.BOS, *OPEN, *tokens[CODES]])
    with torch.no_grad():
        conditional, alone = (net(as_trained(s))[0][0, -CELLS - 1 : -1] @ net.unembedding.weight[low:high].T for s in streams)
    weights = torch.tensor([sampling.weight(i / (CELLS - 1)) for i in range(CELLS)])[:, None]
    return torch.lerp(alone, conditional, weights)


def listened(
    engine: Engine, prefix: list[int], sampling: Sampling, limit: int, speculative: bool = True
) -> tuple[Generation, torch.Tensor]:
    """What an engine writes, and the logits from which it chose codes."""
    seen, scores = [], engine.chooser.scores

    def listen(*arguments):
        for row, slot, own, logits in scores(*arguments):
            seen.extend(logits.clone().unbind() if slot == LAYOUT.slot_index["image.codes.0"] else [])
            yield row, slot, own, logits

    engine.chooser.scores = listen
    return engine.generate(prefix, sampling, limit, speculative), torch.stack(seen)


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(seed=3),
        Sampling(temperature=0.0),
        Sampling(seed=1, temperature=0.7, top_k=5, guidance=3.0, guidance_end=1.5),
        Sampling(seed=2, verification="rejection"),
    ],
    ids=["sampled", "greedy", "guided", "rejection"],
)
def test_every_code_is_what_the_training_path_gives_at_its_place(sampling: Sampling, exact: bool, speculative: bool) -> None:
    """The same logits from passes over a cache as from one over the stream, and of them the choice that each place makes by itself."""
    net = writer(depth=2).eval()
    got, seen = listened(Engine(net, exact=exact), PROMPT, sampling, CELLS + 3, speculative)
    logits = wanted(net, got.tokens, sampling)
    torch.testing.assert_close(seen, logits, atol=1e-5, rtol=1e-5)
    chosen = [each.token for each in choose(logits, sampling, Noise(sampling.seed), range(CODES.start, CODES.stop))]
    assert got.tokens[CODES] == [FIRST + local for local in chosen]
    assert got.tokens[CODES.stop] == Special.EOI
    assert got.stats.per_pass[: len(SCALES)] == [n * n for n in SCALES]
    assert got.stats.generated == len(got.new_tokens)


def test_media_with_weights_of_their_own_ask_with_those_of_pictures() -> None:
    net = writer(backbone=replace(BACKBONE, modality_specific="all")).eval()
    for parameter in net.backbone.blocks[0].parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    got, seen = listened(Engine(net), PROMPT, Sampling(seed=4), CELLS)
    torch.testing.assert_close(seen, wanted(net, got.tokens, Sampling()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("drafts", [HeadDrafts(), DraftsByMedium()], ids=["head", "by medium"])
def test_rows_of_a_batch_are_those_decoded_alone(exact: bool, drafts: Drafts) -> None:
    net = writer(depth=2).eval()
    prompts = [PROMPT, PROMPT[:4], [*PROMPT, FIRST + 5, FIRST + 6], [*PROMPT[:-1], LAYOUT.dim(7)], [*PROMPT[:-1], LAYOUT.dim(ENDS[1])]]
    prompts += [[*PROMPT[:-2], LAYOUT.dim(2), LAYOUT.dim(ENDS[1])]]
    samplings = [Sampling(seed=i, guidance=2.0 if i % 2 else 1.0) for i in range(len(prompts))]
    together = Engine(net, exact=exact, draft_cost=0, drafts=drafts).generate_batch(prompts, samplings, 16)
    for i, (prompt, sampling, row) in enumerate(zip(prompts, samplings, together, strict=True)):
        alone = Engine(net, exact=exact, draft_cost=0, drafts=drafts).generate(prompt, sampling, 16, speculative=i % 3 == 0)
        assert alone.tokens == row.tokens
    assert together[2].stats.per_pass[0] == 3 and together[4].stats.per_pass[:2] == [1, 4]
    for row in (together[3], together[5]):  # 1 x 7 and 2 x 5 codes are no pyramids: one by one, and drafts
        assert max(row.stats.per_pass) <= 1 + drafts.length(net)


def test_a_prefix_may_end_within_a_scale() -> None:
    """What stands of the scale already tells nothing about the rest of it."""
    net, sampling = writer().eval(), Sampling(seed=9)
    whole, logits = listened(Engine(net), PROMPT, sampling, CELLS)
    for known in range(CELLS):
        prefix = whole.tokens[: CODES.start + known]
        rest, seen = listened(Engine(net), prefix, sampling, CELLS - known)
        assert rest.tokens == whole.tokens
        torch.testing.assert_close(seen, logits[known:], atol=1e-5, rtol=1e-5)


def test_the_cache_has_room_for_queries_beside_a_row_that_has_ended() -> None:
    net, late = writer().eval(), PROMPT[:-1]
    direction = torch.randn(48)
    with torch.no_grad():  # <dim 1> is followed by that of all scales
        net.embedding.table.weight[slice(*LAYOUT.dim_range)] = -direction
        net.embedding.table.weight[LAYOUT.dim(1)] = direction
        net.embedding.table.weight[LAYOUT.dim(CELLS)] = 2 * direction
    engine = Engine(net)
    assert engine.generate(late, Sampling(temperature=0.0), 1).tokens == PROMPT
    rows = engine.generate_batch([[Special.BOS, *[40] * 50, *OPEN], late], [Sampling(temperature=0.0)] * 2, CELLS, speculative=False)
    assert [row.stats.per_pass for row in rows] == [[1, 4, 9], [1, 1, 4, 8]]


def test_the_limit_ends_a_row_within_a_scale() -> None:
    got = Engine(writer().eval()).generate(PROMPT, Sampling(seed=9), 3)
    assert len(got.new_tokens) == 3 and got.cut and got.stats.per_pass == [1, 2]
