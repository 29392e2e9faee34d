"""Documents are legal streams, records cover them, and targets are what the model must write."""

import numpy as np
import pytest
import torch

from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.template import (
    TEMPLATES,
    EncodedDocument,
    Sample,
    TemplateError,
    Turn,
    caption_prompt,
    draw_prompt,
    encode_document,
    encode_prompt,
    question_turn,
    read_prompt,
    say_prompt,
    vqa_prompt,
)
from mmtp.stream.vocab import MediaEntry, TextEntry, VocabError, VocabLayout
from mmtp.types import Modality, Segment

LAYOUT = VocabLayout(
    TextEntry("bytes", 128),
    (
        MediaEntry(Modality.IMAGE, "pictures", "", (9, 4), (0, 1)),
        MediaEntry(Modality.IMAGE, "patches"),
        MediaEntry(Modality.AUDIO, "sounds", "", (6, 6), (0, 2)),
    ),
    max_dim=8,
)
GRAMMAR = StreamGrammar(LAYOUT)
PICTURE = Segment(Modality.IMAGE, torch.arange(12).reshape(2, 2, 3) % 4)


def encode_text(text: str) -> list[int]:
    return list(text.encode())


def words(tokens: np.ndarray) -> str:
    """A stream in letters, so that tests can be read."""
    out = []
    for token in tokens.tolist():
        name = LAYOUT.describe(token)
        out.append(chr(int(name[5:])) if name.startswith("text ") else "#" if " code " in name else name)
    return "".join(out)


def targets(document: EncodedDocument) -> str:
    return words(document.tokens[document.target_mask])


def sample(**labels) -> Sample:
    return Sample(PICTURE, **{"captions": ("a red box",), "questions": (("red?", "yes"), ("what?", "box"), ("how many?", "1")), **labels})


def encoded(template: str, **options) -> list[EncodedDocument]:
    return [encode_document(LAYOUT, document) for document in TEMPLATES[template](sample(), encode_text, **options)]


DRAWN = "<boi><dim 2><dim 3>############<eoi>"


@pytest.mark.parametrize(
    ("template", "stream", "predicted"),
    [
        ("plain", f"<bos>{DRAWN}<eos>", f"{DRAWN}<eos>"),
        ("caption", f"<bos>{DRAWN}a red box<eos>", "a red box<eos>"),
        ("draw", f"<bos><user>draw a red box<end><assistant>{DRAWN}<end><eos>", f"{DRAWN}<end><eos>"),
        ("say", f"<bos><user>say a red box<end><assistant>{DRAWN}<end><eos>", f"{DRAWN}<end><eos>"),
        ("vqa", f"<bos><user>{DRAWN}red?<end><assistant>yes<end><eos>", "yes<end><eos>"),
        ("vqa-blind", "<bos><user>red?<end><assistant>yes<end><eos>", "yes<end><eos>"),
    ],
)
def test_streams_and_targets_of_every_task(template, stream, predicted):
    document = encoded(template)[0]
    assert words(document.tokens) == stream
    assert targets(document) == predicted


def test_words_stand_by_turns_with_their_sounds():
    codes = torch.arange(10).reshape(2, 5) % 6
    spoken = Sample(Segment(Modality.AUDIO, codes), ("not this",), words=(("go", 0), ("on", 1)))
    (document,) = TEMPLATES["read"](spoken, encode_text)
    written = encode_document(LAYOUT, document)
    asked, answer = "<bos><user>read go on<end><assistant>", "go<boa>##<eoa>on<boa>########<eoa><end><eos>"
    assert (words(written.tokens), targets(written)) == (asked + answer, answer)
    info = GRAMMAR.analyse(written.tokens, complete=True)
    for span, part in zip(info.spans, (codes[:, :1], codes[:, 1:]), strict=True):
        np.testing.assert_array_equal(GRAMMAR.codes(written.tokens, span), part)
    prompt = read_prompt(LAYOUT, encode_text, "go on")
    np.testing.assert_array_equal(prompt, written.tokens[: len(prompt)])
    assert TEMPLATES["read"](Sample(spoken.medium, ("go on",)), encode_text) == []


@pytest.mark.parametrize("places", [(1, 2), (0, 0), (0, 5), (0, 3, 2)])
def test_words_out_of_order_are_refused(places):
    spoken = Sample(Segment(Modality.AUDIO, torch.zeros(1, 5, dtype=torch.int64)), words=tuple(("go", place) for place in places))
    with pytest.raises(TemplateError, match="of 5: they begin at 0 and go up"):
        TEMPLATES["read"](spoken, encode_text)


def test_several_questions_share_a_picture():
    first, second = encoded("vqa", questions_per_document=2)
    assert words(first.tokens) == f"<bos><user>{DRAWN}red?<end><assistant>yes<end><user>what?<end><assistant>box<end><eos>"
    assert targets(first) == "yes<end>box<end><eos>"
    assert words(second.tokens) == f"<bos><user>{DRAWN}how many?<end><assistant>1<end><eos>"
    with pytest.raises(TemplateError, match="questions_per_document: at least 1"):
        encoded("vqa", questions_per_document=0)


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_documents_are_legal_and_records_cover_them(template):
    for document in encoded(template):
        info = GRAMMAR.analyse(document.tokens, complete=True)
        assert sum(record.length for record in document.segments) == len(document.tokens) == len(document.target_mask)
        for record, other in zip(document.segments, document.segments[1:], strict=False):
            assert (record.modality, record.target) != (other.modality, other.target)
        bodies = [(record.length, record.shape) for record in document.segments if record.modality is Modality.IMAGE]
        assert bodies == ([] if template == "vqa-blind" else [(12, (2, 3))])
        for span in info.spans:
            np.testing.assert_array_equal(GRAMMAR.codes(document.tokens, span), PICTURE.ids)


