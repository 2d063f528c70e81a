"""One page to look at: what a model misses, what it takes for what, and what it finds.

Numbers say how often a model is right. Only looking says why it is wrong. `write_report` shows

    Missed             first the captions whose right video stands last, then others
    Taken for          of each noun, verb and relation: how often its captions find their video,
                       and what the video that came first instead shows
    Found              captions whose right video came first
    Multiple choice    questions, most of them answered wrong

All but the worst misses are drawn at random from a seed; none is picked by hand.

This file chooses what is shown; the templates beside it (page.html, macros.html, base.html) say how
it looks. A page is one HTML file without scripts. Styles and pictures are inside. A
Content-Security-Policy forbids it to load anything but the videos themselves, when they are played.
A picture holds four moments of a video, so that motion can be read from a still page.

Captions and paths come from strangers. Jinja escapes every character that is markup, and `shown`
replaces each that cannot be seen (control characters, marks that turn the writing direction).
"""

import base64
import os
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

import cv2
import jinja2
import numpy as np
from einops import rearrange
from scipy.special import softmax

from cli import write_whole
from datasets.split import Question, Split
from knowledge import GRANULARITIES, extract_many
from videos.decode import VideoError, codec_of, glimpse, read_frames

HERE = Path(__file__).parent
FRAME_SIZE = 104  # pixels of one moment; four make a picture
TOP = 5  # answers shown for a query
SAMPLE = 3000  # captions whose concepts are counted: some seconds of work, then cached
WORST = 8  # concepts shown of a kind
KS = np.unique(np.geomspace(1, 1000, 60).astype(int))  # of the figure
PLAYED = {".mp4", ".m4v", ".mov", ".webm"}  # by browsers, if the codec is one of these:
CODECS = {"avc1", "h264", "vp08", "VP80", "vp09", "VP90", "av01", "AV01"}
OTHERS = ["R@5", "R@10", "MdR", "MnR"]  # beside R@1 and its interval (eval.bootstrap)
DIRECTIONS = {
    "text to video": "t2v",
    "video to text": "v2t",
    "video to text, grouped": "v2t_grouped",
    "text to video, DSL": "dsl_t2v",
    "video to text, DSL": "dsl_v2t",
}  # as metrics are called


@dataclass
class Results:
    """What metrics summarise and the page shows."""

    split: Split  # the gallery and its captions; `broken` are the videos that had to be left out
    text_emb: np.ndarray  # [n_text, E]
    video_emb: np.ndarray  # [n_video, E]
    # "t2v": ranks [n_text], "v2t": ranks [videos with captions], "mc_accuracy": points [questions]
    outcomes: dict[str, np.ndarray]
    questions: list[Question]
    option_scores: np.ndarray  # [questions, options]

    def video(self, j: int) -> tuple:
        """(path, start, end) of the j-th video, for `picture`."""
        return self.split.video_paths[j], *self.split.window

    def first_captions(self) -> np.ndarray:
        """[n_video]: the number of each video's first caption, −1 where it has none."""
        first = np.full(len(self.video_emb), -1)
        first[self.split.video_of_caption[::-1]] = np.arange(len(self.split.captions))[::-1]
        return first


def write_report(
    path: str | Path,
    record: dict,
    results: Results,
    *,
    cache: Path | None = None,
    queries: int = 5,
    seed: int = 0,
) -> None:
    """Write the page to `path`. record: what metrics.json holds (eval.make_record).

    Of captions answered wrong the `queries` worst and as many drawn by `seed`, of those answered
    right as many, and questions. cache: a folder for the knowledge of the captions. Raises
    UserError where the file cannot be written.
    """
    picture.cache_clear()  # files may have changed since the last page
    rng = np.random.default_rng(seed)
    nothing = np.zeros(0)
    ranks = results.outcomes.get("t2v", nothing)
    points = results.outcomes.get("mc_accuracy", nothing)

    def draw(condition, count: int) -> list[int]:
        return rng.permutation(np.flatnonzero(condition))[:count].tolist()

    worst = np.argsort(-ranks, kind="stable")[:queries]
    is_worst = np.isin(np.arange(len(ranks)), worst)
    missed = draw(~is_worst & (ranks > 1), queries)
    found = draw(ranks <= 1, queries)
    asked = draw(points < 100, queries - 1) + draw(points == 100, 2)

    figures = {}
    if len(ranks):
        figures = dict(curves=recall_curves(results), concepts=count_concepts(results, cache))

    render(
        "page.html",
        path,
        title=f"CLOP on {record['task']}, {record['split']} split",
        record=record,
        results=results,
        top=TOP,
        seed=seed,
        ranks=rank_table(record),
        choices=choice_table(record),
        xs=100 * np.log10(KS),
        worst=[describe_query(results, query) for query in worst if ranks[query] > 1],
        missed=[describe_query(results, query) for query in missed],
        found=[describe_query(results, query) for query in found],
        questions=[describe_question(results, record["logit_scale"], i) for i in asked],
        **figures,
    )


# ---- text and pictures ---------------------------------------------------------------------------


def shown(text: str, limit: int = 220) -> str:
    """`text` on one line, cut at `limit` characters, with nothing hidden in it."""
    text = " ".join(text[: 10 * limit].split())
    return printable(text if len(text) <= limit else text[:limit] + " …")


def printable(text: str) -> str:
    """`text` with the code of each character that cannot be seen, or would move a cursor.

    Joiners inside words (emoji, Indic scripts) stay.
    """
    return "".join(
        c if c.isprintable() or c in "\u200c\u200d" else f"\\u{ord(c):04x}" for c in text
    )


