import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from mmtp.eval.shapes import COLOURS, PALETTE, SHAPES, components, draw, parse


def picture(shape: str | None, colour: str, box=(20, 14, 41, 33), background=(240, 235, 250), blur: float = 0.0) -> Image.Image:
    image = Image.new("RGB", (64, 64), background)
    add(image, shape, colour, box)
    return image.filter(ImageFilter.GaussianBlur(blur)) if blur else image


def add(image: Image.Image, shape: str | None, colour: str, box) -> None:
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = box
    if shape == "circle":
        pen.ellipse(box, fill=PALETTE[colour])
    elif shape == "rectangle":
        pen.rectangle(box, fill=PALETTE[colour])
    elif shape == "triangle":
        pen.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=PALETTE[colour])


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
def test_every_colour_and_shape_sharp_and_blurred(shape, colour):
    for blur in (0.0, 1.0):
        found = parse(tensor(picture(shape, colour, blur=blur)))
        assert (found.shape, found.colour, found.components) == (shape, colour, 1)
        assert found.overlap > 0.8


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_size_place_and_background_do_not_matter(data):
    shape, colour = data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from(COLOURS))
    width = data.draw(st.integers(10, 34))
    height = width - 1 if shape != "rectangle" else data.draw(st.integers(8, 34))
    left, top = data.draw(st.integers(0, 63 - width)), data.draw(st.integers(0, 63 - height))
    background = tuple(data.draw(st.integers(215, 255)) for _ in range(3))
    found = parse(tensor(picture(shape, colour, (left, top, left + width, top + height), background)))
    assert (found.shape, found.colour) == (shape, colour)


def test_area_counts_covered_pixels():
    assert parse(tensor(picture("rectangle", "blue", (10, 10, 19, 29)))).area == pytest.approx(200, abs=1)


def test_nothing_specks_and_several_objects_are_no_drawing():
    empty = parse(tensor(picture(None, "red")))
    assert (empty.shape, empty.colour, empty.components, empty.area) == (None, None, 0, 0.0)

    speck = picture("circle", "red")
    speck.putpixel((60, 60), (0, 0, 0))
    assert parse(tensor(speck)).shape == "circle"

    two = picture("circle", "red")
    add(two, "rectangle", "blue", (50, 50, 58, 58))
    found = parse(tensor(two))
    assert (found.shape, found.colour, found.components) == (None, "red", 2)


def test_an_object_that_is_no_shape_is_refused():
    cross = picture("rectangle", "red", (10, 28, 50, 34))
    add(cross, "rectangle", "red", (27, 10, 33, 52))
    found = parse(tensor(cross))
    assert found.shape is None and found.components == 1 and found.colour == "red"


def test_a_colour_outside_the_palette_is_not_named():
    pink = Image.new("RGB", (64, 64), (250, 250, 250))
    ImageDraw.Draw(pink).ellipse((20, 20, 40, 40), fill=(255, 100, 200))
    assert parse(tensor(pink)).colour is None


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.7))
def test_components_agree_with_flood_fill(seed, density):
    mask = np.random.default_rng(seed).random((9, 12)) < density
    left = {(int(r), int(c)) for r, c in np.argwhere(mask)}
    wanted = set()
    while left:
        region, todo = set(), [left.pop()]
        while todo:
            r, c = todo.pop()
            region.add((r, c))
            near = {(r + dr, c + dc) for dr in (-1, 0, 1) for dc in (-1, 0, 1)} & left
            left -= near
            todo += near
        wanted.add(frozenset(region))
    assert {frozenset(map(tuple, region.tolist())) for region in components(mask)} == wanted


def test_drawn_shapes_have_the_areas_of_geometry():
    box = (4.0, 4.0, 24.0, 24.0)
    areas = {shape: draw(shape, box, (32, 32)).sum() for shape in SHAPES}
    assert areas["rectangle"] == pytest.approx(400, rel=0.01)
    assert areas["circle"] == pytest.approx(np.pi * 100, rel=0.01)
    assert areas["triangle"] == pytest.approx(200, rel=0.02)


def test_real_pictures_are_read_right():
    easy_vqa = pytest.importorskip("easy_vqa")
    questions, answers, pictures = easy_vqa.get_train_questions()
    paths = easy_vqa.get_train_image_paths()
    checked = 0
    for question, answer, index in zip(questions[:600], answers, pictures, strict=False):
        if answer in COLOURS or answer in SHAPES:
            with Image.open(paths[index]) as image:
                found = parse(tensor(image.convert("RGB")))
            assert answer in (found.colour, found.shape), (index, question, answer, found)
            checked += 1
    assert checked > 100
