"""Claims about documents: methods shown in them conform, and are ranked against the built-in ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from coraq import registry
from coraq.config import Scheme
from coraq.testing import assert_conforms

CHECKOUT = Path(__file__).resolve().parents[1]
SHOWN = {"plugins/README.md": "Shrunk"}


def shown_method(document: str, name: str) -> Any:
    """The class of that name in the first block of Python of a document that holds it."""
    blocks = re.findall(r"```python\n(.*?)```", (CHECKOUT / document).read_text(), re.DOTALL)
    (source,) = [block for block in blocks if f"class {name}" in block]
    space: dict[str, Any] = {"__name__": "shown"}
    exec(compile(source, document, "exec"), space)
    return space[name]


@pytest.mark.parametrize(("document", "name"), SHOWN.items())
def test_a_method_that_a_document_shows_conforms(document: str, name: str) -> None:
    assert_conforms(shown_method(document, name), bits=(2, 8))


@pytest.mark.parametrize(("document", "name"), SHOWN.items())
def test_a_method_that_a_document_shows_has_the_grids_of_the_built_in_ones(document: str, name: str) -> None:
    """With the same column scales, and so the same bytes: a comparison ranks them."""
    shown, comq = shown_method(document, name), registry.load("comq")
    schemes = [registry.resolve_auto(Scheme(), method, method.Config()) for method in (shown, comq)]
    assert schemes[0] == schemes[1]
    assert schemes[0].weights.column_scale == "channel"
