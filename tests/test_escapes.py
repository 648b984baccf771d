"""Names where they are shown."""

import html

import pytest

from sap_lightning.escapes import for_markdown, for_terminal

HOSTILE = ["a|b", "*a*", "`a`", "<script>", "[a](b)", "![a](b)", "&lt;", "~~a~~", "$a$", "_a_", "a\\", "client _b_ c"]


@pytest.mark.parametrize("name", HOSTILE)
def test_markdown_holds_no_mark_and_a_reader_sees_the_name(name):
    escaped = for_markdown(name)
    assert not set(escaped.replace("&#", "")) & set("|*`<>[]~$&\\")
    assert html.unescape(escaped) == name


@pytest.mark.parametrize("name", ["photo", "task_arithmetic", "sap ρ=0.9, rank=8", "lines (method ties)", "it's"])
def test_plain_names_stay_as_they_are(name):
    assert for_markdown(name) == for_terminal(name).plain == name


def test_what_is_not_printable_is_escaped_everywhere():
    assert for_terminal("a\nb\x1b[31m\u202e").plain == r"a\nb\x1b[31m\u202e"
    assert html.unescape(for_markdown("a\nb")) == r"a\nb"
