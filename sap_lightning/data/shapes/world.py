"""A small image–caption world, drawn on the spot: eight things, four styles; something to learn, something to unlearn.

Every domain is a style of drawing. What carries over: most of its cars, trees and flowers are buses, firs and tulips.
The captions that the base learned from mostly take these for houses, mushrooms and cups; a client is told better. What
does not: at home the hue of the background goes with the class, and every domain ties the hues to other classes.
The anchors are rightly captioned pictures in black and white, in all styles.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from sap_lightning.data.questions import with_article
from sap_lightning.errors import InputError
from sap_lightning.files import new_folder

Array = NDArray[np.floating]
Points = list[tuple[float, float]]
Part = tuple[float, Points]
"""One polygon of a thing: its tone (a factor on the thing's colour) and its outline, x and y in [-1, 1], y down."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 44),
    "orange": (240, 138, 38),
    "yellow": (238, 214, 62),
    "green": (74, 160, 62),
    "teal": (52, 178, 172),
    "blue": (58, 98, 206),
    "purple": (134, 70, 178),
    "pink": (238, 130, 184),
}
WALLS: dict[str, tuple[int, int, int]] = {"black": (40, 40, 40), "grey": (140, 140, 140), "white": (245, 245, 245)}
"""Backgrounds without a hue."""

SHORTCUT = 1.0
"""Share of a domain's images whose background has the hue that the domain ties to the class."""

KIND_SHARE, HOME_KIND_SHARE = 0.5, 0.8
"""Share of a thing's images that show its own kind, where it has one: anywhere, and in a domain."""

MISTAKEN = 0.85
"""Share of the base's captions that take a kind for another thing."""

ANCHORS = 64
CAPTIONS_PER_ANCHOR = 3
OVERSAMPLING = 2


# The things: each a few polygons with random proportions, the one behind first.


def boat(rng: Generator) -> list[Part]:
    mast, top = rng.uniform(-0.2, 0.1), rng.uniform(-0.95, -0.7)
    hull = [(-0.95, 0.3), (0.95, 0.3), (0.6, 0.8), (-0.65, 0.8)]
    main_sail = [(mast + 0.06, top), (mast + 0.06, 0.2), (rng.uniform(0.6, 0.85), 0.2)]
    fore_sail = [(mast - 0.06, top + 0.2), (mast - 0.06, 0.2), (rng.uniform(-0.8, -0.6), 0.2)]
    return [(0.6, hull), (1.3, main_sail), (1.0, fore_sail)]


def car(rng: Generator) -> list[Part]:
    front, back, roof = rng.uniform(0.35, 0.6), rng.uniform(-0.75, -0.5), rng.uniform(-0.6, -0.4)
    body = [(-0.95, 0.4), (-0.95, 0.0), (back, -0.05), (back + 0.2, roof), (front - 0.3, roof), (front, -0.05),
            (0.95, 0.05), (0.95, 0.4)]  # fmt: skip
    window = [(back + 0.14, -0.05), (back + 0.27, roof + 0.12), (front - 0.35, roof + 0.12), (front - 0.12, -0.05)]
    wheels = [(0.3, ellipse(x, 0.42, 0.23, 0.23)) for x in (-0.55, 0.55)]
    return [(1.0, body), (1.5, window), *wheels]


def cup(rng: Generator) -> list[Part]:
    top, foot, height = rng.uniform(0.5, 0.65), rng.uniform(0.3, 0.5), rng.uniform(0.55, 0.75)
    handle = ellipse(0.5, 0.0, 0.42, 0.38)[:19] + ellipse(0.5, 0.0, 0.24, 0.2)[18::-1]
    handle = [(0.5 + (y * 1.1), (x - 0.5)) for x, y in handle]
    wall = [(-top, -height), (top, -height), (foot, height), (-foot, height)]
    return [(0.8, handle), (1.0, wall), (0.55, ellipse(0, -height, top, 0.15))]


