"""A small healthy model passes; each thing that is broken in it is told by name."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmtp import cli, hub
from mmtp.eval.drafts import Drafting
from mmtp.models.heads.base import BELOW
from mmtp.models.heads.sequential import SequentialHead
from mmtp.models.loss import LossConfig
from mmtp.models.unified import UnifiedModel
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.packing import collate
from mmtp.stream.template import TEMPLATES, Sample, encode_document
from mmtp.stream.vocab import VocabLayout
from mmtp.testing.doctor import (
    DoctorError,
    check_drafts,
    check_golden,
    check_kernels,
    check_libraries,
    check_vocabulary,
    check_weights,
    examine,
    example_prompts,
    judge_acceptance,
    read_acceptance,
)
from mmtp.testing.fakes import BlockTokenizer
from mmtp.testing.golden import Golden, model_golden, write_golden
from mmtp.tokenizers.text import TextTokenizer
from mmtp.types import Modality, Segment
from tests.models.common import BACKBONE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers ``words`` and ``blocks``, and a model that has learnt a picture and an answer by heart, with its golden file."""
    from mmtp.registry import REGISTRY

    root = tmp_path_factory.mktemp("zoo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(REGISTRY, "_families", {family: dict(entries) for family, entries in REGISTRY._families.items()})
        REGISTRY.register("tokenizer", "block", "mmtp.testing.fakes:BlockTokenizer")
        patch.setattr(hub, "zoo_root", lambda family: root / hub.ZOO_FOLDERS[family])
        words = TextTokenizer.train(["draw a blue circle", "what is it"] * 4, 280)
        tokenizers = {"words": words, "blocks": BlockTokenizer.Config(block=16, levels=16).build()}
        for name, tokenizer in tokenizers.items():
            hub.save_pretrained(tokenizer, root / "tokenizers" / name)
        layout = VocabLayout.of(tokenizers, 4)
        torch.manual_seed(0)
        net = UnifiedModel.Config(layout=layout, backbone=BACKBONE, head=SequentialHead.Config(mtp_depth=2)).build()
        torch.nn.init.normal_(net.embedding.table.weight, std=0.3)
        picture = Segment(Modality.IMAGE, torch.randint(0, 16, (3, 4, 4)))
        drawn = Sample(picture, ("a blue circle",), (("what is it?", "it is a circle, and it is blue"),))
        encoded = [encode_document(layout, TEMPLATES[task](drawn, words.encode_text)[0]) for task in ("draw", "vqa")]
        batch = collate([(e.tokens, e.target_mask) for e in encoded], StreamGrammar(layout), 220)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            net.loss(batch, LossConfig(mtp_weight=1.0, detach=False)).total.backward()
            optimizer.step()
        hub.save_pretrained(net.eval(), root / "models" / "healthy")
        golden = model_golden(net, torch.from_numpy(encoded[1].tokens))
        write_golden(root / "models" / "healthy" / "golden.safetensors", Golden(golden, 1e-4))
        yield root


@pytest.fixture
def model(zoo: Path) -> UnifiedModel:
    return hub.from_pretrained("healthy")


def states(findings) -> dict[str, set[str]]:
    return {f.check: {g.state for g in findings if g.check == f.check} for f in findings}


def test_a_healthy_model_passes(zoo: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert cli.run(["doctor", "healthy", "--seeds", "1", "--json", str(tmp_path / "found.json")]) == 0
    shown = capsys.readouterr().out
    assert "nothing wrong" in shown and '"wrong": 0' in (tmp_path / "found.json").read_text()
    for said in ("image: 2 of 2 streams equal", "text: 2 of 2 streams equal", "reproduced to", "8 of 8 equal", "no token moved"):
        assert said in shown
    line = next(line for line in shown.splitlines() if "random drafts of image" in line)
    ((before, after),) = re.findall(r"image (\d+)% → (\d+)%", line)
    assert int(after) < int(before)


def test_a_head_with_random_weights_is_named(model: UnifiedModel) -> None:
    torch.manual_seed(1)
    for weight in model.head.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    prompts = [replace(p, max_new_tokens=40) for p in example_prompts(model.config.layout, None, None, "a blue circle", 1)[1:]]
    findings = check_drafts(model, prompts, {}, lambda check: None)
    wrong = [f for f in findings if f.state == "wrong"]
    assert {f.check for f in wrong} == {"acceptance"} and all("head untrained or broken" in f.advice for f in wrong)
    assert any(f.said.startswith("image +1: ") for f in wrong)


def test_a_weight_that_is_no_number_is_named(model: UnifiedModel, zoo: Path) -> None:
    assert check_weights(model).state == "ok"
    name = next(name for name, _ in model.named_parameters() if name.startswith("backbone.blocks.1."))
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[:3] = torch.tensor([float("nan"), float("inf"), float("nan")])
    found = check_weights(model)
    assert found.state == "wrong" and found.said.startswith(f"{name}: 3 of ")
    hub.save_pretrained(model, zoo / "damaged")
    findings = examine(zoo / "damaged")
    assert {f.check for f in findings if f.state == "wrong"} == {"weights"}
    assert findings[-1].check == "decoding" and "not tried" in findings[-1].said


def test_another_tokenizer_is_named(model: UnifiedModel, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, pipeline = check_vocabulary(zoo / "models" / "healthy", model)
    assert found.state == "ok" and pipeline is not None
    other = hub.save_pretrained(BlockTokenizer.Config(block=8, levels=16).build(), zoo / "other")
    find = hub.find
    monkeypatch.setattr(hub, "find", lambda name: other if name == "blocks" else find(name))
    found, pipeline = check_vocabulary(zoo / "models" / "healthy", model)
    assert found.state == "wrong" and pipeline is None
    assert "image tokenizer is 'blocks' (fingerprint" in found.said


def test_a_golden_file_that_is_not_reproduced_is_told(model: UnifiedModel, zoo: Path, tmp_path: Path) -> None:
    assert check_golden(zoo / "models" / "healthy", model)[0].state == "ok"
    with torch.no_grad():
        model.backbone.norm.weight.mul_(1.1)
    found, golden = check_golden(zoo / "models" / "healthy", model)
    assert found.state == "wrong" and "logprobs[0]: off by" in found.said and golden is not None
    assert check_golden(tmp_path, model)[0].state == "note"


def test_kernels_that_do_not_repeat_themselves_are_told(model: UnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = example_prompts(model.config.layout, None, None, "a blue circle", 1)[0]
    assert states(check_kernels(model, prompt)) == {"kernels": {"ok"}, "choices": {"ok"}}
    extend = model.extend
    monkeypatch.setattr(model, "extend", lambda *given: (out := extend(*given)) + 20 * torch.randn_like(out), raising=False)
    assert states(check_kernels(model, prompt)) == {"kernels": {"wrong"}, "choices": {"wrong"}}


def drafting(drafted: dict, accepted: dict) -> Drafting:
    return Drafting([], Counter(drafted), Counter(accepted))


def test_acceptance_is_judged_by_chance_card_and_perfection() -> None:
    one, two, below, text = ("image", 1), ("image", 2), ("image", BELOW), ("text", 1)
    chance = drafting({one: 400, two: 400, below: 400, text: 400}, {one: 20, two: 8, below: 20, text: 2})

    def found(drafted: dict, accepted: dict, card: dict | None = None) -> list[tuple[str, str]]:
        return [(f.state, f.advice) for f in judge_acceptance(drafting(drafted, accepted), chance, card or {})]

    assert found({one: 400}, {one: 300}) == [("ok", "")]
    for key in (one, below, text):
        ((state, advice),) = found({key: 400}, {key: 1})
        assert state == "wrong" and f"head untrained or broken: its drafts of {key[0]} add cost" in advice
    assert found({two: 400}, {two: 5})[0][0] == "note"
    assert found({one: 10}, {}) == [("ok", "")]  # too few to judge
    assert found({one: 400}, {one: 100}, {("image", "+1"): 0.78})[0][1].startswith("far below the card")
    assert found({one: 400}, {one: 400})[0][1].startswith("suspicious") and found({text: 400}, {text: 400}) == [("ok", "")]


def test_the_card_tells_what_was_accepted(tmp_path: Path) -> None:
    found = read_acceptance(ROOT / "models" / "vqa-s" / "README.md")
    assert found["image", "+1"] == 0.78 and found["text", "+4"] == 0.2 and len(found) == 8
    assert read_acceptance(tmp_path / "README.md") == {}


def test_versions_outside_of_their_range_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {f.state for f in check_libraries()} <= {"ok", "note"}
    wanted = ["torch<2", "no-such-thing>=1", "transformers<2; extra == 'hf'", "numpy>=1.26"]
    monkeypatch.setattr("mmtp.testing.doctor.metadata.requires", lambda name: wanted)
    torch_, missing, extra = check_libraries()
    assert torch_.state == "wrong" and torch_.said.startswith(f"torch {torch.__version__.partition('+')[0]}")
    assert missing.state == "wrong" and missing.said == "no-such-thing is missing" and missing.advice == "pip install 'no-such-thing>=1'"
    assert extra.state == "note" and "transformers" in extra.said


def test_a_tokenizer_is_no_patient(zoo: Path) -> None:
    with pytest.raises(DoctorError, match="blocks: is a BlockTokenizer; mmtp doctor examines models"):
        examine("blocks")
