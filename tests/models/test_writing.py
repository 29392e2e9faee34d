"""Models that write vectors: the loss, what it may depend on, packing, and pictures drawn from captions."""

import dataclasses

import pytest
import torch

from mmtp.config import ConfigError
from mmtp.decode.engine import Engine
from mmtp.decode.sample import Sampling, gaussian
from mmtp.models.connector import Projector
from mmtp.models.heads.flow import BlockFlow, FlowHead, TokenFlow
from mmtp.models.heads.sequential import SequentialHead
from mmtp.models.loss import LossConfig
from mmtp.models.unified import UnifiedModel, input_spans
from mmtp.pipeline import Pipeline
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.packing import collate
from mmtp.stream.template import TEMPLATES, Sample, Turn, encode_document
from mmtp.stream.vocab import MediaEntry, Special, TextEntry, VocabLayout
from mmtp.tokenizers.continuous.patches import PatchImageTokenizer
from mmtp.tokenizers.text import TextTokenizer
from mmtp.types import Batch, Modality, Segment
from tests.models.common import BACKBONE

LAYOUT = VocabLayout(TextEntry("words", 50), (MediaEntry(Modality.IMAGE, "patches", written=True),), 8)
GRAMMAR = StreamGrammar(LAYOUT)
WIDTH = 6
FLOW = TokenFlow.Config(width=32, depth=2, steps=8)
BLOCK = BlockFlow.Config(steps=4)


def writer(**changes: object) -> UnifiedModel:
    torch.manual_seed(0)
    config = UnifiedModel.Config(layout=LAYOUT, backbone=BACKBONE, feature_width=WIDTH, flow=FLOW)
    net = dataclasses.replace(config, **changes).build()
    torch.nn.init.normal_(net.embedding.table.weight, std=0.3)
    torch.nn.init.normal_(net.embedding.features.layers[0].weight, std=0.3)
    return net


