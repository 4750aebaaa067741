"""The lock of a model: one thread at a time, re-entrant, and nobody is passed over."""

from __future__ import annotations

import threading
import time

import pytest

from embedgrad.util.fair_lock import FairLock


def test_one_thread_at_a_time_and_again_in_the_same() -> None:
    lock, inside, most = FairLock(), [0], [0]

    def work() -> None:
        for _ in range(200):
            with lock, lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0)
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert most == [1]
    assert not lock.wanted


def test_who_takes_it_again_lets_one_in_that_waits() -> None:
    """Every time, not most times: a thread that works without a pause cannot keep another waiting."""
    lock, order = FairLock(), []

    def other() -> None:
        with lock:
            order.append("other")

    for _ in range(50):
        order.clear()
        thread = threading.Thread(target=other)
        with lock:
            thread.start()
            until = time.monotonic() + 60
            while not lock.wanted and time.monotonic() < until:
                time.sleep(0)
            assert lock.wanted
        with lock:
            order.append("again")
        thread.join(60)
        assert order == ["other", "again"]


def test_an_error_lets_it_go() -> None:
    lock = FairLock()
    with pytest.raises(ValueError, match="wrong"), lock, lock:
        raise ValueError("wrong")
    entered = threading.Event()

    def other() -> None:
        with lock:
            entered.set()

    threading.Thread(target=other, daemon=True).start()
    assert entered.wait(60)
