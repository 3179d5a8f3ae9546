"""Claims about reading images: order, corruption, classes, splits, preprocessing."""

from __future__ import annotations

import io
import itertools
import pickle
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from support.pictures import evaluation, everything, opened, write_images
from timm.data import IterableImageDataset, create_dataset, create_transform, resolve_data_config

from coraq.config import DataConfig
from coraq.data import ImageSet, Preprocess, open_images, tensor_images
from coraq.data.images import balanced
from coraq.errors import CoraqError, UsageError
from coraq.events import ListSink, Note

ASSETS = Path(__file__).parents[2] / "shared" / "assets"


def rows(images: ImageSet) -> set[bytes]:
    return {image.numpy().tobytes() for image in everything(images)[0]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "data", {"ant": 5, "bee": 4, "cat": 3})


# --- preprocessing


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "test_efficientnet", "inception_v3"])
@pytest.mark.parametrize("overrides", [{}, {"img_size": 96, "crop_pct": 1.0, "interpolation": "bilinear"}])
def test_preprocessing_equals_timms_own_pipeline_bit_for_bit(
    name: str, overrides: dict[str, Any], folder: Path
) -> None:
    timm_cfg = timm.get_pretrained_cfg(name)
    assert timm_cfg is not None
    cfg = timm_cfg.to_dict()
    timms = resolve_data_config(overrides, pretrained_cfg=cfg, use_test_size=True)
    reference = create_dataset("", str(folder))
    reference.transform = create_transform(**timms)
    data = DataConfig(data_dir=str(folder), calib_dir=str(folder), calib_size=1, workers=0, **overrides)
    images = evaluation(open_images(data, Preprocess.resolve(cfg, data), 3, 0, ListSink()))
    ours, labels = everything(images)
    used = 12 - len(ours)
    assert used == 1
    expected = {image.numpy().tobytes(): label for image, label in (reference[i] for i in range(12))}
    assert [expected[image.numpy().tobytes()] for image in ours] == labels.tolist()


def test_preprocessing_survives_json_and_prefers_the_test_size() -> None:
    cfg = {"input_size": (3, 64, 64), "test_input_size": (3, 96, 80), "crop_pct": 0.9, "test_crop_pct": 1.0}
    resolved = Preprocess.resolve(cfg, DataConfig())
    assert (resolved.input_size, resolved.crop_pct) == ((3, 96, 80), 1.0)
    assert Preprocess.from_dict(resolved.as_dict()) == resolved
    assert "96×80 px" in resolved.describe()


def test_preprocessing_follows_the_networks_channels(folder: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=3, in_chans=1)
    data = DataConfig(calib_dir=str(folder), workers=0, img_size=64)
    preprocess = Preprocess.resolve(model, data)
    assert preprocess.input_size == (1, 64, 64)
    images, _ = everything(open_images(data, preprocess, 3, 0, ListSink()).calibration)
    assert images.shape == (12, 1, 64, 64)
    assert model(images[:1]).shape == (1, 3)


