"""The decoder for NVIDIA GPUs: packed layers, fused norms and paged attention in Triton, decoding from CUDA graphs.

A step's numbers go to the GPU in one copy from pinned memory. Steps in which every sequence has one new token are
recorded once for each size of batch and context, padded up to it, and replayed without any work of the processor's.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitwright.core.errors import ArgumentError, Notice
from bitwright.core.kv_codes import has_patterns, rotate_head
from bitwright.core.kv_scheme import KVScheme
from bitwright.kernels.gpu import attention, library
from bitwright.kernels.gpu.attention import AttentionBatch, StoredSide
from bitwright.kernels.gpu.gates import silu_multiply
from bitwright.kernels.gpu.layers import RECORDED, Norm, Product, dense_product, in_tiles, join_rows, packed_product
from bitwright.kernels.gpu.tokens import rms_norm
from bitwright.models.decoder import Step, read_shape, refuse_architecture
from bitwright.models.decoder_rows import Layout, Rows, decode_rows, read_rows, stage, step_rows
from bitwright.models.paged_cache import CacheShape, PagedCache
from bitwright.models.quantized import QuantizedLinear

if TYPE_CHECKING:
    from bitwright.models.hf import PreTrainedModel

__all__ = ["CudaDecoder", "refuse", "refuse_cache"]

BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # that graphs are recorded for; larger ones run without
LEAST_CONTEXT = 1024  # of a graph; then the powers of two


def refuse(model: PreTrainedModel) -> str | None:
    """Why this decoder cannot run ``model``, or ``None``."""
    reason = library.refuse_device(torch.device(model.device)) or refuse_architecture(model)
    if reason is not None:
        return reason
    config: Any = model.config
    if config.hidden_act not in ("silu", "swish"):
        return f"activations of type {config.hidden_act!r} are not supported, only silu"
    facts = library.describe(torch.device(model.device))
    if model.dtype == torch.bfloat16 and not facts.has_bfloat16:
        return f"{facts.name} has no bfloat16: load the model in float16"
    return None


def refuse_cache(scheme: KVScheme) -> str | None:
    """Why a cache of this scheme cannot be read here, or ``None``."""
    codes = [code for each in (scheme, *scheme.overrides.values()) for code in (each.key, each.value)]
    return next((f"{code.name}: {reason}" for code in codes if (reason := attention.refuse_code(code))), None)


@dataclass(frozen=True, slots=True)
class _Block:
    """One block: its products, norms, and the norms of queries and keys where it has them."""

    first_norm: Norm
    attend: Product
    output: Product
    second_norm: Norm
    gates: Product
    down: Product
    q_norm: Norm | None
    k_norm: Norm | None


@dataclass(slots=True)
class _Recording:
    """A graph, the numbers that it reads, and the logits that it writes; ``copied``: the event after which ``host`` may
    be written again."""

    layout: Layout
    host: Tensor
    device: Tensor
    graph: torch.cuda.CUDAGraph
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    copied: Any = None


class CudaDecoder:
    """Runs steps with the weights of ``model`` on its GPU, in its dtype.

    Args:
        graphs: whether to record and replay steps of single tokens; without a CUDA device nothing is recorded, nor is
            where a layer has no kernel of the GPU's: plain torch looks at its numbers, which no graph can hold.
        invariant: add in an order that does not depend on the batch: a row's logits are then the same in any company,
            bit for bit. Slower for prompts (every product has tiles of one row's launch, or of 64 rows), and for a few
            sequences of long contexts. ``BITWRIGHT_INVARIANT`` does the same.
        release: whether the weights may be taken from the model, which then no longer runs.

    Raises:
        ArgumentError: BW201 if :func:`refuse` says why it cannot run the model.
    """

    def __init__(
        self, model: PreTrainedModel, *, graphs: bool = True, invariant: bool = False, release: bool = False
    ) -> None:
        reason = refuse(model)
        if reason is not None:
            what = f"the model cannot be decoded on a GPU: {reason}"
            raise ArgumentError("BW201", what, suggestion="bitwright.generate runs every model")
        self.shape, self.device = read_shape(model), torch.device(model.device)
        self.graphs, self.invariant = graphs and self.device.type == "cuda", invariant or library.is_invariant()
        inner: Any = model.model
        self._weight_bytes = 0
        self._embedding: Tensor = inner.embed_tokens.weight.detach()
        self._dtype = self._embedding.dtype
        self._frequencies = self.shape.inverse_frequencies.to(self.device)
        self._blocks = [self._read_block(layer, release=release) for layer in inner.layers]
        self._norm = self._read_norm(inner.norm)
        whole: Any = model
        self._head = self._read_product([whole.get_output_embeddings()])
        if not self.shape.tied:
            self._weight_bytes += self._embedding.nbytes
        packed = (module for module in model.modules() if isinstance(module, QuantizedLinear))
        self._can_record = all(layer.kernel in RECORDED for layer in packed)
        self._recordings: dict[tuple[int, int], _Recording] = {}
        self._recorded: Callable[[], PagedCache | None] = lambda: None
        self._stream: torch.cuda.Stream | None = None  # of all recordings: the vendor's products keep room for each

    def _read_block(self, layer: Any, *, release: bool) -> _Block:
        own = layer.self_attn
        found = _Block(
            first_norm=self._read_norm(layer.input_layernorm),
            attend=self._read_product([own.q_proj, own.k_proj, own.v_proj]),
            output=self._read_product([own.o_proj]),
            second_norm=self._read_norm(layer.post_attention_layernorm),
            gates=self._read_product([layer.mlp.gate_proj, layer.mlp.up_proj]),
            down=self._read_product([layer.mlp.down_proj]),
            q_norm=self._read_norm(own.q_norm) if self.shape.qk_norm else None,
            k_norm=self._read_norm(own.k_norm) if self.shape.qk_norm else None,
        )
        if release:
            for module in (own.q_proj, own.k_proj, own.v_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
                module.to("meta")
        return found

    def _read_norm(self, norm: Any) -> Norm:
        self._weight_bytes += norm.weight.nbytes
        return Norm(norm.weight.detach(), float(norm.variance_epsilon))

    def _read_product(self, layers: list[Any]) -> Product:
        """Layers that read one input, as one product where their weights are of one kind."""
        sizes = tuple(layer.out_features for layer in layers)
        biases = [layer.bias for layer in layers]
        bias = None
        if any(each is not None for each in biases):
            zeros = [self._embedding.new_zeros(size) for size in sizes]
            wide = [zero if each is None else each.detach() for zero, each in zip(zeros, biases, strict=True)]
            bias = wide[0] if len(wide) == 1 else torch.cat(wide)
        if all(isinstance(layer, nn.Linear) for layer in layers):
            weights = [layer.weight.detach() for layer in layers]
            weight = weights[0] if len(weights) == 1 else torch.cat(weights)
            self._weight_bytes += weight.nbytes
            return dense_product(weight, bias, sizes, invariant=self.invariant)
        if all(isinstance(layer, QuantizedLinear) and layer.input_scale is None for layer in layers):
            found = self._read_packed(layers, bias, sizes)
            if found is not None:
                return found
        products = [self._apart(layer) for layer in layers]

        def run(x: Tensor) -> Tensor:
            return torch.cat([each(x) for each in products], dim=-1)

        def run_normed(x: Tensor, norm: Norm, residual: Tensor | None) -> tuple[Tensor, Tensor]:
            y, total = rms_norm(x, norm.weight, norm.epsilon, residual)
            return run(y), total

        return Product(sizes, run, run_normed)

    def _read_packed(
        self, layers: list[QuantizedLinear], bias: Tensor | None, sizes: tuple[int, ...]
    ) -> Product | None:
        first = layers[0]
        weight = first.packed
        if len(layers) > 1:
            joined = join_rows([layer.unpack() for layer in layers])
            if joined is None or any(layer.scheme != first.scheme for layer in layers):
                return None
            weight = first.kernel.pack(joined, first.scheme)
        self._weight_bytes += sum(tensor.nbytes for tensor in weight.tensors.values())
        return packed_product(first.kernel, weight, bias, sizes, invariant=self.invariant)

    def _apart(self, layer: Any) -> Callable[[Tensor], Tensor]:
        tensors = (*layer.parameters(), *layer.buffers())
        self._weight_bytes += sum(tensor.nbytes for tensor in tensors)
        return (lambda x: in_tiles(layer, x)) if self.invariant else layer.forward

    def new_cache(self, page_count: int, scheme: KVScheme | None = None) -> PagedCache:
        """Room for ``page_count`` pages; see :class:`bitwright.models.decoder.Decoder`.

        Raises:
            ArgumentError: BW201 if :func:`refuse_cache` says why the scheme cannot be read.
        """
        reason = None if scheme is None else refuse_cache(scheme)
        if reason is not None:
            what = f"the GPU decoder cannot read this cache: {reason}"
            raise ArgumentError("BW201", what, suggestion="int8 or int4, or the decoder in torch")
        own = KVScheme() if scheme is None else scheme
        codes = [code for each in (own, *own.overrides.values()) for code in (each.key, each.value)]
        if any(has_patterns(code, self.shape.head_dim) for code in codes):
            what = (
                f"{own.name}: on a GPU the offsets of heads of {self.shape.head_dim} numbers have no patterns of signs"
            )
            warnings.warn(what, Notice, stacklevel=2)
        shape = CacheShape(
            layers=self.shape.layers, kv_heads=self.shape.kv_heads, head_dim=self.shape.head_dim, dtype=self._dtype
        )
        return PagedCache(shape, page_count, scheme, self.device)

    def weight_bytes(self) -> int:
        """How much memory the weights take."""
        return self._weight_bytes

    @torch.no_grad()
    def forward(self, step: Step, cache: PagedCache) -> Tensor:
        """Logits of the rows ``step.outputs``, float32 ``[m, vocabulary]`` on the CPU.

        Raises:
            torch.OutOfMemoryError: if the GPU's memory does not hold the activations; the cache may then hold a part of
                the step, which the same step writes again.
        """
        logits = self.forward_there(step, cache)
        # Into pinned memory, which they reach several times as fast; widened where they are.
        return torch.empty(logits.shape, dtype=torch.float32, pin_memory=logits.is_cuda).copy_(logits)

    def free_memory(self) -> None:
        """Give up what can be made again: recorded graphs, and what the allocator keeps."""
        self._recordings.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def forward_there(self, step: Step, cache: PagedCache) -> Tensor:
        """As :meth:`forward`, left on the GPU in the model's dtype, and valid until the next step."""
        with library.on(self.device):
            return self._step(step, cache)

    def _step(self, step: Step, cache: PagedCache) -> Tensor:
        sequences = len(step.lengths)
        is_decoding = len(step.tokens) == sequences and len(step.outputs) == sequences
        if (self.graphs and self._can_record) and (is_decoding and sequences <= BATCHES[-1]):
            return self._replay(step, cache)
        has_units = library.describe(self.device).capability >= library.PROGRAMMED and self._dtype != torch.float32
        few = self.invariant or not has_units  # without matrix units, blocks of many queries would spill registers
        rows = step_rows(step, self.shape.heads // self.shape.kv_heads, few=few)
        layout, host = stage(rows, pinned=self.device.type == "cuda")
        return self._run(read_rows(layout, host.to(self.device, non_blocking=True)), cache)

    def _replay(self, step: Step, cache: PagedCache) -> Tensor:
        sequences, longest = len(step.lengths), int(step.lengths.max())
        size = next(each for each in BATCHES if each >= sequences)
        context = LEAST_CONTEXT
        while context < longest:
            context *= 2
        rows = decode_rows(step, size, context)
        if self._recorded() is not cache:  # a graph holds the addresses of one cache's pages
            self._recordings.clear()
            self._recorded = weakref.ref(cache)
        key = (size, context)
        if key not in self._recordings:
            self._recordings[key] = self._record(rows, cache)
        recording = self._recordings[key]
        if recording.copied is not None:
            recording.copied.synchronize()  # nobody may have looked at the step before
        stage(rows, pinned=True, into=recording.host)
        recording.device.copy_(recording.host, non_blocking=True)
        recording.copied = torch.cuda.current_stream(self.device).record_event()
        recording.graph.replay()
        return recording.logits[:sequences]

    def _record(self, rows: Rows, cache: PagedCache) -> _Recording:
        """Run a step twice, which compiles what has to be, then record it. Its writes are those of the step itself."""
        layout, host = stage(rows, pinned=True)
        recording = _Recording(layout, host, host.to(self.device), torch.cuda.CUDAGraph())
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._run(read_rows(layout, recording.device), cache)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        pool = next((each.graph.pool() for each in self._recordings.values()), None)
        try:
            # What other threads do with the GPU meanwhile is theirs, and no fault of the recording.
            with torch.cuda.graph(recording.graph, pool, stream, "thread_local"):
                recording.logits = self._run(read_rows(layout, recording.device), cache)
        except RuntimeError as error:  # a recording that was broken off by it may end with another error
            if isinstance(error.__context__, torch.OutOfMemoryError):
                raise error.__context__ from None
            raise
        return recording

    def _run(self, rows: Rows, cache: PagedCache) -> Tensor:
        """All layers: logits in the model's dtype, on the device."""
        hidden = nn.functional.embedding(rows.tokens, self._embedding)
        angles = rows.positions.to(torch.float32)[:, None] * self._frequencies
        turns = (angles.cos() * self.shape.attention_factor, angles.sin() * self.shape.attention_factor)
        batch = AttentionBatch(rows.blocks, rows.starts, rows.lengths, rows.table, rows.block_rows, rows.longest)
        residual: Tensor | None = None
        for number, block in enumerate(self._blocks):
            mixed, hidden, residual = self._attend(number, block, hidden, residual, rows, batch, turns, cache)
            gated, residual = block.gates.run_normed(mixed, block.second_norm, residual)
            hidden = block.down.run(silu_multiply(*torch.split(gated, list(block.gates.sizes), dim=-1)))
        assert residual is not None
        if not len(rows.outputs):
            return hidden.new_empty(0, self.shape.vocabulary)
        ends, kept = hidden[rows.outputs.long()], residual[rows.outputs.long()]
        return self._head.run_normed(ends, self._norm, kept)[0]

    def _attend(self, number: int, block: _Block, hidden: Tensor, residual: Tensor | None, rows: Rows,
                batch: AttentionBatch, turns: tuple[Tensor, Tensor],
                cache: PagedCache) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The first half of a block: what attention adds, and the sum so far."""
        shape, own = self.shape, cache.scheme.at(number)
        joined, total = block.attend.run_normed(hidden, block.first_norm, residual)
        q, k, v = (
            part.reshape(*part.shape[:-1], -1, shape.head_dim)
            for part in torch.split(joined, list(block.attend.sizes), dim=-1)
        )
        if block.q_norm is not None and block.k_norm is not None:
            q = rms_norm(q.contiguous(), block.q_norm.weight, block.q_norm.epsilon)[0]
            k = rms_norm(k.contiguous(), block.k_norm.weight, block.k_norm.epsilon)[0]
        q = attention.turn(q, turns)
        angles: tuple[Tensor, Tensor] | None = turns
        if own.key.rotated:
            q, k, angles = self._rotated(q), self._rotated(attention.turn(k, turns)), None
        v = self._rotated(v) if own.value.rotated else v
        keys, values = _sides(cache, number)
        attention.append(k, v, rows.pages, rows.offsets, keys, values, angles)
        mixed = attention.attend(q, keys, values, batch, window=shape.windows[number], invariant=self.invariant)
        mixed = self._rotated(mixed) if own.value.rotated else mixed
        return block.output.run(mixed.flatten(1)), hidden, total

    def _rotated(self, x: Tensor) -> Tensor:
        """Heads times the orthonormal Hadamard matrix, which undoes itself; contiguous, same dtype."""
        matrix, heads = _rotation(x.shape[-1], x.device), x.to(torch.float32).flatten(0, 1)
        rotated = in_tiles(lambda tile: tile @ matrix, heads) if self.invariant else heads @ matrix
        return rotated.view(x.shape).to(x.dtype)


def _sides(cache: PagedCache, layer: int) -> tuple[StoredSide, StoredSide]:
    own = cache.scheme.at(layer)
    key = cache.keys[layer] if own.key.is_float else cache.key_codes[layer]
    value = cache.values[layer] if own.value.is_float else cache.value_codes[layer]
    return (
        attention.stored_side(own.key, key, cache.key_scale[layer]),
        attention.stored_side(own.value, value, cache.value_scale[layer]),
    )


@cache
def _rotation(head_dim: int, device: torch.device) -> Tensor:
    """The matrix that ``core.kv_codes`` rotates heads with, on the device once: a graph cannot record its copying."""
    return rotate_head(torch.eye(head_dim)).to(device)
