"""A tied output head that the files hold twice: tied where both are the same, two weights where they differ."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitwright.core.errors import BitwrightError, Notice
from bitwright.models.loading import load
from bitwright.quantization.api import quantize
from bitwright.quantization.sources import DiskSource, MemorySource
from tests.quantization.tiny import file_tensors, rewrite_tensors, save_model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
IDS = torch.arange(12)[None]


def save_both(directory: Path, head: Tensor | None = None) -> Path:
    """A model whose config.json says that it is tied, with a head in its files."""
    model = save_model(directory, "qwen2", tie_word_embeddings=True)
    rewrite_tensors(directory, {HEAD: model.get_input_embeddings().weight.detach() * 2 if head is None else head})
    assert json.loads((directory / "config.json").read_text())["tie_word_embeddings"]
    return directory


def test_a_stored_head_of_other_values_is_used_as_transformers_does(tmp_path: Path) -> None:
    folder = save_both(tmp_path / "model")
    with pytest.warns(Notice, match=f"{HEAD} and {EMBEDDING} are both stored and differ"):
        mine = load(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert reference.lm_head.weight is not reference.model.embed_tokens.weight
    assert torch.equal(mine.get_parameter(HEAD), reference.lm_head.weight)
    assert torch.equal(mine.get_parameter(EMBEDDING), reference.model.embed_tokens.weight)
    assert not mine.config.tie_word_embeddings
    with torch.no_grad():
        assert torch.allclose(mine(IDS).logits, reference(IDS).logits, atol=1e-5)


def test_a_stored_head_of_the_same_bytes_is_tied(tmp_path: Path) -> None:
    model = save_model(tmp_path, "qwen2", tie_word_embeddings=True)
    rewrite_tensors(tmp_path, {HEAD: model.get_input_embeddings().weight.detach().clone()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load(tmp_path)
    assert loaded.get_parameter(HEAD) is loaded.get_parameter(EMBEDDING) and loaded.config.tie_word_embeddings
    assert HEAD not in DiskSource(tmp_path).shapes()


@pytest.mark.parametrize("overrides", [(), ("lm_head=w8",)], ids=["float head", "quantized head"])
def test_a_quantized_checkpoint_holds_both(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    folder = save_both(tmp_path / "model")
    stored = file_tensors(folder)
    with pytest.warns(Notice, match="differ"):
        quantize(folder, tmp_path / "out", scheme="w8g32", overrides=overrides)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = load(tmp_path / "out")  # and nothing to be noticed any more
    assert torch.equal(loaded.get_parameter(EMBEDDING), stored[EMBEDDING])
    with pytest.warns(Notice, match="differ"):
        wanted = load(folder)(IDS).logits
    assert (loaded(IDS).logits - wanted).norm() < 0.05 * wanted.norm()
    if not overrides:
        assert torch.equal(loaded.get_parameter(HEAD), stored[HEAD])


def test_a_module_that_was_loaded_so_is_written_so(tmp_path: Path) -> None:
    source = MemorySource(AutoModelForCausalLM.from_pretrained(save_both(tmp_path)))
    assert source.config["tie_word_embeddings"] is False and HEAD in source.shapes()


def test_a_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_both(tmp_path, head=torch.zeros(7, 32))
    for read in (load, DiskSource):
        with pytest.warns(Notice, match="differ"), pytest.raises(BitwrightError, match=HEAD) as caught:
            read(tmp_path)
        assert caught.value.code == "BW304"
