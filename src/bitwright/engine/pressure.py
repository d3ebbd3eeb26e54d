"""What happens when memory runs out in the middle of a step: fewer requests run at once for a while, then fewer tokens.

A step that failed is planned anew and computed again. The requests that came last give up their pages and wait, as they
do when the cache is full, so answers are those that they would have been.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from bitwright.core.errors import BitwrightError
from bitwright.engine.runner import Runner
from bitwright.engine.scheduler import Scheduler, Work
from bitwright.models.paged_cache import PAGE

__all__ = ["Pressure", "exhausted"]

CALM_STEPS = 64  # after so many steps without a failure the limits are doubled again
GB = 1e9


@runtime_checkable
class _Frees(Protocol):
    """A decoder that holds memory which it can do without."""

    def free_memory(self) -> None: ...


@dataclass(slots=True)
class Pressure:
    """The limits of a step, which halve when memory runs out and grow back when it does not.

    Attributes:
        failures: steps that memory ran out in, so far.
    """

    runner: Runner
    scheduler: Scheduler
    failures: int = 0
    calm: int = 0

    def relieve(self, works: Sequence[Work], error: torch.OutOfMemoryError) -> None:
        """Let the next step be smaller: half the requests, or of a single one half the tokens.

        Raises:
            BitwrightError: BW503 with sizes, if a step of one request and a page of tokens is too large.
        """
        self.failures, self.calm = self.failures + 1, 0
        if isinstance(self.runner.decoder, _Frees):
            self.runner.decoder.free_memory()
        scheduler = self.scheduler
        if len(works) > 1:
            scheduler.limit(batch=-(-len(works) // 2))
        elif scheduler.step_tokens > PAGE:
            scheduler.limit(step_tokens=max(PAGE, min(scheduler.step_tokens, works[0].count) // 2))
        elif works[0].draft:
            scheduler.limit(drafted=0)
        else:
            raise exhausted(self.runner, works, error) from error

    def ease(self) -> None:
        """Note a step that went well."""
        self.calm += 1
        if self.failures and self.calm % CALM_STEPS == 0:
            self.scheduler.limit(batch=2 * self.scheduler.batch, step_tokens=2 * self.scheduler.step_tokens)


def exhausted(runner: Runner, works: Sequence[Work], error: torch.OutOfMemoryError) -> BitwrightError:
    """That not even the smallest step fits, with what takes the memory."""
    tokens = sum(work.count + len(work.draft) for work in works)
    weights, cache = runner.decoder.weight_bytes() / GB, runner.cache.bytes() / GB
    what = f"memory ran out in a step of {tokens} tokens of one request; weights take {weights:.2f} GB, the cache "
    what += f"{cache:.2f} GB"
    advice = "a smaller cache_memory or cache_tokens, kv_cache='int8', or a quantized model"
    return BitwrightError("BW503", what, why=str(error).partition("\n")[0], suggestion=advice)
