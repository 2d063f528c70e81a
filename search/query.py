"""Find a moment in one's own videos by a sentence: embed what is new in the folder, search exactly.

    python eval.py --task search --videos FOLDER --query "a dog runs on the beach"

A model that puts videos and texts into one space makes search a product. Embed every video once,
and a query when it is asked. The best matches are the largest dot products:

    a file         -> read_windows -> windows of about 8 s -> model -> emb [W, E]
    "a dog runs …" -> tokenizer -> model -> text_emb [E]
    emb @ text_emb -> scores [W] -> the best window of each video -> the first `top`

A long video is cut into windows. One vector for an hour says nothing about a minute, and so the
answer can say *when*. 8 seconds: usual training clips last 5 to 20, and are described as a whole.
Nothing is approximate. Approximate indexes (HNSW, inverted files) pay from tens of millions of
vectors on, and miss neighbours.

Files are decoded in processes that may hang or die, as for training (videos/workers.py). What is
embedded is kept on disk: search/index.py.
"""

import contextlib
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from cli import UserError
from data import prepare_video
from report.page import picture, printable, render
from search.index import File, Index, Record, find_videos
from training.checkpoint import Checkpoint
from videos.decode import VideoError, read_windows
from videos.workers import run_guarded

BATCH_PIXELS = 2**21  # as in eval.py
ANSWERS_SHOWN = 20  # on the page, where many queries are asked


# ---- new videos ----------------------------------------------------------------------------------


def decode_windows(path: str, *, num_frames: int, size: int, window: float, scratch: str):
    """In a process of its own: (spans [W, 2], file of their frames), or why it is broken (str).

    The frames, uint8 [W, T, H, W, 3], go through a file: a film has gigabytes of them.
    """
    spans = []
    try:
        with tempfile.NamedTemporaryFile(dir=scratch, delete=False) as file:
            for start, end, frames in read_windows(path, num_frames, size=size, window=window):
                file.write(frames.data)
                spans.append((start, end))
    except VideoError as error:
        return str(error)
    return np.array(spans, np.float32), file.name


def embed_new(
    model, index: Index, root: Path, todo: list[File], *, window: float, workers: int | None = None
) -> dict[File, Record]:
    """Embed these files below `root`, and put each into the index as it comes. Returns them.

    Raises UserError where the model yields NaN, or the index cannot be written.
    """
    paths = [str(root / file.path) for file in todo]
    num_frames, size = model.config.num_frames, model.config.image_size
    workers = min(workers or os.cpu_count(), len(todo))
    new = {}
    with tempfile.TemporaryDirectory() as scratch:
        how = dict(num_frames=num_frames, size=size, window=window, scratch=scratch)
        decoded = run_guarded(partial(decode_windows, **how), paths, workers=workers)
        bar = tqdm(decoded, "embed videos", len(todo), unit="video", disable=not todo)
        with contextlib.closing(decoded):
            for n, found in bar:
                if not os.path.exists(paths[n]):
                    continue  # gone meanwhile: not broken, its disk may come back
                if isinstance(found, str):
                    reason = found.removeprefix(f"{paths[n]}: ")
                    nothing = np.zeros((0, index.embed_dim), np.float32)
                    record = Record(reason, np.zeros((0, 2), np.float32), nothing)
                else:
                    spans, name = found
                    shape = (len(spans), num_frames, size, size, 3)
                    frames = np.memmap(name, np.uint8, "r", shape=shape)
                    record = Record("", spans, embed_windows(model, frames))
                    os.unlink(name)
                index.add(todo[n], record)
                new[todo[n]] = record
    return new


