import builtins
import contextlib
import json
import math
import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mmtp import hub
from mmtp.data import job, storage
from mmtp.data.encode import TokenizeConfig
from mmtp.data.errors import DataError
from mmtp.data.job import tokenize
from mmtp.data.loader import PackedBatches, ShardDataset
from mmtp.data.manifest import Totals
from mmtp.data.media import decode_image
from mmtp.data.storage import DiskFullError, Journal, Share, locked
from mmtp.data.verify import verify
from mmtp.models.backbone import BackboneConfig
from mmtp.models.connector import Connector, Projector, Resampler
from mmtp.models.loss import LossConfig
from mmtp.models.unified import UnifiedModel
from mmtp.stream.grammar import StreamGrammar
from mmtp.stream.template import TEMPLATES
from mmtp.stream.vocab import Special
from mmtp.stream.words import skeleton, speeches
from mmtp.tokenizers.audio.frame import FrameAudioTokenizer
from mmtp.tokenizers.continuous.patches import PatchAudioTokenizer, PatchImageTokenizer
from mmtp.tokenizers.continuous.vit import TimmViT
from mmtp.tokenizers.image.conv import ConvImageTokenizer
from mmtp.tokenizers.quantizers import FSQ
from mmtp.tokenizers.text import TextTokenizer
from mmtp.train.model_choice import ModelChoice
from mmtp.train.model_trainer import metrics

BAD = {
    "b/cut.png": "truncated",
    "b/empty.png": "empty",
    "b/gone.png": "missing",
    "b/text.png": "not-media",
    "b/wide.png": "not-encodable",
}
CONFIG = TokenizeConfig(tasks=("vqa", "draw"), questions_per_document=2, shard_inputs=4)