@pytest.mark.parametrize("options", [{"mean": (0.1, 0.2)}, {"interpolation": "random"}])
def test_wrong_preprocessing_is_a_usage_error(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Preprocess.resolve({"input_size": (3, 64, 64)}, DataConfig(**options))


# --- order and fingerprints


def test_order_and_fingerprint_do_not_depend_on_workers(folder: Path) -> None:
    write_images(folder, {"ant": 17, "bee": 11})
    (folder / "ant" / "3.png").write_bytes(b"no image")
    none, two = (opened(calib_dir=folder, workers=workers).calibration for workers in (0, 2))
    (x, y), (x2, y2) = everything(none), everything(two)
    assert torch.equal(x, x2)
    assert torch.equal(y, y2)
    assert none.fingerprint == two.fingerprint
    assert none.skipped == two.skipped != []
    assert torch.equal(everything(two)[0], x)  # and the same again at a second reading


def test_fingerprint_changes_with_content_seed_and_names_only(folder: Path) -> None:
    def fingerprint(seed: int = 0, **options: Any) -> str:
        return opened(seed=seed, calib_dir=folder, calib_size=6, **options).calibration.fingerprint

    first = fingerprint()
    assert fingerprint() == fingerprint(batch_size=3) == fingerprint(strict=True) == first
    assert fingerprint(seed=1) != first
    moved = folder.rename(folder.with_name("moved"))
    assert opened(calib_dir=moved, calib_size=6).calibration.fingerprint == first
    for file in moved.rglob("*.*"):
        file.write_bytes(file.read_bytes() + b"\0")
    assert opened(calib_dir=moved, calib_size=6).calibration.fingerprint != first


def test_a_smaller_calibration_set_begins_a_larger_one_and_is_balanced(folder: Path) -> None:
    small, large = (opened(calib_dir=folder, calib_size=size).calibration for size in (6, 9))
    assert torch.equal(everything(small)[0], everything(large)[0][:6])
    assert Counter(everything(large)[1].tolist()) == {0: 3, 1: 3, 2: 3}


def test_balanced_gives_no_class_more_than_another_unless_that_has_no_more() -> None:
    rng = np.random.default_rng(0)
    groups = rng.choice(7, 300, p=[0.5, 0.2, 0.1, 0.1, 0.05, 0.03, 0.02]) * 10
    for size in (1, 5, 30, 100, 299, 300, 400):
        chosen = balanced(groups, size, np.random.default_rng(3))
        assert len(set(chosen.tolist())) == min(size, 300)
        taken, there = Counter(groups[chosen].tolist()), Counter(groups.tolist())
        for one, other in itertools.permutations(there, 2):
            assert taken[one] <= taken[other] + 1 or taken[other] == there[other]


# --- unreadable images


def test_unreadable_images_are_named_skipped_and_noted_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "ant" / "0.jpg").write_bytes(b"")
    truncated = folder / "bee" / "1.png"
    truncated.write_bytes(truncated.read_bytes()[:500])
    Image.new("RGB", (400, 300)).save(folder / "cat" / "0.jpg")  # a bomb, under the limit below
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    sink = ListSink()
    images = opened(calib_dir=folder, sink=sink).calibration
    assert len(everything(images)[0]) == images.count - 3 == 9
    assert sorted(line.split(": ")[0].removeprefix(f"{folder}/") for line in images.skipped) == [
        "ant/0.jpg",
        "bee/1.png",
        "cat/0.jpg",
    ]
    everything(images)
    notes = [event for event in sink.events if isinstance(event, Note) and "images skipped" in event.message]
    assert len(notes) == 1
    assert "3 unreadable images" in notes[0].message
    assert notes[0].level == "warning"
    assert len(images.skipped) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_strict_makes_an_unreadable_image_an_error(folder: Path, workers: int) -> None:
    bad = folder / "ant" / "0.jpg"
    bad.write_bytes(b"no image")
    images = opened(calib_dir=folder, strict=True, workers=workers).calibration
    with pytest.raises(CoraqError, match=str(bad)):
        everything(images)


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes(b"no image")
    with pytest.raises(CoraqError, match="none of the 1 image"):
        everything(opened(calib_dir=tmp_path).calibration)


# --- classes


def test_a_class_map_sets_the_labels(folder: Path, tmp_path: Path) -> None:
    listed, numbered, pickled = tmp_path / "names.txt", tmp_path / "numbered.txt", tmp_path / "map.pkl"
    listed.write_text("cat\ndog\nant\nbee\n\n")
    numbered.write_text("ant 2\nbee 3\ncat 0\n")
    pickled.write_bytes(pickle.dumps({"ant": 2, "bee": 3, "cat": 0}))
    for file in (listed, numbered, pickled):
        images = evaluation(opened(4, data_dir=folder, calib_dir=write_images(tmp_path / "c", {"": 2}), class_map=file))
        assert Counter(everything(images)[1].tolist()) == {2: 5, 3: 4, 0: 3}
        assert images.class_names is not None
        assert images.class_names[2] == "ant"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("text", ["cat\ndog\nant\nbee\n", "ant 2\r\nbee 3\r\ncat 0\r\n"])
