"""Claims about low-rank adapters in closed form, their relaxation, and budgets."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from coraq.core.allocation import LayerOption, allocate_bits, lower_hull
from coraq.core.lowrank import adapter, adapter_bytes, butterworth, directions
from coraq.core.rank_search import SearchLayer, budget_of, relaxed_loss, search_cutoffs
from coraq.core.sensitivity import kl_of_errors

SHAPES = [(1, 12, 20), (1, 20, 12), (3, 5, 9), (1, 8, 8)]


def problem(shape: tuple[int, int, int], seed: int = 0, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """A residual [groups, out, in] and a Gram [groups, in, in] of correlated inputs, of full rank or of `rank`."""
    groups, _, inputs = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, rank or 4 * inputs, inputs, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(groups, inputs, inputs, generator=generator, dtype=torch.float64)
    return torch.randn(shape, generator=generator), x.mT @ x / x.shape[1]


def error(delta: Tensor, gram: Tensor) -> float:
    """tr(D G Dᵀ), summed over groups."""
    d = delta.double()
    return float(((d @ gram) * d).sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_excess_is_the_sum_of_the_discarded_squared_singular_values(shape: tuple[int, int, int], rank: int) -> None:
    """Against QERA's own formula: SVD(D R^½), by a matrix square root in float64."""
    delta, gram = problem(shape)
    found = directions(delta, gram)
    values, vectors = torch.linalg.eigh(gram)
    root = vectors @ torch.diag_embed(values.clamp(min=0).sqrt()) @ vectors.mT
    u, s, vt = torch.linalg.svd(delta.double() @ root, full_matrices=False)
    published = u[..., :rank] @ torch.diag_embed(s[..., :rank]) @ vt[:, :rank] @ torch.linalg.inv(root)
    torch.testing.assert_close(found.truncate(rank).double(), published, rtol=1e-4, atol=1e-5)
    discarded = float(s[..., rank:].square().sum())
    assert error(delta - found.truncate(rank), gram) == pytest.approx(discarded, rel=1e-5, abs=1e-9)
    assert float(found.left()[rank]) == pytest.approx(discarded, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_random_or_perturbed_adapter_of_that_rank_does_better(shape: tuple[int, int, int]) -> None:
    delta, gram = problem(shape, seed=1)
    rank = 3
    found = directions(delta, gram)
    best = error(delta - found.truncate(rank), gram)
    generator = torch.Generator().manual_seed(2)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(20):
            b = found.basis[..., :rank] + size * torch.randn(found.basis[..., :rank].shape, generator=generator)
            a = found.rows[:, :rank] + size * torch.randn(found.rows[:, :rank].shape, generator=generator)
            assert error(delta - b @ a, gram) >= best * (1 - 1e-5)


def test_with_the_identity_it_is_the_plain_svd_and_with_a_diagonal_the_approximate_form() -> None:
    delta, gram = problem((1, 10, 14), seed=3)
    u, s, vt = torch.linalg.svd(delta[0].double())
    plain = u[:, :4] @ torch.diag(s[:4]) @ vt[:4]
    torch.testing.assert_close(directions(delta).truncate(4)[0].double(), plain, rtol=1e-4, atol=1e-5)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    as_vector, as_matrix = directions(delta, diagonal), directions(delta, torch.diag_embed(diagonal))
    torch.testing.assert_close(as_vector.truncate(4), as_matrix.truncate(4), rtol=1e-4, atol=1e-5)


def test_a_rank_deficient_gram_needs_no_damping() -> None:
    delta, gram = problem((1, 12, 20), seed=4, rank=5)
    found = directions(delta, gram)
    assert bool(torch.isfinite(found.rows).all())
    # inputs span five dimensions: rank five undoes the whole output error
    assert error(delta - found.truncate(5), gram) < 1e-9 * error(delta, gram)
    assert error(delta - found.truncate(4), gram) > 1e-6 * error(delta, gram)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_exact_and_rank_0_is_nothing(shape: tuple[int, int, int]) -> None:
    delta, gram = problem(shape)
    found = directions(delta, gram)
    torch.testing.assert_close(found.truncate(min(shape[1:])), delta, rtol=1e-4, atol=1e-5)
    assert not found.truncate(0).any()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("dilation", [1, 2])
def test_the_two_branches_of_a_convolution_equal_the_merged_one(
    groups: int, stride: int, padding: int, dilation: int
) -> None:
    """A k×k convolution to r channels and a 1×1 one, both grouped, on codes; at full rank of the residual, too."""
    delta, _ = problem((groups, 6, 4 * 9))
    found = directions(delta)
    x = torch.randn(2, 4 * groups, 9, 9, generator=torch.Generator().manual_seed(1))
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    for rank in (2, 6):
        low = adapter(found, delta, rank, bits=8)
        a = low.a.dequantize().reshape(groups * rank, 4, 3, 3)
        b = low.b.dequantize().reshape(groups * 6, rank, 1, 1)
        two = functional.conv2d(functional.conv2d(x, a, **geometry), b, groups=groups)  # type: ignore[arg-type]
        merged = functional.conv2d(x, low.dequantize().reshape(groups * 6, 4, 3, 3), **geometry)  # type: ignore[arg-type]
        torch.testing.assert_close(two, merged, rtol=1e-4, atol=1e-4)
        exact = functional.conv2d(x, delta.reshape(groups * 6, 4, 3, 3), **geometry)  # type: ignore[arg-type]
        if rank == 6:  # eight-bit codes in rows of their own: within a percent
            assert float((merged - exact).norm() / exact.norm()) < 0.01


def test_an_adapter_s_codes_lose_little_and_cost_what_is_said() -> None:
    delta, gram = problem((2, 16, 30), seed=5)
    # a fast decay: with one scale for a whole factor the last directions would round to nothing
    u, s, vt = torch.linalg.svd(delta.double(), full_matrices=False)
    delta = (u * (s * torch.logspace(0, -4, 16, dtype=torch.float64))[:, None, :] @ vt).float()
    found = directions(delta, gram)
    low = adapter(found, delta, 8, bits=8)
    low.check((2, 16, 30))
    assert low.size_bytes() == adapter_bytes((2, 16, 30), 8, 8)
    assert adapter_bytes((2, 16, 30), 0) == 0
    exact = error(found.truncate(8), torch.eye(30).expand(2, 30, 30).double())
    lost = error(found.truncate(8) - low.dequantize(), torch.eye(30).expand(2, 30, 30).double())
    assert lost < 1e-3 * exact


def test_a_residual_of_zeros_gives_an_adapter_of_zeros() -> None:
    delta = torch.zeros(1, 6, 9)
    low = adapter(directions(delta, torch.eye(9)[None].double()), delta, 2)
    low.check((1, 6, 9))
    assert not low.dequantize().any()


# -- the relaxation


def test_the_butterworth_gain_has_the_paper_s_limits() -> None:
    gains = butterworth(torch.tensor(0.5), 100)
    assert float(gains[49]) == pytest.approx(0.5)  # at the cutoff, T² = ½
    assert bool((gains[1:] <= gains[:-1]).all())
    assert float(gains[0]) > 0.999
    assert float(gains[-1]) < 0.005
    steep = butterworth(torch.tensor(0.5), 100, order=200)
    assert torch.equal(steep.round(), (torch.arange(1, 101) <= 50).float().index_fill(0, torch.tensor([49]), 0.0))
    assert float(butterworth(torch.tensor(1e6), 10).min()) == pytest.approx(1.0)


def network_and_layers() -> tuple[torch.nn.Module, dict[str, SearchLayer], Tensor, Tensor]:
    """Two layers in float64, their codes poor, and images with the float network's logits."""
    generator = torch.Generator().manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(6 * 16, 5)
    ).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.4, generator=generator)
    x = torch.randn(8, 3, 4, 4, generator=generator, dtype=torch.float64)
    layers = {}
    for name, shape in (("0", (1, 6, 27)), ("3", (1, 5, 96))):
        module = network.get_submodule(name)
        weight = module.weight.detach().reshape(shape)  # type: ignore[union-attr, operator]
        codes = (weight / 0.5).round() * 0.5
        found = directions((weight - codes).float())
        found = type(found)(found.basis.double(), found.rows.double(), found.energy)
        mean = torch.randn(1, shape[2], generator=generator, dtype=torch.float64)
        layers[name] = SearchLayer(codes, module.bias.detach(), mean, found, 0.3)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        return network, layers, x, network(x)


