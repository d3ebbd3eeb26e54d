"""Several layers at a time, each on one thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["map_layers"]

Result = TypeVar("Result")


def map_layers(function: Callable[[str], Result], sizes: Mapping[str, int]) -> dict[str, Result]:
    """What ``function`` makes of each layer's name, in the order of ``sizes``; the largest layers are begun first.

    As many layers are worked on as torch has threads for arithmetic, and each then has one: a step over a tile
    that fits in cache is over sooner than threads that share it have met.

    Raises:
        Exception: whatever ``function`` raises; of several, that of the largest layer.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(sizes) < 2:
        return {name: function(name) for name in sizes}
    is_tracked = torch.is_grad_enabled()

    def run(name: str) -> Result:
        with torch.set_grad_enabled(is_tracked):  # each thread has a setting of its own
            return function(name)

    names = sorted(sizes, key=lambda name: -sizes[name])
    workers = min(threads, len(names))
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            results = dict(zip(names, pool.map(run, names), strict=True))
    finally:
        torch.set_num_threads(threads)  # a thread's own count becomes that of all threads to come
    return {name: results[name] for name in sizes}
