"""Quantized activations: which tensors have a grid, what it is, and that what is read back computes the same."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.tasks import make_task
from torch import Tensor, nn

import coraq
from coraq.activations.fake_quant import FakeQuantModule, fake_quant_of, set_fake_quant
from coraq.activations.points import QuantizationPoint, find_quantization_points
from coraq.artifact import RunFolder, load_checkpoint, read_result
from coraq.artifact.checkpoint import CheckpointInfo, read_checkpoint
from coraq.calibration.statistics import STUDENT
from coraq.calibration.task import CalibrationTask
from coraq.cli.app import run as command
from coraq.config import LayerScheme, RunConfig, Scheme
from coraq.core.fake_quantize import fake_quantize
from coraq.core.ranges import RangeSample, activation_grid, grid_between
from coraq.core.tensors import ActivationGrid, QuantizedLayer
from coraq.errors import CoraqError
from coraq.methods.rtn import RoundToNearest
from coraq.network.fold import fold
from coraq.testing import random_images, randomise_batchnorm, small_network
from coraq.testing.oracles import hook_count, plain_inputs

A4 = Scheme.of(act_bits=4)
INTEGER = Scheme.of(act_bits=4, act_placement="integer")


def network(name: str, **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=10, **arguments).eval()
    randomise_batchnorm(model, torch.Generator().manual_seed(1), random_images(4, 32))
    return model


def tiny_resnet() -> nn.Module:
    return network("resnet18", layers=[2, 1, 1, 1], channels=[8, 8, 16, 16], stem_width=8)


def sites_of(model: nn.Module, scheme: Scheme, size: int = 32) -> tuple[dict[str, QuantizationPoint], list[str]]:
    found = fold(model, random_images(2, size))
    assert found.flow is not None
    points, lost = find_quantization_points(model, found.order, found.flow, scheme)
    return {point.name: point for point in points}, lost


def task_of(model: nn.Module, scheme: Scheme, size: int = 16, **more: Any) -> CalibrationTask:
    found = fold(model, random_images(2, size))
    return make_task(model, scheme, list(random_images(6, size, seed=3).split(4)), found=found, **more)


# ---------------------------------------------------------------- the grid itself


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_grid_rounds_to_the_nearest_level_and_only_once(bits: int, signed: bool) -> None:
    low = -0.7 if signed else 0.0
    grid = grid_between(low, 1.9, bits, signed)
    x = torch.linspace(-1.5, 2.5, 1001)
    levels = torch.tensor([grid.scale * (c - grid.zero_point) for c in range(grid.low, grid.high + 1)])
    nearest = levels[(x[:, None] - levels).abs().argmin(1)]
    assert ((grid.round(x) - x).abs() <= (nearest - x).abs() + 1e-6).all()
    assert torch.equal(grid.round(grid.round(x)), grid.round(x))
    codes = grid.codes(x)
    assert grid.low <= int(codes.min()) <= int(codes.max()) <= grid.high
    assert torch.allclose((codes - grid.zero_point) * grid.scale, grid.round(x))
    assert float(grid.round(torch.zeros(1))) == 0  # padding is zeros
    grid.check()


@pytest.mark.parametrize(
    ("zero_point", "low", "high"), [(-3, -8, 7), (0, 0, 15), (5, 0, 15), (-128, -128, 127), (1, 0, 3)]
)
@pytest.mark.parametrize("scale", [0.25, 0.1733, 3e-5, 1e6])
def test_levels_are_torch_s_to_the_bit(scale: float, zero_point: int, low: int, high: int) -> None:
    """Ties, where the codes end, and far beyond."""
    scale = float(torch.tensor(scale))
    steps = torch.cat([torch.arange(-600, 600) / 2, torch.randn(1000) * 20, torch.randn(100) * 1e8])
    for x in (steps * scale, (steps * scale).reshape(5, 20, -1).transpose(0, 2)):
        wanted = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)
        assert torch.equal(fake_quantize(x, scale, zero_point, low, high), wanted)


def test_levels_of_what_is_not_finite() -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert fake_quantize(x, 0.5, 0, -8, 7).nan_to_num(nan=9.0).tolist() == [3.5, -4.0, 9.0]


def test_levels_hand_gradients_on_inside_the_range() -> None:
    x = torch.tensor([-1.0, 0.3, 0.6, 9.0], requires_grad=True)
    fake_quantize(x, 0.5, 0, 0, 7).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_a_grid_that_is_none_is_refused() -> None:
    for bad in (
        ActivationGrid(0.0, 0, 4, False),
        ActivationGrid(float("nan"), 0, 4, False),
        ActivationGrid(1.0, 16, 4, False),
        ActivationGrid(1.0, 0, 0, False),
    ):
        with pytest.raises(ValueError, match="activation grid"):
            bad.check()


@pytest.mark.parametrize("bits", [2, 4])
def test_the_mse_range_is_no_worse_than_any_range_on_a_fine_grid(bits: int) -> None:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0)).relu()
    high = float(values.max())

    def loss(grid: ActivationGrid) -> float:
        return float((grid.round(values) - values).abs().pow(2.4).sum())

    best = min(loss(grid_between(0, high * s / 400, bits, False)) for s in range(8, 401))
    assert loss(activation_grid(values, 0.0, high, bits)) <= 1.02 * best


def test_a_signed_range_moves_both_ends() -> None:
    """SiLU: a short bounded negative side and a long positive one."""
    values = nn.functional.silu(3 * torch.randn(20000, generator=torch.Generator().manual_seed(0)))
    grid = activation_grid(values, float(values.min()), float(values.max()), 4)
    assert grid.signed
    symmetric = grid_between(-float(values.max()), float(values.max()), 4, True)
    error, worse = ((g.round(values) - values).square().mean() for g in (grid, symmetric))
    assert float(error) < 0.4 * float(worse)


def test_percentiles_leave_outliers_out() -> None:
    values = torch.cat([torch.linspace(0, 1, 9999), torch.tensor([100.0])])
    grid = activation_grid(values, 0.0, 100.0, 8, "percentile", 99.9)
    assert grid.scale * 255 == pytest.approx(0.999, abs=1e-2)
    assert activation_grid(values, 0.0, 100.0, 8, "percentile", 100).scale * 255 == pytest.approx(100)


def test_a_tensor_of_zeros_gets_a_grid() -> None:
    sample = RangeSample(1)
    sample.add(torch.zeros(1, 2, 3, 3))
    grid = sample.grid(4)
    grid.check()
    assert not grid.signed
    assert float(grid.round(torch.zeros(1))) == 0


# ---------------------------------------------------------------- where grids lie


def test_layers_that_read_the_same_tensor_share_a_grid() -> None:
    points, lost = sites_of(tiny_resnet(), A4)
    assert points["layer3.0.conv1.input"].readers == ("layer3.0.conv1", "layer3.0.downsample.0")
    assert all(point.producer is None for point in points.values())
    assert not lost
    assert points["conv1.input"].bits == 8
    assert points["fc.input"].bits == 8
    assert {point.bits for name, point in points.items() if name not in ("conv1.input", "fc.input")} == {4}


def test_every_layer_reads_exactly_one_site() -> None:
    for scheme in (A4, INTEGER):
        model = tiny_resnet()
        found = fold(model, random_images(2, 32))
        assert found.flow is not None
        points, _ = find_quantization_points(model, found.order, found.flow, scheme)
        assert sorted(itertools.chain(*(point.readers for point in points))) == sorted(found.order)


def test_integer_placement_covers_outputs_and_residual_sums() -> None:
    points, lost = sites_of(tiny_resnet(), INTEGER, 64)
    assert not lost
    # a convolution's output that the residual sum reads, with no activation between
    assert points["layer1.0.conv2.output"].producer == "layer1.0.conv2"
    assert points["layer2.0.downsample.0.output"].readers == ()
    # a sum goes through its activation; the next block's layers and its shortcut read it quantized
    assert points["layer1.0.act2.output"].readers == ("layer1.1.conv1",)
    # the last sum is pooled; the pooled tensor has its own grid
    assert points["layer4.0.act2.output"].readers == ()
    assert points["fc.input"].producer is None
    # what only layers read needs no second grid
    assert "layer1.0.act1.output" not in points
    assert "fc.output" not in points


def test_max_pooling_hands_the_grid_on() -> None:
    """It moves values only: the layer behind it and the shortcut read what is on a grid already."""
    points, _ = sites_of(network("resnet18", layers=[1, 1, 1, 1], channels=[64, 8, 8, 8]), INTEGER)
    assert points["act1.output"].readers == ("layer1.0.conv1",)


def test_integer_placement_covers_squeeze_and_excite_products() -> None:
    points, lost = sites_of(network("mobilenetv3_small_050"), INTEGER)
    assert not lost
    assert "blocks.0.0.se.conv_expand.output" not in points  # its gate is an activation, whose output is multiplied
    assert points["blocks.0.0.se.gate.output"].readers == ()
    assert points["blocks.0.0.conv_pw.input"].producer is None  # the product: only this layer reads it
    assert points["blocks.0.0.bn1.output"].readers == ()  # read by the pooling and by the product


def test_an_override_gives_a_layer_s_input_its_own_bits() -> None:
    scheme = Scheme.of(act_bits=4, overrides={r"layer2\.0\.conv1": LayerScheme(bits=4, act_bits=7)})
    points, _ = sites_of(tiny_resnet(), scheme)
    assert points["layer2.0.conv1.input"].bits == 7


def test_a_float_scheme_has_no_sites() -> None:
    assert sites_of(tiny_resnet(), Scheme()) == ({}, [])


class Twice(nn.Module):
    """One convolution that runs twice, and an in-place activation between two readers of one object."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.again(self.first(x)))
        y = self.left(x)
        return (y + self.right(x.relu_())).mean((2, 3))


