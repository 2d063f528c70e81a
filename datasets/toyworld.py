"""Toy world: the embedded data set, small videos of coloured things that act, with captions that
say what happens.

A laptop has no video data set, and a method that is about *knowledge* needs one in which the
knowledge is known. So this file writes one: real mp4 files (64×64 pixels, 16 frames, 8 frames a
second), five paraphrased captions a training video, and the ground truth of each. A video shows one
of three scenes, before a drifting background, by a shaky camera:

    single     "two red stars are spinning"                    one action of one to three equal
                                                               things
    double     "a big red cup is shaking while a small green key is falling"
    relation   "a small blue fish chases a big black house"    who does it to whom is visible only
                                                               in the motion

A *composition* is (action, kind) of a single scene and of each half of a double one, and (action,
unordered pair of kinds) of a relation. Compositions are dealt out to train, val and test once and
for all: no test composition is ever seen in training, though every kind and every action is. The
pair is unordered so that training never shows "star chases fish" where the test asks for "fish
chases star": that would teach a prior against the truth instead of none.

Retrieval on val and test is well posed: the one caption of a video names every attribute, and it is
true of no other video of its split. Training captions come from the same grammar but may drop sizes
and colours.

Multiple choice, one question for each val and test video: the true caption and four that differ
from it by one edit each, each of them false of the video by the ground truth. All five are written
in one template.

    kind        the four distractors
    noun        four other nouns in the place of one of the caption's nouns
    verb        four other verbs in the place of one of the caption's verbs (none that could pass
                for true, see NEAR)
    direction   the two parties of the relation with their roles changed; and three other nouns or
                verbs, so that a
                model that is blind to word order gets at most half of these questions right

Files in `folder`: videos/*.mp4; {train,val,test}.csv (video,caption; paths relative to the file);
{val,test}_mc.jsonl ({"video", "options", "answer", "kind"}); {train,val,test}_truth.jsonl
({"video", "events"}); and world.json, written last: it marks a finished world. All is a pure
function of (VERSION, counts, seed), whatever the number of processes.

    python toyworld.py --folder cache/toy --sheet sheet.png    # the default world, and a picture of
                                                               some test videos
"""

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

import cli
from cli import UserError
from datasets.toyrender import (
    COLOURS,
    FRAMES,
    KINDS,
    SIDE,
    SIDEWAYS,
    SIZES,
    Event,
    Scene,
    Thing,
    contact_sheet,
    render,
)
from videos.workers import run_guarded

VERSION = 6  # of the world: a change of any pixel or word that `generate` writes raises it
FPS = 8
SPLITS = ("train", "val", "test")

# --------------------------------------------------------------------------------------------------
# 1. Vocabulary. Words that a part-of-speech tagger gets right: no "orange", "pink" or "purple"
# (nouns, too), and
# intransitive verbs only in the progressive ("a ball spins" is two nouns to a tagger trained on
# newspapers).

NUMBERS = {2: "two", 3: "three"}

# action: (progressive, synonym's progressive)
SINGLE = {
    "spin": ("spinning", "rotating"),
    "bounce": ("bouncing", "hopping"),
    "grow": ("growing", "expanding"),
    "shrink": ("shrinking", "contracting"),
    "blink": ("blinking", "flashing"),
    "shake": ("shaking", "trembling"),
    "slide": ("sliding", "gliding"),
    "rise": ("rising", "ascending"),
    "fall": ("falling", "descending"),
    "zigzag": ("zigzagging", "zigzagging"),
    "fade": ("fading", "vanishing"),
    "swing": ("swinging", "swaying"),
    "roll": ("rolling", "rolling"),
}
# action: (plural, third person, progressive, participle), and the same of a synonym
RELATION = {
    "chase": ("chase chases chasing chased", "pursue pursues pursuing pursued"),
    "push": ("push pushes pushing pushed", "shove shoves shoving shoved"),
    "pull": ("pull pulls pulling pulled", "drag drags dragging dragged"),
    "orbit": ("orbit orbits orbiting orbited", "circle circles circling circled"),
    "pass": ("pass passes passing passed", "overtake overtakes overtaking overtaken"),
    "hit": ("hit hits hitting hit", "strike strikes striking struck"),
    "eat": ("eat eats eating eaten", "swallow swallows swallowing swallowed"),
    "raise": ("raise raises raising raised", "lift lifts lifting lifted"),
    "drop": ("drop drops dropping dropped", "release releases releasing released"),
}
# Verbs that a person might accept for one another: never a distractor of each other.
NEAR = [{"roll", "spin"}, {"roll", "slide"}, {"slide", "zigzag"}, {"push", "hit"}]
HALF_SCENE = [
    a for a in SINGLE if a not in SIDEWAYS
]  # these fit into half of the frame, so into a double scene

