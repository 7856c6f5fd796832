"""Only the known archive is unpacked, and of any other nothing leaves the folder."""

import io
import json
import tarfile

import pytest
from emoji import PICTURES, unpack

from ddpm_hf.data.sources import load_images
from support.scripts import script

EMOJI = [
    {"image": "1.png", "category": "Flags", "skin_variations": {"A": {"image": "1-a.png"}}},
    {"image": "2.png", "category": "Food & Drink"},
]
FILES = {"package/emoji.json": json.dumps(EMOJI).encode(), "package/package.json": b"{}"}
FILES |= {f"{PICTURES}{name}": name.encode() for name in ("1.png", "1-a.png", "2.png", "unknown.png")}


def archive(path, files, links=()):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return path


def test_pictures_by_category(tmp_path):
    assert unpack(archive(tmp_path / "a.tgz", FILES), tmp_path / "data/emoji", any_version=True) == 3
    rows = [json.loads(line) for line in (tmp_path / "data/emoji/metadata.jsonl").read_text().splitlines()]
    expected = [("1-a.png", "Flags"), ("1.png", "Flags"), ("2.png", "Food & Drink")]
    assert [tuple(row.values()) for row in rows] == expected
    assert (tmp_path / "data/emoji/2.png").read_bytes() == b"2.png"
    assert load_images(str(tmp_path / "data/emoji"))["category"] == ["Flags", "Flags", "Food & Drink"]
    with pytest.raises(FileExistsError, match="emoji is there already; remove it"):
        unpack(tmp_path / "a.tgz", tmp_path / "data/emoji")


def test_another_archive_is_refused(tmp_path):
    refused = script("emoji.py", archive(tmp_path / "a.tgz", FILES), tmp_path / "emoji", check=False)
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert "is not version 16.0.0 of emoji-datasource-google: its sha256 is" in refused.stderr
    assert "or --any_version if you trust it" in refused.stderr and not (tmp_path / "emoji").exists()
    done = script("emoji.py", tmp_path / "a.tgz", tmp_path / "emoji", "--any_version")
    assert done.stdout == f"3 pictures in {tmp_path / 'emoji'}\n"


def of(name):
    """Files of an archive whose index calls a picture so."""
    index = json.dumps([{"image": name, "category": "x"}]).encode()
    return {"package/emoji.json": index, PICTURES + name: b"stolen"}


@pytest.mark.parametrize(
    "files, links",
    [
        (of("../../../../outside.png"), []),
        (of("a/b.png"), []),
        (of("..png"), []),
        (of("/etc/x.png"), []),
        (of("metadata.jsonl"), []),
        ({"package/emoji.json": of("1.png")["package/emoji.json"]}, [(PICTURES + "1.png", "/etc/hostname")]),
        ({}, [("package/emoji.json", "/etc/hostname")]),
        ({"package/package.json": b"{}"}, []),
        *(
            ({"package/emoji.json": text}, [])
            for text in (b"", b"[", b"{}x", b"[1]", b'[{"image": []}]', b"null", b"[" * 10**5)
        ),
        ({"package/emoji.json": b'[{"image": "a", "category": 1, "skin_variations": [1]}]'}, []),
        ({"package/emoji.json": b" " * (2**24 + 1)}, []),
    ],
)
def test_malformed_archives(tmp_path, files, links):
    """One line, and nothing is written."""
    path = archive(tmp_path / "a.tgz", files, links)
    with pytest.raises(ValueError, match="a.tgz is damaged, or not an archive of emoji-datasource-google: "):
        unpack(path, tmp_path / "in/emoji", any_version=True)
    assert {p.name for p in tmp_path.rglob("*")} == {"a.tgz", "in"}


def test_torn_archives(tmp_path):
    whole = archive(tmp_path / "a.tgz", FILES).read_bytes()
    for content in (b"", b"no archive", whole[:100], whole[: len(whole) // 2], whole[:60] + b"xxxx" + whole[64:]):
        (tmp_path / "a.tgz").write_bytes(content)
        with pytest.raises((ValueError, OSError)):
            unpack(tmp_path / "a.tgz", tmp_path / "emoji", any_version=True)
        assert [path.name for path in tmp_path.iterdir()] == ["a.tgz"]
