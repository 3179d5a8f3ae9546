"""A run that is killed at any moment goes on where it was, and ends with the same bytes as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coraq import pipeline
from coraq.artifact import RunFolder, read_result
from coraq.config import DataConfig, RunConfig

COMMAND = [
    str(Path(sys.executable).with_name("coraq")),
    *("quantize", "demo", "--method", "comq", "--bits", "3", "--calib-size", "96", "--eval-size", "50"),
]  # fmt: skip
LONGEST_S = 240


def start(runs: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*COMMAND, "--output", str(runs), "--json"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(runs: Path) -> dict[str, object]:
    process = start(runs)
    out, err = process.communicate(timeout=LONGEST_S)
    assert process.returncode == 0, err
    result: dict[str, object] = json.loads(out)
    return result


def only_run(runs: Path) -> Path:
    (run,) = [path for path in runs.iterdir() if path.is_dir()]
    return run


def layer_files(runs: Path) -> int:
    return len(list(runs.glob("*/layers/*.safetensors")))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that nobody kills, and the seconds between its first committed layer and its end."""
    runs = tmp_path_factory.mktemp("undisturbed")
    process = start(runs)
    deadline = time.monotonic() + LONGEST_S
    while not layer_files(runs) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    working = time.monotonic()
    _, err = process.communicate(timeout=LONGEST_S)
    assert process.returncode == 0, err
    return only_run(runs), time.monotonic() - working


def kill_at(runs: Path, layers: int, delay_s: float) -> None:
    """Start the command, wait for so many committed layers and a little longer, and kill it without warning."""
    process = start(runs)
    try:
        deadline = time.monotonic() + LONGEST_S
        while layer_files(runs) < layers and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(delay_s)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def killed_and_restarted(runs: Path, kills: int, whole_s: float, layers: int, seed: int) -> Path:
    """Kill at random moments, from the first layer to the writing of the report; then run to the end."""
    dice = random.Random(seed)
    for number in range(kills):
        if number % 4 == 3:  # anywhere at all, while the network is loaded too
            kill_at(runs, 0, dice.uniform(0.0, 2 * whole_s))
        else:
            kill_at(runs, dice.randint(layer_files(runs), layers), dice.uniform(0, whole_s / layers))
    finish(runs)
    return only_run(runs)


def same_result(run: Path, other: Path) -> None:
    assert (run / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    results = [json.loads((path / "metrics.json").read_text()) for path in (run, other)]
    for key in ("layers", "size", "scheme_line", "calibration"):
        assert results[0][key] == results[1][key], key
    first, second = (result["comparison"]["quantized_top1"] for result in results)
    assert first == second
    assert not list(run.rglob("*.tmp"))


def test_a_run_killed_twice_ends_as_one_that_was_left_alone(undisturbed: tuple[Path, float], tmp_path: Path) -> None:
    run, whole_s = undisturbed
    layers = len(list((run / "layers").iterdir()))
    for share in (0.3, 0.7):
        kill_at(tmp_path, int(share * layers), whole_s / layers / 2)
        assert 0 < layer_files(tmp_path) < layers
    finish(tmp_path)
    resumed = [json.loads(line) for line in (only_run(tmp_path) / "events.jsonl").read_text().splitlines()]
    assert sum(event.get("resumed", False) for event in resumed) >= int(0.3 * layers) + int(0.7 * layers)
    same_result(only_run(tmp_path), run)
    # the last attempt's time is not the run's, and says so
    result = read_result(only_run(tmp_path))
    assert int(0.7 * layers) <= result.resumed_layers < layers
    assert f"without the {result.resumed_layers} layers" in (only_run(tmp_path) / "report.md").read_text()
    assert read_result(run).resumed_layers == 0
    assert "without the" not in (run / "report.md").read_text()


def test_what_a_killed_write_leaves_is_cleared_away(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "layers").mkdir()
    (tmp_path / ".model.safetensors.4711.tmp").write_bytes(b"half a file")
    (tmp_path / "layers" / ".0003.safetensors.4711.tmp").write_bytes(b"half a file")
    folder.open()
    folder.close()
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("seed", range(4))
def test_runs_killed_twenty_times_in_all_end_as_one_that_was_left_alone(
    seed: int, undisturbed: tuple[Path, float], tmp_path: Path
) -> None:
    run, whole_s = undisturbed
    layers = len(list((run / "layers").iterdir()))
    same_result(killed_and_restarted(tmp_path, 5, whole_s, layers, seed + 100), run)


def test_a_finished_run_prints_its_result_again_without_working(undisturbed: tuple[Path, float]) -> None:
    run, _ = undisturbed
    before = {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*.safetensors"))}
    again = finish(run.parent)
    assert {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*.safetensors"))} == before
    assert again["total_s"] == json.loads((run / "metrics.json").read_text())["total_s"]


def test_a_kill_between_the_numbers_and_the_page_leaves_no_run_without_a_page(tmp_path: Path) -> None:
    config = RunConfig(model="demo", method="rtn", data=DataConfig(calib_size=4, eval_size=4, workers=0))
    run = Path(pipeline.run(config, runs_dir=tmp_path).run_dir)
    page = (run / "report.html").read_text()
    (run / "report.html").unlink()
    pipeline.run(config, runs_dir=tmp_path)
    assert (run / "report.html").read_text() == page
    (run / "report.html").write_text("of an older run")  # --force was killed in between
    os.utime(run / "report.html", ns=(0, 0))
    pipeline.run(config, runs_dir=tmp_path)
    assert (run / "report.html").read_text() == page
    before = (run / "report.html").stat().st_mtime_ns
    pipeline.run(config, runs_dir=tmp_path)
    assert (run / "report.html").stat().st_mtime_ns == before
