import json
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import soundfile
import torch

from mmtp.data.encode import TokenizeConfig
from mmtp.data.job import tokenize
from mmtp.data.loader import PackedBatches, ShardDataset
from mmtp.decode.constrain import ConstraintError
from mmtp.decode.rows import DecodeError, FeaturesError
from mmtp.decode.sample import Sampling
from mmtp.events import End, Event, GridPiece, SoundChunk, TextPiece
from mmtp.models.connector import Projector, Resampler
from mmtp.models.loss import LossConfig
from mmtp.models.presets import preset
from mmtp.models.unified import input_spans
from mmtp.pipeline import Pipeline, PipelineError
from mmtp.speaking import SpeakingError
from mmtp.stream.packing import collate
from mmtp.stream.template import TEMPLATES, Sample, encode_document
from mmtp.stream.vocab import Special, VocabError, VocabLayout, VocabMismatch
from mmtp.testing.fakes import BlockTokenizer
from mmtp.tokenizers.audio.frame import FrameAudioTokenizer
from mmtp.tokenizers.continuous.patches import PatchAudioTokenizer, PatchImageTokenizer
from mmtp.tokenizers.quantizers import FSQ, ResidualFSQ
from mmtp.tokenizers.text import TextTokenizer
from mmtp.train.model_choice import ModelChoice
from mmtp.translator import TranslationError
from mmtp.types import Batch, Codes, Modality, Segment

CAPTIONS = ["a red circle", "a blue triangle"]


@pytest.fixture
def pipeline(tokenizers):
    torch.manual_seed(0)
    return Pipeline(preset("tiny", VocabLayout.of(tokenizers, 4)).build(), tokenizers)


@pytest.fixture(scope="module")
def painter():
    """A model that draws when it is asked to; the other one knows nothing."""
    return Pipeline.from_pretrained("vqa-s")


def picture(seed: int) -> torch.Tensor:
    return torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(seed))


def test_drawings_follow_their_seeds_alone(painter):
    together = painter.draw(CAPTIONS, [3, 4])
    alone = [painter.draw([caption], [seed], speculative=False)[0] for caption, seed in zip(CAPTIONS, [3, 4], strict=True)]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_the_best_candidate_is_the_one_whose_caption_the_model_reads_best(painter):
    best = painter.draw(CAPTIONS, [0, 5], candidates=3)
    for caption, seed, chosen in zip(CAPTIONS, [0, 5], best, strict=True):
        replies = [painter.reply(f"draw {caption}", sampling=Sampling(seed=3 * seed + i)) for i in range(3)]
        scores = painter.caption_scores([painter.segments(reply.tokens)[0] for reply in replies], [caption] * 3)
        assert len(set(scores)) == 3
        wanted = painter.pictures(replies[scores.index(max(scores))].tokens)[0]
        torch.testing.assert_close(chosen, wanted, atol=1e-4, rtol=0)


def test_caption_scores_are_log_likelihoods(pipeline):
    (segment,) = pipeline.encode_pictures([picture(0)])
    document = encode_document(pipeline.layout, TEMPLATES["caption"](Sample(segment, (CAPTIONS[0],)), pipeline.encode_text)[0])
    tokens, info = document.tokens.tolist(), pipeline.grammar.analyse(document.tokens, complete=True)
    wanted = 0.0
    batch = collate([(document.tokens, document.target_mask)], pipeline.grammar, len(tokens))
    with torch.no_grad():
        states = pipeline.model(batch)[0][0]
    for place in document.target_mask.nonzero()[0]:
        slot = pipeline.layout.slots[info.slots[place]]
        ids = torch.tensor([i for low, high in slot.generable for i in range(low, high)])
        logits = pipeline.model.unembedding.weight[ids].detach() @ states[place - 1]
        wanted += float(logits.log_softmax(0)[ids == tokens[place]])
    assert pipeline.caption_scores([segment], [CAPTIONS[0]]) == pytest.approx([wanted], abs=1e-4)
    assert pipeline.caption_scores([picture(0)], [CAPTIONS[0]]) == pipeline.caption_scores([segment], [CAPTIONS[0]])


