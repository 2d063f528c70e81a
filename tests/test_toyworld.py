"""The toy world: what is promised about its splits, captions, questions and files, checked against
the ground truth.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from cli import UserError
from datasets import toyworld
from datasets.toyrender import (
    COLOURS,
    FRAMES,
    KINDS,
    SIDE,
    SIZES,
    Event,
    Thing,
)
from datasets.toyworld import NEAR, RELATION, SINGLE, caption_of, compositions, generate

ROOT = Path(__file__).parent.parent
SMALL = dict(train=12, val=6, test=10, progress=False)
NOUNS = {
    noun: kind
    for kind in KINDS
    for noun in (kind, {"fish": "fish", "cross": "crosses"}.get(kind, kind + "s"))
}
VERBS = {form: action for action, forms in RELATION.items() for form in forms[0].split()}
VERBS |= {forms[0]: action for action, forms in SINGLE.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return generate(tmp_path_factory.mktemp("toy"), workers=1, **SMALL)


@pytest.fixture(scope="module")
def plans() -> dict[str, dict]:
    """All texts of a full-size world: {split: {"csv": rows, "truth": {video: events}, "mc":
    questions}}.
    """
    plans = {}
    for split, count in {"train": 10_000, "val": 500, "test": 1000}.items():
        _, files = toyworld.plan(split, count, seed=0)
        records = {
            name: [json.loads(line) for line in text.splitlines()]
            for name, text in files.items()
            if name.endswith("jsonl")
        }
        plans[split] = {
            "csv": list(csv.DictReader(files[f"{split}.csv"].splitlines())),
            "truth": {
                record["video"]: record["events"] for record in records[f"{split}_truth.jsonl"]
            },
            "mc": records.get(f"{split}_mc.jsonl", []),
        }
    return plans


def _texts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def _frames(path: Path) -> np.ndarray:
    capture, frames = cv2.VideoCapture(str(path)), []
    while (frame := capture.read()[1]) is not None:
        frames.append(frame)
    return np.stack(frames)


def _things(events: list[dict]) -> list[dict]:
    return [thing for event in events for thing in (event["subject"], event["object"]) if thing]


# ---- captions


BALL, FISHES = Thing(1, "big", "red", "ball"), Thing(2, None, "blue", "fish")


CROSSES, UMBRELLA = Thing(3, None, "black", "cross"), Thing(1, None, "", "umbrella")
SPIN, FADE, GROW = Event("spin", BALL), Event("fade", CROSSES), Event("grow", UMBRELLA)
FISH_EAT, BALL_EATS = Event("eat", FISHES, BALL), Event("eat", BALL, FISHES)
PULL, BLINK, FALL = Event("pull", FISHES, BALL), Event("blink", BALL), Event("fall", FISHES)
BLINK_WHILE_FALL = "a big red ball is blinking while two blue fish are descending"


@pytest.mark.parametrize(
    "scene, template, synonyms, expected",
    [
        ((SPIN,), 3, (1,), "a video of a big red ball that is rotating"),
        ((FADE,), 1, (0,), "there are three black crosses that are fading"),
        ((GROW,), 0, (0,), "an umbrella is growing"),
        ((FISH_EAT,), 2, (0,), "a big red ball is eaten by two blue fish"),
        ((BALL_EATS,), 3, (1,), "two blue fish are being swallowed by a big red ball"),
        ((PULL,), 4, (1,), "there are two blue fish that are dragging a big red ball"),
        ((BLINK, FALL), 0, (0, 1), BLINK_WHILE_FALL),
    ],
)
def test_captions_are_grammatical(scene, template, synonyms, expected):
    assert caption_of(scene, template, synonyms) == expected


def test_captions_of_training_are_distinct_paraphrases(plans):
    by_video = {}
    for row in plans["train"]["csv"]:
        by_video.setdefault(row["video"], []).append(row["caption"])
    assert len(by_video) == 10_000
    assert all(len(captions) == len(set(captions)) == 5 for captions in by_video.values())
    words = {
        word for captions in by_video.values() for caption in captions for word in caption.split()
    }
    assert words >= set(NOUNS) | set(COLOURS) | set(SIZES) | {
        "two",
        "three",
        "while",
        "being",
        "by",
    }


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_first_caption_says_all_there_is(plans, split):
    """Every noun phrase of the truth, word by word, is in the first (of val and test: the only)
    caption.
    """
    first = {row["video"]: row["caption"] for row in reversed(plans[split]["csv"])}
    for video, events in plans[split]["truth"].items():
        for thing in _things(events):
            singular = thing["kind"]
            plural = {"fish": "fish", "cross": "crosses"}.get(singular, singular + "s")
            noun = singular if thing["count"] == 1 else plural
            phrase = " ".join(word for word in (thing["size"], thing["colour"], noun) if word)
            count = {1: "a", 2: "two", 3: "three"}[thing["count"]]
            assert f"{count} {phrase} " in first[video] + " ", (phrase, first[video])


# ---- splits


def _compositions(truth: dict[str, list[dict]]) -> set:
    return {
        (event["action"], frozenset(thing["kind"] for thing in _things([event])))
        for events in truth.values()
        for event in events
    }


def test_held_out_compositions_never_occur_in_training(plans):
    seen = {split: _compositions(plan["truth"]) for split, plan in plans.items()}
    assert (
        not seen["train"] & seen["test"]
        and not seen["train"] & seen["val"]
        and not seen["val"] & seen["test"]
    )
    for split, found in seen.items():
        assert {action for action, _ in found} == set(SINGLE) | set(RELATION), split
        assert set().union(*(kinds for _, kinds in found)) == set(KINDS), split
    assert len(seen["test"]) > 200


def test_every_kind_acts_in_training_in_every_sort_of_scene():
    allowed = compositions("train")
    for kind in KINDS:
        assert sum((kind,) in allowed[action] for action in SINGLE) >= len(SINGLE) / 2, kind
        assert all(any(kind in pair for pair in allowed[action]) for action in RELATION), kind


@pytest.mark.parametrize("split", ["val", "test"])
def test_retrieval_is_well_posed(plans, split):
    """One caption a video, and no video shows all that the caption of another one says."""
    assert len(plans[split]["csv"]) == len(plans[split]["truth"])
    assert len({row["caption"] for row in plans[split]["csv"]}) == len(plans[split]["csv"])
    scenes = [
        frozenset(json.dumps(event) for event in events)
        for events in plans[split]["truth"].values()
    ]
    holders = {}
    for i, scene in enumerate(scenes):
        for event in scene:
            holders.setdefault(event, set()).add(i)
    for i, scene in enumerate(scenes):
        assert set.intersection(*(holders[event] for event in scene)) == {i}


def test_scenes_run_out_in_one_line(monkeypatch):
    scene = (Event("spin", BALL),)
    monkeypatch.setattr(toyworld, "draw_scene", lambda split, rng: scene)
    with pytest.raises(UserError, match="test=2: only 1 distinct"):
        toyworld.distinct_scenes("test", 2, np.random.default_rng(0))


# ---- multiple choice


def _read_back(caption: str) -> list[tuple]:
    """What a caption says, in its order: (count, colour, kind) of each thing, (action,)."""
    counts = {"a": 1, "an": 1, "two": 2, "three": 3}
    found, count, colour = [], None, ""
    for word in caption.split():
        if word in counts:
            count, colour = counts[word], ""
        elif word in COLOURS:
            colour = word
        elif word in NOUNS:
            found.append((count, colour, NOUNS[word]))
        elif word in VERBS:
            found.append((VERBS[word],))
    return found


def _edit_of(true: str, option: str) -> str:
    """The sort of an edit, from the words alone."""
    old, new = _read_back(true), _read_back(option)
    changed = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
    before, after = zip(*changed)
    if len(before[0]) == 1:
        assert len(changed) == 1
        return "verb"
    fields = {i for a, b in changed for i in range(3) if a[i] != b[i]}
    if 2 in fields and len(changed) == 2:
        assert sorted(before) == sorted(after)
        return "direction"
    (field,) = fields
    return ("count", "binding", "noun")[field]


@pytest.mark.parametrize("split", ["val", "test"])
def test_questions_have_one_true_option_and_four_false_ones(plans, split):
    truth, questions = plans[split]["truth"], plans[split]["mc"]
    trained = _compositions(plans["train"]["truth"])
    special = {"noun": 4, "verb": 4, "direction": 1, "binding": 1, "count": 2}
    for question in questions:
        events, options, kind = truth[question["video"]], question["options"], question["kind"]
        assert len(set(options)) == 5
        true = options.pop(question["answer"])
        kinds = {thing["kind"] for thing in _things(events)}
        actions = {event["action"] for event in events}
        read = _read_back(true)
        assert {part[-1] for part in read if len(part) == 3} == kinds
        assert {part[0] for part in read if len(part) == 1} == actions

        sorts = [_edit_of(true, option) for option in options]
        assert sorts.count(kind) == special[kind]
        assert set(sorts) <= {kind, "noun"}
        for option, sort in zip(options, sorts):
            new = _read_back(option)
            if sort == "noun":  # nothing of this kind is in the video, and none is taught there
                now = frozenset(part[-1] for part in new if len(part) == 3)
                assert len(now - kinds) == 1
                assert len(events) == 2 or (events[0]["action"], now) not in trained
            if sort == "verb":
                (verb,) = {part[0] for part in new if len(part) == 1} - actions
                assert not any({verb, action} in NEAR for action in actions)


def test_questions_are_many_and_balanced(plans):
    questions = plans["test"]["mc"]
    assert len(questions) > 4000
    answers = np.bincount([question["answer"] for question in questions], minlength=5)
    assert answers.min() > 0.17 * len(questions)
    kinds = [question["kind"] for question in questions]
    assert min(kinds.count(kind) for kind in set(kinds)) > 500 and len(set(kinds)) == 5


# ---- files


def test_a_world_on_disk(world):
    for split, captions in {"train": 60, "val": 6, "test": 10}.items():
        rows = list(csv.DictReader(open(world / f"{split}.csv", encoding="utf-8")))
        assert list(rows[0]) == ["video", "caption"] and len(rows) == captions
        for row in rows:
            assert _frames(world / row["video"]).shape == (FRAMES, SIDE, SIDE, 3)
    manifest = json.loads((world / "world.json").read_text())
    assert (
        manifest["version"] == toyworld.VERSION
        and manifest["test"] == 10
        and "test.csv" in manifest["sha256"]
    )


def test_videos_survive_the_codec(world):
    """What is decoded is what was rendered, up to compression; frame n is frame n."""
    scene = toyworld.plan("test", 10, seed=0)[0][3]
    rendered = toyworld.render(scene, (0, 2, 3)).astype(int)
    decoded = _frames(world / "videos" / "test_00003.mp4")[..., ::-1]
    error = np.abs(rendered[:, None] - decoded[None]).mean(
        axis=(2, 3, 4)
    )  # [rendered frame, decoded frame]
    assert error.diagonal().max() < 10
    assert (error.argmin(axis=1) == np.arange(FRAMES)).mean() > 0.8


def test_the_world_is_the_same_on_two_processes(world, tmp_path):
    other = generate(tmp_path / "two", workers=2, **SMALL)
    assert _texts(other) == _texts(world)
    videos = sorted(path.name for path in (world / "videos").iterdir())
    assert (
        videos == sorted(path.name for path in (other / "videos").iterdir()) and len(videos) == 28
    )
    for name in videos:
        assert (_frames(world / "videos" / name) == _frames(other / "videos" / name)).all()


def test_another_seed_is_another_world(world, tmp_path):
    other = generate(tmp_path / "seed", workers=1, seed=1, **SMALL)
    for split in toyworld.SPLITS:
        assert (world / f"{split}.csv").read_bytes() != (other / f"{split}.csv").read_bytes()


def test_a_finished_world_is_reused(world, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    monkeypatch.setattr(toyworld, "render", lambda *_: pytest.fail("rendered again"))
    assert generate(world, workers=1, **SMALL) == world
    assert before == {path: path.stat().st_mtime_ns for path in world.rglob("*")}


def test_an_interrupted_world_is_completed(world, tmp_path, monkeypatch):
    folder, rendered = tmp_path / "toy", []

    def render(scene, seed):
        if len(rendered) == 5:
            raise KeyboardInterrupt
        rendered.append(seed)
        return toyworld_render(scene, seed)

    toyworld_render = toyworld.render
    monkeypatch.setattr(toyworld, "render", render)
    with pytest.raises(KeyboardInterrupt):
        generate(folder, workers=1, **SMALL)
    assert not (folder / "world.json").exists() and not (folder / "train.csv").exists()
    rendered.clear()
    monkeypatch.setattr(
        toyworld,
        "render",
        lambda scene, seed: rendered.append(seed) or toyworld_render(scene, seed),
    )
    generate(folder, workers=1, **SMALL, splits=["test"])
    assert len(rendered) == 10 and not (folder / "train.csv").exists()  # only what was asked for
    generate(folder, workers=1, **SMALL)
    assert len(rendered) == 28 - 5  # the five finished ones are kept
    assert _texts(folder) == _texts(world)
    assert sorted(path.name for path in (folder / "videos").iterdir()) == sorted(
        path.name for path in (world / "videos").iterdir()
    )


def test_mistakes_end_in_one_line(world, tmp_path):
    def message(folder, **changes):
        with pytest.raises(UserError) as error:
            generate(folder, **{"workers": 1, **SMALL, **changes})
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "'seed': 5" in message(world, seed=5)
    assert "'train': 13" in message(world, train=13)
    assert "train=-1" in message(tmp_path / "a", train=-1)
    assert "workers=0" in message(tmp_path / "a", workers=0)

    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in message(
        tmp_path / "file" / "toy"
    )  # a folder that cannot be made

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.csv").write_text("video,caption\n")
    assert "not a toy world" in message(tmp_path / "mine")

    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "world.json").write_text("{")
    assert "cannot hold" in message(tmp_path / "torn")


def test_command_line(tmp_path):
    words = "--train 2 --val 1 --test 3 --workers 1".split()
    command = [sys.executable, "-m", "datasets.toyworld", "--folder", tmp_path / "toy", *words]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.count("test_0000") == 3
    wrong = subprocess.run([*command, "--seed", "1"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
