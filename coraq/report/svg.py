"""matplotlib figures as SVG that lives inside a page: its colours are the page's, so that it is dark and light with it.

matplotlib is imported when the first figure is made, not with this module.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Placeholders that matplotlib takes for colours; each becomes the page's own.
WIDTH, BOTTOM = 5.4, 0.45  # inches
INK, LINE = "#010203", "#040506"
SERIES = tuple(f"#0a0b{index:02x}" for index in range(1, 9))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_PAGE = {INK: "currentColor", LINE: "var(--line)"} | {
    placeholder: f"var(--s{index})" for index, placeholder in enumerate(SERIES, 1)
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a layer may be called $x$
    "text.usetex": False,
    "font.size": 9.5,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.4,
}


def draw(
    name: str, paint: Callable[[Figure], None], height: float = 2.7, *, left: float = 0.62, top: float = 0.3
) -> str:
    """One SVG element, made of a figure of 5.4 × `height` inches that `paint` fills.

    Args:
        name: unique within the page; its ids start with it.
        left, top: margins in inches. Fixed ones: matplotlib's own layout draws every figure twice.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that its font lacks: the browser has its own fonts
        matplotlib.rcdefaults()
        parameters: Any = matplotlib.rcParams
        parameters.update({**_STYLE, "svg.hashsalt": name})
        figure = Figure(figsize=(WIDTH, height))
        figure.subplots_adjust(left / WIDTH, BOTTOM / height, 1 - 0.18 / WIDTH, 1 - top / height)
        paint(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return _for_the_page(text.getvalue(), name)


def printable(text: str) -> str:
    """Without what XML cannot hold."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def _for_the_page(svg: str, name: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns:xlink="[^"]*"', "", svg)
    svg = re.sub(r'xlink:href="#', f'href="#{name}-', svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    for placeholder, colour in _PAGE.items():
        svg = svg.replace(placeholder, colour)
    return svg.replace("<svg ", '<svg role="img" ', 1)
