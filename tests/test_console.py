from __future__ import annotations

import rich

from sap_lightning.console import on_terminal, track


def test_somebody_watches_a_terminal_only_where_there_is_one(terminal):
    assert on_terminal()
    rich.reconfigure(force_terminal=False)
    assert not on_terminal()


def test_items_are_tracked_silently_without_a_terminal(capsys):
    items = ["a", "b"]
    assert list(track(items, "scoring")) == items
    assert capsys.readouterr().out == ""


def test_items_are_tracked_with_a_bar_on_a_terminal(terminal, capsys):
    assert list(track(["a", "b"], "scoring")) == ["a", "b"]
    assert "scoring" in capsys.readouterr().out
