"""Checkpoints that are damaged, of other versions, of other data, or malicious."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from cutmix_exp.data.sources import Splits
from cutmix_exp.distributed import World
from cutmix_exp.errors import UserError
from cutmix_exp.training.checkpoint import (
    SCHEMA,
    Damaged,
    digest,
    load_checkpoint,
    newest_sound,
    save_checkpoint,
    save_last,
)
from cutmix_exp.training.logging import NoLog, Reporter
from cutmix_exp.training.trainer import Trainer
from tests.helpers import config_of

STATE = {
    "step": 7,
    "rate": 0.1 + 0.2,
    "lines": [{"loss": 1.5, "split": "test"}],
    "model": {"weight": torch.randn(50, 3), "count": torch.tensor(3), "on": torch.tensor([True])},
    "half": torch.randn(9).bfloat16(),
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last.pt", STATE)
    state = load_checkpoint(tmp_path / "last.pt")
    assert state["schema"] == SCHEMA
    assert digest({k: state[k] for k in STATE}) == digest(STATE)
    assert torch.equal(state["model"]["weight"], STATE["model"]["weight"])  # type: ignore[index]


@pytest.mark.parametrize("change", ["weight", "dtype", "shape", "key", "number", "none"])
def test_the_digest_sees_every_change(change: str) -> None:
    other: dict[str, Any] = {**STATE, "model": dict(STATE["model"])}  # type: ignore[call-overload]
    if change == "weight":
        weight = other["model"]["weight"].clone()
        weight.view(torch.int32)[49, 2] ^= 1  # the last bit of the last number
        other["model"]["weight"] = weight
    elif change == "dtype":
        other["half"] = other["half"].view(torch.float16)
    elif change == "shape":
        other["model"]["weight"] = other["model"]["weight"].reshape(3, 50)
    elif change == "key":
        other["model"]["wait"] = other["model"].pop("weight")
    elif change == "number":
        other["rate"] = 0.3
    assert (digest(other) == digest(STATE)) == (change == "none")


def test_a_bit_that_flips_anywhere_is_noticed_or_harmless(tmp_path: Path) -> None:
    """Of 200 random flips in the file each is refused, or has changed nothing that is read (the
    archive's padding); those within the tensors' bytes are refused every time."""
    file = tmp_path / "last.pt"
    save_checkpoint(file, STATE)
    whole, rng, noticed = file.read_bytes(), random.Random(0), 0
    weights = whole.index(STATE["model"]["weight"].numpy().tobytes())  # type: ignore[index]
    places = [rng.randrange(len(whole)) for _ in range(150)]
    for place in [*places, *(weights + rng.randrange(600) for _ in range(50))]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.randrange(8)
        file.write_bytes(flipped)
        try:
            state = load_checkpoint(file)
        except UserError:
            noticed += 1
        else:
            assert not weights <= place < weights + 600
            assert digest({k: state[k] for k in STATE}) == digest(STATE)
    assert noticed >= 60


def test_two_are_kept_and_the_one_before_takes_the_place_of_a_damaged_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_last(tmp_path, {"step": step})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "previous.pt"]
    assert load_checkpoint(tmp_path / "previous.pt")["step"] == 2
    last = tmp_path / "last.pt"
    assert newest_sound(tmp_path) == (last, "")
    whole = last.read_bytes()
    for damage in (whole[:100], b"", whole[:-200], None):
        last.unlink() if damage is None else last.write_bytes(damage)
        found, warning = newest_sound(tmp_path)
        assert found == tmp_path / "previous.pt"
        assert "continuing from the one before it" in warning
    (tmp_path / "previous.pt").write_bytes(whole[:100])
    last.write_bytes(b"")
    with pytest.raises(Damaged, match=r"nor can previous\.pt"):
        newest_sound(tmp_path)


def test_the_damage_is_told_in_a_users_words(tmp_path: Path) -> None:
    """Not in torch's, which for some of these advise to load what may be malicious."""
    file = tmp_path / "last.pt"
    save_checkpoint(file, {"weight": torch.randn(100_000)})
    whole = file.read_bytes()
    cut, damaged = "it is cut off, or not a checkpoint", "it is damaged"
    for content, reason in (
        (b"", cut),
        (b"\x80", cut),
        (b"hello world" * 1000, cut),
        *((whole[:length], cut) for length in (100, 5000, len(whole) - 1)),
        (bytes(5000) + whole[5000:], damaged),
        (whole[:9000] + bytes(4096) + whole[13096:], "its contents do not match their digest"),
    ):
        file.write_bytes(content)
        with pytest.raises(Damaged) as caught:
            load_checkpoint(file)
        assert caught.value.reason == reason
    with pytest.raises(Damaged, match="cannot be read: No such file"):
        load_checkpoint(tmp_path / "none.pt")


def test_a_file_system_without_links_is_served_by_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2):
        save_last(tmp_path, {"step": step})
    assert load_checkpoint(tmp_path / "previous.pt")["step"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    torch.save({"schema": SCHEMA, "evil": Evil()}, tmp_path / "last.pt")
    with pytest.raises(Damaged, match="none of which is executed"):
        load_checkpoint(tmp_path / "last.pt")
    assert not marker.exists()
    torch.load(tmp_path / "last.pt", weights_only=False)
    assert marker.exists()  # it would have been


@pytest.mark.parametrize("schema", [0, SCHEMA + 1])
def test_other_schemas_are_refused_whatever_was_before(schema: int, tmp_path: Path) -> None:
    save_last(tmp_path, {"step": 1})
    torch.save({"schema": schema, "step": 2}, tmp_path / "last.pt")
    with pytest.raises(UserError, match=f"schema {schema}; this version reads up to {SCHEMA}"):
        newest_sound(tmp_path)


WORDS = [
    "dataset=synthetic",
    "dataset.num_classes=10",
    "dataset.image_size=8",
    "dataset.train_size=130",
    "dataset.test_size=20",
    "model=resnet",
    "model.depth=8",
    "budget=smoke",
    "device=cpu",
    "trainer.max_steps=2",
]


def trainer_in(runs: Path, splits: Splits | None = None) -> Trainer:
    config = config_of(*WORDS, f"runs_dir={runs}")
    world = World(0, 1, torch.device("cpu"))
    return Trainer(config, splits or config.dataset.load(), world, Reporter(active=False))


def test_a_checkpoint_of_schema_1_is_migrated(tmp_path: Path) -> None:
    t = trainer_in(tmp_path)
    t.fit(NoLog())
    t.save()
    state = load_checkpoint(t.checkpoints / "last.pt")
    old = {k: v for k, v in state.items() if k not in ("digest", "fingerprint")}
    torch.save({**old, "schema": 1}, t.checkpoints / "last.pt")
    again = trainer_in(tmp_path)
    assert again.resume() and again.step == 2 and not again.warning
    for one, two in zip(t.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_data_that_has_changed_is_refused(tmp_path: Path) -> None:
    t = trainer_in(tmp_path)
    t.fit(NoLog())
    t.save()
    splits = t.config.dataset.load()
    splits.train.images[5, 0, 3, 3] ^= 1  # type: ignore[union-attr]
    changed = trainer_in(tmp_path, splits)
    with pytest.raises(UserError, match="has changed since"):
        changed.resume()
    assert trainer_in(tmp_path).resume()


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    t = trainer_in(tmp_path)
    t.fit(NoLog())
    t.save()
    state = load_checkpoint(t.checkpoints / "last.pt")
    save_last(t.checkpoints, {**state, "run_id": "another"})
    with pytest.raises(UserError, match="holds the run another"):
        trainer_in(tmp_path).resume()
