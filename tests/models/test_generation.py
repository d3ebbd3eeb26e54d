"""Generation: greedy as transformers, sampling by the numbers, limits kept, ends seen."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitwright.core.errors import BitwrightError
from bitwright.core.scheme_names import parse
from bitwright.models import generation
from bitwright.models.blocks import is_linear
from bitwright.models.generation import Sampling, generate, generate_tokens
from bitwright.models.hf import PreTrainedModel, load_tokenizer
from bitwright.models.limits import DEFAULT_MAX_TOKENS, room
from bitwright.models.loading import load
from tests.models.checkpoints import ARCHITECTURES, byte_tokenizer, save_float, save_quantized

STORY = (
    ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball. "
    "She wanted to play with it, but it was too high."
)


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """A random model over bytes: its text is mostly broken UTF-8."""
    directory = tmp_path_factory.mktemp("random")
    torch.manual_seed(0)
    save_float(ARCHITECTURES["llama"](), directory)
    byte_tokenizer().save_pretrained(directory)
    return load(directory)


def test_a_trained_model_tells_its_story(shared_models: Path) -> None:
    pieces: list[str] = []
    text = generate(shared_models / "stories260K", "Once upon a time", max_tokens=80, on_text=pieces.append)
    assert text.startswith(STORY)
    assert "".join(pieces) == text
    assert len(pieces) > 50
    assert all(pieces)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "opt"])
def test_greedy_tokens_equal_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    """Also with quantized layers, whose model transformers can run as its own."""
    model = ARCHITECTURES[architecture]().eval()
    names = [name for name, module in model.named_modules() if is_linear(module) and name.count(".") > 2]
    save_quantized(model, tmp_path, dict.fromkeys(names, parse("w4g8")))
    loaded = load(tmp_path)
    loaded.generation_config.eos_token_id = None
    loaded.config.eos_token_id = None
    prompt = [5, 17, 42]
    found = list(generate_tokens(loaded, prompt, limit=20, sampling=Sampling()))
    expected = loaded.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert found == expected[0, 3:].tolist()


def test_the_cache_is_used(random_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[int] = []
    embedding = random_model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _module, inputs, _output: fed.append(inputs[0].shape[1]))
    try:
        list(generate_tokens(random_model, [1, 2, 3, 4], limit=6, sampling=Sampling()))
    finally:
        handle.remove()
    assert fed == [4, 1, 1, 1, 1, 1]


def test_a_quantized_model_generates(tmp_path: Path) -> None:
    model = ARCHITECTURES["qwen2"]().to(torch.bfloat16)
    names = [name for name, module in model.named_modules() if is_linear(module) and name.count(".") > 2]
    save_quantized(model, tmp_path, dict.fromkeys(names, parse("w8a8")))
    byte_tokenizer().save_pretrained(tmp_path)
    assert generate(tmp_path, "Hello", max_tokens=5) == generate(tmp_path, "Hello", max_tokens=5)


def test_no_broken_character_is_ever_shown(random_model: PreTrainedModel) -> None:
    """What is invalid within the text is shown as the decoder does; what is only incomplete never is."""
    for seed in range(8):
        pieces: list[str] = []
        text = generate(random_model, "A", max_tokens=20, temperature=2.0, seed=seed, on_text=pieces.append)
        assert "".join(pieces) == text
        assert not any(piece.endswith("�") for piece in pieces)


def test_equal_seeds_give_equal_texts(random_model: PreTrainedModel) -> None:
    def sample(**options: Any) -> str:
        return generate(random_model, "A", max_tokens=30, **options)

    assert sample(temperature=1.0, seed=7) == sample(temperature=1.0, seed=7)
    texts = {sample(temperature=1.0, seed=seed) for seed in range(5)}
    assert len(texts) == 5
    torch.manual_seed(99)  # the global generator has no say
    assert sample(temperature=1.0, seed=0) in texts
    greedy = sample()
    assert sample(temperature=1e-300, seed=3) == greedy
    assert sample(temperature=1.0, top_p=1e-9, seed=3) == greedy


def draws(sampling: Sampling, logits: Tensor, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(sampling.seed)
    return torch.tensor([sampling.choose(logits, generator) for _ in range(count)]).bincount(minlength=logits.numel())


def test_tokens_are_drawn_by_their_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    counts = draws(Sampling(temperature=1.0), probabilities.log(), 4000)
    spread = (probabilities * (1 - probabilities) * 4000).sqrt()
    assert ((counts - probabilities * 4000).abs() <= 4 * spread).all()
    sharper = draws(Sampling(temperature=0.5), probabilities.log(), 4000)
    squares = probabilities.square() / probabilities.square().sum()
    assert ((sharper - squares * 4000).abs() <= 4 * (squares * (1 - squares) * 4000).sqrt()).all()


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.95, 4), (1.0, 4)])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: int) -> None:
    logits = torch.tensor([0.25, 0.1, 0.5, 0.15], dtype=torch.float64).log()  # best: 2, 0, 3, 1
    counts = draws(Sampling(temperature=1.0, top_p=top_p), logits, 400)
    assert sorted(counts.nonzero().flatten().tolist()) == sorted([2, 0, 3, 1][:kept])


def test_ties_go_to_the_first() -> None:
    generator = torch.Generator()
    assert Sampling().choose(torch.tensor([1.0, 3.0, 3.0]), generator) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_stop_the_run(bad: float, temperature: float) -> None:
    with pytest.raises(BitwrightError, match="BW601"):
        Sampling(temperature=temperature).choose(torch.tensor([0.0, bad]), torch.Generator())


def test_logits_of_minus_infinity_are_never_drawn() -> None:
    logits = torch.tensor([-math.inf, 0.0, -math.inf])
    assert draws(Sampling(temperature=5.0), logits, 50).tolist() == [0, 50, 0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", math.nan), ("temperature", -0.1), ("temperature", math.inf), ("temperature", "1"),
        ("temperature", True), ("top_p", 0), ("top_p", 1.5), ("top_p", math.nan), ("top_p", -1), ("top_p", None),
        ("seed", -1), ("seed", 1.0), ("seed", 1 << 63), ("max_tokens", 0), ("max_tokens", -5), ("max_tokens", 2.0),
        ("max_tokens", True),
    ],
)  # fmt: skip
def test_arguments_are_refused_by_name_before_anything_is_read(field: str, value: Any) -> None:
    with pytest.raises(BitwrightError, match=f"BW201.*{field} is") as caught:
        generate("/no/such/model", "Hello", **{field: value})
    assert caught.value.suggestion


def test_an_empty_prompt_is_refused(random_model: PreTrainedModel) -> None:
    for chat in (False, True):
        with pytest.raises(BitwrightError, match=r"BW201.*empty"):
            generate(random_model, "", chat=chat)


@pytest.mark.parametrize(("length", "wanted", "room"), [(125, 4, "3"), (128, 1, "shorten"), (200, 5, "shorten")])
def test_nothing_is_cut_to_fit_the_context(random_model: PreTrainedModel, length: int, wanted: int, room: str) -> None:
    with pytest.raises(BitwrightError) as caught:
        generate(random_model, "x" * length, max_tokens=wanted)
    assert caught.value.code == "BW403"
    assert str(length) in caught.value.what
    assert "128" in caught.value.what
    assert room in caught.value.suggestion


def test_the_context_can_be_filled_to_the_last_position(random_model: PreTrainedModel) -> None:
    lengths: list[int] = []
    handle = random_model.get_input_embeddings().register_forward_hook(
        lambda _module, inputs, _output: lengths.append(inputs[0].shape[1])
    )
    generate(random_model, "x" * 125, max_tokens=3)
    assert lengths == [125, 1, 1]
    lengths.clear()
    generate(random_model, "x" * 125)  # no number given: what is left, not an error
    handle.remove()
    assert len(lengths) == 3
    with pytest.raises(BitwrightError, match="BW403"):
        generate(random_model, "x" * 128)


def test_the_default_length() -> None:
    assert room(1, None, 128) == 127
    assert room(1, None, 4096) == DEFAULT_MAX_TOKENS == 128
    assert room(1, 4000, 4096) == 4000
    assert room(10**6, None, None) == 128


@pytest.mark.parametrize("where", ["tokenizer", "generation_config", "list", "config"])
def test_it_stops_at_the_end_of_the_text(
    where: str, random_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the settings names the token that ends a text; the token itself is not shown."""
    tokenizer = load_tokenizer(Path(random_model.name_or_path))
    monkeypatch.setattr(random_model.generation_config, "eos_token_id", None)
    monkeypatch.setattr(random_model.config, "eos_token_id", None)
    tokenizer.eos_token = "<|end|>"
    prompt = tokenizer.encode("A")
    plain = list(generate_tokens(random_model, prompt, limit=12, sampling=Sampling(temperature=1.0)))
    end = next(token for index, token in enumerate(plain) if index >= 4 and token not in plain[:index])
    if where == "tokenizer":
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    elif where == "config":
        monkeypatch.setattr(random_model.config, "eos_token_id", end)
    else:
        ends = [1, end] if where == "list" else end
        monkeypatch.setattr(random_model.generation_config, "eos_token_id", ends)
    text = generate(random_model, "A", max_tokens=12, temperature=1.0, tokenizer=tokenizer)
    detokenizer = generation.Detokenizer(tokenizer, prompt)
    before = plain[: plain.index(end)]
    assert text == "".join([detokenizer.add(token) for token in before] + [detokenizer.finish()])


