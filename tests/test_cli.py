"""The command line: what it asks of the pipeline, what it prints where, and its exit codes.

The pipeline is a fake here: these tests claim nothing about quantization.
"""

from __future__ import annotations

import importlib
import inspect
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel
from rich.console import Console
from support.results import run_result, unmeasured

import coraq
from coraq import registry
from coraq.api import Field, MethodConfig
from coraq.cli import options
from coraq.cli.app import COMMANDS, run
from coraq.cli.methods import method_options
from coraq.cli.progress import BarProgress, PlainProgress, _Bars
from coraq.config import DataConfig, RunConfig
from coraq.errors import CoraqError
from coraq.events import LayerCommitted, Note, Sink, StageAdvanced, StageFinished, StageStarted, stage
from coraq.report import write_report
from coraq.results import RunResult
from coraq.scheme import Scheme, nested


class Plan(BaseModel):
    run_dir: str = "runs/resnet18-comq-w4-3f9a1c"
    method: str = "comq"
    scheme_line: str = "W4A32"
    finished: bool = False
    calibration: str = "64 synthetic images"
    evaluation: str | None = None
    layers: list[dict[str, Any]] = [
        {"name": "conv[0]", "kind": "conv", "shape": (16, 3, 7, 7), "bits": 8, "macs": 118013952}
    ]
    resume_at: str | None = None
    float_bytes: int = 46_800_000
    estimated_bytes: int = 6_240_000


