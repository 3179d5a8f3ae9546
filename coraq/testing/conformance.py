"""What the protocol promises, checked on a network small enough to check all of it."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import random
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from coraq.activations.records import ActivationRecord
from coraq.api import LayerView, MethodConfig, QuantizedLayer, Quantizer
from coraq.artifact import RunFolder, load_checkpoint, write_checkpoint
from coraq.artifact.checkpoint import CheckpointInfo
from coraq.calibration.commit_log import CommitLog
from coraq.calibration.task import CalibrationTask
from coraq.config import Scheme
from coraq.core import sampling
from coraq.errors import CoraqError, UsageError
from coraq.network.fold import Trace, fold, relative_error
from coraq.registry import REQUIRED, configure, make, resolve_auto
from coraq.testing.networks import ARCHITECTURE, random_images, small_network
from coraq.testing.oracles import hook_count, state_digest

Metrics = dict[str, float | int | str]
Granularity = Literal["channel", "tensor"]
# Measured: nearest rounding errs by 2 to 5 % here, sums of powers of two by 4 %, halved scales by 99.8 %.
WORST_ERROR_AT_8_BITS = 0.25


def assert_conforms(
    method: type[Quantizer], options: Mapping[str, Any] | None = None, bits: Sequence[int] = (2, 3, 4, 8)
) -> None:
    """Hold a method to the protocol of `coraq.api`.

    The method quantizes a small random network (dense, grouped, depthwise, 1×1 and Linear layers) on tiny images
    again and again: at every width of `bits`, on symmetric and affine grids, per channel and per tensor; twice with
    one seed; stopped and resumed; on dead and constant channels; on layers whose Grams come in blocks, as those of very
    many inputs do; on a single image; and without any.

    Args:
        method: the class, as in a plugin's METHODS.
        options: its options, e.g. fewer training steps to make the check quick.
        bits: widths to check.

    Raises:
        AssertionError: a promise is broken; the message names it and says what to do.
    """
    _check_declaration(method)
    _check_options(method)
    bench = _Bench(method, dict(options or {}), *_folded(small_network()))
    coarse = {key: _check_grid(bench, min(bits), *key) for key in bench.grids}
    for width in sorted(bits):
        for key in bench.grids:
            error = _check_grid(bench, width, *key) if width > min(bits) else coarse[key]
            case = f"{method.name}, {_describe(width, *key)}"
            if width >= 8:
                _require(
                    error <= WORST_ERROR_AT_8_BITS,
                    f"{case}: how the output varies is off by {100 * error:.0f} % at 8 bits",
                    "8 bits should lose next to nothing: compare dequantize() with layer.weight, scale and zero point.",
                )
                _require(
                    error <= coarse[key],
                    f"{case}: the output error, {error:.2g}, exceeds that at {min(bits)} bits, {coarse[key]:.2g}",
                    "Does the method build its grid from layer.bits?",
                )
    _check_repeatable(bench)
    _check_resume(bench)
    _check_activations(bench)
    _check_awkward(method, bench.options)
    _check_wide(bench)
    _check_images(bench)


_GRIDS: tuple[tuple[bool, Granularity], ...] = (
    (True, "channel"),
    (False, "channel"),
    (True, "tensor"),
    (False, "tensor"),
)


class _Killed(BaseException):
    """Ends a run as a kill would: no method catches it."""


@dataclass
class _Outcome:
    """What one run left."""

    student: nn.Module
    layers: dict[str, QuantizedLayer]
    given: list[tuple[str, QuantizedLayer, Metrics]] = field(default_factory=list)
    activations: dict[str, ActivationRecord] = field(default_factory=dict)


class _WatchedTask(CalibrationTask):
    """Keeps what the method hands over, before the engine looks at it."""

    given: list[tuple[str, QuantizedLayer, Metrics]]

    def commit(self, name: str, layer: QuantizedLayer, **metrics: float | int | str) -> None:
        self.given.append((name, layer, metrics))
        super().commit(name, layer, **metrics)


@dataclass
class _Bench:
    """A method, its options, and a folded network to run it on."""

    method: type[Quantizer]
    options: dict[str, Any]
    teacher: nn.Module
    found: Trace

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def grids(self) -> list[tuple[bool, Granularity]]:
        """The kinds of grid that the method has scales for."""
        known = getattr(self.method, "granularities", ("channel", "tensor"))
        return [key for key in _GRIDS if key[1] in known]

    def batches(self) -> list[Tensor]:
        return list(random_images(5, seed=1).split(3))  # the last micro-batch is smaller

    def run(
        self,
        scheme: Scheme,
        batches: Sequence[Tensor],
        case: str,
        folder: RunFolder | None = None,
        stop_after: int | None = None,
    ) -> _Outcome:
        """Quantize once; every fault on the way becomes an AssertionError that names the case."""
        done = folder.committed() if folder is not None else {}
        save = folder.save_layer if folder is not None else None
        teacher = copy.deepcopy(self.teacher)
        task = _WatchedTask(
            teacher,
            self.found,
            scheme,
            batches,
            seed=7,
            log=CommitLog(done, save, None if folder is None else folder.decisions),
            find_method=make,
        )
        task.given = []
        if stop_after is not None:
            task.commit = _killing(task.commit, stop_after)  # type: ignore[method-assign]
        quantizer = self.method(configure(self.method, self.options))
        world = _World.now(task)
        try:
            try:
                quantizer.quantize(task.scoped(quantizer))
                task.finish(self.name)
            finally:
                task.close()
        except CoraqError as error:
            raise AssertionError(f"{self.name}, {case}: {error.message}. {error.hint}") from error
        except Exception as error:
            raise AssertionError(
                f"{self.name}, {case}: quantize() raised {type(error).__name__}: {error}. "
                f"The last layer committed was {task.given[-1][0] if task.given else 'none'}."
            ) from error
        world.check(task, f"{self.name}, {case}")
        layers = {name: task.committed[name][0] for name in self.found.order}
        return _Outcome(task.student, layers, task.given, task.activations)

    def write(self, outcome: _Outcome, path: Path, scheme: Scheme) -> bytes:
        info = CheckpointInfo(
            architecture=ARCHITECTURE,
            structure=self.found.structure,
            scheme=scheme,
            activations=outcome.activations,
        )
        write_checkpoint(path, outcome.student, outcome.layers, info)
        return path.read_bytes()


def _killing(commit: Callable[..., None], after: int) -> Callable[..., None]:
    commits = 0

    def counted(name: str, layer: QuantizedLayer, **metrics: float | int | str) -> None:
        nonlocal commits
        commit(name, layer, **metrics)
        commits += 1
        if commits == after:
            raise _Killed

    return counted


@dataclass
class _World:
    """All that a method must leave as it was."""

    teacher: str
    hooks: int
    training: list[bool]
    globals: dict[str, object]

    @classmethod
    def now(cls, task: CalibrationTask) -> _World:
        hooks = hook_count(task.teacher) + hook_count(task.student)
        return cls(state_digest(task.teacher), hooks, _training(task), cls._globals())

    @staticmethod
    def _globals() -> dict[str, object]:
        return {
            "torch's global random state": torch.get_rng_state().numpy().tobytes(),
            "numpy's global random state": repr(np.random.get_state(legacy=False)),
            "Python's global random state": hash(random.getstate()),
            "torch's gradient mode": torch.is_grad_enabled(),
            "torch's default dtype": torch.get_default_dtype(),
            "torch's number of threads": torch.get_num_threads(),
        }

    def check(self, task: CalibrationTask, case: str) -> None:
        _require(
            state_digest(task.teacher) == self.teacher,
            f"{case}: the float network was changed",
            "layer.weight and layer.bias are views of its parameters: clone() them before changing anything in place.",
        )
        _require(
            not any(
                p.requires_grad or p.grad is not None for p in (*task.teacher.parameters(), *task.student.parameters())
            ),
            f"{case}: a parameter of the networks was left with requires_grad or a gradient",
            "Train copies (weight.clone().requires_grad_()), never the networks' own parameters.",
        )
        _require(
            _training(task) == self.training,
            f"{case}: a module was left in training mode",
            "Do not call train(), or call eval() in a finally clause.",
        )
        _require(
            hook_count(task.teacher) + hook_count(task.student) == self.hooks,
            f"{case}: forward hooks were left on the networks",
            "Remove them in a finally clause; or use task.stats, which needs none.",
        )
        for what, value in self._globals().items():
            hint = (
                "Draw from task.rng (generator=task.rng)."
                if "random" in what
                else "Restore it, or use a context manager."
            )
            _require(value == self.globals[what], f"{case}: {what} was changed", hint)


def _training(task: CalibrationTask) -> list[bool]:
    return [module.training for network in (task.teacher, task.student) for module in network.modules()]


def _check_declaration(method: type[Quantizer]) -> None:
    label = getattr(method, "name", method.__name__)
    missing = [name for name in REQUIRED if not hasattr(method, name)]
    _require(not missing, f"{label} lacks {', '.join(missing)}", "See the example at the head of coraq/api.py.")
    _require(
        isinstance(method.name, str) and re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", method.name) is not None,
        f"the name {method.name!r} cannot be used",
        "It goes on the command line and into folder names: small letters, digits, '-', '_' and '.'.",
    )
    _require(
        isinstance(method.summary, str) and 0 < len(method.summary) <= 120 and "\n" not in method.summary,
        f"{label}: summary must be one line of at most 120 characters",
        "It is what `coraq methods` prints.",
    )
    _require(
        isinstance(method.version, str) and bool(method.version),
        f"{label}: version is {method.version!r}",
        'Write a string, such as version = "1"; raise it whenever results change.',
    )
    _require(
        isinstance(method.needs_data, bool), f"{label}: needs_data is {method.needs_data!r}", "Write True or False."
    )
    _require(
        isinstance(method.Config, type) and issubclass(method.Config, MethodConfig),
        f"{label}: Config is no subclass of coraq.api.MethodConfig",
        "Write `class Config(MethodConfig):` inside the method, even where it is empty.",
    )
    _require(
        bool(method.Config.model_config.get("frozen")) and method.Config.model_config.get("extra") == "forbid",
        f"{label}: Config must stay frozen and refuse unknown keys",
        "Do not set model_config in it.",
    )
    silent = [name for name, info in method.Config.model_fields.items() if not (info.description or "").strip()]
    _require(
        not silent,
        f"{label}: option {silent[0] if silent else ''} has no description",
        'Write Field(..., description="..."): it is the option\'s help.',
    )


def _check_options(method: type[Quantizer]) -> None:
    unknown = "no_such_option_anywhere"
    try:
        configure(method, {unknown: 1})
    except UsageError as error:
        _require(
            unknown in error.message,
            f"{method.name}: the error for an unknown option does not name it",
            "Leave it to pydantic.",
        )
    else:
        _require(False, f"{method.name}: an unknown option is accepted", "Config must not swallow keys in a validator.")
    for name, info in method.Config.model_fields.items():
        _require(
            not info.is_required(),
            f"{method.name}: option {name} has no default",
            f"`coraq quantize --method {method.name}` must work as it is.",
        )
    config = configure(method, {})
    try:
        again = method.Config.model_validate(json.loads(config.model_dump_json()))
    except (TypeError, ValueError) as error:
        raise AssertionError(f"{method.name}: Config does not survive JSON: {error}. Use plain types in it.") from error
    _require(again == config, f"{method.name}: Config changes on the way through JSON", "Use plain types in it.")


def _check_grid(bench: _Bench, bits: int, symmetric: bool, granularity: Granularity) -> float:
    """One width on one kind of grid; returns the relative error of how the output varies from image to image.

    The outputs' mean is taken out: bias correction makes it right whatever the weights are.
    """
    # zero points between codes at some widths: a method may leave them at codes
    zero = 2 if bits < 4 and not symmetric else 0
    asked = Scheme.of(
        bits=bits, symmetric=symmetric, granularity=granularity, scale_correction="off", zero_point_fraction=zero
    )
    scheme = resolve_auto(asked, bench.method, configure(bench.method, bench.options))  # as a command has it
    case = _describe(bits, symmetric, granularity)
    outcome = bench.run(scheme, bench.batches(), case)
    _check_commits(bench, scheme, outcome, case)
    images = random_images(32, seed=2)
    with torch.no_grad():
        expected, got = bench.teacher(images), outcome.student(images)
    _require(
        bool(torch.isfinite(got).all()),
        f"{bench.name}, {case}: the quantized network gives NaN or Inf",
        "Check the scales.",
    )
    with tempfile.TemporaryDirectory(prefix="coraq-conforms-") as folder:
        path = Path(folder) / "model.safetensors"
        bench.write(outcome, path, scheme)
        with torch.no_grad():
            reloaded = load_checkpoint(path).module(images)
    _require(
        torch.equal(reloaded, got),
        f"{bench.name}, {case}: the network that was written and read back gives other outputs",
        "Hand everything over through commit(); do not change task.student yourself.",
    )
    return relative_error(got - got.mean(0), expected - expected.mean(0))


def _check_commits(bench: _Bench, scheme: Scheme, outcome: _Outcome, case: str) -> None:
    names = [name for name, _, _ in outcome.given]
    where = f"{bench.name}, {case}"
    _require(
        sorted(names) == sorted(bench.found.order),
        f"{where}: layers committed are {names}, the network's are {bench.found.order}",
        "Commit every layer of task.layers exactly once.",
    )
    views = {v.name: v for v in CalibrationTask(copy.deepcopy(bench.teacher), bench.found, scheme, []).all_layers}
    for name, layer, metrics in outcome.given:
        chooses = bool(getattr(bench.method, "chooses_bits", False))
        _check_layer(views[name], layer, scheme, f"{where}, layer {name}", chooses)
        for key, value in metrics.items():
            _require(
                type(value) in (float, int, str, bool) and (isinstance(value, str) or math.isfinite(value)),
                f"{where}, layer {name}: metric {key} is {value!r}",
                "Metrics are finite numbers or text: float(x), int(x); leave out what cannot be measured.",
            )


def _check_layer(view: LayerView, layer: QuantizedLayer, scheme: Scheme, where: str, chooses: bool) -> None:
    try:
        layer.check(view.shape)
    except ValueError as error:
        raise AssertionError(f"{where}: {error}. Use Grid.pack(codes): it gives the right types.") from error
    weight = layer.weight
    _require(
        chooses or weight.bits == view.bits,
        f"{where}: {weight.bits} bits instead of {view.bits}",
        "Take them from layer.bits, or declare `chooses_bits = True` if the method shares out bits by itself.",
    )
    _require(
        not (scheme.weights.symmetric and weight.zero_point is not None),
        f"{where}: a zero point on a symmetric grid",
        "Pass task.scheme.weights.symmetric on to the grid.",
    )
    _require(
        scheme.weights.granularity == "channel" or weight.scale.numel() == 1,
        f"{where}: {weight.scale.numel()} scales where the scheme wants one per tensor",
        "Pass task.scheme.weights.granularity on to the grid.",
    )
    _require(
        weight.zero_point is None or float(weight.zero.max()) < 2**weight.bits,
        f"{where}: a zero point outside the codes' range",
        "Clamp it to 0 … 2**bits − 1, so that zero is on the grid.",
    )


def _check_activations(bench: _Bench) -> None:
    """Quantized activations, at layer inputs and everywhere: written, read back, and resumed after a kill."""
    placements: tuple[Literal["inputs", "integer"], ...] = ("inputs", "integer")
    for placement in placements:
        asked = Scheme.of(bits=4, act_bits=4, act_placement=placement)
        scheme = resolve_auto(asked, bench.method, configure(bench.method, bench.options))  # as a command has it
        case = f"activations at 4 bits ({placement})"
        outcome = bench.run(scheme, bench.batches(), case)
        _check_commits(bench, scheme, outcome, case)
        images = random_images(8, seed=2)
        with tempfile.TemporaryDirectory(prefix="coraq-conforms-") as temporary:
            folder = RunFolder(Path(temporary) / "killed")
            folder.open()
            straight = bench.write(outcome, Path(temporary) / "straight.safetensors", scheme)
            with torch.no_grad():
                reloaded = load_checkpoint(Path(temporary) / "straight.safetensors").module(images)
                _require(
                    torch.equal(reloaded, outcome.student(images)),
                    f"{bench.name}, {case}: the network that was written and read back gives other outputs",
                    "Hand activation grids over as QuantizedLayer.input; do not change task.student yourself.",
                )
            with contextlib.suppress(_Killed):
                bench.run(scheme, bench.batches(), case, folder, stop_after=len(bench.found.order) // 2)
            resumed = bench.run(scheme, bench.batches(), case, folder)
            folder.close()
            _require(
                bench.write(resumed, folder.checkpoint, scheme) == straight,
                f"{bench.name}, {case}: resumed after a kill, the result differs from a straight run's",
                "A layer's result may depend on task.stats, the layer and task.rng alone.",
            )


def _check_repeatable(bench: _Bench) -> None:
    """One seed gives one file, whatever the global random state is."""
    written = []
    scheme = Scheme.of(bits=3)
    for seed in (1, 2):
        with _global_seed(seed), tempfile.TemporaryDirectory(prefix="coraq-conforms-") as folder:
            outcome = bench.run(scheme, bench.batches(), "run twice")
            written.append(bench.write(outcome, Path(folder) / "model.safetensors", scheme))
    _require(
        written[0] == written[1],
        f"{bench.name}: two runs with one seed wrote different files",
        "Draw from task.rng, keep nothing on the class between runs, and iterate over nothing unordered.",
    )


class _global_seed:
    """Seeds torch's global generator inside, restores it after."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.state = torch.get_rng_state()
        torch.manual_seed(self.seed)

    def __exit__(self, *exc: object) -> None:
        torch.set_rng_state(self.state)


