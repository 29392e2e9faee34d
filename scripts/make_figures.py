"""Makes the pictures of the README from the zoo: ``python scripts/make_figures.py docs/assets``."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

from mmtp.data.media import contact_sheet
from mmtp.decode.sample import Sampling
from mmtp.eval.shapes import COLOURS, SHAPES
from mmtp.pipeline import Pipeline
from mmtp.types import Modality

STYLES = ("fluent", "noto", "twemoji")
HELD_OUT = (
    "person kneeling",
    "woman singer",
    "woman facepalming",
    "flag: Morocco",
    "ogre",
    "hippopotamus",
    "tractor",
    "face with symbols on mouth",
)
"""Names of emoji whose code points are kept out of training."""
SCALE = 3  # pixels of the figure per pixel of a drawing, roughly


def drawings(pipeline: Pipeline, path: Path, seed: int = 0) -> None:
    """Every colour and shape as the model draws it; beside it, which cells came out of one pass."""
    pictures, maps, passes, codes = [], [], 0, 0
    low, high = pipeline.layout.code_range(Modality.IMAGE)
    for shape in SHAPES:
        for colour in COLOURS:
            reply = pipeline.reply(f"draw a {colour} {shape}", sampling=Sampling(top_k=20, guidance=2.0, seed=seed), max_new_tokens=96)
            pictures += pipeline.pictures(reply.tokens, reply.prompt_length)[:1]
            tokens = np.array(reply.new_tokens)
            inside = (tokens >= low) & (tokens < high)
            by_pass = np.repeat(np.arange(reply.stats.passes), reply.stats.per_pass)[inside]
            side = round(len(by_pass) ** 0.5)
            maps.append(by_pass.reshape(side, side))
            passes += len(np.unique(by_pass))
            codes += len(by_pass)
    sheet = contact_sheet(pictures, columns=len(COLOURS)).permute(1, 2, 0).numpy()
    figure, (left, right) = plt.subplots(1, 2, figsize=(2 * sheet.shape[1] * SCALE / 200, (sheet.shape[0] + 40) * SCALE / 200), dpi=200)
    left.imshow(sheet)
    left.set_title("vqa-s draws 8 colours × 3 shapes", fontsize=8)
    # Neighbouring passes get shades that are far apart.
    shades = plt.get_cmap("tab20")(np.arange(20))[:, :3]
    cells = np.ones((*sheet.shape[:2], 3))
    height, width = pictures[0].shape[1:]
    for i, by_pass in enumerate(maps):
        top, across = 2 + (height + 2) * (i // len(COLOURS)), 2 + (width + 2) * (i % len(COLOURS))
        cell = height // by_pass.shape[0]
        cells[top : top + height, across : across + width] = shades[by_pass % 20].repeat(cell, 0).repeat(cell, 1)
    right.imshow(cells, interpolation="nearest")
    right.set_title(f"one shade, one pass: {codes / passes:.1f} codes of a picture per pass of the model", fontsize=8)
    for axes in (left, right):
        axes.axis("off")
    figure.tight_layout(pad=0.3)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def emoji(pipeline: Pipeline, path: Path) -> None:
    """What the model makes of words that it was shown no picture for, in every style; seeds 0, 1, 2, … in reading order, none chosen."""
    prompts = [f"{words}, {style} style" for style in STYLES for words in HELD_OUT]
    drawn = pipeline.draw(prompts, seeds=range(len(prompts)), top_k=100, guidance=3.0)
    sheet = contact_sheet(drawn, columns=len(HELD_OUT)).permute(1, 2, 0).numpy()
    figure, axes = plt.subplots(figsize=((sheet.shape[1] + 40) * SCALE / 200, (sheet.shape[0] + 24) * SCALE / 200), dpi=140)
    axes.imshow(sheet)
    step = sheet.shape[1] / len(HELD_OUT)
    axes.set_xticks([step * (i + 0.5) for i in range(len(HELD_OUT))], [words.replace(" ", "\n", 1) for words in HELD_OUT], fontsize=6)
    axes.set_yticks([sheet.shape[0] / len(STYLES) * (i + 0.5) for i in range(len(STYLES))], STYLES, fontsize=6)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Writes the pictures into the folder named on the command line."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/assets")
    folder.mkdir(parents=True, exist_ok=True)
    drawings(Pipeline.from_pretrained("vqa-s"), folder / "vqa-s.png")
    emoji(Pipeline.from_pretrained("emoji-s"), folder / "emoji-s.png")
    print(folder / "vqa-s.png", folder / "emoji-s.png")


if __name__ == "__main__":
    main()
