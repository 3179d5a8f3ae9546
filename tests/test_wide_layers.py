"""Layers of very many inputs: their Gram is block-diagonal, every method works with it, and no result is worse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.one_layer import OneLayerTask, run
from support.tasks import rounded, small_task
from torch import Tensor

from coraq.api import LayerView, LeastSquares, Quantizer, Scheme, mse_grid
from coraq.core import sampling
from coraq.core.patches import Geometry
from coraq.core.rounding import descend, factorise, feedback, nearest, pack, prepare, reassess
from coraq.core.sampling import SampledMoments, blocks_needed
from coraq.core.tensors import QuantizedLayer
from coraq.events import ListSink, Note
from coraq.methods.comq import COMQ
from coraq.registry import load

GROUPS, BLOCKS, SIZE, OUT = 2, 3, 8, 5


def problem_parts(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, a block-diagonal Gram in blocks, and the same Gram whole."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(GROUPS, OUT, BLOCKS * SIZE, generator=generator)
    x = torch.randn(GROUPS * BLOCKS, 40, SIZE, generator=generator, dtype=torch.float64).cumsum(2)
    gram = x.mT @ x / 40
    whole = torch.stack([torch.block_diag(*gram[g * BLOCKS : (g + 1) * BLOCKS]) for g in range(GROUPS)])
    return weight, gram, whole


@pytest.mark.parametrize("order", ["common", "cyclic", "curvature"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_blocks_are_rounded_as_the_whole_block_diagonal_gram_is(order: str, granularity: str) -> None:
    weight, gram, whole = problem_parts()
    grid = mse_grid(weight, 3, False, granularity)  # type: ignore[arg-type]
    results = []
    for matrix in (gram, whole):
        problem = prepare(weight, matrix, order, torch.float64)  # type: ignore[arg-type]
        start = nearest(problem, grid)
        fed = reassess(problem, feedback(problem, factorise(problem, matrix, 0.0), grid))
        ends = [descend(problem, begin, 5, greedy=greedy) for begin in (start, fed) for greedy in (False, True)]
        found = [start, fed, *ends]
        results.append((problem.energy(), [(pack(problem, r, grid).dequantize(), r.error) for r in found]))
    assert torch.allclose(results[0][0], results[1][0])
    for (ours, error), (theirs, wanted) in zip(results[0][1], results[1][1], strict=True):
        assert torch.allclose(ours, theirs)
        assert torch.allclose(error, wanted)


def test_moments_in_blocks_are_the_diagonal_blocks_of_the_whole() -> None:
    geometry = Geometry((3, 3), padding=(1, 1, 1, 1), groups=2, in_channels=8)
    weight = torch.randn(2, 5, 36, generator=torch.Generator().manual_seed(9))
    whole = SampledMoments(geometry, 10, project=torch.eye(36).repeat(2, 1, 1))
    parts = SampledMoments(geometry, 10, blocks=4, project=weight)
    for seed in (0, 1):
        x, y = torch.randn(2, 3, 8, 6, 6, generator=torch.Generator().manual_seed(seed)) + 2
        whole.add(x, y)
        parts.add(x, y)
    pieces = [(g, slice(b * 9, b * 9 + 9)) for g in (0, 1) for b in range(4)]
    gram, drift = whole.result().gram, whole.input_mismatch_moment(centred=True)
    assert torch.allclose(parts.result().gram, torch.stack([gram[g, b, b] for g, b in pieces]), rtol=1e-5)
    wanted = torch.stack([weight[g, :, b].double() @ drift[g, b, b] for g, b in pieces])
    assert torch.allclose(parts.input_mismatch_moment(centred=True), wanted, rtol=1e-4, atol=1e-4)
    assert torch.allclose(parts.result().mean.flatten(), whole.result().mean.flatten())
    rows = parts.rows()
    assert whole.rows() is None
    assert rows is not None
    assert rows.shape == (2, whole.count, 36)
    assert torch.allclose((rows.mT @ rows / whole.count).double(), whole.result().gram, rtol=1e-4)


def test_only_layers_of_very_many_inputs_are_divided() -> None:
    assert blocks_needed(Geometry.linear(8192)) == 1
    assert blocks_needed(Geometry((3, 3), in_channels=512)) == 1  # resnet50's widest
    assert blocks_needed(Geometry((7, 7), groups=4096, in_channels=4096)) == 1
    vgg = Geometry((7, 7), in_channels=512)
    assert blocks_needed(vgg) == 14
    for inputs in (8193, 9216, 13_824, 25_088, 50_000):
        blocks = blocks_needed(Geometry.linear(inputs))
        assert inputs % blocks == 0
        assert inputs * (inputs // blocks) <= sampling.GRAM_ENTRIES


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything counts as wide: Grams of at most 200 entries."""
    monkeypatch.setattr(sampling, "GRAM_ENTRIES", 200)


