"""Files of earlier versions of coraq: checkpoints of `format_version` 1 and the results of their runs.

`tests/data/format_1` was written by commit 6a4b0ac from the demo network: comq at W4, cora at W2A4 with column scales
of inputs, qera at W4 with adapters.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from coraq import pipeline
from coraq.artifact import load_checkpoint, read_result
from coraq.cli.app import run
from coraq.migration import upgrade_config, upgrade_scheme
from coraq.scheme import Scheme

FILES = Path(__file__).parent / "data" / "format_1"
NAMES = ("comq", "cora", "qera")


@pytest.mark.parametrize("name", NAMES)
def test_an_old_checkpoint_opens_and_answers_as_when_it_was_written(name: str) -> None:
    checkpoint = load_checkpoint(FILES / name)
    result = read_result(FILES / name)
    assert result.comparison is not None
    assert result.comparison.quantized_top1 is not None
    with torch.no_grad():
        assert torch.isfinite(checkpoint.module(torch.zeros(1, *checkpoint.info.preprocess["input_size"]))).all()
    assert {layer.name: layer.bits for layer in result.layers} == {
        name: layer.weight.bits for name, layer in checkpoint.layers.items()
    }
    assert any(layer.adapter is not None for layer in checkpoint.layers.values()) == (name == "qera")


def test_the_scheme_of_an_old_file_means_what_it_meant() -> None:
    schemes = {name: load_checkpoint(FILES / name).info.scheme for name in NAMES}
    edges = {"first_bits": 8, "last_bits": 8}
    assert schemes["comq"] == schemes["qera"] == Scheme.of(bits=4, column_scale="channel", **edges)
    assert schemes["cora"] == Scheme.of(bits=2, act_bits=4, column_scale="input", **edges)
    assert read_result(FILES / "cora").config.scheme == schemes["cora"]


def test_a_run_folder_of_before_is_measured_again_with_the_numbers_it_had(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(FILES / "comq", folder)
    before, after = read_result(folder), pipeline.evaluate_run(folder)
    assert before.comparison is not None
    assert after.comparison is not None
    assert after.comparison.quantized_top1 == before.comparison.quantized_top1
    assert run(["report", str(folder)]) == 0


def test_former_values_have_their_present_names() -> None:
    former = {"bits": 3, "first_bits": None, "bias": "keep", "gain": "float", "zero_point": "eighth"}
    former |= {"act_bits": 4, "act_mixed": "macs", "overrides": {"fc": {"bits": 4}}, "version": 1}
    present = {"bits": 3, "first_bits": "same", "last_bits": 8, "bias_correction": "off", "zero_point_fraction": 3}
    wanted = Scheme.of(
        **present, column_scale="none", act_bits=4, act_allocation="bitops", overrides={"fc": {"bits": 4}}
    )
    assert Scheme.model_validate(upgrade_scheme(former)) == wanted
    config = upgrade_config({"version": 1, "model": "demo", "scheme": former, "data": {"calib_rows": 9}})
    assert config["data"] == {"calib_early_images": 0, "calib_precision": "float32", "calib_rows_per_input": 9}


@pytest.mark.parametrize("content", [None, 3, [], {}, {"version": 1, "scheme": 3, "data": []}, {"version": 2}])
def test_what_is_no_configuration_is_left_for_validation(content: object) -> None:
    upgraded = upgrade_config(json.loads(json.dumps(content)))
    assert type(upgraded) is type(content)
