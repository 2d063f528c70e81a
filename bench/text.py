"""How long the longest captions take: every function that reads text, on strings made to be slow.

    python -m bench.text                          # all; the tagger alone takes over 7 minutes
    python -m bench.text --functions clean parse  # some of them

A caption comes from a file that somebody else wrote. A pattern that goes back and forth, or a loop
that starts again until nothing changes, needs a time that grows with the square of the length: one
such caption stops a run for hours. So every function gets texts of 10, 100 and 1,000 kB, each the
repetition of something that is awkward for it. Time is CPU time of this process. Growth is the time
of the longest text over that of the next one: 10 where time is linear, 100 where it is quadratic.
Times below a hundredth of a second count as one. A row is a function with the text that took it
longest, or an alarm: a text whose growth is above 20, twice.
"""

import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from captions.tagger import parse
from captions.tokenizer import Tokenizer, clean
from cli import UserError, parse_config, run
from datasets.readers import read_columns, read_csv, read_json, read_jsonl, read_list
from knowledge import extract_knowledge, meaning_ids, pack, read_captions

LENGTHS = (10_000, 100_000, 1_000_000)  # characters
LINEAR = 20  # growth that is still taken for linear
SHORTEST = 0.01  # seconds: below it, a time is noise

REPEATED = {
    "entities": "&amp;",
    "nested entities": "amp;",  # behind one "&"
    "ampersands": "&",
    "tags": "<&lt;b&gt;>",
    "one letter": "x",
    "two letters": "ab",
    "digits": "7",
    "number of a letter": "9",  # behind "&#"
    "numbers": "1.",
    "hyphens": "a-",
    "apostrophes": "'",
    "clitics": "dog's they don t ",
    "quotes": '"',
    "accents": "\u0301\u0327",
    "accented letters": "e\u0301\u0327",
    "twice encoded": "Ã©",
    "curly quotes": "â€™ ",
    "ligatures": "\ufdfa",
    "syllables": "\u1100\u1161\u11a8",
    "emoji": "👨\u200d👩",
    "control codes": "\x1b[0m\x07",
    "spaces": " ",
    "lines": "é\n",
    "half characters": "\ud83d",
    "brackets": "[",
    "nouns": "dog ",
    "coordinated nouns": "dog and ",
    "verbs": "chases ",
    "sentences": "a dog chases a cat and ",
    "passives": "dogs are chased and ",
    "pieces": "piece of ",
    "auxiliaries": "is ",
    "adverbs": "quickly ",
    "prepositions": "over ",
    "adjectives": "red ",
    "commas": "dog , ",
}
# what stands around a repeated text, so that a loop has something to look for
AROUND = {
    "nested entities": "&{}",
    "number of a letter": "&#{};",
    "accents": "a{}",
    "coordinated nouns": "a man pets a {}cat",
    "pieces": "a man eats a {}cake",
    "auxiliaries": "a cat {}chased",
    "adverbs": "a man runs {}home",
    "prepositions": "a man jumps {}fences",
    "adjectives": "a {}ball is thrown",
    "commas": "{}cats are chased",
}


@dataclass
class BenchConfig:
    """Time of the functions that read text, on long and awkward texts."""

    functions: tuple[str, ...] = ()  # names from the table; none: all


def main() -> None:
    wanted = parse_config(BenchConfig).functions
    with tempfile.TemporaryDirectory() as folder:
        functions = make_functions(Path(folder))
        unknown = set(wanted) - set(functions)
        if unknown:
            names = ", ".join(functions)
            raise UserError(f"--functions {' '.join(sorted(unknown))}: not among {names}")

        print("| function | text | 10 kB, s | 100 kB, s | 1 MB, s | growth | |")
        print("|---|---|---|---|---|---|---|")
        for name in wanted or functions:
            bench_function(name, functions[name])


def make_functions(folder: Path) -> dict[str, Callable[[str], object]]:
    tokenizer = Tokenizer.train(["a dog chases a cat"] * 2, 300)
    nothing = pack([[]])  # the knowledge of a caption without concepts

    def of_file(name: str, read: Callable, before: str = "", after: str = "") -> Callable:
        path = folder / name

        def write_and_read(text: str):
            content = before + text.replace("\n", " ") + after
            path.write_text(content, encoding="utf-8", errors="replace")
            found = read(path)
            return found if found is None else list(found)

        return write_and_read

    columns = ("video", "caption")
    kinds = dict.fromkeys(columns, str)
    return {
        "clean": clean,
        "encode": lambda text: tokenizer.encode(text, 77),
        "train": lambda text: Tokenizer.train([text], 260),
        "parse": parse,
        "extract_knowledge": extract_knowledge,
        "meaning_ids": lambda text: meaning_ids([text], nothing),
        "read_captions": of_file("a.txt", read_captions),
        "read_csv": of_file("a.csv", lambda p: read_csv(p, columns), "video,caption\nx.mp4,"),
        "read_columns": of_file("a.tsv", lambda p: read_columns(p, columns), "x.mp4\t"),
        "read_list": of_file("b.txt", read_list),
        "read_jsonl": of_file(
            "a.jsonl", lambda p: read_jsonl(p, kinds), '{"video": "x.mp4", "caption": "', '"}'
        ),
        "read_json": of_file("a.json", lambda p: read_json(p, "a list"), '["', '"]'),
    }


def bench_function(name: str, function: Callable[[str], object]) -> None:
    """Print the row of the slowest text, and of each whose time is not linear."""
    measure(function, "a dog chases a cat")  # loads what it needs
    slowest, linear_row = 0.0, ""
    for kind, unit in REPEATED.items():
        texts = [AROUND.get(kind, "{}").format(unit * (length // len(unit))) for length in LENGTHS]
        seconds, growth = [measure(function, texts[0])], 0.0
        for shorter, text in itertools.pairwise(texts):
            seconds.append(measure(function, text))
            growth = growth_of(seconds)
            if growth > LINEAR:  # once more: the machine may have been busy
                seconds[-2:] = measure(function, shorter), measure(function, text)
                growth = growth_of(seconds)
            if growth > LINEAR:
                break

        listed = [f"{x:.3f}" for x in seconds] + ["not tried"] * (len(LENGTHS) - len(seconds))
        row = f"| {name} | {kind} | {' | '.join(listed)} | {growth:.0f} |"
        if growth > LINEAR:
            print(f"{row} not linear |", flush=True)
        elif seconds[-1] >= slowest:
            slowest, linear_row = seconds[-1], f"{row} |"
    print(linear_row, flush=True)


def growth_of(seconds: list[float]) -> float:
    """The last over the one before it."""
    return max(seconds[-1], SHORTEST) / max(seconds[-2], SHORTEST)


def measure(function: Callable[[str], object], text: str) -> float:
    """CPU seconds of one call. A text that is refused in one line is fine."""
    started = time.process_time()
    try:
        function(text)
    except UserError:
        pass
    return time.process_time() - started


if __name__ == "__main__":
    run(main)
