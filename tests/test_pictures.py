"""Claims about pixel formats: whatever a picture is stored as, the network sees what a viewer shows."""

from __future__ import annotations

import io
import struct
import tarfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.pictures import everything, opened
from timm.data import get_img_extensions

from coraq.data import ImageSet
from coraq.data.pictures import PixelFormatError, as_shown
from coraq.errors import CoraqError
from coraq.events import ListSink, Note

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (20, 30), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


def stored(picture: Image.Image, kind: str, **options: Any) -> Image.Image:
    """The picture as it comes back from a file."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def png16(values: np.ndarray) -> bytes:
    """A 16-bit PNG of uint16 [height, width, channels], which Pillow cannot write in colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff16(values: np.ndarray, photometric: int) -> bytes:
    """An uncompressed 16-bit TIFF of uint16 [height, width, channels]; photometric 0 white is zero, 1 gray, 2 RGB."""
    height, width, channels = values.shape
    pixels = values.astype("<u2").tobytes()
    depths = 8 + len(pixels)
    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, channels, depths if channels > 2 else 16),
        (259, 3, 1, 1),
        (262, 3, 1, photometric),
        (273, 4, 1, 8),
        (277, 3, 1, channels),
        (278, 4, 1, height),
        (279, 4, 1, len(pixels)),
    ]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    start = depths + 2 * channels
    head = b"II*\0" + struct.pack("<I", start)
    return head + pixels + struct.pack(f"<{channels}H", *[16] * channels) + directory + b"\0\0\0\0"


def shown(picture: Image.Image, mode: str = "RGB") -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return np.asarray(as_shown(picture, mode))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_gray_is_scaled_to_eight(kind: str) -> None:
    picture = stored(Image.fromarray(GRAY.astype(np.uint16) * 257), kind)
    assert np.array_equal(shown(picture, "L"), GRAY)
    assert np.array_equal(shown(picture), np.repeat(GRAY[:, :, None], 3, 2))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bit_colour_and_opaque_alpha_are_scaled_to_eight(channels: int) -> None:
    values = COLOUR if channels > 2 else GRAY[:, :, None]
    whole = values if channels % 2 else np.dstack([values, np.full((20, 30), 255, np.uint8)])
    picture = Image.open(io.BytesIO(png16(whole.astype(np.uint16) * 257)))
    assert np.array_equal(shown(picture), np.broadcast_to(values, (20, 30, 3)))


def test_sixteen_bit_tiffs_are_read_in_colour_and_where_white_is_zero() -> None:
    gray, colour = GRAY[:, :, None].astype(np.uint16) * 257, COLOUR.astype(np.uint16) * 257
    assert np.array_equal(shown(Image.open(io.BytesIO(tiff16(gray, 1))), "L"), GRAY)
    assert np.array_equal(shown(Image.open(io.BytesIO(tiff16(gray, 0))), "L"), 255 - GRAY)
    assert np.array_equal(shown(Image.open(io.BytesIO(tiff16(colour, 2)))), COLOUR)


def test_one_bit_pictures_are_black_and_white() -> None:
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(shown(stored(Image.fromarray(GRAY > 128), kind), "L"), (GRAY > 128) * np.uint8(255))


def test_floating_point_of_0_to_1_is_scaled_and_others_are_refused_by_their_range() -> None:
    picture = stored(Image.fromarray(GRAY.astype(np.float32) / 255), "TIFF")
    assert np.array_equal(shown(picture, "L"), GRAY)
    for values, match in [
        (GRAY.astype(np.float32), "0 to 255"),
        (GRAY / np.float32(255) - 0.5, "only 0 to 1"),
        (np.full((4, 4), np.nan, np.float32), "nan"),
        (GRAY.astype(np.int32), "no known full scale"),
    ]:
        with pytest.raises(PixelFormatError, match=match):
            shown(stored(Image.fromarray(values), "TIFF"))


