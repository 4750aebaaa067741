"""MATH-500: 500 problems of the MATH test set. The training data are the solutions of the MATH training set.

Hendrycks et al., "Measuring Mathematical Problem Solving With the MATH Dataset", arXiv 2103.03874. The 500 problems are
those of Lightman et al., "Let's Verify Step by Step", arXiv 2305.20050. A training target is a whole solution. The last
\\boxed{} of a text is the answer that is graded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embedgrad.data.example import Example
from embedgrad.data.readers import text_field
from embedgrad.evaluation.grading.stated import last_boxed
from embedgrad.tasks.source import HubSet, Source
from embedgrad.tasks.task import Pools, Task

TRAIN = HubSet("DigitalLearningGmbH/MATH-lighteval", ("train",))
TEST = HubSet("HuggingFaceH4/MATH-500", ("test",))


def load(source: Source, variant: str | None = None) -> Pools:
    """The training and test problems. Raises DataError.

    A training row has `problem` and `solution`, a test row has `problem` and `answer`. Training solutions without a
    boxed answer are dropped.
    """
    train = [_solved(*row) for row in source.rows("math_train/train.jsonl", TRAIN)]
    usable = [example for example in train if last_boxed(str(example.target)) is not None]
    test = [_answered(*row) for row in source.rows("math500/test.jsonl", TEST)]
    return Pools(train=usable, test=test, dropped=len(train) - len(usable))


def _solved(where: str, row: Mapping[str, Any]) -> Example:
    return Example(text_field(row, "problem", where), text_field(row, "solution", where), where=where)


def _answered(where: str, row: Mapping[str, Any]) -> Example:
    return Example(text_field(row, "problem", where), text_field(row, "answer", where), where=where)


TASK = Task(
    name="math500",
    load=load,
    prompt="Please reason step by step, and put your final answer within \\boxed{}.",
    paraphrases=(
        "Solve the problem step by step. Put the final answer within \\boxed{}.",
        "Think carefully, show your work, and finish with the answer in \\boxed{}.",
        "You are a mathematician. Derive the answer in small steps and end with \\boxed{answer}.",
        "Work out the solution one step at a time, check it, and write the final answer as \\boxed{}.",
    ),
    grader="math",
    sizes={"train": 1000, "validation": 50, "test": 500},
    target_tokens=512,
    max_new_tokens=1024,
    optimize={
        "steps": 100, "batch_size": 8, "learning_rate": 1e-3, "validate_every": 25,
        "monitors": {"answers": 16, "train_examples": 50},
    },
)  # fmt: skip
