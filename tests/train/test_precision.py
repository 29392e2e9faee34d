import pytest
import torch

from mmtp.train import precision


@pytest.mark.parametrize(("slow", "wanted"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("neither", "float32")])
def test_the_quicker_arithmetic_is_taken_and_a_tie_is_exact(monkeypatch, slow, wanted):
    clock = iter([0.0, 3.0 if slow == "float32" else 1.0, 10.0, 13.0 if slow == "bfloat16" else 11.0])
    monkeypatch.setattr(precision.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(precision, "SIZE", 8)
    assert precision.quicker_precision() == wanted
