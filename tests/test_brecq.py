"""BRECQ and QDrop, against finite differences, enumeration, and their own start."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import timm
import torch
from support.tasks import make_task, run_method
from torch import nn

from coraq import registry
from coraq.calibration.block_learning import RoundingLearner
from coraq.calibration.spill import LiveStorages
from coraq.calibration.task import CalibrationTask
from coraq.config import Scheme
from coraq.core.grid import mse_grid
from coraq.core.ranges import grid_between
from coraq.core.soft_rounding import LearnedGrid, SoftRounding, beta_at, squared_error
from coraq.errors import CoraqError
from coraq.methods.brecq import BRECQ, QDrop
from coraq.network.fold import fold
from coraq.registry import configure
from coraq.testing import random_images, randomise_batchnorm, small_network


def rounding(start: str = "float", bits: int = 3, trust: float = 0.0) -> tuple[torch.Tensor, SoftRounding]:
    weight = torch.randn(1, 6, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = mse_grid(weight, bits, symmetric=False)
    codes = None if start == "float" else (grid.codes(weight) + torch.randint(-1, 2, weight.shape)).clamp(0, grid.top)
    return weight, SoftRounding(weight, grid, codes, trust)


# ---------------------------------------------------------------- soft rounding


def test_trust_starts_at_the_base_codes_however_far_they_are_from_the_weight() -> None:
    weight, _ = rounding()
    grid = mse_grid(weight, 3, symmetric=False)
    codes = torch.randint(0, grid.top + 1, weight.shape, generator=torch.Generator().manual_seed(2)).double()
    assert float((codes - grid.position(weight)).abs().max()) > 3
    assert torch.equal(SoftRounding(weight, grid, codes, trust=0.75).codes(), codes)


def test_the_soft_weight_starts_at_the_float_weight() -> None:
    weight, soft = rounding()
    held = (weight - soft.grid.values(soft.floor)) / soft.grid.scale
    inside = (held > 0.011) & (held < 0.989)
    assert inside.float().mean() > 0.8
    torch.testing.assert_close(soft.weight()[inside], weight[inside])


def test_hard_rounding_moves_no_code_by_more_than_one_from_the_floor_or_the_base() -> None:
    generator = torch.Generator().manual_seed(1)
    for trust in (0.0, 0.5, 1.0):
        _, soft = rounding("codes", trust=trust)
        base = soft.floor.clone()
        started = soft.codes()
        with torch.no_grad():
            soft.alpha.add_(5 * torch.randn(soft.alpha.shape, generator=generator))
        codes = soft.codes()
        assert ((codes - soft.floor) >= 0).all()
        assert ((codes - soft.floor) <= 1).all()
        assert ((codes - started).abs() <= 1).all()
        assert int(codes.min()) >= 0
        assert int(codes.max()) <= soft.grid.top
        assert torch.equal(base, soft.floor)


def test_rounding_starts_at_its_base_codes() -> None:
    """With half trust, a start within one step of the float weight is kept until something is learned."""
    weight, _ = rounding()
    grid = mse_grid(weight, 3, symmetric=False)
    base = grid.codes(weight)
    other = torch.where(weight / grid.scale + grid.zero > base, base + 1, base - 1).clamp(0, grid.top)  # the far side
    for codes in (base, other):
        assert torch.equal(SoftRounding(weight, grid, codes, 0.75).codes(), codes)


def test_gradients_of_the_soft_rounding_are_those_of_finite_differences() -> None:
    _, soft = rounding()
    with torch.no_grad():
        soft.alpha.clamp_(-2, 2)  # where the rectified sigmoid is clipped it has no derivative
    torch.manual_seed(0)
    target = torch.randn_like(soft.alpha)

    def loss(alpha: torch.Tensor, beta: float) -> torch.Tensor:
        soft.alpha = alpha
        return ((soft.weight() - target) ** 2).sum() + 0.3 * soft.undecided(beta)

    for beta in (2.0, 7.5):
        alpha = soft.alpha.detach().clone().requires_grad_(True)
        assert torch.autograd.gradcheck(lambda a, beta=beta: loss(a, beta), (alpha,), eps=1e-6, atol=1e-5)


def test_the_regulariser_is_zero_only_where_all_is_decided() -> None:
    _, soft = rounding()
    assert float(soft.undecided(beta_at(0.0)).detach()) > 1
    with torch.no_grad():
        soft.alpha.copy_(torch.where(soft.alpha >= 0, 9.0, -9.0))
    assert float(soft.undecided(beta_at(1.0)).detach()) == 0
    assert beta_at(0.0) == 20
    assert beta_at(1.0) == beta_at(2.0) == 2


# ---------------------------------------------------------------- learned steps


@pytest.mark.parametrize("signed", [False, True])
def test_the_step_s_gradient_is_lsq_s(signed: bool) -> None:
    """Σ of q − x/s inside the range and of the bound outside, times 1/√(N·Qp)."""
    grid = grid_between(-1.0 if signed else 0.0, 2.0, 3, signed)
    learned = LearnedGrid(grid)
    x = torch.linspace(-3, 4, 200, requires_grad=True)
    learned(x).sum().backward()
    low, high = grid.low - grid.zero_point, grid.high - grid.zero_point
    unit = x.detach() / grid.scale
    level = unit.round().clamp(low, high)
    outside = (unit < low - 0.5) | (unit > high + 0.5)
    expected = torch.where(outside, level, level - unit).sum() / math.sqrt(200 * high) * grid.scale
    assert learned.log_factor.grad is not None
    torch.testing.assert_close(learned.log_factor.grad, expected)
    assert x.grad is not None
    assert torch.equal(x.grad == 0, outside)


def test_the_step_s_gradient_in_bfloat16_is_that_of_the_same_numbers_in_float32() -> None:
    grid = grid_between(0.0, 2.0, 4, False)
    x = (torch.rand(20_000, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()
    slope = torch.randn(20_000, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = {}
    for kind in (torch.float32, torch.bfloat16):
        learned, values = LearnedGrid(grid), x.to(kind).requires_grad_(True)
        rounded = learned(values)
        assert rounded.dtype == kind
        rounded.backward(slope.to(kind))
        assert learned.log_factor.grad is not None
        assert values.grad is not None
        found[kind] = rounded.detach(), values.grad, learned.log_factor.grad
    single, half = found[torch.float32], found[torch.bfloat16]
    assert torch.equal(half[0], single[0].bfloat16())
    assert torch.equal(half[1].float(), single[1])
    torch.testing.assert_close(half[2], single[2], rtol=0.02, atol=0)


def test_the_squared_error_and_its_slope_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    got = torch.randn(3, 4, 5, 2, generator=generator, dtype=torch.float64).to(memory_format=torch.channels_last)
    wanted = torch.randn(3, 4, 5, 2, generator=generator, dtype=torch.float64)
    got.requires_grad_(True)
    total = squared_error(got, wanted)
    torch.testing.assert_close(total.double(), (got - wanted).square().sum(), rtol=1e-6, atol=0)
    (3 * total).backward()
    torch.testing.assert_close(got.grad, 6 * (got - wanted).detach())
    half = got.detach().bfloat16().requires_grad_(True)
    squared_error(half, wanted.float()).backward()
    assert half.grad is not None
    torch.testing.assert_close(half.grad.double(), 2 * (got - wanted).detach(), rtol=0.02, atol=0.05)


def test_a_learned_step_stays_positive_and_starts_at_the_grid() -> None:
    grid = grid_between(0.0, 2.0, 4, False)
    learned = LearnedGrid(grid)
    x = torch.rand(50) * 3
    assert torch.equal(learned(x).detach(), grid.round(x))
    assert learned.result() == grid
    with torch.no_grad():
        learned.log_factor.fill_(-30)
    assert learned.result().scale > 0


def test_dropping_keeps_the_wanted_share_float() -> None:
    grid = grid_between(0.0, 2.0, 2, False)
    x = torch.rand(4000) * 2
    learned = LearnedGrid(grid, 0.5, torch.Generator().manual_seed(0))
    kept = (learned(x).detach() == x).float().mean()
    assert 0.45 < float(kept) < 0.55
    assert not torch.equal(learned(x), learned(x))


# ---------------------------------------------------------------- the method


def resnet() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("resnet18", num_classes=10, layers=[1, 1, 1, 1], channels=[8, 8, 16, 16])
    randomise_batchnorm(model.eval(), torch.Generator().manual_seed(1), random_images(8, 32))
    return model


def solved(method: Any, scheme: Scheme, model: nn.Module, size: int = 32, **options: Any) -> CalibrationTask:
    found = fold(model, random_images(2, size))
    task = make_task(model, scheme, list(random_images(24, size, seed=3).split(8)), found=found, seed=5)
    return run_method(task, method, options)


def metrics(task: CalibrationTask, key: str) -> dict[str, float]:
    return {name: float(numbers[key]) for name, (_, numbers) in task.committed.items()}


@pytest.mark.parametrize(("method", "learn"), [(BRECQ, "none"), (BRECQ, "steps"), (BRECQ, "all"), (QDrop, "all")])
@pytest.mark.parametrize("act_bits", [None, 4])
def test_a_block_never_ends_worse_than_its_start_and_one_pass_does(
    method: Any, learn: str, act_bits: int | None
) -> None:
    options = {"iterations": 60, "initial_codes": "nearest", "batch": 16, "learn": learn}
    task = solved(method, Scheme.of(bits=2, act_bits=act_bits), resnet(), **options)
    start, end = metrics(task, "block_start_error"), metrics(task, "block_error")
    assert all(end[name] <= start[name] for name in start)
    assert any(end[name] < 0.98 * start[name] for name in start)
    assert task.traversal.passes == 1


@pytest.mark.parametrize("learn", ["none", "steps", "all"])
def test_the_committed_student_has_the_block_error_that_was_reported(learn: str) -> None:
    """What is measured on the cached data is what the engine's own student does."""
    scheme = Scheme.of(bits=3, act_bits=4)
    task = solved(BRECQ, scheme, resnet(), iterations=20, learn=learn, bias_lr=1e-3, correction=1.0, holdout=0.0)
    outputs = []
    for network in (task.teacher, task.student):
        got: list[torch.Tensor] = []
        handle = network.get_submodule("layer2").register_forward_hook(lambda m, a, y, got=got: got.append(y.clone()))
        for x in task.batches():
            network(x)
        handle.remove()
        outputs.append(torch.cat(got).double())
    wanted, found = outputs
    error = (found - wanted).square().sum() / (wanted - wanted.mean()).square().sum()
    reported = metrics(task, "block_error")["layer2.0.conv1"]
    assert float(error) == pytest.approx(reported, rel=1e-3)


