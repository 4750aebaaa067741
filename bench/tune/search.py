"""The fastest right parameters of one kernel within a time limit: compile, check, then successive halving.

All candidates compile side by side. Dropped are those that do not compile or fit, spill, or miss the reference (with
their stages and with one, twice with equal bits: launch_check.check). The others take turns on every shape; after each
round the better half goes on with twice the repetitions (Jamieson and Talwalkar, arXiv 1502.07943). The last one is
compared with the parameters in use, and must be faster by MARGIN to replace them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from embedgrad.kernels import launch

from bench.tune.candidates import Options, Question
from bench.tune.clock import Clock, Timer
from embedgrad.backends.launch_check.check import Checked, DeviceLost, is_lost, named_error
from embedgrad.backends.launch_check.compiled import Compiled, compile_all

MARGIN = 0.02
FIRST_REPEATS, LAST_REPEATS = 3, 25
COMPILE_SHARE, CHECK_SHARE = 0.45, 0.75
"""Parts of the time limit after which compiling, and then checking, gives way to the next stage."""

Compiler = Callable[[list[tuple[Checked, Options]], torch.device, float], Sequence[Compiled | None]]


def compile_calls(calls: list[tuple[Checked, Options]], device: torch.device, until: float) -> list[Compiled | None]:
    """Compiles; tests put a stand-in here."""
    return compile_all(calls, device, until=until)


@dataclass
class Contestant:
    """Parameters for each case, and the seconds measured so far, by case. name: the parameters in words."""

    name: str
    options: tuple[Options, ...]
    seconds: list[list[float]] = field(default_factory=list)
    timers: list[Timer] = field(default_factory=list)

    def median(self, case: int) -> float:
        return statistics.median(self.seconds[case])


@dataclass(frozen=True)
class Found:
    """The best parameters of a question.

    options: of the winner; None where those in use stay and differ from shape to shape. seconds, before: of the winner
    and of the parameters in use, by shape; {} where these cannot be run. gained: 1 − the geometric mean of their
    ratios. finished: no round was cut short. measured: medians of everything timed, by parameters and shape.
    """

    question: Question
    options: Options | None
    seconds: dict[str, float]
    before: dict[str, float]
    gained: float
    finished: bool
    measured: dict[str, dict[str, float]]


class Broken(Exception):
    """A candidate after which nothing runs on the device in this process. candidate: its name."""

    def __init__(self, candidate: str, why: object) -> None:
        super().__init__(f"{candidate}: {why}")
        self.candidate = candidate


class Stopped(Exception):
    """Ctrl-C; `found` is what could still be said about the question at hand."""

    def __init__(self, found: Found | None) -> None:
        super().__init__("stopped")
        self.found = found


def search(
    question: Question,
    device: torch.device,
    clock: Clock,
    *,
    seconds: float,
    compiler: Compiler = compile_calls,
    without: Sequence[str] = (),
    spills: int = 0,
    told: Callable[[str], None] = print,
) -> Found | None:
    """The best parameters; None where the time did not suffice for one round. `told` hears each dropped candidate.

    without: names of candidates to leave out. spills: registers of a thread that a candidate may spill.
    Raises Broken where a candidate has broken the device, and Stopped on Ctrl-C.
    """
    return _Search(question, device, clock, seconds, compiler, without, spills, told).run()


class _Search:
    def __init__(
        self, question: Question, device: torch.device, clock: Clock, seconds: float, compiler: Compiler,
        without: Sequence[str], spills: int, told: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._question, self._device, self._clock, self._compiler, self._told = question, device, clock, compiler, told
        self._spills = spills
        started = time.monotonic()
        self._until_compiled = started + COMPILE_SHARE * seconds
        self._until_checked = started + CHECK_SHARE * seconds
        self._until = started + seconds
        self._checked = [Checked(case, device) for case in question.cases]
        in_use = tuple(one.case.options(device) for one in self._checked)
        self._present = Contestant("in use: " + ", ".join(dict.fromkeys(map(named, in_use))), in_use)
        self._others = []
        for candidate in question.candidates:
            options = tuple({**mine, **candidate} for mine in in_use)
            if options != in_use and named(candidate) not in without:
                self._others.append(Contestant(named(candidate), options))
        self._alive = [self._present, *self._others]
        self._base = self._present
        self._wrong_in_use = False
        self._rounds = 0

    def run(self) -> Found | None:
        try:
            self._compile()
            self._check()
            finished = self._halve()
        except KeyboardInterrupt:
            raise Stopped(self._found(finished=False)) from None
        return self._found(finished=finished)

    def _drop(self, one: Contestant, why: str) -> None:
        one.timers = []
        if one is self._present:
            self._told(f"  {one.name}: {why}; only others can win")
            self._wrong_in_use = True
        else:
            self._told(f"  dropped {one.name}: {why}")
            self._alive.remove(one)

    def _compile(self) -> None:
        calls, owners = [], []
        for one in self._alive:
            for checked, options in zip(self._checked, one.options, strict=True):
                for stages in sorted({1, options["num_stages"]}):
                    calls.append((checked, {**options, "num_stages": stages}))
                    owners.append((one, stages == options["num_stages"]))
        faults: dict[str, str] = {}
        for (one, own), made in zip(owners, self._compiler(calls, self._device, self._until_compiled), strict=True):
            if made is None:
                if one is not self._present:
                    faults.setdefault(one.name, "not compiled in time")
            elif made.fault is not None:
                faults[one.name] = made.fault
            elif made.spills > self._spills and own and one is not self._present:
                faults.setdefault(one.name, f"{made.spills} registers spill")
        for one in list(self._alive):
            if one.name in faults:
                self._drop(one, faults[one.name])

    def _check(self) -> None:
        for one in list(self._alive):
            for checked, options in zip(self._checked, one.options, strict=True):
                if time.monotonic() > self._until_checked and one is not self._present:
                    self._drop(one, "not checked in time")
                    break
                try:
                    verdict = checked.verdict(options)
                except DeviceLost as error:
                    raise Broken(one.name, error) from None
                if not verdict.right:
                    self._drop(one, f"{verdict.fault} ({verdict.text})")
                    break

    def _halve(self) -> bool:
        """Times what is left; whether no round was cut short."""
        repeats = FIRST_REPEATS
        for one in list(self._alive):
            try:
                one.timers = [self._timer(i, one) for i in range(len(self._checked))]
            except Exception as error:
                if is_lost(error):
                    raise Broken(one.name, named_error(error)) from error
                self._drop(one, f"it cannot be timed: {named_error(error)}")
                continue
            one.seconds = [[] for _ in self._checked]
        self._alive = [one for one in self._alive if one.timers]
        if not self._alive:
            return False
        self._base = self._alive[0]
        while True:
            if not self._round(repeats):
                return False
            others = sorted((one for one in self._alive if one is not self._base), key=self._score)
            if len(others) <= 1:
                return self._round(LAST_REPEATS)
            for slower in others[len(others) // 2 :]:
                slower.timers = []
            self._alive = [self._base, *others[: len(others) // 2]]
            repeats *= 2

    def _round(self, repeats: int) -> bool:
        """Everyone takes turns on every shape. False where the time was over; a first turn is always finished."""
        for _ in range(repeats):
            if self._rounds and time.monotonic() > self._until:
                return False
            for i in range(len(self._checked)):
                for one in self._alive:
                    try:
                        one.seconds[i].append(one.timers[i]())
                    except Exception as error:
                        raise Broken(one.name, named_error(error)) from error
            self._rounds += 1
        return True

    def _timer(self, i: int, one: Contestant) -> Timer:
        checked, options = self._checked[i], one.options[i]
        out = checked.case.fresh(checked.given)

        def call() -> None:
            with launch.overridden(checked.case.kernel, **options):
                checked.case.run(checked.given, out)

        return self._clock.timer(checked.case, options, call)

    def _score(self, one: Contestant) -> float:
        """The geometric mean over the shapes of its time relative to that of the parameters in use.

        Where those cannot be run on this GPU, the first candidate stands in for them.
        """
        ratios = [one.median(i) / self._base.median(i) for i in range(len(self._checked))]
        return math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))

    def _found(self, *, finished: bool) -> Found | None:
        if not self._rounds:
            return None
        rivals = [one for one in self._alive if one is not self._present or not self._wrong_in_use]
        if not rivals:
            return None
        best = min(rivals, key=self._score)
        if not self._wrong_in_use and self._score(best) > 1 - MARGIN:
            best = self._present
        texts = [case.text for case in self._question.cases]

        def medians(one: Contestant) -> dict[str, float]:
            return {text: one.median(i) for i, text in enumerate(texts)}

        same = all(options == best.options[0] for options in best.options)
        comparable = all(self._present.seconds) and bool(self._present.seconds)
        timed = [one for one in (self._present, *self._others) if one.seconds and all(one.seconds)]
        return Found(
            self._question, best.options[0] if same else None, medians(best),
            medians(self._present) if comparable else {}, 1 - self._score(best) if comparable else 0.0, finished,
            {one.name: medians(one) for one in timed},
        )  # fmt: skip


def named(options: Options) -> str:
    """Parameters in words: "BLOCK_Q 128 BLOCK_K 64 num_warps 8 num_stages 3"."""
    return " ".join(f"{name} {value}" for name, value in options.items())
