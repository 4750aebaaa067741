"""Several runs on one model in one process, their steps taken together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial

from embedgrad.distributed.ranks import ALONE
from embedgrad.engine.model import Model
from embedgrad.train.forest import Forest, Seat
from embedgrad.train.optimize import OptimizeResult, Run, begin_session, result_of
from embedgrad.train.session import Session
from embedgrad.util.errors import EmbedGradError, SaveError
from embedgrad.util.interrupts import stop_on_signals


def optimize_together(
    model: Model, runs: Sequence[Run], *, terminate_cleanly: bool = False, allow_other_bits: bool = False
) -> list[OptimizeResult | EmbedGradError]:
    """`optimize` for several runs whose steps are taken in one pass over the model; for each its result, or its error.

    Each run has its own folder, settings, data, validations and end, and may differ from the others in all of them.
    Where the shapes of the products do not change their rounding, a run ends with the bits that it has alone, else
    within rounding of them. A run that ends early leaves the pass to the others.

    Raises SaveError, which ends all; what was saved before is intact.
    """
    results: dict[int, OptimizeResult | EmbedGradError] = {}
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals(terminate_cleanly))
        forest = Forest(model)
        trainer_of = partial(Seat, forest=forest) if len(runs) > 1 else None
        sessions: dict[int, Session] = {}

        def attempt(number: int, act: Callable[[], object]) -> bool:
            """Whether `act` succeeded; the error of a run is its result."""
            try:
                act()
            except SaveError:
                raise
            except EmbedGradError as error:
                results[number] = error
                return False
            return True

        def begin(number: int, run: Run) -> None:
            session = begin_session(model, run, stack, stop, ALONE, allow_other_bits, trainer_of)
            session.start()
            sessions[number] = session

        for number, run in enumerate(runs):
            attempt(number, partial(begin, number, run))
        active = list(sessions)
        while active := [number for number in active if sessions[number].goes_on()]:
            launched = [number for number in active if attempt(number, sessions[number].launch_step)]
            forest.step()
            active = [number for number in launched if attempt(number, sessions[number].end_step)]
        for number, session in sessions.items():
            if number not in results and attempt(number, session.finish):
                attempt(number, partial(_keep, results, number, session))
    return [results[number] for number in range(len(runs))]


def _keep(results: dict[int, OptimizeResult | EmbedGradError], number: int, session: Session) -> None:
    results[number] = result_of(session)
