"""Claims about the method rdoq, and about budgets that a user names, through the real calibration task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tasks import make_task, run_method

from coraq import registry
from coraq.artifact import load_checkpoint
from coraq.calibration.task import CalibrationTask
from coraq.cli.options import parse_file_size, parse_weight_bits
from coraq.config import DataConfig, RunConfig, Scheme
from coraq.core import sensitivity
from coraq.core.sensitivity import kl_of_errors, kl_of_errors_by_channel
from coraq.errors import UsageError
from coraq.events import ListSink
from coraq.methods.rdoq import RDOQ, _blended
from coraq.pipeline import run
from coraq.pipeline.cache import RunCache
from coraq.pipeline.prepare import prepare
from coraq.testing.networks import random_images, small_network

BATCHES = list(random_images(96, seed=1).split(32))


def task(**arguments: Any) -> CalibrationTask:
    return make_task(small_network(), arguments.pop("scheme", Scheme.of(bits=3)), BATCHES, **arguments)


def bits_of(one: CalibrationTask) -> float:
    """Bits a weight as stored."""
    layers = one.quantized.values()
    return 8 * sum(layer.size_bytes() for layer in layers) / sum(layer.weight.codes.numel() for layer in layers)


def error_of(one: CalibrationTask) -> float:
    """Relative squared error of the logits."""
    with torch.no_grad():
        pairs = [(one.teacher(x), one.student(x)) for x in BATCHES]
    return sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(a.square().sum()) for a, _ in pairs)


@pytest.mark.parametrize("bits", [3.0, 4.3, 6.0])
def test_the_budget_is_met_from_below(bits: float) -> None:
    one = run_method(task(), RDOQ, {"bits_per_weight": bits})
    assert 0.995 * bits <= bits_of(one) <= bits


def test_more_bytes_lose_less() -> None:
    errors = [error_of(run_method(task(), RDOQ, {"bits_per_weight": bits})) for bits in (2.5, 3.5, 5.0, 7.0)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05 * errors[0]


def test_at_equal_bytes_less_is_lost_than_by_any_fixed_width() -> None:
    base = run_method(task(scheme=Scheme.of(bits=3)), registry.load("comq"))
    one = run_method(task(), RDOQ, {"bits_per_weight": bits_of(base)})
    assert bits_of(one) <= bits_of(base)
    assert error_of(one) < 0.6 * error_of(base)


@pytest.mark.parametrize("options", [{"columns": True}, {"sweeps": 0}, {"rounds": 1}, {"blend": 0.0}])
def test_every_option_gives_codes_that_fit_the_budget(options: dict[str, Any]) -> None:
    one = run_method(task(), RDOQ, {"bits_per_weight": 4.0, **options})
    assert 3.9 < bits_of(one) <= 4.0
    for layer in one.quantized.values():
        assert layer.weight.coding == "ans"
        assert int(layer.weight.codes.min()) >= 1


def test_a_budget_below_scales_and_tables_says_the_least() -> None:
    with pytest.raises(UsageError) as caught:
        run_method(task(), RDOQ, {"bits_per_weight": 0.2})
    assert "at least" in caught.value.hint


def test_a_killed_run_goes_on_to_the_same_codes() -> None:
    decisions: dict[str, Any] = {}
    whole = run_method(task(decisions=decisions), RDOQ, {"bits_per_weight": 4.0})
    half = dict(list(whole.committed.items())[:2])
    again = run_method(task(done=half, decisions=decisions), RDOQ, {"bits_per_weight": 4.0})
    for name, layer in whole.quantized.items():
        assert torch.equal(layer.weight.codes, again.quantized[name].weight.codes)


def test_the_kl_of_single_channels_is_that_of_errors_in_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "_by_probability", sensitivity._by_slope)  # the same labels for both
    one = task()
    layer = one.layers[1]
    generator = torch.Generator().manual_seed(0)
    error = 0.01 * torch.randn(layer.shape, generator=generator)

    def drawn() -> torch.Generator:
        return torch.Generator().manual_seed(7)

    found = kl_of_errors_by_channel(one.teacher, {layer.name: error}, BATCHES, drawn())[layer.name]
    assert found.shape == (layer.shape[0] * layer.shape[1],)
    for channel in (0, 3):
        alone = torch.zeros_like(error).flatten(0, 1)
        alone[channel] = error.flatten(0, 1)[channel]
        kl = kl_of_errors(one.teacher, {layer.name: alone.reshape(layer.shape)}, BATCHES, drawn())[layer.name]
        assert float(found[channel]) == pytest.approx(kl, rel=1e-4)


@pytest.mark.parametrize("blend", [0.0, 0.5, 1.0])
def test_channels_together_cost_what_was_measured_of_their_layer(blend: float) -> None:
    generator = torch.Generator().manual_seed(0)
    kl = {"conv": torch.rand(1, 30, generator=generator).double() ** 8, "dead": torch.zeros(1, 4).double()}
    energy = {"conv": torch.rand(1, 30, generator=generator).double(), "dead": torch.zeros(1, 4).double()}
    kl["conv"][0, 3] = 0.0
    found = _blended(kl, energy, blend)
    assert float((found["conv"] * energy["conv"]).sum()) == pytest.approx(float(kl["conv"].sum()))
    assert all(bool((own > 0).all()) and bool(torch.isfinite(own).all()) for own in found.values())


def _config(method: str = "rdoq", **more: Any) -> RunConfig:
    data = DataConfig(calib_size=64, eval_size=64)
    return RunConfig(model="demo", method=method, data=data, **more)


@pytest.mark.parametrize(("method", "within"), [("rdoq", 0.005), ("mixed", 0.02)])
def test_a_named_size_is_met_by_the_whole_file(method: str, within: float, tmp_path: Path) -> None:
    result = run(_config(method, size=85_000), runs_dir=tmp_path)
    assert 85_000 * (1 - within) <= result.size.file_bytes <= 85_000
    path = Path(result.run_dir) / "model.safetensors"
    assert path.stat().st_size == result.size.file_bytes
    assert len(load_checkpoint(path).layers) == len(result.layers)


def test_a_ratio_is_a_size(tmp_path: Path) -> None:
    result = run(_config(ratio=7.0), runs_dir=tmp_path)
    assert 7.0 <= result.size.float_bytes / result.size.file_bytes <= 7.0 * 1.005


def test_coding_changes_bytes_and_nothing_else(tmp_path: Path) -> None:
    packed, coded = (run(_config("rtn", coding=coding), runs_dir=tmp_path) for coding in ("packed", "auto"))
    assert coded.size.file_bytes < packed.size.file_bytes
    assert coded.comparison.kl_nats == packed.comparison.kl_nats
    opened = load_checkpoint(Path(coded.run_dir))
    assert {layer.weight.coding for layer in opened.layers.values()} <= {"ans", "packed"}


@pytest.mark.parametrize("budget", [{"size": 90_000}, {"ratio": 8.0}, {"budget_bits": 2.7}])
def test_a_method_that_cannot_choose_says_which_can(budget: dict[str, Any]) -> None:
    shared = RunCache()
    shared.begin(ListSink())
    with pytest.raises(UsageError) as caught:
        prepare(_config("rtn", **budget), ListSink(), shared)
    assert "rdoq" in caught.value.hint
    assert "mixed" in caught.value.hint


@pytest.mark.parametrize("method", ["rdoq", "mixed"])
@pytest.mark.parametrize("size", [1_000, 30_000])
def test_an_impossible_size_is_a_usage_error(method: str, size: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        run(_config(method, size=size), runs_dir=tmp_path)


def test_two_budgets_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="one way"):
        _config(size=1000, ratio=8.0)
    with pytest.raises(ValueError, match="one way"):
        _config(ratio=8.0, budget_bits=2.5)


def test_a_run_without_a_budget_has_the_name_that_it_had() -> None:
    assert _config().digest() == _config(coding=None, size=None).digest()
    assert _config(size=5).digest() != _config().digest()


def test_sizes_and_bits_are_read_as_written() -> None:
    assert parse_file_size("1.5MB") == 1_500_000
    assert parse_file_size("800kB") == 800_000
    assert parse_file_size("1 MiB") == 1_048_576
    assert parse_file_size("123") == 123
    assert parse_weight_bits("4") == 4
    assert isinstance(parse_weight_bits("4"), int)
    assert parse_weight_bits("2.7") == 2.7


@pytest.mark.parametrize("text", ["1.5 elephants", "0", "-1MB", "", "nan", "1e6", "0.0MB"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(Exception, match="is not a size"):
        parse_file_size(text)