def test_a_class_map_with_a_byte_order_mark_is_read(folder: Path, tmp_path: Path, encoding: str, text: str) -> None:
    file = tmp_path / "map.txt"
    file.write_bytes(text.encode(encoding))
    images = evaluation(opened(4, data_dir=folder, calib_dir=write_images(tmp_path / "c", {"": 2}), class_map=file))
    assert Counter(everything(images)[1].tolist()) == {2: 5, 3: 4, 0: 3}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("ant\nbee\ndog\n", "lacks 1 of the 3 classes .*'cat'"),
        ("ant\nbee\ncat\ndog\n", "4 classes, the network has 3"),
        ("ant\nbee\n", "2 names, the network has 3"),
        ("ant 0\nbee 7\ncat 1\n", "'bee' = 7"),
        ("ant\nbee\nant\n", "'ant' twice"),
        ("", "empty"),
    ],
)
def test_a_class_map_that_does_not_fit_is_an_error(folder: Path, tmp_path: Path, text: str, match: str) -> None:
    file = tmp_path / "map.txt"
    file.write_text(text)
    with pytest.raises(CoraqError, match=match) as caught:
        opened(3, data_dir=folder, class_map=file)
    assert caught.value.hint


def test_another_number_of_classes_than_the_networks_is_an_error_that_says_both(folder: Path) -> None:
    with pytest.raises(CoraqError, match=r"has 3 classes .*, the network has 10") as caught:
        opened(10, data_dir=folder)
    assert "--class-map" in caught.value.hint
    assert "--num-classes" not in caught.value.hint  # it would replace the classifier by an untrained one
    calibration = opened(10, calib_dir=folder).calibration  # calibration alone needs no classes
    assert not calibration.labelled
    assert set(everything(calibration)[1].tolist()) == {-1}


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    flat = write_images(tmp_path / "flat", {"": 6})
    sink = ListSink()
    images = opened(10, data_dir=flat, sink=sink)
    assert images.evaluation is None  # all are calibrated on: accuracy could not be measured on any
    assert images.calibration.count == 6
    few = opened(10, data_dir=flat, calib_size=4, sink=sink)
    assert few.calibration.count == 4
    assert evaluation(few).count == 2
    assert not evaluation(few).labelled
    assert set(everything(evaluation(few))[1].tolist()) == {-1}
    assert any("no class folders" in event.message for event in sink.events if isinstance(event, Note))


# --- splits


def test_splits_follow_timms_folders_and_synonyms(tmp_path: Path) -> None:
    write_images(tmp_path / "training", {"a": 4, "b": 4}, seed=1)
    write_images(tmp_path / "val", {"a": 3, "b": 3}, seed=2)
    images = opened(2, data_dir=tmp_path)
    assert (images.calibration.count, evaluation(images).count) == (8, 6)
    assert "training" in images.calibration.description
    assert "val" in evaluation(images).description
    assert rows(images.calibration).isdisjoint(rows(evaluation(images)))


def test_one_folder_for_both_is_divided_never_shared(folder: Path) -> None:
    sink = ListSink()
    images = opened(3, data_dir=folder, calib_size=4, sink=sink)
    assert (images.calibration.count, evaluation(images).count) == (4, 8)
    assert rows(images.calibration).isdisjoint(rows(evaluation(images)))
    assert any("evaluating on the other 8 only" in event.message for event in sink.events if isinstance(event, Note))
    greedy = opened(3, data_dir=folder, calib_size=100)
    assert (greedy.calibration.count, evaluation(greedy).count) == (6, 6)


