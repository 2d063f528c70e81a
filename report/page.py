"""One page to look at: what a model finds, where it fails, and what it confuses.

Numbers say how often a model is right. Only looking says why it is wrong. `write_report` draws its
examples at random from a seed; none is picked by hand. It shows

    Found, Missed     captions whose right video came first, and captions whose did not
    Hard negatives    pairs, with the wrong captions and videos that score highest; as in KCL,
                      pairs that mean the same are no negatives
    Multiple choice   questions of every kind

This file chooses what is shown; the templates beside it (page.html, macros.html, base.html) say how
it looks. A page is one HTML file without scripts. Styles and pictures are inside, and a
Content-Security-Policy forbids it to load anything. A picture holds four moments of a video, so
that motion can be read from a still page.

Captions and paths come from strangers. Jinja escapes every character that is markup, and `shown`
replaces each that cannot be seen (control characters, marks that turn the writing direction).
"""

import base64
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import jinja2
import numpy as np
from einops import rearrange

from cli import write_whole
from datasets.split import Question, Split
from knowledge import ConceptVocab, extract_many, meaning_ids, unit_rows
from videos.decode import VideoError, glimpse, read_frames

HERE = Path(__file__).parent
FRAME_SIZE = 104  # pixels of one moment; four make a picture
MAX_PICTURE_BYTES = 14_000  # of a JPEG: some hundred pictures stay below 3 MB
TOP = 5  # answers shown for a query
COLUMNS = ["R@1", "R@5", "R@10", "MdR", "MnR"]
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
    t2v_ranks: np.ndarray  # [n_text]
    v2t_ranks: np.ndarray  # [videos with captions]
    questions: list[Question]
    option_scores: np.ndarray  # [questions, options]

    def video(self, j: int) -> tuple:
        """(path, start, end) of the j-th video, for `picture`."""
        return self.split.video_paths[j], *self.split.window

    def caption_of(self, j: int) -> int | None:
        """The number of the j-th video's first caption, None where it has none."""
        mine = np.flatnonzero(self.split.video_of_caption == j)
        return int(mine[0]) if len(mine) else None


def write_report(
    path: str | Path,
    record: dict,
    results: Results,
    vocab: ConceptVocab,
    *,
    queries: int = 5,
    pairs: int = 4,
    seed: int = 0,
) -> None:
    """Write the page to `path`. record: what metrics.json holds (eval.make_record).

    Drawn by `seed`: `queries` captions answered right and as many not, `pairs` with their hard
    negatives, two questions a kind. Raises UserError where the file cannot be written.
    """
    picture.cache_clear()  # files may have changed since the last page
    rng = np.random.default_rng(seed)
    split, is_found = results.split, results.t2v_ranks <= 1

    def draw(condition, count: int) -> list[int]:
        return rng.permutation(np.flatnonzero(condition))[:count].tolist()

    questions = draw_questions(results, draw)
    examples = dict(
        questions=[describe_question(i, results, record["logit_scale"]) for i in questions],
        found=[describe_query(i, results) for i in draw(is_found, queries)],
        missed=[describe_query(i, results) for i in draw(~is_found, queries)],
        pairs=[],
    )
    if split.captions:
        knowledge = extract_many(split.captions)
        meaning = meaning_ids(split.captions, knowledge)
        unit = unit_rows(vocab.encode(knowledge), vocab.idf)
        chosen = draw(np.ones(len(split.captions)), pairs)
        examples["pairs"] = [describe_pair(text, results, meaning, unit) for text in chosen]

    hidden = ("protocol", "note", "unusable")
    metrics = ("t2v_", "v2t_", "dsl_", "mc_")
    run_facts = {
        name: value
        for name, value in record.items()
        if name not in hidden and not name.startswith(metrics)
    }
    numbers = dict(
        captions=len(split.captions),
        videos=len(results.video_emb),
        columns=COLUMNS,
        rank_rows=rank_rows(record),
        kinds=kind_rows(record, results.questions),
        options=results.option_scores.shape[1],
        curve=draw_curve(results) if split.captions else None,
    )
    title = f"CLOP on {record['task']}, {record['split']} split"
    about = dict(title=title, record=record, run_facts=run_facts, top=TOP, seed=seed)
    render("page.html", path, **about, **numbers, **examples)


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


