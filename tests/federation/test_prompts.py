"""Prompt clients in the whole protocol, by its real commands, in the run folder of clients that sent adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from federation.runs import DOMAINS, lines_of, shown_rows, stored, table, times
from places import REPOSITORY, SHAPES_CLIP
from references import contents, quiet_trainer
from safetensors.torch import load_file

from sap_lightning.cli import SapCLI
from sap_lightning.data import DomainDataModule
from sap_lightning.errors import InputError
from sap_lightning.federation.run_folder import RunFolder
from sap_lightning.io.context import context_layer
from sap_lightning.io.prompt import read_prompt
from sap_lightning.modules import CLIPPromptModule

UNSEEN = ["photo", "sketch"]
PROMPTS = [f"--config={REPOSITORY / 'configs' / 'prompts.yaml'}", "--model.tokens=4"]
ADAPTERS = ["zero-shot", *(f"client {domain}" for domain in DOMAINS), "average", "sap"]
COOP = [f"coop {domain}" for domain in DOMAINS]


@pytest.fixture(scope="module")
def joint(finished, run, tmp_path_factory) -> Path:
    """The finished run of adapters with prompts in it, for two unseen domains."""
    folder = Path(shutil.copytree(finished, tmp_path_factory.mktemp("joint") / "run"))
    unseen = f"--federation.unseen=[{','.join(UNSEEN)}]"
    run("fit", *PROMPTS, "--merge.method=median", unseen, f"--federation.run_dir={folder}")
    return folder


@pytest.fixture
def copy(joint, tmp_path) -> Path:
    return Path(shutil.copytree(joint, tmp_path / "copy"))


def test_prompts_stand_beside_adapters_in_one_table(joint, finished):
    rows = table(joint)
    assert set(rows) == {*ADAPTERS, *COOP, "promptfl", "pfedprompt", "promptfl median"}
    assert {model: rows[model] for model in ADAPTERS} == table(finished), "what was measured before is not anew"
    for model in (*COOP, "promptfl", "pfedprompt", "promptfl median"):
        assert list(rows[model]) == [domain for domain in UNSEEN if model != f"coop {domain}"]
    shown = shown_rows(joint)
    assert set(shown) == {*rows, "best client", "best coop"}
    assert shown["promptfl"][:3] == shown["pfedprompt"][:3], "the server's model is the prompt alone"


def test_adapters_find_prompts_beside_them_too(copy, run):
    before = shown_rows(copy)
    line = ["--federation.report=false", f"--federation.run_dir={copy}"]
    run("fit", f"--federation.unseen=[{','.join(UNSEEN)}]", *line)
    assert shown_rows(copy) == before
    run("fit", "--federation.clients=[cartoon,photo]", "--federation.unseen=sketch", *line)
    assert {"coop cartoon", "coop photo"} < shown_rows(copy).keys()
    assert not {"promptfl", "coop painting"} & shown_rows(copy).keys(), "which are of other clients"


def test_accuracy_at_home_is_a_column_of_its_own_for_prompts_alone(joint):
    for line in lines_of(joint):
        assert bool(line["personal_accuracy"]) == line["row"].startswith(("coop", "promptfl", "pfedprompt"))
    assert " | mean | personal | ECE | " in (joint / "table.md").read_text().splitlines()[0]
    promptfl, pfedprompt, coop, sap = (shown_rows(joint)[row][3] for row in ("promptfl", "pfedprompt", COOP[0], "sap"))
    assert promptfl != pfedprompt and sap == "–" and "–" not in (promptfl, pfedprompt, coop)


def test_accuracy_at_home_is_of_the_images_that_each_client_held_back(joint):
    at_home = {}
    for domain in DOMAINS:
        found = {
            stored(joint, f"coop {domain}", unseen)["metrics"]["personal_accuracy"]
            for unseen in UNSEEN
            if unseen != domain
        }
        (at_home[domain],) = found  # wherever else it is measured
        assert 10 * at_home[domain] == pytest.approx(round(10 * at_home[domain])), "a fifth of 48 images"
    promptfl = stored(joint, "promptfl", "sketch")["metrics"]["personal_accuracy"]
    assert 30 * promptfl == pytest.approx(round(30 * promptfl)), "the mean over three clients"


def test_what_is_sent_and_merged_is_the_prompt(joint):
    folder = RunFolder(joint).of_kind("prompt")
    contexts = {}
    for domain in DOMAINS:
        upload = folder.upload(domain)
        assert {file.name for file in upload.iterdir()} == {"prompt.safetensors", "manifest.json"}
        (contexts[domain],) = load_file(upload / "prompt.safetensors").values()
        assert contexts[domain].shape == (4, 64)
        assert json.loads((upload / "manifest.json").read_text())["kind"] == "prompt"
    others = torch.stack([contexts[domain] for domain in DOMAINS if domain != "sketch"])
    assert not torch.equal(others[0], others[1])
    for method, expected in {"average": others.mean(0), "median": others.median(0)[0]}.items():
        (merged,) = read_prompt(folder.merged("sketch", method)).layers.values()
        torch.testing.assert_close(merged.delta(), expected, atol=1e-6, rtol=0)


def test_nothing_in_the_run_folder_holds_what_a_client_remembers(joint, world):
    """The features of its images, of which a memory is made, are kept in the cache alone."""
    kept = [file.read_bytes() for file in joint.glob("prompts/**/*") if file.is_file()]
    assert len(kept) > 20
    client = CLIPPromptModule(SHAPES_CLIP)
    quiet_trainer().validate(client, DomainDataModule(str(world / "domains"), "photo", base=SHAPES_CLIP), verbose=False)
    for feature in client._seen:
        assert not any(feature[:3].numpy().tobytes() in content for content in kept)


def test_running_again_trains_and_measures_nothing_anew(copy, run):
    before, trained = contents(copy, "prompts/**/*"), times(copy, "prompts/**/*.ckpt")
    lines = (copy / "results.jsonl").read_bytes()
    run("fit", *PROMPTS, f"--federation.unseen=[{','.join(UNSEEN)}]", f"--federation.run_dir={copy}")
    after = contents(copy, "prompts/**/*")
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} <= {"prompts/config.yaml"}, "its run folder"
    assert times(copy, "prompts/**/*.ckpt") == trained and (copy / "results.jsonl").read_bytes() == lines


def test_another_memory_is_another_pfedprompt_and_needs_no_training(copy, joint, run):
    trained = times(copy, "prompts/**/*.ckpt")
    run("fit", *PROMPTS, "--model.memory.alpha=0", "--federation.unseen=sketch", f"--federation.run_dir={copy}")
    assert times(copy, "prompts/**/*.ckpt") == trained
    assert shown_rows(copy)["pfedprompt"] == shown_rows(copy)["promptfl"], "α = 0 is PromptFL"
    assert stored(copy, "promptfl", "sketch") == stored(joint, "promptfl", "sketch")
    assert stored(copy, "pfedprompt", "sketch")["settings"]["memory"] == {"alpha": 0.0, "beta": 5.5}


def test_a_client_trains_at_its_own_site_to_the_same_upload(joint, run, tmp_path):
    run("client", *PROMPTS, "--data.domain=photo", f"--federation.run_dir={tmp_path}")
    one, other = (contents(folder, "prompts/uploads/photo/*") for folder in (joint, tmp_path))
    assert one == other and len(one) == 2


def test_uploads_of_prompts_are_merged_and_measured_by_the_other_commands(joint, run, tmp_path, capsys):
    uploads = [str(joint / "prompts" / "uploads" / domain) for domain in DOMAINS if domain != "sketch"]
    out = tmp_path / "merged"
    run("merge", "--merge.method=average", "--merge.report=true", f"--merge.output={out}", "--uploads", *uploads)
    one, other = (load_file(folder / "prompt.safetensors") for folder in (out, joint / "prompts/merged/sketch/average"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    run("test", "--data.domain=sketch", "--uploads", str(out))
    assert f"{stored(joint, 'promptfl', 'sketch')['metrics']['accuracy']:.6f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (["--merge.method=ties"], "merge.method ties does not merge prompts, only adapters"),
        (["--federation.poison.domain=photo", "--federation.poison.kind=noise"], "poison.kind noise is for adapters"),
        (["--federation.ranks={photo: 4}"], r"federation\.ranks is for clients that train LoRA"),
        (["--federation.aggregation=flora", "--federation.rounds=2"], "aggregation: is for adapters; rounds of"),
        (["--data.val_fraction=0"], r"data\.val_fraction 0: prompts are measured on images that their clients hold"),
        (["--model.tokens=40"], r"model\.tokens 40: the text tower has room for 28 beside a class's name"),
    ],
)
def test_what_prompts_cannot_is_refused_before_any_upload_is_written(run, tmp_path, line, reason):
    with pytest.raises(InputError, match=reason):
        run("fit", *PROMPTS, *line, f"--federation.run_dir={tmp_path}")
    assert not list(tmp_path.glob("prompts/uploads/*"))


def test_ways_of_aggregating_prompts_are_not_swept(run, tmp_path):
    over = "--sweep.over={federation.aggregation: [fedit, flora]}"
    with pytest.raises(InputError, match=r"sweep\.over\.federation\.aggregation: is for adapters"):
        run("sweep", *PROMPTS, over, "--federation.rounds=2", f"--federation.run_dir={tmp_path}")


def test_prompts_that_come_from_elsewhere_are_refused_as_their_clients_are_not_here(options, joint):
    command = SapCLI("fit", [*options, *PROMPTS, f"--federation.run_dir={joint}"])
    with pytest.raises(InputError, match="prompts are measured at their clients' sites too, so these train here"):
        command.federation(uploads=[])


def test_settings_that_a_client_was_not_trained_with_are_refused(joint, run):
    with pytest.raises(InputError, match=r"model\.init_args\.tokens was 4, is 5"):
        run("fit", *PROMPTS, "--model.tokens=5", f"--federation.run_dir={joint}")


def test_a_poisoned_client_learns_wrong_labels(copy, run):
    poison = ["--federation.poison.domain=photo", "--federation.unseen=sketch"]
    run("fit", *PROMPTS, *poison, f"--federation.run_dir={copy}")
    rows = table(copy)
    assert {"coop photo, photo label_flip", "promptfl, photo label_flip", "pfedprompt, photo label_flip"} < set(rows)


def test_in_rounds_clients_go_on_from_the_merge_of_the_prompts_before(run, tmp_path):
    """In the second, after warm-up, at a rate so low that they stay there."""
    few = ["--federation.clients=[cartoon,photo]", "--federation.unseen=sketch", "--federation.rounds=2"]
    rates = ["--model.warmup_rate=0.1", "--model.learning_rate=1e-7"]
    run("fit", *PROMPTS, *few, *rates, f"--federation.run_dir={tmp_path}")
    folder = RunFolder(tmp_path).of_kind("prompt")
    contexts: list[list[torch.Tensor]] = []
    for number in (0, 1):
        prompts = [read_prompt(folder.round("sketch", number).upload(domain)) for domain in ("cartoon", "photo")]
        assert [prompt.manifest.round for prompt in prompts if prompt.manifest] == [number] * 2
        contexts.append([prompt.layers[context_layer("end")].delta() for prompt in prompts])
    assert (contexts[0][0] - contexts[0][1]).abs().max() > 0.01
    mean = (contexts[0][0] + contexts[0][1]) / 2
    (start,) = read_prompt(folder.handed("sketch", 0) / "start").layers.values()
    torch.testing.assert_close(start.delta(), mean, atol=1e-6, rtol=0)
    for context in contexts[1]:
        torch.testing.assert_close(context, mean, atol=1e-4, rtol=0)
        assert not torch.equal(context, start.delta())
    assert stored(tmp_path, "promptfl", "sketch")["rounds"] == 2


def test_the_config_names_every_setting_of_a_prompt_client_at_its_default(run, capsys):
    written = yaml.safe_load((REPOSITORY / "configs" / "prompts.yaml").read_text())["model"]
    with pytest.raises(SystemExit):
        run("fit", "--model=CLIPPromptModule", "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)["model"]
    assert printed["class_path"].endswith(written["class_path"])
    own = {name: value for name, value in printed["init_args"].items() if name not in ("base", "templates", "seed")}
    assert own == written["init_args"]
