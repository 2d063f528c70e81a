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
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import torch
from einops import rearrange

from cli import run
from data import Question, Split
from knowledge import ConceptVocab, concept_vectors, extract_many, meaning_ids, multi_hot
from video import VideoError, read_frames, write_video

FRAME_SIZE = 104          # pixels of one moment; four make a picture
MAX_PICTURE_BYTES = 14_000  # JPEG; about 110 pictures keep a page below 3 MB
TOP = 5



@dataclass
class Results:
    """What metrics summarise and the page shows."""

    split: Split                 # the gallery and its captions; `broken` are the videos that had to be left out
    text_emb: np.ndarray         # [n_text, E]
    video_emb: np.ndarray        # [n_video, E]
    t2v_ranks: np.ndarray        # [n_text]
    v2t_ranks: np.ndarray        # [videos with captions]
    questions: list[Question]
    option_scores: np.ndarray    # [questions, options]


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


def _headline(record: dict, results: Results) -> str:
    n_video = record["videos"]
    tiles = [("Text to video, R@1", f"{record['t2v_R@1']:.1f} %", f"a guess: {100 / n_video:.2g} %"),
             ("Video to text, R@1", f"{record['v2t_R@1']:.1f} %", f"{record['captions']:,} captions"),
             ("Text to video, median rank", f"{record['t2v_MdR']:g}", f"of {n_video:,} videos")]
    if results.questions:
        tiles.append(("Multiple choice", f"{record['mc_accuracy']:.1f} %", f"a guess: {100 / results.option_scores.shape[1]:.3g} %"))
    tiles = "".join(f'<div class="tile"><dt>{name}</dt><dd>{value}<small>{below}</small></dd></div>' for name, value, below in tiles)
    columns, rows = ("R@1", "R@5", "R@10", "MdR", "MnR"), []
    for name, way in (("text to video", "t2v"), ("video to text", "v2t")):
        rows.append([name, *(f"{record[f'{way}_{column}']:.1f}" for column in columns)])
    tables = _table("R@K in percent; ranks start at 1, ties count half", ["", *columns], rows)
    kinds = [(name.removeprefix("mc_accuracy_"), sum(question.kind == name.removeprefix("mc_accuracy_") for question in results.questions),
              f"{value:.1f}") for name, value in record.items() if name.startswith("mc_accuracy_")]
    if kinds:
        tables += _table("Multiple choice, percent right", ["wrong options differ in", "questions", "accuracy"],
                         [(visible(kind), f"{n:,}", accuracy) for kind, n, accuracy in kinds])
    return f'<dl class="tiles">{tiles}</dl><div class="numbers"><div>{tables}</div>{_curve(results)}</div>'


