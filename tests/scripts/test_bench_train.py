import json

import pytest
import torch

from mmtp.models.loss import plan_targets
from mmtp.registry import REGISTRY
from scripts.bench_train import LAYOUT, SIZES, Setting, build, main, measure, packed_batch


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


@pytest.mark.parametrize("whole", [False, True])
def test_flops_are_those_of_parameters_documents_and_allowed_ids(whole):
    setting = Setting(size=SIZES["tiny"], rows=2, length=192, whole=whole, precision="float32")
    batch = packed_batch(2, 192, 0, whole)
    (cost,) = measure(["next"], setting, 1, 1e12)
    model, _ = build("next", setting)
    weights = sum(layer.weight.numel() for layer in model.backbone.modules() if isinstance(layer, torch.nn.Linear))
    logits = sum(len(item.rows) * item.choices for item in plan_targets(batch, LAYOUT, inputs=("text", "image")))
    lengths = [int(n) for row in batch.document_ids for n in row[row >= 0].unique(return_counts=True)[1]]
    assert lengths == [192, 192] if whole else max(lengths) < 100
    size = setting.size
    attention = 12 * size.depth * size.num_heads * size.head_dim * sum(n * n for n in lengths)
    # PaLM, appendix B, but for logits: only of the ids that a place allows.
    assert cost.flops == 6 * weights * batch.tokens.numel() + 6 * size.width * logits + attention
    assert cost.mfu == pytest.approx(cost.flops / cost.median / 1e12)


def test_drafts_from_a_part_of_the_positions_take_fewer_flops():
    every, some = (Setting(size=SIZES["tiny"], rows=1, length=192, precision="float32", anchors=share) for share in (1.0, 0.125))
    flops = {}
    for name, setting in (("every", every), ("some", some)):
        flops |= {(name, cost.way): cost.flops for cost in measure(["next", "sequential"], setting, 1, 1e12)}
    assert flops["every", "next"] == flops["some", "next"] < flops["some", "sequential"] < flops["every", "sequential"]


def test_the_size_for_accelerators_has_350_million_parameters():
    with torch.device("meta"):
        model, _ = build("next", Setting(size=SIZES["350m"], device=torch.device("meta")))
    assert model.num_parameters() == pytest.approx(350e6, rel=0.01)


def test_what_a_cpu_cannot_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--attention", "flex"])
    assert "FlexAttention has no backward pass on a CPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_an_accelerator_is_timed_and_its_utilisation_told(tmp_path):
    command = "--size tiny --rows 1 --length 256 --whole-rows --rounds 1 --attention flex --ways sequential next_compiled"
    main([*command.split(), "--json", str(tmp_path / "costs.json")])
    costs = {cost["way"]: cost for cost in json.loads((tmp_path / "costs.json").read_text())}
    assert set(costs) == {"next", "sequential", "next_compiled"}
    assert all(0 < cost["mfu"] < 1 for cost in costs.values())
    assert costs["sequential"]["memory_ratio"] > 1
