"""Reading data files: errors that name the place, gzip, the data folder."""

import gzip

import gin
import pytest

from tasks import files


def test_gzip_and_plain_files_read_alike_and_plain_comes_first(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("é\n".encode()))
    path = files.find(str(tmp_path), "a.txt", source="nowhere")
    assert path.endswith("a.txt.gz") and files.read_text(path) == "é\n"
    (tmp_path / "a.txt").write_text("plain")
    assert files.read_text(files.find(str(tmp_path), "a.txt", source="nowhere")) == "plain"


def test_a_missing_file_is_named_with_the_place_to_get_it(tmp_path):
    with pytest.raises(
        files.MissingDataError, match=r"x/train\.txt.*https://data\.example"
    ) as error:
        files.find(str(tmp_path / "x"), "train.txt", "train.tsv", source="https://data.example")
    assert "train.tsv" in str(error.value)
    assert isinstance(error.value, ValueError) and isinstance(error.value, FileNotFoundError)


def test_invalid_utf8_is_an_error_with_file_line_and_offset(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(b"one\ntwo \xff\n")
    with pytest.raises(files.RowError, match=r"bad\.txt:2: invalid UTF-8: byte 0xff at offset 8"):
        files.read_text(str(path))


def test_a_damaged_gzip_file_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "cut.txt.gz"
    path.write_bytes(gzip.compress(b"text" * 100)[:20])
    with pytest.raises(files.RowError, match="cut.txt.gz: not a whole gzip file"):
        files.read_text(str(path))


def test_only_a_line_feed_ends_a_line(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes("a\u2028b\r\n\nc".encode())
    lines = list(files.read_lines(str(path)))
    assert [text for _, text in lines] == ["a\u2028b", "", "c"]
    assert lines[2][0] == f"{path}:3"


def test_the_data_folder_comes_from_gin_then_the_environment_else_an_error(monkeypatch):
    monkeypatch.delenv(files.VARIABLE, raising=False)
    with pytest.raises(files.MissingDataError, match="DATA_DIR.*MODJAX_DATA"):
        files.data_dir()
    monkeypatch.setenv(files.VARIABLE, "/from/environment")
    assert files.data_dir() == "/from/environment"
    gin.parse_config("DATA_DIR = '/from/gin'\ntasks.files.data_dir.path = %DATA_DIR")
    try:
        assert files.data_dir() == "/from/gin"
    finally:
        gin.clear_config()
