"""One tiny model for the tests of the engine: random, in float32, fast, and with a vocabulary of 80 tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from bitwright.models.loading import load
from tests.models.architectures import build


@pytest.fixture(scope="session")
def tiny() -> PreTrainedModel:
    model = build("llama", num_hidden_layers=1)
    model.config.eos_token_id = None
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="session")
def demo() -> PreTrainedModel:
    """The embedded model in float32, where near ties are rare, with its own tokenizer."""
    return load("demo:", dtype=torch.float32)
