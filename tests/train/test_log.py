import json

import pytest
import torch

from mmtp.data.media import read_image, read_sound
from mmtp.train.log import RunLog


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_means_since_the_last_record_and_rates(tmp_path):
    with RunLog(tmp_path, total=4, start=0, progress=False) as log:
        for step, loss in enumerate([1.0, 3.0, 5.0, 7.0], start=1):
            log.update(step, {"loss": loss, "tokens": 100.0}, write=step % 2 == 0, left=1.0)
    first, second = records(tmp_path)
    assert (first["step"], first["loss"], second["step"], second["loss"]) == (2, 2.0, 4, 6.0)
    assert first["tokens_per_second"] == pytest.approx(100 * first["steps_per_second"])
    assert "tokens" not in first


def test_records_beyond_the_checkpoint_are_dropped(tmp_path):
    tmp_path.joinpath("log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    with RunLog(tmp_path, total=4, start=2, progress=False) as log:
        log.update(3, {"loss": 1.0}, write=True, left=1.0)
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3]


def test_bar_shows_what_a_person_watches(tmp_path, capsys):
    with RunLog(tmp_path, total=200, start=0, progress=True) as log:
        record = {"loss": 0.125, "text": 1.5, "text.accuracy": 0.5, "text+1": 2.0, "tokens": 8.0, "lr": 1e-3}
        log.update(1, record, write=True, left=75.0)
        shown = log._bar.tasks[0].fields["metrics"]
        assert "step 1  1:15 left" in shown and "tokens/s" in shown and "loss 0.125  text 1.5" in shown
        assert not {"lr", "accuracy", "+1"} & set(shown.replace(".", " ").split())
        assert log._bar.tasks[0].completed == 1 / 200
        log.update(2, record, write=False, left=60.0, done=0.25)
        assert log._bar.tasks[0].completed == 0.25 and "1:00 left" in log._bar.tasks[0].fields["metrics"]


def test_a_mean_is_over_the_steps_that_have_the_number(tmp_path):
    with RunLog(tmp_path, total=3, start=0, progress=False) as log:
        for step, record in enumerate([{"loss": 1.0}, {"loss": 2.0, "critic": 4.0}, {"loss": 3.0, "critic": 6.0}], start=1):
            log.update(step, record, write=step == 3, left=1.0)
    assert (records(tmp_path)[0]["loss"], records(tmp_path)[0]["critic"]) == (2.0, 5.0)


def test_previews_are_files_and_on_the_board(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    picture, sound = torch.rand(3, 4, 6), torch.linspace(-1.5, 1.5, 800)[None]
    with RunLog(tmp_path, total=3, start=0, progress=False) as log:
        log.picture(2, picture)
        log.sound(2, "original", sound, 8000.0)
    assert (read_image(tmp_path / "previews/step-000002.png") - picture).abs().max() < 0.01
    heard, rate = read_sound(tmp_path / "previews/step-000002-original.wav")
    assert rate == 8000 and (heard - sound.clamp(-1, 1)).abs().max() < 1e-3
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert (board.Tags()["images"], board.Tags()["audio"]) == (["preview"], ["original"])
