"""What a merge method of one's own may rely on."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence

import pytest
import torch
from places import SHAPES_CLIP
from probes import FC2, PROJECTION, Q, adapter, deltas, exact_delta, probe, random_adapter, random_layer, relative_gap

from sap_lightning.errors import InputError, check_at_least, check_positive, check_share
from sap_lightning.functional.lora import LoRALayer, Update, dense
from sap_lightning.functional.spaces import Parameters, Space
from sap_lightning.io.adapter import Adapter, read_adapter, write_adapter
from sap_lightning.merging import METHODS, Average
from sap_lightning.merging.method import ClientLayers, LayerwiseMethod, MergeMethod, PruningMethod, client_layers
from sap_lightning.models.clip import load_base
from sap_lightning.models.layers import layer_shapes
from sap_lightning.models.probe import AnchorProbe

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


class ByGradient(PruningMethod):
    """Keeps the factors' elements with the largest gradient on the anchors."""

    name = "by gradient"
    needs_anchors = True
    space = "factor"

    def __init__(self, sparsity: float = 0.5) -> None:
        self.sparsity = sparsity

    def examine(self, adapter: Adapter, anchors: AnchorProbe) -> dict[str, Parameters]:
        return anchors.gradients(adapter.layers, self.spaces(adapter), "abs_then_mean").of

    def scores(self, adapter: Adapter, spaces: Mapping[str, Space]) -> Mapping[str, Parameters]:
        return self.evidence(adapter)


class Unexamined(ByGradient):
    examine = PruningMethod.examine


class Magnitudes(PruningMethod):
    """Keeps what is largest, in factor space."""

    space = "factor"
    sparsity = 0.5

    def scores(self, adapter: Adapter, spaces: Mapping[str, Space]) -> Mapping[str, Parameters]:
        return {name: tuple(theta.abs() for theta in space.parameters) for name, space in spaces.items()}


def test_a_layerwise_method_sees_every_layer_of_every_client():
    clients = [random_adapter(1), random_adapter(2, (Q, PROJECTION))]
    merged = Largest().merge(clients)
    assert list(merged) == sorted([Q, FC2, PROJECTION])
    expected = {name: max(deltas(clients, name), key=torch.linalg.vector_norm) for name in merged}
    assert relative_gap(merged, expected) < 1e-6


def test_a_pruning_method_needs_only_a_score():
    one = random_adapter(1)
    merged = Magnitudes().merge([one])
    for name, layer in one.layers.items():
        A, B = (factor.clone() for factor in (layer.A, layer.B))
        together = torch.cat([A.flatten(), B.flatten()]).abs()
        threshold = together.sort().values[round(0.5 * len(together))]
        A[A.abs() < threshold], B[B.abs() < threshold] = 0, 0
        torch.testing.assert_close(dense(merged[name]), layer.scale * B @ A, atol=1e-6, rtol=1e-5)


def test_a_pruning_method_that_looks_at_anchors_does_so_once_for_each_client():
    method = ByGradient()
    method.prepare([random_adapter(1), random_adapter(2)], [0.5, 0.5], probe())
    method.prepare([random_adapter(2)], [1.0], probe())
    assert len(method.answers) == 2
    kept = method.kept(random_adapter(2), 0.5)
    assert all(sum(int((~m).sum()) for m in kept[n]) == sum(m.numel() for m in kept[n]) // 2 for n in kept)


def test_a_method_without_anchors_that_needs_them_says_so():
    with pytest.raises(InputError, match=r"merge\.method by gradient looks at anchors; give --anchors\.root"):
        ByGradient().merge([random_adapter(1)])
    with pytest.raises(NotImplementedError, match="Unexamined needs anchors"):
        Unexamined().merge([random_adapter(1)], anchors=probe())


@pytest.mark.parametrize("name", sorted(name for name, method in METHODS.items() if method.needs_anchors))
def test_every_method_that_needs_anchors_asks_for_them(name):
    with pytest.raises(InputError, match=rf"merge\.method {name} looks at anchors"):
        METHODS[name]().merge([random_adapter(1), random_adapter(2)])


def test_a_method_is_called_by_its_class_unless_it_has_a_name():
    assert (Largest.name, Magnitudes.name, ByGradient.name) == ("Largest", "Magnitudes", "by gradient")
    assert type("Sub", (ByGradient,), {}).name == "Sub", "a subclass is another method"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_s_settings_are_its_constructor_s_arguments(name):
    settings = json.loads(json.dumps(METHODS[name]().settings))
    defaults = {key: given.default for key, given in inspect.signature(METHODS[name]).parameters.items()}
    assert settings == json.loads(json.dumps(defaults))


def test_clients_count_alike_if_there_are_no_weights():
    clients = [random_adapter(1), random_adapter(2)]
    assert relative_gap(Magnitudes().merge(clients), Magnitudes().merge(clients, [0.5, 0.5])) == 0


def test_a_layer_that_a_client_lacks_is_an_update_of_rank_0():
    clients = [random_adapter(1, (Q,)), random_adapter(2, (Q, FC2)), random_adapter(3, (FC2,))]
    layers = ClientLayers(clients, FC2)
    assert len(layers) == 3
    assert [layer.rank for layer in layers] == [0, 3, 3]
    assert {layer.shape for layer in layers} == {(32, 64)}
    assert not layers[0].delta().any()
    assert [layer.rank for layer in layers[:2]] == [0, 3]
    assert torch.equal(layers[-1].A, clients[2].layers[FC2].A)
    with pytest.raises(IndexError):
        layers[3]
    assert list(client_layers(clients)) == sorted([Q, FC2])


def test_layers_of_clients_stay_on_disk_until_they_are_looked_at(tmp_path):
    folder = write_adapter(tmp_path / "client", {"fc": random_layer(0, (4, 6))}, "some/base")
    layers = ClientLayers([read_adapter(folder)], "fc")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter_model\.safetensors"):
        layers[0]


def test_an_adapter_merges_to_itself_by_every_method_that_leaves_it_whole():
    one = adapter("one", {Q: random_layer(0, (32, 32))})
    for method in (METHODS["average"](), METHODS["median"](), Largest()):
        assert isinstance(method, MergeMethod)
        assert relative_gap(method.merge([one]), {Q: exact_delta(one.layers[Q])}) < 1e-6


def test_a_share_in_per_cent_is_told_how_to_write_it():
    with pytest.raises(InputError, match=r"merge\.method\.drop must lie in \[0, 1\], got 95; 95 % is 0\.95$"):
        check_share("merge.method.drop", 95)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_what_is_no_share_is_refused_by_name(value):
    with pytest.raises(InputError, match=r"merge\.method\.drop must lie in \[0, 1\]"):
        check_share("merge.method.drop", value)
    assert check_share("merge.method.drop", 1) == 1


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_not_above_0_or_not_finite_is_refused_by_name(value):
    with pytest.raises(InputError, match=r"merge\.method\.scale must be above 0"):
        check_positive("merge.method.scale", value)
    check_positive("merge.method.scale", 0.1)


@pytest.mark.parametrize("value", [0, float("nan")])
def test_what_is_below_the_least_is_refused_by_name(value):
    with pytest.raises(InputError, match=r"merge\.method\.sweeps must be at least 1"):
        check_at_least("merge.method.sweeps", value, 1)
    check_at_least("merge.method.sweeps", 1, 1)


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


def test_an_argument_that_is_not_stored_under_its_name_is_refused():
    class Secretive(Average):
        def __init__(self, power: float = 1.0) -> None:
            self._power = power

    with pytest.raises(InputError, match=r"Secretive: store the argument power as self\.power"):
        _ = Secretive().settings
