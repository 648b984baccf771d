"""What a merge method of one's own may rely on."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Sequence
from dataclasses import FrozenInstanceError

import pytest
import torch
from adapters import adapter_of, exact_delta, reaching
from places import SHAPES_CLIP
from probes import FC2, PROJECTION, Q, deltas, probe, random_adapter, random_layer, relative_gap

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import LoRALayer, Update
from sap_lightning.io.adapter import Adapter, read_adapter, write_adapter
from sap_lightning.merging import METHODS, Average, SAPAuto
from sap_lightning.merging.method import LayerwiseMethod, MergeMethod
from sap_lightning.merging.pruning import Pruning, PruningMethod
from sap_lightning.models.clip import load_base
from sap_lightning.models.layers import layer_shapes

MODULE = '''
from sap_lightning.errors import InputError
from sap_lightning.merging.method import LayerwiseMethod


class HalfOfFirst(LayerwiseMethod):
    """A share of the first client."""

    def __init__(self, share: float = 1.0) -> None:
        if share < 0:
            raise InputError(f"merge.method.share must not be negative, got {share}")
        self.share = share

    def merge_layer(self, layers, weights):
        return layers[0]._replace(scale=self.share * layers[0].scale)
'''


class Largest(LayerwiseMethod):
    """Of all clients' ΔW the longest."""

    def merge_layer(self, layers: Sequence[LoRALayer], weights: Sequence[float]) -> Update:
        return max((layer.delta() for layer in layers), key=torch.linalg.vector_norm)


def test_a_layerwise_method_sees_every_layer_of_every_client():
    clients = [random_adapter(1), random_adapter(2, (Q, PROJECTION))]
    merged = Largest().merge(clients)
    assert list(merged) == sorted([Q, FC2, PROJECTION])
    expected = {name: max(deltas(clients, name), key=torch.linalg.vector_norm) for name in merged}
    assert relative_gap(merged, expected) < 1e-6


@pytest.mark.parametrize("name", sorted(name for name, method in METHODS.items() if method().needs_anchors))
def test_every_method_that_needs_anchors_asks_for_them(name):
    with pytest.raises(InputError, match=rf"merge\.method {name} looks at anchors"):
        METHODS[name]().merge([random_adapter(1), random_adapter(2)])


def test_a_method_is_called_by_its_class_unless_it_has_a_name():
    named = type("Named", (Largest,), {"name": "by length"})
    assert (Largest.name, named.name, Average.name) == ("Largest", "by length", "average")
    assert type("Sub", (named,), {}).name == "Sub", "a subclass is another method"


def test_clients_count_alike_if_there_are_no_weights():
    clients = [random_adapter(1), random_adapter(2)]
    assert relative_gap(Average().merge(clients), Average().merge(clients, [0.5, 0.5])) == 0


def test_an_adapter_merges_to_itself_by_every_method_that_leaves_it_whole():
    one = adapter_of({Q: random_layer(0, (32, 32))})
    for method in (METHODS["average"](), METHODS["median"](), Largest()):
        assert isinstance(method, MergeMethod)
        assert relative_gap(method.merge([one]), {Q: exact_delta(one.layers[Q])}) < 1e-6


# Settings and nothing else

EACH_METHOD = pytest.mark.parametrize("name", sorted(METHODS))
CHANGES = {
    "task_arithmetic": {"scale": 0.7},
    "fisher": {"floor": 0.5},
    "regmean": {"off_diagonal": 0.5},
    "lorm": {"rank": 2},
    "sens_merging": {"scale": 0.7},
    "ata": {"neighbours": 1},
    "ataf": {"steps": 3},
    "trimmed_mean": {"trim": 0.4},
    "krum": {"multi": 2},
    "tsv_m": {"scale": 0.7},
    "iso_c": {"scale": 0.7},
    "iso_cts": {"scale": 0.7},
    "cart": {"scale": 0.7},
    "wudi": {"time": 1.0},
    "dc_merge": {"scale": 0.7},
    "consensus": {"wanted_by": 1},
    "sap_auto": {"scales": (1.0, 2.0)},
    "wise_ft": {"scale": 0.7},
    "lines": {"method": "ties"},
    "at_reach": {"method": "ties"},
    "core_space": {"method": "average"},
    "lora_lego": {"rank": 2},
    "adamerging": {"steps": 3},
    "stats_merging": {"steps": 3},
}
"""Another setting of each method that has settings, but no sparsity of its own."""


@EACH_METHOD
def test_every_method_s_settings_are_its_constructor_s_arguments(name):
    settings = json.loads(json.dumps(METHODS[name]().settings))
    defaults = {key: given.default for key, given in inspect.signature(METHODS[name]).parameters.items()}
    assert settings == json.loads(json.dumps(defaults))


def test_an_argument_that_is_not_stored_under_its_name_is_refused():
    class Secretive(Average):
        def __init__(self, power: float = 1.0) -> None:
            self._power = power

    with pytest.raises(InputError, match=r"Secretive: store the argument power as self\.power"):
        _ = Secretive().settings


