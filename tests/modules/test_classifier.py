from __future__ import annotations

import pytest
import torch
from places import SHAPES_CLIP
from references import quiet_trainer, randn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoTokenizer, CLIPModel

from sap_lightning.models.clip import load_base
from sap_lightning.modules.classifier import CLIPClassifier, accuracy_metrics

CLASSES = ["star", "moon", "house"]


class Answers(CLIPClassifier):
    """Measures logits that are given, (n, classes), against labels."""

    def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.metrics.update(*batch)

    def on_test_epoch_end(self) -> None:
        self.log_accuracy("test/")


def measured(answers: list[int], labels: list[int]) -> dict[str, float]:
    module = Answers()
    module.use_classes(CLASSES, torch.zeros(3, 1))
    data = TensorDataset(torch.eye(3)[answers], torch.tensor(labels))
    (metrics,) = quiet_trainer().test(module, DataLoader(data, batch_size=4), verbose=False)
    return dict(metrics)


@torch.no_grad()
def test_zero_shot_logits_are_clip_s_own() -> None:
    base = load_base(SHAPES_CLIP)
    classifier = CLIPClassifier()
    classifier.tower, classifier.logit_scale = base.tower, base.logit_scale
    classifier.use_classes(CLASSES, base.texts.class_features(CLASSES, ["a photo of a {}."]))
    images = randn(0, 5, 3, 64, 64)
    prompts = [f"a photo of a {name}." for name in CLASSES]
    tokens = AutoTokenizer.from_pretrained(SHAPES_CLIP)(prompts, padding=True, return_tensors="pt")
    expected = CLIPModel.from_pretrained(SHAPES_CLIP).eval()(pixel_values=images, **tokens).logits_per_image
    torch.testing.assert_close(classifier(images), expected, atol=1e-4, rtol=0)


def test_image_features_have_length_one() -> None:
    classifier = CLIPClassifier()
    classifier.tower = load_base(SHAPES_CLIP).tower
    images = randn(0, 5, 3, 64, 64)
    torch.testing.assert_close(classifier.image_features(images).norm(dim=1), torch.ones(5))


def test_accuracy_counts_images_and_macro_accuracy_counts_classes() -> None:
    metrics = measured(answers=[0, 0, 0, 1, 1, 0], labels=[0, 0, 0, 0, 1, 2])
    assert metrics == pytest.approx(
        {
            "test/accuracy": 4 / 6,
            "test/macro_accuracy": (3 / 4 + 1 + 0) / 3,
            "test/accuracy/star": 3 / 4,
            "test/accuracy/moon": 1,
            "test/accuracy/house": 0,
            # Numbers in [0, 1] count as probabilities: each answer is given with confidence 1, and 4 of 6 are right.
            "test/ece": 1 - 4 / 6,
        },
        abs=1e-6,
    )


def test_the_calibration_error_is_the_gap_of_confidence_and_accuracy_in_fifteen_bins() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = 2 * torch.randn(200, 3, generator=generator), torch.randint(3, (200,), generator=generator)
    probability, answer = logits.double().softmax(1).max(1)
    by_hand = 0.0
    for number in range(15):
        chosen = (probability > number / 15) & (probability <= (number + 1) / 15)
        if chosen.any():
            gap = probability[chosen].mean() - (answer == labels)[chosen].double().mean()
            by_hand += float(chosen.double().mean() * gap.abs())
    metrics = accuracy_metrics(CLASSES)
    for part in range(0, 200, 64):
        metrics.update(logits[part : part + 64], labels[part : part + 64])
    assert by_hand > 0.1
    assert float(metrics.compute()["ece"]) == pytest.approx(by_hand, abs=1e-6)


def test_other_classes_start_the_count_anew() -> None:
    classifier = CLIPClassifier()
    classifier.use_classes(CLASSES, torch.eye(3))
    classifier.metrics.update(torch.eye(3), torch.tensor([0, 1, 2]))
    classifier.use_classes(["cat", "dog"], torch.eye(2))
    classifier.metrics.update(torch.eye(2), torch.tensor([0, 0]))
    assert classifier.metrics.compute()["accuracy"] == 0.5
    assert classifier.class_names == ["cat", "dog"]
    assert "class_features" not in classifier.state_dict(), "what the base gives is not saved again"


def test_logits_are_of_full_precision_also_where_features_are_not() -> None:
    classifier = CLIPClassifier()
    classifier.use_classes(CLASSES, torch.eye(3))
    classifier.logit_scale = 100.0
    features = torch.tensor([[0.5, 0.501, 0.0]])
    with torch.autocast("cpu", torch.bfloat16):
        probabilities = classifier.logits(features).softmax(-1)
    torch.testing.assert_close(probabilities, torch.tensor([[50.0, 50.1, 0.0]]).softmax(-1))
