"""One thread per test process: the processes of pytest-xdist share the cores, and sums are made in one order."""

import os
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked ``gpu`` where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no accelerator here"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def block_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry with ``mmtp.testing.fakes:BlockTokenizer`` as ``block``, for the length of a test."""
    from mmtp.registry import REGISTRY

    monkeypatch.setattr(REGISTRY, "_families", {family: dict(entries) for family, entries in REGISTRY._families.items()})
    REGISTRY.register("tokenizer", "block", "mmtp.testing.fakes:BlockTokenizer")


@pytest.fixture
def tokenizers(block_registered: None) -> dict[str, Any]:
    """A small text tokenizer, and one of pictures that any code stands for a flat block of."""
    from mmtp.testing.fakes import BlockTokenizer
    from mmtp.tokenizers.text import TextTokenizer

    return {
        "words": TextTokenizer.train(["draw a red circle", "a blue triangle"] * 4, 280),
        "blocks": BlockTokenizer.Config(block=16, levels=3).build(),
    }
