"""The decoder for GPUs, under Triton's interpreter on tiny models: everything but the graphs is what runs there."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitwright.core.errors import ArgumentError, Notice
from bitwright.core.kv_scheme import parse_kv
from bitwright.kernels import reference
from bitwright.kernels.gpu import attention, integer, layers, library, linear
from bitwright.models import decoder_cuda
from bitwright.models.decoder import Step
from bitwright.models.decoder_cuda import CudaDecoder, refuse, refuse_cache
from bitwright.models.decoder_rows import decode_rows, read_rows, stage, step_rows
from bitwright.models.decoder_torch import TorchDecoder
from bitwright.models.quantized import QuantizedLinear
from bitwright.quantization.session import quantize_module
from tests.models import decoder_laws
from tests.models.architectures import build

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    from triton.runtime import interpreter

    from tests.kernels.gpu.interpreting import dot_in_place, teach_bfloat16

    teach_bfloat16()


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU passes for a GPU, whose programs Triton interprets."""
    if not HAS_TRITON:
        pytest.skip("Triton is not installed: pip install 'bitwright[gpu]'")
    monkeypatch.setattr(library, "refuse_device", lambda *_: None)


@pytest.mark.usefixtures("interpreted")
def test_it_computes_what_transformers_does() -> None:
    model = build("llama")
    decoder = CudaDecoder(model)
    decoder_laws.agrees_with_transformers(decoder, model, 1e-5, length=16)
    silent = replace(some_step([1]), outputs=torch.zeros(0, dtype=torch.int32))
    assert decoder.forward(silent, decoder.new_cache(3)).shape == (0, decoder.shape.vocabulary)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("name", "fields"), [
    ("llama", {"tied": True, "attention_bias": True, "mlp_bias": True}), ("llama48", {}),
    ("mistral", {"sliding_window": 40}), ("qwen2", {}), ("qwen3", {}),
])  # fmt: skip
def test_every_architecture(name: str, fields: dict[str, Any]) -> None:
    model = build(name, **fields)
    decoder_laws.agrees_with_transformers(CudaDecoder(model), model, 1e-5, length=75)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kv", ["int8", "int4", "int4-rotated", "k8v4", "fp8", "none/1:int8-sym"])
