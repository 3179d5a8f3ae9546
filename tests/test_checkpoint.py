"""A checkpoint gives back what was written, bit for bit, or says what is wrong with it."""

from __future__ import annotations

import copy
import json
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.checkpoints import Written, random_layer, with_info
from torch import Tensor, nn

import coraq
from coraq.api import QTensor, QuantizedLayer
from coraq.artifact import RunFolder, load_checkpoint, write_checkpoint
from coraq.artifact.codec import content_digest, decode, encode
from coraq.artifact.files import write_atomic
from coraq.config import Scheme
from coraq.errors import CoraqError
from coraq.network.layers import install
from coraq.testing import random_images, small_network
from coraq.testing.networks import ARCHITECTURE

KINDS = ["symmetric", "affine", "finer", "tensor", "codebook", "adapter"]


def same(a: QTensor, b: QTensor) -> bool:
    pairs = ((a.codes, b.codes), (a.scale, b.scale), (a.zero_point, b.zero_point), (a.codebook, b.codebook))
    return (a.bits, a.fraction) == (b.bits, b.fraction) and all(
        (x is None and y is None) or (x is not None and y is not None and x.dtype == y.dtype and torch.equal(x, y))
        for x, y in pairs
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(1, 5, 27), (4, 3, 9), (7, 1, 25), (1, 1, 1)])
def test_a_layer_comes_back_from_its_encoding_bit_for_bit(kind: str, bits: int, shape: tuple[int, int, int]) -> None:
    layer = random_layer(shape, bits, kind)
    layer.check(shape)
    tensors, record = encode("some.layer", layer)
    stored = sum(t.numel() * t.element_size() for key, t in tensors.items() if key != "some.layer.bias")
    assert stored == layer.size_bytes()  # what is reported is what is on the disk
    again = decode("some.layer", record, tensors)
    assert tensors == {}
    assert same(again.weight, layer.weight)
    assert torch.equal(again.bias, layer.bias)  # type: ignore[arg-type]
    assert torch.equal(again.dequantize(), layer.dequantize())
    if layer.adapter is not None:
        assert again.adapter is not None
        assert same(again.adapter.a, layer.adapter.a)
        assert same(again.adapter.b, layer.adapter.b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_network_comes_back_bit_for_bit(bits: int, kind: str, tmp_path: Path) -> None:
    made = Written(tmp_path / "model.safetensors", bits, kind)
    checkpoint = load_checkpoint(made.path)
    own, back = made.student.state_dict(), checkpoint.module.state_dict()
    assert list(own) == list(back)
    assert all(torch.equal(own[key], back[key]) for key in own)
    images = random_images(3)
    with torch.no_grad():
        assert torch.equal(checkpoint.module(images), made.student(images))
    assert all(same(checkpoint.layers[name].weight, layer.weight) for name, layer in made.layers.items())
    assert list(checkpoint.layers) == made.found.order
    assert checkpoint.info.scheme == made.info.scheme
    assert checkpoint.info.provenance == made.info.provenance
    assert checkpoint.size_bytes == made.size == made.path.stat().st_size
    assert not checkpoint.module.training
    assert not any(parameter.requires_grad for parameter in checkpoint.module.parameters())


def test_the_same_contents_are_the_same_bytes(written: Written) -> None:
    first = written.path.read_bytes()
    for _ in range(8):  # safetensors orders its metadata by chance: eight coin tosses
        write_checkpoint(written.path, written.student, written.layers, written.info)
        assert written.path.read_bytes() == first


def test_a_file_is_what_any_safetensors_reader_can_open(written: Written) -> None:
    tensors = load_file(written.path)
    assert tensors["dense.weight_packed"].dtype == torch.uint8
    assert tensors["dense.weight_packed"].shape == (24, 72)  # 144 codes of 4 bits
    with safe_open(written.path, "pt") as file:
        assert json.loads(file.metadata()["coraq"])["architecture"] == ARCHITECTURE
    header = struct.unpack("<Q", written.path.read_bytes()[:8])[0]
    assert header % 8 == 0


def test_layers_that_share_a_tensor_can_be_written(written: Written) -> None:
    codebook, scale = torch.linspace(-1, 1, 16), torch.ones(1, 1, 1)
    for name, layer in written.layers.items():
        weight = QTensor(layer.weight.codes, scale, 4, None, codebook)
        written.layers[name] = QuantizedLayer(weight, None, layer.bias)
        install(written.student.get_submodule(name), weight.dequantize(), layer.bias)
    write_checkpoint(written.path, written.student, written.layers, written.info)
    images = random_images(1)
    with torch.no_grad():
        assert torch.equal(load_checkpoint(written.path).module(images), written.student(images))


def test_half_precision_halves_the_float_rest_and_nothing_else(tmp_path: Path) -> None:
    full, half = Written(tmp_path / "a"), Written(tmp_path / "b", dtype=torch.float16)
    assert half.size < full.size
    a, b = load_checkpoint(full.path), load_checkpoint(half.path)
    for name, layer in a.layers.items():
        assert same(b.layers[name].weight, layer.weight)  # codes and scales untouched
        assert b.layers[name].bias is not None
        assert torch.equal(b.layers[name].bias, layer.bias.half().float())  # type: ignore[union-attr]
    state_a, state_b = a.module.state_dict(), b.module.state_dict()
    for key in ("preactivation.weight", "preactivation.running_var"):
        assert state_b[key].dtype == torch.float32
        assert torch.equal(state_b[key], state_a[key].half().float())
    assert state_b["preactivation.num_batches_tracked"].dtype == torch.int64


def test_what_would_overflow_in_half_precision_stays_single(tmp_path: Path) -> None:
    made = Written(tmp_path / "model.safetensors")
    with torch.no_grad():
        made.student.get_submodule("preactivation").running_var[0] = 1e6  # type: ignore[index,operator]
    write_checkpoint(made.path, made.student, made.layers, made.info, torch.float16)
    assert load_checkpoint(made.path).module.state_dict()["preactivation.running_var"][0] == 1e6


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 0.999])
def test_a_truncated_file_is_refused(written: Written, share: float) -> None:
    content = written.path.read_bytes()
    written.path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CoraqError, match="damaged"):
        load_checkpoint(written.path)


