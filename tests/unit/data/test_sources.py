"""Where rows come from: every file, table and stream gives the same rows, and what is none says what to write."""

import bz2
import csv
import gzip
import io
import json
import lzma
import pathlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tensafe_nb as tn
from tensafe_nb import data
from tensafe_nb.data.rows import open_rows

ROWS = [
    {"prompt": "capital of France?", "completion": "Paris, on the Seine"},
    {"prompt": 'a "quoted" word', "completion": "two\nlines"},
    {"prompt": "ß, 漢字, 🙂", "completion": "as they are"},
]


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def table(delimiter: str) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue()


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.jsonl", LINES),
        ("rows.ndjson", "\n\n" + LINES),
        ("rows", LINES),
        ("rows.json", json.dumps(ROWS, indent=2)),
        ("rows.json", json.dumps(ROWS)),
        ("rows.json", json.dumps({"version": "1", "data": ROWS})),
        ("rows.json", LINES),
        ("rows.jsonl", json.dumps(ROWS, indent=2)),
        ("rows.jsonl", json.dumps(ROWS)),
        ("rows.csv", table(",")),
        ("rows.csv", "\r\n\n" + table(",").replace("prompt,", " prompt , ")),
        ("rows.csv", "\ufeff" + table(";")),
        ("rows.CSV", table("\t")),
        ("rows.tsv", table("\t")),
    ],
)
def test_every_file_gives_the_same_rows(tmp_path: Path, name: str, text: str) -> None:
    path = written(tmp_path / name, text)
    assert data.read_rows(path) == ROWS
    assert data.read_rows(str(path)) == ROWS


@pytest.mark.parametrize(("suffix", "module"), [("gz", gzip), ("bz2", bz2), ("xz", lzma)])
def test_compressed_files_are_read(tmp_path: Path, suffix: str, module: Any) -> None:
    for name, text in (("rows.jsonl", LINES), ("rows.csv", table(","))):
        path = tmp_path / f"{name}.{suffix}"
        with module.open(path, "wt", encoding="utf-8", newline="") as file:
            file.write(text)
        assert data.read_rows(path) == ROWS
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(tn.ValidationError, match=r"cannot be read.*Is it whole"):
        data.read_rows(path)


def test_every_table_gives_the_same_rows(tmp_path: Path) -> None:
    pandas, polars = pytest.importorskip("pandas"), pytest.importorskip("polars")
    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    frame = pandas.DataFrame(ROWS)
    frame.to_parquet(tmp_path / "rows.parquet")
    sources = [
        frame,
        frame.set_index(pandas.Index([7, 7, 9])),
        polars.DataFrame(ROWS),
        pyarrow.Table.from_pylist(ROWS),
        pyarrow.RecordBatch.from_pylist(ROWS),
        datasets.Dataset.from_list(ROWS),
        datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
        datasets.Dataset.from_list(ROWS).with_format("pandas"),
        datasets.Dataset.from_list(ROWS).with_format("torch"),
        pyarrow.Table.from_pylist(ROWS).to_reader(),
        pandas.DataFrame(ROWS).astype("category").convert_dtypes(),
        np.array(ROWS, dtype=object),
        tmp_path / "rows.parquet",
        iter(ROWS),
        tuple(ROWS),
        (row for row in ROWS),
        dict(enumerate(ROWS)).values(),
    ]
    for source in sources:
        assert data.read_rows(source) == ROWS, type(source)


def test_a_column_of_texts_is_rows() -> None:
    pandas = pytest.importorskip("pandas")
    polars = pytest.importorskip("polars")
    texts = ["one", "two"]
    for source in (pandas.Series(texts), polars.Series(texts), np.array(texts)):
        assert data.read_rows(source) == texts, type(source)


def test_lists_in_a_parquet_file_come_back_as_they_were(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    chats = [
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "yo", "name": "bot"},
            ]
        },
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"a": {"b": [1, 2]}}]}]},
    ]
    pandas.DataFrame(chats).to_parquet(tmp_path / "chats.parquet")
    expected = [chats[0], {"messages": [dict(chats[1]["messages"][0].items())]}]
    assert data.read_rows(tmp_path / "chats.parquet") == expected
    assert data.read_rows(pandas.read_parquet(tmp_path / "chats.parquet")) == expected


def test_no_library_of_tables_is_loaded_for_a_list() -> None:
    import subprocess
    import sys

    code = (
        "import sys\nfrom tensafe_nb import data\ndata.read_rows([{'text': 'a'}])\n"
        "print(sorted({'pandas', 'polars', 'pyarrow', 'datasets', 'torch'} & set(sys.modules)))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
        == "[]\n"
    )


