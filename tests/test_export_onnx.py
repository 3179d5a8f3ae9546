"""ONNX files: what is in them, what a runtime makes of them, and that the verification catches what is wrong."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.exports import check_random, checkpoint_of, of_every_width, with_adapter, with_layers
from torch import nn

from coraq.cli.app import run
from coraq.core.grid import minmax_grid
from coraq.core.tensors import QuantizedLayer
from coraq.data import tensor_images
from coraq.errors import CoraqError
from coraq.export import verify
from coraq.export.bitplanes import bit_weights, from_blob, to_blob
from coraq.export.onnx_file import WIDER, build_onnx, read_metadata
from coraq.export.requirements import require
from coraq.export.run import Request, export_checkpoint
from coraq.export.weights import Form
from coraq.testing import random_images

onnx = pytest.importorskip("onnx", reason="needs coraq[onnx]")
pytest.importorskip("onnxruntime", reason="needs coraq[onnx]")
pytest.importorskip("onnxscript", reason="needs coraq[onnx]")

pytestmark = pytest.mark.usefixtures("untimed")


@pytest.mark.parametrize("form", ["cast", "packed", "dq"])
@pytest.mark.parametrize(
    ("bits", "symmetric"), [(4, False), (4, True), (3, False), (2, True), (2, False), (6, True)], ids=str
)
def test_every_code_comes_back_from_the_file_and_every_weight_from_the_runtime(
    tmp_path: Path, form: Form, bits: int, symmetric: bool
) -> None:
    checkpoint = checkpoint_of(tmp_path, bits, symmetric, awkward=True)
    export = build_onnx(checkpoint, form)
    onnx.checker.check_model(onnx.load_from_string(export.content), full_check=True)
    found = check_random(checkpoint, export)
    assert found.codes_exact
    assert found.weights_exact
    assert found.failures == []
    assert found.logits_error < 1e-5
    assert found.agreeing == found.count == 16


@pytest.mark.parametrize(
    ("wanted", "zero_point", "bits", "stored"),
    [("cast", 2, 2, 2), ("cast", 3, 3, 3), ("packed", 1, 3, 3), ("dq", 2, 2, 4)],
)
def test_zero_points_between_codes_stay_there_but_for_dequantize_linear(
    tmp_path: Path, wanted: Form, zero_point: int, bits: int, stored: int
) -> None:
    """Which gets whole ones, and wider codes."""
    checkpoint = checkpoint_of(tmp_path, bits, awkward=True, zero_point_fraction=zero_point)
    images = tensor_images(random_images(16, seed=5))
    result = export_checkpoint(checkpoint, Request(form=wanted), images)
    assert result.verified
    assert result.label == f"{stored}- to 8-bit on disk, float in memory"  # the last layer has 5
    assert any(WIDER in note for note in result.notes) == (stored > bits)
    (found,) = result.checks
    assert found.codes_exact
    assert found.weights_exact
    assert found.logits_error < 1e-5
    plain = export_checkpoint(checkpoint_of(tmp_path, bits), Request(form=wanted), None)
    assert not any(WIDER in note for note in plain.notes)


@pytest.mark.parametrize(("wanted", "bits"), [("cast", 2), ("packed", 3), ("dq", 4)])
def test_column_scales_come_back_from_the_file(tmp_path: Path, wanted: Form, bits: int) -> None:
    checkpoint = checkpoint_of(tmp_path, bits, awkward=True, column_scale="channel")
    export = build_onnx(checkpoint, wanted)
    onnx.checker.check_model(onnx.load_from_string(export.content), full_check=True)
    found = check_random(checkpoint, export)
    assert found.failures == []
    assert found.codes_exact
    assert found.weights_exact
    model = onnx.load_from_string(export.content)
    (scales,) = (i for i in model.graph.initializer if i.name == "dense.weight_column_scale")
    changed = 2 * onnx.numpy_helper.to_array(scales)
    scales.CopyFrom(onnx.numpy_helper.from_array(changed, scales.name))
    wrong = check_random(checkpoint, export, model.SerializeToString())
    assert not wrong.codes_exact
    assert not wrong.weights_exact


@pytest.mark.parametrize(("form", "symmetric"), [("cast", False), ("cast", True), ("packed", True)])
def test_every_width_takes_its_bits_in_the_file_and_no_operator_at_run_time(
    tmp_path: Path, form: Form, symmetric: bool
) -> None:
    from coraq.export.runtimes import OnnxRuntime

    checkpoint = of_every_width(tmp_path, symmetric)
    assert {layer.weight.bits for layer in checkpoint.layers.values()} == {2, 3, 4, 5, 6, 7, 8}
    export = build_onnx(checkpoint, form)
    onnx.checker.check_model(onnx.load_from_string(export.content), full_check=True)
    stored = {i.name: i for i in onnx.load_from_string(export.content).graph.initializer}
    for name, layer in checkpoint.layers.items():
        bits, raw = layer.weight.bits, stored[f"{name}.weight_codes"].raw_data
        assert len(raw) <= -(-layer.weight.codes.numel() // 8) * bits  # whole eights of codes
    assert len(export.content) - export.graph_bytes <= 1.02 * export.nominal_bytes
    ours, plain = (OnnxRuntime(content, 1).kernels() for content in (export.content, export.float_content))
    assert ours == plain  # all of it is folded at load
    found = check_random(checkpoint, export)
    assert found.failures == []
    assert found.codes_exact
    assert found.weights_exact
    assert not found.inexact
    assert not any("next type" in note for note in export.notes)


def test_adapters_are_codes_on_disk_and_folded_at_load(tmp_path: Path) -> None:
    checkpoint = with_layers(checkpoint_of(tmp_path), with_adapter)
    export = build_onnx(checkpoint)
    found = check_random(checkpoint, export)
    assert found.codes_exact
    assert found.weights_exact
    assert found.failures == []
    from coraq.export.runtimes import OnnxRuntime

    kernels = OnnxRuntime(export.content, 1).kernels()
    assert kernels["MatMul"] == 0  # no branch is left
    assert any("folded" in note for note in export.notes)
    assert "dense.adapter_a_codes" in {i.name for i in onnx.load_from_string(export.content).graph.initializer}


def test_negative_scales_and_codebooks_survive(tmp_path: Path) -> None:
    def negative(name: str, layer: QuantizedLayer) -> QuantizedLayer:
        if name == "dense":
            table = torch.linspace(-1, 1, 16) ** 3
            return dataclasses.replace(layer, weight=dataclasses.replace(layer.weight, zero_point=None, codebook=table))
        scale = layer.weight.scale.clone()
        scale[:, ::2] *= -1
        return dataclasses.replace(layer, weight=dataclasses.replace(layer.weight, scale=scale))

    checkpoint = with_layers(checkpoint_of(tmp_path), negative)
    for form in ("cast", "packed", "dq"):
        found = check_random(checkpoint, build_onnx(checkpoint, form))
        assert found.failures == []
        assert found.weights_exact


@pytest.mark.parametrize("what", ["code", "scale", "zero_point", "bias"])
def test_one_wrong_number_in_the_file_is_found(tmp_path: Path, what: str) -> None:
    checkpoint = checkpoint_of(tmp_path)
    export = build_onnx(checkpoint)
    model = onnx.load_from_string(export.content)
    name = {"code": "dense.weight_codes", "bias": "dense.bias"}.get(what, f"dense.weight_{what}")
    target = next(i for i in model.graph.initializer if i.name == name)
    raw = bytearray(target.raw_data)
    if what == "bias":
        raw[:] = (np.frombuffer(raw, np.float32) + 1).tobytes()
    else:
        raw[2] ^= 0x10
    target.raw_data = bytes(raw)
    found = check_random(checkpoint, export, model.SerializeToString())
    assert found.failures
    assert found.codes_exact == (what == "bias")


def test_a_file_that_is_none_is_refused_in_plain_words(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path)
    with pytest.raises(CoraqError, match="does not open the file"):
        check_random(checkpoint, build_onnx(checkpoint), b"no model")


def test_two_layers_of_one_weight_share_its_codes(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight, self.second.bias = self.first.weight, self.first.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x.mean(2)[:, [0, 1, 2, 0, 1, 2], 0]))

    network = Twice().requires_grad_(False).eval()
    weight = network.first.weight[None]
    grid = minmax_grid(weight, 4)
    layer = QuantizedLayer(grid.pack(grid.codes(weight)))
    network.first.weight.copy_(layer.dequantize()[0])
    shared = dataclasses.replace(checkpoint, module=network, layers={"first": layer, "second": layer})
    export = build_onnx(shared)
    found = check_random(shared, export)
    assert found.failures == []


def test_metadata_tell_how_to_use_and_where_it_is_from(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path)
    model = onnx.load_from_string(build_onnx(checkpoint, labels=list("abcdefghij")).content)
    facts = read_metadata({entry.key: entry.value for entry in model.metadata_props})
    assert facts["preprocess"] == checkpoint.info.preprocess
    assert facts["labels"] == list("abcdefghij")
    assert facts["provenance"]["method"] == "rtn"
    assert facts["label"] == "4- to 8-bit on disk, float in memory"  # its layers have several widths
    assert facts["layers"]["stem"] == {"bits": 8, "rank": None}


def test_out_of_tolerance_keeps_the_name_unverified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = checkpoint_of(tmp_path)
    images = tensor_images(random_images(8))
    request = Request(threads=1)
    good = export_checkpoint(checkpoint, request, images)
    assert good.verified
    assert Path(good.path).name == "model.onnx"
    monkeypatch.setattr(verify, "LOGITS_TOLERANCE", -1.0)
    monkeypatch.setattr(verify, "CONTROL_FACTOR", -1.0)
    bad = export_checkpoint(checkpoint, request, images)
    assert bad.verified is False
    assert Path(bad.path).name == "model.onnx.unverified"
    assert not Path(good.path).exists()  # the older one would be taken for the new


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("count", [37, 40])
def test_a_blob_holds_the_bits_and_nothing_else(bits: int, count: int, signed: bool) -> None:
    low = -(2 ** (bits - 1)) if signed else 0
    values = np.random.default_rng(0).integers(low, low + 2**bits, count)
    blob = to_blob(values, bits)
    assert blob.nbytes == -(-count // 8) * bits
    assert np.array_equal(from_blob(blob, count), values & (2**bits - 1))
    lanes = (blob >> np.arange(8, dtype=np.uint8).reshape(-1, 1, 1)) & 1  # what the operators do
    assert np.array_equal((lanes @ bit_weights(bits, signed).astype(np.int32)).reshape(-1)[:count], values)


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(CoraqError, match="onnxruntime") as caught:
        require("onnxruntime")
    assert "coraq[onnx]" in caught.value.hint


# ---------------------------------------------------------------- the command


def test_coraq_export_takes_the_newest_run_and_verifies_it(
    demo_runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo_runs)
    assert run(["export", "--json", "-q"]) == 0
    result = json.loads(capsys.readouterr().out)
    (folder,) = (demo_runs / "runs").iterdir()
    assert result["verified"] is True
    assert result["checks"][0]["labelled"] == 64
    assert result["checks"][0]["exported_right"] == result["checks"][0]["checkpoint_right"]
    assert Path(result["path"]) == Path("runs") / folder.name / "model.onnx"
    assert result["size_bytes"] == (folder / "model.onnx").stat().st_size
    assert json.loads((folder / "export.json").read_text())["exports"]["model.onnx"] == result


def test_no_verify_is_recorded(
    demo_runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo_runs)
    assert run(["export", "--portable", "--no-verify", "-q"]) == 0
    assert "not verified" in capsys.readouterr().out
    (folder,) = (demo_runs / "runs").iterdir()
    record = json.loads((folder / "export.json").read_text())["exports"]["model.portable.onnx"]
    assert record["verified"] is None
    assert record["opset"] == 18


def test_a_failed_verification_is_exit_code_1(
    demo_runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo_runs)
    monkeypatch.setattr(verify, "tolerances", lambda ours, control: ["planted"])
    assert run(["export", "--npu", "-q"]) == 1
    assert "planted" in capsys.readouterr().out
    (folder,) = (demo_runs / "runs").iterdir()
    assert (folder / "model.npu.onnx.unverified").is_file()
    assert not (folder / "model.npu.onnx").exists()


def test_what_a_runtime_refuses_is_recorded(
    demo_runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any) -> None:
        raise CoraqError("OpenVINO 0 does not open the file: planted", "a hint")

    monkeypatch.chdir(demo_runs)
    monkeypatch.setattr(verify, "OpenVino", refuse)
    monkeypatch.setattr("coraq.export.run.require", lambda package: None)
    assert run(["export", "--openvino", "-q"]) == 1
    assert "planted (a hint)" in capsys.readouterr().out.replace("\n", " ")
    (folder,) = (demo_runs / "runs").iterdir()
    assert (folder / "model.onnx.unverified").is_file()
    record = json.loads((folder / "export.json").read_text())["exports"]["model.onnx.unverified"]
    assert record["verified"] is False
    assert [bool(check["failures"]) for check in record["checks"]] == [False, True]
    assert record["checks"][1]["logits_error"] is None


@pytest.mark.parametrize(("form", "name"), [("onnx", "model.onnx"), ("timm", "timm"), ("pt2", "model.pt2")])
def test_a_crash_while_verifying_leaves_a_record(
    form: str, name: str, demo_runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(*args: Any, **more: Any) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.chdir(demo_runs)
    for check in ("check_onnx", "check_torch"):
        monkeypatch.setattr(f"coraq.export.run.{check}", crash)
    assert run(["export", "--format", form, "-q"]) == 1
    assert "ZeroDivisionError: planted" in capsys.readouterr().out.replace("\n", " ")
    (folder,) = (demo_runs / "runs").iterdir()
    record = json.loads((folder / "export.json").read_text())["exports"][f"{name}.unverified"]
    assert record["verified"] is False
    assert "ZeroDivisionError: planted" in (folder / "log.txt").read_text()


def test_without_a_run_it_says_what_to_do_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["export"]) == 1
    assert "coraq quantize demo" in capsys.readouterr().err


def test_the_label_of_mixed_widths_names_the_range() -> None:
    """One width beside the edges' is the file's; more are named from the least to the most."""
    from types import SimpleNamespace

    from coraq.export.onnx_file import label_of

    def labelled(*widths: int) -> str:
        layers = {str(i): SimpleNamespace(weight=SimpleNamespace(bits=bits)) for i, bits in enumerate(widths)}
        return label_of(SimpleNamespace(layers=layers))  # type: ignore[arg-type]

    assert labelled(8, 4, 4, 8) == "4-bit on disk, float in memory"
    assert labelled(5, 3, 4, 8) == "3- to 8-bit on disk, float in memory"


def test_short_names_never_meet_a_stored_one() -> None:
    """Past 192 values in between, the next short name in hexadecimal would be that of the first constant, `_c0`."""
    from onnx import TensorProto, helper, numpy_helper

    from coraq.export.onnx_file import shorten

    steps = 300
    nodes = [helper.make_node("Add", [f"v{i}" if i else "x", "_c0"], [f"v{i + 1}"]) for i in range(steps)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", f"v{steps}")]
    constant = numpy_helper.from_array(np.ones(1, np.float32), "_c0")
    model = helper.make_model(helper.make_graph(nodes, "chain", ends[:1], ends[1:], [constant]))
    shorten(model, set())
    onnx.checker.check_model(model)
    assert all(node.input[1] == "_c0" for node in model.graph.node)
    assert len({node.output[0] for node in model.graph.node}) == steps
