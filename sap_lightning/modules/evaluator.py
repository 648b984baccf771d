"""The base, or whatever update it wears, classifies images: measured on a domain, or asked about a user's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics import CatMetric

from sap_lightning.data.folder import ImageFolderDataModule
from sap_lightning.data.loaders import Batch
from sap_lightning.functional.groups import softmax_within
from sap_lightning.functional.lora import Update
from sap_lightning.io.adapter import Adapter
from sap_lightning.models.clip import TextEncoder, load_base
from sap_lightning.models.patched import Patched
from sap_lightning.models.prompt import prompted_features
from sap_lightning.models.stem import StemCache, first_changed
from sap_lightning.modules.classifier import CLIPClassifier, data_of
from sap_lightning.results import Predictions


class CLIPEvaluator(CLIPClassifier):
    """Zero-shot classification by a CLIP checkpoint that can wear an update.

    ``test`` on a domain measures accuracy, ``predict`` gives class probabilities.

    Args:
        base: hub id or folder of the checkpoint.
        templates: class prompts, averaged after normalisation; ``{}`` stands for the class name.

    Attributes:
        predictions: what the model said of every image of the last test.
        tested_features: image features of the last test, shape (n, d), float32.
    """

    texts: TextEncoder
    predictions: Predictions
    tested_features: Tensor

    def __init__(
        self, base: str = "openai/clip-vit-base-patch16", templates: Sequence[str] = ("a photo of a {}.",)
    ) -> None:
        super().__init__()
        self.base = base
        self.templates = templates
        self._stem: StemCache | None = None
        self._classes_by = 0

    def configure_model(self) -> None:
        if self.tower is None:
            self._loaded = load_base(self.base)
            self.tower, self.texts, self.logit_scale, _ = self._loaded
            self.base_fingerprint = self._loaded.fingerprint()
            self._patched = Patched(self.tower, self.texts.tower)

    def set_update(self, update: Mapping[str, Update]) -> None:
        """The towers' weights become base + ΔW, or class prompts get a context; an empty one gives the base back."""
        self.configure_model()
        self._patched.set_update(update)

    def on_test_start(self) -> None:
        self.use_classes_of_the_data()
        self._tested = [CatMetric(nan_strategy="disable").to(self.device) for _ in (*Predictions._fields, "features")]

    def on_predict_start(self) -> None:
        self.use_classes_of_the_data()

    def use_classes_of_the_data(self) -> None:
        """Classify into the classes of the data that the trainer runs on.

        Raises:
            InputError: when its images are made for another base.
        """
        self.require_its_images()
        names = data_of(self.trainer).class_names
        if (self.class_names, self._classes_by) != (names, self._patched.text_version):
            self._classes_by = self._patched.text_version
            prompted = prompted_features(self.texts, names, self._patched.update)
            plain = self.texts.class_features(names, self.templates) if prompted is None else prompted
            self.use_classes(names, plain)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Probability of every class, in its group if the data's classes have any; (n, classes), float32 on the CPU."""
        logits, data = self(batch.images).float(), data_of(self.trainer)
        grouped = isinstance(data, ImageFolderDataModule) and data.groups
        return (softmax_within(logits, data.groups.values()) if grouped else logits.softmax(-1)).cpu()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        features = self._test_features(batch, batch_idx)
        probabilities = self.logits(features).softmax(-1)
        self.metrics.update(probabilities, batch.labels)
        tested = (probabilities, batch.labels, batch.indices, features.float())
        for metric, values in zip(self._tested, tested, strict=True):
            metric.update(values)

    def on_test_epoch_end(self) -> None:
        self.log_accuracy()
        # Over all processes, in the order of the domain; the metrics are float32, which holds these integers.
        probabilities, labels, images, features = (metric.compute().cpu() for metric in self._tested)
        labels, images = labels.flatten(), images.flatten()  # of one image alone they are numbers
        order = images.argsort()
        probabilities = probabilities.view(len(images), -1)
        self.tested_features = features.view(len(images), -1)[order]
        self.predictions = Predictions(probabilities[order], labels[order].long(), images[order].long())

    def remember_stem(self, adapters: Iterable[Adapter]) -> None:
        """From now on, what comes before the first layer of these adapters is computed once for each test batch.

        The batches must stay the same: call it anew for every domain. It takes memory for the hidden states of all
        images, and does nothing where an adapter changes the first encoder layer.
        """
        assert self.tower is not None
        layers = [name for adapter in adapters for name in adapter.layers]
        first = min(first_changed(self.tower, layers), first_changed(self.tower, ()) - 1)
        self._stem = StemCache(self.tower, first) if layers and first > 0 else None

    def _test_features(self, batch: Batch, batch_idx: int) -> Tensor:
        assert self.tower is not None
        if self._stem is None or first_changed(self.tower, self._patched.update) < self._stem.first:
            return self.image_features(batch.images)
        return normalize(self._stem.embed(batch_idx, batch.images), dim=-1)
