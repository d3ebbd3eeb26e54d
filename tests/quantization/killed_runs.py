"""``python -m tests.quantization.killed_runs``: a program without threads, whose forks quantize and are killed.

It prints one JSON object. Importing torch once, and not for every run, is what makes real kills cheap.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from bitwright.core.errors import BitwrightError
from bitwright.formats.checkpoint import INDEX, WORK_DIRECTORY, WORK_JOURNAL
from bitwright.quantization.api import quantize
from tests.quantization.tiny import digests

UNFINISHED = 100


def start(arguments: dict[str, Any]) -> int:
    """Quantize in a process of its own; its exit status is that of the command."""
    pid = os.fork()
    if pid:
        return pid
    status = UNFINISHED
    try:
        quantize(**arguments)
        status = 0
    except BitwrightError as error:
        status = error.exit_status
    finally:
        os._exit(status)


def finish(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_after(pid: int, seconds: float) -> tuple[int, float]:
    """Kill a process unless it ends before; its status (negative if killed), and how long it lived."""
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), time.perf_counter() - began
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    return finish(pid), time.perf_counter() - began


def finished_files(output: Path) -> dict[str, str]:
    """The digests of a finished output, without the lock that a kill leaves between the journal's end and its own."""
    found = digests(output)
    found.pop(f"{WORK_DIRECTORY}/lock", None)
    return found


def run_again(arguments: dict[str, Any], expected: dict[str, str]) -> bool:
    """Whether the same command ends well with the expected files.

    A kill that came when all was done, while the process was leaving, is told that the output is finished (2).
    """
    output = Path(arguments["output"])
    finished = (output / INDEX).exists() and not (output / WORK_DIRECTORY / WORK_JOURNAL).exists()
    status, found = finish(start(arguments)), finished_files(output)
    return status == (2 if finished else 0) and found == expected


def kill_at_random(arguments: dict[str, Any], count: int, seed: int) -> dict[str, Any]:
    """Kill ``count`` runs, each at a random moment, three of four within the blocks, and run each again to its end."""
    output = Path(arguments["output"])
    generator = random.Random(seed)
    assert finish(start(arguments)) == 0
    expected = digests(output)
    shutil.rmtree(output)
    duration = kill_after(start(arguments), 600)[1]
    record: dict[str, Any] = {"files": sorted(expected), "points": [], "different": []}
    early = 0
    while len(record["points"]) < count:
        shutil.rmtree(output, ignore_errors=True)
        moment = generator.uniform(0.02, 1.0) * duration
        status, lived = kill_after(start(arguments), moment)
        if status >= 0:
            duration = lived  # the machine has become less busy
            continue
        units = len(list(output.glob("model-*.safetensors"))) if output.exists() else 0
        early += units == 0
        if units == 0 and early > count // 4:
            continue  # enough of those before the first block is done
        record["points"].append([round(moment, 3), units])
        if not run_again(arguments, expected):
            record["different"].append([round(moment, 3), units])
    record["in_work"] = sum(units > 0 for _, units in record["points"])
    return record


def kill_again_and_again(arguments: dict[str, Any], seed: int) -> dict[str, Any]:
    """Kill one run at random until it ends before its kill comes."""
    output = Path(arguments["output"])
    shutil.rmtree(output, ignore_errors=True)
    assert finish(start(arguments)) == 0
    expected = digests(output)
    shutil.rmtree(output)
    generator = random.Random(seed)
    kills, patience = 0, 0.05
    while True:
        status, _ = kill_after(start(arguments), generator.uniform(0.5, 1.0) * patience)
        if status >= 0:
            return {"kills": kills, "status": status, "equal": finished_files(output) == expected}
        kills, patience = kills + 1, patience * 1.15


def race(arguments: dict[str, Any], count: int) -> dict[str, Any]:
    """Start two runs on one output at the same moment, ``count`` times."""
    output = Path(arguments["output"])
    statuses, wrong = [], 0
    expected: dict[str, str] = {}
    for _ in range(count):
        shutil.rmtree(output, ignore_errors=True)
        pids = [start(arguments), start(arguments)]
        statuses.append(sorted(map(finish, pids)))
        expected = expected or digests(output)
        wrong += digests(output) != expected
    return {"statuses": statuses, "wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("arguments", type=json.loads)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    arguments = chosen.arguments
    quantize(**arguments)  # everything is imported and warm before the first fork
    shutil.rmtree(arguments["output"])
    result = {
        "seed": chosen.seed,
        "random": kill_at_random(arguments, chosen.count, chosen.seed),
        "again": kill_again_and_again(arguments, chosen.seed),
        "race": race(arguments, 4),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
