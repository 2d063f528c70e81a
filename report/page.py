"""One page to look at: what a model finds, where it fails, and what it confuses.

Numbers say how often a model is right; only looking says why it is wrong. `write_report` draws its
examples at random from a seed (none is picked by hand): captions whose right video came first,
captions whose did not, pairs with their hardest wrong captions and videos (KCL's hard negatives,
mined by the same rule: pairs that mean the same are no negatives), and multiple-choice questions of
every kind.

The page is one HTML file without scripts: its styles and its pictures (JPEGs, four moments of a
video in each, so that motion can be read from a still page) are inside, and a
Content-Security-Policy forbids it to load anything. Captions and paths come from files that
strangers wrote: every character that is markup is escaped, and each that cannot be seen (control
characters, marks that turn the writing direction) is shown by its code.

    python report.py [FILE]     # a page of made-up videos and scores (without FILE: in a temporary
                                folder)
"""

import base64
import html
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from einops import rearrange

from datasets.split import Question, Split
from knowledge import ConceptVocab, extract_many, meaning_ids, unit_rows
from videos.decode import VideoError, glimpse, read_frames

FRAME_SIZE = 104  # pixels of one moment; four make a picture
MAX_PICTURE_BYTES = 14_000  # of a JPEG: some hundred pictures stay below 3 MB
TOP = 5  # answers shown for a query
DIRECTIONS = {
    "text to video": "t2v",
    "video to text": "v2t",
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


# ---- text and pictures ---------------------------------------------------------------------------


def visible(text: str, limit: int = 220) -> str:
    """`text` safe to stand in HTML, also in an attribute: one line, cut at `limit` characters,
    nothing hidden in it.

    Blanks are joined; joiners inside words (emoji, Indic scripts) stay; other unprintable
    characters become \\u + code.
    """
    text = " ".join(text[: 10 * limit].split())
    return html.escape(printable(text if len(text) <= limit else text[:limit] + " …"))


def printable(text: str) -> str:
    """`text` safe to stand in a terminal: what cannot be seen, or would move the cursor, is shown
    by its code.
    """
    return "".join(
        c if c.isprintable() or c in "\u200c\u200d" else f"\\u{ord(c):04x}" for c in text
    )


def quote(text: str) -> str:
    """A caption as an element; <bdi> keeps right-to-left writing from turning what stands around
    it.
    """
    return f"<bdi>{visible(text)}</bdi>" if text.strip() else "<i>(empty caption)</i>"


@lru_cache(maxsize=512)
def picture(path: str, start: float = 0.0, end: float | None = None) -> str:
    """Four uniform moments of the video, or of its seconds start … end, 2×2 in reading order: a
    JPEG in the page.
    """
    name = visible(os.path.basename(path))
    try:
        frames = (
            read_frames(path, 4, size=FRAME_SIZE)
            if end is None
            else glimpse(path, 4, size=FRAME_SIZE, start=start, end=end)
        )
    except VideoError:  # it decoded a moment ago, or lay in the cache: the page says what is so now
        return f'<div class="picture lost" role="img" aria-label="{name}, which cannot be read">not readable</div>'
    sheet = rearrange(frames, "(row column) h w c -> (row h) (column w) c", row=2)[..., ::-1]
    for quality in (80, 60, 40, 20):
        jpeg = cv2.imencode(".jpg", sheet, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        if len(jpeg) <= MAX_PICTURE_BYTES:
            break
    data, side = base64.b64encode(jpeg).decode(), 2 * FRAME_SIZE
    return (
        f'<div class="picture"><img src="data:image/jpeg;base64,{data}" width="{side}" height="{side}" '
        f'alt="Four moments of {name}"></div>'
    )


def card(
    path: str, title: str, caption: str, mark: str, window: tuple[float, float | None] = (0.0, None)
) -> str:
    """One video: its picture, a line above, one of its captions below. mark: "right" or "wrong"."""
    return (
        f'<li class="card {mark}"><p class="title">{title}</p>{picture(path, *window)}'
        f'<p class="caption">{quote(caption)}</p></li>'
    )


def table(title: str, columns, rows) -> str:
    """A table with a caption; rows of cells that are HTML already, the first of each is its name."""
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f'<div class="scroll"><table><caption>{title}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def section(title: str, intro: str, articles: list[str]) -> str:
    """Nothing at all where there is no article."""
    return (
        f"<section><h2>{title}</h2><p>{intro}</p>{''.join(articles)}</section>" if articles else ""
    )


# ---- the sections, each a string of HTML ---------------------------------------------------------


def headline(record: dict, results: Results) -> str:
    """The metrics: up to four large numbers, tables, the curve of R@K; without captions no
    retrieval.
    """
    n_video, columns, tiles, tables = (
        len(results.video_emb),
        ("R@1", "R@5", "R@10", "MdR", "MnR"),
        [],
        "",
    )
    if results.split.captions:
        tiles = [
            ("Text to video, R@1", f"{record['t2v_R@1']:.1f} %", f"a guess: {100 / n_video:.2g} %"),
            (
                "Video to text, R@1",
                f"{record['v2t_R@1']:.1f} %",
                f"among {len(results.text_emb):,} captions",
            ),
            ("Text to video, median rank", f"{record['t2v_MdR']:g}", f"among {n_video:,} videos"),
        ]
        tables = table(
            "Percent of queries answered within the first K, median and mean rank",
            ["", *columns],
            [
                [name, *(f"{record[f'{way}_{column}']:.1f}" for column in columns)]
                for name, way in DIRECTIONS.items()
                if f"{way}_R@1" in record
            ],
        )
    if results.questions:
        guess = 100 / results.option_scores.shape[1]
        tiles.append(
            ("Multiple choice", f"{record['mc_accuracy']:.1f} %", f"a guess: {guess:.3g} %")
        )
        kinds = [*sorted({question.kind for question in results.questions} - {""}), None]
        asked = {
            kind: sum(kind in (None, question.kind) for question in results.questions)
            for kind in kinds
        }
        tables += table(
            "Multiple choice",
            ["wrong options differ in", "questions", "right, %"],
            [
                (
                    visible(kind or "all questions"),
                    asked[kind],
                    f"{record[f'mc_accuracy_{kind}' if kind else 'mc_accuracy']:.1f}",
                )
                for kind in kinds
            ],
        )
    tiles = "".join(
        f'<div class="tile"><dt>{name}</dt><dd>{value}<small>{below}</small></dd></div>'
        for name, value, below in tiles
    )
    return (
        f'<section><h2>Result</h2><dl class="tiles">{tiles}</dl><div class="halves"><div>{tables}</div>'
        f"{curve(results) if results.split.captions else ''}</div></section>"
    )


def curve(results: Results) -> str:
    """R@K over K as an inline SVG, K on a log axis; the dotted line is a model that guesses."""
    width, height, left, right, top, bottom = 640, 260, 40, 530, 12, 226
    last = min(len(results.video_emb), 1000)
    ks = np.unique(np.geomspace(1, last, 60).round())
    x = lambda k: left + (right - left) * np.log(k) / max(np.log(last), 1e-9)  # noqa: E731
    y = lambda percent: bottom - (bottom - top) * np.asarray(percent) / 100  # noqa: E731
    parts = [
        f'<line class="grid" x1="{left}" x2="{right}" y1="{y(p):.0f}" y2="{y(p):.0f}"/>'
        f'<text x="{left - 8}" y="{y(p) + 4:.0f}" text-anchor="end">{p}</text>'
        for p in (0, 25, 50, 75, 100)
    ]
    parts += [
        f'<text x="{x(k):.0f}" y="{height - 12}" text-anchor="middle">{k}</text>'
        for k in (1, 10, 100, 1000)
        if k <= last
    ]
    lines = [("guess", "a guess", 100 * ks / len(results.video_emb))]
    for way, label, ranks in (
        ("t2v", "text to video", results.t2v_ranks),
        ("v2t", "video to text", results.v2t_ranks),
    ):
        lines.append((way, label, np.array([100 * np.mean(ranks <= k) for k in ks])))
    label_y = 0.0
    for style, label, percent in sorted(lines, key=lambda line: (-line[2][-1], -line[2][0])):
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x(ks), y(percent)))
        label_y = max(
            label_y + 16, float(y(percent[-1])) + 4
        )  # labels at the ends of the lines, none over another
        parts.append(
            f'<polyline class="{style}" points="{points}"/>'
            f'<text class="{style}" x="{right + 8}" y="{label_y:.0f}">{label}</text>'
        )
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="R@K for K from 1 to {last}">'
        f"{''.join(parts)}</svg><figcaption>R@K, the percent of queries whose right answer is among the first K."
        "</figcaption></figure>"
    )


