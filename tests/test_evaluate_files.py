"""Claims about `coraq evaluate`: a run, its checkpoint and its exports are measured on the same images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.pictures import PREPROCESS, everything, opened, write_digits, write_images

import coraq
from coraq.artifact.checkpoint import read_checkpoint
from coraq.cli.app import run
from coraq.config import DataConfig
from coraq.data import ImageSet, open_evaluation
from coraq.errors import CoraqError
from coraq.events import ListSink, Note
from coraq.network.load import names_of

DEMO = Path(coraq.__file__).parent / "demo"


def asked(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert run([*arguments, "--json", "-q"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("calibrated", ["--calib-dir", "--data-dir"])
def test_a_run_its_checkpoint_and_its_export_are_measured_on_the_same_images(
    calibrated: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    write_digits(here / "images", 6)
    write_digits(here / "others", 5)
    arguments = ["quantize", "demo", "--method", "rtn", "--bits", "4", "--data-dir", "images", "--calib-size", "20"]
    if calibrated == "--calib-dir":
        arguments += ["--calib-dir", "others"]
    folder = Path(asked(arguments, capsys)["run_dir"])
    assert run(["export", str(folder), "-q"]) == 0
    (file,) = folder.glob("*.onnx")
    whole = {"--calib-dir": (60, 30), "--data-dir": (40, 50)}[calibrated]  # of images, of others
    for given, count in (
        ([], whole[0]),
        (["--eval-size", "7"], 7),
        (["--data-dir", "others"], whole[1]),
        (["--data-dir", "others", "--eval-size", "25"], 25),
    ):
        of_run = asked(["evaluate", str(folder), *given], capsys)
        of_checkpoint = asked(["evaluate", str(folder / "model.safetensors"), *given], capsys)
        of_file = asked(["evaluate", str(file), *given], capsys)
        assert of_run["comparison"]["count"] == count
        assert of_checkpoint["comparison"]["count"] == of_file["accuracy"]["count"] == count
        assert of_checkpoint["evaluation_data"] == of_run["evaluation_data"] == of_file["evaluation_data"]
        assert of_file["accuracy"]["top1"] == of_run["comparison"]["quantized_top1"]


def test_a_file_outside_of_a_run_folder_is_measured_on_all_images(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    write_digits(here / "images", 5)
    folder = Path(asked(["quantize", "demo", "--method", "rtn", "--calib-size", "8"], capsys)["run_dir"])
    assert run(["export", str(folder), "-q"]) == 0
    (file,) = folder.glob("*.onnx")
    shares = []
    for path in (file, folder / "model.safetensors"):
        alone = here / path.name
        alone.write_bytes(path.read_bytes())
        accuracy = asked(["evaluate", str(alone), "--data-dir", "images"], capsys)["accuracy"]
        assert accuracy["count"] == 50
        assert (
            asked(["evaluate", str(alone), "--data-dir", "images", "--eval-size", "20"], capsys)["accuracy"]["count"]
            == 20
        )
        shares.append(accuracy["top1"]["value_pct"])
    assert shares[0] == shares[1] > 80


def evaluated(data: dict[str, Any], calibrated: dict[str, Any] | None, sink: Any = None) -> ImageSet:
    def config(options: dict[str, Any]) -> DataConfig:
        return DataConfig(
            **{"workers": 0, **{key: str(value) for key, value in options.items() if key != "calib_size"}},
            **({"calib_size": options["calib_size"]} if "calib_size" in options else {}),
        )

    return open_evaluation(
        config(data), None if calibrated is None else config(calibrated), PREPROCESS, 2, 0, sink or ListSink()
    )


def test_only_images_that_the_run_was_calibrated_on_are_held_back(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "data", {"a": 6, "b": 6})
    other = write_images(tmp_path / "other", {"a": 3, "b": 2}, seed=9)
    once = opened(2, data_dir=folder, calib_size=4)
    assert once.evaluation is not None
    used = {image.numpy().tobytes() for image in everything(once.calibration)[0]}
    run_data = {"data_dir": folder, "calib_size": 4}
    again = everything(evaluated({"data_dir": folder, "calib_size": 4}, run_data))[0]
    assert torch.equal(again, everything(once.evaluation)[0])
    assert evaluated({"data_dir": other}, run_data).count == 5
    assert evaluated({"data_dir": folder}, {"calib_dir": other}).count == 12
    assert evaluated({"data_dir": folder}, None).count == 12
    assert evaluated({"data_dir": folder}, {}).count == 12  # synthetic images
    sink = ListSink()
    held = evaluated({"data_dir": folder}, run_data, sink)
    assert held.count == 8
    assert {image.numpy().tobytes() for image in everything(held)[0]}.isdisjoint(used)
    assert any("4 images of" in event.message for event in sink.events if isinstance(event, Note))
    with pytest.raises(CoraqError, match="calibrated on all images"):
        evaluated({"data_dir": folder}, {"calib_dir": folder})
    sink = ListSink()
    assert evaluated({"data_dir": folder}, {"calib_dir": tmp_path / "gone"}, sink).count == 12
    assert any("none is left out" in event.message for event in sink.events if isinstance(event, Note))


# --- names of classes


@pytest.fixture
def named(here: Path) -> str:
    """The demo's network, in a folder, with names that sort otherwise than its classes."""
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    config = json.loads((DEMO / "config.json").read_text())
    config["pretrained_cfg"]["label_names"] = names
    config.pop("label_names", None)
    folder = here / "network"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes((DEMO / "model.safetensors").read_bytes())
    write_digits(here / "images", 5)
    for number, name in enumerate(names):
        (here / "images" / str(number)).rename(here / "images" / name)
    return "local-dir:network"


