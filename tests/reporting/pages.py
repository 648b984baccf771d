"""Walks a page as a browser would, and what every page must be."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

HOSTILE = "<script>alert(1)</script>\" onerror='x'&"
VOID = {"meta", "img", "br", "link", "hr", "input", "wbr"}


class Page(HTMLParser):
    """Walks a page, whose elements must nest and end."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def assert_it_needs_nothing(path: Path) -> None:
    """Nothing of the network, and nothing that runs."""
    page = Page(path)
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "base", "form"}
    for _, attributes in page.elements:
        for name in ("src", "srcset", "poster", "data", "background", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
        assert (attributes.get("href") or "#").startswith("#")
        assert "style" not in attributes
        assert not any(name.startswith("on") for name in attributes)
    source = path.read_text(encoding="utf-8")
    assert "http://" not in source and "https://" not in source
    assert "url(" not in source and "@import" not in source


def assert_every_link_leads_somewhere(path: Path) -> None:
    """Ids are unique, and the contents name every section, in order."""
    page = Page(path)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    links = [str(link["href"]).removeprefix("#") for link in page.all("a")]
    assert len(ids) == len(set(ids))
    assert links == ids
