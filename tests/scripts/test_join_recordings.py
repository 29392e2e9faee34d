import json

import numpy as np
import pytest
import soundfile

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
        orders.append(tuple(said))
    assert len(set(orders)) > 6
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_source_without_words_is_refused(script, source, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main([str(source), str(tmp_path / "out"), "--label", "nobody"])
    assert "no recording of at most 3 s has the label nobody" in capsys.readouterr().err
