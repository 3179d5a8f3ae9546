"""Mutation fuzzer over everything that coraq reads: checkpoints, run folders, networks in folders, pictures.

    python examples/hardening/fuzz.py --count 100000 --seed 0         # prints a table; exit code 1 if one is at fault
    python examples/hardening/fuzz.py --count 1 --seed 0 --skip 4711  # one input again

Every input is a mutation of a good file: cut, flipped, spliced, with another header, or with other contents under a
right checksum (an attacker can compute one). The only good ends are a CoraqError, or a result that is consistent: a
file without a right checksum of its own must give the original network back, bit for bit, or nothing. At fault is: any
other exception, more than `--longest` seconds, more memory than `--most-mb` at once, and, seen by an audit hook, a file
written, a socket opened, a process started or a pickle read.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

import coraq
from coraq.artifact import RunFolder, load_checkpoint, read_histograms, read_predictions, read_result
from coraq.artifact.codec import content_digest
from coraq.config import DataConfig, RunConfig, Scheme
from coraq.data import Preprocess
from coraq.data.imageset import DecodedImages
from coraq.data.sources import FileSource
from coraq.errors import CoraqError
from coraq.network.load import load_model
from coraq.testing import random_images, small_network

DEEP = 100_000
HOSTILE: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        7,
        9,
        64,
        255,
        2**31 - 1,
        2**31,
        2**53,
        2**63 - 1,
        2**63,
        2**64,
        10**30,
        -(10**30),
    ),
    *(0.5, -0.0, 1e-320, 1e38, 1e39, 1e308, float("inf"), float("-inf"), float("nan")),
    *(
        "",
        "a",
        "../../etc/passwd",
        "/etc/passwd",
        "local-dir:/",
        "hf-hub:a/b",
        "stem",
        "head",
        "\x00",
        "\ud800",
        "é" * 300,
    ),
    *([], {}, [1], [[]], [1, 2, 3], [0, 0, 0], [-1, -1, -1], [2**40, 2**40, 2**40], {"a": 1}, {"bits": 4}),
    *("resnet50", "vit_giant_patch14_224", "coraq_small", "__class__", "layers", "cuda", "float64", "I8", "F64", "U64"),
]
KEYS = [
    *("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "features_only"),
    *("num_classes", "in_chans", "img_size", "../x", "", "version", "architecture", "model_args", "stem", "head"),
]  # fmt: skip


# ---------------------------------------------------------------- mutations


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and its tensors' bytes."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def join(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every node of a JSON value but its root."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*place, key)
        yield from places(inner, (*place, key))


def with_other_json(value: Any, dice: random.Random) -> Any:
    """One to three nodes replaced, deleted, renamed, moved or added."""
    value = copy.deepcopy(value)
    for _ in range(dice.randint(1, 3)):
        nodes = list(places(value))
        if not nodes:
            return value
        *way, last = dice.choice(nodes)
        parent = value
        for key in way:
            parent = parent[key]
        action = dice.random()
        if action < 0.6:
            parent[last] = copy.deepcopy(dice.choice(HOSTILE))
        elif action < 0.7 and isinstance(parent[last], (int, float)) and not isinstance(parent[last], bool):
            parent[last] = parent[last] + dice.choice((-1, 1, 1000, 0.5))
        elif action < 0.8:
            del parent[last]
        elif isinstance(parent, dict):
            parent[dice.choice([*KEYS, *map(str, parent)])] = (
                parent.pop(last) if dice.random() < 0.5 else copy.deepcopy(dice.choice(HOSTILE))
            )
        else:
            parent.extend(copy.deepcopy(parent[: dice.randint(1, 3)]))
    return value


def truncated(content: bytes, dice: random.Random) -> bytes:
    return content[: dice.randrange(len(content))]


def extended(content: bytes, dice: random.Random) -> bytes:
    return content + dice.randbytes(dice.choice((1, 8, 4096)))


def bits_flipped(content: bytes, dice: random.Random) -> bytes:
    damaged = bytearray(content)
    header = 8 + int.from_bytes(content[:8], "little") if dice.random() < 0.5 else len(content)
    for _ in range(dice.choice((1, 1, 1, 2, 8))):
        damaged[dice.randrange(max(min(header, len(damaged)), 1))] ^= 1 << dice.randrange(8)
    return bytes(damaged)


def spliced(content: bytes, dice: random.Random) -> bytes:
    """A part copied, dropped or overwritten somewhere else."""
    start, length, to = dice.randrange(len(content)), dice.choice((1, 2, 8, 100, 1000)), dice.randrange(len(content))
    part = dice.choice((content[start : start + length], bytes(length), b"\xff" * length, b"[" * length))
    return content[:to] + part + content[to + dice.choice((0, length)) :]


def other_length(content: bytes, dice: random.Random) -> bytes:
    """A header that says it is longer or shorter than it is: up to all that 64 bits can say."""
    right = int.from_bytes(content[:8], "little")
    wrong = dice.choice((0, 1, right - 1, right + 1, len(content), 10**8, 10**8 + 1, 2**31, 2**63 - 1, 2**64 - 1))
    return struct.pack("<Q", max(wrong, 0)) + content[8:]


def other_header(content: bytes, dice: random.Random) -> bytes:
    """Other names, types, shapes and offsets of tensors, unsigned."""
    header, data = split(content)
    return join(with_other_json(header, dice), data)


def deep_header(content: bytes, dice: random.Random) -> bytes:
    text = dice.choice((b"[" * DEEP, b'{"a":' * DEEP, b'{"__metadata__":' + b"[" * DEEP))
    return struct.pack("<Q", len(text)) + text + content[-100:]


def other_tensors(content: bytes, dice: random.Random) -> bytes:
    """Other contents, types, shapes, names or numbers of tensors, under a right checksum."""
    tensors, about = opened(content)
    for _ in range(dice.randint(1, 2)):
        name = dice.choice(list(tensors))
        value = tensors[name]
        changes: list[Callable[[], Tensor]] = [
            lambda v=value: torch.full_like(v, dice.choice((0, 1, 255)) if not v.is_floating_point() else float("nan")),
            lambda v=value: v * 0 + dice.choice((0, 1, 3)),
            lambda v=value: v.to(dice.choice((torch.float64, torch.float16, torch.int64, torch.bool, torch.bfloat16))),
            lambda v=value: v.reshape(-1),
            lambda v=value: v.reshape(1, *v.shape),
            lambda v=value: v[:0] if v.dim() else v,
            lambda v=value: torch.zeros(
                dice.choice(((0, 2**40), (2**40, 0), (0,), (), (1, 1, 1, 1, 1))), dtype=v.dtype
            ),
        ]
        action = dice.random()
        if action < 0.7:
            tensors[name] = dice.choice(changes)().contiguous()
        elif action < 0.8:
            del tensors[name]
        else:
            new = dice.choice([*KEYS, name + "x", name.rpartition(".")[0] + ".weight", *tensors])
            tensors[new] = value.clone()
        if not tensors:
            break
    return signed(tensors, about)


def other_metadata(content: bytes, dice: random.Random) -> bytes:
    """Another architecture, scheme, shape, bit width, grid, …, under a right checksum."""
    tensors, about = opened(content)
    key = dice.choice([key for key in about if key != "sha256"])
    try:
        value = json.loads(about[key])
    except ValueError:
        value = about[key]
    if isinstance(value, (dict, list)) and dice.random() < 0.95:
        about[key] = json.dumps(with_other_json(value, dice))
    else:
        about[key] = dice.choice(("", "{}", "[]", "null", "1", "../../x", "[" * DEEP, '{"layers":' * DEEP, "\x00", "{"))
    return signed(tensors, about)


def opened(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    return safetensors.torch.load(content), dict(split(content)[0].get("__metadata__", {}))


def signed(tensors: dict[str, Tensor], about: dict[str, str]) -> bytes:
    """A file whose checksum is right, as an attacker would make it."""
    if "sha256" in about:
        rest = {key: value for key, value in about.items() if key != "sha256"}
        text = rest["coraq"] if "coraq" in rest else json.dumps(sorted(rest.items()))
        about = {**rest, "sha256": content_digest(tensors, text)}
    try:
        return safetensors.torch.save(tensors, about)
    except (UnicodeEncodeError, ValueError, safetensors.SafetensorError):
        return b""


def text_mutated(content: bytes, dice: random.Random) -> bytes:
    """JSON with other nodes, or nesting without end."""
    if dice.random() < 0.02:
        return dice.choice(
            (b"[" * DEEP, b'{"a":' * DEEP, b"", b"\xff\xfe", b"null", b"1e999", b'"' + b"A" * 100_000 + b'"')
        )
    return json.dumps(with_other_json(json.loads(content), dice)).encode("utf-8", "surrogatepass")


RAW = [truncated, extended, bits_flipped, spliced]
UNSIGNED = [*RAW, other_length, other_header, deep_header]
SIGNED = [other_tensors, other_metadata]


# ---------------------------------------------------------------- targets


class Bench:
    """Good files of every kind, and what reading a mutated one must lead to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        made = coraq.quantize(
            small_network(),
            "comq",
            data=random_images(4),
            scheme=Scheme.of(bits=3, act_bits=8),
            path=folder / "model.safetensors",
        )
        self.state = made.module.state_dict()
        self.images = random_images(1)
        self.run = folder / "run"
        result = coraq.pipeline.run(
            made.result.config.model_copy(
                update={
                    "model": "demo",
                    "method": "rtn",
                    "scheme": Scheme.of(bits=3),
                    "data": made.result.config.data.model_copy(update={"calib_size": 4, "eval_size": 4}),
                }
            ),
            runs_dir=folder,
        )
        os.rename(result.run_dir, self.run)
        names = set(self.targets) - {"model.safetensors", "decisions.json"}
        shutil.copytree(Path(coraq.__file__).with_name("demo"), self.run / "local")
        for kind in ("png", "jpeg"):
            Image.fromarray(torch.arange(1200).reshape(20, 20, 3).byte().numpy()).save(self.run / f"picture.{kind}")
        self.good = {name: (self.run / name).read_bytes() for name in names}
        self.good["model.safetensors"] = (folder / "model.safetensors").read_bytes()
        shutil.copy(folder / "model.safetensors", self.run)
        (self.run / "decisions.json").unlink(missing_ok=True)
        RunFolder(self.run).decisions["ranks"] = {"stem": [1, 2]}
        self.good["decisions.json"] = (self.run / "decisions.json").read_bytes()
        self.first, (layer, _) = next(iter(RunFolder(self.run).committed().items()))
        self.layer_weight = layer.dequantize()

    @property
    def targets(self) -> dict[str, Callable[[Path, bool], str]]:
        return {
            "model.safetensors": self.checkpoint,
            "layers/0000.safetensors": self.layer,
            "metrics.json": self.metrics,
            "predictions.safetensors": self.predictions,
            "histograms.json": self.histograms,
            "decisions.json": self.decisions,
            "local/config.json": self.local,
            "local/model.safetensors": self.local,
            "picture.png": self.picture,
            "picture.jpeg": self.picture,
        }

    def checkpoint(self, path: Path, is_signed: bool) -> str:
        module = load_checkpoint(path).module
        state = module.state_dict()
        same = list(state) == list(self.state) and all(torch.equal(state[key], self.state[key]) for key in state)
        if not is_signed:
            assert same, "a change without a right checksum was served"
        elif not same:
            assert all(torch.isfinite(value).all() for value in state.values()), "not finite"
        return "loaded as it was" if same else "loaded another network under a right checksum"

    def layer(self, path: Path, is_signed: bool) -> str:
        found = RunFolder(path.parents[1]).committed()
        for layer, _ in found.values():
            assert torch.isfinite(layer.dequantize()).all(), "not finite"
        if found and not is_signed:
            assert torch.equal(found[self.first][0].dequantize(), self.layer_weight), "changed, served"
        return "taken as committed" if found else "not taken as committed"

    def metrics(self, path: Path, is_signed: bool) -> str:
        read_result(path.parent)
        return "read"

    def predictions(self, path: Path, is_signed: bool) -> str:
        found = read_predictions(path.parent)
        if found is None:
            return "left out"
        assert len(found.float_choice) == len(found.quantized_choice) == len(found.label), "lengths differ"
        return "read"

    def histograms(self, path: Path, is_signed: bool) -> str:
        return "read" if read_histograms(path.parent) else "left out"

    def decisions(self, path: Path, is_signed: bool) -> str:
        kept = dict(RunFolder(path.parent).decisions)
        assert is_signed or kept in ({}, {"ranks": {"stem": [1, 2]}}), "changed, served"
        return "read" if kept else "left out"

    def local(self, path: Path, is_signed: bool) -> str:
        module = load_model(RunConfig(model=f"local-dir:{path.parent}")).module
        for key, value in module.state_dict().items():
            assert torch.isfinite(value).all(), f"{key} is not finite"
        return "loaded"

    def picture(self, path: Path, is_signed: bool) -> str:
        preprocess = Preprocess.resolve({"input_size": (3, 16, 16)}, DataConfig())
        source = FileSource(str(path.parent), [str(path)])
        images = DecodedImages.of_source(
            source, [0], [0], preprocess, description="", fingerprint="", workers=0, batch_size=1
        )
        for pixels, _ in images.batches():
            assert torch.isfinite(pixels).all(), "not finite"
        return "skipped" if images.skipped else "shown"

    def input(self, dice: random.Random) -> tuple[str, str, bytes]:
        """A target, the name of a mutation, and a mutated file."""
        names = list(self.targets)
        name = dice.choices(names, (12, 3, 3, 1, 1, 1, 2, 1, 1, 1))[0]
        if name.startswith("picture"):
            mutation = dice.choice(RAW)
        elif name.endswith(".json"):
            mutation = dice.choice([*RAW, text_mutated, text_mutated, text_mutated, text_mutated])
        else:
            mutation = dice.choice([*UNSIGNED, *SIGNED, *SIGNED, *SIGNED])
        return name, mutation.__name__, mutation(self.good[name], dice)


