"""Measure the embedded model: perplexity, unigram perplexity, probes, damage from rounding.

python -m scripts.embedded.report src/bitwright/models/embedded
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme_names import parse

WINDOW = 512


def perplexity(model: Any, ids: list[int]) -> float:
    """Return the perplexity of token ids in windows of `WINDOW`, each read from its start."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, WINDOW):
            window = torch.tensor([ids[start : start + WINDOW]])  # [1, tokens]
            if window.shape[1] < 2:
                break
            logits = model(input_ids=window).logits[0, :-1].float()  # [tokens - 1, vocabulary]
            loss = torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum")
            total, count = total + float(loss), count + window.shape[1] - 1
    return math.exp(total / count)


def unigram_perplexity(ids: list[int]) -> float:
    """Return the perplexity of the best unigram model of these very ids."""
    counts = Counter(ids)
    return math.exp(-sum(n * math.log(n / len(ids)) for n in counts.values()) / len(ids))


def correct(model: Any, tokenizer: Any, prompt: str, answer: str) -> bool:
    """Return whether greedy decoding after the prompt begins with the answer."""
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    wanted = tokenizer(answer, add_special_tokens=False).input_ids
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([before + wanted[:-1]])).logits
    said = logits[0, len(before) - 1 :].argmax(-1).tolist()
    return bool(said == wanted)


def probe_scores(model: Any, tokenizer: Any, probes: list[dict[str, str]]) -> dict[str, float]:
    """Return the fraction of right answers for each kind of probe."""
    right: dict[str, list[bool]] = {}
    for probe in probes:
        hit = correct(model, tokenizer, probe["prompt"], probe["answer"])
        right.setdefault(probe["kind"], []).append(hit)
    return {kind: sum(hits) / len(hits) for kind, hits in right.items()}


def round_linears(model: Any, scheme: str) -> None:
    """Round every linear layer of the blocks in place, to nearest, as `bitwright quantize` does."""
    stored = parse(scheme).weight
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            rounded = QuantizedTensor.quantize(module.weight.data, stored).dequantize()
            module.weight.data = rounded.to(module.weight.dtype)


def measure(directory: Path, scheme: str | None) -> dict[str, Any]:
    """Return perplexity and probe scores at bf16, or after rounding to `scheme`."""
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model.eval()
    if scheme is not None:
        round_linears(model, scheme)
    text = (directory / "heldout.txt").read_text()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    lines = (directory / "probes.jsonl").read_text().splitlines()
    return {
        "weights": scheme or "bf16",
        "heldout_tokens": len(ids),
        "perplexity": round(perplexity(model, ids), 4),
        "unigram": round(unigram_perplexity(ids), 2),
        **probe_scores(model, tokenizer, [json.loads(line) for line in lines]),
    }


def main() -> None:
    """Print one line of figures at bf16 and one for each scheme."""
    parser = argparse.ArgumentParser(description="Measure the embedded model.")
    parser.add_argument("directory", type=Path)
    given = parser.parse_args()
    for scheme in (None, "w4g128", "w3g128", "w3", "w2g128"):
        print(json.dumps(measure(given.directory, scheme)), flush=True)


if __name__ == "__main__":
    main()
