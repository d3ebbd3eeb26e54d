"""Tables of quality put together from several runs: no row is lost or doubled, no interval is of other rows."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks.quality import merge
from benchmarks.quality_runs.tables import apart, compare, ratio, schemes_by_storage

Record = dict[str, Any]


def row(peer: str, method: str, divergences: list[float] | None, kl: float = 1.0) -> Record:
    mean = kl if divergences is None else sum(divergences) / len(divergences)
    found = {"scheme": "w4g128-asym", "stored": "w4-asym", "peer": peer, "method": method, "family": "gptq", "kl": mean}
    found |= {"kl_ci": [0.9 * mean, 1.1 * mean]}
    return found if divergences is None else found | {"kl_windows": divergences}


def model(name: str, *rows: Record, samples: int = 128) -> Record:
    return {"name": name, "seqlen": 512, "samples": samples, "texts": "a text", "rows": list(rows)}


def test_a_ratio_draws_the_same_windows_for_both() -> None:
    theirs = [1.0, 5.0, 2.0, 9.0]
    found = ratio(row("bitwright", "gptq", [value / 2 for value in theirs]), row("peer", "gptq", theirs))
    assert found == pytest.approx((0.5, 0.5, 0.5))


def test_without_windows_the_interval_holds_both() -> None:
    ours, theirs = row("bitwright", "gptq", None, 0.5), row("peer", "gptq", None, 1.0)
    value, low, high = apart(ours, theirs)
    assert value == 0.5
    assert low == pytest.approx(0.5 * math.exp(-math.hypot(*[math.log(1.1 / 0.9) / 2] * 2)))
    assert value / low == pytest.approx(high / value)


def test_an_earlier_interval_stands_for_its_own_rows_alone() -> None:
    rows = row("bitwright", "gptq", None, 0.5), row("peer", "gptq", None, 1.0)
    first = compare([model("demo", *rows)], [])
    assert [found["family"] for found in first] == [None, "gptq"] and not first[0]["paired"]
    earlier = [found | {"ratio": [0.5, 0.49, 0.51], "paired": True} for found in first]
    again = compare([model("demo", *rows)], earlier)
    assert all(found["paired"] and found["ratio"] == [0.5, 0.49, 0.51] for found in again)
    other = compare([model("demo", row("bitwright", "gptq", None, 0.6), rows[1])], earlier)
    assert not any(found["paired"] for found in other)
    unpaired = compare([model("demo", *rows)], [found | {"paired": False} for found in earlier])
    assert not any(found["paired"] for found in unpaired)


def test_a_run_adds_to_an_earlier_table() -> None:
    kept, old = row("peer", "gptq", None), row("bitwright", "gptq", None, 2.0)
    new, added = row("bitwright", "gptq", [1.0]), row("bitwright", "rtn", [3.0])
    merged = merge([model("demo", kept, old), model("stories260K", kept)], [model("demo", new, added)])
    assert [record["name"] for record in merged] == ["demo", "stories260K"]
    assert merged[0]["rows"] == [kept, new, added] and merged[1]["rows"] == [kept]
    assert merge([], [model("demo", new)]) == [model("demo", new)]


def test_other_calibration_tokens_are_another_table() -> None:
    with pytest.raises(ValueError, match="samples is 64, and 128 in the earlier table"):
        merge([model("demo")], [model("demo", samples=64)])


def test_schemes_that_are_stored_alike_are_one() -> None:
    ours, theirs = row("bitwright", "gptq", [1.0]), row("peer", "gptq", [2.0]) | {"scheme": "w4g32-asym"}
    assert schemes_by_storage(model("demo", ours, theirs)) == {"w4-asym": ["w4g128-asym", "w4g32-asym"]}
    told = model("demo", ours, theirs) | {
        "stored": {"w4g128-asym": "w4-asym", "w4-asym": "w4-asym", "w8-asym": "w8-asym"}
    }
    assert schemes_by_storage(told) == {"w8-asym": ["w8-asym"], "w4-asym": ["w4-asym", "w4g128-asym"]}
    found = compare([told], [])
    assert [one["scheme"] for one in found] == ["w4-asym, w4g128-asym"] * 2 and found[0]["ratio"][0] == 0.5
    merged = merge([model("demo", ours)], [model("demo", row("bitwright", "gptq", [3.0]) | {"scheme": "w4g32-asym"})])
    assert [one["kl"] for one in merged[0]["rows"]] == [3.0]
