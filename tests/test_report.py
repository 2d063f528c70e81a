"""The page: complete, self-contained, small, and deaf to what stands in captions and paths."""

import base64
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from datasets.split import Question, Split
from knowledge import ConceptVocab, extract_many
from report.page import MAX_PICTURE_BYTES, Results, picture, shown, write_report
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
    folder, videos, captions, *, embed=None, questions=(), note="", broken=None, **kwargs
) -> str:
    """A page of one caption a video; `embed` is the similarity of caption and video (default:
    neighbours confused).
    """
    n = len(captions)
    sim = np.eye(n) + 1.2 * np.diag(np.arange(n - 1) % 2, k=1) if embed is None else embed
    split = Split(videos[:n], list(captions), np.arange(n), broken or {})
    ranks = 1.0 + (sim > np.diag(sim)[:, None]).sum(1)
    record = dict(
        task="toy",
        split="test",
        protocol="a protocol",
        note=note,
        unusable=split.broken,
        logit_scale=5.0,
        checkpoint="x.safetensors",
        frames=8,
        versions={"torch": "2"},
        training_seed=None,
        mc_accuracy=50.0,
        **{f"mc_accuracy_{question.kind}": 50.0 for question in questions},
        **{
            f"{way}_{m}": 12.5
            for way in ("t2v", "v2t")
            for m in ("R@1", "R@5", "R@10", "MdR", "MnR")
        },
    )
    scores = np.tile([0.1, 0.9, 0.3, 0.2, 0.0], (len(questions), 1))
    knowledge = extract_many(captions, progress=False)
    results = Results(split, sim, np.eye(n), ranks, ranks, list(questions), scores)
    path, vocab = folder / "report.html", ConceptVocab.build(knowledge, min_count=1)
    write_report(path, record, results, vocab, **kwargs)
    return path.read_text(encoding="utf-8")


NOUNS, VERBS = ("cup", "star", "fish", "tree"), ("pushes", "hits", "pulls")
CAPTIONS = [f"a {noun} {verb} a ball" for verb in VERBS for noun in NOUNS]


@pytest.fixture(scope="module")
def page(videos, tmp_path_factory):
    questions = [
        Question(videos[i], CAPTIONS[:5], i % 3, ("noun", "verb")[i % 2]) for i in range(6)
    ]
    return make_page(tmp_path_factory.mktemp("page"), videos, CAPTIONS, questions=questions)


def test_page_needs_nothing_from_outside(page):
    parsed = Page(page)
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "a", "form", "base"}
    for tag, attributes in parsed.elements:
        assert not {
            name for name in attributes if name.startswith("on") or name in ("href", "srcset")
        }
        if "src" in attributes:
            assert tag == "img" and attributes["src"].startswith("data:image/jpeg;base64,")
    assert (
        "url(" not in page
        and "@import" not in page
        and "http:" not in page
        and "https:" not in page
    )
    policy = [
        a["content"]
        for tag, a in parsed.elements
        if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_page_can_be_read_by_all(page):
    parsed = Page(page)
    images = [attributes for tag, attributes in parsed.elements if tag == "img"]
    assert len(images) > 30 and all(
        image["alt"].strip() and image["width"] and image["height"] for image in images
    )
    assert ("html", {"lang": "en"}) in parsed.elements and [
        tag for tag, _ in parsed.elements
    ].count("h1") == 1
    assert all(
        attributes.get("scope") in ("row", "col")
        for tag, attributes in parsed.elements
        if tag == "th"
    )
    assert "prefers-color-scheme: dark" in page and "max-width: 640px" in page
    for words in (
        "✓ right",
        "✗ wrong",
        "◀ chosen",
        "✓ answered right",
        "✗ answered wrong",
    ):  # never by colour alone
        assert words in parsed.text


def test_pictures_are_small_jpegs_of_four_moments(videos):
    jpeg = base64.b64decode(picture(videos[1]))
    assert len(jpeg) <= MAX_PICTURE_BYTES  # noise is the worst case
    assert cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR).shape == (208, 208, 3)


def test_page_of_noise_stays_below_three_megabytes(page):
    assert len(page.encode()) < 3_000_000
    assert page.count("<img") * (MAX_PICTURE_BYTES * 4 / 3 + 200) < 3_000_000


