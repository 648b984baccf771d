"""One domain of a labelled image dataset, as a Lightning data module."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sap_lightning.data.augment import epoch_crops, resized_crop
from sap_lightning.data.cache import load_pixels, report_corrupt
from sap_lightning.data.curriculum import Curriculum, easiest
from sap_lightning.data.loaders import (
    Batch,
    PixelDataset,
    images_per_process,
    make_loader,
    process_of,
    train_sampler,
)
from sap_lightning.data.names import check_names, spelling
from sap_lightning.data.pixels import PixelDataModule
from sap_lightning.data.sources import Source, open_source
from sap_lightning.errors import InputError, short

log = logging.getLogger(__name__)
Relabel = Callable[[Tensor, int], Tensor]
_ALL_AT_ONCE = Curriculum()


class DomainDataModule(PixelDataModule):
    """The images of one domain: train and validation parts for its client, the whole of it for testing.

    Args:
        root: Folder `domain/class/image`, folder of a saved or parquet dataset, or id of a dataset on the hub.
        domain: The domain to load; needed once images are, not for `domains` and `class_names`.
        class_names: Names for the prompts, in label order; by default the class folders' own with spaces for `_`.
            Matched to the folders by name; if the names differ but their number agrees, in the order of the folders:
            alphabetical, or by value where all are numbers; see docs/data.md.
        base: Hub id or folder of the CLIP checkpoint whose preprocessing to apply.
        batch_size: Images per batch over all processes.
        val_fraction: Share of the domain kept back from training for validation.
        augment: Whether to crop and flip training images at random.
        crop_scale: The smallest share of an image's area that a crop has.
        curriculum: Whether to begin with the easiest images; the module that is trained says how difficult each is,
            once, before it is. Needs a Trainer that reloads the loader in every epoch.
        cache: Whether to keep decoded images on disk, see `sap_lightning.data.cache`.
        domain_column: Column of a dataset that names the domain.
        label_column: Column of a dataset that holds the class.
        seed: Seed of the split, the shuffling and the augmentation.

    Raises:
        InputError: on use, for anything wrong with these arguments or with the data.
    """

    def __init__(
        self,
        root: str = "flwrlabs/pacs",
        domain: str | None = None,
        class_names: list[str] | None = None,
        base: str = "openai/clip-vit-base-patch16",
        batch_size: int = 32,
        val_fraction: float = 0.2,
        augment: bool = True,
        crop_scale: float = 0.6,
        curriculum: Curriculum = _ALL_AT_ONCE,
        cache: bool = True,
        domain_column: str = "domain",
        label_column: str = "label",
        seed: int = 0,
    ) -> None:
        super().__init__(base, batch_size)
        if not 0 <= val_fraction < 1:
            raise InputError(f"data.val_fraction must be at least 0 and below 1, got {val_fraction}")
        if not 0 < crop_scale <= 1:
            raise InputError(f"data.crop_scale must be above 0 and at most 1, got {crop_scale}")
        self.root = root
        self.domain = domain
        self.val_fraction = val_fraction
        self.augment = augment
        self.crop_scale = crop_scale
        self.curriculum = curriculum
        self.cache = cache
        self.domain_column = domain_column
        self.label_column = label_column
        self.seed = seed
        self._test_images: int | None = None
        self._relabel: Relabel | None = None
        self._first_epoch = 0
        self._all_epochs: int | None = None
        self._difficulty: Tensor | None = None
        self._given_names = class_names
        self._fingerprint: str | None = None

    @property
    def domains(self) -> list[str]:
        """All domains under `root`, sorted."""
        return self._source.domains

    @property
    def class_names(self) -> list[str]:
        """Names for the prompts, in label order; the same for every domain of `root`."""
        return self._classes[0]

    def require_domain(self) -> str:
        """The domain that is set.

        Raises:
            InputError: none is, or there is none of that name.
        """
        if self.domain is None:
            raise InputError(f"data.domain is not set; choose one of {', '.join(self.domains)}")
        if self.domain not in self.domains:
            raise InputError(f"{self.root}: no domain {short(self.domain)}; it has {', '.join(self.domains)}")
        return self.domain

    @property
    def num_samples(self) -> int:
        """Number of training images; known after `setup`."""
        return len(self._train)

    def fingerprint(self, domain: str) -> str:
        """Changes whenever an image of a domain does."""
        return self._source.samples(domain).fingerprint

    def for_domain(
        self,
        name: str,
        test_images: int | None = None,
        relabel: Relabel | None = None,
        first_epoch: int = 0,
        all_epochs: int | None = None,
    ) -> DomainDataModule:
        """The same settings for another domain.

        Args:
            name: the domain.
            test_images: test on that many images, spread evenly over the domain; all if not given.
            relabel: gives other labels to the training part, from its own (n,) and the number of classes.
            first_epoch: number of epochs that were trained before; shuffles and augmentation are those that follow.
            all_epochs: number of epochs with those before and after, where a Trainer trains a part of them.
        """
        other = copy.copy(self)
        other.domain, other.trainer, other._fingerprint = name, None, None
        other._test_images, other._relabel = test_images, relabel
        other._first_epoch, other._all_epochs = first_epoch, all_epochs
        return other

    def held_out(self, number: int) -> Batch:
        """At most so many images of the validation part, spread evenly over it, as pixels; known after `setup`."""
        part = self._val
        return part[spread(torch.arange(len(part)), number).tolist()]

    def images(self) -> np.ndarray:
        """All images of the domain as they are decoded, uint8 (n, 3, h, w); zeros where one could not be."""
        self._load()
        return self._pixels.images

    def inputs(self, at_once: int, device: torch.device) -> Iterator[Tensor]:
        """All images of the domain in order, as the tower's normalised input (at_once, 3, h, w) on a device."""
        self._load()
        for batch in self._as_input(self._part(torch.arange(len(self._labels))), at_once, device):
            yield batch.images

    def unchanged(self, at_once: int, device: torch.device) -> Iterator[Batch]:
        """The images that are trained on, in order and as they are, as the tower's input; known after `setup`."""
        return self._as_input(self._train, at_once, device)

    @property
    def training_part(self) -> PixelDataset:
        """The images that are trained on, as pixels; known after `setup`."""
        return self._train

    def prepare_data(self) -> None:
        """Decode the domain into the cache, in one process."""
        if self.cache:
            self._load()

    def setup(self, stage: str | None = None) -> None:
        """Open the images and split them, in every process.

        Args:
            stage: unused; all parts are views of the same images.
        """
        self._load()
        usable = torch.tensor([row for row in range(len(self._labels)) if row not in self._pixels.corrupt])
        order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(self.seed))
        num_val = round(len(usable) * self.val_fraction)
        if num_val == len(usable):
            raise InputError(
                f"{self.root}: domain {self.domain!r} has {len(usable)} images and val_fraction {self.val_fraction}"
                " leaves none to train on"
            )
        self._val = self._part(usable[order[:num_val]].sort().values)
        self._train = self._train_part(usable[order[num_val:]].sort().values)
        self._test = self._part(spread(usable, self._test_images))
        self._difficulty = None

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled batches of what an epoch shows; the last one is dropped where it is not full."""
        world_size, rank = process_of(self.trainer)
        shown = self._shown()
        sampler = train_sampler(shown, world_size, rank, self.seed + self._first_epoch)
        batch_size = images_per_process(min(self.batch_size, len(shown)), world_size)
        return make_loader(shown, sampler, batch_size, drop_last=True)

    @property
    def epochs(self) -> range:
        """Numbers of the epochs that the Trainer trains, among all."""
        assert self.trainer is not None and self.trainer.max_epochs is not None
        return range(self._first_epoch, self._first_epoch + self.trainer.max_epochs)

    def steps(self, epochs: Iterable[int]) -> int:
        """Steps of the optimizer in some of all epochs, which show different numbers of images; known after `setup`."""
        assert self.trainer is not None
        limit, images = self.trainer.limit_train_batches, map(self._number_shown, epochs)
        batches = [number // min(self.batch_size, number) for number in images]
        taken = [min(number, limit) if isinstance(limit, int) else int(number * limit) for number in batches]
        return sum(math.ceil(number / self.trainer.accumulate_grad_batches) for number in taken)

    def state_dict(self) -> dict[str, Any]:
        """How difficult the images are, as a module that was trained further would not say so again."""
        return {} if self._difficulty is None else {"difficulty": self._difficulty}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes on what `state_dict` gave."""
        self._difficulty = state_dict["difficulty"]

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation part in order, each image once."""
        return self._eval_loader(self._val)

    def test_dataloader(self) -> DataLoader[Batch]:
        """The whole domain in order, each image once, or as many as `for_domain` was told."""
        return self._eval_loader(self._test)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augments while training, then normalises; on the device."""
        assert self.trainer is not None
        if self.augment and self.trainer.training:
            images = batch.images.float()
            epoch = self._first_epoch + self.trainer.current_epoch
            crops = epoch_crops(len(self._labels), self.crop_scale, self.seed, epoch)
            boxes, flips = (part.to(images.device)[batch.indices] for part in crops)
            batch = batch._replace(images=resized_crop(images, boxes, flips))
        normalised: Batch = super().on_after_batch_transfer(batch, dataloader_idx)
        return normalised

    @cached_property
    def _source(self) -> Source:
        return open_source(self.root, self.domain_column, self.label_column)

    @cached_property
    def _classes(self) -> tuple[list[str], dict[str, int]]:
        return match_classes(self._source.classes, self._given_names)

    def _load(self) -> None:
        samples = self._source.samples(self.require_domain())
        if samples.fingerprint == self._fingerprint:
            return
        labels = self._classes[1]
        self._labels = torch.tensor([labels[name] for name in samples.classes])
        self._pixels = load_pixels(samples.pictures, samples.fingerprint, self._preprocess, self.cache)
        report_corrupt(samples.pictures, self._pixels, f"{self.root}: domain {self.domain!r}")
        self._fingerprint = samples.fingerprint

    def _as_input(self, part: PixelDataset, at_once: int, device: torch.device) -> Iterator[Batch]:
        """Images of a part in order, as the tower's input on a device."""
        for positions in torch.arange(len(part)).split(at_once):
            yield self.normalised(Batch(*(tensor.to(device) for tensor in part[positions.tolist()])))

    def _part(self, rows: Tensor) -> PixelDataset:
        return PixelDataset(self._pixels.images, self._labels, rows)

    def _train_part(self, rows: Tensor) -> PixelDataset:
        if self._relabel is None:
            return self._part(rows)
        labels = self._labels.clone()
        labels[rows] = self._relabel(labels[rows], len(self.class_names))
        return PixelDataset(self._pixels.images, labels, rows)

    def _shown(self) -> PixelDataset:
        """The images of the present epoch."""
        if not self.curriculum.narrows:
            return self._train
        self._check_curriculum()
        assert self.trainer is not None
        if self._difficulty is None:
            started = time.monotonic()
            module: Any = self.trainer.lightning_module
            self._difficulty = module.difficulty(self)
            log.info("%s: difficulty of %d images, %.0f s", self.domain, len(self._train), time.monotonic() - started)
        number = self._number_shown(self.epochs.start + self.trainer.current_epoch)
        return PixelDataset(self._train.images, self._train.labels, self._train.rows[easiest(self._difficulty, number)])

    def _number_shown(self, epoch: int) -> int:
        assert self.trainer is not None and self.trainer.max_epochs is not None
        all_epochs = self._all_epochs or self.trainer.max_epochs
        return self.curriculum.images(len(self._train), self.batch_size, epoch, all_epochs)

    def _check_curriculum(self) -> None:
        trainer: Any = self.trainer
        if trainer is None or trainer.reload_dataloaders_every_n_epochs != 1:
            raise InputError("data.curriculum: every epoch has its own images; set reload_dataloaders_every_n_epochs 1")
        if (trainer.max_epochs or 0) < 1 or trainer.max_steps != -1:
            raise InputError("data.curriculum grows with the epochs; set trainer.max_epochs, and leave out max_steps")

    def _eval_loader(self, part: PixelDataset) -> DataLoader[Batch]:
        return self._in_order(part, f"{self.root}: domain {self.domain!r}")


