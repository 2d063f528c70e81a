"""Find a moment in one's own videos by a sentence: embed what is new in the folder, search exactly.

    python eval.py --task search --videos ~/clips --query "a dog runs on the beach" --checkpoint
    runs/mine

A model that puts videos and texts into one space makes search a product. Embed every video once;
embed a query when it is asked; the best matches are the largest dot products:

    a file ── read_windows ──> windows of about 8 s ── model ──> emb [W, E] ─┐ "a dog runs …"
    ─────────────────────────────────── model ──> [E] ────────┴─> scores [W], best of each video,
    top k

A long video is cut into windows, because one vector for an hour says nothing about a minute, and so
that the answer can say *when*. 8 seconds: usual training clips last 5 to 20, and are described as a
whole; `--window inf` cuts nothing. Nothing is approximate: 100,000 vectors are multiplied in a few
hundredths of a second (bench/search.py). Approximate indexes (HNSW, inverted files) pay from tens
of millions on, and miss neighbours. What is embedded is kept on disk: videoindex.py.

    python search.py        # two small videos and a model that has learned nothing
"""

import contextlib
import hashlib
import os
import queue
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from cli import UserError
from data import prepare_video
from report.page import document, picture, printable, quote, section
from search.index import File, Index, Record, find_videos
from training.checkpoint import Checkpoint
from videos.decode import VideoError, read_windows

BATCH_PIXELS = 2**21  # as in eval.py
COMMIT_SECONDS = 2  # of work that an interruption may cost
ANSWERS_SHOWN = 20  # on the page, where many queries are asked


# ---- new videos: threads decode, the model embeds ------------------------------------------------


def decode_ahead(
    paths: list[str], num_frames: int, *, size: int, window: float, workers: int
) -> Iterator[tuple]:
    """(i, (start, end, frames)) for the windows of video i, in order, then (i, None), or (i,
    VideoError): it is broken.

    `workers` threads (OpenCV decodes without Python's lock) take a video each and run a few windows
    ahead, so that memory is bounded by windows, not by films.
    """
    found, room, stopped = queue.SimpleQueue(), threading.Semaphore(4 * workers), threading.Event()

    def put(item):
        while not room.acquire(timeout=0.1):
            if stopped.is_set():
                return
        found.put(item)

    def decode(i):
        try:
            for part in read_windows(paths[i], num_frames, size=size, window=window):
                put((i, part))
                if stopped.is_set():
                    return
            put((i, None))
        except (
            Exception
        ) as error:  # VideoError is an answer; any other is raised where the items are awaited
            put((i, error))

    with ThreadPoolExecutor(workers) as pool:
        try:
            for i in range(len(paths)):
                pool.submit(decode, i)
            running = len(paths)
            while running:
                i, item = found.get()
                room.release()
                if isinstance(item, Exception) and not isinstance(item, VideoError):
                    raise item
                running -= not isinstance(item, tuple)
                yield i, item
        finally:  # the consumer may stop early
            stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)


def check_finite(emb: np.ndarray, what: str) -> np.ndarray:
    """`emb` itself.

    Raises UserError, naming `what`, where it is not finite: NaN would rank at random, and stay.
    """
    if not np.isfinite(emb).all():
        raise UserError(
            f"{what}: NaN or infinity inside; the model has diverged or its checkpoint is damaged"
        )
    return emb


@torch.inference_mode()
def embed_windows(model, windows: list[np.ndarray]) -> np.ndarray:
    """[n, E] float32, unit norm, of the frames of n windows, uint8 [T, H, W, 3] each."""
    video = torch.from_numpy(np.stack(windows)).to(model.logit_scale.device)  # [n, T, H, W, 3]
    return check_finite(model.encode_video(prepare_video(video)).cpu().numpy(), "video embeddings")


