"""The kinds of files that data sets come in, read with suspicion.

An annotation file was written by strangers, with a script of their own. A caption that silently
vanished changes every number that is measured afterwards. So nothing is guessed and nothing is
skipped. A column that is missing, a number where a text should be, a broken quote, a byte that is
no UTF-8: each ends in one line (UserError) that says where, and what was expected,

    train.csv, line 3: 1 columns, the header has 2; expected video, caption
    MSRVTT_data.json, sentences[17]: the entry has no caption; expected video_id, caption

The readers know kinds of files, not data sets (published.py). Each yields (where, row) and holds
one row at a time, whatever the size of the file:

    read_csv               a header, then rows
    read_columns           no header, a fixed number of columns, no quotes
    read_jsonl             a JSON object a line
    read_list              a name a line
    read_json              one JSON document, whole
    read_captions_pickle   {video: captions} in a pickle

Three things that a file from elsewhere must not do: run code (a pickle may call any function, so
ours is read by a reader that can build plain data only), point out of the folder of the data
(`check_name`), and bring characters that no name or text holds (control characters in a path,
halves of characters in a caption).
"""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from captions.tagger import load_plain_pickle
from cli import UserError

# ---- rows ----------------------------------------------------------------------------------------

KINDS = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}


def check_row(row, where: str, columns: dict[str, type]) -> None:
    """Raise UserError unless `row` is a dict in which each column is there, and of its type."""
    expected = f"expected {', '.join(columns)}"
    if not isinstance(row, dict):
        raise UserError(f"{where}: the entry is not an object; {expected}")
    if missing := [name for name in columns if name not in row]:
        raise UserError(f"{where}: the entry has no {' or '.join(missing)}; {expected}")

    for name, kind in columns.items():
        if type(row[name]) is not kind:
            raise UserError(f"{where}: {name} is {short(row[name])}, not {KINDS[kind]}; {expected}")
        if kind is str:
            check_text(row[name], where, name)


def check_text(text, where: str, name: str) -> str:
    """`text`, if it is one that can be written as UTF-8. Raises UserError."""
    if not isinstance(text, str):
        raise UserError(f"{where}: {name} is {short(text)}, not a text")
    if not text.isascii() and SURROGATE.search(text):
        raise UserError(
            f"{where}: {name} holds half of a character (a lone surrogate); repair the file"
        )
    return text


SURROGATE = re.compile("[\ud800-\udfff]")
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def short(value) -> str:
    return repr(value)[:40]


def check_name(name: str, where: str, *, inside: bool = True) -> str:
    """A file's name from an annotation file, if no character in it is a control character and, with
    `inside`, it cannot leave the folder that it is looked up in: no absolute path, no "..".
    Raises UserError.
    """
    if not name.strip():
        raise UserError(f"{where}: video is empty; expected the name of a file")
    if CONTROL.search(name):
        raise UserError(
            f"{where}: the video {short(name)} has control characters in its name; repair the file"
        )
    if inside and (name[0] in "/\\" or name[1:2] == ":" or ".." in re.split(r"[/\\]", name)):
        raise UserError(
            f"{where}: the video {short(name)} lies outside of the data root; expected a path "
            "below it"
        )
    return name


# ---- files ---------------------------------------------------------------------------------------


def read_csv(
    path: Path, columns: Sequence[str], delimiter: str = ","
) -> Iterator[tuple[str, dict]]:
    """(where, {column: text}) of each row of a file whose header holds these columns.

    Blank lines are no rows. Raises UserError as the top of this file says; also where the file has
    no header.
    """
    expected = f"expected {', '.join(columns)}"
    reader = csv.reader(read_lines(path, expected), strict=True, delimiter=delimiter)
    header, start = None, 1
    try:
        for row in reader:
            where = f"{path}, line {start}"
            # a quoted caption may run over several lines: the row begins at `start`
            start = reader.line_num + 1
            if header is None and any(map(str.strip, row)):
                header = row
                if missing := [name for name in columns if name not in header]:
                    shown = delimiter.join(header)[:80]
                    raise UserError(
                        f"{where}: the header {shown!r} has no {' or '.join(missing)}; {expected}"
                    )
            elif header and row:
                if len(row) != len(header):
                    raise UserError(
                        f"{where}: {len(row)} columns, the header has {len(header)}; {expected} "
                        "(a caption with a comma stands in double quotes)"
                    )
                yield where, dict(zip(header, row))
    except csv.Error as error:
        raise UserError(f"{path}, line {start}: not valid csv ({error}); {expected}") from error
    if not header:
        raise UserError(f"{path}: the file is empty; {expected}")


