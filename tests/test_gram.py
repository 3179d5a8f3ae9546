"""The Gram of a convolution's inputs, each fast way against the patches themselves in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from coraq.core import autocorrelation, gram
from coraq.core import patches as module
from coraq.core.gram import GramAccumulator
from coraq.core.patches import Geometry, MeanAccumulator, patches

# float32 products of up to a few hundred rows, with entries of about 1: a few units of rounding (6e-8) an entry,
# growing with the root of the rows, and relative to the norm of the whole Gram
RTOL = 3e-6


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the products are tiny
    yield
    torch.set_num_threads(threads)


def images(n: int, channels: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Channels-last post-ReLU values with means of about 1 that differ by channel."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.6 * torch.randn(n, channels, height, width, generator=generator) + 1
    scale = 0.5 + torch.rand(channels, 1, 1, generator=generator)
    return (x.relu() * scale).to(memory_format=torch.channels_last)


def reference(batches: list[Tensor], geometry: Geometry) -> tuple[int, Tensor, Tensor]:
    """Count, mean and E[x xᵀ] from the patches, in float64."""
    x = torch.cat([patches(x.double(), geometry) for x in batches], 1)
    return x.shape[1], x.mean(1), x.transpose(1, 2) @ x / x.shape[1]


def close(found: Tensor, wanted: Tensor, scale: float = 1.0) -> bool:
    """Equal up to RTOL of the larger of the norm wanted and that of a matrix of entries `scale`."""
    norm = max(float(wanted.norm()), scale * wanted.numel() ** 0.5)
    return float((found - wanted).norm()) <= RTOL * norm


def force(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Make the accumulators use one way for everything that it can do."""
    automatic = gram._choose

    def choose(geometry: Geometry, size: tuple[int, int], shift: Tensor) -> object:
        if way == "im2col":
            return gram._Im2col(geometry, size, shift)
        if way == "autocorrelation":
            return autocorrelation.AutocorrelationGram(autocorrelation.Plan(geometry, size), shift)
        if way == "depthwise" and geometry.groups == geometry.in_channels:
            return gram._Depthwise(geometry, size, shift.device)
        return automatic(geometry, size, shift)

    monkeypatch.setattr(gram, "_choose", choose)


def agree(geometry: Geometry, batches: list[Tensor]) -> bool:
    """Whether Gram and mean equal those of the patches."""
    accumulator = GramAccumulator(geometry)
    for x in batches:
        accumulator.add(x)
    count, mean, gram = reference(batches, geometry)
    moments = accumulator.result()
    return moments.count == count and close(moments.mean, mean) and close(moments.gram, gram)


SAME_3 = (1, 1, 1, 1)
GEOMETRIES = [
    (Geometry((1, 1), in_channels=6), (5, 4)),
    (Geometry((1, 1), stride=(2, 2), in_channels=6), (7, 6)),
    (Geometry((1, 1), padding=(1, 0, 2, 0), groups=3, in_channels=6), (4, 5)),
    (Geometry((3, 3), padding=SAME_3, in_channels=5), (7, 9)),
    (Geometry((3, 3), in_channels=5), (8, 7)),
    (Geometry((3, 3), stride=(2, 2), padding=SAME_3, in_channels=4), (9, 8)),
    (Geometry((3, 3), stride=(2, 2), padding=(0, 1, 0, 1), in_channels=4), (8, 8)),  # TensorFlow's "same"
    (Geometry((3, 3), stride=(3, 3), padding=SAME_3, in_channels=4), (10, 11)),
    (Geometry((3, 3), padding=(2, 2, 2, 2), dilation=(2, 2), in_channels=4), (9, 9)),
    (Geometry((3, 3), stride=(2, 2), padding=(2, 2, 2, 2), dilation=(2, 2), in_channels=4), (9, 9)),
    (Geometry((3, 3), padding=SAME_3, groups=2, in_channels=6), (6, 6)),
    (Geometry((3, 3), padding=SAME_3, groups=4, in_channels=4), (6, 5)),
    (Geometry((3, 3), stride=(2, 2), padding=(0, 1, 0, 1), groups=4, in_channels=4), (7, 6)),
    (Geometry((5, 5), padding=(2, 2, 2, 2), groups=3, in_channels=3), (9, 8)),
    (Geometry((5, 5), stride=(2, 2), padding=(2, 2, 2, 2), in_channels=3), (9, 12)),
    (Geometry((7, 7), stride=(2, 2), padding=(3, 3, 3, 3), in_channels=3), (13, 12)),
    (Geometry((7, 7), padding=(3, 3, 3, 3), groups=2, in_channels=2), (3, 2)),  # smaller than the kernel
    (Geometry((3, 3), padding=SAME_3, in_channels=3), (1, 1)),
    (Geometry((1, 7), padding=(0, 0, 3, 3), in_channels=4), (5, 9)),
    (Geometry((7, 1), padding=(3, 3, 0, 0), in_channels=4), (9, 5)),
    (Geometry((2, 2), stride=(2, 2), in_channels=4), (7, 8)),
    (Geometry((2, 2), padding=(0, 1, 0, 1), in_channels=4), (6, 6)),
    (Geometry((4, 4), stride=(4, 4), in_channels=3), (13, 9)),
    (Geometry((3, 3), padding=(3, 0, 1, 2), in_channels=4), (5, 5)),
]


