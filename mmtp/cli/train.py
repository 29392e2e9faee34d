"""``mmtp train``: one loop for tokenizers, text vocabularies and models; the recipe says which."""

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

    A recipe names its task (``tokenizer``, ``text`` or ``model``), the configuration, the data, the optimiser and the run.

    Args:
        recipe: the recipe.toml.
        set: change a value of the recipe, for instance run.steps=500; may be repeated.
        run_dir: folder of checkpoints, logs and the result; runs/ and the recipe's name where it is not given.
        data_root: folder that relative paths of the recipe's data start from.
        max_minutes: stop after so many minutes, with a checkpoint and a result.

    Examples:
        mmtp train tokenizers/image-fsq-f8/recipe.toml
        mmtp train recipe.toml --run-dir runs/small --set run.steps=500 --set optim.lr=3e-4
        mmtp train models/vqa-s/recipe.toml --max-minutes 5
    """
    from mmtp.train.trainer import load_recipe, run_recipe

    run_recipe(load_recipe(recipe, set or []), run_dir=run_dir, data_root=data_root, max_minutes=max_minutes)
