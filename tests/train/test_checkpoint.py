import pytest
import torch

from mmtp.train.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint


def test_the_last_two_are_kept_and_read_back(tmp_path):
    for step in (1, 2, 30):
        save_checkpoint(tmp_path, step, {"step": step, "w": torch.arange(3) * step})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002.pt", "step-00000030.pt"]
    state = load_checkpoint(latest_checkpoint(tmp_path))
    assert state["step"] == 30
    assert state["w"].tolist() == [0, 30, 60]


def test_what_a_killed_run_left_unfinished_does_not_count(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None
    (tmp_path / "step-00000009.tmp").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) is None


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = save_checkpoint(tmp_path, 4, {"step": 4})
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(CheckpointError, match=r"step-00000004\.pt: is damaged .*; remove it"):
        load_checkpoint(path)


def test_a_checkpoint_cannot_run_code(tmp_path):
    path = tmp_path / "step-00000001.pt"
    torch.save({"step": CheckpointError}, path)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_checkpoint(path)