def test_tensors_are_told_apart_by_version_and_tied_by_a_layer_that_runs_twice() -> None:
    points, _ = sites_of(Twice().eval(), Scheme.of(act_bits=4))
    assert {name: point.readers for name, point in points.items()} == {
        "first.input": ("first",),
        "again.input": ("again",),
        "left.input": ("left",),
        "right.input": ("right",),
    }


class HandsBack(nn.Module):
    """Reshapes that return the very tensor they were given, as resnest14d has them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.contiguous()).contiguous()
        return (self.second(x) + x.contiguous()).mean((2, 3))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("scheme", [A4, INTEGER], ids=["inputs", "integer"])
def test_an_operation_that_hands_its_input_back_is_none(scheme: Scheme) -> None:
    model = HandsBack().eval()
    found = fold(model, random_images(2))
    assert found.flow is not None
    assert not any(set(op.outputs) & set(op.inputs) for op in found.flow.ops)
    points, _ = sites_of(HandsBack().eval(), scheme)  # without that rule it never ends
    assert points["first.input"].readers == ("first",)


# ---------------------------------------------------------------- gridded modules


def test_a_gridded_module_copies_pickles_and_keeps_its_class_and_state() -> None:
    layer = nn.Conv2d(3, 4, 3)
    before = layer.state_dict().keys()
    grid = ActivationGrid(0.1, 0, 4, False)
    x = torch.randn(1, 3, 8, 8)
    expected = layer(grid.round(x))
    set_fake_quant(layer, "input", grid)
    assert isinstance(layer, nn.Conv2d)
    assert layer.state_dict().keys() == before
    assert hook_count(layer) == 0
    for one in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(one(x), expected)
        assert fake_quant_of(one).input == grid
    set_fake_quant(layer, "input", None)
    assert torch.equal(layer(x), nn.functional.conv2d(x, layer.weight, layer.bias))


# ---------------------------------------------------------------- calibration in one pass


def test_statistics_are_those_of_quantized_inputs() -> None:
    """The student's Gram at a layer is that of the inputs on their grid; the teacher's stay float."""
    task = task_of(small_network(), Scheme.of(bits=4, act_bits=2, bias_correction="off"), rows_per_input=0)
    for layer in task.layers[:3]:
        stats = task.stats(layer.name)
        teacher, student = stats.paired[0]
        grid = task.grids.grid_of(layer.name)
        assert grid is not None
        assert torch.equal(student, grid.round(student))
        assert student.unique().numel() <= 2**grid.bits
        assert teacher.unique().numel() > 2**grid.bits
        task.commit(layer.name, nearest(layer))
    task.close()


def nearest(layer: Any) -> QuantizedLayer:
    grid = layer.grid_spec(Scheme()).mse(layer.weight)
    return QuantizedLayer(grid.pack(grid.codes(layer.weight)))


@pytest.mark.parametrize("placement", ["inputs", "integer"])
def test_one_pass_gives_what_an_ordinary_forward_pass_sees(placement: str) -> None:
    """Each layer's grid is the one that a plain pass of the finished student would calibrate."""
    scheme = Scheme.of(bits=4, act_bits=4, act_placement=placement)  # type: ignore[arg-type]
    task = task_of(tiny_resnet(), scheme, size=32)
    RoundToNearest(RoundToNearest.Config()).quantize(task.scoped(RoundToNearest))
    task.finish("rtn")
    assert task.traversal.passes == 1
    assert not task.grids.missing
    assert hook_count(task.student) == 0
    images = list(task.batches())
    for point in task.grids.points:
        if point.producer is not None or not point.readers:
            continue
        reader = task.student.get_submodule(point.readers[0])
        sample = RangeSample(len(images))
        for x in images:
            sample.add(plain_inputs(task.student, x, [point.readers[0]])[point.readers[0]])
        assert fake_quant_of(reader).input == task.grids.grid(point) == sample.grid(point.bits)


