"""Texts for language models, as rows of as many tokens each."""

from __future__ import annotations

from collections.abc import Sequence
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
    except (OSError, ValueError) as error:  # one for bytes that are no UTF-8, or for a name with a null byte
        raise InputError(f"{option} {file}: cannot be read as UTF-8 text ({first_line(error)})") from error


def check_tokens(tokens: Sequence[Tensor], config: Any, model: str | Path, place: str, shorter: str) -> None:
    """Checks by a language model's config that it can be shown tokens, which takes none of its weights.

    Args:
        tokens: rows of them, positions last.
        config: the model's, as transformers reads it.
        model: how messages call the model.
        place: the same of the tokens.
        shorter: what to do where rows are too long.

    Raises:
        InputError: the model has no such token, or fewer positions than a row.
    """
    inner = config.get_text_config()
    vocabulary, positions = (getattr(inner, name, None) for name in ("vocab_size", "max_position_embeddings"))
    largest = max((int(one.max()) for one in tokens), default=0)
    longest = max((one.shape[-1] for one in tokens), default=0)
    if isinstance(vocabulary, int) and largest >= vocabulary:
        raise InputError(
            f"{place}: the tokenizer makes token {largest} of it, and {model} has a vocabulary of {vocabulary}; give"
            " models of one vocabulary, with their own tokenizer"
        )
    if isinstance(positions, int) and 0 < positions < longest:
        raise InputError(f"{place}: takes {longest} positions, and {model} has {positions}; {shorter}")


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