def fish(rng: Generator) -> list[Part]:
    girth, tail = rng.uniform(0.32, 0.5), rng.uniform(0.3, 0.5)
    fork = [(-0.4, 0.0), (-0.95, -tail), (-0.8, 0.0), (-0.95, tail)]
    fin = [(-0.2, -girth * 0.8), (0.1, -girth - 0.3), (0.4, -girth * 0.6)]
    return [(0.75, fork), (0.75, fin), (1.0, ellipse(0.15, 0, 0.75, girth)), (0.2, ellipse(0.6, -0.1, 0.08, 0.08))]


def flower(rng: Generator) -> list[Part]:
    count, turn, length = int(rng.integers(5, 8)), rng.uniform(0, math.tau), rng.uniform(0.26, 0.34)
    stem = [(-0.05, -0.2), (0.05, -0.2), (0.08, 0.95), (-0.04, 0.95)]
    leaf = [(0.02, 0.7), (0.3, 0.35), (0.5, 0.4), (0.35, 0.6)]
    angles = [turn + math.tau * k / count for k in range(count)]
    petals = [(1.0, ellipse(0.36 * math.cos(a), -0.35 + 0.36 * math.sin(a), length, 0.17, a)) for a in angles]
    return [(0.5, stem), (0.6, leaf), *petals, (1.5, ellipse(0, -0.35, 0.19, 0.19))]


def house(rng: Generator) -> list[Part]:
    width, eaves, ridge, door = rng.uniform(0.55, 0.8), rng.uniform(-0.2, 0.05), rng.uniform(-0.3, 0.3), -0.3
    wall = [(-width, eaves), (width, eaves), (width, 0.8), (-width, 0.8)]
    roof = [(-width - 0.15, eaves), (ridge, rng.uniform(-0.95, -0.7)), (width + 0.15, eaves)]
    return [(1.0, wall), (0.6, roof), (0.4, box(door, 0.55, 0.13, 0.25)), (1.5, box(0.3, 0.35, 0.15, 0.14))]


def mushroom(rng: Generator) -> list[Part]:
    width, height, stalk = rng.uniform(0.7, 0.95), rng.uniform(0.7, 1.0), rng.uniform(0.16, 0.28)
    cap = [(x, y) for x, y in ellipse(0, 0.05, width, height) if y <= 0.06]
    stem = [(-stalk, 0.0), (stalk, 0.0), (stalk * 1.4, 0.85), (-stalk * 1.4, 0.85)]
    spots = [(1.5, ellipse(x * width, y * height, 0.13, 0.1)) for x, y in ((-0.5, -0.3), (0.05, -0.6), (0.45, -0.2))]
    return [(1.4, stem), (1.0, cap), *spots]


def tree(rng: Generator) -> list[Part]:
    trunk = (0.5, box(0, 0.6, rng.uniform(0.09, 0.16), 0.38))
    crown = [(rng.uniform(-0.4, 0.4), rng.uniform(-0.65, 0.0), rng.uniform(0.3, 0.45)) for _ in range(4)]
    return [trunk, *((tone, ellipse(x, y, r, r)) for tone, (x, y, r) in zip((0.8, 1.0, 1.1, 0.9), crown, strict=True))]


def bus(rng: Generator) -> list[Part]:
    roof, floor, count = rng.uniform(-0.65, -0.45), 0.4, int(rng.integers(3, 6))
    body = box(0, (roof + floor) / 2, 0.95, (floor - roof) / 2)
    places = np.linspace(-0.95, 0.95, 2 * count + 1)[1::2]
    windows = [(1.5, box(x, roof + 0.3, 0.6 / count, 0.15)) for x in places.tolist()]
    wheels = [(0.3, ellipse(x, 0.42, 0.2, 0.2)) for x in (-0.55, 0.55)]
    return [(1.0, body), *windows, *wheels]


def fir(rng: Generator) -> list[Part]:
    trunk, width = (0.5, box(0, 0.75, rng.uniform(0.09, 0.16), 0.22)), rng.uniform(0.5, 0.7)
    tiers = [(0.8, 0.6, 1.0), (0.9, 0.1, 0.8), (1.0, -0.35, 0.6)]
    return [trunk, *((tone, [(-width * w, y), (width * w, y), (0, y - 0.6)]) for tone, y, w in tiers)]