def test_the_integer_student_puts_every_placed_tensor_on_its_grid() -> None:
    task = task_of(tiny_resnet(), INTEGER, size=32)
    RoundToNearest(RoundToNearest.Config()).quantize(task.scoped(RoundToNearest))
    task.finish("rtn")
    x = random_images(2, 32, seed=9)
    for point in task.grids.points:
        grid, seen = task.grids.grid(point), []
        assert grid is not None
        if point.producer is None:
            continue
        module = task.student.get_submodule(point.producer)
        handle = module.register_forward_hook(lambda m, a, y, seen=seen: seen.append(y.clone()))
        task.student(x)
        handle.remove()
        assert torch.equal(seen[0], grid.round(seen[0]))
        assert seen[0].unique().numel() > 1


def test_a_method_s_own_grid_serves_all_readers_and_cannot_be_contradicted() -> None:
    task = task_of(tiny_resnet(), A4, size=32)
    for layer in task.layers:
        given = None
        if layer.name == "layer2.0.conv1":
            task.stats(layer.name)
            calibrated = task.grids.grid_of(layer.name)
            assert calibrated is not None
            given = ActivationGrid(2 * calibrated.scale, 0, 4, False)
        quantized = nearest(layer)
        if layer.name == "layer2.0.downsample.0":
            wrong = ActivationGrid(0.5, 0, 4, False)
            with pytest.raises(CoraqError, match="another layer that reads the same tensor"):
                task.commit(layer.name, QuantizedLayer(quantized.weight, input=wrong))
        task.commit(layer.name, QuantizedLayer(quantized.weight, input=given))
        if given is not None:
            chosen = given
    assert task.quantized["layer2.0.downsample.0"].input == chosen
    assert fake_quant_of(task.student.get_submodule("layer2.0.downsample.0")).input == chosen
    task.finish("test")


