"""Where the tests find the repository and the shipped models."""

from pathlib import Path

import sap_lightning.data

REPOSITORY = Path(__file__).parents[1]
SHAPES_CLIP = str(Path(sap_lightning.data.__file__).with_name("shapes_clip"))
SHAPES_LLAVA = str(Path(sap_lightning.data.__file__).with_name("shapes_llava"))