def test_folders_called_like_the_networks_classes_have_their_numbers(
    named: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", named, "--method", "rtn", "--bits", "8", "--calib-size", "8", "--data-dir", "images"]
    result = asked(command, capsys)
    assert result["comparison"]["float_top1"]["value_pct"] > 80
    again = asked(["evaluate", result["run_dir"], "--eval-size", "20"], capsys)
    assert again["comparison"]["float_top1"]["value_pct"] > 80
    alphabetical = sorted(path.name for path in (here / "images").iterdir())
    (here / "map.txt").write_text("\n".join(alphabetical))  # a class map is stronger than the network's names
    assert asked([*command, "--class-map", "map.txt"], capsys)["comparison"]["float_top1"]["value_pct"] < 50


def test_names_are_used_only_where_they_hold_every_folder_once() -> None:
    from coraq.data.classes import class_numbers

    assert class_numbers(["a", "b", "c"], None, 3, "x", ["c", "a", "b"]) == [1, 2, 0]
    assert class_numbers(["a", "c"], None, 3, "x", ["c", "a", "b"]) == [1, 0]  # some of the classes
    assert class_numbers(["a", "b", "d"], None, 3, "x", ["c", "a", "b"]) == [0, 1, 2]
    assert class_numbers(["a", "b", "c"], None, 3, "x", ["a", "a", "b"]) == [0, 1, 2]
    assert class_numbers(["a", "b", "c"], {"a": 0, "b": 1, "c": 2}, 3, "x", ["c", "a", "b"]) == [0, 1, 2]
    assert names_of({"label_names": ["a"]}, 2) == names_of({"label_names": "ab"}, 2) == names_of({}, 2) == []


# --- images without labels, images that cannot be read


def test_a_flat_folder_is_calibrated_on_and_the_report_says_why_accuracy_is_missing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(here / "flat", {"": 12})
    command = ["quantize", "demo", "--method", "rtn", "--bits", "4", "--data-dir", "flat"]
    result = asked(command, capsys)
    assert result["calibration"]["count"] == 12
    assert result["calibration"]["synthetic"] is False
    assert run(command) == 0
    shown = capsys.readouterr().out
    assert "the images have no labels" in shown
    assert "no images given" not in shown
    some = asked([*command, "--calib-size", "8"], capsys)
    assert (some["calibration"]["count"], some["comparison"]["count"]) == (8, 4)


def test_images_that_cannot_be_read_are_not_counted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(here / "calib", {"": 10})
    write_digits(here / "images", 2)
    for file in [*sorted((here / "calib").iterdir())[:4], here / "calib" / "10.png"]:
        file.write_bytes(b"no image")
    sorted((here / "images" / "3").iterdir())[0].write_bytes(b"no image")
    result = asked(
        ["quantize", "demo", "--method", "rtn", "--calib-dir", "calib", "--data-dir", "images", "-b", "4"], capsys
    )
    assert result["calibration"]["count"] == 6
    assert result["calibration"]["description"] == "11 images of calib, 5 of them unreadable"
    assert result["comparison"]["count"] == 19
    assert result["evaluation_data"] == "20 images of images, 1 of them unreadable"


def test_no_method_is_not_all_methods(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("", " ", ","):
        assert run(["compare", "demo", "--methods", text, "-q"]) == 2
        assert "--methods names no method" in capsys.readouterr().err
    assert not (here / "runs").exists()


# --- from Python


def test_the_size_of_images_given_from_python_is_stored(tmp_path: Path) -> None:
    network = timm.create_model("test_resnet", num_classes=4).eval()
    coraq.quantize(network, "rtn", data=torch.randn(4, 3, 48, 64), path=tmp_path / "model.safetensors")
    _, info = read_checkpoint(tmp_path / "model.safetensors")
    assert info.preprocess["input_size"] == [3, 48, 64]
