"""Image files of every kind become uint8 [3, H, W]; broken ones are named."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cutmix_exp.data import decoding
from cutmix_exp.data.decoding import BadImage, decode, fit
from cutmix_exp.errors import UserError


def picture(height: int = 20, width: int = 30) -> Image.Image:
    """Smooth colours, so that JPEG keeps them."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def check(file: Path, wanted: np.ndarray, tolerance: int = 0) -> None:
    got = decode(file)
    assert got.dtype == torch.uint8
    assert tuple(got.shape) == wanted.shape
    assert np.abs(got.numpy().astype(int) - wanted.astype(int)).max() <= tolerance


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}, {"comment": b"x" * 500}],
    ids=str,
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_are_decoded_as_pil_does(tmp_path: Path, mode: str, options: dict[str, Any]) -> None:
    file = tmp_path / "image.jpg"
    picture().convert(mode).save(file, **options)
    with Image.open(file) as image:
        check(file, pixels(image))


def test_the_colours_of_a_cmyk_jpeg_are_not_inverted(tmp_path: Path) -> None:
    file = tmp_path / "image.jpg"
    picture().convert("CMYK").save(file, quality=95)
    check(file, pixels(picture()), tolerance=25)


def test_only_plain_jpegs_go_to_the_fast_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(decoding, "_decode_jpeg", lambda data: asked.append(len(data)))
    exif = Image.Exif()
    exif[decoding._ORIENTATION] = 1
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "rgb.jpg": ("RGB", {}),
        "grey.jpg": ("L", {"progressive": True}),
        "cmyk.jpg": ("CMYK", {}),
        "exif.jpg": ("RGB", {"exif": exif}),
        "rgb.png": ("RGB", {}),
    }
    for name, (mode, options) in kinds.items():
        picture().convert(mode).save(tmp_path / name, **options)
        decode(tmp_path / name)
    sizes = [(tmp_path / name).stat().st_size for name in ("rgb.jpg", "grey.jpg")]
    assert asked == sizes


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    """ImageNet has a PNG that is called JPEG."""
    file = tmp_path / "image.JPEG"
    picture().save(file, format="PNG")
    check(file, pixels(picture()))


TURNS: dict[int, Any] = {
    # What must be done to the stored rows and columns, by the EXIF standard.
    1: lambda a: a,
    2: lambda a: a[:, :, ::-1],
    3: lambda a: a[:, ::-1, ::-1],
    4: lambda a: a[:, ::-1],
    5: lambda a: a.transpose(0, 2, 1),
    6: lambda a: a.transpose(0, 2, 1)[:, :, ::-1],
    7: lambda a: a.transpose(0, 2, 1)[:, ::-1, ::-1],
    8: lambda a: a.transpose(0, 2, 1)[:, ::-1],
}


@pytest.mark.parametrize("form", ["jpg", "png"])
@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[decoding._ORIENTATION] = orientation
    file = tmp_path / f"image.{form}"
    picture().save(file, exif=exif)
    with Image.open(file) as stored:
        check(file, TURNS[orientation](pixels(stored)))


def test_damaged_exif_data_does_not_hide_the_image(tmp_path: Path) -> None:
    file = tmp_path / "image.jpg"
    picture().save(file, exif=b"Exif\0\0nonsense", dpi=(72, 72))
    with Image.open(file) as stored:
        check(file, pixels(stored))


def test_16_bits_are_scaled_to_8(tmp_path: Path) -> None:
    file = tmp_path / "image.png"
    values = np.linspace(0, 65535, 600).reshape(20, 30).astype(np.uint16)
    Image.fromarray(values).save(file)
    wanted = np.repeat((values / 65535 * 255)[None], 3, 0)
    check(file, np.rint(wanted).astype(np.uint8), tolerance=1)
    assert len(np.unique(decode(file).numpy())) == 256


def test_16_bits_of_colour_are_scaled_to_8(tmp_path: Path) -> None:
    """PIL cannot write them; the file is put together by hand."""
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), dtype=np.uint16)

    def chunk(kind: bytes, data: bytes) -> bytes:
        whole = kind + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    file = tmp_path / "image.png"
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    check(file, np.rint(values / 65535 * 255).astype(np.uint8).transpose(2, 0, 1), tolerance=1)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "YCbCr", "CMYK"])
def test_every_mode_becomes_three_channels(tmp_path: Path, mode: str) -> None:
    image = picture().convert(mode)
    file = tmp_path / ("image.tif" if mode in ("YCbCr", "CMYK") else "image.png")
    image.save(file)
    check(file, pixels(image), tolerance=2 if mode == "YCbCr" else 0)


@pytest.mark.parametrize("form", ["RGBA", "LA", "palette"])
def test_transparent_pixels_lie_over_white(tmp_path: Path, form: str) -> None:
    """The colour behind them is whatever the program that wrote them left there."""
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    image.putpixel((2, 0), (0, 0, 0, 128))
    file = tmp_path / "image.png"
    image = image.quantize() if form == "palette" else image.convert(form)
    image.save(file)
    values = decode(file)
    assert values[:, 1].unique().tolist() == [255]
    assert values[:, 0, :2].tolist() == [[255, 0]] * 3
    assert 120 < int(values[0, 0, 2]) < 135


@pytest.mark.parametrize("form", ["jpg", "png", "gif", "tif", "webp", "bmp"])
@pytest.mark.parametrize("kept", [0.0, 0.05, 0.5, 0.9])
def test_a_truncated_file_is_named(tmp_path: Path, form: str, kept: float) -> None:
    file = tmp_path / f"image.{form}"
    picture(60, 80).save(file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(BadImage, match=f"{re.escape(str(file))} cannot be read as an image: ."):
        decode(file)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff\xd9", bytes(1000)])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "image.jpg"
    file.write_bytes(content)
    with pytest.raises(BadImage, match=re.escape(str(file))):
        decode(file)


@pytest.mark.parametrize("values", [np.float32(0.5), np.int32(70000)], ids=str)
def test_numbers_of_unknown_range_are_refused(tmp_path: Path, values: Any) -> None:
    file = tmp_path / "image.tif"
    Image.fromarray(np.full((3, 4), values)).save(file)
    with pytest.raises(BadImage, match=r"floating-point|more than 16 bits"):
        decode(file)


def test_a_file_that_cannot_be_read_is_no_bad_image(tmp_path: Path) -> None:
    """A disk that fails must not pass for bad images, which can be skipped."""
    for path in (tmp_path / "missing.jpg", tmp_path):
        with pytest.raises(UserError, match=f"{re.escape(str(path))} cannot be read") as caught:
            decode(path)
        assert not isinstance(caught.value, BadImage)


@pytest.mark.parametrize(("height", "width"), [(20, 30), (30, 20), (8, 9), (41, 13), (16, 16)])
def test_fitting_resizes_the_shorter_side_and_takes_the_centre(height: int, width: int) -> None:
    image = picture(height, width)
    small = (16, int(16 * width / height)) if height <= width else (int(16 * height / width), 16)
    resized = image.resize(small[::-1], Image.Resampling.BILINEAR)  # PIL always antialiases
    top, left = round((small[0] - 16) / 2), round((small[1] - 16) / 2)
    wanted = pixels(resized.crop((left, top, left + 16, top + 16)))
    got = fit(torch.from_numpy(pixels(image).copy()), 16)
    np.testing.assert_array_equal(got.numpy(), wanted)


def test_an_image_that_fits_is_left_alone() -> None:
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    assert fit(image, 16) is image
