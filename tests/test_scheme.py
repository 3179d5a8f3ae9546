"""The scheme's options, and what a run's identity depends on."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import Field

from coraq import pipeline, registry
from coraq.cli.app import run
from coraq.config import RunConfig, Scheme
from coraq.errors import UsageError
from coraq.methods.comq import COMQ
from coraq.scheme import SCHEME_OPTIONS

OPTIONS = {
    "bits": 3,
    "last_bits": 5,
    "act_bits": 6,
    "act_placement": "integer",
    "bias_correction": "layer",
    "overrides": {"fc": {"bits": 4}},
}


def test_options_and_scheme_say_the_same() -> None:
    scheme = Scheme.of(**OPTIONS)
    assert Scheme.of(**scheme.options()) == scheme == Scheme().replace(**OPTIONS)
    assert set(scheme.options()) == set(SCHEME_OPTIONS)
    assert Scheme.of(**Scheme().options()) == Scheme()


def test_an_option_of_activations_needs_their_bits() -> None:
    with pytest.raises(UsageError, match="--act-range percentile needs --act-bits"):
        Scheme.of(act_range="percentile")


def test_a_former_name_is_answered_with_the_present_one() -> None:
    with pytest.raises(UsageError, match="'gain' of a scheme is now called 'scale_correction'"):
        Scheme.of(gain="keep")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--gain", "keep"], "--scale-correction off"),
        (["--gain=float"], "--scale-correction network"),
        (["--bias", "layer"], "--bias-correction layer"),
        (["--act-mixed", "values"], "--act-allocation memory"),
        (["--zero-point", "quarter"], "--zero-point-fraction 2"),
        (["--calib-early", "0"], "--calib-early-images 0"),
        (["--calib-rows", "9"], "--calib-rows-per-input 9"),
        (["--act-allocation", "macs"], "--act-allocation bitops"),
        (["--bias-correction", "keep"], "--bias-correction off"),
    ],
)
def test_a_command_line_of_before_is_told_the_present_names(
    words: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["quantize", "demo", *words]) == 2
    assert f"hint: write {hint}\n" in capsys.readouterr().err


def resolved(method: str, options: dict[str, Any], **scheme: Any) -> tuple[Any, Any]:
    chosen = registry.load(method)
    weights = registry.resolve_auto(Scheme.of(**scheme), chosen, registry.configure(chosen, options)).weights
    return weights.first_bits, weights.last_bits


def test_the_first_and_last_layer_are_as_all_others_but_in_a_paper_s_preset() -> None:
    assert resolved("comq", {}) == (None, None)
    assert resolved("comq", {"preset": "paper"}) == (8, 8)
    assert resolved("comq", {"preset": "paper"}, first_bits="same", last_bits=6) == (None, 6)
    assert {own.bits for own in Scheme().resolve(["a", "b", "c"]).values()} == {4}


def test_another_default_of_a_method_s_option_makes_another_run(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder() -> str:
        return pipeline.plan(RunConfig(model="demo", method="comq"), runs_dir=tmp_path).run_dir

    before = folder()

    class Config(COMQ.Config):
        sweeps: int = Field(default=COMQ.Config().sweeps + 1)

    monkeypatch.setattr(COMQ, "Config", Config)
    assert folder() != before


def test_a_base_s_options_and_version_are_part_of_the_identity() -> None:
    config = RunConfig(model="demo")
    base = {"method": "comq", "version": "1", "options": {"sweeps": 3}}
    digests = {
        config.digest({}, bases) for bases in ([], [base], [{**base, "version": "2"}], [{**base, "options": {}}])
    }
    assert len(digests) == 4


def test_a_default_that_is_written_out_makes_no_other_run() -> None:
    said = RunConfig(model="demo", scheme=Scheme.of(**Scheme().options()), seed=0)
    assert said.digest() == RunConfig(model="demo").digest()


def test_a_description_says_the_bits_that_are_in_the_file() -> None:
    scheme = Scheme.of(bits=3)
    assert scheme.describe().startswith("W3A32, affine")
    assert scheme.describe({"a": 3, "b": 3}).startswith("W3A32, affine")
    assert scheme.describe({"a": 4, "b": 8}).startswith("budget of 3 bits a weight, layers 4 to 8 bits, A32")
    assert "first/last layer 8/3 bits" in Scheme.of(bits=3, first_bits=8).describe()


def test_a_budget_of_bytes_is_named_in_place_of_the_scheme_s_bits() -> None:
    config = RunConfig(model="demo", method="rdoq", size=60000)
    line = config.scheme.describe({"stem": 3.21, "head": 0.5}, config.budget_text)
    assert line.startswith("budget of 60,000 bytes, layers 0.5 to 3.21 bits, A32")
    assert RunConfig(model="demo", ratio=8).budget_text == "1/8 of the float bytes"
    assert RunConfig(model="demo", budget_bits=2.7).budget_text == "2.7 bits a weight"
    assert RunConfig(model="demo").budget_text is None
