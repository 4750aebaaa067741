"""Text for the terminal. It obeys nothing that a file holds, and closing it stops nothing."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from embedgrad.util.shown import visible

if TYPE_CHECKING:
    from rich.text import Text


def tell(text: str) -> None:
    """Writes a line to stderr."""
    with contextlib.suppress(OSError):  # a run that is being saved goes on without its terminal
        print(visible(text), file=sys.stderr, flush=True)


def cell(text: str) -> Text:
    """`text` for a cell of a table, in which square brackets are no markup."""
    from rich.text import Text

    return Text(visible(text))
