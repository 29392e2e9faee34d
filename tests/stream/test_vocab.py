"""Every id means one thing, and the layout survives the disk."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp.config import ConfigError
from mmtp.stream.patterns import PatternError
from mmtp.stream.vocab import MediaEntry, Special, TextEntry, VocabError, VocabLayout, VocabMismatch
from mmtp.types import Modality, TokenizerSpec

QUICK = settings(max_examples=60, deadline=None)
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple)
PARTS = st.tuples(st.none() | st.integers(1, 300), st.dictionaries(st.sampled_from(["image", "audio", "video"]), SIZES), st.booleans())


def layout_of(text: int | None, media: dict[str, tuple[int, ...]], features: bool = False, max_dim: int = 9) -> VocabLayout:
    entries = [MediaEntry(Modality(name), f"my-{name}", f"f-{name}", sizes) for name, sizes in media.items()]
    if features:
        entries.append(MediaEntry(Modality.IMAGE, "patches", "f-patches"))
    return VocabLayout(TextEntry("bpe", text, "f-text") if text else None, tuple(entries), max_dim)


FULL = layout_of(100, {"image": (8, 4), "audio": (6,)}, features=True)


def ranges_of(layout: VocabLayout) -> list[tuple[int, int]]:
    codes = [layout.code_range(e.modality, k) for e in layout.media for k in range(len(e.codebook_sizes))]
    return [layout.text_range, layout.dim_range, *codes]


@QUICK
@given(PARTS)
def test_ranges_tile_the_vocabulary(parts):
    layout = layout_of(*parts)
    end = 32
    for lo, hi in ranges_of(layout):
        assert lo == end and hi >= lo
        end = hi
    assert layout.used == end
    assert layout.size % 64 == 0 and 0 <= layout.size - layout.used < 64


@QUICK
@given(PARTS)
def test_ids_go_there_and_back_and_are_described_apart(parts):
    layout = layout_of(*parts)
    seen = [layout.describe(token) for token in range(layout.used)]
    assert len(set(seen)) == len(seen)
    for entry in layout.media:
        for k, size in enumerate(entry.codebook_sizes):
            local = np.arange(size)
            tokens = layout.to_global(local, entry.modality, k)
            assert (tokens.min(), tokens.max() + 1) == layout.code_range(entry.modality, k)
            np.testing.assert_array_equal(layout.from_global(tokens, entry.modality, k), local)


@QUICK
@given(PARTS)
def test_slots_have_sorted_disjoint_ranges_and_their_generable_part(parts):
    layout = layout_of(*parts)
    for slot in layout.slots:
        for (_, hi), (lo, _) in zip(slot.ranges, slot.ranges[1:], strict=False):
            assert hi < lo
        legal = [token for lo, hi in slot.ranges for token in range(lo, hi)]
        generable = {token for lo, hi in slot.generable for token in range(lo, hi)}
        assert slot.size == len(legal) == len(set(legal)) and slot.size > 0
        assert set(legal) - generable <= {Special.BOF, Special.FEATURE}
        assert generable <= set(legal)
        assert slot.forced == (legal[0] if len(legal) == 1 else None)
        assert all(token in slot for token in legal) and layout.size not in slot
    assert [layout.slot_index[slot.name] for slot in layout.slots] == list(range(len(layout.slots)))


@QUICK
@given(PARTS)
def test_layouts_survive_json(parts):
    layout = layout_of(*parts)
    again = VocabLayout.from_dict(json.loads(json.dumps(layout.to_dict())))
    assert again == layout
    assert again.hash == layout.hash


def test_slots_stand_in_a_fixed_order():
    assert [slot.name for slot in FULL.slots] == [
        "start", "doc", "turn", "dim", "image.codes.0", "image.codes.1", "image.end",
        "audio.codes.0", "audio.boundary.0", "audio.end", "feature.codes.0", "feature.end", "done",
    ]  # fmt: skip
    doc = FULL.slots[1]
    assert doc.ranges == ((2, 6), (7, 8), (9, 10), (13, 14), (32, 132))
    assert doc.generable == ((2, 6), (7, 8), (9, 10), (32, 132))
    assert FULL.slots[2].ranges == ((6, 8), (9, 10), (13, 14), (32, 132))
    assert FULL.slots[FULL.slot_index["image.end"]].forced == Special.EOI
    assert FULL.slots[FULL.slot_index["audio.boundary.0"]].ranges == ((10, 11), FULL.code_range(Modality.AUDIO))


def test_hash_tells_every_difference():
    others = [
        replace(FULL, max_dim=10),
        replace(FULL, text=None),
        replace(FULL, text=TextEntry("bpe", 100, "other")),
        replace(FULL, media=FULL.media[:1]),
        replace(FULL, media=FULL.media[::-1]),
        replace(FULL, media=(replace(FULL.media[0], delays=(0, 1)), *FULL.media[1:])),
    ]
    assert len({FULL.hash, *(other.hash for other in others)}) == len(others) + 1
    assert len(FULL.hash) == 16 and int(FULL.hash, 16) >= 0


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (replace(FULL, text=None), r"shard: text tokenizer is none, but 'bpe' \(fingerprint f-text, sizes \[100\]\) is wanted"),
        (replace(FULL, text=TextEntry("bpe", 100, "x")), r"text tokenizer is 'bpe' \(fingerprint x, .*but 'bpe' \(fingerprint f-text"),
        (
            replace(FULL, media=(replace(FULL.media[0], fingerprint="y"), *FULL.media[1:])),
            r"image tokenizer is 'my-image' \(fingerprint y, .* but 'my-image' \(fingerprint f-image",
        ),
        (replace(FULL, media=(replace(FULL.media[0], delays=(0, 2)), *FULL.media[1:])), r"delays \[0, 2\]"),
        (replace(FULL, media=FULL.media[:2]), "continuous image tokenizer is none, but 'patches'"),
        (replace(FULL, media=(*FULL.media, MediaEntry(Modality.VIDEO, "v", "", (3,)))), "video tokenizer is 'v' .* but none is wanted"),
        (replace(FULL, max_dim=8), "max_dim is 8, but 9 is wanted"),
        (replace(FULL, media=FULL.media[::-1]), "stand in the order"),
    ],
)
def test_another_vocabulary_is_refused_by_name(other, message):
    FULL.check_same(replace(FULL), "shard")
    with pytest.raises(VocabMismatch, match=message):
        FULL.check_same(other, "shard")


@QUICK
@given(PARTS, st.sets(st.sampled_from(["text", "image", "audio", "video", "patches"])), st.integers(1, 12))
def test_a_joined_vocabulary_calls_every_id_what_its_parts_do(parts, chosen, max_dim):
    whole = layout_of(*parts)
    media = tuple(e for e in whole.media if ("patches" if e.continuous else str(e.modality)) in chosen)
    part = VocabLayout(whole.text if "text" in chosen else None, media, max_dim)
    joined = VocabLayout.joined({"part": part, "whole": whole})
    assert VocabLayout.joined({"joined": joined, "part": part, "whole": whole}) is joined
    assert joined.max_dim == max(max_dim, whole.max_dim) and joined._entries().keys() == whole._entries().keys()
    for each in (part, whole):
        ids = joined.ids_of(each)
        assert [joined.describe(token) for token in ids[: each.used].tolist()] == [each.describe(token) for token in range(each.used)]
        assert not ids[each.used :].any()


def test_vocabularies_of_different_tokenizers_are_not_joined():
    other = layout_of(None, {"audio": (7,)})
    with pytest.raises(VocabMismatch, match=r"b: audio tokenizer is 'my-audio' .*sizes \[7\]\), but .*sizes \[6\]\) is wanted, as in a$"):
        VocabLayout.joined({"a": FULL, "b": other})


@dataclass
class Fake:
    spec: TokenizerSpec


def test_a_layout_follows_from_tokenizers_in_any_order():
    tokenizers = {
        "a": Fake(TokenizerSpec(modality=Modality.AUDIO, codebook_sizes=(6, 6), fingerprint="fa")),
        "p": Fake(TokenizerSpec(modality=Modality.IMAGE, latent_dim=16, fingerprint="fp")),
        "i": Fake(TokenizerSpec(modality=Modality.IMAGE, codebook_sizes=(8,), fingerprint="fi")),
        "t": Fake(TokenizerSpec(modality=Modality.TEXT, codebook_sizes=(100,), fingerprint="ft")),
    }
    layout = VocabLayout.of(tokenizers, max_dim=7, delays={"a": (0, 1)})
    assert layout.text == TextEntry("t", 100, "ft")
    assert [entry.name for entry in layout.media] == ["i", "p", "a"]
    assert layout.entry(Modality.AUDIO).delays == (0, 1)
    assert layout.max_dim == 7
    assert VocabLayout.of(dict(reversed(tokenizers.items())), max_dim=7, delays={"a": (0, 1)}) == layout
    with pytest.raises(VocabError, match="'u': there is another text tokenizer, 't'"):
        VocabLayout.of({**tokenizers, "u": tokenizers["t"]})


def test_streams_may_hold_the_first_codebooks_of_a_residual_tokenizer():
    spec = TokenizerSpec(modality=Modality.AUDIO, codebook_sizes=(6, 5, 4), residual=True)
    assert VocabLayout.of({"a": Fake(spec)}, codebooks={"a": 2}).entry(Modality.AUDIO).codebook_sizes == (6, 5)
    assert VocabLayout.of({"a": Fake(spec)}).entry(Modality.AUDIO).codebook_sizes == (6, 5, 4)
    with pytest.raises(VocabError, match="'a': the first 4 codebooks are wanted, and it has 3"):
        VocabLayout.of({"a": Fake(spec)}, codebooks={"a": 4})
    with pytest.raises(VocabError, match="the first 2 codebooks are wanted, and it is not residual"):
        VocabLayout.of({"a": Fake(replace(spec, residual=False))}, codebooks={"a": 2})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: replace(FULL, max_dim=0), "max_dim: at least 1"),
        (lambda: VocabLayout(TextEntry("t", 0)), "'t': a text tokenizer needs at least one id"),
        (lambda: replace(FULL, media=(FULL.media[0], replace(FULL.media[0], name="b"))), "another discrete image tokenizer"),
        (lambda: MediaEntry(Modality.TEXT, "t", "", (4,)), "'t': a text tokenizer is a TextEntry"),
        (lambda: MediaEntry(Modality.IMAGE, "i", "", (4,), (0, 1)), "'i': 2 delays for 1 codebooks"),
        (lambda: MediaEntry(Modality.IMAGE, "i", "", (4, 0)), "'i': every codebook needs at least one entry"),
        (lambda: MediaEntry(Modality.VIDEO, "a"), "'a': continuous features are known for pictures and sounds, not for video"),
        (lambda: replace(FULL, media=(*FULL.media, MediaEntry(Modality.AUDIO, "mel"))), "'patches': there is another continuous tokenizer"),
    ],
)
def test_entries_that_make_no_vocabulary_are_refused(build, message):
    with pytest.raises(VocabError, match=message):
        build()


def test_bad_delays_are_refused_by_name_of_the_field():
    with pytest.raises(PatternError, match="the first of them 0"):
        MediaEntry(Modality.AUDIO, "a", "", (4, 4), (1, 0))
    data = FULL.to_dict()
    data["media"][0]["delays"] = [0]
    with pytest.raises(ConfigError, match=r"layout.media\[0\]: 'my-image': 1 delays for 2 codebooks"):
        VocabLayout.from_dict(data, "layout")


@pytest.mark.parametrize("ids", [np.array([0, 8]), torch.tensor([-1]), 8])
def test_local_ids_beyond_the_codebook_are_refused(ids):
    with pytest.raises(VocabError, match="image codebook 0: local ids from 0 to 7 are wanted"):
        FULL.to_global(ids, Modality.IMAGE)


def test_helpers_name_what_is_missing():
    with pytest.raises(VocabError, match="no video tokenizer; it has bpe, my-image, my-audio, patches"):
        FULL.code_range(Modality.VIDEO)
    with pytest.raises(VocabError, match="image has 2 codebooks; there is no codebook 2"):
        FULL.code_range(Modality.IMAGE, 2)
    with pytest.raises(VocabError, match="extent 10 along one axis: this vocabulary has dims from 1 to 9"):
        FULL.dim(10)
    with pytest.raises(VocabError, match="vocabulary ids from 32 to 131"):
        FULL.from_global(5, Modality.TEXT)


def test_text_of_a_stream():
    tokens = np.array([1, 32, 7, 33, 131, 132, 200], dtype=np.uint16)
    assert FULL.text_ids(tokens).tolist() == [0, 1, 99]


def test_words_for_ids():
    words = [FULL.describe(token) for token in (0, 7, 20, 32, 132, 141, 149, 153, 159, -3)]
    assert words == [
        "<pad>", "<boi>", "reserved id 20", "text 0", "<dim 1>", "image code 0 of codebook 0", "image code 0 of codebook 1",
        "audio code 0 of codebook 0",
        "id 159, which no tokenizer of this vocabulary uses",
        "id -3, which no tokenizer of this vocabulary uses",
    ]  # fmt: skip