def drawing(seed: int, grid: tuple[int, int] = (2, 3), shown: bool = False) -> tuple:
    """A person's words, with a picture that is only read where ``shown``, and the assistant's picture."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, *grid, WIDTH, generator=generator)
    words = Segment(Modality.TEXT, torch.randint(0, 50, (4,), generator=generator), target=False)
    shown_picture = (Segment(Modality.IMAGE, features=features[0], target=False),) if shown else ()
    answer = (Segment(Modality.IMAGE, features=features[1]), Segment(Modality.TEXT, torch.tensor([1, 2])))
    document = encode_document(LAYOUT, (Turn("user", (*shown_picture, words)), Turn("assistant", answer)))
    return document.tokens, document.target_mask, document.features, document.feature_grids


def moved(net: UnifiedModel, batch: Batch, index: int) -> list[bool]:
    """Which states move with one vector."""
    changed = batch.features.clone()
    changed[index] += 1
    with torch.no_grad():
        before, after = net(batch)[0], net(dataclasses.replace(batch, features=changed))[0]
    return (before != after).any(-1)[0].tolist()


def test_written_vectors_are_read_one_after_the_other_and_shown_ones_at_once() -> None:
    net = writer().eval()
    batch = collate([drawing(0, shown=True)], GRAMMAR, 40)
    read, written = batch.feature_index[:6].tolist(), batch.feature_index[6:].tolist()
    assert [i for i, span in enumerate(input_spans(batch, LAYOUT)[0].tolist()) if span >= 0] == read
    last_read = moved(net, batch, 5)
    assert last_read.index(True) == read[0]
    last_written = moved(net, batch, 11)
    assert last_written.index(True) == written[-1]  # no state before it, none of those that predict vectors
    assert batch.loss_mask[0, written[0] - 3 : written[-1] + 2].all()  # opener, dims, vectors, closer


def test_the_error_of_a_vector_hangs_on_nothing_after_it() -> None:
    net = writer()
    torch.nn.init.normal_(net.flow.outputs.out.weight, std=0.3)
    batch = collate([drawing(0)], GRAMMAR, 40)
    features = batch.features.clone().requires_grad_()
    states = net(dataclasses.replace(batch, features=features))[0].flatten(0, 1)[batch.feature_index - 1]
    for i, state in enumerate(states):
        (gradient,) = torch.autograd.grad(state.square().sum(), features, retain_graph=True)
        assert gradient[:i].any(1).all() and not gradient[i:].any()


def test_the_loss_counts_written_vectors_alone_and_weighs_them() -> None:
    net = writer()
    batch = collate([drawing(0, shown=True), drawing(1, (1, 2))], GRAMMAR, 80)
    torch.manual_seed(1)
    once = net.loss(batch, LossConfig())
    torch.manual_seed(1)
    twice = net.loss(batch, LossConfig(flow_weight=3.0))
    assert once.flow.keys() == {Modality.IMAGE} and once.flow[Modality.IMAGE] == pytest.approx(2.0, abs=0.5)
    assert float((twice.total - once.total).detach()) == pytest.approx(2 * once.flow[Modality.IMAGE], rel=1e-4)
    torch.manual_seed(1)
    states = net(batch)[0].flatten(0, 1)
    written = torch.tensor([*range(6, 12), 12, 13])
    error = net.flow.error(batch.features[written], states[batch.feature_index[written] - 1])
    assert float(error.detach()) == pytest.approx(once.flow[Modality.IMAGE], rel=1e-4)
    once.total.backward()
    assert net.flow.outputs.out.weight.grad.any() and net.embedding.features.layers[0].weight.grad.any()


def test_documents_of_a_row_do_not_touch_each_others_vectors() -> None:
    net = writer().eval()
    packed = collate([drawing(0), drawing(1, (1, 2))], GRAMMAR, 60)
    assert len(packed.tokens) == 1
    with torch.no_grad():
        together = net(packed)[0].flatten(0, 1)[packed.feature_index - 1]
        single = [collate([drawing(0)], GRAMMAR, 40), collate([drawing(1, (1, 2))], GRAMMAR, 40)]
        alone = torch.cat([net(batch)[0].flatten(0, 1)[batch.feature_index - 1] for batch in single])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


PROMPT = [Special.BOS, Special.USER, 35, 36, Special.END, Special.ASSISTANT, Special.BOF, LAYOUT.dim(2), LAYOUT.dim(3)]


def as_written(tokens: list[int], vectors: torch.Tensor) -> Batch:
    """A stream as training reads it, all of it a target."""
    info = GRAMMAR.analyse(torch.tensor(tokens))
    return Batch(
        tokens=torch.tensor([tokens]),
        positions=torch.from_numpy(info.positions)[None],
        document_ids=torch.zeros(1, len(tokens), dtype=torch.long),
        slots=torch.from_numpy(info.slots)[None],
        loss_mask=torch.ones(1, len(tokens), dtype=torch.bool),
        features=vectors,
        feature_index=torch.tensor([i for i, token in enumerate(tokens) if token == Special.FEATURE]),
    )


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("flow", [FLOW, BLOCK], ids=["token", "block"])
def test_decoding_draws_what_the_training_path_gives(flow: FlowHead.Config, guidance: float, speculative: bool) -> None:
    """The vectors that the engine wrote are the flow's, from forward passes over the whole stream, and over the span alone to guide."""
    net = writer(head=SequentialHead.Config(mtp_depth=2), flow=flow).eval()
    for parameter in net.flow.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    sampling = Sampling(temperature=0.7, seed=5, guidance=guidance)
    got = Engine(net).generate(PROMPT, sampling, max_new_tokens=7, speculative=speculative)
    assert got.tokens[len(PROMPT) :] == [Special.FEATURE] * 6 + [Special.EOF]
    noise = torch.stack([0.7 * gaussian(5, len(PROMPT) + i, WIDTH) for i in range(6)])
    streams = (got.tokens, [Special.BOS, *got.tokens[len(PROMPT) - 3 :]])

    def blocks(points: torch.Tensor, time: float) -> torch.Tensor:
        batches = [as_written(tokens, net.flow.to_vectors(points)) for tokens in streams]
        states = [net(batch, times=torch.full((6,), time))[0][0, batch.feature_index] for batch in batches]
        return torch.lerp(net.flow(states[1]), net.flow(states[0]), guidance)

    with torch.no_grad():
        if flow is BLOCK:
            wanted = net.flow.euler(noise, blocks)
        else:
            batches = [as_written(tokens, got.vectors) for tokens in streams]
            states = [net(batch)[0][0, batch.feature_index - 1] for batch in batches]
            wanted = net.flow.sample(states[0], noise, states[1], torch.full((6,), guidance))
    torch.testing.assert_close(got.vectors, wanted, atol=1e-4, rtol=1e-3)


def test_rows_draw_their_blocks_together_and_go_on_alone() -> None:
    net = writer(flow=BLOCK).eval()
    for parameter in net.flow.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    prompts = [PROMPT, [*PROMPT[:-2], LAYOUT.dim(1), LAYOUT.dim(2)], PROMPT[:-3]]
    samplings = [Sampling(seed=1), Sampling(seed=2, guidance=2.0), Sampling(seed=3)]
    together = Engine(net).generate_batch(prompts, samplings, max_new_tokens=9)
    for prompt, sampling, row in zip(prompts, samplings, together, strict=True):
        alone = Engine(net).generate(prompt, sampling, max_new_tokens=9)
        assert alone.tokens == row.tokens and alone.stats.generated == row.stats.generated == len(row.new_tokens)
        if alone.vectors is not None:
            torch.testing.assert_close(alone.vectors, row.vectors, atol=1e-4, rtol=1e-3)
    assert [len(row.vectors) for row in together[:2]] == [6, 2]
    cut = Engine(net).generate(PROMPT, Sampling(), max_new_tokens=4)
    assert cut.new_tokens == [Special.FEATURE] * 4 and cut.vectors is None


