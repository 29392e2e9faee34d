import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mmtp.hub import from_pretrained, save_pretrained
from mmtp.testing import check_tokenizer
from mmtp.tokenizers.text import TextTokenizer, TextTokenizerError
from mmtp.types import Modality

CORPUS = [
    "what color is the rectangle? blue",
    "draw a blue circle",
    "is there not a triangle in the image? yes",
    "Съешь же ещё этих мягких французских булок",
] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer.train(CORPUS, 340)


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.characters()))
def test_any_text_comes_back(text):
    trained = _trained()
    assert trained.decode_text(trained.encode_text(text)) == text


@settings(deadline=None, max_examples=200)
@given(data=st.binary())
def test_any_bytes_come_back(data):
    trained = _trained()
    assert trained.decode_bytes(trained.encode_bytes(data)) == data


@pytest.mark.parametrize(
    "text", ["\ud83d", "a\udc80b", "\ud83d\ude00", "\x00", "\u00e9", "e\u0301", "\r\n", "   ", "🙂\u200d↔\ufe0f", "\ufeff"]
)
def test_unusual_text_comes_back(tokenizer, text):
    assert tokenizer.decode_text(tokenizer.encode_text(text)) == text


def test_valid_runs_between_invalid_bytes_are_still_merged(tokenizer):
    ids = tokenizer.encode_bytes(b"blue\xff\xfecircle")
    assert tokenizer.decode_bytes(ids) == b"blue\xff\xfecircle"
    assert len(ids) < len(b"blue\xff\xfecircle")


def test_ids_that_are_no_text_show_as_replacement(tokenizer):
    assert tokenizer.decode_text(tokenizer.encode_bytes(b"a\xffb")) == "a\ufffdb"


def test_training_gives_the_size_asked_for_and_repeats_itself(tokenizer, tmp_path):
    assert tokenizer.spec.codebook_sizes == (340,)
    assert TextTokenizer.train(CORPUS, 340).spec == tokenizer.spec
    assert tokenizer.spec.modality is Modality.TEXT
    assert len(tokenizer.encode_text("draw a blue circle")) < 12


def test_conforms(tokenizer):
    check_tokenizer(tokenizer, ["draw a blue circle", "", "Съешь", "\t x"])


def test_saved_file_is_kept_as_it_was_read(tokenizer, tmp_path):
    save_pretrained(tokenizer, tmp_path / "a")
    content = json.loads((tmp_path / "a/tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "a/tokenizer.json").write_text(json.dumps(content), encoding="utf-8")  # written otherwise, same meaning
    loaded = from_pretrained(tmp_path / "a")
    again = from_pretrained(save_pretrained(loaded, tmp_path / "b"))
    assert (tmp_path / "b/tokenizer.json").read_bytes() == (tmp_path / "a/tokenizer.json").read_bytes()
    assert loaded.spec == again.spec
    assert loaded.encode_text("blue") == tokenizer.encode_text("blue")


def test_control_tokens_are_not_read_from_text(tokenizer, tmp_path):
    backend = Tokenizer.from_str(tokenizer._backend.to_str())
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    backend.save(str(tmp_path / "other.json"))
    loaded = TextTokenizer.from_file(tmp_path / "other.json")
    assert loaded.spec.codebook_sizes == (341,)
    assert 340 not in loaded.encode_text("a <|end|> b")
    assert loaded.decode_text(loaded.encode_text("a <|end|> b")) == "a <|end|> b"
    assert loaded.decode_text([340]) == "<|end|>"


def test_a_file_that_normalises_still_gives_text_back(tokenizer, tmp_path):
    backend = Tokenizer.from_str(tokenizer._backend.to_str())
    backend.normalizer = normalizers.NFC()
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = TextTokenizer.from_file(tmp_path / "tokenizer.json")
    for text in ("e\u0301te\u0301", "\u00e9t\u00e9", "plain"):
        assert loaded.decode_text(loaded.encode_text(text)) == text


def _imported(folder):
    """As Qwen's are: byte-level BPE behind NFC, with control tokens; the tokenizer of a language model's folder."""
    backend = Tokenizer.from_str(_trained()._backend.to_str())
    backend.normalizer = normalizers.NFC()
    backend.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    return from_pretrained(f"transformers:{folder}")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    return _imported(tmp_path_factory.mktemp("qwen"))


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.one_of(st.characters(), st.sampled_from("e\u0301 \n\u1100\u1161<|im_end|>"))))
def test_any_text_comes_back_from_a_language_models_tokenizer(imported, text):
    ids = imported.encode_text(text)
    assert imported.decode_text(ids) == text
    assert all(0 <= i < imported.spec.codebook_sizes[0] - 2 for i in ids)  # the last two are control tokens


