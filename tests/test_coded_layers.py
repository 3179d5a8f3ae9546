"""Entropy-coded layers: the same codes in fewer bytes, in layer files and checkpoints, or an error."""

from __future__ import annotations

import builtins
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from coraq.api import QTensor, QuantizedLayer
from coraq.artifact import RunFolder
from coraq.artifact.checkpoint import CheckpointInfo, read_checkpoint, write_checkpoint
from coraq.artifact.codec import LayerRecord, decode, encode
from coraq.errors import CoraqError


def _layer(shape: tuple[int, int, int] = (1, 40, 60), bits: int = 8, seed: int = 0) -> QuantizedLayer:
    """Codes of little entropy around the middle of the range."""
    generator = torch.Generator().manual_seed(seed)
    middle = 2 ** (bits - 1)
    codes = (torch.randn(shape, generator=generator) + middle).round().clamp(0, 2**bits - 1).to(torch.uint8)
    scale = torch.rand(*shape[:2], 1, generator=generator) + 0.1
    return QuantizedLayer(QTensor(codes, scale, bits))


def _coded(layer: QuantizedLayer) -> QuantizedLayer:
    return replace(layer, weight=layer.weight.coded("ans"))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(1, 40, 60), (24, 1, 9), (1, 1, 1), (1, 5, 0)])
def test_coded_layers_come_back_as_they_were(shape: tuple[int, int, int], bits: int) -> None:
    layer = _coded(_layer(shape, bits))
    tensors, record = encode("conv", layer)
    back = decode("conv", record, dict(tensors))
    assert torch.equal(back.weight.codes, layer.weight.codes)
    assert torch.equal(back.dequantize(), layer.dequantize())
    assert back.weight.coding == "ans"


def test_the_size_is_that_of_the_stored_tensors() -> None:
    for layer in (_layer(), _coded(_layer()), _coded(_short_scales(_layer()))):
        tensors, _ = encode("conv", layer)
        assert layer.size_bytes() == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _short_scales(layer: QuantizedLayer) -> QuantizedLayer:
    return replace(layer, weight=replace(layer.weight, scale_type="bfloat16").with_stored_scale())


def test_short_scales_come_back_as_they_were() -> None:
    layer = _short_scales(_layer())
    tensors, record = encode("conv", layer)
    assert tensors["conv.weight_scale"].dtype == torch.bfloat16
    back = decode("conv", record, dict(tensors))
    assert torch.equal(back.weight.scale, layer.weight.scale)
    assert back.weight.scale_type == "bfloat16"


def test_scales_that_their_type_cannot_hold_are_refused() -> None:
    layer = _layer()
    with pytest.raises(ValueError, match="bfloat16"):
        replace(layer.weight, scale_type="bfloat16").check((1, 40, 60))


def test_auto_takes_the_smaller_coding() -> None:
    little = _layer(bits=8)
    assert little.weight.coded("auto").coding == "ans"
    generator = torch.Generator().manual_seed(0)
    uniform = replace(little.weight, codes=torch.randint(0, 256, (1, 40, 60), generator=generator).to(torch.uint8))
    assert uniform.coded("auto").coding == "packed"
    assert little.weight.coded("packed").coding == "packed"


def test_a_packed_layer_is_recorded_as_before_there_was_a_choice() -> None:
    record = encode("conv", _layer())[1]
    assert "coding" not in json.loads(record.model_dump_json())
    assert LayerRecord.model_validate_json('{"shape":[1,2,3],"bits":4}').coding == "packed"


@pytest.mark.parametrize(("coding", "version"), [("packed", 2), ("ans", 3)])
def test_only_files_with_coded_layers_need_the_new_version(tmp_path: Path, coding: Any, version: int) -> None:
    layer = _layer()
    layer = replace(layer, weight=layer.weight.coded(coding))
    write_checkpoint(
        tmp_path / "model.safetensors", torch.nn.Module(), {"conv": layer}, CheckpointInfo(architecture="x")
    )
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["coraq"])["format_version"] == version
    tensors, info = read_checkpoint(tmp_path / "model.safetensors")
    assert torch.equal(decode("conv", info.layers["conv"], tensors).weight.codes, layer.weight.codes)


def test_a_killed_run_finds_its_coded_layers(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open()
    layer = _coded(_short_scales(_layer()))
    folder.save_layer(0, "conv", layer, {})
    found = folder.committed()["conv"][0]
    folder.close()
    assert torch.equal(found.dequantize(), layer.dequantize())
    assert found.weight.coding == "ans"


@pytest.mark.parametrize("shape", [(1, 40, 61), (1, 1, 10**15), (10**6, 10**6, 10**6), (-1, -40, 60), (1, 40, 0)])
def test_a_forged_shape_is_an_error(shape: tuple[int, int, int]) -> None:
    tensors, record = encode("conv", _coded(_layer()))
    with pytest.raises(CoraqError, match="layer conv"):
        decode("conv", record.model_copy(update={"shape": shape}), tensors)


@pytest.mark.parametrize("length", [0, 1, 2, 5, 20, 200, -1])
def test_a_stream_that_ends_early_is_an_error(length: int) -> None:
    tensors, record = encode("conv", _coded(_layer()))
    tensors["conv.weight_coded"] = tensors["conv.weight_coded"][:length]
    with pytest.raises(CoraqError, match="layer conv"):
        decode("conv", record, tensors)


def test_a_forged_table_is_an_error() -> None:
    tensors, record = encode("conv", _coded(_layer()))
    for place in range(2, 8):
        for value in (0, 1, 2, 200, 255):
            forged = tensors["conv.weight_coded"].clone()
            if forged[place] == value:
                continue
            forged[place] = value
            with pytest.raises(CoraqError, match="layer conv"):
                decode("conv", record, {**tensors, "conv.weight_coded": forged})


def test_a_layer_of_fewer_bits_than_its_codes_is_an_error() -> None:
    tensors, record = encode("conv", _coded(_layer()))
    with pytest.raises(CoraqError, match="codes leave"):
        decode("conv", record.model_copy(update={"bits": 4}), tensors)


def test_without_the_coder_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, record = encode("conv", _coded(_layer()))
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "constriction":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(CoraqError, match="pip install constriction"):
        decode("conv", record, tensors)
