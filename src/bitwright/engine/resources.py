"""What an engine is made of: the decoder that runs the model, and how much memory its cache may take."""

from __future__ import annotations

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.kv_scheme import KVScheme
from bitwright.core.memory import machine_memory
from bitwright.models import decoder_torch
from bitwright.models.decoder import Decoder
from bitwright.models.decoder_torch import TorchDecoder
from bitwright.models.hf import PreTrainedModel
from bitwright.models.paged_cache import PAGE

__all__ = ["DECODERS", "choose_decoder", "page_count"]

DECODERS = ("auto", "native", "torch")
SHARE = 4  # the cache takes at most one part in so many of the available memory, unless told otherwise


def choose_decoder(model: PreTrainedModel, name: str) -> tuple[str, Decoder, str | None]:
    """The decoder called ``name``, or the fastest that accepts the model: its name, itself, why no faster one.

    Raises:
        ArgumentError: BW201 if there is no such decoder, or it does not run the model.
    """
    if name not in DECODERS:
        raise ArgumentError("BW201", f"decoder is {name!r}", suggestion=f"accepted: {', '.join(DECODERS)}")
    reason = decoder_torch.refuse(model)
    if reason is not None:
        raise ArgumentError(
            "BW201", f"the engine cannot run the model: {reason}", suggestion="bitwright.generate runs every model"
        )
    return "torch", TorchDecoder(model), None


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
    page_bytes = decoder.new_cache(1, scheme).bytes()
    if cache_tokens is not None:
        least, given, pages = PAGE, cache_tokens, cache_tokens // PAGE
        name, unit = "cache_tokens", ""
    else:
        available = machine_memory()[1]
        least, given = page_bytes, available // SHARE if cache_memory is None else cache_memory
        pages, name, unit = given // page_bytes, "cache_memory", " bytes"
        if cache_memory is None:
            pages = min(pages, max_batch * -(-max_length // PAGE))
        if pages * page_bytes > available:
            what = f"a cache of {given} bytes does not fit the memory: {available} bytes are available"
            raise BitwrightError("BW503", what, suggestion="less cache_memory, or kv_cache='int8'")
    if pages < 1:
        raise ArgumentError("BW201", f"{name} is {given}", suggestion=f"at least {least}{unit}, one page")
    return pages
