import json
import os
import stat
from pathlib import Path

import pytest
import yaml

from puat_fast import files


def test_whole_file_appears_with_the_users_permissions(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o666 & ~mask
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_keeps_the_old_file_and_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(error), files.atomic_write(path) as temp:
        temp.write_bytes(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_failing_rename_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()  # a folder stands where the file should go
    with pytest.raises(OSError):
        files.write_text(tmp_path / "a", "text")
    assert os.listdir(tmp_path) == ["a"]


def test_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(FileNotFoundError), files.atomic_write(tmp_path / "a"):
        pass
    assert (tmp_path / "a").read_text() == "old"


def test_json_and_yaml_round_trip_in_order(tmp_path: Path) -> None:
    value = {"z": 8 / 255, "a": [1e-5, 2], "none": None}
    files.write_json(tmp_path / "a.json", value)
    files.write_yaml(tmp_path / "a.yaml", value)
    for loaded in (json.loads((tmp_path / "a.json").read_text()), yaml.safe_load((tmp_path / "a.yaml").read_text())):
        assert loaded == value
        assert list(loaded) == list(value)


def test_json_refuses_nan_before_it_touches_the_file(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {})
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {}


def test_remove_stale_takes_only_what_atomic_write_leaves(tmp_path: Path) -> None:
    for name in (".last.pt.123.tmp", "last.pt", ".hidden", "notes.tmp"):
        (tmp_path / name).touch()
    files.remove_stale(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "last.pt", "notes.tmp"]


def test_a_device_is_written_to_and_stays_one() -> None:
    files.write_text("/dev/null", "gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(OSError, match="No space left"):
        files.write_text("/dev/full", "too much")


def test_a_link_keeps_its_place(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    files.write_json(tmp_path / "link.json", 1)
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real.json").read_text() == "1\n"


def test_stale_files_of_others_stay(tmp_path: Path) -> None:
    for name in (".last.pt.123.tmp", ".other.program.tmp"):
        (tmp_path / name).touch()
    files.remove_stale(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".other.program.tmp"]


def test_folder_is_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with files.atomic_folder(target) as new:
        (new / "a").write_text("1")
        assert not target.exists()
    with pytest.raises(KeyboardInterrupt), files.atomic_folder(target) as new:
        (new / "a").write_text("2")
        raise KeyboardInterrupt
    assert [(file.name, file.read_text()) for file in target.iterdir()] == [("a", "1")]
    with files.atomic_folder(target) as new:
        (new / "b").write_text("3")
    assert [(file.name, file.read_text()) for file in target.iterdir()] == [("b", "3")]
    assert list(tmp_path.iterdir()) == [target]


def test_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, rename = tmp_path / "out", Path.rename
    with files.atomic_folder(target) as new:
        (new / "a").write_text("1")

    def refuse(self: Path, to: Path) -> Path:
        if self.name.endswith(".new"):
            raise OSError(28, "No space left on device")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="No space"), files.atomic_folder(target):
        pass
    assert (target / "a").read_text() == "1" and list(tmp_path.iterdir()) == [target]
