import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mmtp.data.encode import TokenizeConfig
from mmtp.data.errors import DataError
from mmtp.data.job import tokenize
from mmtp.data.manifest import Manifest
from mmtp.data.verify import verify


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tokenizers: dict[str, Path]) -> Path:
    """A data set of 12 shards with quarantine."""
    from PIL import Image

    root = tmp_path_factory.mktemp("verify")
    (root / "in").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / f"in/{i:02d}.png")
    (root / "in/bad.png").write_text("no picture")
    tokenize(root / "in", root / "out", tokenizer=tokenizers["image"], config=TokenizeConfig(shard_inputs=10))
    return root / "out"


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def test_all_is_well(sound: Path) -> None:
    calls: list[tuple[int, int]] = []
    verdict = verify(sound, progress=lambda *args: calls.append(args))
    assert verdict.problems == ()
    assert verdict.files == 5 + 4
    assert verdict.bytes == sum(p.stat().st_size for p in sound.iterdir())
    assert (verdict.totals.ok, verdict.totals.reasons) == (40, {"not-media": 1})
    assert calls == [(i, 5) for i in range(1, 6)]


def test_every_flipped_bit_is_found_and_named(folder: Path) -> None:
    rng = np.random.default_rng(1)
    files = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    for flip in range(200):
        path = files[flip % len(files)]
        data = path.read_bytes()
        flipped = bytearray(data)
        place = int(rng.integers(len(data)))
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        problems = verify(folder).problems
        assert path in [problem.file for problem in problems], (path.name, place)
        assert all(problem.what and "run the same mmtp tokenize again" in problem.advice for problem in problems)
        path.write_bytes(data)
    assert verify(folder).problems == ()


def test_every_truncation_is_found_and_named(folder: Path) -> None:
    rng = np.random.default_rng(2)
    for path in sorted(p for p in folder.iterdir() if not p.name.startswith(".")):
        data = path.read_bytes()
        for keep in {0, len(data) - 1, *rng.integers(0, len(data), 6).tolist()}:
            path.write_bytes(data[:keep])
            named = [problem.file for problem in verify(folder).problems]
            # A journal cut between two lines is that of a run that has not ended.
            whole_lines = path.name == "journal.jsonl" and (keep == 0 or data[keep - 1 : keep] == b"\n")
            assert (folder if whole_lines else path) in named, (path.name, keep)
        path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("shard-00002.arrow", "cannot be read (No such file or directory); run the same mmtp tokenize again to make it anew"),
        ("plan.arrow", "cannot be read (No such file or directory); run the same mmtp tokenize again; it is written anew"),
        ("dataset.json", "is missing; run the same mmtp tokenize again; it is written anew"),
        ("quarantine.jsonl", "is not as it was written; run the same mmtp tokenize again; it is written anew"),
    ],
)
def test_missing_files_are_named(folder: Path, name: str, words: str) -> None:
    (folder / name).unlink()
    assert [str(problem) for problem in verify(folder).problems] == [f"{folder / name}: {words}"]


def test_damaged_shard_says_what_to_do(folder: Path) -> None:
    path = folder / "shard-00001.arrow"
    path.write_bytes(path.read_bytes() + b"more")
    (problem,) = verify(folder).problems
    assert problem.file == path
    assert problem.what.startswith("is damaged (its hash is ")
    assert problem.advice == "delete it and run the same mmtp tokenize again: only this shard is made anew"


def test_a_forged_shard_is_found(folder: Path) -> None:
    # Shards that are sound by themselves, but stand in each other's place.
    first, second = folder / "shard-00000.arrow", folder / "shard-00001.arrow"
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    assert {problem.file for problem in verify(folder).problems} == {first, second}


def test_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone: no such folder"):
        verify(tmp_path / "gone")
    with pytest.raises(DataError, match=r"has neither dataset\.json nor a journal, so it is no data set of mmtp"):
        verify(tmp_path)


def test_manifest_accepts_only_what_it_wrote(folder: Path) -> None:
    path = folder / "dataset.json"
    manifest = Manifest.read(folder)
    assert manifest.complete
    assert manifest.to_bytes() == path.read_bytes()
    values = json.loads(path.read_text())
    for text in ("", "[]", "{}", json.dumps(values), json.dumps(values | {"inputs": 7}), json.dumps(values | {"surplus": 1})):
        path.write_text(text)
        with pytest.raises(DataError, match=r"dataset\.json: is damaged; delete it and run the same mmtp tokenize again: shards are kept"):
            Manifest.read(folder)
