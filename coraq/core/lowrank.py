"""Low-rank adapters `C = B A` for what rounding left, `D = T − Q`, in closed form and relaxed.

Everything follows from one identity. Over all C of rank r, `tr[(D − C) G (D − C)ᵀ]` is least at

    C = U_r U_rᵀ D,    U the eigenvectors of D G Dᵀ,

the projection of D on the r output directions that its output error is largest in. With G the input autocorrelation
this is QERA's closed form (arXiv 2410.06040, theorem 1) without its matrix square root, its inverse or any damping:
`U Σ Vᵀ = SVD(D G^½)` has these U, and `U_r Σ_r V_rᵀ G^{−½} = U_r U_rᵀ D G^½ G^{−½}`. So a rank-deficient G needs no
care. With G diagonal it is QERA-approx; with G = I the plain SVD of D, which is CoRa's (arXiv 2408.00923, equation 4).
What is left is the sum of the discarded eigenvalues.

Matrices are batches [groups, …], as everywhere in coraq.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coraq.core.grid import minmax_grid
from coraq.core.tensors import LowRank, QTensor, stored_bytes

ORDER = 4  # p of the Butterworth gain, CoRa equation 7


@dataclass(frozen=True)
class Directions:
    """The directions of an output error, by falling energy.

    Attributes:
        basis: float32 [groups, out, k], orthonormal columns U.
        rows: float32 [groups, k, in], `Uᵀ D`.
        energy: float64 [groups, k], eigenvalues of `D G Dᵀ`: what keeping each direction takes off the error.
    """

    basis: Tensor
    rows: Tensor
    energy: Tensor

    def left(self) -> Tensor:
        """Error that is left at each rank 0 … k, all groups together, less that of directions beyond k: [k + 1]."""
        energy = self.energy.sum(0)
        return torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])

    def keep(self, gains: Tensor) -> Tensor:
        """`U diag(gains) Uᵀ D` [groups, out, in] of the first `gains` [≤ k], differentiable."""
        count = len(gains)
        return (self.basis[..., :count] * gains) @ self.rows[:, :count]

    def truncate(self, rank: int) -> Tensor:
        """The optimum of a rank, float32 [groups, out, in]."""
        return self.basis[..., :rank] @ self.rows[:, :rank]


def directions(delta: Tensor, gram: Tensor | None = None, limit: int | None = None) -> Directions:
    """The directions of `delta` [groups, out, in] under `gram` [groups, in, in]; None stands for the identity.

    A gram [groups, in] is diagonal, one of [groups · blocks, in/blocks, in/blocks] has blocks along its diagonal. At
    most `min(out, in)` of the directions have energy; `limit` keeps fewer. float64 inside.
    """
    d = delta.double()
    if gram is None:
        weighted = d
    elif gram.dim() == 2:
        weighted = d * gram.double()[:, None, :]
    else:
        groups, blocks = delta.shape[0], delta.shape[2] // gram.shape[2]
        parts = d.unflatten(2, (blocks, -1)).transpose(1, 2)  # [groups, blocks, out, in/blocks]
        weighted = (parts @ gram.double().unflatten(0, (groups, blocks))).transpose(1, 2).flatten(2)
    error = weighted @ d.mT
    energy, basis = torch.linalg.eigh((error + error.mT) / 2)
    count = min(*delta.shape[1:], limit if limit is not None else delta.shape[1])
    energy, basis = energy.flip(-1)[:, :count].clamp(min=0), basis.flip(-1)[..., :count]
    # a sign convention, so that another LAPACK gives the same factors: the largest entry of a direction is positive
    signs = basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
    basis = basis * torch.where(signs == 0, 1.0, signs)
    return Directions(basis.float(), (basis.mT @ d).float(), energy)


def adapter(found: Directions, delta: Tensor, rank: int, bits: int = 8) -> LowRank:
    """The first `rank` directions as codes of `bits`; A is fitted anew to the rounded B, which undoes its rounding.

    The columns of B are scaled to the same largest entry, so one scale serves all of B and the singular values stand in
    A, which has a scale for every row. (A scale for every row of B, too, would cost as much as four ranks.)

    Args:
        found: directions of `delta`.
        delta: [groups, out, in].
        rank: 1 … k.
    """
    basis = found.basis[..., :rank]
    basis = basis / basis.abs().amax(1, keepdim=True).clamp(min=1e-20)
    b = _rounded(basis, bits, "tensor")
    left = b.dequantize().double()  # [groups, out, rank]; pinv, since rounding may make columns equal
    fitted = torch.linalg.pinv(left.mT @ left, hermitian=True) @ (left.mT @ delta.double())
    return LowRank(b, _rounded(fitted.float(), bits, "channel"))


def low_rank(gram: Tensor | None, rank: int, bits: int, delta: Tensor) -> LowRank | None:
    """The best adapter of a rank for `delta` [groups, out, in], as `directions` takes it; None at rank 0."""
    return adapter(directions(delta, gram, limit=rank), delta, rank, bits) if rank else None


def _rounded(factor: Tensor, bits: int, granularity: str) -> QTensor:
    grid = minmax_grid(factor, bits, symmetric=True, granularity=granularity)
    return grid.pack(grid.codes(factor))


def adapter_bytes(shape: tuple[int, int, int], rank: int, bits: int = 8) -> int:
    """Bytes on disk of an adapter for a weight [groups, out, in]: packed codes, and float32 scales as `adapter` has."""
    groups, out, inputs = shape
    if rank == 0:
        return 0
    return stored_bytes((groups, out, rank), bits, 1, 0) + stored_bytes((groups, rank, inputs), bits, groups * rank, 0)


def can_pay(shape: tuple[int, int, int], code_bits: int, bits: int = 8) -> bool:
    """Whether an adapter is worth a thought: rank 1 is not the whole matrix, and costs less than half the codes.

    Never for depthwise layers, whose groups have one output.
    """
    return min(shape[1:]) > 1 and 2 * adapter_bytes(shape, 1, bits) <= stored_bytes(shape, code_bits, 0, 0)


def butterworth(cutoff: Tensor, count: int, order: int = ORDER) -> Tensor:
    """What a cutoff keeps of each direction: `T² = 1 / (1 + ((i/R)/c)^{2p})`, i = 1 … R (CoRa equation 7, squared).

    T multiplies both factors, so a direction is kept with weight T². Differentiable in `cutoff`, a scalar in
    [1/R, 1]; returns [count].
    """
    position = torch.arange(1, count + 1, dtype=cutoff.dtype, device=cutoff.device) / count
    return 1 / (1 + (position / cutoff).pow(2 * order))