def test_a_grid_where_activations_are_float_is_refused() -> None:
    task = task_of(small_network(), Scheme())
    layer = task.layers[0]
    with pytest.raises(CoraqError, match="the scheme leaves this tensor float"):
        task.commit(layer.name, QuantizedLayer(nearest(layer).weight, input=ActivationGrid(1.0, 0, 4, False)))
    task.close()


def test_quantizing_activations_needs_images() -> None:
    model = small_network()
    task = make_task(model, A4, [], found=fold(model, random_images(2)))
    with pytest.raises(CoraqError, match="needs calibration images"):
        RoundToNearest(RoundToNearest.Config()).quantize(task.scoped(RoundToNearest))


def test_spilled_micro_batches_give_the_same_grids(tmp_path: Path) -> None:
    records = []
    for bound in (None, 1):
        task = task_of(tiny_resnet(), INTEGER, size=32, memory_bytes=bound, folder=tmp_path)
        RoundToNearest(RoundToNearest.Config()).quantize(task.scoped(RoundToNearest))
        task.finish("rtn")
        assert bool(task.traversal.spilled) == (bound is not None)
        records.append(task.activations)
    assert records[0] == records[1]


# ---------------------------------------------------------------- written and read back

ARCHITECTURES = [
    ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}),
    ("mobilenetv3_small_050", {}),  # hard-swish, squeeze-excite
    ("mobilenetv2_035", {}),
    ("convnext_atto", {"depths": [1, 1, 1, 1]}),  # GELU, Linear, LayerNorm
    ("regnety_002", {}),
    ("densenet121", {"block_config": [1, 1, 1, 1]}),
]


@pytest.mark.parametrize("placement", ["inputs", "integer"])
@pytest.mark.parametrize(("name", "arguments"), ARCHITECTURES, ids=[name for name, _ in ARCHITECTURES])
def test_what_is_read_back_computes_the_same(
    name: str, arguments: dict[str, Any], placement: Any, tmp_path: Path
) -> None:
    x = random_images(2, 32, seed=2).contiguous(memory_format=torch.channels_last)
    scheme = Scheme.of(bits=8, act_bits=8, act_placement=placement)
    path = tmp_path / "model.safetensors"
    quantized = coraq.quantize(network(name, **arguments), "rtn", data=x, scheme=scheme, path=path)
    checkpoint = load_checkpoint(path)
    reloaded = checkpoint.module.to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(reloaded(x), quantized.module(x))
    gridded = [module for module in reloaded.modules() if isinstance(module, FakeQuantModule)]
    assert len(gridded) >= len(checkpoint.layers) * (placement == "inputs")
    for layer in checkpoint.layers.values():
        assert layer.input is not None