# ---------------------------------------------------------------- the watch


class TooSlow(BaseException):
    """Not an Exception: no handler of ours may swallow it."""


class Watch:
    """What an input did that no file may make a reader do."""

    FORBIDDEN = ("socket.connect", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class")
    CHANGES = (
        "os.remove",
        "os.rename",
        "os.mkdir",
        "os.rmdir",
        "os.truncate",
        "os.symlink",
        "os.link",
        "shutil.rmtree",
    )

    def __init__(self) -> None:
        self.on, self.seen = False, list[str]()
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event in self.FORBIDDEN or event in self.CHANGES:
            self.seen.append(f"{event} {args[:1]}")


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def attempt(bench: Bench, watch: Watch, dice: random.Random, longest: float, most_mb: float) -> tuple[str, str, str]:
    """One input: its target, its mutation, and its outcome, which begins with "AT FAULT" if it is."""
    name, mutation, content = bench.input(dice)
    is_signed = mutation in {one.__name__ for one in SIGNED}
    return name, mutation, outcome_of(bench, watch, name, content, is_signed, longest, most_mb)


def outcome_of(
    bench: Bench, watch: Watch, name: str, content: bytes, is_signed: bool, longest: float, most_mb: float
) -> str:
    """What reading this content in a target's place leads to."""
    path = bench.run / name
    path.write_bytes(content)
    before, watch.seen = peak_mb(), []
    try:
        with alarm(longest):
            watch.on = True
            try:
                outcome = bench.targets[name](path, is_signed)
            finally:
                watch.on = False
    except CoraqError as error:
        outcome = "refused" if error.hint else f"AT FAULT: no hint: {error}"
    except TooSlow:
        outcome = f"AT FAULT: more than {longest:g} s"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        outcome = f"AT FAULT: {type(error).__name__}: {str(error)[:200]} ({where.filename}:{where.lineno})"
    if watch.seen:
        outcome = f"AT FAULT: {watch.seen[0]}"
    if peak_mb() > before + most_mb:
        outcome = f"AT FAULT: {peak_mb() - before:.0f} MB more memory"
    path.write_bytes(bench.good[name])
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", type=int, default=0, help="number of the first input")
    parser.add_argument("--longest", type=float, default=30.0, help="seconds that an input may take")
    parser.add_argument("--most-mb", type=float, default=64.0, help="memory that an input may add")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    watch, outcomes, faults = Watch(), Counter[tuple[str, str]](), dict[str, list[int]]()
    with tempfile.TemporaryDirectory(prefix="coraq-fuzz-") as folder:
        bench = Bench(Path(folder))
        os.chdir(folder)
        start, started = peak_mb(), time.monotonic()
        for number in range(arguments.skip, arguments.skip + arguments.count):
            dice = random.Random(f"{arguments.seed} {number}")
            name, mutation, outcome = attempt(bench, watch, dice, arguments.longest, arguments.most_mb)
            if outcome.startswith("AT FAULT"):
                numbers = faults.setdefault(f"{name}, {mutation}: {outcome}", [])
                numbers.append(number)
                if len(numbers) == 1:
                    print(f"input {number}: {name}, {mutation}: {outcome}", file=sys.stderr)
            outcomes[name, outcome.partition(":")[0]] += 1
            if number % 1000 == 999:
                print(f"{number + 1} inputs, {len(faults)} faults, {peak_mb():.0f} MB", file=sys.stderr)
        os.chdir("/")
        seconds, peak = time.monotonic() - started, peak_mb()
    print("| file | outcome | inputs |\n|---|---|--:|")
    for (name, outcome), count in sorted(outcomes.items()):
        print(f"| {name} | {outcome} | {count} |")
    per_input = 1000 * seconds / arguments.count
    print(
        f"\n{arguments.count} inputs in {seconds:.0f} s ({per_input:.2f} ms each), {len(faults)} kinds of fault; ",
        end="",
    )
    print(f"peak memory {peak:.0f} MB, {peak - start:.0f} MB above the start.")
    for fault, numbers in sorted(faults.items(), key=lambda item: -len(item[1]))[:100]:
        print(f"- {len(numbers)} times, first input {numbers[0]}: {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
