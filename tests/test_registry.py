"""Methods are found by name, wherever they come from; what cannot be used is listed with its reason."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from coraq import registry
from coraq.api import MethodConfig
from coraq.errors import CoraqError, UsageError
from coraq.testing import assert_conforms

PLUGIN = '''
"""A method in a file of its own, with a dataclass and a nested pydantic model in it."""
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar, Literal
from coraq.api import Field, MethodConfig, QuantizedLayer, minmax_grid

@dataclass(frozen=True)
class Shrunk:
    factor: ClassVar[float] = 0.9
    name: str = ""

class NAME_CLASS:
    name = "NAME"
    summary = "nearest rounding on a smaller range"
    version = "1"
    needs_data = False
    scope = "layer"
    class Config(MethodConfig):
        kind: Literal["a", "b"] = Field(default="a", description="kind of range")
        shrink: float = Field(default=1.0, gt=0, le=1, description="factor on the range")
    def __init__(self, config: Config) -> None:
        self.config = config
    def quantize(self, task) -> None:
        for layer in task.layers:
            weight = layer.weight * self.config.shrink
            grid = minmax_grid(weight, layer.bits, task.scheme.weights.symmetric, task.scheme.weights.granularity)
            task.commit(layer.name, QuantizedLayer(grid.pack(grid.codes(layer.weight))))

METHODS = [NAME_CLASS]
'''


@pytest.fixture(autouse=True)
def _no_plugins_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CORAQ_PLUGINS", raising=False)


def write_plugin(folder: Path, name: str, file: str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / (file or f"{name}.py")
    path.write_text(PLUGIN.replace("NAME_CLASS", name.title().replace("-", "")).replace("NAME", name))
    return path


def test_the_built_in_methods_are_there() -> None:
    infos = registry.available()
    assert {"rtn", "comq"} <= set(infos)
    assert all(infos[name].source == "built-in" and infos[name].error is None for name in registry.BUILT_IN)
    assert registry.find("rtn")[1] == "built-in"


def test_the_checkout_s_own_plugins_come_through_the_same_door() -> None:
    info = registry.available()["gptq"]
    assert info.source == str(Path(__file__).parents[1] / "plugins" / "gptq.py")


def test_a_plugin_file_with_dataclasses_and_pydantic_in_it_works(tmp_path: Path) -> None:
    path = write_plugin(tmp_path, "shrunk")
    info = registry.available([tmp_path])["shrunk"]
    assert (info.source, info.error, info.needs_data) == (str(path), None, False)
    method = registry.load("shrunk", [tmp_path])
    assert registry.configure(method, {"kind": "b"}).kind == "b"  # type: ignore[attr-defined]
    assert_conforms(method, {"shrink": 0.9}, bits=(4,))


def test_a_plugin_folder_can_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_plugin(tmp_path / "one", "one-method")
    write_plugin(tmp_path / "two", "two-method")
    monkeypatch.setenv("CORAQ_PLUGINS", os.pathsep.join([str(tmp_path / "one"), str(tmp_path / "two")]))
    assert {"one-method", "two-method"} <= set(registry.available())
    assert registry.find("two-method")[1] == str(tmp_path / "two" / "two-method.py")


def test_a_plugin_folder_that_does_not_exist_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"no plugin folder .*/nowhere"):
        registry.available([tmp_path / "nowhere"])
    monkeypatch.setenv("CORAQ_PLUGINS", str(tmp_path / "elsewhere"))
    with pytest.raises(UsageError, match=r"no plugin folder .*/elsewhere"):
        registry.load("anything")


def test_a_plugin_is_imported_once(tmp_path: Path) -> None:
    write_plugin(tmp_path, "shrunk")
    assert registry.load("shrunk", [tmp_path]) is registry.load("shrunk", [tmp_path])


def test_two_plugins_of_one_file_name_do_not_mix(tmp_path: Path) -> None:
    write_plugin(tmp_path / "a", "first", "same.py")
    write_plugin(tmp_path / "b", "second", "same.py")
    folders = [tmp_path / "a", tmp_path / "b"]
    first, second = registry.load("first", folders), registry.load("second", folders)
    assert first.__module__ != second.__module__
    assert {first.__module__, second.__module__} <= set(sys.modules)


@pytest.mark.parametrize("name", ["shrunk", "rtn"])
def test_two_methods_of_one_name_are_an_error_that_names_both_files(name: str, tmp_path: Path) -> None:
    write_plugin(tmp_path, name, "one.py")
    if name != "rtn":
        write_plugin(tmp_path, name, "two.py")
    other = "built-in" if name == "rtn" else "one.py"
    mine = "one.py" if name == "rtn" else "two.py"
    with pytest.raises(CoraqError, match=f"two methods are named '{name}': .*{other} and .*{mine}"):
        registry.load(name, [tmp_path])
    listed = registry.available([tmp_path])[name]
    assert listed.error is not None
    assert other in listed.error
    assert mine in listed.error
    assert registry.load("comq", [tmp_path])  # the others go on working


def test_a_plugin_that_cannot_be_imported_is_listed_with_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import coraq.api\nraise RuntimeError('a plugin of mine')\n")
    info = registry.available([tmp_path])["broken"]
    assert info.error is not None
    assert "Traceback" in info.error
    assert "broken.py" in info.error
    assert info.source == str(tmp_path / "broken.py")
    with pytest.raises(CoraqError, match="is broken: RuntimeError: a plugin of mine"):
        registry.load("broken", [tmp_path])
    assert registry.load("rtn", [tmp_path])
    assert registry.import_plugins([tmp_path]) == [
        f"plugin {tmp_path / 'broken.py'} is broken and ignored: RuntimeError: a plugin of mine"
    ]
    assert not [name for name in sys.modules if name.startswith("coraq_plugin_broken")]


def test_a_class_that_is_no_method_is_listed_with_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "half.py").write_text("class Half:\n    name = 'half'\n    version = '1'\nMETHODS = [Half]\n")
    error = registry.available([tmp_path])["half"].error
    assert error is not None
    assert "lacks summary, needs_data, scope, Config, quantize" in error
    (tmp_path / "half.py").unlink()
    source = PLUGIN.replace("NAME_CLASS", "M").replace("NAME", "other").replace("(MethodConfig)", "")
    (tmp_path / "other.py").write_text(source)
    error = registry.available([tmp_path])["other"].error
    assert error is not None
    assert "MethodConfig" in error


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown method 'comp'") as caught:
        registry.load("comp")
    assert "Did you mean comq" in caught.value.hint
    assert "rtn" in caught.value.hint
    assert caught.value.exit_code == 2


def test_an_unknown_option_is_answered_with_the_nearest_and_all() -> None:
    with pytest.raises(UsageError, match="method comq has no option 'sweep'") as caught:
        registry.configure(registry.load("comq"), {"sweep": 3})
    assert "Did you mean sweeps" in caught.value.hint
    assert "damping" in caught.value.hint


def test_an_option_out_of_range_names_option_and_value() -> None:
    with pytest.raises(UsageError, match=r"option sweeps of comq is -1"):
        registry.configure(registry.load("comq"), {"sweeps": -1})


def test_a_method_without_options_says_so() -> None:
    class Bare:
        name = "bare"

        class Config(MethodConfig):
            pass

    with pytest.raises(UsageError) as caught:
        registry.configure(Bare, {"x": 1})  # type: ignore[arg-type]
    assert caught.value.hint == "bare has no options."


class FakeEntryPoint:
    """What `importlib.metadata` gives for an installed package; `target` is the class or the error on loading it."""

    group = registry.ENTRY_POINTS
    value = "package.module:Method"
    dist = None

    def __init__(self, name: str, target: Any) -> None:
        self.name, self.target = name, target

    def load(self) -> Any:
        if isinstance(self.target, Exception):
            raise self.target
        return self.target


def test_methods_of_installed_packages_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_plugin(tmp_path, "packaged")
    method = registry.load("packaged", [tmp_path])
    points: list[FakeEntryPoint | EntryPoint] = [
        FakeEntryPoint("packaged", method),
        FakeEntryPoint("shattered", ImportError("no module named numba")),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    assert registry.find("packaged") == (method, "entry point package.module:Method")
    assert "numba" in (registry.available()["shattered"].error or "")
    with pytest.raises(CoraqError, match="is broken: ImportError: no module named numba"):
        registry.load("shattered")


def test_an_entry_point_cannot_replace_a_built_in_in_silence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_plugin(tmp_path, "rtn")
    (found,) = registry._from_file(tmp_path / "rtn.py")
    monkeypatch.setattr(registry, "entry_points", lambda group: [FakeEntryPoint("rtn", found.method)])
    with pytest.raises(CoraqError, match="two methods are named 'rtn'"):
        registry.load("rtn")


def test_the_current_folder_is_never_searched(tmp_path: Path) -> None:
    # neither plugins in it nor beside it, nor modules that shadow ours
    for folder in (tmp_path, tmp_path / "plugins"):
        folder.mkdir(exist_ok=True)
        (folder / "stranger.py").write_text("raise SystemExit('a stranger\\'s code ran')\n")
    (tmp_path / "pyproject.toml").write_text("")
    environment = {key: value for key, value in os.environ.items() if key not in ("CORAQ_PLUGINS", "PYTHONPATH")}
    done = subprocess.run(
        [Path(sys.executable).with_name("coraq"), "methods", "--json"], cwd=tmp_path, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "stranger" not in done.stdout + done.stderr


def test_a_plugin_file_may_register_architectures(tmp_path: Path) -> None:
    (tmp_path / "zoo.py").write_text(
        textwrap.dedent("""
        from timm.models import register_model
        from timm.models.resnet import ResNet, BasicBlock

        @register_model
        def coraq_test_resnet(pretrained=False, **kwargs):
            kwargs = {k: v for k, v in kwargs.items() if k in ("num_classes",)}
            return ResNet(BasicBlock, (1, 1, 1, 1), channels=(8, 8, 8, 8), **kwargs)
        """)
    )
    assert not timm.is_model("coraq_test_resnet")
    assert registry.import_plugins([tmp_path]) == []
    assert timm.is_model("coraq_test_resnet")
    assert registry.available([tmp_path]).keys() == registry.available().keys()
    network = timm.create_model("coraq_test_resnet", num_classes=3).eval()
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
