"""What every decoder must hold: it computes what transformers computes, and a row depends on its text alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitwright.core.kv_scheme import parse_kv
from bitwright.models.decoder import Decoder, Step
from bitwright.models.paged_cache import PAGE, PagedCache

__all__ = [
    "Piece",
    "Text",
    "agrees_with_transformers",
    "does_not_depend_on_chunks",
    "does_not_depend_on_company",
    "does_not_depend_on_pages",
    "gives_no_logits",
    "random_text",
    "run",
]


@dataclass
class Text:
    """A sequence: its tokens, the pages it lies in, and how many of its tokens are in them."""

    tokens: list[int]
    pages: list[int]
    done: int = 0


@dataclass(frozen=True)
class Piece:
    """``count`` more tokens of a text."""

    text: Text
    count: int


def random_text(length: int, vocabulary: int, pages: list[int], seed: int = 0) -> Text:
    generator = torch.Generator().manual_seed(seed)
    return Text(torch.randint(1, vocabulary, (length,), generator=generator).tolist(), pages)


def run(decoder: Decoder, cache: PagedCache, pieces: list[Piece]) -> list[Tensor]:
    """One step; the logits ``[count, vocabulary]`` of each piece."""
    step = _step(pieces, outputs=True)
    logits = decoder.forward(step, cache)
    assert logits.dtype == torch.float32 and logits.shape == (len(step.tokens), decoder.shape.vocabulary)
    return list(torch.split(logits, [piece.count for piece in pieces]))


def _step(pieces: list[Piece], *, outputs: bool) -> Step:
    tokens, positions, starts, lengths = [], [], [0], []
    most = max(len(piece.text.pages) for piece in pieces)
    pages = torch.zeros(len(pieces), most, dtype=torch.int32)
    for row, piece in enumerate(pieces):
        text, end = piece.text, piece.text.done + piece.count
        assert piece.count > 0 and end <= min(len(text.tokens), PAGE * len(text.pages))
        tokens += text.tokens[text.done : end]
        positions += range(text.done, end)
        starts.append(len(tokens))
        lengths.append(end)
        pages[row, : len(text.pages)] = torch.tensor(text.pages, dtype=torch.int32)
        text.done = end
    return Step(
        tokens=torch.tensor(tokens, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int32),
        starts=torch.tensor(starts, dtype=torch.int32),
        lengths=torch.tensor(lengths, dtype=torch.int32),
        pages=pages,
        outputs=torch.arange(len(tokens) if outputs else 0, dtype=torch.int32),
    )


def gives_no_logits(decoder: Decoder) -> None:
    """A step may be all pieces of prompts, after which nobody wants logits; what comes later is the same."""
    vocabulary = decoder.shape.vocabulary
    first, again = decoder.new_cache(3), decoder.new_cache(3)
    expected = _in_chunks(decoder, first, random_text(40, vocabulary, [0, 1]), [40])[-1:]
    text = random_text(40, vocabulary, [0, 1])
    step = _step([Piece(text, 39)], outputs=False)
    assert decoder.forward(step, again).shape == (0, vocabulary)
    assert torch.equal(run(decoder, again, [Piece(text, 1)])[0], expected)


def _in_chunks(decoder: Decoder, cache: PagedCache, text: Text, chunks: list[int]) -> Tensor:
    return torch.cat([run(decoder, cache, [Piece(text, count)])[0] for count in chunks])


def agrees_with_transformers(decoder: Decoder, model: PreTrainedModel, tolerance: float, length: int = 75) -> None:
    """A prompt at once, then token by token: both as transformers' own forward of the whole text."""
    text = random_text(length, decoder.shape.vocabulary, [3, 1, 4][: -(-length // PAGE)])
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([text.tokens])).logits[0].float()
    prompt = length - 12
    found = _in_chunks(decoder, decoder.new_cache(5), text, [prompt] + [1] * (length - prompt))
    scale = max(1.0, float(expected.abs().max()))
    error = float((found - expected).abs().max())
    assert error <= tolerance * scale, f"differs by {error:.2e} of {scale:.2e}"


def does_not_depend_on_chunks(decoder: Decoder, kv: str = "none") -> None:
    length = 75
    vocabulary, scheme = decoder.shape.vocabulary, parse_kv(kv)
    first = _in_chunks(decoder, decoder.new_cache(5, scheme), random_text(length, vocabulary, [3, 1, 4]), [length])
    for chunks in ([1] * length, [31, 1, 1, 32, length - 65], [5, 40, length - 45]):
        again = _in_chunks(decoder, decoder.new_cache(5, scheme), random_text(length, vocabulary, [3, 1, 4]), chunks)
        assert torch.equal(first, again), f"other logits in chunks of {chunks}"


@dataclass
class _Company:
    """Texts that run beside each other, each at its own pace, as an engine would have them."""

    texts: list[Text]
    found: list[list[Tensor]] = field(default_factory=list)

    def run(self, decoder: Decoder, cache: PagedCache, paces: list[int]) -> list[Tensor]:
        self.found = [[] for _ in self.texts]
        while any(text.done < len(text.tokens) for text in self.texts):
            members = [number for number, text in enumerate(self.texts) if text.done < len(text.tokens)]
            pieces = [
                Piece(self.texts[i], min(paces[i], len(self.texts[i].tokens) - self.texts[i].done)) for i in members
            ]
            for number, logits in zip(members, run(decoder, cache, pieces), strict=True):
                self.found[number].append(logits)
        return [torch.cat(parts) for parts in self.found]


SIX = ((40, 9), (1, 1), (33, 1), (64, 50), (7, 3), (20, 20))  # lengths of texts, and how many tokens a step has


def does_not_depend_on_company(decoder: Decoder, sizes: tuple[tuple[int, int], ...] = SIX) -> None:
    """Texts of several lengths and paces, each equal to itself alone; and the same again on a second run."""
    vocabulary, lengths, paces = decoder.shape.vocabulary, *map(list, zip(*sizes, strict=True))

    def texts() -> list[Text]:
        return [
            random_text(length, vocabulary, [2 * seed, 2 * seed + 1], seed)
            for seed, length in enumerate(lengths)
        ]  # fmt: skip

    together = _Company(texts()).run(decoder, decoder.new_cache(12), paces)
    again = _Company(texts()).run(decoder, decoder.new_cache(12), paces)
    for number, text in enumerate(texts()):
        alone = _in_chunks(decoder, decoder.new_cache(12), text, [len(text.tokens)])
        assert torch.equal(together[number], alone), f"text {number} is another one in company"
        assert torch.equal(together[number], again[number]), f"text {number} is another one on the second run"


def does_not_depend_on_pages(decoder: Decoder) -> None:
    """Wherever it lies, and whatever lay there before."""
    vocabulary, used = decoder.shape.vocabulary, decoder.new_cache(7)
    for seed in range(3):
        _in_chunks(decoder, used, random_text(64, vocabulary, [2 * seed, 2 * seed + 1], seed + 7), [64])
    first = _in_chunks(decoder, decoder.new_cache(7), random_text(70, vocabulary, [0, 1, 2]), [70])
    again = _in_chunks(decoder, used, random_text(70, vocabulary, [5, 0, 6]), [70])
    assert torch.equal(first, again)