def readable(value) -> str:
    """A value of the record as a person writes it."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


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

    sheet = rearrange(frames, "(row column) h w c -> (row h) (column w) c", row=2)[..., ::-1]
    for quality in (80, 60, 40, 20):
        jpeg = cv2.imencode(".jpg", sheet, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        if len(jpeg) <= MAX_PICTURE_BYTES:
            break
    return base64.b64encode(jpeg).decode()


def render(template: str, path: str | Path, **values) -> None:
    """Fill a template of report/ or search/, and write it. Raises UserError where it cannot."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([HERE, HERE.parent / "search"]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= dict(
        shown=shown, readable=readable, file_name=lambda path: shown(os.path.basename(path))
    )
    environment.globals["picture"] = picture
    page = environment.get_template(template).render(values)
    with write_whole(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")


# ---- numbers -------------------------------------------------------------------------------------


def rank_rows(record: dict) -> list[list[str]]:
    """Rows of the table of ranks: a name, then `COLUMNS`."""
    rows = []
    for name, way in DIRECTIONS.items():
        if f"{way}_R@1" in record:
            rows.append([name, *(f"{record[f'{way}_{column}']:.1f}" for column in COLUMNS)])
    return rows


def kind_rows(record: dict, questions: list[Question]) -> list[list[str]]:
    """Rows of the table of multiple choice: a kind, its questions, percent right."""
    rows = []
    for kind in sorted({question.kind for question in questions if question.kind}):
        count = sum(question.kind == kind for question in questions)
        rows.append([shown(kind), count, f"{record[f'mc_accuracy_{kind}']:.1f}"])
    if questions:
        rows.append(["all questions", len(questions), f"{record['mc_accuracy']:.1f}"])
    return rows


def draw_curve(results: Results) -> dict:
    """Where the lines of the figure run: R@K over K, K on a log axis, 640 × 260 units."""
    left, right, top, bottom = 40, 530, 12, 226
    last = min(len(results.video_emb), 1000)
    ks = np.unique(np.geomspace(1, last, 60).round())

    def place_x(k):
        return left + (right - left) * np.log(k) / max(np.log(last), 1e-9)

    def place_y(percent):
        return bottom - (bottom - top) * np.asarray(percent) / 100

    guess = 100 * ks / len(results.video_emb)
    named = [("guess", "a guess", guess)]
    for way, label, ranks in (
        ("t2v", "text to video", results.t2v_ranks),
        ("v2t", "video to text", results.v2t_ranks),
    ):
        named.append((way, label, np.array([100 * np.mean(ranks <= k) for k in ks])))

    lines, y = [], 0.0
    named.sort(key=lambda line: (-line[2][-1], -line[2][0]))
    for style, label, percent in named:
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(place_x(ks), place_y(percent)))
        y = max(y + 16, float(place_y(percent[-1])) + 4)  # no label stands over another
        lines.append(dict(style=style, label=label, points=points, y=round(y)))
    return dict(
        last=last,
        lines=lines,
        percents=[(p, round(float(place_y(p)))) for p in (0, 25, 50, 75, 100)],
        ks=[(k, round(float(place_x(k)))) for k in (1, 10, 100, 1000) if k <= last],
    )


# ---- examples ------------------------------------------------------------------------------------


def draw_questions(results: Results, draw) -> list[int]:
    """Of each kind, one question answered right and one answered wrong."""
    kind = np.array([question.kind for question in results.questions], str)
    answer = np.array([question.answer for question in results.questions], int)
    if not len(answer):
        return []
    is_right = results.option_scores.argmax(axis=1) == answer
    chosen = []
    for name in np.unique(kind):
        chosen += draw((kind == name) & is_right, 1) + draw((kind == name) & ~is_right, 1)
    return chosen


def describe_query(query: int, results: Results) -> dict:
    """A caption, the videos that score highest, and the right one wherever it stands."""
    split, rank = results.split, results.t2v_ranks[query]
    scores = results.video_emb @ results.text_emb[query]  # [n_video]
    right = int(split.video_of_caption[query])
    places = dict(zip(np.argsort(-scores, kind="stable")[:TOP].tolist(), range(1, TOP + 1)))
    places.setdefault(right, rank)

    answers = []
    for j, place in places.items():
        text = query if j == right else results.caption_of(j)
        caption = "" if text is None else split.captions[text]
        score = dict(score=scores[j], place=place, is_right=j == right)
        answers.append(dict(video=results.video(j), caption=caption, **score))
    return dict(caption=split.captions[query], rank=rank, answers=answers)


def describe_pair(text: int, results: Results, meaning: np.ndarray, unit) -> dict:
    """A caption and its video, with their hardest wrong captions and videos.

    meaning [n_text]: equal for captions that mean the same. unit: sparse [n_text, K], rows whose
    products are κ.
    """
    split, video_of_text = results.split, results.split.video_of_caption
    video = int(video_of_text[text])
    text_scores = results.text_emb @ results.video_emb[video]
    video_scores = results.video_emb @ results.text_emb[text]
    own = dict(video=results.video(video), caption=split.captions[text], place=None)
    own |= dict(score=video_scores[video], is_right=True)

    # a video with a caption that means what one of this video's does is no negative …
    same = np.unique(video_of_text[np.isin(meaning, meaning[video_of_text == video])])
    text_scores[np.isin(video_of_text, same)] = -np.inf
    video_scores[same] = -np.inf
    # … nor is one without a caption: nothing is known of it
    video_scores[np.setdiff1d(np.arange(len(video_scores)), video_of_text)] = -np.inf

    def describe(other: int, score: float, caption: int) -> dict:
        kappa = (unit[[text]] @ unit[[caption]].T).toarray()[0, 0]
        facts = dict(score=score, kappa=kappa, caption=split.captions[caption])
        return facts | dict(video=results.video(other))

    texts = [describe(video, text_scores[i], i) for i in hardest(text_scores)]
    videos = [describe(j, video_scores[j], results.caption_of(j)) for j in hardest(video_scores)]
    return dict(caption=split.captions[text], own=own, texts=texts, videos=videos)


def hardest(scores: np.ndarray) -> list[int]:
    """The `TOP` largest scores that are not −∞."""
    order = np.argsort(-scores, kind="stable")[:TOP]
    return order[np.isfinite(scores[order])].tolist()


def describe_question(index: int, results: Results, scale: float) -> dict:
    """A question with the probability of each option: the softmax of scale · score."""
    question = results.questions[index]
    logits = scale * results.option_scores[index]
    weights = np.exp(logits - logits.max())
    percents = 100 * weights / weights.sum()
    return dict(
        video=(question.video, *results.split.window),
        kind=question.kind,
        answer=question.answer,
        picked=int(np.argmax(logits)),
        options=list(zip(question.options, percents)),
    )
