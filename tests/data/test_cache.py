"""Decoded images are kept: once for all processes, anew when the source or the cache changed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cutmix_exp.data import cache as cache_module
from cutmix_exp.data.cache import Cache, Listing
from cutmix_exp.data.decoding import decode, fit
from cutmix_exp.data.folders import class_folders, list_images
from cutmix_exp.data.sources import folder_lock
from cutmix_exp.errors import UserError
from tests.data.trees import SYNSETS, class_trees, truncate, write_image
from tests.helpers import ROOT, environment


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return class_trees(tmp_path / "data") / "train"


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "kept", "some-train")


def listing(source: Path) -> Listing:
    return list_images(source, class_folders(source))


def kept(cache: Cache) -> list[Path]:
    return sorted(p for p in cache.folder.iterdir() if p.name != ".lock")


def direct(source: Path, side: int = 32) -> np.ndarray:
    files = listing(source)
    return np.stack([fit(decode(files.path(i)), side).numpy() for i in range(len(files))])


def check(cache: Cache, source: Path) -> None:
    got = cache.decoded(listing(source), 32)
    np.testing.assert_array_equal(got.images.numpy(), direct(source))
    assert torch.equal(got.labels, listing(source).labels)


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are decoded from now on."""
    decoded: list[Path] = []

    def counting(path: Path) -> torch.Tensor:
        decoded.append(path)
        return decode(path)

    monkeypatch.setattr(cache_module, "decode", counting)
    return decoded