# {s} subject, {o} object, {is_s} is/are, {ing} progressive, {verb} chases/chase, {done} participle
TEMPLATES = {
    "single": [
        "{s} {is_s} {ing}",
        "there {is_s} {s} that {is_s} {ing}",
        "in this video {s} {is_s} {ing}",
        "a video of {s} that {is_s} {ing}",
        "here {s} {is_s} {ing}",
    ],
    "relation": [
        "{s} {verb} {o}",
        "{s} {is_s} {ing} {o}",
        "{o} {is_o} {done} by {s}",
        "{o} {is_o} being {done} by {s}",
        "there {is_s} {s} that {is_s} {ing} {o}",
        "in this video {s} {verb} {o}",
        "a video of {o} that {is_o} {done} by {s}",
    ],
    "double": [
        "{0} while {1}",
        "{0} and {1}",
        "in this video {0} while {1}",
        "here {0} and {1}",
    ],  # two single scenes
}

# --------------------------------------------------------------------------------------------------
# 2. Language


def _phrase(thing: Thing) -> str:
    noun = thing.kind
    if thing.count > 1:
        noun = {"fish": "fish", "cross": "crosses"}.get(noun, noun + "s")
    words = " ".join(w for w in (thing.size, thing.colour, noun) if w)
    return f"{NUMBERS[thing.count] if thing.count > 1 else 'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption_of(scene: Scene, template: int = 0, synonyms: tuple[int, ...] = (0, 0)) -> str:
    """The caption of a scene in a template of its sort; synonyms[i] = 1 takes the synonym for the
    verb of event i.
    """
    if len(scene) == 2:
        return TEMPLATES["double"][template].format(
            *(caption_of((e,), 0, (s,)) for e, s in zip(scene, synonyms))
        )
    (action, subject, other), form = scene[0], synonyms[0]
    words = {"s": _phrase(subject), "is_s": "is" if subject.count == 1 else "are"}
    if other is None:
        return TEMPLATES["single"][template].format(**words, ing=SINGLE[action][form])
    plural, third, ing, done = RELATION[action][form].split()
    return TEMPLATES["relation"][template].format(
        **words,
        o=_phrase(other),
        is_o="is" if other.count == 1 else "are",
        verb=third if subject.count == 1 else plural,
        ing=ing,
        done=done,
    )


def _sort(scene: Scene) -> str:
    return "double" if len(scene) == 2 else "single" if scene[0].object is None else "relation"


def paraphrase(scene: Scene, rng: np.random.Generator, *, full: bool = True) -> str:
    """A random caption of a scene; with full=False it may drop sizes and colours."""

    def thin(thing: Thing | None) -> Thing | None:
        if full or thing is None:
            return thing
        return thing._replace(
            size=None if rng.random() < 0.4 else thing.size,
            colour="" if rng.random() < 0.2 else thing.colour,
        )

    scene = tuple(
        event._replace(subject=thin(event.subject), object=thin(event.object)) for event in scene
    )
    if len(scene) == 2 and rng.integers(2):
        scene = scene[::-1]
    template = int(rng.integers(len(TEMPLATES[_sort(scene)])))
    return caption_of(scene, template, tuple(int(rng.random() < 0.2) for _ in scene))


# --------------------------------------------------------------------------------------------------
# 3. Scenes: compositions are dealt out to the splits, then scenes are drawn from a split's
# compositions


