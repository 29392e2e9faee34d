import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmtp.config import ConfigError
from mmtp.data.encode import TokenizeConfig
from mmtp.data.errors import DataError
from mmtp.data.job import tokenize
from mmtp.data.loader import ShardDataset
from mmtp.data.media import encode_png
from mmtp.data.pairs import PairBatch, collate_pairs
from mmtp.hub import from_pretrained, save_pretrained
from mmtp.models.presets import preset
from mmtp.models.unified import UnifiedModel
from mmtp.nn.memory import PeakMemory
from mmtp.registry import REGISTRY
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.packing import PackDocument
from mmtp.stream.template import Turn, encode_document
from mmtp.stream.vocab import TextEntry, VocabLayout, VocabMismatch
from mmtp.testing.fakes import BlockTokenizer
from mmtp.tokenizers.text import TextTokenizer
from mmtp.train.preference import PreferenceLossConfig, compare, preference_loss
from mmtp.train.recipe import Recipe, run_recipe
from mmtp.types import Modality, Segment
from tests.models.common import BACKBONE, GRAMMAR, LAYOUT, model

COLOURS = {"red": (1.0, 0.0, 0.0), "blue": (0.0, 0.0, 1.0)}


def conversation(question: list[int], answer: Segment, layout: VocabLayout = LAYOUT) -> PackDocument:
    words = Segment(Modality.TEXT, torch.tensor(question), target=False)
    encoded = encode_document(layout, (Turn("user", (words,)), Turn("assistant", (answer,))))
    return PackDocument(encoded.tokens, encoded.target_mask)


def pairs() -> PairBatch:
    """Two pairs of words and one of pictures, which differ in length."""
    words = [Segment(Modality.TEXT, torch.tensor(ids)) for ids in ([5, 6], [7, 8, 9, 10], [11], [12])]
    pictures = [Segment(Modality.IMAGE, torch.randint(0, 40, (1, rows, 4))) for rows in (3, 2)]
    documents = [([1, 2], *words[:2]), ([3], *pictures), ([4], *words[2:])]
    return collate_pairs([(conversation(q, good), conversation(q, bad)) for q, good, bad in documents], GRAMMAR, 40)


def moved(net: UnifiedModel) -> UnifiedModel:
    """The same model with other weights."""
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return other


def log_probabilities(net: UnifiedModel, batch: PairBatch) -> list[list[tuple[Modality, Tensor, Tensor]]]:
    """Of every document the targets' modality, log-probability, and the distribution it comes from, with all logits in memory."""
    states = net(batch.rows)[0]
    found = [[] for _ in range(2 * batch.count)]
    for row, place in (batch.documents >= 0).nonzero().tolist():
        slot = LAYOUT.slots[int(batch.rows.slots[row, place])]
        if batch.rows.loss_mask[row, place] and slot.size > 1:
            ids = torch.tensor([i for low, high in slot.generable for i in range(low, high)])
            distribution = (states[row, place - 1] @ net.unembedding.weight[ids].T).log_softmax(0)
            picked = distribution[(ids == batch.rows.tokens[row, place]).nonzero()[0, 0]]
            found[int(batch.documents[row, place])].append((slot.modality, picked, distribution))
    return found