def test_the_gradients_of_the_cutoffs_are_those_of_finite_differences() -> None:
    network, layers, x, target = network_and_layers()
    cutoffs = torch.tensor([0.45, 0.6], dtype=torch.float64, requires_grad=True)

    def loss(c: Tensor) -> Tensor:
        return relaxed_loss(network, layers, c, x, target, budget=0.2)[0]

    assert torch.autograd.gradcheck(loss, (cutoffs,), eps=1e-6, atol=1e-6)
    (slope,) = torch.autograd.grad(loss(cutoffs), cutoffs)
    assert bool((slope != 0).all())


def test_the_penalty_is_the_paper_s() -> None:
    """`γ exp(relu(ρ(c) − ρ*))`, ρ(c) = Σ ω c (equations 9 and 10): γ itself within the budget."""
    network, layers, x, target = network_and_layers()
    cutoffs = torch.tensor([0.45, 0.6], dtype=torch.float64)  # ρ = 0.3 · 1.05
    for budget, over in ((0.5, 0.0), (0.2, 0.115)):
        loss, kl = relaxed_loss(network, layers, cutoffs, x, target, budget, gamma=0.7)
        assert float(loss - kl) == pytest.approx(0.7 * math.exp(over))


def test_the_one_convolution_of_the_search_is_the_paper_s_three() -> None:
    """`Ŵ∗x + B∗(A∗x)` with T on both factors, against the merged weight; means are kept by the bias."""
    network, layers, x, _ = network_and_layers()
    layer, gains = layers["0"], butterworth(torch.tensor(0.4, dtype=torch.float64), 6)
    weight, bias = layer.effective(torch.tensor(0.4, dtype=torch.float64), 4, network[0].weight.shape)  # type: ignore[index]
    assert bias is not None
    merged = functional.conv2d(x, weight, bias, padding=1)
    a = (gains.sqrt()[:, None] * layer.found.rows[0]).reshape(6, 3, 3, 3)
    b = (layer.found.basis[0] * gains.sqrt()).reshape(6, 6, 1, 1)
    three = functional.conv2d(x, layer.weight.reshape(6, 3, 3, 3), layer.bias, padding=1)
    three = three + functional.conv2d(functional.conv2d(x, a, padding=1), b)
    shift = layer.found.keep(gains) @ layer.mean[..., None]
    torch.testing.assert_close(merged, three - shift.reshape(1, 6, 1, 1))


