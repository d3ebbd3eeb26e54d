"""The keys and values of one layer as they are stored, and as the queries of one step see them.

Tokens that are coded lie in sealed blocks of about ``BLOCK``, of whole groups, and one that still grows, so that
appending copies little and no byte is reserved that holds no token. Sinks and the newest tokens of schemes with a
window are kept as they came.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from bitwright.core.errors import ArgumentError
from bitwright.core.kv_codes import Coded, StaticParameters, decode_kv, encode_kv, join, refuse_head, rotate_head
from bitwright.core.kv_scheme import KVCode, KVScheme, float_tokens

__all__ = ["BLOCK", "SIDES", "LayerParameters", "LayerStore", "Piece", "Side", "View"]

BLOCK = 512  # tokens; a step of attention decodes so many at a time
Side = Literal["key", "value"]
SIDES: tuple[Side, Side] = ("key", "value")
LayerParameters = dict[Side, StaticParameters]


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of tokens that is read at once.

    Attributes:
        start: its first column, among those that the mask knows.
        stored: its numbers, by side; plain ones if not ``coded``.
        seen: by which queries: ``always`` by all; ``coded``, ``float``: by those for which these tokens are coded, or
            are still float. Tokens that are coded in the midst of a step are there twice.
    """

    start: int
    stored: dict[Side, Coded]
    is_coded: bool
    seen: Literal["always", "coded", "float"] = "always"

    @property
    def tokens(self) -> int:
        return self.stored["key"].tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What the queries of one step see.

    Attributes:
        pieces: in the order of their columns.
        limits: of each query, the first column that is not coded for it (int64 ``[queries]``).
        codes: of coded pieces, by side.
        shape: batch, heads, columns.
        widths: of a head, by side.
        parameters: of calibrated codes.
        dtype: that the model computes with.
        counts_columns: whether the place of a token decides how it is stored: padding would count.
        is_sliding: whether a query may not see the first columns, padding or not.
    """

    pieces: tuple[Piece, ...]
    limits: Tensor
    codes: dict[Side, KVCode]
    shape: tuple[int, int, int]
    widths: dict[Side, int]
    parameters: LayerParameters
    dtype: torch.dtype
    counts_columns: bool = False
    is_sliding: bool = False

    def numbers(self, piece: Piece, side: Side, *, turned: bool = False) -> Tensor:
        """The keys or values of a piece, float32 ``[batch, heads, tokens, head_dim]``.

        With ``turned``, those of a rotated scheme are rotated.
        """
        stored, code = piece.stored[side], self.codes[side]
        if piece.is_coded:
            return decode_kv(stored, code, self.widths[side], self.parameters.get(side), keep_rotated=turned)
        numbers = stored.codes.to(torch.float32)
        return rotate_head(numbers) if turned and code.rotated else numbers

    def whole(self, side: Side) -> Tensor:
        """All keys or values as the last query sees them, in the model's dtype."""
        last = [piece for piece in self.pieces if piece.seen != "float"]
        return torch.cat([self.numbers(piece, side).to(self.dtype) for piece in last], dim=2)

    def hidden(self, piece: Piece) -> Tensor | None:
        """Which tokens of a piece are not there for which query, bool ``[queries, tokens]``; ``None`` if all are."""
        if piece.seen == "always":
            return None
        columns = torch.arange(piece.start, piece.start + piece.tokens, device=self.limits.device)
        is_coded = columns[None, :] < self.limits[:, None]
        return ~is_coded if piece.seen == "coded" else is_coded


@dataclass(slots=True)
class _Run:
    """Coded keys, or values: sealed blocks of ``size`` tokens, whole groups, and the one that grows."""

    code: KVCode
    size: int
    blocks: list[Coded] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(block.tokens for block in self.blocks)

    def append(self, coded: Coded) -> None:
        if self.blocks and self.blocks[-1].tokens < self.size:
            coded = join([self.blocks.pop(), coded])
        while coded.tokens > self.size:
            self.blocks.append(coded.span(0, self.size, self.group))
            coded = coded.span(self.size, coded.tokens, self.group)
        self.blocks.append(coded)

    def keep(self, tokens: int) -> None:
        """Forget all but the first ``tokens``."""
        excess = self.tokens - tokens
        while excess > 0:
            last = self.blocks.pop()
            if last.tokens > excess:
                self.blocks.append(last.span(0, last.tokens - excess, self.group))
            excess -= last.tokens

    @property
    def group(self) -> int:
        return self.code.group if self.code.grain == "channel" else 1


