"""Commands as a user types them, and what they say when they fail."""

from __future__ import annotations

import pytest

from coraq.cli.app import run


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int, *parts: str, hint: str = "") -> None:
    """A command ends with this exit code and two lines on stderr, an error with all `parts` in it and a hint."""
    capsys.readouterr()
    assert run(arguments) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert "Traceback" not in "\n".join(lines)
    assert lines[-2].startswith("error: "), lines
    assert lines[-1].startswith("hint: "), lines
    assert "this should not happen" not in lines[-1], lines
    for part in parts:
        assert part in lines[-2], lines
    assert hint in lines[-1], lines