def embed_new(
    model, index: Index, folder: Path, *, window: float, workers: int | None = None
) -> dict[File, Record]:
    """Embed the index's files that it does not know yet, and put them into it as they come; returns
    them.

    Raises UserError where the model yields NaN, or the index cannot be written.
    """
    known = index.known()
    todo = [file for file in index.files.values() if file not in known]
    paths = [str(folder / file.path) for file in todo]
    num_frames, size = model.config.num_frames, model.config.image_size
    batch_size = max(1, BATCH_PIXELS // (num_frames * size**2))
    waiting, parts, done, new = [], defaultdict(list), {}, {}

    def embed():  # what waits; videos whose windows are complete go to `done`
        windows = [item[2] for _, item in waiting if isinstance(item, tuple)]
        rows = iter(embed_windows(model, windows) if windows else ())
        for i, item in waiting:
            if isinstance(item, tuple):
                parts[i].append((item[:2], next(rows)))
                continue
            mine = parts.pop(i, [])
            if item:  # broken: what came before that does not count
                mine = []
            if mine or os.path.exists(paths[i]):  # else gone: not broken, its disk may come back
                done[todo[i]] = Record(
                    str(item or "").removeprefix(f"{paths[i]}: "),
                    np.array([span for span, _ in mine], np.float32).reshape(-1, 2),
                    np.array([row for _, row in mine], np.float32).reshape(-1, index.embed_dim),
                )
            bar.update()
        half_done = sum(map(len, parts.values()))
        bar.set_postfix_str(f"{half_done:,} windows of unfinished videos" if half_done else "")
        waiting.clear()

    items = decode_ahead(
        paths, num_frames, size=size, window=window, workers=workers or os.cpu_count()
    )
    bar = tqdm(total=len(todo), desc="embed videos", unit="video", disable=not todo)
    with bar, contextlib.closing(items):
        committed = time.monotonic()
        try:
            for i, item in items:
                waiting.append((i, item))
                is_late = time.monotonic() - committed > COMMIT_SECONDS
                if is_late or sum(isinstance(item, tuple) for _, item in waiting) in (
                    0,
                    batch_size,
                ):  # 0: only ends
                    embed()
                if is_late:
                    index.add(done)
                    new, done, committed = new | done, {}, time.monotonic()
            embed()
        finally:  # also after Ctrl-C
            index.add(done)
    return new | done


# ---- search --------------------------------------------------------------------------------------


class Match(NamedTuple):
    """A video that answers a query, and its best window. `path` as in File; seconds."""

    score: float
    path: str
    start: float
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
        self.paths = [file.path for file in records]
        lengths = [len(record.emb) for record in records.values()]
        assert lengths and min(lengths) > 0, "a video without windows cannot be found"
        self.first = np.cumsum([0, *lengths])[:-1]  # [N]: row of its first window
        self.spans = np.concatenate([record.spans for record in records.values()])  # [W, 2]
        self.emb = np.concatenate([record.emb for record in records.values()])  # [W, E]

    def search(self, text_emb: np.ndarray, top: int) -> list[Match]:
        """The `top` videos whose best window has the largest product with `text_emb` [E]; of equals
        the first path.
        """
        scores = self.emb @ text_emb  # [W]
        best = np.maximum.reduceat(scores, self.first)  # [N]
        top = min(top, len(best))
        candidates = np.flatnonzero(
            best >= np.partition(best, -top)[-top]
        )  # `top`, more where some tie
        matches = []
        for video in candidates[np.argsort(-best[candidates], kind="stable")][:top].tolist():
            rows = slice(
                self.first[video], self.first[video + 1] if video + 1 < len(best) else None
            )
            row = self.first[video] + np.argmax(scores[rows])
            matches.append(Match(float(scores[row]), self.paths[video], *self.spans[row].tolist()))
        return matches


@torch.inference_mode()
def answer(checkpoint: Checkpoint, library: Library, query: str, top: int) -> Answer:
    """The videos that the query describes best.

    A query may be longer than the model reads: a line says so.
    """
    started = time.perf_counter()
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    length, device = model.config.text_length, model.logit_scale.device
    tokens, text_mask = tokenizer.encode_batch([query], length)  # [1, L]
    if len(tokenizer.encode(query, length + 1)) > length:
        print(
            f"the query is long: the model reads its first {length - 2} tokens, up to "
            f"“{printable(tokenizer.decode(tokens[0].tolist())[-40:])}”"
        )
    text_emb = model.encode_text(tokens.to(device), text_mask.to(device))[0].cpu().numpy()  # [E]
    embedded = time.perf_counter()
    matches = library.search(check_finite(text_emb, "query embedding"), top)
    return Answer(query, matches, (embedded - started, time.perf_counter() - embedded))


def print_answer(given: Answer) -> None:
    """A line a match: rank, score, time, path; nothing that could move the cursor."""
    print(f"“{printable(given.query[:220])}” ({1000 * sum(given.seconds):.0f} ms)")
    for rank, match in enumerate(given.matches, 1):
        print(
            f"{rank:4d}  {match.score:6.3f}  {clock(match.start, match.end):>15s}  {printable(match.path)}"
        )


def clock(start: float, end: float) -> str:
    """Seconds as 0:08–0:16, 1:02:03–1:02:11; a second at least."""
    first, last = round(start), max(round(start) + 1, round(end))
    return "–".join(
        f"{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d}"
        if last >= 3600
        else f"{s // 60}:{s % 60:02d}"
        for s in (first, last)
    )


def ask() -> Iterator[str]:
    """Queries from the terminal or a pipe, one a line, until it ends; empty lines are none."""
    while True:
        if sys.stdin.isatty():
            print("query (Ctrl-D ends): ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


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
    """What `eval.py --task search` does: bring the index of `folder` up to date, answer, print,
    write out/report.html.

    query None: queries are asked for. index None: CACHE/index/<hash of the folder's path>. Returns
    {"videos", "windows", "new", "broken": {path: reason}, "answers": [Answer], …}. Raises
    UserError: no such folder, nothing in it that decodes, a query without text, an index or page
    that cannot be written.
    """
    if folder is None or not os.path.isdir(folder):
        raise UserError(
            f"--videos {folder or ''}: not a folder; name the one that holds your videos"
        )
    if query is not None and not query.strip():
        raise UserError(
            "--query: empty; describe what you look for, or leave the flag out to be asked"
        )
    if top < 1 or not window > 0:
        raise UserError(f"--top {top}, --window {window}: both must be positive")
    root, picked = Path(folder).resolve(), dict(checkpoint=checkpoint.sha256, window=window)
    files, notes = find_videos(root)
    print(f"{printable(str(root))}: {len(files):,} videos")
    _print_some("", notes)
    place = Path(
        index or Path(cache) / "index" / hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
    )
    place /= f"{checkpoint.sha256[:16]}-{window:g}s"
    on_disk = Index(place, picked, files, checkpoint.model.config.embed_dim)
    new = embed_new(checkpoint.model, on_disk, root, window=window)
    _print_some(
        "broken: ",
        [f"{file.path}: {record.reason}" for file, record in new.items() if record.reason],
    )
    known = on_disk.known()
    broken = {file.path: record.reason for file, record in known.items() if record.reason}
    if len(broken) == len(known):
        raise UserError(
            f"--videos {printable(folder)}: nothing to search in; it holds {len(files):,} video files, and "
            f"{len(broken):,} of them cannot be read"
        )
    library = Library({file: record for file, record in known.items() if not record.reason})
    record = dict(
        videos=len(library.paths),
        windows=len(library.emb),
        new=sum(not r.reason for r in new.values()),
        seconds_a_window=window,
        checkpoint=str(checkpoint.path),
        step=checkpoint.step,
        index=str(place),
        broken=broken,
        answers=[],
    )
    print(
        "index {}: {videos:,} videos ({new:,} new), {windows:,} windows, {:.1f} MB".format(
            printable(str(place)), library.emb.nbytes / 1e6, **record
        )
        + (f"; {len(broken):,} broken videos are left out until they change" if broken else "")
    )
    del on_disk, known, new  # the library has a copy of the vectors
    picture.cache_clear()  # files may have changed since the last page
    for text in [query] if query is not None else ask():
        given = answer(checkpoint, library, text, top)
        record["answers"].append(given)
        print_answer(given)
        write_page(out / "report.html", root, record)
    if record["answers"]:
        print(printable(str(out / "report.html")))
    return record


def _print_some(prefix: str, lines: list[str]) -> None:
    for line in [*lines[:10], *([f"… and {len(lines) - 10:,} more"] if len(lines) > 10 else [])]:
        print(f"    {prefix}{printable(line)}")


# ---- the page ------------------------------------------------------------------------------------


def write_page(path: Path, root: Path, record: dict) -> None:
    """The last answers, newest first, each match with four moments of its best window; what the
    library holds.
    """
    articles = []
    for given in record["answers"][: -ANSWERS_SHOWN - 1 : -1]:
        cards = []
        for rank, match in enumerate(given.matches, 1):
            video = root / match.path
            # percent-encoded: no markup is left in it
            link = f"{video.as_uri()}#t={match.start:.1f},{match.end:.1f}"
            cards.append(
                f'<li class="card"><p class="title"><b>{rank}</b>{clock(match.start, match.end)}<span '
                f'class="score">{match.score:.3f}</span></p>{picture(str(video), match.start, match.end)}'
                f'<p class="caption"><a href="{link}">{quote(match.path)}</a></p></li>'
            )
        milliseconds = f'<p class="soft">{1000 * sum(given.seconds):.0f} ms</p>'
        articles.append(
            f'<article><h3>“{quote(given.query)}”</h3>{milliseconds}<ol class="cards">{"".join(cards)}</ol>'
            "</article>"
        )
    facts = "".join(
        f"<div><dt>{name.replace('_', ' ')}</dt><dd>{quote(str(value))}</dd></div>"
        for name, value in record.items()
        if name not in ("broken", "answers")
    )
    lost = [f"<li>{quote(f'{name}: {reason}')}</li>" for name, reason in record["broken"].items()]
    body = section(
        "Found",
        "Of each video the window that fits best: four moments, left to right, then down; its "
        "time; its cosine with the query. Names are links to the files.",
        articles,
    )
    body += section("The library", "", [f'<dl class="facts">{facts}</dl>'])
    body += section(
        "Not readable",
        f"{len(lost):,} videos, left out until they change. The first {min(50, len(lost))} "
        "of them:",
        lost and [f"<ul>{''.join(lost[:50])}</ul>"],
    )
    html = document(
        "CLOP search",
        f'<p class="soft">in {quote(str(root))}</p>',
        body,
        "Scores rank the videos for one query; they are no probabilities.",
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); choose another --out"
        ) from error
