"""Adding a regularizer takes one class and one YAML: done here, from outside the package."""

from __future__ import annotations

from pathlib import Path

from tests.helpers import ROOT, TINY, only_run, record_of, train

CLASS = '''
from dataclasses import dataclass

import numpy as np

from cutmix_exp.aug.base import Mixer, MixPlan, two_weights
from cutmix_exp.schema import option


@dataclass(frozen=True, kw_only=True)
class SideBySide(Mixer):
    """The partner's right part beside one's own left part."""

    share: float = option(0.5, ge=0, le=1)

    def sample(self, shape, progress, rng):
        own = np.full(shape.batch, self.share)
        return MixPlan(rng.permutation(shape.batch)[None], two_weights(own))

    def apply(self, plan, sources):
        cut = round(self.share * sources[0].shape[-1])
        mixed = sources[1].clone()
        mixed[..., :cut] = sources[0][..., :cut]
        return mixed
'''


def test_one_class_and_one_yaml(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(CLASS)
    (tmp_path / "configs" / "aug").mkdir(parents=True)
    (tmp_path / "configs" / "aug" / "side_by_side.yaml").write_text(
        "atoms: {side_by_side: mix}\nmix: {_target_: toy.SideBySide, share: 0.5}\n"
    )
    train(
        *TINY,
        f"hydra.searchpath=[file://{tmp_path / 'configs'}]",
        "aug=[cutout,side_by_side]",
        "aug.mix.share=0.75",
        "trainer.max_steps=2",
        f"runs_dir={tmp_path / 'runs'}",
        PYTHONPATH=f"{ROOT}:{tmp_path}",
    )
    record = record_of(only_run(tmp_path / "runs"))
    assert record["aug"] == "cutout+side_by_side"
    assert record["run_id"].startswith("digits-resnet-cutout+side_by_side-")
    assert record["protocol"]["share"] == 0.75
