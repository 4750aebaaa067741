"""Who imports whom: only downwards, in no circle; and what a step brings along."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model.tiny import write_folder
from tests.rooms import DESIGN, FLOORS, PICTURE, Modules, drawing, listed, modules, room, rooms, with_imports

DIRECTLY_IN_EMBEDGRAD = {"__init__", "__main__"}

PROGRAM = """
import sys
from embedgrad import Example, Sampling, SoftPrompt, Template, generate, load_model, loss_and_grad
model = load_model(sys.argv[1])
prompt = SoftPrompt.from_ids(model, [9, 30], template=Template.plain())
for policy in ("all", "mlp", "layer"):
    loss_and_grad(model, prompt, [Example([10, 11], [20]), Example([12], [30, 31])], policy=policy)
generate(model, prompt, [[10], [11]], Sampling(max_new_tokens=2))
print(sorted(name for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor", "sympy")))[:3])
"""


def upward(found: Modules) -> list[str]:
    """Imports of a module in a room above."""
    return [
        f"{found[name][0]} imports {found[other][0]}"
        for name in sorted(found)
        for other in sorted(found[name][1])
        if FLOORS.index(room(other)) > FLOORS.index(room(name))
    ]


def circles(found: Modules) -> list[str]:
    """Imports on a path that leads back to where it began."""
    reached = {name: set(imports) for name, (_, imports) in found.items()}
    for _ in found:
        grown = {name: seen.union(*(reached[other] for other in seen)) for name, seen in reached.items()}
        if grown == reached:
            break
        reached = grown
    return [
        f"{found[name][0]} and {found[other][0]} import each other"
        for name in sorted(found)
        for other in sorted(found[name][1])
        if name in reached[other]
    ]


@pytest.fixture(scope="module")
def found() -> Modules:
    return modules()


def test_no_room_imports_from_one_above(found: Modules) -> None:
    assert upward(found) == []


def test_no_imports_go_round_in_a_circle(found: Modules) -> None:
    assert circles(found) == []


def test_no_question_of_bench_imports_another(found: Modules) -> None:
    questions = {name for name in found if room(name) == "bench"}
    assert not [(name, other) for name in questions for other in found[name][1] & questions]


def test_every_module_lies_in_a_room(found: Modules) -> None:
    outside = {name.rpartition(".")[2] for name in found if room(name) == "embedgrad" and name != "embedgrad"}
    assert outside <= DIRECTLY_IN_EMBEDGRAD
    assert set(FLOORS) <= {room(name) for name in found}


def test_the_picture_shows_the_imports(found: Modules) -> None:
    assert PICTURE.read_text(encoding="utf-8") == drawing(rooms(found)), "python -m tests.rooms draws it anew"


def test_the_table_of_rooms_lists_the_imports(found: Modules) -> None:
    text = DESIGN.read_text(encoding="utf-8")
    assert listed(text) == {*rooms(found), "csrc/"}
    assert text == with_imports(text, rooms(found)), "python -m tests.rooms writes it anew"


def test_kernels_know_only_torch_and_triton(found: Modules) -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", ""}
    for name, (path, _) in found.items():
        if room(name) == "embedgrad.kernels":
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                assert {each.partition(".")[0] for each in names} <= allowed, path


def test_arrows_that_should_not_be_are_found(tmp_path: Path) -> None:
    """An arrow upwards and a circle, one end of each inside a function."""
    for name, text in {
        "util/low.py": "def f():\n    from embedgrad.cli import high\n",
        "cli/high.py": "",
        "maths/one.py": "from . import two\n",
        "maths/two.py": "def f():\n    import embedgrad.maths.one\n",
        "maths/__init__.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    planted = modules(tmp_path, {"embedgrad": "."})
    low, high, one, two = (tmp_path / name for name in ("util/low.py", "cli/high.py", "maths/one.py", "maths/two.py"))
    assert upward(planted) == [f"{low} imports {high}"]
    assert circles(planted) == [f"{one} and {two} import each other", f"{two} and {one} import each other"]


def test_neither_step_nor_generation_imports_torchs_compiler(tmp_path: Path) -> None:
    write_folder(tmp_path, "llama")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "[]\n"