def test_nested_and_linked_folders_do_not_overlap(tmp_path: Path) -> None:
    write_images(tmp_path / "root" / "val", {"a": 3, "b": 3}, seed=1)
    write_images(tmp_path / "root" / "more", {"a": 2, "b": 2}, seed=2)
    link = tmp_path / "linked"
    for file in sorted((tmp_path / "root").rglob("*.*")):
        target = link / file.parent.name / f"{file.parent.parent.name}{file.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(file)
    for calib_dir in (tmp_path / "root", link):
        sink = ListSink()
        images = opened(2, data_dir=tmp_path / "root", calib_dir=calib_dir, sink=sink)
        assert (images.calibration.count, evaluation(images).count) == (4, 6)
        assert rows(images.calibration).isdisjoint(rows(evaluation(images)))
        assert any("6 images of" in event.message for event in sink.events if isinstance(event, Note))


def test_eval_size_limits_evaluation_evenly(folder: Path) -> None:
    images = evaluation(opened(3, data_dir=folder, calib_size=3, eval_size=3))
    assert Counter(everything(images)[1].tolist()) == {0: 1, 1: 1, 2: 1}


def test_no_data_gives_synthetic_calibration_and_no_evaluation() -> None:
    sink = ListSink()
    images = opened(10, calib_size=5, sink=sink)
    assert images.evaluation is None
    assert images.calibration.description == "5 synthetic images"
    assert any("not measured" in event.message for event in sink.events if isinstance(event, Note))


# --- wrong folders


def test_wrong_folders_are_two_part_errors(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "x.heic").write_bytes(b"")
    for wrong, message, hint in [
        (folder.with_name("dota"), "does not exist", str(folder)),
        (folder.with_name("dota") / "deeper" / "still", "does not exist", str(folder)),
        (empty, "holds no images", ".heic"),
        (folder / "ant" / "0.jpg", "is a file", "folder"),
    ]:
        with pytest.raises(CoraqError, match=message) as caught:
            opened(3, data_dir=wrong)
        assert str(wrong) in caught.value.message
        assert hint in caught.value.hint


@pytest.mark.parametrize("spec", ["torch/nonsense", "torch/cifar10", "hfds/no/such", "wds/none", "tfds/none"])
def test_dataset_specs_that_cannot_be_opened_are_two_part_errors(
    spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CoraqError, match=spec) as caught:
        opened(10, dataset=spec, data_dir=tmp_path)
    assert caught.value.hint
    assert not capsys.readouterr().out  # timm's readers print


# --- other sources


def test_a_torch_spec_reads_the_same_images_as_its_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"a": 4, "b": 4}, seed=1)
    write_images(tmp_path / "test", {"a": 3, "b": 3}, seed=2)
    by_folder = opened(2, data_dir=tmp_path, split="test")
    by_spec = opened(2, data_dir=tmp_path, split="test", dataset="torch/image_folder", workers=2)
    for one, other in [
        (by_folder.calibration, by_spec.calibration),
        (evaluation(by_folder), evaluation(by_spec)),
    ]:
        assert torch.equal(everything(one)[0], everything(other)[0])
        assert torch.equal(everything(one)[1], everything(other)[1])


def test_a_torchvision_data_set_in_memory_is_read_by_number(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        batch = {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 1, 2, 9]}
        (base / name).write_bytes(pickle.dumps(batch))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(10)]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
        images = opened(10, dataset="torch/cifar10", data_dir=tmp_path, calib_size=8)
        same = opened(10, dataset="torch/cifar10", data_dir=tmp_path, calib_split="validation", calib_size=1)
    assert (images.calibration.count, evaluation(images).count) == (8, 4)
    assert everything(evaluation(images))[1].tolist() == [0, 1, 2, 9]
    assert evaluation(images).class_names == [f"class{i}" for i in range(10)]
    assert evaluation(same).count == 3


