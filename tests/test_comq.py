"""Claims about the methods comq and rtn on layers of every shape, through a minimal task."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from support.one_layer import SHAPES, OneLayerTask, run

from coraq.api import LeastSquares, Quantizer
from coraq.core import rounding
from coraq.core.grid import minmax_grid, mse_grid
from coraq.methods.comq import COMQ
from coraq.methods.rtn import RoundToNearest


def test_both_satisfy_the_protocol() -> None:
    assert isinstance(COMQ(COMQ.Config()), Quantizer)
    assert isinstance(RoundToNearest(RoundToNearest.Config()), Quantizer)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", SHAPES)
def test_comq_never_worsens_nearest_rounding(kind: str, bits: int, symmetric: bool, granularity: str) -> None:
    task = OneLayerTask.random(SHAPES[kind], bits, symmetric=symmetric, granularity=granularity)
    quantized, metrics = run(COMQ, task)
    fraction = task.scheme.fraction(bits)
    nearest = mse_grid(task.squares.weight, bits, symmetric, granularity, fraction=fraction).round(task.squares.weight)
    assert metrics["error"] <= metrics["rtn_error"]
    # what the metrics say is what the committed weight does
    assert metrics["error"] == pytest.approx(task.error(quantized), rel=1e-3)
    assert metrics["rtn_error"] == pytest.approx(task.error(nearest), rel=1e-3)
    if granularity == "channel":
        assert bool((task.squares.error(quantized) <= task.squares.error(nearest) * (1 + 1e-4)).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_part_of_the_default_earns_its_place(bits: int) -> None:
    errors = {
        name: sum(
            run(COMQ, OneLayerTask.random((1, 32, 96), bits, seed, symmetric=True), **options)[1]["error"]
            for seed in range(3)
        )
        for name, options in {
            "default": {},
            "one range": {"candidates": 1},
            "min-max": {"grid": "minmax"},
            "no sweep": {"sweeps": 0},
            "nearest start": {"initial_codes": "nearest", "sweeps": 1},
            "fixed scales": {"scales": False},
            "paper": {"preset": "paper"},
        }.items()
    }
    rivals = {name: error for name, error in errors.items() if name != "default"}
    assert errors["default"] < min(rivals.values())
    assert errors["default"] < 0.9 * errors["paper"]


def test_paper_preset_is_the_released_routine_plus_scales() -> None:
    task = OneLayerTask.random((1, 12, 40), 3, symmetric=False)
    quantized, _ = run(COMQ, task, preset="paper", scales=False, sweeps=2)
    weight, gram = task.squares.weight[0].double(), task.squares.gram[0]
    grid = minmax_grid(task.squares.weight, 3, False)
    current = weight.clone()
    for _ in range(2):
        for i in range(weight.shape[1]):
            others = weight - current
            others[:, i] = 0
            target = weight[:, i] + others @ gram[:, i] / gram[i, i]
            scale, zero = grid.scale[0, :, 0].double(), grid.zero[0, :, 0].double()
            current[:, i] = scale * ((target / scale + zero).round().clamp(0, grid.top) - zero)
    assert torch.allclose(quantized[0].double(), current, atol=1e-5)
    refitted, _ = run(COMQ, OneLayerTask.random((1, 12, 40), 3, symmetric=False), preset="paper")
    assert task.error(refitted) < task.error(quantized)


def test_options_given_beside_a_preset_win() -> None:
    assert COMQ.Config(preset="paper").sweeps == 3
    assert COMQ.Config(preset="paper", sweeps=7, order="greedy").sweeps == 7
    assert COMQ.Config(preset="paper").guard is False
    assert COMQ.Config.model_validate(COMQ.Config(preset="paper").model_dump()) == COMQ.Config(preset="paper")
    with pytest.raises(ValidationError):
        COMQ.Config(sweep=3)


@pytest.mark.parametrize(
    "option",
    [
        {"grid": "mse"}, {"candidates": 2}, {"initial_codes": "nearest"}, {"initial_codes": "float"},
        {"sweeps": 0}, {"scales": False},
        {"order": "cyclic"}, {"order": "greedy"}, {"damping": 0.5}, {"tolerance": 0.5}, {"preset": "paper"},
    ],
    ids=str,
)  # fmt: skip
def test_no_option_is_dead(option: dict[str, Any]) -> None:
    usual, _ = run(COMQ, OneLayerTask.random((1, 16, 72), 3, symmetric=False))
    changed, _ = run(COMQ, OneLayerTask.random((1, 16, 72), 3, symmetric=False), **option)
    assert not torch.equal(usual, changed)


def test_guard_takes_nearest_rounding_where_it_is_better() -> None:
    weak = {
        "grid": "minmax",
        "initial_codes": "nearest",
        "sweeps": 0,
    }  # min-max is worse than the range of least weight error
    assert (
        run(COMQ, OneLayerTask.random((1, 16, 72), 3), **weak, guard=False)[1]["error"]
        > 1.05 * (run(COMQ, OneLayerTask.random((1, 16, 72), 3), **weak)[1]["error"])
    )


@pytest.mark.parametrize(("options", "correction"), [({}, 0.5), ({"correction": 0.2}, 0.2), ({"preset": "paper"}, 0.0)])
def test_correction_is_passed_on(options: dict[str, Any], correction: float) -> None:
    task = OneLayerTask.random((1, 4, 9))
    run(COMQ, task, **options)
    assert task.posed == [correction]


def test_same_input_same_bits() -> None:
    first, second = (run(COMQ, OneLayerTask.random((4, 6, 27), 3))[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", SHAPES)
def test_a_layer_without_any_signal_stays_finite(kind: str) -> None:
    task = OneLayerTask.random(SHAPES[kind], 2)
    task.squares = LeastSquares(torch.zeros_like(task.squares.weight), torch.zeros_like(task.squares.gram))
    quantized, metrics = run(COMQ, task)
    assert bool((quantized == 0).all())
    assert metrics["error"] == metrics["rtn_error"] == 0


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_rtn_takes_the_range_that_clip_names(granularity: str) -> None:
    results = {}
    for clip in ("mse", "minmax", "sigma"):
        task = OneLayerTask.random((1, 16, 72), 3, granularity=granularity)
        results[clip], _ = run(RoundToNearest, task, clip=clip, k=2.0)
        assert not task.posed  # needs no data
    weight = task.layers[0].weight
    assert torch.equal(
        results["minmax"], minmax_grid(weight, 3, task.scheme.weights.symmetric, granularity).round(weight)
    )
    errors = {clip: float((weight - result).square().sum()) for clip, result in results.items()}
    assert errors["mse"] < errors["sigma"]
    assert errors["mse"] < errors["minmax"]


def test_rtn_norm_and_steps_matter() -> None:
    usual, _ = run(RoundToNearest, OneLayerTask.random((1, 16, 72), 3))
    for option in ({"norm": 4.0}, {"steps": 5}):
        assert not torch.equal(usual, run(RoundToNearest, OneLayerTask.random((1, 16, 72), 3), **option)[0])


# Planted faults: each must break a claim made above, or the claims are worth nothing.


def claims_hold() -> bool:
    """The claims about agreement with the objective, as one yes or no."""
    for kind in ("conv", "grouped"):
        task = OneLayerTask.random(SHAPES[kind], 3, symmetric=False)
        quantized, metrics = run(COMQ, task)
        weight = task.squares.weight
        baseline = task.error(mse_grid(weight, 3, False).round(weight))
        honest = metrics["error"] == pytest.approx(task.error(quantized), rel=1e-3)
        if not honest or task.error(quantized) > 0.7 * baseline:
            return False
    return True


def test_claims_hold_without_a_fault() -> None:
    assert claims_hold()


@pytest.mark.parametrize(
    "fault",
    ["transposed pull", "dropped zero point", "halved scale", "no compensation", "curvature dropped", "wrong order"],
)
def test_a_planted_fault_breaks_a_claim(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right_prepare, right_pack = rounding.prepare, rounding.pack

    def wrong_prepare(*args: Any, **more: Any) -> Any:
        problem = right_prepare(*args, **more)
        if fault == "transposed pull":
            return rounding.replace(problem, pull=problem.pull.mT.contiguous())
        if fault == "curvature dropped":
            return rounding.replace(problem, curvature=torch.ones_like(problem.curvature))
        return problem

    def wrong_pack(problem: Any, result: Any, grid: Any) -> Any:
        if fault == "wrong order":
            problem = rounding.replace(problem, order=problem.order.flip(-1))
        packed = right_pack(problem, result, grid)
        if fault == "dropped zero point":
            return rounding.replace(packed, zero_point=torch.zeros_like(packed.zero_point))
        if fault == "halved scale":
            return rounding.replace(packed, scale=packed.scale / 2)
        return packed

    monkeypatch.setattr("coraq.methods.comq.prepare", wrong_prepare)
    monkeypatch.setattr("coraq.methods.comq.pack", wrong_pack)
    if fault == "no compensation":
        monkeypatch.setattr(
            rounding,
            "_sweep",
            lambda targets, levels, pull, grid, onward: levels.copy_(levels.round().clamp(grid.low, grid.high)),
        )
    assert not claims_hold()


def test_the_shrunk_objective_is_the_objective_and_a_ridge() -> None:
    squares = OneLayerTask.random(SHAPES["grouped"]).squares
    counted = LeastSquares(squares.weight, squares.gram, count=54)  # 27 inputs: half of the mean diagonal
    candidate = squares.weight.round()
    ridge = (squares.weight - candidate).double().square().sum(2) * squares.gram.diagonal(dim1=1, dim2=2).mean(1)[
        :, None
    ]
    torch.testing.assert_close(counted.shrunk().error(candidate), squares.error(candidate) + ridge / 2)
    torch.testing.assert_close(counted.shrunk(0.5).error(candidate), squares.error(candidate) + ridge / 4)
    assert counted.shrunk(0.0) is counted
    assert squares.shrunk() is squares  # its Gram is exact


def test_codes_of_few_rows_err_less_on_other_rows_when_shrunk() -> None:
    """A layer of 64 inputs seen in 32 rows, judged by the Gram of 4,096 others."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(64, 64, generator=generator).double() / 8
    seen, others = (torch.randn(n, 64, generator=generator).double() @ mix for n in (32, 4096))
    task = OneLayerTask.random((1, 48, 64), bits=2)
    judge = LeastSquares(task.squares.weight, (others.T @ others / 4096)[None])
    task.squares = LeastSquares(task.squares.weight, (seen.T @ seen / 32)[None], count=32)
    errors = {}
    for share in (0.0, 1.0):
        task.committed.clear()
        errors[share] = float(judge.error(run(COMQ, task, shrinkage=share)[0]).sum())
    assert errors[1.0] < 0.8 * errors[0.0]
    assert task.posed == [0.5, 0.5]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_finer_zero_points_lower_the_error_at_the_same_bytes(shape: tuple[int, int, int]) -> None:
    errors, sizes = [], []
    for zero in (0, 1, 2, 3):
        task = OneLayerTask.random(shape, 2, zero_point_fraction=zero)
        quantized, _ = run(COMQ, task)
        weight = task.committed["layer"][0].weight
        errors.append(task.error(quantized))
        sizes.append(weight.size_bytes())
        assert weight.fraction == task.scheme.fraction(2)
    assert len(set(sizes)) == 1
    assert errors[1] < errors[0]
    assert errors[2] < 0.95 * errors[0]
    assert errors[3] < 1.02 * errors[2]