def test_unfinished_drawings_are_none_or_name_their_caption(pipeline):
    assert pipeline.try_draw(CAPTIONS, [Sampling(seed=0)] * 2, max_new_tokens=2, candidates=2) == [None, None]
    with pytest.raises(PipelineError, match="'a red circle': no picture was drawn with seed 0 within 2 tokens"):
        pipeline.draw(CAPTIONS, max_new_tokens=2)
    with pytest.raises(PipelineError, match="candidates 0: at least 1 is wanted"):
        pipeline.draw(CAPTIONS, candidates=0)


def test_answers_do_not_depend_on_the_batch(pipeline):
    pictures, questions = [picture(0), picture(1), None], ["red?", "a circle?", "draw"]
    assert pipeline.answer(pictures, questions) == pipeline.answer(pictures, questions, batch_size=1)


def held(events: list[Event]) -> tuple[str, list[list], torch.Tensor]:
    """What events hold together: text, parts of pictures, and sound."""
    parts = [[e.span, e.index, e.codes.tolist()] for e in events if isinstance(e, GridPiece)]
    sound = torch.cat([torch.zeros(1, 0), *(e.sound for e in events if isinstance(e, SoundChunk))], 1)
    return "".join(e.text for e in events if isinstance(e, TextPiece)), parts, sound


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_stream_tells_what_the_reply_holds(painter, guidance):
    sampling = Sampling(seed=3, guidance=guidance)
    reply = painter.reply("draw a red circle", sampling=sampling)
    (drawn,), (codes,) = painter.drawn(reply), painter.segments(reply.tokens)
    events = {drafts: list(painter.stream("draw a red circle", sampling=sampling, speculative=drafts)) for drafts in (True, False)}
    for several in events.values():
        assert several[-1].generation.tokens == reply.tokens
        text, parts, _ = held(several)
        assert text == painter.text(reply)
        assert parts == [[0, row, codes.ids[:, row].tolist()] for row in range(codes.shape[0])]
        torch.testing.assert_close([e for e in several if isinstance(e, GridPiece)][-1].so_far(), drawn)
    assert events[True][-1].generation.stats.passes < events[False][-1].generation.stats.passes


def test_streams_run_beside_each_other_and_closing_one_ends_it(pipeline):
    batcher = pipeline.engine.batcher(max_lanes=3, context=100)
    asked = [pipeline.request(words, sampling=Sampling(seed=i), max_new_tokens=30) for i, words in enumerate(("red", "blue", "a"))]
    rows = [batcher.submit(request) for request in asked]
    one, other, never = (pipeline.events(batcher.stream(row)) for row in rows)
    first = next(one)
    one.close()
    never.close()
    assert rows[0].cancelled and rows[2].cancelled and not list(one)
    alone = pipeline.reply("blue", sampling=Sampling(seed=1), max_new_tokens=30)
    assert held(list(other))[0] == pipeline.text(alone)
    assert not isinstance(first, End) and len(rows[0].tokens) < rows[0].end


def test_errors_of_a_stream_come_before_its_first_event(pipeline):
    with pytest.raises(DecodeError, match="row 0: max_new_tokens -1: 0 or more is wanted"):
        pipeline.stream("draw", max_new_tokens=-1)
    with pytest.raises(TranslationError, match="this model has no audio tokenizer"):
        pipeline.stream("draw", sounds=[torch.zeros(1, 100)])


def test_another_tokenizer_is_refused(tokenizers):
    model = preset("tiny", VocabLayout.of(tokenizers, 4)).build()
    with pytest.raises(VocabMismatch, match="blocks"):
        Pipeline(model, tokenizers | {"blocks": BlockTokenizer.Config(block=8, levels=3).build()})


SPOKEN = ("one", "two")