class MapStyle:
    """As torch's: rows by number, no iteration."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, number: int) -> str:
        return "text"


async def asynchronous() -> Any:
    yield "text"


def refused_sources() -> Iterator[Any]:
    pandas, polars = pytest.importorskip("pandas"), pytest.importorskip("polars")
    datasets, pyarrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    yield {"text": "one"}, "put it in a list, [row]"
    yield {"messages": [{"role": "user", "content": "hi"}]}, "put it in a list, [row]"
    yield {"train": ROWS, "test": ROWS}, "data['train']"
    yield {"validation": ROWS}, "data['validation']"
    yield datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), "data['train']"
    yield {"train": pandas.DataFrame(ROWS)}, "data['train']"
    yield {"prompt": ["a", "b"], "completion": ["c", "d"]}, "[dict(zip(columns, cells))"
    yield {"text": np.array(["a", "b"])}, "[dict(zip(columns, cells))"
    yield b"text", "these are bytes"
    yield io.StringIO("text"), "Give its path"
    yield {"a", "b"}, "sorted(rows)"
    yield asynchronous(), "[row async for row in rows]"
    yield np.zeros((2, 3)), "shape (2, 3)"
    yield np.array("text"), "shape ()"
    yield np.zeros(3), "float64"
    yield np.zeros(2, dtype=[("a", int)]), "pandas.DataFrame(array)"
    yield MapStyle(), "[data[i] for i in range(len(data))]"
    yield 3, "single row goes in a list"
    yield None, "single row goes in a list"
    yield tn.BatchData([[1, 2]]), "holds batches already"
    yield (
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}],
        "[{'messages': messages}]",
    )
    yield dict(enumerate(ROWS)), "list(rows.values())"
    yield pandas.DataFrame(ROWS).to_dict(), 'frame.to_dict("records")'
    yield pandas.DataFrame(ROWS).set_index("prompt"), "frame.reset_index()"
    yield polars.LazyFrame(ROWS), "frame.collect()"
    yield pyarrow.array(["a"]), "to_pylist()"
    yield pandas.DataFrame([["a", "b"]]), "frame.columns = "
    yield pandas.DataFrame([["a", "b"]], columns=["text", "text"]), "two columns of one name"
    yield "a text that is no path", "A text goes in a list: [text]"
    yield "a text that is too long to be the name of a file " * 200, "A text goes in a list: [text]"
    yield "half a te\0xt", "A text goes in a list: [text]"
    yield "~nobody-of-that-name/rows.jsonl", "There is no file '~nobody"
    yield "owner/name", "datasets.load_dataset('owner/name'"
    yield "https://example.org/rows.jsonl", "is an address"
    yield [], "There are no rows"


def test_what_is_no_list_of_rows_says_what_to_write() -> None:
    for source, line in refused_sources():
        with pytest.raises(tn.ValidationError, match=re.escape(line)):
            data.read_rows(source)


def test_names_of_files_are_no_texts(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", LINES)
    with pytest.raises(tn.ValidationError, match=r"is the name of a file, not a text.*read_rows\(path\)"):
        data.read_rows([str(path), str(path)])
    assert (
        data.read_rows(["a text about rows.jsonl", "long " * 2000 + ".json"])[0] == "a text about rows.jsonl"
    )


def test_a_loader_of_torch_is_refused_for_its_data_set() -> None:
    from torch.utils.data import DataLoader, Dataset

    class Texts(Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 2

        def __getitem__(self, number: int) -> str:
            return "text"

    with pytest.raises(tn.ValidationError, match=r"loader\.dataset"):
        data.read_rows(DataLoader(Texts(), batch_size=2))
    with pytest.raises(tn.ValidationError, match=r"\[data\[i\] for i in range"):
        data.read_rows(Texts())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("rows.xlsx", "", "pandas.read_excel"),
        ("rows.txt", "one\ntwo", r"splitlines\(\)"),
        ("rows.jsonl.zst", "", "pandas.read_json"),
        ("rows.json", '{"train": [1], "x": 1}', r"json.load\(open\(.*\)\)\['train'\]"),
        ("rows.json", '{"text": "one"}\n', None),
        ("rows.json", '{"a": [1], "b": [2]}', r"read_json\('.*'\), if these are columns"),
        ("rows.json", '{"text": {"0": "a"}}', r"read_json\('.*'\), if these are columns"),
        ("rows.json", '{"columns": ["text"], "index": [0], "data": [["a"]]}', "orient='split'"),
        (
            "rows.json",
            '{"x1": {"text": "a"}, "x2": {"text": "b"}}',
            r"list\(json.load\(open\('.*'\)\).values\(\)\)",
        ),
        (
            "rows.json",
            '{"train": [{"text": "a"}], "test": [{"text": "b"}]}',
            r"json.load\(open\('.*'\)\)\['train'\]",
        ),
        ("rows.jsonl", '{"text": "a"},\n{"text": "b"}', "line 1.: not JSON .*ends in a comma"),
        ("rows.json", '[{"text": "a"},\n{"text": }]', r"line 2: not JSON"),
        (
            "rows.json",
            '[{"text": "a"},\n{"n": ' + 5000 * "9" + "}]",
            r"line 2: not JSON .*thousands of digits",
        ),
        ("rows.jsonl", '{"n": ' + 5000 * "9" + "}", r"line 1.: not JSON .*thousands of digits"),
        ("rows.json", '[{"text": "a"}\n {"text": "b"}]', "line 2: not JSON .a comma"),
        ("rows.json", '[{"text": "a"}]\n{"text": "b"}', "stands behind the array"),
        ("rows.json", '[{"text": "a"}', "not JSON"),
        ("rows.csv", "text,text\na,b\n", "'text' twice"),
        ("rows.csv", 'text\n"a"b\n', "line 2: not CSV"),
        ("rows.parquet", "text", "cannot be read as Parquet"),
    ],
)
def test_a_file_that_is_no_list_of_rows_says_what_would_be(
    tmp_path: Path, name: str, text: str, message: str | None
) -> None:
    path = written(tmp_path / name, text)
    if message is None:  # one object is one line of JSON lines
        assert data.read_rows(path) == [{"text": "one"}]
        return
    with pytest.raises(tn.ValidationError, match=message):
        data.read_rows(path)


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_a_file_that_is_not_utf8_says_the_line_that_makes_it_so(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text\nplain\nGrüße aus Köln\n", encoding)
    with pytest.raises(
        tn.ValidationError, match=f"line {3 if encoding == 'cp1252' else 1}: not UTF-8"
    ) as refused:
        data.read_rows(path)
    (line,) = re.findall(r"p = pathlib.*'utf-8'\)", str(refused.value))
    exec(line, {"pathlib": pathlib})
    assert data.read_rows(path) == [{"text": "plain"}, {"text": "Grüße aus Köln"}]


def test_a_folder_says_how_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(tn.ValidationError, match=r"glob\('\*\.jsonl'\)"):
        data.read_rows(tmp_path)
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    with pytest.raises(tn.ValidationError, match=r"datasets\.load_from_disk"):
        data.read_rows(tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "text", "places"),
    [
        ("rows.jsonl", '\n{"text": "a"}\n\n{"text": "b"}\n', [2, 4]),
        ("rows.json", '[\n  {"text":\n  "a"},\n  {"text": "b"}\n]', [2, 4]),
        ("rows.csv", 'text\n"a\nb"\nc\n\nd\n', [2, 4, 6]),
    ],
)
def test_rows_know_the_line_they_begin_at(tmp_path: Path, name: str, text: str, places: list[int]) -> None:
    rows = open_rows(written(tmp_path / name, text))
    assert [line for line, _ in rows.each] == places
    assert rows.place(1, places[1]) == f"Row 1 ({name}, line {places[1]})"


def test_a_cell_longer_than_csvs_own_limit_is_read(tmp_path: Path) -> None:
    long = "word " * 60_000
    path = written(tmp_path / "rows.csv", f'text\n"{long}"\n')
    assert data.read_rows(path) == [{"text": long}]


def test_an_error_of_the_users_own_iterator_comes_through(tokenizer: Any) -> None:
    class Broken(Exception):
        pass

    def rows() -> Iterator[str]:
        yield "one text"
        raise Broken

    with pytest.raises(Broken):
        data.batches(rows(), tokenizer)
    with pytest.raises(Broken):
        data.batches(rows(), tokenizer, on_bad_rows="skip")


def test_a_stream_is_checked_as_it_is_read(tokenizer: Any) -> None:
    read = 0

    def rows() -> Iterator[Any]:
        nonlocal read
        for read in range(1_000_000):
            yield "a text" if read != 5 else None

    with pytest.raises(tn.ValidationError, match="Row 5: "):
        data.batches(rows(), tokenizer)
    assert read == 5