@lru_cache(maxsize=512)
def picture(path: str, start: float = 0.0, end: float | None = None) -> str | None:
    """Four moments of a video, 2 × 2 in reading order: a JPEG in base64.

    None where the video cannot be read any more.
    """
    try:
        if end is None:
            frames = read_frames(path, 4, size=FRAME_SIZE)
        else:
            frames = glimpse(path, 4, size=FRAME_SIZE, start=start, end=end)
    except VideoError:
        return None

    frames[:, :, -1] = frames[:, -1] = 255  # a line between them
    sheet = rearrange(frames, "(row column) h w c -> (row h) (column w) c", row=2)[..., ::-1]
    jpeg = cv2.imencode(".jpg", sheet, [cv2.IMWRITE_JPEG_QUALITY, 60])[1]
    return base64.b64encode(jpeg).decode()


def browsers_play(path: str) -> bool:
    """Whether they show this file themselves; others they hand to the system's player."""
    try:
        return Path(path).suffix.lower() in PLAYED and codec_of(path) in CODECS
    except VideoError:
        return False


def link_to(path: str, start: float = 0.0, end: float | None = None) -> str:
    """The file's address and what to play of it; percent-encoded: no markup is left in it."""
    until = f",{end:.1f}" if end else ""
    return f"{Path(path).absolute().as_uri()}#t={start:.1f}{until}"


def render(template: str, path: str | Path, **values) -> None:
    """Fill a template of report/ or search/, and write it. Raises UserError where it cannot."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([HERE, HERE.parent / "search"]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= dict(shown=shown, file_name=os.path.basename)
    environment.globals |= dict(picture=picture, browsers_play=browsers_play, link_to=link_to)
    page = environment.get_template(template).render(values)
    with write_whole(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")


# ---- numbers -------------------------------------------------------------------------------------


def rank_table(record: dict) -> list[list]:
    """The header, then a row per direction."""
    rows = [["", "R@1", "low", "high", *OTHERS]]
    for name, way in DIRECTIONS.items():
        if f"{way}_R@1" in record:
            others = [record[f"{way}_{column}"] for column in OTHERS]
            rows.append([name, record[f"{way}_R@1"], *record["intervals"][f"{way}_R@1"], *others])
    return rows


def choice_table(record: dict) -> list[list]:
    """The header, then a row of all questions, and of each kind."""
    rows = [["wrong options differ in", "right, %", "low", "high", "questions"]]
    for name, points in record["outcomes"].items():
        if name.startswith("mc_accuracy"):
            kind = shown(name.removeprefix("mc_accuracy").removeprefix("_") or "all questions")
            rows.append([kind, record[name], *record["intervals"][name], len(points.split())])
    return rows


def recall_curves(results: Results) -> dict[str, np.ndarray]:
    """{"t2v", "v2t": R@K in percent for each K of `KS`; "guess": that of a random ranking}"""
    curves = dict(guess=np.minimum(100 * KS / len(results.video_emb), 100))
    for way in ("t2v", "v2t"):
        curves[way] = 100 * np.mean(results.outcomes[way][:, None] <= KS, axis=0)
    return curves


def count_concepts(results: Results, cache: Path | None) -> dict[str, list]:
    """{granularity: [(concept, captions, percent found, [(taken for, times)])]}, most misses first.

    Of the first captions of `SAMPLE` videos. A concept is taken for another of its granularity
    where the caption of the video that comes first has the other and not the concept.
    """
    first = results.first_captions()
    chosen = first[first >= 0][:SAMPLE]
    winner = first[(results.text_emb[chosen] @ results.video_emb.T).argmax(axis=1)]
    texts = [*results.split.captions, ""]  # number −1: a video without a caption came first
    captions = [texts[i] for i in (*chosen, *winner)]
    knowledge = extract_many(captions, cache=cache, progress=False)

    asked, found, taken_for = Counter(), Counter(), defaultdict(Counter)
    for i, rank in enumerate(results.outcomes["t2v"][chosen]):
        ours, theirs = (set(knowledge.concepts_of(j)) for j in (i, len(chosen) + i))
        asked.update(ours)
        if rank <= 1:
            found.update(ours)
            continue
        for lost, seen in product(ours - theirs, theirs - ours):
            if lost.partition(":")[0] == seen.partition(":")[0]:
                taken_for[lost][seen.partition(":")[2]] += 1

    tables = {kind: [] for kind in GRANULARITIES}
    for concept in sorted(asked, key=lambda concept: (found[concept] - asked[concept], concept)):
        kind, _, name = concept.partition(":")
        percent = 100 * found[concept] / asked[concept]
        tables[kind].append((name, asked[concept], percent, taken_for[concept].most_common(3)))
    return {kind: rows[:WORST] for kind, rows in tables.items()}


# ---- examples ------------------------------------------------------------------------------------


def describe_query(results: Results, query: int) -> dict:
    """The videos that score highest for a caption, and the right one wherever it stands."""
    rank, right = results.outcomes["t2v"][query], results.split.video_of_caption[query]
    scores = results.video_emb @ results.text_emb[query]  # [n_video]
    answers = list(enumerate(np.argsort(-scores, kind="stable")[:TOP], 1))
    if right not in (video for _, video in answers):
        answers.append((rank, right))
    return dict(query=query, rank=rank, right=right, answers=answers, scores=scores)


def describe_question(results: Results, scale: float, index: int) -> dict:
    """A question with the probability of each option: the softmax of scale · score."""
    question = results.questions[index]
    percents = 100 * softmax(scale * results.option_scores[index])
    return dict(
        video=(question.video, *results.split.window),
        kind=question.kind,
        answer=question.answer,
        picked=int(np.argmax(percents)),
        options=list(zip(question.options, percents)),
    )
