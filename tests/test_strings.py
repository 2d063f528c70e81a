"""strings.py: says what a list would say, and its file is shared, whole, and repaired when it is not."""

import multiprocessing
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cli import UserError
from datasets.strings import Strings

ROOT = Path(__file__).parent.parent
texts = st.lists(st.text(st.characters(exclude_categories=()), max_size=6), max_size=20)  # half surrogates too


@settings(max_examples=150, deadline=None)
@given(texts, st.data())
def test_it_is_a_list_of_these_strings(strings, data):
    packed = Strings.pack(strings)
    assert len(packed) == len(strings) and list(packed) == strings and packed == strings and strings == packed
    assert [packed[i] for i in range(-len(strings), len(strings))] == 2 * strings
    piece = slice(*(data.draw(st.none() | st.integers(-25, 25).filter(bool)) for _ in range(3)))
    assert packed[piece] == strings[piece]
    rows = data.draw(st.lists(st.integers(0, len(strings) - 1), max_size=30)) if strings else []
    assert packed.take(np.array(rows, np.int64)) == [strings[i] for i in rows]
    kept = np.array([len(string) % 2 == 0 for string in strings], bool)
    assert packed.take(kept) == [string for string, keep in zip(strings, kept) if keep]
    first, index = packed.distinct()
    assert packed.take(first) == list(dict.fromkeys(strings))  # in order of appearance
    assert packed.take(first[index]) == strings and first.dtype == index.dtype == np.int64
    assert Strings.concatenate([packed, packed[:3], packed]) == strings + strings[:3] + strings
    assert Strings.concatenate([]) == []


def test_what_it_is_not():
    packed = Strings.pack(["a", "b"])
    assert Strings.pack(packed) is packed
    assert packed != ["a", "c"] and packed != ["a"] and packed != "ab" and packed != 3
    for i in (2, -3):
        with pytest.raises(IndexError, match="of 2"):
            packed[i]
    with pytest.raises(TypeError):
        hash(packed)
    with pytest.raises(ValueError):
        Strings.columns([("a", "b", "c")], 2)


def test_long_lists_cross_the_internal_pieces():
    strings = [f"{i} " * (i % 7) for i in range(150_000)]
    packed = Strings.pack(strings)
    assert packed == strings
    assert packed[::-1] == strings[::-1]


def test_columns_read_their_rows_once():
    left, right = Strings.columns(((str(i), str(-i)) for i in range(5)), 2)
    assert left == list("01234") and right == ["0", "-1", "-2", "-3", "-4"]


def test_stored_strings_are_a_mapped_file(tmp_path):
    strings = ["a dog", "", "犬", "\ud800"] * 1000
    mapped = Strings.pack(strings).stored(tmp_path / "new")
    (path,) = (tmp_path / "new").iterdir()
    assert mapped == strings and str(path) in Path("/proc/self/maps").read_text() and not mapped.blob.flags.writeable
    written = path.stat()
    again = Strings.pack(strings).stored(tmp_path / "new")
    assert again == strings and path.stat() == written and list((tmp_path / "new").iterdir()) == [path]
    assert Strings.pack([]).stored(tmp_path) == [] and Strings.pack([""]).stored(tmp_path) == [""]


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[:100], lambda data: b"",
    lambda data: data[:8] + bytes(8) + data[16:], lambda data: data + b"0"],
    ids=["bit", "cut", "empty", "offsets", "longer"])
def test_a_damaged_file_is_written_again(tmp_path, capsys, damage):
    strings = [f"caption {i}" for i in range(50)]
    Strings.pack(strings).stored(tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert Strings.pack(strings).stored(tmp_path) == strings and path.read_bytes() == whole
    assert f"{path}: damaged" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another --cache"):
        Strings.pack(["a"]).stored(tmp_path / "file" / "strings")


def _store_and_read(folder, go, results):
    go.wait()
    results.put(list(Strings.pack(f"caption {i}" for i in range(20_000)).stored(folder)[-2:]))


def test_processes_write_the_same_file_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    go, results = context.Event(), context.Queue()
    processes = [context.Process(target=_store_and_read, args=(tmp_path, go, results)) for _ in range(3)]
    for process in processes:
        process.start()
    go.set()
    assert [results.get() for _ in processes] == [["caption 19998", "caption 19999"]] * 3
    for process in processes:
        process.join()
    assert len(list(tmp_path.iterdir())) == 1  # and no temporary files


def test_processes_that_hold_them_share_the_memory():
    done = subprocess.run([sys.executable, "bench/memory.py", "--millions", "0.1", "--workers", "2"], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    rows = re.findall(r"    (\w+, .+?)  +(\d+) +(\d+) +(\d+) +\d+ +\d+\n", done.stdout)
    private = {name: int(megabytes) for name, _, _, megabytes in rows}
    for way in ("separate", "forked"):  # of a worker's own, beyond what any process has
        lists, ours = (private[f"{way}, {data}"] - private[f"{way}, nothing"]
                       for data in ("list of str", "Strings (ours)"))
        assert lists > 15 and ours < lists / 3, private


def test_demo_runs():
    done = subprocess.run([sys.executable, "strings.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "1,000,000 captions" in done.stdout and done.stdout.endswith("True\n")
