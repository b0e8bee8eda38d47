"""What a process sets and imports before it trains: asked of real processes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split

from cutmix_exp.data.sources import stratified_split
from tests.helpers import ROOT, TINY, command

HEAVY = ["sklearn", "scipy", "pandas", "matplotlib", "torchvision", "timm"]
COMPILER = ["torch._dynamo", "torch._inductor", "sympy"]


def test_a_run_on_digits_imports_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    """To the end: with training, evaluation, checkpoints, TensorBoard and the record."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import json, runpy, sys\n"
        f"sys.argv[0] = {str(ROOT / 'train.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "print(json.dumps(sorted(sys.modules)))\n"
    )
    done = command(
        str(driver), *TINY, "aug=cutmix", "trainer.max_steps=2", cwd=tmp_path, fresh=True
    )
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert "cutmix_exp.training.trainer" in loaded
    assert [name for name in [*HEAVY, *COMPILER] if name in loaded] == []


FAULTS = """
import cutmix_exp.{first}
import ctypes, json, multiprocessing, os, resource

def faults():
    "Page faults of taking and leaving 40 MiB ten times, and the setting of oneDNN."
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        block = libc.malloc(40 << 20)
        libc.memset(block, 1, 40 << 20)
        libc.free(block)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    print(json.dumps([after - before, os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY")]))

if __name__ == "__main__":
    faults()
    child = multiprocessing.get_context("spawn").Process(target=faults)
    child.start()
    child.join()
"""
PAGES = (40 << 20) // 4096


def faults(folder: Path, first: str = "startup", **extra: str) -> list[tuple[int, str]]:
    """Of a process that imports the settings first, and of one spawned by it."""
    script = folder / "faults.py"
    script.write_text(FAULTS.format(first=first))
    done = command(str(script), fresh=True, **extra)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_memory_is_kept_and_kernels_are_here_and_in_spawned_processes(tmp_path: Path) -> None:
    for count, kernels in faults(tmp_path):
        assert count < 1.5 * PAGES  # each page once; without: ten times
        assert kernels == "16384"


@pytest.mark.parametrize(
    "own",
    [
        {"MALLOC_MMAP_MAX_": "100", "MALLOC_TOP_PAD_": "0"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=100:glibc.malloc.top_pad=0"},
    ],
)
def test_the_users_own_settings_win(tmp_path: Path, own: dict[str, str]) -> None:
    for count, kernels in faults(tmp_path, ONEDNN_PRIMITIVE_CACHE_CAPACITY="7", **own):
        assert count > 5 * PAGES
        assert kernels == "7"


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 9), min_size=4, max_size=60), st.data())
@settings(max_examples=60, deadline=None)
def test_the_split_is_the_one_that_scikit_learn_draws(
    seed: int, drawn: list[int], data: st.DataObject
) -> None:
    labels = np.array([*drawn, *drawn])
    classes = len(set(drawn))
    size = data.draw(st.integers(classes, len(labels) - classes))
    kept, held_out = stratified_split(labels, size, seed)
    theirs = train_test_split(
        np.arange(len(labels)), test_size=size, stratify=labels, random_state=seed
    )
    assert kept.tolist() == sorted(theirs[0])
    assert held_out.tolist() == sorted(theirs[1])
