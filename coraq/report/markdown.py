"""Markdown's few elements, with hostile text kept in its cell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right_from: int | None = None) -> str:
    """A table; columns from `right_from` on are aligned right."""
    rules = ["---:" if right_from is not None and index >= right_from else "---" for index in range(len(header))]
    lines = [header, rules, *rows]
    return "\n".join("| " + " | ".join(cell(part) for part in line) + " |" for line in lines)


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"- {label}: {text}" for label, text in pairs)


def fenced(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"
