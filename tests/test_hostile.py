"""Files that a stranger made are refused in two lines, or left out: nothing run, nothing written elsewhere or huge."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import signal
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.checkpoints import Written, random_layer, with_info
from support.examples_folder import example

import coraq
from coraq import pipeline
from coraq.api import QTensor, QuantizedLayer
from coraq.artifact import RunFolder, load_checkpoint, newest_run, read_histograms, read_predictions, read_result
from coraq.artifact.codec import content_digest
from coraq.artifact.files import write_atomic
from coraq.cli.app import run
from coraq.config import DataConfig, RunConfig, Scheme
from coraq.data import Preprocess
from coraq.data.imageset import DecodedImages
from coraq.data.sources import FileSource
from coraq.errors import CoraqError
from coraq.events import JsonLinesSink
from coraq.export.run import Request, export_run
from coraq.network.fold import Structure
from coraq.report import read_comparison, write_report
from coraq.report.html import logged_metrics

fuzz: Any = example("hardening/fuzz")
LONGEST_S, MOST_MB = 20, 200


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fails what hangs or grows instead of hanging or growing."""

    def ring(*_: Any) -> None:
        raise AssertionError(f"more than {LONGEST_S} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handler = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LONGEST_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MOST_MB, f"{grown:.0f} MB more"


@pytest.fixture(scope="module")
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the demo by qera (or the method named), which decides ranks before it begins."""
    method = getattr(request, "param", "qera")
    config = RunConfig(model="demo", method=method, data=DataConfig(calib_size=8, eval_size=10, workers=0))
    return Path(pipeline.run(config, runs_dir=tmp_path_factory.mktemp("runs")).run_dir)


def again(finished: Path, tmp_path: Path) -> tuple[RunConfig, Path]:
    """A copy of the run, as a kill after its last layer would leave it."""
    import shutil

    folder = tmp_path / finished.name
    shutil.copytree(finished, folder)
    for name in ("metrics.json", "model.safetensors"):
        (folder / name).unlink()
    return read_result(finished).config, folder


# ---------------------------------------------------------------- checkpoints under a right checksum


@pytest.mark.parametrize("key", ["checkpoint_path", "pretrained", "pretrained_cfg_overlay", "cache_dir"])
def test_a_checkpoint_cannot_make_timm_open_other_files(key: str, written: Written, tmp_path: Path) -> None:
    save_file(written.student.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(CoraqError, match=f"{key}.*not an argument of an architecture"):
        load_checkpoint(with_info(written, model_args={key: str(tmp_path / "other.safetensors")}))


@pytest.mark.parametrize("name", ["local-dir:{}", "hf-hub:some/one", "hf_hub:some/one", "../{}", "resnet18.a1_in1k"])
def test_a_checkpoint_names_an_architecture_and_no_place(name: str, written: Written, tmp_path: Path) -> None:
    config = {"architecture": "resnet18", "num_classes": 3, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CoraqError, match="has no architecture"):
        load_checkpoint(with_info(written, architecture=name.format(tmp_path)))


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("coraq_small", {"num_classes": 10**8}),
        ("coraq_small", {"in_chans": 10**8}),
        ("resnet18", {"layers": [10**6, 1, 1, 1]}),
        ("resnet18", {"channels": [10**5] * 4}),
        ("resnet18", {"layers": [10**4] * 4, "channels": [1] * 4}),
        ("convnext_tiny", {"depths": [10**7] * 4, "drop_path_rate": 0.1}),
        ("mobilenetv2_100", {"num_features": 10**9}),
        ("resnet18", {"norm_layer": [[[10**12]]]}),
    ],
)
def test_a_network_larger_than_its_file_is_never_built(
    architecture: str, arguments: dict[str, Any], written: Written
) -> None:
    path = with_info(written, architecture=architecture, model_args=arguments)
    with bounded(), pytest.raises(CoraqError, match=r"larger than|cannot build|are too large"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "size", [[3, 10**6, 10**6], [3, 0, 0], [3, -1, 8], [3, 16], "abc", [10**9, 8, 8], [3, 1e400, 2]]
)
def test_images_of_absurd_size_are_never_made(size: Any, written: Written) -> None:
    good = Preprocess.resolve({"input_size": (3, 16, 16)}, DataConfig()).as_dict()
    path = with_info(written, preprocess={**good, "input_size": size})
    with bounded(), pytest.raises(CoraqError, match="input_size"):
        export_run(path, Request("timm", images=2))


@pytest.mark.parametrize("values", [{}, {"input_size": [3, 8, 8]}, {"mean": 1}, {"std": [0, 0, 0]}, {"crop_pct": "x"}])
def test_preprocessing_that_is_none_is_refused(values: dict[str, Any]) -> None:
    good = Preprocess.resolve({"input_size": (3, 16, 16)}, DataConfig()).as_dict()
    assert Preprocess.from_dict(good).as_dict() == good
    with pytest.raises(CoraqError, match="preprocessing"):
        Preprocess.from_dict({**good, **values} if len(values) == 1 and "input_size" not in values else values)


@pytest.mark.parametrize("model_kwargs", [{"checkpoint_path": "x.pth"}, {"pretrained_cfg": {"file": "x.pth"}}])
def test_a_run_s_configuration_cannot_make_timm_open_a_pickle(model_kwargs: dict[str, Any], tmp_path: Path) -> None:
    # metrics.json of a stranger's run folder names the float network that `coraq evaluate` loads
    config = RunConfig(model="demo", method="rtn", model_kwargs=model_kwargs)
    with pytest.raises(CoraqError, match=f"{next(iter(model_kwargs))}.*not an argument of an architecture"):
        pipeline.run(config, runs_dir=tmp_path)


# ---------------------------------------------------------------- structure fuzz

leaves = st.one_of(
    st.sampled_from([value for value in fuzz.HOSTILE if not isinstance(value, (list, dict))]),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
)
names = st.text(max_size=9)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=9
)
quick = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def replaced(content: Any, data: st.DataObject) -> Any:
    """A JSON value with one node replaced by an arbitrary one, or deleted."""
    content = json.loads(json.dumps(content))
    place = data.draw(st.sampled_from(list(fuzz.places(content))))
    parent = content
    for key in place[:-1]:
        parent = parent[key]
    if data.draw(st.booleans()) or isinstance(parent, list):
        parent[place[-1]] = data.draw(values)
    else:
        del parent[place[-1]]
    return content


@quick
@given(data=st.data())
def test_any_metadata_under_a_right_checksum_is_refused_or_consistent(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    if not path.exists():
        Written(path, 3, "adapter")
        os.rename(path, tmp_path / "good.safetensors")
    tensors = load_file(tmp_path / "good.safetensors")
    with safe_open(tmp_path / "good.safetensors", "pt") as file:
        about = json.loads(file.metadata()["coraq"])
    text = json.dumps(replaced(about, data))
    save_file(tensors, path, {"coraq": text, "sha256": content_digest(tensors, text)})
    with bounded(), contextlib.suppress(CoraqError):
        module = load_checkpoint(path).module
        assert all(torch.isfinite(value).all() for value in module.state_dict().values())


@quick
@given(data=st.data())
def test_any_metrics_are_refused_or_can_be_reported(data: st.DataObject, finished: Path, tmp_path: Path) -> None:
    content = replaced(json.loads((finished / "metrics.json").read_text()), data)
    (tmp_path / "metrics.json").write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")
    with bounded(), contextlib.suppress(CoraqError):
        write_report(read_result(tmp_path), tmp_path / "report")  # as text and as HTML


@pytest.mark.parametrize("place", ["peak_memory_bytes", "total_s", "stages", "bits", "shape", "metrics"])
@pytest.mark.parametrize(
    "number", [10**400, 2**63, float("inf"), float("nan"), -1], ids=["10**400", "2**63", "inf", "nan", "-1"]
)
def test_numbers_that_no_run_has_are_refused_or_can_be_reported(
    place: str, number: float, finished: Path, tmp_path: Path
) -> None:
    content = json.loads((finished / "metrics.json").read_text())
    layer = content["layers"][0]
    changed = {"stages": {"load": number}, "shape": [number], "metrics": {"own": number}}.get(place, number)
    (layer if place in layer else content)[place] = changed
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    with bounded(), contextlib.suppress(CoraqError):
        write_report(read_result(tmp_path), tmp_path / "report")


@pytest.mark.parametrize("error", [-1.0, 0.0, float("inf"), float("nan"), 5e-324, 1e308])
def test_a_layer_of_any_error_can_be_reported(error: float, finished: Path, tmp_path: Path) -> None:
    result = read_result(finished)
    changed = {"output_error": error, "input_error": error, "weight_sqnr_db": error}
    layers = [result.layers[0].model_copy(update=changed), *result.layers[1:]]
    write_report(result.model_copy(update={"layers": layers}), tmp_path)


@pytest.mark.parametrize("seed", range(100))
def test_mutated_files_of_every_kind_are_refused_or_consistent(seed: int, bench: Any, watch: Any) -> None:
    _, _, outcome = fuzz.attempt(bench, watch, random.Random(f"test {seed}"), 20.0, 100.0)
    assert not outcome.startswith("AT FAULT"), outcome


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return fuzz.Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def watch() -> Any:
    return fuzz.Watch()


# ---------------------------------------------------------------- run folders


@pytest.mark.parametrize("name", [".lock", "events.jsonl", "layers", "config.json", "decisions.json", "log.txt"])
def test_nothing_is_written_through_a_link_in_a_run_folder(
    name: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = again(finished, tmp_path)
    elsewhere = tmp_path / "elsewhere"
    if name == "layers":
        elsewhere.mkdir()
        (elsewhere / "0000.safetensors").write_text("precious")
        (elsewhere / ".x.tmp").write_text("precious")
        for layer in (folder / "layers").iterdir():
            layer.unlink()
        (folder / "layers").rmdir()
    else:
        elsewhere.write_text("precious")
        (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(CoraqError, match=f"{name} is a link"):
        pipeline.run(config, runs_dir=tmp_path, force=True)
    kept = [elsewhere] if elsewhere.is_file() else sorted(elsewhere.iterdir())
    assert [path.read_text() for path in kept] == ["precious"] * (1 if elsewhere.is_file() else 2)


def test_the_log_of_a_failure_is_not_written_through_a_link(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / "log.txt").symlink_to(tmp_path / "elsewhere")

    def broken(*args: object, **known: object) -> None:
        error = RuntimeError("a fault")
        error.run_dir = tmp_path  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(pipeline, "run", broken)
    assert run(["quantize", "demo", "-q"]) == 1
    assert "the traceback is in" in capsys.readouterr().err
    assert (tmp_path / "elsewhere").read_text() == "precious"


def test_a_temporary_file_s_name_cannot_be_a_link_to_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / f".file.{os.getpid()}.tmp").symlink_to(tmp_path / "elsewhere")
    write_atomic(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "elsewhere").read_text() == "precious"


READERS: dict[str, Callable[[Path], Any]] = {
    "metrics.json": read_result,
    "model.safetensors": load_checkpoint,
    "decisions.json": lambda folder: dict(RunFolder(folder).decisions),
    "layers/0000.safetensors": lambda folder: RunFolder(folder).committed(),
    "predictions.safetensors": read_predictions,
    "histograms.json": read_histograms,
    "events.jsonl": lambda folder: logged_metrics(folder / "events.jsonl"),
    "compare.json": read_comparison,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["fifo", "endless", "folder", "huge", "deep", "binary"])
def test_what_is_no_ordinary_file_is_not_read(kind: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        path.touch()
        os.truncate(path, 1 << 40)  # a hole: a terabyte that takes no room
    else:
        path.write_bytes({"deep": b"[" * 1_000_000, "binary": bytes(range(256)) * 100}[kind])
    with bounded(), contextlib.suppress(CoraqError):
        assert not READERS[name](tmp_path)


def test_events_do_not_wait_for_a_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "events.jsonl")
    with bounded(), pytest.raises(CoraqError, match=r"events\.jsonl"):
        JsonLinesSink(tmp_path / "events.jsonl")


def test_a_run_that_vanishes_is_not_the_newest(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "metrics.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "metrics.json").write_text("{}")
    assert newest_run(tmp_path) == tmp_path / "here"


# ---------------------------------------------------------------- what a run resumes from


def saved(folder: Path, *names: str) -> RunFolder:
    there = RunFolder(folder)
    (folder / "layers").mkdir(exist_ok=True)
    for index, name in enumerate(names):
        there.save_layer(index, name, random_layer((1, 4, 9), 3, "affine", index), {"error": 1.0})
    return there


def test_a_flipped_bit_in_a_committed_layer_is_found(tmp_path: Path) -> None:
    folder, dice = saved(tmp_path, "a"), random.Random(0)
    path = tmp_path / "layers" / "0000.safetensors"
    content = path.read_bytes()
    assert list(folder.committed()) == ["a"]
    before = folder.committed()["a"][0].dequantize()
    for _ in range(60):
        damaged = bytearray(content)
        damaged[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        for layer, metrics in folder.committed().values():
            assert torch.equal(layer.dequantize(), before)
            assert metrics == {"error": 1.0}


@pytest.mark.parametrize("metrics", ["[1]", '{"a": [1]}', '{"a": {"b": 1}}', "[" * 100_000, "null", "{"])
def test_a_layer_file_with_other_metrics_is_not_taken(metrics: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, "a")
    path = tmp_path / "layers" / "0000.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        about = {**file.metadata(), "metrics": metrics}
    about.pop("sha256", None)
    signature = content_digest(tensors, json.dumps(sorted(about.items())))
    save_file(tensors, path, {**about, "sha256": signature})
    assert not folder.committed()
    save_file(tensors, path)  # no metadata at all
    assert not folder.committed()


@pytest.mark.parametrize("damage", ["name", "shape"])
def test_layers_of_another_network_are_not_resumed(damage: str, finished: Path, tmp_path: Path) -> None:
    config, folder = again(finished, tmp_path)
    there = RunFolder(folder)
    done = list(there.committed().items())
    name, (layer, metrics) = done[1]
    if damage == "name":
        there.save_layer(1, "no_such_layer", layer, metrics)
    else:
        there.save_layer(1, name, random_layer((1, 2, 3), 4, "affine"), metrics)
    result = pipeline.run(config, runs_dir=tmp_path)
    assert Path(result.run_dir) == folder
    assert (folder / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert any("is not of this run" in note for note in result.notes)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "{}", "[]", '{"ranks": 3}', '{"ranks": {"stem": "x"}}', '{"ranks": {}}']
)
def test_a_damaged_decision_under_finished_layers_is_refused(content: str, finished: Path, tmp_path: Path) -> None:
    config, folder = again(finished, tmp_path)
    (folder / "layers" / "0020.safetensors").unlink()
    (folder / "decisions.json").write_text(content)
    with pytest.raises(CoraqError, match="decision") as caught:
        pipeline.run(config, runs_dir=tmp_path)
    assert "--force" in caught.value.hint


@pytest.mark.parametrize("finished", ["qera", "cora"], indirect=True)
@pytest.mark.parametrize(
    "forge",
    [
        lambda kept: [],
        lambda kept: {"no_such_layer": 1},
        lambda kept: {**kept, next(iter(kept)): "x"},
        lambda kept: {**kept, next(iter(kept)): -1},
        lambda kept: {**kept, next(iter(kept)): 10**12},
        lambda kept: {**kept, next(iter(kept)): True},
        lambda kept: {**kept, next(iter(kept)): [4]},
        lambda kept: {**kept, next(iter(kept)): [9, 0]},
        lambda kept: {**kept, next(iter(kept)): [4, 10**12]},
    ],
)
def test_a_forged_decision_under_a_right_checksum_is_refused(
    forge: Callable[[Any], Any], finished: Path, tmp_path: Path
) -> None:
    config, folder = again(finished, tmp_path)
    for layer in (folder / "layers").iterdir():
        layer.unlink()
    decisions = RunFolder(folder).decisions
    (key,) = decisions
    decisions[key] = forge(decisions[key])
    with pytest.raises(CoraqError, match="decision") as caught:
        pipeline.run(config, runs_dir=tmp_path)
    assert "--force" in caught.value.hint


def test_a_layer_that_overflows_is_not_resumed_from(tmp_path: Path) -> None:
    """Its scale is finite, its checksum right, and its weights are not: found by coverage-guided fuzzing."""
    folder = RunFolder(tmp_path)
    (tmp_path / "layers").mkdir()
    layer = random_layer((1, 2, 3), 4, "affine")
    folder.save_layer(0, "sound", layer, {})
    folder.save_layer(1, "vast", layer.scaled(3e38 / layer.weight.scale), {})
    assert list(folder.committed()) == ["sound"]


# ---------------------------------------------------------------- pictures


def png(width: int, height: int, body: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def images_of(paths: list[Path], **more: Any) -> DecodedImages:
    preprocess = Preprocess.resolve({"input_size": (3, 16, 16)}, DataConfig())
    source = FileSource(str(paths[0].parent), [str(path) for path in paths])
    about = {"description": "pictures", "fingerprint": "", "workers": 0, "batch_size": 4, **more}
    return DecodedImages.of_source(source, list(range(len(paths))), [0] * len(paths), preprocess, **about)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "0.png"
    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(path)
    return path


@pytest.mark.parametrize("size", [(50_000, 50_000), (2**31 - 1, 2**31 - 1), (20_000, 20_000), (0, 0)])
def test_a_picture_that_grows_when_it_is_opened_is_skipped(
    size: tuple[int, int], picture: Path, tmp_path: Path
) -> None:
    bomb = tmp_path / "1.png"
    bomb.write_bytes(png(*size, zlib.compress(bytes(50_000_000), 9)))
    with bounded():
        batches = list(images_of([picture, bomb]).batches(4))
    assert [len(images) for images, _ in batches] == [1]
    with pytest.raises(CoraqError, match="unreadable image"):
        list(images_of([picture, bomb], strict=True).batches(4))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "JPEG2000"])
def test_mutated_pictures_are_skipped_or_shown(kind: str, picture: Path, tmp_path: Path) -> None:
    stream = io.BytesIO()
    try:
        Image.open(picture).save(stream, kind)
    except OSError as error:
        pytest.skip(f"this Pillow cannot write {kind}: {error}")
    content, dice, paths = stream.getvalue(), random.Random(kind), [picture]
    for number in range(1, 60):
        mutation = dice.choice(fuzz.RAW)
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(mutation(content, dice))
    with bounded():
        for pixels, _ in images_of(paths).batches(16):
            assert torch.isfinite(pixels).all()


# ---------------------------------------------------------------- the report


def test_a_name_cannot_put_a_script_into_the_report(finished: Path, tmp_path: Path) -> None:
    result = read_result(finished)
    evil = "<script>alert(1)</script>"
    layers = [layer.model_copy(update={"name": evil, "kind": evil, "metrics": {evil: evil}}) for layer in result.layers]
    config = result.config.model_copy(update={"model": evil, "options": {evil: evil}})
    changed = {
        "layers": layers,
        "config": config,
        "method": evil,
        "notes": [evil],
        "command": [evil],
        "stages": {evil: 1.0},
    }
    page = write_report(result.model_copy(update=changed), tmp_path).read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_schemes_are_checked_as_files_are(tmp_path: Path) -> None:
    for content in ({"bits": 1}, {"bits": 99}, {"overrides": {"(": {"bits": 4}}}, {"overrides": {".*": {"bits": 0}}}):
        with pytest.raises(ValueError, match=r"bits|regular"):
            Scheme.model_validate(content)
    with pytest.raises(CoraqError, match="no checkpoint"):
        coraq.load(tmp_path / "nowhere")


# ---------------------------------------------------------------- more under a right checksum


@pytest.mark.parametrize(
    "structure",
    [
        {"materialised": {"head": True}},
        {"materialised": {"act": False}},
        {"materialised": {"": True}},
        {"folded": {"act": "stem"}},
        {"folded": {"stem_norm": "head"}},
        {"folded": {"stem_norm": "act"}},
        {"folded": {"stem_norm": "stem", "grouped_norm": "stem"}},
    ],
)
def test_a_structure_that_does_not_fit_the_network_is_refused(structure: dict[str, Any], written: Written) -> None:
    with pytest.raises(CoraqError, match=r"folded as its file says|of another architecture|no module"):
        load_checkpoint(with_info(written, structure=Structure(**structure)))


def test_a_bias_of_another_length_is_refused(written: Written) -> None:
    layer = written.layers["dense"]  # 24 channels of 144 inputs
    weight = QTensor(layer.weight.codes.reshape(1, 48, 72), layer.weight.scale.repeat(1, 2, 1), 4)
    written.layers["dense"] = QuantizedLayer(weight, None, torch.zeros(48))
    with pytest.raises(CoraqError, match="dense has another shape"):
        load_checkpoint(with_info(written))


@pytest.mark.parametrize("number", [10**400, -(10**400), 1e308, [[10**30]], {"a": {"b": 2**63}}])
def test_arguments_of_any_size_are_weighed(number: Any, written: Written) -> None:
    with pytest.raises(CoraqError, match="are too large"):
        load_checkpoint(with_info(written, model_args={"num_classes": number}))


@pytest.mark.parametrize("pattern", ["a{99999999999999}", "(" * 5000 + ")" * 5000, "(?P<x", "[", "*"])
def test_overrides_that_no_expression_can_be_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="regular expression"):
        Scheme.model_validate({"overrides": {pattern: {"bits": 4}}})
