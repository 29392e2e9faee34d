import json

import pytest
import torch

from mmtp.registry import REGISTRY
from scripts.bench_train import main, packed_batch


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_every_head_is_timed_beside_transformers(tmp_path, capsys):
    pytest.importorskip("transformers")
    main(["--size", "tiny", "--rows", "1", "--length", "192", "--rounds", "1", "--mtp-depth", "1", "--json", str(tmp_path / "costs.json")])
    costs = {cost["way"]: cost for cost in json.loads((tmp_path / "costs.json").read_text())}
    assert set(costs) == {*REGISTRY.names("head"), "modality_specific", "transformers"}
    assert costs["next"]["time_ratio"] == costs["next"]["memory_ratio"] == 1
    assert costs["next"]["parameters"] == costs["transformers"]["parameters"] < costs["shared"]["parameters"]
    assert costs["modality_specific"]["parameters"] > costs["next"]["parameters"]
    assert costs["sequential"]["peak"] > costs["next"]["peak"]
    table = capsys.readouterr().out
    assert all(f"| {way} |" in table for way in costs)


def test_whole_rows_are_one_document_each():
    many, one = packed_batch(2, 192, 0), packed_batch(2, 192, 0, whole=True)
    assert torch.equal(many.tokens, one.tokens)
    assert len(many.document_ids.unique()) > 1
    assert len(one.document_ids.unique()) == 1