def facts(record: dict) -> str:
    """All of the record that the page does not say elsewhere, and the videos that were left out."""
    elsewhere = {"protocol", "note", "unusable"}
    rows = "".join(
        f"<div><dt>{visible(name.replace('_', ' '))}</dt><dd>{quote(_readable(value))}</dd></div>"
        for name, value in record.items()
        if name not in elsewhere and not name.startswith(("t2v_", "v2t_", "dsl_", "mc_"))
    )
    reasons = list(record["unusable"].values())
    listed = "".join(f"<li>{quote(reason)}</li>" for reason in reasons[:50])
    listed = f"<p>{len(reasons)} videos were left out; the first {min(50, len(reasons))}:</p><ul>{listed}</ul>"
    return f'<section><h2>The run</h2><dl class="facts">{rows}</dl>{listed if reasons else ""}</section>'


def _readable(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return (
        f"{value:.4g}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )


def query_article(query: int, results: Results) -> str:
    """A caption with the videos that score highest, and the right one wherever it stands."""
    split, rank, first_text = results.split, results.t2v_ranks[query], _first_texts(results.split)
    scores, right = (
        results.video_emb @ results.text_emb[query],
        int(results.split.video_of_caption[query]),
    )
    best = np.argsort(-scores, kind="stable")[:TOP].tolist()
    cards = []
    for place, j in [*enumerate(best, 1), *[(rank, right)] * (right not in best)]:
        caption = split.captions[query if j == right else first_text[j]] if j in first_text else ""
        cards.append(
            card(
                split.video_paths[j],
                _title(scores[j], j == right, f"{place:g}"),
                caption,
                "right" if j == right else "wrong",
                split.window,
            )
        )
    return (
        f'<article><h3>“{quote(split.captions[query])}”</h3><p class="soft">right video at rank {rank:g} of '
        f'{len(scores):,}</p><ol class="cards">{"".join(cards)}</ol></article>'
    )


def _title(score: float, is_right: bool, place: str = "") -> str:
    word = '<b class="ok">✓ right</b>' if is_right else '<b class="no">✗ wrong</b>'
    return f'{f"<b>{place}</b>" if place else ""}{word}<span class="score">{score:.3f}</span>'


def _first_texts(split: Split) -> dict[int, int]:
    """{video: its first caption}, as indices."""
    return {j: i for i, j in reversed(list(enumerate(split.video_of_caption.tolist())))}


def pair_article(
    text: int, results: Results, meaning: np.ndarray, knowledge, vocab: ConceptVocab
) -> str:
    """A caption and its video: the wrong captions nearest to the video, the wrong videos nearest to
    the caption, κ.
    """
    split, first_text, video_of_text = (
        results.split,
        _first_texts(results.split),
        results.split.video_of_caption,
    )
    video = video_of_text[text]
    # no negatives: videos with a caption that means what one of this video's own does, and all
    # their captions
    same_videos = np.unique(video_of_text[np.isin(meaning, meaning[video_of_text == video])])
    text_scores, video_scores = (
        results.text_emb @ results.video_emb[video],
        results.video_emb @ results.text_emb[text],
    )
    own = card(
        split.video_paths[video],
        _title(video_scores[video], True),
        split.captions[text],
        "right",
        split.window,
    )
    text_scores[np.isin(video_of_text, same_videos)] = -np.inf
    video_scores[same_videos] = -np.inf
    video_scores[
        np.setdiff1d(np.arange(len(video_scores)), video_of_text)
    ] = -np.inf  # no caption: nothing is known

    def hardest(scores) -> list[int]:
        return [
            i for i in np.argsort(-scores, kind="stable")[:TOP].tolist() if np.isfinite(scores[i])
        ]

    def overlaps(others: list[int]) -> np.ndarray:
        vectors = unit_rows(
            vocab.encode(knowledge)[[text, *others]], vocab.idf
        ).toarray()  # [1 + n, K]
        return vectors[1:] @ vectors[0]

    texts, videos = hardest(text_scores), hardest(video_scores)
    rows = [
        (quote(split.captions[i]), f"{text_scores[i]:.3f}", f"{kappa:.2f}")
        for i, kappa in zip(texts, overlaps(texts))
    ]
    cards = [
        card(
            split.video_paths[j],
            f'<b>{video_scores[j]:.3f}</b><span class="score">κ {kappa:.2f}</span>',
            split.captions[first_text[j]],
            "wrong",
            split.window,
        )
        for j, kappa in zip(videos, overlaps([first_text[j] for j in videos]))
    ]
    return (
        f'<article><h3>“{quote(split.captions[text])}”</h3><div class="pair"><ul class="cards">{own}</ul>'
        f"{table('Hardest wrong captions of this video', ['caption', 'score', 'κ'], rows)}</div>"
        f'<h4>Hardest wrong videos of this caption</h4><ul class="cards">{"".join(cards)}</ul></article>'
    )


def question_article(index: int, results: Results, scale: float) -> str:
    """A multiple-choice question with the probability of each option: the soft-max of scale ·
    score.
    """
    question, logits = results.questions[index], scale * results.option_scores[index]
    percents = 100 * np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    picked, options = int(np.argmax(logits)), []
    for i, (option, percent) in enumerate(zip(question.options, percents)):
        state = "right" if i == question.answer else "wrong" if i == picked else ""
        marks = '<b class="ok">✓ right</b> ' * (i == question.answer) + "<b>◀ chosen</b> " * (
            i == picked
        )
        options.append(
            f'<li class="{state}"><span class="bar" style="width:{percent:.0f}%"></span>'
            f"<span>{quote(option)}</span><span>{marks}{percent:.0f} %</span></li>"
        )
    is_right = picked == question.answer
    verdict = (
        '<b class="ok">✓ answered right</b>' if is_right else '<b class="no">✗ answered wrong</b>'
    )
    kind = f"wrong options differ in: {visible(question.kind)} · " if question.kind else ""
    return (
        f'<article class="question">{picture(question.video, *results.split.window)}<div><p class="soft">{kind}'
        f"{verdict}</p><ol>{''.join(options)}</ol></div></article>"
    )


# ---- the page ------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --bg: #f7f6f3; --card: #fff; --ink: #1d2126; --soft: #59616b; --line: #dcd9d2;
  --ok: #0a6b4f; --no: #a8321f; --blue: #1f5fbf; --bar: #dfe9f7; --warn: #fff1cc }
@media (prefers-color-scheme: dark) { :root { --bg: #13161a; --card: #1c2026; --ink: #e9ebee; --soft: #a3acb7;
  --line: #343a43; --ok: #5fd0a5; --no: #ff9b87; --blue: #8db8ff; --bar: #26364d; --warn: #3b3214 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 36px 20px; max-width: 1240px; background: var(--bg); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 6px }
h2 { font-size: 1.35rem; margin: 0 0 4px }
h3 { font-size: 1.05rem; font-weight: 600; margin: 0 }
h4 { font-size: .9rem; margin: 14px 0 6px; color: var(--soft) }
p { margin: 0 0 10px }
section { margin: 44px 0 }
article, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 16px 18px }
article { margin: 18px 0 }
caption, figcaption, footer, .soft, .score { color: var(--soft); font-size: .875rem }
.ok { color: var(--ok) }
.no { color: var(--no) }
.warn { background: var(--warn); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 14px; margin: 20px 0 28px }
.tile dt, .tile small { color: var(--soft); font-size: .875rem; font-weight: 400; letter-spacing: 0; display: block }
.tile dd { margin: 2px 0 0; font-size: 2.1rem; font-weight: 650; letter-spacing: -.02em; line-height: 1.2 }
.halves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 28px }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px 24px; margin: 10px 0 }
.facts dt { color: var(--soft); font-size: .8rem }
.facts dd { margin: 0; font-size: .9rem }
.scroll { overflow-x: auto; margin-bottom: 22px }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
caption { text-align: left; padding-bottom: 6px }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
th:first-child { text-align: left; padding-left: 0 }
th[scope=row] { font-weight: 400 }
td { white-space: nowrap }
figure { margin: 0 }
svg { width: 100%; height: auto; font-size: 13px }
svg text { fill: var(--soft) }
svg line, polyline { fill: none; stroke: var(--line) }
polyline { stroke-width: 2.5; stroke: var(--soft); stroke-dasharray: 2 4 }
polyline.t2v { stroke: var(--blue); stroke-dasharray: none }
polyline.v2t { stroke: var(--ok); stroke-dasharray: 7 4 }
text.t2v { fill: var(--blue) }
text.v2t { fill: var(--ok) }
.cards { list-style: none; margin: 0; padding: 0; display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 172px), 1fr)) }
.card { border: 3px dotted var(--line); border-radius: 10px; padding: 6px; min-width: 0 }
.card.right { border: 3px solid var(--ok) }
.title { margin: 0 0 4px; font-size: .85rem; display: flex; gap: 8px }
.title .score { margin-left: auto }
.caption { margin: 6px 0 0; font-size: .84rem; line-height: 1.35 }
.caption a { color: var(--blue) }
.picture { position: relative; border-radius: 6px; overflow: hidden; aspect-ratio: 1; background: var(--line);
  display: grid; place-items: center; align-self: start }