def learn_by_heart(pipeline, documents):
    encoded = [encode_document(pipeline.layout, document) for document in documents]
    batch = collate([(e.tokens, e.target_mask) for e in encoded], pipeline.grammar, 64)
    optimizer = torch.optim.AdamW(pipeline.model.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        pipeline.model.loss(batch, LossConfig()).total.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def speaker():
    """A tiny model that has learnt two short sounds by heart, to say and to hear."""
    torch.manual_seed(0)
    codec = FrameAudioTokenizer.Config(
        window=24, hop=12, width=8, encoder_blocks=1, decoder_blocks=1, quantizer=FSQ.Config(levels=(5, 5))
    ).build()
    tokenizers = {"words": TextTokenizer.train(["say one", "two"] * 4, 280), "codec": codec.eval()}
    pipeline = Pipeline(preset("tiny", VocabLayout.of(tokenizers, 4)).build(), tokenizers)
    sounds = [torch.rand(1, 48) * 2 - 1, torch.rand(1, 96) * 2 - 1]
    tokens = pipeline.encode_sounds(sounds)
    assert all(len(set(segment.ids.flatten().tolist())) > 1 for segment in tokens if segment.ids is not None)
    samples = [Sample(s, (words,)) for s, words in zip(tokens, SPOKEN, strict=True)]
    documents = [TEMPLATES[task](sample, pipeline.encode_text)[0] for sample in samples for task in ("say", "caption")]
    learn_by_heart(pipeline, documents)
    return pipeline, sounds


def test_what_is_learnt_is_said_and_heard(speaker):
    pipeline, sounds = speaker
    segments = pipeline.encode_sounds(sounds)
    greedy = [Sampling(temperature=0.0)] * 2
    for said, segment in zip(pipeline.say(SPOKEN, greedy), segments, strict=True):
        torch.testing.assert_close(said, pipeline.decode([segment])[0])
    assert pipeline.caption(segments) == list(SPOKEN)
    assert pipeline.caption(segments[1:], batch_size=1) == [SPOKEN[1]]
    reply = pipeline.reply("say two", sampling=greedy[0])
    torch.testing.assert_close(pipeline.sounds(reply.tokens, reply.prompt_length)[0], pipeline.decode([segments[1]])[0])


def test_the_best_candidate_is_the_sound_in_which_the_model_best_hears_the_text(speaker):
    pipeline, _ = speaker
    (chosen,) = pipeline.say(["two"], [Sampling(temperature=1.5, seed=4)], candidates=6)
    replies = [pipeline.reply("say two", sampling=Sampling(temperature=1.5, seed=24 + i)) for i in range(6)]
    sounds = [sound for reply in replies for sound in pipeline.written(reply, Modality.AUDIO)[:1]]
    scores = pipeline.caption_scores(sounds, ["two"] * len(sounds))
    assert len(set(scores)) > 1
    torch.testing.assert_close(chosen, pipeline.decode([sounds[scores.index(max(scores))]])[0])
    with pytest.raises(PipelineError, match="candidates 0: at least 1 is wanted"):
        pipeline.say(["two"], candidates=0)


def test_long_texts_are_said_in_parts(speaker):
    pipeline, sounds = speaker
    first, second = pipeline.encode_sounds(sounds)
    greedy = Sampling(temperature=0.0)
    (said,) = pipeline.say([" ".join(SPOKEN)], [greedy], at_once=len(SPOKEN[0].split()))
    torch.testing.assert_close(said, pipeline.decode([Segment(Modality.AUDIO, torch.cat([first.ids, second.ids], -1))])[0])
    assert pipeline.say([" ".join(SPOKEN)], [greedy], at_once=1, max_new_tokens=3) == [None]
    with pytest.raises(SpeakingError, match="at_once -1: words said at once, at least 1, or 0 for all"):
        pipeline.say(SPOKEN, at_once=-1)


@pytest.fixture(scope="module")
def reader(speaker):
    """A tiny model that has learnt to read two words in either order, each a sound of its own."""
    pipeline, sounds = speaker
    torch.manual_seed(1)
    pipeline = Pipeline(preset("tiny", pipeline.layout).build(), pipeline.tokenizers)
    said = dict(zip(SPOKEN, pipeline.encode_sounds(sounds), strict=True))
    documents = []
    for words in [*permutations(SPOKEN), *((word,) for word in SPOKEN)]:
        ids = [said[word].ids for word in words]
        starts = [sum(part.shape[-1] for part in ids[:i]) for i in range(len(ids))]
        sample = Sample(Segment(Modality.AUDIO, torch.cat(ids, -1)), words=tuple(zip(words, starts, strict=True)))
        documents += TEMPLATES["read"](sample, pipeline.encode_text)
    learn_by_heart(pipeline, documents)
    return pipeline, said


def test_words_are_read_one_by_one(reader):
    pipeline, said = reader
    texts = [" ".join(words) for words in permutations(SPOKEN)] + [SPOKEN[1]]
    greedy = [Sampling(temperature=0.0)] * len(texts)
    for speculative in (True, False):
        for text, sound in zip(texts, pipeline.say(texts, greedy, word_by_word=True, speculative=speculative, batch_size=2), strict=True):
            codes = torch.cat([said[word].ids for word in text.split()], -1)
            torch.testing.assert_close(sound, pipeline.decode([Segment(Modality.AUDIO, codes)])[0])
    # The model writes the words of its turn itself as well.
    reply = pipeline.reply(f"read {texts[0]}", sampling=greedy[0])
    assert pipeline.text(reply) == "".join(SPOKEN)
    ids = [segment.ids.tolist() for segment in pipeline.written(reply, Modality.AUDIO)]
    assert ids == [said[word].ids.tolist() for word in SPOKEN]
    assert len(pipeline.sounds(reply.tokens, reply.prompt_length)) == 2
    (whole,) = pipeline.sounds(reply.tokens, reply.prompt_length, as_one=True)
    torch.testing.assert_close(whole, pipeline.say(texts[:1], greedy[:1], word_by_word=True)[0])
    assert pipeline.sounds(reply.tokens[: reply.prompt_length], as_one=True) == []
    room = 1 + len(pipeline.encode_text(SPOKEN[0])) + said[SPOKEN[0]].ids.shape[-1] + 1
    assert pipeline.say([SPOKEN[0]], greedy[:1], word_by_word=True, max_new_tokens=room)[0] is not None
    assert pipeline.say([SPOKEN[0]], greedy[:1], word_by_word=True, max_new_tokens=room - 1) == [None]
    assert pipeline.say([texts[0]], greedy[:1], word_by_word=True, max_new_tokens=room + 2) == [None]


def test_a_sound_comes_in_chunks(speaker):
    pipeline, _ = speaker
    whole = pipeline.say(["two"], [Sampling(temperature=0.0)])[0]
    text, _, sound = held(list(pipeline.stream("say two", sampling=Sampling(temperature=0.0))))
    assert text == ""
    torch.testing.assert_close(sound, whole, atol=1e-5, rtol=0)


def test_sounds_that_do_not_end_in_time_are_none(speaker):
    pipeline, _ = speaker
    assert pipeline.say(["two"], [Sampling(temperature=0.0)], max_new_tokens=3) == [None]


def test_a_medium_that_the_model_does_not_know(pipeline):
    with pytest.raises(TranslationError, match="this model has no audio tokenizer; it has words, blocks"):
        pipeline.say(["a"])


@pytest.mark.parametrize("connector", [Projector.Config(merge=2), Resampler.Config(num_queries=3, depth=1, num_heads=2)])
def test_a_model_reads_vectors_of_pictures_as_in_training(tokenizers, connector):
    """Prompts with features: what the engine chooses is what the training path, which sees spans both ways, finds most probable."""
    tokenizers["blocks"] = PatchImageTokenizer.Config(patch=8).build()
    layout = VocabLayout.of(tokenizers, 8)
    torch.manual_seed(0)
    config = replace(preset("tiny", layout), feature_width=192, connector=connector)
    net = config.build()
    torch.nn.init.normal_(net.embedding.table.weight, std=0.3)
    pipeline = Pipeline(net, tokenizers)
    segments = pipeline.encode_pictures([picture(0), picture(1)[:, :16]])
    greedy = Sampling(temperature=0.0)
    pictures = [picture(0), picture(1)[:, :16]]
    reply = pipeline.reply("draw", pictures, sampling=greedy, max_new_tokens=6)
    assert reply.tokens == pipeline.reply("draw", pictures, sampling=greedy, max_new_tokens=6, speculative=False).tokens
    info = pipeline.grammar.analyse(np.array(reply.tokens))
    batch = Batch(
        tokens=torch.tensor([reply.tokens]),
        positions=torch.from_numpy(info.positions)[None],
        document_ids=torch.zeros(1, len(reply.tokens), dtype=torch.long),
        slots=torch.from_numpy(info.slots)[None],
        loss_mask=torch.zeros(1, len(reply.tokens), dtype=torch.bool),
        features=torch.cat([s.features.flatten(0, 1) for s in segments]),
        feature_index=torch.tensor([i for i, token in enumerate(reply.tokens) if token == Special.FEATURE]),
        feature_grids=torch.tensor([s.shape for s in segments]),
    )
    with torch.no_grad():
        states = net(batch)[0][0]
    for place in range(reply.prompt_length, len(reply.tokens)):
        ids = torch.tensor([i for low, high in layout.slots[info.slots[place]].generable for i in range(low, high)])
        assert ids[(net.unembedding.weight[ids] @ states[place - 1]).argmax()] == reply.tokens[place]
    assert len(pipeline.answer([picture(0), None], ["is it red"] * 2, max_new_tokens=2)) == 2
    with pytest.raises(FeaturesError, match=r"row 0: 0 vectors for \d+ <feature> tokens"):
        pipeline.engine.generate(pipeline.vqa_prompt(segments[0], "x"))


def test_sounds_as_vectors_from_files_to_a_prompt(tmp_path):
    words = TextTokenizer.train(["a high tone", "a low tone"] * 4, 280)
    patches = PatchAudioTokenizer.Config(bands=32, patch=(16, 16), stride=(16, 16)).build()
    (tmp_path / "sounds").mkdir()
    for name, pitch in (("high", 2000), ("low", 200)):
        wave = 0.3 * torch.sin(torch.arange(8000) * 2 * torch.pi * pitch / 16000)
        soundfile.write(tmp_path / "sounds" / f"{name}.wav", wave.numpy(), 16000)
    lines = [json.dumps({"path": f"sounds/{name}.wav", "caption": f"a {name} tone"}) for name in ("high", "low")]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    config = TokenizeConfig(tasks=("caption",))
    tokenize(tmp_path / "all.jsonl", tmp_path / "out", tokenizer=patches, text=words, config=config)
    dataset = ShardDataset(tmp_path / "out")
    grid = patches.grid((8000,))
    assert dataset[0].feature_grids.tolist() == [list(grid)] and grid[1] == 2
    net = ModelChoice(preset="tiny").model(dataset.layout, dataset.feature_width)
    batch = PackedBatches(dataset, rows=1, budget=64).batch(0)
    assert set(input_spans(batch, dataset.layout)[0].tolist()) > {-1, 1}  # what is only read is seen both ways
    net.loss(batch, LossConfig()).total.backward()
    assert net.embedding.features.layers[0].weight.grad.any()
    pipeline = Pipeline(net, {"TextTokenizer": words, "PatchAudioTokenizer": patches})
    wave = 0.3 * torch.randn(1, 8000)
    reply = pipeline.reply("which tone", sounds=[wave], sampling=Sampling(temperature=0.0), max_new_tokens=4)
    (span,) = pipeline.grammar.spans(np.array(reply.tokens))
    assert span.modality is Modality.AUDIO and span.grid == grid
    silent = pipeline.reply("which tone", sounds=[0 * wave], sampling=Sampling(temperature=0.0), max_new_tokens=0)
    assert silent.tokens == reply.tokens[: reply.prompt_length]


def test_answers_take_a_form(pipeline):
    pytest.importorskip("llguidance")
    media = [picture(0), picture(1)]
    answers = pipeline.answer(media, ["red?", "round?"], choices=["yes", "no"])
    assert set(answers) <= {"yes", "no"}
    assert [pipeline.answer([m], [q], regex="yes|no")[0] for m, q in zip(media, ["red?", "round?"], strict=True)] == answers
    flags = {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}
    assert set(json.loads(pipeline.caption(media[:1], json_schema=flags)[0])) <= {True, False}
    reply = pipeline.reply("draw", json_schema='{"const": "a red circle"}', sampling=Sampling(seed=1))
    assert pipeline.text(reply) == '"a red circle"' and not reply.cut
    assert reply.stats.passes < len(reply.new_tokens)


def test_answers_without_the_end_of_their_form_are_refused_by_name(pipeline):
    pytest.importorskip("llguidance")
    with pytest.raises(ConstraintError, match=r"'red\?': 4 tokens do not complete regex 'a\{40\}'; raise max_new_tokens"):
        pipeline.answer([None], ["red?"], regex="a{40}", max_new_tokens=4)
    with pytest.raises(ConstraintError, match="caption 0: 3 tokens do not complete choices"):
        pipeline.caption([picture(0)], choices=["yes and no, but no and yes"], max_new_tokens=3)
    assert pipeline.reply("draw", regex="a{40}", max_new_tokens=4).cut
    with pytest.raises(PipelineError, match="regex and choices are given; an answer takes one form"):
        pipeline.reply("draw", regex="a", choices=["a"])
    with pytest.raises(ConstraintError, match="regex '.': unclosed character class"):
        pipeline.reply("draw", regex="[")


def test_a_form_needs_a_tokenizer_of_text(tokenizers):
    del tokenizers["words"]
    wordless = Pipeline(preset("tiny", VocabLayout.of(tokenizers, 4)).build(), tokenizers)
    with pytest.raises(TranslationError, match="this model has no text tokenizer; it has blocks"):
        wordless.constraint(regex="a")


def test_a_model_may_know_the_first_codebooks_of_a_residual_tokenizer(tmp_path):
    codec = FrameAudioTokenizer.Config(
        window=24, hop=12, width=8, encoder_blocks=1, decoder_blocks=1, quantizer=ResidualFSQ.Config(levels=(5, 5), num_codebooks=3)
    ).build()
    sounds = [torch.rand(1, 48) * 2 - 1, torch.rand(1, 96) * 2 - 1]
    (tmp_path / "sounds").mkdir()
    for i, sound in enumerate(sounds):
        soundfile.write(tmp_path / f"sounds/{i}.wav", sound[0].numpy(), 16000, subtype="FLOAT")
    tokenize(tmp_path / "sounds", tmp_path / "out", tokenizer=codec, config=TokenizeConfig(codebooks=2))
    dataset = ShardDataset(tmp_path / "out")
    pipeline = Pipeline(preset("tiny", dataset.layout).build(), {"FrameAudioTokenizer": codec})
    for row, segment, sound in zip(dataset, pipeline.encode_sounds(sounds), sounds, strict=True):
        codes = codec.encode([sound]).ids[0, :2]
        assert torch.equal(segment.ids, codes)
        assert torch.equal(pipeline.segments(row.tokens, modality=Modality.AUDIO)[0].ids, codes)
        expected = codec.decode(Codes(codes[None], torch.tensor([codes.shape[1:]])))[0]
        torch.testing.assert_close(pipeline.sounds(row.tokens)[0], expected)
    with pytest.raises(VocabError, match="the first 4 codebooks are wanted, and it has 3"):
        tokenize(tmp_path / "sounds", tmp_path / "more", tokenizer=codec, config=TokenizeConfig(codebooks=4))
