"""One page to look at: what a model finds, where it fails, and what it confuses.

Numbers say how often a model is right; only looking says why it is wrong. `write_report` draws its examples at random from a
seed (nothing is picked by hand): queries whose right video came first, queries where it did not, pairs with their hardest
wrong captions and videos (what KCL calls hard negatives, mined with the same rule: pairs that mean the same are no
negatives), and multiple-choice questions of every kind.

The page is one HTML file without scripts: pictures are JPEGs inside it (four moments of a video in one picture, so that motion can
be read from a still page), styles too, and a Content-Security-Policy forbids it to load anything. Captions and paths come from
files that strangers wrote: every character that is markup is escaped, and every one that cannot be seen (control characters,
marks that turn the writing direction) is shown by its code.

    python report.py [FILE]     # a page of made-up videos and scores (default: a temporary file, removed again)
"""

import base64
import html
import os
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from einops import rearrange

from cli import UserError, run
from knowledge import ConceptVocab, concept_vectors, extract_many, meaning_ids, multi_hot
from video import VideoError, read_frames, write_video

FRAME_SIZE = 104          # pixels of one moment; four make a picture
MAX_PICTURE_BYTES = 14_000  # JPEG; about 110 pictures keep a page below 3 MB
TOP = 5

# ---------------------------------------------------------------- text and pictures


def visible(text: str, limit: int = 220) -> str:
    """`text` safe to stand in HTML, also in an attribute: one line, cut at `limit` characters, nothing hidden in it.

    Spaces are joined; joiners inside words (emoji, Indic scripts) stay; any other unprintable character becomes \\u and its code.
    """
    text = " ".join(text.split())
    text = text if len(text) <= limit else text[:limit] + " …"
    return html.escape("".join(c if c.isprintable() or c in "\u200c\u200d" else f"\\u{ord(c):04x}" for c in text))


def quote(text: str) -> str:
    """A caption as an element; <bdi> keeps right-to-left writing from turning what stands around it."""
    return f"<bdi>{visible(text)}</bdi>" if text.strip() else "<i>(empty caption)</i>"