.picture img { width: 100%; height: auto; display: block }
.picture::after { content: ""; position: absolute; inset: 0; background:
  linear-gradient(var(--card), var(--card)) center / 3px 100% no-repeat,
  linear-gradient(var(--card), var(--card)) center / 100% 3px no-repeat }
.lost::after { content: none }
.pair { display: grid; grid-template-columns: minmax(150px, 200px) minmax(0, 1fr); gap: 20px; margin-top: 10px }
.pair .cards { grid-template-columns: 1fr }
.questions { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 540px), 1fr)) }
.question { display: grid; grid-template-columns: minmax(110px, 170px) minmax(0, 1fr); gap: 16px; margin: 0 }
.question ol { list-style: none; margin: 0; padding: 0; font-size: .9rem }
.question li { position: relative; padding: 4px 8px; margin: 3px 0; border: 1px solid transparent;
  border-radius: 6px; display: flex; gap: 8px; justify-content: space-between }
.question li.right { border: 1px solid var(--ok) }
.question li.wrong { border: 1px dashed var(--no) }
.question li span { position: relative }
.question li span:last-child { white-space: nowrap; font-size: .8rem }
.question li span.bar { position: absolute; inset: 0 auto 0 0; min-width: 2px; border-radius: 6px;
  background: var(--bar) }