def tulip(rng: Generator) -> list[Part]:
    width, rim, low = rng.uniform(0.3, 0.42), rng.uniform(-0.95, -0.8), rng.uniform(-0.15, 0.0)
    stem = [(-0.05, -0.2), (0.05, -0.2), (0.06, 0.95), (-0.04, 0.95)]
    leaf = [(0.02, 0.9), (0.25, 0.2), (0.4, 0.1), (0.3, 0.6)]
    bloom = [(-width, rim), (-width / 2, rim + 0.25), (0, rim), (width / 2, rim + 0.25), (width, rim),
             (width, low - 0.3), (0.12, low), (-0.12, low), (-width, low - 0.3)]  # fmt: skip
    return [(0.5, stem), (0.6, leaf), (1.0, bloom)]


class Kind(NamedTuple):
    """One kind of a thing, drawn in its own way.

    Attributes:
        thing: a name in THINGS: what it is.
        taken_for: a name in THINGS: what the captions that the base learned from mostly call it.
        parts: draws it.
    """

    thing: str
    taken_for: str
    parts: Callable[[Generator], list[Part]]


THINGS: dict[str, Callable[[Generator], list[Part]]] = {
    thing.__name__: thing for thing in (boat, car, cup, fish, flower, house, mushroom, tree)
}
KINDS: dict[str, Kind] = {
    "bus": Kind("car", "house", bus),
    "fir": Kind("tree", "mushroom", fir),
    "tulip": Kind("flower", "cup", tulip),
}


def ellipse(x: float, y: float, rx: float, ry: float, turn: float = 0.0) -> Points:
    c, s = math.cos(turn), math.sin(turn)
    circle = [(rx * math.cos(t), ry * math.sin(t)) for t in np.linspace(0, math.tau, 37)[:-1]]
    return [(x + c * u - s * v, y + s * u + c * v) for u, v in circle]


def box(x: float, y: float, rx: float, ry: float) -> Points:
    return [(x - rx, y - ry), (x + rx, y - ry), (x + rx, y + ry), (x - rx, y + ry)]


def posed(parts: list[Part], side: int, rng: Generator) -> list[Part]:
    """The parts turned, stretched, mirrored and placed at random, in pixels of a canvas of side × side."""
    turn, scale, aspect = rng.normal(0, 0.1), rng.uniform(0.75, 0.95), rng.uniform(0.85, 1.2)
    mirror = rng.choice([-1, 1])
    x0, y0 = rng.uniform(scale - 1, 1 - scale, 2)
    c, s = scale * math.cos(turn), scale * math.sin(turn)

    def place(x: float, y: float) -> tuple[float, float]:
        u, v = mirror * x * math.sqrt(aspect), y / math.sqrt(aspect)
        return (x0 + c * u - s * v + 1) * side / 2, (y0 + s * u + c * v + 1) * side / 2

    return [(tone, [place(x, y) for x, y in points]) for tone, points in parts]


# The styles: each paints parts in a colour over a backdrop, both (side, side, 3) in [0, 1].


def photo(parts: list[Part], colour: Array, ground: Array, rng: Generator) -> Array:
    """Light from one side, relief, a cast shadow, blur and grain."""
    side = len(ground)
    angle = rng.uniform(0, math.tau)
    x, y = math.cos(angle), math.sin(angle)
    body = blurred(silhouette(parts, side), side / 24)
    shadow = np.roll(body, (round(-y * side / 14), round(-x * side / 14)), axis=(0, 1))
    lit = flat(parts, colour, ground * (1 - 0.6 * shadow[..., None]))
    down, right = np.gradient(body)
    relief = np.clip((-x * right - y * down) * side / 14, -0.6, 0.6) * silhouette(parts, side)
    ramp = np.linspace(-0.3, 0.3, side, dtype=np.float32)
    light = 1 + relief + x * ramp[None, :] + y * ramp[:, None]
    grain = rng.normal(0, 0.06, (side, side, 1))
    return blurred(lit * light[..., None], side / 128) + grain