def match_classes(found: list[str], given: list[str] | None) -> tuple[list[str], dict[str, int]]:
    """Prompt names in label order, and the label of every class of a dataset.

    Args:
        found: class names of the dataset, in its own order.
        given: names for the prompts in label order, or None for the dataset's own.

    Returns:
        The prompt names, and a label for each name in `found`.

    Raises:
        InputError: the given names are ambiguous, or fit the dataset neither by name nor by number.
    """
    found_keys = list(dict.fromkeys(map(spelling, found)))
    if given is None:
        shown = {spelling(name): name.replace("_", " ") for name in reversed(found)}
        names, keys = [shown[key] for key in found_keys], found_keys
    else:
        if isinstance(given, str):
            raise InputError(f"data.class_names {short(given)}: is one name; give a list of them")
        check_names("data.class_names", "class", given)
        names, keys = given, list(map(spelling, given))
        if len(set(keys)) < len(keys):
            raise InputError(f"data.class_names holds a name twice: {', '.join(given)}")
        if not set(found_keys) <= set(keys):
            _check_positional(found_keys, keys)
            keys = found_keys
    if len(names) < 2:
        raise InputError(
            f"one class only ({', '.join(names)}); a classifier needs two: give images of others, or name more in"
            " data.class_names"
        )
    label = {key: position for position, key in enumerate(keys)}
    return names, {name: label[spelling(name)] for name in found}


def spread(rows: Tensor, number: int | None) -> Tensor:
    """So many of these rows, spread evenly over them; all if there are not more, or no number is given."""
    if number is None or number >= len(rows):
        return rows
    return rows[torch.linspace(0, len(rows) - 1, number).round().long()]


def _check_positional(found: list[str], given: list[str]) -> None:
    """Names that do match must stand at their own place, or the others would be guessed wrong."""
    in_place = all(name not in found or found.index(name) == place for place, name in enumerate(given))
    if len(found) != len(given) or not in_place:
        missing = ", ".join(name for name in found if name not in given)
        raise InputError(
            f"data.class_names has {len(given)} names for {len(found)} classes and none for: {missing};"
            " give a name for every class, spelled as its folder or in the folders' order"
        )
