"""Says whether every method still writes the same checkpoint for the demo, to the byte (metadata aside).

    python examples/hardening/same_bytes.py record before.json     # on the commit to compare with
    python examples/hardening/same_bytes.py check before.json      # afterwards; exits with 1 where a file differs

A record made by a coraq whose default method was called `cora` also serves one where it is called `mixed`. The first
and last layer have 8 bits in every run, given explicitly, so that a change of that default does not count.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

METHODS = ("rtn", "comq", "mixed", "qera", "brecq", "qdrop", "gptq", "npot")
BITS = (4, 2)
ACT_BITS = (None, 4)
FORMER_NAME = {"mixed": "cora"}


def content_digest(path: Path) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors of a safetensors file; its metadata does not count."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    digest = hashlib.sha256()
    for name in sorted(header):
        begin, end = header[name]["data_offsets"]
        digest.update(f"{name} {header[name]['dtype']} {header[name]['shape']}".encode())
        digest.update(data[8 + length + begin : 8 + length + end])
    return digest.hexdigest()


def known_methods() -> set[str]:
    command = [sys.executable, "-m", "coraq", "methods", "--json"]
    listed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {method["name"] for method in listed}


def run(method: str, bits: int, act_bits: int | None) -> str:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "coraq", "quantize", "demo", "--method", method, "--bits", str(bits)]
        command += ["--first-bits", "8", "--last-bits", "8", "--output", folder, "--quiet"]
        if act_bits is not None:
            command += ["--act-bits", str(act_bits)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"failed: {done.stderr.strip().splitlines()[:2]}"
        (checkpoint,) = Path(folder).rglob("model.safetensors")
        return content_digest(checkpoint)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("record", "check"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--methods", default=",".join(METHODS))
    options = parser.parse_args()
    known = known_methods()
    cells = []
    for method in options.methods.split(","):
        name = method if method in known else FORMER_NAME.get(method, method)
        cells += [(method, name, bits, act) for bits in BITS for act in ACT_BITS]
    with ThreadPoolExecutor(2) as pool:
        digests = list(pool.map(lambda cell: run(*cell[1:]), cells))
    found = {
        f"{method} W{bits}A{act or 32}": digest for (method, _, bits, act), digest in zip(cells, digests, strict=True)
    }
    if options.action == "record":
        options.file.write_text(json.dumps(found, indent=2) + "\n")
        return 0
    before = json.loads(options.file.read_text())
    different = [cell for cell, digest in found.items() if before.get(cell) != digest]
    for cell in different:
        print(f"{cell}: {before.get(cell)} before, {found[cell]} now")
    print(f"{len(found) - len(different)} of {len(found)} checkpoints have the same bytes as before")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
