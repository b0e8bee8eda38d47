"""Every YAML of configs/ is composed, checked and built; run identities are stable."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from cutmix_exp import schema
from cutmix_exp.composition import CONFIG_DIR, ELSEWHERE, compose, groups
from cutmix_exp.config import Config, Hardware, from_dict, resolve
from cutmix_exp.errors import UserError
from cutmix_exp.evaluation.base import load_suite
from cutmix_exp.models.library import LibraryModel
from cutmix_exp.reporting.tables import BUDGETS, load_budget, load_table
from cutmix_exp.sweeps.jobs import Settings
from tests.data.trees import class_trees
from tests.helpers import config_of, row_configs

CPU = Hardware(cpu_bf16=True)
HARDWARE = Hardware(gpus=8, gpu_bf16=True, cpu_bf16=True)
FILES = sorted(p.relative_to(CONFIG_DIR) for p in CONFIG_DIR.rglob("*.yaml"))
GROUPS = sorted({f.parts[0] for f in FILES if len(f.parts) == 2})


def test_all_files_are_in_a_known_group() -> None:
    assert GROUPS == [
        "aug",
        "budget",
        "dataset",
        "experiment",
        "model",
        "schedule",
        "suite",
        "table",
    ]
    others = [f for f in FILES if len(f.parts) != 2]
    assert others == [Path("hydra/launcher/sweep.yaml"), Path("train.yaml")]


def test_every_field_of_train_yaml_is_explained() -> None:
    text = (CONFIG_DIR / "train.yaml").read_text()
    fields = text[text.index("\nseed:") : text.index("\nhydra:")].splitlines()
    values = [line for line in fields if re.match(r" *\w+: +[^ #]", line)]
    assert {"seed: 0", "  gamma: 0.1"} <= {line.partition(" # ")[0].rstrip() for line in values}
    for line in values:
        comment = line.partition(" # ")[2]
        assert len(comment.split()) > 1 and comment.split()[0] not in ("of", "null:"), line


def test_the_launchers_options_are_the_settings_of_a_sweep() -> None:
    file = CONFIG_DIR / "hydra" / "launcher" / "sweep.yaml"
    options = {k: v for k, v in yaml.safe_load(file.read_text()).items() if k[0] != "_"}
    assert options == schema.to_dict(Settings())
    with pytest.raises(UserError, match=r"did you mean 'hydra\.launcher\.jobs'"):
        compose(["hydra.launcher.jobz=2"])


@pytest.mark.parametrize("file", [f for f in FILES if f.parts[0] == "suite"], ids=str)
def test_every_suite_is_built_under_its_name(file: Path) -> None:
    assert (CONFIG_DIR / file).read_text().startswith("#"), "a YAML opens with what it is"
    suite = load_suite(file.stem)
    assert suite.name == file.stem
    with pytest.raises(UserError, match="no_such_field"):
        load_suite(file.stem, {"no_such_field": 1})


COMPOSED = [f for f in FILES if len(f.parts) == 2 and f.parts[0] != "suite"]


def from_weights(config: Config) -> bool:
    return isinstance(config.model, LibraryModel) and config.model.pretrained


@pytest.mark.parametrize("file", COMPOSED, ids=str)
def test_every_yaml_is_composed_and_built(file: Path, tmp_path: Path) -> None:
    group, name = file.parts[0], file.stem
    assert (CONFIG_DIR / file).read_text().startswith("#"), "a YAML opens with what it is"
    follows_data = (
        [f"dataset.root={class_trees(tmp_path)}"] if "dataset/image_folder" in str(file) else []
    )
    configs = (
        row_configs(load_table(name))
        if group == "table"
        else [from_dict(compose([f"{group}={name}", *follows_data]))]
    )
    built = set()
    for config in configs:
        resolved = resolve(config, HARDWARE)
        assert from_dict(resolved.to_dict()) == resolved
        network = str((resolved.model, resolved.dataset.num_classes, resolved.dataset.image_size))
        if network in built:
            continue
        built.add(network)
        # Without published weights, which need a download and change no shape.
        plain = (
            replace(resolved.model, pretrained=False) if from_weights(resolved) else resolved.model
        )
        with torch.device("meta"):
            model = plain.build(resolved.dataset.num_classes)
            side = resolved.dataset.image_size
            logits = model.eval()(torch.zeros(2, 3, side, side))
        assert logits.shape == (2, resolved.dataset.num_classes)


@pytest.mark.parametrize("file", [f for f in FILES if f.parts[0] == "aug"], ids=str)
def test_the_name_of_an_atom_is_its_file(file: Path) -> None:
    aug = config_of(f"aug={file.stem}").aug
    assert aug.name == file.stem or len(aug.atoms) > 1


def test_cifar_recipe() -> None:
    config = config_of("dataset=cifar100", "model=pyramidnet", "aug=cutmix")
    s = config.schedule
    assert (config.epochs, s.batch_size, s.lr, s.milestones, s.gamma) == (
        300,
        64,
        0.25,
        (0.5, 0.75),
        0.1,
    )
    assert (s.momentum, s.nesterov, s.weight_decay) == (0.9, True, 1e-4)
    assert config.aug.protocol() == {
        "prob": 0.5,
        "alpha": 1.0,
        "partner": "permutation",
        "granularity": "batch",
        "box_law": "official",
        "correct_lambda": True,
        "prob_schedule": "constant",
        "centre": "uniform",
        "centre_std": 0.25,
        "fixed_lambda": None,
        "max_aspect": 1.0,
        "label": "area",
        "label_smoothing": 0.0,
    }
    both = config_of("dataset=cifar100", "aug=cutout_mixup").aug.protocol()
    assert both["image"] == {"cutout": {"size": 16}} and both["alpha"] == 1.0


def test_imagenet_recipe() -> None:
    config = config_of("dataset=imagenet", "aug=cutmix")
    data, s = config.dataset, config.schedule
    assert (config.epochs, s.batch_size, s.lr, s.gamma) == (300, 256, 0.1, 0.1)
    assert [share * config.epochs for share in s.milestones] == [75, 150, 225]
    assert (s.momentum, s.nesterov, s.weight_decay) == (0.9, True, 1e-4)
    assert (data.num_classes, data.image_size, data.eval_resize) == (1000, 224, 256)
    assert (data.crop, data.color_jitter, data.lighting) == ("random_resized", 0.4, 0.1)
    assert (data.crop_scale, data.crop_ratio) == ((0.08, 1.0), (3 / 4, 4 / 3))


def test_the_recipe_follows_the_data_set_and_can_be_overridden() -> None:
    assert config_of("dataset=digits", "model=resnet").schedule.lr == 0.1
    assert config_of("dataset=digits", "model=resnet", "schedule=cifar").schedule.lr == 0.25
    assert config_of("dataset=digits", "model=resnet", "schedule.lr=0.3").schedule.lr == 0.3


@pytest.mark.parametrize(
    ("budget", "epochs"), [("smoke", 1), ("short", 30), ("medium", 100), ("paper", 300)]
)
def test_budgets_are_epochs_of_the_same_recipe(budget: str, epochs: int) -> None:
    assert config_of("dataset=cifar10", f"budget={budget}").epochs == epochs
    assert config_of("dataset=cifar10", f"budget={budget}", "schedule.epochs=7").epochs == 7


@pytest.mark.parametrize("name", [f.stem for f in FILES if f.parts[0] == "dataset"])
def test_padding_can_be_set_for_every_data_set(name: str) -> None:
    own = ["dataset.num_classes=2"] if name == "image_folder" else []
    pad = ["++dataset.crop=pad", "++dataset.crop_resize=null", "dataset.padding_mode=reflect"]
    built = from_dict(compose([f"dataset={name}", *own, *pad]))
    assert built.dataset.padding_mode == "reflect"
    assert from_dict(compose([f"dataset={name}", *own])).dataset.crop_padding == 4


@pytest.mark.parametrize("name", [f.stem for f in FILES if f.parts[0] == "dataset"])
def test_what_a_data_sets_file_says_stays_where_it_has_no_use(name: str) -> None:
    own = ["dataset.num_classes=2"] if name == "image_folder" else []
    others = ["++dataset.crop_resize=null", "++dataset.eval_fit=shorter", "dataset.image_size=40"]
    if name in ("cub", "imagenet", "image_folder", "tiny_imagenet", "cifar10_jpeg"):
        others.append("dataset.delivery=resident")
    for crop in ("pad", "random_resized"):
        config = from_dict(compose([f"dataset={name}", *own, *others, f"++dataset.crop={crop}"]))
        assert config.dataset.crop == crop


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tiny_imagenet", "dataset.eval_resize=80"], r"eval_resize=80 is of images that stream"),
        (["tiny_imagenet", "dataset.crop_padding=8"], r"crop_padding=8 is of dataset\.crop=pad"),
        (["tiny_imagenet", "dataset.padding_mode=reflect"], r"crop=random_resized has no use"),
        (["cub", "dataset.padding_mode=reflect"], r"dataset\.crop=window has no use"),
        (["cifar10", "+dataset.crop_scale=[0.2,1.0]"], r"crop_scale=\[0.2, 1.0\] is of dataset"),
        (["cifar10", "+dataset.crop_ratio=[1.0,1.0]"], r"or set dataset\.crop=random_resized"),
    ],
)
def test_what_would_do_nothing_is_refused(words: list[str], said: str) -> None:
    name, *others = words
    with pytest.raises(UserError, match=said):
        from_dict(compose([f"dataset={name}", *others]))
    streams = ["dataset=tiny_imagenet", "dataset.delivery=streaming", "dataset.eval_resize=80"]
    assert from_dict(compose(streams)).dataset.eval_resize == 80


def test_resnet110_presets() -> None:
    config = config_of("experiment=resnet110_cutmix")
    assert (config.schedule.lr, config.aug.protocol()["prob"]) == (0.1, 1.0)
    assert (config.model.depth, config.model.block) == (110, "bottleneck")  # type: ignore[attr-defined]
    assert config_of("experiment=resnet110_baseline").schedule.lr == 0.1


PINNED = {
    # Committed records are found by these; a field that is added later must not change them.
    (
        "dataset=cifar100",
        "model=pyramidnet",
        "aug=cutmix",
    ): "cifar100-pyramidnet-cutmix-db2cb448-s0",
    (
        "dataset=cifar10",
        "model=pyramidnet",
        "aug=cutmix",
    ): "cifar10-pyramidnet-cutmix-99da30e7-s0",
    (
        "dataset=tiny_imagenet",
        "model=resnet",
        "aug=cutmix",
    ): "tiny_imagenet-resnet-cutmix-c2b335f4-s0",
}


@pytest.mark.parametrize("overrides", PINNED, ids=" ".join)
def test_run_ids_are_pinned(overrides: tuple[str, ...]) -> None:
    config = resolve(from_dict(compose([*overrides, "precision=bf16"])), CPU)
    assert config.run_id == PINNED[overrides]


BASE = ("dataset=digits", "model=resnet", "aug=cutmix", "precision=fp32")


@pytest.mark.parametrize(
    "override",
    [
        "aug.mix.alpha=0.5",
        "aug.mix.prob=1.0",
        "aug.mix.box_law=unbiased",
        "aug.mix.correct_lambda=false",
        "aug.mix.partner=roll",
        "aug.mix.granularity=sample",
        "model.depth=56",
        "schedule.lr=0.2",
        "schedule.epochs=3",
        "schedule.batch_size=32",
        "schedule.weight_decay=0.0",
        "schedule.milestones=[0.5]",
        "trainer.max_steps=3",
        "trainer.bn_group_size=32",
        "trainer.deterministic=false",
        "precision=bf16",
        "dataset.val_size=100",
        "dataset.flip=true",
        "devices=2",
        "trainer.accumulate=2",
    ],
)
def test_the_hash_covers_what_can_move_a_number(override: str) -> None:
    base = resolve(from_dict(compose([*BASE])), CPU)
    other = resolve(from_dict(compose([*BASE, override])), CPU)
    assert other.run_id != base.run_id
    assert other.run_id.split("-")[:3] == base.run_id.split("-")[:3]


@pytest.mark.parametrize(
    "override",
    [
        "runs_dir=elsewhere",
        "force=true",
        "profile=true",
        "dataset.root=elsewhere",
        "trainer.compile=true",
        "checkpoint.every_epochs=5",
        "checkpoint.every_minutes=1.5",
        "logging.grid=0",
        "device=cpu",
        "budget=paper",
        "aug.mix.prob=0.5",
        "trainer.bn_group_size=64",
        "dataset.val_seed=3",  # without a validation split
    ],
)
def test_the_hash_leaves_out_what_cannot(override: str) -> None:
    base = resolve(from_dict(compose([*BASE])), CPU)
    other = resolve(from_dict(compose([*BASE, override])), CPU)
    assert other.run_id == base.run_id


def test_devices_count_only_through_the_batchnorm_group() -> None:
    one = resolve(from_dict(compose([*BASE, "trainer.bn_group_size=32"])), CPU)
    two = resolve(from_dict(compose([*BASE, "devices=2"])), CPU)
    accumulated = resolve(from_dict(compose([*BASE, "trainer.accumulate=2"])), CPU)
    assert one.run_id == two.run_id == accumulated.run_id
    assert one.bn_group_size == two.bn_group_size == 32


def test_batchnorm_groups_of_rounded_size_do_not_collide() -> None:
    """64 images in 11 and in 12 groups have up to 6 each, and are different computations."""
    ids = [
        resolve(from_dict(compose([*BASE, f"trainer.accumulate={n}"])), CPU).run_id
        for n in (11, 12)
    ]
    assert ids[0] != ids[1]


def test_the_budget_is_named_only_where_it_is_followed() -> None:
    assert config_of("dataset=cifar10", "budget=short").budget_name == "short"
    assert config_of("dataset=cifar10", "budget=short", "schedule.epochs=7").budget_name == "custom"


def test_seeds_of_a_cell_share_the_hash() -> None:
    ids = [config_of(*BASE, f"seed={seed}").run_id for seed in (0, 1)]
    assert ids[0][:-1] == ids[1][:-1]
    assert [i[-3:] for i in ids] == ["-s0", "-s1"]


def test_torchrun_sets_the_number_of_devices() -> None:
    hardware = Hardware(cpu_bf16=True, launched=2, launched_here=2)
    assert resolve(from_dict(compose([*BASE])), hardware).world_size == 2
    assert resolve(from_dict(compose([*BASE, "devices=2"])), hardware).world_size == 2
    with pytest.raises(UserError, match="leave devices out"):
        resolve(from_dict(compose([*BASE, "devices=4"])), hardware)


def test_precision_follows_the_device_that_computes() -> None:
    config = from_dict(compose(["dataset=digits", "model=resnet"]))
    old_gpu = Hardware(gpus=1, gpu_bf16=False, cpu_bf16=True)
    assert resolve(config, CPU).precision == "bf16"
    assert resolve(config, Hardware()).precision == "fp32"
    assert resolve(config, old_gpu).precision == "fp32"
    assert resolve(replace(config, device="cpu"), old_gpu).precision == "bf16"
    for hardware in (Hardware(), old_gpu):
        with pytest.raises(UserError, match="precision=fp32"):
            resolve(replace(config, precision="bf16"), hardware)


def test_more_processes_than_gpus_are_refused() -> None:
    config = from_dict(compose(["dataset=digits", "model=resnet"]))
    for hardware in (
        Hardware(gpus=1, launched=2, launched_here=2),
        Hardware(gpus=1, launched=4, launched_here=2),
    ):
        with pytest.raises(UserError, match="has 1 GPUs"):
            resolve(config, hardware)
    assert resolve(config, Hardware(gpus=2, launched=4, launched_here=2)).world_size == 4
    with pytest.raises(UserError, match="has 1 GPUs"):
        resolve(replace(config, devices=2), Hardware(gpus=1))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["aug=cutmixx"], ["no aug=cutmixx", "did you mean aug=cutmix?", "mixup"]),
        (["model=pyramidnett"], ["did you mean model=pyramidnet?", "options of 'model': densenet"]),
        (["aug=nothing"], ["there is no aug=nothing\noptions of 'aug': adl, augmix"]),
        (["experimnt=resnet110_cutmix"], ["did you mean 'experiment'"]),
        (["suite=fgsm"], ["'suite' is an option of scripts/evaluate.py"]),
        (["+table=demo_digits"], ["'table' is an option of scripts/run_table.py"]),
        (["suite.eps=4"], ["'suite' is an option of scripts/evaluate.py"]),
        (["modle=resnet"], ["'modle'", "did you mean 'model'"]),
        (["model=resnet", "model.dept=20"], ["'model.dept'", "did you mean 'model.depth'", "stem"]),
        (["+model.dept=20"], ["'model.dept'", "did you mean 'model.depth'"]),
        (["aug.mix.prob=2"], ["'aug.mix.prob'", "aug=baseline is chosen", "add aug=cutmix (or"]),
        (["model.alpha=64"], ["model=resnet is chosen", "add model=pyramidnet\n"]),
        (["aug.alpha=-1"], ["aug=baseline is chosen, which has no 'aug.mix.alpha'"]),
        (["aug=cutmix", "aug.alpha=-1"], ["did you mean 'aug.mix.alpha'", "'aug' (aug=cutmix)"]),
        (["experiment=resnet110_cutmix", "aug.alpha=2"], ["mean 'aug.mix.alpha'", "aug=cutmix"]),
        (["aug=cutmix_or_mixup", "aug.mix.prob=1"], ["'aug.mix.first.prob' or 'aug.mix.second."]),
        (["aug.cutout.size=8"], ["aug=baseline is chosen", "'aug.image.cutout.size'"]),
        (["lr=0.1"], ["did you mean 'schedule.lr'?", "fields of the top level: aug, budget"]),
        (["epochs=3"], ["did you mean 'schedule.epochs'?"]),
        (["epoch=3"], ["did you mean 'schedule.epochs'?"]),
        (["sched.epochs=3"], ["there is no field 'sched.epochs'", "mean 'schedule.epochs'?"]),
        (["schedule.lr.x=1"], ["there is no field 'schedule.lr.x'\nfields of 'schedule'"]),
        (["dataset.color_jitter=1"], ["default; ++dataset.color_jitter=VALUE sets it"]),
        (["aug=cutmix", "aug.mix.prob=1.5"], ["aug.mix.prob=1.5", ">= 0 and <= 1"]),
        (["schedule.epochs=-3"], ["schedule.epochs=-3", ">= 1"]),
        (["schedule.epochs=0"], ["schedule.epochs=0", ">= 1"]),
        (["seed=-1"], ["seed=-1", ">= 0"]),
        (["seed=1.5"], ["seed=1.5", "whole number"]),
        (["schedule.lr=nan"], ["schedule.lr=nan", "> 0"]),
        (["schedule.lr=inf"], ["schedule.lr=inf", "> 0"]),
        (["model.depth=deep"], ["model.depth='deep'", "whole number"]),
        (["model.depth=21"], ["model.depth=21", "9n+2", "20 and 29"]),
        (["schedule.batch_size=2", "devices=3"], ["batch_size=2", "3 devices"]),
        (["trainer.bn_group_size=48"], ["bn_group_size=48", "allowed: 64, 32, 16"]),
        (["dataset=synthetic", "dataset.image_size=2"], ["too small", "2 px", "stride is 4"]),
        (["precision=fp16"], ["fp16 needs a GPU"]),
        (["precision=fp8"], ["fp8", "fp32, bf16"]),
        (["device=cuda"], ["no CUDA GPU", "device=cpu"]),
        (["budget=huge"], ["no budget=huge", "smoke"]),
        (["aug=[cutmix,mixup]"], ["aug=[cutmix,mixup]", "one mixer"]),
        (["aug=[cutmix,cutmix]"], ["'cutmix' is named twice", "write aug=cutmix"]),
        (["aug=[cutout,mixup,cutout]"], ["'cutout' is named twice", "write aug=[cutout,mixup]"]),
        (["aug=[baseline,cutmix]"], ["'baseline' is no regularizer", "write aug=cutmix"]),
        (["aug=[baseline,baseline]"], ["write aug=baseline"]),
        (["dataset=[digits,cifar10]"], ["one option is chosen, as dataset=digits"]),
        (["dataset.name=../evil"], ["'../evil'", "folder"]),
        (["trainer.sync_bn=true", "devices=2"], ["needs GPUs", "bn_group_size"]),
        (["trainer.sync_bn=true", "trainer.accumulate=2"], ["exclude each other"]),
        (["dataset.val_seed=4294967296"], ["val_seed", "< 4294967296"]),
        (["schedule.momentum=0.0"], ["nesterov"]),
    ],
    ids=str,
)
def test_errors_say_what_was_given_and_what_is_allowed(
    overrides: list[str], said: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        resolve(from_dict(compose(overrides)), CPU)
    for text in said:
        assert text in str(caught.value)


def test_what_is_no_group_of_a_run_is_an_option_of_a_script() -> None:
    assert {*groups()} | {*ELSEWHERE} == {*GROUPS} and not {*groups()} & {*ELSEWHERE}
    assert all((CONFIG_DIR.parent / script).exists() for script in ELSEWHERE.values())


def test_budget_files_have_the_known_names() -> None:
    assert {f.stem for f in FILES if f.parts[0] == "budget"} == set(BUDGETS)
    assert all(load_budget(name).name == name for name in BUDGETS)