@torch.inference_mode()
def embed_windows(model, frames: np.ndarray) -> np.ndarray:
    """uint8 [W, T, H, W, 3] -> float32 [W, E], unit norm."""
    rows = max(1, BATCH_PIXELS // frames[0, ..., 0].size)
    parts = []
    for first in range(0, len(frames), rows):
        video = torch.from_numpy(np.array(frames[first : first + rows]))
        video = prepare_video(video.to(model.logit_scale.device))
        parts.append(model.encode_video(video).cpu().numpy())
    return check_finite(np.concatenate(parts), "video embeddings")


def check_finite(emb: np.ndarray, what: str) -> np.ndarray:
    """`emb` itself. Raises UserError where it is not finite: NaN would rank at random, and stay."""
    if not np.isfinite(emb).all():
        raise UserError(
            f"{what}: NaN or infinity inside; the model has diverged or its checkpoint is damaged"
        )
    return emb


# ---- search --------------------------------------------------------------------------------------


class Match(NamedTuple):
    """A video that answers a query, and its best window."""

    score: float
    path: str  # as in File
    start: float  # seconds
    end: float


@dataclass
class Answer:
    """Best first."""

    query: str
    matches: list[Match]
    seconds: tuple[float, float]  # to embed the query, to search


class Library:
    """All windows of all videos in memory, ready for queries."""

    def __init__(self, records: dict[File, Record]):
        """`records`: of videos with windows, at least one."""
        lengths = [len(record.emb) for record in records.values()]
        assert lengths and min(lengths) > 0, "a video without windows cannot be found"
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
        top = min(top, len(best))
        least = np.partition(best, -top)[-top]
        candidates = np.flatnonzero(best >= least)  # `top`, more where some tie
        candidates = candidates[np.argsort(-best[candidates], kind="stable")]

        matches = []
        for video in candidates[:top].tolist():
            first, last = self.first[video : video + 2]
            row = first + np.argmax(scores[first:last])
            matches.append(Match(float(scores[row]), self.paths[video], *self.spans[row].tolist()))
        return matches


@torch.inference_mode()
def answer(checkpoint: Checkpoint, library: Library, query: str, top: int) -> Answer:
    """The videos that the query describes best.

    If it is longer than the model reads, a line says so.
    """
    started = time.perf_counter()
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    length, device = model.config.text_length, model.logit_scale.device
    tokens, text_mask = tokenizer.encode_batch([query], length)  # [1, L]
    if len(tokenizer.encode(query, length + 1)) > length:
        last = printable(tokenizer.decode(tokens[0].tolist())[-40:])
        print(f"the query is long: the model reads its first {length - 2} tokens, up to “{last}”")
    text_emb = model.encode_text(tokens.to(device), text_mask.to(device))[0].cpu().numpy()  # [E]
    embedded = time.perf_counter()

    matches = library.search(check_finite(text_emb, "query embedding"), top)
    return Answer(query, matches, (embedded - started, time.perf_counter() - embedded))


def print_answer(given: Answer) -> None:
    """A line a match: rank, score, time, path; nothing that could move the cursor."""
    print(f"“{printable(given.query[:220])}” ({1000 * sum(given.seconds):.0f} ms)")
    for rank, match in enumerate(given.matches, 1):
        when, path = clock(match.start, match.end), printable(match.path)
        print(f"{rank:4d}  {match.score:6.3f}  {when:>15s}  {path}")


def clock(start: float, end: float) -> str:
    """Seconds as 0:08–0:16, 1:02:03–1:02:11; a second at least."""
    first = round(start)
    last = max(first + 1, round(end))
    hours = last >= 3600
    shown = []
    for seconds in (first, last):
        minutes, second = divmod(seconds, 60)
        whole = f"{minutes // 60}:{minutes % 60:02d}" if hours else str(minutes)
        shown.append(f"{whole}:{second:02d}")
    return "–".join(shown)


def ask() -> Iterator[str]:
    """Queries from the terminal or a pipe, one a line, until it ends; empty lines are none."""
    if sys.stdin.isatty():
        print("one query a line (Ctrl-D ends):")
    for line in sys.stdin:
        if line.strip():
            yield line.strip()


# ---- the task ------------------------------------------------------------------------------------


def search_folder(
    checkpoint: Checkpoint,
    folder: str | None,
    query: str | None,
    *,
    top: int,
    window: float,
    index: str | None,
    cache: str,
    out: Path,
) -> dict:
    """`eval.py --task search`: bring the index up to date, answer, print, write out/report.html.

    query None: queries are asked for. index: its folder; None: CACHE/index. Returns {"videos",
    "windows", "new", "broken": {path: reason}, "answers": [Answer], …}. Raises UserError: no such
    folder, nothing in it that decodes, a query without text, an index or page that cannot be
    written.
    """
    check_flags(folder, query, top, window)
    root = Path(folder).resolve()
    files, notes = find_videos(root)
    print(f"{printable(str(root))}: {len(files):,} videos")
    print_some("", notes)

    place = hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
    place = Path(index or Path(cache) / "index" / place) / "index.sqlite"
    recipe = dict(checkpoint=checkpoint.sha256, window=window)
    on_disk = Index(place, **recipe, embed_dim=checkpoint.model.config.embed_dim)
    known = on_disk.known(files)
    todo = [file for file in files if file not in known]
    new = embed_new(checkpoint.model, on_disk, root, todo, window=window)
    reasons = [f"{file.path}: {record.reason}" for file, record in new.items() if record.reason]
    print_some("broken: ", reasons)

    known |= new
    known = {file: known[file] for file in files if file in known}  # by path again
    broken = {file.path: record.reason for file, record in known.items() if record.reason}
    if len(broken) == len(known):
        raise UserError(
            f"--videos {printable(folder)}: nothing to search in; it holds {len(files):,} video "
            f"files, and {len(broken):,} of them cannot be read"
        )
    library = Library({file: record for file, record in known.items() if not record.reason})
    facts = dict(
        videos=len(library.paths),
        windows=len(library.emb),
        new=len(new) - len(reasons),
        seconds_a_window=window,
        checkpoint=str(checkpoint.path),
        step=checkpoint.step,
        index=str(place),
    )
    print(
        f"index {printable(str(place))}: {facts['videos']:,} videos ({facts['new']:,} new), "
        f"{facts['windows']:,} windows, {library.emb.nbytes / 1e6:.1f} MB"
    )
    if broken:
        print(f"{len(broken):,} broken videos are left out until they change")

    answers = []
    picture.cache_clear()  # files may have changed since the last page
    for text in [query] if query is not None else ask():
        answers.append(answer(checkpoint, library, text, top))
        print_answer(answers[-1])
        newest = [show(given, root) for given in answers[: -ANSWERS_SHOWN - 1 : -1]]
        about = dict(title="CLOP search", folder=str(root), library=facts, broken=broken)
        render("search.html", out / "report.html", answers=newest, **about)
    if answers:
        print(printable(str(out / "report.html")))
    return facts | dict(broken=broken, answers=answers)


def check_flags(folder: str | None, query: str | None, top: int, window: float) -> None:
    if folder is None or not os.path.isdir(folder):
        raise UserError(
            f"--videos {folder or ''}: not a folder; name the one that holds your videos"
        )
    if query is not None and not query.strip():
        raise UserError("--query: empty; describe what you look for, or leave the flag out")
    if top < 1 or not window > 0:
        raise UserError(f"--top {top}, --window {window}: both must be positive")


def print_some(prefix: str, lines: list[str]) -> None:
    for line in lines[:10]:
        print(f"    {prefix}{printable(line)}")
    if len(lines) > 10:
        print(f"    … and {len(lines) - 10:,} more")


def show(given: Answer, root: Path) -> dict:
    """An answer as the page needs it."""
    matches = []
    for match in given.matches:
        video = root / match.path
        # percent-encoded: no markup is left in it
        link = f"{video.as_uri()}#t={match.start:.1f},{match.end:.1f}"
        window = (str(video), match.start, match.end)
        seen = dict(video=window, link=link, clock=clock(match.start, match.end))
        matches.append(match._asdict() | seen)
    return asdict(given) | dict(matches=matches)
