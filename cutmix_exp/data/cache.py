"""Many small image files are decoded once: arrays on the disk, mapped into memory afterwards.

A cache is a folder `<set>-<key>` that is renamed into place when it is whole. The key covers what
the source is (names, sizes, times of modification, labels) and what is made of it, so that a
changed source has another key; what was made of the set's earlier states is then removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from torch import Tensor

from cutmix_exp.data import decoding
from cutmix_exp.data.decoding import OR_LEAVE_OUT, BadImage, decode, fit
from cutmix_exp.data.sources import FileSet, ImageSet, folder_lock
from cutmix_exp.distributed import is_main_process
from cutmix_exp.errors import UserError
from cutmix_exp.files import write_json

T = TypeVar("T")

CHUNK = 256
"""Images that are decoded before they are written."""


@dataclass(frozen=True, kw_only=True)
class Listing(FileSet):
    """Files with their times of modification, int64 [N] in nanoseconds."""

    times: np.ndarray

    def key(self, *made: Any) -> str:
        """16 hexadecimal digits: of what the source is, and of what is made of it."""
        digest = hashlib.sha256(repr(made).encode())
        for content in self.contents():
            digest.update(content)
        digest.update(self.times.astype(np.int64).tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Cache:
    """The caches of one set of files.

    Attributes:
        folder: holds the caches.
        name: of the set, such as `tiny_imagenet-train`.
        skip: leave out files that cannot be decoded; else they are errors.
    """

    folder: Path
    name: str
    skip: bool = False

    def decoded(self, files: Listing, side: int | None) -> ImageSet:
        """All images in memory, which the processes of this machine share.

        Args:
            files: what to decode, or to find decoded.
            side: what `fit` makes of each image; None: as they are, all of one size.

        Raises:
            UserError: a file that is no image (unless it is to be skipped), an image of another
                size, a folder that cannot be written.
        """

        def make(folder: Path) -> list[int]:
            with open(folder / "images.npy", "wb") as file:
                return _write_images(file, self._decode_all(files, side), files)

        found = self._find_or_make(f"{side or 'whole'}", files, (side,), make)
        good = self._good(files, found)
        images = np.load(found / "images.npy", mmap_mode="c")  # copy on write: shared till then
        labels = files.labels[torch.from_numpy(good)]
        return ImageSet(
            torch.from_numpy(images), labels, skipped=len(files) - len(good), files=files.at(good)
        )

    def checked(self, files: Listing) -> FileSet:
        """The files that can be decoded: all are tried once, and what came out is kept.

        Raises:
            UserError: no file can be decoded, or the folder cannot be written.
        """

        def make(folder: Path) -> list[int]:
            def is_bad(index: int) -> bool:
                return isinstance(self._decode(files, index, None), BadImage)

            return [i for i, bad in enumerate(_in_threads(is_bad, len(files))) if bad]

        good = self._good(files, self._find_or_make("checked", files, (), make))
        return replace(files.at(good), skipped=len(files) - len(good))

    def _decode(self, files: Listing, index: int, side: int | None) -> Tensor | BadImage:
        try:
            image = decode(files.path(index))
        except BadImage as error:
            if self.skip:
                return error
            raise UserError(f"{error}, {OR_LEAVE_OUT}") from None
        return image if side is None else fit(image, side)

    def _decode_all(self, files: Listing, side: int | None) -> Iterator[Tensor | BadImage]:
        return _in_threads(lambda index: self._decode(files, index, side), len(files))

    def _good(self, files: Listing, cache: Path) -> np.ndarray:
        """Indices of the files that can be decoded; says how many others there are."""
        bad = json.loads((cache / "meta.json").read_text())["bad"]
        if bad and not self.skip:
            self._decode(files, bad[0], None)  # raises what it did when the cache was made
        if len(bad) == len(files):
            raise UserError(f"none of the {len(files):,} images below {files.root} can be decoded")
        if bad and is_main_process():
            self._say(
                f"{len(bad):,} of {len(files):,} images cannot be decoded and are left out, "
                f"the first is {files.path(bad[0])}"
            )
        return np.setdiff1d(np.arange(len(files)), np.asarray(bad, dtype=np.int64))

    def _say(self, text: str) -> None:
        print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    def _find_or_make(
        self, kind: str, files: Listing, made: tuple[Any, ...], make: Callable[[Path], list[int]]
    ) -> Path:
        """The folder of a sound cache. `make` writes files into a folder and returns the indices
        of bad images. One process makes it, others that start meanwhile wait for it."""
        # The same source by another mount point is the same; another one in this folder is not.
        place = os.path.relpath(files.root.resolve(), self.folder.resolve())
        prefix = f"{self.name}-{kind}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"
        cache = self.folder / f"{prefix}-{files.key(decoding.VERSION, *made)}"
        if _is_sound(cache):
            return cache
        try:
            with folder_lock(self.folder):
                if not _is_sound(cache):
                    self._make(cache, prefix, files, make)
        except OSError as error:
            raise UserError(
                f"the decoded images cannot be kept in {self.folder.absolute()}: "
                f"{error.strerror or error}; set dataset.cache_dir=FOLDER"
            ) from None
        return cache

    def _make(
        self, cache: Path, prefix: str, files: Listing, make: Callable[[Path], list[int]]
    ) -> None:
        damaged = " (what was kept there is damaged)" if cache.exists() else ""
        self._say(f"decoding {len(files):,} images once, kept in {self.folder}{damaged}")
        temporary = self.folder / f".{cache.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        temporary.mkdir()
        try:
            bad = make(temporary)
            sums = {path.name: _crc32(path) for path in temporary.iterdir()}
            write_json(temporary / "meta.json", {"bad": bad, "crc32": sums})
            shutil.rmtree(cache, ignore_errors=True)
            temporary.rename(cache)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for other in self.folder.iterdir():
            if other != cache and re.fullmatch(
                rf"\.?{re.escape(prefix)}-\w{{16}}(\.tmp)?", other.name
            ):
                shutil.rmtree(other, ignore_errors=True)


def _in_threads(action: Callable[[int], T], count: int) -> Iterator[T]:
    """action(0), action(1), ... in this order; PIL and torchvision decode outside of the GIL."""
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        for start in range(0, count, CHUNK):
            yield from pool.map(action, range(start, min(start + CHUNK, count)))


def _write_images(file: BinaryIO, images: Iterator[Tensor | BadImage], files: Listing) -> list[int]:
    """Write an .npy file uint8 [N, 3, H, W] of the images; returns the indices of bad ones.

    Written as a stream and not through a memory map, in which a full disk would kill the process.
    """
    shape: tuple[int, ...] | None = None
    bad: list[int] = []
    first = 0
    for index, image in enumerate(images):
        if isinstance(image, BadImage):
            bad.append(index)
            continue
        if shape is None:
            shape, first = tuple(image.shape), index
            _write_header(file, len(files), shape)
        if tuple(image.shape) != shape:
            raise UserError(
                f"{files.path(index)} has {tuple(image.shape[1:])} px, but {files.path(first)} has "
                f"{shape[1:]}; all images must have one size"
            )
        file.write(image.contiguous().numpy().data)
    if shape is not None and bad:
        file.seek(0)
        _write_header(file, len(files) - len(bad), shape)
    file.flush()
    os.fsync(file.fileno())
    return bad


def _write_header(file: BinaryIO, count: int, shape: tuple[int, ...]) -> None:
    """Its length does not depend on `count`: NumPy leaves room for the first axis to grow."""
    np.lib.format.write_array_header_1_0(
        file, {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    )


def _crc32(path: Path) -> int:
    total = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            total = zlib.crc32(block, total)
    return total


def _is_sound(cache: Path) -> bool:
    try:
        meta = json.loads((cache / "meta.json").read_text())
        return isinstance(meta["bad"], list) and all(
            _crc32(cache / name) == crc32 for name, crc32 in meta["crc32"].items()
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False
