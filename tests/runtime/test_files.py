import os

import pytest

from grokkit.runtime import files


def test_a_file_is_replaced_when_it_is_complete(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with files.replacing(path) as temporary:
        assert temporary.parent == tmp_path and temporary.match(files.TEMPORARY)
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(error), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_users_own_temporary_file_survives(tmp_path):
    (tmp_path / "a.json.tmp").write_text("mine")
    files.write(tmp_path / "a.json", "{}")
    assert (tmp_path / "a.json.tmp").read_text() == "mine"


@pytest.mark.parametrize("content", ["Zoë", b"\x00\xff"])
def test_texts_and_bytes(tmp_path, content):
    files.write(tmp_path / "a", content, durable=True)
    found = (tmp_path / "a").read_bytes()
    assert found == (content.encode() if isinstance(content, str) else content)


def test_permissions_are_those_of_a_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    files.write(tmp_path / "a", "")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode
