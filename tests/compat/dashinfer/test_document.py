"""Every instant quantization of DashInfer's document is one of ours: its dictionaries, read from it."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from bitwright.compat.dashinfer import InstantQuantConfig
from bitwright.core.scheme_names import parse

DOCUMENT = Path(__file__).resolve().parents[4] / "shared" / "seeds" / "dashinfer_weight_quantization.rst"
ASSIGNED = re.compile(r"(\w+_quant_config) = (\{.*?\})", flags=re.DOTALL)
SCHEMES = {
    "simpled_a16w8_per_channel_customized_quant_config": "A16W8",
    "simple_a16w8_group128_customized_quant_config": "A16W8g128",
    "simpled_a16w4_customized_quant_config": "A16W4",
    "simpled_a8w8_customized_quant_config": "A8W8",
}


def test_its_dictionaries_mean_our_schemes() -> None:
    if not DOCUMENT.is_file():
        pytest.skip("no document: it is looked for in a folder 'shared/seeds' beside the repository")
    found: dict[str, dict[str, Any]] = {
        name: ast.literal_eval(source) for name, source in ASSIGNED.findall(DOCUMENT.read_text(encoding="utf-8"))
    }
    assert {name: InstantQuantConfig.from_dict(config).scheme for name, config in found.items()} == {
        name: parse(scheme) for name, scheme in SCHEMES.items()
    }