@lru_cache(maxsize=512)
def picture(path: str) -> str:
    """<img> of four uniform moments of the video, 2×2 in reading order, as a JPEG inside the page."""
    name = visible(os.path.basename(path))
    try:
        frames = read_frames(path, 4, size=FRAME_SIZE)
    except VideoError:  # it decoded when it was embedded; say what is seen now
        return f'<div class="lost" role="img" aria-label="{name}: cannot be read">not readable</div>'
    sheet = rearrange(frames, "(r c) h w ch -> (r h) (c w) ch", r=2)[..., ::-1]
    for quality in (80, 60, 40, 20):
        jpeg = cv2.imencode(".jpg", sheet, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        if len(jpeg) <= MAX_PICTURE_BYTES:
            break
    data = base64.b64encode(jpeg).decode()
    side = 2 * FRAME_SIZE
    return f'<img src="data:image/jpeg;base64,{data}" width="{side}" height="{side}" alt="Four moments of {name}">'


def card(path: str, title: str, caption: str, mark: str = "") -> str:
    """One video: its picture, a line above, one of its captions below. mark "right" or "wrong" sets the frame."""
    return (f'<li class="card {mark}"><p class="title">{title}</p>{picture(path)}'
            f'<p class="caption">{quote(caption)}</p></li>')


# ---------------------------------------------------------------- sections, each a string of HTML


def _headline(record: dict) -> str:
    n_video, n_text = record["videos"], record["captions"]
    tiles, rows = [], []
    if "t2v_R@1" in record:
        tiles += [("text to video R@1", f"{record['t2v_R@1']:.1f} %", f"chance {100 / n_video:.2g} %"),
                  ("video to text R@1", f"{record['v2t_R@1']:.1f} %", f"chance {100 / n_text:.2g} %"),
                  ("text to video median rank", f"{record['t2v_MdR']:g}", f"chance {(n_video + 1) / 2:g}")]
        columns = ("R@1", "R@5", "R@10", "MdR", "MnR")
        for name, way in (("text to video", "t2v"), ("video to text", "v2t")):
            rows.append(f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{record[f'{way}_{c}']:.1f}</td>" for c in columns) + "</tr>")
        rows.insert(0, '<tr><th scope="col">direction</th>' + "".join(f'<th scope="col">{c}</th>' for c in columns) + "</tr>")
    if "mc_accuracy" in record:
        tiles.append(("multiple choice", f"{record['mc_accuracy']:.1f} %", f"chance {record['mc_chance']:.0f} %"))
    tiles = "".join(f'<div class="tile"><dt>{name}</dt><dd>{value}<small>{chance}</small></dd></div>' for name, value, chance in tiles)
    table = f'<div class="scroll"><table><caption>R@K in percent; ranks start at 1, ties count half</caption>{"".join(rows)}</table></div>'
    return f'<dl class="tiles">{tiles}</dl>' + (table if rows else "")


def _curve(t2v: np.ndarray, v2t: np.ndarray, n_video: int) -> str:
    """R@K against K as an inline SVG, K on a log axis; the dotted line is a model that guesses."""
    width, height, left, bottom = 640, 250, 42, 30
    ks = np.unique(np.geomspace(1, min(n_video, 1000), 60).round().astype(int))
    x = left + (width - left - 110) * np.log(ks) / max(np.log(ks[-1]), 1e-9)
    y = lambda percent: 12 + (height - bottom - 12) * (1 - np.asarray(percent) / 100)  # noqa: E731
    parts = [f'<line x1="{left}" x2="{x[-1]:.0f}" y1="{y(p):.0f}" y2="{y(p):.0f}" class="grid"/>'
             f'<text x="{left - 6}" y="{y(p) + 4:.0f}" text-anchor="end">{p}</text>' for p in (0, 25, 50, 75, 100)]
    parts += [f'<text x="{x[np.searchsorted(ks, k)]:.0f}" y="{height - 8}" text-anchor="middle">{k}</text>'
              for k in (1, 10, 100, 1000) if k in ks]
    curves = [("guess", "chance", 100 * ks / n_video)]
    curves += [(name, label, np.array([100 * np.mean(ranks <= k) for k in ks]))
               for name, label, ranks in (("t2v", "text to video", t2v), ("v2t", "video to text", v2t))]
    label_y = 0.0
    for name, label, percent in sorted(curves, key=lambda curve: -curve[2][-1] - 1e-3 * curve[2][0]):
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y(percent)))
        label_y = max(label_y + 15, float(y(percent[-1])) + 4)
        parts.append(f'<polyline points="{points}" class="{name}"/><text x="{x[-1] + 8:.0f}" y="{label_y:.0f}" class="{name}">{label}</text>')
    return (f'<figure class="curve"><svg viewBox="0 0 {width} {height}" role="img" aria-label="Recall at K, in percent, for K from 1 to '
            f'{ks[-1]}">{"".join(parts)}</svg><figcaption>Percent of queries whose right answer is among the first K.</figcaption></figure>')


def _facts(record: dict) -> str:
    shown = {name: value for name, value in record.items() if not isinstance(value, float) and value not in ("", {}, [])}
    rows = "".join(f"<div><dt>{visible(name)}</dt><dd>{quote(_readable(value))}</dd></div>" for name, value in shown.items())
    return f'<section><h2>The run</h2><dl class="facts">{rows}</dl></section>'


def _readable(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_readable(part)}" for name, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _queries(title: str, intro: str, queries, embedded, ranks) -> str:
    """Captions with the videos that score highest, and the right one wherever it stands."""
    first_caption = _first_captions(embedded)
    articles = []
    for query in queries:
        scores, right = embedded.video_emb @ embedded.text_emb[query], embedded.video_of_text[query]
        order = np.argsort(-scores, kind="stable")[:TOP]
        cards = [card(embedded.paths[j], _title(f"{place}", scores[j], j == right),
                      embedded.captions[query] if j == right else first_caption.get(j, ""), "right" if j == right else "wrong")
                 for place, j in enumerate(order, 1)]
        if right not in order:
            cards.append(card(embedded.paths[right], _title(f"{ranks[query]:g}", scores[right], True), embedded.captions[query], "right far"))
        articles.append(f'<article><h3>“{quote(embedded.captions[query])}”</h3><p class="note">right video at rank {ranks[query]:g} of '
                        f'{len(embedded.paths):,}</p><ol class="cards">{"".join(cards)}</ol></article>')
    return f"<section><h2>{title}</h2><p>{intro}</p>{''.join(articles)}</section>" if articles else ""


