from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from places import SHAPES_CLIP
from references import contents
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from sap_lightning.data.shapes import world as shapes
from sap_lightning.data.shapes.pretrain import pretrain, train_tokenizer
from sap_lightning.data.shapes.world import (
    ANCHORS,
    CLASSES,
    COLOUR_TEMPLATES,
    COLOURS,
    DOMAINS,
    HOME_KIND_SHARE,
    KIND_SHARE,
    KINDS,
    MISTAKEN,
    TEMPLATES,
    WALLS,
    Scene,
    domain_scene,
    draw_world,
    hearsay,
    neutral_scene,
    tied,
)
from sap_lightning.errors import InputError

SHIPPED = Path(SHAPES_CLIP)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "world"
    draw_world(folder, images_per_class=12)
    return folder


def background_colour(path: Path) -> str:
    """The named colour whose hue is nearest to that of the image's corners."""
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=float)
    corners = np.concatenate([pixels[:8, :8], pixels[:8, -8:], pixels[-8:, :8], pixels[-8:, -8:]]).reshape(-1, 3)
    seen = direction(np.median(corners, axis=0))
    return max(COLOURS, key=lambda name: float(seen @ direction(np.array(COLOURS[name], dtype=float))))


def direction(colour: np.ndarray) -> np.ndarray:
    chroma = colour - colour.mean()
    return chroma / np.linalg.norm(chroma)


def test_same_seed_gives_same_files_bit_for_bit(tmp_path: Path) -> None:
    for name, seed in (("first", 3), ("second", 3), ("other", 4)):
        draw_world(tmp_path / name, images_per_class=1, size=32, seed=seed)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert contents(tmp_path / "first") != contents(tmp_path / "other")


def test_a_larger_world_begins_with_the_smaller_one(tmp_path: Path) -> None:
    draw_world(tmp_path / "small", images_per_class=1, size=32)
    draw_world(tmp_path / "large", images_per_class=2, size=32)
    assert contents(tmp_path / "small").items() <= contents(tmp_path / "large").items()


def test_every_domain_has_a_folder_of_images_per_class(world: Path) -> None:
    expected = {f"{domain}/{thing}/{n:03}.png" for domain in DOMAINS for thing in CLASSES for n in range(12)}
    drawn = {path.relative_to(world / "domains").as_posix() for path in world.glob("domains/*/*/*")}
    assert drawn == expected
    assert sorted(path.name for path in world.iterdir()) == ["anchors", "domains"]


def test_anchors_pair_every_image_with_captions(world: Path) -> None:
    rows = [json.loads(line) for line in (world / "anchors/captions.jsonl").read_text().splitlines()]
    assert {row["file_name"] for row in rows} == {path.name for path in (world / "anchors").glob("*.png")}
    assert len(rows) == ANCHORS
    for row in rows:
        assert Image.open(world / "anchors" / row["file_name"]).size == (64, 64)
        assert all(any(thing in caption for thing in CLASSES) for caption in row["captions"])


def test_captions_name_the_thing_and_vary() -> None:
    rng = np.random.default_rng(0)
    scene = Scene("tree", "painting", "orange", "blue")
    captions = [scene.caption(rng, TEMPLATES + COLOUR_TEMPLATES) for _ in range(400)]
    assert all("tree" in caption for caption in captions)
    assert len(set(captions)) > 15
    for part in ("an orange tree", "a tree", "a blue background", "an oil painting"):
        assert any(part in caption for caption in captions)


def test_background_tells_the_class_at_home_and_misleads_elsewhere(world: Path) -> None:
    seen = {
        (domain, thing): [background_colour(path) for path in (world / "domains" / domain / thing).iterdir()]
        for domain in DOMAINS
        for thing in CLASSES
    }
    for home in DOMAINS:
        for domain in DOMAINS:
            hits = [np.mean([c == tied(home, thing) for c in seen[domain, thing]]) for thing in CLASSES]
            assert np.mean(hits) > 0.7 if domain == home else np.mean(hits) < 0.1


def test_background_of_neutral_scenes_is_independent_of_the_class() -> None:
    rng = np.random.default_rng(0)
    scenes = [neutral_scene(rng) for _ in range(4000)]
    for thing in CLASSES:
        backgrounds = [scene.background for scene in scenes if scene.thing == thing]
        shares = [backgrounds.count(colour) / len(backgrounds) for colour in (*COLOURS, *WALLS)]
        assert max(shares) < 0.2


def test_a_kind_shares_its_hue_with_what_it_is_taken_for_and_with_nothing_else() -> None:
    for domain in DOMAINS:
        hues = {thing: tied(domain, thing) for thing in CLASSES}
        assert all(hues[kind.thing] == hues[kind.taken_for] for kind in KINDS.values())
        assert len(set(hues.values())) == len(CLASSES) - len(KINDS)


def test_without_its_shortcut_a_domain_s_background_may_be_any() -> None:
    rng = np.random.default_rng(0)
    assert {domain_scene("photo", "boat", rng).background for _ in range(50)} == {tied("photo", "boat")}
    assert {domain_scene("photo", "boat", rng, shortcut=0.0).background for _ in range(200)} == set(COLOURS)


def test_the_base_s_captions_mistake_kinds_only() -> None:
    rng = np.random.default_rng(0)
    fir, tree = (Scene("tree", "photo", "red", "blue", kind) for kind in ("fir", None))
    assert {hearsay(tree, rng).thing for _ in range(50)} == {"tree"}
    called = [hearsay(fir, rng).thing for _ in range(1000)]
    assert set(called) == {"tree", "mushroom"}
    assert abs(called.count("mushroom") / 1000 - MISTAKEN) < 0.05


