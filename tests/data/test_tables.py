"""Tables of Hugging Face datasets."""

from io import BytesIO

import datasets
import numpy as np
from pictures import noise
from PIL import Image

from sap_lightning.data.tables import first_rows, table_fingerprint, table_pictures


def test_the_first_rows_of_a_stream_are_a_table_of_encoded_images(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    images, captions = [noise(seed) for seed in range(6)], [f"caption {seed}" for seed in range(6)]
    datasets.Dataset.from_dict({"image": images, "caption": captions}, features).to_parquet(tmp_path / "a.parquet")
    stream = datasets.load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), streaming=True)["train"]
    table, again = first_rows(stream, 4), first_rows(stream, 4)
    assert table["caption"][:] == captions[:4]
    for picture, image in zip(table_pictures(table, "image", range(4)), images, strict=False):
        assert np.array_equal(np.asarray(Image.open(BytesIO(picture.read()))), np.asarray(image))
    assert table_fingerprint(table, "image") == table_fingerprint(again, "image")
