"""The clients' layers and shares, as merge methods see them."""

from __future__ import annotations

import pytest
import torch
from adapters import adapter_of, reaching
from probes import FC2, PROJECTION, Q, random_adapter, random_layer

from sap_lightning.errors import InputError
from sap_lightning.functional.reach import MEASURED
from sap_lightning.io.adapter import Adapter, read_adapter, write_adapter
from sap_lightning.merging.clients import (
    ClientLayers,
    client_layers,
    client_weights,
    doubts_about,
    layer_names,
    layers_named,
)


def unlike_clients() -> list[Adapter]:
    """Three clients none of which has every layer."""
    return [random_adapter(1, (Q,)), random_adapter(2, (Q, FC2)), random_adapter(3, (FC2,))]


def test_a_layer_that_a_client_lacks_is_an_update_of_rank_0():
    clients = unlike_clients()
    layers = ClientLayers(clients, FC2)
    assert len(layers) == 3
    assert [layer.rank for layer in layers] == [0, 3, 3]
    assert {layer.shape for layer in layers} == {(32, 64)}
    assert not layers[0].delta().any()
    assert [layer.rank for layer in layers[:2]] == [0, 3]
    assert torch.equal(layers[-1].A, clients[2].layers[FC2].A)
    with pytest.raises(IndexError):
        layers[3]


def test_the_layers_are_those_that_some_client_adapts_in_order():
    clients = unlike_clients()
    assert layer_names(clients) == list(client_layers(clients)) == sorted([Q, FC2])
    assert all(layers.name == name for name, layers in client_layers(clients).items())
    assert layer_names([]) == []


def test_layers_of_clients_stay_on_disk_until_they_are_looked_at(tmp_path):
    folder = write_adapter(tmp_path / "client", {"fc": random_layer(0, (4, 6))}, "some/base")
    layers = ClientLayers([read_adapter(folder)], "fc")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter_model\.safetensors"):
        layers[0]


def test_layers_are_named_as_far_as_the_adapter_has_them():
    one = random_adapter(1, (Q, FC2))
    assert layers_named(one, None) == one.layers
    named = layers_named(one, [PROJECTION, FC2])
    assert list(named) == [FC2]
    assert torch.equal(named[FC2].A, one.layers[FC2].A)
    assert list(layers_named(one, [Q, FC2])) == [Q, FC2]
    assert layers_named(one, ()) == {}


@pytest.mark.parametrize("count", [1, 3])
def test_clients_count_alike_unless_it_is_said(count):
    clients = [random_adapter(seed, samples=10 * seed) for seed in range(1, count + 1)]
    assert client_weights(clients) == client_weights(clients, "uniform") == [1 / count] * count


def test_clients_count_by_their_images():
    clients = [random_adapter(seed, samples=samples) for seed, samples in enumerate((30, 10, 60))]
    assert client_weights(clients, "samples") == [0.3, 0.1, 0.6]
    assert client_weights(clients[:1], "samples") == [1.0]


def test_a_client_that_does_not_say_its_images_is_refused_by_name():
    silent = adapter_of(random_adapter(2).layers, "silent")
    with pytest.raises(InputError, match="upload 'silent' has no manifest that says its number of samples"):
        client_weights([random_adapter(1, samples=5), silent], "samples")
    assert client_weights([random_adapter(1, samples=5), silent]) == [0.5, 0.5]


def test_no_client_counts_more_than_the_largest_share_that_is_allowed():
    clients = [random_adapter(seed, samples=count) for seed, count in enumerate((980, 15, 5))]
    assert client_weights(clients, "samples") == pytest.approx([0.98, 0.015, 0.005])
    assert client_weights(clients, "samples", 0.5) == pytest.approx([0.5, 0.375, 0.125])
    assert client_weights(clients, "samples", 0.4) == pytest.approx([0.4, 0.4, 0.2])
    assert client_weights(clients, "samples", 1 / 3) == pytest.approx([1 / 3] * 3)
    with pytest.raises(InputError, match=r"merge\.max_share 0\.3: 3 clients of at most that make no whole"):
        client_weights(clients, "samples", 0.3)


