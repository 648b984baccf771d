"""How answers are judged."""

from __future__ import annotations

import pytest

from sap_lightning.functional.answers import box_in, exact, f1, iou, overlap


def test_exact_passes_over_case_articles_and_punctuation():
    assert exact("The boat.", "boat") == 1
    assert exact("two boats", "boat") == 0


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        ("1.5", "15", 0), ("1.50", "1.5", 1), ("-5", "5", 0), ("15.", "15", 1), ("2", "two", 0), ("1,5", "15", 1),
        ("", "A", 0), ("the", "A", 0), ("a.", "A", 1), ("B", "b.", 1), ("", "...", 1), ("...", "!", 0),
        ("An A", "A", 0), ("the cup", "cup", 1), ("", "boat", 0), ("C", "C++", 1),
        ("A)", "A", 1), ("(a)", "A", 1), ("A,", "A", 1), ("**A**", "A", 1),
        ("10000000000000001", "10000000000000000", 0),
    ],
)  # fmt: skip
def test_numbers_and_what_has_no_words_are_compared_as_they_stand(said, answer, right):
    assert exact(said, answer) == right
    assert f1(said, answer) == right


def test_f1_is_of_words():
    assert f1("a red boat", "a red car") == pytest.approx(0.5)
    assert f1("", "boat") == 0


def test_a_box_is_the_first_in_what_was_said():
    assert box_in("it is at [0.1, .25, 1, 0.9].") == (0.1, 0.25, 1.0, 0.9)
    assert box_in("it is at 0.1 0.2 0.3 0.4") is None


def test_overlap_is_intersection_over_union():
    assert overlap((0, 0, 1, 1), (0, 0, 1, 1)) == 1
    assert overlap((0, 0, 1, 1), (0.5, 0, 1.5, 1)) == pytest.approx(1 / 3)
    assert overlap((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    assert overlap((1, 1, 0, 0), (0, 0, 1, 1)) == 0
    assert overlap((0, 0, 0, 0), (0, 0, 0, 0)) == 0


def test_iou_wants_more_than_half():
    assert iou("[0, 0, 1, 1]", "[0, 0, 1, 0.6]") == 1
    assert iou("[0, 0, 1, 1]", "[0, 0, 1, 0.5]") == 0
    assert iou("nowhere", "[0, 0, 1, 0.5]") == 0
