"""Several layers, or tiles of one, at a time, each on one thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["map_layers", "map_side_by_side"]

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_layers(function: Callable[[str], Result], sizes: Mapping[str, int]) -> dict[str, Result]:
    """What ``function`` makes of each layer's name, in the order of ``sizes``; the largest layers are begun first.

    As many layers are worked on as torch has threads for arithmetic, and each then has one: a step over a tile
    that fits in cache is over sooner than threads that share it have met.

    Raises:
        Exception: whatever ``function`` raises; of several, that of the largest layer.
    """
    names = sorted(sizes, key=lambda name: -sizes[name])
    results = dict(zip(names, map_side_by_side(function, names), strict=True))
    return {name: results[name] for name in sizes}


def map_side_by_side(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """What ``function`` makes of each item, in order; the first are begun first. Threads as for :func:`map_layers`.

    Raises:
        Exception: whatever ``function`` raises; of several, that of the first item.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(items) < 2:
        return [function(item) for item in items]
    is_tracked = torch.is_grad_enabled()

    def run(item: Item) -> Result:
        with torch.set_grad_enabled(is_tracked):  # each thread has a setting of its own
            return function(item)

    workers = min(threads, len(items))
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(run, items))
    finally:
        torch.set_num_threads(threads)  # a thread's own count becomes that of all threads to come
