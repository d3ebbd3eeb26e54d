"""What every method is given and judged on: the same models, calibration windows and held-out windows, as files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitwright.evaluation.windows import TokenWindows
from bitwright.formats.checkpoint import open_checkpoint
from bitwright.models.embedded_model import read_text
from bitwright.models.hf import context_length, load_tokenizer, read_config
from bitwright.models.location import resolve_model
from bitwright.quantization.calibration import cut_windows, tokenize

__all__ = ["MODELS", "SAMPLES", "Material", "prepare_material"]

SAMPLES = 128  # calibration windows
SEED = 0
WINDOW = 512  # tokens, or the model's context where that is shorter
HELDOUT_TOKENS = 32_768


@dataclass(frozen=True)
class Texts:
    """Where calibration and held-out text come from, and in words."""

    read: Callable[[Path], tuple[str, str]]
    how: str


@dataclass(frozen=True)
class Material:
    """One model with its tokens.

    Attributes:
        directory: a Hugging Face directory of float weights.
        calibration_text: a file from which ``bitwright.quantize`` cuts exactly ``calibration``.
        calibration: int64 ``[SAMPLES, seqlen]``; in ``calibration_file`` as the tensor ``windows``.
        heldout: the windows that methods are judged on.
        input_sizes: input features of the layers in the blocks, which groups have to divide.
    """

    name: str
    directory: Path
    seqlen: int
    calibration_text: Path
    calibration_file: Path
    calibration: Tensor
    heldout: TokenWindows
    input_sizes: tuple[int, ...]
    texts: str


def _embedded(data: Path) -> tuple[str, str]:
    return read_text("calibration"), read_text("heldout")


def _wikitext(data: Path) -> tuple[str, str]:
    parts = ((data / "wikitext-2" / f"{name}.txt").read_text("utf-8") for name in ("valid", "test"))
    calibration, heldout = (text.replace("<unk>", "unknown") for text in parts)
    return calibration, heldout


def _stories(data: Path) -> tuple[str, str]:
    text = (data / "tinystories" / "train_head_2MiB.txt").read_text("utf-8")
    stories = [f"<s>{story.strip()}" for story in text.split("<|endoftext|>")[:-1]]  # the last one is cut off
    middle = len(stories) // 2
    return "".join(stories[:middle]), "".join(stories[middle:])


EMBEDDED = Texts(_embedded, "the embedded calibration and held-out texts")
WIKITEXT = Texts(_wikitext, "wikitext-2: valid for calibration, test held out; `<unk>` read as `unknown`")
STORIES = Texts(_stories, "TinyStories: the first half of the stories for calibration, the second half held out")
MODELS: Mapping[str, Texts] = {
    "demo": EMBEDDED,
    "wikitext-qwen2-6m": WIKITEXT,
    "BabyLlama-361-0.97M": STORIES,
    "stories260K": STORIES,
    "llama2xs-279K": STORIES,
}


def prepare_material(name: str, *, models: Path, data: Path, work: Path) -> Material | None:
    """Tokens and files of one model, written to ``work/NAME`` at the first call; ``None`` where it is not there."""
    directory = resolve_model("demo:") if name == "demo" else models / name
    if not directory.is_dir() or (name != "demo" and not data.is_dir()):
        return None
    folder = work / name
    config = read_config(open_checkpoint(directory))
    seqlen = min(WINDOW, context_length(config) or WINDOW)
    calibration_file, heldout_file = folder / "calibration.safetensors", folder / "heldout.safetensors"
    if not heldout_file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = load_tokenizer(directory)
        calibration, heldout = MODELS[name].read(data)
        (folder / "calibration.txt").write_text(calibration, encoding="utf-8")
        ids = tokenize(tokenizer, calibration)
        cut = cut_windows(ids, samples=SAMPLES, seqlen=seqlen, seed=SEED, source=name).windows
        save_file({"windows": cut}, calibration_file)
        save_file({"windows": spread_windows(tokenize(tokenizer, heldout), seqlen)}, heldout_file)
    heldout_windows = load_file(heldout_file)["windows"]
    return Material(
        name=name,
        directory=directory,
        seqlen=seqlen,
        calibration_text=folder / "calibration.txt",
        calibration_file=calibration_file,
        calibration=load_file(calibration_file)["windows"],
        heldout=TokenWindows(
            source=name, windows=tuple(heldout_windows), seqlen=seqlen, available=heldout_windows.numel()
        ),
        input_sizes=tuple(sorted({config.hidden_size, config.intermediate_size})),
        texts=MODELS[name].how,
    )


def spread_windows(ids: Tensor, seqlen: int) -> Tensor:
    """``[n, seqlen]``: windows of ``HELDOUT_TOKENS`` tokens in all, at even distances over the whole text."""
    available = len(ids) // seqlen
    count = min(available, HELDOUT_TOKENS // seqlen)
    numbers = torch.linspace(0, available - 1, count).round().to(torch.int64)
    return ids[: available * seqlen].view(available, seqlen)[numbers].clone()
