"""The report says everything that the result holds, and what it writes is whole or absent."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest
from support.results import run_result, unmeasured

from coraq.errors import CoraqError
from coraq.report import markdown, summary, write_report
from coraq.results import (
    CalibrationInfo,
    RunResult,
)

# ---------------------------------------------------------------- results


def test_the_inputs_bits_are_said_where_there_are_any() -> None:
    cost = run_result().cost.model_copy(update={"input_values": 6_690_000, "input_bits": 4.0894})
    assert "- inputs: 4.089 bits on average, 6.69 M values an image\n" in markdown(run_result(cost=cost))
    assert "- inputs:" not in markdown(run_result())


def test_a_result_survives_its_json_with_infinite_values() -> None:
    result = run_result()
    layers = [result.layers[0].model_copy(update={"weight_sqnr_db": math.inf}), *result.layers[1:]]
    result = result.model_copy(update={"layers": layers})
    text = result.model_dump_json()
    assert RunResult.model_validate_json(text) == result
    assert json.loads(text, parse_constant=pytest.fail)["layers"][0]["weight_sqnr_db"] == "Infinity"


def test_a_result_of_another_version_is_refused() -> None:
    content = run_result().model_dump(mode="json")
    with pytest.raises(ValueError, match="version"):
        RunResult.model_validate({**content, "version": 2})
    with pytest.raises(ValueError, match="unheard_of"):
        RunResult.model_validate({**content, "unheard_of": 1})


# ---------------------------------------------------------------- wording


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (6_240_000, "6.24 MB"),
        (46_800_000, "46.8 MB"),
        (2.5e9, "2.50 GB"),
    ],
)
def test_bytes_are_decimal_with_three_digits(count: int, text: str) -> None:
    assert summary.bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 s"), (0.0123, "0.012 s"), (0.999, "1.0 s"), (59.9, "59.9 s"), (59.99, "1 min 00 s"), (83.4, "1 min 23 s"),
     (3599.7, "1 h 00 min"), (7380, "2 h 03 min")],
)  # fmt: skip
def test_times_read_like_a_clock(seconds: float, text: str) -> None:
    assert summary.time_text(seconds) == text


def test_worst_layers_go_by_output_error_and_else_by_weight_sqnr() -> None:
    result = run_result()
    measure, worst = summary.worst_layers(result)
    assert measure == "output error"
    assert [layer.name for layer, _ in worst] == ["layer3.conv", "layer1.conv", "layer2.conv"]
    blind = [layer.model_copy(update={"output_error": None}) for layer in result.layers]
    measure, worst = summary.worst_layers(run_result(layers=blind), count=2)
    assert measure == "weight SQNR"
    assert [layer.name for layer, _ in worst] == ["layer2.conv", "layer1.conv"]


def test_an_exact_layer_is_called_exact() -> None:
    assert summary.decibel_text(math.inf) == "exact"
    assert summary.decibel_text(21.53) == "21.5 dB"
    assert summary.decibel_text(None) == ""


# ---------------------------------------------------------------- Markdown


def test_the_report_says_all_that_a_person_wants_to_see() -> None:
    text = markdown(run_result())
    for said in [
        "# resnet18 at 4 bits by comq",
        "coraq quantize resnet18 --model-kwargs 'head=(a b)'",
        "W4A32, first/last layer 8/8 bits",
        "| top-1 | 71.25 % [68.75, 73.50] | 70.00 % [67.50, 72.25] | -1.25 [-3.75, +1.50] |",
        "| top-5 | 90.50 % [88.00, 92.75] | 89.25 % [86.75, 91.50] | -1.25 |",
        "1000 labelled images; only float right 41, only quantized 28; McNemar p = 0.148",
        "agreement: 88.50 % [86.00, 90.75]",
        "SQNR 21.5 dB, KL 0.03125 nats",
        "6.24 MB of 46.8 MB, 7.50 times smaller",
        "effective bits: 4.125",
        "1.82 GMACs, 58.2 GBitOps",
        "time: 1 min 37 s",
        "peak memory: 1.25 GB; bound on calibration activations 2.00 GB",
        "| quantize | 1 min 10 s |",
        "folder cal: 64 images",
        "abc123def",
        "folder val, split validation",
        "torch 2.15.0",
        "Testor 9000, 2 threads, device cpu",
        "seed: 7",
        "comq 3 (built-in)",
        "3 corrupt images skipped",
        "Worst by output error: `layer3.conv` (0.1200)",
        "runs/resnet18-comq-w4-3f9a1c",
    ]:
        assert said in text, said


def test_every_layer_is_a_row_in_execution_order_with_the_methods_own_measures() -> None:
    lines = markdown(run_result()).splitlines()
    header = next(line for line in lines if line.startswith("| layer |"))
    assert header.endswith("| weight SQNR dB | input error | output error | sweeps | gain |")
    assert "rank" not in header
    rows = [line for line in lines if line.startswith("| `layer")]
    assert rows[1] == "| `layer1.conv` | convolution | 16×8×3×3 | 4 | 701 | 1.15 M | 19 | 0.01 | 0.11 | 4 | 0.1235 |"
    assert [row.split("`")[1] for row in rows] == [f"layer{index}.conv" for index in range(4)]
    ranked = [layer.model_copy(update={"rank": 8}) for layer in run_result().layers]
    assert "| bits | rank | bytes |" in markdown(run_result(layers=ranked))


def test_without_evaluation_images_the_report_says_so_and_gives_fidelity() -> None:
    text = markdown(unmeasured())
    assert "Accuracy: not measured" in text
    assert "| top-1 |" not in text
    assert "On 1000 images: 256 synthetic images." in text
    assert "SQNR 21.5 dB" in text


def test_synthetic_calibration_is_never_passed_over() -> None:
    made = CalibrationInfo(description="smooth noise", count=64, fingerprint="f", synthetic=True)
    assert "synthetic: not real images" in markdown(run_result(calibration=made))


@pytest.mark.parametrize(
    ("description", "said"),
    [
        ("64 images of cal", "64 images of cal\n"),
        ("folder cal", "folder cal: 64 images\n"),
        ("70 files", "70 files: 64 images\n"),
    ],
)
def test_the_number_of_calibration_images_is_said_once(description: str, said: str) -> None:
    info = CalibrationInfo(description=description, count=64, fingerprint="f", synthetic=False)
    assert f"calibration: {said}" in markdown(run_result(calibration=info))


def test_every_table_has_as_many_cells_as_its_header_even_with_pipes_in_names() -> None:
    layers = [run_result().layers[0].model_copy(update={"name": "a|b", "metrics": {"c|d": "e|f"}})]
    table: list[int] = []
    for line in [*markdown(run_result(layers=layers)).splitlines(), ""]:
        if line.startswith("|"):
            table.append(line.replace("\\|", "").count("|"))
        elif table:
            assert len(set(table)) == 1
            table = []


def test_a_result_with_nothing_in_it_still_renders() -> None:
    bare = run_result(layers=[], notes=[], stages={}, comparison=None, evaluation_data=None, float_pass_s=None)
    text = markdown(bare)
    assert "## Layers" not in text
    assert "## Notes" not in text
    assert "None" not in text


# ---------------------------------------------------------------- files


def test_write_report_writes_what_can_be_read_back(tmp_path: Path) -> None:
    result = run_result()
    path = write_report(result, tmp_path / "run")
    assert path == tmp_path / "run" / "report.html"
    assert (tmp_path / "run" / "report.md").read_text(encoding="utf-8") == markdown(result)
    assert RunResult.model_validate_json((tmp_path / "run" / "metrics.json").read_text()) == result
    assert sorted(os.listdir(tmp_path / "run")) == ["metrics.json", "report.html", "report.md"]


def test_a_write_that_fails_leaves_the_old_files_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(run_result(), tmp_path)
    before = (tmp_path / "metrics.json").read_text()

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("coraq.artifact.files.os.replace", full)
    with pytest.raises(CoraqError, match="no room on the disk"):
        write_report(unmeasured(), tmp_path)
    assert (tmp_path / "metrics.json").read_text() == before
    assert sorted(os.listdir(tmp_path)) == ["metrics.json", "report.html", "report.md"]


def test_metrics_json_comes_last_because_it_makes_a_run_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(result: RunResult) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("coraq.report.render.markdown", die)
    with pytest.raises(KeyboardInterrupt):
        write_report(run_result(), tmp_path)
    assert not (tmp_path / "metrics.json").exists()


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CoraqError, match="file"):
        write_report(run_result(), tmp_path / "file")
