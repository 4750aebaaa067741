"""Where a task's data come from: a local folder or a data set of the Hugging Face hub. The package holds no data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedgrad.data.readers import read_rows
from embedgrad.util.errors import DataError
from embedgrad.util.shown import first_line

VARIABLE = "EMBEDGRAD_DATA"


@dataclass(frozen=True)
class HubSet:
    """A data set on the hub: repository, configuration, and the splits that are joined in this order."""

    repository: str
    splits: tuple[str, ...]
    configuration: str | None = None


@dataclass(frozen=True)
class Source:
    """A source of data. folder: the folder that holds the files; None: the hub."""

    folder: Path | None

    @classmethod
    def of(cls, folder: str | os.PathLike[str] | None) -> Source:
        """`folder` if it is given, else the folder in the environment variable EMBEDGRAD_DATA, else the hub.

        Raises DataError where the folder does not exist.
        """
        named = folder if folder is not None else os.environ.get(VARIABLE) or None
        if named is None:
            return cls(None)
        path = Path(os.path.expandvars(os.path.expanduser(named)))
        if not path.is_dir():
            raise DataError(f"there is no data folder {path} ({'data.folder' if folder is not None else VARIABLE}).")
        return cls(path)

    def rows(self, file: str, hub: HubSet) -> list[tuple[str, Mapping[str, Any]]]:
        """(place, data row) for each row of `file` in the folder, or of `hub`; messages name the place.

        Raises DataError.
        """
        if self.folder is not None:
            return list(read_rows(self.folder / file))
        return _from_hub(file, hub)


def _from_hub(file: str, hub: HubSet) -> list[tuple[str, Mapping[str, Any]]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(
            f"no data for this task: name a folder that holds {file} ({VARIABLE} or data.folder), or "
            f"pip install embedgrad[data] to have {hub.repository} from the Hugging Face hub."
        ) from None
    rows: list[tuple[str, Mapping[str, Any]]] = []
    for part in hub.splits:
        where = f"{hub.repository}, {part}"
        try:
            loaded = load_dataset(hub.repository, hub.configuration, split=part)
        except Exception as error:  # the package raises errors of many classes
            raise DataError(f"{where} could not be had from the Hugging Face hub: {first_line(error)}.") from error
        rows += [(f"{where}, row {number}", dict(row)) for number, row in enumerate(loaded)]
    return rows