def test_the_search_lowers_the_kl_within_its_budget_and_respects_its_bounds() -> None:
    network, layers, x, target = network_and_layers()
    steps: list[tuple[float, float]] = []
    layers = {
        name: SearchLayer(s.weight.float(), s.bias.float(), s.mean.float(), directions_float(s), s.price)  # type: ignore[union-attr]
        for name, s in layers.items()
    }
    network, x, target = network.float(), x.float(), target.float()
    found = search_cutoffs(
        network,
        layers,
        [0.01, 0.9],
        [(x, target)],
        100,
        budget=0.3,
        rate=0.02,
        on_step=lambda step, kl, spent: steps.append((kl, spent)),
    )
    assert len(steps) == 100
    assert all(1 / s.found.basis.shape[-1] - 1e-6 <= c <= 1 for c, s in zip(found, layers.values(), strict=True))
    start = relaxed_loss(network, layers, torch.tensor([1 / 6, 0.9]), x, target, 0.3)[0]
    end = relaxed_loss(network, layers, torch.tensor(found), x, target, 0.3)[0]
    assert float(end) < float(start)
    assert float(budget_of(layers, torch.tensor(found))) <= 0.3 * 1.1  # the penalty is soft: repair comes later


def directions_float(layer: SearchLayer):  # type: ignore[no-untyped-def]
    found = layer.found
    return type(found)(found.basis.float(), found.rows.float(), found.energy)


# -- budgets


