"""What calibration notes of the inputs of layers: who shares a site, what was never reached, when to stop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from bitwright.quantization.statistics import NonFiniteActivations, SiteStatistics, collect_statistics


class Mixture(nn.Module):
    """Two experts behind a router that reads the sign of the first number; each token goes to one of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.ended = 0

    def forward(self, hidden: Tensor) -> Tensor:
        result = torch.zeros_like(hidden)
        for expert, chosen in enumerate((hidden[:, 0] < 0, hidden[:, 0] >= 0)):
            if chosen.any():
                tokens = hidden[chosen]
                result[chosen] = self.gate[expert](tokens) * self.up[expert](tokens)
        self.ended += 1
        return result


def observe(
    model: nn.Module, samples: list[Tensor], **options: int
) -> tuple[dict[str, SiteStatistics], tuple[object, ...]]:
    layers: dict[str, nn.Module] = {
        name: child for name, child in model.named_modules() if isinstance(child, nn.Linear)
    }
    forwards: list[Callable[[], object]] = [partial(model, sample) for sample in samples]
    found = collect_statistics(layers, forwards, with_gram=True, **options)
    return dict(found.statistics), found.sites


def test_experts_have_the_statistics_of_their_own_tokens() -> None:
    torch.manual_seed(1)
    samples = [torch.randn(20, 4) for _ in range(3)]
    statistics, sites = observe(Mixture(), samples)
    tokens = torch.cat(samples)
    for expert, mine in enumerate((tokens[tokens[:, 0] < 0], tokens[tokens[:, 0] >= 0])):
        entry = statistics[f"gate.{expert}"]
        assert entry is statistics[f"up.{expert}"] and entry.tokens == len(mine) and entry.gram is not None
        torch.testing.assert_close(entry.gram, mine.T @ mine)
    assert set(sites) == {("gate.0", "up.0"), ("gate.1", "up.1")}


def test_an_expert_that_no_token_reached_is_left_out() -> None:
    statistics, sites = observe(Mixture(), [torch.randn(20, 4).abs()])
    assert set(statistics) == {"gate.1", "up.1"} and sites == (("gate.1", "up.1"),)


def test_no_tokens_are_no_statistics() -> None:
    entry = SiteStatistics(4, with_gram=True)
    entry.add(torch.empty(2, 0, 4))
    assert entry.tokens == 0 and entry.gram is not None and entry.gram.shape == (4, 4)


def test_later_forwards_end_once_everything_is_read() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    ended: list[int] = []
    model.register_forward_hook(lambda *_: ended.append(1))
    torch.manual_seed(0)
    samples = [torch.randn(5, 4) for _ in range(6)]
    whole, sites = observe(model, samples)
    assert len(ended) == 6
    short, short_sites = observe(model, samples, complete=2)
    assert len(ended) == 8 and sites == short_sites
    for name, entry in whole.items():
        assert torch.equal(entry.gram, short[name].gram)  # type: ignore[arg-type]


def test_a_mixture_ends_only_where_every_expert_was_reached() -> None:
    model = Mixture()
    low, high = -torch.ones(3, 4), torch.ones(3, 4)
    statistics, _ = observe(model, [torch.cat([low, high]), low, high, torch.cat([low, high])], complete=0)
    assert model.ended == 2 and statistics["up.0"].tokens == statistics["up.1"].tokens == 9


def test_the_sample_and_the_layer_of_a_number_that_is_not_finite_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    bad = torch.zeros(3, 4)
    bad[1, 2] = float("nan")
    for value in (float("nan"), float("inf"), float("-inf")):
        bad[1, 2] = value
        with pytest.raises(NonFiniteActivations, match=r"sample 1 .* input of 0") as failure:
            observe(model, [torch.zeros(3, 4), bad])
        assert failure.value.position == 1


def test_sums_of_great_numbers_do_not_make_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    statistics, _ = observe(model, [torch.full((300, 4), 1e37)])
    assert torch.isfinite(statistics["0"].largest).all()


class Accumulating(nn.Module):
    """Two layers that read one tensor, which is changed in place between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden += self.first(hidden)
        hidden += self.second(hidden)
        return hidden


@torch.no_grad()
def test_what_is_changed_in_place_is_another_input() -> None:
    torch.manual_seed(0)
    model, sample = Accumulating(), torch.randn(20, 4)
    statistics, sites = observe(model, [sample])
    between = sample + model.first(sample)
    assert sites == (("first",), ("second",))
    torch.testing.assert_close(statistics["first"].gram, sample.T @ sample)
    torch.testing.assert_close(statistics["second"].gram, between.T @ between)


@torch.inference_mode()
def test_tensors_without_versions_are_read_too() -> None:
    assert observe(Accumulating(), [torch.randn(20, 4)])[0]["first"].tokens == 20