def test_a_language_models_tokenizer_conforms(imported):
    check_tokenizer(imported, ["draw a blue circle", "", "e\u0301te\u0301", "<|im_end|>"])


def test_bytes_that_a_byte_level_file_lacks_get_ids_behind_its_own(tmp_path):
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    letters = sorted(set("The quick, brown Fox (0123)."))  # as of a corpus without control characters
    alphabet = ["Ġ" if letter == " " else letter for letter in letters] + ["Ċ", "ĉ"]
    trained.model = models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[])
    trained.save(str(tmp_path / "tokenizer.json"))
    loaded = from_pretrained(f"transformers:{tmp_path}")
    assert loaded.file_size == len(alphabet) and loaded.spec.codebook_sizes == (256,)
    check_tokenizer(loaded, ["The Fox", "\x00\x04é", ""])
    assert min(loaded.encode_text("\x04")) >= loaded.file_size


def test_only_words_that_a_file_would_change_go_byte_by_byte(imported):
    plain, changed = "draw a blue circle", "e\u0301"
    bytewise = [imported.vocabulary[bytes([byte])] for byte in f" {changed}".encode()]
    ids = imported.encode_text(f"{plain} {changed} {plain}")
    assert ids == [*imported.encode_text(plain), *bytewise, *imported.encode_text(f" {plain}")]


def test_byte_fallback_with_a_leading_space(tmp_path):
    """As SentencePiece files are converted: a space is put first, spaces are ▁, unknown characters fall back to bytes."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "a": 257, "b": 258, "▁a": 259, "ab": 260}
    model = models.BPE(vocab=vocab, merges=[("▁", "a"), ("a", "b")], byte_fallback=True, unk_token=None)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = TextTokenizer.from_file(tmp_path / "tokenizer.json")
    for text in ("a b", " a", "ab ab", "é", "", "a▁b", "\ud800"):
        assert loaded.decode_text(loaded.encode_text(text)) == text
    assert loaded.encode_text("a a") == [257, 259]


def test_files_that_cannot_serve_are_refused(tmp_path):
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    with pytest.raises(TextTokenizerError, match=r"broken\.json: is not a Hugging Face tokenizer"):
        TextTokenizer.from_file(tmp_path / "broken.json")
    with pytest.raises(TextTokenizerError, match=r"none\.json: cannot be read"):
        TextTokenizer.from_file(tmp_path / "none.json")
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(TextTokenizerError, match="has no token for 255 of the 256 bytes"):
        TextTokenizer.from_file(tmp_path / "words.json")


@pytest.mark.parametrize(
    ("normalizer", "splitter"),
    [(normalizers.Lowercase(), pre_tokenizers.ByteLevel(add_prefix_space=False)), (None, pre_tokenizers.WhitespaceSplit())],
)
def test_files_that_change_plain_text_are_refused(tokenizer, normalizer, splitter, tmp_path):
    backend = Tokenizer.from_str(tokenizer._backend.to_str())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([splitter, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TextTokenizerError, match=r"tokenizer\.json: changes plain text \(case, spaces, line breaks\)"):
        TextTokenizer.from_file(tmp_path / "tokenizer.json")


def test_ids_beyond_the_vocabulary_are_refused(tokenizer):
    with pytest.raises(TextTokenizerError, match="id 340 is no token; they go to 339"):
        tokenizer.decode_text([340])


_CACHE: list[TextTokenizer] = []


def _trained() -> TextTokenizer:
    if not _CACHE:
        _CACHE.append(TextTokenizer.train(CORPUS, 340))
    return _CACHE[0]
