import pytest
import torch

from mmtp.train import precision


@pytest.mark.parametrize(("slow", "wanted"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("neither", "float32")])
def test_the_quicker_arithmetic_is_taken_and_a_tie_is_exact(monkeypatch, slow, wanted):
    quick = {torch.float32: slow != "float32", torch.bfloat16: slow != "bfloat16"}
    monkeypatch.setattr(precision, "product_flops", lambda device, dtype, rows: 3e9 if quick[dtype] else 1e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert precision.quicker_precision() == wanted