def test_the_checksum_covers_the_grids_and_old_files_still_load(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    coraq.quantize(small_network(), "rtn", data=random_images(4), scheme=A4, path=path)
    _, info = read_checkpoint(path)
    content = path.read_bytes()
    scale = repr(info.activations["stem.input"].scale).encode()
    changed = scale[:-1] + (b"1" if scale[-1:] != b"1" else b"2")
    path.write_bytes(content.replace(scale, changed, 1))
    with pytest.raises(CoraqError, match="checksum"):
        load_checkpoint(path)
    old = CheckpointInfo(architecture="x").model_dump(exclude={"activations", "scheme", "format_version"})
    old |= {"format_version": 1, "scheme": {"version": 1, "bits": 4}}
    wanted = Scheme.of(first_bits=8, last_bits=8, zero_point_fraction=0, column_scale="none")
    assert CheckpointInfo.model_validate(old) == CheckpointInfo(architecture="x", scheme=wanted)


def test_what_does_not_act_makes_no_other_run() -> None:
    symmetric = {
        RunConfig(model="demo", scheme=Scheme.of(symmetric=True, zero_point_fraction=z)).digest() for z in ZEROS
    }
    affine = {RunConfig(model="demo", scheme=Scheme.of(zero_point_fraction=z)).digest() for z in ZEROS}
    assert (len(symmetric), len(affine)) == (1, 2)  # a symmetric grid has its zero at the middle code either way
    digests = {RunConfig(model="demo", scheme=Scheme.of(act_bits=bits, act_placement=p)).digest() for bits, p in CASES}
    assert len(digests | {RunConfig(model="demo").digest()}) == len(CASES) + 1


ZEROS: list[Any] = ["auto", 0]
CASES: list[tuple[Any, Any]] = [(8, "inputs"), (8, "integer"), (4, "inputs")]


@pytest.mark.parametrize("placement", ["inputs", "integer"])
def test_a_killed_run_ends_as_if_nothing_had_happened(placement: Any, tmp_path: Path) -> None:
    scheme = Scheme.of(bits=4, act_bits=4, act_placement=placement)

    def run(folder: RunFolder, stop_after: int) -> CalibrationTask:
        task = task_of(tiny_resnet(), scheme, 32, done=folder.committed(), save=folder.save_layer)
        for layer in list(task.layers):
            if len(task.committed) == stop_after:
                task.close()
                return task
            task.commit(layer.name, nearest(layer))
        task.finish("test")
        return task

    total = len(task_of(tiny_resnet(), scheme, 32).layers)
    unbroken = RunFolder(tmp_path / "straight")
    unbroken.open()
    straight = run(unbroken, -1)
    unbroken.close()
    for after in (1, total // 2, total):
        folder = RunFolder(tmp_path / f"killed-{after}")
        folder.open()
        run(folder, after)
        resumed = run(folder, -1)
        folder.close()
        assert resumed.activations == straight.activations
        x = random_images(2, 32, seed=4)
        assert torch.equal(resumed.student(x), straight.student(x))


def test_the_command_line_quantizes_activations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "quantize",
        "demo",
        "--method",
        "rtn",
        "-w",
        "4",
        "--act-bits",
        "8",
        "--calib-size",
        "32",
        "--eval-size",
        "32",
        "-q",
    ]
    results = []
    for more in ([], ["--act-placement", "integer"]):
        assert command([*arguments, *more, "--output", str(tmp_path), "--json"]) == 0
        capsys.readouterr()
    for folder in tmp_path.glob("demo-rtn-w4a8-*"):
        results.append(read_result(folder))
    assert len(results) == 2
    for result in results:
        assert "W4A8" in result.scheme_line
        assert result.cost.bitops == sum(layer.macs * layer.bits * 8 for layer in result.layers)
        assert result.comparison is not None
        assert result.comparison.agreement.value_pct > 80


def test_streams_are_numbered_as_the_grids_think() -> None:
    from coraq.activations import grids as activations

    assert activations.STUDENT == STUDENT