def test_images_are_decoded_once(
    source: Path,
    cache: Cache,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    decoded = count_decoded(monkeypatch)
    check(cache, source)
    assert len(decoded) == 12
    assert "some-train: decoding 12 images once" in capfd.readouterr().err
    decoded.clear()
    check(cache, source)
    assert decoded == []
    assert capfd.readouterr().err == ""
    assert len(kept(cache)) == 1


@pytest.mark.parametrize("chunk", [1, 5, 12, 100])
def test_the_order_does_not_depend_on_the_chunks(
    source: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(cache_module, "CHUNK", chunk)
    check(cache, source)


def test_the_array_is_a_file_in_memory_that_nobody_changes(source: Path, cache: Cache) -> None:
    images = cache.decoded(listing(source), 32).images
    (file,) = cache.folder.glob("*/images.npy")
    assert str(file) in Path("/proc/self/maps").read_text()
    images.zero_()
    np.testing.assert_array_equal(np.load(file), direct(source))


@pytest.mark.parametrize("change", ["content", "touched", "added", "removed", "renamed"])
def test_a_changed_source_is_decoded_anew(source: Path, cache: Cache, change: str) -> None:
    check(cache, source)
    (before,) = kept(cache)
    file = source / SYNSETS[1] / f"{SYNSETS[1]}_1.JPEG"
    if change == "content":
        write_image(file, 77)
    elif change == "touched":  # as by a tool that writes files of the same size
        stat = file.stat()
        pixels = np.random.default_rng(1).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
        file.write_bytes(file.read_bytes().ljust(stat.st_size, b"\0")[: stat.st_size])
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    elif change == "added":
        write_image(file.with_name("new.JPEG"), 77)
    elif change == "removed":
        file.unlink()
    else:
        file.rename(file.with_name("zzz.JPEG"))
    check(cache, source)
    (after,) = kept(cache)
    assert after != before, "the stale one is removed"


@pytest.mark.parametrize(
    "damage", ["flipped", "shortened", "images gone", "meta gone", "meta nonsense", "meta {}"]
)
def test_a_damaged_cache_is_made_anew(
    source: Path, cache: Cache, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    check(cache, source)
    (folder,) = kept(cache)
    images, meta = folder / "images.npy", folder / "meta.json"
    content = bytearray(images.read_bytes())
    if damage == "flipped":
        content[-7] ^= 1
        images.write_bytes(content)
    elif damage == "shortened":
        images.write_bytes(content[:-1])
    elif damage == "images gone":
        images.unlink()
    elif damage == "meta gone":
        meta.unlink()
    else:
        meta.write_text(damage.removeprefix("meta "))
    capfd.readouterr()
    check(cache, source)
    assert "damaged" in capfd.readouterr().err
    assert kept(cache) == [folder]


def test_sets_sides_and_places_are_kept_beside_each_other(
    tmp_path: Path, source: Path, cache: Cache
) -> None:
    other = class_trees(tmp_path / "other", each=2) / "train"
    for _ in range(2):
        cache.decoded(listing(source), 32)
        cache.decoded(listing(source), 16)
        cache.decoded(listing(other), 32)
        Cache(cache.folder, "some-test").decoded(listing(source), 32)
        Cache(cache.folder, "some-train", skip=True).checked(listing(source))
    assert len(kept(cache)) == 5


def test_the_same_source_at_another_mount_point_is_the_same(tmp_path: Path) -> None:
    class_trees(tmp_path / "data")
    Cache(tmp_path / "data/.cache", "s").decoded(listing(tmp_path / "data/train"), 32)
    (tmp_path / "data").rename(tmp_path / "moved")
    Cache(tmp_path / "moved/.cache", "s").decoded(listing(tmp_path / "moved/train"), 32)
    assert len(kept(Cache(tmp_path / "moved/.cache", "s"))) == 1


def test_what_a_killed_process_left_is_removed(source: Path, cache: Cache) -> None:
    check(cache, source)
    (folder,) = kept(cache)
    folder.rename(folder.with_name(f".{folder.name}.tmp"))
    (cache.folder / f".{folder.name[:-16]}{'0' * 16}.tmp").mkdir()
    check(cache, source)
    assert kept(cache) == [folder]


def test_an_error_leaves_nothing_behind(source: Path, cache: Cache) -> None:
    truncate(source / SYNSETS[1] / f"{SYNSETS[1]}_1.JPEG")
    truncate(source / SYNSETS[2] / f"{SYNSETS[2]}_0.JPEG")
    with pytest.raises(UserError, match=rf"{SYNSETS[1]}_1\.JPEG"):
        cache.decoded(listing(source), 32)
    assert kept(cache) == []


def test_skipped_images_leave_no_gap(source: Path, cache: Cache) -> None:
    wanted = np.delete(direct(source), [0, 5], 0)
    truncate(source / SYNSETS[0] / f"{SYNSETS[0]}_0.JPEG")
    truncate(source / SYNSETS[1] / f"{SYNSETS[1]}_1.JPEG")
    got = Cache(cache.folder, "s", skip=True).decoded(listing(source), 32)
    np.testing.assert_array_equal(got.images.numpy(), wanted)
    assert got.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert got.skipped == 2


def test_a_set_without_a_sound_image_is_refused(source: Path, cache: Cache) -> None:
    for file in source.rglob("*.JPEG"):
        file.write_text("no image")
    skipping = Cache(cache.folder, "s", skip=True)
    for _ in range(2):
        with pytest.raises(UserError, match="none of the 12 images"):
            skipping.decoded(listing(source), 32)
        with pytest.raises(UserError, match="none of the 12 images"):
            skipping.checked(listing(source))


def test_a_folder_that_cannot_be_written_is_told(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"set dataset\.cache_dir=FOLDER"):
        Cache(tmp_path / "file/below", "s").decoded(listing(source), 32)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "_write_header", full)
    with pytest.raises(UserError, match=r"No space left on device; set dataset\.cache_dir="):
        Cache(tmp_path / "kept", "s").decoded(listing(source), 32)


def test_a_cache_in_a_folder_that_is_read_only_is_used(
    source: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(cache, source)

    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache_module, "folder_lock", refuse)
    check(cache, source)


def test_a_process_waits_for_the_one_that_makes_the_cache(source: Path, cache: Cache) -> None:
    done = threading.Event()

    def use() -> None:
        cache.decoded(listing(source), 32)
        done.set()

    with folder_lock(cache.folder):
        thread = threading.Thread(target=use)
        thread.start()
        assert not done.wait(0.3)
        assert kept(cache) == []
    thread.join(20)
    assert done.is_set()


USE = """
import sys, time
from pathlib import Path
from cutmix_exp.data.cache import Cache
from cutmix_exp.data.folders import class_folders, list_images

source, kept, mine, other = map(Path, sys.argv[1:])
files = list_images(source, class_folders(source))
mine.touch()
while not other.exists():
    time.sleep(0.001)
images = Cache(kept, "s").decoded(files, 32).images
print(int(images.long().sum()))
"""


@pytest.mark.slow
def test_two_processes_that_start_at_once_decode_once(tmp_path: Path) -> None:
    source = class_trees(tmp_path / "data", each=60) / "train"
    flags = [tmp_path / "first", tmp_path / "second"]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", USE, source, tmp_path / "kept", *order],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for order in (flags, flags[::-1])
    ]
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert sum(len(re.findall("decoding 180 images once", err)) for _, err in said) == 1
    assert {int(out) for out, _ in said} == {int(direct(source).astype(int).sum())}
