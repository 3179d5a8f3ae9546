"""Coverage-guided fuzzing of the same readers, by atheris (libFuzzer): inputs that reach new lines are mutated further.

    pip install atheris
    python examples/hardening/guided.py --minutes 10 [--corpus FOLDER] [--seed 1]

The corpus is the good files, and what is kept of earlier runs in FOLDER. The first byte of an input says which file it
is, the second whether it is given a right checksum, as an attacker would; what is at fault is what `fuzz.py` says of
files under a right checksum. At the first fault the program ends with a traceback and exit code 77, and leaves the
input in a file `crash-…`. What that file does again: `guided.py crash-…`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["coraq"]):
    import fuzz
    import torch

    importlib.import_module("coraq.pipeline")  # else imported later, when the hook is gone


def corpus(bench: fuzz.Bench, names: list[str], folder: Path) -> None:
    """Every good file as an input, with and without a checksum made anew."""
    for number, name in enumerate(names):
        for signed in (0, 1):
            (folder / f"good-{number}-{signed}").write_bytes(bytes([number, signed]) + bench.good[name])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("input", nargs="?", type=Path, help="run this one input")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--corpus", type=Path, help="where inputs are kept that reach new lines")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--longest", type=float, default=30.0, help="seconds that an input may take")
    parser.add_argument("--most-mb", type=float, default=64.0, help="memory that an input may add")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="coraq-guided-") as folder:
        child = os.fork()  # libFuzzer ends its process, and would leave the folder behind
        if not child:
            guide(arguments, Path(folder))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def guide(arguments: argparse.Namespace, folder: Path) -> None:
    """Fuzz until the time is over or something is at fault; does not return."""
    kept = (arguments.corpus or folder / "corpus").absolute()
    kept.mkdir(parents=True, exist_ok=True)
    one_input = arguments.input and arguments.input.absolute()
    bench, watch = fuzz.Bench(folder), fuzz.Watch()
    names = list(bench.targets)
    if not one_input:
        corpus(bench, names, kept)

    def test(content: bytes) -> None:
        if len(content) < 3:
            return
        name, is_signed, content = names[content[0] % len(names)], bool(content[1] & 1), content[2:]
        if is_signed:
            if not name.endswith(".safetensors"):
                return
            try:
                content = fuzz.signed(*fuzz.opened(content))
            except Exception:  # what is no safetensors file at all is the other half's business
                return
        # libFuzzer reads what a checksum is compared with and writes it into the file: any content may have a right one
        outcome = fuzz.outcome_of(bench, watch, name, content, True, arguments.longest, arguments.most_mb)
        if outcome.startswith("AT FAULT"):
            raise AssertionError(f"{name}: {outcome}")

    options = [f"-seed={arguments.seed}", f"-max_total_time={60 * arguments.minutes:.0f}", "-print_final_stats=1"]
    # our own alarm watches the time: libFuzzer's would take its signal; pictures and networks need their memory
    options += ["-timeout=0", "-rss_limit_mb=4096", f"-max_len={2 + max(map(len, bench.good.values()))}"]
    options += [f"-artifact_prefix={os.getcwd()}/", str(one_input or kept)]
    atheris.Setup([sys.argv[0], *options], test)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
