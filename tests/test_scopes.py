"""Claims about scopes: a task offers what a method's scope says and no more, and plugins keep to coraq.api."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from support.tasks import make_task, run_method

from coraq.api import BlockTask, LayerMethod, LayerProblem, LayerTask, MethodConfig, NetworkTask, QuantizedLayer
from coraq.calibration.scopes import OFFERED, Scope
from coraq.config import Scheme
from coraq.errors import UsageError
from coraq.methods.comq import COMQ
from coraq.testing.networks import random_images, small_network

PLUGINS = Path(__file__).resolve().parents[1] / "plugins"
PROTOCOLS: dict[Scope, type] = {"layer": LayerTask, "block": BlockTask, "network": NetworkTask}


def members(protocol: type) -> set[str]:
    return {name for base in protocol.__mro__ for name in vars(base) if not name.startswith("_")}


@pytest.mark.parametrize("scope", get_args(Scope))
def test_a_scope_offers_what_its_protocol_says(scope: Scope) -> None:
    assert OFFERED[scope] == members(PROTOCOLS[scope])


class Curious(LayerMethod):
    """Asks for what only wider scopes offer."""

    name = "curious"
    summary = "asks for too much"
    version = "1"
    needs_data = False

    class Config(MethodConfig):
        pass

    def quantize(self, task: Any) -> None:
        task.partition()


def test_a_method_that_asks_for_what_its_scope_lacks_is_told_both() -> None:
    task = make_task(small_network(), Scheme(), [random_images(4)])
    with pytest.raises(UsageError) as caught:
        run_method(task, Curious)
    assert "method curious has scope 'layer', which does not offer task.partition" in caught.value.message
    assert 'scope = "block"' in caught.value.hint


def test_a_layer_method_is_a_pure_function_of_its_problem() -> None:
    """The codes of a run are those of `quantize_layer` on the problems that a task poses, asked twice."""
    done = run_method(make_task(small_network(), Scheme.of(bits=3), [random_images(16)]), COMQ)
    task, method = make_task(small_network(), Scheme.of(bits=3), [random_images(16)]), COMQ(COMQ.Config())
    for layer in task.layers:
        problem = task.problem(layer.name)
        first, second = (problem.restore(method.quantize_layer(problem)) for _ in range(2))
        assert torch.equal(first.weight.codes, second.weight.codes)
        task.commit(layer.name, first)
        assert torch.equal(first.weight.codes, done.quantized[layer.name].weight.codes), layer.name
    task.close()


class Doubled(LayerMethod):
    """Knows nothing of column scales."""

    name = "doubled"
    summary = "nearest rounding on a min-max grid"
    version = "1"
    needs_data = False

    class Config(MethodConfig):
        pass

    def quantize_layer(self, problem: LayerProblem) -> QuantizedLayer:
        grid = problem.grid_spec.minmax(problem.weight)
        return QuantizedLayer(grid.pack(grid.codes(problem.weight)))


def test_column_scales_are_applied_for_a_layer_method() -> None:
    scheme = Scheme.of(bits=3, column_scale="channel")
    layers = run_method(make_task(small_network(), scheme, [random_images(16)]), Doubled).quantized
    assert layers["dense"].weight.columns is not None
    whole = run_method(make_task(small_network(), Scheme.of(bits=3), [random_images(16)]), Doubled).quantized
    assert not torch.equal(layers["dense"].weight.codes, whole["dense"].weight.codes)


@pytest.mark.parametrize("path", sorted(PLUGINS.glob("*.py")), ids=lambda path: path.stem)
def test_plugins_import_nothing_of_ours_but_the_api_and_core(path: Path) -> None:
    tree = ast.parse(path.read_text())
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    ours = [module for module in modules if module and module.split(".")[0] == "coraq"]
    assert ours
    assert all(module == "coraq.api" or module.startswith("coraq.core") for module in ours)