def test_coded_keys_and_values_are_the_torch_decoders(kv: str) -> None:
    wide = {"head_dim": 64} if kv == "int4-rotated" else {}  # offsets of smaller heads have patterns, not so on a GPU
    model, scheme = build("qwen3", **wide), parse_kv(kv)
    found = []
    for decoder in (CudaDecoder(model), TorchDecoder(model)):
        text = decoder_laws.random_text(45, decoder.shape.vocabulary, [1, 0])
        cache = decoder.new_cache(2, scheme)
        pieces = [decoder_laws.Piece(text, count) for count in (40, 1, 4)]
        found.append(torch.cat([decoder_laws.run(decoder, cache, [piece])[0] for piece in pieces]))
    error = (found[0] - found[1]).abs().max() / found[1].abs().max()
    assert error < (1e-4 if kv != "int4-rotated" else 5e-2)  # the rotation is rounded otherwise, and a code may flip


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("scheme", ["w4g32", "w8a8", "w4g32-asym"])
def test_packed_layers_are_joined_and_run_by_the_gpu_kernels(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = integer.KERNEL if scheme.endswith("a8") else linear.KERNEL
    monkeypatch.setattr("bitwright.models.quantized.select", lambda _spec: chosen)
    model: Any = quantize_module(build("qwen2"), scheme=scheme)
    assert any(isinstance(each, QuantizedLinear) and each.kernel is chosen for each in model.modules())
    with torch.no_grad():
        tokens = torch.randint(0, model.config.vocab_size, (1, 9))
        expected = model(input_ids=tokens).logits[0]
    decoder = CudaDecoder(model, release=True)
    text = decoder_laws.Text(tokens[0].tolist(), [0])
    found = decoder_laws.run(decoder, decoder.new_cache(1), [decoder_laws.Piece(text, 9)])[0]
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert decoder.weight_bytes() > 0


def some_step(lengths: list[int]) -> Step:
    numbers = torch.tensor(lengths, dtype=torch.int32)
    every = torch.arange(len(lengths) + 1, dtype=torch.int32)
    pages = torch.arange(1, 1 + 2 * len(lengths), dtype=torch.int32).view(-1, 2)
    tokens = torch.arange(7, 7 + len(lengths))
    return Step(tokens=tokens, positions=numbers - 1, starts=every, lengths=numbers, pages=pages, outputs=every[:-1])


def test_staged_rows_are_read_back_and_every_part_is_aligned() -> None:
    rows = step_rows(some_step([5, 40, 33]), 4)
    layout, host = stage(rows, pinned=False)
    again = read_rows(layout, host)
    for name in ("tokens", "positions", "pages", "offsets", "starts", "lengths", "table", "blocks", "outputs"):
        assert torch.equal(getattr(again, name), getattr(rows, name)) and getattr(again, name).data_ptr() % 16 == 0
    assert again.pages.tolist() == [1, 4, 6] and again.offsets.tolist() == [4, 7, 0]
    assert (again.block_rows, again.longest) == (16, 40)


def test_the_padding_of_a_graph_is_written_nowhere_and_has_no_context() -> None:
    rows = decode_rows(some_step([5, 40, 33]), 4, 1024)
    assert rows.pages.tolist() == [1, 4, 6, -1] and rows.lengths.tolist() == [5, 40, 33, 0]
    assert rows.table.shape == (4, 32) and rows.table[1, :3].tolist() == [3, 4, 0]
    assert rows.blocks.tolist() == [[0, 0], [1, 0], [2, 0], [3, 0]] and rows.starts.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.usefixtures("interpreted")
def test_padded_steps_give_the_same_logits() -> None:
    model = build("llama")
    decoder = CudaDecoder(model)
    found = []
    for padded in (False, True):
        cache = decoder.new_cache(6)
        step = some_step([1, 1])
        rows = decode_rows(step, 4, 1024) if padded else step_rows(step, 2)
        found.append(decoder._run(read_rows(*stage(rows, pinned=False)), cache)[:2])
        written = [int(tensor.abs().sum((1, 2, 3)).count_nonzero()) for tensor in (*cache.keys, *cache.values)]
        assert set(written) == {2}, "each sequence has one page"
    assert torch.allclose(found[0], found[1], atol=1e-4)


@pytest.mark.usefixtures("interpreted")
def test_a_text_is_the_same_beside_a_long_one_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other text is a prompt (blocks of many rows), with a context that is split and one part that is not."""
    monkeypatch.setattr(attention, "FIXED_SPLIT", 64)
    decoder = CudaDecoder(build("llama", num_hidden_layers=1), invariant=True)
    vocabulary, found = decoder.shape.vocabulary, []
    for company in (False, True):
        cache, first = decoder.new_cache(8), decoder_laws.random_text(9, vocabulary, [7])
        other = decoder_laws.random_text(66, vocabulary, [2, 3, 4], 1)
        decoder_laws.run(decoder, cache, [decoder_laws.Piece(first, 8)])
        more = [decoder_laws.Piece(other, 66)] if company else []
        found.append(decoder_laws.run(decoder, cache, [*more, decoder_laws.Piece(first, 1)])[-1])
    assert torch.equal(found[0], found[1])


@pytest.mark.usefixtures("interpreted")
def test_memory_that_runs_out_in_a_recording_is_told_as_that(
    graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = CudaDecoder(build("llama", num_hidden_layers=1))
    decoder.graphs = True

    @contextmanager
    def recording(graph: FakeGraph, pool: Any, stream: Any, errors: str) -> Iterator[None]:
        try:
            raise torch.OutOfMemoryError("no room")
        finally:
            raise RuntimeError("the recording was broken off")
        yield

    monkeypatch.setattr(decoder_cuda.torch.cuda, "graph", recording)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        decoder.forward(some_step([1]), decoder.new_cache(3))
    assert not decoder._recordings


def test_what_asks_for_invariance_gets_blocks_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "refuse_device", lambda *_: None)
    seen: list[int] = []
    monkeypatch.setattr(
        CudaDecoder, "_run", lambda _self, rows, _cache: seen.append(rows.block_rows) or torch.zeros(1, 2)
    )
    model = build("llama", num_hidden_layers=1).to(torch.float16)
    plain, asked = CudaDecoder(model), CudaDecoder(model, invariant=True)
    monkeypatch.setattr(library, "is_invariant", lambda: True)
    by_variable = CudaDecoder(model)
    assert (plain.invariant, asked.invariant, by_variable.invariant) == (False, True, True)
    monkeypatch.setattr(library, "is_invariant", lambda: False)
    exact = CudaDecoder(build("llama", num_hidden_layers=1))  # float32, which no matrix unit takes
    for decoder in (plain, asked, by_variable, exact):
        text = decoder_laws.random_text(40, decoder.shape.vocabulary, [0, 1])
        decoder.forward(decoder_laws._step([decoder_laws.Piece(text, 40)], outputs=True), decoder.new_cache(2))
    assert seen == [attention.MANY_QUERIES, *[attention.FEW_QUERIES] * 3]


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("scheme", [None, "w4g32", "w4g32-a8"])
def test_answers_do_not_depend_on_company_or_chunks_where_that_is_asked_for(
    scheme: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = integer.KERNEL if scheme == "w4g32-a8" else linear.KERNEL
    monkeypatch.setattr("bitwright.models.quantized.select", lambda _spec: chosen)
    monkeypatch.setattr(attention, "FIXED_SPLIT", 64)
    monkeypatch.setattr(layers, "TILE", 1)  # a processor's products depend on the place of a row in a tile
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_in_place)
    model = build("llama", num_hidden_layers=1)
    decoder = CudaDecoder(model if scheme is None else quantize_module(model, scheme=scheme), invariant=True)
    decoder_laws.does_not_depend_on_company(decoder, ((20, 9), (1, 1), (5, 5)))


def test_dense_products_have_one_size_where_the_order_of_sums_must_not_change() -> None:
    seen: list[tuple[int, ...]] = []

    def run(x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return 2 * x

    for rows in (1, layers.TILE, layers.TILE + 1):
        x = torch.randn(rows, 3)
        assert torch.equal(layers.in_tiles(run, x), 2 * x)
    assert seen == [(layers.TILE, 3)] * 4 and layers.in_tiles(run, torch.empty(0, 3)).shape == (0, 3)


class FakeGraph:
    """Notes the one run that is recorded, and runs it again into the same logits."""

    def __init__(self) -> None:
        self.again: Any = None

    def pool(self) -> str:
        return "pool"

    def replay(self) -> None:
        self.again()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Graphs are recorded by :class:`FakeGraph`; gives the pools that were asked for, and waits for copies."""
    pools: list[Any] = []

    @contextmanager
    def recording(graph: FakeGraph, pool: Any, stream: Any, errors: str) -> Iterator[None]:
        pools.append(pool)
        assert (stream, errors) == (idle, "thread_local")
        run = CudaDecoder._run

        def noted(self: CudaDecoder, rows: Any, cache: Any) -> torch.Tensor:
            logits = run(self, rows, cache)
            graph.again = lambda: logits.copy_(run(self, rows, cache))
            return logits

        with monkeypatch.context() as patched:
            patched.setattr(CudaDecoder, "_run", noted)
            yield

    event = SimpleNamespace(synchronize=lambda: pools.append("copied"))
    idle = SimpleNamespace(wait_stream=lambda _other: None, record_event=lambda: event)
    monkeypatch.setattr(decoder_cuda.torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(decoder_cuda.torch.cuda, "graph", recording)
    monkeypatch.setattr(decoder_cuda.torch.cuda, "Stream", lambda _device: idle)
    monkeypatch.setattr(decoder_cuda.torch.cuda, "current_stream", lambda _device: idle)
    monkeypatch.setattr(decoder_cuda.torch.cuda, "stream", lambda _stream: nullcontext())
    monkeypatch.setattr(decoder_cuda, "stage", lambda rows, pinned, into=None: stage(rows, pinned=False, into=into))
    return pools


@pytest.mark.usefixtures("interpreted")
def test_replayed_steps_give_the_logits_of_steps_that_are_run(graphs: list[Any]) -> None:
    model = build("llama", num_hidden_layers=1)
    plain, recorded = CudaDecoder(model), CudaDecoder(model)
    recorded.graphs = True
    caches = [decoder.new_cache(10) for decoder in (plain, recorded)]
    for lengths in ([1, 1, 1], [2, 2, 2], [1], [3, 3]):
        expected, found = (each.forward(some_step(lengths), cache)
                           for each, cache in zip((plain, recorded), caches, strict=True))  # fmt: skip
        assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)
    assert sorted(recorded._recordings) == [(1, 1024), (2, 1024), (4, 1024)]
    assert graphs == [None, "copied", "pool", "pool"], "only the second step has a copy before it in its buffer"
    again = recorded.new_cache(10)
    recorded.forward(some_step([1]), again)
    assert sorted(recorded._recordings) == [(1, 1024)], "graphs of another cache write to its pages"
    recorded.free_memory()
    assert not recorded._recordings


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kernel", [linear.KERNEL, reference.KERNEL])
def test_steps_with_layers_of_plain_torch_are_not_recorded(
    kernel: Any, graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks at numbers on the way (whether they are finite, say), which breaks a recording off."""
    monkeypatch.setattr("bitwright.models.quantized.select", lambda _spec: kernel)
    model: Any = quantize_module(build("llama", num_hidden_layers=1), scheme="w4g32")
    decoder = CudaDecoder(model, release=True)
    decoder.graphs = True
    logits = decoder.forward(some_step([1]), decoder.new_cache(3))
    assert logits.isfinite().all() and bool(decoder._recordings) == (kernel is linear.KERNEL)


def test_small_heads_whose_offsets_have_no_patterns_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "refuse_device", lambda *_: None)
    decoder = CudaDecoder(build("llama", num_hidden_layers=1))
    assert decoder.shape.head_dim <= 32
    with pytest.warns(Notice, match=r"int4-rotated: on a GPU the offsets of heads of \d+ numbers have no patterns"):
        decoder.new_cache(1, parse_kv("int4-rotated"))
    decoder.new_cache(1, parse_kv("int8-rotated"))  # a warning would be an error
    decoder.shape = replace(decoder.shape, head_dim=64)
    decoder.new_cache(1, parse_kv("int4-rotated"))


def test_what_cannot_run_is_refused() -> None:
    assert refuse(build("llama")) == "runs on an NVIDIA GPU, not on cpu"
    with pytest.raises(ArgumentError, match="cannot be decoded on a GPU"):
        CudaDecoder(build("llama"))
    assert refuse_cache(parse_kv("int8")) is None
    assert refuse_cache(parse_kv("int4-g16")) == "int4-g16: several scales for one head"
