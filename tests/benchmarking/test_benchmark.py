"""The benchmark's bookkeeping by hand-made figures, and one real run of the command. Nothing is
asserted of how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cutmix_exp.benchmarking import worker
from cutmix_exp.benchmarking.cases import ALL, GROUPS, OURS, Case, Variant
from cutmix_exp.benchmarking.reference import cut_and_mix
from cutmix_exp.benchmarking.report import keep, load, machine_name, markdown, rows, unsteady
from cutmix_exp.benchmarking.runner import Process, Result
from cutmix_exp.errors import UserError
from tests.helpers import ROOT, command, refused

NOTHING = Variant("ours", "config_of")


def result(quantity: str = "rate", goal: float | None = 2.5, limit: float | None = None) -> Result:
    variants = {OURS: NOTHING, "slow": NOTHING, "fast": NOTHING}
    case = Case("c", "g", "Work", variants, goal, quantity=quantity, limit=limit)  # type: ignore[arg-type]
    figures = {OURS: [30.0, 60.0, 40.0], "slow": [1.0, 2.0, 2.0], "fast": [10.0, 30.0, 10.0]}
    return Result(case, figures)


def test_a_ratio_is_the_median_of_the_rounds_against_the_best_alternative() -> None:
    found = result()
    assert (found.other, found.ratios, found.ratio) == ("fast", [3.0, 2.0, 4.0], 3.0)
    assert found.met is True
    assert result(goal=3.1).met is False
    assert result(goal=None).met is None


def test_of_memory_less_is_better_and_of_a_latency_the_limit_counts() -> None:
    memory = result("memory", goal=0.5)
    assert memory.other == "slow"
    assert memory.ratio == 30.0
    assert memory.met is False
    latency = result("latency", goal=1.0, limit=40.0)
    assert latency.ratio == 1.0  # the median round takes 40 s, as long as allowed
    assert latency.met is True


def test_results_are_kept_beside_those_of_other_cases(tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    keep(file, [result()])
    other = Result(Case("d", "g", "Other work", result().case.variants, None), result().figures)
    whole = keep(file, [other])
    assert load(file) == whole
    assert list(whole["cases"]) == ["c", "d"]
    table = rows(whole)
    assert table[0] == [
        "Work (unsteady)",  # from 30 to 60 around 40
        "40 (30 to 60) images/s",
        "fast: 10 (10 to 30) images/s",
        "3.00 (2.00 to 4.00)",
        "2.5",
        "yes",
    ]
    assert table[1][4:] == ["-", "-"]
    assert "| Other work (unsteady) |" in markdown(whole)
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(UserError, match="holds no benchmark results"):
        load(tmp_path / "broken.json")


def test_rounds_within_the_limit_are_steady() -> None:
    figures = {"ours": [10.0, 11.5, 10.0], "fast": [1.0, 1.25, 1.0], "slow": [1.0, 9.0, 1.0]}
    case = {"figures": figures, "other": "fast"}
    assert not unsteady(case)  # what it is not compared with does not matter
    assert unsteady({**case, "figures": {**figures, "ours": [10.0, 13.5, 10.0]}})
    assert unsteady({**case, "other": "slow"})


def test_the_machine_names_the_file() -> None:
    found = {"gpu": None, "cpu": "AMD EPYC (R)", "cores": 2, "flags": ["avx2", "avx512_bf16"]}
    assert machine_name(found) == "amd-epyc-r-2-cores-avx512-bf16"
    assert machine_name({**found, "gpu": "NVIDIA X"}).startswith("nvidia-x-")


def test_every_case_names_subjects_that_exist() -> None:
    from cutmix_exp.benchmarking import ours, reference

    modules = {"ours": ours, "reference": reference}
    cases = [case for make in GROUPS.values() for case in make("folder")]
    assert len({case.name for case in cases}) == len(cases)
    assert set(ALL) < set(GROUPS)
    for case in cases:
        assert next(iter(case.variants)) == OURS
        for variant in case.variants.values():
            assert callable(getattr(modules[variant.module], variant.name))


def test_the_references_cutmix_pastes_a_box_and_weighs_its_area() -> None:
    np.random.seed(1)  # noqa: NPY002 (it draws as a plain script would)
    torch.manual_seed(1)
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8).clone()
    mixed, one, other, lam = cut_and_mix(images, torch.arange(4))
    for image, mine, theirs in zip(mixed, one, other, strict=True):
        share = (image == float(mine)).float().mean().item() if mine != theirs else lam
        assert share == pytest.approx(lam)


def test_a_subject_is_measured_for_as_long_as_was_asked() -> None:
    calls = []
    found = worker.measure(lambda: calls.append(1) or 5, 0.0)  # type: ignore[func-returns-value]
    assert len(calls) == 1  # once at least
    assert found["rate"] > 0
    assert found["memory"] > 1e6


def test_a_process_that_fails_is_told_with_its_last_words() -> None:
    with pytest.raises(UserError, match=r"benchmark of 'it': the process ended\n(.*\n)*.*no_such"):
        Process("it", Variant("ours", "no_such"))


@pytest.mark.slow
def test_the_command_measures_and_writes_what_it_says(tmp_path: Path) -> None:
    words = ["mix", "only=sample", "effort=0.01", f"out={tmp_path}"]
    done = command(str(ROOT / "scripts/benchmark.py"), *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*.json")
    (case,) = json.loads(file.read_text())["cases"].values()
    assert (case["goal"], case["other"]) == (8.0, "timm Mixup(elem)")
    assert all(len(figures) == 7 for figures in case["figures"].values())
    page = file.with_suffix(".md").read_text()
    assert "CutMix, one box a sample" in page
    assert file.with_suffix(".png").stat().st_size > 1000
    file.with_suffix(".md").unlink()
    again = command(str(ROOT / "scripts/benchmark.py"), "table", f"out={tmp_path}", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert file.with_suffix(".md").read_text() == page


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    said = refused("epochs", script="scripts/benchmark.py", cwd=tmp_path)
    assert "startup" in said
    assert "got epochs" in said
