"""What an engine is made of: the decoder that runs the model, and how much memory its cache may take."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bitwright.core.errors import ArgumentError, BitwrightError, Notice
from bitwright.core.kv_scheme import KVScheme
from bitwright.core.memory import machine_memory
from bitwright.core.scheme import LayerScheme
from bitwright.core.settings import read_settings
from bitwright.kernels import native_library
from bitwright.kernels.gpu import library
from bitwright.models import decoder_cuda, decoder_native, decoder_torch, hf
from bitwright.models.coded_tokenizers import has_vocabulary
from bitwright.models.decoder import Decoder, read_shape
from bitwright.models.decoder_cuda import CudaDecoder
from bitwright.models.decoder_native import NativeDecoder
from bitwright.models.decoder_torch import TorchDecoder
from bitwright.models.direct_loading import open_direct
from bitwright.models.hf import has_tokenizer, load_tokenizer
from bitwright.models.limits import end_tokens
from bitwright.models.loading import check_vocabulary, load, load_with_tokenizer
from bitwright.models.location import resolve_model
from bitwright.models.paged_cache import PAGE, refuse_scheme

if TYPE_CHECKING:
    from bitwright.models.hf import PreTrainedModel, Tokenizer

__all__ = ["DECODERS", "Opened", "choose_decoder", "open_model", "packed_folder", "page_count"]

DECODERS = ("auto", "native", "cuda", "torch")
SHARE = 4  # the cache takes at most one part in so many of the available memory, unless told otherwise


@dataclass(frozen=True, slots=True)
class Opened:
    """What an engine runs: the name of the decoder and itself, the tokenizer, the tokens that end a text."""

    name: str
    decoder: Decoder
    tokenizer: Tokenizer | None
    ends: frozenset[int]


def open_model(
    model: PreTrainedModel | str | Path,
    tokenizer: Tokenizer | None,
    *,
    decoder: str,
    scheme: KVScheme,
    head: LayerScheme | None,
    kept: Path | None = None,
    invariant: bool = False,
) -> Opened:
    """A decoder of ``model``, and a tokenizer if there is one that fits it.

    From a directory the native decoder's weights are read without loading the model, which takes less memory and time;
    ``kept``: where they are looked for first.

    Raises:
        BitwrightError: as :func:`choose_decoder` and :func:`bitwright.load`.
    """
    _check_name(decoder)
    _check_kinds(tokenizer, invariant)
    if isinstance(model, str | Path) and decoder in ("auto", "native"):
        directory = resolve_model(model)
        direct = open_direct(directory)
        if direct is not None and decoder_native.refuse_cache(scheme, direct.model.config.head_dim) is None:
            if tokenizer is None and has_tokenizer(directory):
                tokenizer = load_tokenizer(directory)
            if tokenizer is not None:
                check_vocabulary(direct.model, tokenizer)
            return Opened("native", NativeDecoder(direct.pack(head, kept)), tokenizer, _ends(direct.model, tokenizer))
    if kept is not None:
        what = "packed_cache has no effect: the model is not read from its files by the native decoder"
        warnings.warn(Notice(what), stacklevel=3)
    loaded, tokenizer = _load(model, tokenizer)
    # Nobody else has a model that was loaded here.
    is_own = loaded is not model
    if is_own and decoder == "cuda" and library.missing() is None:
        loaded = loaded.to("cuda")  # type: ignore[arg-type]
    name, made = choose_decoder(loaded, decoder, scheme, head=head, release=is_own, invariant=invariant)
    return Opened(name, made, tokenizer, _ends(loaded, tokenizer))


def packed_folder(packed_cache: bool | str | Path) -> Path | None:
    """Where packed weights are kept, if they are.

    Raises:
        ArgumentError: BW201 if it is neither a directory nor true or false.
    """
    if isinstance(packed_cache, bool):
        return read_settings().cache / "packed" if packed_cache else None
    if not isinstance(packed_cache, str | Path) or not str(packed_cache):
        what = f"packed_cache is {packed_cache!r}"
        raise ArgumentError("BW201", what, suggestion="accepted: True, False, or a directory")
    return Path(packed_cache)


def _load(model: PreTrainedModel | str | Path, tokenizer: Tokenizer | None) -> tuple[PreTrainedModel, Tokenizer | None]:
    """The model, and a tokenizer if there is one that fits it."""
    if isinstance(model, str | Path):
        directory = resolve_model(model)
        if tokenizer is None and has_tokenizer(directory):
            return load_with_tokenizer(directory)
        model = load(directory)
    elif not isinstance(model, hf.PreTrainedModel):
        what = f"model is a {type(model).__name__}"
        raise ArgumentError("BW201", what, suggestion="accepted: a directory, an id, or what bitwright.load gives")
    elif tokenizer is None and model.name_or_path:
        directory = Path(model.name_or_path)
        tokenizer = load_tokenizer(directory) if has_vocabulary(directory) else None
    if tokenizer is not None:
        check_vocabulary(model, tokenizer)
    return model, tokenizer


def _ends(model: Any, tokenizer: Tokenizer | None) -> frozenset[int]:
    end = None if tokenizer is None else tokenizer.eos_token_id
    return frozenset(end_tokens(model) | ({end} if isinstance(end, int) else set()))


def _check_name(decoder: str) -> None:
    if decoder not in DECODERS:
        raise ArgumentError("BW201", f"decoder is {decoder!r}", suggestion=f"accepted: {', '.join(DECODERS)}")


def _check_kinds(tokenizer: object, invariant: object) -> None:
    if tokenizer is not None and not hasattr(tokenizer, "get_vocab"):
        what = f"tokenizer is a {type(tokenizer).__name__}"
        raise ArgumentError("BW201", what, suggestion="accepted: a tokenizer of transformers")
    if type(invariant) is not bool:
        raise ArgumentError("BW201", f"invariant is {invariant!r}", suggestion="True or False")


def choose_decoder(
    model: PreTrainedModel,
    name: str,
    scheme: KVScheme,
    *,
    head: LayerScheme | None,
    release: bool,
    invariant: bool = False,
) -> tuple[str, Decoder]:
    """The decoder called ``name``, or for ``auto`` the first that runs the model: its name, and itself.

    Args:
        scheme: of the cache that it is to read.
        head: how the output head is to be stored, which the native decoder alone can choose.
        release: whether the decoder may take the weights from the model.
        invariant: whether answers must not depend on company on a GPU either, which costs speed there.

    Raises:
        ArgumentError: BW201 if there is no such decoder, or it does not run the model.
    """
    _check_name(name)
    reasons = {
        "native": _refuse_native(model, scheme),
        "cuda": _refuse_cuda(model, scheme, head),
        "torch": _refuse_torch(model, scheme, head),
    }
    wanted = [each for each in reasons if name in ("auto", each)]
    chosen = next((each for each in wanted if reasons[each] is None), None)
    if chosen is None:
        what = f"the engine cannot run this: {reasons[wanted[-1]]}"
        why = f"the native decoder: {reasons['native']}" if name == "auto" else ""
        raise ArgumentError("BW201", what, why=why, suggestion="bitwright.generate runs every model")
    if chosen == "native":
        return chosen, NativeDecoder(model, head=head, release=release)
    if chosen == "cuda":
        return chosen, CudaDecoder(model, release=release, invariant=invariant)
    on_cpu = torch.device(model.device).type == "cpu"
    if name == "auto" and on_cpu and native_library.missing() is None:
        what = f"the native decoder does not run this model: {reasons['native']}; the slower one in torch does"
        warnings.warn(what, Notice, stacklevel=3)
    return chosen, TorchDecoder(model, exact=True if invariant else None)


def _refuse_native(model: PreTrainedModel, scheme: KVScheme) -> str | None:
    reason = decoder_native.refuse(model)
    return reason or _of_cache(scheme, decoder_native.refuse_cache(scheme, read_shape(model).head_dim))


def _refuse_cuda(model: PreTrainedModel, scheme: KVScheme, head: LayerScheme | None) -> str | None:
    return decoder_cuda.refuse(model) or decoder_cuda.refuse_cache(scheme) or _refuse_torch(model, scheme, head)


def _refuse_torch(model: PreTrainedModel, scheme: KVScheme, head: LayerScheme | None) -> str | None:
    reason = decoder_torch.refuse(model)
    reason = reason or _of_cache(scheme, refuse_scheme(scheme, read_shape(model).head_dim))
    return reason or (None if head is None else "head: the native decoder alone rounds the output head")


def _of_cache(scheme: KVScheme, reason: str | None) -> str | None:
    return None if reason is None else f"kv_cache {scheme.name!r}: {reason}"


def _memory(device: torch.device) -> tuple[int, int]:
    """Bytes that a cache may take where it lies, and one part in how many it takes unless told otherwise.

    A GPU is there for the engine: its memory may be filled, but for a headroom.
    """
    return (machine_memory()[1], SHARE) if device.type == "cpu" else (library.usable_memory(device), 1)


def page_count(
    decoder: Decoder,
    scheme: KVScheme,
    *,
    cache_tokens: int | None,
    cache_memory: int | None,
    max_batch: int,
    max_length: int,
) -> int:
    """How many pages the cache has.

    Raises:
        ArgumentError: BW201 if both ``cache_tokens`` and ``cache_memory`` (bytes) are given, or are below a page.
        BitwrightError: BW503 if there is not even the memory for one page.
    """
    if cache_tokens is not None and cache_memory is not None:
        raise ArgumentError("BW201", "both cache_tokens and cache_memory are given", suggestion="one of them")
    page = decoder.new_cache(1, scheme)
    page_bytes, (available, share) = page.bytes(), _memory(page.keys[0].device)
    if cache_tokens is not None:
        name, given, least, pages = "cache_tokens", cache_tokens, str(PAGE), cache_tokens // PAGE
    else:
        given = available // share if cache_memory is None else cache_memory
        name, least, pages = "cache_memory", f"{page_bytes} bytes", given // page_bytes
        if cache_memory is None:
            pages = min(pages, max_batch * -(-max_length // PAGE))
    if pages < 1:
        raise ArgumentError("BW201", f"{name} is {given}", suggestion=f"at least {least}, one page")
    if pages * page_bytes > available:
        what = f"a cache of {pages * page_bytes} bytes does not fit the memory: {available} bytes are available"
        raise BitwrightError("BW503", what, suggestion="a smaller cache, or kv_cache='int8'")
    return pages
