"""The launch table without tuned rows, so that what is in use does not depend on what a GPU has measured."""

from collections.abc import Iterator

import pytest
from embedgrad.kernels import launch, launch_table


@pytest.fixture(autouse=True)
def written_rows_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(launch, "ROWS", launch_table.WRITTEN)
    launch._looked_up.cache_clear()
    yield
    launch._looked_up.cache_clear()
