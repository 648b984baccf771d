"""What docs/flower.md tells a person to paste is what the demo runs."""

from __future__ import annotations

import re
import subprocess

from places import REPOSITORY

PAGE = (REPOSITORY / "docs" / "flower.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_bash_understands_every_block():
    assert BLOCKS
    for block in BLOCKS:
        checked = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert not checked.stderr, block


def test_every_link_leads_to_a_file_or_a_heading():
    headings = {re.sub(r"\W+", "-", line.lower()).strip("-") for line in re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)}
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGE) if "://" not in link]
    assert links
    for link in links:
        assert link[1:] in headings if link.startswith("#") else (REPOSITORY / "docs" / link).is_file(), link
