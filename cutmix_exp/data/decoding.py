"""Image files to RGB tensors: the same file gives the same pixels, whatever machine or thread."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cutmix_exp.errors import UserError

VERSION = 1
"""To be raised when `decode` or `fit` gives other pixels than before: caches are then rebuilt."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
"""Of files that count as images, in any case of letters."""

OR_LEAVE_OUT = "or leave such files out: dataset.bad_images=skip"
"""The other way to mend a `BadImage`, besides mending the file."""

_ORIENTATION = 0x0112  # the EXIF tag


class BadImage(UserError):
    """A file that is truncated or no image: the one error that `bad_images=skip` passes over."""


def decode(path: str | Path) -> Tensor:
    """The pixels of an image file, uint8 [3, H, W] (a view of an [H, W, 3] buffer).

    EXIF rotation is applied; transparent pixels lie over white; 16 bits are scaled to 8; of an
    animation the first frame counts. Ordinary JPEGs are decoded by torchvision, which is faster,
    and all else by PIL; both use libjpeg-turbo, and which of them does is decided by the file's
    content alone.

    Raises:
        BadImage: the file is truncated or no image that PIL knows.
        UserError: it cannot be read at all (permissions, a disk that fails).
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    pixels = _decode_jpeg(data) if _is_plain_jpeg(data) else None
    return _decode_any(data, path) if pixels is None else pixels


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether this is a grey or three-channel JPEG of 8 bits without EXIF data.

    A JPEG is a row of segments: 0xFF, marker, length (big endian, with itself). The frame header
    (markers C0 to CF but C4, C8 and CC) holds precision, height, width, number of channels.
    """
    place = 2
    if data[:2] != b"\xff\xd8":
        return False
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xE1 and data[place + 4 : place + 8] == b"Exif":
            return False
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return data[place + 4] == 8 and data[place + 9] in (1, 3)
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return False


def _decode_jpeg(data: bytes) -> Tensor | None:
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        return decode_jpeg(
            torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB
        )
    except RuntimeError:
        return None  # PIL says more clearly what is wrong


def _decode_any(data: bytes, path: str | Path) -> Tensor:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.array(_to_rgb(image))
    except MemoryError:
        raise
    except Exception as error:  # on broken files PIL's plugins raise all kinds
        cause = str(error) or type(error).__name__
        if "cannot identify image file" in cause:
            cause = "no image format is recognised" if data else "the file is empty"
        raise BadImage(
            f"{path} cannot be read as an image: {cause}; replace the file or remove it"
        ) from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _to_rgb(image: Any) -> Any:
    from PIL import Image, ImageOps

    image.load()
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey; PIL's own conversion would clip them
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("its integers have more than 16 bits")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Any) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF data beside sound pixels
        return 1


def size_of(path: str | Path) -> tuple[int, int]:
    """(height, width) of what `decode` makes of a file; only its header is read.

    Raises:
        UserError: the file is no image, or cannot be read.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = _orientation(image) in (5, 6, 7, 8)
    except Exception as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from None
    return (width, height) if turned else (height, width)


def fit(image: Tensor, side: int) -> Tensor:
    """uint8 [3, side, side]: the shorter side resized to `side` (bilinear, antialiased), then the
    centre; an image that has this size already stays as it is."""
    from PIL import Image
    from torchvision.transforms.v2 import functional as F

    if tuple(image.shape[1:]) == (side, side):
        return image
    # By PIL: torch would start threads of its own in each of the threads that call this.
    whole = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
    square = F.center_crop(F.resize(whole, [side]), [side, side])
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)
