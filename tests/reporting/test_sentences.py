"""What a report says in words."""

from __future__ import annotations

from pathlib import Path

from reporting.samples import UNSEEN, add, swept

from sap_lightning.reporting.evidence import Client
from sap_lightning.reporting.sentences import anchor_sentences, summary
from sap_lightning.reporting.table import tabulate
from sap_lightning.results import Results


def test_the_best_merge_is_named_with_its_leads(tmp_path: Path) -> None:
    first, second, third = summary(tabulate(swept(tmp_path), UNSEEN))
    assert first == "sap ρ=0.8 is the most accurate model over the 2 unseen domains: 0.950 top-1 accuracy on average."
    assert second.startswith("It is 10.0 points ahead of the plain average (95 % interval +")
    assert "45.0 points ahead of zero-shot" in second
    assert "2 merges" in third


def test_a_merge_that_loses_is_said_to_lose(tmp_path: Path) -> None:
    results = Results(tmp_path)
    add(results, "zero-shot", {"photo": 20, "sketch": 18}, "zero-shot")
    add(results, "client photo", {"sketch": 20}, "client")
    add(results, "average", {"photo": 12, "sketch": 12})
    add(results, "sap", {"photo": 12, "sketch": 12})
    first, second, third = summary(tabulate(results, UNSEEN))
    assert first.startswith("zero-shot is the most accurate model"), "the client has not been measured everywhere"
    assert second == "No merge does better; of them sap comes nearest with 0.600."
    assert "level with the plain average as far as these images can tell, +0.0 points" in third
    assert "35.0 points behind zero-shot (95 % interval −" in third


def test_a_single_client_is_never_the_best_model_and_a_merge_called_like_one_may_be(tmp_path: Path) -> None:
    results = Results(tmp_path)
    add(results, "zero-shot", {"photo": 10}, "zero-shot")
    add(results, "client sketch", {"photo": 20}, "client")
    add(results, "client of all", {"photo": 15})
    first, *_ = summary(tabulate(results, ["photo"]))
    assert first == "client of all is the most accurate model on the unseen domain: 0.750 top-1 accuracy."


def test_clients_alone_make_no_summary(tmp_path: Path) -> None:
    results = Results(tmp_path)
    add(results, "client sketch", {"photo": 20}, "client")
    assert summary(tabulate(results, ["photo"])) == []


def test_a_poisoned_client_is_found_or_missed() -> None:
    honest = [Client(name, 1, 1, 0.5, 0.1, False, "") for name in "ab"]
    assert anchor_sentences(honest) == ["Of fewer than three clients none can be called the odd one."]
    found = anchor_sentences(
        [*honest, Client("c", 1, 1, 0.9, 0.5, True, "noise"), Client("d", 1, 1, 0.5, 0.1, False, "noise")]
    )
    assert found == [
        "The anchors single out c.",
        "Poisoned on purpose: c, d; found: 1 of 2.",
        "Honest clients singled out wrongly: none.",
    ]
