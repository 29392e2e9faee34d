"""A judge of simple drawings: which shape, which colour, how many objects.

The pictures of easy-VQA show one upright circle, rectangle or triangle in one of eight colours on a light background. The
judge works by synthesis: it finds the object, draws each of the three shapes into the object's box and keeps the one that
fits best. It knows nothing of any model, so that it may judge what a model drew; a smear, an empty picture or two objects
are told apart from a drawing by ``shape`` being None.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

SHAPES = ("circle", "rectangle", "triangle")
PALETTE = {
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
}
COLOURS = tuple(PALETTE)
_RGB = np.array(list(PALETTE.values()), dtype=np.float64) / 255

_FOREGROUND = 0.3  # Euclidean distance in RGB from the background; easy-VQA keeps 0.69 or more
_LEAST_AREA = 8  # pixels; anything smaller is a speck. The least object of easy-VQA covers 33
_COLOUR_TOLERANCE = 0.4  # Euclidean distance in RGB of the object's inside from the nearest colour of the palette
_LEAST_OVERLAP = 0.7  # intersection over union of an object and the shape drawn into its box
_BLURS = (0.0, 0.7, 1.2)  # standard deviations in pixels
_SUPERSAMPLING = 4


@dataclass(frozen=True)
class Parsed:
    """What a picture shows.

    Attributes:
        shape: one of ``SHAPES``; None unless there is exactly one object and it resembles a shape.
        colour: one of ``COLOURS``, of the largest object; None without an object or if no colour of the palette is near.
        area: pixels covered by the largest object, fractions counted at its edge.
        components: number of separate objects.
        overlap: intersection over union of the object with its shape drawn exactly; 0 without an object.
    """

    shape: str | None
    colour: str | None
    area: float
    components: int
    overlap: float = 0.0


def parse(image: Float[Tensor, "3 h w"]) -> Parsed:
    """Names the object of a picture.

    Args:
        image: RGB in [0, 1]; values beyond are clipped.
    """
    pixels = np.clip(image.detach().to("cpu", torch.float64).permute(1, 2, 0).numpy(), 0, 1)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    distance = np.linalg.norm(pixels - background, axis=2)
    objects = [o for o in components(distance > _FOREGROUND) if len(o) >= _LEAST_AREA]
    if not objects:
        return Parsed(None, None, 0.0, 0)
    largest = max(objects, key=len)
    mask = np.zeros(distance.shape, dtype=bool)
    mask[largest[:, 0], largest[:, 1]] = True

    # The colour is that of the object's inside: its edge is mixed with the background.
    inside = mask & (distance >= 0.9 * np.quantile(distance[mask], 0.75))
    rgb = np.median(pixels[inside], axis=0)
    to_palette = np.linalg.norm(_RGB - rgb, axis=1)
    colour = COLOURS[int(to_palette.argmin())] if to_palette.min() <= _COLOUR_TOLERANCE else None

    # How much of every pixel the object covers: the place of its colour on the line from background to object.
    line = rgb - background
    cover = np.clip((pixels - background) @ line / (line @ line), 0, 1) * _grown(mask)
    shape, overlap = _fit(cover)
    if len(objects) > 1 or overlap < _LEAST_OVERLAP:
        shape = None
    return Parsed(shape, colour, float(cover.sum()), len(objects), overlap)


def components(mask: np.ndarray) -> list[np.ndarray]:
    """Connected regions (eight neighbours) of a Boolean picture, each as ``[n, 2]`` rows and columns.

    Runs of set pixels are joined row by row with union-find, so the Python loop goes over runs, not pixels.
    """
    parent: list[int] = []
    runs: list[tuple[int, int, int]] = []

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    above: list[int] = []
    for row, edges in enumerate(np.diff(mask.astype(np.int8), axis=1, prepend=0, append=0)):
        here = []
        for start, end in zip(np.flatnonzero(edges == 1).tolist(), np.flatnonzero(edges == -1).tolist(), strict=True):
            here.append(len(runs))
            parent.append(len(runs))
            runs.append((row, start, end))
            for other in above:
                if runs[other][1] <= end and runs[other][2] >= start:
                    parent[root(other)] = root(here[-1])
        above = here
    regions: dict[int, list[np.ndarray]] = {}
    for i, (row, start, end) in enumerate(runs):
        columns = np.arange(start, end)
        regions.setdefault(root(i), []).append(np.stack([np.full_like(columns, row), columns], axis=1))
    return [np.concatenate(parts) for parts in regions.values()]


def draw(shape: str, box: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    """Coverage in [0, 1] of an upright shape that fills a box.

    Args:
        shape: one of ``SHAPES``.
        box: top, left, bottom, right in pixels; pixel i spans i to i + 1.
        size: height and width of the picture.
    """
    top, left, bottom, right = box
    n = _SUPERSAMPLING
    y = ((np.arange(size[0] * n) + 0.5) / n - top) / max(bottom - top, 1e-6)
    x = ((np.arange(size[1] * n) + 0.5) / n - left) / max(right - left, 1e-6)
    v, u = np.meshgrid(y, x, indexing="ij")
    if shape == "circle":
        filled = (2 * u - 1) ** 2 + (2 * v - 1) ** 2 <= 1
    elif shape == "rectangle":
        filled = (u >= 0) & (u <= 1) & (v >= 0) & (v <= 1)
    else:
        filled = (v >= 0) & (v <= 1) & (np.abs(2 * u - 1) <= v)
    return filled.reshape(size[0], n, size[1], n).mean(axis=(1, 3))


def _fit(cover: np.ndarray) -> tuple[str, float]:
    """The shape that fits a coverage best, and its intersection over union.

    The box is the object's at half coverage. Blur eats corners and tips, and lossy tokenizers blur: so every shape is drawn
    sharp and blurred, with edges at the box and a little further out, and the least squared error decides.
    """
    rows, columns = np.flatnonzero((cover >= 0.5).any(1)), np.flatnonzero((cover >= 0.5).any(0))
    if not len(rows) or not len(columns):
        return SHAPES[0], 0.0
    margin = 4
    window = np.pad(cover, margin)[rows[0] : rows[-1] + 2 * margin + 1, columns[0] : columns[-1] + 2 * margin + 1]
    bottom, right = window.shape[0] - margin, window.shape[1] - margin
    even = [(e, e, e) for e in (-0.25, 0.0, 0.25)]
    # The upper tip of a triangle is the first thing that blur takes.
    tipped = list(product((0.0, 1.0, 2.5), (-0.25, 0.5, 1.0), (0.0,)))
    best, least, overlap = SHAPES[0], np.inf, 0.0
    for shape in SHAPES:
        for up, aside, down in tipped if shape == "triangle" else even:
            sharp = draw(shape, (margin - up, margin - aside, bottom + down, right + aside), window.shape)
            for spread in _BLURS:
                drawn = _blurred(sharp, spread)
                error = float(np.square(drawn - window).sum())
                if error < least:
                    best, least = shape, error
                    overlap = float(np.minimum(drawn, window).sum() / np.maximum(drawn, window).sum())
    return best, overlap


def _blurred(picture: np.ndarray, spread: float) -> np.ndarray:
    """Gaussian blur of a standard deviation in pixels (up to about 1.5), zeros beyond the frame."""
    if spread == 0:
        return picture
    taps = np.exp(-0.5 * (np.arange(-3, 4) / spread) ** 2)
    taps /= taps.sum()
    for _ in range(2):
        padded = np.pad(picture, ((3, 3), (0, 0)))
        picture = sum(tap * padded[i : i + picture.shape[0]] for i, tap in enumerate(taps)).T  # type: ignore[union-attr]
    return picture


def _grown(mask: np.ndarray) -> np.ndarray:
    """A Boolean picture with every region one pixel larger, so that faint edges belong to it."""
    padded = np.pad(mask, 1)
    out = np.zeros_like(mask)
    for dy, dx in product(range(3), range(3)):
        out |= padded[dy : dy + mask.shape[0], dx : dx + mask.shape[1]]
    return out
