"""Pictures of several of the world's things, each in a quarter of its own, and the boxes that they fill."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from PIL import Image

from sap_lightning.data.questions import plural, with_article
from sap_lightning.data.shapes.world import (
    CLASSES,
    COLOURS,
    MEDIA,
    OVERSAMPLING,
    STYLES,
    THINGS,
    WALLS,
    Part,
    backdrop,
    posed,
    shade,
    to_image,
)

MOST = 3
"""Things in a picture; of its four quarters one at least is empty."""

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 in shares of width and height, y down."""

NUMERALS = {2: "two", 3: "three"}


class Item(NamedTuple):
    """One thing of a picture.

    Attributes:
        thing: a name in THINGS.
        colour: a name in COLOURS.
        quarter: which of the picture's, in the order of reading.
    """

    thing: str
    colour: str
    quarter: int


@dataclass(frozen=True)
class Arrangement:
    """What one picture of several things shows.

    Attributes:
        style: a name in STYLES.
        background: the background's colour, a name in COLOURS or WALLS.
        items: the things, in the order of reading, no two in one quarter.
    """

    style: str
    background: str
    items: tuple[Item, ...]

    def draw(self, size: int, rng: Generator) -> tuple[Image.Image, list[Box]]:
        """The arrangement as an RGB image of size × size pixels, and what box each item fills.

        Every thing is drawn alone, by the same hand (light, grain, width of lines), and gives its quarter.
        """
        side = OVERSAMPLING * size
        ground = backdrop(0.5 + 0.5 * shade(self.background, rng), side, rng)
        placed = [place(item, side, rng) for item in self.items]
        hand = rng.integers(2**32)
        picture = np.zeros((side, side, 3), dtype=np.float32)
        for item, parts in zip(self.items, placed, strict=True):
            colour = 0.8 * shade(item.colour, rng)
            drawn = STYLES[self.style](parts, colour, ground, np.random.default_rng(hand))
            if item is self.items[0]:
                picture = np.array(drawn)
            rows, columns = quarter_slices(item.quarter, side)
            picture[rows, columns] = drawn[rows, columns]
        boxes = [extent(parts, item.quarter, side) for item, parts in zip(self.items, placed, strict=True)]
        return to_image(picture).reduce(OVERSAMPLING), boxes

    def boxes(self, rng: Generator) -> list[Box]:
        """Boxes such as the items fill when they are drawn."""
        return [extent(place(item, 2, rng), item.quarter, 2) for item in self.items]

    def caption(self, rng: Generator, templates: Sequence[str]) -> str:
        """One of the many things people would say of the picture, by templates of the world."""
        return self.said(str(rng.choice(MEDIA[self.style])), str(rng.choice(templates)))

    def said(self, medium: str, template: str) -> str:
        """A template of the world with this medium and what the picture shows."""
        return template.format(
            medium=with_article(medium),
            thing=listed(self._counted()),
            coloured=listed([with_article(f"{item.colour} {item.thing}") for item in self.items]),
            background=with_article(self.background),
        )

    def _counted(self) -> list[str]:
        often = Counter(item.thing for item in self.items)
        return [with_article(name) if n == 1 else f"{NUMERALS[n]} {plural(name)}" for name, n in often.items()]


def listed(names: Sequence[str]) -> str:
    """Names as a sentence lists them."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def arranged(style: str, things: Sequence[str], rng: Generator) -> Arrangement:
    """These things in some quarters and colours, none in the background's."""
    background = str(rng.choice([*COLOURS, *WALLS]))
    colours = [name for name in COLOURS if name != background]
    quarters = sorted(rng.choice(4, len(things), replace=False).tolist())
    shuffled = rng.permutation(list(things)).tolist()
    items = (Item(thing, str(rng.choice(colours)), at) for thing, at in zip(shuffled, quarters, strict=True))
    return Arrangement(style, background, tuple(items))


def some_things(rng: Generator) -> list[str]:
    """One thing to MOST, no two alike."""
    return [str(name) for name in rng.choice(CLASSES, rng.integers(1, MOST + 1), replace=False)]


def several_of(thing: str, number: int, rng: Generator) -> list[str]:
    """A thing so many times, and others up to MOST."""
    others = [name for name in CLASSES if name != thing]
    more = rng.integers(0, MOST - number + 1)
    return [thing] * number + [str(name) for name in rng.choice(others, more)]


def place(item: Item, side: int, rng: Generator) -> list[Part]:
    """The thing's parts in a random pose in its quarter of a canvas of side × side."""
    rows, columns = quarter_slices(item.quarter, side)
    return [
        (tone, [(x + columns.start, y + rows.start) for x, y in points])
        for tone, points in posed(THINGS[item.thing](rng), side // 2, rng)
    ]


def quarter_slices(quarter: int, side: int) -> tuple[slice, slice]:
    """Rows and columns of a quarter."""
    row, column = divmod(quarter, 2)
    half = side // 2
    return slice(row * half, (row + 1) * half), slice(column * half, (column + 1) * half)


def extent(parts: Sequence[Part], quarter: int, side: int) -> Box:
    """The box around polygons, as far as it lies in their quarter."""
    rows, columns = quarter_slices(quarter, side)
    points = np.array([point for _, outline in parts for point in outline])
    low, high = (columns.start, rows.start), (columns.stop, rows.stop)
    (x1, y1), (x2, y2) = np.clip([points.min(axis=0), points.max(axis=0)], low, high) / side
    return float(x1), float(y1), float(x2), float(y2)