def test_the_allocation_is_the_best_of_all_where_steps_fit() -> None:
    """Brute force over 4 layers × 4 choices, at every budget that the relaxation reaches exactly."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        layers = []
        for _ in range(4):
            sizes = torch.randint(1, 9, (4,), generator=generator).cumsum(0).tolist()
            losses = torch.rand(4, generator=generator).sort(descending=True).values.tolist()
            layers.append([LayerOption(size, loss) for size, loss in zip(sizes, losses, strict=True)])
        for budget in range(4 * 4, 80, 7):
            least = sum(c[0].size for c in layers)
            if budget < least:
                with pytest.raises(ValueError, match="exceed the budget"):
                    allocate_bits(layers, budget)
                continue
            taken = allocate_bits(layers, budget)
            size = sum(c[i].size for c, i in zip(layers, taken, strict=True))
            loss = sum(c[i].loss for c, i in zip(layers, taken, strict=True))
            assert size <= budget
            best_at_this_size = min(
                sum(c[i].loss for c, i in zip(layers, pick, strict=True))
                for pick in itertools.product(range(4), repeat=4)
                if sum(c[i].size for c, i in zip(layers, pick, strict=True)) <= size
            )
            # the relaxation is exact at its own corners; in between, one step of the hull is the most it can miss
            steps = [max(c[i].loss - c[j].loss for i in range(4) for j in range(i, 4)) for c in layers]
            assert loss <= best_at_this_size + max(steps)


def test_the_hull_leaves_out_what_is_dearer_and_no_better() -> None:
    choices = [
        LayerOption(1, 1.0),
        LayerOption(2, 0.9),
        LayerOption(3, 0.2),
        LayerOption(3, 0.3),
        LayerOption(4, 0.25),
        LayerOption(6, 0.1),
    ]
    assert lower_hull(choices) == [0, 2, 5]


def test_a_large_layer_does_not_miss_its_step_by_a_byte() -> None:
    """Small steps that save a little more for each byte come first, and leave no room for one that saves far more."""
    small = [[LayerOption(0, 1.1), LayerOption(1, 0.0)] for _ in range(5)]
    large = [LayerOption(0, 100.0), LayerOption(100, 0.0)]
    assert allocate_bits([*small, large], 100) == [0, 0, 0, 0, 0, 1]
    assert allocate_bits([*small, large], 102) == [1, 1, 0, 0, 0, 1]
    assert allocate_bits([*small, large], 99) == [1, 1, 1, 1, 1, 0]


# -- sensitivity


def test_the_predicted_kl_is_the_measured_one_for_small_errors() -> None:
    """Against the true KL of each layer perturbed alone, its mean moved into the bias; many draws of labels."""
    network, layers, x, target = network_and_layers()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(512, 3, 4, 4, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        target = network(x)
    deltas = {
        name: 0.02 * torch.randn(s.weight.shape, generator=generator, dtype=torch.float64) for name, s in layers.items()
    }
    predicted = kl_of_errors(network, deltas, [x] * 8, generator)
    for name, delta in deltas.items():
        module = network.get_submodule(name)
        kept_w, kept_b = module.weight.detach().clone(), module.bias.detach().clone()  # type: ignore[union-attr, operator]
        with torch.no_grad():
            first = {"0": x, "3": network[:3](x)}[name]  # type: ignore[index]
            error = type(module).forward(module, first)
            module.weight += delta.reshape(module.weight.shape)  # type: ignore[operator, union-attr]
            error = type(module).forward(module, first) - error
            dims = (0, 2, 3) if error.dim() == 4 else (0,)
            module.bias -= error.mean(dims)  # type: ignore[operator]
            logits = network(x)
            module.weight.copy_(kept_w)  # type: ignore[union-attr, operator]
            module.bias.copy_(kept_b)  # type: ignore[union-attr, operator]
        kl = functional.kl_div(logits.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean")
        assert predicted[name] == pytest.approx(float(kl), rel=0.15), name


def test_the_sensitivity_leaves_the_network_as_it_was() -> None:
    network, layers, x, target = network_and_layers()
    kl_of_errors(network, {name: s.weight for name, s in layers.items()}, [x], torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(network(x), target)
