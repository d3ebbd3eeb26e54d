"""The names with which Qwen's documentation loads a quantized model and talks to it.

``AutoModelForCausalLM`` and ``AutoTokenizer`` stand for those of transformers; a model has ``chat`` and
``chat_stream``.

Example:
    >>> from bitwright.compat.qwen import AutoModelForCausalLM, AutoTokenizer
    >>> tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2-0.5B-Instruct-GPTQ-Int4")
    >>> model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2-0.5B-Instruct-GPTQ-Int4", device_map="auto").eval()
    >>> response, history = model.chat(tokenizer, "Hi", history=None)
"""

from __future__ import annotations

from bitwright.compat.qwen.cache import QwenCache, dequantize_cache_torch, layer_past, quantize_cache_v
from bitwright.compat.qwen.conversation import chat, chat_stream
from bitwright.compat.qwen.loading import AutoModelForCausalLM, AutoTokenizer

__all__ = [
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "QwenCache",
    "chat",
    "chat_stream",
    "dequantize_cache_torch",
    "layer_past",
    "quantize_cache_v",
]