def _title(place: str, score: float, is_right: bool) -> str:
    word = '<b class="ok">✓ right</b>' if is_right else '<b class="no">✗ wrong</b>'
    return f'<span class="place">{place}</span> {word} <span class="score">{score:.3f}</span>'


def _first_captions(embedded) -> dict[int, str]:
    return {int(j): caption for j, caption in zip(embedded.video_of_text[::-1], embedded.captions[::-1])}


def _hard_negatives(pairs, embedded, vocab: ConceptVocab) -> str:
    """For some pairs the wrong captions nearest to the video and the wrong videos nearest to the caption, with their overlap κ."""
    knowledge = extract_many(embedded.captions, progress=False)
    meaning, video_of_text = meaning_ids(embedded.captions, knowledge), embedded.video_of_text
    first_text = {int(j): i for i, j in reversed(list(enumerate(video_of_text)))}

    def overlap(text: int, others: list[int]) -> np.ndarray:
        ids = [vocab.encode(knowledge[i]) for i in [text, *others]]
        vectors = concept_vectors(multi_hot(ids, len(vocab)), vocab.idf).numpy()  # [1 + n, K]
        return vectors[1:] @ vectors[0]

    articles = []
    for text in pairs:
        video = video_of_text[text]
        same = np.isin(meaning, meaning[video_of_text == video])                # [n_text] captions that fit this video
        same_videos = np.unique(video_of_text[same])                            # videos that one of them describes
        text_scores = np.where(same | np.isin(video_of_text, same_videos), -np.inf, embedded.text_emb @ embedded.video_emb[video])
        video_scores = embedded.video_emb @ embedded.text_emb[text]
        own_score = video_scores[video]
        video_scores[same_videos] = -np.inf
        texts = _distinct_best(text_scores, embedded.captions, TOP)
        videos = [int(j) for j in np.argsort(-video_scores, kind="stable")[:TOP] if np.isfinite(video_scores[j]) and int(j) in first_text]
        rows = "".join(f"<tr><td>{quote(embedded.captions[i])}</td><td>{text_scores[i]:.3f}</td><td>{kappa:.2f}</td></tr>"
                       for i, kappa in zip(texts, overlap(text, texts)))
        cards = "".join(card(embedded.paths[j], f'{video_scores[j]:.3f} <span class="score">κ {kappa:.2f}</span>',
                             embedded.captions[first_text[j]], "wrong")
                        for j, kappa in zip(videos, overlap(text, [first_text[j] for j in videos])))
        own = card(embedded.paths[video], _title("", own_score, True), embedded.captions[text], "right")
        articles.append(f'<article><h3>“{quote(embedded.captions[text])}”</h3><div class="pair"><ul class="cards">{own}</ul>'
                        f'<div class="scroll"><table class="texts"><caption>Hardest wrong captions of this video</caption>'
                        f'<tr><th scope="col">caption</th><th scope="col">score</th><th scope="col">κ</th></tr>{rows}</table></div></div>'
                        f'<h4>Hardest wrong videos of this caption</h4><ul class="cards">{cards}</ul></article>')
    intro = ("What the model confuses. κ is the knowledge that two captions share (0 nothing, 1 all). Captions that mean the same are no "
             "negatives and are left out, as in training.")
    return f"<section><h2>Hard negatives</h2><p>{intro}</p>{''.join(articles)}</section>" if articles else ""


def _distinct_best(scores: np.ndarray, captions: list[str], count: int) -> list[int]:
    """Indices of the highest scores, each caption's text once."""
    best = {}
    for i in np.argsort(-scores, kind="stable"):
        if len(best) == count or not np.isfinite(scores[i]):
            break
        best.setdefault(captions[i], int(i))
    return list(best.values())


