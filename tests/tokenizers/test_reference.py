import pytest
import torch
from torch import nn

from mmtp.config import Config
from mmtp.tokenizers import reference
from mmtp.tokenizers.reference import FingerprintCache, Reference


def test_mode_gradients_and_autocast_come_back():
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    with torch.autocast("cpu", torch.bfloat16):
        with Reference(module):
            assert not module.training and not module[1].training
            assert not torch.is_grad_enabled()
            assert module(torch.ones(1, 2)).dtype == torch.float32
        assert module(torch.ones(1, 2)).dtype == torch.bfloat16
    assert module.training and module[1].training
    assert torch.is_grad_enabled()


def test_mode_comes_back_after_an_error():
    module = nn.Linear(2, 2).train()
    with pytest.raises(RuntimeError, match="broken"), Reference(module):
        raise RuntimeError("broken")
    assert module.training and torch.is_grad_enabled()


def test_weights_are_hashed_once_per_change(monkeypatch):
    calls = []
    monkeypatch.setattr(reference, "fingerprint", lambda *_: calls.append(1) or f"hash {len(calls)}")
    module, cache = nn.Linear(2, 2), FingerprintCache()
    assert cache.of(Config(), module) == cache.of(Config(), module) == "hash 1"
    with torch.no_grad():
        module.bias.add_(1)
    assert cache.of(Config(), module) == "hash 2"
    module.load_state_dict({k: torch.zeros_like(v) for k, v in module.state_dict().items()})
    assert cache.of(Config(), module) == cache.of(Config(), module) == "hash 3"