def test_transparent_pixels_lie_over_white() -> None:
    palette = Image.fromarray(COLOUR).quantize(250)
    opaque, clear = np.asarray(palette.convert("RGB")), np.asarray(palette) == 3
    assert clear.any()
    over_white = np.where(clear[:, :, None], 255, opaque)
    alpha = bytes(0 if index == 3 else 255 for index in range(250))
    assert np.array_equal(shown(stored(palette, "PNG", transparency=alpha)), over_white)
    assert np.array_equal(shown(stored(palette, "PNG", transparency=3)), over_white)
    assert np.array_equal(shown(stored(palette, "PNG")), opaque)
    layer = Image.fromarray(np.dstack([COLOUR, np.where(GRAY > 100, 255, 0).astype(np.uint8)]))
    expected = np.where((GRAY > 100)[:, :, None], COLOUR, 255)
    assert np.array_equal(shown(stored(layer, "PNG")), expected)
    assert np.array_equal(shown(stored(layer, "PNG"), "L"), np.asarray(Image.fromarray(expected).convert("L")))


def test_cmyk_is_read_as_colour_and_as_gray() -> None:
    picture = stored(Image.fromarray(COLOUR).convert("CMYK"), "TIFF")
    assert np.array_equal(shown(picture), COLOUR)
    assert np.array_equal(shown(picture, "L"), np.asarray(Image.fromarray(COLOUR).convert("L")))
    jpeg = stored(Image.fromarray(COLOUR).convert("CMYK"), "JPEG", quality=100, subsampling=0)
    assert np.abs(shown(jpeg).astype(int) - COLOUR).max() <= 4


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [(1, lambda x: x), (3, lambda x: np.rot90(x, 2)), (6, lambda x: np.rot90(x, -1)), (8, np.rot90), (2, np.fliplr)],
)
def test_the_rotation_that_a_camera_recorded_is_applied(orientation: int, turn: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    # As the camera stores it: undoing the turn.
    assert np.array_equal(shown(stored(Image.fromarray(COLOUR), "PNG", exif=exif)), turn(COLOUR))
    sixteen = stored(Image.fromarray(GRAY.astype(np.uint16) * 257), "PNG", exif=exif)
    assert np.array_equal(shown(sixteen, "L"), turn(GRAY))


def test_damaged_exif_leaves_the_picture_as_it_is() -> None:
    picture = stored(Image.fromarray(COLOUR), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.array_equal(shown(picture), COLOUR)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_picture_is_read(kind: str) -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200, 90)]
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    picture = stored(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(shown(picture), np.full((8, 8, 3), 10, np.uint8))


# --- in folders


def write(folder: Path, suffix: str, picture: Image.Image, **options: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"{len(list(folder.iterdir()))}{suffix}", **options)


def first_batch(images: ImageSet) -> torch.Tensor:
    return everything(images)[0]


@pytest.mark.parametrize("suffix", [".webp", ".bmp", ".tif", ".TIFF", ".gif", ".ppm", ".jp2"])
def test_folders_of_other_formats_show_the_same_images_as_png(suffix: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lossless": True} if suffix == ".webp" else {}
    for _ in range(3):
        picture = Image.fromarray(np.repeat(RNG.integers(0, 256, (40, 40, 1), dtype=np.uint8), 3, 2))
        write(tmp_path / "png" / "a", ".png", picture)
        write(tmp_path / "other" / "a", suffix, picture, **options)
    reference = opened(calib_dir=tmp_path / "png").calibration
    images = opened(calib_dir=tmp_path / "other").calibration
    assert images.count == 3
    assert torch.equal(first_batch(images), first_batch(reference))
    assert ".webp" not in get_img_extensions()  # timm is left as it was


def test_sixteen_bit_files_show_the_same_images_in_a_folder_a_tar_and_a_stream(tmp_path: Path) -> None:
    for name, scale in (("eight", 1), ("sixteen", 257)):
        rng = np.random.default_rng(1)
        for label in ("a", "b"):
            for _ in range(2):
                values = rng.integers(0, 256, (40, 40)).astype(np.uint16 if scale > 1 else np.uint8)
                write(tmp_path / name / label, ".png", Image.fromarray(values * values.dtype.type(scale)))
    with tarfile.open(tmp_path / "sixteen.tar", "w") as archive:
        for file in sorted((tmp_path / "sixteen").rglob("*.*")):
            archive.add(file, file.relative_to(tmp_path / "sixteen"))
    reference = first_batch(opened(calib_dir=tmp_path / "eight").calibration)
    assert torch.equal(first_batch(opened(calib_dir=tmp_path / "sixteen").calibration), reference)
    tar = first_batch(opened(calib_dir=tmp_path / "sixteen.tar").calibration)
    assert {x.numpy().tobytes() for x in tar} == {x.numpy().tobytes() for x in reference}


def test_sixteen_bit_pictures_in_shards_are_not_read_as_garbage(tmp_path: Path) -> None:
    pytest.importorskip("webdataset", reason="needs the package webdataset")
    values = np.random.default_rng(2).integers(0, 256, (40, 40))
    for name, scale in (("eight", np.uint8(1)), ("sixteen", np.uint16(257))):
        with tarfile.open(tmp_path / f"{name}-0000.tar", "w") as archive:
            file = io.BytesIO()
            Image.fromarray(values.astype(scale.dtype) * scale).save(file, "PNG")
            for suffix, data in (("png", file.getvalue()), ("cls", b"0")):
                entry = tarfile.TarInfo(f"00000.{suffix}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    spec: dict[str, Any] = {"dataset": "wds/x", "data_dir": tmp_path, "calib_size": 1, "split": "eight-0000.tar|1"}
    eight, sixteen = (
        opened(2, calib_split=f"{name}-0000.tar|1", **{**spec, "split": f"{other}-0000.tar|1"}).calibration
        for name, other in (("eight", "sixteen"), ("sixteen", "eight"))
    )
    assert torch.equal(first_batch(sixteen), first_batch(eight))


def test_files_that_cannot_be_read_right_are_named_and_counted(tmp_path: Path) -> None:
    write(tmp_path / "a", ".tif", Image.fromarray(GRAY.astype(np.float32)))  # 0 to 255: no known scale
    for _ in range(2):
        write(tmp_path / "a", ".png", Image.fromarray(COLOUR))
    (tmp_path / "a" / "x.HEIC").write_bytes(b"a format that is not read")
    sink = ListSink()
    images = opened(calib_dir=tmp_path, sink=sink).calibration
    assert len(first_batch(images)) == 2
    assert len(images.skipped) == 1
    assert "0.tif: floating-point pixels" in images.skipped[0]
    notes = [event.message for event in sink.events if isinstance(event, Note)]
    assert any("1 file in formats that coraq does not read left out" in note and "x.HEIC" in note for note in notes)


# --- splits


def test_a_missing_split_is_an_error_that_lists_those_that_are_there(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write(tmp_path / name / "a", ".png", Image.fromarray(COLOUR))
        write(tmp_path / name / "b", ".png", Image.fromarray(COLOUR))
    for options in ({}, {"dataset": "torch/image_folder"}, {"split": "holdout"}, {"split": "tset"}):
        with pytest.raises(CoraqError, match=r"has no split '.*'; it has test, train") as caught:
            opened(2, data_dir=tmp_path, **options)
        assert "--split test or train" in caught.value.hint
    with pytest.raises(CoraqError, match=r"has no split 'nosuch'; it has test, train") as caught:
        opened(2, data_dir=tmp_path, split="test", calib_split="nosuch")
    assert "--calib-split" in caught.value.hint
    assert opened(2, data_dir=tmp_path, split="test").evaluation is not None


def test_a_split_asked_for_by_name_is_not_a_folder_of_classes(tmp_path: Path) -> None:
    for name in ("plane", "train", "tram"):  # a class that is called like a split is a class
        write(tmp_path / name, ".png", Image.fromarray(COLOUR))
        write(tmp_path / name, ".png", Image.fromarray(COLOUR))
    assert opened(3, data_dir=tmp_path, calib_split="validation").calibration.count == 3
    with pytest.raises(CoraqError, match=r"has no split 'test'; it has plane, train, tram"):
        opened(3, data_dir=tmp_path, split="test")


def test_a_split_that_torchvision_does_not_have_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CoraqError, match=r"torch/cifar10 has no split 'holdout'; it has train and test"):
        opened(10, data_dir=tmp_path, dataset="torch/cifar10", split="holdout")
