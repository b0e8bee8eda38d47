"""ImageNet-like data from the command line: a small tree of the published layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import command, metrics_of, only_run, record_of, refused, train

pytestmark = pytest.mark.slow

SYNSETS = ("n01440764", "n01443537", "n01484850")
WORDS = ["dataset=imagenet", "dataset.num_classes=3", "model=resnet", "aug=cutmix", "device=cpu"]
SMALL = ["dataset.image_size=64", "model.depth=18", "model.stem=imagenet", "schedule.batch_size=8"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ilsvrc")
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 2)):
        for synset in SYNSETS:
            folder = root / part / synset
            folder.mkdir(parents=True)
            for i in range(count):
                coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
                image = coarse.resize((90 + 4 * i, 80), Image.Resampling.BICUBIC)
                image.save(folder / f"{synset}_{i}.JPEG")
    return root


def test_the_papers_network_takes_two_steps(tree: Path, tmp_path: Path) -> None:
    """ResNet-50 at 224 px, as the contract's command has it."""
    words = [*WORDS, f"dataset.root={tree}", "trainer.max_steps=2", "schedule.batch_size=2"]
    done = train(*words, f"runs_dir={tmp_path}")
    assert "23,514,179 parameters" in done.stdout  # 25,557,032 with three classes
    record = record_of(only_run(tmp_path))
    assert record["config"]["dataset"]["color_jitter"] == 0.4
    assert record["config"]["dataset"]["lighting"] == 0.1
    assert record["config"]["aug"]["mix"]["prob"] == 1.0
    assert record["config"]["schedule"]["milestones"] == [0.25, 0.5, 0.75]
    assert record["provenance"]["images_skipped"] == 0


def test_workers_do_not_matter_and_two_processes_share_the_work(tree: Path, tmp_path: Path) -> None:
    words = [*WORDS, *SMALL, f"dataset.root={tree}", "schedule.epochs=1", "precision=fp32"]
    found = {}
    for workers in (0, 1, 3):
        train(*words, f"dataset.workers={workers}", f"runs_dir={tmp_path / str(workers)}")
        found[workers] = metrics_of(only_run(tmp_path / str(workers)))
    assert found[0] == found[1] == found[3]
    train(*words, "devices=2", f"runs_dir={tmp_path / 'two'}")
    record = record_of(only_run(tmp_path / "two"))
    assert record["protocol"]["partner_scope"] == "rank"
    assert record["cost"]["world_size"] == 2
    held = np.load(only_run(tmp_path / "two") / "evaluations" / "test.npz")
    assert held["label"].tolist() == [0, 0, 1, 1, 2, 2]


def test_a_broken_file_is_named(tree: Path, tmp_path: Path) -> None:
    broken = tree / "train" / SYNSETS[1] / f"{SYNSETS[1]}_3.JPEG"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    words = [*WORDS, *SMALL, f"dataset.root={tree}", "schedule.epochs=1", f"runs_dir={tmp_path}"]
    try:
        assert f"{broken.name} cannot be read as an image" in refused(*words)
        both = command("train.py", *words, "devices=2")
        assert both.returncode == 2 and "Traceback" not in both.stderr
        # By the rank that meets it, or by both: the first one also makes the picture of the batch.
        assert f"{broken.name} cannot be read as an image" in both.stderr
        skipped = [*words, "dataset.bad_images=skip", f"dataset.cache_dir={tmp_path / 'cache'}"]
        train(*skipped)
        assert record_of(only_run_of(tmp_path, "complete"))["provenance"]["images_skipped"] == 1
    finally:
        broken.write_bytes(whole)


def only_run_of(runs_dir: Path, status: str) -> Path:
    files = list(runs_dir.glob("*/record.json"))
    (found,) = [f.parent for f in files if record_of(f.parent)["status"] == status]
    return found
