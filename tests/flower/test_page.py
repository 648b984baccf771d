"""What docs/flower.md and docs/simulation.md tell a person to paste; the demo runs the first."""

from __future__ import annotations

import re
import subprocess

import pytest
from places import REPOSITORY

PAGES = {name: (REPOSITORY / "docs" / name).read_text(encoding="utf-8") for name in ("flower.md", "simulation.md")}


@pytest.fixture(params=PAGES)
def page(request) -> str:
    return PAGES[request.param]


def headings_of(page: str) -> set[str]:
    return {re.sub(r"\W+", "-", line.lower()).strip("-") for line in re.findall(r"^#+ (.*)$", page, re.MULTILINE)}


def test_bash_understands_every_block(page):
    blocks = re.findall(r"^```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        checked = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert not checked.stderr, block


def test_every_link_leads_to_a_file_or_a_heading(page):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page) if "://" not in link]
    assert links
    for link in links:
        name, _, heading = link.partition("#")
        other = (REPOSITORY / "docs" / name).read_text(encoding="utf-8") if name else page
        assert not heading or heading in headings_of(other), link