class LayerStore:
    """What one layer keeps, for a batch of sequences of one length.

    Args:
        scheme: of this layer.
        parameters: of calibrated codes.
        sliding: how far back a query looks, where the layer's attention is limited so; older tokens are dropped.
    """

    def __init__(self, scheme: KVScheme, parameters: LayerParameters, *, sliding: int | None = None) -> None:
        self.scheme, self.parameters, self.sliding = scheme, parameters, sliding
        self.codes: dict[Side, KVCode] = {"key": scheme.key, "value": scheme.value}
        self.block = max(BLOCK // scheme.step, 1) * scheme.step
        self.forget()

    def forget(self) -> None:
        """Become empty."""
        self.length = 0  # tokens seen, whether they are still here or not
        self.dropped = 0  # of the coded ones, behind a sliding window
        self.runs: dict[Side, _Run] = {side: _Run(self.codes[side], self.block) for side in SIDES}
        self.sinks: dict[Side, Tensor] = {}
        self.recent: dict[Side, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept, calibrated parameters included."""
        runs = sum(block.nbytes for run in self.runs.values() for block in run.blocks)
        plain = sum(tensor.nbytes for part in (self.sinks, self.recent) for tensor in part.values())
        given = [(self.codes[side], parameters) for side, parameters in self.parameters.items()]
        fixed = sum(each.scale.nbytes + (0 if code.symmetric else each.zero_point.nbytes) for code, each in given)
        return runs + plain + fixed

    @property
    def stored(self) -> int:
        """How many tokens are here."""
        return self.length - self.dropped

    def append(self, keys: Tensor, values: Tensor) -> View:
        """Store new tokens (``[batch, heads, tokens, head_dim]``) and return what their queries see.

        Raises:
            ArgumentError: BW202 if heads of this size cannot be stored by the scheme.
            BitwrightError: BW602 for numbers that are not finite.
        """
        new: dict[Side, Tensor] = {"key": keys.detach(), "value": values.detach()}
        if not self.recent:
            self._refuse_heads(new)
            self.recent = {side: tensor[:, :, :0] for side, tensor in new.items()}
            self.sinks = dict(self.recent)
        before, coded = self.length, self._coded
        self.length += keys.shape[2]
        plain = {side: _joined(self.recent[side], new[side]) for side in SIDES}
        self._fill_sinks(plain)
        moved = max(0, self._coded_at(self.length) - coded)
        for side in SIDES:
            if moved:
                chosen = plain[side][:, :, :moved]
                code, parameters = self.codes[side], self.parameters.get(side)
                self.runs[side].append(encode_kv(chosen, code, parameters))
            rest = plain[side][:, :, moved:]
            self.recent[side] = rest.clone() if rest.shape[2] else rest[:, :, :0].clone()
        view = self._view(plain, coded, moved, before, keys)
        self._slide()
        return view

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Select, repeat or reorder sequences: ``change`` acts on the first dimension of everything."""
        for run in self.runs.values():
            run.blocks = [block.each(change) for block in run.blocks]
        self.sinks = {side: change(tensor) for side, tensor in self.sinks.items()}
        self.recent = {side: change(tensor) for side, tensor in self.recent.items()}

    def remove(self, tokens: int) -> None:
        """Forget the last ``tokens``. What stays keeps its codes.

        Raises:
            ArgumentError: BW201 if that would cut a group of tokens with one scale, or needs tokens that have left a
                sliding window.
        """
        if tokens >= self.length:
            self.forget()
            return
        plain = min(tokens, self.recent["key"].shape[2])
        coded = min(tokens - plain, self.runs["key"].tokens)
        if (self.runs["key"].tokens - coded) % self.scheme.step:
            self._refuse(f"{self.scheme.step} tokens share their scales")
        if self.sliding is not None and self.dropped > max(0, self.length - tokens - self.sliding + 1):
            self._refuse(f"{self.dropped} tokens have left the sliding window of {self.sliding}")
        for side in SIDES:
            self.recent[side] = _without_last(self.recent[side], plain)
            self.runs[side].keep(self.runs[side].tokens - coded)
            self.sinks[side] = _without_last(self.sinks[side], tokens - plain - coded)
        self.length -= tokens

    @property
    def _coded(self) -> int:
        """How many tokens have been coded, those that were dropped among them."""
        return self.runs["key"].tokens + self.dropped

    def _coded_at(self, length: int) -> int:
        """How many tokens are coded once there are ``length``."""
        if self.scheme.key.is_float and self.scheme.value.is_float:
            return length
        return length - float_tokens(self.scheme, length)

    def _fill_sinks(self, plain: dict[Side, Tensor]) -> None:
        missing = self.scheme.sinks - self.sinks["key"].shape[2]
        if missing > 0:
            for side in SIDES:
                self.sinks[side] = torch.cat([self.sinks[side], plain[side][:, :, :missing]], dim=2)
                plain[side] = plain[side][:, :, missing:]

    def _view(self, plain: dict[Side, Tensor], coded: int, moved: int, before: int, keys: Tensor) -> View:
        pieces: list[Piece] = []
        sinks, count = self.sinks["key"].shape[2], keys.shape[2]
        start = sinks
        if sinks:
            pieces.append(Piece(0, {side: Coded(self.sinks[side]) for side in SIDES}, is_coded=False))
        old = sinks + coded - self.dropped  # the first column that this step has coded, if any
        is_late = count > 1 and self._is_late
        for key, value in zip(self.runs["key"].blocks, self.runs["value"].blocks, strict=True):
            is_new = is_late and start + key.tokens > old
            pieces.append(Piece(start, {"key": key, "value": value}, True, "coded" if is_new else "always"))
            start += key.tokens
        if is_late and moved:
            both = {side: Coded(plain[side][:, :, :moved]) for side in SIDES}
            pieces.append(Piece(old, both, False, "float"))
        if self.recent["key"].shape[2]:
            pieces.append(Piece(start, {side: Coded(self.recent[side]) for side in SIDES}, is_coded=False))
        ends = range(before + 1, before + count + 1)
        limits = [sinks + max(coded, self._coded_at(end)) - self.dropped for end in ends] if is_late else [start]
        return View(
            pieces=tuple(pieces),
            limits=torch.tensor(limits, device=keys.device),
            codes=self.codes,
            shape=(keys.shape[0], keys.shape[1], self.stored),
            widths={side: plain[side].shape[3] for side in SIDES},
            parameters=self.parameters,
            dtype=keys.dtype,
            counts_columns=self._is_late,
            is_sliding=self.sliding is not None,
        )

    @property
    def _is_late(self) -> bool:
        """Whether tokens may be coded later than they come."""
        return self.scheme.window > 0 or self.scheme.sinks > 0 or self.scheme.step > 1

    def _slide(self) -> None:
        """Drop the blocks that no later query sees."""
        while self.sliding is not None and self.runs["key"].blocks:
            first = self.runs["key"].blocks[0].tokens
            if first < self.block or self.dropped + first > self.length - self.sliding + 1:
                return
            for run in self.runs.values():
                run.blocks.pop(0)
            self.dropped += first

    def _refuse_heads(self, new: dict[Side, Tensor]) -> None:
        for side in SIDES:
            why = refuse_head(self.codes[side], new[side].shape[3])
            if why is not None:
                what = f"{side}s of this model cannot be stored as {self.codes[side].name}"
                raise ArgumentError("BW202", what, why=why, suggestion="int8 and int4 store every head")

    def _refuse(self, why: str) -> None:
        raise ArgumentError("BW201", "the cache cannot be cropped so far", why=why, suggestion="begin a new cache")


def _joined(recent: Tensor, new: Tensor) -> Tensor:
    return torch.cat([recent, new], dim=2) if recent.shape[2] else new


def _without_last(tensor: Tensor, tokens: int) -> Tensor:
    return tensor[:, :, : tensor.shape[2] - tokens].clone() if tokens else tensor
