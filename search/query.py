"""Find a moment in one's own videos by a sentence: embed what is new in the folder, search exactly.

    python eval.py --task search --videos FOLDER --query "a dog runs on the beach"

A model that puts videos and texts into one space makes search a product. Embed every video once,
and a query when it is asked. The best matches are the largest dot products:

    a file         -> read_windows -> windows of about 8 s -> model -> emb [W, E]
    "a dog runs …" -> tokenizer -> model -> text_emb [E]
    emb @ text_emb -> scores [W] -> the best windows of each video -> the first `top` videos

A long video is cut into windows. One vector for an hour says nothing about a minute, and so the
answer can say *when*, and name several moments. 8 seconds: usual training clips last 5 to 20, and
are described as a whole. Nothing is approximate. Approximate indexes (HNSW, inverted files) pay
from tens of millions of vectors on, and miss neighbours.

Something always scores highest. So an answer also says which words the model hardly knows, and
which scores claim nothing (`UNRELATED`).

Files are decoded in processes that may hang or die, as for training (videos/workers.py). What is
embedded is kept on disk: search/index.py.
"""

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from captions.tokenizer import split_words
from cli import UserError
from data import prepare_video
from report.page import picture, printable, render
from search.index import File, Index, Record, find_videos
from training.checkpoint import Checkpoint
from videos.decode import VideoError, read_windows
from videos.workers import run_guarded

BATCH_PIXELS = 2**21  # per batch: 256 toy videos, or 5 of preset base
ANSWERS_SHOWN = 20  # on the page, where many queries are asked
MOMENTS = 3  # of one video, in an answer
# What no camera shows. A match is claimed only where it scores higher than all of these do in the
# same library: a number would be wrong for another model. On the toy world 994 of 1,000 captions
# claim a match, and 1 of 20 sentences of other scenes: python -m bench.search --toy cache/toy
UNRELATED = """
    the stock market fell sharply on tuesday
    quarterly report of the finance committee
    photosynthesis turns light into sugar
    the senate voted on the budget
    my password does not work any more
    he owes the bank a lot of money
    the theorem follows by induction
    the price of gold per ounce
    a history of the roman empire
    freedom of speech is a human right
"""


# ---- new videos ----------------------------------------------------------------------------------


def decode_windows(path: str, *, num_frames: int, size: int, window: float, scratch: str):
    """In a process of its own: (spans [W, 2], file of their frames), or why there are none (str).

    The frames, uint8 [W, T, H, W, 3], go through a file: a film has gigabytes of them.
    """
    spans = []
    with tempfile.NamedTemporaryFile(dir=scratch, delete=False) as file:
        try:
            for start, end, frames in read_windows(path, num_frames, size=size, window=window):
                file.write(frames.data)
                spans.append((start, end))
        except (VideoError, OSError) as error:
            return str(error)
    return np.array(spans, np.float32), file.name


def embed_new(model, index: Index, root: Path, todo: list[File], *, window: float) -> dict:
    """Embed these files below `root`, and put each into the index as it comes.

    Returns {path: why} of those that cannot be read. Raises UserError where the model yields NaN,
    or the index cannot be written.
    """
    paths = [str(root / file.path) for file in todo]
    num_frames, size = model.config.num_frames, model.config.image_size
    workers = min(os.cpu_count(), len(todo))
    broken = {}

    # frames go from process to process through files, deleted with their folder
    with tempfile.TemporaryDirectory() as scratch:
        how = dict(num_frames=num_frames, size=size, window=window, scratch=scratch)
        decoded = run_guarded(partial(decode_windows, **how), paths, workers=workers)
        bar = tqdm(decoded, "embed videos", len(todo), unit="video", disable=not todo)
        with contextlib.closing(decoded):
            for n, found in bar:
                if isinstance(found, str):
                    if os.path.exists(paths[n]):  # not gone meanwhile
                        broken[todo[n].path] = printable(found.removeprefix(f"{paths[n]}: "))
                    continue

                spans, name = found
                shape = (len(spans), num_frames, size, size, 3)
                frames = np.memmap(name, np.uint8, "r", shape=shape)
                index.add(todo[n], Record(spans, embed_windows(model, frames)))
                os.unlink(name)

    return broken