class FakePipeline(ModuleType):
    """Records what the command line asks for, and answers with `result` or raises `failure`."""

    def __init__(self) -> None:
        super().__init__("coraq.pipeline")
        self.calls: list[dict[str, Any]] = []
        self.result: RunResult = run_result()
        self.failure: BaseException | None = None

    def run(self, config: RunConfig, *, runs_dir: Path, sink: Sink, force: bool, command: list[str]) -> RunResult:
        self.calls.append({"config": config, "runs_dir": runs_dir, "force": force, "command": command})
        with stage(sink, "quantize", 2):
            sink(LayerCommitted("conv[0]", 1, 2, {"sqnr_db": 21.5}))
            sink(Note("fell back to half precision", "warning"))
            sink(Note("nothing to see"))
        if self.failure is not None:
            raise self.failure
        return self.result

    def plan(self, config: RunConfig, *, runs_dir: Path) -> Plan:
        self.calls.append({"config": config, "runs_dir": runs_dir})
        return Plan()

    def evaluate_run(self, run: Path, data: DataConfig | None, *, sink: Sink) -> RunResult:
        self.calls.append({"run": run, "data": data})
        return self.result

    @property
    def config(self) -> RunConfig:
        config = self.calls[-1]["config"]
        assert isinstance(config, RunConfig)
        return config


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakePipeline:
    fake = FakePipeline()
    monkeypatch.setitem(sys.modules, "coraq.pipeline", fake)
    monkeypatch.setattr(coraq, "pipeline", fake, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("CORAQ_PLUGINS", "")
    monkeypatch.chdir(tmp_path)
    return fake


# ---------------------------------------------------------------- opening at once


@pytest.mark.parametrize(
    "arguments", [["--help"], ["quantize", "--help"], ["compare", "-h"], ["--version"], ["quantize", "-w", "9"]]
)
def test_help_and_usage_errors_open_without_torch(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from coraq.cli.app import run\n"
        f"run({arguments!r})\n"
        "slow = ('torch', 'timm', 'numpy', 'PIL', 'matplotlib', 'jinja2', 'ray')\n"
        "heavy = [name for name in slow if name in sys.modules]\n"
        "print('HEAVY', heavy)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout


def test_commands_are_listed_by_the_first_line_of_their_docstrings() -> None:
    for name, summary in COMMANDS.items():
        function = getattr(importlib.import_module(f"coraq.cli.{name}"), name)
        assert (inspect.getdoc(function) or "").splitlines()[0] == summary


def test_the_list_of_commands_needs_none_of_them() -> None:
    program = (
        "import sys\nfrom coraq.cli.app import run\nrun(['--help'])\n"
        "print('LOADED', [name for name in sys.modules if name.startswith(('coraq.cli.quantize', 'pydantic'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("LOADED []\n")
    assert all(name in done.stdout for name in COMMANDS)


def test_the_program_never_imports_click() -> None:
    folder = Path(options.__file__).parent
    for file in folder.glob("*.py"):
        assert not re.search(r"^\s*(import click|from click)", file.read_text(), re.MULTILINE), file


def test_version_and_help_go_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr() == (f"coraq {coraq.__version__}\n", "")
    assert run([]) == 0
    assert "quantize" in capsys.readouterr().out


def test_every_field_of_the_configuration_is_an_option_with_its_description(capsys: pytest.CaptureFixture[str]) -> None:
    os.environ["COLUMNS"] = "300"
    try:
        assert run(["quantize", "--help-all"]) == 0
    finally:
        del os.environ["COLUMNS"]
    text = " ".join(capsys.readouterr().out.split())
    for name, field in DataConfig.model_fields.items():
        assert f"--{name.replace('_', '-')} " in text, name
        assert field.description is not None
        assert " ".join(field.description.split()) in text, name


# ---------------------------------------------------------------- what quantize asks for


def test_a_bare_command_asks_for_the_configurations_defaults(pipeline: FakePipeline) -> None:
    assert run(["quantize", "resnet50", "-q"]) == 0
    assert pipeline.config == RunConfig(model="resnet50")
    assert pipeline.calls[-1]["runs_dir"] == Path("runs")
    assert pipeline.calls[-1]["force"] is False
    assert pipeline.calls[-1]["command"] == ["coraq", "quantize", "resnet50", "-q"]


def test_no_model_means_the_demo(pipeline: FakePipeline) -> None:
    assert run(["quantize"]) == 0
    assert pipeline.config.model == "demo"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--bits", "3"], {"scheme": {"bits": 3}}),
        (["-w", "2"], {"scheme": {"bits": 2}}),
        (["--first-bits", "4", "--last-bits", "same"], {"scheme": {"first_bits": 4, "last_bits": "same"}}),
        (["--granularity", "tensor"], {"scheme": {"granularity": "tensor"}}),
        (["--symmetric"], {"scheme": {"symmetric": True}}),
        (["--bias-correction", "off"], {"scheme": {"bias_correction": "off"}}),
        (
            ["--override", r"a=b\d=3", "--override", "c.*=8"],
            {"scheme": {"overrides": {r"a=b\d": {"bits": 3}, "c.*": {"bits": 8}}}},
        ),
        (
            ["--act-bits", "4", "--override", ".*conv_dw=3/8"],
            {"scheme": {"act_bits": 4, "overrides": {".*conv_dw": {"bits": 3, "act_bits": 8}}}},
        ),
        (["--act-bits", "4", "--act-allocation", "bitops"], {"scheme": {"act_bits": 4, "act_allocation": "bitops"}}),
        (["--method", "rtn"], {"method": "rtn"}),
        (
            ["-o", "sweeps=3", "-o", "order=greedy", "--option", "grid=[1, 2]", "-o", "fast=true", "-o", "x=a=b"],
            {"options": {"sweeps": 3, "order": "greedy", "grid": [1, 2], "fast": True, "x": "a=b"}},
        ),
        (["--model-kwargs", "drop_rate=0.5"], {"model_kwargs": {"drop_rate": 0.5}}),
        (["--checkpoint", "w.safetensors", "--num-classes", "7"], {"checkpoint": "w.safetensors", "num_classes": 7}),
        (["--seed", "5", "--device", "cuda:1"], {"seed": 5, "device": "cuda:1"}),
        (["--calib-memory", "4G"], {"calib_memory": 4 * 2**30}),
        (["--calib-memory", "1.5 GiB"], {"calib_memory": 3 * 2**29}),
        (["--float-dtype", "float16"], {"float_dtype": "float16"}),
        (["--data-dir", "d", "--eval-size", "9"], {"data": {"data_dir": "d", "eval_size": 9}}),
        (["--data-dir", "d", "--split", "test"], {"data": {"data_dir": "d", "split": "test"}}),
        (["--dataset", "hfds/x", "--class-map", "c.txt"], {"data": {"dataset": "hfds/x", "class_map": "c.txt"}}),
        (["-b", "8", "-j", "0", "--img-size", "64"], {"data": {"batch_size": 8, "workers": 0, "img_size": 64}}),
        (["--crop-pct", "0.9", "--interpolation", "bicubic"], {"data": {"crop_pct": 0.9, "interpolation": "bicubic"}}),
        (["--mean", "0.5,0.4,0.3"], {"data": {"mean": [0.5, 0.4, 0.3]}}),
        (["--std", "0.2 0.2 0.1"], {"data": {"std": [0.2, 0.2, 0.1]}}),
        (
            ["--calib-dir", "c", "--calib-split", "s", "--calib-size", "12", "--strict"],
            {"data": {"calib_dir": "c", "calib_split": "s", "calib_size": 12, "strict": True}},
        ),
    ],
)  # fmt: skip
def test_each_option_changes_its_own_field_and_no_other(
    pipeline: FakePipeline, arguments: list[str], expected: dict[str, Any]
) -> None:
    assert run(["quantize", "m", *arguments]) == 0
    content = {"model": "m", **expected, "scheme": nested(expected.get("scheme", {}))}
    assert pipeline.config == RunConfig.model_validate(content)
    assert pipeline.config != RunConfig(model="m")


def test_output_and_force_reach_the_pipeline(pipeline: FakePipeline) -> None:
    assert run(["quantize", "m", "-O", "elsewhere", "--force"]) == 0
    assert pipeline.calls[-1]["runs_dir"] == Path("elsewhere")
    assert pipeline.calls[-1]["force"] is True


@pytest.mark.parametrize("command", [["quantize", "m"], ["evaluate", "made"]])
def test_plugin_folders_reach_the_registry(command: list[str], pipeline: FakePipeline, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in [*folders, tmp_path / "made"]:
        folder.mkdir()
    assert run([*command, "--plugins-dir", "one", "--plugins-dir", str(folders[1])]) == 0
    assert registry.plugin_folders()[:2] == folders


# ---------------------------------------------------------------- wrong requests


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["quantize", "m", "-w", "9"], "--bits 9", "less than or equal to 8"),
        (["quantize", "m", "-w", "1"], "--bits 1", "greater than or equal to 2"),
        (["quantize", "m", "-w", "four"], "--bits", "--help"),
        (["quantize", "m", "--first-bits", "9"], "'9' is neither 2 to 8 nor 'same'", "--help"),
        (["quantize", "m", "-b", "0"], "--batch-size 0", "greater than or equal to 1"),
        (["quantize", "m", "--crop-pct", "-1"], "--crop-pct -1", "greater than 0"),
        (["quantize", "m", "--granularity", "row"], "'--granularity': 'row' is not one of 'channel'", "--help"),
        (["quantize", "m", "--act-allocation", "memory"], "--act-allocation memory needs --act-bits", "how many bits"),
        (
            ["quantize", "m", "-a", "4", "--act-placement", "integer", "--act-allocation", "bitops"],
            "--act-allocation 'bitops' is not allowed",
            "leave out --act-placement integer",
        ),
        (["quantize", "m", "-o", "sweeps"], "-o 'sweeps' is not KEY=VALUE", "sweeps=VALUE"),
        (["quantize", "m", "-o", "a=1", "-o", "a=2"], "-o a is given twice", "once"),
        (["quantize", "m", "--override", "layer"], "--override 'layer' is not REGEX=BITS", "for example"),
        (["quantize", "m", "--override", "a.*=16"], "--override 'a.*=16'", "for example"),
        (["quantize", "m", "--override", "a.*=4/9"], "--override 'a.*=4/9'", "for example"),
        (["quantize", "m", "--override", "a.*=4/8/8"], "--override 'a.*=4/8/8'", "for example"),
        (
            ["quantize", "m", "--override", "a.*=4/8"],
            "--override {'a.*': {'bits': 4, 'act_bits': 8}} is not allowed",
            "hint: bits of inputs, as 'a.*' has them, need --act-bits",
        ),
        (["quantize", "m", "--override", "(=4"], "'(' is no regular expression", "for example"),
        (["quantize", "m", "--calib-memory", "much"], "'much' is not a size", "--help"),
        (["quantize", "m", "--mean", "red"], "'red' is not a list of numbers", "--help"),
        (["quantize", "m", "--plugins-dir", "nowhere"], "nowhere is not a folder", "folder"),
        (["quantize", "m", "--fail-under", "70"], "--fail-under 70.0 needs images", "--data-dir"),
        (["quantize", "m", "--data-dir", "d", "--fail-under", "170"], "170.0 is not a percentage", "0 to 100"),
        (["quantize", "m", "--frobnicate"], "--frobnicate", "coraq quantize --help"),
        (["quantise", "m"], "Did you mean 'quantize'", "coraq --help"),
        (["evaluate", "nothing"], "no run 'nothing'", "coraq quantize"),
    ],
)
def test_a_wrong_request_is_two_lines_and_exit_code_2(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str, hint: str
) -> None:
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert first.startswith("error: ")
    assert message in first
    assert second.startswith("hint: ")
    assert hint in second
    assert not pipeline.calls