def test_prompts_are_the_start_of_training_documents():
    vqa, draw, say = (encoded(task)[0].tokens for task in ("vqa", "draw", "say"))
    for prompt, document in (
        (vqa_prompt(LAYOUT, encode_text, PICTURE, "red?"), vqa),
        (draw_prompt(LAYOUT, encode_text, "a red box"), draw),
        (say_prompt(LAYOUT, encode_text, "a red box"), say),
    ):
        np.testing.assert_array_equal(prompt, document[: len(prompt)])
        assert words(prompt).endswith("<end><assistant>")
        assert not GRAMMAR.begin(prompt.tolist()).done


def test_a_caption_is_what_follows_its_prompt():
    prompt, document = caption_prompt(LAYOUT, PICTURE), encoded("caption")[0].tokens
    np.testing.assert_array_equal(prompt, document[: len(prompt)])
    assert words(document[len(prompt) :]) == "a red box<eos>"


def test_every_wording_of_a_caption_is_a_document():
    several = sample(captions=("a red box", "red"))
    assert [words(encode_document(LAYOUT, document).tokens) for document in TEMPLATES["caption"](several, encode_text)] == [
        f"<bos>{DRAWN}a red box<eos>",
        f"<bos>{DRAWN}red<eos>",
    ]


def test_a_question_may_stand_without_its_picture():
    assert words(vqa_prompt(LAYOUT, encode_text, None, "red?")) == "<bos><user>red?<end><assistant>"


def test_a_prompt_may_go_on_with_a_conversation_or_open_no_turn():
    turns = (
        question_turn(encode_text, "a"),
        Turn("assistant", (Segment(Modality.TEXT, torch.tensor([98])),)),
        question_turn(encode_text, "c"),
    )
    assert words(encode_prompt(LAYOUT, turns)) == "<bos><user>a<end><assistant>b<end><user>c<end><assistant>"
    assert words(encode_prompt(LAYOUT, (), role=None)) == "<bos>"


def test_samples_without_words_give_no_documents():
    bare = sample(captions=(), questions=())
    assert [len(TEMPLATES[name](bare, encode_text)) for name in TEMPLATES] == [1] + [0] * (len(TEMPLATES) - 1)


def test_features_are_input_only():
    picture = Segment(Modality.IMAGE, features=torch.randn(2, 2, 5), target=True)
    document = encode_document(LAYOUT, TEMPLATES["vqa"](Sample(picture, (), (("q", "a"),)), encode_text)[0])
    assert words(document.tokens) == "<bos><user><bof><dim 2><dim 2>" + "<feature>" * 4 + "<eof>q<end><assistant>a<end><eos>"
    assert targets(document) == "a<end><eos>"
    assert document.features is not None
    torch.testing.assert_close(document.features, picture.features.reshape(4, 5), rtol=0, atol=0)
    assert not encode_document(LAYOUT, (picture,)).target_mask[:-1].any()
    GRAMMAR.analyse(document.tokens, complete=True)


def test_sound_is_written_with_its_delays():
    sound = Segment(Modality.AUDIO, torch.tensor([[0, 1, 2], [3, 4, 5]]))
    document = encode_document(LAYOUT, (sound,))
    assert words(document.tokens) == "<bos><boa>######<eoa><eos>"
    span = GRAMMAR.spans(document.tokens)[0]
    assert span.grid == (3,)
    np.testing.assert_array_equal(GRAMMAR.codes(document.tokens, span), sound.ids)


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (Segment(Modality.IMAGE, torch.zeros(2, 9, 3, dtype=torch.int64)), "image of 9x3 cells: this vocabulary's dims reach from 1 to 8"),
        (Segment(Modality.IMAGE, torch.zeros(1, 2, 3, dtype=torch.int64)), r"image codes of shape \[1, 2, 3\]: 2 codebooks over 2 axes"),
        (Segment(Modality.IMAGE, torch.zeros(2, 0, 3, dtype=torch.int64)), "of at least 1"),
        (Segment(Modality.AUDIO, torch.zeros(2, 2, 2, dtype=torch.int64)), "2 codebooks over 1 axes"),
        (Segment(Modality.IMAGE), "it has neither ids nor features"),
        (Segment(Modality.AUDIO, features=torch.zeros(3, 4)), "no continuous audio tokenizer"),
        (Segment(Modality.IMAGE, features=torch.zeros(3, 4)), r"features of shape \[3, 4\]"),
    ],
)
def test_segments_that_do_not_fit_are_refused(segment, message):
    with pytest.raises(TemplateError, match=message):
        encode_document(LAYOUT, (segment,))


def test_ids_that_the_tokenizer_lacks_are_refused():
    with pytest.raises(VocabError, match="image codebook 1: local ids from 0 to 3 are wanted, 4 to 4 given"):
        encode_document(LAYOUT, (Segment(Modality.IMAGE, torch.full((2, 1, 1), 4)),))
    with pytest.raises(VocabError, match="no video tokenizer"):
        encode_document(LAYOUT, (Segment(Modality.VIDEO, torch.zeros(1, 1, 1, 1, dtype=torch.int64)),))


def test_unknown_roles_are_refused():
    with pytest.raises(TemplateError, match="role 'robot' is not one of user, assistant, system"):
        Turn("robot", ())