@pytest.mark.parametrize("way", ["automatic", "im2col", "autocorrelation", "depthwise"])
@pytest.mark.parametrize(("geometry", "size"), GEOMETRIES, ids=str)
def test_every_way_equals_the_patches(
    geometry: Geometry, size: tuple[int, int], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, way)
    assert agree(geometry, [images(3, geometry.in_channels, *size), images(2, geometry.in_channels, *size, seed=1)])


@st.composite
def layers(draw: st.DrawFn) -> tuple[Geometry, list[tuple[int, int, int]]]:
    """A random geometry and the (images, height, width) of three micro-batches."""
    small = st.integers(1, 3)
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    geometry = Geometry(
        kernel=(draw(st.integers(1, 5)), draw(st.integers(1, 5))),
        stride=(draw(small), draw(small)),
        padding=(draw(st.integers(0, 3)), draw(st.integers(0, 3)), draw(st.integers(0, 3)), draw(st.integers(0, 3))),
        dilation=(draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        groups=groups,
        in_channels=groups * draw(st.integers(1, 3)),
    )
    return geometry, [(draw(small), draw(st.integers(1, 9)), draw(st.integers(1, 9))) for _ in range(3)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(layers(), st.sampled_from(["automatic", "im2col", "autocorrelation", "depthwise"]))
def test_random_geometries_of_several_sizes(layer: tuple[Geometry, list[tuple[int, int, int]]], way: str) -> None:
    geometry, shapes = layer
    try:
        for _, height, width in shapes:
            geometry.output_size(height, width)
    except ValueError:
        assume(False)
    with pytest.MonkeyPatch.context() as monkeypatch:
        force(monkeypatch, way)
        batches = [images(n, geometry.in_channels, h, w, seed=i) for i, (n, h, w) in enumerate(shapes)]
        assert agree(geometry, batches)


def test_patches_are_in_the_order_of_the_weight() -> None:
    geometry = Geometry((3, 2), (2, 1), (1, 0, 2, 1), (1, 2), groups=2, in_channels=6)
    x, weight = images(2, 6, 9, 8), torch.randn(4, 3, 3, 2)
    rows = patches(x, geometry) @ weight.reshape(2, 2, -1).transpose(1, 2)  # groups, rows, out / groups
    padded = F.pad(x, (2, 1, 1, 0))
    wanted = F.conv2d(padded, weight, None, geometry.stride, 0, geometry.dilation, 2).permute(1, 0, 2, 3)
    torch.testing.assert_close(rows.transpose(1, 2).reshape(4, -1), wanted.reshape(4, -1))


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_gram_gives_the_output_error_of_a_convolution(groups: int, stride: int) -> None:
    geometry = Geometry((3, 3), (stride, stride), SAME_3, groups=groups, in_channels=8)
    x, change = images(4, 8, 10, 9), torch.randn(16, 8 // groups, 3, 3)
    accumulator = GramAccumulator(geometry)
    accumulator.add(x)
    moments = accumulator.result()
    delta = change.double().reshape(groups, 16 // groups, -1)
    error = (delta @ moments.gram * delta).sum() * moments.count
    wanted = F.conv2d(x.double(), change.double(), None, stride, 1, 1, groups).square().sum()
    assert float(error) == pytest.approx(float(wanted), rel=1e-5)


def test_the_mean_alone() -> None:
    for geometry, size in GEOMETRIES:
        accumulator = MeanAccumulator(geometry)
        batches = [images(3, geometry.in_channels, *size), images(1, geometry.in_channels, *size, seed=1)]
        for x in batches:
            accumulator.add(x)
        count, mean = accumulator.result()
        wanted_count, wanted, _ = reference(batches, geometry)
        assert count == wanted_count, geometry
        assert close(mean, wanted), geometry


@pytest.mark.parametrize("way", ["im2col", "autocorrelation"])
@pytest.mark.parametrize("limit", [1, 3000])
def test_small_chunks_change_nothing(way: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, way)
    for where, name in (
        (gram, "PATCH_BYTES"),
        (gram, "CACHE_BYTES"),
        (autocorrelation, "CACHE_BYTES"),
        (autocorrelation, "SPECTRA_BYTES"),
    ):
        monkeypatch.setattr(where, name, limit)
    monkeypatch.setattr(module, "SPLIT", 16)
    geometry = Geometry((3, 3), padding=SAME_3, in_channels=6)
    assert agree(geometry, [images(5, 6, 7, 8), images(4, 6, 7, 8, seed=1)])


@pytest.mark.parametrize("onednn", [True, False])
def test_wide_layers_by_either_library(onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ONEDNN", onednn and module._ONEDNN)
    assert agree(Geometry((1, 1), in_channels=600), [images(2, 600, 3, 3)])
    force(monkeypatch, "autocorrelation")
    assert agree(Geometry((3, 1), padding=(1, 1, 0, 0), in_channels=200), [images(2, 200, 4, 3)])
    assert agree(Geometry((1, 3), padding=(0, 0, 1, 1), in_channels=260), [images(2, 260, 3, 4)])


@pytest.mark.parametrize("memory", [torch.channels_last, torch.contiguous_format])
def test_the_memory_layout_of_inputs_does_not_matter(memory: torch.memory_format) -> None:
    for geometry in (Geometry((3, 3), padding=SAME_3, in_channels=8), Geometry((1, 1), in_channels=8)):
        assert agree(geometry, [images(2, 8, 9, 7).contiguous(memory_format=memory)])


@pytest.mark.parametrize("way", ["im2col", "autocorrelation"])
def test_precision_of_the_centred_gram(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean-dominated inputs with outliers: what remains when mean · meanᵀ is taken off must still be exact."""
    force(monkeypatch, way)
    geometry = Geometry((3, 3), padding=SAME_3, in_channels=32)
    accumulator, batches = GramAccumulator(geometry), []
    for seed in range(4):
        x = images(8, 32, 14, 14, seed)
        x[torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < 1e-4] *= 30
        batches.append(x)
        accumulator.add(x)
    moments = accumulator.result()
    _, mean, gram = reference(batches, geometry)
    wanted = gram - mean[:, :, None] * mean[:, None]
    centred = moments.gram - moments.mean[:, :, None] * moments.mean[:, None]
    assert float((centred - wanted).norm() / wanted.norm()) < 1e-5


def test_the_grams_are_symmetric() -> None:
    accumulator = GramAccumulator(Geometry((3, 3), padding=SAME_3, in_channels=8))
    accumulator.add(images(2, 8, 6, 6))
    gram = accumulator.result().gram
    assert torch.equal(gram, gram.transpose(1, 2))


def test_results_are_not_spent() -> None:
    """`result` may be asked for in between, and again."""
    for geometry, size in GEOMETRIES[:14]:
        x, y = images(2, geometry.in_channels, *size), images(2, geometry.in_channels, *size, seed=1)
        accumulator = GramAccumulator(geometry)
        accumulator.add(x)
        first = accumulator.result()
        assert torch.equal(first.gram, accumulator.result().gram), geometry
        accumulator.add(y)
        assert close(first.gram, reference([x], geometry)[2]), geometry
        assert close(accumulator.result().gram, reference([x, y], geometry)[2]), geometry


def test_misuse_is_refused() -> None:
    geometry = Geometry((3, 3), in_channels=4)
    with pytest.raises(ValueError, match="shape"):
        GramAccumulator(geometry).add(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="smaller than the kernel"):
        GramAccumulator(geometry).add(torch.zeros(1, 4, 2, 8))
    with pytest.raises(ValueError, match="no inputs"):
        GramAccumulator(geometry).result()
    with pytest.raises(ValueError, match="no inputs"):
        MeanAccumulator(geometry).result()
    with pytest.raises(ValueError, match="groups"):
        Geometry((3, 3), groups=3, in_channels=4)


@pytest.mark.parametrize("fault", ["borders", "corners", "wrap", "transpose", "shift", "opposite"])
def test_planted_faults_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail: with each part of the correction left out the Gram is wrong."""
    force(monkeypatch, "autocorrelation")
    batches = [images(3, 4, 7, 8)]
    geometry = Geometry((3, 3), padding=SAME_3, in_channels=4)
    assert agree(geometry, batches)
    if fault == "borders":
        monkeypatch.setattr(autocorrelation._Axis, "left_out", lambda *_: [[], []])
    elif fault == "corners":
        monkeypatch.setattr(
            autocorrelation.AutocorrelationGram, "_corner", lambda *_: torch.zeros(1, 4, 4, dtype=torch.float64)
        )
    elif fault == "wrap":
        monkeypatch.setattr(autocorrelation, "_transform_length", lambda length, shift: length // 2 * 2 + 1)
    elif fault == "transpose":
        right = autocorrelation.AutocorrelationGram._lag
        monkeypatch.setattr(
            autocorrelation.AutocorrelationGram, "_lag", lambda self, s, p, q: right(self, s, p, q).transpose(1, 2)
        )
    elif fault == "shift":
        monkeypatch.setattr(autocorrelation._Restore, "add", lambda self, block, o1, o2: block)
    else:
        waves = autocorrelation._waves
        monkeypatch.setattr(
            autocorrelation, "_waves", lambda plan, device: (waves(plan, device)[0], -waves(plan, device)[1])
        )
    assert not agree(geometry, batches)
