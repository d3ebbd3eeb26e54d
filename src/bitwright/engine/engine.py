"""Many requests at once on one model, each answered as if it were alone."""

from __future__ import annotations

import itertools
import random
import threading
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypedDict, Unpack, overload

from bitwright.core.errors import ArgumentError
from bitwright.core.kv_scheme import KVScheme, parse_kv
from bitwright.core.scheme_names import parse
from bitwright.engine.answer_text import AnswerText
from bitwright.engine.drafting import look_up
from bitwright.engine.handle import Completion, RequestHandle
from bitwright.engine.loop import EngineLoop
from bitwright.engine.options import RequestOptions, check_count, check_number, show
from bitwright.engine.pages import PageAllocator
from bitwright.engine.prompting import Prompt, check_length, check_tokens, encode, room_of
from bitwright.engine.request import Request
from bitwright.engine.resources import open_model, packed_folder, page_count
from bitwright.engine.runner import Runner
from bitwright.engine.sampler import Sampler
from bitwright.engine.scheduler import Scheduler
from bitwright.engine.statistics import Statistics
from bitwright.models.kv_safety import check_safety, safe_for_decoder
from bitwright.models.paged_cache import PAGE

if TYPE_CHECKING:
    from bitwright.models.hf import PreTrainedModel, Tokenizer

__all__ = ["Engine", "RequestFields"]


MOST_GUESSED = 64  # tokens of one request in one step
BEFORE = 32  # last tokens of a prompt, on which the first piece of text can depend


class RequestFields(TypedDict, total=False):
    """The fields of :class:`RequestOptions`, as arguments."""

    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    stop: str | Sequence[str]
    stop_ids: Sequence[int]
    ignore_end: bool
    seed: int | None
    logprobs: int | None


