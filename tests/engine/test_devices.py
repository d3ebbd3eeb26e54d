"""Which decoder an engine takes by where the model is, and how much of a GPU its cache may fill, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from bitwright import Engine
from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.kv_scheme import parse_kv
from bitwright.engine import resources
from bitwright.engine.resources import choose_decoder, page_count
from bitwright.kernels import native_library
from bitwright.kernels.gpu import library
from bitwright.models import decoder_cuda, decoder_native

PLAIN = parse_kv("none")
GPU = torch.device("cuda", 0)


class FakeCuda:
    """Notes how it was made."""

    def __init__(self, model: Any, **fields: Any) -> None:
        self.model, self.fields = model, fields


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model is taken to lie on a GPU, whose decoder refuses nothing but what caches it cannot read."""
    monkeypatch.setattr(resources, "CudaDecoder", FakeCuda)
    monkeypatch.setattr(decoder_cuda, "refuse", lambda _model: None)
    monkeypatch.setattr(decoder_native, "refuse", lambda _model: "runs on the CPU, not on cuda")
    monkeypatch.setattr(native_library, "_MISSING", "of no use to a model on a GPU, about which nobody is told")


def choose(model: PreTrainedModel, name: str = "auto", kv: str = "none", **fields: Any) -> tuple[str, Any]:
    return choose_decoder(model, name, parse_kv(kv), **{"head": None, "release": False} | fields)


@pytest.mark.usefixtures("with_gpu")
def test_a_model_on_a_gpu_is_run_there(tiny: PreTrainedModel) -> None:
    name, made = choose(tiny, release=True)
    assert name == "cuda" and made.fields == {"release": True, "invariant": False}
    assert choose(tiny, "cuda", invariant=True)[1].fields["invariant"] is True
    assert choose(tiny, "torch")[0] == "torch"
    with pytest.raises(ArgumentError, match="runs on the CPU, not on cuda"):
        choose(tiny, "native")


@pytest.mark.usefixtures("with_gpu")
def test_a_cache_that_the_kernels_do_not_read_is_left_to_torch(tiny: PreTrainedModel) -> None:
    assert choose(tiny, kv="int8")[0] == "cuda" and choose(tiny, kv="int4-g16")[0] == "torch"
    with pytest.raises(ArgumentError, match="several scales for one head"):
        choose(tiny, "cuda", kv="int4-g16")


def test_without_a_gpu_its_decoder_says_so(tiny: PreTrainedModel) -> None:
    assert choose(tiny)[0] != "cuda"
    with pytest.raises(ArgumentError, match="runs on an NVIDIA GPU, not on cpu"):
        choose(tiny, "cuda")
    with pytest.raises(ArgumentError, match="runs on an NVIDIA GPU, not on cpu"):
        Engine("demo:", decoder="cuda")


@pytest.mark.usefixtures("with_gpu")
def test_a_model_given_by_name_is_moved_to_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Any] = []
    monkeypatch.setattr(library, "missing", lambda: None)
    monkeypatch.setattr(PreTrainedModel, "to", lambda self, place: (moved.append(place), self)[1])
    opened = resources.open_model("demo:", None, decoder="cuda", scheme=PLAIN, head=None, invariant=True)
    assert moved == ["cuda"] and opened.name == "cuda"
    assert vars(opened.decoder)["fields"] == {"release": True, "invariant": True}


def test_invariance_reaches_the_torch_decoder(tiny: PreTrainedModel) -> None:
    made = [choose(tiny, "torch", invariant=invariant)[1] for invariant in (False, True)]
    assert made[1].exact is True and made[0].exact is True, "on a CPU it holds anyway"
    with Engine(tiny, invariant=True) as engine:
        assert engine.generate([[1, 2, 3]], max_tokens=2)[0].tokens


def pages(free: int, total: int, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> int:
    """Pages of a megabyte in a cache on a GPU of so many megabytes."""
    monkeypatch.setattr(library, "gpu_memory", lambda device: (free << 20, total << 20) if device == GPU else (0, 0))
    page = SimpleNamespace(bytes=lambda: 1 << 20, keys=[SimpleNamespace(device=GPU)])
    decoder: Any = SimpleNamespace(new_cache=lambda _count, _scheme: page)
    asked = {"cache_tokens": None, "cache_memory": None, "max_batch": 1000, "max_length": 3200} | fields
    return page_count(decoder, PLAIN, **asked)


def test_the_pool_fills_the_gpu_but_for_a_headroom(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pages(600, 1000, monkeypatch) == 600 - int(1000 * library.HEADROOM)
    assert pages(600, 1000, monkeypatch, max_batch=2, max_length=320) == 20, "not more than the requests take"
    assert pages(600, 1000, monkeypatch, cache_memory=100 << 20) == 100
    assert pages(600, 1000, monkeypatch, cache_tokens=520 * 32) == 520
    with pytest.raises(BitwrightError, match="does not fit the memory"):
        pages(600, 1000, monkeypatch, cache_tokens=521 * 32)
    with pytest.raises(ArgumentError, match="at least 1048576 bytes, one page"):
        pages(80, 1000, monkeypatch)