@media (max-width: 640px) {
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)) }
  .pair, .question { grid-template-columns: 1fr }
  .pair .card, .question .picture { max-width: 220px; width: 100% }
  .question li { flex-wrap: wrap } }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def document(title: str, intro: str, body: str, footer: str) -> str:
    """A whole document; the four parts are HTML already."""
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><header><h1>{title}</h1>{intro}</header><main>{body}</main><footer>{footer}</footer></body>"
        "</html>\n"
    )


def write_report(
    path,
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
    negatives, two questions a kind. Raises OSError where the file cannot be written.
    """
    picture.cache_clear()  # files may have changed since the last page
    knowledge = extract_many(results.split.captions)
    rng = np.random.default_rng(seed)

    def draw(condition, count: int) -> list[int]:
        return rng.permutation(np.flatnonzero(condition))[:count].tolist()

    first, meaning = (
        results.t2v_ranks <= 1,
        meaning_ids(results.split.captions, knowledge),
    )  # no captions: both empty
    kind = np.array([question.kind for question in results.questions], str)
    answer = np.array([question.answer for question in results.questions], int)
    answered = results.option_scores.argmax(axis=1) == answer if len(answer) else np.zeros(0, bool)
    chosen = [
        index
        for name in np.unique(kind)
        for state in (True, False)
        for index in draw((kind == name) & (answered == state), 1)
    ]
    asked = [question_article(index, results, record["logit_scale"]) for index in chosen]
    body = "".join(
        [
            headline(record, results),
            facts(record),
            section(
                "Found",
                "Captions drawn at random among those whose right video came first. A picture shows four "
                "moments of a video: left to right, then down. Below a wrong video stands one of its own captions.",
                [query_article(query, results) for query in draw(first, queries)],
            ),
            section(
                "Missed",
                "Captions drawn at random among the others. The right video stands last if it is not among "
                f"the first {TOP}.",
                [query_article(query, results) for query in draw(~first, queries)],
            ),
            section(
                "Hard negatives",
                "What the model confuses, for pairs drawn at random. κ is the knowledge that two "
                "captions share, from 0 (nothing) to 1 (all). As in training, what means the same is no negative.",
                [
                    pair_article(text, results, meaning, knowledge, vocab)
                    for text in draw(first | True, pairs)
                ],
            ),
            section(
                "Multiple choice",
                "Which caption fits the video? Of each kind one question answered right and one "
                "answered wrong, drawn at random.",
                asked and [f'<div class="questions">{"".join(asked)}</div>'],
            ),
        ]
    )
    title = f"CLOP on {visible(record['task'])}, {visible(record['split'])} split"
    warning = (
        f'<p class="warn" role="note"><b>Mind:</b> {visible(record["note"])}</p>'
        if record["note"]
        else ""
    )
    intro = f'<p class="soft">{visible(record["protocol"], 400)}</p>{warning}'
    html_page = document(title, intro, body, f"All examples were drawn at random (seed {seed}).")
    Path(path).write_text(html_page, encoding="utf-8")
