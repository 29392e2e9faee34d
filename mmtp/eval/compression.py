"""How short a text tokenizer makes texts."""

from collections.abc import Iterable

from mmtp.tokenizers.text import TextTokenizer


def evaluate_text_tokenizer(tokenizer: TextTokenizer, texts: Iterable[str]) -> dict[str, float]:
    """Measures a text tokenizer.

    Args:
        tokenizer: any text tokenizer.
        texts: each counts once, however often it occurs.

    Returns:
        ``texts``; ``bytes_per_token`` (UTF-8); ``vocabulary_usage``, the share of entries that occur; ``exact``, the share of
        texts that decode to themselves.
    """
    distinct = list(dict.fromkeys(texts))
    ids = [tokenizer.encode_text(text) for text in distinct]
    tokens = sum(map(len, ids))
    used = {i for row in ids for i in row}
    exact = sum(tokenizer.decode_text(row) == text for row, text in zip(ids, distinct, strict=True))
    size = tokenizer.spec.codebook_sizes[0]
    return {
        "texts": float(len(distinct)),
        "bytes_per_token": sum(len(text.encode("utf-8", "surrogatepass")) for text in distinct) / max(1, tokens),
        "vocabulary_usage": len(used) / size,
        "exact": exact / max(1, len(distinct)),
    }