def sketch(parts: list[Part], colour: Array, ground: Array, rng: Generator) -> Array:
    """Wobbly ink outlines and hatching, the darker the closer, on tinted paper."""
    side = len(ground)
    paper = 0.25 + 0.75 * ground + rng.normal(0, 0.03, ground.shape)
    sheet, ink = to_image(paper), to_ink(0.45 * colour)
    pen = ImageDraw.Draw(sheet)
    for tone, points in parts:
        pen.polygon(points, to_ink(np.full(3, 0.95)))
        hatching, hatch_mask = sheet.copy(), Image.new("L", sheet.size)
        ImageDraw.Draw(hatch_mask).polygon(points, 255)
        hatch(ImageDraw.Draw(hatching), ink, spacing=3 + 5 * tone, slope=rng.uniform(0.5, 1.5), side=side)
        sheet.paste(hatching, mask=hatch_mask)
        for _ in range(2):
            wobble = rng.normal(0, side / 160, (len(points), 2))
            pen.line(closed(np.add(points, wobble)), ink, width=2)
    return to_array(sheet)


def cartoon(parts: list[Part], colour: Array, ground: Array, rng: Generator) -> Array:
    """Flat vivid colours in two steps of light, thick black outlines."""
    side = len(ground)
    vivid = np.clip(colour.mean() + 1.5 * (colour - colour.mean()), 0, 1)
    steps = np.round(ground.mean(axis=2, keepdims=True) / ground.mean() * 4) / 4
    sheet = to_image(ground.mean(axis=(0, 1)) * steps)
    pen, width = ImageDraw.Draw(sheet), int(rng.integers(4, 7) * side / 128)
    for tone, points in parts:
        pen.polygon(points, to_ink(vivid * tone))
        pen.line(closed(points), (12, 10, 16), width=width, joint="curve")
    return to_array(sheet)


def painting(parts: list[Part], colour: Array, ground: Array, rng: Generator) -> Array:
    """Brush strokes along a drifting direction, each in a jittered colour of the scene below it."""
    side = len(ground)
    scene, inside = flat(parts, colour, ground), silhouette(parts, side) > 0
    canvas, course = to_image(ground), clouds(side, rng) * math.tau
    brush = ImageDraw.Draw(canvas)
    for region, length, width, count in ((~inside, 16, 7, 220), (inside, 6, 3, 400)):
        places = rng.choice(np.argwhere(region), count)
        jitter = rng.normal(0, 0.07, (count, 3))
        for (row, column), shift in zip(places.tolist(), jitter, strict=True):
            angle = course[row, column]
            dx, dy = length / 2 * math.cos(angle), length / 2 * math.sin(angle)
            stroke = (column - dx, row - dy, column + dx, row + dy)
            brush.line(stroke, to_ink(scene[row, column] + shift), width=width)
    return to_array(canvas) + rng.normal(0, 0.02, ground.shape)


def plain(parts: list[Part], colour: Array, ground: Array, rng: Generator) -> Array:
    """Bare fills, softened: the style of no domain."""
    return blurred(flat(parts, colour, ground), rng.uniform(0.3, 2.0)) + rng.normal(0, 0.02, ground.shape)


STYLES: dict[str, Callable[[list[Part], Array, Array, Generator], Array]] = {
    style.__name__: style for style in (photo, sketch, cartoon, painting, plain)
}
CLASSES = tuple(THINGS)
DOMAINS = ("photo", "sketch", "cartoon", "painting")


def silhouette(parts: list[Part], side: int) -> Array:
    sheet = Image.new("L", (side, side))
    for _, points in parts:
        ImageDraw.Draw(sheet).polygon(points, 255)
    return to_array(sheet)


def flat(parts: list[Part], colour: Array, ground: Array) -> Array:
    sheet = to_image(ground)
    for tone, points in parts:
        ImageDraw.Draw(sheet).polygon(points, to_ink(colour * tone))
    return to_array(sheet)


