"""The rooms of the package and who imports whom; `python -m tests.rooms` says so in docs/."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "pictures" / "rooms.svg"
DESIGN = ROOT / "docs" / "design.md"
LINE = re.compile(r"^(\| \[(\w+/?)\]\([^)]*\) \|.*\| )([^|]*) \|$", re.MULTILINE)  # of the table of rooms
# From the lowest floor up; a room's files may import from rooms before it.
FLOORS = (
    "embedgrad.kernels", "embedgrad.util", "embedgrad.distributed", "embedgrad.maths", "embedgrad.backends",
    "embedgrad.data", "embedgrad.model", "embedgrad.prompt", "embedgrad.engine", "embedgrad.generation",
    "embedgrad.evaluation", "embedgrad.tasks", "embedgrad.exports", "embedgrad.serve", "embedgrad.harness",
    "embedgrad.train", "embedgrad.search", "embedgrad.compare", "embedgrad.sweep", "embedgrad.distil",
    "embedgrad.transfer", "embedgrad.report", "embedgrad.cli", "embedgrad",
    "bench.harness", "bench.machine_code", "bench.tune", "bench.on_gpu", "bench",
)  # fmt: skip

Modules = dict[str, tuple[Path, set[str]]]

# Row and column of each room in the picture, and what it holds in a few words.
PLACES = {
    "cli": (0, 1, "commands, doctor, demo"),
    "sweep": (1, 0, "a search over settings"),
    "report": (1, 1, "pages and pictures of runs"),
    "harness": (1, 3, "others' evaluation harnesses"),
    "distil": (2, 1, "texts for closed models"),
    "transfer": (2, 2, "prompts for another model"),
    "serve": (2, 3, "the OpenAI-compatible server"),
    "compare": (3, 1, "controls, studies"),
    "exports": (3, 3, "HF, GGUF, Ollama, PEFT, vLLM"),
    "search": (4, 1, "discrete search on a budget"),
    "train": (5, 1, "optimize, session, run folder"),
    "tasks": (6, 1, "data with prompt and grader"),
    "evaluation": (7, 1, "grading, scores, statistics"),
    "generation": (8, 1, "sampling, KV cache, loops"),
    "engine": (9, 1, "tree, decoder, loss, gradient"),
    "prompt": (10, 1, "SoftPrompt, template, render"),
    "model": (11, 1, "configuration, weights, files"),
    "backends": (12, 1, "base, naive, reference, …"),
    "csrc/": (12, 3, "C++ and CUDA"),
    "distributed": (13, 0, "the processes of a task"),
    "maths": (13, 1, "trust region, optimiser"),
    "data": (13, 2, "examples, readers, splits"),
    "kernels/": (13, 3, "Triton"),
    "util": (14, 1, "errors, files, host"),
}
WIDE = {"util": (0, 2)}  # this room's box spans these columns
BOX, PITCH, LEFT, TOP = (196, 42), (220, 64), 20, 20  # pixels: box, distance of boxes, margins


def modules(root: Path = ROOT, folders: dict[str, str] | None = None) -> Modules:
    """Every module below `folders` (package -> folder below root): its file, and the modules of them that it imports,
    at its top or in a function."""
    folders = folders or {"embedgrad": "embedgrad", "embedgrad.kernels": "kernels", "bench": "bench"}
    files: dict[str, Path] = {}
    for package, folder in folders.items():
        for path in (root / folder).rglob("*.py"):
            parts = [package, *path.relative_to(root / folder).with_suffix("").parts]
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: (path, set(_imported(path, name, files)) - {name}) for name, path in files.items()}


def _imported(path: Path, name: str, known: dict[str, Path]) -> Iterator[str]:
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                yield from (found for found in (whole if whole in known else source,) if found in known)


def room(name: str) -> str:
    """The longest of FLOORS that the module lies in."""
    return max((floor for floor in FLOORS if name == floor or name.startswith(floor + ".")), key=len)


def rooms(found: Modules) -> dict[str, set[str]]:
    """The rooms of the package from the lowest up, by the names of docs/design.md, and the rooms that each imports."""
    names = {floor: floor.partition(".")[2] for floor in FLOORS if floor.startswith("embedgrad.")}
    names["embedgrad.kernels"] = "kernels/"
    imports: dict[str, set[str]] = {name: set() for name in names.values()}
    for name, (_, imported) in found.items():
        here = room(name)
        if here in names:
            imports[names[here]] |= {names[room(other)] for other in imported} - {names[here]}
    return imports


def drawing(imports: dict[str, set[str]]) -> str:
    """docs/pictures/rooms.svg. An arrow that follows from others is left out."""
    imports = {**imports, "csrc/": set(), "backends": {*imports["backends"], "csrc/"}}
    assert set(imports) == set(PLACES), f"PLACES and the rooms differ in {sorted(set(imports) ^ set(PLACES))}"

    def reached(name: str) -> set[str]:
        return imports[name].union(*(reached(below) for below in imports[name]))

    lines = [
        _arrow(name, below)
        for name in imports
        for below in sorted(imports[name])
        if not any(below in reached(other) for other in imports[name] - {below})
    ]
    boxes = [_box(name) for name in PLACES]
    width, height = LEFT + 4 * PITCH[0], TOP + 15 * PITCH[1] + 16
    note = "Arrows that follow from others are left out: a room may import every room that it reaches."
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' role="img" aria-label="The rooms of the package on their floors; every arrow of an import points down."'
        ' font-family="system-ui, sans-serif" font-size="14">',
        "<style>",
        "  @media (prefers-color-scheme: dark) { .ink { fill: #e6edf3 } .dim, .tip { fill: #9da7b1 }"
        " .line { stroke: #9da7b1 } .box { fill: #21262d; stroke: #9da7b1 } }",
        "</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto"'
        ' markerUnits="userSpaceOnUse"><path class="tip" d="M0 0 L8 4 L0 8 Z" fill="#59636e"/></marker></defs>',
        *lines, *boxes, _text(LEFT, height - 10, note, "start"), "</svg>", "",
    ])  # fmt: skip


def _sides(name: str) -> tuple[int, int, int, int]:
    row, column, _ = PLACES[name]
    first, last = WIDE.get(name, (column, column))
    left, top = LEFT + first * PITCH[0], TOP + row * PITCH[1]
    return left, top, left + (last - first) * PITCH[0] + BOX[0], top + BOX[1]


def _arrow(name: str, below: str) -> str:
    path = _path(name, below)
    return f'<path class="line" d="{path}" stroke="#59636e" stroke-width="1.5" fill="none" marker-end="url(#tip)"/>'


def _path(name: str, below: str) -> str:
    """The path from a room to one below it: straight down, along the row, or round the boxes between them."""
    (row, column, _), (low, aside, _) = PLACES[name], PLACES[below]
    assert (low, aside) > (row, column), f"{below} must stand below {name} or beside it"
    left, top, right, bottom = _sides(name)
    other_left, other_top, other_right, other_bottom = _sides(below)
    x = LEFT + column * PITCH[0] + BOX[0] // 2
    end = x if below in WIDE else (other_left + other_right) // 2
    if low == row:
        return f"M{right} {(top + bottom) // 2} H{other_left}"
    if x == end:
        return f"M{x} {bottom} V{other_top}"
    if low == row + 1:
        middle = (bottom + other_top) // 2
        return f"M{x} {bottom} C{x} {middle + 8} {end} {middle - 8} {end} {other_top}"
    if column == 1:  # from the middle column: out at the side, then down the other's column
        side, turn = (right, 12) if end > x else (left, -12)
        y = (top + bottom) // 2
        return f"M{side} {y} H{end - turn} Q{end} {y} {end} {y + 12} V{other_top}"
    side, turn = (other_right, -12) if end < x else (other_left, 12)
    y = (other_top + other_bottom) // 2
    return f"M{x} {bottom} V{y - 12} Q{x} {y} {x + turn} {y} H{side}"


def _box(name: str) -> str:
    left, top, right, bottom = _sides(name)
    middle = (left + right) // 2
    return (
        f'<rect class="box" x="{left}" y="{top}" width="{right - left}" height="{bottom - top}" rx="6" fill="#f6f8fa"'
        f' stroke="#59636e"/>\n<text class="ink" fill="#1f2328" x="{middle}" y="{top + 18}" text-anchor="middle"'
        f' font-weight="600">{name}</text>\n{_text(middle, top + 34, PLACES[name][2], "middle")}'
    )


def _text(x: int, y: int, text: str, anchor: str) -> str:
    place = f'x="{x}" y="{y}" text-anchor="{anchor}"'
    return f'<text class="dim" fill="#59636e" {place} font-size="12">{escape(text)}</text>'


def listed(text: str) -> set[str]:
    """The rooms in the table of docs/design.md."""
    return {found[1] for found in LINE.findall(text)}


def with_imports(text: str, imports: dict[str, set[str]]) -> str:
    """docs/design.md with the imports of each room in its table."""
    words = {"cli": "every room", "util": "nothing", "kernels/": "torch and triton only", "csrc/": "–"}

    def line(found: re.Match[str]) -> str:
        name = found[2]
        below = [other.rstrip("/") for other in reversed(imports) if other in imports.get(name, ())]
        told = words.get(name) or ", ".join(below) + ("; loads csrc/" if name == "backends" else "")
        return f"{found[1]}{told} |"

    return LINE.sub(line, text)


if __name__ == "__main__":
    PICTURE.write_text(drawing(rooms(modules())), encoding="utf-8")
    DESIGN.write_text(with_imports(DESIGN.read_text(encoding="utf-8"), rooms(modules())), encoding="utf-8")
