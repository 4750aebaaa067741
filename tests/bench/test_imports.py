"""Imports of bench point downwards: questions, on_gpu, tune, machine_code, harness, embedgrad; and form no circle.

Imports inside functions count.
"""

import ast
from graphlib import TopologicalSorter

from bench.harness.rows import ROOT

FLOORS = ("bench.harness", "bench.machine_code", "bench.tune", "bench.on_gpu", "bench")  # from the ground up


def imports() -> dict[str, set[str]]:
    """Each module of bench, and the modules of bench that it imports."""
    files = [path.relative_to(ROOT) for path in (ROOT / "bench").rglob("*.py")]
    names = {".".join(file.with_suffix("").parts).removesuffix(".__init__"): ROOT / file for file in files}
    found: dict[str, set[str]] = {}
    for name, path in names.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name} has a relative import"
                found[name] |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return {name: (wanted & names.keys()) - {name} for name, wanted in found.items()}


def floor(name: str) -> int:
    return next(i for i, start in enumerate(FLOORS) if name == start or name.startswith(f"{start}."))


def test_imports_point_downwards_and_no_question_imports_another() -> None:
    upwards = [(name, other) for name, wanted in imports().items() for other in wanted if floor(other) > floor(name)]
    assert not upwards
    questions = FLOORS.index("bench")
    sideways = [(name, other) for name, wanted in imports().items() for other in wanted if floor(other) == questions]
    assert not sideways


def test_no_circle() -> None:
    packages = {name for name in imports() if (ROOT / name.replace(".", "/")).is_dir()}
    graph = {name: wanted - {p for p in packages if name.startswith(f"{p}.")} for name, wanted in imports().items()}
    TopologicalSorter(graph).prepare()  # raises CycleError
