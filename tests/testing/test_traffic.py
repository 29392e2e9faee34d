import pytest

from mmtp.decode.cache import KVCache
from mmtp.decode.engine import Engine
from mmtp.stream.vocab import Special
from mmtp.testing.traffic import Traffic, stir, trace
from mmtp.types import Modality
from tests.models.common import GRAMMAR, LAYOUT, model


def test_a_cache_that_copies_wrongly_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said to be equal would not be if rows read something else than their own prompts."""
    net = model(depth=0).eval()
    stir(net)
    engine = Engine(net, exact=True)
    right = trace(engine, Traffic(GRAMMAR, seed=1, max_new_tokens=12), 12)
    assert not right.unequal and right.copied_tokens and right.ended + right.cancelled + right.refused == 12
    copy = KVCache.copy
    monkeypatch.setattr(KVCache, "copy", lambda self, source, target, length: copy(self, target, target, length))
    assert trace(engine, Traffic(GRAMMAR, seed=1, max_new_tokens=12), 12).unequal


def test_equal_seeds_draw_equal_requests_that_keep_the_grammar() -> None:
    drawn = [[Traffic(GRAMMAR, seed).draw().prefix for seed in range(30)] for _ in range(2)]
    assert drawn[0] == drawn[1]
    for prefix in drawn[0]:
        GRAMMAR.begin(prefix)
    assert any(Special.BOI in prefix and LAYOUT.code_range(Modality.IMAGE)[0] <= prefix[-1] for prefix in drawn[0])
