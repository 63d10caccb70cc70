"""Tables as text and as Markdown."""

import pytest

from vit_scaling.names import render_table


def test_tables_are_padded_or_markdown() -> None:
    rows = [("a", 1, ""), ("bcd", (2, 3), "x|y")]
    assert render_table(("name", "n", "z"), rows) == "name  n       z\na     1\nbcd   (2, 3)  x|y"
    assert render_table(("name", "n", "z"), rows, markdown=True).splitlines() == [
        "| name | n | z |",
        "| --- | --- | --- |",
        "| a | 1 |  |",
        r"| bcd | (2, 3) | x\|y |",
    ]
    assert render_table(("only", "header"), []) == "only  header"
    numbers = [("a", "1,000", "12.5%"), ("b", "-2", "-")]
    assert render_table(("name", "n", "%"), numbers) == "name      n      %\na     1,000  12.5%\nb        -2      -"
    with pytest.raises(ValueError, match="argument"):
        render_table(("one",), [("a", "b")])
