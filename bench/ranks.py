"""What do several processes gain over one, and several prompts in one step over steps of their own?

A step is a step of a run: batch, forward, backward, exchange, prompt. *Ranks* are processes of one thread each,
connected by Gloo on this machine; beside them stands one process with as many threads. Every rank computes the prompt's
tokens for itself, so a rank's packed tokens and not its examples bound the gain. *Together* are the steps that `sweep
--together` takes: several prompts with their batches in one pass, beside the same steps one by one, in one process with
a thread for each core. Arrangements take turns. Memory is the peak of the resident size above what the process held
before its first step; of steps one by one it is that of one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench.harness import files, resident
from bench.harness.arguments import positive
from bench.harness.contenders import Case, load, our_version, task
from bench.harness.files import ModelFile
from bench.harness.markdown import seconds as shown
from bench.harness.markdown import table
from bench.harness.rows import Row, of_part, row
from bench.harness.worker import Worker, serve

SHAPES = ("64/64/8", "200/50/8", "32/250/8")
TOGETHER = ("16/16/1", "16/16/4", "40/40/4", "40/40/16")
PROMPTS = 4  # in one step
CHECKS = (
    "tests/train/test_ranks.py::test_gradient_loss_and_figures_are_those_of_one_process",
    "tests/train/test_together.py::test_one_run_has_the_bits_that_it_has_alone",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this question."""
    files.add_argument(parser, several=False)
    parser.add_argument("--shapes", nargs="*", type=Case.told, default=None, help=f"of ranks ({' '.join(SHAPES)})")
    parser.add_argument("--together", nargs="*", type=Case.told, default=None, help=f"({' '.join(TOGETHER)})")
    parser.add_argument("--ranks", nargs="*", type=positive, default=[1, 2, 3], help="how many (default 1 2 3)")
    parser.add_argument("--prompts", type=positive, default=PROMPTS, help=f"in one step (default {PROMPTS})")
    parser.add_argument("--repeats", type=positive, default=3, help="steps that count (default 3)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> list[Row]:
    """Measure; the rows."""
    if args.worker:
        serve({}, _Measure(args.path))
        return []
    shapes = args.shapes if args.shapes is not None else SHAPES[:1] if args.quick else SHAPES
    together = args.together if args.together is not None else TOGETHER[:1] if args.quick else TOGETHER
    with files.model_files([args.model]) as (file,):
        return [*_ranks(args, file, shapes), *_together(args, file, together)]


def _ranks(args: argparse.Namespace, file: ModelFile, shapes: Sequence[str]) -> list[Row]:
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        asked: dict[tuple[str, int], Callable[..., list[dict[str, Any]]]] = {}
        for count in args.ranks:
            asked["threads", count] = stack.enter_context(_group(file, 1, threads=count))
            if count > 1:
                asked["ranks", count] = stack.enter_context(_group(file, count, threads=1))
        for shape in shapes:
            for number in range(1 + (1 if args.quick else args.repeats)):  # the first does not count
                for (kind, count), ask in asked.items():
                    answers = ask(case=shape, first=number == 0)
                    if number:
                        found[shape, kind, count].append(_slowest(answers))
    rows = []
    for (shape, kind, count), steps in found.items():
        last = steps[-1]
        rows.append(row(
            "ranks", kind, last["version"], [step["seconds"] for step in steps],
            case={"part": "ranks", "model": file.title, **vars(Case.parse(shape)), "count": count},
            peak_bytes=last["peak_bytes"], tokens=last["tokens"], all_tokens=last["all_tokens"],
            exchange_seconds=statistics.median(step["exchange"] for step in steps),
        ))  # fmt: skip
        print(f"{shape}, {count} {kind}: {shown(rows[-1].median)}", flush=True)
    return rows


def _together(args: argparse.Namespace, file: ModelFile, shapes: Sequence[str]) -> list[Row]:
    rows = []
    threads = os.cpu_count() or 1
    for shape in shapes:
        for kind in ("alone", "together"):  # each in a new process, whose peak is its own
            with _group(file, 1, threads=threads) as ask:
                steps = [
                    ask(case=shape, first=number == 0, prompts=args.prompts, kind=kind)[0]
                    for number in range(1 + (1 if args.quick else args.repeats))
                ]
            rows.append(row(
                "ranks", kind, steps[-1]["version"], [step["seconds"] for step in steps[1:]],
                case={"part": "together", "model": file.title, **vars(Case.parse(shape)), "prompts": args.prompts,
                      "threads": threads},
                peak_bytes=max(step["peak_bytes"] for step in steps),
            ))  # fmt: skip
            print(f"{shape}, {args.prompts} prompts {kind}: {shown(rows[-1].median)}", flush=True)
    return rows


def _slowest(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the ranks of one step have measured, as one answer."""
    return {
        **answers[0], "all_tokens": sum(answer["tokens"] for answer in answers),
        **{key: max(answer[key] for answer in answers) for key in ("seconds", "exchange", "peak_bytes", "tokens")},
    }  # fmt: skip


@contextlib.contextmanager
def _group(file: ModelFile, size: int, threads: int) -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """`size` processes that take steps together: what asks all of them at once."""
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(size))
        members = [
            stack.enter_context(Worker("ranks", "--worker", "--path", str(file.path), threads=threads))
            for _ in range(size)
        ]

        def ask(**request: Any) -> list[dict[str, Any]]:
            return list(pool.map(lambda member: member.ask(**request), members))

        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        list(pool.map(lambda rank: members[rank].ask(rank=rank, size=size, port=port), range(size)))
        yield ask


# ---- a process that takes steps --------------------------------------------------------------------------------------


class _Measure:
    """The worker's side; it holds the steps of the last shape."""

    def __init__(self, path: Path) -> None:
        from embedgrad.distributed.ranks import ALONE, Ranks

        self._model = load(path, torch.device("cpu"))
        self._ranks: Ranks = ALONE
        self._steps: Callable[[], int] = lambda: 0
        self._base = 0

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        if "port" in request:
            return self._meet(**request)
        case, where = Case.parse(request["case"]), torch.device("cpu")
        if request["first"]:
            self._model.release_memory()
            self._base = resident.used(where)
            self._steps = self._made(case, request.get("kind", "ranks"), request.get("prompts", 1))
        resident.forget_peak(where)
        self._ranks.gather(0)  # all begin at once
        started = time.perf_counter()
        tokens = self._steps()
        spent = time.perf_counter() - started
        return {
            "seconds": spent, "tokens": tokens, "peak_bytes": resident.peak(where) - self._base,
            "version": our_version(self._model), "exchange": self._exchange(case),
        }  # fmt: skip

    def _meet(self, rank: int, size: int, port: int) -> dict[str, Any]:
        from embedgrad.distributed.join import join

        if size > 1:
            told = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
            os.environ.update({key: str(value) for key, value in told.items()}, MASTER_ADDR="127.0.0.1")
            self._ranks = join()
        return {}

    def _made(self, case: Case, kind: str, prompts: int) -> Callable[[], int]:
        """What takes a step of every prompt, and says how many packed tokens the (last) pass had."""
        from embedgrad.engine.batch_split import split_batch
        from embedgrad.engine.tree import build_tree, prepare
        from embedgrad.maths.optimizer import AdamW
        from embedgrad.maths.trust_region import CosineCone
        from embedgrad.prompt.rendering import render
        from embedgrad.train.forest import Forest, Seat

        model = self._model
        soft, examples = task(model, case)
        batch = prepare([render(model, soft, example) for example in examples]), [1.0] * len(examples)
        zero = torch.zeros_like(soft.embeddings)
        settings: dict[str, Any] = {"region": CosineCone(0.95), "rule": AdamW(), "clip_norm": None}
        settings |= {"policy": "all", "memory_budget": None}
        forest = Forest(model)
        trainers: list[Any] = []
        for _ in range(prompts):
            given = (model, (soft.embeddings.clone(), zero.clone(), zero.clone()), soft.anchor, ())
            made = Seat(*given, forest=forest, **settings) if kind == "together" else self._trainer(given, settings)
            trainers.append(made)
        own = [batch[0][i] for i in split_batch(batch[0], self._ranks.size)[self._ranks.rank]]
        tokens = build_tree(own).num_tokens if own else 0
        number = 0

        def steps() -> int:
            nonlocal number
            number += 1
            if kind == "together":
                launched = [trainer.launch(trainer.prepare(batch), number, 1e-3) for trainer in trainers]
                for trainer, each in zip(trainers, launched, strict=True):
                    trainer.read(each)
            else:
                for trainer in trainers:
                    trainer.read(trainer.launch(trainer.prepare(batch), number, 1e-3))
            return tokens

        return steps

    def _trainer(self, given: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        from embedgrad.engine.prompt_trainer import PromptTrainer
        from embedgrad.train.ranked_trainer import RankedTrainer

        if self._ranks.size == 1:
            return PromptTrainer(*given, **settings)
        return RankedTrainer(*given, ranks=self._ranks, **settings)

    def _exchange(self, case: Case) -> float:
        """Seconds that gathering a step's gradient takes by itself; the median of ten."""
        sent = torch.zeros(case.prompt * self._model.config.hidden_size + 1)
        spent = []
        for _ in range(10 if self._ranks.size > 1 else 1):
            self._ranks.gather(0)
            started = time.perf_counter()
            self._ranks.gather_tensors(sent)
            spent.append(time.perf_counter() - started)
        return statistics.median(spent)


# ---- what is shown ---------------------------------------------------------------------------------------------------


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """`ranks`: a step of several processes; `ranks-together`: steps of several prompts."""
    found = {}
    if of_part(rows, "ranks"):
        found["ranks"] = _ranks_table(of_part(rows, "ranks"))
    if of_part(rows, "together"):
        found["ranks-together"] = _together_table(of_part(rows, "together"))
    return found


def _ranks_table(rows: Sequence[Row]) -> str:
    by_case: dict[Case, dict[tuple[str, int], Row]] = defaultdict(dict)
    for one in rows:
        by_case[Case.of(one)][one.contender, int(one.case["count"])] = one
    kinds = list(dict.fromkeys((one.contender, int(one.case["count"])) for one in rows))
    threads = [count for kind, count in kinds if kind == "threads"]
    ranks = [count for kind, count in kinds if kind == "ranks"]
    heads = ["prompt/query/examples", *(f"one process, threads: {n}" for n in threads)]
    for count in ranks:
        heads += [f"{count} ranks", "times as fast as 1 thread; by tokens"]
    heads += ["packed tokens of one process; of the fullest rank", "gathering"]
    cells = []
    for case, found in by_case.items():
        alone = found["threads", 1]
        line = [str(case), *(f"{found['threads', n].median:.2f} s" for n in threads)]
        for count in ranks:
            one = found["ranks", count]
            line += [
                f"{one.median:.2f} s",
                f"{alone.median / one.median:.2f}; {alone.more['tokens'] / one.more['tokens']:.2f}",
            ]
        tokens = ", ".join(f"{found['ranks', n].more['tokens']:,}" for n in ranks)
        spent = ", ".join(shown(found["ranks", n].more["exchange_seconds"]) for n in ranks)
        cells.append([*line, f"{alone.more['tokens']:,}; {tokens}", spent])
    return table(heads, cells)


def _together_table(rows: Sequence[Row]) -> str:
    by_case: dict[Case, dict[str, Row]] = defaultdict(dict)
    for one in rows:
        by_case[Case.of(one)][one.contender] = one
    count = rows[0].case["prompts"]
    cells = [
        (
            str(case), f"{found['alone'].median:.2f} s",
            f"{found['together'].median:.2f} s ({found['alone'].median / found['together'].median:.2f}×)",
            *(f"{(found[kind].peak_bytes or 0) / 1e6:.0f} MB" for kind in ("alone", "together")),
        )
        for case, found in by_case.items()
    ]  # fmt: skip
    heads = ("of each prompt", f"{count} prompts one by one", "in one pass", "memory one by one", "in one pass")
    return table(heads, cells)


def pictures(rows: Sequence[Row]) -> dict[str, Any]:
    """None; the tables show it."""
    return {}
