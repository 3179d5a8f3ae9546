"""What goes wrong for a user: two lines on stderr, the right exit code, and nothing lost of earlier runs.

The real pipeline, on the demo and on a tiny network in a folder; `test_cli.py` has the command line's own faults.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from support.commands import fails
from support.tasks import small_task

from coraq import pipeline
from coraq.cli.app import run
from coraq.errors import CoraqError, disk_error
from coraq.events import JsonLinesSink, Note

DEMO = ["quantize", "demo", "--method", "rtn", "--calib-size", "8", "--eval-size", "10", "-q"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def network(here: Path) -> str:
    """A folder with a tiny network of ten classes, and forty images beside it."""
    torch.manual_seed(0)
    folder = here / "network"
    folder.mkdir()
    save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), folder / "model.safetensors")
    cfg = {"input_size": [3, 32, 32], "num_classes": 10, "first_conv": "conv1.0", "classifier": "fc"}
    content = {"architecture": "test_resnet", "num_classes": 10, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(content))
    rng = np.random.default_rng(0)
    for number in range(40):
        path = here / "images" / f"c{number // 4}" / f"{number % 4}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    return "local-dir:network"


# ---------------------------------------------------------------- files that are not what they should be


def test_a_pickle_in_a_model_folder_is_named_as_one(network: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("network/model.safetensors").write_bytes(pickle.dumps({"conv1": 1}))
    fails(["quantize", network], capsys, 1, "is a pickle, not safetensors")


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ("{oops", "Expecting"),
        ("{}", "no 'architecture'"),
        ('{"architecture": ["resnet18"]}', "no name"),
        ('{"architecture": "resnet18", "pretrained_cfg": {}, "model_args": [1]}', "object has no"),
    ],
)
def test_a_damaged_model_configuration_has_a_way_out(
    content: str, wrong: str, network: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("network/config.json").write_text(content)
    fails(["quantize", network], capsys, 1, "config.json is not a timm configuration", wrong, hint="architecture")


def test_the_number_of_classes_cannot_replace_a_trained_classifier(
    network: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["--num-classes", "7"], ["--model-kwargs", "num_classes=7"]):
        fails(["quantize", network, *arguments], capsys, 2, "trained for 10 classes, not 7", hint="--checkpoint")
    weights = "network/model.safetensors"
    command = ["quantize", "test_resnet", "--checkpoint", weights, "--num-classes"]
    fails([*command, "7"], capsys, 1, "(fc) has 10 classes, the network has 7", hint="--num-classes 10")
    assert run([*command, "10", "--method", "rtn", "--calib-size", "4", "--img-size", "32", "-q"]) == 0


@pytest.mark.parametrize(
    ("arguments", "wrong", "hint"),
    [
        (["--crop-pct", "87.5"], "--crop-pct", "2"),
        (["--mean", "127.5,127.5,127.5"], "--mean", "0.5, 0.5, 0.5"),
        (["--std", "63.75,127.5,127.5"], "--std", "0.25, 0.5, 0.5"),
    ],
)
def test_percentages_and_statistics_of_pixels_to_255_are_errors(
    arguments: list[str], wrong: str, hint: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails([*DEMO, *arguments], capsys, 2, wrong, hint=hint)


def test_a_class_map_that_is_no_text_is_refused(network: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["quantize", network, "--data-dir", "images", "--class-map"]
    Path("map.txt").write_bytes(bytes(range(256)))
    fails([*command, "map.txt"], capsys, 1, "class map map.txt cannot be read", hint="UTF-8")
    fails([*command, "images"], capsys, 1, "class map images is no file")


def test_an_unknown_kind_of_dataset_is_refused(network: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["quantize", network, "--data-dir", "images", "--dataset", "imagenet/x"]
    fails(command, capsys, 2, "imagenet/x is not a dataset specification", hint="hfds/NAME")


def test_a_run_whose_metrics_cannot_be_read_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "runs" / "one" / "metrics.json").mkdir(parents=True)
    fails(["report", "runs/one"], capsys, 1, "metrics.json is damaged", hint="--force")


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("option", "value"), [("--std", "0,0,0"), ("--std", "1,nan,1"), ("--mean", "nan,0,0"), ("--std", "-1,1,1")]
)
def test_pictures_cannot_be_normalised_by_nothing(
    option: str, value: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails([*DEMO, option, value], capsys, 2, option, hint=f"each {option[2:]} must be finite")


def test_a_symmetric_grid_has_no_finer_zero_point(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*DEMO, "--symmetric", "--zero-point-fraction", "1"]
    fails(command, capsys, 2, "--zero-point-fraction 1 is not allowed", hint="leave out --symmetric")


def test_an_override_that_is_no_expression_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails([*DEMO, "--override", "conv(=4"], capsys, 2, "'conv(' is no regular expression", hint="--override")


def test_an_override_that_no_layer_matches_is_reported(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*DEMO, "--override", "nosuch=3", "--override", ".*=6"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "no layer matches the override 'nosuch'" in shown
    assert "override '.*'" not in shown


# ---------------------------------------------------------------- disks


def test_a_full_disk_under_the_event_log_is_said_in_two_lines(tmp_path: Path) -> None:
    log = JsonLinesSink(tmp_path / "events.jsonl")  # which would refuse the device itself
    log._file = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115 (log.close closes it)
    with pytest.raises(CoraqError, match="no room on the disk"):
        log(Note("hello"))
    log.close()  # and nothing comes up again


def test_no_room_for_activations_is_said_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.TemporaryFile", lambda **_: io.FileIO("/dev/full", "r+"))
        task = small_task(memory_bytes=1 << 12, folder=tmp_path)
        with pytest.raises(CoraqError, match=r"cannot be kept in .*No space left.*\n.*TMPDIR"):
            task.stats(task.layers[-1].name)
        task.close()
    assert not list(tmp_path.iterdir())
    task = small_task(memory_bytes=1 << 12, folder=tmp_path / "missing")
    with pytest.raises(CoraqError, match=r"cannot be kept in .*\n.*TMPDIR"):
        task.stats(task.layers[0].name)


def test_a_library_that_runs_out_of_disk_is_no_bug(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pipeline, "run", full)
    fails(DEMO, capsys, 1, "no room on a disk", hint="free some space")


def test_a_forced_run_that_fails_leaves_the_earlier_result(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(DEMO) == 0
    (folder,) = (here / "runs").iterdir()
    before = {name: (folder / name).read_bytes() for name in ("model.safetensors", "metrics.json", "report.md")}
    with monkeypatch.context() as patch:

        def full(path: Path, *args: object) -> int:
            raise disk_error(path, OSError(errno.ENOSPC, ""), 1000)

        patch.setattr("coraq.pipeline.flow.write_checkpoint", full)
        fails([*DEMO, "--force"], capsys, 1, "no room on the disk")
    assert {name: (folder / name).read_bytes() for name in before} == before
    with monkeypatch.context() as patch:

        def killed(*args: object, **known: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("coraq.pipeline.measure.compare_networks", killed)
        assert run([*DEMO, "--force"]) == 130
    assert not (folder / "metrics.json").exists()  # the new checkpoint has no metrics yet, and not the old ones
    assert run(DEMO) == 0
    assert (folder / "metrics.json").exists()


# ---------------------------------------------------------------- interrupts


def test_an_interrupt_while_the_command_is_imported_leaves_no_traceback() -> None:
    program = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'coraq.cli': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from coraq.__main__ import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr.splitlines() == ["error: interrupted", "hint: nothing was begun"]


# ---------------------------------------------------------------- pictures


def test_damaged_pictures_are_skipped_and_named_or_refused(network: str, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("images", "damaged")
    truncated = Path("damaged/c3/1.png")
    truncated.write_bytes(truncated.read_bytes()[:300])
    Path("damaged/c4/2.png").write_bytes(b"no picture")
    command = ["quantize", network, "--method", "rtn", "--data-dir", "damaged", "--calib-size", "20", "-j", "0"]
    assert run([*command, "-q"]) == 0
    shown = capsys.readouterr()
    assert "unreadable image" in shown.out + shown.err
    fails([*command, "--strict"], capsys, 1, "unreadable image damaged/")
