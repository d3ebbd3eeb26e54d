"""Models whose blocks do not simply follow each other: what calibration block by block would leave out is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bitwright.core.errors import BitwrightError
from bitwright.models.blocks import find_blocks
from bitwright.quantization.capture import ChangedBetweenBlocks, capture, run_block
from bitwright.quantization.session import Prepared, convert, prepare
from tests.quantization.tiny import Plain, PlainBlock

BETWEEN = ["residual", "activation", "in place", "another order", "twice", "left out", "side by side", "two streams"]


class Streamed(PlainBlock):
    """Takes what the block before it made in two places."""

    def forward(self, x: Tensor, stream: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + 0.1 * stream


class Between(Plain):
    """A plain model that does more than to hand the output of each block to the next."""

    def __init__(self, kind: str) -> None:
        super().__init__(32)
        self.kind = kind
        if kind == "two streams":
            self.blocks = nn.ModuleList(Streamed(32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.kind == "side by side":
            return self.head(sum(block(x) for block in self.blocks))
        for block in reversed(self.blocks) if self.kind == "another order" else self.blocks:
            if self.kind == "residual":
                x = x + block(x)
            elif self.kind == "activation":
                x = torch.relu(block(x))
            elif self.kind == "in place":
                x = block(x).mul_(1.5)
            elif self.kind == "two streams":
                x = block(x, stream=x)
            elif self.kind == "twice":
                x = block(block(x))
            elif self.kind != "left out" or block is not self.blocks[1]:
                x = block(x)
        return self.head(x)


def prepared(kind: str, algorithm: str) -> Prepared:
    torch.manual_seed(0)
    made = prepare(Between(kind), scheme="w4g32", algorithm=algorithm)
    with torch.no_grad():
        for _ in range(2):
            made(torch.randn(4, 8))
    return made


@pytest.mark.parametrize("kind", BETWEEN)
def test_what_happens_between_blocks_is_not_left_out_in_silence(kind: str) -> None:
    made = prepared(kind, "gptq")
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    with pytest.raises(BitwrightError, match=r"blocks\.\d is not given just what the block before it made") as caught:
        convert(made)
    assert caught.value.code == "BW313" and isinstance(caught.value, ChangedBetweenBlocks)
    after = made.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", BETWEEN)
def test_without_calibration_it_does_not_matter(kind: str) -> None:
    prepare(Between(kind), scheme="w4g32")
    assert convert(prepared(kind, "rtn"))(torch.randn(2, 8)).shape == (2, 8)


class Parts(nn.Module):
    """Blocks that are no more than dictionaries of layers."""

    def __init__(self) -> None:
        super().__init__()
        names = ("first", "second")
        self.blocks = nn.ModuleList(nn.ModuleDict({name: nn.Linear(8, 8) for name in names}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["second"](torch.relu(block["first"](x)))
        return x


@torch.no_grad()
def test_blocks_that_are_not_run_as_a_whole_are_told() -> None:
    model = Parts()
    with pytest.raises(ChangedBetweenBlocks, match=r"BW313.*blocks\.0 is not run as a whole"):
        capture(model, find_blocks(model), [lambda: model(torch.randn(5, 8))])


class Listed(PlainBlock):
    """Returns a list, as blocks of the first GPT do."""

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        return [super().forward(x)]


@torch.no_grad()
def test_blocks_may_return_lists() -> None:
    torch.manual_seed(0)
    model = Plain(32, blocks=0)
    model.blocks = nn.ModuleList(Listed(32) for _ in range(3))
    seen: list[Tensor] = []

    def through(x: Tensor) -> Tensor:
        x = model.embed(x)
        for block in model.blocks:
            x = block(x)[0]
        seen.append(x)
        return model.head(x)

    given = torch.randn(5, 8)
    through(given)
    captured = capture(model, find_blocks(model), [lambda: through(given)])
    hidden = captured.inputs[0]
    for block, (call,) in zip(model.blocks, captured.calls, strict=True):
        hidden = run_block(block, hidden, call)
    assert torch.equal(hidden, seen[0])


class Two(PlainBlock):
    """Returns something beside its hidden states."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), x.mean()


@pytest.mark.parametrize("is_used", [False, True])
@torch.no_grad()
def test_a_model_that_takes_more_from_its_blocks_is_told_so(is_used: bool) -> None:
    torch.manual_seed(0)
    model = Plain(32, blocks=0)
    model.blocks = nn.ModuleList(Two(32) for _ in range(3))

    def through(x: Tensor) -> Tensor:
        x = model.embed(x)
        for block in model.blocks:
            if is_used:
                x, _ = block(x)
            else:
                x, *_ = block(x)
        return model.head(x)

    if not is_used:
        assert capture(model, find_blocks(model), [lambda: through(torch.randn(5, 8))]).as_tuple
        return
    with pytest.raises(ChangedBetweenBlocks, match=r"BW313.*more from its blocks"):
        capture(model, find_blocks(model), [lambda: through(torch.randn(5, 8))])


class Renamed(PlainBlock):
    """Takes its hidden states by a name of its own, beside a mask that is no float."""

    def forward(self, *, mask: Tensor, states: Tensor) -> Tensor:
        return torch.where(mask, super().forward(states), states)


@torch.no_grad()
def test_hidden_states_may_come_by_any_name() -> None:
    torch.manual_seed(0)
    model = Plain(32, blocks=0)
    model.blocks = nn.ModuleList(Renamed(32) for _ in range(3))
    mask = torch.arange(32) > 3

    def through(x: Tensor) -> Tensor:
        x = model.embed(x)
        for block in model.blocks:
            x = block(mask=mask, states=x)
        return model.head(x)

    given = torch.randn(5, 8)
    captured = capture(model, find_blocks(model), [lambda: through(given)])
    assert torch.equal(captured.inputs[0], model.embed(given))
    assert [call.hidden_keyword for (call,) in captured.calls] == ["states"] * 3


@torch.no_grad()
def test_numbers_that_are_not_finite_are_no_change() -> None:
    model = Plain(32)
    given = torch.full((2, 8), torch.nan)
    assert capture(model, find_blocks(model), [lambda: model(given)]).inputs[0].isnan().all()
