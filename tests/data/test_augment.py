import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sap_lightning.data.augment import RATIO, draw_crops, epoch_crops, resized_crop


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("smallest", [0.6, 0.8])
def test_boxes_keep_area_and_ratio_and_stay_inside(smallest):
    boxes, flips = draw_crops(10_000, smallest, torch.Generator().manual_seed(0))
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    assert boxes.min() >= 0 and boxes.max() <= 1 + 1e-6
    assert smallest - 1e-6 <= (width * height).min() < smallest + 0.01
    assert (width / height).min() >= RATIO[0] - 1e-6 and (width / height).max() <= RATIO[1] + 1e-6
    assert abs(flips.float().mean() - 0.5) < 0.02
    assert (width * height).std() > 0.03 and boxes[:, 0].std() > 0.02


@pytest.mark.parametrize(("side", "rounding"), [(16, 1e-6), (224, 5e-5)])
def test_the_whole_box_returns_the_image(side, rounding):
    batch = images(3, 3, side, side)
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(3, 4)
    torch.testing.assert_close(
        resized_crop(batch, whole, torch.zeros(3, dtype=torch.bool)), batch, atol=rounding, rtol=0
    )


def test_a_flip_mirrors_left_and_right():
    batch = images(2, 3, 8, 12)
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(2, 4)
    flipped = resized_crop(batch, whole, torch.tensor([True, False]))
    torch.testing.assert_close(flipped[0], batch[0].flip(-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(flipped[1], batch[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_equals_interpolate_of_the_cut_away_from_its_edge(flip):
    batch = images(1, 3, 32, 32)
    boxes = torch.tensor([[4 / 32, 8 / 32, 28 / 32, 30 / 32]])
    expected = F.interpolate(batch[:, :, 8:30, 4:28], (32, 32), mode="bilinear", align_corners=False)
    expected = expected.flip(-1) if flip else expected
    actual = resized_crop(batch, boxes, torch.tensor([flip]))
    torch.testing.assert_close(actual[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], atol=1e-5, rtol=0)


def test_a_crop_at_fractions_of_a_pixel_equals_pil():
    batch = images(1, 1, 32, 32)
    box = (3.3, 5.7, 29.1, 30.2)
    pil = Image.fromarray(batch[0, 0].numpy()).resize((32, 32), Image.Resampling.BILINEAR, box=box)
    actual = resized_crop(batch, torch.tensor([box]) / 32, torch.tensor([False]))
    np.testing.assert_allclose(actual[0, 0, 1:-1, 1:-1], np.asarray(pil)[1:-1, 1:-1], atol=1e-4)


def test_crops_follow_seed_and_epoch():
    first = epoch_crops(50, 0.6, 0, 1)
    epoch_crops(50, 0.6, 0, 2)
    assert torch.equal(epoch_crops(50, 0.6, 0, 1).boxes, first.boxes)
    assert not torch.equal(epoch_crops(50, 0.6, 0, 2).boxes, first.boxes)
    assert not torch.equal(epoch_crops(50, 0.6, 1, 0).boxes, first.boxes)
