"""What a server refuses before it reads a weight."""

import pytest

from vxl_serve.settings import ServerSettings


@pytest.mark.parametrize("name", ["uploads/holiday.mp4", "mem-lecture.vxl", "notes.txt"])
def test_a_folder_with_other_files_is_no_store(tmp_path, name):
    """A server empties `uploads` and deletes memories that it does not know."""
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"mine")
    with pytest.raises(ValueError, match=f"store: got {tmp_path}, which holds"):
        ServerSettings(store=tmp_path)
    with pytest.raises(ValueError, match="expected a folder"):
        ServerSettings(store=file)
    assert file.read_bytes() == b"mine"


def test_a_new_an_empty_and_a_used_folder_are_stores(tmp_path):
    ServerSettings(store=tmp_path / "new")
    ServerSettings(store=tmp_path)
    (tmp_path / ".lock").touch()
    (tmp_path / "mem-1.vxl").touch()
    assert ServerSettings(store=tmp_path).store == tmp_path
