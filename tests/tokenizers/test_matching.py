import pytest

from mmtp import hub
from mmtp.stream.vocab import MediaEntry, TextEntry
from mmtp.tokenizers.matching import by_fingerprint
from mmtp.types import Modality

TEXT = hub.from_pretrained("text-bytes").spec.fingerprint


def test_a_tokenizer_serves_what_has_its_fingerprint_and_others_are_told() -> None:
    entries = [TextEntry("letters", 256, TEXT), MediaEntry(Modality.IMAGE, "pictures", "0123", (40,))]
    served, strangers = by_fingerprint(entries, ["text-bytes", "text-bpe-4k", "vqa-s"])
    assert served.keys() == {"letters"} and served["letters"].spec.fingerprint == TEXT
    other = hub.from_pretrained("text-bpe-4k").spec.fingerprint
    assert strangers == {"text-bpe-4k": f"has fingerprint {other}", "vqa-s": "is a UnifiedModel, not a tokenizer"}
    with pytest.raises(hub.HubError, match="nowhere"):
        by_fingerprint(entries, ["nowhere"])
