"""The reference decoder: the modules of a loaded model, with rotary positions and paged attention in plain torch.

A matrix product of torch may sum a row in another order when there are more rows, and its vectorized functions round
the last few numbers of a tensor differently. So on a CPU every row is computed in a tile of 16 rows, always in the
place that its position in the text has there, next to whatever rows there are or zeros; and attention goes over whole
pages, one after the other. Each product then has the same sizes every time, and a row's result depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitwright.core.errors import ArgumentError
from bitwright.core.kv_scheme import KVScheme
from bitwright.models.decoder import DecoderShape, Step, read_shape, refuse_architecture
from bitwright.models.paged_cache import PAGE, CacheShape, PagedCache

if TYPE_CHECKING:
    from bitwright.models.hf import PreTrainedModel

__all__ = ["TILE", "TorchDecoder", "refuse"]

TILE = 16  # rows; divides a page, so that the positions of a tile lie in one page
LOWEST = -1e30  # instead of minus infinity, whose differences are not numbers


def refuse(model: PreTrainedModel) -> str | None:
    """Why this decoder cannot run ``model``, or ``None``."""
    return refuse_architecture(model)


class TorchDecoder:
    """Runs steps with the modules of ``model``, on its device and in its dtype; attention is in float32.

    Args:
        exact: whether a row's result is to be the same in any company, bit for bit; if not given, on CPUs it is.
            Without it all rows are computed at once, which is faster.

    Raises:
        ArgumentError: BW201 if :func:`refuse` says why it cannot run the model.
    """

    def __init__(self, model: PreTrainedModel, *, exact: bool | None = None) -> None:
        reason = refuse(model)
        if reason is not None:
            what = f"the model cannot be decoded: {reason}"
            raise ArgumentError("BW201", what, suggestion="bitwright.generate runs every model")
        self.model, self.shape = model, read_shape(model)
        self.device = torch.device(model.device)
        self.exact = self.device.type == "cpu" if exact is None else exact
        self._inner: Any = model.model
        self._dtype: torch.dtype = self._inner.embed_tokens.weight.dtype

    def new_cache(self, page_count: int, scheme: KVScheme | None = None) -> PagedCache:
        """Room for ``page_count`` pages; see :class:`bitwright.models.decoder.Decoder`."""
        shape = CacheShape(
            layers=self.shape.layers, kv_heads=self.shape.kv_heads, head_dim=self.shape.head_dim, dtype=self._dtype
        )
        return PagedCache(shape, page_count, scheme, self.device)

    def weight_bytes(self) -> int:
        """How much memory the weights take, packed layers included."""
        tensors = {id(tensor): tensor for tensor in (*self.model.parameters(), *self.model.buffers())}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    @torch.no_grad()
    def forward(self, step: Step, cache: PagedCache) -> Tensor:
        """Logits of the rows ``step.outputs``, float32 ``[m, vocabulary]`` on the CPU."""
        tiles = _arrange(step.positions, self.exact)
        place = _Place.of(step, self.device)
        turns = self._turns(tiles.scatter(step.positions[:, None].float()))
        embedded = self._inner.embed_tokens(step.tokens.to(self.device))
        hidden = tiles.scatter(embedded)
        for number, layer in enumerate(self._inner.layers):
            parts = [self._project(layer, x, *turn) for x, turn in zip(hidden, turns, strict=True)]
            cache.write(number, place.pages, place.offsets, _encode(cache, number, tiles, parts))
            q = tiles.gather([part[0] for part in parts])
            attend = _attend_exactly if self.exact else _attend_fast
            mixed = attend(q, step, cache, number, self.shape)
            hidden = [self._mix(layer, x, y) for x, y in zip(hidden, tiles.scatter(mixed), strict=True)]
        outputs = step.outputs.long()
        ends = _arrange(step.positions[outputs], self.exact)
        last = ends.scatter(tiles.gather(hidden)[outputs.to(self.device)])
        logits = ends.gather([self.model.lm_head(self._inner.norm(x)) for x in last])
        return logits.to("cpu", torch.float32)

    def _turns(self, positions: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Cosines and sines of each tile's positions, float32 ``[rows, 1, head_dim / 2]``."""
        frequencies, factor = self.shape.inverse_frequencies, self.shape.attention_factor
        angles = [(rows * frequencies)[:, None] for rows in positions]
        return [((x.cos() * factor).to(self.device), (x.sin() * factor).to(self.device)) for x in angles]

    def _project(self, layer: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, turned, float32, and values, ``[rows, heads, head_dim]``."""
        x, attention = layer.input_layernorm(x), layer.self_attn
        split = (x.shape[0], -1, self.shape.head_dim)
        q, k, v = attention.q_proj(x).view(split), attention.k_proj(x).view(split), attention.v_proj(x).view(split)
        if self.shape.qk_norm:
            q, k = attention.q_norm(q), attention.k_norm(k)
        return _rotate(q.float(), cosine, sine), _rotate(k.float(), cosine, sine), v

    def _mix(self, layer: Any, x: Tensor, mixed: Tensor) -> Tensor:
        """The rest of a block, after attention gave ``mixed [rows, heads x head_dim]``."""
        x = x + layer.self_attn.o_proj(mixed.to(x.dtype))
        rest: Tensor = x + layer.mlp(layer.post_attention_layernorm(x))
        return rest


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Which row of which tile each row of a step is computed in."""

    places: Tensor  # int64 [n], into the rows of all tiles
    count: int
    size: int

    def scatter(self, rows: Tensor) -> list[Tensor]:
        """``rows [n, ...]`` as tiles ``[size, ...]``, with zeros where there is none."""
        flat = rows.new_zeros((self.count * self.size, *rows.shape[1:]))
        flat[self.places.to(rows.device)] = rows
        return list(torch.split(flat, self.size))

    def gather(self, tiles: list[Tensor]) -> Tensor:
        """The inverse."""
        flat = torch.cat(tiles)
        return flat[self.places.to(flat.device)]


def _encode(cache: PagedCache, layer: int, tiles: _Tiles, parts: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    """What the cache stores of the keys and values of each row; a rotation, which is a product, in tiles."""
    if cache.is_rotated(layer):
        coded = zip(*[cache.encode(layer, k, v) for _, k, v in parts], strict=True)
        return [tiles.gather(list(part)) for part in coded]
    return cache.encode(layer, tiles.gather([part[1] for part in parts]), tiles.gather([part[2] for part in parts]))


def _arrange(positions: Tensor, exact: bool) -> _Tiles:
    """Each row at its position's place in a tile, in the first tile that has this place free."""
    if not exact:
        return _Tiles(torch.arange(len(positions)), 1, len(positions))
    taken = [0] * TILE
    places = []
    for slot in (positions % TILE).tolist():
        places.append(taken[slot] * TILE + slot)
        taken[slot] += 1
    return _Tiles(torch.tensor(places, dtype=torch.int64), max(taken), TILE)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the keys and values of each row are written, int64 ``[n]``."""

    pages: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, step: Step, device: torch.device) -> _Place:
        counts = (step.starts[1:] - step.starts[:-1]).long()
        sequences = torch.repeat_interleave(torch.arange(len(counts)), counts)
        positions = step.positions.long()
        pages = step.pages[sequences, positions // PAGE].long()
        return cls(pages.to(device), (positions % PAGE).to(device))


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Su et al. 2021, equation 34, in the order of features that transformers uses: halves, not pairs."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def _attend_exactly(q: Tensor, step: Step, cache: PagedCache, layer: int, shape: DecoderShape) -> Tensor:
    """Attention of ``q [n, heads, head_dim]``, tile by tile: float32 ``[n, heads x head_dim]``."""
    group = shape.heads // shape.kv_heads
    mixed = torch.empty_like(q)
    for sequence, start, stop in _same_tiles(step):
        block = int(step.positions[start]) // TILE
        slots = (step.positions[start:stop] % TILE).long().to(q.device)
        tile = q.new_zeros((TILE, shape.heads, shape.head_dim))
        tile[slots] = q[start:stop]
        queries = tile.view(TILE, shape.kv_heads, group, shape.head_dim).permute(1, 2, 0, 3)
        queries = queries.reshape(shape.kv_heads, group * TILE, shape.head_dim) * shape.head_dim**-0.5
        table, length = step.pages[sequence].tolist(), int(step.lengths[sequence])
        out = _attend_pages(queries, table, block, length, cache, layer, shape.windows[layer])
        out = out.view(shape.kv_heads, group, TILE, shape.head_dim).permute(2, 0, 1, 3)
        mixed[start:stop] = out.reshape(TILE, shape.heads, shape.head_dim)[slots]
    return mixed.flatten(1)


def _same_tiles(step: Step) -> Iterator[tuple[int, int, int]]:
    """``(sequence, start, stop)``: rows of one sequence whose positions lie in one tile."""
    starts = step.starts.tolist()
    for sequence, (start, stop) in enumerate(pairwise(starts)):
        while start < stop:
            end = min(stop, start + TILE - int(step.positions[start]) % TILE)
            yield sequence, start, end
            start = end


def _attend_pages(
    queries: Tensor, table: list[int], block: int, length: int, cache: PagedCache, layer: int, window: int
) -> Tensor:
    """Attention of one tile over its context of ``length`` tokens, page after page, with a running maximum.

    Milakov, Gimelshein 2018, algorithm 3. ``queries``: float32 ``[kv_heads, group x TILE, head_dim]``, scaled.
    """
    positions = torch.arange(block * TILE, (block + 1) * TILE, device=queries.device)
    positions = positions.repeat(queries.shape[1] // TILE)[:, None]
    largest = queries.new_full((*queries.shape[:2], 1), LOWEST)
    total = torch.zeros_like(largest)
    mixed = torch.zeros_like(queries)
    last = block * TILE // PAGE
    first = max(0, block * TILE - window + 1) // PAGE if window else 0
    pages = cache.read(layer, table[first : last + 1])
    # Whoever had the page before may have left numbers that are not finite: not even zero times such is nothing.
    pages[1][-1, :, max(0, length - last * PAGE) :] = 0
    for number, keys, values in zip(range(first, last + 1), *pages, strict=True):
        scores = queries @ keys.transpose(1, 2)
        if number == last or window:
            at = torch.arange(number * PAGE, (number + 1) * PAGE, device=queries.device)
            scores.masked_fill_(_hidden(positions, at, window), -torch.inf)
        higher = torch.maximum(largest, scores.amax(-1, keepdim=True))
        weights, decay = (scores - higher).exp(), (largest - higher).exp()
        total = total * decay + weights.sum(-1, keepdim=True)
        mixed = mixed * decay + weights @ values
        largest = higher
    return mixed / total.clamp_min(torch.finfo(torch.float32).tiny)


def _hidden(positions: Tensor, at: Tensor, window: int) -> Tensor:
    """What a query at ``positions [rows, 1]`` does not see of the keys ``at [keys]``: bool ``[rows, keys]``."""
    unseen = at > positions
    return unseen | (at <= positions - window) if window else unseen


def _attend_fast(q: Tensor, step: Step, cache: PagedCache, layer: int, shape: DecoderShape) -> Tensor:
    """As :func:`_attend_exactly`, with one product for the context of each sequence."""
    group = shape.heads // shape.kv_heads
    starts, mixed = step.starts.tolist(), torch.empty_like(q)
    for sequence, (start, stop) in enumerate(pairwise(starts)):
        length = int(step.lengths[sequence])
        table = step.pages[sequence, : -(-length // PAGE)].tolist()
        keys, values = (side.transpose(0, 1).flatten(1, 2)[:, :length] for side in cache.read(layer, table))
        at = torch.arange(length, device=q.device)
        positions = step.positions[start:stop].to(q.device)[:, None]
        queries = q[start:stop].view(stop - start, shape.kv_heads, group, shape.head_dim).permute(1, 2, 0, 3)
        scores = (queries * shape.head_dim**-0.5) @ keys[:, None].transpose(2, 3)
        scores.masked_fill_(_hidden(positions, at, shape.windows[layer]), -torch.inf)
        out = (scores.softmax(-1) @ values[:, None]).permute(2, 0, 1, 3)
        mixed[start:stop] = out.reshape(stop - start, shape.heads, shape.head_dim)
    return mixed.flatten(1)