@pytest.mark.parametrize("chunk_rows", [5, 1024])
def test_equals_what_one_would_write_down(chunk_rows: int) -> None:
    batch, reference = pairs(), model(depth=1)
    net, config = moved(reference), PreferenceLossConfig(beta=0.3, modality_weights={"image": 0.5})
    own, other = log_probabilities(net, batch), log_probabilities(reference, batch)
    rewards = []
    for mine, theirs in zip(own, other, strict=True):
        parts = [config.modality_weights.get(m, 1.0) * (p - q.detach()) for (m, p, _), (_, q, _) in zip(mine, theirs, strict=True)]
        rewards.append(0.3 * torch.stack(parts).sum())
    differences = torch.stack([rewards[2 * i] - rewards[2 * i + 1] for i in range(batch.count)])
    wanted, margins = -torch.log(torch.sigmoid(differences)).mean(), differences.detach()
    loss, metrics = preference_loss(compare(net, reference, batch, chunk_rows), config)
    torch.testing.assert_close(loss, wanted)
    weights = [p for name, p in net.named_parameters() if not name.startswith("head.")]
    for mine, theirs in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(wanted, weights), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)

    assert metrics["margin"] == pytest.approx(float(margins.mean()), rel=1e-4)
    assert metrics["image.margin"] == pytest.approx(float(margins[1]), rel=1e-4)
    assert metrics["text.accuracy"] == pytest.approx(float((margins[[0, 2]] > 0).float().mean()))
    divergences = [
        [float(F.kl_div(q, p, reduction="sum", log_target=True).detach()) for (_, _, p), (_, _, q) in zip(mine, theirs, strict=True)]
        for mine, theirs in zip(own, other, strict=True)
    ]
    everything = [value for values in divergences for value in values]
    assert metrics["kl"] == pytest.approx(sum(everything) / len(everything), rel=1e-3)
    pictures = divergences[2] + divergences[3]
    assert metrics["image.kl"] == pytest.approx(sum(pictures) / len(pictures), rel=1e-3)


def test_costs_a_coin_toss_at_the_start() -> None:
    net = model(depth=1)
    loss, metrics = preference_loss(compare(net, copy.deepcopy(net), pairs()), PreferenceLossConfig())
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert metrics["margin"] == metrics["kl"] == 0


