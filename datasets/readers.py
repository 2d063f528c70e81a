"""The kinds of files that data sets are published in, read with suspicion.

An annotation file was written by strangers, with a script of their own. One caption that silently
vanishes changes every number that is measured afterwards. So nothing is guessed and nothing is
skipped. A missing column, a number where a text should be, a broken quote, a byte that is not UTF-8
end in one line (UserError), which says where it is and what was expected:

    train.csv, line 3: 1 columns, the header has 2; expected video, caption
    MSRVTT_data.json, sentences[17]: the entry has no caption; expected video_id, caption

These readers know files, not data sets (those are in published.py). Each yields (where, row); the
first four hold one row at a time, so a file may have any size:

    read_csv        a header, then rows           read_columns    no header, no quotes
    read_jsonl      a JSON object per line        read_list       a name per line
    read_json       one JSON document, whole      read_entries    a list in such a document
    read_pickle     a pickle of plain data        read_rows       jsonl, json or csv, by its ending

A file from elsewhere may not run code: a pickle may call any function, so ours is read by a reader
that builds plain data only. It may not name a file outside of the folder of the data
(`check_name`). And it may not bring what no name and no text holds: control characters in a path,
halves of characters in a caption.
"""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from captions.tagger import load_plain_pickle
from cli import UserError

Rows = Iterator[tuple[str, dict]]  # (where it stands, {column: value})

TYPE_NAMES = {str: "a text", int: "a whole number", list: "a list", str | list: "a text or a list"}
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")

# ---- values --------------------------------------------------------------------------------------


def shorten(value) -> str:
    return repr(value)[:40]