def test_shares_by_images_are_said(caplog):
    with caplog.at_level("INFO"):
        client_weights([random_adapter(seed, samples=count) for seed, count in enumerate((3, 1))], "samples")
    assert "0.750" in caplog.text and "0.250" in caplog.text


def saying(seed: int, before: float, after: float, elsewhere: float) -> Adapter:
    """A client whose adapter wins this at home, and this in every other style."""
    home, other = [before, 0, 0, 0, after], [0.25, 0, 0, 0, 0.25 + elsewhere]
    return reaching(random_adapter(seed), {style: home if style == "plain" else other for style in MEASURED})


def test_clients_count_by_what_they_win_elsewhere_of_what_was_left(caplog):
    clients = [saying(1, 0.5, 0.75, 0.25), saying(2, 0.75, 0.875, 0.125), saying(3, 0.5, 0.75, 0.125)]
    with caplog.at_level("INFO"):
        assert client_weights(clients, "reach") == pytest.approx([0.4, 0.4, 0.2])
    assert "clients count by what they win elsewhere" in caplog.text and "0.400" in caplog.text


@pytest.mark.parametrize("said", [(0.5, 0.75, -0.125), (0.5, 0.5625, 0.0625)])
def test_clients_count_alike_where_nothing_holds_elsewhere_or_next_to_nothing_was_won(said):
    assert client_weights([saying(1, *said), saying(2, 0.5, 0.5625, 0.0)], "reach") == [0.5, 0.5]


def test_clients_count_alike_where_each_loses_or_had_nothing_to_win():
    sure = reaching(random_adapter(1), {one: [1.0] * 5 if one == "plain" else [0.1, 0, 0, 0, 1.0] for one in MEASURED})
    assert client_weights([sure, saying(2, 0.1, 0.9, -0.05)], "reach") == [0.5, 0.5]


def test_no_client_wins_more_than_all_that_was_left():
    weights = client_weights([saying(1, 0.999, 1.0, 0.25), saying(2, 0.5, 1.0, 0.25)], "reach")
    assert weights == pytest.approx([2 / 3, 1 / 3])


def test_a_client_that_loses_elsewhere_counts_nothing():
    clients = [saying(1, 0.5, 0.75, 0.25), saying(2, 0.5, 0.75, -0.0625)]
    assert client_weights(clients, "reach") == [1.0, 0.0]


def test_shares_by_reach_are_bounded_too():
    clients = [saying(1, 0.5, 0.75, 0.5), saying(2, 0.5, 0.75, -0.0625), saying(3, 0.5, 0.75, -0.0625)]
    assert client_weights(clients, "reach", max_share=0.5) == [0.5, 0.25, 0.25]


def test_where_clients_count_alike_the_largest_share_is_held_to_as_well():
    clients = [saying(1, 0.5, 0.75, -0.125), saying(2, 0.5, 0.75, 0.0)]
    for weights in ("reach", "uniform"):
        with pytest.raises(InputError, match=r"merge\.max_share 0\.4: 2 clients of at most that make no whole"):
            client_weights(clients, weights, max_share=0.4)


def test_a_client_that_does_not_say_its_reach_is_refused_by_name():
    silent = adapter_of(random_adapter(2).layers, "silent")
    with pytest.raises(InputError, match=r"merge\.weights reach: upload 'silent' has no manifest that says how far"):
        client_weights([saying(1, 0.5, 0.75, 0.25), silent], "reach")


def test_adapters_that_are_unlike_the_others_are_doubted():
    honest = [random_adapter(seed) for seed in range(3)]
    assert doubts_about(honest) == []
    first = honest[0].layers
    still = Adapter("still", {name: layer._replace(B=0 * layer.B) for name, layer in first.items()}, "0" * 64)
    huge = Adapter("huge", {name: layer._replace(scale=1e6) for name, layer in first.items()}, "1" * 64)
    zero, far = doubts_about([*honest, still, huge])
    assert "'still': its ΔW is zero" in zero and "'huge': its ΔW is" in far and "times as long as the median" in far
    missing = Adapter("partial", first, "2" * 64, doubts=["its config names 'fc9', of which it has no layer"])
    assert doubts_about([missing, *honest[1:]]) == [
        "upload 'partial': its config names 'fc9', of which it has no layer"
    ]
