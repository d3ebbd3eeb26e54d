"""Train the embedded model from generated text, in chunks that survive a kill.

    python -m scripts.embedded.train --work-dir work --output src/bitwright/models/embedded

A rerun of the same command goes on from the last checkpoint and ends with the same weights as
an uninterrupted run: the batch of a step depends on the step alone, nothing else is random after
the first weights, and a checkpoint is replaced in one rename.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from . import vocabulary
from .corpus import end_of_text, load_tokenizer, load_tokens
from .first_weights import seed_heads
from .text import SEED

CONTEXT = 512
ROPE_THETA = 100_000.0
CYCLES = (0, 2400, 4000, 4800)  # steps at which the learning rate rises anew
CONFIG_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "max_window_layers",
    "hidden_act",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_dropout",
    "sliding_window",
    "use_sliding_window",
    "use_cache",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "transformers_version",
)


@dataclass(frozen=True, slots=True)
class Options:
    """What is trained and for how long. Every field changes the weights that come out."""

    steps: int = 5120
    short_steps: int = 1680
    batch_tokens: int = 4096
    layers: int = 5
    hidden: int = 256
    intermediate: int = 768
    learning_rate: float = 1e-3
    embedding_rate: float = 0.3
    weight_decay: float = 0.1
    warmup: int = 100
    seed: int = SEED

    @property
    def tokens(self) -> int:
        """Tokens of the whole run; no token is seen twice."""
        return self.steps * self.batch_tokens


def architecture(options: Options, tokenizer_size: int, end: int) -> Qwen2Config:
    """Return the Qwen2 configuration: grouped-query attention, biases, tied embeddings."""
    return Qwen2Config(
        vocab_size=tokenizer_size,
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 128,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )


def rate(options: Options, step: int) -> float:
    """Return the learning rate of a step: in each cycle a linear rise, then a linear fall to zero."""
    first = max(start for start in CYCLES if start <= step)
    end = min((start for start in (*CYCLES, options.steps) if start > step), default=options.steps)
    rise = min(1.0, (step - first + 1) / options.warmup)
    fall = (end - step) / max(1, end - first - options.warmup)
    return options.learning_rate * min(rise, fall)


def rows(options: Options, tokens: NDArray[np.uint16], step: int) -> torch.Tensor:
    """Return the batch of a step, int64 [rows, length]: rows of half the length at first."""
    length = CONTEXT if step >= options.short_steps else CONTEXT // 2
    start = step * options.batch_tokens
    batch = np.asarray(tokens[start : start + options.batch_tokens], dtype=np.int64)
    return torch.from_numpy(batch.reshape(-1, length))


def optimizer_for(model: Qwen2ForCausalLM, options: Options) -> torch.optim.AdamW:
    """Return AdamW: only matrices decay, and embeddings move slowly, or rare tokens blur."""
    tables = [p for name, p in model.named_parameters() if "embed" in name]
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": tables, "weight_decay": 0.0, "factor": options.embedding_rate},
        {"params": matrices, "weight_decay": options.weight_decay, "factor": 1.0},
        {"params": vectors, "weight_decay": 0.0, "factor": 1.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95), fused=True)


@dataclass(slots=True)
class Run:
    """A training run in memory: what a checkpoint holds."""

    options: Options
    model: Qwen2ForCausalLM
    optimizer: torch.optim.AdamW
    step: int = 0

    def save(self, path: Path) -> None:
        """Write the checkpoint beside its place, then rename it there."""
        state = {
            "options": asdict(self.options),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    def restore(self, path: Path) -> None:
        """Take over a checkpoint; one that was made with other options is refused."""
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        wanted = asdict(self.options)
        if state["options"] != wanted:
            other = {k: v for k, v in state["options"].items() if wanted.get(k) != v}
            raise SystemExit(f"{path} was trained with {other}; give the same options, or another --work-dir")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])


def start(options: Options, config: Qwen2Config, device: str) -> Run:
    """Return a run at step 0 with seeded first weights."""
    torch.manual_seed(options.seed)
    model = Qwen2ForCausalLM(config)
    seed_heads(model, ROPE_THETA, options.seed)
    model.to(device)  # type: ignore[arg-type]
    return Run(options, model, optimizer_for(model, options))


def advance(run: Run, tokens: NDArray[np.uint16], device: str) -> torch.Tensor:
    """Train one step and return its mean loss (a scalar on the device)."""
    batch = rows(run.options, tokens, run.step).to(device)
    for group in run.optimizer.param_groups:
        group["lr"] = rate(run.options, run.step) * group["factor"]
    with torch.autocast(device, dtype=torch.bfloat16):
        loss: torch.Tensor = run.model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    return loss.detach()


def train(run: Run, tokens: NDArray[np.uint16], work_dir: Path, chunk: int, device: str) -> None:
    """Train to the last step, with a checkpoint and a line of progress after every chunk."""
    checkpoint = work_dir / "checkpoint.pt"
    if checkpoint.exists():
        run.restore(checkpoint)
    run.model.train()
    while run.step < run.options.steps:
        begun, first = time.perf_counter(), run.step
        losses = [advance(run, tokens, device) for _ in range(first, min(first + chunk, run.options.steps))]
        seconds = time.perf_counter() - begun
        run.save(checkpoint)
        record = {
            "step": run.step,
            "loss": round(float(torch.stack(losses).mean()), 4),
            "tokens_per_second": round(len(losses) * run.options.batch_tokens / seconds),
            "seconds": round(seconds, 1),
        }
        with (work_dir / "log.jsonl").open("a") as log:
            log.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)


def export(run: Run, work_dir: Path, output: Path) -> None:
    """Write the model in bf16 with its configuration, tokenizer and chat template."""
    output.mkdir(parents=True, exist_ok=True)
    model = run.model
    model.to("cpu", torch.bfloat16)  # type: ignore[arg-type]
    weights = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    save_file(weights, str(output / "model.safetensors"), metadata={"format": "pt"})
    full = model.config.to_dict()
    config = {name: full[name] for name in CONFIG_FIELDS}
    config.update(architectures=["Qwen2ForCausalLM"], dtype="bfloat16", torch_dtype="bfloat16", rope_theta=ROPE_THETA)
    (output / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer = load_tokenizer(work_dir)
    ends = [end_of_text(tokenizer), tokenizer.token_to_id("<|end|>")]
    generation = {"do_sample": False, "eos_token_id": ends, "pad_token_id": ends[0]}
    (output / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    vocabulary.save(tokenizer, output)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the command line's options; the fields of `Options` are flags with its defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work-dir", type=Path, required=True, help="tokens and checkpoint")
    parser.add_argument("--output", type=Path, help="where the finished model is written")
    parser.add_argument("--chunk-steps", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=2, help="the sums depend on it: keep it")
    for name, value in asdict(Options()).items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(value), default=value, help=f"default {value}")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Train or go on training, then export if an output directory is given."""
    given = parse(arguments)
    options = Options(**{name: getattr(given, name) for name in asdict(Options())})
    cuda = given.device == "cuda" or (given.device == "auto" and torch.cuda.is_available())
    device = "cuda" if cuda else "cpu"
    torch.set_num_threads(given.threads)
    torch.use_deterministic_algorithms(device == "cpu")
    given.work_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(given.work_dir)
    tokens = load_tokens(given.work_dir, tokenizer, options.tokens)
    config = architecture(options, tokenizer.get_vocab_size(), end_of_text(tokenizer))
    run = start(options, config, device)
    train(run, tokens, given.work_dir, given.chunk_steps, device)
    if given.output is not None:
        export(run, given.work_dir, given.output)


if __name__ == "__main__":
    main(sys.argv[1:])
