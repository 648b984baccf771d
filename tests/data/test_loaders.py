from itertools import chain

import numpy as np
import pytest
import torch

from sap_lightning.data.loaders import PixelDataset, eval_sampler, images_per_process, make_loader, train_sampler
from sap_lightning.errors import InputError


def dataset(size: int) -> PixelDataset:
    images = np.arange(size, dtype=np.uint8).reshape(-1, 1, 1, 1).repeat(3, 1)
    return PixelDataset(images, torch.arange(size) % 3, torch.arange(size))


def train_batches(size: int, batch_size: int, world_size: int, rank: int, epoch: int) -> list[list[int]]:
    data = dataset(size)
    sampler = train_sampler(data, world_size, rank, seed=5)
    sampler.set_epoch(epoch)
    loader = make_loader(data, sampler, images_per_process(batch_size, world_size), drop_last=True)
    return [batch.indices.tolist() for batch in loader]


@pytest.mark.parametrize("size", [31, 32, 37])
@pytest.mark.parametrize("world_size", [2, 4])
def test_training_batches_do_not_depend_on_the_number_of_processes(size, world_size):
    for epoch in range(2):
        alone = train_batches(size, 8, 1, 0, epoch)
        shares = [train_batches(size, 8, world_size, rank, epoch) for rank in range(world_size)]
        together = [sorted(chain(*parts)) for parts in zip(*shares, strict=True)]
        assert together == [sorted(batch) for batch in alone]
    assert train_batches(size, 8, 1, 0, 0) != train_batches(size, 8, 1, 0, 1)


@pytest.mark.parametrize("size", [7, 8])
def test_evaluation_covers_every_image_once(size):
    data = dataset(size)
    seen = [list(eval_sampler(data, 3, rank, "here")) for rank in range(3)]
    assert sorted(chain(*seen)) == list(range(size))


def test_evaluation_needs_an_image_per_process():
    with pytest.raises(InputError, match="here: 2 images for 3 processes"):
        eval_sampler(dataset(2), 3, 0, "here")


def test_a_batch_that_does_not_divide_is_refused():
    assert images_per_process(32, 4) == 8
    with pytest.raises(InputError, match=r"batch of 30 .* 4 processes; set batch_size to 28"):
        images_per_process(30, 4)


def test_images_labels_and_indices_belong_together():
    data = dataset(10)
    loader = make_loader(data, eval_sampler(data, 1, 0, "here"), 4)
    batches = list(loader)
    assert [len(batch.labels) for batch in batches] == [4, 4, 2]
    for batch in batches:
        assert batch.images.dtype == torch.uint8
        assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.indices)
        assert torch.equal(batch.labels, batch.indices % 3)
