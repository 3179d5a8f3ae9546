"""From a picture file, whatever its pixel format, to 8-bit RGB or gray as a viewer would show it."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image
from timm.data import get_img_extensions, set_img_extensions

# What timm reads by default, and what a folder of photographs may hold beside. Of a file with several pictures
# (animations, multi-page TIFF) the first one is read.
EXTENSIONS = [
    ".png",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".webp",
    ".bmp",
    ".dib",
    ".tif",
    ".tiff",
    ".gif",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
    ".jp2",
    ".tga",
    ".apng",
    ".avif",
]
# Files that show pictures to people, and that Pillow does not open: they are left out, and counted.
UNSUPPORTED = [
    ".heic",
    ".heif",
    ".jxl",
    ".svg",
    ".psd",
    ".cr2",
    ".nef",
    ".arw",
    ".dng",
    ".exr",
    ".hdr",
    ".npy",
    ".npz",
    ".mat",
    ".dcm",
    ".nii",
]

SIXTEEN_BITS = 65535
PHOTOMETRIC = 262  # TIFF's tag of what a pixel of 0 looks like
ORIENTATION = 0x0112  # EXIF's tag of how the camera was held
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PixelFormatError(ValueError):
    """The file is intact, and its pixel values have no known scale."""


@contextmanager
def picture_extensions() -> Iterator[None]:
    """Within, timm's readers find files of all `EXTENSIONS`; afterwards timm is as it was."""
    before = get_img_extensions()
    set_img_extensions([*before, *EXTENSIONS])
    try:
        yield
    finally:
        set_img_extensions(before)


def as_shown(picture: Image.Image, mode: str) -> Image.Image:
    """A picture as 8-bit `mode` ("RGB" or "L"), as a viewer shows it.

    The rotation that the camera recorded (EXIF) is applied, transparent pixels lie over white, 16-bit values are
    scaled to 8 bits, and floating point is taken from 0…1. Of several pictures in a file the first one is read.

    Raises:
        PixelFormatError: 32-bit integers, or floating point outside 0…1: their full scale is not known.
        OSError, ValueError, …: the file cannot be decoded.
    """
    picture.load()
    if picture.mode.startswith("I") or picture.mode == "F":
        shown = _eight_bits(picture)
    else:
        shown = _over_white(picture)
    picture = _upright(shown, _orientation(picture))
    if mode == "L" and picture.mode not in ("1", "L"):
        picture = picture.convert("RGB")  # CMYK and others have no gray of their own
    return picture if picture.mode == mode else picture.convert(mode)


def _orientation(picture: Image.Image) -> object:
    """EXIF's number of how the camera was held; 1 (upright) where it does not say or is damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return picture.getexif().get(ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, struct.error):
        return 1


def _upright(picture: Image.Image, orientation: object) -> Image.Image:
    turn = TURNS.get(orientation) if isinstance(orientation, int) else None
    return picture if turn is None else picture.transpose(turn)


def _over_white(picture: Image.Image) -> Image.Image:
    clear = picture.info.get("transparency")
    if isinstance(clear, tuple) and max(clear) > 255:  # of a 16-bit file, whose pixels Pillow has made 8 bits
        picture.info["transparency"] = tuple(value >> 8 for value in clear)
    if clear is None and picture.mode not in ("RGBA", "LA", "PA", "La", "RGBa"):
        return picture
    if picture.mode in ("La", "RGBa"):
        picture = picture.convert("LA" if picture.mode == "La" else "RGBA")
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer).convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """A gray picture of 16-bit or floating-point values as 8-bit gray."""
    values = np.asarray(picture, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    if picture.mode == "F":
        if not (low >= 0 and high <= 1):
            raise PixelFormatError(f"floating-point pixels of {low:.4g} to {high:.4g}: only 0 to 1 has a known scale")
        full = 1.0
    else:
        # Pillow opens 16-bit files of some formats as 32-bit integers.
        sixteen = picture.mode.startswith("I;16") or picture.format in ("PNG", "PPM")
        if not sixteen or not (low >= 0 and high <= SIXTEEN_BITS):
            raise PixelFormatError("32-bit integer pixels have no known full scale")
        full = SIXTEEN_BITS
    if getattr(picture, "tag_v2", {}).get(PHOTOMETRIC) == 0:  # TIFF's "white is zero", which Pillow leaves
        values = full - values
    return Image.fromarray(np.rint(values * (255 / full)).astype(np.uint8))
