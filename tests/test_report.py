"""The page: complete, self-contained, small, and deaf to what stands in captions and paths."""

import base64
import re
from html.parser import HTMLParser
from urllib.parse import unquote

import cv2
import numpy as np
import pytest

from datasets.split import Question, Split
from eval import multiple_choice_points, outcome_facts, retrieval_ranks, summarize
from report.page import Results, write_report
from videos.decode import write_video

EVIL = (
    '<script>alert("x")</script> & \x00\x1b[31m\u202eevil\u2066 \ud800 '
    "'><img src=http://example.org/x onerror=alert(1)>"
)
VOID = {"meta", "img", "line", "br"}


class Page(HTMLParser):
    """Checks that tags match; collects elements, their attributes, and text."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(page)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Twelve videos of coloured noise, one of them with a hostile name."""
    folder, rng = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    paths = [str(folder / (f"{i}.mp4" if i else "<b onclick='x'>&.mp4")) for i in range(12)]
    for path in paths:
        write_video(path, rng.integers(0, 256, (5, 160, 160, 3), np.uint8))
    return paths


def make_page(
    folder, videos, captions, *, sim=None, questions=(), note="", broken=None, **kwargs
) -> str:
    """A page of one caption a video. sim: by default, neighbours are confused."""
    n = len(captions)
    if sim is None:
        sim = np.eye(n) + 1.2 * np.diag(np.arange(n - 1) % 2, k=1)
    split = Split(videos[:n], list(captions), np.arange(n), broken or {})
    outcomes = retrieval_ranks(sim, np.eye(n), np.arange(n))
    scores = np.tile([0.1, 0.9, 0.3, 0.2, 0.0], (len(questions), 1))
    if questions:
        answers, kinds = zip(*((question.answer, question.kind) for question in questions))
        outcomes |= multiple_choice_points(scores, answers, kinds)
    results = Results(split, sim, np.eye(n), outcomes, list(questions), scores)
    record = dict(task="toy", split="test", protocol="a protocol", note=note, training_seed=None)
    record |= dict(unusable=split.broken, window=list(split.window), logit_scale=5.0, frames=8)
    record |= dict(checkpoint="x.safetensors", versions={"torch": "2"})
    record |= summarize(outcomes) | outcome_facts(results)
    path = folder / "report.html"
    write_report(path, record, results, **kwargs)
    return path.read_text(encoding="utf-8")


NOUNS, VERBS = ("cup", "star", "fish", "tree"), ("pushes", "hits", "pulls")
CAPTIONS = [f"a {noun} {verb} a ball" for verb in VERBS for noun in NOUNS]


@pytest.fixture(scope="module")
def page(videos, tmp_path_factory):
    questions = [
        Question(videos[i], CAPTIONS[:5], i % 3, ("noun", "verb")[i % 2]) for i in range(6)
    ]
    return make_page(tmp_path_factory.mktemp("page"), videos, CAPTIONS, questions=questions)


def test_page_needs_nothing_from_outside(page, videos):
    """But the videos themselves, which a click plays."""
    parsed, linked = Page(page), set()
    for tag, attributes in parsed.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "form", "base", "source")
        assert not any(name.startswith("on") or name == "srcset" for name in attributes)
        if tag == "a":
            linked.add(unquote(attributes["href"].removesuffix("#t=0.0")))
        else:
            assert attributes.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg")
    assert linked <= {f"file://{video}" for video in videos} and len(linked) > 6
    assert not re.search("url\\(|@import|https?:", page)
    policy = "default-src 'none'; img-src data:; media-src file:; style-src 'unsafe-inline'"
    assert ("meta", {"http-equiv": "Content-Security-Policy", "content": policy}) in parsed.elements


def test_browsers_play_what_they_can_decode_in_place(videos, tmp_path):
    page = make_page(tmp_path, videos, CAPTIONS[:4])
    assert "<video" not in page and '<a class="picture"' in page  # mp4v: for the system's player
    playable = tmp_path / "clip.webm"
    writer = cv2.VideoWriter(str(playable), cv2.VideoWriter_fourcc(*"VP80"), 10, (64, 64))
    for value in range(0, 250, 25):
        writer.write(np.full((64, 64, 3), value, np.uint8))
    writer.release()
    page = make_page(tmp_path, [str(playable)] * 4, CAPTIONS[:4])
    sources = [a["src"] for tag, a in Page(page).elements if tag == "video"]
    assert sources and set(sources) == {f"file://{playable}#t=0.0"}