@pytest.mark.parametrize(("name", "scale_correction"), [("comq", "network"), ("rtn", "off")])
def test_a_unit_s_start_is_what_the_method_itself_makes_of_the_network(name: str, scale_correction: Any) -> None:
    """Roundings that do not move leave the codes of a plain run, layer after layer, unit after unit."""
    scheme = Scheme.of(bits=2, scale_correction=scale_correction)
    plain = solved(registry.load(name), scheme, resnet())
    task = solved(BRECQ, scheme, resnet(), initial_codes=name, rounds=0, learn="all", iterations=2, lr=1e-9)
    for layer, mine in task.quantized.items():
        theirs = plain.quantized[layer]
        assert torch.equal(mine.weight.codes, theirs.weight.codes), layer
        assert torch.allclose(mine.weight.scale, theirs.weight.scale, rtol=1e-5)
        assert mine.bias is not None
        assert theirs.bias is not None
        assert torch.allclose(mine.bias, theirs.bias, atol=1e-5)
    assert task.traversal.passes == 1


def test_layers_that_read_one_tensor_get_one_learned_grid() -> None:
    options = {"iterations": 30, "guard": False, "rounds": 0, "learn": "steps"}
    task = solved(BRECQ, Scheme.of(bits=4, act_bits=4), resnet(), act_lr=0.05, **options)
    first, second = (task.quantized[name].input for name in ("layer2.0.conv1", "layer2.0.downsample.0"))
    assert first is not None
    assert first == second
    plain = solved(BRECQ, Scheme.of(bits=4, act_bits=4), resnet(), act_lr=0, **options)
    assert plain.quantized["layer2.0.conv1"].input != first