def test_a_tar_file_reads_the_same_images_as_its_folder(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.add(file, file.relative_to(folder))
    tar = opened(calib_dir=tmp_path / "data.tar").calibration
    assert rows(tar) == rows(opened(calib_dir=folder).calibration) == rows(tar)
    two = opened(calib_dir=tmp_path / "data.tar", workers=2).calibration
    list(two.batches(100))  # one batch, read by this process: workers must not inherit its open file
    for _ in range(3):
        assert torch.equal(everything(tar)[0], everything(two)[0])


class Stream:
    """A timm reader that can be read from its beginning only."""

    def __len__(self) -> int:
        return 20

    def __iter__(self) -> Any:
        return ((Image.new("RGB", (40, 40), (index, 0, 0)), index % 4) for index in range(20))


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """`wds/…` without the webdataset package, which is not among the test requirements."""
    monkeypatch.setattr(
        "coraq.data.sources.create_dataset", lambda *args, **options: IterableImageDataset(None, reader=Stream())
    )


@pytest.mark.usefixtures("streams")
def test_one_stream_for_both_is_divided_never_shared(tmp_path: Path) -> None:
    sink = ListSink()
    both: dict[str, Any] = {"dataset": "wds/x", "data_dir": tmp_path, "split": "val", "calib_split": "val"}
    images = opened(4, sink=sink, calib_size=6, eval_size=9, workers=2, **both)
    assert everything(images.calibration)[1].tolist() == [index % 4 for index in range(6)]
    assert everything(evaluation(images))[1].tolist() == [index % 4 for index in range(6, 15)]
    assert rows(images.calibration).isdisjoint(rows(evaluation(images)))
    assert any("first 6" in event.message for event in sink.events if isinstance(event, Note))
    halves = opened(4, calib_size=100, **both)
    assert (halves.calibration.count, evaluation(halves).count) == (10, 10)


@pytest.mark.usefixtures("streams")
def test_a_label_that_the_network_has_not_is_an_error(tmp_path: Path) -> None:
    images = opened(3, dataset="wds/x", data_dir=tmp_path, calib_size=6)
    with pytest.raises(CoraqError, match="is 3, the network has 3 classes"):
        everything(evaluation(images))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two webdataset shards of six images each, classes 0 to 3 in turn, and a third of four for calibration."""
    pytest.importorskip("webdataset", reason="needs the package webdataset")
    rng = np.random.default_rng(0)
    number = 0
    for shard, count in (("val-0000", 6), ("val-0001", 6), ("train-0000", 4)):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as archive:
            for _ in range(count):
                picture = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(picture, "PNG")
                for name, data in (("png", picture.getvalue()), ("cls", str(number % 4).encode())):
                    entry = tarfile.TarInfo(f"{number:05d}.{name}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
                number += 1
    return tmp_path


def test_real_webdataset_shards_are_read_in_order_and_divided(shards: Path) -> None:
    """No fakes: timm's own reader over tar shards, whatever the number of workers."""
    for workers in (0, 2):
        images = opened(
            4,
            dataset="wds/x",
            data_dir=shards,
            split="val-{0000..0001}.tar|12",
            calib_split="train-0000.tar|4",
            calib_size=3,
            workers=workers,
        )
        assert (images.calibration.count, evaluation(images).count) == (3, 12)
        assert everything(images.calibration)[1].tolist() == [0, 1, 2]
        labels = everything(evaluation(images))[1].tolist()
        assert labels == [number % 4 for number in range(12)]
        assert rows(images.calibration).isdisjoint(rows(evaluation(images)))
        assert rows(evaluation(images)) == rows(evaluation(images))
    both: dict[str, Any] = {"dataset": "wds/x", "data_dir": shards, "split": "val-{0000..0001}.tar|12"}
    images = opened(4, calib_split="val-{0000..0001}.tar|12", calib_size=5, **both)
    assert everything(images.calibration)[1].tolist() == [0, 1, 2, 3, 0]
    assert everything(evaluation(images))[1].tolist() == [number % 4 for number in range(5, 12)]
    mapped = opened(4, calib_split="train-0000.tar|4", class_map=class_map(shards, [3, 2, 1, 0]), **both)
    assert everything(evaluation(mapped))[1].tolist() == [3 - number % 4 for number in range(12)]


def test_a_label_that_the_class_map_lacks_is_a_two_part_error(shards: Path) -> None:
    (shards / "map.txt").write_text("0 0\n1 1\n2 2\n")
    wds: dict[str, Any] = {"dataset": "wds/x", "data_dir": shards, "split": "val-{0000..0001}.tar|12"}
    for workers in (0, 2):
        images = opened(4, calib_split="train-0000.tar|4", class_map=shards / "map.txt", workers=workers, **wds)
        with pytest.raises(CoraqError, match="cannot be read: KeyError") as caught:
            everything(evaluation(images))
        assert "class-map" in caught.value.hint


def class_map(folder: Path, order: list[int]) -> Path:
    """Class number i of the data is the network's number order[i]."""
    (folder / "map.txt").write_text("".join(f"{name} {number}\n" for name, number in enumerate(order)))
    return folder / "map.txt"


def test_a_missing_shard_is_a_two_part_error(shards: Path) -> None:
    images = opened(4, dataset="wds/x", data_dir=shards, split="none-0000.tar|4", calib_split="train-0000.tar|4")
    with pytest.raises(CoraqError) as caught:
        everything(evaluation(images))
    assert caught.value.hint


def test_a_real_hugging_face_data_set_reads_the_same_images_as_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No fakes: timm's reader over `datasets`, which reads a folder of train/ and test/ without a network."""
    pytest.importorskip("datasets", reason="needs the package datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    write_images(data / "train", {"a": 4, "b": 4}, seed=1)
    write_images(data / "test", {"a": 3, "b": 3}, seed=2)
    by_folder = opened(2, data_dir=data, split="test")
    spec: dict[str, Any] = {"dataset": f"hfds/{data}", "data_dir": tmp_path / "cache", "split": "test"}
    for workers in (0, 2):
        by_spec = opened(2, workers=workers, **spec)
        assert rows(by_spec.calibration) == rows(by_folder.calibration)
        assert evaluation(by_spec).class_names == ["a", "b"]
        assert sorted(everything(evaluation(by_spec))[1].tolist()) == [0, 0, 0, 1, 1, 1]
        assert torch.equal(everything(evaluation(by_spec))[0], everything(evaluation(by_folder))[0])
    with pytest.raises(CoraqError, match="cannot be opened") as caught:
        opened(2, **{**spec, "split": "nosuch"})
    assert caught.value.hint


# --- tensors


def test_tensors_and_loaders_become_an_image_set() -> None:
    x, y = torch.randn(10, 3, 8, 8), torch.arange(10)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=3)
    given: list[tuple[Any, bool]] = [
        (x, False),
        ((x, y), True),
        (loader, True),
        (list(x.split(1)), False),
        (iter(loader), True),
    ]
    for data, labelled in given:
        images = tensor_images(data, batch_size=4)
        assert (images.count, images.labelled) == (10, labelled)
        for _ in range(2):
            ours, labels = everything(images)
            assert torch.equal(ours, x)
            assert labels.tolist() == (y.tolist() if labelled else [-1] * 10)
        assert max(len(batch) for batch, _ in images.batches()) <= 4
    assert tensor_images(loader, limit=5).count == 5
    assert (
        tensor_images(x).fingerprint == tensor_images(list(x.split(3))).fingerprint != tensor_images(x + 1).fingerprint
    )


@pytest.mark.parametrize(
    "data",
    [[], torch.zeros(3, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["x"], torch.full((1, 3, 8, 8), torch.nan)],
)
def test_tensors_that_are_no_images_are_errors(data: Any) -> None:
    with pytest.raises(CoraqError):
        tensor_images(data)


# --- real photographs


@pytest.mark.assets
@pytest.mark.skipif(not ASSETS.is_dir(), reason="needs ../shared/assets")
def test_real_folders_open_with_their_class_map() -> None:
    images = opened(
        1000,
        data_dir=ASSETS / "imagenet-val",
        calib_dir=ASSETS / "imagenet-sample",
        class_map=ASSETS / "imagenet.class_map.txt",
        calib_size=64,
        eval_size=128,
        workers=2,
    )
    _, calibrated = everything(images.calibration)
    assert len(set(calibrated.tolist())) == 64
    _, evaluated = everything(evaluation(images))
    assert len(set(evaluated.tolist())) == 128
    assert not images.calibration.skipped
