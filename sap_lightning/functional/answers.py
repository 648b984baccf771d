"""How good an answer is."""

from __future__ import annotations

import re
import string
from decimal import Decimal

from torchmetrics.functional.text import squad

Box = tuple[float, float, float, float]
_NUMBER = r"\s*(-?(?:\d+\.?\d*|\.\d+))\s*"
_BOX = re.compile(rf"\[{','.join([_NUMBER] * 4)}\]")
_NUMBERS = re.compile(r"-?(?:\d+\.?\d*|\.\d+)")
_SQUAD_WORDS = re.compile(r"\b(?!(?:a|an|the)\b)\w*[^\W_]")
"""What SQuAD's normalisation leaves something of."""
_BESIDE = f"{string.punctuation} "
OVERLAP = 0.5


def exact(said: str, answer: str) -> float:
    """1 where an answer is the same but for case, articles and punctuation (SQuAD's exact match), else 0.

    Where we deviate: answers that are nothing but a number are compared as numbers, as without punctuation 1.5 is 15
    and −5 is 5; and of what has articles alone, such as the choice A, these count.

    Example:
        >>> from sap_lightning.functional.answers import exact
        >>> exact("the cup.", "Cup"), exact("1.5", "15"), exact("", "A")
        (1.0, 0.0, 0.0)
    """
    return _judged(said, answer, "exact_match")


def f1(said: str, answer: str) -> float:
    """F1 of the words of an answer (SQuAD's), in [0, 1]; of numbers and of what has no words as `exact`."""
    return _judged(said, answer, "f1")


def _judged(said: str, answer: str, score: str) -> float:
    """A score of SQuAD's, but for numbers and for what its normalisation leaves nothing of."""
    one, other = _words(said), _words(answer)
    if _NUMBERS.fullmatch(one) and _NUMBERS.fullmatch(other):
        return float(Decimal(one) == Decimal(other))
    if _SQUAD_WORDS.search(one) and _SQUAD_WORDS.search(other):
        return _squad(said, answer)[score]
    bare = one.strip(_BESIDE)
    return float(one == other or bare == other.strip(_BESIDE) != "")


def _words(text: str) -> str:
    return " ".join(text.lower().rstrip(" .\n\t").split())


def iou(said: str, answer: str) -> float:
    """1 where the first box in an answer overlaps with the right one by more than half of both together, else 0.

    A box is ``[x1, y1, x2, y2]``; what is none overlaps with nothing.
    """
    one, other = box_in(said), box_in(answer)
    return float(one is not None and other is not None and overlap(one, other) > OVERLAP)


def box_in(text: str) -> Box | None:
    """The first box in a text."""
    found = _BOX.search(text)
    if found is None:
        return None
    x1, y1, x2, y2 = map(float, found.groups())
    return x1, y1, x2, y2


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes, in [0, 1]; 0 of one without an area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0) * max(height, 0)
    both = _area(one) + _area(other) - shared
    return shared / both if both > 0 else 0.0


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def _squad(said: str, answer: str) -> dict[str, float]:
    found = squad({"prediction_text": said, "id": "0"}, {"answers": {"answer_start": [0], "text": [answer]}, "id": "0"})
    return {name: float(value) / 100 for name, value in found.items()}