@functools.cache
def compositions(split: str) -> dict[str, list[tuple[str, ...]]]:
    """All that `split` shows: {action: [(kind,), …]} of single actions, {action: [(kind, kind),
    …]}, of relations.

    Fixed for ever, whatever the seed: test has 4 of the 16 kinds of each single action and 24 of
    the 120 pairs of each relation, val 2 and 12 others; the kinds are held out equally often (give
    or take one) over the single actions.
    """
    assert split in SPLITS, split
    rng, dealt = np.random.default_rng(0), {}
    order = rng.permutation(len(KINDS))
    for i, action in enumerate(SINGLE):
        kinds = [(KINDS[j],) for j in np.roll(order, -5 * i)]
        dealt[action] = {"test": kinds[:4], "val": kinds[4:6], "train": kinds[6:]}[split]
    pairs = list(itertools.combinations(KINDS, 2))
    for action in RELATION:
        mixed = [pairs[j] for j in rng.permutation(len(pairs))]
        dealt[action] = {"test": mixed[:24], "val": mixed[24:36], "train": mixed[36:]}[split]
    return dealt


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def _thing(kind: str, count: int, sized: bool, rng: np.random.Generator) -> Thing:
    size, colour = _pick(rng, list(SIZES)), _pick(rng, list(COLOURS))
    return Thing(count, size if sized and count == 1 else None, colour, kind)


def draw_scene(split: str, rng: np.random.Generator) -> Scene:
    """A random scene of a split's compositions: half of them relations, 35 % single, 15 % double."""
    allowed, roll = compositions(split), rng.random()
    if roll < 0.5:
        action = _pick(rng, list(RELATION))
        kinds = rng.permutation(_pick(rng, allowed[action]))
        counts = (
            [1, 1]
            if action == "orbit" or rng.random() < 0.75
            else [[1, 2], [2, 1]][int(rng.integers(2))]
        )
        return (Event(action, *(_thing(str(k), c, True, rng) for k, c in zip(kinds, counts))),)

    def event(actions, count):
        action = _pick(rng, actions)
        return Event(
            action,
            _thing(_pick(rng, allowed[action])[0], count, action not in ("grow", "shrink"), rng),
        )

    if roll < 0.85:
        return (event(list(SINGLE), _pick(rng, [1, 1, 2, 3])),)
    while True:
        left, right = event(HALF_SCENE, 1), event(HALF_SCENE, 1)
        if left.action != right.action and left.subject.kind != right.subject.kind:
            return left, right


def distinct_scenes(split: str, count: int, rng: np.random.Generator) -> list[Scene]:
    """Scenes of which none makes the full caption of another one true: no scene's events are a
    subset of another's.
    """
    scenes, whole, parts, misses = (
        [],
        set(),
        set(),
        0,
    )  # all scenes as sets of events; the events of the double ones
    while len(scenes) < count:
        scene = draw_scene(split, rng)
        key = frozenset(scene)
        if (
            key in whole
            or key <= parts
            or (len(key) == 2 and any(frozenset([event]) in whole for event in key))
        ):
            misses += 1
            if misses > 1000 + 20 * count:
                raise UserError(
                    f"{split}={count}: only {len(scenes)} distinct scenes were found; ask for fewer videos"
                )
            continue
        whole.add(key)
        parts |= key if len(key) == 2 else set()
        scenes.append(scene)
    return scenes


# --------------------------------------------------------------------------------------------------
# 4. Multiple choice


def _edits(scene: Scene, sort: str, rng: np.random.Generator) -> Iterator[Scene]:
    """Scenes that differ from `scene` in one noun, one verb, or its direction, and are false where
    it is true.

    All edit the same place: without the video, the options of a noun or verb question say nothing
    about the answer.
    """
    i = int(rng.integers(len(scene)))
    event = scene[i]
    if sort == "direction":
        edits = [event._replace(subject=event.object, object=event.subject)]
    elif sort == "verb":
        verbs = HALF_SCENE if len(scene) == 2 else RELATION if event.object else SINGLE
        actions = {e.action for e in scene}
        edits = [
            event._replace(action=v)
            for v in verbs
            if not any(v == a or {v, a} in NEAR for a in actions)
        ]
    else:
        role = _pick(rng, ["subject", "object"] if event.object else ["subject"])
        kinds = {thing.kind for e in scene for thing in (e.subject, e.object) if thing}
        edits = [
            event._replace(**{role: getattr(event, role)._replace(kind=k)})
            for k in KINDS
            if k not in kinds
        ]
    for j in rng.permutation(len(edits)):
        yield scene[:i] + (edits[j],) + scene[i + 1 :]


