"""The file that limits a run to some users."""

import pyarrow as pa
import pytest

from recsys_dist.errors import ConfigError, DataError
from recsys_dist.scoring.chosen import choose, told, unchanged

USERS = pa.table({"user": pa.array([3, 1, 2], pa.int32()), "user_id": ["u 3", "u1", "2"]})


def written(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "users.txt"
    path.write_bytes(text.encode(encoding))
    return str(path)


def test_known_users_are_found_and_the_others_told(tmp_path):
    path = written(tmp_path, "\ufeffu1\r\n\n u 3 \nnobody\nu1\n9\n9\n")
    chosen = choose(path, USERS)
    assert chosen.users.sort_by("user").to_pydict() == {"user": [1, 3], "user_id": ["u1", "u 3"]}
    assert chosen.unknown == ["nobody", "9"]
    assert told(chosen).splitlines() == [
        f"score: 2 users of {path}; the others' lists stay as they are",
        f"score: 2 ids of {path} are not known: nobody, 9",
    ]


def test_white_space_that_the_log_keeps_is_part_of_an_id(tmp_path):
    users = pa.table({"user": pa.array([1, 2, 3], pa.int32()), "user_id": ["a\u2028b", "c\t", "\u00a0d"]})
    chosen = choose(written(tmp_path, "a\u2028b\nc\t\r\n \u00a0d \n"), users)
    assert chosen.users["user"].to_pylist() == [1, 2, 3]
    assert not chosen.unknown


def test_nobody_known_is_refused(tmp_path):
    with pytest.raises(DataError, match="not one of its 2 ids is a user's, such as x, y"):
        choose(written(tmp_path, "x\ny\n"), USERS)
    with pytest.raises(DataError, match="not one of its 0 ids"):
        choose(written(tmp_path, ""), USERS)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"score\.users=.*there is no such file"):
        choose(str(tmp_path / "nowhere.txt"), USERS)
    with pytest.raises(DataError, match="is not text in UTF-8"):
        choose(written(tmp_path, "ü\n", "latin-1"), USERS)


def test_a_changed_file_is_noticed(tmp_path):
    figures = choose(written(tmp_path, "u1\n"), USERS).figures()
    assert unchanged(figures)
    written(tmp_path, "u1\n2\n")
    assert not unchanged(figures)
    (tmp_path / "users.txt").unlink()
    assert not unchanged(figures)
