"""Methods of strangers that misbehave: named, with what to do; the run folder stays as consistent as after a kill."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import fails

from coraq import registry
from coraq.artifact import RunFolder
from coraq.cli.app import run

PLUGIN = """
import time, sys, torch
from typing import ClassVar
from coraq.api import MethodConfig, QTensor, QuantizedLayer, minmax_grid
{top}

class Faulty:
    name, summary, version, needs_data = {name!r}, "misbehaves", "1", False
    scope = "layer"

    class Config(MethodConfig):
        pass

    def __init__(self, config):
        self.config = config

    def codes(self, layer):
        grid = minmax_grid(layer.weight, layer.bits)
        return QuantizedLayer(grid.pack(grid.codes(layer.weight)))

    def quantize(self, task):
        for index, layer in enumerate(task.layers):
            {body}
            task.commit(layer.name, self.codes(layer))

METHODS = [Faulty]
"""
DEMO = ["quantize", "demo", "--calib-size", "4", "--eval-size", "4", "-j", "0", "-q"]
FAULTS = {
    "raises": ("if index == 2: raise ZeroDivisionError('by nothing')", "ZeroDivisionError: by nothing"),
    "exits": ("if index == 2: sys.exit()", "SystemExit"),
    "commits twice": ("task.commit(layer.name, self.codes(layer))", "was committed twice"),
    "another layer": ("task.commit('nowhere', self.codes(layer))", "there is no layer 'nowhere'"),
    "no name": ("task.commit([], self.codes(layer))", "there is no layer []"),
    "no layer": ("task.commit(layer.name, None)", "is invalid"),
    "forgets": ("if index == 2: continue", "left 1 of"),
    "wrong shape": ("task.commit(layer.name, QuantizedLayer(self.codes(layer).weight.__class__("
                    "self.codes(layer).weight.codes[:, :1], self.codes(layer).weight.scale, 4)))", "have shape"),
    "wrong type": ("task.commit(layer.name, QuantizedLayer(QTensor(layer.weight, torch.ones(1, 1, 1), 4)))", "float32"),
    "not finite": ("task.commit(layer.name, QuantizedLayer(QTensor(torch.zeros(layer.shape, dtype=torch.uint8), "
                   "torch.full((1, 1, 1), float('nan')), 4)))", "must be finite"),
    "absurd bits": ("task.commit(layer.name, QuantizedLayer(QTensor(torch.zeros(layer.shape, dtype=torch.uint8), "
                    "torch.ones(1, 1, 1), 999)))", "bits is 999"),
}  # fmt: skip


def plugin(folder: Path, body: str = "pass", top: str = "", name: str = "faulty") -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "faulty.py").write_text(PLUGIN.format(body=body, top=top, name=name))
    return ["--method", "faulty", "--plugins-dir", str(folder)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CORAQ_PLUGINS", raising=False)
    return tmp_path


@pytest.mark.parametrize("fault", FAULTS)
def test_a_method_s_fault_is_named_and_its_run_is_left_unfinished(
    fault: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body, message = FAULTS[fault]
    fails([*DEMO, *plugin(here / "strange", body)], capsys, 1, "method faulty", message, hint="tell its author")
    (folder,) = (here / "runs").iterdir()
    assert not (folder / "metrics.json").exists()
    assert not (folder / "model.safetensors").exists()
    assert not list(folder.rglob("*.tmp"))
    assert len(RunFolder(folder).committed()) == len(list((folder / "layers").iterdir()))


def test_a_mended_method_starts_afresh_and_the_same_one_resumes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plugin's content is part of a run's identity: layers of before an edit are not taken for those of after it."""
    command = [*DEMO, *plugin(here / "strange", FAULTS["raises"][0])]
    for _ in range(2):
        fails(command, capsys, 1, "method faulty", hint="tell its author")
    (folder,) = (here / "runs").iterdir()
    left = RunFolder(folder).committed()
    assert len(left) == 4  # it fails behind the second layer that it commits, each time
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert sum(event.get("resumed", False) for event in events) == 2
    registry._import_file.cache_clear()
    assert run([*DEMO, *plugin(here / "strange")]) == 0
    (mended,) = set((here / "runs").iterdir()) - {folder}
    events = [json.loads(line) for line in (mended / "events.jsonl").read_text().splitlines()]
    assert not any(event.get("resumed", False) for event in events)


@pytest.mark.parametrize("top", ["sys.exit(0)", "import no_such_module", "(", "\x00"])
def test_a_plugin_that_cannot_be_imported_does_not_end_the_program(
    top: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails([*DEMO, *plugin(here / "strange", top=top)], capsys, 1, "method 'faulty'", "faulty.py", hint="coraq methods")
    assert run([*DEMO, "--method", "rtn"]) == 0


def test_a_plugin_that_hangs_at_import_is_given_up(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "IMPORT_S", 0.5)
    top = "while True:\n    try:\n        time.sleep(60)\n    except Exception:\n        pass"
    fails([*DEMO, *plugin(here / "strange", top=top)], capsys, 1, "faulty.py", "takes more than 0.5 s")


@pytest.mark.parametrize("name", ["../../outside", "", ".hidden", "a\n"])
def test_a_method_s_name_cannot_lead_out_of_the_runs_folder(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails([*DEMO, *plugin(here / "strange", name=name)], capsys, 1, "its name")
    assert not (here / "runs").exists()


def test_neither_the_current_folder_nor_a_run_s_runs_code(here: Path) -> None:
    trap = f"open({str(here / 'ran')!r}, 'w')"
    for name in ("plugins/trap.py", "trap.py", "sitecustomize.py", "timm.py", "coraq/__init__.py", "runs/x/plugin.py"):
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(trap)
    program = str(Path(sys.executable).with_name("coraq"))
    done = subprocess.run([program, *DEMO, "--method", "rtn"], capture_output=True, text=True, check=False, cwd=here)
    assert done.returncode == 0, done.stderr
    assert not (here / "ran").exists()
