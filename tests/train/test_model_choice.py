"""Which model a recipe trains, and what it starts from."""

from pathlib import Path

import pytest
import torch

from mmtp import cli
from mmtp.config import ConfigError
from mmtp.data.encode import TokenizeConfig
from mmtp.data.job import tokenize
from mmtp.data.loader import PackedBatches, ShardDataset
from mmtp.hub import from_pretrained, save_pretrained
from mmtp.models.presets import preset
from mmtp.stream.vocab import MediaEntry, TextEntry, VocabLayout
from mmtp.train.model_choice import ModelChoice
from mmtp.train.recipe import Recipe, run_recipe
from mmtp.types import Modality
from tests.models.common import LAYOUT, model
from tests.models.test_refiner import random_refiner


def test_a_refiner_stays_with_the_backbone_that_it_was_made_for(tmp_path: Path) -> None:
    net = model(depth=2)
    net.refiner = random_refiner()
    save_pretrained(net, tmp_path / "known")
    head = {"type": "parallel", "mtp_depth": 1}
    kept = [ModelChoice(start=str(tmp_path / "known"), train="head", **changes).model(LAYOUT) for changes in ({}, {"head": head})]
    assert all(torch.equal(each.refiner.told, net.refiner.told) for each in kept)
    assert ModelChoice(start=str(tmp_path / "known")).model(LAYOUT).refiner is None


def test_a_model_learns_a_medium_that_is_new_to_it_and_keeps_what_it_knows(root: Path, tmp_path: Path) -> None:
    known = ShardDataset(root / "shards").layout
    before = preset("tiny", known).build().eval()
    save_pretrained(before, tmp_path / "known")
    speech = MediaEntry(Modality.AUDIO, "speech", "f", (40, 40))
    choice = ModelChoice(start=str(tmp_path / "known"), head={"type": "synchronized", "mtp_depth": 2})
    layout = choice.layout(VocabLayout(TextEntry("words", 50, "t"), (speech,), 12))
    assert [entry.name for entry in layout.media] == [known.media[0].name, "speech"] and (layout.text.size, layout.max_dim) == (50, 12)
    after = choice.model(layout).eval()
    ids = torch.from_numpy(layout.ids_of(known)[: known.used])
    assert not torch.equal(ids, torch.arange(known.used))
    for table in ("embedding.table.weight", "unembedding.weight"):
        old, new = (net.state_dict()[table] for net in (before, after))
        assert torch.equal(new[ids], old[: known.used])
    batches = [PackedBatches(ShardDataset(root / "shards"), rows=2, budget=64, layout=over).batch(0) for over in (known, layout)]
    states = [net(batch, drafts=False)[0] for net, batch in zip((before, after), batches, strict=True)]
    assert torch.equal(states[0], states[1])