def question(scene: Scene, rng: np.random.Generator) -> dict:
    """The question on a video of `scene`: {"options": five captions, "answer": index of the true
    one, "kind": …}.
    """
    sort = str(
        rng.choice(
            ["noun", "verb", "direction"], p=[0.3, 0.3, 0.4] if scene[0].object else [0.5, 0.5, 0]
        )
    )
    if sort == "direction":
        sources = [_edits(scene, s, rng) for s in ("direction", *rng.choice(["noun", "verb"], 3))]
    else:
        sources = [_edits(scene, sort, rng)] * 4
    options = [scene]
    for source in sources:
        options.append(next(edit for edit in source if edit not in options))
    template = int(rng.integers(len(TEMPLATES[_sort(scene)])))
    order = rng.permutation(5)
    return {
        "options": [caption_of(options[j], template) for j in order],
        "answer": int(np.argmin(order)),
        "kind": sort,
    }


# --------------------------------------------------------------------------------------------------
# 5. Files


def _write_atomically(path: Path, text: str) -> None:
    """Writes `text` so that `path` holds all of it or does not exist, whenever the process is
    killed.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, path)


def _write_video(job: tuple[Path, Scene, tuple[int, ...]]) -> None:
    """Renders one video to its path, unless it is there already: a path that exists is complete."""
    path, scene, seed = job
    if path.exists():
        return
    part = path.with_name(
        f"{path.stem}.{os.getpid()}.part.mp4"
    )  # the writer picks the container by the extension
    writer = cv2.VideoWriter(str(part), cv2.VideoWriter_fourcc(*"mp4v"), FPS, (SIDE, SIDE))
    for frame in render(scene, seed):
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()
    if (
        not part.exists() or b"moov" not in part.read_bytes()
    ):  # the index, written last; OpenCV reports no failure
        part.unlink(missing_ok=True)
        raise UserError(
            f"{path}: the video could not be written; check the folder's permissions and free space"
        )
    os.replace(part, path)


def _read_video(path: Path) -> np.ndarray:
    """All frames of a video that `_write_video` wrote, uint8 [FRAMES, SIDE, SIDE, 3] RGB."""
    capture = cv2.VideoCapture(str(path))
    return np.stack([cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB) for _ in range(FRAMES)])


def _plan(split: str, count: int, seed: int) -> tuple[list[Scene], dict[str, str]]:
    """Everything of a split but the pixels: its scenes, and {file name: text}."""
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    scenes = (
        [draw_scene(split, rng) for _ in range(count)]
        if split == "train"
        else distinct_scenes(split, count, rng)
    )
    rows, truth, choice = [("video", "caption")], [], []
    for i, scene in enumerate(scenes):
        video = _video_name(split, i)
        captions = {paraphrase(scene, rng): None}  # a dict is a set that keeps the order
        while split == "train" and len(captions) < 5:
            captions[paraphrase(scene, rng, full=False)] = None
        rows += [(video, caption) for caption in captions]
        events = [
            {
                "action": e.action,
                "subject": e.subject._asdict(),
                "object": e.object and e.object._asdict(),
            }
            for e in scene
        ]
        truth.append({"video": video, "events": events})
        if split != "train":
            choice.append({"video": video, **question(scene, rng)})
    files = {
        f"{split}.csv": "".join(",".join(row) + "\n" for row in rows)
    }  # no caption holds a comma or a quote
    for name, records in ((f"{split}_truth.jsonl", truth), (f"{split}_mc.jsonl", choice)):
        if name != "train_mc.jsonl":
            files[name] = "".join(json.dumps(record) + "\n" for record in records)
    return scenes, files


def _video_name(split: str, i: int) -> str:
    return f"videos/{split}_{i:05d}.mp4"


def generate(
    folder: str | Path,
    *,
    train: int = 10_000,
    val: int = 500,
    test: int = 1000,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Writes the toy world with these numbers of videos into `folder`, and returns the folder as a
    Path.

    A finished world is recognised by its world.json and reused at once; an interrupted one is
    completed. `workers` processes render (default: one a core; 1 = this process). Raises UserError
    where the folder cannot be written, holds something else, or where val or test asks for more
    videos than there are distinct scenes.
    """
    folder, counts = Path(folder), {"train": train, "val": val, "test": test}
    workers = (os.cpu_count() or 1) if workers is None else workers
    for name, value, least in [(split, count, 0) for split, count in counts.items()] + [
        ("workers", workers, 1)
    ]:
        if value < least:
            raise UserError(f"{name}={value}: too few; at least {least}")
    try:
        return _generate(folder, counts, seed, workers, progress)
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"{folder}: cannot hold the toy world ({error}); choose a writable folder"
        ) from error