def test_colours_have_contrast(page):
    """Text colours reach WCAG AA (4.5 : 1) on both of their backgrounds, in both themes."""

    def luminance(code):
        code = code if len(code) == 6 else "".join(2 * c for c in code)
        channels = [int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    themes = re.findall(r":root \{([^}]*)\}", page)
    assert len(themes) == 2
    for theme in themes:
        colours = {name: luminance(code) for name, code in re.findall(r"--(\w+): #(\w+)", theme)}
        for text, grounds in dict(
            ink=("bg", "card", "bar", "warn"),
            soft=("bg", "card"),
            ok=("bg", "card", "bar"),
            no=("card",),
            blue=("bg", "card"),
        ).items():
            for ground in grounds:
                low, high = sorted((colours[text], colours[ground]))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (
                    f"{text} on {ground}: {(high + 0.05) / (low + 0.05):.2f}"
                )


def test_hostile_captions_and_paths_stay_text(videos, tmp_path):
    captions = [EVIL, "", "word " * 10_000, "猫が走る 🐈\u200d⬛", *CAPTIONS[:4]]
    questions = [Question(videos[0], [EVIL] * 5, 1, "<i>")]
    page = make_page(
        tmp_path,
        videos,
        captions,
        questions=questions,
        note=EVIL,
        broken={"<u>": EVIL},
        queries=8,
        pairs=8,
    )
    parsed = Page(page)
    assert (
        not {tag for tag, _ in parsed.elements} & {"script", "i>", "u"}
        and 'alert("x")' in parsed.text
    )
    assert all(
        not name.startswith("on") for _, attributes in parsed.elements for name in attributes
    )
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page)
    assert r"\u0000" in parsed.text and r"\u202e" in parsed.text and r"\ud800" in parsed.text
    assert (
        "猫が走る 🐈\u200d⬛" in parsed.text
        and "(empty caption)" in parsed.text
        and len(parsed.text) < 100_000
    )


@pytest.mark.parametrize(
    "text, seen",
    [
        ("a  b\n\tc", "a b c"),
        ("\x07", "\\u0007"),
        ("x" * 500, "x" * 220 + " …"),
        ("", ""),
    ],
)
def test_shown(text, seen):
    assert shown(text) == seen


def test_what_the_page_says_is_what_was_measured(page, videos, tmp_path):
    n, sim = 12, np.full((12, 12), 0.25)
    sim[np.diag_indices(n)] = 0.5
    sim[3, [0, 1, 2, 5, 6, 7]] = 0.75  # caption 3 alone is missed: its video stands at rank 7
    page = make_page(tmp_path, videos, CAPTIONS, embed=sim)
    missed = page[page.index("<h2>Missed</h2>") : page.index("<h2>Hard negatives</h2>")]
    assert (
        missed.count("<article>") == 1
        and CAPTIONS[3] in missed
        and "right video at rank 7 of 12" in missed
    )
    marks = re.findall(r"<b>(\d+)</b><b class=\"(ok|no)\">", missed)
    assert marks == [("1", "no"), ("2", "no"), ("3", "no"), ("4", "no"), ("5", "no"), ("7", "ok")]


def test_hard_negatives_leave_out_what_means_the_same(videos, tmp_path):
    captions = ["a dog runs", "dogs are running", "a cat sleeps", "a dog sleeps"]
    sim = np.array(
        [[0.9, 0.8, 0.1, 0.2], [0.8, 0.9, 0.1, 0.2], [0.1, 0.1, 0.9, 0.3], [0.2, 0.2, 0.3, 0.9]]
    )
    page = make_page(tmp_path, videos, captions, embed=sim, queries=0, pairs=4)
    article = next(
        a for a in page.split("<article>") if a.startswith("<h3>“<bdi>a dog runs</bdi>”")
    )
    assert (
        "dogs are running" not in article
        and "a cat sleeps" in article
        and "a dog sleeps" in article
    )
    assert re.search(r"a dog sleeps</bdi></th><td>0\.200</td><td>0\.[1-9]", article), (
        "κ of a shared noun is not shown"
    )
    assert re.search(r"a cat sleeps</bdi></th><td>0\.100</td><td>0\.00", article)


def test_unreadable_video_does_not_stop_the_page(videos, tmp_path):
    lost = [str(tmp_path / "lost.mp4"), *videos[1:]]
    assert "not readable" in make_page(tmp_path, lost, CAPTIONS, queries=12)


def test_same_seed_same_page(videos, tmp_path):
    one, two, three = (
        make_page(tmp_path, videos, CAPTIONS, seed=seed, queries=2) for seed in (1, 1, 2)
    )
    assert one == two != three
