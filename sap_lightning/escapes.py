"""Names from outside where they are shown: nothing in them is taken for a mark. HTML is escaped by Jinja."""

from __future__ import annotations

import re

from rich.text import Text

from sap_lightning.errors import printable

_MARKS = re.compile(r"[\\`*<>\[\]|&~$]|\b_|_\b")


def for_terminal(text: str) -> Text:
    """Text that is neither rich's markup nor an escape sequence."""
    return Text(printable(text))


def for_markdown(text: str) -> str:
    """Text on one line, in which what may be a mark of Markdown is an HTML entity, which every reader of it knows."""
    return _MARKS.sub(lambda mark: f"&#{ord(mark[0])};", printable(text))