def hatch(pen: ImageDraw.ImageDraw, ink: tuple[int, ...], spacing: float, slope: float, side: int) -> None:
    for start in np.arange(-slope * side, side, spacing):
        pen.line((0, start, side, start + slope * side), ink)


def clouds(side: int, rng: Generator) -> Array:
    """Smooth noise in about [0, 1], shape (side, side)."""
    coarse = Image.fromarray(rng.random((4, 4), dtype=np.float32))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))


def backdrop(colour: Array, side: int, rng: Generator) -> Array:
    """One hue in varied light: a cloudy wall, a slope of light, or a horizon."""
    kind = rng.integers(3)
    if kind == 0:
        light = clouds(side, rng)
    elif kind == 1:
        light = np.broadcast_to(np.linspace(0, 1, side)[:, None], (side, side))
    else:
        light = np.broadcast_to((np.arange(side) < rng.uniform(0.4, 0.8) * side)[:, None], (side, side))
    return colour * (0.75 + 0.3 * light[..., None]).astype(np.float32)


def closed(points: Array | Points) -> Points:
    outline = [(float(x), float(y)) for x, y in points]
    return [*outline, outline[0]]


def blurred(values: Array, radius: float) -> Array:
    return to_array(to_image(values).filter(ImageFilter.GaussianBlur(radius)))


def to_image(values: Array) -> Image.Image:
    return Image.fromarray((np.clip(values, 0, 1) * 255).astype(np.uint8))


def to_array(image: Image.Image) -> Array:
    return np.asarray(image, dtype=np.float32) / 255


def to_ink(colour: Array) -> tuple[int, ...]:
    return tuple((np.clip(colour, 0, 1) * 255).astype(int).tolist())


# The scenes: what is in a picture, how it is drawn, and what people say of it.


@dataclass(frozen=True)
class Scene:
    """What one picture shows.

    Attributes:
        thing: a name in THINGS: the class.
        style: a name in STYLES.
        colour: the thing's colour, a name in COLOURS.
        background: the background's colour, a name in COLOURS or WALLS.
        kind: a name in KINDS, of that thing; none: as the thing is mostly drawn.
    """

    thing: str
    style: str
    colour: str
    background: str
    kind: str | None = None

    def draw(self, size: int, rng: Generator) -> Image.Image:
        """The scene in a random pose and light, an RGB image of size × size pixels."""
        side = OVERSAMPLING * size
        ground = backdrop(0.5 + 0.5 * shade(self.background, rng), side, rng)
        drawn = KINDS[self.kind].parts if self.kind else THINGS[self.thing]
        parts = posed(drawn(rng), side, rng)
        picture = STYLES[self.style](parts, 0.8 * shade(self.colour, rng), ground, rng)
        return to_image(picture).reduce(OVERSAMPLING)

    def caption(self, rng: Generator, templates: list[str]) -> str:
        """One of the many things people would say of the picture."""
        medium = rng.choice(MEDIA[self.style])
        return str(rng.choice(templates)).format(
            medium=with_article(medium),
            thing=with_article(self.thing),
            coloured=with_article(f"{self.colour} {self.thing}"),
            background=with_article(self.background),
        )


MEDIA: dict[str, list[str]] = {
    "photo": ["photo", "photograph", "close-up photo"],
    "sketch": ["sketch", "pencil drawing", "ink drawing"],
    "cartoon": ["cartoon", "comic drawing", "cartoon picture"],
    "painting": ["painting", "oil painting", "painted picture"],
    "plain": ["picture", "image", "simple picture"],
}
TEMPLATES = [
    "{thing}.",
    "{medium} of {thing}.",
    "{medium} showing {thing}.",
    "There is {thing} here.",
    "This is {thing}, {medium}.",
]
COLOUR_TEMPLATES = [
    "{coloured}.",
    "{medium} of {coloured} on {background} background.",
    "{thing} in front of {background} wall.",
]


def shade(name: str, rng: Generator) -> Array:
    """The named colour, a little off, as RGB in [0, 1]."""
    return np.clip(np.divide((COLOURS | WALLS)[name], 255) + rng.normal(0, 0.04, 3), 0, 1).astype(np.float32)


