"""Writes that are whole or not at all, and never through a link."""

import os
import stat

import pytest

from ddpm_hf.files.atomic import (
    leftovers,
    moved_aside,
    remove_folder,
    remove_leftovers,
    replacing_file,
    replacing_folder,
    restore_folder,
    write_text,
)


def test_a_link_is_replaced_and_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    path = tmp_path / "folder" / "evaluation.json"
    path.parent.mkdir()
    path.symlink_to(victim)
    assert write_text(path, "é\n") == path
    assert victim.read_text() == "mine" and not path.is_symlink() and path.read_bytes() == "é\n".encode()


def test_temporary_names_cannot_be_prepared(tmp_path):
    names = set()
    for _ in range(2):
        with replacing_file(tmp_path / "x.json") as temporary:
            names.add(temporary.name)
            assert temporary.is_file() and temporary.parent == tmp_path
    assert len(names) == 2 and len(next(iter(names)).split(".")[-2]) == 16


def test_permissions_are_those_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "x", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_after_an_error_all_is_as_before(tmp_path):
    write_text(tmp_path / "x", "old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "y").write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing_file(tmp_path / "x") as temporary:
        temporary.write_text("new")
        raise KeyboardInterrupt
    with pytest.raises(OSError), replacing_folder(tmp_path / "folder") as temporary:
        (temporary / "y").write_text("new")
        raise OSError
    assert sorted(os.listdir(tmp_path)) == ["folder", "x"]
    assert (tmp_path / "x").read_text() == (tmp_path / "folder" / "y").read_text() == "old"
    with pytest.raises(FileNotFoundError), replacing_file(tmp_path / "none" / "x"):
        pass


def test_folders_are_replaced_whole(tmp_path):
    folder = tmp_path / "pipeline"
    for text in ("first", "second"):
        with replacing_folder(folder) as temporary:
            (temporary / "x").write_text(text)
            if text == "first":
                (temporary / "only").write_text("")
    assert (
        (folder / "x").read_text() == "second" and os.listdir(folder) == ["x"] and os.listdir(tmp_path) == ["pipeline"]
    )


def test_a_folder_that_is_a_link(tmp_path):
    """The link is replaced; what it leads to stays. So too where a link is moved aside, or leads nowhere."""
    folder, real = tmp_path / "pipeline", tmp_path / "real"
    real.mkdir()
    (real / "mine").touch()
    for target in real, tmp_path / "nowhere":
        folder.symlink_to(target)
        for text in ("first", "second"):
            with replacing_folder(folder) as temporary:
                (temporary / "x").write_text(text)
            assert (folder / "x").read_text() == text and not folder.is_symlink()
        folder.rename(tmp_path / "aside")
        moved_aside(folder).symlink_to(target)  # killed between the two renames
        restore_folder(folder)
        assert folder.readlink() == target
        folder.unlink()
        remove_folder(tmp_path / "aside")
    assert os.listdir(tmp_path) == ["real"] and os.listdir(real) == ["mine"]


def test_what_a_kill_leaves_behind(tmp_path):
    folder, names = tmp_path / "pipeline", {".pipeline.0123456789abcdef.tmp", ".x.json.0123456789abcdef.tmp"}
    moved_aside(folder).mkdir()  # killed between the two renames
    (tmp_path / ".pipeline.0123456789abcdef.tmp" / "unet").mkdir(parents=True)
    (tmp_path / ".x.json.0123456789abcdef.tmp").touch()
    for other in (".hidden", ".x.tmp", "x.0123456789abcdef.tmp"):
        (tmp_path / other).touch()
    assert {path.name for path in leftovers(tmp_path)} == names and not leftovers(tmp_path / "none")
    restore_folder(folder)
    assert folder.is_dir() and not moved_aside(folder).exists()
    moved_aside(folder).mkdir()  # killed after both
    restore_folder(folder)
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", ".x.tmp", "pipeline", "x.0123456789abcdef.tmp"]


def test_a_removed_folder_is_gone_or_whole(tmp_path):
    folder = tmp_path / "0000002"
    (folder / "x").mkdir(parents=True)
    remove_folder(folder)
    assert os.listdir(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        remove_folder(folder)
