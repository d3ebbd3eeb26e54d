"""Every wrong option is refused when the request is made, by its name."""

from __future__ import annotations

import math
from typing import Any

import pytest

from bitwright.core.errors import ArgumentError
from bitwright.engine.options import RequestOptions

WRONG: list[tuple[str, Any]] = [
    ("max_tokens", 0), ("max_tokens", 1.5), ("max_tokens", True), ("temperature", math.nan), ("temperature", -0.1),
    ("temperature", math.inf), ("temperature", "hot"), ("temperature", None), ("top_k", -1), ("top_k", 2.0),
    ("top_p", 0), ("top_p", 1.0001), ("top_p", math.nan), ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0),
    ("repetition_penalty", math.inf), ("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("seed", -1),
    ("seed", 1 << 63), ("seed", 1.0), ("logprobs", -1), ("logprobs", 21), ("ignore_end", 1), ("stop", ("",)),
    ("stop", (3,)), ("stop", None), ("stop", ("x",) * 65), ("stop_ids", (1.0,)), ("stop_ids", 5),
    ("logit_bias", {"a": 1.0}), ("logit_bias", {-1: 1.0}), ("logit_bias", {1: math.nan}), ("logit_bias", {1: math.inf}),
    ("logit_bias", [1]), ("temperature", 10**400), ("repetition_penalty", 10**400), ("max_tokens", -(10**5000)),
    ("max_tokens", 10**5000), ("seed", 10**5000), ("stop_ids", (-(10**5000), "a")),
    ("logit_bias", {10**5000: math.nan}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WRONG, ids=[field for field, _ in WRONG])
def test_it_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"BW201.*{field}") as caught:
        RequestOptions(**{field: value})
    assert caught.value.suggestion and len(caught.value.what) < 300


def test_a_field_that_does_not_exist() -> None:
    with pytest.raises(TypeError, match="max_token"):
        RequestOptions(max_token=3)  # type: ignore[call-arg]


def test_what_is_accepted() -> None:
    options = RequestOptions(stop="end", stop_ids=[3], logit_bias={1: -math.inf}, top_p=1, temperature=0, seed=0)
    assert options.stop == ("end",) and options.stop_ids == (3,)
