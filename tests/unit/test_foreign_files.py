"""Files of somebody else's: pipes, devices, links out of the folder, JSON that is none."""

import os
from pathlib import Path

import pytest

from launchers.imported_conf import copy_files, rest_files, tokenizer_files
from msa_train.config.text import excerpt
from msa_train.foreign_files import member, open_regular, parse_json, read_json, read_limited


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    cases = {
        tmp_path / "pipe": "is a pipe, not a regular file",
        tmp_path / "link": "is a pipe, not a regular file",
        Path("/dev/zero"): "is a device, not a regular file",
        tmp_path: "Is a directory",
        tmp_path / "none": "No such file or directory",
    }
    for path, reason in cases.items():
        with pytest.raises(OSError, match="") as caught:
            open_regular(path)
        assert caught.value.strerror == reason
    (tmp_path / "text").write_text("12345")
    assert read_limited(tmp_path / "text", 5) == b"12345"
    with pytest.raises(OSError, match="has more than 4 bytes"):
        read_limited(tmp_path / "text", 4)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"9" * 5000, "is not JSON"),
        (b"\xff\xfe", "it is not UTF-8"),
        (b'{"a": 1, "b": 2, "a": 1}', "a is there twice"),
        (b'{"x": [{"a": 1, "a": 1}]}', "a is there twice"),
        (b"[NaN]", "NaN is not a number"),
        (b"-Infinity", "-Infinity is not a number"),
        (b'"\x1b"', "control character"),
    ],
)
def test_json_that_is_none(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_json(content)
    assert str(caught.value).startswith("is not JSON")
    assert str(caught.value).isprintable()


def test_json_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path, "config.json", 100) == {"a": 1}
    with pytest.raises(
        ValueError, match=rf"^{tmp_path}/config.json: cannot be read \(has more than 5 bytes\); "
    ):
        read_json(tmp_path, "config.json", 5)


def test_members_of_a_folder_and_of_a_hub_cache(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    model = tmp_path / "hub/models--a--b"
    folder = model / "snapshots/0123"
    folder.mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "blobs/abc").write_text("blob")
    (model / "blobs/out").symlink_to(tmp_path / "secret")
    (folder / "plain").write_text("plain")
    for name, target in {
        "blob": "../../blobs/abc",
        "same": "plain",
        "near": "../../../../secret",
        "far": "/etc/passwd",
        "twice": "../../blobs/out",
        "refs": "../../refs",
    }.items():
        (folder / name).symlink_to(target)
    (model / "refs").write_text("main")
    (tmp_path / "other").symlink_to(folder)
    for place in (folder, tmp_path / "other"):
        assert {name: member(place, name).read_text() for name in ("plain", "blob", "same")} == {
            "plain": "plain",
            "blob": "blob",
            "same": "plain",
        }
        for name in ("near", "far", "twice", "refs"):
            with pytest.raises(
                ValueError, match=rf"^{place / name}: is a link out of its folder; copy the file"
            ):
                member(place, name)
    # the name alone makes no hub cache of a folder
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/abc").write_text("other")
    (folder / "outer").symlink_to(tmp_path / "blobs/abc")
    with pytest.raises(ValueError, match="is a link out of its folder"):
        member(folder, "outer")
    for name in ("../secret", "/etc/passwd", "..", ".", "", "a\0b", "\x1b[2J"):
        with pytest.raises(ValueError, match="must be a plain name in the folder") as caught:
            member(folder, name)
        assert str(caught.value).isprintable()


def test_nothing_outside_is_copied(tmp_path: Path) -> None:
    """A link that looks like part of a model is refused before anything is written; so are pipes."""
    folder, out = tmp_path / "hf", tmp_path / "out"
    folder.mkdir()
    (tmp_path / "id_rsa").write_text("private")
    for name in ("tokenizer.json", "LICENSE", "README.md", ".hidden", "model.safetensors"):
        (folder / name).write_text(name)
    (folder / "assets").mkdir()
    assert list(tokenizer_files(folder)) == ["tokenizer.json"]
    assert list(rest_files(folder)) == ["LICENSE", "tokenizer.json"]
    # an earlier copy that is a link is replaced, not written through
    out.mkdir()
    (out / "LICENSE").symlink_to(tmp_path / "id_rsa")
    copy_files(rest_files(folder), out)
    assert {path.name: path.read_text() for path in out.iterdir()} == {
        "LICENSE": "LICENSE",
        "tokenizer.json": "tokenizer.json",
    }
    assert (tmp_path / "id_rsa").read_text() == "private"
    for name in ("merges.txt", "chat_template.jinja"):
        (folder / name).symlink_to("../id_rsa")
        for find in (tokenizer_files, rest_files):
            with pytest.raises(ValueError, match=rf"^{folder / name}: is a link out of its folder"):
                find(folder)
        (folder / name).unlink()
    os.mkfifo(folder / "vocab.json")
    for find in (tokenizer_files, rest_files):
        with pytest.raises(
            ValueError, match=r"vocab\.json: cannot be read \(is a pipe, not a regular file\); "
        ):
            find(folder)
    (folder / "vocab.json").unlink()
    (folder / "vocab.json").symlink_to("none")
    with pytest.raises(ValueError, match=r"vocab\.json: cannot be read \(No such file"):
        tokenizer_files(folder)


def test_texts_of_others_in_messages() -> None:
    assert excerpt("a\n b\x1b[2J\u202ec") == r"a b\x1b[2J\u202ec"
    assert excerpt("x" * 200, 10) == "x" * 7 + "..."


def test_links_in_a_circle_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="Too many levels"):
        member(tmp_path, "a")
    with pytest.raises(ValueError, match=r"a: cannot be read \(Too many levels of symbolic links\)"):
        read_json(tmp_path, "a", 100)
