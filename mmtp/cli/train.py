"""``mmtp train``: one loop for tokenizers, text vocabularies and models; the recipe says which."""

import sys
from pathlib import Path


def train(
    recipe: Path,
    /,
    *,
    set: list[str] | None = None,
    run_dir: Path | None = None,
    data_root: Path | None = None,
    max_minutes: float | None = None,
) -> None:
    """Train what a recipe describes. Run again with the same run folder, it goes on where it stopped.

    A recipe names its task (``tokenizer``, ``text``, ``model`` or ``preference``), the configuration, the data, the optimiser and the
    run. The result lies in the run folder's ``result``, ready for any place that takes a tokenizer or a model. A model may be trained by
    several processes, which torchrun starts: docs/scale.md.

    Args:
        recipe: the recipe.toml, or a folder that holds one.
        set: change a value of the recipe, for instance run.steps=500; may be repeated.
        run_dir: folder of checkpoints, logs and the result; runs/NAME after the recipe where it is not given.
        data_root: folder that relative paths of the recipe start from; else $MMTP_DATA, else the working directory.
        max_minutes: stop after so many minutes, with a checkpoint and a result.

    Examples:
        mmtp train tokenizers/image-fsq-f8/recipe.toml
        mmtp train recipe.toml --run-dir runs/small --set run.steps=500 --set optim.lr=3e-4
        mmtp train models/vqa-s/recipe.toml --max-minutes 5
    """
    from mmtp.train.distributed import rank
    from mmtp.train.precision import quicker_precision
    from mmtp.train.recipe import load_recipe, run_recipe

    overrides = list(set or [])
    if max_minutes is not None:
        overrides.append(f"run.max_minutes={float(max_minutes)}")
    loaded = load_recipe(recipe, overrides)
    if rank() == 0 and loaded.run.precision == "bfloat16" and quicker_precision() == "float32":
        print("run.precision: bfloat16 is slower than float32 on this machine; --set run.precision=auto takes the quicker", file=sys.stderr)
    folder = run_dir or Path("runs") / run_name(recipe)
    result = run_recipe(loaded, folder, data_root=data_root)
    if rank() == 0:
        print(f"trained: {result}")


def run_name(recipe: Path) -> str:
    """Name of a run after its recipe: the folder's where the file is just called ``recipe``, else the file's."""
    path = recipe.resolve()
    return path.parent.name if path.stem == "recipe" and path.is_file() else path.stem