def _check_resume(bench: _Bench) -> None:
    """A run that is killed after k layers and started again ends as if nothing had happened."""
    scheme = Scheme.of(bits=3, symmetric=False)
    total = len(bench.found.order)
    with tempfile.TemporaryDirectory(prefix="coraq-conforms-") as temporary:
        straight = bench.write(
            bench.run(scheme, bench.batches(), "straight run"), Path(temporary) / "straight.safetensors", scheme
        )
        for killed_after in sorted({1, total // 2, total - 1}):
            folder = RunFolder(Path(temporary) / f"killed-{killed_after}")
            folder.open()
            case = f"resumed after {killed_after} of {total} layers"
            try:
                bench.run(scheme, bench.batches(), case, folder, stop_after=killed_after)
            except _Killed:
                pass
            else:
                raise AssertionError(f"{bench.name}, {case}: fewer commits than layers, or the kill was caught.")
            resumed = bench.run(scheme, bench.batches(), case, folder)
            folder.close()
            _require(
                bench.write(resumed, folder.checkpoint, scheme) == straight,
                f"{bench.name}, {case}: the result differs from a straight run's",
                "A layer's result may depend on task.stats, the layer and task.rng alone: carry nothing from one layer "
                "to the next (what task.layers lacks on resuming is in task.student).",
            )


def _check_awkward(method: type[Quantizer], options: dict[str, Any]) -> None:
    """Dead inputs, channels of zeros and constant channels, as trained networks have them."""
    bench = _Bench(method, options, *_folded(small_network(seed=3, awkward=True)))
    for symmetric, granularity in bench.grids:
        for bits in (2, 4):
            scheme = Scheme.of(bits=bits, symmetric=symmetric, granularity=granularity, scale_correction="off")
            case = f"network with dead and constant channels, {_describe(bits, symmetric, granularity)}"
            outcome = bench.run(scheme, bench.batches(), case)
            _check_commits(bench, scheme, outcome, case)
            with torch.no_grad():
                finite = bool(torch.isfinite(outcome.student(random_images(4, seed=2))).all())
            _require(
                finite, f"{bench.name}, {case}: the quantized network gives NaN or Inf", "Guard divisions by zero."
            )


def _check_wide(bench: _Bench) -> None:
    """Grams in blocks, as layers of very many inputs have them."""
    usual = sampling.GRAM_ENTRIES
    sampling.GRAM_ENTRIES = 200
    try:
        for granularity in dict.fromkeys(granularity for _, granularity in bench.grids):
            scheme = Scheme.of(bits=4, granularity=granularity)
            case = f"Grams in blocks, per {granularity} (LeastSquares.gram is [groups · blocks, in/blocks, in/blocks])"
            _check_commits(bench, scheme, bench.run(scheme, bench.batches(), case), case)
    finally:
        sampling.GRAM_ENTRIES = usual


def _check_images(bench: _Bench) -> None:
    """A single calibration image (Grams of rank one), every kind of bias, and no image at all."""
    for bias in ("network", "layer", "off"):
        scheme = Scheme.of(bits=4, bias_correction=bias)
        case = f"one calibration image, bias {bias}"
        outcome = bench.run(scheme, [random_images(1, seed=5)], case)
        _check_commits(bench, scheme, outcome, case)
    if not bench.method.needs_data:
        bench.run(Scheme.of(bits=4), [], "no calibration images (needs_data is False)")
        return
    try:
        bench.run(Scheme.of(bits=4), [], "no calibration images")
    except AssertionError as error:
        _require(
            isinstance(error.__cause__, CoraqError),
            f"{bench.name}: without images, quantize() ends in {type(error.__cause__).__name__}",
            "Ask task.stats or task.least_squares, which raise an error that the user understands.",
        )
    else:
        _require(False, f"{bench.name}: runs without images, but needs_data is True", "Write needs_data = False.")


def _folded(network: nn.Module) -> tuple[nn.Module, Trace]:
    return network, fold(network, random_images(2))


def _describe(bits: int, symmetric: bool, granularity: str) -> str:
    return f"{bits} bits, {'symmetric' if symmetric else 'affine'}, per {granularity}"


def _require(condition: bool, wrong: str, todo: str) -> None:
    if not condition:
        raise AssertionError(f"{wrong}. {todo}")
