"""The checks of settings, and what they say."""

from __future__ import annotations

from functools import partial

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from sap_lightning.errors import (
    InputError,
    check_at_least,
    check_positive,
    check_seed,
    check_share,
    first_line,
    in_one_line,
    printable,
    short,
)


def test_a_share_in_per_cent_is_told_how_to_write_it():
    with pytest.raises(InputError, match=r"merge\.method\.drop must lie in \[0, 1\], got 95; 95 % is 0\.95$"):
        check_share("merge.method.drop", 95)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_what_is_no_share_is_refused_by_name(value):
    with pytest.raises(InputError, match=r"merge\.method\.drop must lie in \[0, 1\]"):
        check_share("merge.method.drop", value)
    check_share("merge.method.drop", 1)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_not_above_0_or_not_finite_is_refused_by_name(value):
    with pytest.raises(InputError, match=r"merge\.method\.scale must be above 0"):
        check_positive("merge.method.scale", value)
    check_positive("merge.method.scale", 0.1)


@pytest.mark.parametrize("value", [0, float("nan"), float("inf")])
def test_what_is_below_the_least_is_refused_by_name(value):
    with pytest.raises(InputError, match=r"merge\.method\.sweeps must be at least 1"):
        check_at_least("merge.method.sweeps", value, 1)
    check_at_least("merge.method.sweeps", 1, 1)


@pytest.mark.parametrize("value", [-1, 2**32, 99999999999999999999999])
def test_what_is_no_seed_is_refused_by_name(value):
    with pytest.raises(InputError, match=rf"merge\.method\.seed: {value} lies outside \[0, 4294967296\)"):
        check_seed("merge.method.seed", value)
    check_seed("merge.method.seed", 2**32 - 1)


@pytest.mark.parametrize("check", [check_share, check_positive, check_seed, partial(check_at_least, least=1)])
def test_what_is_no_number_is_refused_by_name(check):
    with pytest.raises(InputError, match=r"prune\.sparsity is '0\.9', expected a number"):
        check("prune.sparsity", value="0.9")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("  \n one"), "one"),
        (KeyError(), "KeyError"),
        (OSError(""), "OSError"),
    ],
)
def test_of_a_library_s_error_the_first_line_is_said_or_its_name(error, line):
    assert first_line(error) == line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("model.rank is 0"), "model.rank is 0"),
        (MisconfigurationException("no devices\nand more"), "trainer: no devices"),
        (OSError(28, "No space left on device", "runs/a"), "runs/a: No space left on device; check path, permission"),
    ],
)
def test_what_ends_a_command_is_one_line(error, line):
    assert in_one_line(error).startswith(line) and "\n" not in in_one_line(error)


def test_an_error_is_one_printable_line_whatever_it_quotes():
    assert str(InputError("no 'a\nb\x1b[31m\u202ec\udcff'; rename")) == r"no 'a\nb\x1b[31m\u202ec\udcff'; rename"


def test_what_can_be_read_is_not_escaped():
    assert printable("Gemälde — 素描, ρ = 0.9 \\ [red]") == "Gemälde — 素描, ρ = 0.9 \\ [red]"


@pytest.mark.parametrize("value", ["x" * 10**6, [list(range(10**5))] * 50, {"a" * 999: "b" * 999}, "\n\ud800"])
def test_a_value_from_outside_is_cut_to_fit_into_a_line(value):
    assert len(short(value)) < 300 and short(value).isprintable()
