"""Which clients are left out of a merge, on adapters of which one spoils the tower."""

from __future__ import annotations

import logging
from dataclasses import replace

import probes
import pytest
from adapters import adapter_of
from probes import exact_features, images, random_adapter

from sap_lightning.errors import InputError
from sap_lightning.functional.outliers import LEAST_VALUES
from sap_lightning.io.adapter import Adapter
from sap_lightning.merging.selection import (
    check_rejection,
    doubts_on_anchors,
    losses_alone,
    standings,
    without_outliers,
)
from sap_lightning.models.probe import AnchorProbe


def probe() -> AnchorProbe:
    """Anchors whose images the base finds the captions of."""
    return probes.probe(captions=exact_features({}, images(8)).float())


def small(seed: int) -> Adapter:
    """A client that hardly moves the base."""
    one = random_adapter(seed)
    return adapter_of({name: layer._replace(scale=0.01 * layer.scale) for name, layer in one.layers.items()}, one.name)


def broken(seed: int) -> Adapter:
    """A client with which no feature is a finite number."""
    one = random_adapter(seed)
    return adapter_of({name: layer._replace(B=1e30 * layer.B) for name, layer in one.layers.items()}, f"broken {seed}")


def clients() -> list[Adapter]:
    """Four that agree, and a large one between them."""
    return [small(1), small(2), random_adapter(9), small(3), small(4)]


def test_the_client_that_stands_out_is_left_out_and_said(caplog):
    caplog.set_level(logging.WARNING, logger="sap_lightning")
    margins = [one.margin for one in standings(clients(), probe())]
    adapters, rejected = without_outliers(clients(), probe())
    assert [one.name for one in adapters] == ["client 1", "client 2", "client 3", "client 4"]
    assert rejected == ["client 9"]
    (said,) = [record.getMessage() for record in caplog.records]
    typical = sorted(margins)[2]
    assert said == (
        f"client 9 left out: it stands out on the anchors, caption margin {margins[2]:.3f} where {typical:.3f} is the"
        " clients' median"
    )


def test_a_margin_is_the_distance_of_the_own_caption_from_the_mean_of_the_others():
    (one,) = standings([random_adapter(9)], probe())
    found, captions = exact_features(random_adapter(9).layers, images(8)), exact_features({}, images(8))
    cosines = [[float(image @ caption) for caption in captions] for image in found]
    margins = [row[i] - (sum(row) - row[i]) / 7 for i, row in enumerate(cosines)]
    assert one.margin == pytest.approx(sum(margins) / 8, abs=1e-6) and not one.stands_out


def test_the_client_that_stands_out_is_doubted_with_the_way_to_leave_it_out():
    (doubt,) = doubts_on_anchors(clients(), probe())
    assert doubt.startswith("upload 'client 9': it stands out on the anchors, caption margin ")
    assert doubt.endswith("--merge.reject_outliers true leaves it out")
    assert doubts_on_anchors([small(seed) for seed in range(1, 5)], probe()) == []


def test_the_given_clients_stay_as_they_were():
    given = clients()
    before = list(given)
    adapters, _ = without_outliers(given, probe())
    assert all(one is other for one, other in zip(given, before, strict=True)) and len(adapters) == 4
    assert all(any(one is other for other in before) for one in adapters)


def test_clients_none_of_which_stands_out_are_all_merged(caplog):
    alike = [small(seed) for seed in (1, 2)]
    for adapters in (alike, alike * 3, [small(1), random_adapter(9)], alike[:1]):
        selection = without_outliers(adapters, probe())
        assert list(selection.adapters) == adapters and selection.rejected == []
    assert not caplog.records


def test_a_client_whose_loss_is_no_number_is_left_out():
    adapters, rejected = without_outliers([broken(1), small(2)], probe())
    assert [one.name for one in adapters] == ["client 2"] and rejected == ["broken 1"]


def test_clients_that_are_all_broken_are_refused():
    with pytest.raises(InputError, match="no upload gives finite features"):
        without_outliers([broken(1), broken(2)], probe())


def test_a_loss_alone_is_that_of_the_adapter_and_asked_once():
    anchors = probe()
    expected = [probe().loss(one.layers) for one in clients()]
    assert losses_alone(clients(), anchors) == pytest.approx(expected, abs=1e-6)
    blind = replace(anchors, batches=unreadable)
    assert losses_alone(clients()[::-1], blind) == pytest.approx(expected[::-1], abs=1e-6)
    with pytest.raises(OSError, match="unreadable"):
        losses_alone([small(5)], blind)


def unreadable():
    raise OSError("unreadable image")


def test_halves_of_the_anchors_find_losses_of_their_own():
    whole: AnchorProbe = probe()
    one, other = whole.halves()
    found = [losses_alone([random_adapter(1)], anchors) for anchors in (whole, one, other)]
    assert (found[1][0] + found[2][0]) / 2 == pytest.approx(found[0][0], rel=1e-6)
    assert found[1] != found[2]


def test_so_few_clients_that_none_can_stand_out_are_refused():
    check_rejection(LEAST_VALUES)
    with pytest.raises(InputError, match=r"merge\.reject_outliers needs at least 3 clients in a merge, here are 2"):
        check_rejection(LEAST_VALUES - 1)