def embed_windows(model, frames: np.ndarray) -> np.ndarray:
    """uint8 [W, T, H, W, 3] -> float32 [W, E], unit norm."""
    rows = max(1, BATCH_PIXELS // frames[0, ..., 0].size)
    starts = range(0, len(frames), rows)
    batches = (torch.from_numpy(np.array(frames[first : first + rows])) for first in starts)
    emb = embed_batches(model, batches)
    check_finite(emb, "video embeddings")
    return emb.numpy()


@torch.inference_mode()
def embed_batches(model, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """video_emb [n, E], float32 on the CPU, of batches of frames, uint8 [B, T, H, W, 3]."""
    parts = []
    for video in batches:
        video = prepare_video(video.to(model.logit_scale.device))
        parts.append(model.encode_video(video).cpu())
    return torch.cat(parts)


def check_finite(values: torch.Tensor, what: str) -> None:
    """Raises UserError where a value is not finite: NaN would rank at random, and stay."""
    if not torch.isfinite(values).all():
        raise UserError(
            f"{what}: NaN or infinity inside; the model has diverged or its checkpoint is damaged"
        )


# ---- search --------------------------------------------------------------------------------------


@dataclass
class Moment:
    """A window of a video, and how well it fits."""

    score: float
    start: float  # seconds
    end: float


@dataclass
class Match:
    """A video that answers a query."""

    path: str  # as in File
    moments: list[Moment]  # best first, none beside a better one


@dataclass
class Answer:
    """Best first."""

    query: str
    matches: list[Match]
    floor: float  # scores up to it claim nothing
    notes: list[str]  # what the reader must know


class Library:
    """All windows of all videos in memory, ready for queries."""

    def __init__(self, records: dict[File, Record]):
        """records: of one video at least."""
        lengths = [len(record.emb) for record in records.values()]
        self.paths = [file.path for file in records]
        self.first = np.cumsum([0, *lengths])  # [N + 1]: row of its first window
        self.spans = np.concatenate([record.spans for record in records.values()])  # [W, 2]
        self.emb = np.concatenate([record.emb for record in records.values()])  # [W, E]

    def search(self, text_emb: np.ndarray, top: int) -> list[Match]:
        """The `top` videos whose best window has the largest product with `text_emb` [E].

        Of equals the first path comes first.
        """
        scores = self.emb @ text_emb  # [W]
        best = np.maximum.reduceat(scores, self.first[:-1])  # [N]
        order = np.argsort(-best, kind="stable")[:top]
        return [Match(self.paths[n], self.find_moments(n, scores)) for n in order]

    def find_moments(self, n: int, scores: np.ndarray) -> list[Moment]:
        """The best windows of the n-th video: `MOMENTS` at most, no two side by side."""
        first, last = self.first[n : n + 2]
        rows = []
        for row in first + np.argsort(-scores[first:last], kind="stable"):
            if len(rows) < MOMENTS and all(abs(row - better) > 1 for better in rows):
                rows.append(row)
        return [Moment(float(scores[row]), *self.spans[row].tolist()) for row in rows]


BATCH_TEXTS = 256


@torch.inference_mode()
def embed_texts(model, tokenizer, captions: Sequence[str]) -> torch.Tensor:
    """text_emb [n_text, E], float32 on the CPU. Equal captions get equal embeddings."""
    device = model.logit_scale.device
    # captions of like lengths together need little padding
    distinct = sorted(set(captions), key=lambda caption: (len(caption), caption))
    parts = []
    for i in range(0, len(distinct), BATCH_TEXTS):
        batch = distinct[i : i + BATCH_TEXTS]
        tokens, text_mask = tokenizer.encode_batch(batch, model.config.text_length)  # [B, L]
        parts.append(model.encode_text(tokens.to(device), text_mask.to(device)).cpu())

    place = {caption: i for i, caption in enumerate(distinct)}
    return torch.cat(parts)[[place[caption] for caption in captions]]


def embed_query(checkpoint: Checkpoint, query: str) -> np.ndarray:
    """[E]. Raises UserError where it is not finite."""
    text_emb = embed_texts(checkpoint.model, checkpoint.tokenizer, [query])[0]
    check_finite(text_emb, "query embedding")
    return text_emb.numpy()


def note_limits(checkpoint: Checkpoint, query: str) -> list[str]:
    """What of the query the model does not read, or hardly knows."""
    tokenizer, length = checkpoint.tokenizer, checkpoint.model.config.text_length
    notes = []
    if len(tokenizer.encode(query, length + 1)) > length:
        notes.append(f"the query is long: the model reads its first {length - 2} tokens")

    # frequent words of the training captions are one token each, between start and end
    words = [word for word in split_words(query)[:length] if word.isalpha()]
    strange = [word for word in dict.fromkeys(words) if len(tokenizer.encode(word, 4)) > 3]
    if strange:
        notes.append(f"rare or new to the model, so it may not know: {', '.join(strange)}")
    return notes


def find_floor(checkpoint: Checkpoint, library: Library) -> float:
    """The best score that a sentence of `UNRELATED` reaches."""
    sentences = UNRELATED.strip().splitlines()
    text_emb = np.stack([embed_query(checkpoint, sentence) for sentence in sentences])
    return float((library.emb @ text_emb.T).max())


def answer(checkpoint: Checkpoint, library: Library, query: str, top: int, floor: float) -> Answer:
    """The videos that the query describes best. floor: of `find_floor`."""
    matches = library.search(embed_query(checkpoint, query), top)
    notes = note_limits(checkpoint, query)
    if matches[-1].moments[0].score <= floor:
        notes.append(f"?: claims nothing, unrelated sentences score up to {floor:.3f} here")
    return Answer(query, matches, floor, notes)


def print_answer(given: Answer) -> None:
    """A line a moment: rank, score, time, path; nothing that could move the cursor."""
    print(f"“{printable(given.query[:220])}”")
    for rank, match in enumerate(given.matches, 1):
        for moment in match.moments:
            place = rank if moment is match.moments[0] else ""
            mark = "?" if moment.score <= given.floor else " "
            when = clock(moment.start, moment.end)
            print(f"{place:>4}  {moment.score:6.3f}{mark} {when:>13s}  {printable(match.path)}")
    print_some("", given.notes)


def clock(start: float, end: float) -> str:
    """Seconds as minutes, 0:08–0:16 or 62:03–62:11; a second at least."""
    first = round(start)
    last = max(first + 1, round(end))
    return f"{first // 60}:{first % 60:02d}–{last // 60}:{last % 60:02d}"


def ask() -> Iterator[str]:
    """Queries from the terminal or a pipe, one a line, until it ends; empty lines are none."""
    if sys.stdin.isatty():
        print("one query a line (Ctrl-D ends):")
    for line in sys.stdin:
        if line.strip():
            yield line.strip()


# ---- the task ------------------------------------------------------------------------------------


def search_folder(checkpoint: Checkpoint, config, out: Path) -> dict:
    """`eval.py --task search`: bring the index up to date, answer, print, write out/report.html.

    config: eval.EvalConfig. Returns {"videos", "windows", "new", "broken": {path: reason},
    "answers": [Answer], …}. Raises UserError: no such folder, nothing in it that decodes, a query
    without text, an index or page that cannot be written.
    """
    check_flags(config)
    root = Path(config.videos).resolve()
    files, troubles = find_videos(root)
    print(f"{printable(str(root))}: {len(files):,} videos")
    print_some("", troubles)

    place = hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
    place = Path(config.index or Path(config.cache) / "index" / place) / "index.sqlite"
    index = Index(place, checkpoint=checkpoint.sha256, window=config.window)

    known = index.known(files)
    todo = [file for file in files if file not in known]
    broken = embed_new(checkpoint.model, index, root, todo, window=config.window)
    if todo:
        known = index.known(files)

    reasons = [f"{path}: {reason}" for path, reason in sorted(broken.items())]
    print_some("cannot be read: ", reasons)
    if not known:
        raise UserError(
            f"--videos {printable(config.videos)}: nothing to search in; it holds {len(files):,} "
            f"video files, and {len(broken):,} of them cannot be read"
        )

    library = Library(known)
    facts = dict(
        videos=len(known),
        windows=len(library.emb),
        new=len(known.keys() & set(todo)),
        checkpoint=str(checkpoint.path),
        index=str(place),
    )
    print(printable(", ".join(f"{name} {value}" for name, value in facts.items())))

    answers, floor = [], find_floor(checkpoint, library)
    picture.cache_clear()  # files may have changed since the last page
    about = dict(title="CLOP search", root=root, library=facts, reasons=reasons, clock=clock)
    for text in [config.query] if config.query is not None else ask():
        answers.append(answer(checkpoint, library, text, config.top, floor))
        print_answer(answers[-1])
        newest = answers[: -ANSWERS_SHOWN - 1 : -1]
        render("search.html", out / "report.html", answers=newest, **about)

    if answers:
        print(printable(str(out / "report.html")))
    return facts | dict(broken=broken, answers=answers)


def check_flags(config) -> None:
    if config.videos is None or not os.path.isdir(config.videos):
        raise UserError(
            f"--videos {config.videos or ''}: not a folder; name the one that holds your videos"
        )
    if config.query is not None and not config.query.strip():
        raise UserError("--query: empty; describe what you look for, or leave the flag out")
    if config.top < 1 or not config.window > 0:
        raise UserError(f"--top {config.top}, --window {config.window}: both must be positive")


def print_some(prefix: str, lines: list[str]) -> None:
    for line in lines[:10]:
        print(f"    {prefix}{printable(line)}")
    if len(lines) > 10:
        print(f"    … and {len(lines) - 10:,} more")