def _choices(chosen, choices: list[dict], scores: np.ndarray, scale: float) -> str:
    """Questions with the options' probabilities (soft-max of scale · score)."""
    articles = []
    for index in chosen:
        item, logits = choices[index], scale * scores[index]
        probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        picked, options = int(np.argmax(logits)), []
        for k, (option, probability) in enumerate(zip(item["options"], probabilities)):
            marks = ('<b class="ok">✓ right</b> ' if k == item["answer"] else "") + ("<b>◀ chosen</b>" if k == picked else "")
            state = ("right" if k == item["answer"] else "wrong") if k in (picked, item["answer"]) else ""
            options.append(f'<li class="{state}"><span class="bar" style="width:{100 * probability:.0f}%"></span>'
                           f'<span class="option">{quote(option)}</span> <span class="marks">{marks} {100 * probability:.0f} %</span></li>')
        verdict = '<b class="ok">✓ answered right</b>' if picked == item["answer"] else '<b class="no">✗ answered wrong</b>'
        articles.append(f'<article class="choice">{picture(item["video"])}<div><p class="note">options differ in: {visible(item["kind"])} · '
                        f'{verdict}</p><ol class="options">{"".join(options)}</ol></div></article>')
    return f'<section><h2>Multiple choice</h2><div class="choices">{"".join(articles)}</div></section>' if articles else ""


# ---------------------------------------------------------------- the page

STYLE = """
:root{color-scheme:light dark;--bg:#f7f6f3;--card:#fff;--ink:#1d2126;--soft:#59616b;--line:#dcd9d2;--ok:#0a6b4f;--no:#a8321f;--blue:#1f5fbf;
--bar:#dfe9f7;--warn:#fff1cc}
@media(prefers-color-scheme:dark){:root{--bg:#13161a;--card:#1c2026;--ink:#e9ebee;--soft:#a3acb7;--line:#343a43;--ok:#5fd0a5;--no:#ff9b87;
--blue:#8db8ff;--bar:#26364d;--warn:#3b3214}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main,header{max-width:1240px;margin:0 auto;padding:0 20px}header{padding-top:36px}h1{font-size:1.9rem;line-height:1.2;margin:0 0 6px}
h2{font-size:1.35rem;margin:0 0 4px}h3{font-size:1.05rem;margin:0;font-weight:600}h4{font-size:.9rem;margin:14px 0 6px;color:var(--soft)}
p{margin:0 0 10px}section{margin:44px 0}.soft,.note,.score,caption,figcaption{color:var(--soft);font-size:.875rem}
.warn{background:var(--warn);border:1px solid var(--line);border-radius:8px;padding:10px 14px;margin-top:12px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(180px,1fr));gap:14px;margin:24px 0}.tile{background:var(--card);
border:1px solid var(--line);border-radius:12px;padding:14px 18px}.tile dt{color:var(--soft);font-size:.875rem}.tile dd{margin:2px 0 0;
font-size:2.1rem;font-weight:650;letter-spacing:-.02em;line-height:1.2}.tile small{display:block;font-size:.8rem;font-weight:400;
letter-spacing:0;color:var(--soft)}.numbers{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:28px;align-items:start}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}caption{text-align:left;padding-bottom:6px}th,td{padding:6px 10px;
border-bottom:1px solid var(--line);text-align:right;vertical-align:top}th:first-child,td:first-child{text-align:left;padding-left:0}
th[scope=row]{font-weight:400}.scroll{overflow-x:auto}.curve{margin:0}svg{width:100%;height:auto;font-size:13px}svg text{fill:var(--soft)}
svg text.t2v{fill:var(--blue)}svg text.v2t{fill:var(--ok)}polyline{fill:none;stroke-width:2.5}.grid{stroke:var(--line)}.t2v{stroke:var(--blue)}
.v2t{stroke:var(--ok);stroke-dasharray:7 4}.guess{stroke:var(--soft);stroke-dasharray:2 4}svg text{stroke:none!important}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,250px),1fr));gap:10px 24px;margin:10px 0}.facts dt{color:var(--soft);
font-size:.8rem}.facts dd{margin:0;overflow-wrap:anywhere;font-size:.9rem}article{margin:18px 0;padding:16px 18px;background:var(--card);
border:1px solid var(--line);border-radius:12px}.cards{list-style:none;margin:0;padding:0;display:grid;gap:12px;
grid-template-columns:repeat(auto-fill,minmax(min(100%,172px),1fr))}.card{border:3px solid transparent;border-radius:10px;padding:6px;min-width:0}
.card.right{border-color:var(--ok)}.card.wrong{border:3px dotted var(--line)}.card.far{border-style:dashed}.title{margin:0 0 4px;font-size:.85rem;
display:flex;gap:8px}.title .score{margin-left:auto}.place{font-weight:650}.ok{color:var(--ok)}.no{color:var(--no)}img,.lost{width:100%;height:auto;
display:block;border-radius:6px;background:var(--line)}.lost{aspect-ratio:1;display:grid;place-items:center;color:var(--ink)}.caption{
margin:6px 0 0;font-size:.84rem;line-height:1.35;overflow-wrap:anywhere}.pair{display:grid;grid-template-columns:minmax(150px,200px) minmax(0,1fr);
gap:20px;margin-top:10px}.texts td{overflow-wrap:anywhere}.texts td:nth-child(n+2){white-space:nowrap}.choices{display:grid;gap:16px;
grid-template-columns:repeat(auto-fit,minmax(min(100%,540px),1fr))}.choice{display:grid;grid-template-columns:minmax(110px,170px) minmax(0,1fr);
gap:16px;margin:0}.options{list-style:none;margin:0;padding:0;font-size:.9rem}.options li{position:relative;padding:4px 8px;margin:3px 0;
border-radius:6px;border:1px solid transparent;display:flex;gap:8px;justify-content:space-between}.options li.right{border-color:var(--ok)}
.options li.wrong{border:1px dashed var(--no)}.bar{position:absolute;inset:0 auto 0 0;background:var(--bar);border-radius:6px;min-width:2px}
.option,.marks{position:relative;overflow-wrap:anywhere}.marks{white-space:nowrap;font-size:.8rem}footer{color:var(--soft);font-size:.85rem;margin:40px 0}
@media(max-width:640px){.cards{grid-template-columns:repeat(2,minmax(0,1fr))}.pair,.choice{grid-template-columns:1fr}.choice img{max-width:208px}
.options li{display:block}}
"""