def _table(title: str, columns, rows) -> str:
    """Rows of cells that are HTML already; the first cell names its row."""
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    body = "".join(f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>" for first, *rest in rows)
    return f'<div class="scroll"><table><caption>{title}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _curve(results: Results) -> str:
    """R@K against K as an inline SVG, K on a log axis; the dotted line is a model that guesses."""
    t2v, v2t, n_video = results.t2v_ranks, results.v2t_ranks, len(results.split.video_paths)
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
    """All of the record but metrics and what the page says elsewhere."""
    elsewhere = {"protocol", "note", "unusable"}
    shown = {name: value for name, value in record.items() if name not in elsewhere and not name.startswith(("t2v_", "v2t_", "mc_"))}
    rows = "".join(f"<div><dt>{visible(name.replace('_', ' '))}</dt><dd>{quote(_readable(value))}</dd></div>" for name, value in shown.items())
    unusable = "".join(f"<li>{quote(reason)}</li>" for reason in list(record["unusable"].values())[:50])
    listed = f'<p class="note">Videos left out{" (the first 50)" if len(record["unusable"]) > 50 else ""}:</p><ul>{unusable}</ul>'
    return f'<section><h2>The run</h2><dl class="facts">{rows}</dl>{listed if unusable else ""}</section>'


def _readable(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _title(score: float, is_right: bool, place: str = "") -> str:
    word = '<b class="ok">✓ right</b>' if is_right else '<b class="no">✗ wrong</b>'
    return f'<span class="place">{place}</span>{word}<span class="score">{score:.3f}</span>'


def _queries(title: str, intro: str, queries, results: Results) -> str:
    """Captions with the videos that score highest, and the right one wherever it stands."""
    split, caption_of, articles = results.split, _first_texts(results.split), []
    for query in queries:
        scores, right, rank = results.video_emb @ results.text_emb[query], split.video_of_caption[query], results.t2v_ranks[query]
        best = np.argsort(-scores, kind="stable")[:TOP].tolist()
        places = [(f"{place}", j) for place, j in enumerate(best, 1)] + [(f"{rank:g}", right)] * (right not in best)
        cards = "".join(card(split.video_paths[j], _title(scores[j], j == right, place),
                             split.captions[query if j == right else caption_of[j]] if j in caption_of else "",
                             "right" if j == right else "wrong") for place, j in places)
        articles.append(f'<article><h3>“{quote(split.captions[query])}”</h3><p class="note">right video at rank {rank:g} of '
                        f'{len(scores):,}</p><ol class="cards">{cards}</ol></article>')
    return f"<section><h2>{title}</h2><p>{intro}</p>{''.join(articles)}</section>" if articles else ""


def _first_texts(split: Split) -> dict[int, int]:
    """{video: its first caption}, as indices."""
    return {j: i for i, j in reversed(list(enumerate(split.video_of_caption.tolist())))}


def _hard_negatives(texts, results: Results, knowledge: list[dict], vocab: ConceptVocab) -> str:
    """For some captions and their videos: the wrong captions nearest to the video, the wrong videos nearest to the caption, and κ."""
    split, text_of, articles = results.split, _first_texts(results.split), []
    meaning, video_of_text = meaning_ids(split.captions, knowledge), split.video_of_caption

    def overlaps(text: int, others: list[int]) -> np.ndarray:
        concepts = multi_hot([vocab.encode(knowledge[i]) for i in [text, *others]], len(vocab))
        vectors = concept_vectors(concepts, torch.as_tensor(vocab.idf))                     # [1 + n, K]
        return (vectors[1:] @ vectors[0]).numpy()

    for text in texts:
        video = video_of_text[text]
        # no negatives: captions that mean what one of the video's own does, and all that is said of videos with such a caption
        same_videos = np.unique(video_of_text[np.isin(meaning, meaning[video_of_text == video])])
        text_scores = np.where(np.isin(video_of_text, same_videos), -np.inf, results.text_emb @ results.video_emb[video])
        video_scores = results.video_emb @ results.text_emb[text]
        own_card = card(split.video_paths[video], _title(video_scores[video], True), split.captions[text], "right")
        video_scores[[j for j in range(len(video_scores)) if j not in text_of]] = -np.inf   # nothing is known of them
        video_scores[same_videos] = -np.inf
        wrong_texts = [i for i in np.argsort(-text_scores, kind="stable")[:TOP].tolist() if np.isfinite(text_scores[i])]
        wrong_videos = [j for j in np.argsort(-video_scores, kind="stable")[:TOP].tolist() if np.isfinite(video_scores[j])]
        rows = [(quote(split.captions[i]), f"{text_scores[i]:.3f}", f"{kappa:.2f}")
                for i, kappa in zip(wrong_texts, overlaps(text, wrong_texts))]
        cards = "".join(card(split.video_paths[j], f'<b class="no">✗ wrong</b><span class="score">{video_scores[j]:.3f} · κ {kappa:.2f}</span>',
                             split.captions[text_of[j]], "wrong")
                        for j, kappa in zip(wrong_videos, overlaps(text, [text_of[j] for j in wrong_videos])))
        articles.append(f'<article><h3>“{quote(split.captions[text])}”</h3><div class="pair"><ul class="cards">{own_card}</ul>'
                        f'{_table("Hardest wrong captions of this video", ["caption", "score", "κ"], rows)}</div>'
                        f'<h4>Hardest wrong videos of this caption</h4><ul class="cards">{cards}</ul></article>')
    intro = ("What the model confuses, whatever the rank. κ is the knowledge that two captions share, from 0 (nothing) to 1 (all). As in "
             "training, captions that mean the same are no negatives of each other and are left out.")
    return f"<section><h2>Hard negatives</h2><p>{intro}</p>{''.join(articles)}</section>" if articles else ""


def _choices(chosen, results: Results, scale: float) -> str:
    """Questions with the options' probabilities (soft-max of scale · score)."""
    articles = []
    for index in chosen:
        question, logits = results.questions[index], scale * results.option_scores[index]
        probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        picked, options = int(np.argmax(logits)), []
        for i, (option, probability) in enumerate(zip(question.options, probabilities)):
            state = "right" if i == question.answer else "wrong" if i == picked else ""
            marks = '<b class="ok">✓ right</b> ' * (i == question.answer) + "<b>◀ chosen</b> " * (i == picked)
            options.append(f'<li class="{state}"><span class="bar" style="width:{100 * probability:.0f}%"></span><span class="option">'
                           f'{quote(option)}</span><span class="marks">{marks}{100 * probability:.0f} %</span></li>')
        verdict = '<b class="ok">✓ answered right</b>' if picked == question.answer else '<b class="no">✗ answered wrong</b>'
        articles.append(f'<article class="choice">{picture(question.video)}<div><p class="note">wrong options differ in: '
                        f'{visible(question.kind)} · {verdict}</p><ol class="options">{"".join(options)}</ol></div></article>')
    intro = "Which caption fits the video? Two questions of each kind drawn at random, one answered right and one wrong where there are both."
    return f'<section><h2>Multiple choice</h2><p>{intro}</p><div class="choices">{"".join(articles)}</div></section>' if articles else ""


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


def write_report(path, record: dict, results: Results, knowledge: list[dict], concept_vocab: ConceptVocab, *, queries: int = 5,
                 seed: int = 0) -> None:
    """Write the page to `path`. `record` is what metrics.json holds (see eval.evaluate).

    knowledge: of each caption, as extract_knowledge gives it. `queries` right and as many wrong ones are drawn by `seed`.
    Raises OSError where the file cannot be written.
    """
    rng = np.random.default_rng(seed)

    def draw(condition, count: int) -> list[int]:
        return rng.permutation(np.flatnonzero(condition))[:count].tolist()

    first = results.t2v_ranks <= 1
    picked_right = np.array([scores.argmax() == question.answer for scores, question in zip(results.option_scores, results.questions)], bool)
    kind = np.array([question.kind for question in results.questions], str)
    chosen = [index for name in dict.fromkeys(kind.tolist()) for was_right in (True, False)
              for index in draw((kind == name) & (picked_right == was_right), 1)]
    sections = [
        f"<section><h2>Result</h2>{_headline(record, results)}</section>",
        _facts(record),
        _queries("Found", "Captions drawn at random among those whose right video came first. Each picture shows four moments of a video, "
                 "left to right, then down. Below a wrong video stands one of its own captions.", draw(first, queries), results),
        _queries("Missed", f"Captions drawn at random among all others. The right video stands at the end if it is not among the first {TOP}.",
                 draw(~first, queries), results),
        _hard_negatives(draw(np.ones_like(first), 4), results, knowledge, concept_vocab),
        _choices(chosen, results, record["logit_scale"])]
    title = f"{visible(record['task'])}, {visible(record['split'])} split"
    warning = f'<p class="warn" role="note"><b>Incomplete:</b> {visible(record["note"])}</p>' if record["note"] else ""
    page = ('<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; style-src \'unsafe-inline\'">'
            f"<title>CLOP on {title}</title><style>{STYLE}</style></head><body><header><h1>CLOP on {title}</h1>"
            f'<p class="soft">{visible(record["protocol"], 400)}</p>{warning}</header><main>{"".join(sections)}'
            f"<footer>All examples were drawn at random (seed {seed}); none was picked by hand.</footer></main></body></html>")
    Path(path).write_text(page, encoding="utf-8")


def main():
    """A page of grey videos, with scores made up so that neighbours are confused."""
    with tempfile.TemporaryDirectory() as folder:
        captions = [f"a ball {verb}s a {noun}" for verb in ("push", "pass", "chase") for noun in ("cup", "star", "fish", "tree")]
        split = Split.from_pairs((f"{folder}/{i}.mp4", caption) for i, caption in enumerate(captions))
        for i, name in enumerate(split.video_paths):
            write_video(name, np.full((4, 64, 64, 3), 20 * i, np.uint8) + np.arange(4, dtype=np.uint8)[:, None, None, None] * 9)
        emb = np.eye(12) + 0.9 * np.eye(12, k=1)
        ranks = np.ones(12) + (np.arange(12) % 3 == 0)
        metrics = {f"{way}_{m}": 66.7 if "@" in m else 1.3 for way in ("t2v", "v2t") for m in ("R@1", "R@5", "R@10", "MdR", "MnR")}
        record = dict(task="demo", split="made-up", protocol="Nothing is measured here.", note="", videos=12, captions=12, unusable={},
                      logit_scale=10.0, mc_accuracy=100.0, **metrics)
        results = Results(split, emb, np.eye(12), ranks, ranks, [Question(split.video_paths[0], captions[:5], 0, "noun")], emb[:1, :5])
        knowledge = extract_many(captions, progress=False)
        page = sys.argv[1] if len(sys.argv) > 1 else f"{folder}/report.html"
        write_report(page, record, results, knowledge, ConceptVocab.build(knowledge))
        print(f"{page}: {os.path.getsize(page) / 1000:.0f} kB" + (" (removed again; give a FILE to keep it)" if len(sys.argv) == 1 else ""))


if __name__ == "__main__":
    run(main)
