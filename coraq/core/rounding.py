"""Rounding that minimises a layer's output error, from its Gram alone.

Everything here minimises `tr[(W − Q) H (W − Q)ᵀ]` per group over Q on a grid: exactly in one coordinate
(COMQ, arXiv 2403.07134), column by column with the later columns still free (GPTQ, arXiv 2210.17323), or exactly in
the scales. The number of images does not matter, and all output channels go at once.

One kernel serves both kinds of rounding. The new level is the grid's nearest to a target,

    coordinate descent:  target_i = w_i + Σ_{j≠i} (w_j − q_j) · H_ji / H_ii
    GPTQ:                target_i = w_i + Σ_{j<i} (w_j − q_j) · R_ji / R_ii,   H = R Rᵀ, R upper triangular.

The second is the usual form with `H⁻¹ = UᵀU`, since U = R⁻¹: one Cholesky factor and no inverse. Its error is
`Σ_i R_ii² (target_i − q_i)²`, so comparing grids costs no more than rounding on each.

Layout: transposed, `[groups, in, out]`, inputs in visiting order, so that one coordinate of all output channels is
contiguous. `levels` are centred codes `code − zero`, or a codebook's entries; the weight is `scale · levels`. Where
zero points lie between codes, no level is a whole number, but all are whole steps from the lowest.

H may be block-diagonal: `[groups · blocks, in/blocks, in/blocks]`, each block for so many consecutive inputs. Blocks
are then rounded side by side; a channel's scale and error are those of all its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from coraq.core.grid import TINY, Codebook, Grid, nearest_entries
from coraq.core.tensors import QTensor

DEAD = 1e-9  # an input with less than this share of the mean diagonal of H keeps nearest rounding
BLOCK = 16  # inputs that are rounded one by one before a matrix product tells all others
STRIP = 2048  # output channels worked on at once: the small steps of a block of them stay in cache and on one thread

Order = Literal["cyclic", "common", "curvature"]
Choose = Callable[
    [int, Tensor, Tensor], None
]  # an input of each block, targets, the levels chosen: [groups · blocks, out]


@dataclass(frozen=True)
class Problem:
    """`min tr[(W − Q) H (W − Q)ᵀ]`, prepared; inputs stand in visiting order.

    Attributes:
        weight: [groups, in, out].
        pull: like H, `pull[j, i] = H_ji / H_ii`, diagonal zero; nothing pulls a dead input (H_ii = 0).
        ideal: [groups, in, out], `H W / diag H`; W itself at dead inputs.
        curvature: [groups, in, 1], the diagonal of H.
        order: [groups, in], the input visited at each step; a block's inputs stay together.
        rows: [groups, rows, in] inputs in visiting order, or None. Where H leaves correlations out, `reassess` takes
            the error from these, so that roundings are compared by what they do to the outputs.
    """

    weight: Tensor
    pull: Tensor
    ideal: Tensor
    curvature: Tensor
    order: Tensor
    rows: Tensor | None = None

    def energy(self) -> Tensor:
        """`w H wᵀ` of each channel, float64 [groups, 1, out]."""
        if self.rows is not None:
            return _mean_square(self.rows, self.weight)
        return _dot(self.weight * self.curvature, self.ideal)

    def targets(self, levels: Tensor, scale: Tensor) -> Tensor:
        """The best value of every coordinate while all others stay, in units of the scale [groups, in, out]."""
        weight = self.weight / scale
        return _add_pulled(weight, self.pull, weight - levels)

    def error(self, levels: Tensor, scale: Tensor, targets: Tensor) -> Tensor:
        """The objective, float64 [groups, 1, out], where `targets` belong to `levels` and `scale`."""
        error = _dot((self.weight / scale).sub_(levels).mul_(self.curvature), targets - levels)
        return (error * scale.double().square()).clamp_(min=0)


@dataclass(frozen=True)
class Factor:
    """`H + damping = R Rᵀ` (R upper triangular, visiting order), as GPTQ reads it.

    Attributes:
        pull: like H, `R_ji / R_ii` above the diagonal, zero elsewhere.
        curvature: [groups, in, 1], `R_ii²`.
        damping: float64 [groups · blocks], the share of the mean diagonal that was added to the diagonal.
    """

    pull: Tensor
    curvature: Tensor
    damping: Tensor


@dataclass(frozen=True)
class Rounding:
    """A rounding of a Problem's weight, in the Problem's layout.

    Attributes:
        levels: [groups, in, out]: whole steps from `low` to `high`, or entries of `table`.
        scale: positive, [groups, 1, out], or [1, 1, 1] for one per tensor.
        low, high: like the scale; both 0 where the grid's scale was 0.
        error: float64 [groups, 1, out], the objective.
        table: the codebook, if the grid is not uniform.
        whole: whether levels are whole numbers.
    """

    levels: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor
    error: Tensor
    table: Tensor | None = None
    whole: bool = True

    def better(self, other: Rounding) -> Rounding:
        """The better of two, channel by channel; as a whole where one scale serves the tensor."""
        if self.scale.numel() == 1:
            return self if bool(self.error.sum() <= other.error.sum()) else other
        keep = self.error <= other.error
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("levels", "scale", "low", "high", "error"))
        levels, scale, low, high, error = (torch.where(keep, mine, theirs) for mine, theirs in pairs)
        return Rounding(levels, scale, low, high, error, self.table, self.whole and other.whole)


def prepare(
    weight: Tensor,
    gram: Tensor,
    order: Order = "common",
    dtype: torch.dtype = torch.float32,
    rows: Tensor | None = None,
) -> Problem:
    """The problem of rounding `weight` [groups, out, in] under `gram` [groups · blocks, in/blocks, in/blocks].

    Computed in `dtype`. `rows` [groups, rows, in] are inputs to take errors from where `gram` has several blocks.
    Order "common" visits inputs by falling `√H_ii · mean |w_i|`, one order for all channels; "curvature" by falling
    H_ii (GPTQ's activation order); "cyclic" as they come.
    """
    # a constant input's variance may come out as −1e-9
    diagonal = gram.diagonal(dim1=-2, dim2=-1).double().clamp(min=0)
    if order != "cyclic":
        strength = weight.abs().mean(1).reshape(diagonal.shape) if order == "common" else 1.0
        visit = (diagonal.sqrt() * strength).argsort(dim=-1, descending=True, stable=True)
    else:
        visit = torch.arange(gram.shape[-1], device=gram.device).repeat(gram.shape[0], 1)
    dead = diagonal <= DEAD * diagonal.mean(-1, keepdim=True)
    inverse = torch.where(dead, 0.0, 1 / torch.where(dead, 1.0, diagonal))
    curvature = _visit(torch.where(dead, 0.0, diagonal).unsqueeze(-1), visit).to(dtype)
    pull = _visit_both(gram.to(dtype), visit).mul_(_visit(inverse.unsqueeze(-1), visit).to(dtype).mT)
    pull.diagonal(dim1=-2, dim2=-1).zero_()
    blocks, size = gram.shape[0] // weight.shape[0], gram.shape[-1]
    if blocks > 1:
        offsets = size * torch.arange(blocks, device=visit.device).repeat(weight.shape[0])
        visit = (visit + offsets[:, None]).reshape(weight.shape[0], -1)
    ordered = _visit(weight.mT, visit).to(dtype).contiguous()
    if rows is not None:
        rows = rows.to(dtype).gather(2, visit.unsqueeze(1).expand_as(rows))
    ideal = _add_pulled(ordered, pull, ordered)
    return Problem(ordered, pull, ideal, curvature.reshape(weight.shape[0], -1, 1), visit, rows)


def factorise(problem: Problem, gram: Tensor, damping: float = 0.01) -> Factor:
    """Cholesky factor of `gram` in the problem's order, float64.

    `damping` times the mean diagonal is added, ten times more as often as a group's factor does not exist; an input
    that is dead gets the mean diagonal itself, which leaves it alone.
    """
    order = (problem.order % gram.shape[-1]).reshape(gram.shape[:2])  # within each block
    work = _visit_both(gram.double(), order.flip(-1))  # backwards: its lower factor is R, backwards
    diagonal = work.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1.0)
    dead = problem.curvature.reshape(gram.shape[:2]).flip(-1) <= 0
    if bool(dead.any()):
        work.masked_fill_(dead.unsqueeze(1) | dead.unsqueeze(2), 0.0)
    diagonal += torch.where(dead, mean, damping * mean)
    share = torch.full_like(mean[:, 0], damping)
    lower, failed = torch.linalg.cholesky_ex(work)
    while bool(failed.any()):
        more = torch.where(failed > 0, share.clamp(min=1e-6) * 9, 0.0)
        share = share + more
        diagonal += more.unsqueeze(-1) * mean
        lower, failed = torch.linalg.cholesky_ex(work)
    pivots = lower.diagonal(dim1=-2, dim2=-1).flip(-1)
    dtype = problem.weight.dtype
    pull = lower.to(dtype).flip(-2, -1)
    pull /= pivots.unsqueeze(1).to(dtype)
    pull.diagonal(dim1=-2, dim2=-1).zero_()
    return Factor(pull, pivots.square().reshape(problem.curvature.shape).to(dtype), share)


def nearest(problem: Problem, grid: Grid | Codebook) -> Rounding:
    """Nearest rounding on `grid`."""
    start = _enter(problem, grid)
    levels = torch.empty_like(start.levels)
    _snap(start.levels, start.low, start.high, start, levels)
    return reassess(problem, replace(start, levels=levels))


def feedback(problem: Problem, factor: Factor, grid: Grid | Codebook) -> Rounding:
    """GPTQ (arXiv 2210.17323) on `grid`: each input's rounding error is fed to the inputs still to come.

    `error` is that of the damped problem, which is what GPTQ minimises; `reassess` gives the true one.
    """
    return next(feedbacks(problem, factor, [grid]))


def feedbacks(problem: Problem, factor: Factor, grids: Sequence[Grid | Codebook]) -> Iterator[Rounding]:
    """`feedback` on grids that differ in scales and zero points alone: side by side, as if they were more channels."""
    groups, _, out = problem.weight.shape
    at_once = max(1, STRIP // (groups * out))  # a step on few channels takes no less time than one on many
    for first in range(0, len(grids), at_once):
        starts = [_enter(problem, grid) for grid in grids[first : first + at_once]]
        levels, low, high = (
            torch.cat([getattr(start, name).expand(-1, -1, out) for start in starts], 2)
            for name in ("levels", "low", "high")
        )
        whole = replace(starts[0], levels=levels, low=low, high=high)
        starts = [replace(start, levels=levels) for start in starts]  # their own are not needed any more
        targets = levels.clone()
        _sweep(targets, levels, factor.pull, whole, onward=True)
        errors = _dot((targets - levels).square_(), factor.curvature)
        parts = (x.split(out, 2) for x in (levels, errors))
        for start, own, error in zip(starts, *parts, strict=True):
            yield replace(start, levels=own.contiguous(), error=error * start.scale.double().square())


def reassess(problem: Problem, rounding: Rounding) -> Rounding:
    """The same rounding with its error computed afresh: from H, or from the problem's rows where it has some."""
    if problem.rows is not None:
        return replace(rounding, error=_mean_square(problem.rows, problem.weight - rounding.scale * rounding.levels))
    targets = problem.targets(rounding.levels, rounding.scale)
    return replace(rounding, error=problem.error(rounding.levels, rounding.scale, targets))


def search(problem: Problem, roundings: Iterable[Rounding]) -> Rounding:
    """The best of several roundings, per channel (per tensor where there is one scale), its true error known."""
    return reassess(problem, reduce(Rounding.better, roundings))


def descend(
    problem: Problem,
    start: Rounding,
    sweeps: int,
    *,
    scales: bool = True,
    greedy: bool = False,
    from_float: bool = False,
    tolerance: float = 0.0,
) -> Rounding:
    """COMQ's coordinate descent: up to `sweeps` rounds of closed-form scales (if `scales`) and one visit to every code.

    No round raises the error, in exact arithmetic; in float32 a channel that ends above its start gets it back. Stops
    when no code changes, or when a round lowers the total error by a smaller share than `tolerance`. `from_float` is
    the authors' released start, all codes at their unrounded weights (then the error may rise, and stays risen);
    `greedy` visits each channel's inputs by falling `‖x_i‖·|w_i|` (the paper's order; slow).
    """
    scale = start.scale
    levels = problem.weight / scale if from_float else start.levels.clone()
    targets = problem.targets(levels, scale)
    total = float("inf")
    for round_ in range(sweeps):
        if scales and not (from_float and round_ == 0):
            scale = refit_scale(problem, levels, targets, scale)
        before = levels.clone()
        if greedy:
            _greedy_sweep(problem, targets, levels, start)
        else:
            _sweep(targets, levels, problem.pull, start, onward=False)
        last, total = total, float(problem.error(levels, scale, targets).sum())
        if bool((before == levels).all()) or total >= (1 - tolerance) * last:
            break
    if scales and sweeps:
        scale = refit_scale(problem, levels, targets, scale)
    end = reassess(problem, replace(start, levels=levels, scale=scale))
    return end if from_float else end.better(start)


def refit_scale(problem: Problem, levels: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """The scale of least error for these levels, `kᵀHw / kᵀHk`, in closed form; moves `targets` along, in place.

    Numerators and denominators are summed over the tensor where it has one scale. A scale that would not be
    positive stays as it is.
    """
    weighted = levels * problem.curvature
    top = _dot(weighted, problem.ideal)
    bottom = _dot(weighted, (problem.ideal / scale).sub_(targets).add_(levels))
    if scale.numel() == 1:
        top, bottom = top.sum((0, 2), keepdim=True), bottom.sum((0, 2), keepdim=True)
    good = (top > TINY * bottom) & (bottom > 0)
    fitted = torch.where(good, top / torch.where(good, bottom, 1.0), scale.double()).to(scale.dtype)
    targets.addcmul_(problem.ideal, 1 / fitted - 1 / scale)
    return fitted


def pack(problem: Problem, rounding: Rounding, grid: Grid | Codebook) -> QTensor:
    """A rounding as stored. `grid` is any of the grids that it was made on: it says bits and kind."""
    scale = rounding.scale.mT
    levels = torch.empty_like(rounding.levels)
    levels = levels.scatter_(1, problem.order.unsqueeze(-1).expand_as(levels), rounding.levels).mT
    if isinstance(grid, Codebook):
        table = grid.table.to(levels.dtype)
        return replace(grid, scale=scale).pack(nearest_entries(levels, table))
    if grid.symmetric:
        zero = torch.full_like(scale, 2 ** (grid.bits - 1))
    else:
        zero = (-rounding.low.mT).expand_as(scale)
    return replace(grid, scale=scale, zero=zero).pack(levels + zero)


def _enter(problem: Problem, grid: Grid | Codebook) -> Rounding:
    """The unrounded weight in units of the grid's scale, with the bounds; where the scale is 0, level 0 alone."""
    dtype = problem.weight.dtype
    scale = grid.scale.mT.to(dtype)
    empty = scale < TINY
    scale = torch.where(empty, 1.0, scale).contiguous()
    if isinstance(grid, Codebook):
        table, whole = grid.table.to(dtype), False
        low, high = table[:1].expand_as(scale), table[-1:].expand_as(scale)
    else:
        table, zero, whole = None, grid.zero.mT.to(dtype), grid.fraction == 0
        low, high = -zero, grid.top - zero
    low, high = torch.where(empty, 0.0, low).contiguous(), torch.where(empty, 0.0, high).contiguous()
    return Rounding(problem.weight / scale, scale, low, high, torch.zeros(()), table, whole)


def _snap(targets: Tensor, low: Tensor, high: Tensor, grid: Rounding, out: Tensor) -> None:
    """The nearest levels of `grid` to `targets`, into `out`; `low` and `high` are the targets' part of its bounds."""
    if grid.table is not None:
        out.copy_(grid.table[nearest_entries(targets, grid.table)])
    elif grid.whole:
        torch.round(targets, out=out)
    else:
        torch.sub(targets, low, out=out)
        out.round_().add_(low)
    torch.clamp(out, low, high, out=out)


def _sweep(targets: Tensor, levels: Tensor, pull: Tensor, grid: Rounding, *, onward: bool) -> None:
    """Round every input once, in order, in place, on `grid`'s levels; `onward`: `pull` is upper triangular (GPTQ)."""
    low, high = _per_block(grid.low, pull), _per_block(grid.high, pull)

    def rule(strip: slice) -> Choose:
        least, most = (b.squeeze(1) if b.shape[-1] == 1 else b[:, 0, strip] for b in (low, high))
        return lambda _, wanted, code: _snap(wanted, least, most, grid, code)

    sweep(targets, levels, pull, rule, onward=onward)


def sweep(targets: Tensor, levels: Tensor, pull: Tensor, rule: Callable[[slice], Choose], *, onward: bool) -> None:
    """Choose every input's level once, in order, by any rule; in place.

    Args:
        targets, levels: [groups, in, out] in visiting order: the best values of all coordinates, and what they are now.
        pull: [groups · blocks, in/blocks, in/blocks], `Problem.pull` or `Factor.pull`.
        rule: by a strip of output channels, what chooses the levels of one input of them.
        onward: `pull` is upper triangular (GPTQ): an input's error is fed to later ones only.
    """
    targets, levels = in_blocks(targets, pull), in_blocks(levels, pull)
    for start in range(0, targets.shape[-1], STRIP):
        strip = slice(start, start + STRIP)
        ours, codes = targets[..., strip].contiguous(), levels[..., strip].contiguous()
        _sweep_strip(ours, codes, pull, rule(strip), onward=onward)
        targets[..., strip] = ours
        levels[..., strip] = codes


def _sweep_strip(targets: Tensor, levels: Tensor, pull: Tensor, choose: Choose, *, onward: bool) -> None:
    """Blocks of inputs: one by one inside a block, one matrix product for the effect on all others."""
    groups, inputs, out = levels.shape
    code = levels.new_empty(groups, out)
    for start in range(0, inputs, BLOCK):
        stop = min(inputs, start + BLOCK)
        block, local = targets[:, start:stop], pull[:, start:stop, start:stop]
        change = levels.new_empty(stop - start, groups, out)  # old level minus new one
        for i in range(stop - start):
            choose(start + i, block[:, i], code)
            torch.sub(levels[:, start + i], code, out=change[i])
            if i + 1 < stop - start:
                if groups == 1:
                    block[0, i + 1 :].addr_(local[0, i, i + 1 :], change[i, 0])
                else:
                    block[:, i + 1 :].addcmul_(local[:, i, i + 1 :, None], change[i].unsqueeze(1))
        told = change.transpose(0, 1)
        levels[:, start:stop] -= told
        if stop < inputs:
            targets[:, stop:].baddbmm_(pull[:, start:stop, stop:].mT, told)
        if not onward:  # earlier inputs too: their next visit must know
            block.baddbmm_(local.tril(-1).mT, told)
            if start:
                targets[:, :start].baddbmm_(pull[:, start:stop, :start].mT, told)


def _greedy_sweep(problem: Problem, targets: Tensor, levels: Tensor, grid: Rounding) -> None:
    """One visit to every input in each channel's own order, falling `‖x_i‖·|w_i|`; in place, unblocked."""
    low, high = _per_block(grid.low, problem.pull), _per_block(grid.high, problem.pull)
    targets, levels = in_blocks(targets, problem.pull), in_blocks(levels, problem.pull)
    strength = in_blocks(problem.curvature.sqrt() * problem.weight, problem.pull).abs()
    visits = strength.argsort(dim=1, descending=True, stable=True)
    groups = torch.arange(levels.shape[0], device=levels.device).unsqueeze(-1)
    for step in range(levels.shape[1]):
        visit = visits[:, step : step + 1]
        code = targets.gather(1, visit)
        _snap(code.clone(), low, high, grid, code)
        change = levels.gather(1, visit) - code
        levels.scatter_(1, visit, code)
        targets.addcmul_(problem.pull[groups, visit.squeeze(1)].mT, change)


def in_blocks(x: Tensor, pull: Tensor) -> Tensor:
    """The view [groups · blocks, in/blocks, k] of `x` [groups, in, k], for a `pull` of that many blocks."""
    return x.view(*pull.shape[:2], x.shape[-1])


def _per_block(bound: Tensor, pull: Tensor) -> Tensor:
    """`bound` [groups, 1, k] (or one for all groups) once for every block of its group."""
    return bound if bound.shape[0] == 1 else bound.repeat_interleave(pull.shape[0] // bound.shape[0], 0)


def _add_pulled(base: Tensor, pull: Tensor, change: Tensor) -> Tensor:
    """`base + pullᵀ change`, block by block: [groups, in, out]."""
    return torch.baddbmm(in_blocks(base, pull), pull.mT, in_blocks(change, pull)).view(base.shape)


def _mean_square(rows: Tensor, weight: Tensor) -> Tensor:
    """Mean square of `rows` [groups, rows, in] times `weight` [groups, in, out], float64 [groups, 1, out]."""
    return (rows @ weight).double().square().mean(1, keepdim=True)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Sum over inputs of a product, accumulated in float64: [groups, 1, out]."""
    return (left * right).sum(-2, keepdim=True, dtype=torch.float64)


def _visit(rows: Tensor, order: Tensor) -> Tensor:
    """Rows [groups, in, k] in visiting order."""
    return rows.gather(1, order.unsqueeze(-1).expand_as(rows))


def _visit_both(matrix: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of [groups, in, in] in visiting order; a copy."""
    if matrix.shape[0] == 1:
        return matrix[0].index_select(0, order[0]).index_select(1, order[0]).unsqueeze(0)
    groups = torch.arange(matrix.shape[0], device=matrix.device)[:, None, None]
    return matrix[groups, order.unsqueeze(2), order.unsqueeze(1)]
