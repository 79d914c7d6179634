"""Whose compiled code is loaded: this user's and root's, from where nobody else could put any."""

import os
import stat

import pytest

from parsimony_kernels.runtime import build
from parsimony_kernels.runtime.trust import is_ours, private_folder

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files to other users")


def test_a_folder_is_made_for_its_user_alone_and_an_open_one_is_closed(tmp_path):
    assert stat.S_IMODE(private_folder(tmp_path / "a/b").stat().st_mode) == 0o700
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    assert stat.S_IMODE(private_folder(tmp_path / "open").stat().st_mode) == 0o700


@as_root
def test_a_folder_of_another_user_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 54321, 54321)
    with pytest.raises(RuntimeError, match=r"of user 54321, not of yours.*XDG_CACHE_HOME"):
        private_folder(tmp_path / "theirs")


def test_a_link_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    with pytest.raises(RuntimeError, match="no folder but a link"):
        private_folder(tmp_path / "link")


def test_files_that_others_could_have_written_are_not_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = private_folder(build.cache_folder())
    for name, mode in (("host-1.so", 0o755), ("host-2.so", 0o775), ("host-3.so", 0o757)):
        (folder / name).touch()
        (folder / name).chmod(mode)
    (folder / "host-4.so").symlink_to(folder / "host-1.so")
    if os.getuid() == 0:
        (folder / "host-5.so").touch(mode=0o600)
        os.chown(folder / "host-5.so", 54321, 54321)
    assert [path.name for path in build.kept("host-*.so")] == ["host-1.so"]
    assert not is_ours(folder / "missing")


def test_what_is_kept_is_closed_to_others_whatever_the_umask(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    old = os.umask(0)
    try:
        path = build.cache_folder() / "host-1.so"
        build.keep(path, lambda new: new.write_text("code"))
    finally:
        os.umask(old)
    assert build.kept("host-*.so") == [path]