def _generate(
    folder: Path, counts: dict[str, int], seed: int, workers: int, progress: bool
) -> Path:
    finished, started = folder / "world.json", folder / "world.started.json"
    key = {"version": VERSION, "seed": seed, **counts}
    for mark in (finished, started):
        if mark.exists():
            found = json.loads(mark.read_text())
            found = {k: found.get(k) for k in key}
            if found != key:
                raise UserError(
                    f"{mark}: {found} is not the toy world asked for, {key}; "
                    f"delete {folder} or choose another folder"
                )
    names = {
        split: [_video_name(split, i) for i in range(count)] for split, count in counts.items()
    }
    if finished.exists():
        if any(
            _sha256(folder / name) != sha
            for name, sha in json.loads(finished.read_text())["sha256"].items()
        ):
            raise UserError(
                f"{finished}: its files have been changed since; delete {folder} to write them anew"
            )
        if all((folder / name).exists() for split in names.values() for name in split):
            return folder
    elif not started.exists() and any((folder / f"{split}.csv").exists() for split in SPLITS):
        raise UserError(
            f"{folder}: holds a data set that is not a toy world; choose another folder"
        )

    (folder / "videos").mkdir(parents=True, exist_ok=True)
    _write_atomically(started, json.dumps(key))
    jobs, files = [], {}
    for split, count in counts.items():
        scenes, texts = _plan(split, count, seed)
        files |= texts
        jobs += [
            (folder / name, scene, (seed, SPLITS.index(split), i))
            for i, (name, scene) in enumerate(zip(names[split], scenes, strict=True))
        ]
    _write_videos(jobs, workers, progress)
    for name, text in files.items():
        _write_atomically(folder / name, text)
    for orphan in (folder / "videos").glob(
        "*.part.mp4"
    ):  # of killed processes: every video is complete by now
        orphan.unlink(missing_ok=True)
    hashes = {name: _sha256(folder / name) for name in files}
    _write_atomically(finished, json.dumps({**key, "sha256": hashes}, indent=1))
    started.unlink(missing_ok=True)
    return folder


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_videos(jobs: list, workers: int, progress: bool) -> None:
    """Render all jobs in the guarded processes that also decode videos: one that dies or hangs is
    replaced.
    """
    with tqdm(total=len(jobs), desc="toy world", unit="video", disable=not progress) as bar:
        if workers == 1:
            for job in jobs:
                _write_video(job)
                bar.update()
            return
        rendered = run_guarded(
            functools.partial(_write_numbered, jobs),
            map(str, range(len(jobs))),
            workers=min(workers, len(jobs)),
        )
        for _, failure in rendered:
            if failure:
                raise UserError(
                    "a rendering process died twice at the same video, or hung (out of memory?); run the "
                    "same command again: what is rendered is kept"
                )
            bar.update()


def _write_numbered(jobs: list, number: str) -> str:
    _write_video(jobs[int(number)])
    return ""


@dataclass
class ToyConfig:
    """Write the toy world, and a picture of some of its test videos."""

    folder: str = "cache/toy"  # where the world is written
    train: int = 10_000  # training videos
    val: int = 500  # validation videos
    test: int = 1000  # test videos
    seed: int = 0  # another seed draws other scenes from the same compositions
    workers: int | None = None  # processes; default: one a core
    sheet: str | None = None  # PNG file for a picture of the first 12 test videos


def main() -> None:
    config = cli.parse_config(ToyConfig)
    folder = generate(
        config.folder,
        train=config.train,
        val=config.val,
        test=config.test,
        seed=config.seed,
        workers=config.workers,
    )
    rows = [line.split(",") for line in (folder / "test.csv").read_text().splitlines()[1:13]]
    for video, caption in rows:
        print(folder / video, caption)
    if config.sheet and rows:
        videos = [_read_video(folder / video) for video, _ in rows]
        contact_sheet(videos, [caption for _, caption in rows], config.sheet)


if __name__ == "__main__":
    cli.run(main)
