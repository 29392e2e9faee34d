import json
import random
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch

from mmtp.data.media import decode_sound
from mmtp.data.sources import open_source
from mmtp.types import Modality

RATE = 8000


@pytest.fixture
def source(tmp_path):
    """Five tones of a quarter of a second, each of its own height, one too long and one without words."""
    folder = tmp_path / "source"
    folder.mkdir()
    for i in range(7):
        samples = np.full(RATE * (8 if i == 5 else 1) // 4, (i + 1) / 10, dtype=np.float32)
        soundfile.write(folder / f"{i}.flac", samples, RATE)
        if i != 6:
            (folder / f"{i}.json").write_text(json.dumps({"text": f"word {i}"}))
    return folder


def test_words_and_sounds_stand_in_one_order(script, source, tmp_path):
    command = [str(source), "--count", "12", "--seconds", "1", "--pause", "0.1", "--rate", str(RATE)]
    for name in ("out", "again"):
        script.main([command[0], str(tmp_path / name), *command[1:]])
    opened = open_source(str(tmp_path / "out"), Modality.AUDIO)
    samples = [opened.read(item) for item in opened.items()]
    assert len(samples) == 12
    orders = []
    for sample in samples:
        sound = decode_sound(sample.media)[0][0]
        assert sound.shape[0] <= RATE
        levels = (sound[sound > 0.05] * 10).round().int().unique_consecutive().tolist()
        said = [int(word) + 1 for word in sample.labels["text"].split()[1::2]]
        assert levels == said and 2 <= len(said) <= 4
        assert sound[[round(seconds * RATE) for _, seconds in sample.labels["timed"]]].mul(10).round().int().tolist() == said
        assert " ".join(words for words, _ in sample.labels["timed"]) == sample.labels["text"]
        orders.append(tuple(said))
    assert len(set(orders)) > 6
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_speed_shortens_a_sound_and_raises_it(script):
    time = torch.arange(RATE) / RATE
    tone = torch.sin(2 * torch.pi * 400 * time)[None]
    quick = script.played(tone, 1.25, RATE)
    assert script.played(tone, 1.0, RATE) is tone
    assert quick.shape == (1, RATE * 4 // 5)
    assert int(torch.fft.rfft(quick[0]).abs().argmax()) * RATE / quick.shape[1] == pytest.approx(500, abs=2)


def test_so_many_recordings_at_least_stand_in_one(script, source, tmp_path):
    command = ["--count", "20", "--seconds", "2", "--parts", "3", "--rate", str(RATE)]
    lengths = {}
    for least in ("1", "3"):
        script.main([str(source), str(tmp_path / least), *command, "--least", least])
        labels = [json.loads(path.read_text()) for path in (tmp_path / least).glob("*.json")]
        lengths[least] = {len(label["text"].split()) // 2 for label in labels}
    assert lengths == {"1": {1, 2, 3}, "3": {3}}


def test_words_are_cut_where_they_were_heard_right(script):
    """Four words of half a second with a dip of silence between them; the third is misheard, so it stays with its neighbours."""
    word = np.concatenate([np.full(RATE // 2 - 80, 0.5, dtype=np.float32), np.zeros(80, dtype=np.float32)])
    sound = torch.from_numpy(np.tile(word, 5))[None]
    heard = [("Press", 0.0, 0.52), ("one.", 0.52, 1.03), ("four", 1.0, 1.5), ("other", 1.47, 2.0), ("things", 2.0, 2.5)]
    pieces = script.cut((sound, "Press 1, for other things"), heard, RATE)
    assert [words for _, words in pieces] == ["Press", "1, for other", "things"]
    assert sum(piece.shape[1] for piece, _ in pieces) == sound.shape[1]
    for piece, words in pieces:
        assert abs(piece.shape[1] - len(words.split()) * RATE // 2) <= 80
        assert piece[0, 0] == piece[0, -1] == 0
    assert len(script.cut((sound, "nothing of it"), heard, RATE)) == 1


def test_what_was_heard_is_kept_for_the_next_call(script, tmp_path, monkeypatch):
    calls = []

    class Listener:
        def words(self, sound, rate):
            calls.append(rate)
            return [("one", 0.0, 0.5)]

    monkeypatch.setattr(script, "Recognizer", Listener)
    whole = [(torch.zeros(1, RATE), "one"), (torch.zeros(1, RATE), "two")]
    first = script.listened(whole, RATE, tmp_path / "heard.json")
    again = script.listened(whole, RATE, tmp_path / "heard.json")
    assert len(calls) == 2 and [[tuple(word) for word in words] for words in again] == first
    with pytest.raises(SystemExit, match="heard.json: holds what was heard in other recordings"):
        script.listened(whole[:1], RATE, tmp_path / "heard.json")


def test_runs_are_of_different_recordings(script):
    pieces = [[(torch.full((1, 3), float(i)), f"{i}.{j}") for j in range(i + 1)] for i in range(5)]
    drawn = [list(script.runs(pieces, random.Random(seed), 3, 2)) for seed in range(200)]
    firsts = Counter()
    for some in drawn:
        said = [[int(word.split(".")[0]) for _, word in run] for run in some]
        assert len(some) == 3 and len({words[0] for words in said}) == 3
        for run, words in zip(some, said, strict=True):
            assert [sound[0, 0] for sound, _ in run] == words and len(set(words)) == 1 and len(words) <= 2
        firsts[said[0][0]] += 1
    assert firsts[4] > 2 * firsts[0]


def test_a_source_without_words_is_refused(script, source, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main([str(source), str(tmp_path / "out"), "--label", "nobody"])
    assert "no recording of at most 3 s has the label nobody" in capsys.readouterr().err