def test_every_flipped_bit_is_found(written: Written) -> None:
    content = written.path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    # everywhere in the tensors and in the metadata; the header's own framing is the reader's business
    positions = torch.randint(8, len(content), (60,), generator=generator).tolist()
    for position in [*positions, len(content) - 1]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        written.path.write_bytes(damaged)
        with pytest.raises(CoraqError):
            load_checkpoint(written.path)
    written.path.write_bytes(content)
    load_checkpoint(written.path)


def test_a_pickle_is_refused_before_anything_of_it_runs(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "exploded",)

    for protocol in (2, 5):
        path = tmp_path / f"model-{protocol}.safetensors"
        path.write_bytes(pickle.dumps(Bomb(), protocol))
        with pytest.raises(CoraqError, match="is a pickle, not safetensors"):
            load_checkpoint(path)
    path = tmp_path / "zip.safetensors"
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(CoraqError, match="is a pickle, not safetensors"):
        load_checkpoint(path)
    assert not (tmp_path / "exploded").exists()


def test_float_weights_are_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    save_file(small_network().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(CoraqError, match="not a coraq checkpoint"):
        load_checkpoint(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CoraqError, match=r"no checkpoint .*/nowhere"):
        load_checkpoint(tmp_path / "nowhere")


def test_another_architecture_is_refused(written: Written) -> None:
    with pytest.raises(CoraqError, match=r"no module|of another architecture"):
        load_checkpoint(with_info(written, architecture="resnet10t"))


def test_another_size_of_the_same_architecture_is_refused(written: Written) -> None:
    with pytest.raises(CoraqError, match=r"another shape|of another architecture"):
        load_checkpoint(with_info(written, model_args={"num_classes": 11}))


def test_an_architecture_that_timm_does_not_know_is_refused_with_a_way_out(written: Written) -> None:
    with pytest.raises(CoraqError, match="no architecture 'resnet9000'") as caught:
        load_checkpoint(with_info(written, architecture="resnet9000"))
    assert "--plugins-dir" in caught.value.hint


def test_a_checkpoint_of_a_later_version_is_refused_with_the_key_that_is_new(written: Written) -> None:
    tensors = load_file(written.path)
    with safe_open(written.path, "pt") as file:
        about = json.loads(file.metadata()["coraq"])
    about["something_new"] = 1
    text = json.dumps(about)
    save_file(tensors, written.path, {"coraq": text, "sha256": content_digest(tensors, text)})
    with pytest.raises(CoraqError, match="something_new"):
        load_checkpoint(written.path)


@pytest.mark.parametrize("where", ["scale", "bias", "rest"])
def test_nan_is_refused(where: str, written: Written) -> None:
    # a checkpoint that was written with NaN in it has a right checksum
    if where == "rest":
        with torch.no_grad():
            written.student.get_submodule("preactivation").weight[0] = float("nan")  # type: ignore[index,operator]
    else:
        layer = written.layers["dense"]
        {"scale": layer.weight.scale, "bias": layer.bias}[where].view(-1)[0] = float("nan")  # type: ignore[union-attr]
    write_checkpoint(written.path, written.student, written.layers, written.info)
    with pytest.raises(CoraqError, match="finite"):
        load_checkpoint(written.path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(CoraqError, match="no room on the disk"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# -- the run folder


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    folder = RunFolder(tmp_path / "run")
    folder.open()
    yield folder
    folder.close()


def test_committed_layers_come_back_in_order_with_their_numbers(folder: RunFolder) -> None:
    layers = {f"layer{index}": random_layer((2, 3, 9), 3, kind, index) for index, kind in enumerate(KINDS)}
    for index, (name, layer) in enumerate(layers.items()):
        folder.save_layer(index, name, layer, {"error": 0.1 * index, "sweeps": index, "by": "text"})
    back = folder.committed()
    assert list(back) == list(layers)
    for index, (name, (layer, metrics)) in enumerate(back.items()):
        assert torch.equal(layer.dequantize(), layers[name].dequantize())
        assert metrics == {"error": 0.1 * index, "sweeps": index, "by": "text"}


@pytest.mark.parametrize("damage", [b"", b"\0" * 100, None])
def test_a_damaged_layer_ends_what_counts_as_committed(folder: RunFolder, damage: bytes | None) -> None:
    for index in range(4):
        folder.save_layer(index, f"layer{index}", random_layer((1, 2, 3), 4, "affine", index), {})
    victim = folder.path / "layers" / "0002.safetensors"
    victim.unlink() if damage is None else victim.write_bytes(damage)
    assert list(folder.committed()) == ["layer0", "layer1"]


def test_a_second_process_in_a_run_s_folder_is_refused(folder: RunFolder) -> None:
    with pytest.raises(CoraqError, match="another process is working in"):
        RunFolder(folder.path).open()


# -- the Python interface


def assert_same_outputs(a: nn.Module, b: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(a(images), b(images))


def loader(count: int = 8) -> torch.utils.data.DataLoader[Any]:
    images, labels = random_images(count), torch.arange(count) % 10
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=3)


@pytest.mark.parametrize("method", ["rtn", "comq"])
def test_quantize_takes_a_module_and_a_loader_and_leaves_the_module_alone(method: str, tmp_path: Path) -> None:
    network = small_network()
    before = copy.deepcopy(network.state_dict())
    module, result = coraq.quantize(network, method=method, bits=3, data=loader(), path=tmp_path / "model.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert list(network.state_dict()) == list(before)
    back = coraq.load(tmp_path / "model.safetensors").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert_same_outputs(back, module, random_images(2).contiguous(memory_format=torch.channels_last))
    assert [layer.bits for layer in result.layers] == [3] * 7
    assert result.size.file_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert result.calibration.count == 8
    assert result.fidelity is not None
    assert result.fidelity.sqnr_db > 3


def test_quantize_takes_a_tensor_a_scheme_and_options() -> None:
    scheme = Scheme.of(bits=4, first_bits=None, last_bits=None, symmetric=False)
    _, result = coraq.quantize(
        small_network(), "comq", data=random_images(6), scheme=scheme, options={"sweeps": 1}, calib_size=4
    )
    assert {layer.bits for layer in result.layers} == {4}
    assert result.config.options == {"sweeps": 1}
    assert result.calibration.count == 4


def test_more_bits_lose_less() -> None:
    sqnr = []
    for bits in (2, 4, 8):
        result = coraq.quantize(small_network(), "comq", bits, random_images(16)).result
        assert result.fidelity is not None
        sqnr.append(result.fidelity.sqnr_db)
    assert sqnr == sorted(sqnr)
    assert sqnr[2] > sqnr[0] + 10


def test_a_network_whose_classifier_was_replaced_can_be_read_back(tmp_path: Path) -> None:
    network = timm.create_model("test_resnet", num_classes=10).eval()
    network.reset_classifier(4)
    images = random_images(2, 32)
    module, _ = coraq.quantize(network, "rtn", data=images, path=tmp_path / "model.safetensors")
    back = coraq.load(tmp_path / "model.safetensors").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert_same_outputs(back, module, images.contiguous(memory_format=torch.channels_last))


def test_a_network_that_is_not_timm_s_can_be_quantized_but_not_written(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 5)).eval()
    with pytest.raises(CoraqError, match="only timm networks can be written"):
        coraq.quantize(network, "rtn", data=random_images(2), path=tmp_path / "model.safetensors")
    module, _ = coraq.quantize(network, "rtn", data=random_images(2))
    assert module(random_images(1)).shape == (1, 5)


def test_an_unknown_option_or_method_is_refused_before_anything_is_done() -> None:
    with pytest.raises(CoraqError, match="has no option 'sweep'"):
        coraq.quantize(small_network(), "comq", options={"sweep": 1}, data=random_images(1))
    with pytest.raises(CoraqError, match="unknown method"):
        coraq.quantize(small_network(), "no-such-method", data=random_images(1))


def test_a_network_with_nan_in_it_is_refused() -> None:
    network = small_network()
    with torch.no_grad():
        network.get_submodule("dense").weight[0, 0, 0, 0] = float("nan")  # type: ignore[index,operator]
    with pytest.raises(CoraqError, match=r"dense\.weight holds 1 NaN"):
        coraq.quantize(network, "rtn", data=random_images(1))
