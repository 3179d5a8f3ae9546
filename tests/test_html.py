"""The HTML reports: everything is in the one file, whatever names hold; seen by a real browser where there is one."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from support.results import HOSTILE_NAME, compare_result, run_result, unmeasured

from coraq.api import minmax_grid
from coraq.artifact import read_histograms, weight_histogram, write_histograms
from coraq.core.tensors import LowRank, QTensor, QuantizedLayer
from coraq.report.html import compare_html, logged_metrics, run_html
from coraq.results import LayerResult, RunResult, WeightHistogram


def histogram(name: str = "layer0.conv", bits: int = 4) -> WeightHistogram:
    weight = torch.randn(1, 16, 72, generator=torch.Generator().manual_seed(0))
    grid = minmax_grid(weight, bits, symmetric=False)
    return weight_histogram(name, weight, QuantizedLayer(grid.pack(grid.codes(weight))))


def large_result() -> RunResult:
    """As many layers and as long texts as a real network has; ranks, and a hostile name."""
    layers = [
        LayerResult(
            name=HOSTILE_NAME if index == 5 else f"stages.{index // 12}.blocks.{index % 12}.token_mixer.conv_{index}",
            kind="depthwise" if index % 3 else "convolution",
            shape=(512, 256, 3, 3),
            bits=2 + index % 7,
            rank=index % 5 * 4,
            bytes=1_234_567 + index,
            macs=1_152_000,
            weight_sqnr_db=20 + 10 * math.sin(index),
            input_error=0.01 * index,
            output_error=0.02 * index,
            metrics={"error": 1e-5, "rtn_error": 1e-3, "sweeps": 3},
        )
        for index in range(96)
    ]
    return run_result(
        layers=layers, notes=[HOSTILE_NAME, "a note"], command=["coraq", "quantize", HOSTILE_NAME, "--bits", "3"]
    )


def curves() -> dict[str, list[tuple[int, float]]]:
    return {f"{name} loss": [(step, 1 / (1 + step)) for step in range(60)] for name in ("a", HOSTILE_NAME, "blocks.3")}


def run_page() -> str:
    return run_html(large_result(), [histogram(f"layer{i}") for i in range(3)] + [histogram(HOSTILE_NAME)], curves())


def pages() -> dict[str, str]:
    return {
        "run": run_page(),
        "unmeasured": run_html(unmeasured()),
        "bare": run_html(run_result(layers=[], notes=[], stages={}, comparison=None, evaluation_data=None)),
        "compare": compare_html(compare_result()),
        "failed": compare_html(compare_result(cells=[], groups=[])),
    }


# ---------------------------------------------------------------- the text


def test_nothing_comes_from_elsewhere_and_nothing_escapes() -> None:
    for name, page in pages().items():
        for address in re.findall(r'(?:src|href|action|data)\s*=\s*["\']?([^"\'\s>]*)', page):
            assert address.startswith(("#", "data:")), (name, address)
        assert "@import" not in page
        assert not re.findall(r"url\((?!#)", page), name
        assert page.count("<script>") == 1, name  # ours
        assert "<script>alert" not in page
        assert "None" not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL), name


def test_every_svg_is_well_formed_and_takes_the_pages_colours() -> None:
    for page in (run_page(), compare_html(compare_result())):
        drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
        assert len(drawings) >= 4
        ids = [found for one in drawings for found in re.findall(r'\bid="([^"]*)"', one)]
        assert len(ids) == len(set(ids))
        for one in drawings:
            ElementTree.fromstring(one)
            colours = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", one))
            assert colours == set(), colours  # all are variables: dark and light with the page
            used = set(re.findall(r'(?:href="|url\()#([^")]*)', one))
            assert used <= set(ids)
        assert "$\\mathdefault" not in page


def test_the_report_holds_what_the_result_holds() -> None:
    result = run_result()
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", run_html(result, [histogram()], curves())))
    for layer in result.layers:
        assert layer.name in text
    for part in (
        "70.00 % [67.50, 72.25]",
        "McNemar p = 0.148",
        "SQNR 21.5 dB",
        "BitOps",
        "Testor 9000",
        "torch 2.15.0",
    ):
        assert part in text, part
    for title in ("Signal over noise", "Bits", "Weights on the grid", "Logged by the method", "Where the time went"):
        assert title in text, title
    assert "this run kept none" in run_html(result)


def test_the_same_result_renders_to_the_same_bytes() -> None:
    assert run_page() == run_page()


def test_a_failed_cell_stands_in_the_comparison_with_its_reason() -> None:
    page = compare_html(compare_result())
    assert "it failed: &lt;script&gt;" in page
    assert "try again" in page


# ---------------------------------------------------------------- what is plotted


def test_a_histogram_counts_every_weight_and_every_code(tmp_path: Path) -> None:
    one = histogram(bits=3)
    assert sum(one.weights) == sum(one.codes) == 16 * 72
    assert one.levels == list(range(8))
    write_histograms(tmp_path, [one])
    assert read_histograms(tmp_path) == [one]
    (tmp_path / "histograms.json").write_text("[{}]")
    assert read_histograms(tmp_path) == []


def test_a_histogram_shows_where_weights_lie_on_the_grid() -> None:
    # a symmetric grid with scale 0.5: weight 0.5 lies one step above the middle code 8; 100 is beyond the end
    weight = torch.tensor([[[0.5, -0.5, 0.0, 100.0]]])
    codes = torch.tensor([[[9, 7, 8, 15]]], dtype=torch.uint8)
    scale = torch.full((1, 1, 1), 0.5)
    one = weight_histogram("x", weight, QuantizedLayer(QTensor(codes, scale, 4)))
    width = (one.high - one.low) / len(one.weights)
    places = [one.low + (index + 0.5) * width for index, count in enumerate(one.weights) if count]
    assert places[:3] == pytest.approx([7, 8, 9], abs=width)
    assert one.weights[-1] == 1
    assert [index for index, count in enumerate(one.codes) if count] == [7, 8, 9, 15]
    # with an adapter that carries the weight, what is on the grid is the rest: nothing
    row = QTensor(torch.ones(1, 1, 4, dtype=torch.uint8) * 3, torch.ones(1, 1, 1), 2)
    column = QTensor(torch.ones(1, 1, 1, dtype=torch.uint8) * 3, torch.ones(1, 1, 1), 2)
    carried = QuantizedLayer(QTensor(codes, scale, 4), LowRank(column, row))
    rest = weight_histogram("x", torch.ones(1, 1, 4), carried)
    assert max(rest.weights) == 4
    # levels of a codebook stand where the codebook puts them
    uneven = QTensor(torch.tensor([[[0, 1, 2, 3]]], dtype=torch.uint8), scale, 2, None, torch.tensor([-2.0, -1, 0, 4]))
    assert weight_histogram("x", weight, QuantizedLayer(uneven)).levels == [-2, -1, 0, 4]


def test_logged_metrics_are_read_from_the_events_and_lift_the_pen_between_layers(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    event = '{"event": "Metric", "name": "loss", "value": 0.5, "step": %d}'
    lines = [event % step for step in (0, 1, 0, 1)]
    file.write_text("\n".join([*lines, '{"event": "Metric", "name"', '{"event": "Note", "message": "Metric"}']))
    (points,) = logged_metrics(file).values()
    assert [step for step, _ in points] == [0, 1, 0, 0, 1]
    assert math.isnan(points[2][1])
    assert logged_metrics(tmp_path / "absent") == {}
    # a resumed attempt adds to the curves, one that starts afresh replaces them
    began = '{"event": "StageStarted", "stage": "quantize"}'
    done = '{"event": "LayerCommitted", "resumed": %s}'
    file.write_text("\n".join([began, *lines, began, done % "true", done % "false", event % 7]))
    assert [step for step, _ in logged_metrics(file)["loss"]] == [0, 1, 0, 0, 1, 7]
    file.write_text("\n".join([began, *lines, began, done % "false", event % 7]))
    assert [step for step, _ in logged_metrics(file)["loss"]] == [7]


# ---------------------------------------------------------------- a real browser

OVERLAPS = """
() => {
  const clip = (rect, node) => {            // what scrolling containers let one see of it
    let box = {left: rect.left, right: rect.right, top: rect.top, bottom: rect.bottom};
    for (let at = node; at && at !== document.body; at = at.parentElement) {
      if (getComputedStyle(at).overflowX !== 'visible' && !(at instanceof SVGElement)) {
        const own = at.getBoundingClientRect();
        box = {left: Math.max(box.left, own.left), right: Math.min(box.right, own.right),
               top: Math.max(box.top, own.top), bottom: Math.min(box.bottom, own.bottom)};
      }
    }
    return box;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    if (!node.textContent.trim() || parent.closest('script, style')) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const rects = parent instanceof SVGElement ? [parent.getBoundingClientRect()] : [...range.getClientRects()];
    for (const rect of rects) {
      const box = clip(rect, parent);
      if (box.right - box.left > 1 && box.bottom - box.top > 1)
        found.push({box, node, text: node.textContent.trim().slice(0, 40)});
    }
  }
  const bad = [];
  for (let i = 0; i < found.length; i++)
    for (let j = i + 1; j < found.length; j++) {
      const a = found[i], b = found[j];
      if (a.node === b.node) continue;
      const wide = Math.min(a.box.right, b.box.right) - Math.max(a.box.left, b.box.left);
      const high = Math.min(a.box.bottom, b.box.bottom) - Math.max(a.box.top, b.box.top);
      if (wide > 2 && high > 4) bad.push([a.text, b.text, Math.round(wide), Math.round(high)]);
    }
  return {bad, texts: found.length, overflow: document.documentElement.scrollWidth - innerWidth};
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=program, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield launched
        launched.close()


def looked_at(browser: Any, file: Path, width: int, scheme: str) -> dict[str, Any]:
    """What a browser has to say of a page with everything opened: requests, complaints, overlaps, overflow."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    requests: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    seen: dict[str, Any] = page.evaluate(OVERLAPS)
    page.close()
    others = [url for url in requests if not url.startswith("data:") and url != file.as_uri()]
    return {**seen, "requests": others, "complaints": complaints}


@pytest.mark.parametrize("name", ["run", "unmeasured", "compare"])
def test_a_browser_finds_no_request_no_error_and_no_overlapping_text(browser: Any, tmp_path: Path, name: str) -> None:
    file = tmp_path / "report.html"
    file.write_text(pages()[name], encoding="utf-8")
    for width, scheme in ((360, "light"), (800, "dark"), (1400, "light")):
        seen = looked_at(browser, file, width, scheme)
        assert seen["requests"] == seen["complaints"] == []
        assert seen["texts"] > 50
        assert seen["bad"] == [], f"at {width} px"
        assert seen["overflow"] <= 0, f"the page is wider than {width} px"


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("<script>document.querySelectorAll('svg text').forEach((t) => t.setAttribute('y', 9));</script>", "bad"),
        ("<style>h2 { margin-bottom: -3rem !important; }</style>", "bad"),
        ("<div style='width: 500px'>wide</div>", "overflow"),
        ("<img src='file:///elsewhere.png'>", "requests"),
        ("<script>nowhere();</script>", "complaints"),
    ],
)
def test_the_browser_s_checks_can_fail(browser: Any, tmp_path: Path, fault: str, found: str) -> None:
    file = tmp_path / "report.html"
    file.write_text(run_page().replace("</body>", f"{fault}</body>"), encoding="utf-8")
    assert looked_at(browser, file, 360, "light")[found]


def test_a_browser_sorts_layers_and_turns_dark(browser: Any, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(run_page(), encoding="utf-8")
    page = browser.new_page(color_scheme="dark")
    page.goto(file.as_uri())
    column = "[...document.querySelectorAll('table.sortable tbody tr')].map((row) => +row.cells[4].dataset.key)"
    for expected in (sorted, lambda values: sorted(values, reverse=True)):
        page.click("table.sortable th button:text-is('bits')")
        values = page.evaluate(column)
        assert values == expected(values)
    colours = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('svg text')).fill]"
    )
    paper, ink = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert paper < 100 < 500 < ink
    page.close()
