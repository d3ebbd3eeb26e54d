"""Models of bitwright for EleutherAI's lm-eval, which this module alone imports: install ``bitwright[harness]``.

bitwright eval MODEL --tasks mmlu,gsm8k --kv-cache none,int8
results = lm_eval.simple_evaluate(HarnessModel("out", kv_cache="int8"), tasks=["winogrande"])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor, nn

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.kv_scheme import KVScheme, parse_kv
from bitwright.evaluation.kv_models import CachedModel
from bitwright.evaluation.windows import start_token
from bitwright.models.generation import Sampling, generate_tokens
from bitwright.models.hf import PreTrainedModel, Tokenizer, context_length
from bitwright.models.kv_cache import QuantizedCache
from bitwright.models.limits import end_tokens
from bitwright.models.loading import load_with_tokenizer

__all__ = ["HarnessModel", "run_tasks"]

BATCH = 8  # texts of one length, read at once
WRITTEN = 256  # tokens of an answer, unless the task says how many
# Which figure of a task is its score, the first that it has.
SCORES = ("acc_norm,none", "acc,none", "exact_match,none", "pass@1,none", "f1,none", "word_perplexity,none")


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A model as lm-eval asks it: log-likelihoods of continuations and of whole texts, and answers up to a stop.

    Args:
        model: what :func:`bitwright.load` takes or gives.
        tokenizer: needed beside a model in memory.
        kv_cache: the scheme through which every text is read, and every answer written.
        batch: how many texts of one length are read at once.

    Raises:
        BitwrightError: BW201 without a tokenizer, BW202 for the scheme; what :func:`bitwright.load` raises.
    """

    def __init__(
        self,
        model: nn.Module | str | Path,
        *,
        tokenizer: Tokenizer | None = None,
        kv_cache: str | int | KVScheme = "none",
        batch: int = BATCH,
    ) -> None:
        super().__init__()
        scheme = kv_cache if isinstance(kv_cache, KVScheme) else parse_kv(kv_cache)
        if isinstance(model, str | Path):
            model, tokenizer = load_with_tokenizer(model)
        if isinstance(model, CachedModel):
            scheme, model = model.scheme, model.model
        if tokenizer is None or not isinstance(model, PreTrainedModel):
            what = "lm-eval needs a causal language model of transformers, and its tokenizer"
            raise ArgumentError("BW201", what, suggestion="the directory of a model, or tokenizer=")
        self.model, self.tokenizer, self.scheme, self.batch = model, tokenizer, scheme, batch
        self._reader = model if scheme.is_float else CachedModel(model, scheme)
        self._start = start_token(tokenizer)
        self._context = context_length(model.config) or 1 << 20

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        own = self.tokenizer.eos_token_id
        return int(own) if own is not None else min(end_tokens(self.model), default=0)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is: the token that begins texts, or the one that ends them."""
        return self.eot_token_id if self._start is None else self._start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text, after the one with which the model was taught to begin texts."""
        tokens = list(self.tokenizer(string, add_special_tokens=False)["input_ids"])
        begins = self._start is not None and add_special_tokens is not False and tokens[:1] != [self._start]
        return [self._start, *tokens] if begins and self._start is not None else tokens

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """For each (texts, context, continuation): the log-probability, and whether it is what greedy search writes."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        by_length: dict[int, list[int]] = {}
        for number, (_texts, context, continuation) in enumerate(requests):
            by_length.setdefault(min(len(context) + len(continuation), self._context + 1), []).append(number)
        for length, numbers in by_length.items():
            for start in range(0, len(numbers), self.batch):
                chosen = numbers[start : start + self.batch]
                rows = [(requests[number][1] + requests[number][2])[-length:] for number in chosen]
                for number, row, logits in zip(chosen, rows, self._read(rows), strict=True):
                    count = min(len(requests[number][2]), length - 1)
                    found[number] = _score(logits[-count:] if count else logits[:0], row[len(row) - count :])
        return found

    def _read(self, rows: Sequence[list[int]]) -> Tensor:
        with torch.no_grad():
            inputs = torch.tensor(rows, device=self.model.device)[:, :-1]
            logits: Tensor = self._reader(input_ids=inputs, use_cache=False).logits
        return logits

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts, in windows of the model's context that share no predicted token."""
        sums = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._context,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            sums.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The likeliest answer to each prompt, up to the first of the task's stops."""
        return [self._write(*request.args) for request in requests]

    def _write(self, prompt: str, settings: Mapping[str, Any]) -> str:
        given = settings.get("until") or []
        stops = [given] if isinstance(given, str) else [stop for stop in given if stop]
        limit = int(settings.get("max_gen_toks") or WRITTEN)
        limit = min(limit, self._context - 1)
        tokens = self.tok_encode(prompt)[-(self._context - limit) :]
        cache = None if self.scheme.is_float else QuantizedCache(self.model, self.scheme, kv_safety="off")
        ends, written, text = end_tokens(self.model), list[int](), ""
        for token in generate_tokens(self.model, tokens, limit=limit, sampling=Sampling(), cache=cache):
            if token in ends:
                break
            written.append(token)
            text = str(self.tokenizer.decode(written))
            if any(stop in text for stop in stops):
                break
        return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def _score(logits: Tensor, targets: list[int]) -> tuple[float, bool]:
    """Log-probability of ``targets`` under ``logits`` ``[targets, vocabulary]``, and whether each is the likeliest."""
    wanted = torch.tensor(targets, device=logits.device)
    chances = torch.log_softmax(logits.float(), dim=-1)
    return float(chances.gather(1, wanted[:, None]).sum()), bool((chances.argmax(-1) == wanted).all())


def run_tasks(
    model: nn.Module, tokenizer: Tokenizer, tasks: Sequence[str], *, path: Path | None = None, limit: int | None = None
) -> dict[str, float]:
    """The score of each task of lm-eval, by its name; of groups, their mean.

    Args:
        path: a directory with tasks of one's own, in lm-eval's format.
        limit: so many questions of each task.

    Raises:
        BitwrightError: BW402 if there is no such task, or its data cannot be had.
    """
    manager = TaskManager(include_path=None if path is None else str(path))
    try:
        found = simple_evaluate(
            HarnessModel(model, tokenizer=tokenizer), tasks=list(tasks), task_manager=manager, limit=limit,
            bootstrap_iters=0, log_samples=False,
        )  # fmt: skip
    except BitwrightError:
        raise
    except Exception as error:  # whatever a task's file, its data or a network raises
        advice = "lm-eval ls tasks names them; --task-path DIR has your own; their data need a network or a local copy"
        what = f"lm-eval cannot run {', '.join(tasks)}: {type(error).__name__}: {str(error)[:200]}"
        raise BitwrightError("BW402", what, suggestion=advice) from error
    results = {} if found is None else {**found["results"], **found.get("groups", {})}
    return {task: next((float(results[task][name]) for name in SCORES if name in results[task]), 0.0) for task in tasks}
