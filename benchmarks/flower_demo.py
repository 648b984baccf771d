"""Runs the commands of docs/flower.md as they stand there, in runs/flower: four sites and a server on this machine.

    make flower-demo

Whatever it started ends with it, also when a command fails.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
FOLDER = REPOSITORY / "runs" / "flower"


def commands() -> str:
    """All blocks of the page that are for bash, in their order."""
    page = (REPOSITORY / "docs" / "flower.md").read_text(encoding="utf-8")
    return "\n".join(re.findall(r"^```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))


def main() -> None:
    """Shows each step as it is run."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    demo = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", commands()],
        cwd=FOLDER,
        env=os.environ | {"PATH": path},
        start_new_session=True,
    )
    try:
        code = demo.wait()
    finally:
        os.killpg(demo.pid, signal.SIGKILL)
    sys.exit(code)


if __name__ == "__main__":
    main()
