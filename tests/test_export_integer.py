"""The integer pattern: the checkpoint's grids and codes, on the runtime's integer kernels, all of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from support.exports import check_random, checkpoint_of, of_every_width, with_adapter, with_layers
from torch import Tensor, nn

import coraq
from coraq.artifact import Checkpoint, load_checkpoint
from coraq.cli.export import weights_text
from coraq.config import Scheme
from coraq.core.grid import minmax_grid
from coraq.core.tensors import QuantizedLayer
from coraq.errors import CoraqError
from coraq.export import verify
from coraq.export.float_graph import Place
from coraq.export.graph import Walk
from coraq.export.integer import find_integer_layers, raise_scales
from coraq.export.onnx_file import build_onnx
from coraq.export.onnx_rewrites import grid_pieces, name_pools, write_out_hard_swishes
from coraq.export.readback import as_written, inexact_layers
from coraq.export.runtimes import OnnxRuntime, run_all
from coraq.export.weights import Form
from coraq.testing import random_images

onnx = pytest.importorskip("onnx", reason="needs coraq[onnx]")
pytest.importorskip("onnxruntime", reason="needs coraq[onnx]")

pytestmark = pytest.mark.usefixtures("untimed")

CONVOLUTIONS = ("stem", "grouped", "depthwise", "pointwise", "dense")
BEHIND = ("act", "grouped_norm", "depthwise_norm")  # activations: their outputs are what the next layer reads


def observe(module: nn.Module, where: tuple[str, ...], bits: int = 8, signed: bool = False) -> None:
    """Min-max grids at the outputs of modules, at the images and at what `dense` and `hidden` read, by hooks."""
    top = 2**bits - 1
    grids: dict[Any, tuple[float, int, int, int]] = {}

    def on_grid(key: Any, x: Tensor) -> Tensor:
        if key not in grids:
            low, high = float(x.min().clamp(max=0)), float(x.max().clamp(min=0))
            scale = float(torch.tensor((high - low) / top))
            shift = 2 ** (bits - 1) if signed else 0
            grids[key] = (scale, round(-low / scale) - shift, -shift, top - shift)
        return torch.fake_quantize_per_tensor_affine(x, *grids[key])

    modules = dict(module.named_modules())
    for name in where:
        modules[name].register_forward_hook(lambda m, a, y, name=name: on_grid((name, y.shape[1:]), y))
    module.register_forward_pre_hook(lambda m, args: (on_grid("images", args[0]),))
    for name in ("dense", "hidden"):
        modules[name].register_forward_pre_hook(lambda m, args, name=name: (on_grid((name, "in"), args[0]),))
    with torch.no_grad():
        module(random_images(8))


@pytest.fixture
def gridded(tmp_path: Path) -> Checkpoint:
    checkpoint = checkpoint_of(tmp_path)
    observe(checkpoint.module, (*CONVOLUTIONS, *BEHIND))
    return checkpoint


@pytest.mark.parametrize("form", ["cast", "packed"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
def test_every_convolution_runs_on_integer_kernels(tmp_path: Path, form: Any, symmetric: bool) -> None:
    checkpoint = checkpoint_of(tmp_path, symmetric=symmetric)
    observe(checkpoint.module, (*CONVOLUTIONS, *BEHIND), signed=symmetric)
    export = build_onnx(checkpoint, form)
    assert export.label == "integer kernels"
    onnx.checker.check_model(onnx.load_from_string(export.content), full_check=True)
    found = check_random(checkpoint, export)
    assert found.failures == []
    assert found.codes_exact
    assert found.weights_exact
    assert found.integer_convolutions == found.quantized_convolutions == len(CONVOLUTIONS)
    assert found.largest_step in (0, 1)
    assert found.logits_error < 0.1


@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
def test_weights_of_every_width_reach_signed_integer_kernels(tmp_path: Path, symmetric: bool) -> None:
    checkpoint = of_every_width(tmp_path, symmetric)
    observe(checkpoint.module, (*CONVOLUTIONS, *BEHIND))
    export = build_onnx(checkpoint)
    assert len(export.content) - export.graph_bytes <= 1.02 * export.nominal_bytes
    found = check_random(checkpoint, export)
    assert found.failures == []
    assert found.codes_exact
    assert found.weights_exact
    assert found.integer_convolutions == len(CONVOLUTIONS)
    # unsigned weights take twice the time on x86: no instruction multiplies unsigned by unsigned
    optimised = onnx.load_from_string(OnnxRuntime(export.content, 1).optimised)
    stored = {i.name: i for i in optimised.graph.initializer}
    kinds = {stored[node.input[3]].data_type for node in optimised.graph.node if node.op_type == "QLinearConv"}
    assert kinds == {onnx.TensorProto.INT8}
    # ONNX Runtime before 1.25 refuses zero points that differ from channel to channel, and OpenVINO any
    for node in optimised.graph.node:
        if node.op_type == "QLinearConv":
            assert not onnx.numpy_helper.to_array(stored[node.input[5]]).any()
    assert not {"BitShift", "BitwiseAnd", "MatMulInteger", "Cast"} & {node.op_type for node in optimised.graph.node}


def test_a_nearly_dead_channel_is_counted_and_named(tmp_path: Path) -> None:
    def dying(name: str, layer: QuantizedLayer) -> QuantizedLayer:
        if name != "dense":
            return layer
        scale = layer.weight.scale.clone()
        scale[:, 3] = 1e-14
        return dataclasses.replace(layer, weight=dataclasses.replace(layer.weight, scale=scale))

    checkpoint = with_layers(checkpoint_of(tmp_path), dying)
    observe(checkpoint.module, (*CONVOLUTIONS, *BEHIND))
    export = build_onnx(checkpoint)
    found = check_random(checkpoint, export)
    assert found.failures == []
    assert found.inexact == {
        "dense": "scale raised in 1 of 24 channels, nearly dead ones",
        "stem": "codes rounded to symmetric 8 bits at load",
    }
    assert any("dense (1 of 24)" in note for note in export.notes)
    text = weights_text(found)
    assert "5 of 7 layers" in text
    assert "dense" in text
    # the other 23 channels are held to the bit
    model = onnx.load_from_string(export.content)
    stored = {i.name: i for i in model.graph.initializer}
    values = onnx.numpy_helper.to_array(stored["dense.weight_scale"]).copy()
    values[4] *= 1.001
    stored["dense.weight_scale"].raw_data = values.tobytes()
    failures = check_random(checkpoint, export, model.SerializeToString()).failures
    assert any("another weight of dense" in failure for failure in failures)


def test_grids_of_fewer_bits_clip(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path)
    observe(checkpoint.module, (*CONVOLUTIONS, *BEHIND), bits=4)
    found = check_random(checkpoint, build_onnx(checkpoint))
    assert found.failures == []
    assert found.integer_convolutions == len(CONVOLUTIONS)


def test_grids_at_inputs_alone_are_not_called_integer_kernels(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path)
    observe(checkpoint.module, ())
    export = build_onnx(checkpoint)
    assert export.label == "4- to 8-bit on disk, float in memory"
    assert check_random(checkpoint, export).failures == []


def test_column_scales_of_inputs_are_in_the_file(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, act_bits=4, column_scale="input")
    assert any(record.scaled for record in checkpoint.info.activations.values())
    export = build_onnx(checkpoint)
    assert export.label == "4- to 8-bit on disk, float in memory"
    assert check_random(checkpoint, export).failures == []


def test_a_bias_on_another_scale_is_found(gridded: Checkpoint) -> None:
    export = build_onnx(gridded)
    model = onnx.load_from_string(export.content)
    nodes = {name: node for node in model.graph.node for name in node.output}
    (conv,) = (node for node in model.graph.node if node.op_type == "Conv" and node.input[1] == "dense.weight")
    scale = nodes[nodes[conv.input[2]].input[1]]
    assert scale.op_type == "Mul"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.full(24, 0.01, np.float32), "wrong"))
    nodes[conv.input[2]].input[1] = "wrong"
    assert check_random(gridded, export, model.SerializeToString()).failures


def test_adapters_between_grids_become_int8_at_load(tmp_path: Path) -> None:
    checkpoint = with_layers(checkpoint_of(tmp_path), with_adapter)
    observe(checkpoint.module, (*CONVOLUTIONS, *BEHIND))
    found = check_random(checkpoint, build_onnx(checkpoint))
    assert found.failures == []
    assert found.integer_convolutions == len(CONVOLUTIONS)


@pytest.mark.parametrize("form", ["cast", "packed"])
def test_column_scales_between_grids_become_int8_at_load(tmp_path: Path, form: Form) -> None:
    """And their codes stay as narrow as they are, with zero points between them."""
    checkpoint = checkpoint_of(tmp_path, 2, column_scale="channel", zero_point_fraction=2)
    observe(checkpoint.module, (*CONVOLUTIONS, *BEHIND))
    export = build_onnx(checkpoint, form)
    found = check_random(checkpoint, export)
    assert found.failures == []
    assert found.codes_exact
    told = inexact_layers(checkpoint, export)
    assert {name for name, what in told.items() if "column scales" in what} == {
        "grouped",
        "pointwise",
        "dense",
        "hidden",
    }
    written = as_written(checkpoint, export).layers
    assert {name: written[name].weight.bits for name in ("dense", "depthwise")} == {"dense": 2, "depthwise": 4}
    (codes,) = (i for i in onnx.load_from_string(export.content).graph.initializer if i.name == "dense.weight_codes")
    assert len(codes.raw_data) == written["dense"].weight.codes.numel() * 2 // 8


def test_a_codebook_between_grids_is_refused(tmp_path: Path) -> None:
    table = torch.linspace(-1, 1, 16)

    def codebook(name: str, layer: QuantizedLayer) -> QuantizedLayer:
        if name != "dense":
            return layer
        return dataclasses.replace(layer, weight=dataclasses.replace(layer.weight, zero_point=None, codebook=table))

    checkpoint = with_layers(checkpoint_of(tmp_path), codebook)
    observe(checkpoint.module, (*CONVOLUTIONS, *BEHIND))
    with pytest.raises(CoraqError, match="codebook"):
        build_onnx(checkpoint)


def test_a_dead_channels_scale_is_raised_until_its_bias_fits() -> None:
    scale = np.array([0.01, 1e-14, 0.0, -1e-14], np.float32)
    bias = np.array([0.5, 0.5, 0.25, 0.5])
    raised = raise_scales(scale, bias, 0.02)
    assert raised is not None
    assert raised[0] == scale[0]
    assert np.all(np.abs(bias / (raised.astype(np.float64) * 0.02)) < 2**31)
    assert raised[3] < 0
    assert raise_scales(scale[:1], bias[:1], 0.02) is None


def test_a_convolution_before_a_silu_gets_the_grid_that_it_needs(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path)
    scheme = checkpoint.info.scheme.replace(act_bits=8, act_placement="integer")
    checkpoint = dataclasses.replace(checkpoint, info=checkpoint.info.model_copy(update={"scheme": scheme}))
    observe(checkpoint.module, ("stem", "grouped", "pointwise", "dense", *BEHIND))  # `depthwise` goes into a SiLU
    bare = check_random(checkpoint, build_onnx(checkpoint))
    assert bare.failures == ["4 of 5 quantized convolutions run on integer kernels"]
    export = build_onnx(checkpoint, calibration=random_images(8).numpy())
    found = check_random(checkpoint, export)
    assert found.failures == []
    assert found.integer_convolutions == 5
    assert any("1 convolutions" in note for note in export.notes)


def test_a_silu_between_grids_is_computed_on_codes(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path)
    scheme = checkpoint.info.scheme.replace(act_bits=8, act_placement="integer")
    checkpoint = dataclasses.replace(checkpoint, info=checkpoint.info.model_copy(update={"scheme": scheme}))
    observe(checkpoint.module, (*CONVOLUTIONS, *BEHIND))
    export = build_onnx(checkpoint)
    assert any("1 sigmoids between grids" in note for note in export.notes)
    kinds = OnnxRuntime(export.content, 1).kernels()
    assert "Sigmoid" not in kinds
    assert kinds["QLinearSigmoid"] == 1
    found = check_random(checkpoint, export)
    assert found.failures == []
    # the grid behind the sigmoid costs no more than the other roundings that an execution may take another way
    assert found.logits_error is not None
    assert found.logits_error < 0.1


@pytest.mark.parametrize("signed", [False, True])
def test_a_hard_swish_between_grids_is_computed_on_codes(signed: bool) -> None:
    """All 256 codes; a signed grid, which an integer sum does not take beside unsigned ones, is left alone."""
    helper, kind = onnx.helper, onnx.TensorProto
    dtype = np.int8 if signed else np.uint8
    values = {"s": np.float32(10 / 255), "z": dtype(0 if signed else 128), "t": np.float32(6 / 255), "u": np.uint8(16)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("HardSwish", ["xd"], ["y"]),
        helper.make_node("QuantizeLinear", ["y", "t", "u"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "t", "u"], ["yd"]),
    ]
    graph = helper.make_graph(
        nodes,
        "swish",
        [helper.make_tensor_value_info("x", kind.FLOAT, [1, 256])],
        [helper.make_tensor_value_info("yd", kind.FLOAT, [1, 256])],
        [onnx.numpy_helper.from_array(np.array(value), name) for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    codes = np.arange(256, dtype=np.float32)[None] - 128
    feeds = {"x": (codes * values["s"]).astype(np.float32)}
    (before,) = run_all(model.SerializeToString(), feeds, False)
    count = write_out_hard_swishes(model)
    assert count == (0 if signed else 1)
    onnx.checker.check_model(model)
    kinds = OnnxRuntime(model.SerializeToString(), 1).kernels()
    assert ("HardSigmoid" in kinds or "HardSwish" in kinds) == signed
    for optimised in (False, True):
        (after,) = run_all(model.SerializeToString(), feeds, optimised)
        # half a step of the gate times the input, and half a step of the output's own grid once more
        allowed = np.abs(feeds["x"]) * 0.51 / 255 + values["t"] * 1.01
        assert (np.abs(after - before) <= allowed).all()
    assert np.ptp(before) > 3


@pytest.mark.parametrize(
    ("axes", "keeps", "rank", "pooled"),
    [([2, 3], 1, 4, 1), ([-1, -2], 1, 4, 1), ([2, 3], 0, 4, 0), ([1, 2], 1, 4, 0), ([3], 1, 4, 0), ([2, 3], 1, 5, 0)],
)
def test_a_mean_is_written_as_a_pooling_only_where_it_is_one(
    axes: list[int], keeps: int, rank: int, pooled: int
) -> None:
    helper = onnx.helper
    shape = [2, 3, 4, 5, 6][:rank]
    kind = onnx.TensorProto.FLOAT
    made = helper.make_node("ReduceMean", ["moved", "axes"], ["y"], keepdims=keeps)
    graph = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["moved"]), made],
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [onnx.numpy_helper.from_array(np.array(axes), "axes")],
        value_info=[helper.make_tensor_value_info("moved", kind, shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    x = {"x": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    before = run_all(model.SerializeToString(), x, False)
    assert name_pools(model) == pooled
    np.testing.assert_allclose(run_all(model.SerializeToString(), x, False)[0], before[0], rtol=1e-5, atol=1e-6)


def gridded_graph(nodes: list[Any], *weights: Any) -> Any:
    """A model that reads x [1, 4, 5, 5] on a grid as `on_grid` and puts out y; scales 0.1, zero points 128."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    pairs = [onnx.numpy_helper.from_array(np.array(0.1, np.float32), "s")]
    pairs.append(onnx.numpy_helper.from_array(np.array(128, np.uint8), "z"))
    head = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "s", "z"], ["on_grid"]),
    ]
    graph = helper.make_graph(
        [*head, *nodes],
        "g",
        [helper.make_tensor_value_info("x", kind, [1, 4, 5, 5])],
        [helper.make_tensor_value_info("y", kind, None)],
        [*pairs, *weights],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_each_piece_of_a_split_tensor_is_on_its_grid() -> None:
    helper = onnx.helper
    split = helper.make_node("Split", ["on_grid"], ["a", "b", "unread"], axis=1, num_outputs=3)
    model = gridded_graph([split, helper.make_node("Concat", ["b", "a"], ["y"], axis=1)])
    x = {"x": np.random.default_rng(0).standard_normal((1, 4, 5, 5)).astype(np.float32)}
    before = run_all(model.SerializeToString(), x, False)[0]
    assert grid_pieces(model) == 2
    walk = Walk(model.graph)
    (joined,) = [node for node in model.graph.node if node.op_type == "Concat"]
    assert all(walk.grid_before(name) is not None for name in joined.input)
    np.testing.assert_array_equal(run_all(model.SerializeToString(), x, False)[0], before)


def test_a_weight_that_two_convolutions_read_is_one_layer_with_two_uses() -> None:
    helper = onnx.helper
    weight = np.ones((4, 4, 1, 1), np.float32)
    grid = ["s", "z"]
    nodes = [
        helper.make_node("Conv", ["on_grid", "w"], ["one"]),
        helper.make_node("QuantizeLinear", ["one", *grid], ["one_codes"]),
        helper.make_node("DequantizeLinear", ["one_codes", *grid], ["one_value"]),
        helper.make_node("Conv", ["one_value", "w"], ["two"]),
        helper.make_node("QuantizeLinear", ["two", *grid], ["two_codes"]),
        helper.make_node("DequantizeLinear", ["two_codes", *grid], ["y"]),
    ]
    model = gridded_graph(nodes, onnx.numpy_helper.from_array(weight, "w"))
    codes = minmax_grid(torch.from_numpy(weight).reshape(1, 4, 4), 4)
    layer = QuantizedLayer(codes.pack(codes.codes(torch.from_numpy(weight).reshape(1, 4, 4))))
    places = {name: Place("w", (4, 4, 1, 1)) for name in ("first", "second")}
    (found,) = find_integer_layers(model.graph, places, {"first": layer, "second": layer}).values()
    assert found.name == "first"
    assert [node.output[0] for node, _ in found.uses] == ["one", "two"]
    assert [scale for _, (_, scale) in found.uses] == pytest.approx([0.1, 0.1])


def exported(path: Path, network: Any, scheme: Scheme) -> verify.Check:
    """A timm network with activation grids, written, read back, exported and verified on 64-pixel images."""
    network.pretrained_cfg = {**network.pretrained_cfg, "input_size": (3, 64, 64), "test_input_size": None}
    images = random_images(8, 64)
    coraq.quantize(network, "rtn", data=images, scheme=scheme, path=path)
    checkpoint = load_checkpoint(path)
    export = build_onnx(checkpoint, calibration=images.numpy())
    batches = [(random_images(16, 64, seed=5), torch.full((16,), -1))]
    return verify.check_onnx(checkpoint, export, export.content, batches, "random", 1)


@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
def test_linear_layers_within_blocks_run_on_integer_kernels_and_put_out_float(tmp_path: Path, symmetric: bool) -> None:
    """ConvNeXt's: LayerNorm, Linear, GELU, Linear. The runtime's product of codes is exact, so no grid is needed."""
    torch.manual_seed(0)
    network = timm.create_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 16, 16, 24), num_classes=10).eval()
    scheme = Scheme.of(bits=4, symmetric=symmetric, act_bits=8, act_placement="integer")
    found = exported(tmp_path / "model.safetensors", network, scheme)
    assert found.failures == []
    assert found.codes_exact
    assert found.weights_exact
    assert found.integer_products == found.quantized_products == 8
    assert found.integer_convolutions == found.quantized_convolutions


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "convolutions"),
    [("mixnet_s", 123), ("gcresnext26ts", 55)],
    ids=["a tensor that is split", "two layers of equal weights"],
)
def test_every_convolution_of_awkward_networks_runs_on_integer_kernels(
    tmp_path: Path, name: str, convolutions: int
) -> None:
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=10).eval()
    scheme = Scheme.of(bits=4, act_bits=8, act_placement="integer")
    found = exported(tmp_path / "model.safetensors", network, scheme)
    assert found.failures == []
    assert found.codes_exact
    assert found.weights_exact
    assert found.integer_convolutions == found.quantized_convolutions == convolutions
