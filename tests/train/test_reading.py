import gzip
import json
from collections.abc import Mapping

import pytest

from modernbert.train.reading import files, lines, parse_rows, read_rows

ROWS = [{"query": f"q{i} é", "n": i} for i in range(600)]


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path, rows):
    """A file of rows by its ending."""
    if path.name.endswith(".parquet"):
        arrow = pytest.importorskip("pyarrow")
        from pyarrow.parquet import write_table

        write_table(arrow.Table.from_pylist(rows), path, row_group_size=100)
    elif path.name.endswith(".zst"):
        path.write_bytes(
            pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(json_lines(rows))
        )
    else:
        path.write_bytes(gzip.compress(json_lines(rows)) if path.name.endswith(".gz") else json_lines(rows))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    write(tmp_path / name, ROWS)
    rows = list(read_rows(tmp_path / name))
    assert [row.fields for row in rows] == ROWS
    assert {row.file for row in rows} == {"a"}
    where = f"{tmp_path / name}: row 600" if name.endswith("parquet") else f"{tmp_path / name}:600"
    assert rows[-1].where == where
    assert [row.fields for row in read_rows(tmp_path)] == ROWS


def test_a_folder_is_read_in_name_order(tmp_path):
    write(tmp_path / "2.parquet", ROWS[:2])
    write(tmp_path / "1.jsonl.gz", ROWS[2:4])
    (tmp_path / "README.md").write_text("not rows")
    assert [row.fields for row in read_rows(tmp_path)] == ROWS[2:4] + ROWS[:2]


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"a\.csv is not one of \*\.jsonl, .*\*\.parquet"):
        list(read_rows(tmp_path / "a.csv"))
    with pytest.raises(ValueError, match=r"no \*\.jsonl, .* in "):
        files(tmp_path)
    with pytest.raises(FileNotFoundError):
        list(read_rows(tmp_path / "gone"))


def test_a_data_set_of_hugging_face_in_memory_streamed_and_saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(str(tmp_path / "saved"))
    for source in (one, one.to_iterable_dataset(), tmp_path / "saved", str(tmp_path / "saved"), ROWS, iter(ROWS)):
        rows = list(read_rows(source))
        assert [dict(row.fields) for row in rows] == ROWS
        assert rows[6].where.endswith(": row 7")
    assert next(read_rows(tmp_path / "saved")).where == f"{tmp_path / 'saved'}: row 1"


def test_several_splits_are_refused_and_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "dev": datasets.Dataset.from_list(ROWS)})
    both.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="holds several splits: give one of 'train', 'dev'"):
        list(read_rows(both))
    with pytest.raises(ValueError, match=r"several splits: give one of .*saved/dev, .*saved/train"):
        list(read_rows(tmp_path / "saved"))
    assert len(list(read_rows(tmp_path / "saved" / "dev"))) == 600


def test_fields_may_have_other_names():
    rows = [{"anchor": "a", "positive": "p", "query": "not this"}, {"positive": "p"}]
    got = [row.fields for row in read_rows(rows, {"query": "anchor"})]
    assert got == [{"query": "a", "positive": "p"}, {"positive": "p"}]


@pytest.mark.parametrize("row", ["text", 3, None, ["query"]])
def test_a_row_that_is_not_an_object_is_named(tmp_path, row):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n' + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:2: a row must be an object"):
        list(read_rows(tmp_path))
    with pytest.raises(ValueError, match="the data set: row 2: a row must be an object"):
        list(read_rows([{"a": 1}, row]))


def test_the_error_of_a_parser_gets_the_place_of_its_row(tmp_path):
    def parse(row):
        if row.fields["n"] == 300:
            raise ValueError("three hundred")
        return row.fields["n"]

    for name, where in (("a.jsonl", "a.jsonl:301"), ("b.parquet", "b.parquet: row 301")):
        write(tmp_path / name, ROWS)
        parsed = parse_rows(tmp_path / name, parse)
        assert [next(parsed) for _ in range(300)] == list(range(300))
        with pytest.raises(ValueError, match=f"{where}: three hundred"):
            next(parsed)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("damage", ["cut", "noise", "flipped", "empty"])
def test_a_damaged_file_is_named(tmp_path, name, damage):
    rows = [{"query": f"{i * 7919 % 10007}" * 20} for i in range(3000)]
    write(tmp_path / name, rows)
    whole = (tmp_path / name).read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes(byte ^ 255 for byte in whole[middle : middle + 40]) + whole[middle + 40 :]
    content = {"cut": whole[:middle], "noise": b"\xff" * 99, "flipped": flipped, "empty": b""}[damage]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}( is damaged|:\d+: )"):
        list(read_rows(tmp_path))


def test_a_damaged_data_set_is_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(ValueError, match="saved is damaged, or not a data set"):
        list(read_rows(tmp_path / "saved"))


def test_long_lines_and_a_last_line_without_an_end(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    content = b"x" * 1_000_000 + b"\n\ny"
    for name, packed in (("a", content), ("a.gz", gzip.compress(content))):
        (tmp_path / name).write_bytes(packed)
    (tmp_path / "a.zst").write_bytes(zstandard.ZstdCompressor().compress(content))
    for name in ("a", "a.gz", "a.zst"):
        got = [(where, line.rstrip(b"\n")) for where, line in lines(tmp_path / name)]
        assert got == [(f"{tmp_path / name}:{i}", x) for i, x in enumerate([b"x" * 1_000_000, b"", b"y"], 1)]


def test_null_in_a_table_is_a_field_that_the_row_lacks(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"query": "a", "group": "g"}, {"query": "b", "group": None}]
    write(tmp_path / "a.parquet", rows)
    for source in (tmp_path, datasets.Dataset.from_list(rows), rows):
        assert [row.fields for row in read_rows(source)] == [rows[0], {"query": "b"}]
    write(tmp_path / "a.jsonl", rows)  # of JSON it is a value
    assert [row.fields for row in read_rows(tmp_path / "a.jsonl")] == rows


def test_mappings_that_are_not_dicts_are_rows():
    class Lazy(Mapping):
        def __getitem__(self, key):
            return {"query": "q"}[key]

        def __iter__(self):
            return iter(["query"])

        def __len__(self):
            return 1

    assert [row.fields for row in read_rows([Lazy()])] == [{"query": "q"}]
