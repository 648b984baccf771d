"""Names of classes and domains."""

import re
import unicodedata

import pytest

from sap_lightning.data.names import check_names, spelling
from sap_lightning.errors import InputError


@pytest.mark.parametrize(
    "name", ["", " ", "dog ", " dog", "dog\n", "a\xa0b", "\u202edog", "a\u200bb", "caf\udce9", "\x1b[31m"]
)
def test_a_name_that_a_person_cannot_read_is_refused_as_it_is_written(name):
    with pytest.raises(InputError, match=rf"^here: class {re.escape(repr(name))}: a name has printable") as refused:
        check_names("here", "class", ["dog", name])
    assert str(refused.value).isprintable()


def test_a_long_name_is_cut_where_it_is_quoted():
    with pytest.raises(InputError) as refused:
        check_names("here", "class", ["x" * 10**6 + " "])
    assert len(str(refused.value)) < 300


def test_names_in_any_script_are_taken():
    check_names("here", "domain", ["Gemälde", "素描", "big cat", "art_painting", "it's (1)"])


def test_spellings_of_one_name_are_told_to_be_one():
    composed, decomposed = (unicodedata.normalize(form, "Café_au lait") for form in ("NFC", "NFD"))
    assert composed != decomposed
    assert len({spelling(name) for name in (composed, decomposed, "café au_lait", "CAFÉ  AU LAIT")}) == 1
    assert spelling("dog") != spelling("dogs")
