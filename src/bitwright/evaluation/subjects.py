"""The models of a comparison before they are loaded: where they are, and whether they read the same tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.kv_scheme import KVScheme
from bitwright.evaluation.kv_models import CachedModel
from bitwright.evaluation.sizes import Size, checkpoint_size, module_size
from bitwright.formats.checkpoint import Checkpoint, open_checkpoint
from bitwright.models.embedded_model import embedded_directory
from bitwright.models.hf import PreTrainedModel, Tokenizer, context_length, load_tokenizer, read_config
from bitwright.models.loading import load
from bitwright.models.location import resolve_model
from bitwright.quantization.rows import layer_error

__all__ = ["ModelLike", "Subject", "check_tokenizers", "choose_window", "find_subjects", "worst_layers"]

ModelLike = str | Path | tuple[str, nn.Module]
WINDOW = 512  # tokens, unless asked otherwise or a model's context is smaller
# Looked at where there is no tokenizer.json.
TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "qwen.tiktoken")
# Which texts these fields allow differs with how a tokenizer was last called, not with what it is.
VOLATILE_FIELDS = ("truncation", "padding")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model to be measured: a ``checkpoint`` in a directory, or a ``module`` in memory."""

    name: str
    checkpoint: Checkpoint | None
    module: nn.Module | None
    vocabulary: int
    context: int | None
    scheme: KVScheme | None = None  # of the cache through which it reads; None: without any

    @property
    def directory(self) -> Path | None:
        return self.checkpoint.directory if self.checkpoint else None

    def load(self, dtype: torch.dtype | None) -> nn.Module:
        """The model; one in memory is taken as it is."""
        if self.module is not None:
            return self._cached(self.module)
        assert self.directory is not None
        return self._cached(load(self.directory, dtype=dtype))

    def _cached(self, model: nn.Module) -> nn.Module:
        if self.scheme is None or self.scheme.is_float:
            return model
        if not isinstance(model, PreTrainedModel):
            what = f"{self.name} is no model of transformers, and has no cache"
            raise ArgumentError("BW201", what, suggestion="leave out the cache schemes")
        return CachedModel(model, self.scheme)

    def size(self) -> Size:
        if self.checkpoint is not None:
            return checkpoint_size(self.checkpoint)
        assert self.module is not None
        return module_size(self.module)


def find_subjects(
    models: Sequence[ModelLike], reference: ModelLike | None, schemes: Sequence[KVScheme] = ()
) -> tuple[list[Subject], Subject | None]:
    """Open every checkpoint, so that what is wrong with the last one is known before the first is measured.

    With cache ``schemes`` each model is there once for each, and unless there is a reference, the first model without
    a quantized cache is it.

    Raises:
        BitwrightError: BW201 if there is no model; BW312 if a model predicts another number of tokens than the
            reference; whatever opening a checkpoint raises.
    """
    if isinstance(models, str | Path) or not models:
        raise ArgumentError("BW201", f"models is {models!r}", suggestion="a list of at least one model")
    subjects = [_find_subject(model) for model in models]
    own = schemes and reference is None
    beside = subjects[0] if own else None if reference is None else _find_subject(reference)
    if schemes:
        subjects = [
            replace(subject, name=f"{subject.name} kv={scheme.name}", scheme=scheme)
            for subject in subjects
            for scheme in schemes
            if not (own and subject is beside and scheme.is_float)
        ]
    for subject in subjects:
        if beside is not None and subject.vocabulary != beside.vocabulary:
            raise BitwrightError(
                "BW312",
                f"{subject.name} predicts {subject.vocabulary} tokens and {beside.name} predicts {beside.vocabulary}",
                why="a divergence is between probabilities of the same tokens",
                suggestion="compare a model with the one that it was made from",
            )
    return subjects, beside


def _find_subject(model: ModelLike) -> Subject:
    config: Any
    if isinstance(model, str | Path):
        checkpoint = open_checkpoint(resolve_model(model))
        name, module, config = str(model), None, read_config(checkpoint)
    else:
        (name, module), checkpoint = model, None
        config = getattr(module, "config", None)
    fields = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(fields, "vocab_size", None)
    if not isinstance(vocabulary, int):
        what = f"{name} does not say how many tokens it predicts"
        raise BitwrightError("BW307", what, suggestion="a causal language model of transformers, with its config")
    return Subject(
        name=name, checkpoint=checkpoint, module=module, vocabulary=vocabulary, context=context_length(fields)
    )


def choose_window(subjects: Sequence[Subject], seqlen: int | None) -> int:
    """``seqlen`` if every model can read so much at once; unless given, what all of them can, at most ``WINDOW``.

    Raises:
        BitwrightError: BW201 naming the model whose context is shorter.
    """
    contexts = {subject.context: subject.name for subject in subjects if subject.context is not None}
    least = min(contexts, default=WINDOW)
    if seqlen is None:
        return min(WINDOW, least)
    if seqlen > least and contexts:
        what = f"seqlen {seqlen} is longer than the context of {contexts[least]}, {least} tokens"
        raise ArgumentError("BW201", what, suggestion=f"--seqlen {least}")
    return seqlen


def check_tokenizers(subjects: Sequence[Subject], tokenizer: str | Path | None) -> tuple[Tokenizer, bool]:
    """The one tokenizer of all models, and whether it is the embedded model's.

    Args:
        tokenizer: a model directory whose tokenizer to use. Models in memory have none and are believed.

    Raises:
        BitwrightError: BW312 if there is none, or two models have different ones.
    """
    directories = {subject.name: subject.directory for subject in subjects if subject.directory is not None}
    if tokenizer is not None:
        directories = {str(tokenizer): resolve_model(tokenizer), **directories}
    if not directories:
        what = "models in memory have no tokenizer to read the text with"
        raise BitwrightError("BW312", what, suggestion="give tokenizer= the directory of a model that has it")
    (first, directory), *others = directories.items()
    reader, fingerprint = load_tokenizer(directory), _fingerprint(directory)
    for name, other in others:
        if _fingerprint(other) != fingerprint:
            raise BitwrightError(
                "BW312",
                f"the tokenizers of {first} and {name} differ",
                where=str(other),
                why="token ids would mean different text, and figures per token could not be compared",
                suggestion="compare models of one family, or restore the tokenizer files of the original model",
            )
    return reader, fingerprint == _fingerprint(embedded_directory())


def _fingerprint(directory: Path) -> str:
    """A hash of what a tokenizer does; how its file is laid out does not matter.

    Raises:
        BitwrightError: BW312 if the directory has no tokenizer.
    """
    path = directory / "tokenizer.json"
    digest = hashlib.sha256()
    if path.is_file():
        content = path.read_bytes()
        try:
            fields = json.loads(content)
            kept = {name: value for name, value in fields.items() if name not in VOLATILE_FIELDS}
            content = json.dumps(kept, sort_keys=True).encode()
        except (ValueError, AttributeError, RecursionError):
            pass  # whatever it is, it can be compared byte by byte
        digest.update(content)
        return digest.hexdigest()
    found = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if not found:
        what = "the model has no tokenizer"
        raise BitwrightError("BW312", what, where=str(directory), suggestion="copy tokenizer.json there")
    for path in found:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def worst_layers(directory: Path | None, count: int = 5) -> list[str]:
    """The layers of largest error in the report beside a checkpoint; none if there is no readable report."""
    try:
        layers = json.loads((directory / "report.json").read_bytes())["layers"] if directory else {}
        errors = {str(name): layer_error(row) for name, row in layers.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []
    return sorted(errors, key=lambda name: -errors[name])[:count]
