"""Several processes at one folder: locked or correct, never mixed; the same bytes for other workers and batch sizes."""

from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest

from coraq import pipeline
from coraq.artifact import newest_run
from coraq.cli.app import run
from coraq.config import DataConfig, RunConfig
from coraq.errors import CoraqError
from coraq.events import Event, LayerCommitted

DEMO = ["--calib-size", "8", "--eval-size", "10", "-j", "0", "-q"]


def config(method: str = "rtn", **data: Any) -> RunConfig:
    return RunConfig(
        model="demo", method=method, data=DataConfig(**{"calib_size": 8, "eval_size": 10, "workers": 0, **data})
    )


class During:
    """A sink that does something once, in the middle of a run."""

    def __init__(self, action: Any) -> None:
        self.action, self.done = action, False

    def __call__(self, event: Event) -> None:
        if isinstance(event, LayerCommitted) and not self.done and event.index > 3:
            self.done = True
            self.action()


def test_the_same_run_twice_at_once_is_refused_and_the_first_is_not_hurt(tmp_path: Path) -> None:
    def second() -> None:
        with pytest.raises(CoraqError, match="another process is working in") as caught:
            pipeline.run(config(), runs_dir=tmp_path)
        assert "--output" in caught.value.hint
        with pytest.raises(CoraqError, match="another process is working in"):
            pipeline.run(config(), runs_dir=tmp_path, force=True)

    during = During(second)
    result = pipeline.run(config(), runs_dir=tmp_path, sink=during)
    assert during.done
    alone = pipeline.run(config(), runs_dir=tmp_path / "alone")
    assert result.checkpoint_sha256 == alone.checkpoint_sha256


def test_two_runs_in_one_folder_of_runs_do_not_meet(tmp_path: Path) -> None:
    during = During(lambda: pipeline.run(config("npot"), runs_dir=tmp_path))
    first = pipeline.run(config(), runs_dir=tmp_path, sink=during)
    assert len(list(tmp_path.iterdir())) == 2
    assert first.checkpoint_sha256 == pipeline.run(config(), runs_dir=tmp_path / "alone").checkpoint_sha256


def test_while_a_run_goes_on_nothing_else_is_written_into_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def report() -> None:
        capsys.readouterr()
        (folder,) = (tmp_path / "runs").iterdir()
        for command in (["report"], ["export", "--format", "timm"]):
            assert run([command[0], str(folder), *command[1:]]) == 1
            shown = capsys.readouterr().err
            assert ("another process is working in" if finished else "is not a finished run") in shown
        assert run(["evaluate", str(folder), "-q"]) == (0 if finished else 1)  # writes nothing

    finished = False
    first = During(report)
    pipeline.run(config(), runs_dir=tmp_path / "runs", sink=first)
    finished = True
    again = During(report)
    pipeline.run(config(), runs_dir=tmp_path / "runs", sink=again, force=True)
    assert first.done
    assert again.done


def hammer(folder: str, seconds: float, seen: Any) -> None:
    """Reads whatever is there, again and again; puts what was wrong."""
    end = time.monotonic() + seconds
    reads = 0
    while time.monotonic() < end:
        for path in Path(folder).glob("*/metrics.json"):
            try:
                json.loads(path.read_text())
                reads += 1
            except FileNotFoundError:
                continue
            except ValueError as error:
                seen.put(f"{path}: {error}")
        try:
            newest_run(Path(folder))
        except CoraqError:
            continue
    seen.put(reads)


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    pipeline.run(config(), runs_dir=tmp_path)
    context = multiprocessing.get_context("fork")
    seen = context.Queue()
    reader = context.Process(target=hammer, args=(str(tmp_path), 2.0, seen))
    reader.start()
    for _ in range(2):
        pipeline.run(config(), runs_dir=tmp_path, force=True)
    found = seen.get(timeout=60)
    reader.join(60)
    assert isinstance(found, int), found
    assert found > 0


@pytest.mark.parametrize("method", ["comq", pytest.param("cora", marks=pytest.mark.slow)])
def test_workers_and_resumption_change_no_byte(method: str, tmp_path: Path) -> None:
    first = pipeline.run(config(method, workers=0), runs_dir=tmp_path / "a")
    second = pipeline.run(config(method, workers=3), runs_dir=tmp_path / "b")
    assert Path(first.run_dir).name == Path(second.run_dir).name
    folder = Path(second.run_dir)
    for name in ("metrics.json", "model.safetensors"):
        (folder / name).unlink()
    for layer in sorted((folder / "layers").iterdir())[7:]:
        layer.unlink()
    third = pipeline.run(config(method, workers=1), runs_dir=tmp_path / "b")
    results = [first, second, third]
    assert len({result.checkpoint_sha256 for result in results}) == 1
    assert len({result.comparison.model_dump_json(exclude={"float_s", "quantized_s"}) for result in results}) == 1  # type: ignore[union-attr]
    assert first.layers == second.layers == third.layers


def test_the_batch_size_of_an_evaluation_changes_no_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["quantize", "demo", "--method", "comq", "--calib-size", "8", "--eval-size", "50", "-j", "0", "-q"]) == 0
    found = []
    for size in ("1", "7", "50"):
        capsys.readouterr()
        assert run(["evaluate", "-b", size, "-j", "0", "-q", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["comparison"])
    for other in found[1:]:
        assert {key: other[key] for key in ("count", "float_top1", "quantized_top1", "agreement")} == {
            key: found[0][key] for key in ("count", "float_top1", "quantized_top1", "agreement")
        }
        assert other["kl_nats"] == pytest.approx(found[0]["kl_nats"], rel=1e-4)  # sums in another order


def test_the_report_records_the_number_of_threads(tmp_path: Path) -> None:
    import torch

    assert pipeline.run(config(), runs_dir=tmp_path).machine.threads == torch.get_num_threads()