def read_columns(
    path: Path, columns: Sequence[str], delimiter: str = "\t"
) -> Iterator[tuple[str, dict]]:
    """(where, {column: text}) of each line of a file without header or quotes: every line has just
    these columns.
    """
    expected, empty = f"expected {', '.join(columns)}, separated by tabs, without a header", True
    for number, line in enumerate(read_lines(path, expected), 1):
        values = line.rstrip("\r\n").split(delimiter)
        if line.strip():
            if len(values) != len(columns):
                raise UserError(f"{path}, line {number}: {len(values)} columns; {expected}")
            empty = False
            yield f"{path}, line {number}", dict(zip(columns, values))
    if empty:
        raise UserError(f"{path}: the file is empty; {expected}")


def read_list(path: Path) -> list[tuple[str, str]]:
    """(where, name) of each line of a file of names, one a line, without a header."""
    names = []
    for number, line in enumerate(read_lines(path, "expected one name a line"), 1):
        where = f"{path}, line {number}"
        if line.strip():
            names.append((where, check_text(line.strip(), where, "the name")))
    if not names:
        raise UserError(f"{path}: the file is empty; expected one name a line")
    return names


def read_jsonl(path: Path, columns: dict[str, type]) -> Iterator[tuple[str, dict]]:
    """(where, object) of each line, in which these columns are there, of their types."""
    expected, empty = f"expected an object with {', '.join(columns)} on each line", True
    for number, line in enumerate(read_lines(path, expected), 1):
        if line.strip():
            row = parse_json(line, f"{path}, line {number}", expected)
            check_row(row, f"{path}, line {number}", columns)
            empty = False
            yield f"{path}, line {number}", row
    if empty:
        raise UserError(f"{path}: the file is empty; {expected}")


def read_json(path: Path, expected: str):
    """The value of a JSON file. Raises UserError with the line of a mistake in its syntax."""
    return parse_json(
        "".join(read_lines(path, f"expected {expected}")), str(path), f"expected {expected}"
    )


def read_entries(
    path: Path, document, key: str | None, columns: dict[str, type]
) -> Iterator[tuple[str, dict]]:
    """(where, object) of each entry of the list document[key] (key None: the document is the list),
    checked.
    """
    if key is not None:
        check_row(document, str(path), {key: list})
    entries = document if key is None else document[key]
    if not isinstance(entries, list) or not entries:
        raise UserError(
            f"{path}: no entries in it; expected a list of objects with {', '.join(columns)}"
        )
    for number, entry in enumerate(entries):
        check_row(entry, where := f"{path}, {key or 'entry '}[{number}]", columns)
        yield where, entry


def read_captions_pickle(path: Path) -> dict[str, list]:
    """{video: [caption, …]} of a pickle, in which a caption is a text or a list of words.

    Only dicts, lists, texts and numbers are built, nothing is called (`tagger.load_plain_pickle`).
    Texts that Python 2 wrote are bytes: UTF-8 where they can be, else Latin-1. Raises UserError
    where there is anything else.
    """

    def text(value):
        if isinstance(value, bytes):
            try:
                return value.decode("utf-8")
            except UnicodeDecodeError:
                return value.decode("latin-1")
        return [text(part) for part in value] if isinstance(value, (list, tuple)) else value

    try:
        data = load_plain_pickle(path.read_bytes(), encoding="bytes")
        if isinstance(data, dict):
            return {text(video): text(captions) for video, captions in data.items()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    # a damaged pickle raises nearly anything; a list may be its own member, or a key a list
    except Exception as error:
        raise UserError(
            f"{path}: not a pickle of plain data ({short(str(error))}); expected {{video: "
            "captions}}; fetch it again"
        ) from error
    raise UserError(f"{path}: holds {short(data)}; expected {{video: captions}}")


def read_lines(path: Path, expected: str) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends, one at a time."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{path}, line {number}: not UTF-8 text; save the file as UTF-8"
                    ) from error
    except (OSError, ValueError) as error:  # ValueError: no disk can hold such a name
        raise UserError(
            f"{path}: cannot be read ({getattr(error, 'strerror', error)}); {expected}"
        ) from error


def parse_json(text: str, where: str, expected: str):
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: refuse_twins(pairs, where))
    except json.JSONDecodeError as error:
        at = f" (line {error.lineno})" if "\n" in text.strip() else ""
        raise UserError(f"{where}: not valid JSON{at}; {expected}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON; {expected}") from error


def refuse_twins(pairs: list, where: str) -> dict:
    """A dict; a key that comes twice would lose the first one's value."""
    found = {}
    for name, value in pairs:
        if name in found:
            raise UserError(f"{where}: {short(name)} stands there twice")
        found[name] = value
    return found


# ---- one's own videos ----------------------------------------------------------------------------


def read_pairs(path: Path) -> Iterator[tuple[str, dict]]:
    """(where, {"video", "caption", …}) of each row of a csv (with header) or jsonl file."""
    if path.suffix.lower() == ".jsonl":
        yield from read_jsonl(path, {"video": str, "caption": str})
    else:
        yield from read_csv(path, ["video", "caption"])
