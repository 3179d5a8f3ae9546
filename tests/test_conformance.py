"""Every method there is keeps the protocol, and `assert_conforms` catches methods that do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coraq import registry
from coraq.api import Field, MethodConfig, QuantizedLayer, minmax_grid
from coraq.core.rounding import prepare
from coraq.testing import assert_conforms

CHECKOUT = Path(__file__).parents[1]
METHODS = sorted(registry.available())
# every step of these is checked, but few of them: the protocol does not depend on their number
QUICK: dict[str, dict[str, Any]] = {"brecq": {"iterations": 5}, "qdrop": {"iterations": 5}}


def test_the_built_in_methods_and_the_checkout_s_plugins_are_all_held_to_the_protocol() -> None:
    plugins = [info for info in registry.available().values() if str(CHECKOUT / "plugins") in info.source]
    files = [path for path in (CHECKOUT / "plugins").glob("*.py") if "METHODS" in path.read_text()]
    assert set(METHODS) >= set(registry.BUILT_IN)
    assert len(plugins) >= len(files)


@pytest.mark.parametrize("name", METHODS)
def test_conforms(name: str) -> None:
    quick = QUICK.get(name)
    assert_conforms(registry.load(name), quick, bits=(2, 8) if quick else (2, 3, 4, 8))


class Sound:
    """A method without fault; each of the faulty ones below differs from it in one thing."""

    name = "sound"
    summary = "nearest rounding"
    version = "1"
    needs_data = False
    scope = "network"

    class Config(MethodConfig):
        shrink: float = Field(default=1.0, gt=0, description="factor on the range")

    def __init__(self, config: Any) -> None:
        self.config = config

    def quantize(self, task: Any) -> None:
        for layer in task.layers:
            task.commit(layer.name, self.layer(task, layer))

    def layer(self, task: Any, layer: Any) -> QuantizedLayer:
        grid = minmax_grid(layer.weight, layer.bits, task.scheme.weights.symmetric, task.scheme.weights.granularity)
        return QuantizedLayer(grid.pack(grid.codes(layer.weight)))


def own_bias(layer: Any) -> torch.Tensor:
    return torch.zeros(layer.shape[0] * layer.shape[1]) if layer.bias is None else layer.bias


class ForgetsALayer(Sound):
    """left 1 of 7 layers unquantized"""

    def quantize(self, task: Any) -> None:
        for layer in task.layers[:-1]:
            task.commit(layer.name, self.layer(task, layer))


class CommitsTwice(Sound):
    """was committed twice"""

    def quantize(self, task: Any) -> None:
        for layer in task.layers:
            for _ in range(2):
                task.commit(layer.name, self.layer(task, layer))


class ChangesTheTeacher(Sound):
    """the float network was changed"""

    def layer(self, task: Any, layer: Any) -> QuantizedLayer:
        made = super().layer(task, layer)
        layer.weight.mul_(0.5)
        return made


class ChangesTheStudent(Sound):
    """gives other outputs"""

    def layer(self, task: Any, layer: Any) -> QuantizedLayer:
        task.student.get_submodule("preactivation").weight.data.mul_(1.5)
        made = super().layer(task, layer)
        if task.layers[-1].name == layer.name:
            task.student.get_submodule("stem").weight.data.mul_(1.5)
        return made


class IgnoresItsBits(Sound):
    """8 bits instead of 2"""

    def layer(self, task: Any, layer: Any) -> QuantizedLayer:
        return super().layer(task, replace(layer, bits=8))


class UsesTwoBitsOfAll(Sound):
    """off by|exceeds that at 2"""

    def layer(self, task: Any, layer: Any) -> QuantizedLayer:
        grid = minmax_grid(layer.weight, 2, task.scheme.weights.symmetric, task.scheme.weights.granularity)
        wider = replace(grid, bits=layer.bits, zero=grid.zero + (2 ** (layer.bits - 1) - 2))
        return QuantizedLayer(wider.pack(grid.codes(layer.weight) + (2 ** (layer.bits - 1) - 2)))


class HalvesTheScale(Sound):
    """off by .* at 8 bits"""

    def layer(self, task: Any, layer: Any) -> QuantizedLayer:
        made = super().layer(task, layer)
        return replace(made, weight=replace(made.weight, scale=made.weight.scale / 2))


class DropsTheZeroPoint(Sound):
    """affine, per channel: how the output varies is off by"""

    def layer(self, task: Any, layer: Any) -> QuantizedLayer:
        made = super().layer(task, layer)
        return replace(made, weight=replace(made.weight, zero_point=None))


class IsAlwaysAffine(Sound):
    """a zero point on a symmetric grid"""

    def layer(self, task: Any, layer: Any) -> QuantizedLayer:
        grid = minmax_grid(layer.weight, layer.bits, False, task.scheme.weights.granularity)
        return QuantizedLayer(grid.pack(grid.codes(layer.weight)))


class IsAlwaysPerChannel(Sound):
    """scales where the scheme wants one per tensor"""

    def layer(self, task: Any, layer: Any) -> QuantizedLayer:
        grid = minmax_grid(layer.weight, layer.bits, task.scheme.weights.symmetric, "channel")
        return QuantizedLayer(grid.pack(grid.codes(layer.weight)))


class LeavesTheCodesRange(Sound):
    """codes leave 0 … 3"""

    def layer(self, task: Any, layer: Any) -> QuantizedLayer:
        made = super().layer(task, layer)
        return replace(made, weight=replace(made.weight, codes=made.weight.codes + 1))


class ReturnsFloatCodes(Sound):
    """codes are torch.float32"""

    def layer(self, task: Any, layer: Any) -> QuantizedLayer:
        made = super().layer(task, layer)
        return replace(made, weight=replace(made.weight, codes=made.weight.codes.float()))


class DividesByAnEmptyRange(Sound):
    """scale must be finite"""

    def layer(self, task: Any, layer: Any) -> QuantizedLayer:
        made = super().layer(task, layer)
        span = layer.weight.amax(-1, keepdim=True) - layer.weight.amin(-1, keepdim=True)
        return replace(made, weight=replace(made.weight, scale=made.weight.scale * (span / span).amax()))


class RollsGlobalDice(Sound):
    """torch's global random state was changed"""

    def layer(self, task: Any, layer: Any) -> QuantizedLayer:
        noise = 0.01 * torch.rand_like(layer.weight)
        return super().layer(task, replace(layer, weight=layer.weight + noise))


