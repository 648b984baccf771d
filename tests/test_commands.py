"""What the commands do between the parser and the parts."""

from __future__ import annotations

import json
import shutil

import pytest

from sap_lightning.errors import InputError


def test_a_merged_model_s_images_are_preprocessed_as_it_says_itself(finished, run, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(finished / "merged" / "photo" / "sap", model)
    settings = json.loads((model / "preprocessor_config.json").read_text())
    (model / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.1, 0.2, 0.9]}))

    def shown(*options: str) -> str:
        run("test", "--data.domain=photo", *options)
        return capsys.readouterr().out

    assert shown(f"--uploads={model}") == shown(f"--model.base={model}")
    assert shown(f"--uploads={model}") != shown(f"--uploads={finished / 'merged' / 'photo' / 'sap'}")


@pytest.mark.parametrize("domain", ["../photo", "/tmp/photo", ".photo"])
def test_a_domain_that_would_lead_out_of_the_run_folder_is_refused_before_anything_is_written(run, tmp_path, domain):
    with pytest.raises(InputError, match="its name must be"):
        run("client", f"--data.domain={domain}", f"--federation.run_dir={tmp_path / 'run'}")
    assert list(tmp_path.iterdir()) == []