def test_memory_is_that_of_a_chunk() -> None:
    wide = VocabLayout(TextEntry("words", 20_000), (), 16)
    answers = [Segment(Modality.TEXT, torch.randint(0, 20_000, (60,))) for _ in range(2)]
    batch = collate_pairs([(conversation([1], answers[0], wide), conversation([1], answers[1], wide))], StreamGrammar(wide), 80)
    net = UnifiedModel.Config(layout=wide, backbone=BACKBONE).build()
    reference = copy.deepcopy(net)

    def peak(chunk_rows: int) -> int:
        with PeakMemory() as memory:
            preference_loss(compare(net, reference, batch, chunk_rows), PreferenceLossConfig())[0].backward()
        net.zero_grad()
        return memory.peak

    assert peak(8) < 0.5 * peak(1024)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of answers and of pictures over one vocabulary, and an untrained model."""
    root = tmp_path_factory.mktemp("data")
    names = list(COLOURS)
    block, text = BlockTokenizer(BlockTokenizer.Config()), TextTokenizer.train(["what color? red blue", "draw a red square"] * 3, 280)
    for name, colour in COLOURS.items():
        (root / f"{name}.png").write_bytes(encode_png(torch.tensor(colour)[:, None, None].expand(3, 16, 16)))
    with pytest.MonkeyPatch.context() as patch:
        register_block(patch)
        for kind in ("chosen", "rejected"):
            lines = []
            for i, name in enumerate(names):
                told = name if kind == "chosen" else names[1 - i]
                lines.append({"key": f"vqa{i}", "image": f"{name}.png", "questions": [["what color?", told]]})
                lines.append({"key": f"draw{i}", "image": f"{told}.png", "caption": f"a {name} square"})
            for task in ("vqa", "draw"):
                path = root / f"{task}-{kind}.jsonl"
                path.write_text("".join(json.dumps(line) + "\n" for line in lines if line["key"].startswith(task)))
                config = TokenizeConfig(tasks=(task,), max_dim=8)
                made = tokenize(path, root / task / kind, tokenizer=block, text=text, config=config)
                assert made.totals.ok == 2
    torch.manual_seed(1)
    save_pretrained(preset("tiny", ShardDataset(root / "vqa/chosen").layout).build(), root / "start")
    return root


def register_block(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(REGISTRY, "_families", {family: dict(entries) for family, entries in REGISTRY._families.items()})
    REGISTRY.register("tokenizer", "block", "mmtp.testing.fakes:BlockTokenizer")


def recipe(root: Path, **changes: dict) -> Recipe:
    tables = {
        "task": "preference",
        "model": {"start": str(root / "start")},
        "data": {"chosen": ["vqa/chosen", "draw/chosen"], "rejected": ["vqa/rejected", "draw/rejected"], "budget": 64},
        "loss": {},
        "optim": {"lr": 3e-3, "warmup": 2, "flat": 1.0},
        "run": {"steps": 16, "batch": 4, "log_every": 1, "checkpoint_every": 4},
    }
    return Recipe.from_dict({key: {**value, **changes.get(key, {})} if isinstance(value, dict) else value for key, value in tables.items()})


def records(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if not k.endswith("_per_second")} for record in found]


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run_recipe(recipe(root), folder, data_root=root, progress=False)
    return folder


def test_prefers_what_was_chosen_in_words_and_in_pictures(root: Path, whole: Path) -> None:
    first, *_, last = records(whole)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert last["loss"] < 0.5 * first["loss"]
    for kind in ("", "text.", "image."):
        assert first[f"{kind}margin"] == pytest.approx(0, abs=1e-6)
        assert first[f"{kind}kl"] == pytest.approx(0, abs=1e-6)
        assert last[f"{kind}margin"] > 0.5
        assert last[f"{kind}accuracy"] == 1
        assert last[f"{kind}kl"] > 1e-3
    before, after = (from_pretrained(folder).state_dict() for folder in (root / "start", whole / "result"))
    for name, value in before.items():
        assert torch.equal(after[name], value) == name.startswith("head."), name


def test_goes_on_to_the_same_bits(root: Path, whole: Path, tmp_path: Path) -> None:
    for steps in (6, 16):
        run_recipe(recipe(root, run={"steps": steps}), tmp_path / "run", data_root=root, progress=False)
    assert records(tmp_path / "run") == records(whole)
    one, other = (from_pretrained(folder / "result").state_dict() for folder in (whole, tmp_path / "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_reference_of_its_own(root: Path, whole: Path, tmp_path: Path) -> None:
    changes = {"loss": {"reference": str(whole / "result")}, "run": {"steps": 1}}
    run_recipe(recipe(root, **changes), tmp_path / "run", data_root=root, progress=False)
    (record,) = records(tmp_path / "run")
    assert record["margin"] < -0.5
    assert record["kl"] > 1e-3


def test_refuses_a_reference_of_another_vocabulary(root: Path, tmp_path: Path) -> None:
    save_pretrained(preset("tiny", LAYOUT).build(), tmp_path / "other")
    with pytest.raises(VocabMismatch, match=r"other: text tokenizer is 'words'"):
        run_recipe(recipe(root, loss={"reference": str(tmp_path / "other")}), tmp_path / "run", data_root=root, progress=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"start": "", "preset": "tiny"}}, "give 'start', a saved one"),
        ({"model": {"train": "head"}}, "leave out train = 'head' and 'compile'"),
        ({"loss": {"beta": 0}}, "beta 0: above 0 is wanted"),
        ({"loss": {"modality_weights": {"picture": 1.0}}}, "'picture' is no modality"),
        ({"data": {"rejected": ["vqa/rejected"]}}, "2 data sets of chosen and 1 of rejected"),
        ({"data": {"rejected": ["draw/chosen", "draw/rejected"]}}, "no document of one has the key"),
        ({"data": {"shards": ["x"]}}, "data: unknown key 'shards'"),
    ],
)
def test_names_what_is_wrong_in_a_recipe(root: Path, tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises((ConfigError, DataError), match=words):
        run_recipe(recipe(root, **changes), tmp_path / "run", data_root=root, progress=False)
