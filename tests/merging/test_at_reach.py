"""Any method's merge, as long as the clients reach."""

from __future__ import annotations

import pytest
from adapters import assert_same, reaching, unlike_adapters

from sap_lightning.errors import InputError
from sap_lightning.functional.lora import dense
from sap_lightning.merging import SAP, TIES, AtReach, Average, TaskArithmetic
from sap_lightning.merging.reach import reach_of

WEIGHTS = [0.5, 0.3, 0.2]


def clients():
    return [reaching(one) for one in unlike_adapters()]


@pytest.mark.parametrize("inner", [Average(), TIES(0.5)], ids=lambda method: method.name)
def test_it_is_the_other_method_s_merge_as_long_as_what_the_clients_say_asks_for(inner):
    plain = {name: dense(update).double() for name, update in inner.merge(clients(), WEIGHTS).items()}
    reach = reach_of(clients(), WEIGHTS)
    size = sum(float(update.square().sum()) for update in plain.values()) ** 0.5
    merged = AtReach(inner).merge(clients(), WEIGHTS)
    assert_same(merged, {name: reach.length / size * update for name, update in plain.items()})


def test_the_other_method_s_own_length_does_not_matter():
    one, other = (AtReach(TaskArithmetic(scale)).merge(clients(), WEIGHTS) for scale in (0.1, 3.0))
    assert_same(one, other)


def test_where_nothing_carries_over_the_merge_is_the_base_and_the_log_says_so(caplog):
    still = [reaching(one, [0.5, 0.4, 0.4, 0.4, 0.4]) for one in unlike_adapters()]
    with caplog.at_level("WARNING"):
        merged = AtReach().merge(still)
    assert "nothing that the clients learned carries over" in caplog.text
    assert set(merged) == {"fc1", "q"} and all(not dense(update).any() for update in merged.values())


def test_it_says_what_the_clients_said():
    prepared = AtReach().prepare(clients(), WEIGHTS)
    assert prepared.findings["transfers"] is False and prepared.findings["carried_over"][0.5] == pytest.approx(0.2)


def test_clients_that_do_not_say_how_far_they_reach_are_refused():
    with pytest.raises(InputError, match=r"merge\.method at_reach: not every upload's manifest says how far"):
        AtReach().merge([*clients()[:2], unlike_adapters()[2]])


def test_it_looks_at_anchors_if_the_other_method_does():
    assert AtReach(SAP()).needs_anchors and not AtReach("ties").needs_anchors
    assert AtReach("krum").least_clients == AtReach("krum").inner.least_clients
