import numpy as np
import pytest
import torch
from pictures import noise
from transformers import AutoImageProcessor

from sap_lightning.data.preprocess import Preprocess
from sap_lightning.errors import InputError

LEGACY = {"feature_extractor_type": "CLIPFeatureExtractor", "image_processor_type": None, "size": 16, "crop_size": 16}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"do_center_crop": False, "size": {"height": 12, "width": 20}},
        {"resample": 2, "size": {"shortest_edge": 30}},
        {"do_normalize": False},
        {"do_rescale": False},
        LEGACY,
    ],
)
@pytest.mark.parametrize("size", [(24, 20), (20, 24), (9, 40)])
def test_pixels_then_normalise_equal_the_processor(write_base, changes, size):
    base = write_base(**changes)
    image = noise(0, *size)
    preprocess = Preprocess(base)
    pixels = preprocess.pixels(image)
    assert pixels.dtype == np.uint8
    assert pixels.shape == preprocess.shape
    expected = AutoImageProcessor.from_pretrained(base, backend="pil")(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(
        preprocess.normalise(torch.from_numpy(pixels)[None]), expected.float(), atol=1e-6, rtol=1e-6
    )


def test_sizes_that_follow_the_image_are_refused(write_base):
    with pytest.raises(InputError, match="differing size"):
        Preprocess(write_base(do_center_crop=False))


def test_a_size_that_no_image_can_have_is_refused(write_base):
    with pytest.raises(InputError, match="by its preprocessor config no image can be made"):
        Preprocess(write_base(size={"shortest_edge": -1}))


def test_a_base_without_preprocessor_config_is_refused(tmp_path):
    with pytest.raises(InputError, match="preprocessor config"):
        Preprocess(str(tmp_path))