def test_a_block_sees_itself_and_what_is_before_it() -> None:
    net = writer(flow=BLOCK).eval()
    batch = collate([drawing(0, shown=True)], GRAMMAR, 40)
    written = batch.feature_index[6:].tolist()
    last = moved(net, batch, 11)
    assert last.index(True) == written[0] and all(last[written[0] : written[-1] + 1])
    torch.manual_seed(1)
    net.loss(batch, LossConfig()).total.backward()
    assert net.flow.outputs.weight.grad.any()


@pytest.mark.parametrize(
    ("flow", "copies", "steps"),
    [
        (TokenFlow.Config(width=48, depth=2, steps=10, repeats=16, mean=0.5, std=0.5), 1, 160),
        (BlockFlow.Config(steps=10, mean=0.5, std=0.5), 8, 250),  # a span has one time per copy
    ],
    ids=["token", "block"],
)
def test_a_model_learns_to_draw_tiny_pictures_from_captions(flow: FlowHead.Config, copies: int, steps: int) -> None:
    words = TextTokenizer.train(["draw red", "draw blue", "draw green"] * 4, 270)
    patches = PatchImageTokenizer.Config(patch=2).build()
    tokenizers = {"words": words, "patches": patches}
    layout = VocabLayout.of(tokenizers, 4, written=True)
    grammar = StreamGrammar(layout)
    pictures = {}
    for name, colour in (("red", (1, 0, 0)), ("green", (0, 1, 0)), ("blue", (0, 0, 1))):
        pictures[name] = torch.ones(3, 4, 4) * torch.tensor(colour).view(3, 1, 1)
        pictures[name][:, 2:, 2:] = 0.5  # the last patch differs: where a vector stands matters
    documents = []
    for name, picture in pictures.items():
        segment = Segment(Modality.IMAGE, features=patches.encode([picture]).item(0).reshape(2, 2, -1))
        (pieces,) = TEMPLATES["draw"](Sample(segment, (name,)), words.encode_text)
        document = encode_document(layout, pieces)
        documents.append((document.tokens, document.target_mask, document.features, document.feature_grids))
    batch = collate(documents * copies, grammar, 70)
    torch.manual_seed(0)
    net = UnifiedModel.Config(layout=layout, backbone=dataclasses.replace(BACKBONE, rope_theta=100.0), feature_width=12, flow=flow).build()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LinearLR(
        optimizer, 1.0, 0.05, steps
    )  # a rate that stays high ends on a spike of the loss, or does not
    for _ in range(steps):
        optimizer.zero_grad()
        net.loss(batch, LossConfig()).total.backward()
        optimizer.step()
        falling.step()
    pipeline = Pipeline(net, tokenizers)
    drawn = pipeline.draw(list(pictures), max_new_tokens=16)
    for picture, wanted in zip(drawn, pictures.values(), strict=True):
        assert picture.shape == (3, 4, 4) and float((picture - wanted).abs().mean()) < 0.1
    again = pipeline.draw(["green"], [1], max_new_tokens=16)[0]
    torch.testing.assert_close(again, drawn[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flow": None}, "the vocabulary has vectors that the model writes; give a table"),
        ({"layout": VocabLayout(TextEntry("words", 50), (MediaEntry(Modality.IMAGE, "p"),), 8)}, "no continuous tokenizer whose vectors"),
        ({"connector": Projector.Config(merge=2)}, "reads them one by one"),
        ({"feature_width": 0}, "needs their width"),
    ],
)
def test_models_that_cannot_write_are_refused(changes: dict, message: str) -> None:
    config = UnifiedModel.Config(layout=LAYOUT, backbone=BACKBONE, feature_width=WIDTH, flow=FLOW)
    assert UnifiedModel.Config.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(config, **changes).build()


def test_a_vocabulary_says_whether_vectors_are_written() -> None:
    read = VocabLayout(LAYOUT.text, (MediaEntry(Modality.IMAGE, "patches"),), 8)
    assert read.hash != LAYOUT.hash and "written" not in str(read.to_dict())
    assert VocabLayout.from_dict(LAYOUT.to_dict()) == LAYOUT
    opener = int(Special.BOF)
    for layout, may in ((read, False), (LAYOUT, True)):
        slot = layout.slots[layout.slot_index["turn"]]
        assert opener in slot and any(low <= opener < high for low, high in slot.generable) is may