def test_a_language_model_learns_pictures_and_leaves_again(school: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a checkpoint of transformers to shards, a recipe, a checkpoint of transformers, and the next recipe."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(school)  # where the vocabulary's "cells" are
    start = f"transformers:{school}/tongue"
    tasks = TokenizeConfig(tasks=("vqa", "draw"), max_dim=8)
    tokenize(school / "pictures", tmp_path / "shards", tokenizer="cells", text=start, config=tasks)
    recipe = {
        "task": "model",
        "model": {"start": start, "head": {"type": "sequential", "mtp_depth": 1}, "codebook_init": True},
        "data": {"shards": ["shards"], "budget": 64},
        "optim": {"lr": 1e-3},
        "run": {"steps": 4, "batch": 2},
    }
    known = ShardDataset(tmp_path / "shards").layout
    assert known.text.name == start
    choice = ModelChoice.from_dict(recipe["model"])
    layout = choice.layout(known)
    before, theirs = choice.model(layout), transformers.AutoModelForCausalLM.from_pretrained(school / "tongue").state_dict()
    (lo, hi), codes = layout.text_range, slice(*layout.code_range(Modality.IMAGE))
    for table, name in ((before.embedding.table, "model.embed_tokens.weight"), (before.unembedding, "lm_head.weight")):
        rows, words = table.weight.detach(), theirs[name][: hi - lo]
        assert torch.equal(rows[lo:hi], words)
        assert 0.2 * words.std() < (rows[codes] - words.mean(0)).std() < 0.4 * words.std()
    result = run_recipe(Recipe.from_dict(recipe), tmp_path / "run", data_root=tmp_path, progress=False)
    trained = from_pretrained(result)
    assert trained.config == before.config and not torch.equal(trained.embedding.table.weight[codes], before.embedding.table.weight[codes])
    assert cli.run(["export", str(result), str(tmp_path / "out")]) == 0
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    again = ModelChoice(start=f"transformers:{tmp_path}/out")
    layout = again.layout(known)
    assert layout == trained.config.layout
    for name, value in again.model(layout).state_dict().items():
        assert torch.equal(value, trained.state_dict()[name])


def test_overrides_of_a_preset_reach_the_model() -> None:
    choice = ModelChoice(preset="tiny", backbone={"depth": 3}, head={"type": "next"})
    model = choice.model(LAYOUT)
    assert len(model.backbone.blocks) == 3
    assert model.head.mtp_depth == 0
    with pytest.raises(ConfigError, match="has its own"):
        ModelChoice(start="somewhere", backbone={"depth": 3}).model(LAYOUT)


def test_codes_that_look_alike_begin_alike() -> None:
    tokenizers = {name: from_pretrained(name) for name in ("text-bpe-4k", "image-fsq-f8")}
    layout = VocabLayout.of(tokenizers)
    low, high = layout.code_range(Modality.IMAGE)
    vectors = tokenizers["image-fsq-f8"].codebook_vectors()
    near, far = (torch.cdist(vectors[:1], vectors)[0].topk(2, largest=largest).indices[-1] for largest in (False, True))
    tied = ModelChoice(preset="tiny", codebook_init=True).model(layout)
    untied = ModelChoice(preset="tiny", codebook_init=True, tie_embeddings=False).model(layout)
    assert tied.unembedding is tied.embedding.table and untied.unembedding is not untied.embedding.table
    for table in (tied.embedding.table, untied.embedding.table, untied.unembedding):
        codes = table.weight[low:high]
        assert torch.dist(codes[0], codes[near]) < 0.7 * torch.dist(codes[0], codes[far])
    with pytest.raises(ConfigError, match="belong to a preset"):
        ModelChoice(start="somewhere", tie_embeddings=False).model(layout)


def test_media_get_weights_of_their_own_that_begin_as_copies(root: Path, tmp_path: Path) -> None:
    known = ShardDataset(root / "shards").layout
    before = preset("tiny", known).build().eval()
    save_pretrained(before, tmp_path / "dense")
    choice = ModelChoice(start=str(tmp_path / "dense"), backbone={"modality_specific": "mlp"})
    mixed = choice.model(known).eval()
    save_pretrained(mixed, tmp_path / "mixed")
    speech = MediaEntry(Modality.AUDIO, "speech", "f", (40,))
    choice = ModelChoice(start=str(tmp_path / "mixed"), head={"type": "next"})
    layout = choice.layout(VocabLayout(TextEntry("words", 50, "t"), (speech,), 12))
    further = choice.model(layout).eval()
    mlp = further.backbone.blocks[0].mlp
    assert list(mlp) == ["text", "image", "audio"] and torch.equal(mlp["audio"].down.weight, mlp["text"].down.weight)
    batches = [PackedBatches(ShardDataset(root / "shards"), rows=2, budget=64, layout=over).batch(0) for over in (known, known, layout)]
    with torch.no_grad():
        states = [net(batch, drafts=False)[0] for net, batch in zip((before, mixed, further), batches, strict=True)]
    torch.testing.assert_close(states[1], states[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(states[2], states[1], atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match="media of .*mixed have more of their own \\('mlp'\\) to lose"):
        ModelChoice(start=str(tmp_path / "mixed"), backbone={"modality_specific": "none"}).model(known)


def test_a_model_gets_cross_attention_to_vectors_with_closed_gates(root: Path, tmp_path: Path) -> None:
    known = ShardDataset(root / "shards").layout
    before = preset("tiny", known).build().eval()
    save_pretrained(before, tmp_path / "plain")
    choice = ModelChoice(start=str(tmp_path / "plain"), backbone={"cross_attention_every": 2}, train="features")
    layout = choice.layout(VocabLayout(None, (MediaEntry(Modality.IMAGE, "vit"),), 12))
    after = choice.model(layout, feature_width=6).eval()
    save_pretrained(after, tmp_path / "crossed")
    batches = [PackedBatches(ShardDataset(root / "shards"), rows=2, budget=64, layout=over).batch(0) for over in (known, layout)]
    with torch.no_grad():
        states = [net(batch, drafts=False)[0] for net, batch in zip((before, from_pretrained(tmp_path / "crossed")), batches, strict=True)]
    torch.testing.assert_close(*states)
    learns = {name.split(".")[1] for name, weight in after.named_parameters() if weight.requires_grad}
    assert learns == {"features", "cross"} and len(after.backbone.cross) == 1
    with pytest.raises(ConfigError, match="cross_attention_every is for a model that reads no vectors yet"):
        ModelChoice(start=str(tmp_path / "crossed"), backbone={"cross_attention_every": 0}).model(layout, feature_width=6)


def test_an_outline_is_the_model_without_weights(root: Path) -> None:
    layout = ShardDataset(root / "shards").layout
    choice = ModelChoice(preset="tiny", train="head", dropout=0.1, backbone={"modality_specific": "mlp"})
    made, outline = choice.model(layout), choice.outline(layout)
    assert {name: (p.shape, p.requires_grad) for name, p in made.named_parameters()} == {
        name: (p.shape, p.requires_grad) for name, p in outline.named_parameters() if p.is_meta
    }
    assert all(torch.equal(buffer, outline.get_buffer(name)) for name, buffer in made.named_buffers())
    assert [getattr(part, "dropout", 0) for part in made.modules()] == [getattr(part, "dropout", 0) for part in outline.modules()]
