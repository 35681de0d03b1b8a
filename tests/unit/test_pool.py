import os
import sys
import threading

import pytest

from ofutils import pool


def work(task, report):
    if task == "raise":
        raise ValueError("no such thing")
    if task == "exit":
        sys.exit(3)
    if task == "die":
        os._exit(9)
    if task == "lock":
        return threading.Lock()  # cannot be sent back
    report(task)
    return task * 2


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_order_and_failures_cost_their_own_task(workers):
    seen = []
    results = pool.run(work, [1, "raise", 2, "exit", 3], workers, lambda index, value: seen.append((index, value)))
    assert [result.value for result in results] == [2, None, 4, None, 6]
    assert "ValueError: no such thing" in results[1].error and "SystemExit" in results[3].error
    assert sorted(seen) == [(0, 1), (2, 2), (4, 3)]


def test_tasks_and_results_that_cannot_travel_and_dead_processes_are_reported():
    results = pool.run(work, [1, "lock", threading.Lock(), "die", 5], 2, lambda *_: None)
    assert results[0].value == 2 and results[4].value == 10
    assert "cannot be sent back" in results[1].error
    assert "cannot be sent to a process" in results[2].error
    assert "its process died (exit code 9)" in results[3].error


def test_no_tasks_are_no_work():
    assert pool.run(work, [], 2, lambda *_: None) == []
    assert pool.run(work, [], None, lambda *_: None) == []