# ---------------------------------------------------------------- failures


def test_a_coraq_error_is_two_lines_with_its_own_exit_code(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.failure = CoraqError("no weights for\nresnet50", "try --checkpoint FILE", 1)
    assert run(["quantize", "resnet50", "-q"]) == 1
    assert capsys.readouterr() == ("", "error: no weights for resnet50\nhint: try --checkpoint FILE\n")


def test_an_interrupt_exits_130_and_says_how_to_go_on(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.failure = KeyboardInterrupt()
    assert run(["quantize", "resnet50", "-w", "3", "-q"]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert "coraq quantize resnet50 -w 3 -q" in err.splitlines()[1]


def test_an_interrupt_elsewhere_exits_130_too(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(plugins_dirs: Any = ()) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "available", interrupt)
    assert run(["methods"]) == 130
    assert capsys.readouterr().err.startswith("error: interrupted\n")


def test_a_bug_is_two_lines_and_its_traceback_is_in_the_runs_log(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    failure = ZeroDivisionError("scale is 0")
    failure.run_dir = tmp_path  # type: ignore[attr-defined]
    (tmp_path / "log.txt").write_text("before\n")
    pipeline.failure = failure
    assert run(["quantize", "m", "-q"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: ZeroDivisionError: scale is 0"
    assert str(tmp_path / "log.txt") in second
    log = (tmp_path / "log.txt").read_text()
    assert log.startswith("before\n")
    assert "Traceback (most recent call last)" in log


def test_a_bug_without_a_run_folder_leaves_its_traceback_in_a_temporary_file(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.failure = RuntimeError()
    assert run(["quantize", "m", "-q"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: RuntimeError"
    log = Path(second.rpartition(" ")[2])
    assert "Traceback" in log.read_text()
    log.unlink()


# ---------------------------------------------------------------- results


def test_the_closing_table_says_what_was_gained_and_lost_in_80_columns(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["quantize", "resnet18", "-q"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for said in [
        "resnet18 at 4 bits by comq",
        "71.25 % [68.75, 73.50]",
        "70.00 % [67.50, 72.25]",
        "-1.25 [-3.75, +1.50]",
        "88.50 % [86.00, 90.75]",
        "6.24 MB of 46.8 MB, 7.50 times smaller",
        "4.125 per quantized weight",
        "1 min 37 s",
        "1.25 GB",
        "W4A32, first/last layer 8/8 bits",
        "layer3.conv",
        "0.1200",
        "note: 3 corrupt images skipped",
        "coraq report runs/resnet18-comq-w4-3f9a1c",
    ]:
        assert said in out, said
    assert "coraq evaluate" not in out  # it was measured
    assert max(map(len, out.splitlines())) <= 80


def test_only_commands_that_exist_are_recommended(pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.result = unmeasured()
    assert run(["quantize", "resnet18", "-q"]) == 0
    out = capsys.readouterr().out
    for command in re.findall(r"^  coraq (\w+)", out, re.MULTILINE):
        assert run([command, "--help"]) == 0, command


def test_without_images_accuracy_is_not_measured_and_fidelity_is_given(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.result = unmeasured()
    assert run(["quantize", "resnet18", "-q"]) == 0
    out = capsys.readouterr().out
    assert "accuracy: not measured (no images given; --data-dir FOLDER)" in out
    assert "SQNR 21.5 dB, KL 0.03125 nats" in out
    assert "coraq evaluate runs/resnet18-comq-w4-3f9a1c --data-dir FOLDER" in out


def test_notes_that_the_result_does_not_hold_reach_the_person_once(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as: this run is finished already."""
    pipeline.result = run_result(notes=["fell back to half precision"])
    assert run(["quantize", "m", "-q"]) == 0
    out = capsys.readouterr().out
    assert out.count("note: nothing to see") == 1
    assert out.count("note: fell back to half precision") == 1


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ({"act_bits": 4}, True),
        ({}, False),
        ({"act_bits": 8}, False),
        ({"act_bits": 2}, False),
        ({"act_bits": 4, "act_allocation": "bitops"}, False),
        ({"act_bits": 4, "act_placement": "integer"}, False),
    ],
)
def test_few_bits_for_inputs_are_told_of_how_to_share_them_out(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str], scheme: dict[str, Any], said: bool
) -> None:
    config = RunConfig(model="m", scheme=Scheme.of(**scheme))
    pipeline.result = run_result(config=config, command=["coraq", "quantize", "my model"])
    assert run(["quantize", "m"]) == 0
    assert ("  coraq quantize 'my model' --act-allocation both\n" in capsys.readouterr().out) == said
    pipeline.result = run_result(config=config, command=[])  # a run from Python has none
    assert run(["quantize", "m"]) == 0
    assert "--act-allocation both" not in capsys.readouterr().out


def test_the_next_commands_name_the_plugins_that_the_run_had(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORAQ_PLUGINS", "")  # what the command adds to it is undone
    monkeypatch.chdir(tmp_path)
    for name in ("my plugins", "b"):
        Path(name).mkdir()
    pipeline.result = run_result(comparison=None, run_dir="runs/net")
    assert run(["quantize", "m", "--plugins-dir", "my plugins", "--bits", "4", "--plugins-dir=b"]) == 0
    out = capsys.readouterr().out
    for line in ("coraq evaluate runs/net --data-dir FOLDER", "coraq compare", "coraq export runs/net"):
        assert f"  {line} --plugins-dir 'my plugins' --plugins-dir b\n" in out
    pipeline.result = run_result(run_dir="runs/net")
    assert run(["quantize", "m"]) == 0
    assert "  coraq export runs/net\n" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["-q"], ["-v"]])
def test_json_is_exactly_one_object_on_stdout(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert run(["quantize", "resnet18", "--json", *arguments]) == 0
    assert RunResult.model_validate_json(capsys.readouterr().out) == pipeline.result


@pytest.mark.parametrize(("threshold", "code"), [("70.0", 0), ("70.01", 3)])
def test_fail_under_exits_with_3_after_printing_the_result(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str], threshold: str, code: int
) -> None:
    assert run(["quantize", "m", "--data-dir", "d", "--fail-under", threshold, "-q"]) == code
    out, err = capsys.readouterr()
    assert "70.00 %" in out
    assert ("is below --fail-under 70.01" in err) == (code == 3)


def test_fail_under_without_a_measured_accuracy_never_passes(pipeline: FakePipeline) -> None:
    pipeline.result = unmeasured()
    assert run(["quantize", "m", "--data-dir", "unlabelled", "--fail-under", "1", "-q"]) == 2


def test_a_dry_run_plans_and_runs_nothing(pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", "resnet18", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for said in [
        "runs/resnet18-comq-w4-3f9a1c",
        "conv[0]",
        "16×3×7×7",
        "118 M",
        "6.24 MB and a header, of 46.8 MB",
        "not measured",
    ]:
        assert said in out, said
    assert max(map(len, out.splitlines())) <= 80
    assert "force" not in pipeline.calls[-1]
    assert run(["quantize", "resnet18", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run_dir"] == "runs/resnet18-comq-w4-3f9a1c"


# ---------------------------------------------------------------- progress


def plain(verbose: bool = False) -> tuple[PlainProgress, list[str], list[float]]:
    lines: list[str] = []
    clock = [0.0]
    return PlainProgress(lines.append, verbose, lambda: clock[0]), lines, clock


def test_a_log_gets_a_line_a_stage_and_one_every_ten_seconds() -> None:
    sink, lines, clock = plain()
    sink(StageStarted("quantize", 100))
    for done in range(1, 101):
        clock[0] += 0.5
        sink(StageAdvanced("quantize", done, f"layer{done}"))
    sink(StageFinished("quantize", 50.0))
    assert lines[0] == "quantize (100) ..."
    assert lines[1] == "quantize: 20/100 layer20, about 40.0 s left"
    assert len(lines) == 1 + 5 + 1
    assert lines[-1] == "quantize: done in 50.0 s"


def test_layers_drive_a_stage_that_has_no_steps_of_its_own() -> None:
    sink, lines, clock = plain()
    sink(StageStarted("quantize"))
    for index in range(4):
        clock[0] += 11
        sink(LayerCommitted(f"layer{index}", index + 1, 4, {}))
    assert lines[1:3] == ["quantize: 1/4 layer0, about 33.0 s left", "quantize: 2/4 layer1, about 22.0 s left"]


def test_what_is_left_does_not_count_the_time_of_a_stage_within() -> None:
    sink, lines, clock = plain()
    sink(StageStarted("quantize", 4))
    sink(StageStarted("look", 4))
    clock[0] += 50
    sink(StageFinished("look", 50.0))
    for done in (1, 2):
        clock[0] += 11
        sink(StageAdvanced("quantize", done))
    assert lines[-2:] == ["quantize: 1/4, about 33.0 s left", "quantize: 2/4, about 22.0 s left"]
    sink, lines, clock = plain()
    sink(StageStarted("compare", 4))  # whose cells are made of stages
    sink(StageStarted("quantize", 4))
    clock[0] += 20
    sink(StageFinished("quantize", 20.0))
    sink(StageAdvanced("compare", 1))
    clock[0] += 20
    sink(StageAdvanced("compare", 2))
    assert lines[-1] == "compare: 2/4, about 40.0 s left"


def test_a_short_stage_ends_without_a_line() -> None:
    sink, lines, _ = plain()
    sink(StageStarted("load"))
    sink(StageFinished("load", 0.5))
    assert lines == ["load ..."]


def test_verbose_adds_layers_and_notes_and_quiet_prints_nothing(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    run(["quantize", "m", "-v"])
    loud = capsys.readouterr().err
    run(["quantize", "m"])
    normal = capsys.readouterr().err
    run(["quantize", "m", "-q"])
    assert capsys.readouterr().err == ""
    assert "  1/2 conv[0]  sqnr_db 21.5" in loud
    assert "info: nothing to see" in loud
    assert "warning: fell back to half precision" in loud
    assert "conv[0]" not in normal
    assert "info: nothing to see" not in normal
    assert "warning: fell back to half precision" in normal


def test_a_terminal_shows_only_stages_that_take_two_seconds() -> None:
    now = [0.0]
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    bars = _Bars(console)
    bars.get_time = lambda: now[0]
    sink = BarProgress(bars, verbose=False)

    def shown() -> str:
        screen.truncate(0)
        screen.seek(0)
        console.print(*bars.get_renderables())
        return screen.getvalue()

    sink(StageStarted("load"))
    now[0] = 1.5
    assert "load" not in shown()
    sink(StageFinished("load", 1.5))
    sink(StageStarted("quantize"))
    sink(LayerCommitted("layer1.[0]", 1, 4, {}))
    now[0] = 4.0
    text = shown()
    assert "load" not in text
    assert "quantize" in text
    assert "1/4" in text
    assert "layer1.[0]" in text
    sink(LayerCommitted("a.very.long.name" * 10, 2, 4, {}))
    assert all(len(line) <= 80 for line in shown().splitlines())
    assert len(shown().strip().splitlines()) == 1
    sink(StageFinished("quantize", 2.5))
    assert "4/4" in shown()  # a stage that took its time stays, complete


# ---------------------------------------------------------------- evaluate and report


@pytest.fixture
def written(pipeline: FakePipeline, tmp_path: Path) -> Path:
    """Two finished runs in runs/; the path of the newer."""
    for index, name in enumerate(["older", "newer"]):
        folder = tmp_path / "runs" / name
        write_report(run_result(run_dir=f"runs/{name}"), folder)
        os.utime(folder / "metrics.json", (1_000_000 + index, 1_000_000 + index))
    return tmp_path / "runs" / "newer"


def test_no_run_means_the_newest(pipeline: FakePipeline, written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report"]) == 0
    assert capsys.readouterr().out == "runs/newer/report.html\n"
    assert run(["evaluate", "-q"]) == 0
    assert pipeline.calls[-1] == {"run": Path("runs/newer"), "data": None}


def test_a_run_is_found_by_path_and_by_name(
    pipeline: FakePipeline, written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("older", "runs/older", str(written.with_name("older"))):
        assert run(["evaluate", name, "-q"]) == 0
        assert pipeline.calls[-1]["run"].resolve() == written.with_name("older")
    capsys.readouterr()
    assert run(["report", "oldr"]) == 2
    assert "did you mean older?" in capsys.readouterr().err


def test_no_runs_at_all_is_an_error_that_says_where_to_start(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["report"]) == 1
    assert "coraq quantize demo" in capsys.readouterr().err


def test_evaluate_keeps_the_runs_data_settings_but_for_those_given(pipeline: FakePipeline, written: Path) -> None:
    assert run(["evaluate", "newer", "--data-dir", "val", "-b", "4", "--no-strict", "-q"]) == 0
    before = run_result().config.data
    assert pipeline.calls[-1]["data"] == before.model_copy(update={"data_dir": "val", "batch_size": 4})
    assert before.calib_size == 64  # not the default: it came from the run


def test_evaluate_has_json_and_fail_under(
    pipeline: FakePipeline, written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["evaluate", "--json", "--fail-under", "99", "-q"]) == 3
    assert RunResult.model_validate_json(capsys.readouterr().out) == pipeline.result


def test_report_renders_again_from_metrics_json(
    pipeline: FakePipeline, written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (written / "report.md").write_text("scribble")
    assert run(["report", "newer", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (written / "report.md").read_text().startswith("# resnet18 at 4 bits")
    assert answer["report"] == "runs/newer/report.html"
    assert answer["result"]["method"] == "comq"


# ---------------------------------------------------------------- methods


class Settings(MethodConfig):
    sweeps: int = Field(default=3, ge=1, le=50, description="passes over all columns")
    damp: float | None = Field(default=None, gt=0, description="added to the diagonal")
    target: str = Field(description="what to fit")


class Method:
    name, summary, version, needs_data, Config = "fake", "does nothing", "7", True, Settings
    scope = "layer"


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch, pipeline: FakePipeline) -> None:
    infos = {
        "fake": registry.MethodInfo("fake", "does nothing", "7", True, "layer", "built-in"),
        "bad": registry.MethodInfo("bad", "(broken)", "", False, "", "/x/bad.py", "Traceback …\nSyntaxError: [oops]"),
    }
    monkeypatch.setattr(registry, "available", lambda plugins_dirs=(): infos)
    monkeypatch.setattr(registry, "find", lambda name, plugins_dirs=(): (Method, "built-in"))


def test_methods_lists_sources_and_broken_plugins_with_their_error(
    listed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["methods"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"fake +does nothing +images +built-in", out)
    assert "broken: bad from /x/bad.py" in out
    assert "SyntaxError: [oops]" in out
    assert run(["methods", "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == ["fake", "bad"]


def test_a_methods_options_are_printed_from_its_config(listed: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["methods", "fake"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"sweeps +integer ≥ 1, ≤ 50 +3 +passes over all columns", out)
    assert re.search(r"damp +number > 0 \| null +null +added to the diagonal", out)
    assert re.search(r"target +string +required +what to fit", out)
    assert run(["methods", "fake", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["needs_data"] is True
    assert answer["scope"] == "layer"
    assert answer["options"] == method_options(Settings)


def test_an_unknown_method_names_the_nearest(
    pipeline: FakePipeline, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "BUILT_IN", {"comq": f"{__name__}:Method"})
    assert run(["methods", "comqq"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "'comqq'" in first
    assert "comq" in second


def test_a_plugin_folder_is_searched(
    pipeline: FakePipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "broken.py").write_text("import nothing_of_this_name\n")
    assert run(["methods", "--plugins-dir", str(folder)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "No module named 'nothing_of_this_name'" in out


@pytest.mark.parametrize(
    ("given", "found"), [({}, "1000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"), ({"GOMP_SPINCOUNT": "5"}, "5")]
)
def test_threads_that_wait_for_each_other_leave_the_core(given: dict[str, str], found: str) -> None:
    program = (
        "import os, sys\n"
        "class Torch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': print(os.environ.get('GOMP_SPINCOUNT')); sys.stdout.flush(); os._exit(0)\n"
        "sys.meta_path.insert(0, Torch())\n"
        "from coraq.__main__ import main\n"
        "sys.argv = ['coraq', 'quantize', 'demo', '-O', os.devnull + '/none']\n"
        "main()"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | given
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.splitlines() == [found]  # as torch is about to be loaded


def test_help_has_two_levels(capsys: pytest.CaptureFixture[str]) -> None:
    """What most people need on one screen, all options by --help-all; the second asks for no other state."""
    shown = []
    for flag in ("--help", "--help-all", "--help"):
        assert run(["quantize", flag]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[2]
    assert "--bits" in shown[0]
    assert "--granularity" not in shown[0]
    assert "--granularity" in shown[1]
    assert "--help-all" in shown[0]
