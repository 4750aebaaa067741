"""Every question has what the command needs, and the documents say what the recorded rows say."""

import pytest
import torch

from bench import __main__ as command
from bench.harness import report, rows

QUESTIONS = [command.question(name) for name, *_ in command.ALL]


def test_all_asks_every_question() -> None:
    assert sorted(name for name, *_ in command.ALL) == command.names()


@pytest.mark.parametrize("name", command.names())
def test_every_question_has_what_the_command_needs(name: str) -> None:
    module, args = command.parse([name, *(["--static"] if name == "kernels" else []), "--quick"])
    assert module is not None
    assert args.quick
    for check in module.CHECKS:
        file, *names = check.split("::")
        source = (rows.ROOT / file).read_text()
        assert all(f"def {test}(" in source for test in names), check
    assert callable(module.main)
    assert callable(module.tables)
    assert callable(module.pictures)


@pytest.mark.parametrize("name", ["step", "decode", "ops", "ablation"])
def test_without_a_gpu_it_says_so_and_stops(name: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    module, args = command.parse([name, "--device", "cuda"])
    assert module is not None
    with pytest.raises(SystemExit, match="no CUDA device is present here"):
        module.main(args)


def test_the_documents_say_what_the_recorded_rows_say() -> None:
    """`python -m bench report` would change no table."""
    assert report.outdated(QUESTIONS) == []


def test_every_place_has_a_table_and_every_picture_is_there() -> None:
    named = set()
    for path in report.DOCUMENTS:
        named |= {place["name"] for place in report.PLACE.finditer(path.read_text())}
        for line in path.read_text().splitlines():
            if "pictures/" in line and line.startswith("!["):
                assert (path.parent / line.split("(")[1].split(")")[0]).is_file(), line
    made = {name for question in QUESTIONS for name in report.tables_of(question)}
    assert not named - made


def test_every_question_has_rows_that_say_where_they_come_from() -> None:
    for question in QUESTIONS:
        found = report.recorded(question)
        assert found, question
        assert all(one.run is not None for one in found)
        if not getattr(question, "HISTORY", False):  # that one has rows of scripts which are older than the question
            assert all(one.run is not None and one.run.command.startswith("python -m bench") for one in found)