class Engine:
    """Answers many requests at once: continuous batching over a paged, shared cache of keys and values.

    Args:
        model: what :func:`bitwright.load` takes or gives.
        tokenizer: instead of the one in the model's directory; an engine without one takes and gives tokens.
        cache_tokens, cache_memory: the size of the cache, in tokens or in bytes; one of them, or neither for what
            ``max_batch`` requests of full length take, but at most a quarter of the available memory; of a GPU's, all
            but a headroom of 8 percent.
        max_batch: how many requests run at once; others wait.
        max_length: of a prompt and its answer, in tokens; the model's context unless given.
        step_tokens: how many tokens a step computes; long prompts are computed in such pieces.
        kv_cache: how keys and values are stored: ``none`` for as computed, or the name of a scheme.
        kv_safety: in which layers 4 bits or less are unsafe is tried first: ``warn`` names them, ``widen`` takes 8-bit
            codes there, ``off`` does not try.
        reuse: how many tokens of equal beginnings are reused at a time, a multiple of 32; 0 for no reuse.
        reuse_seconds: for how long an unused beginning is kept; as long as there is room unless given.
        speculate: how many tokens at most are guessed from the text itself in a step; answers stay the same.
        decoder: ``native``, ``cuda`` (to which a model given by name is moved), ``torch``, or ``auto`` for the fastest
            that runs the model where it is.
        head: in which scheme the output head is rounded, for instance ``w8``; as it is stored unless given.
        packed_cache: keep the packed weights in a file, which the next start maps instead of packing: a directory, or
            ``True`` for ``packed`` in the directory that ``BITWRIGHT_CACHE`` names. A notice tells of its size.
        invariant: answers on a GPU are the same in any company, too, bit for bit, which costs speed there.

    Raises:
        BitwrightError: BW201 for an argument or a model that no decoder runs, BW202 for ``kv_cache``, BW503 if the
            cache does not fit the memory; what :func:`bitwright.load` raises.

    Example:
        >>> with bitwright.Engine("demo:") as engine:
        ...     answers = engine.generate(["Once upon a time", "The sea is"], max_tokens=20)
        >>> answers[0].text
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        *,
        tokenizer: Tokenizer | None = None,
        cache_tokens: int | None = None,
        cache_memory: int | None = None,
        max_batch: int = 16,
        max_length: int | None = None,
        step_tokens: int = 512,
        kv_cache: str | int | KVScheme = "none",
        kv_safety: str = "warn",
        reuse: int = PAGE,
        reuse_seconds: float | None = None,
        speculate: int = 0,
        decoder: str = "auto",
        head: str | None = None,
        packed_cache: bool | str | Path = False,
        invariant: bool = False,
    ) -> None:
        room = {"cache_tokens": cache_tokens, "cache_memory": cache_memory}
        _check_sizes(max_batch=max_batch, step_tokens=step_tokens, max_length=max_length, **room)
        _check_reuse(reuse, reuse_seconds)
        check_count("speculate", speculate, 0, MOST_GUESSED)
        check_safety(kv_safety)
        scheme = kv_cache if isinstance(kv_cache, KVScheme) else parse_kv(kv_cache)
        head_scheme = None if head is None else parse(head)
        kept = packed_folder(packed_cache)
        opened = open_model(
            model, tokenizer, decoder=decoder, scheme=scheme, head=head_scheme, invariant=invariant, kept=kept
        )
        self.decoder, self.tokenizer, runs = opened.name, opened.tokenizer, opened.decoder
        self.kv_cache = scheme = safe_for_decoder(runs, scheme, kv_safety, self.tokenizer)
        self.max_length = _max_length(max_length, runs.shape.positions)
        self.pages = page_count(runs, scheme, max_batch=max_batch, max_length=self.max_length, **room)
        allocator = PageAllocator(self.pages, reuse=reuse, ttl=reuse_seconds)
        scheduler = Scheduler(
            allocator,
            max_batch=max_batch,
            step_tokens=step_tokens,
            draft=look_up if speculate else None,
            most_drafted=speculate,
        )
        self._vocabulary, self._ends = runs.shape.vocabulary, opened.ends
        self._numbers, self._encoding = itertools.count(1), threading.Lock()
        self._loop = EngineLoop(Runner(runs, runs.new_cache(self.pages, scheme)), allocator, scheduler)
        # Also when the process ends, or nobody holds the engine any more.
        self._finalizer = weakref.finalize(self, self._loop.close)

    def submit(
        self,
        prompt: Prompt,
        options: RequestOptions | None = None,
        *,
        chat: bool = False,
        **fields: Unpack[RequestFields],
    ) -> RequestHandle:
        """Ask, and go on; everything about the request is checked first.

        Args:
            prompt: a text, tokens, or messages with ``role`` and ``content``.
            options: how to answer; or else its fields, as further arguments.
            chat: put a text into the model's chat template, as a message of the user.

        Raises:
            BitwrightError: BW201 for the prompt or a field of the options, BW209 if the engine is closed, BW312
                without a tokenizer, BW403 if prompt and answer do not fit the context or the cache, BW505 if the
                engine has failed.
        """
        self._loop.refuse_if_ended()
        if options is not None and fields:
            what = f"both options and {next(iter(fields))} are given"
            raise ArgumentError("BW201", what, suggestion="one or the other")
        options = RequestOptions(**fields) if options is None else options
        if not isinstance(options, RequestOptions):
            what = f"options is {show(options)}"
            raise ArgumentError("BW201", what, suggestion="a RequestOptions, or its fields as arguments")
        check_length(prompt, self.tokenizer, self.max_length)
        with self._encoding:  # a tokenizer has settings that a call may change for a moment
            tokens = encode(prompt, self.tokenizer, chat=chat)
        check_tokens(tokens, options, self._vocabulary)
        if options.stop and self.tokenizer is None:
            raise ArgumentError("BW201", "stop needs a tokenizer", suggestion="stop_ids, or a tokenizer for the engine")
        request = self._request(tokens, options, room_of(len(tokens), options.max_tokens, self.max_length, self.pages))
        self._loop.add(request)
        return request.handle

    def _request(self, tokens: list[int], options: RequestOptions, limit: int) -> Request:
        seed = random.SystemRandom().getrandbits(63) if options.seed is None else options.seed
        handle = RequestHandle(next(self._numbers), self._cancel)
        return Request(
            handle=handle,
            options=options,
            tokens=list(tokens),
            prompt_length=len(tokens),
            limit=limit,
            seed=seed,
            ends=frozenset(options.stop_ids) | (frozenset() if options.ignore_end else self._ends),
            sampler=Sampler(options, tokens, seed),
            text=AnswerText(self.tokenizer, tokens[-BEFORE:], options.stop),
        )

    def _cancel(self, number: int) -> None:
        """What a handle calls; a handle thus keeps its engine from being closed."""
        self._loop.cancel(number)

    @overload
    def generate(  # type: ignore[overload-overlap]
        self,
        prompts: str,
        options: RequestOptions | None = None,
        *,
        chat: bool = False,
        **fields: Unpack[RequestFields],
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        options: RequestOptions | None = None,
        *,
        chat: bool = False,
        **fields: Unpack[RequestFields],
    ) -> list[Completion]: ...

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        options: RequestOptions | None = None,
        *,
        chat: bool = False,
        **fields: Unpack[RequestFields],
    ) -> Completion | list[Completion]:
        """The answers to all prompts, in their order; to one text, its answer. Arguments and errors as :meth:`submit`.

        If one fails, or the wait is interrupted, the others are cancelled.
        """
        if isinstance(prompts, str):
            return self.generate([prompts], options, chat=chat, **fields)[0]
        handles: list[RequestHandle] = []
        try:
            for prompt in _several(prompts):
                handles.append(self.submit(prompt, options, chat=chat, **fields))
            return [handle.result() for handle in handles]
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise

    def stream(
        self,
        prompt: Prompt,
        options: RequestOptions | None = None,
        *,
        chat: bool = False,
        **fields: Unpack[RequestFields],
    ) -> Iterator[str]:
        """The answer in pieces of whole characters, as they come; leaving early cancels. As :meth:`submit`."""
        pieces = _pieces(self.submit(prompt, options, chat=chat, **fields))
        next(pieces)  # what is begun is called off when it is left, even before its first piece
        return pieces

    async def generate_async(
        self,
        prompts: Sequence[Prompt],
        options: RequestOptions | None = None,
        *,
        chat: bool = False,
        **fields: Unpack[RequestFields],
    ) -> list[Completion]:
        """As :meth:`generate`, for asyncio."""
        handles: list[RequestHandle] = []
        try:
            for prompt in _several(prompts):
                handles.append(self.submit(prompt, options, chat=chat, **fields))
            return [await handle.wait() for handle in handles]
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise

    def stream_async(
        self,
        prompt: Prompt,
        options: RequestOptions | None = None,
        *,
        chat: bool = False,
        **fields: Unpack[RequestFields],
    ) -> AsyncIterator[str]:
        """As :meth:`stream`, for ``async for``."""
        handle = self.submit(prompt, options, chat=chat, **fields)
        pieces = aiter(handle)
        weakref.finalize(pieces, handle.cancel).atexit = False  # also where nobody has begun to read
        return pieces

    def statistics(self) -> Statistics:
        """What the engine has done so far."""
        return self._loop.statistics(self.decoder)

    def close(self) -> None:
        """End every request with BW209, and the engine; once closed, closing does nothing."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _check_sizes(**sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None:
            check_count(name, size, 1, (1 << 63) - 1)


def _max_length(asked: int | None, context: int) -> int:
    if asked is not None and asked > context:
        raise ArgumentError("BW201", f"max_length is {asked}", suggestion=f"at most {context}, the model's context")
    return asked or context


def _check_reuse(reuse: int, seconds: float | None) -> None:
    if check_count("reuse", reuse, 0, (1 << 63) - 1) % PAGE:
        raise ArgumentError("BW201", f"reuse is {reuse}", suggestion=f"accepted: a multiple of {PAGE}, or 0")
    if seconds is not None:
        check_number("reuse_seconds", seconds, lambda x: x >= 0, "a finite number, 0 or more")


def _several(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    is_list = isinstance(prompts, Sequence) and not isinstance(prompts, str | bytes)
    if not is_list or any(isinstance(prompt, int | Mapping) for prompt in prompts):
        what = "the prompts are not a list of prompts"
        raise ArgumentError("BW201", what, suggestion="[prompt] for one")
    return prompts


def _pieces(handle: RequestHandle) -> Iterator[str]:
    try:
        yield ""
        yield from handle
    finally:
        handle.cancel()
