"""Recipes: one TOML file says what is trained, on what, how and for how long.

A recipe names data relative to a root that the person gives (``--data-root``, or the environment variable ``MMTP_DATA``, or else the
working directory), so that it means the same on every machine.
"""

import importlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mmtp.config import Config, ConfigError, load_file, override
from mmtp.hub import write_text
from mmtp.train.distributed import processes, rank
from mmtp.train.precision import quicker_precision
from mmtp.train.trainer import OptimConfig, RunConfig

TASKS = {
    "tokenizer": "mmtp.train.tokenizer_trainer:train_tokenizer",
    "text": "mmtp.train.text_trainer:train_text",
    "model": "mmtp.train.model_trainer:train_model",
    "preference": "mmtp.train.preference:train_preference",
}
"""Task -> function ``(recipe, folder, data_root, progress) -> folder of the saved result``; imported when asked for."""

ADJUSTABLE = ("steps", "max_minutes", "log_every", "checkpoint_every", "preview_every", "parallel")
"""Keys of ``[run]`` that may differ when a run is continued."""


@dataclass(frozen=True, kw_only=True)
class Recipe(Config):
    """A recipe as read; the task checks the tables that are its own, as strictly.

    Attributes:
        task: what is trained; decides which tables are wanted.
        tokenizer: configuration of the tokenizer (``type`` is the registry name).
        model: configuration or preset of the model.
        data: sources and how they are mixed.
        loss: weights of the loss.
        optim: optimizer and schedule.
        run: length, batch, seed, intervals.
    """

    task: Literal["tokenizer", "text", "model", "preference"]
    tokenizer: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=lambda: RunConfig(steps=1, batch=1))


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Reads a recipe.

    Args:
        path: TOML or JSON file, or a folder that holds ``recipe.toml`` (a zoo entry).
        overrides: ``"run.steps=100"`` and the like, applied on top.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown (names the nearest) or of the wrong type.
    """
    path = Path(path)
    path = path / "recipe.toml" if path.is_dir() else path
    return Recipe.from_dict(override(load_file(path), overrides or []), str(path))


def run_recipe(recipe: Recipe, folder: str | Path, *, data_root: str | Path | None = None, progress: bool = True) -> Path:
    """Trains what a recipe says, continuing where ``folder`` already holds checkpoints of the same recipe.

    Args:
        recipe: what to train.
        folder: receives log, checkpoints and, in ``result/``, what was trained, as ``from_pretrained`` reads it.
        data_root: where relative paths of the recipe start; default ``$MMTP_DATA``, else the working directory.
        progress: whether to show a bar.

    Returns:
        The folder of the result.

    Raises:
        ConfigError: the folder holds a run of another recipe; names the first key that differs. Or several processes were launched
            for a task that trains in one, or for a precision that each would choose for itself.
        TrainError: the run cannot go on.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.json"
    begun = load_file(path) if path.exists() else None
    recipe = _with_precision(recipe, begun)
    record = json.loads(json.dumps(recipe.to_dict()))
    if begun and (difference := _first_difference(_comparable(begun), _comparable(record))):
        raise ConfigError(f"{folder}: holds a run of another recipe ({difference}); give another folder, or remove this one")
    if processes() > 1 and recipe.task != "model":
        raise ConfigError(f"task = {recipe.task!r} trains in one process, and {processes()} were launched; several can train a model")
    if rank() == 0:
        write_text(path, json.dumps(record, indent=2) + "\n")
    module, _, name = TASKS[recipe.task].partition(":")
    train: Callable[..., Path] = getattr(importlib.import_module(module), name)
    root = Path(data_root or os.environ.get("MMTP_DATA", "."))
    return train(recipe, folder, data_root=root, progress=progress)


def _with_precision(recipe: Recipe, begun: dict[str, Any] | None) -> Recipe:
    """The recipe with its precision decided: that of the run which is continued, else what is quicker on this machine."""
    if recipe.run.precision != "auto":
        return recipe
    if processes() > 1:
        raise ConfigError('run: precision = "auto" is for one process; "float32" or "bfloat16" is wanted, the same for all')
    precision = begun["run"]["precision"] if begun else quicker_precision()
    return replace(recipe, run=replace(recipe.run, precision=precision))


def _comparable(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"run": {k: v for k, v in record["run"].items() if k not in ADJUSTABLE}}


def _first_difference(old: Any, new: Any, where: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if difference := _first_difference(old.get(key), new.get(key), f"{where}.{key}" if where else key):
                return difference
        return ""
    return "" if old == new else f"{where} was {old!r}, is {new!r}"
