"""Checksums of a checkpoint's files: written by name, verified on demand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bitwright.core.errors import BitwrightError
from bitwright.formats.checksums import CHECKSUMS, serialize_checksums, verify_files
from bitwright.formats.storage import write_file


def _write(directory: Path) -> dict[str, str]:
    hashes = {name: write_file(directory / name, [name.encode() * 100]) for name in ("b.safetensors", "config.json")}
    write_file(directory / CHECKSUMS, [serialize_checksums(hashes)])
    return hashes


def test_files_as_they_were_written_are_verified(tmp_path: Path) -> None:
    assert verify_files(tmp_path) == ()
    hashes = _write(tmp_path)
    assert verify_files(tmp_path) == ("b.safetensors", "config.json")
    assert serialize_checksums(hashes) == serialize_checksums(dict(reversed(hashes.items())))


def test_a_changed_file_is_named_with_both_hashes(tmp_path: Path) -> None:
    hashes = _write(tmp_path)
    path = tmp_path / "b.safetensors"
    content = bytearray(path.read_bytes())
    content[77] ^= 1
    path.write_bytes(content)
    with pytest.raises(BitwrightError, match=r"(?s)BW314.*b\.safetensors.*" + hashes["b.safetensors"]):
        verify_files(tmp_path)


def test_a_missing_file_and_one_outside_are_refused(tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(BitwrightError, match=r"BW303.*config\.json"):
        verify_files(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(BitwrightError, match=r"BW303.*config\.json"):
        verify_files(tmp_path)
    write_file(tmp_path / CHECKSUMS, [serialize_checksums({"../../etc/passwd": "0" * 64})])
    with pytest.raises(BitwrightError, match="BW310"):
        verify_files(tmp_path)


@pytest.mark.parametrize(
    ("record", "code"),
    [
        ({"version": 2, "sha256": {}}, "BW311"),
        ({"sha256": {}}, "BW311"),
        ({"version": 1}, "BW314"),
        ({"version": 1, "sha256": []}, "BW314"),
        ({"version": 1, "sha256": {"a": "xyz"}}, "BW314"),
        ({"version": 1, "sha256": {"a": None}}, "BW314"),
        ([], "BW314"),
    ],
)
def test_a_list_that_is_not_understood_is_refused(tmp_path: Path, record: object, code: str) -> None:
    (tmp_path / CHECKSUMS).write_text(json.dumps(record))
    with pytest.raises(BitwrightError, match=code):
        verify_files(tmp_path)
