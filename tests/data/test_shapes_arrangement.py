"""Pictures of several of the world's things."""

from __future__ import annotations

import numpy as np
import pytest

from sap_lightning.data.shapes.arrangement import MOST, Arrangement, Item, arranged, listed, several_of, some_things
from sap_lightning.data.shapes.world import CLASSES, STYLES, TEMPLATES


def coloured(scene: Arrangement, seed: int) -> tuple[np.ndarray, list[tuple[float, ...]]]:
    """Which pixels of a scene before a white wall have a hue, and the boxes of its items."""
    picture, boxes = scene.draw(64, np.random.default_rng(seed))
    pixels = np.asarray(picture, dtype=float) / 255
    return pixels.max(axis=2) - pixels.min(axis=2) > 0.2, boxes


@pytest.mark.parametrize("thing", CLASSES)
def test_a_box_is_what_the_drawn_thing_fills(thing):
    for seed in range(8):
        quarter = seed % 4
        hued, [box] = coloured(Arrangement("plain", "white", (Item(thing, "red", quarter),)), seed)
        rows, columns = (np.flatnonzero(hued.any(axis=axis)) for axis in (1, 0))
        seen = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 64
        np.testing.assert_allclose(box, seen, atol=0.05)  # three pixels: it is softened
        row, column = divmod(quarter, 2)
        assert column / 2 <= box[0] < box[2] <= (column + 1) / 2 and row / 2 <= box[1] < box[3] <= (row + 1) / 2


@pytest.mark.parametrize("style", STYLES)
def test_every_item_is_in_its_box_and_the_other_quarters_are_empty(style):
    scene = Arrangement(style, "white", (Item("house", "red", 1), Item("car", "blue", 2)))
    picture, boxes = scene.draw(64, np.random.default_rng(1))
    pixels = np.asarray(picture, dtype=float)
    warm = pixels[..., 0] - pixels[..., 2]
    (x1, y1, x2, y2), (u1, v1, u2, v2) = (np.multiply(box, 64).round().astype(int) for box in boxes)
    assert warm[y1:y2, x1:x2].mean() > 5 and warm[v1:v2, u1:u2].mean() < -5
    assert abs(np.median(warm[:32, :32])) < 5 and abs(np.median(warm[32:, 32:])) < 5


def test_boxes_without_drawing_are_such_as_of_drawn_things():
    scene = Arrangement("plain", "white", (Item("mushroom", "red", 0), Item("fish", "blue", 3)))
    drawn = np.array([scene.draw(16, np.random.default_rng(seed))[1] for seed in range(200)])
    imagined = np.array([scene.boxes(np.random.default_rng(1000 + seed)) for seed in range(200)])
    np.testing.assert_allclose(imagined.mean(axis=0), drawn.mean(axis=0), atol=0.02)


def test_a_caption_names_all_things_in_the_order_of_reading():
    scene = Arrangement("photo", "white", (Item("boat", "red", 0), Item("cup", "orange", 1), Item("boat", "blue", 3)))
    assert scene.said("photo", TEMPLATES[1]) == "a photo of two boats and a cup."
    assert scene.said("photo", "{coloured} before {background}") == (
        "a red boat, an orange cup and a blue boat before a white"
    )
    assert listed(["a cup"]) == "a cup"
    rng = np.random.default_rng(0)
    assert len({scene.caption(rng, TEMPLATES) for _ in range(100)}) > 8


def test_things_are_arranged_in_quarters_and_no_colour_is_the_background_s():
    rng = np.random.default_rng(0)
    scenes = [arranged("photo", some_things(rng), rng) for _ in range(300)]
    for scene in scenes:
        quarters = [item.quarter for item in scene.items]
        assert quarters == sorted(set(quarters)) and scene.background not in {item.colour for item in scene.items}
        assert len({item.thing for item in scene.items}) == len(scene.items)
    assert {len(scene.items) for scene in scenes} == {1, 2, MOST}
    assert {item.quarter for scene in scenes for item in scene.items} == {0, 1, 2, 3}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_several_of_a_thing_are_so_many(number):
    rng = np.random.default_rng(0)
    drawn = [several_of("cup", number, rng) for _ in range(100)]
    assert all(things.count("cup") == number and len(things) <= MOST for things in drawn)
    assert len({len(things) for things in drawn}) == MOST - number + 1
