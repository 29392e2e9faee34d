"""What comes of a reply piece by piece is what the whole holds, wherever the pieces end."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtp.decode.batcher import Piece
from mmtp.decode.engine import Engine
from mmtp.decode.rows import Request
from mmtp.decode.sample import Sampling
from mmtp.decode.stats import DecodeStats, Generation
from mmtp.events import End, Event, Events, GridPiece, Reader, SoundChunk, TextPiece, VectorSpan
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.template import Turn, encode_document
from mmtp.stream.vocab import Special, VocabLayout
from mmtp.testing.fakes import BlockTokenizer
from mmtp.tokenizers.audio.frame import FrameAudioTokenizer
from mmtp.tokenizers.continuous.patches import PatchImageTokenizer
from mmtp.tokenizers.image.conv import ConvImageTokenizer
from mmtp.tokenizers.quantizers import FSQ, MultiScaleVQ, ResidualFSQ
from mmtp.tokenizers.text import TextTokenizer
from mmtp.tokenizers.video.conv import ConvVideoTokenizer
from mmtp.types import Codes, Modality, Segment
from tests.models import test_writing

WORDS = TextTokenizer.train(["draw a red circle", "a blue triangle", "ein grüner Kreis", "日本語"] * 4, 300)
BLOCKS = BlockTokenizer.Config(block=4, levels=5).build()
pytestmark = pytest.mark.usefixtures("block_registered")
quick = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
GRAMMARS: dict[tuple, StreamGrammar] = {}
cuts = st.lists(st.integers(1, 40), min_size=1, max_size=5)


def codec(causal: bool, window: int = 16) -> FrameAudioTokenizer:
    torch.manual_seed(0)
    built = FrameAudioTokenizer.Config(
        window=window, hop=8, width=8, encoder_blocks=1, decoder_blocks=2, kernel=3, causal=causal,
        quantizer=ResidualFSQ.Config(num_codebooks=3, levels=(5, 5)),
    ).build()  # fmt: skip
    for parameter in built.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return built.eval()


CODECS = {"causal": codec(True), "overlapping": codec(True, window=32), "ahead": codec(False)}


class Foreign:
    """A tokenizer of sounds that decodes them as a whole alone."""

    def __init__(self) -> None:
        self.spec = CODECS["ahead"].spec


FOREIGN = Foreign()


def reader(tokenizers: dict, delays: dict | None = None) -> Reader:
    def decode(segment: Segment) -> Tensor:
        tokenizer = next(t for t in tokenizers.values() if t.spec.modality is segment.modality)
        tokenizer = CODECS["ahead"] if isinstance(tokenizer, Foreign) else tokenizer
        return tokenizer.decode(Codes(segment.ids[None], torch.tensor([segment.shape])))[0]

    key = (*map(id, tokenizers.values()), *(delays or {}).values())
    if key not in GRAMMARS:
        GRAMMARS[key] = StreamGrammar(VocabLayout.of(tokenizers, 32, delays or {}))
    return Reader(GRAMMARS[key], tokenizers, decode)


def told(reader: Reader, tokens: list[int], sizes: list[int]) -> list[Event]:
    """The events of a stream that comes in pieces of these sizes, over and over."""

    def pieces() -> Iterator[Piece]:
        first, i = 0, 0
        while True:
            new = tokens[first : first + sizes[i % len(sizes)]]
            first, i = first + len(new), i + 1
            if first >= len(tokens):
                yield Piece(new, Generation(tokens, 0, DecodeStats()))
                return
            yield Piece(new)

    events = list(Events(pieces(), reader))
    assert isinstance(events[-1], End) and not any(isinstance(event, End) for event in events[:-1])
    return events[:-1]


def written(reader: Reader, *segments: Segment) -> list[int]:
    """A reply of some segments."""
    return encode_document(reader._grammar.layout, (Turn("assistant", segments),)).tokens.tolist()


def words(text: str) -> Segment:
    return Segment(Modality.TEXT, torch.tensor(WORDS.encode_text(text), dtype=torch.long))


@quick
@given(text=st.text(), sizes=cuts)
def test_text_comes_in_whole_characters(text, sizes):
    read = reader({"words": WORDS})
    pieces = [event.text for event in told(read, written(read, words(text)), sizes)]
    assert "".join(pieces) == text and all(pieces)


@quick
@given(data=st.binary(max_size=40), cut=st.integers(0, 40), sizes=cuts)
def test_bytes_that_are_no_text_and_pictures_between_bytes_change_nothing(data, cut, sizes):
    """Models write what they like: halves of characters, with a picture between them."""
    read = reader({"words": WORDS, "blocks": BLOCKS})
    first, rest = (Segment(Modality.TEXT, torch.tensor(WORDS.encode_bytes(part), dtype=torch.long)) for part in (data[:cut], data[cut:]))
    tokens = written(read, first, Segment(Modality.IMAGE, torch.zeros(3, 1, 2, dtype=torch.long)), rest)
    events = told(read, tokens, sizes)
    ids = first.ids.tolist() + rest.ids.tolist()
    assert "".join(event.text for event in events if isinstance(event, TextPiece)) == WORDS.decode_text(ids)


def test_a_character_waits_for_its_last_byte():
    read = reader({"words": WORDS})
    tokens = [read._grammar.layout.text_range[0] + id_ for byte in "aé€".encode() for id_ in WORDS.encode_bytes(bytes([byte]))]
    got = [[event.text for event in read.read(Piece([token]))] for token in tokens]
    assert got == [["a"], [], ["é"], [], [], ["€"]]


@quick
@given(
    rows=st.integers(1, 4), columns=st.integers(1, 5), delays=st.permutations([0, 1, 3]).filter(lambda d: d[0] == 0) | st.just([0, 0, 0]),
    sizes=cuts, count=st.integers(1, 2),
)  # fmt: skip
def test_rows_of_pictures_are_those_of_the_whole(rows, columns, delays, sizes, count):
    read = reader({"words": WORDS, "blocks": BLOCKS}, {"blocks": tuple(delays)})
    pictures = [torch.randint(0, 5, (3, rows, columns)) for _ in range(count)]
    tokens = written(read, *(part for ids in pictures for part in (words("so"), Segment(Modality.IMAGE, ids))), words("end"))
    events = told(read, tokens, sizes)
    assert "".join(event.text for event in events if isinstance(event, TextPiece)) == "so" * count + "end"
    parts = [event for event in events if isinstance(event, GridPiece)]
    assert [(part.span, part.index) for part in parts] == [(i, r) for i in range(count) for r in range(rows)]
    for part in parts:
        assert part.grid == (rows, columns) and torch.equal(part.codes, pictures[part.span][:, part.index])
        (whole,) = BLOCKS.decode(Codes(pictures[part.span][None], torch.tensor([[rows, columns]])))
        assert torch.equal(part.so_far(), whole[:, : 4 * (part.index + 1)])


def test_a_row_comes_with_its_last_code():
    read = reader({"words": WORDS, "blocks": BLOCKS})
    tokens = written(read, Segment(Modality.IMAGE, torch.zeros(3, 2, 4, dtype=torch.long)))
    came = [i for i, token in enumerate(tokens) for _ in read.read(Piece([token]))]
    body = tokens.index(Special.BOI) + 3
    assert came == [body + 11, body + 23]


def test_scales_of_a_pyramid_come_one_by_one_each_a_picture():
    quantizer = MultiScaleVQ.Config(codebook_size=16, codebook_dim=4, scales=(1, 2, 4), convolutions=2)
    pyramid = (
        ConvImageTokenizer.Config(patch=4, widths=(8, 8), encoder_blocks=(1, 1), decoder_blocks=(1, 1), quantizer=quantizer).build().eval()
    )
    read = reader({"words": WORDS, "pyramid": pyramid})
    ids = torch.randint(0, 16, (1, 1, 21))
    parts = told(read, written(read, Segment(Modality.IMAGE, ids)), [3, 4])
    for part, side, (start, end) in zip(parts, (1, 2, 4), ((0, 1), (1, 5), (5, 21)), strict=True):
        assert torch.equal(part.codes, ids[:, 0, start:end].unflatten(1, (side, side)))
        assert torch.equal(part.so_far(), pyramid.decode(Codes(ids[None, :, :, :end], torch.tensor([[1, end]])))[0])


def test_frames_of_videos_come_one_by_one():
    video = ConvVideoTokenizer.Config(quantizer=FSQ.Config(levels=(5, 5))).build().eval()
    read = reader({"words": WORDS, "video": video})
    ids = torch.randint(0, 25, (1, 2, 2, 3))
    first, second = told(read, written(read, Segment(Modality.VIDEO, ids)), [7])
    assert torch.equal(first.codes, ids[:, 0]) and torch.equal(second.codes, ids[:, 1])
    (whole,) = video.decode(Codes(ids[None], torch.tensor([[2, 2, 3]])))
    torch.testing.assert_close(second.so_far(), whole)


@quick
@given(
    name=st.sampled_from([*CODECS, "foreign"]), frames=st.integers(1, 60), sizes=cuts,
    delays=st.permutations([0, 1, 3]).filter(lambda d: d[0] == 0) | st.just([0, 0, 0]),
)  # fmt: skip
def test_chunks_of_a_sound_are_the_whole(name, frames, sizes, delays):
    tokenizer = CODECS.get(name) or FOREIGN
    read = reader({"words": WORDS, "codec": tokenizer}, {"codec": tuple(delays)})
    ids = torch.randint(0, 25, (3, frames))
    tokens = written(read, words("hear"), Segment(Modality.AUDIO, ids), words("this"))
    chunks = [event for event in told(read, tokens, sizes) if isinstance(event, SoundChunk)]
    (whole,) = CODECS.get(name, CODECS["ahead"]).decode(Codes(ids[None], torch.tensor([[frames]])))
    sound = torch.cat([chunk.sound for chunk in chunks], 1)
    assert sound.shape == whole.shape
    assert (sound - whole).abs().max() < 1e-5  # kernels add in another order where a chunk is shorter
    starts = [0]
    for chunk in chunks:
        assert chunk.start == starts[-1] and chunk.sample_rate == 16000 and chunk.last == (chunk is chunks[-1])
        starts.append(chunk.start + chunk.sound.shape[1])


def test_sound_comes_while_it_is_written():
    """A causal decoder gives each frame with its last code, one that sees ahead later; a foreign one at the end alone."""
    ids = torch.randint(0, 25, (3, 60))
    given = {}
    for name in (*CODECS, "foreign"):
        read = reader({"words": WORDS, "codec": CODECS.get(name) or FOREIGN})
        tokens = written(read, Segment(Modality.AUDIO, ids))
        body = tokens.index(Special.BOA) + 1
        given[name] = sum(e.sound.shape[1] // 8 for e in read.read(Piece(tokens[: body + 3 * 40])) if isinstance(e, SoundChunk))
    assert given["causal"] == 39 and given["overlapping"] == 37 and 0 < given["ahead"] < 40 and given["foreign"] == 0


def test_a_span_that_began_before_is_left_out():
    read = reader({"words": WORDS, "blocks": BLOCKS})
    ids = torch.randint(0, 5, (3, 2, 2))
    tokens = written(read, Segment(Modality.IMAGE, ids), words("and"), Segment(Modality.IMAGE, ids))
    events = told(read, tokens[tokens.index(Special.BOI) + 5 :], [4])
    assert "".join(event.text for event in events if isinstance(event, TextPiece)) == "and"
    assert [event.index for event in events if isinstance(event, GridPiece)] == [0, 1]


@pytest.mark.parametrize("flow", [test_writing.FLOW, test_writing.BLOCK], ids=["token", "block"])
@pytest.mark.parametrize("speculative", [False, True])
def test_vectors_come_span_by_span(flow, speculative):
    net = test_writing.writer(flow=flow).eval()
    for parameter in net.flow.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    decoded: list[Segment] = []
    tokenizers = {"words": WORDS, "patches": PatchImageTokenizer.Config(patch=2).build()}
    read = Reader(test_writing.GRAMMAR, tokenizers, lambda segment: decoded.append(segment) or torch.zeros(1))
    prompt, opener = test_writing.PROMPT[:-3], test_writing.PROMPT[-3:]
    assert opener[0] == Special.BOF and not list(read.read(Piece(opener)))  # as if the model had written it
    request = Request(prefix=prompt + opener, sampling=Sampling(seed=1), max_new_tokens=12)
    *events, end = Events(Engine(net).stream(request, speculative=speculative), read)
    span = next(event for event in events if isinstance(event, VectorSpan))
    rows, columns = test_writing.GRAMMAR.spans(torch.tensor(end.generation.tokens))[0].grid
    assert span.segment.shape == (rows, columns)
    assert torch.equal(span.segment.features.flatten(0, 1), end.generation.vectors[: rows * columns])
    span.decoded()
    assert decoded == [span.segment]
