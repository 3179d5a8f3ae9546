"""timm folders and .pt2 files: opened without coraq, they answer as the checkpoint does."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.exports import checkpoint_of

from coraq.artifact import load_checkpoint
from coraq.cli.app import run
from coraq.data import tensor_images
from coraq.errors import CoraqError
from coraq.export.pt2 import build_pt2, codes_exact, open_pt2, pack_words
from coraq.export.run import Request, export_checkpoint
from coraq.export.timm_folder import unfolded_state, weights_on_grid
from coraq.testing import random_images


@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_a_pt2_file_unpacks_its_codes_to_the_checkpoints_outputs(tmp_path: Path, bits: int) -> None:
    checkpoint = checkpoint_of(tmp_path, bits, symmetric=bits == 2, awkward=True)
    opened = open_pt2(build_pt2(checkpoint, random_images(2)))
    images = random_images(5, seed=3)  # another batch size than it was exported with
    with torch.no_grad():
        assert torch.equal(opened(images), checkpoint.module(images))
    assert codes_exact(checkpoint, opened)
    opened.get_buffer("dense.parametrizations.weight.0.codes.packed")[0] ^= 4
    assert not codes_exact(checkpoint, opened)


def test_a_pt2_file_holds_zero_points_between_codes(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, 2, zero_point_fraction=3)
    result = export_checkpoint(checkpoint, Request(format="pt2"), tensor_images(random_images(8)))
    assert result.verified
    assert result.label == "2- to 8-bit on disk, float in memory"
    images = random_images(5, seed=3)
    with torch.no_grad():
        assert torch.equal(open_pt2(Path(result.path).read_bytes())(images), checkpoint.module(images))


def test_a_pt2_file_holds_column_scales(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, 2, column_scale="channel")
    result = export_checkpoint(checkpoint, Request(format="pt2"), tensor_images(random_images(8)))
    assert result.verified
    opened = open_pt2(Path(result.path).read_bytes())
    images = random_images(5, seed=3)
    with torch.no_grad():
        assert torch.equal(opened(images), checkpoint.module(images))
    opened.get_buffer("dense.parametrizations.weight.0.codes.columns")[0, 0, 0] *= 2
    assert not codes_exact(checkpoint, opened)


def test_a_pt2_file_opens_without_timm_and_coraq(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path)
    path = tmp_path / "model.pt2"
    path.write_bytes(build_pt2(checkpoint, random_images(2)))
    program = (
        f"import sys; sys.modules['timm'] = sys.modules['coraq'] = None; import torch; "
        f"print(tuple(torch.export.load({str(path)!r}).module()(torch.randn(3, 3, 16, 16)).shape))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "(3, 10)" in done.stdout


def test_words_hold_as_many_codes_as_fit() -> None:
    assert pack_words(torch.full((9,), 15, dtype=torch.uint8), 4).tolist() == [-1, 15]
    assert pack_words(torch.tensor([1, 2, 3], dtype=torch.uint8), 3).tolist() == [1 + 2 * 8 + 3 * 64]


def test_a_timm_folder_computes_what_the_folded_student_does(tmp_path: Path) -> None:
    # every norm's kind: folded (with and without activation), and one that stays
    checkpoint = checkpoint_of(tmp_path)
    result = export_checkpoint(checkpoint, Request(format="timm"), tensor_images(random_images(16)))
    assert result.verified
    assert result.label == "float"
    folder = Path(result.path)
    assert (folder / "config.json").is_file()
    assert "float32 weights" in (folder / "README.md").read_text()
    assert weights_on_grid(checkpoint, folder)
    state = load_file(folder / "model.safetensors")
    state["dense.weight"][0, 0, 0, 0] += 1e-3
    save_file(state, folder / "model.safetensors")
    assert not weights_on_grid(checkpoint, folder)


def test_a_timm_folder_opens_with_timm_alone(demo_runs: Path) -> None:
    runs = demo_runs / "runs"
    assert run(["export", "--format", "timm", "-O", str(runs), "-q"]) == 0
    (folder,) = runs.iterdir()
    program = (
        "import sys; sys.modules['coraq'] = None; import timm, torch; "
        f"m = timm.create_model('local-dir:{folder / 'timm'}', pretrained=True).eval(); torch.manual_seed(0); "
        "print(m(torch.randn(1, 3, *m.pretrained_cfg['input_size'][1:])).argmax().item(), m.pretrained_cfg['mean'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    checkpoint = load_checkpoint(folder)
    torch.manual_seed(0)
    expected = checkpoint.module(torch.randn(1, *checkpoint.info.preprocess["input_size"])).argmax().item()
    assert done.stdout.split()[0] == str(expected)


def test_a_bias_that_the_architecture_has_no_place_for_is_refused(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path)
    checkpoint.module.head.bias = None
    structure = checkpoint.info.structure.model_copy(update={"folded": {}})
    info = checkpoint.info.model_copy(update={"structure": structure})
    with pytest.raises(CoraqError, match="bias"):
        unfolded_state(dataclasses.replace(checkpoint, info=info))


def test_evaluate_takes_an_exported_file(
    demo_runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("onnxruntime", reason="needs coraq[onnx]")
    monkeypatch.chdir(demo_runs)
    assert run(["export", "--no-verify", "-q"]) == 0
    (folder,) = (demo_runs / "runs").iterdir()
    capsys.readouterr()
    assert run(["evaluate", str(folder / "model.onnx"), "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    measured = json.loads((folder / "metrics.json").read_text())["comparison"]["quantized_top1"]
    assert found["accuracy"]["top1"] == measured
    assert found["accuracy"]["count"] == 64
    assert run(["evaluate", str(folder / "model.onnx"), "--fail-under", "100", "-q"]) in (0, 3)
    assert run(["evaluate", str(folder / "nothing.onnx")]) == 2