@pytest.mark.parametrize("end", [1.5, "3", True, [1, None], {"a": 1}])
def test_an_end_that_is_no_token_is_refused(
    end: object, random_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random_model.generation_config, "eos_token_id", end)
    with pytest.raises(BitwrightError, match=r"BW307.*eos_token_id") as caught:
        generate(random_model, "A", max_tokens=2)
    assert isinstance(end, dict) or "no token" in caught.value.what


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (TypeError("'float' object is not iterable"), "BW307"),
        (RuntimeError("sizes do not match"), "BW307"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "BW503"),
        (MemoryError(), "BW503"),
        (BitwrightError("BW602", "not finite"), "BW602"),
    ],
    ids=str,
)
def test_a_model_that_fails_while_it_runs_is_an_error_of_the_catalogue(
    failure: Exception, code: str, random_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise failure

    monkeypatch.setattr(random_model, "forward", fail)
    with pytest.raises(BitwrightError, match=code):
        generate(random_model, "A", max_tokens=2)


def test_a_model_in_memory_needs_a_tokenizer() -> None:
    model = ARCHITECTURES["llama"]()
    with pytest.raises(BitwrightError, match="BW312"):
        generate(model, "Hello")
    assert isinstance(generate(model, "Hello", max_tokens=3, tokenizer=byte_tokenizer()), str)


def test_a_tokenizer_of_another_model_is_refused(random_model: PreTrainedModel) -> None:
    with pytest.raises(BitwrightError, match="BW312"):
        generate(random_model, "Hello", tokenizer=byte_tokenizer(extra=100))


def test_an_exception_of_the_listener_ends_the_run(random_model: PreTrainedModel) -> None:
    def listen(_piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(random_model, "A", max_tokens=100, on_text=listen)


def test_the_embedded_model_chats() -> None:
    text = generate("demo:", "Tell me a story.", chat=True, max_tokens=40)
    assert len(text.split()) > 10
    assert "<|" not in text
