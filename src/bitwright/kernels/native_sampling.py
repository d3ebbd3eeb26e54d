"""A token from logits, natively and without sorting them."""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.kernels import native_library

if native_library.missing() is None:
    from bitwright.kernels import _native

__all__ = ["choose"]

HOTTEST, LEAST = 1e30, 1e-30  # temperature and share of the chance, beyond which nothing changes


def choose(
    logits: Tensor, *, uniform: float, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> int:
    """The token of float32 ``logits [vocabulary]`` that ``uniform`` (0 up to, not including, 1) stands for.

    Chances are ``softmax(logits / temperature)``, among the ``top_k`` likeliest (0: all), of those among the fewest
    that have ``top_p`` of the chance together, of those among the ones of ``min_p`` times the likeliest's chance. Of
    equal logits the first counts as likelier. The numbers from 0 to 1 are dealt out in the order of the tokens.
    Temperature 0 gives the likeliest.

    Raises:
        ArgumentError: BW201 for an argument out of its range.
        BitwrightError: BW601 if a logit is NaN, or the largest is not finite.
    """
    missing = native_library.missing()
    if missing is not None:
        raise ArgumentError("BW201", missing, suggestion=native_library.BUILD)
    native_library.instruction_set()
    is_sound = logits.dtype == torch.float32 and logits.dim() == 1 and logits.is_contiguous()
    if not is_sound or logits.device.type != "cpu" or not logits.numel():
        found = f"logits: {logits.dtype} {list(logits.shape)} on {logits.device}"
        raise ArgumentError("BW201", found, suggestion="contiguous float32 [vocabulary] on the CPU")
    ranges = {
        "uniform": (uniform, 0 <= uniform < 1, "0 or more, below 1"),
        "temperature": (temperature, 0 <= temperature < float("inf"), "a finite number, 0 or more"),
        "top_k": (top_k, type(top_k) is int and top_k >= 0, "a whole number, 0 or more"),
        "top_p": (top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        "min_p": (min_p, 0 <= min_p <= 1, "0 to 1"),
    }
    for name, (value, is_valid, accepted) in ranges.items():
        if not is_valid:
            raise ArgumentError("BW201", f"{name} is {value!r}", suggestion=accepted)
    # In float32 a huge temperature would be infinite, and a tiny share none.
    temperature, top_p, top_k = min(temperature, HOTTEST), max(top_p, LEAST), min(top_k, logits.numel())
    token = _native.sample(logits.data_ptr(), logits.numel(), temperature, top_k, top_p, min_p, uniform)
    if token < 0:
        advice = "the weights or the activations are broken; evaluate the model it was made from"
        raise BitwrightError("BW601", "the model gives logits that are not numbers", suggestion=advice)
    return token
