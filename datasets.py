"""Data sets by name: a loader each, which reads the files as their authors publish them."""

from collections.abc import Callable
from pathlib import Path

from cli import UserError
from splits import Question, Split, read_rows


def load_split(dataset: str, data: str | Path, role: str = "train") -> Split:
    """The "train", "val" or "test" split of a data set (one of LOADERS) at the path `data`.

    Raises UserError, with file, line and what was expected, where a file is missing, empty or malformed. Videos are not
    looked at: `keep_decodable` finds the missing and the broken ones.
    """
    assert role in ("train", "val", "test"), f"{role=}: train, val or test"
    if dataset not in LOADERS:
        raise UserError(f"{dataset}: no such data set; one of {', '.join(LOADERS)}")
    return LOADERS[dataset](Path(data), role)


def load_pairs(path: Path, role: str) -> Split:
    """A csv (with header) or jsonl file with `video` and `caption`; or a folder with train.csv, val.csv, test.csv."""
    path = path / f"{role}.csv" if path.is_dir() else path
    pairs = ((str(path.parent / row["video"]), row["caption"]) for _, row in read_rows(path, ("video", "caption")))
    split = Split.from_pairs(pairs)
    if not split.captions:
        raise UserError(f"{path}: no samples in it; expected a line with video and caption for each")
    return split


LOADERS: dict[str, Callable[[Path, str], Split]] = {"toy": load_pairs, "csv": load_pairs}  # a data set is one function


def load_questions(path: str | Path) -> list[Question]:
    """Multiple choice from a jsonl file: {"video", "options": [caption, …], "answer": index, "kind"} a line."""
    path, questions = Path(path), []
    for line, row in read_rows(path, ("video", "kind"), others=("options", "answer")):
        options, answer = row["options"], row["answer"]
        if not (isinstance(options, list) and len(options) > 1 and all(isinstance(option, str) for option in options)):
            raise UserError(f"{path}, line {line}: options must be a list of two or more captions")
        if type(answer) is not int or not 0 <= answer < len(options):
            raise UserError(f"{path}, line {line}: answer is {answer!r}, expected 0 … {len(options) - 1}")
        questions.append(Question(str(path.parent / row["video"]), options, answer, row["kind"]))
    if not questions:
        raise UserError(f"{path}: no questions in it; expected one JSON object a line")
    return questions
