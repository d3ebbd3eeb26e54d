"""The environment is read when asked, and nothing is remembered."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitwright.core.errors import ArgumentError
from bitwright.core.settings import read_cache_limit, read_settings


def test_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("BITWRIGHT_CACHE", "XDG_CACHE_HOME", "NO_COLOR", "BITWRIGHT_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = read_settings()
    assert settings.cache == tmp_path / ".cache" / "bitwright"
    assert not settings.no_color and not settings.debug
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert read_settings().cache == tmp_path / "xdg" / "bitwright"


def test_values_are_read_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder in ("one", "two"):
        monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path / folder))
        assert read_settings().cache == tmp_path / folder
    for name, field in (("NO_COLOR", "no_color"), ("BITWRIGHT_DEBUG", "debug"), ("BITWRIGHT_INVARIANT", "invariant")):
        monkeypatch.setenv(name, "1")
        assert getattr(read_settings(), field)
        monkeypatch.setenv(name, "")
        assert not getattr(read_settings(), field)


def test_the_limit_of_what_is_kept_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, limit in (("", 4 << 30), ("0", 0), ("0.5", 1 << 29), ("20", 20 << 30)):
        monkeypatch.setenv("BITWRIGHT_CACHE_LIMIT", text)
        assert read_cache_limit() == limit
    monkeypatch.delenv("BITWRIGHT_CACHE_LIMIT")
    assert read_cache_limit() == 4 << 30
    for text in ("-1", "nan", "inf", "4 GB", "all"):
        monkeypatch.setenv("BITWRIGHT_CACHE_LIMIT", text)
        with pytest.raises(ArgumentError, match=r"BW201.*BITWRIGHT_CACHE_LIMIT"):
            read_cache_limit()