@EACH_METHOD
def test_a_method_s_settings_cannot_be_changed_and_nothing_can_be_added(name):
    method = METHODS[name]()
    before = method.settings
    for setting in (*before, "adapters", "name"):
        with pytest.raises(FrozenInstanceError):
            setattr(method, setting, None)
    assert method.settings == before and not hasattr(method, "adapters")


@EACH_METHOD
def test_methods_of_equal_settings_are_equal_and_hash_alike(name):
    one, other = METHODS[name](), METHODS[name]()
    assert one == other and hash(one) == hash(other) and len({one, other}) == 1
    assert all(one != METHODS[another]() for another in METHODS if another != name)


@pytest.mark.parametrize("name", sorted(name for name, method in METHODS.items() if method().settings))
def test_methods_of_other_settings_are_not_equal(name):
    method = METHODS[name]
    other = CHANGES.get(name, {"sparsity": 0.35})
    assert method(**other) != method() and method(**other) == method(**other)
    assert method(**other).settings != method().settings


def test_a_method_with_lists_as_a_config_file_gives_them_is_equal_to_its_like():
    one, other = SAPAuto(scales=[1.0, 2.0]), SAPAuto(scales=(1.0, 2.0))
    assert one == other and hash(one) == hash(other) and one != SAPAuto(scales=[1.0])
    assert one.settings["scales"] == other.settings["scales"] == [1.0, 2.0], "a record knows lists only"


def four_clients(first: int, name: str) -> list[Adapter]:
    """With manifests that say what the method needs."""
    adapters = [random_adapter(seed, samples=10 * seed) for seed in range(first, first + 4)]
    return list(map(reaching, adapters)) if name == "at_reach" else adapters


@EACH_METHOD
def test_one_method_prepared_for_two_sets_of_clients_keeps_both(name):
    method, anchors = METHODS[name](), probe()
    weights = ([0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1])
    one = method.prepare(four_clients(1, name), weights[0], anchors)
    before, found = one.apply(), copy.deepcopy(one.findings)
    other = method.prepare(four_clients(5, name), weights[1], anchors)
    assert relative_gap(other.apply(), METHODS[name]().merge(four_clients(5, name), weights[1], probe())) == 0
    assert relative_gap(one.apply(), before) == 0
    assert relative_gap(before, other.apply()) > 0
    assert one.findings == found


@EACH_METHOD
def test_how_a_merge_prunes_is_known_where_it_prunes(name):
    prepared = METHODS[name]().prepare(four_clients(1, name), [0.25] * 4, probe())
    prunes = issubclass(METHODS[name], PruningMethod | SAPAuto)
    assert isinstance(prepared, Pruning) == prunes
    if isinstance(prepared, Pruning):
        assert list(prepared.adapters) == four_clients(1, name)


# A file of one's own


@pytest.fixture
def uploads(tmp_path, monkeypatch) -> list[str]:
    """Two uploads for the shipped base, and a merge method in a file outside the package."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "my_methods.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "code")
    name, shape = next(iter(layer_shapes(load_base(SHAPES_CLIP).tower).items()))
    for seed in range(2):
        write_adapter(tmp_path / str(seed), {name: random_layer(seed, tuple(shape))}, SHAPES_CLIP)
    return [str(tmp_path / str(seed)) for seed in range(2)]


def test_a_method_in_a_file_of_one_s_own_is_named_by_class_path(run, uploads, tmp_path, capsys):
    options = ["--merge.method", "my_methods.HalfOfFirst", "--merge.method.share", "0.5"]
    run("merge", *options, f"--merge.output={tmp_path / 'out'}", "--uploads", *uploads)
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["method"] == "HalfOfFirst" and record["settings"] == {"share": 0.5}
    first = next(read_adapter(one) for one in uploads if read_adapter(one).sha256 == record["sources"][0]["sha256"])
    [(name, layer)] = first.layers.items()
    merged = read_adapter(tmp_path / "out").layers
    torch.testing.assert_close(merged[name].delta(), 0.5 * layer.delta())
    assert "by HalfOfFirst" in capsys.readouterr().out


def test_what_a_method_of_one_s_own_refuses_is_said_and_nothing_written(run, uploads, tmp_path):
    options = ["--merge.method=my_methods.HalfOfFirst", "--merge.method.share=-1"]
    with pytest.raises(InputError, match=r"merge\.method\.share must not be negative"):
        run("merge", *options, f"--merge.output={tmp_path / 'out'}", "--uploads", *uploads)
    assert not (tmp_path / "out").exists()


def test_a_method_that_is_not_there_is_refused_by_name(run, uploads, tmp_path):
    with pytest.raises(InputError, match=r"my_methods\.Nothing: no such method"):
        run("merge", "--merge.method=my_methods.Nothing", f"--merge.output={tmp_path / 'out'}", "--uploads", *uploads)