def test_page_can_be_read_by_all(page):
    parsed = Page(page)
    images = [attributes for tag, attributes in parsed.elements if tag == "img"]
    assert len(images) > 50 and len(page.encode()) < 3_000_000  # small, though of noise
    for image in images:
        assert image["alt"].strip() and image["width"] and image["height"]
        jpeg = np.frombuffer(base64.b64decode(image["src"].partition(",")[2]), np.uint8)
        assert cv2.imdecode(jpeg, cv2.IMREAD_COLOR).shape == (208, 208, 3)  # four moments
    assert ("html", {"lang": "en"}) in parsed.elements
    for tag, attributes in parsed.elements:
        assert tag != "th" or attributes["scope"] in ("row", "col")
    assert "prefers-color-scheme: dark" in page and "max-width: 640px" in page
    # never by colour alone
    for words in ("✓ right", "✗ wrong", "◀ chosen", "✓ answered right", "✗ answered wrong"):
        assert words in parsed.text
    # nothing that is empty
    assert "None" not in page and "[0.0" not in page and "training seed" not in page
    assert "torch 2" in page


def test_hostile_captions_and_paths_stay_text(videos, tmp_path):
    captions = [EVIL, "", "word " * 10_000, "猫が走る 🐈\u200d⬛", *CAPTIONS[:4]]
    options = dict(questions=[Question(videos[0], [EVIL] * 5, 1, "<i>")], queries=8)
    page = make_page(tmp_path, videos, captions, note=EVIL, broken={"<u>": EVIL}, **options)
    parsed = Page(page)
    for tag, attributes in parsed.elements:
        assert tag not in ("script", "i", "u")
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page)
    for text in ('alert("x")', r"\u0000", r"\u202e", r"\ud800", "猫が走る 🐈\u200d⬛"):
        assert text in parsed.text
    assert len(parsed.text) < 100_000


def test_long_lists_are_folded(videos, tmp_path):
    broken = {f"{i}.mp4": f"{i}.mp4: no such video file" for i in range(1200)}
    page = make_page(tmp_path, videos, CAPTIONS[:4], broken=broken)
    folded = page[page.index("<details>") : page.index("</details>")]
    assert "<summary>1200 videos were left out</summary>" in folded and "<details open" not in page
    assert folded.count("<li>") == 1000 and "… and 200 more" in folded


def test_misses_come_first_and_the_worst_before_others(videos, tmp_path):
    sim = np.full((12, 12), 0.25)
    sim[np.diag_indices(12)] = 0.5
    sim[3, [0, 1, 2, 5, 6, 7]] = 0.75  # the video of caption 3 stands at rank 7
    sim[4, [0]] = 0.75  # that of caption 4 at rank 2
    page = make_page(tmp_path, videos, CAPTIONS, sim=sim, queries=1)
    titles = ("Missed by most", "Missed", "Taken for", "Found", "The run")
    places = [page.index(f"<h2>{title}</h2>") for title in titles]
    assert places == sorted(places)
    worst, missed = page[places[0] : places[1]], page[places[1] : places[2]]
    assert CAPTIONS[3] in worst and "right video at rank 7 of 12" in worst
    assert missed.count("<article>") == 1 and "right video at rank 2 of 12" in missed
    marks = re.findall(r"<b>(\d+)</b><b class=\"(ok|no)\">", worst)
    assert marks == [("1", "no"), ("2", "no"), ("3", "no"), ("4", "no"), ("5", "no"), ("7", "ok")]


def test_what_is_taken_for_what_is_counted(videos, tmp_path):
    captions = ["a dog chases a cat", "a cat chases a dog", "a horse sleeps", "a pig sleeps"]
    sim = np.eye(4)
    sim[0, 1] = sim[2, 3] = sim[3, 2] = 2  # roles swapped; horse and pig mixed up
    page = make_page(tmp_path, videos, captions, sim=sim)
    text = Page(page[page.index("<h2>Taken for") - 9 : page.index("<h2>Found") - 9]).text
    lines = {line.replace("\xa0", " ") for line in text.splitlines()}
    assert {"horse10.0pig × 1", "pig10.0horse × 1"} <= lines  # noun, captions, R@1, taken for
    assert {"sleep20.0", "chase250.0"} <= lines  # the verb is in both
    assert "chase cat10.0chase dog × 1" in lines and "chase dog1100.0" in lines


def test_an_unreadable_video_does_not_stop_the_page_and_a_seed_decides_it(videos, tmp_path):
    lost = [str(tmp_path / "lost.mp4"), *videos[1:]]
    assert "not readable" in make_page(tmp_path, lost, CAPTIONS, queries=12)
    pages = [make_page(tmp_path, videos, CAPTIONS, seed=seed, queries=2) for seed in (1, 1, 2)]
    assert pages[0] == pages[1] != pages[2]
