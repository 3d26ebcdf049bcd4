"""What benchmarks that compare share: sides that take turns, and goals as one line of JSON."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Seconds = dict[str, list[float]]


def use_cores(count: int) -> Callable[[], float]:
    """Keeps this process on so many cores (call it before jax or torch is imported), 0 for all; returns the clock.

    On one core the clock is the processor's time of this process, which is the wall's on a machine that does nothing
    else, and does not count what others do on a shared one.
    """
    if count:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-count:])
    return time.process_time if count == 1 else time.perf_counter


def in_turn(
    sides: Mapping[str, Callable[[], Any]],
    rounds: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Seconds:
    """Seconds of each call of each side, ABCABC..., so that what else the machine does hits all alike.

    A side returns when its work is done: block on jax's arrays in it.
    """
    found: Seconds = {name: [] for name in sides}
    for round_ in range(warm_up + rounds):
        for name, side in sides.items():
            start = clock()
            side()
            if round_ >= warm_up:
                found[name].append(clock() - start)
    return found


def ratio(seconds: Seconds, over: str, under: str) -> float:
    """The median over the rounds of one side's time over another's: drifts of the machine's speed cancel."""
    pairs = zip(seconds[over], seconds[under], strict=True)
    return statistics.median(a / b for a, b in pairs)


def spread(values: list[float], unit: float = 1.0) -> str:
    """Median and quartiles, as "12.1 (11.8-12.9)"."""
    ordered = sorted(value * unit for value in values)
    low, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.25, 0.75))
    return f"{statistics.median(ordered):.4g} ({low:.4g}-{high:.4g})"


def goal(name: str, value: float, bound: float, at_least: bool = False) -> dict[str, Any]:
    """A goal as reports read it; it holds up to the bound, or from it on."""
    holds = value >= bound if at_least else value <= bound
    sign = ">=" if at_least else "<="
    return {"name": name, "value": round(value, 4), "goal": f"{sign} {bound:g}", "holds": holds}


def report(goals: list[dict[str, Any]]) -> None:
    """Prints the goals as the last line."""
    print(json.dumps({"goals": goals}), flush=True)


def machine() -> str:
    """The processor's name and how many cores there are."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            found = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
        name = found[0] if found else name
    except OSError:
        pass
    return f"{os.cpu_count()} cores, {name}"
