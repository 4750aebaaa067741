"""How much memory and time does a run on a GPU take at least, by counting?

The run is `examples/math500-qwen2.5-math-1.5b.yaml`. Steps, batch and validations come from that configuration, and the
lengths are means over MATH's training problems and solutions. A step's memory is `embedgrad.engine.memory.device_bytes`
for each policy. A step's least time is its necessary operations (`bench/harness/floor.py`) at the data-sheet rate. A
token's least time is reading the weights, keys and values once at the data-sheet bandwidth. Nothing here is measured;
real kernels reach a part of these rates.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

import embedgrad
from bench.harness.accelerators import ACCELERATORS
from bench.harness.floor import operations
from bench.harness.markdown import table
from bench.harness.models import QWEN_1_5B, config_of
from bench.harness.rows import ROOT, Row, of_part, row
from embedgrad.engine.memory import POLICIES, device_bytes, weight_bytes
from embedgrad.engine.packed_pass import PassSize
from embedgrad.engine.tree import TokenTree, build_tree
from embedgrad.prompt.rendering import Rendered
from embedgrad.train.settings import load_run_config

CHECKS = ("tests/engine/test_memory.py",)
CONFIG = ROOT / "examples/math500-qwen2.5-math-1.5b.yaml"
HEADER, PROMPT, QUERY, TARGET = 4, 20, 60, 145  # tokens; query and target: means over MATH's training set
TAIL = 10  # tokens of the chat template between the prompt and the answer
SLOTS = 32  # answers that are written together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this question."""
    parser.add_argument("--config", type=Path, default=CONFIG, help="whose steps, batch and data count")
    parser.add_argument("--answer", type=int, default=400, help="mean tokens of an answer (default 400)")


def main(args: argparse.Namespace) -> list[Row]:
    """Count; the rows."""
    config = config_of(QWEN_1_5B)
    run = load_run_config(args.config).optimize
    split = yaml.safe_load(args.config.read_text())["data"]["split"]
    steps, examples = run.total_steps(split["train"]), run.batch_size
    validations = 1 + -(-steps // run.validation_interval(split["train"]))
    answers = validations * (split["validation"] + run.monitors.train_examples) + 2 * split["test"]
    tree = _tree(examples)
    work = sum(operations(config, tree))
    version = f"embedgrad {embedgrad.__version__}"
    size = PassSize(tree.num_tokens, HEADER, len(tree.predicting), PROMPT, len(tree.target_ids))
    rows = []
    for policy in POLICIES:
        found = device_bytes(config, size, torch.bfloat16, policy, "compute", "sm_90")
        rows.append(row(
            "predict", policy, version, [found.total], counted=True, unit="bytes",
            case={"part": "memory", "model": QWEN_1_5B, "tokens": tree.num_tokens}, **vars(found),
        ))  # fmt: skip
    each = HEADER + PROMPT + TAIL + QUERY + args.answer // 2  # keys that a token in the middle of an answer sees
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * torch.bfloat16.itemsize
    moved = weight_bytes(config, torch.bfloat16) + SLOTS * each * cache
    for machine in ACCELERATORS:
        step = work / machine.matrix_rate(torch.bfloat16)
        token = moved / machine.bandwidth  # of SLOTS answers at once
        writing = answers / SLOTS * args.answer * token
        rows.append(row(
            "predict", machine.name, version, [steps * step + writing], counted=True,
            case={"part": "time", "model": QWEN_1_5B, "steps": steps, "batch": examples, "answers": answers,
                  "answer_tokens": args.answer},
            step_seconds=step, training_seconds=steps * step, token_seconds=token, writing_seconds=writing,
            operations=work,
        ))  # fmt: skip
    return rows


def _tree(examples: int) -> TokenTree:
    """A batch whose examples share header and prompt; no two queries begin alike."""
    sequences = []
    for n in range(examples):
        own = [1000 + n] * (QUERY + TAIL + TARGET)
        ids, rows = [1] * HEADER + [2] * PROMPT + own, [-1] * HEADER + list(range(PROMPT)) + [-1] * len(own)
        targets = [False] * (len(ids) - TARGET) + [True] * TARGET
        sequences.append(Rendered(ids, rows, targets, HEADER))
    return build_tree(sequences)


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """`predict`: least time on each machine, and memory with each policy."""
    times, memory = of_part(rows, "time"), of_part(rows, "memory")
    heads = ("at least", "a step", "all steps", "a token of 32 answers", "all answers", "the run")
    cells = [
        (
            one.contender, f"{1e3 * one.more['step_seconds']:.0f} ms", f"{one.more['training_seconds']:.0f} s",
            f"{1e3 * one.more['token_seconds']:.2f} ms", f"{one.more['writing_seconds']:.0f} s", f"{one.median:.0f} s",
        )
        for one in times
    ]  # fmt: skip
    case = times[0].case
    told = ", ".join(f"{one.median / 2**30:.2f} GiB with `{one.contender}`" for one in memory)
    return {"predict": table(heads, cells) + (
        f"\n\n{case['steps']} steps of {case['batch']} examples ({memory[0].case['tokens']} packed tokens), "
        f"{case['answers']} answers of {case['answer_tokens']} tokens. A step's peak in bfloat16: {told}."
    )}  # fmt: skip


def pictures(rows: Sequence[Row]) -> dict[str, Any]:
    """None; the table shows it."""
    return {}
