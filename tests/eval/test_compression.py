import pytest

from mmtp.eval.compression import evaluate_text_tokenizer
from mmtp.tokenizers.text import TextTokenizer


def test_figures_of_bytes_alone():
    tokenizer = TextTokenizer.train([], 256)
    figures = evaluate_text_tokenizer(tokenizer, ["ab", "ab", "é"])
    assert figures == {"texts": 2, "bytes_per_token": 1.0, "vocabulary_usage": 4 / 256, "exact": 1.0}


def test_merges_make_texts_shorter():
    tokenizer = TextTokenizer.train(["blue circle"] * 4, 266)
    assert evaluate_text_tokenizer(tokenizer, ["blue circle"])["bytes_per_token"] == pytest.approx(11 / 2)
