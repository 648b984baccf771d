"""What the commands do between the parser and the parts."""

from __future__ import annotations

import json
import shutil

import pytest
from damage import cut, flip

from sap_lightning.errors import InputError


def test_a_merged_model_s_images_are_preprocessed_as_it_says_itself(finished, run, tmp_path, capsys):
    model, untouched = tmp_path / "model", tmp_path / "untouched"
    uploads = [str(finished / "uploads" / name) for name in ("cartoon", "sketch")]
    run("merge", "--merge.format=model", f"--merge.output={untouched}", "--uploads", *uploads)
    shutil.copytree(untouched, model)
    capsys.readouterr()
    settings = json.loads((model / "preprocessor_config.json").read_text())
    (model / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.1, 0.2, 0.9]}))

    def shown(*options: str) -> str:
        run("test", "--data.domain=photo", *options)
        return capsys.readouterr().out

    assert shown(f"--uploads={model}") == shown(f"--model.base={model}")
    assert shown(f"--uploads={model}") != shown(f"--uploads={untouched}")


@pytest.mark.parametrize("damage", [cut, flip])
def test_a_merged_model_whose_tensors_have_changed_is_refused(finished, run, tmp_path, damage):
    merged = shutil.copytree(finished / "merged" / "photo" / "sap", tmp_path / "merged")
    (file,) = merged.glob("*.safetensors")
    damage(file)
    with pytest.raises(InputError, match=f"{file}: is missing or has changed since it was written; merge again"):
        run("test", "--data.domain=photo", f"--uploads={merged}")


def test_uploads_named_in_two_options_are_refused(finished, run, tmp_path):
    upload = str(finished / "uploads" / "photo")
    for twice in (["--uploads", upload, "--uploads", upload], [f"--uploads={upload}", "--uploads", upload]):
        with pytest.raises(InputError, match="--uploads is given twice"):
            run("merge", f"--merge.output={tmp_path / 'out'}", *twice)
    assert not (tmp_path / "out").exists()


def test_classes_are_shown_by_their_names_whatever_a_terminal_makes_of_them(world, run, tmp_path, capsys):
    names = [":boat: [/b]", "[red]car", *"abcdef"]
    run("test", "--data.domain=photo", f"--data.class_names={json.dumps(names)}")
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"accuracy/{name}" in shown for name in names)
