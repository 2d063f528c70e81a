"""What is promised about the toy world's splits, captions, questions and files."""

import csv
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cli import UserError
from datasets import toyworld
from datasets.toyrender import COLOURS, FRAMES, KINDS, SIZES, Event, Thing, render
from datasets.toyworld import NEAR, RELATION, SINGLE, caption_of, compositions, generate
from videos.decode import read_frames

ROOT = Path(__file__).parent.parent
SMALL = dict(train=12, val=6, test=10, progress=False)
PLURALS = {kind: kind + "s" for kind in KINDS} | dict(fish="fish", cross="crosses")
NOUNS = {kind: kind for kind in KINDS} | {noun: kind for kind, noun in PLURALS.items()}
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
        truth = map(json.loads, files[f"{split}_truth.jsonl"].splitlines())
        plans[split] = {
            "csv": list(csv.DictReader(files[f"{split}.csv"].splitlines())),
            "truth": {record["video"]: record["events"] for record in truth},
            "mc": [*map(json.loads, files.get(f"{split}_mc.jsonl", "").splitlines())],
        }
    return plans


def contents(folder: Path) -> dict[str, bytes]:
    """{path in the folder: bytes}, the pixels of videos."""
    found = {}
    for path in folder.rglob("*.*"):
        is_video = path.suffix == ".mp4"
        data = read_frames(path, FRAMES, size=64).tobytes() if is_video else path.read_bytes()
        found[str(path.relative_to(folder))] = data
    return found


def things_of(events: list[dict]) -> list[dict]:
    parties = itertools.chain(*([event["subject"], event["object"]] for event in events))
    return [thing for thing in parties if thing]


def composition(event: dict) -> tuple:
    return event["action"], frozenset(thing["kind"] for thing in things_of([event]))


def compositions_of(plan: dict) -> set:
    return set(map(composition, itertools.chain(*plan["truth"].values())))


# ---- captions ------------------------------------------------------------------------------------

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
    by_video, words = {}, set()
    for row in plans["train"]["csv"]:
        by_video.setdefault(row["video"], set()).add(row["caption"])
        words.update(row["caption"].split())
    assert len(plans["train"]["csv"]) == 50_000 == 5 * len(by_video)
    assert {*map(len, by_video.values())} == {5}
    assert words >= {*NOUNS, *COLOURS, *SIZES, "two", "three", "while", "being", "by"}


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_first_caption_says_all_there_is(plans, split):
    """Every noun phrase of the truth, word by word; val and test have no other caption."""
    first = {row["video"]: row["caption"] for row in reversed(plans[split]["csv"])}
    for video, events in plans[split]["truth"].items():
        for thing in things_of(events):
            noun = thing["kind"] if thing["count"] == 1 else PLURALS[thing["kind"]]
            count = {1: "a", 2: "two", 3: "three"}[thing["count"]]
            phrase = " ".join(filter(None, (count, thing["size"], thing["colour"], noun)))
            assert f"{phrase} " in first[video] + " "


# ---- splits --------------------------------------------------------------------------------------


def test_held_out_compositions_never_occur_in_training(plans):
    seen = {split: compositions_of(plan) for split, plan in plans.items()}
    assert (
        sum(map(len, seen.values())) == len(set.union(*seen.values())) and len(seen["test"]) > 200
    )
    for found in seen.values():
        actions, kinds = zip(*found)
        assert set(actions) == {*SINGLE, *RELATION} and frozenset.union(*kinds) == set(KINDS)


def test_every_kind_acts_in_training_in_every_sort_of_scene():
    allowed = compositions("train")
    for kind in KINDS:
        assert sum((kind,) in allowed[action] for action in SINGLE) >= len(SINGLE) / 2, kind
        assert all(any(kind in pair for pair in allowed[action]) for action in RELATION), kind


@pytest.mark.parametrize("split", ["val", "test"])
def test_retrieval_is_well_posed(plans, split):
    """One caption a video, and no video shows all that the caption of another one says."""
    captions = [row["caption"] for row in plans[split]["csv"]]
    assert len(captions) == len(set(captions)) == len(plans[split]["truth"])
    holders = {}
    scenes = [[json.dumps(event) for event in events] for events in plans[split]["truth"].values()]
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


# ---- multiple choice -----------------------------------------------------------------------------


def read_back(caption: str) -> list[tuple]:
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


