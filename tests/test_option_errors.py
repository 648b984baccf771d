"""What a person is told of a faulty option: its name and what it takes, in one line, by every command."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from jsonargparse import ActionConfigFile, ArgumentParser

from sap_lightning.cli import SapCLI
from sap_lightning.commands import COMMANDS
from sap_lightning.config_files import ConfigFile
from sap_lightning.errors import InputError
from sap_lightning.merging import METHODS, MergeMethod
from sap_lightning.option_errors import in_words

TIES = (
    "ties has no such setting; it has sparsity (float), scale (float), variant (one of authors, peft, mergekit), major"
)
UNKNOWN = f"no such method; there are {', '.join(METHODS)}"


def told(*line: str) -> str:
    command, *args = line
    with pytest.raises(InputError) as refused:
        COMMANDS[command](args)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 700
    return str(refused.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("merge --merge.method ties --merge.method.density 0.5", f"merge.method.density: {TIES}"),
        ("merge --merge.method lines --merge.method.method ties --merge.method.method.density 1",
         f"merge.method.method.density: {TIES}"),
        ("merge --merge.method average --merge.method.x 1", "merge.method.x: average has no such setting; it has none"),
        ("merge --merge.method ties --merge.method.sparsity x", "merge.method.sparsity: takes float, got 'x'"),
        ("merge --merge.method lines --merge.method.method ties --merge.method.method.scale x",
         "merge.method.method.scale: takes float, got 'x'"),
        ("merge --merge.method.sparsity 0.5",
         "merge.method.sparsity: a setting of no method; name its method before it, with --merge.method"),
        ("fuse --fuse.method.sparsity 0.5 --fuse.method ties",
         "fuse.method.sparsity: a setting of no method; name its method before it, with --fuse.method"),
        ("merge --merge.method nosuch", f"merge.method nosuch: {UNKNOWN}"),
        ("merge --merge.method nosuch --merge.method.x 1", f"merge.method nosuch: {UNKNOWN}"),
        ("merge --merge.method no.Such --merge.method.x 1", f"merge.method no.Such: {UNKNOWN}"),
        ("merge --merge.method torch.nn.Linear --merge.method.bias 1", f"merge.method torch.nn.Linear: {UNKNOWN}"),
        ("fit --model.rank three", "model.rank: takes int, got 'three'"),
        ("fit --merge.rank x", "merge.rank: takes int or null, got 'x'"),
        ("fit --merge.weights x",
         "merge.weights: takes one of uniform, samples, reach or a list of float or null, got 'x'"),
        ("client --model.targets 3", "model.targets: takes a list of str, got '3'"),
        ("predict --predict.images p --data.class_names [1,2", "data.class_names: takes a list of str or null, got"),
        ("sweep --sweep.seeds a", "sweep.seeds: takes a list of int, got 'a'"),
        ("test --trainer.precision x", "trainer.precision: takes one of 64, 32, 16 or one of "),
        ("fit --trainer.callbacks Nope", "trainer.callbacks: takes a list of Callback or Callback or null, got 'Nope'"),
        ("fit --trainer.callbacks Timer --trainer.callbacks.x 1", "trainer.callbacks.x: Timer has no such setting; it"),
        ("fit --model {rnak: 3}", "model.rnak: no such option; did you mean model.rank?"),
        ("fit --model.rnak=3", "model.rnak: no such option; did you mean model.rank?"),
        ("fit foo", "foo: no such option; --help shows all"),
        ("fit --model.rank", "model.rank: no value is given; it takes int"),
        ("merge --uploads", "uploads: no value is given"),
        ("fit --federation.poison x",
         "federation.poison: takes a file or a mapping of its settings; they are federation.poison.domain, "),
        ("fuse --fuse.method ties --fuse.method.variant foo",
         "fuse.method.variant: takes one of authors, peft, mergekit, got 'foo'"),
        ("fuse --fuse.method ties --fuse.method.sparsty 3", "fuse.method.sparsty: ties has no such setting; it has "),
        ("fuse --fuse.method task_arithmetic --fuse.method.scale nan", "fuse.method.scale: takes float, got 'nan'"),
        ("fuse --fuse.method hm3 --fuse.method.method ties --fuse.method.method.scale x",
         "fuse.method.method.scale: takes float, got 'x'"),
        ("fit --config configs/prompts.yaml --model.memory 5",
         "model.memory: takes a file or a mapping of its settings; they are model.memory.alpha, "),
        ("fit --config configs/prompts.yaml --model.memory null --data.root x",
         "model.memory: takes a file or a mapping of its settings, got null; they are model.memory.alpha, "),
        ("fit --model.rank 5000 --data.root x", "model.rank 5000: the server takes adapters of rank 4096 at most"),
        ("client --model.sent_blocks -1 --data.root x", "model.sent_blocks must lie in (0, 1], got -1"),
        ("client --model.sent_blocks 2 --data.root x",
         "model.sent_blocks must lie in (0, 1], got 2; for one block alone write [2]"),
        ("sweep --sweep.over {1: [2]} --data.root x", "sweep.over.1: is no name of a setting, such as model.rank"),
        ("sweep --sweep.over null --data.root x", "sweep.over: takes a mapping of a list of Any, got"),
        ("fit --config /nowhere.yaml", "config: File does not exist: '/nowhere.yaml'"),
    ],
)  # fmt: skip
def test_an_option_is_named_with_what_it_takes(line, said):
    words = re.findall(r"\{.*\}|\S+", line)
    assert told(*words).startswith(said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model: {rank: x}", "model.rank: takes int, got 'x'"),
        ("merge: {method: {class_path: TIES, init_args: {density: 3}}}", f"merge.method.density: {TIES}"),
        ("model: [1", "is no YAML: while parsing a flow sequence in line 1, column 8: model: [1 ^ expected ',' or"),
        ("\x1b[2J", "is no YAML: unacceptable character #x001b"),
        ("anchors: {root: 2026-13-77}", "is no YAML: month must be in 1..12"),
        ("- 3", "holds [3], expected settings by group, such as model: {rank: 8}"),
        ("# nothing", "is empty; give settings by group"),
        ("model: {rank: 4}\nmodel: {rank: 8}", "'model' stands twice, again in line 2; leave one of them out"),
        ("model: {rank: 4, rank: 8}", "'rank' stands twice, again in line 1"),
        (
            "model: [{rank: 4}]",
            "model: takes a file or a mapping of its settings, got [{'rank': 4}]; they are model.base, ",
        ),
        ("? [a, b]\n: 1", "is no YAML: "),
        ("[" * 3000, "is no YAML: "),
        ("model:", "model: takes a file or a mapping of its settings, got null; they are "),
        ("data: {curriculum: true}", "data.curriculum: takes a file or a mapping of its settings, got True; they are "),
    ],
)
def test_what_is_wrong_in_a_config_file_is_said_with_its_name(tmp_path, content, said):
    file = tmp_path / "config.yaml"
    file.write_text(content)
    assert told("fit", "--config", str(file)).startswith(f"{file}: {said}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model: {rank: null}", "model.rank: takes int, got null"),
        ("model: {reach: null}", "model.reach: takes bool, got null"),
        ("data: {augment: null}", "data.augment: takes bool, got null"),
        ("trainer: {max_epochs: null}", "trainer.max_epochs is null, which is 1,000 epochs to Lightning; give a num"),
        ("federation: {aggregation: null}", "federation.aggregation: takes one of "),
        (
            "merge: {method: {class_path: sap_lightning.merging.TIES, init_args: {scale: null}}}",
            "merge.method.scale: takes float, got null",
        ),
    ],
)
def test_null_is_refused_where_nothing_else_is_meant_by_it(tmp_path, content, said):
    file = tmp_path / "config.yaml"
    file.write_text(content)
    assert told("fit", "--config", str(file), "--data.root", str(tmp_path)).startswith(said)


def test_jsonargparse_which_reads_by_the_locale_is_given_text(tmp_path, monkeypatch):
    file, given = tmp_path / "config.yaml", []
    file.write_text("fuse: {output: café}", encoding="utf-8")
    monkeypatch.setattr("locale.getpreferredencoding", lambda _: "ISO-8859-1")
    monkeypatch.setattr(ActionConfigFile, "apply_config", staticmethod(lambda *args: given.append(args[-1])))
    ArgumentParser().add_argument("--config", action=ConfigFile)(SimpleNamespace(_actions=[]), {}, str(file))
    assert given == ["fuse: {output: café}"]


@pytest.mark.parametrize("command", ["fuse", "fit"])
def test_a_config_file_that_is_no_text_is_refused_with_its_name(tmp_path, command):
    file = tmp_path / "config.yaml"
    file.write_bytes(b"model: \xff")
    assert told(command, "--config", str(file)).startswith(f"{file}: is no text in UTF-8 (")


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "int"),
        (float | None, "float or null"),
        (Literal["a", 1] | bool, "one of a, 1 or bool"),
        (Sequence[str], "a list of str"),
        (Mapping[str, list[Any]], "a mapping of a list of Any"),
        (MergeMethod | str, "MergeMethod or str"),
    ],
)
def test_a_type_is_said_in_words(hint, words):
    assert in_words(hint) == words


def test_a_group_may_be_a_file_that_lies_beside_its_config(tmp_path):
    (tmp_path / "curriculum.yaml").write_text("{start: 0.5}")
    (tmp_path / "config.yaml").write_text("data: {curriculum: curriculum.yaml}  # ρ")
    given = SapCLI("client", ["--config", str(tmp_path / "config.yaml"), "--data.root", "x"])
    assert given.datamodule.curriculum.start == 0.5


def test_a_callback_of_one_s_own_need_not_say_its_types(tmp_path, monkeypatch):
    (tmp_path / "untyped.py").write_text(
        "import lightning as L\nclass Mine(L.Callback):\n    def __init__(self, folder): self.folder = folder\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = '[{"class_path": "untyped.Mine", "init_args": {"folder": null}}]'
    given = SapCLI("client", [f"--trainer.callbacks={own}", "--data.root", "x"])
    assert given.config.trainer.callbacks[0].init_args.folder is None