def check_row(row, where: str, columns: dict[str, type]) -> dict:
    """`row`, if it is a dict with these columns, each of its type. Raises UserError."""
    expected = f"expected {', '.join(columns)}"
    if not isinstance(row, dict):
        raise UserError(f"{where}: the entry is not an object; {expected}")
    if missing := [name for name in columns if name not in row]:
        raise UserError(f"{where}: the entry has no {' or '.join(missing)}; {expected}")

    for name, kind in columns.items():
        value = row[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            is_not = f"{shorten(value)}, not {TYPE_NAMES[kind]}"
            raise UserError(f"{where}: {name} is {is_not}; {expected}")
        if isinstance(value, str):
            check_text(value, where, name)
    return row


def check_text(text, where: str, name: str) -> str:
    """`text`, if it is one that can be written as UTF-8. Raises UserError."""
    if not isinstance(text, str):
        raise UserError(f"{where}: {name} is {shorten(text)}, not a text")
    if not text.isascii() and SURROGATE.search(text):
        problem = "holds half of a character (a lone surrogate)"
        raise UserError(f"{where}: {name} {problem}; repair the file")
    return text


def check_name(name: str, where: str, *, inside: bool = True) -> str:
    """`name`, if it can be that of a file. Raises UserError.

    With `inside` it must stay in the folder that it is looked up in: no absolute path, no "..".
    """
    if not name.strip():
        raise UserError(f"{where}: video is empty; expected the name of a file")
    video = f"{where}: the video {shorten(name)}"
    if CONTROL.search(name):
        raise UserError(f"{video} has control characters in its name; repair the file")

    parts = re.split(r"[/\\]", name)  # of Unix and of Windows
    is_absolute = parts[0] == "" or name[1:2] == ":"
    if inside and (is_absolute or ".." in parts):
        raise UserError(f"{video} lies outside of the data root; expected a path below it")
    return name


# ---- lines ---------------------------------------------------------------------------------------


def read_lines(path: Path, expected: str) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends, one at a time."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                # Windows begins a file with a mark that is no part of the text
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        where = f"{path}, line {number}"
        raise UserError(f"{where}: not UTF-8 text; save the file as UTF-8") from error
    except (OSError, ValueError) as error:  # ValueError: no disk can hold such a name
        reason = getattr(error, "strerror", error)
        raise UserError(f"{path}: cannot be read ({reason}); {expected}") from error


def number_lines(path: Path, expected: str) -> Iterator[tuple[str, str]]:
    """(where, line) of each line that is not blank. Raises UserError where all are."""
    is_empty = True
    for number, line in enumerate(read_lines(path, expected), 1):
        if line.strip():
            is_empty = False
            yield f"{path}, line {number}", line
    if is_empty:
        raise UserError(f"{path}: the file is empty; {expected}")


def read_list(path: Path) -> list[tuple[str, str]]:
    """(where, name) of each line of a file of names."""
    lines = number_lines(path, "expected one name a line")
    return [(where, line.strip()) for where, line in lines]


def read_columns(path: Path, columns: Sequence[str]) -> Rows:
    """(where, {column: text}) of a file without header or quotes, its columns between tabs."""
    expected = f"expected {', '.join(columns)}, separated by tabs, without a header"
    for where, line in number_lines(path, expected):
        values = line.rstrip("\r\n").split("\t")
        if len(values) != len(columns):
            raise UserError(f"{where}: {len(values)} columns; {expected}")
        yield where, dict(zip(columns, values))


def read_csv(path: Path, columns: Sequence[str]) -> Rows:
    """(where, {column: text}) of a file whose header holds these columns, and perhaps others.

    They stand between commas, semicolons or tabs, as in the header, whose capitals do not count.
    Blank lines are no rows. Raises UserError also where there is no row.
    """
    expected = f"expected {', '.join(columns)}"
    _, first = next(number_lines(path, expected))
    delimiter = max(",;\t", key=first.count)
    places = []  # of the lines of a row: a quoted caption may run over several

    def lines() -> Iterator[str]:
        for where, line in number_lines(path, expected):
            places.append(where)
            yield line

    header, is_empty = None, True
    try:
        for row in csv.reader(lines(), strict=True, delimiter=delimiter):
            where = places[0]
            places.clear()
            if header is None:
                header = [name.strip().lower() for name in row]
                if missing := [name for name in columns if name.lower() not in header]:
                    raise UserError(
                        f"{where}: the header {first.strip()[:80]!r} has no "
                        f"{' or '.join(missing)}; {expected}"
                    )
                continue

            if len(row) != len(header):
                raise UserError(
                    f"{where}: {len(row)} columns, the header has {len(header)}; {expected} "
                    f"(a caption with {delimiter!r} in it stands in double quotes)"
                )
            is_empty = False
            yield where, {name: row[header.index(name.lower())] for name in columns}
    except csv.Error as error:
        raise UserError(f"{places[0]}: not valid csv ({error}); {expected}") from error
    if is_empty:
        raise UserError(f"{path}: no samples in it; {expected}")


# ---- JSON ----------------------------------------------------------------------------------------


def read_jsonl(path: Path, columns: dict[str, type]) -> Rows:
    """(where, object) of each line. The columns are there, of their types."""
    expected = f"expected an object with {', '.join(columns)} on each line"
    for where, line in number_lines(path, expected):
        yield where, check_row(parse_json(line, where, expected), where, columns)


def read_json(path: Path, expected: str):
    """The value of a JSON file. Raises UserError with the line of a mistake in its syntax."""
    expected = f"expected {expected}"
    return parse_json("".join(read_lines(path, expected)), str(path), expected)


def read_entries(path: Path, document, key: str | None, columns: dict[str, type]) -> Rows:
    """(where, object) of the list document[key]; without a key, the document is the list."""
    entries = check_row(document, str(path), {key: list})[key] if key else document
    if not isinstance(entries, list) or not entries:
        expected = f"expected a list of objects with {', '.join(columns)}"
        raise UserError(f"{path}: no entries in it; {expected}")
    for number, entry in enumerate(entries):
        where = f"{path}, {key or 'entry '}[{number}]"
        yield where, check_row(entry, where, columns)


def read_rows(path: Path, columns: dict[str, type]) -> Rows:
    """By the file's ending: an object per line, a list of objects, or a table with a header."""
    ending = path.suffix.lower()
    if ending == ".jsonl":
        return read_jsonl(path, columns)
    if ending == ".json":
        return read_entries(path, read_json(path, "a list of objects"), None, columns)
    return read_csv(path, list(columns))


def parse_json(text: str, where: str, expected: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        at = f" (line {line})" if line > 1 else ""
        raise UserError(f"{where}: not valid JSON{at}; {expected}") from error


# ---- pickles -------------------------------------------------------------------------------------


def read_pickle(path: Path, expected: str) -> dict:
    """The dict in a pickle. Only dicts, lists, texts and numbers are built, nothing is called.

    Texts that Python 2 wrote are bytes: UTF-8 where they can be, else Latin-1. Raises UserError
    where there is anything else.
    """
    try:
        data = load_plain_pickle(path.read_bytes(), encoding="bytes")
        if isinstance(data, dict):
            return {decode(key): decode(value) for key, value in data.items()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {expected}") from error
    # a damaged pickle raises nearly anything; a list may be its own member, or a key a list
    except Exception as error:
        raise UserError(
            f"{path}: not a pickle of plain data ({shorten(str(error))}); {expected}; "
            "fetch it again"
        ) from error
    raise UserError(f"{path}: holds {shorten(data)}; {expected}")


def decode(value):
    """The same value with texts for bytes, and lists for tuples."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.decode("latin-1")
    return [decode(part) for part in value] if isinstance(value, list | tuple) else value
