"""Files of a model directory: none outside it, no JSON that costs more than its size."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bitwright.core.errors import BitwrightError
from bitwright.formats.directory import find_file, locate_file, read_object


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/etc/passwd",
        "a\\b",
        "C:x",
        "a\0b",
        "a\nb",
        "\x1b[31m",
        "x" * 256,
        "\ud800",
        "\u202ex",
    ],
)
def test_names_that_are_not_plain_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BitwrightError) as caught:
        locate_file(tmp_path, name)
    assert caught.value.code == "BW310" and str(caught.value).replace("\n", "").isprintable()


def test_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "a b-ü.json").write_bytes(b"{}")
    assert find_file(tmp_path, "a b-ü.json") == tmp_path / "a b-ü.json"
    assert find_file(tmp_path, "absent") is None


def test_links_may_point_into_the_directory_but_not_out_of_it(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (tmp_path / "secret").write_bytes(b"{}")
    (model / "real").write_bytes(b"{}")
    (model / "inside").symlink_to("real")
    (model / "chain").symlink_to("inside")
    (model / "out").symlink_to("../secret")
    (model / "absolute").symlink_to(tmp_path / "secret")
    (model / "hop").symlink_to("out")
    (model / "folder").symlink_to(tmp_path)
    (model / "dangling").symlink_to("nothing")
    (model / "loop").symlink_to("loop")
    assert find_file(model, "inside") == model / "inside" and find_file(model, "chain") is not None
    assert find_file(model, "dangling") is None
    for name in ("out", "absolute", "hop", "folder", "loop"):
        with pytest.raises(BitwrightError, match="BW310"):
            find_file(model, name)


def test_a_directory_that_is_itself_a_link_is_no_escape(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_bytes(b"{}")
    (tmp_path / "real" / "b").symlink_to("a")
    (tmp_path / "alias").symlink_to("real")
    assert find_file(tmp_path / "alias", "b") is not None


def test_the_cache_of_the_hub_links_to_blobs_beside_its_snapshots(tmp_path: Path) -> None:
    model = tmp_path / "models--a--b"
    snapshot = model / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "blobs" / "f00d").write_bytes(b"{}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_bytes(b"{}")
    (snapshot / "config.json").symlink_to("../../blobs/f00d")
    (snapshot / "bad").symlink_to("../../refs/main")
    assert find_file(snapshot, "config.json") is not None
    with pytest.raises(BitwrightError, match="BW310"):
        find_file(snapshot, "bad")
    elsewhere = tmp_path / "copy" / "0123"
    elsewhere.mkdir(parents=True)
    (elsewhere / "config.json").symlink_to(model / "blobs" / "f00d")
    with pytest.raises(BitwrightError, match="BW310"):
        find_file(elsewhere, "config.json")


def test_an_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_text('{"a": [1, 2.5, null, Infinity], "ü": {}}', encoding="utf-8")
    assert read_object(tmp_path / "x", code="BW307", limit=100) == {"a": [1, 2.5, None, float("inf")], "ü": {}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "Expecting value"),
        (b"[]", "list"),
        (b"null", "NoneType"),
        (b"{", "Expecting property name"),
        (b"{}x", "Extra data"),
        (b'{"a":1,"a":2}', "'a' occurs twice"),
        (b'{"x":{"a":1,"b":2,"a":2}}', "'a' occurs twice"),
        (b'{"\xff":1}', "utf-8"),
        (b'{"a":' + b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b'{"a":' + b"9" * 5000 + b"}", "digits"),
        (b" " * (1 << 21), "at most"),
    ],
)
def test_what_is_no_object_is_refused_with_the_reason(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(BitwrightError) as caught:
        read_object(tmp_path / "config.json", code="BW307", limit=(1 << 21) - 1)
    assert caught.value.code == "BW307" and words in caught.value.what and "config.json" in caught.value.what
    assert len(str(caught.value)) < 2000


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    for name in ("pipe", "directory", "absent"):
        with pytest.raises(BitwrightError, match=f"BW307.*{name}"):
            read_object(tmp_path / name, code="BW307", limit=100)
