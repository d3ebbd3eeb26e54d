"""Attention on a packed cache, block by block: no step makes all keys or values float at once.

Plain torch, in float32. Scores and sums of rotated schemes are taken in the rotated space: the query is rotated once,
and the sum of rotated values is rotated back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.core.errors import ArgumentError
from bitwright.core.kv_codes import rotate_head
from bitwright.models.kv_storage import Piece, View

__all__ = ["attend", "mix", "scores"]

TILE = 1 << 24  # scores worked on at a time


def attend(
    view: View, query: Tensor, *, mask: Tensor | None, is_causal: bool, scale: float | None, repeats: int
) -> Tensor:
    """``softmax(query keys^T scale + mask) values``: what ``scaled_dot_product_attention`` gives, in its shapes.

    Args:
        query: ``[batch, heads * repeats, queries, width]``.
        mask: bool (true: attend) or float (added), to be broadcast to ``[batch, heads * repeats, queries, columns]``.
        is_causal: query i sees columns up to i.
        repeats: how many query heads share a head of keys.

    The softmax runs along the columns in one pass (Milakov and Gimelshein 2018, algorithm 3). A query that sees nothing
    gets zeros.

    Raises:
        ArgumentError: BW201 for padding, where a token's place decides how it is stored.
    """
    batch, heads, _ = view.shape
    queries = query.shape[2]
    if view.counts_columns and mask is not None:
        own = mask[..., -queries:].diagonal(dim1=-2, dim2=-1)  # whether tokens of this step see themselves
        seen = own if view.is_sliding else torch.cat([own, mask[..., -1:, 0]], dim=-1)
        _refuse_padding(~seen if mask.dtype == torch.bool else seen < torch.finfo(mask.dtype).min / 2)
    turned = _turned(query.to(torch.float32), view, "key") * (query.shape[-1] ** -0.5 if scale is None else scale)
    grouped = turned.view(batch, heads, repeats, queries, -1)
    sums = grouped.new_zeros(*grouped.shape[:-1], view.widths["value"])
    weight = grouped.new_zeros(*grouped.shape[:-1], 1)
    largest = torch.full_like(weight, -torch.inf)
    spread = _spread(mask, view, repeats, queries)
    step = max(1, TILE // (batch * heads * repeats * max(piece.tokens for piece in view.pieces)))
    for piece in view.pieces:
        keys, values = (view.numbers(piece, side, turned=True) for side in ("key", "value"))
        hidden = view.hidden(piece)
        for start in range(0, queries, step):
            rows = slice(start, min(start + step, queries))
            if is_causal and piece.start >= rows.stop:
                continue
            found = _multiply(grouped[:, :, :, rows], keys.transpose(2, 3))
            _hide(found, piece, rows, spread, hidden, is_causal=is_causal)
            peak = torch.maximum(largest[:, :, :, rows], found.amax(-1, keepdim=True))
            safe = torch.where(peak == -torch.inf, 0.0, peak)
            share = (found - safe).exp_()
            fade = (largest[:, :, :, rows] - safe).exp_()
            sums[:, :, :, rows] = sums[:, :, :, rows] * fade + _multiply(share, values)
            weight[:, :, :, rows] = weight[:, :, :, rows] * fade + share.sum(-1, keepdim=True)
            largest[:, :, :, rows] = peak
    sums = sums / torch.where(weight == 0, 1.0, weight)
    return _turned(sums, view, "value").flatten(1, 2).to(query.dtype)


def scores(view: View, query: Tensor, repeats: int) -> Tensor:
    """``query keys^T``, ``[batch, heads * repeats, queries, columns]``, of queries ``[.., queries, width]``."""
    batch, heads, columns = view.shape
    grouped = _turned(query.to(torch.float32), view, "key").view(batch, heads, repeats, query.shape[2], -1)
    found = grouped.new_empty(*grouped.shape[:-1], columns)
    for piece in view.pieces:
        part = _multiply(grouped, view.numbers(piece, "key", turned=True).transpose(2, 3))
        target = found[..., piece.start : piece.start + piece.tokens]
        hidden = view.hidden(piece)
        target.copy_(part if hidden is None or piece.seen == "coded" else torch.where(hidden, target, part))
    return found.flatten(1, 2).to(query.dtype)


def mix(view: View, weights: Tensor, repeats: int) -> Tensor:
    """``weights values``, ``[batch, heads * repeats, queries, width]``, of weights ``[.., queries, columns]``."""
    batch, heads, _ = view.shape
    if view.counts_columns:
        # In no head does the newest token see the first; in a window, a token of this step the one before it.
        new = weights[..., -weights.shape[2] :].diagonal(offset=-1, dim1=-2, dim2=-1)
        is_hidden = ((new if view.is_sliding else weights[..., -1:, 0]) == 0).all(1)
        if weights.dtype == torch.float16:
            # Small weights are zero, too; but only padding, which sees nothing, spreads over what comes after it.
            ahead = weights[:, :, :1, -1:].ne(0).any(1) & (weights.shape[2] > 1)
            is_hidden = is_hidden & ahead[..., 0]
        _refuse_padding(is_hidden)
    grouped = weights.to(torch.float32).view(batch, heads, repeats, weights.shape[2], -1)
    sums = grouped.new_zeros(*grouped.shape[:-1], view.widths["value"])
    for piece in view.pieces:
        part, hidden = grouped[..., piece.start : piece.start + piece.tokens], view.hidden(piece)
        part = part if hidden is None else part.masked_fill(hidden, 0.0)
        sums += _multiply(part, view.numbers(piece, "value", turned=True))
    return _turned(sums, view, "value").flatten(1, 2).to(weights.dtype)


def _refuse_padding(is_hidden: Tensor) -> None:
    """Raises BW201 if some token that should be seen is hidden."""
    if bool(is_hidden.any()):
        what = "prompts of different lengths, padded on the left, in a cache of token groups or windows"
        why = "they would be counted from the padding on, and padding would share scales with tokens"
        raise ArgumentError(
            "BW201", what, why=why, suggestion="prompts one by one; or int4-rotated, which pads do not touch"
        )


def _multiply(grouped: Tensor, matrix: Tensor) -> Tensor:
    """``[batch, heads, repeats, rows, n] @ [batch, heads, n, m]``; one product for all queries that share a head."""
    batch, heads, repeats, rows, _ = grouped.shape
    return (grouped.flatten(2, 3) @ matrix).view(batch, heads, repeats, rows, -1)


def _turned(numbers: Tensor, view: View, side: str) -> Tensor:
    code = view.codes["key" if side == "key" else "value"]
    return rotate_head(numbers) if code.rotated else numbers


def _spread(mask: Tensor | None, view: View, repeats: int, queries: int) -> Tensor | None:
    """The mask as what is added, float32 ``[batch or 1, heads or 1, repeats or 1, queries or 1, columns]``."""
    if mask is None:
        return None
    _, heads, columns = view.shape
    mask = mask.expand(*mask.shape[:-1], columns) if mask.dim() == 4 else mask.expand(1, 1, queries, columns)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)
    mask = mask.to(torch.float32)
    if mask.shape[1] == 1:
        return mask.unsqueeze(2)
    return mask.view(mask.shape[0], heads, repeats, mask.shape[2], columns)


def _hide(
    found: Tensor, piece: Piece, rows: slice, mask: Tensor | None, hidden: Tensor | None, *, is_causal: bool
) -> None:
    """Take out of the scores ``found`` (of the queries ``rows``) what they do not see of ``piece``."""
    columns = slice(piece.start, piece.start + piece.tokens)
    if mask is not None:
        found += mask[..., rows if mask.shape[3] > 1 else slice(None), columns]
    if hidden is not None:
        found.masked_fill_(hidden[rows], -torch.inf)
    if is_causal:
        column = torch.arange(columns.start, columns.stop, device=found.device)
        row = torch.arange(rows.start, rows.stop, device=found.device)
        found.masked_fill_(column[None, :] > row[:, None], -torch.inf)
