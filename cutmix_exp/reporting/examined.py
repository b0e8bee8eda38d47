"""What was found of a network, read again from its record and the columns beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cutmix_exp.errors import UserError
from cutmix_exp.reporting.record import Record, read_record

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Examined:
    """A network's record, and what each of its suites said image by image.

    Attributes:
        columns: by suite; `test` are the predictions that the training itself left.
        evaluations: the folder of columns and pictures.
    """

    record: Record
    columns: dict[str, Columns]
    evaluations: Path

    @property
    def name(self) -> str:
        return str(self.record["run_id"])

    def correct(self, suite: str) -> np.ndarray | None:
        """bool [N]: which images a suite counts as right; None where it has no such answer."""
        columns = self.columns.get(suite, {})
        return columns.get("correct", columns.get("in_top1"))


def read_examined(where: str, runs_dir: Path, results: Path) -> Examined:
    """A run by its id or directory, or a network from elsewhere by the name of its record.

    Raises:
        UserError: there is no record of this name.
    """
    for record, folder in (
        (runs_dir / where / "record.json", runs_dir / where),
        (Path(where) / "record.json", Path(where)),
        (results / "records" / f"{where}.json", runs_dir / where),
    ):
        if record.is_file():
            files = sorted((folder / "evaluations").glob("*.npz"))
            return Examined(
                read_record(record),
                {f.stem: read_columns(f) for f in files},
                folder / "evaluations",
            )
    raise UserError(
        f"there is no record of {where}: looked in {runs_dir} and {results / 'records'}; "
        "name a run_id, a run's directory or a record, or another runs_dir=FOLDER"
    )


def examined(record: Record, evaluations: Path) -> Examined:
    """A record with the columns that lie in a folder."""
    files = sorted(evaluations.glob("*.npz"))
    return Examined(record, {file.stem: read_columns(file) for file in files}, evaluations)


def read_columns(file: Path) -> Columns:
    with np.load(file, allow_pickle=False) as held:
        return {name: held[name] for name in held.files}