def edit_of(true: str, option: str) -> str:
    """The sort of an edit, from the words alone."""
    old, new = read_back(true), read_back(option)
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
    trained = compositions_of(plans["train"])
    special = {"noun": 4, "verb": 4, "direction": 1, "binding": 1, "count": 2}
    for question in questions:
        events, options, kind = truth[question["video"]], question["options"], question["kind"]
        assert len(set(options)) == 5
        true = options.pop(question["answer"])
        kinds = {thing["kind"] for thing in things_of(events)}
        actions = {event["action"] for event in events}
        read = read_back(true)
        assert {part[-1] for part in read if len(part) == 3} == kinds
        assert {part[0] for part in read if len(part) == 1} == actions

        sorts = [edit_of(true, option) for option in options]
        assert sorts.count(kind) == special[kind]
        assert set(sorts) <= {kind, "noun"}
        for option, sort in zip(options, sorts):
            new = read_back(option)
            if sort == "noun":  # nothing of this kind is in the video, and none is taught there
                now = frozenset(part[-1] for part in new if len(part) == 3)
                assert len(now - kinds) == 1
                assert len(events) == 2 or (events[0]["action"], now) not in trained
            if sort == "verb":
                (verb,) = {part[0] for part in new if len(part) == 1} - actions
                assert not any({verb, action} in NEAR for action in actions)


def test_scenes_of_a_film_differ_in_one_thing():
    rng, seen = np.random.default_rng(0), set()
    for _ in range(100):
        first, *others = toyworld.draw_film(rng)
        sorts = {edit_of(caption_of(first), caption_of(other)) for other in others}
        assert len(sorts) == len(others) >= 2
        seen |= sorts
    assert seen == {"noun", "verb", "direction", "binding", "count"}


def test_questions_are_many_and_balanced(plans):
    questions = plans["test"]["mc"]
    assert len(questions) > 4000
    answers = np.bincount([question["answer"] for question in questions], minlength=5)
    assert answers.min() > 0.17 * len(questions)
    kinds = [question["kind"] for question in questions]
    assert min(kinds.count(kind) for kind in set(kinds)) > 500 and len(set(kinds)) == 5


# ---- files ---------------------------------------------------------------------------------------


def test_a_world_on_disk(world):
    for split, captions in {"train": 60, "val": 6, "test": 10}.items():
        rows = list(csv.DictReader((world / f"{split}.csv").read_text().splitlines()))
        assert list(rows[0]) == ["video", "caption"] and len(rows) == captions
        assert all((world / row["video"]).is_file() for row in rows)
    manifest = json.loads((world / "world.json").read_text())
    assert (manifest["version"], manifest["test"]) == (toyworld.VERSION, 10)
    assert "test.csv" in manifest["sha256"]


def test_videos_survive_the_codec(world):
    """What is decoded is what was rendered, up to compression; frame n is frame n."""
    rendered = render(toyworld.plan("test", 10, seed=0)[0][3], (0, 2, 3)).astype(int)
    decoded = read_frames(world / "videos" / "test_00003.mp4", FRAMES, size=64)
    # [rendered frame, decoded frame]
    error = np.abs(rendered[:, None] - decoded[None]).mean(axis=(2, 3, 4))
    assert error.diagonal().max() < 10
    assert (error.argmin(axis=1) == np.arange(FRAMES)).mean() > 0.8


def test_the_world_is_a_function_of_the_seed(world, tmp_path):
    """On one process or two; and another seed draws another one."""
    assert contents(generate(tmp_path / "two", workers=2, **SMALL)) == contents(world)
    for split in toyworld.SPLITS:
        assert toyworld.plan(split, 6, seed=1)[1] != toyworld.plan(split, 6, seed=0)[1]


def test_only_what_is_missing_is_rendered(world, tmp_path):
    """A whole world is reused, and an interrupted one completed; a split comes alone."""

    def times() -> dict:
        return {path: path.stat().st_mtime_ns for path in folder.glob("videos/*.mp4")}

    folder = generate(tmp_path / "toy", splits=["test"], **SMALL)
    tested = times()
    assert len(tested) == 10 and not (folder / "train.csv").exists()
    # as Ctrl-C leaves it: a video is whole or not there, and world.json comes last
    for path in (*folder.glob("*.*"), *sorted(tested)[:4]):
        path.unlink()

    generate(folder, **SMALL)
    completed = times()
    assert len(completed) == 28 and contents(folder) == contents(world)
    assert sum(completed[path] == time for path, time in tested.items()) == 6
    assert generate(folder, **SMALL) == folder and times() == completed


def test_mistakes_end_in_one_line(world, tmp_path):
    (tmp_path / "file").write_text("")
    for name, file, text in (("mine", "train.csv", "video,caption\n"), ("torn", "world.json", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
    for folder, changes, says in (
        (world, dict(seed=5), "'seed': 5"),
        (world, dict(train=13), "'train': 13"),
        (tmp_path / "file" / "toy", {}, f"{tmp_path}/file"),  # a folder that cannot be made
        (tmp_path / "mine", {}, "not a toy world"),
        (tmp_path / "torn", {}, "cannot hold"),
    ):
        with pytest.raises(UserError, match=says) as error:
            generate(folder, **SMALL | changes)
        assert "\n" not in str(error.value)


def test_command_line(tmp_path):
    words = "--train 2 --val 1 --test 3 --workers 1".split()
    command = [sys.executable, "-m", "datasets.toyworld", "--folder", tmp_path / "toy", *words]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.count("test_0000") == 3
    for flags in ("--seed 1", "--val -1", "--workers 0"):
        words = [*command, *flags.split()]
        wrong = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
