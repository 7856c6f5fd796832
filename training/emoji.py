"""Noto emoji by category, as a folder of images that train.py reads: about 3,700 pictures of 64x64 pixels, most of them RGBA.

    npm pack emoji-datasource-google          # or take the archive from the package's page
    python training/emoji.py emoji-datasource-google-*.tgz data/emoji
    accelerate launch training/train.py --config emoji32

Writes the pictures and metadata.jsonl, which gives each its category ("Food & Drink", ...); those of skin tones are their
emoji's. The pictures are under the licenses that the archive names.
"""

import json
import os
import sys
import tarfile
from pathlib import Path

PICTURES = "package/img/google/64/"


def unpack(archive: str, folder: str) -> int:
    """Writes the folder, whole or not at all; returns how many pictures.

    Raises:
        FileExistsError: the folder is there.
        KeyError: the archive is not of this package.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; remove it, or name another")
    temporary = folder.with_name(f".{folder.name}")
    temporary.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        category = {}
        for emoji in json.load(tar.extractfile("package/emoji.json")):
            for version in (emoji, *emoji.get("skin_variations", {}).values()):
                category[version["image"]] = emoji["category"]
        rows = []
        for member in tar:
            name = member.name.removeprefix(PICTURES)
            if member.isfile() and member.name.startswith(PICTURES) and name in category:
                (temporary / name).write_bytes(tar.extractfile(member).read())
                rows.append({"file_name": name, "category": category[name]})
    lines = "".join(json.dumps(row) + "\n" for row in sorted(rows, key=lambda row: row["file_name"]))
    (temporary / "metadata.jsonl").write_text(lines)
    os.replace(temporary, folder)
    return len(rows)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        print(f"{unpack(*sys.argv[1:])} pictures in {sys.argv[2]}")
    except (OSError, KeyError, tarfile.TarError) as error:
        sys.exit(f"emoji.py: {error}")
