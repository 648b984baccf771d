"""Texts for language models, as rows of as many tokens each."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sap_lightning.errors import InputError, first_line


def read_text(file: str, option: str) -> str:
    """What stands in a text file, in UTF-8, that an option names.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{option} {file}: cannot be read as UTF-8 text ({first_line(error)})") from error


class TokenRows(NamedTuple):
    """A text of which a language model is shown the first rows.

    Attributes:
        text: all of it.
        rows: how many.
        tokens: of each row.
        place: how messages call it.
    """

    text: str
    rows: int
    tokens: int
    place: str

    @classmethod
    def of(cls, file: str, rows: int, tokens: int, option: str) -> TokenRows:
        """Those of a file that an option names.

        Raises:
            InputError: it cannot be read.
        """
        return cls(read_text(file, option), rows, tokens, f"{option} {file}")

    def ids(self, tokenizer: Any) -> Tensor:
        """The first rows by a language model's tokenizer, shape (rows, tokens).

        Raises:
            InputError: the text is too short.
        """
        needed = self.rows * self.tokens
        ids = torch.tensor(tokenizer(self.text).input_ids[:needed], dtype=torch.long)
        if len(ids) < needed:
            wanted = f"{self.rows} rows of {self.tokens} are {needed}"
            raise InputError(f"{self.place}: has {len(ids)} tokens; {wanted}; give a longer text")
        return ids.view(self.rows, self.tokens)
