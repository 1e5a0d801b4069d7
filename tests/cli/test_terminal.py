"""Tables on a terminal and in a pipe."""

import pytest

from baton.cli.terminal import counted, show_table


def test_a_table_is_aligned_and_never_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    show_table(
        ("model", "blocks", "state"), [("[bold]größe", 2048, "ready"), ("今日", 7, "suspect")]
    )
    assert capsys.readouterr().out.splitlines() == [
        "model        blocks  state",
        "[bold]größe    2048  ready",
        "今日              7  suspect",
    ]


def test_a_table_without_a_header_or_rows(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(("", ""), [("mode", "disagg"), ("prompt", "1 token")])
    show_table(("transfer", "state"), [])
    lines = ["mode    disagg", "prompt  1 token", "transfer  state"]
    assert capsys.readouterr().out.splitlines() == lines


def test_one_and_many() -> None:
    assert [counted(count, "block") for count in (0, 1, 2)] == ["0 blocks", "1 block", "2 blocks"]
