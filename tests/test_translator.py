"""Media into segments of a vocabulary and out of streams, without any model."""

import pytest
import torch

from mmtp.models.connector import Projector
from mmtp.stream.template import Turn, encode_document, text_segment
from mmtp.stream.vocab import Special, VocabLayout, VocabMismatch
from mmtp.testing.fakes import BlockTokenizer
from mmtp.tokenizers.continuous.patches import PatchImageTokenizer
from mmtp.translator import TranslationError, Translator
from mmtp.types import Modality


@pytest.fixture
def translator(tokenizers) -> Translator:
    return Translator(VocabLayout.of(tokenizers, 4), tokenizers, Projector.Config())


def pictures(count: int) -> list[torch.Tensor]:
    return [torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def test_pictures_come_out_of_a_stream_as_their_codes_have_them(translator) -> None:
    segments = translator.encode_pictures(pictures(3))
    assert [segment.ids.shape for segment in segments] == [(3, 2, 3)] * 3
    words = text_segment(translator.encode_text, "a red circle", target=True)
    stream = encode_document(translator.layout, (Turn("user", (segments[0], words)), Turn("assistant", (*segments[1:], words)))).tokens
    drawn = translator.pictures(stream)
    assert len(drawn) == 3
    for found, codes in zip(drawn, translator.decode(segments), strict=True):
        torch.testing.assert_close(found, codes, atol=0, rtol=0)
    answer = stream.tolist().index(Special.ASSISTANT)
    assert len(translator.segments(stream, answer)) == len(translator.pictures(stream, answer)) == 2
    assert translator.segments(stream, modality=Modality.AUDIO) == [] and translator.decode([]) == []


def test_a_picture_that_is_asked_about_twice_is_encoded_once(translator, monkeypatch) -> None:
    one, other = pictures(2)
    asked: list[int] = []
    encode = translator.encode_pictures
    monkeypatch.setattr(translator, "encode_pictures", lambda media: (asked.append(len(media)), encode(media))[1])
    (coded,) = encode([other])
    found = translator.encode_once([one, one, None, coded, one])
    assert asked == [1] and found[2] is None and found[3] is coded
    assert found[0] is found[1] is found[4] is not None


def test_text_has_ids_of_its_own_and_of_the_vocabulary(translator) -> None:
    first, last = translator.layout.text_range
    local, ids = translator.encode_text("a red circle"), translator.text_ids("a red circle")
    assert [token - first for token in ids] == local and max(ids) < last
    assert translator.tokenizer(Modality.TEXT).decode_text(local) == "a red circle"


def test_vectors_are_taken_where_a_tokenizer_gives_them(tokenizers) -> None:
    tokenizers["patches"] = PatchImageTokenizer.Config(patch=8).build()
    translator = Translator(VocabLayout.of(tokenizers, 8), tokenizers, Projector.Config(merge=2))
    (segment,) = translator.encode_pictures(pictures(1))
    assert segment.features.shape == (4, 6, 192) and segment.places == (2, 3)
    (picture,) = translator.decode([segment])
    torch.testing.assert_close(picture, pictures(1)[0], atol=0, rtol=0)


def test_wrong_tokenizers_and_media_are_named(translator, tokenizers) -> None:
    with pytest.raises(TranslationError, match="this model has no audio tokenizer; it has words, blocks"):
        translator.encode_sounds([torch.zeros(1, 100)])
    other = tokenizers | {"blocks": BlockTokenizer.Config(block=8, levels=3).build()}
    with pytest.raises(VocabMismatch, match="blocks"):
        Translator(translator.layout, other, Projector.Config())
