"""SIGKILL at random moments: quantize, compare and export of the demo, over all methods, must end as if left alone.

    python examples/hardening/kills.py --count 100 --seed 0            # prints a table; exit code 1 if one is lost
    python examples/hardening/kills.py --count 10 --methods rtn,cora   # some methods only

After every kill each file that is there under its final name must be the undisturbed run's, byte for byte (checkpoint,
committed layers, decisions, predictions, exported files) or number for number (metrics.json, compare.json): a file
that loads but is wrong counts as a loss. Then the command is started again, killed again or left to its end, and what
it leaves is compared in the same way.

Each command runs in a child that is forked from a process which has torch loaded: the kills fall into coraq's own
work instead of into Python's imports.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import coraq
from coraq.cli.app import run

METHODS = ("rtn", "comq", "cora", "qera", "gptq", "npot", "brecq", "qdrop")
QUICK = {"brecq": ("-o", "iterations=20"), "qdrop": ("-o", "iterations=20")}
DATA = ("--calib-size", "48", "--eval-size", "30", "-j", "0", "-q", "--json")
LONGEST_S = 300.0
KILLS_A_VICTIM = 3  # before the command is left to its end
OCCASION = {  # keys of times, places and memory: no second run repeats them
    *("command", "run_dir", "machine", "stages", "total_s", "float_pass_s", "peak_memory_bytes", "memory_bound_bytes"),
    *("notes", "resumed_layers", "resumed", "float_s", "quantized_s", "ran_s", "folder", "reused", "source", "path"),
    *("latency", "time_s"),
}
BYTES = (".safetensors", ".onnx", ".pt2", "decisions.json", "histograms.json")
NUMBERS = ("metrics.json", "compare.json", "export.json")


@dataclass
class Case:
    """One command. `prepare` makes the folder that it starts from."""

    name: str
    arguments: tuple[str, ...]
    before: Path | None = None  # a finished run that the command works on
    reference: Path = Path()
    time_s: float = 0.0


@dataclass
class Tally:
    kills: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    victims: int = 0


def child(arguments: tuple[str, ...], folder: Path) -> int:
    """Fork a process that runs one command in `folder`; returns its number."""
    number = os.fork()
    if number:
        return number
    code = 70
    try:
        os.setsid()  # a kill takes worker processes along
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = run(list(arguments))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def ended(number: int, seconds: float) -> int | None:
    """The child's exit status if it ends within so many seconds."""
    until = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(number, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.001)