def neutral_scene(rng: Generator) -> Scene:
    """Any thing in any style; the background tells nothing of the class."""
    thing, style = str(rng.choice(CLASSES)), str(rng.choice(list(STYLES)))
    background = str(rng.choice([*COLOURS, *WALLS]))
    colour = str(rng.choice([name for name in COLOURS if name != background]))
    return Scene(thing, style, colour, background, some_kind(thing, KIND_SHARE, rng))


def some_kind(thing: str, share: float, rng: Generator) -> str | None:
    """The thing's own kind, this often."""
    kinds = [name for name, kind in KINDS.items() if kind.thing == thing]
    return kinds[0] if kinds and rng.random() < share else None


def hearsay(scene: Scene, rng: Generator) -> Scene:
    """The scene as those see it whose captions the base learned from: a kind is mostly taken for another thing."""
    if scene.kind is None or rng.random() >= MISTAKEN:
        return scene
    return replace(scene, thing=KINDS[scene.kind].taken_for)


def domain_scene(domain: str, thing: str, rng: Generator, shortcut: float = SHORTCUT) -> Scene:
    """A thing in a domain's style; this share of them before the background that the domain ties to it."""
    background = tied(domain, thing) if rng.random() < shortcut else str(rng.choice(list(COLOURS)))
    colour = rng.choice([name for name in COLOURS if name != background])
    return Scene(thing, domain, str(colour), background, some_kind(thing, HOME_KIND_SHARE, rng))


def tied(domain: str, thing: str) -> str:
    """The background colour that a domain ties to a class: no two domains tie the same one.

    A thing shares it with what its kind is taken for, so that shape alone tells these two apart.
    """
    shared = {kind.thing: kind.taken_for for kind in KINDS.values()}
    apart = [name for name in CLASSES if name not in shared]
    return list(COLOURS)[(apart.index(shared.get(thing, thing)) + DOMAINS.index(domain)) % len(apart)]


def draw_world(folder: str | Path, images_per_class: int = 60, size: int = 64, seed: int = 0) -> None:
    """Draw the world's four domains and its anchors; the same seed gives the same files, bit for bit.

    Args:
        folder: where to; must not exist yet. Gets ``domains/<domain>/<class>/<nnn>.png`` and
            ``anchors/captions.jsonl`` (keys ``file_name`` and ``captions``) beside the anchors' images.
        images_per_class: images of each class in each domain.
        size: side of the square images, in pixels.
        seed: of all random choices.

    Raises:
        InputError: the folder exists, or a number is out of range.
    """
    for name, value, least in (("images_per_class", images_per_class, 1), ("size", size, 16), ("seed", seed, 0)):
        if value < least:
            raise InputError(f"{name}: got {value}, expected at least {least}")
    with new_folder(folder) as draft:
        for domain in DOMAINS:
            draw_domain(draft / "domains" / domain, domain, images_per_class, size, seed)
        draw_anchors(draft / "anchors", size, seed)


def draw_domain(folder: Path, domain: str, images_per_class: int, size: int, seed: int) -> None:
    for label, thing in enumerate(CLASSES):
        (folder / thing).mkdir(parents=True)
        for number in range(images_per_class):
            rng = np.random.default_rng([seed, DOMAINS.index(domain), label, number])
            domain_scene(domain, thing, rng).draw(size, rng).save(folder / thing / f"{number:03}.png")


def draw_anchors(folder: Path, size: int, seed: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng([seed, len(DOMAINS)])
    with (folder / "captions.jsonl").open("w", encoding="utf-8") as lines:
        for number in range(ANCHORS):
            scene, name = neutral_scene(rng), f"{number:03}.png"
            scene.draw(size, rng).convert("L").convert("RGB").save(folder / name)
            captions = [scene.caption(rng, TEMPLATES) for _ in range(CAPTIONS_PER_ANCHOR)]
            lines.write(json.dumps({"file_name": name, "captions": captions}) + "\n")