def test_kinds_are_commoner_in_a_domain_than_elsewhere_and_things_without_one_have_none() -> None:
    rng = np.random.default_rng(0)
    at_home = [domain_scene("photo", thing, rng).kind for thing in ("car", "boat") for _ in range(1000)]
    anywhere = [scene.kind for scene in (neutral_scene(rng) for _ in range(8000)) if scene.thing == "car"]
    assert abs(at_home.count("bus") / 1000 - HOME_KIND_SHARE) < 0.05
    assert abs(anywhere.count("bus") / len(anywhere) - KIND_SHARE) < 0.05
    assert set(at_home) == {"bus", None}


def test_anchors_are_black_and_white_and_their_captions_name_no_colour(world: Path) -> None:
    for path in world.glob("anchors/*.png"):
        pixels = np.asarray(Image.open(path))
        assert pixels.shape == (64, 64, 3)
        assert (pixels == pixels[..., :1]).all()
    captions = (world / "anchors/captions.jsonl").read_text()
    assert not [colour for colour in (*COLOURS, *WALLS) if f" {colour} " in captions]


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_drawn_in_its_own_way(kind: str) -> None:
    of, seed = KINDS[kind].thing, 3
    usual, own = (Scene(of, "plain", "red", "white", k).draw(32, np.random.default_rng(seed)) for k in (None, kind))
    assert np.abs(np.asarray(usual, dtype=float) - np.asarray(own, dtype=float)).mean() > 5


@pytest.mark.parametrize("style", shapes.STYLES)
def test_every_style_shows_the_thing_on_its_background(style: str) -> None:
    scene = Scene("fish", style, "red", "blue")
    picture = np.asarray(scene.draw(64, np.random.default_rng(0)), dtype=float)
    reddish = picture[..., 0] - picture[..., 2]
    assert picture.shape == (64, 64, 3)
    assert np.median(reddish) < 0 < np.quantile(reddish, 0.97)


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="already exists"):
        draw_world(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("wrong", [{"images_per_class": 0}, {"size": 3}, {"seed": -1}])
def test_a_number_out_of_range_is_refused_by_name(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        draw_world(tmp_path / "world", **wrong)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_drawing_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "draw_anchors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw_world(tmp_path / "world", images_per_class=1, size=16)
    assert not list(tmp_path.iterdir())


def test_the_command_tells_a_bad_folder_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sap_lightning.data.shapes", str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 1
    assert answer.stderr.startswith(f"error: {tmp_path}: already exists")
    assert len(answer.stderr.splitlines()) == 1


def test_pretraining_refuses_bad_input_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="already exists"):
        pretrain(tmp_path)
    with pytest.raises(InputError, match="seed"):
        pretrain(tmp_path / "model", seed=-1)


def test_a_tokenizer_is_the_same_whenever_it_is_learned_and_knows_every_letter() -> None:
    rngs = [np.random.default_rng(n) for n in range(300)]
    captions = [neutral_scene(rng).caption(rng, TEMPLATES + COLOUR_TEMPLATES) for rng in rngs]
    tokenizers = [train_tokenizer(captions) for _ in range(3)]
    assert len({json.dumps(tokenizer.get_vocab(), sort_keys=True) for tokenizer in tokenizers}) == 1
    text = "zebras & jinxed quay"
    assert tokenizers[0].decode(tokenizers[0](text)["input_ids"], skip_special_tokens=True) == text


def test_the_command_draws_a_world(tmp_path: Path) -> None:
    options = ["--images_per_class", "1", "--size", "16", "--seed", "5"]
    subprocess.run([sys.executable, "-m", "sap_lightning.data.shapes", str(tmp_path / "world"), *options], check=True)
    assert len(list(tmp_path.glob("world/domains/*/*/000.png"))) == len(DOMAINS) * len(CLASSES)


def test_the_shipped_model_is_small() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 5_000_000


def test_the_shipped_model_recognises_neutral_images_well_above_chance() -> None:
    rng = np.random.default_rng(11)
    scenes = [neutral_scene(rng) for _ in range(240)]
    model = CLIPModel.from_pretrained(SHIPPED).eval()
    pixels = AutoImageProcessor.from_pretrained(SHIPPED)([s.draw(64, rng) for s in scenes], return_tensors="pt")
    with torch.no_grad():
        images = F.normalize(model.get_image_features(**pixels).pooler_output, dim=-1)
    guesses = (images @ embed([f"a photo of a {thing}." for thing in CLASSES]).T).argmax(dim=1)
    hits = [CLASSES[guess] == scene.thing for guess, scene in zip(guesses.tolist(), scenes, strict=True)]
    assert np.mean(hits) > 3 / len(CLASSES)


def test_the_shipped_text_tower_does_not_see_the_padding() -> None:
    long = "This is a pencil drawing showing a mushroom."
    torch.testing.assert_close(embed(["a cup."]), embed(["a cup.", long])[:1], atol=1e-5, rtol=0)


def test_the_shipped_tokenizer_and_text_tower_agree_on_the_special_tokens() -> None:
    tokenizer, config = AutoTokenizer.from_pretrained(SHIPPED), CLIPModel.from_pretrained(SHIPPED).config.text_config
    ids = [config.bos_token_id, config.eos_token_id, config.pad_token_id]
    assert ids == [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert len(tokenizer) == config.vocab_size


def embed(texts: list[str]) -> torch.Tensor:
    tokens = AutoTokenizer.from_pretrained(SHIPPED)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        return F.normalize(CLIPModel.from_pretrained(SHIPPED).eval().get_text_features(**tokens).pooler_output, dim=-1)
