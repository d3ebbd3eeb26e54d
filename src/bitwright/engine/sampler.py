"""The next token of one request, from its logits: penalties, then what is left out, then a number by chance.

Each request has random numbers of its own, one for each token, so that its answer is the same alone and in company.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.engine.options import RequestOptions
from bitwright.kernels import native_library, native_sampling

__all__ = ["Logprobs", "Sampler"]

Floats: TypeAlias = NDArray[np.float32]
Doubles: TypeAlias = NDArray[np.float64]
LARGEST = 1e30  # logit that a penalty makes, which float32 can hold, and differences of which
FIRST = 1024  # of the likeliest tokens, among which a top_p nearly always ends


@dataclass(frozen=True, slots=True)
class Logprobs:
    """The log-probability that the model gave a token, and those of the likeliest ones, best first.

    They are the model's own: before penalties, temperature and whatever is left out.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses the tokens of one request, and remembers those it has chosen.

    Args:
        options: of the request.
        prompt: its tokens, for the repetition penalty.
        seed: of its random numbers.
    """

    def __init__(self, options: RequestOptions, prompt: Sequence[int], seed: int) -> None:
        self._options, self._random = options, random.Random(seed)
        self._in_prompt = frozenset(prompt) if options.repetition_penalty != 1 else frozenset()
        self._answer: Counter[int] = Counter()
        self._bias_tokens = np.array(list(options.logit_bias), dtype=np.int64)
        self._bias = np.array(list(options.logit_bias.values()), dtype=np.float32)
        self._is_plain = (
            options.repetition_penalty == 1
            and options.presence_penalty == 0
            and options.frequency_penalty == 0
            and not options.logit_bias
        )

    def choose(self, logits: Floats) -> tuple[int, Logprobs | None]:
        """A token from its ``logits [vocabulary]``, and its log-probability if the request wants it.

        Raises:
            BitwrightError: BW601 if a logit is NaN or the largest is infinite.
        """
        if not np.isfinite(logits.max()):  # NaN, if there is one, is the maximum
            advice = "the weights or the activations are broken; evaluate the model it was made from"
            raise BitwrightError("BW601", "the model gives logits that are not numbers", suggestion=advice)
        wanted = logits if self._is_plain else self._penalized(logits)
        if not np.isfinite(wanted.max()):
            raise ArgumentError("BW201", "logit_bias leaves no token", suggestion="allow at least one")
        options = self._options
        is_greedy = options.temperature == 0 or options.top_k == 1
        token = int(wanted.argmax()) if is_greedy else self._draw(wanted)
        self._answer[token] += 1
        return token, None if options.logprobs is None else _logprobs(logits, token, options.logprobs)

    def _penalized(self, logits: Floats) -> Floats:
        options, logits = self._options, logits.copy()
        if options.repetition_penalty != 1:
            seen = np.fromiter(self._in_prompt | self._answer.keys(), dtype=np.int64)
            values, penalty = logits[seen].astype(np.float64), options.repetition_penalty
            with np.errstate(over="ignore", under="ignore"):
                penalized = np.where(values > 0, values / penalty, values * penalty)
            logits[seen] = penalized.clip(-LARGEST, LARGEST)
        if self._answer and (options.presence_penalty or options.frequency_penalty):
            tokens = np.fromiter(self._answer.keys(), dtype=np.int64)
            counts = np.fromiter(self._answer.values(), dtype=np.float32)
            logits[tokens] -= np.float32(options.presence_penalty) + np.float32(options.frequency_penalty) * counts
        logits[self._bias_tokens] += self._bias
        return logits

    def _draw(self, logits: Floats) -> int:
        """One token by chance: the chances of those that are kept are dealt out in the order of the tokens."""
        options, number = self._options, self._random.random()
        if native_library.missing() is None:
            return native_sampling.choose(
                torch.from_numpy(np.ascontiguousarray(logits)),
                uniform=number,
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                min_p=options.min_p,
            )
        weights = _weights(logits, options.temperature)
        kept = _kept(logits, weights, options)
        sums = weights[kept].cumsum()
        position = int(np.searchsorted(sums, number * sums[-1], side="right"))
        return int(kept[min(position, len(kept) - 1)])


def _kept(logits: Floats, weights: Doubles, options: RequestOptions) -> NDArray[np.int64]:
    """The tokens that ``top_k``, then ``top_p``, then ``min_p`` leave, in ascending order."""
    if not options.top_k and options.top_p == 1:
        return np.flatnonzero(weights >= options.min_p)
    count = min(options.top_k or len(logits), len(logits))
    # A vocabulary is rarely sorted as a whole: what is kept is nearly always among the first.
    for size in sorted({min(count, max(options.top_k, FIRST)), count}):
        tokens = _largest(logits, size)
        ordered = weights[tokens]
        bound = options.top_p * float(ordered.sum() if options.top_k else weights.sum())
        inside = (ordered.cumsum() - ordered < bound) & (ordered >= options.min_p)
        inside[0] = True
        if not inside[-1]:
            break
    return np.sort(tokens[inside])


def _largest(logits: Floats, count: int) -> NDArray[np.int64]:
    """The tokens of the ``count`` largest logits, largest first; of equal ones the first."""
    if count < len(logits):
        bound = np.partition(logits, len(logits) - count)[len(logits) - count]
        tokens = np.flatnonzero(logits >= bound)
    else:
        tokens = np.arange(len(logits))
    order = np.argsort(-logits[tokens], kind="stable")
    return tokens[order][:count]


def _weights(logits: Floats, temperature: float) -> Doubles:
    """Chances up to a common factor: the likeliest token's is 1."""
    differences: Doubles = logits.astype(np.float64) - float(logits.max())
    with np.errstate(under="ignore", over="ignore"):  # a tiny temperature makes differences infinite, which is right
        return np.asarray(np.exp(differences / temperature), dtype=np.float64)


def _logprobs(logits: Floats, token: int, count: int) -> Logprobs:
    values = logits.astype(np.float64)
    largest = values.max()
    with np.errstate(under="ignore"):
        total = largest + np.log(np.exp(values - largest).sum())
    best = _largest(logits, count) if count else np.array([], dtype=np.int64)
    top = tuple((int(each), float(values[each] - total)) for each in best)
    return Logprobs(token, float(values[token] - total), top)