def test_searched_steps_are_of_the_calibrated_ones_and_lower_the_error() -> None:
    """At 2 bits the step of least error in the tensor is not that of least error in the unit's output."""
    scheme = Scheme.of(bits=8, act_bits=2, act_first_bits=2, act_last_bits=2)
    plain = solved(BRECQ, scheme, resnet(), rounds=0, eight_bit_blocks=True)
    task = solved(BRECQ, scheme, resnet(), rounds=1, eight_bit_blocks=True)
    # of the first unit: what later ones read differs
    first = plain.quantized["conv1"].input
    found = task.quantized["conv1"].input
    assert first is not None
    assert found is not None
    assert min(abs(found.scale / first.scale - factor) for factor in (0.7, 0.85, 1.0, 1.15, 1.3)) < 1e-6
    ratios = []
    for name, layer in task.quantized.items():
        one, other = layer.input, plain.quantized[name].input
        assert one is not None
        assert other is not None
        ratios.append(one.scale / other.scale)
    assert any(ratio != 1 for ratio in ratios)
    assert metrics(task, "block_error")["layer1.0.conv1"] < metrics(plain, "block_error")["layer1.0.conv1"]


class OneLinear(nn.Module):
    """A block of one small linear layer whose roundings can all be tried."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(6, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.mean((2, 3)).repeat(1, 2) * torch.tensor([1.0, 2, 3, 1.5, -2, 0.5]) + x[:, 0, 0, :6])


@pytest.mark.parametrize(
    ("learn", "start", "zero_point", "exact"),
    [
        ("all", "nearest", 0, 4),
        ("all", "comq", 0, 6),
        ("all", "comq", "auto", 5),
        ("steps", "comq", "auto", 5),
    ],
)
def test_a_single_linear_layer_is_solved_as_by_enumeration(learn: str, start: str, zero_point: Any, exact: int) -> None:
    """Against all 4⁶ codes of six channels: all but one at the most from comq, most from the nearest (the paper)."""
    found_exactly = 0
    for seed in range(3):
        model = OneLinear().eval()
        model.layer.weight.data = 0.3 * torch.randn(2, 6, generator=torch.Generator().manual_seed(seed))
        edges = {"first_bits": None, "last_bits": None}
        scheme = Scheme.of(
            bits=2, **edges, bias_correction="off", scale_correction="off", zero_point_fraction=zero_point
        )
        batches = list(random_images(64, 8, seed=3).split(32))
        task = make_task(model, scheme, batches, found=fold(model, random_images(2, 8)), seed=5)
        data = task.block_io(task.partition()[0])
        inputs, wanted = data.student_input, data.teacher_output
        options = {"iterations": 800, "initial_codes": start, "batch": 64, "trust": 0.0, "patience": 0, "learn": learn}
        options["rounds"] = int(learn == "steps")
        run_method(task, BRECQ, options)
        chosen = task.quantized["layer"].weight
        every = torch.cartesian_prod(*[torch.arange(4.0)] * 6)  # [4096, 6]
        for row in range(2):
            zero = float(chosen.zero[0, row])
            codes = torch.cat((chosen.codes[0, row].float()[None], every))
            outputs = inputs @ ((codes - zero) * chosen.scale[0, row]).T
            own, *others = (outputs - wanted[:, row : row + 1]).square().sum(0).tolist()
            assert own <= 1.15 * min(others)
            found_exactly += own <= 1.00001 * min(others)
    assert found_exactly >= exact


def test_learning_ends_where_looks_show_no_gain_and_the_best_look_is_the_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, list[float]] = {}
    look = RoundingLearner.look

    def watched(self: RoundingLearner, weights: bool, best: float) -> float:
        error = look(self, weights, best)
        seen.setdefault(self.state.views[0].name, []).append(error)
        return error

    monkeypatch.setattr(RoundingLearner, "look", watched)
    options = {"iterations": 60, "patience": 5, "eight_bit_blocks": True, "initial_codes": "nearest", "rounds": 0}
    task = solved(QDrop, Scheme.of(bits=2, act_bits=4), resnet(), **options)
    errors, starts, taken = (metrics(task, key) for key in ("block_error", "block_start_error", "iterations"))
    assert len(seen) > 3
    gained = 0
    for name, looks in seen.items():
        assert taken[name] == 5 * len(looks) or taken[name] == 60
        idle = [error >= min([starts[name], *looks[:i]]) for i, error in enumerate(looks)]
        assert not any(a and b for a, b in itertools.pairwise(idle[:-1]))
        assert taken[name] == 60 or (idle[-1] and idle[-2])
        assert errors[name] == min(*looks, starts[name])
        gained += errors[name] < starts[name]
    assert min(taken.values()) < 60
    assert gained


def test_patience_ends_learning_early_and_none_takes_all_steps() -> None:
    long = solved(BRECQ, Scheme.of(bits=4), resnet(), iterations=200, patience=0, eight_bit_blocks=True, learn="all")
    short = solved(BRECQ, Scheme.of(bits=4), resnet(), iterations=200, patience=5, eight_bit_blocks=True, learn="all")
    assert set(metrics(long, "iterations").values()) == {200}
    taken = metrics(short, "iterations")
    assert max(taken.values()) <= 200
    assert min(taken.values()) < 200


def test_the_paper_s_preset_is_the_paper_s() -> None:
    config = configure(BRECQ, {"preset": "paper"})
    assert (config.iterations, config.lr, config.initial_codes, config.trust) == (20000, 1e-3, "nearest", 0)  # type: ignore[attr-defined]
    assert configure(BRECQ, {"preset": "paper", "iterations": 7}).iterations == 7  # type: ignore[attr-defined]
    assert configure(QDrop, {"preset": "paper"}).drop == 0.5  # type: ignore[attr-defined]
    assert configure(QDrop, {"preset": "paper"}).joint  # type: ignore[attr-defined]


def test_products_are_in_bfloat16_where_the_device_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def codes(has: bool, **options: Any) -> list[torch.Tensor]:
        monkeypatch.setattr("coraq.calibration.block_learning.multiplies_bfloat16", lambda device: has)
        task = solved(BRECQ, Scheme.of(bits=2), resnet(), iterations=30, guard=False, learn="all", **options)
        return [layer.weight.codes for layer in task.quantized.values()]

    def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    single, half = codes(True, precision="float32"), codes(False, precision="bfloat16")
    assert not same(single, half)
    assert same(codes(False), single)
    assert same(codes(True), half)
    seen: list[set[torch.dtype]] = []
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    monkeypatch.setattr(
        "coraq.calibration.block_learning.squared_error",
        lambda got, wanted: seen.append({got.dtype}) or squared_error(got, wanted),
    )
    for precision, kind in kinds.items():
        seen.clear()
        codes(True, precision=precision)
        assert seen
        assert set.union(*seen) == {kind}  # to the end of a unit, its residual sum included
    assert configure(BRECQ, {"preset": "paper"}).precision == "float32"  # type: ignore[attr-defined]


def test_fisher_information_is_that_of_the_float_network_and_changes_the_result() -> None:
    model = resnet()
    task = make_task(model, Scheme(), [random_images(6, 32)], found=fold(model, random_images(2, 32)), seed=1)
    units = task.partition()
    head = units[-1]
    weigh = task.fisher(head)
    assert weigh.shape == (6, 10)
    # at the logits the gradient of a drawn label's log-probability is one-hot minus the softmax
    probability = model(random_images(6, 32)).softmax(1)
    error = weigh[:, None] - (torch.eye(10)[None] - probability[:, None]).square()
    assert float(error.abs().amax(2).amin(1).max()) < 1e-5
    task.close()
    plain = solved(BRECQ, Scheme.of(bits=2), resnet(), iterations=30, guard=False, learn="all")
    other = solved(BRECQ, Scheme.of(bits=2), resnet(), iterations=30, guard=False, learn="all", loss="fisher")
    assert any(
        not torch.equal(plain.quantized[name].weight.codes, other.quantized[name].weight.codes)
        for name in plain.quantized
    )


def test_block_data_past_the_memory_bound_waits_in_files(tmp_path: Any) -> None:
    def codes(bound: int | None) -> list[torch.Tensor]:
        model = small_network()
        found = fold(model, random_images(2))
        batches = list(random_images(12, seed=3).split(4))
        task = make_task(model, Scheme.of(bits=3), batches, found=found, memory_bytes=bound, folder=tmp_path)
        run_method(task, BRECQ, {"iterations": 5})
        return [layer.weight.codes for layer in task.quantized.values()]

    for one, other in zip(codes(None), codes(1), strict=True):
        assert torch.equal(one, other)
    assert not list(tmp_path.iterdir())


def test_a_units_data_and_the_passes_that_wait_share_the_memory_bound(tmp_path: Any) -> None:
    model = small_network()
    found = fold(model, random_images(2))
    batches = list(random_images(32, seed=3).split(1))

    def widest(bound: int | None) -> int:
        task = make_task(model, Scheme.of(bits=3), batches, found=found, memory_bytes=bound, folder=tmp_path)
        live, alive = LiveStorages([model, task.student], batches), []
        with live:
            for unit in task.partition():
                data = task.block_io(unit)
                data_bytes = sum(x.nbytes for x in (data.student_input, data.teacher_input, data.teacher_output))
                alive.append(live.bytes_alive() - data_bytes + data.held_bytes)  # what waits in files is not in memory
                layers = task.quantize_block_with(data, "rtn")
                data.close()
                for name, layer in layers.items():
                    task.commit(name, layer)
        task.finish("rtn")
        return max(alive)

    unbounded = widest(None)
    assert widest(unbounded // 2) <= unbounded // 2 < unbounded


def test_a_block_method_needs_images() -> None:
    model = small_network()
    task = make_task(model, Scheme(), [], found=fold(model, random_images(2)))
    with pytest.raises(CoraqError, match="needs calibration images"):
        run_method(task, BRECQ)