def make(pictures: Path, out: Path, tokenizers: dict[str, Path], **options: Any) -> Any:
    settings = {"tokenizer": tokenizers["image"], "text": tokenizers["text"], "config": CONFIG} | options
    return tokenize(pictures, out, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    """Everything but the journal, whose lines come in the order in which shards were finished."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith((".", "journal"))}


@pytest.fixture
def whole(pictures: Path, tmp_path: Path, tokenizers: dict[str, Path]) -> dict[str, bytes]:
    """What an uninterrupted run gives."""
    make(pictures, tmp_path / "whole", tokenizers)
    return contents(tmp_path / "whole")


def test_inputs_are_ok_or_quarantined(pictures: Path, tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    calls: list[tuple[int, int, Totals]] = []
    outcome = make(pictures, tmp_path / "out", tokenizers, progress=lambda *args: calls.append(args))
    assert outcome.complete
    assert (outcome.totals.ok, outcome.totals.quarantined, outcome.made, outcome.kept) == (24, 5, 8, 0)
    assert outcome.totals.reasons == dict.fromkeys(sorted(BAD.values()), 1)
    lines = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert {line["key"]: line["reason"] for line in lines} == BAD
    assert {line["key"]: line["detail"] for line in lines}["b/gone.png"] == "no such file"
    wide = "image of 2x70 cells: this vocabulary's dims reach from 1 to 64; crop or shrink it"
    assert {line["key"]: line["detail"] for line in lines}["b/wide.png"] == wide
    assert [done for done, total, _ in calls if total == 29] == [0, *range(4, 29, 4), 29]
    assert verify(tmp_path / "out").problems == ()


def test_documents_say_what_the_input_says(pictures: Path, tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    make(pictures, tmp_path / "out", tokenizers)
    dataset = ShardDataset(tmp_path / "out")
    grammar = StreamGrammar(dataset.layout)
    text, image = (hub.from_pretrained(tokenizers[name]) for name in ("text", "image"))
    rows = {row.key: row for row in dataset}
    # Pictures have one, two or three questions (two to a document) and a caption to draw from.
    assert sorted(key for key in rows if key.startswith("a/02")) == [f"a/02.png#{i}" for i in range(3)]
    row = rows["a/02.png#0"]
    assert row.meta == {"input": "a/02.png", "task": "vqa", "size": [16, 16], "caption": "a red circle"}
    (span,) = grammar.spans(row.tokens)
    pixels = np.asarray(Image.open(pictures / "a/02.png"))
    codes = image.encode([torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255]).item(0)
    np.testing.assert_array_equal(grammar.codes(row.tokens, span), codes)
    assert text.decode_text(dataset.layout.text_ids(row.tokens).tolist()) == "is there a circle?yeswhat color is the shape?red"
    targets = row.tokens[row.target_mask]
    assert text.decode_text(dataset.layout.text_ids(targets).tolist()) == "yesred"
    draw = rows["a/02.png#2"]
    assert draw.meta["task"] == "draw"
    assert text.decode_text(dataset.layout.text_ids(draw.tokens).tolist()) == "draw a red circle"
    assert int(draw.target_mask.sum()) == 2 * 2 + 3 + 1 + 2  # codes, opener and dims, closer, <end> and <eos>


def test_size_brings_all_pictures_to_one_grid(pictures: Path, tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    config = TokenizeConfig(size=(32, 24))
    outcome = make(pictures, tmp_path / "out", tokenizers, config=config, text=None)
    assert outcome.totals.ok == 25  # the wide one fits now
    dataset = ShardDataset(tmp_path / "out")
    assert set(dataset.lengths.tolist()) == {4 * 3 + 6}
    assert {tuple(row.meta["size"]) for row in dataset} == {(32, 24)}
    assert dataset.layout.text is None


def test_flips_are_further_documents(pictures: Path, tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    outcome = make(pictures, tmp_path / "out", tokenizers, config=TokenizeConfig(flips="all"), text=None)
    assert (outcome.totals.ok, outcome.totals.rows) == (24, 24 * 4)


def test_every_wording_of_a_caption_is_a_document(pictures: Path, tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    config = TokenizeConfig(tasks=("draw", "plain"), captions=("{caption}", "a picture: {caption}", "{caption} of {nobody}"))
    outcome = make(pictures, tmp_path / "out", tokenizers, config=config)
    assert outcome.totals.rows == outcome.totals.ok * 3
    with pytest.raises(DataError, match="task say: is for audio, and this tokenizer reads image"):
        make(pictures, tmp_path / "said", tokenizers, config=TokenizeConfig(tasks=("say",)))


def test_shifts_are_moved_copies(pictures: Path, tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    config = TokenizeConfig(size=(32, 32), shifts=2)
    outcome = make(pictures, tmp_path / "out", tokenizers, config=config, text=None)
    assert (outcome.totals.ok, outcome.totals.rows) == (25, 25 * 3)
    make(pictures, tmp_path / "again", tokenizers, config=config, text=None)
    rows, again = ({row.key: row.tokens.tolist() for row in ShardDataset(tmp_path / name)} for name in ("out", "again"))
    assert rows == again
    # Random offsets may be 0; some of 50 are not.
    assert sum(rows[f"{key[:-2]}#0"] != tokens for key, tokens in rows.items() if not key.endswith("#0")) > 25


def test_labels_that_do_not_fit_go_to_quarantine(pictures: Path, tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    (pictures / "a/00.txt").unlink()
    (pictures / "a/02.json").write_text('{"questions": [["only a question"]]}')
    (pictures / "a/04.json").write_text('{"caption": 7}')
    make(pictures, tmp_path / "out", tokenizers, config=TokenizeConfig(tasks=("draw",)))
    lines = map(json.loads, (tmp_path / "out/quarantine.jsonl").read_text().splitlines())
    found = {line["key"]: (line["reason"], line["detail"]) for line in lines if line["key"].startswith("a/")}
    assert found == {
        "a/00.png": ("no-labels", "no labels for draw; it has questions"),
        "a/02.png": ("bad-labels", "questions: a list of [question, answer] is wanted, [['only a question']] given"),
        "a/04.png": ("bad-labels", "caption: a string is wanted, 7 given"),
    }


def test_running_again_makes_nothing(pictures: Path, tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    make(pictures, tmp_path / "out", tokenizers)
    before = contents(tmp_path / "out")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.arrow")}
    outcome = make(pictures, tmp_path / "out", tokenizers)
    assert (outcome.made, outcome.kept, outcome.totals.ok) == (0, 8, 24)
    assert contents(tmp_path / "out") == before
    assert {p: p.stat().st_mtime_ns for p in times} == times


@pytest.mark.parametrize("name", ["shard-00003.arrow", "journal.jsonl", "plan.arrow", "quarantine.jsonl", "dataset.json"])
def test_what_is_lost_is_made_anew(name: str, pictures: Path, tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    make(pictures, tmp_path / "out", tokenizers)
    before = contents(tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    outcome = make(pictures, tmp_path / "out", tokenizers)
    assert outcome.made == {"shard-00003.arrow": 1, "journal.jsonl": 8}.get(name, 0)
    assert contents(tmp_path / "out") == before


def test_torn_journal_line_is_tolerated(pictures: Path, tmp_path: Path, tokenizers: dict[str, Path], whole: dict[str, bytes]) -> None:
    make(pictures, tmp_path / "out", tokenizers)
    path = tmp_path / "out/journal.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    outcome = make(pictures, tmp_path / "out", tokenizers)
    assert (outcome.made, outcome.kept) == (1, 7)
    assert contents(tmp_path / "out") == whole
    assert Journal(path).read()[1] == []


def test_changes_are_refused_by_name(pictures: Path, tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    out = tmp_path / "out"
    make(pictures, out, tokenizers)
    before = contents(out)
    other = tmp_path / "img"
    hub.save_pretrained(ConvImageTokenizer.Config(patch=4, widths=(4, 4), encoder_blocks=(1, 1), decoder_blocks=(1, 1)).build(), other)
    prints = [hub.from_pretrained(folder).spec.fingerprint for folder in (tokenizers["image"], other)]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tokenizer": other}, f"tokenizer 'img' had the fingerprint {prints[0]}, now {prints[1]}"),
        ({"config": TokenizeConfig(tasks=("vqa",), questions_per_document=2, shard_inputs=4)}, "tasks was ['vqa', 'draw'], now ['vqa']"),
        ({"config": TokenizeConfig(tasks=("vqa", "draw"), shard_inputs=4)}, "questions_per_document was 2, now 1"),
    ]
    for options, words in cases:
        with pytest.raises(DataError) as caught:
            make(pictures, out, tokenizers, **options)
        assert (
            str(caught.value) == f"{out}: was begun otherwise, and is not mixed: {words}; choose another --out, or go back to what it was"
        )
    (pictures / "b/text.png").write_text("longer than it was before")
    with pytest.raises(DataError, match=r"is not mixed: input 'b/text.png' has changed \(size was 18, is 25, stamp was "):
        make(pictures, out, tokenizers)
    (pictures / "b/text.png").unlink()
    with pytest.raises(DataError, match=r"is not mixed: input 27 was 'b/text.png' and is 'b/wide.png'"):
        make(pictures, out, tokenizers)
    assert contents(out) == before


def test_lost_manifest_does_not_let_others_in(pictures: Path, tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    make(pictures, tmp_path / "out", tokenizers)
    (tmp_path / "out/dataset.json").unlink()
    with pytest.raises(DataError, match=r"is not mixed: tasks was \['vqa', 'draw'\], now \['plain'\]"):
        make(pictures, tmp_path / "out", tokenizers, config=TokenizeConfig(questions_per_document=2, shard_inputs=4))


def test_nothing_usable_is_an_error(tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_text("no picture")
    (folder / "b.png").touch()
    with pytest.raises(DataError) as caught:
        make(folder, tmp_path / "out", tokenizers)
    out = tmp_path / "out/quarantine.jsonl"
    assert str(caught.value) == f"{folder}: none of its 2 inputs can be used (empty 1, not-media 1); {out} names them"


def test_wrong_requests(pictures: Path, tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    with pytest.raises(DataError, match=r"tasks vqa, draw write words: name a text tokenizer \(--text text-bpe-4k\)"):
        make(pictures, tmp_path / "out", tokenizers, text=None)
    with pytest.raises(DataError, match="txt: is a text tokenizer; give it as --text"):
        make(pictures, tmp_path / "out", tokenizers, tokenizer=tokenizers["text"], text=None, config=TokenizeConfig())
    with pytest.raises(DataError, match=f"task 'pain' is not one of {', '.join(TEMPLATES)}"):
        TokenizeConfig(tasks=("pain",))
    with pytest.raises(DataError, match="questions_per_document: at least 1 is wanted, 0 given"):
        TokenizeConfig(questions_per_document=0)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file: cannot be made \(File exists\); choose another --out"):
        make(pictures, tmp_path / "file", tokenizers)


def test_second_writer_is_refused(pictures: Path, tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out", Share()), pytest.raises(DataError, match="out: another run is writing here; wait for it"):
        make(pictures, tmp_path / "out", tokenizers)


def test_shares_together_make_the_whole(pictures: Path, tmp_path: Path, tokenizers: dict[str, Path], whole: dict[str, bytes]) -> None:
    outcomes = [make(pictures, tmp_path / "out", tokenizers, share=Share(i, 3)) for i in range(3)]
    assert [(o.made, o.kept, o.complete) for o in outcomes] == [(3, 0, False), (3, 3, False), (2, 6, True)]
    assert contents(tmp_path / "out") == whole
    assert len(list((tmp_path / "out").glob("journal-0000?-of-00003.jsonl"))) == 3
    assert verify(tmp_path / "out").problems == ()


def test_full_disk_is_one_error_and_loses_nothing(
    pictures: Path, tmp_path: Path, tokenizers: dict[str, Path], whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def open_or_full(path: Any, *args: Any, **options: Any) -> Any:
        return builtins.open("/dev/full" if "shard-00005" in str(path) else path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "open", open_or_full, raising=False)
        with pytest.raises(DiskFullError, match=r"shard-00005\.arrow: the disk is full \(\d,\d+ bytes are to be written, "):
            make(pictures, out, tokenizers)
    assert sorted(p.name for p in out.glob("*.arrow")) == ["plan.arrow", *(f"shard-{i:05d}.arrow" for i in range(5))]
    assert [problem.what for problem in verify(out).problems] == ["5 of 8 shards are there"]
    with pytest.raises(DataError, match=r"5 of 8 shards are there, it is unfinished; run the same mmtp tokenize again"):
        ShardDataset(out)
    outcome = make(pictures, out, tokenizers)
    assert (outcome.made, outcome.kept) == (3, 5)
    assert contents(out) == whole


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_before_rename() -> None:
    real = os.replace
    os.replace = lambda old, new: die() if "shard-00002" in str(new) else real(old, new)


def kill_in_mid_write() -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if "shard-00003" in os.readlink(f"/proc/self/fd/{descriptor}"):
            os.ftruncate(descriptor, 100)
            die()
        real(descriptor)

    os.fsync = fsync


def kill_before_journal() -> None:
    Journal.append = die


def kill_in_mid_line() -> None:
    real = os.write

    def write(descriptor: int, data: bytes) -> int:
        if b'"shard":4' in data:
            real(descriptor, data[:30])
            die()
        return real(descriptor, data)

    os.write = write


def kill_before_the_manifest() -> None:
    job.quarantine_bytes = die


@pytest.mark.parametrize(
    ("kill", "made"),
    [(kill_before_rename, 6), (kill_in_mid_write, 5), (kill_before_journal, 8), (kill_in_mid_line, 4), (kill_before_the_manifest, 0)],
)
def test_killed_runs_continue_to_the_same_bytes(
    kill: Callable[[], None], made: int, pictures: Path, tmp_path: Path, tokenizers: dict[str, Path], whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads; the child uses none of them
        child = os.fork()
    if not child:
        try:
            kill()
            make(pictures, out, tokenizers)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    outcome = make(pictures, out, tokenizers)
    assert outcome.made == made
    assert contents(out) == whole
    assert [p for p in out.iterdir() if p.suffix == ".tmp"] == []
    assert verify(out).problems == ()


def members(session: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, of_session = path.read_text().rpartition(")")[2].split()[:4]
            found += [int(path.parent.name)] if int(of_session) == session and state != "Z" else []
    return found


@pytest.mark.timeout(600)  # three processes import torch; on a machine that is busy with other things that takes its time
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_killed_pool_leaves_no_orphans_and_continues(
    pictures: Path, tmp_path: Path, tokenizers: dict[str, Path], whole: dict[str, bytes]
) -> None:
    out = tmp_path / "out"

    def report(done: int, total: int, totals: Totals) -> None:
        if done >= 8:
            die()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        try:
            os.setsid()
            make(pictures, out, tokenizers, workers=2, progress=report)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    deadline = time.monotonic() + 300
    while members(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert members(child) == []
    outcome = make(pictures, out, tokenizers)
    assert outcome.kept >= 2  # made by the pool; the rest here: together as if nothing had happened
    assert contents(out) == whole


def test_a_continuous_tokenizer_gives_features_that_a_model_reads(pictures: Path, tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    patches = PatchImageTokenizer.Config(patch=8).build()
    config = TokenizeConfig(tasks=("caption",), shard_inputs=12, flips="horizontal")
    outcome = make(pictures, tmp_path / "out", tokenizers, tokenizer=patches, config=config, workers=1)
    assert outcome.totals.reasons == dict.fromkeys(sorted(BAD.values()), 1)
    assert verify(tmp_path / "out").problems == ()
    dataset = ShardDataset(tmp_path / "out")
    rows = {row.key: row for row in dataset}
    picture = decode_image((pictures / "a/00.png").read_bytes())
    for key, expected in (("a/00.png#0", picture), ("a/00.png#1", picture.flip(2))):
        np.testing.assert_array_equal(rows[key].features, patches.encode([expected]).item(0).half().numpy())
    batch = PackedBatches(dataset, rows=2, budget=64).batch(0)
    assert batch.features is not None and batch.features.dtype == torch.float32
    assert len(batch.features) == int((batch.tokens == Special.FEATURE).sum()) > 8
    backbone = BackboneConfig(width=32, depth=1, num_heads=2, num_kv_heads=1, head_dim=16, mlp_width=32)
    model = UnifiedModel.Config(layout=dataset.layout, backbone=backbone, feature_width=patches.spec.latent_dim).build()
    model.loss(batch, LossConfig()).total.backward()
    assert model.embedding.features.layers[0].weight.grad.any()


def test_drawn_vectors_are_targets_of_a_flow_head(pictures: Path, tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    patches = PatchImageTokenizer.Config(patch=8).build()
    config = TokenizeConfig(tasks=("draw",))
    make(pictures, tmp_path / "out", tokenizers, tokenizer=patches, config=config, workers=1)
    dataset = ShardDataset(tmp_path / "out")
    assert dataset.layout.continuous is not None and dataset.layout.continuous.written
    assert all(row.target_mask[row.tokens == Special.FEATURE].all() for row in dataset)
    model = ModelChoice(preset="tiny", flow={"type": "token", "width": 16}).model(dataset.layout, dataset.feature_width)
    output = model.loss(PackedBatches(dataset, rows=2, budget=64).batch(0), LossConfig())
    output.total.backward()
    assert metrics(output)["image.flow"] > 0 and model.flow.outputs.out.weight.grad.any()


@pytest.mark.parametrize(
    ("settings", "connector"),
    [({"merge": 2}, Projector.Config(merge=2)), ({"queries": 5}, Resampler.Config(num_queries=5, depth=1, num_heads=2))],
)
def test_streams_have_places_for_what_a_connector_makes(
    pictures: Path, tmp_path: Path, tokenizers: dict[str, Path], settings: dict[str, int], connector: Connector.Config
) -> None:
    patches = PatchImageTokenizer.Config(patch=8).build()
    config = TokenizeConfig(tasks=("caption",), **settings)
    make(pictures, tmp_path / "out", tokenizers, tokenizer=patches, config=config, workers=1)
    dataset = ShardDataset(tmp_path / "out")
    assert dataset.feature_width == 192
    for row in dataset:
        grid = patches.grid(row.meta["size"])
        assert row.feature_grids.tolist() == [list(grid)] and len(row.features) == math.prod(grid)
        assert int((row.tokens == Special.FEATURE).sum()) == math.prod(connector.places(grid))
    choice = ModelChoice(preset="tiny", connector=connector.to_dict())
    model = choice.model(dataset.layout, dataset.feature_width)
    model.loss(PackedBatches(dataset, rows=2, budget=64).batch(0), LossConfig()).total.backward()
    assert all(p.grad.any() for p in model.embedding.features.parameters())
    with pytest.raises(DataError, match="merge and queries: only vectors of a continuous tokenizer"):
        make(pictures, tmp_path / "codes", tokenizers, config=config, workers=1)


def test_vectors_that_cannot_be_stored_or_written_are_refused(pictures: Path, tmp_path: Path, tokenizers: dict[str, Path]) -> None:
    patches = PatchImageTokenizer.Config(patch=8).build()
    drawn = TokenizeConfig(tasks=("draw",), merge=2)
    with pytest.raises(DataError, match="task draw: a model writes vectors one by one"):
        make(pictures, tmp_path / "draw", tokenizers, tokenizer=patches, config=drawn, workers=1)
    options = {"embed_dim": 8, "depth": 1, "num_heads": 2, "patch_size": 8, "img_size": 16}
    vit = TimmViT.Config(model="vit_tiny_patch16_224", options=options).build()
    torch.nn.init.constant_(vit.model.norm.bias, 1e5)
    with pytest.raises(DataError, match="none of its 29 inputs can be used .*not-encodable 25"):
        make(pictures, tmp_path / "large", tokenizers, tokenizer=vit.eval(), config=TokenizeConfig(), workers=1)
    reasons = [json.loads(line)["detail"] for line in (tmp_path / "large" / "quarantine.jsonl").read_text().splitlines()]
    assert sum("the largest number of float16" in reason for reason in reasons) == 25


def test_words_stand_by_turns_with_the_frames_of_their_sounds(tmp_path: Path) -> None:
    """320 samples are 8 frames of 40. Words of one frame belong together, those behind the end are left out."""
    codec = FrameAudioTokenizer.Config(
        window=80, hop=40, width=8, encoder_blocks=1, decoder_blocks=1, quantizer=FSQ.Config(levels=(5, 5))
    ).build()
    text = TextTokenizer.train(["read press one or two"] * 4, 300)
    folder = tmp_path / "sounds"
    folder.mkdir()
    sound = torch.rand(320) * 2 - 1
    for name, timed in (
        ("a", [["press", 0], ["one", 0.0050], ["or", 0.0051], ["two", 0.0124], ["three", 0.021]]),
        ("b", None),
        ("c", [["one", 1]]),
    ):
        soundfile.write(folder / f"{name}.wav", sound.numpy(), 16000, subtype="FLOAT")
        (folder / f"{name}.json").write_text(json.dumps({"text": "any"} | ({"timed": timed} if timed else {})))
    outcome = tokenize(folder, tmp_path / "out", tokenizer=codec, text=text, config=TokenizeConfig(tasks=("read",)))
    assert (outcome.totals.ok, outcome.totals.reasons) == (1, {"bad-labels": 1, "no-labels": 1})
    dataset = ShardDataset(tmp_path / "out")
    (row,) = dataset
    grammar = StreamGrammar(dataset.layout)
    codes = codec.encode([sound[None]]).ids[0]
    spans = grammar.spans(row.tokens)
    assert [
        torch.equal(torch.from_numpy(grammar.codes(row.tokens, span)), codes[:, first:end])
        for span, first, end in zip(spans, (0, 2, 5), (2, 5, 8), strict=True)
    ] == [True] * 3
    said = [text.decode_text(run) for speech in speeches(skeleton(row.tokens, dataset.layout), dataset.layout) for run in speech.runs]
    assert said == ["read press one or two", "press", "one or", "two"]
    with pytest.raises(DataError, match="task read: a model writes the sounds of words as codes, and this tokenizer gives vectors"):
        tokenize(
            folder, tmp_path / "vectors", tokenizer=PatchAudioTokenizer.Config().build(), text=text, config=TokenizeConfig(tasks=("read",))
        )
