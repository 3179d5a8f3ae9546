"""A comparison runs what is missing, ranks at equal bytes only, and a failing cell is a row."""

from __future__ import annotations

import csv
import json
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import BaseModel, ValidationError
from support.results import cell_result, compare_result, comparison

from coraq import pipeline
from coraq.artifact import Predictions, read_result, write_predictions
from coraq.cli.app import run
from coraq.cli.commandline import command_line
from coraq.cli.display_compare import show_comparison
from coraq.compare import expand, parse_variants
from coraq.compare.ranking import groups_of, reference_bytes
from coraq.config import DataConfig, LayerScheme, RunConfig, Scheme
from coraq.errors import UsageError
from coraq.evaluate.intervals import mcnemar_p

SMALL = ["--calib-size", "16", "--eval-size", "48"]

FAULTY = """
from coraq.api import MethodConfig, QuantizedLayer, minmax_grid

class Faulty:
    name, summary, version, needs_data = "faulty", "breaks in the middle", "1", False
    scope = "layer"
    Config = MethodConfig
    def __init__(self, config):
        pass
    def quantize(self, task):
        raise ZeroDivisionError("on purpose")

METHODS = [Faulty]
"""


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, no plugins from outside."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CORAQ_PLUGINS", "")
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def compared(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = run(["compare", *arguments, "--json", "-q"])
    return code, json.loads(capsys.readouterr().out)


# ---------------------------------------------------------------- whole comparisons


def test_a_comparison_in_an_empty_folder_ends_in_a_table_and_files(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compare", "--methods", "rtn,comq", *SMALL, "-q"]) == 0
    out = capsys.readouterr().out
    assert "demo at 4 bits" in out
    assert "McNemar p" in out
    assert max(map(len, out.splitlines()[:9])) <= 80
    (folder,) = (empty / "runs").glob("compare-*")
    assert str(folder.relative_to(empty)) in out
    assert sorted(path.name for path in folder.iterdir()) == [
        "compare.csv",
        "compare.json",
        "report.html",
        "report.md",
    ]
    with (folder / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["rtn", "comq"]
    for row in rows:
        assert float(row["top1_pct"]) == read_result(Path(row["run_dir"])).comparison.quantized_top1.value_pct  # type: ignore[union-attr]
    assert "| # | method | top-1 % |" in (folder / "report.md").read_text()


def test_finished_cells_are_reused_and_are_those_of_single_runs(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["quantize", "demo", "--method", "rtn", *SMALL, "-q"]) == 0
    code, first = compared(capsys, "demo", "--methods", "rtn,rtn:clip=minmax", *SMALL)
    assert code == 0
    assert [cell["reused"] for cell in first["cells"]] == [True, False]
    before = {path: path.read_bytes() for path in (empty / "runs").glob("demo-*/*.json")}
    for cell in first["cells"]:  # each cell's own command finds the same folder, finished
        assert run([*cell["command"][1:], "--json", "-q"]) == 0
        assert json.loads(capsys.readouterr().out)["run_dir"] == cell["run_dir"]
    _, again = compared(capsys, "demo", "--methods", "rtn,rtn:clip=minmax", *SMALL)
    assert [cell["reused"] for cell in again["cells"]] == [True, True]
    assert again["folder"] == first["folder"]
    assert {path: path.read_bytes() for path in (empty / "runs").glob("demo-*/*.json")} == before


def test_without_a_model_the_newest_run_says_what_to_compare(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scheme = ["--bits", "3", "--first-bits", "same", "--override", "conv_stem=5"]
    assert run(["quantize", "demo", "--method", "rtn", *scheme, *SMALL, "--seed", "3", "-q"]) == 0
    newest = read_result(next((empty / "runs").glob("demo-*"))).config
    code, result = compared(capsys, "--methods", "rtn,rtn:clip=minmax", "--eval-size", "32")
    assert code == 0
    configs = [read_result(Path(cell["run_dir"])).config for cell in result["cells"]]
    assert configs[0] == newest.model_copy(update={"data": newest.data.model_copy(update={"eval_size": 32})})
    assert configs[1].options == {"clip": "minmax"}
    assert [config.scheme.weights.bits for config in configs] == [3, 3]


def test_a_flag_may_need_what_only_the_newest_run_has(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", "demo", "--method", "rtn", "--act-bits", "4", *SMALL, "-q"]) == 0
    code, result = compared(capsys, "--methods", "rtn", "--override", ".*conv_dw=4/8", "--column-scale", "input")
    assert code == 0
    scheme = read_result(Path(result["cells"][0]["run_dir"])).config.scheme
    assert (scheme.act_bits, scheme.weights.column_scale) == (4, "input")
    assert scheme.overrides == {".*conv_dw": LayerScheme(bits=4, act_bits=8)}


def test_a_failing_cell_is_a_row_and_the_others_go_on(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (empty / "methods").mkdir()
    (empty / "methods" / "faulty.py").write_text(FAULTY)
    given = ["--plugins-dir", "methods", "--methods", "faulty,rtn", *SMALL]
    code, result = compared(capsys, *given)
    assert code == 1
    faulty, rtn = result["cells"]
    assert faulty["reason"].startswith(f"method faulty ({empty / 'methods' / 'faulty.py'}) failed: ZeroDivisionError")
    assert "Traceback" in Path(faulty["hint"].split(" is in ")[1]).read_text()
    assert rtn["reason"] is None
    assert [method["label"] for method in result["groups"][0]["methods"]] == ["rtn", "faulty"]
    assert run(["compare", *given, "-q"]) == 1
    captured = capsys.readouterr()
    assert "failed: demo faulty W4 seed 0: method faulty" in captured.out
    assert captured.err.startswith("error: 1 of 2 cells failed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "rtn,nope"], "unknown method 'nope'"),
        (["--methods", "rtn:clip=banana"], "option clip of rtn"),
        (["--methods", "rtn:clip"], "'clip' is not KEY=VALUE"),
        (["--methods", "rtn,rtn"], "given twice"),
        (["--bits", "4,9"], "--bits '9'"),
        (["--bits", "4,4"], "--bits names 4 twice"),
        (["--seeds", "x"], "--seeds 'x'"),
        (["--ray-address", "auto"], "without --engine ray"),
        (["--cell-cpus", "2"], "without --engine ray"),
        (["--calib-size", "0"], "--calib-size"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_runs(
    empty: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(["compare", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (empty / "runs").exists()


def test_an_interrupt_leaves_finished_cells_usable(
    empty: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = pipeline.run

    def interrupted(config: RunConfig, **more: Any) -> Any:
        if config.options:
            raise KeyboardInterrupt
        return plain(config, **more)

    given = ["--methods", "rtn,rtn:clip=minmax", *SMALL]
    monkeypatch.setattr(pipeline, "run", interrupted)
    assert run(["compare", *given, "-q"]) == 130
    assert "finished cells are kept" in capsys.readouterr().err
    monkeypatch.setattr(pipeline, "run", plain)
    _, result = compared(capsys, *given)
    assert [cell["reused"] for cell in result["cells"]] == [True, False]


def test_a_comparisons_report_is_rendered_again_from_its_json(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, result = compared(capsys, "--methods", "rtn", *SMALL)
    page = Path(result["folder"]) / "report.html"
    before = page.read_text()
    page.write_text("scribble")
    assert run(["report", Path(result["folder"]).name, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["report"] == str(page)
    assert answer["result"]["cells"] == result["cells"]
    assert page.read_text() == before


# ---------------------------------------------------------------- ranking


def test_methods_are_ranked_at_equal_bytes_and_others_are_marked() -> None:
    cells = [
        cell_result("large", 0, 90.0, 1100),
        cell_result("a", 0, 70.0, 1000),
        cell_result("b", 0, 72.0, 1009),
        cell_result("a", 1, 76.0, 1000),
        cell_result("b", 1, 72.5, 1009),
        cell_result("broken", 0, 0.0, 1000, reason="no"),
    ]
    (group,) = groups_of(cells)
    assert [(method.label, method.rank) for method in group.methods] == [
        ("large", None),
        ("a", 1),
        ("b", 2),
        ("broken", None),
    ]
    large, a, b, broken = group.methods
    assert large.bytes_difference_pct == pytest.approx(10)
    assert not large.equal_bytes
    assert b.equal_bytes
    assert a.top1_pct is not None
    assert (a.top1_pct.mean, a.top1_pct.low, a.top1_pct.high) == (73, 70, 76)
    assert a.top1_pct.deviation == pytest.approx(18**0.5)
    assert large.top1_pct is not None
    assert large.top1_pct.deviation is None
    assert broken.failed == 1


def test_the_reference_size_is_the_one_that_most_share() -> None:
    assert reference_bytes([1100, 1000, 1005, 900]) == 1000
    assert reference_bytes([1100, 1000]) == 1100
    assert reference_bytes([]) is None


def test_without_labels_fidelity_ranks() -> None:
    near, far = comparison(labelled=False), comparison(labelled=False).model_copy(update={"kl_nats": 1.0})
    cells = [
        cell_result("far", 0, 0, 1000, comparison=far, labelled=False),
        cell_result("near", 0, 0, 1000, comparison=near, labelled=False),
    ]
    (group,) = groups_of(cells)
    assert group.measure == "kl_nats"
    assert [method.label for method in group.methods] == ["near", "far"]


def test_pairs_are_counted_image_by_image_and_every_seed_must_agree(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (200,), generator=generator)
    kept = {}
    for label, seed in (("a", 0), ("b", 0), ("a", 1), ("b", 1), ("old", 0), ("other", 0)):
        folder = tmp_path / f"{label}{seed}"
        folder.mkdir()
        choice = torch.randint(0, 3, (200,), generator=generator)
        if label == "a" and seed == 0:
            choice[:120] = labels[:120]
        kept[label, seed] = choice
        if label != "old":
            write_predictions(folder, Predictions(labels, choice, labels, "other" if label == "other" else "same"))
    cells = [cell_result(label, seed, 50.0, 1000, tmp_path / f"{label}{seed}") for label, seed in kept]
    pairs = {(pair.first, pair.second): pair for pair in groups_of(cells)[0].pairs}
    counted = []
    for seed in (0, 1):
        one, two = (kept[label, seed] == labels for label in ("a", "b"))
        counted.append((sum(int(x and not y) for x, y in zip(one, two, strict=True)), int((two & ~one).sum())))
    ab = pairs["a", "b"]
    assert [(seed.only_first, seed.only_second) for seed in ab.seeds] == counted
    assert ab.p_value == max(mcnemar_p(*counts) for counts in counted)
    assert ab.difference_points == pytest.approx(sum(x - y for x, y in counted) / 400 * 100)
    assert "kept no predictions" in (pairs["a", "old"].reason or "")
    assert "other images" in (pairs["a", "other"].reason or "")
    assert pairs["a", "old"].p_value is None


@pytest.mark.parametrize(("count", "lines"), [(4, 6), (6, 5)])
def test_of_many_methods_the_best_is_compared_with_each_other(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, count: int, lines: int
) -> None:
    monkeypatch.setenv("COLUMNS", "66")  # memory and time make room for the options
    labels = ["cora:budget=0.05:spend=ranks", "brecq:precision=bfloat16", *"abcdef"][:count]
    result = compare_result(groups=groups_of([cell_result(label, 0, 70.0 + i, 1000) for i, label in enumerate(labels)]))
    show_comparison(result, Path("report.html"))
    out = capsys.readouterr().out
    pairs = [line for line in out.splitlines() if " against " in line]
    assert len(pairs) == lines
    best = labels[-1]
    assert all(f"{best} " in line or f" {best}:" in line for line in pairs) == (count > 4)
    assert (f"the other {count * (count - 1) // 2 - lines} pairs are in the report" in out) == (count > 4)
    # options stand whole, one below the other
    assert [line.split()[0] for line in out.splitlines() if line.startswith("       ") and line.strip()] == [
        "precision=bfloat16",
        "budget=0.05",
        "spend=ranks",
    ]
    assert "memory" not in out


# ---------------------------------------------------------------- the grid and its command lines


def test_the_grid_holds_every_combination_next_to_what_it_shares() -> None:
    variants = parse_variants('rtn,comq:sweeps=2:preset="paper"', json.loads)
    assert variants[1].options == {"sweeps": 2, "preset": "paper"}
    cells = expand(RunConfig(model="x"), ["m", "n"], variants, [4, 2], [0, 1])
    assert len({c.config.digest() for c in cells}) == len(cells) == 16
    changes = [(a.config.model, a.config.seed) != (b.config.model, b.config.seed) for a, b in pairwise(cells)]
    assert sum(changes) == 3
    with pytest.raises(UsageError):
        parse_variants("", json.loads)


CONFIGS = [
    RunConfig(model="demo"),
    RunConfig(
        model="local-dir:a b",
        checkpoint="w.safetensors",
        num_classes=7,
        model_kwargs={"act": "relu", "n": 3, "deep": {"a": [1, 2]}},
        method="rtn",
        options={"clip": "mse", "text": "3"},
        scheme=Scheme.of(
            bits=3,
            first_bits=None,
            last_bits=5,
            granularity="tensor",
            symmetric=True,
            bias_correction="off",
            act_bits=6,
            overrides={r"layer1\..*=x": LayerScheme(bits=2)},
        ),
        data=DataConfig(
            data_dir="imagenet",
            dataset="torch/x",
            split="val",
            calib_dir="c",
            calib_split="t",
            calib_size=3,
            calib_rows_per_input=0,
            eval_size=4,
            class_map="m.txt",
            batch_size=5,
            workers=0,
            img_size=64,
            crop_pct=0.9,
            mean=(0.5, 0.25, 1e-3),
            std=(0.25, 0.5, 1.0),
            interpolation="bicubic",
            strict=True,
        ),
        seed=9,
        device="cuda:1",
        calib_memory=123456789,
        float_dtype="float16",
        coding="ans",
        size=123456,
    ),
    RunConfig(  # what the second cannot have: it is symmetric, and all of its activations are quantized
        model="demo",
        scheme=Scheme.of(
            zero_point_fraction=2, act_bits=4, act_allocation="bitops", overrides={"a": LayerScheme(bits=5, act_bits=8)}
        ),
    ),
]


@pytest.mark.parametrize("config", CONFIGS, ids=["defaults", "everything", "finer"])
def test_a_cells_command_line_means_its_configuration(
    config: RunConfig, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if config is CONFIGS[1]:  # fields that have come since, with whatever else they allow
        config = _with_others(RunConfig, config, RunConfig(model="demo", scheme=Scheme.of(act_bits=6)))
    seen: list[RunConfig] = []

    def fake(config: RunConfig, **more: Any) -> Any:
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", fake)
    assert run([*command_line(config, Path("elsewhere"))[1:], "-q"]) == 130
    assert seen == [config]


def _with_others(model: type[Any], full: Any, plain: Any) -> Any:
    """`full` with every field that still has its default set to another value that its type allows."""
    content = full.model_dump()
    for name, field in model.model_fields.items():
        value, default = getattr(full, name), getattr(plain, name)
        if isinstance(value, BaseModel):
            content[name] = _with_others(type(value), value, default)
        elif value == default and name not in ("version", "zero_point_fraction", "allocation", "ratio", "budget_bits"):
            for other in (not default, 3, 0.5, 99.0, "x", *get_args(field.annotation)):
                try:
                    changed = model.model_validate({**content, name: other})
                except ValidationError:
                    continue
                if getattr(changed, name) != default:
                    content[name] = other
                    break
            else:
                raise AssertionError(f"no other value is known for {name}: add one to CONFIGS")
    return model.model_validate(content)
