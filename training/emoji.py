"""Unpack Noto emoji into an image folder for train.py: about 3,800 pictures of 64x64 pixels, most of them RGBA.

    npm pack emoji-datasource-google@16.0.0          # or take the archive from the package's page
    python training/emoji.py emoji-datasource-google-16.0.0.tgz data/emoji
    accelerate launch training/train.py --config emoji32

Writes the pictures and metadata.jsonl with their categories ("Food & Drink", ...). A picture with a skin tone has the
category of its emoji. The archive names the licenses of the pictures.
"""

import argparse
import hashlib
import json
import re
import sys
import tarfile
import zlib
from pathlib import Path

from ddpm_hf.files.atomic import replacing_folder

VERSION, SHA256 = "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
PICTURES = "package/img/google/64/"
# the errors of reading a damaged gzipped tar, or JSON of another structure
MALFORMED = (tarfile.TarError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError, RecursionError)
MAX_FILE_BYTES = 2**24  # of one file in the archive: emoji.json has 2 million bytes, a picture a few thousand


def unpack(archive: str, folder: str, any_version: bool = False) -> int:
    """Write the folder completely or not at all, and return the number of pictures.

    Args:
        any_version: whether to accept archives of versions other than `VERSION`. File names and sizes are always checked.

    Raises:
        FileExistsError: the folder exists.
        OSError: the archive cannot be read, or the folder cannot be written.
        ValueError: the archive is damaged, or it has another version or other contents.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; remove it, or choose another folder")
    with open(archive, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256 and not any_version:
        raise ValueError(
            f"{archive} is not version {VERSION} of emoji-datasource-google: its sha256 is {digest}, not {SHA256}; "
            f"get it with npm pack emoji-datasource-google@{VERSION}, or --any_version if you trust it"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(archive) as tar, replacing_folder(folder) as temporary:
            return _unpack(tar, temporary)
    except MALFORMED as error:
        raise ValueError(f"{archive} is damaged, or not an archive of emoji-datasource-google: {error!r}") from error


def _unpack(tar, folder):
    categories = {}
    for emoji in json.loads(_read_member(tar, tar.getmember("package/emoji.json"))):
        for version in (emoji, *emoji.get("skin_variations", {}).values()):
            categories[version["image"]] = str(emoji["category"])
    rows = []
    for member in tar:
        name = member.name.removeprefix(PICTURES)
        if member.name.startswith(PICTURES) and name in categories:
            if not re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z_-]*\.png", name):
                raise ValueError(f"the archive has a picture called {name!r}, which is not a plain name")
            (folder / name).write_bytes(_read_member(tar, member))
            rows.append({"file_name": name, "category": categories[name]})
    lines = "".join(json.dumps(row) + "\n" for row in sorted(rows, key=lambda row: row["file_name"]))
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return len(rows)


def _read_member(tar, member):
    if not member.isfile() or member.size > MAX_FILE_BYTES:  # a link could point outside the archive
        raise ValueError(f"the archive's {member.name!r} is not a file of at most {MAX_FILE_BYTES} bytes")
    return tar.extractfile(member).read()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", help=f"emoji-datasource-google-{VERSION}.tgz")
    parser.add_argument("folder", help="the folder to write, such as data/emoji")
    parser.add_argument("--any_version", action="store_true", help="accept another version of the archive")
    try:
        arguments = parser.parse_args()
        print(f"{unpack(**vars(arguments))} pictures in {arguments.folder}")
    except (OSError, ValueError) as error:
        sys.exit(f"emoji.py: {' '.join(str(error).split())}")
