"""What a run says while it goes: JSON lines, TensorBoard, previews, and a progress bar."""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from jaxtyping import Float
from torch import Tensor

from mmtp.data.media import encode_png, write_wav

RATES = ("tokens", "samples")
"""Metrics that count work done in a step; they are shown per second."""


class RunLog:
    """The log of a run in ``folder``: ``log.jsonl`` (one record per line), TensorBoard files in ``tensorboard/``, previews.

    Args:
        folder: the run's folder.
        total: steps of the whole run.
        start: step from which this process continues; records of later steps, written before a kill, are dropped.
        progress: whether to show a bar with the metrics and the time left.
    """

    def __init__(self, folder: Path, *, total: int, start: int, progress: bool) -> None:
        self.folder, self.total, self.start, self.progress = folder, total, start, progress
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._steps = 0
        self._since = time.perf_counter()
        self._shown = ""

    def __enter__(self) -> "RunLog":
        from torch.utils.tensorboard import SummaryWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "log.jsonl"
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            path.write_text("".join(f"{line}\n" for line in lines if _step_of(line) <= self.start), encoding="utf-8")
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.start + 1 if self.start else None)
        self._bar: Any = None
        if self.progress:
            from rich.progress import BarColumn, Progress, TextColumn

            self._bar = Progress(TextColumn("training"), BarColumn(24), TextColumn("{task.fields[metrics]}"))
            self._bar.start()
            self._line = self._bar.add_task("training", total=1.0, completed=self.start / self.total, metrics="")  # pyrefly: ignore
        return self

    def update(self, step: int, record: dict[str, float], *, write: bool, left: float, done: float | None = None) -> None:
        """Takes in one step; every so often (``write``) writes the means since the last record.

        Args:
            step: steps done.
            record: numbers of this step; the mean of each is over the steps that have it.
            write: whether a record is due.
            left: seconds until the end, estimated.
            done: share of the run that lies behind, where a clock ends it; else steps tell.
        """
        for key, value in record.items():
            self._sums[key] = self._sums.get(key, 0.0) + float(value)
            self._counts[key] = self._counts.get(key, 0) + 1
        self._steps += 1
        if write:
            seconds = time.perf_counter() - self._since
            means = {key: value / self._counts[key] for key, value in self._sums.items() if key not in RATES}
            rates = {f"{key}_per_second": self._sums[key] / seconds for key in RATES if key in self._sums}
            line = {"step": step, **means, **rates, "steps_per_second": self._steps / seconds}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            for key, value in line.items():
                self._board.add_scalar(key, value, step)
            self._sums, self._counts, self._steps, self._since = {}, {}, 0, time.perf_counter()
            self._shown = _for_the_bar(line)
        if self._bar:
            minutes, rest = divmod(int(min(left, 359_999)), 60)
            share = step / self.total if done is None else done
            self._bar.update(self._line, completed=share, metrics=f"step {step:,}  {minutes}:{rest:02d} left  {self._shown}")

    @property
    def previews(self) -> Path:
        """Folder of previews, made when first asked for."""
        folder = self.folder / "previews"
        folder.mkdir(exist_ok=True)
        return folder

    def picture(self, step: int, picture: Float[Tensor, "3 h w"]) -> None:
        """Shows a picture with values in 0..1: ``previews/step-000123.png``, and TensorBoard."""
        (self.previews / f"step-{step:06d}.png").write_bytes(encode_png(picture))
        self._board.add_image("preview", picture, step)

    def sound(self, step: int, name: str, sound: Float[Tensor, "1 t"], sample_rate: float) -> None:
        """Lets a sound in -1..1 be heard: ``previews/step-000123-name.wav``, and TensorBoard."""
        write_wav(self.previews / f"step-{step:06d}-{name}.wav", sound, sample_rate)
        self._board.add_audio(name, sound.clamp(-1, 1), step, int(sample_rate))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()
        self._file.close()
        self._board.close()


def _for_the_bar(record: dict[str, int | float]) -> str:
    """The numbers that a person watches, in the width of a terminal: rates, then losses; drafts and accuracies are in the log."""
    hidden = ("step", "lr", "grad_norm", "epoch", "steps_per_second")
    shown = {k: v for k, v in record.items() if k not in hidden and "+" not in k and "." not in k}
    rates = [f"{v:,.0f} {k.removesuffix('_per_second')}/s" for k, v in shown.items() if k.endswith("_per_second")]
    return "  ".join([*rates, *(f"{k} {v:.4g}" for k, v in shown.items() if not k.endswith("_per_second"))])


def _step_of(line: str) -> float:
    """The step of a record; infinite for a line that a kill cut short, so that it is dropped."""
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