@pytest.mark.usefixtures("narrow")
def test_the_engine_s_blocks_are_the_diagonal_blocks_of_the_whole_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    task = small_task(scheme=Scheme.of(bits=3))
    divided = 0
    for layer in task.layers:
        squares = task.least_squares(layer.name, 0.0)
        groups, _, inputs = layer.shape
        size = inputs // squares.blocks
        assert squares.gram.shape == (groups * squares.blocks, size, size)
        assert groups * inputs * size <= 200 or size == 1
        assert torch.equal(squares.join(squares.split(layer.weight)), layer.weight)
        if squares.blocks > 1:
            divided += 1
            monkeypatch.setattr(sampling, "GRAM_ENTRIES", 2**26)
            whole = small_task(scheme=Scheme.of(bits=3))
            for name, (committed, _) in task.committed.items():
                whole.commit(name, committed)
            reference = whole.least_squares(layer.name, 0.0)
            whole.close()
            monkeypatch.setattr(sampling, "GRAM_ENTRIES", 200)
            blocks = reference.gram.unflatten(1, (-1, size)).unflatten(3, (-1, size))  # g, b, n, b, n
            wanted = torch.stack([blocks[:, b, :, b] for b in range(squares.blocks)], 1).flatten(0, 1)
            assert torch.allclose(squares.gram, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
        task.commit(layer.name, rounded(layer))
    task.close()
    assert divided >= 3


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", ["comq", "gptq", "npot", "rtn"])
def test_every_method_works_on_wide_layers_and_the_run_says_so(name: str) -> None:
    sink = ListSink()
    task = small_task(scheme=Scheme.of(bits=3), sink=sink)
    method: type[Quantizer] = load(name)
    method(method.Config()).quantize(task)
    task.finish(name)
    notes = [event.message for event in sink.events if isinstance(event, Note)]
    numbers = {layer: metrics for layer, (_, metrics) in task.committed.items()}
    divided = [layer for layer, metrics in numbers.items() if "gram_blocks" in metrics]
    if name == "rtn":  # reads no Gram
        assert not notes
        assert not divided
        return
    assert len(divided) >= 3
    assert len(notes) == len(divided)
    for layer, note in zip(divided, notes, strict=True):
        assert f"layer {layer} " in note
        assert f"in {numbers[layer]['gram_blocks']} blocks" in note
    if name == "comq":
        assert all(m["error"] <= m["rtn_error"] for m in numbers.values())


def correlated(seed: int) -> tuple[LayerView, LeastSquares, Tensor]:
    """A layer whose inputs are nearly the same across blocks, and its whole Gram."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, 4, 12, generator=generator)
    common = torch.randn(1, 64, 1, generator=generator, dtype=torch.float64)
    x = common + 0.05 * torch.randn(1, 64, 12, generator=generator, dtype=torch.float64)
    whole = x.mT @ x / 64
    blocks = torch.stack([whole[0, i : i + 2, i : i + 2] for i in range(0, 12, 2)])
    layer = LayerView("layer", weight, None, 3, None, "linear", (1, 1), 48)
    return layer, LeastSquares(weight, blocks, x.float()), whole


def test_comq_on_blocks_is_never_worse_than_nearest_rounding_by_the_whole_gram() -> None:
    worse_without_rows = 0
    for seed in range(20):
        layer, squares, whole = correlated(seed)
        grid = mse_grid(layer.weight, layer.bits, False, "channel")
        baseline = QuantizedLayer(grid.pack(grid.codes(layer.weight)))
        true = LeastSquares(layer.weight, whole)
        limit = true.error(baseline.dequantize())
        kept, metrics = run(COMQ, OneLayerTask(squares, Scheme.of(bits=3)))
        assert bool((true.error(kept) <= limit * (1 + 1e-4)).all()), seed
        assert metrics["error"] <= metrics["rtn_error"]
        energy = true.error(torch.zeros_like(layer.weight)).sum()
        assert metrics["error"] == pytest.approx(float(true.error(kept).sum() / energy), rel=1e-3)
        blind, _ = run(COMQ, OneLayerTask(replace(squares, rows=None), Scheme.of(bits=3)))
        worse_without_rows += bool((true.error(blind) > limit * 1.01).any())
    assert worse_without_rows > 5  # or the rows would not be needed


@pytest.mark.usefixtures("narrow")
def test_a_spilled_wide_layer_gives_the_same_bits(tmp_path: Path) -> None:
    results = []
    for bound in (None, 1 << 12):
        task = small_task(scheme=Scheme.of(bits=3), memory_bytes=bound, folder=tmp_path)
        COMQ(COMQ.Config()).quantize(task)
        task.finish("comq")
        results.append({name: layer.dequantize() for name, layer in task.quantized.items()})
    assert task.traversal.spilled
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