class CountsItsRuns(Sound):
    """two runs with one seed wrote different files"""

    runs = 0

    def quantize(self, task: Any) -> None:
        CountsItsRuns.runs += 1
        super().quantize(task)

    def layer(self, task: Any, layer: Any) -> QuantizedLayer:
        return super().layer(task, replace(layer, weight=layer.weight * (1 + 1e-4 * self.runs)))


class RemembersEarlierLayers(Sound):
    """the result differs from a straight run's"""

    def quantize(self, task: Any) -> None:
        for position, layer in enumerate(task.layers):
            bias = own_bias(layer) + position / 1000
            task.commit(layer.name, replace(self.layer(task, layer), bias=bias))


class ReportsNaN(Sound):
    """metric loss is nan"""

    def quantize(self, task: Any) -> None:
        for layer in task.layers:
            task.commit(layer.name, self.layer(task, layer), loss=float("nan"))


class ReportsTensors(Sound):
    """metric loss is tensor"""

    def quantize(self, task: Any) -> None:
        for layer in task.layers:
            task.commit(layer.name, self.layer(task, layer), loss=torch.tensor(1.0))


class LeavesAHook(Sound):
    """forward hooks were left"""

    def quantize(self, task: Any) -> None:
        task.student.register_forward_hook(lambda *_: None)
        super().quantize(task)


class TrainsTheStudent(Sound):
    """requires_grad or a gradient"""

    def quantize(self, task: Any) -> None:
        task.student.requires_grad_(True)
        super().quantize(task)


class LeavesTrainingMode(Sound):
    """left in training mode"""

    def quantize(self, task: Any) -> None:
        super().quantize(task)
        task.student.train()


class NeedsImagesAfterAll(Sound):
    """no calibration images \\(needs_data is False\\)"""

    def layer(self, task: Any, layer: Any) -> QuantizedLayer:
        seen = task.stats(layer.name).mean.sum()
        return replace(super().layer(task, layer), bias=own_bias(layer) + 0 * seen.float())


class SaysItNeedsImages(Sound):
    """runs without images, but needs_data is True"""

    needs_data = True


class HasAMuteOption(Sound):
    """option shrink has no description"""

    class Config(MethodConfig):
        shrink: float = 1.0


class SwallowsOptions(Sound):
    """must stay frozen and refuse unknown keys"""

    class Config(MethodConfig, extra="ignore"):
        pass


class DemandsAnOption(Sound):
    """option shrink has no default"""

    class Config(MethodConfig):
        shrink: float = Field(description="factor on the range")


class HasNoVersion(Sound):
    """version is 1"""

    version = 1


class HasABadName(Sound):
    """cannot be used"""

    name = "../My Method"


class RunsIntoABug(Sound):
    """quantize\\(\\) raised ZeroDivisionError: .* The last layer committed was stem"""

    def layer(self, task: Any, layer: Any) -> QuantizedLayer:
        if layer.name == "grouped":
            raise ZeroDivisionError("division by zero")
        return super().layer(task, layer)


class ClaimsColumnScales(Sound):
    """does not support column scales"""

    class Config(Sound.Config):
        def column_scales(self) -> bool:
            return True


FAULTY = Sound.__subclasses__()


def test_a_sound_method_conforms() -> None:
    assert_conforms(Sound)


@pytest.mark.parametrize("method", FAULTY, ids=lambda method: method.__name__)
def test_a_planted_fault_is_found_and_named(method: type[Sound]) -> None:
    with pytest.raises(AssertionError, match=method.__doc__):
        assert_conforms(method)  # type: ignore[arg-type]


def test_inputs_that_are_constant_but_for_rounding_do_no_harm() -> None:
    # the kernel is larger than the image: one tap sees anything, and sees the same in all images, so that its
    # centred second moment is a rounding error, here a negative one
    gram = torch.zeros(1, 5, 5, dtype=torch.float64)
    gram[0, 2, 2] = -8e-9
    problem = prepare(torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0)), gram)
    assert torch.isfinite(problem.pull).all()
    assert torch.isfinite(problem.energy()).all()
