"""The names with which LMDeploy's document on KV cache INT8 calibrates a model, and what its numbers mean.

Its shell blocks run with ``bitwright`` in the place of ``lmdeploy``: ``bitwright lite calibrate ...`` and ``bitwright
chat turbomind ...``.

Example:
    >>> from bitwright.compat.lmdeploy import calibrate
    >>> calibrate("internlm2-chat-1_8b", calib_dataset="my.txt", calib_samples=32, calib_seqlen=512)
"""

from __future__ import annotations

from bitwright.compat.lmdeploy.commands import calibrate, kv_scheme

__all__ = ["calibrate", "kv_scheme"]