def kill(number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(number, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, signal.SIGKILL)  # before its setsid there is no group
    os.waitpid(number, 0)


def finish(case: Case, folder: Path) -> str | None:
    """Run to the end; what is wrong, or None."""
    number = child(case.arguments, folder)
    status = ended(number, LONGEST_S)
    if status is None:
        kill(number)
        return f"did not end within {LONGEST_S:.0f} s"
    return None if status == 0 else f"exit code {status}: {(folder / 'log').read_text()[-500:]}"


def stable(content: Any) -> Any:
    """JSON without what belongs to the occasion."""
    if isinstance(content, dict):
        return {key: stable(value) for key, value in content.items() if key not in OCCASION}
    return [stable(value) for value in content] if isinstance(content, list) else content


def wrong(case: Case, folder: Path, complete: bool) -> list[str]:
    """What differs from the undisturbed run; `complete`: files that are missing or left over count, too."""
    found = []
    paths = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    wanted = {path.relative_to(case.reference) for path in case.reference.rglob("*") if path.is_file()}
    for path in sorted(paths):
        if path.name.endswith((".tmp", ".unverified")) or ".unverified" in str(path):
            found += [f"{path} is left over"] if complete else []
        elif path not in wanted:
            found += [f"{path} should not be"] if path.name != "log.txt" else []
        elif path.name.endswith(BYTES):
            if (folder / path).read_bytes() != (case.reference / path).read_bytes():
                found.append(f"{path} has other bytes")
        elif path.name in NUMBERS:
            try:
                same = stable(json.loads((folder / path).read_text())) == stable(
                    json.loads((case.reference / path).read_text())
                )
            except ValueError:
                found.append(f"{path} is cut off")
                continue
            if path.name == "export.json":  # keyed by artefact: an interrupted one is not in it yet
                same = same or not complete
            found += [] if same else [f"{path} has other numbers"]
    for checkpoint in folder.rglob("model.safetensors"):
        if checkpoint.parent.name != "timm" and ".unverified" not in str(checkpoint):
            coraq.load(checkpoint)  # raises: caught by the caller
    if complete:
        found += [f"{path} is missing" for path in sorted(wanted - paths) if path.name != "log.txt"]
    return found


def checked(case: Case, folder: Path, complete: bool) -> list[str]:
    try:
        return wrong(case, folder, complete)
    except coraq.CoraqError as error:
        return [str(error)]


def start_folder(case: Case, parent: Path) -> Path:
    folder = Path(tempfile.mkdtemp(dir=parent))
    if case.before is not None:
        shutil.copytree(case.before, folder, dirs_exist_ok=True)
    return folder


def victim(case: Case, parent: Path, dice: random.Random, most: int, tally: Tally) -> None:
    """Kill one command up to `most` times, let it end, and compare."""
    folder = start_folder(case, parent)
    problems: list[str] = []
    killed = 0
    while killed < most:
        moment = dice.uniform(0, case.time_s)
        number = child(case.arguments, folder)
        if ended(number, moment) is not None:
            break  # what earlier attempts had done made it quicker than the dice
        kill(number)
        killed += 1
        problems += [f"after a kill at {moment:.2f} s: {line}" for line in checked(case, folder, False)]
    failure = finish(case, folder)
    problems += [failure] if failure else checked(case, folder, True)
    tally.kills[case.name] += killed
    tally.victims += 1
    tally.lost += [f"{case.name}: {problem}" for problem in problems]
    if not problems:
        shutil.rmtree(folder)


def cases(methods: tuple[str, ...], parent: Path) -> list[Case]:
    """Every method by itself, one comparison, and two exports of a finished run; with their undisturbed ends."""
    made = [
        Case(f"quantize {name}", ("quantize", "demo", "--method", name, "--bits", "3", *QUICK.get(name, ()), *DATA))
        for name in methods
    ]
    made.append(Case("compare rtn,comq", ("compare", "demo", "--methods", "rtn,comq", "--bits", "4,3", *DATA)))
    for case in made:
        reference(case, parent)
    for form in ("timm", "onnx"):
        case = Case(f"export {form}", ("export", "--format", form, "-q", "--json"), made[0].reference)
        reference(case, parent)
        made.append(case)
    return made


def reference(case: Case, parent: Path) -> None:
    case.reference = start_folder(case, parent)
    started = time.monotonic()
    failure = finish(case, case.reference)
    case.time_s = time.monotonic() - started
    if failure:
        raise SystemExit(f"{case.name}, undisturbed: {failure}")
    again, started = start_folder(case, parent), time.monotonic()
    failure = finish(case, again)
    case.time_s = min(case.time_s, time.monotonic() - started)
    different = [failure] if failure else checked(case, again, True)
    if different:
        raise SystemExit(f"{case.name}: two undisturbed runs differ: {different}")
    shutil.rmtree(again)
    print(f"{case.name}: {case.time_s:.1f} s undisturbed, twice the same", file=sys.stderr)


def preload() -> None:
    """Import in this process what commands import when they need it, so that children begin to work at once."""
    torch.set_num_threads(1)  # a fork takes no threads along
    for module in ("timm", "torchvision", "matplotlib", "jinja2", "onnx", "onnxscript", "onnxruntime", "torch.export"):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    import coraq.export.run
    import coraq.report  # noqa: F401


def main(say: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="kills in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    arguments = parser.parse_args()
    preload()
    dice, tally, started = random.Random(arguments.seed), Tally(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="coraq-kills-", dir=arguments.folder) as parent:
        made = cases(tuple(arguments.methods.split(",")), Path(parent))
        turn: list[Case] = []
        while (left := arguments.count - sum(tally.kills.values())) > 0:
            turn = turn or dice.sample(made, len(made))
            victim(turn.pop(), Path(parent), dice, min(left, KILLS_A_VICTIM), tally)
            print(f"{sum(tally.kills.values())} kills, {len(tally.lost)} problems", file=sys.stderr)
        say("| command | kills |\n|---|--:|")
        for case in made:
            say(f"| {case.name} | {tally.kills[case.name]} |")
        kills, seconds = sum(tally.kills.values()), time.monotonic() - started
        say(f"\n{kills} kills of {tally.victims} runs in {seconds:.0f} s; {len(tally.lost)} problems.")
        for line in tally.lost:
            say(f"- {line}")
    return 1 if tally.lost else 0


if __name__ == "__main__":
    sys.exit(main())