def write_report(path, record: dict, *, embedded, t2v_ranks, v2t_ranks, choices: list[dict], choice_scores, concept_vocab: ConceptVocab,
                 queries: int = 5, seed: int = 0) -> int:
    """Write the page to `path`; returns its size in bytes.

    record: what metrics.json holds. embedded: eval.Embedded. t2v_ranks [n_text], v2t_ranks. choices: multiple-choice items with
    choice_scores [n, options]; empty where the task has none. `queries` right and as many wrong ones are drawn by `seed`.
    Raises UserError where the file cannot be written.
    """
    rng = np.random.default_rng(seed)
    draw = lambda candidates, n: rng.permutation(candidates)[:n].tolist()  # noqa: E731
    right, wrong = np.flatnonzero(t2v_ranks <= 1), np.flatnonzero(t2v_ranks > 1)
    picked = np.array([int(np.argmax(s)) == item["answer"] for s, item in zip(choice_scores, choices)], dtype=bool)
    kinds = np.array([item["kind"] for item in choices])
    questions = [q for kind in dict.fromkeys(kinds) for was_right in (True, False)
                 for q in draw(np.flatnonzero((kinds == kind) & (picked == was_right)), 1)]
    warning = f'<p class="warn" role="note"><b>Not comparable:</b> {visible(record["note"])}</p>' if record.get("note") else ""
    sections = [
        f'<section><h2>Result</h2>{_headline(record)}{_curve(t2v_ranks, v2t_ranks, len(embedded.paths))}</section>',
        _facts(record),
        _queries("Found", "Captions drawn at random among those whose right video came first. Each picture shows four moments of a "
                 "video: left to right, then down. Below a wrong video stands one of its own captions.", draw(right, queries), embedded, t2v_ranks),
        _queries("Missed", "Captions drawn at random among the others; the right video is added at the end if it is not among the first "
                 f"{TOP}.", draw(wrong, queries), embedded, t2v_ranks),
        _hard_negatives(draw(np.arange(len(t2v_ranks)), 4), embedded, concept_vocab),
        _choices(questions, choices, choice_scores, record["logit_scale"]),
    ]
    title = f"{visible(record['task'])}, {visible(record['split'])} split"
    page = ('<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; style-src \'unsafe-inline\'">'
            f"<title>CLOP on {title}</title><style>{STYLE}</style></head><body><header><h1>Video and language: {title}</h1>"
            f'<p class="soft">{visible(record["protocol"], 400)}</p>{warning}</header><main>{"".join(sections)}'
            f"<footer>Examples were drawn at random with seed {seed}; none was picked by hand.</footer></main></body></html>")
    try:
        return Path(path).write_text(page, encoding="utf-8") and os.path.getsize(path)
    except OSError as error:
        raise UserError(f"{path}: the report cannot be written ({error.strerror}); choose another --out") from error
