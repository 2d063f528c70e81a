"""Toy world: the embedded data set, small videos of coloured things that act, with captions.

A laptop has no video data set, and a method that is about *knowledge* needs one in which the
knowledge is known. So this file writes one: real mp4 files (64 × 64 pixels, 16 frames, 8 frames a
second), five paraphrased captions a training video, and the ground truth of each. A video shows one
of three scenes:

    single     "two red stars are spinning"             one action of one to three equal things
    double     "a big red cup is shaking while a small green key is falling"
    relation   "a small blue fish chases a big black house"

Who does it to whom is visible only in the motion.

**Films.** Clips of a real data set are often cut from one film, and show the same things again, in
other roles. So training comes in films of four scenes: a random one, and three that differ from it
in one thing, a noun, a verb, the roles, the colours or the number. Among 10,000 videos the other
scenes of its film are the hardest negatives that a caption has, and a random batch seldom holds
one. The films of val and test have one scene.

**Compositions.** A composition is (action, kind), or for a relation (action, pair of kinds). They
are dealt out to train, val and test once and for all. No test composition is ever seen in training,
though every kind and every action is. The pair is unordered, so that training never shows "star
chases fish" where the test asks for "fish chases star": that would teach a prior against the truth.
For the same reason the wrong nouns of a question make compositions that training never shows, too.

**Retrieval** on val and test is well posed. The caption of a video names every attribute, and it is
true of no other video of its split. Training captions may drop sizes and colours.

**Multiple choice,** about 4.4 questions for each val and test video: the true caption, and four in
its template that are false of the video. One question asks for each noun and for each verb, and one
for each other sort that applies:

    noun        four other nouns in the place of one of the caption's nouns
    verb        four other verbs in the place of one of its verbs (none that might pass, see NEAR)
    direction   the two parties of a relation with their roles exchanged, and three other nouns
    binding     two things with their colours exchanged, and three other nouns
    count       the two other numbers that such scenes have, and two other nouns

A model that knows which words are true, but not how they belong together, gets at most half of the
questions about direction and binding right.

**Files:** videos/*.mp4; {train,val,test}.csv (video, caption); {val,test}_mc.jsonl (video, options,
answer, kind); {train,val,test}_truth.jsonl (video, events); and world.json, which lists the splits
that are finished, with checksums. All is a pure function of (VERSION, counts, seed).

    python -m datasets.toyworld --folder cache/toy
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from cli import UserError, check_ranges, parse_config, run, write_whole
from datasets.toyrender import (
    COLOURS,
    KINDS,
    SIDEWAYS,
    SIZES,
    Event,
    Scene,
    Thing,
    render,
)
from videos.decode import write_video
from videos.workers import TOGETHER, run_guarded

VERSION = 8  # of the world: a change of any pixel or word that `generate` writes raises it
FPS = 8
CLIPS = 4  # scenes of a film of training
SPLITS = ("train", "val", "test")

# ---- vocabulary ----------------------------------------------------------------------------------
# Words that a part-of-speech tagger gets right: no "orange" or "pink" (nouns, too). Intransitive
# verbs only in the progressive ("a ball spins" is two nouns to a tagger of newspapers).

NUMBERS = {2: "two", 3: "three"}
PLURALS = {"fish": "fish", "cross": "crosses"}

SINGLE = {  # action: (progressive, that of a synonym)
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
RELATION = {  # action: plural, third person, progressive, participle; and the same of a synonym
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
# verbs that a person might accept for one another: never a distractor of each other
NEAR = [{"roll", "spin"}, {"roll", "slide"}, {"slide", "zigzag"}, {"push", "hit"}]
# these fit into half of the frame, so into a double scene
HALF_SCENE = [action for action in SINGLE if action not in SIDEWAYS]

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
    "double": [  # of two single scenes
        "{0} while {1}",
        "{0} and {1}",
        "in this video {0} while {1}",
        "here {0} and {1}",
    ],
}

# ---- captions ------------------------------------------------------------------------------------


def sort_of(scene: Scene) -> str:
    if len(scene) == 2:
        return "double"
    return "relation" if scene[0].object else "single"


def phrase(thing: Thing) -> str:
    noun = thing.kind
    if thing.count > 1:
        noun = PLURALS.get(noun, noun + "s")
    words = " ".join(word for word in (thing.size, thing.colour, noun) if word)
    article = "an" if words[0] in "aeiou" else "a"
    return f"{NUMBERS.get(thing.count, article)} {words}"


def be(thing: Thing) -> str:
    return "is" if thing.count == 1 else "are"


def caption_of(scene: Scene, template: int = 0, synonyms: tuple[int, ...] = (0, 0)) -> str:
    """The caption of a scene in a template of its sort.

    synonyms[i] = 1 takes the synonym for the verb of event i.
    """
    form = TEMPLATES[sort_of(scene)][template]
    if len(scene) == 2:
        parts = [caption_of((event,), 0, (s,)) for event, s in zip(scene, synonyms)]
        return form.format(*parts)

    action, subject, other = scene[0]
    words = dict(s=phrase(subject), is_s=be(subject))
    if other is None:
        return form.format(**words, ing=SINGLE[action][synonyms[0]])
    plural, third, ing, done = RELATION[action][synonyms[0]].split()
    words |= dict(o=phrase(other), is_o=be(other), ing=ing, done=done)
    return form.format(**words, verb=third if subject.count == 1 else plural)


def paraphrase(scene: Scene, rng: np.random.Generator, *, full: bool = True) -> str:
    """A random caption of a scene; with full=False it may drop sizes and colours."""

    def thin(thing: Thing | None) -> Thing | None:
        if full or thing is None:
            return thing
        size = None if rng.random() < 0.4 else thing.size
        colour = "" if rng.random() < 0.2 else thing.colour
        return thing._replace(size=size, colour=colour)

    scene = tuple(Event(event.action, thin(event.subject), thin(event.object)) for event in scene)
    if len(scene) == 2 and rng.integers(2):
        scene = scene[::-1]
    template = int(rng.integers(len(TEMPLATES[sort_of(scene)])))
    return caption_of(scene, template, tuple(int(rng.random() < 0.2) for _ in scene))


# ---- scenes --------------------------------------------------------------------------------------


@functools.cache
def compositions(split: str) -> dict[str, list[tuple[str, ...]]]:
    """All that `split` shows: {action: [(kind,), …]}, of relations {action: [(kind, kind), …]}.

    Fixed for ever, whatever the seed. Of each single action test has 4 of the 16 kinds and val 2
    others. The kinds of a relation stand on a circle. Test has the pairs at two distances along it,
    val those at a third: 32 and 16 of the 120. So each kind is held out as often as any other one.
    """
    assert split in SPLITS, split
    rng, dealt = np.random.default_rng(0), {}
    order = rng.permutation(len(KINDS))
    for i, action in enumerate(SINGLE):
        kinds = [(KINDS[j],) for j in np.roll(order, -5 * i)]
        dealt[action] = {"test": kinds[:4], "val": kinds[4:6], "train": kinds[6:]}[split]

    for action in RELATION:
        circle, distances = rng.permutation(KINDS).tolist(), rng.permutation(range(1, 8)).tolist()
        shares = {"test": distances[:2], "val": distances[2:3], "train": [*distances[3:], 8]}
        pairs = []
        for distance in shares[split]:
            for i in range(8 if distance == 8 else 16):  # opposite ones would come twice
                pairs.append((circle[i], circle[(i + distance) % 16]))
        dealt[action] = pairs
    return dealt


@functools.cache
def taught() -> set[tuple[str, frozenset[str]]]:
    """The compositions of training: (action, its kinds)."""
    found = set()
    for action, dealt in compositions("train").items():
        found |= {(action, frozenset(kinds)) for kinds in dealt}
    return found


def is_taught(event: Event) -> bool:
    action, *parties = event
    return (action, frozenset(thing.kind for thing in parties if thing)) in taught()


def pick(rng: np.random.Generator, options):
    options = list(options)
    return options[int(rng.integers(len(options)))]


def possible_counts(action: str) -> list[tuple[int, ...]]:
    """How many there may be of each thing of an event."""
    if action in SINGLE:
        return [(1,), (2,), (3,)]
    return [(1, 1)] if action == "orbit" else [(1, 1), (1, 2), (2, 1)]


def draw_thing(kind: str, count: int, sized: bool, rng: np.random.Generator) -> Thing:
    size, colour = pick(rng, SIZES), pick(rng, COLOURS)
    return Thing(count, size if sized and count == 1 else None, colour, kind)


def draw_scene(split: str, rng: np.random.Generator) -> Scene:
    """A random scene of a split's compositions: half relations, 35 % single, 15 % double."""
    allowed, roll = compositions(split), rng.random()

    def draw_single(actions: Iterable[str], count: int) -> Event:
        action = pick(rng, actions)
        kind = pick(rng, allowed[action])[0]
        return Event(action, draw_thing(kind, count, action not in ("grow", "shrink"), rng))

    if roll < 0.5:
        action = pick(rng, RELATION)
        kinds = rng.permutation(pick(rng, allowed[action]))
        counts = pick(rng, possible_counts(action))
        things = [draw_thing(str(kind), count, True, rng) for kind, count in zip(kinds, counts)]
        return (Event(action, *things),)
    if roll < 0.85:
        return (draw_single(SINGLE, pick(rng, (1, 2, 3))),)
    while True:
        left, right = draw_single(HALF_SCENE, 1), draw_single(HALF_SCENE, 1)
        if left.action != right.action and left.subject.kind != right.subject.kind:
            return left, right


def distinct_scenes(split: str, count: int, rng: np.random.Generator) -> list[Scene]:
    """Scenes of which none makes the full caption of another one true.

    That is: no scene's events are a subset of another's.
    """
    scenes, misses = [], 0
    whole, parts = set(), set()  # all scenes as sets of events; the events of the double ones

    while len(scenes) < count:
        scene = draw_scene(split, rng)
        key = frozenset(scene)
        holds_another = len(key) == 2 and any(frozenset([event]) in whole for event in key)
        if key in whole or key <= parts or holds_another:
            misses += 1
            if misses > 1000 + 20 * count:
                raise UserError(
                    f"{split}={count}: only {len(scenes)} distinct scenes were found; ask for "
                    "fewer videos"
                )
            continue
        whole.add(key)
        if len(key) == 2:
            parts |= key
        scenes.append(scene)

    return scenes


# ---- what else might be --------------------------------------------------------------------------
# Each function gives scenes that are false where `scene` is true.


def change(scene: Scene, i: int, role: str | None = None, **fields) -> Scene:
    """The scene with other fields of its event i, or of the thing that has the role there."""
    event = scene[i]
    if role:
        fields = {role: getattr(event, role)._replace(**fields)}
    return scene[:i] + (event._replace(**fields),) + scene[i + 1 :]


def places_of(scene: Scene) -> list[tuple[int, str]]:
    """Where things are: (number of the event, role)."""
    if scene[0].object:
        return [(0, "subject"), (0, "object")]
    return [(i, "subject") for i in range(len(scene))]


def values_of(scene: Scene, field: str) -> tuple:
    """What this field of each thing is."""
    return tuple(getattr(getattr(scene[i], role), field) for i, role in places_of(scene))


def change_all(scene: Scene, field: str, values: Iterable) -> Scene:
    """The scene with other values of this field of its things."""
    for place, value in zip(places_of(scene), values):
        scene = change(scene, *place, **{field: value})
    return scene


def other_nouns(scene: Scene, i: int, role: str) -> list[Scene]:
    """Another kind at one place: one that is not shown."""
    shown = values_of(scene, "kind")
    return [change(scene, i, role, kind=kind) for kind in KINDS if kind not in shown]


def other_verbs(scene: Scene, i: int) -> list[Scene]:
    """Another action of event i: none that is shown, or might pass for one that is."""
    shown = {event.action for event in scene}
    found = []
    for verb in HALF_SCENE if len(scene) == 2 else RELATION if scene[i].object else SINGLE:
        if verb not in shown and not any({verb, action} in NEAR for action in shown):
            found.append(change(scene, i, action=verb))
    return found


def other_direction(scene: Scene) -> list[Scene]:
    action, subject, other = scene[0]
    return [(Event(action, other, subject),)] if other else []


def other_binding(scene: Scene) -> list[Scene]:
    """The colours of two things exchanged."""
    colours = values_of(scene, "colour")
    return [change_all(scene, "colour", colours[::-1])] if len(set(colours)) == 2 else []


def other_counts(scene: Scene) -> list[Scene]:
    """The other numbers that such a scene may have."""
    if len(scene) == 2:
        return []
    counts = [n for n in possible_counts(scene[0].action) if n != values_of(scene, "count")]
    return [change_all(scene, "count", n) for n in counts]


def variations(scene: Scene) -> list[tuple[str, Scene, list[Scene]]]:
    """(sort, the scene, what differs from it in that) for each noun and verb, and each other sort.

    Groups have no sizes, so a size would tell the number: where that varies, the scene has none.
    """
    sizeless = change_all(scene, "size", [None, None])
    found = [("noun", scene, other_nouns(scene, *place)) for place in places_of(scene)]
    found += [("verb", scene, other_verbs(scene, i)) for i in range(len(scene))]
    found.append(("direction", scene, other_direction(scene)))
    found.append(("binding", scene, other_binding(scene)))
    found.append(("count", sizeless, other_counts(sizeless)))
    return found


def draw_film(rng: np.random.Generator) -> list[Scene]:
    """Scenes of training: a random one, and others that differ from it, each in another sort."""
    film = [draw_scene("train", rng)]
    by_sort: dict[str, list[Scene]] = {}
    for sort, _, others in variations(film[0]):
        by_sort.setdefault(sort, []).extend(s for s in others if all(map(is_taught, s)))

    sorts = list(by_sort.values())
    for i in rng.permutation(len(sorts)):
        if sorts[i] and len(film) < CLIPS:
            film.append(pick(rng, sorts[i]))
    return film


# ---- multiple choice -----------------------------------------------------------------------------


def ask(scene: Scene, rng: np.random.Generator) -> list[dict]:
    """Questions: {"options": five captions, "answer": index of the true one, "kind": its sort}."""

    def untaught(scenes: list[Scene]) -> list[Scene]:
        return [other for other in scenes if not any(map(is_taught, other))]

    questions = []
    for sort, true, false in variations(scene):
        false = untaught(false) if sort == "noun" else false
        if not false:
            continue  # this sort does not apply
        false = [false[j] for j in rng.permutation(len(false))]
        fillers = untaught(other_nouns(true, *pick(rng, places_of(true))))
        false += [fillers[j] for j in rng.permutation(len(fillers))]
        options, order = [true, *false[:4]], rng.permutation(5)
        template = int(rng.integers(len(TEMPLATES[sort_of(scene)])))
        captions = [caption_of(options[j], template) for j in order]
        questions.append({"options": captions, "answer": int(np.argmin(order)), "kind": sort})
    return questions


# ---- files ---------------------------------------------------------------------------------------


def generate(
    folder: str | Path,
    *,
    train: int = 10_000,
    val: int = 500,
    test: int = 1000,
    seed: int = 0,
    splits: Iterable[str] = SPLITS,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write these splits of the toy world with these numbers of videos; returns the folder.

    A finished split is recognised by world.json and reused, an interrupted one is completed.
    `workers` processes render (None: one a core). Raises UserError where the folder cannot be
    written or holds something else, or its files were changed, or where val or test asks for more
    videos than there are distinct scenes.
    """
    folder = Path(folder)
    counts = dict(train=train, val=val, test=test)
    key = dict(version=VERSION, seed=seed, **counts)
    try:
        checksums = read_mark(folder, key)
        for split in splits:
            if f"{split}.csv" not in checksums:
                checksums |= write_split(folder, split, counts[split], seed, workers, progress)
                mark = json.dumps(dict(key, sha256=checksums), indent=1, sort_keys=True)
                with write_whole(folder / "world.json") as unfinished:
                    unfinished.write_text(mark, encoding="utf-8")
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        raise UserError(
            f"{folder}: cannot hold the toy world ({error}); choose a writable folder"
        ) from error

    return folder


def read_mark(folder: Path, key: dict) -> dict[str, str]:
    """{file or "SPLIT videos": SHA-256} of what is finished in this folder; all is verified."""
    mark = folder / "world.json"
    if not mark.exists():
        if any((folder / f"{split}.csv").exists() for split in SPLITS):
            raise UserError(
                f"{folder}: holds a data set that is not a toy world; choose another folder"
            )
        return {}

    found = json.loads(mark.read_text(encoding="utf-8"))
    same = {name: found.get(name) for name in key}
    if same != key:
        raise UserError(
            f"{mark}: {same} is not the toy world asked for, {key}; delete {folder} or choose "
            "another folder"
        )
    whole = {}

    for name, expected in found["sha256"].items():
        split = re.match("[a-z]+", name)[0]
        videos = [folder / video_name(split, i) for i in range(key[split])]
        if not all(path.exists() for path in videos):
            continue  # it is completed
        if sha256(videos if name.endswith(" videos") else [folder / name]) != expected:
            raise UserError(
                f"{mark}: its files have been changed since; delete {folder} to write them anew"
            )
        whole[name] = expected

    return whole


def sha256(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def video_name(split: str, i: int) -> str:
    return f"videos/{split}_{i:05d}.mp4"


class Film(NamedTuple):
    """A video to render."""

    path: Path
    scene: Scene
    seed: tuple[int, ...]


def write_film(film: Film) -> None:
    """In a worker: render a video, unless it is there already. A path that exists is complete."""
    if not film.path.exists():
        with write_whole(film.path) as unfinished:
            write_video(unfinished, render(film.scene, film.seed), FPS)


def write_split(
    folder: Path, split: str, count: int, seed: int, workers: int | None, progress: bool
) -> dict[str, str]:
    """Write all files of a split, the videos first. Returns their checksums."""
    scenes, texts = plan(split, count, seed)
    films = []
    for i, scene in enumerate(scenes):
        films.append(Film(folder / video_name(split, i), scene, (seed, SPLITS.index(split), i)))
    (folder / "videos").mkdir(parents=True, exist_ok=True)

    done = run_guarded(write_film, films, workers=workers, together=TOGETHER)
    for _, failure in tqdm(done, f"toy world, {split}", count, unit="video", disable=not progress):
        if failure:
            raise UserError(
                "a rendering process died twice at the same video, or hung (out of memory?); run "
                "the same command again: what is rendered is kept"
            )

    for orphan in (folder / "videos").glob(".*.unfinished.mp4"):  # of killed processes
        orphan.unlink(missing_ok=True)

    checksums = {f"{split} videos": sha256(film.path for film in films)}
    for name, text in texts.items():
        with write_whole(folder / name) as unfinished:
            unfinished.write_text(text, encoding="utf-8", newline="\n")
        checksums[name] = sha256([folder / name])

    return checksums


def plan(split: str, count: int, seed: int) -> tuple[list[Scene], dict[str, str]]:
    """Everything of a split but the pixels: its scenes, and {file name: text}."""
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    is_train = split == "train"
    if is_train:
        scenes = []
        while len(scenes) < count:
            scenes += draw_film(rng)
        scenes = scenes[:count]
    else:
        scenes = distinct_scenes(split, count, rng)

    rows, truth, questions = ["video,caption\n"], [], []
    for i, scene in enumerate(scenes):
        video = video_name(split, i)
        captions = {paraphrase(scene, rng): None}  # a dict is a set that keeps the order
        while is_train and len(captions) < 5:
            captions[paraphrase(scene, rng, full=False)] = None
        rows += [f"{video},{caption}\n" for caption in captions]  # no caption has a comma or quote

        events = []
        for action, subject, other in scene:
            parties = dict(subject=subject._asdict(), object=other and other._asdict())
            events.append(dict(action=action, **parties))
        truth.append(json.dumps(dict(video=video, events=events)) + "\n")
        if not is_train:
            questions += [json.dumps(dict(video=video, **one)) + "\n" for one in ask(scene, rng)]

    files = {f"{split}.csv": "".join(rows), f"{split}_truth.jsonl": "".join(truth)}
    if not is_train:
        files[f"{split}_mc.jsonl"] = "".join(questions)
    return scenes, files


@dataclass
class ToyConfig:
    """Write the toy world."""

    folder: str = "cache/toy"  # where the world is written
    train: int = 10_000  # training videos
    val: int = 500  # validation videos
    test: int = 1000  # test videos
    seed: int = 0  # another seed draws other scenes from the same compositions
    workers: int | None = None  # processes; default: one a core


def main() -> None:
    config = parse_config(ToyConfig)
    check_ranges(config, dict(train=0, val=0, test=0, seed=0, workers=1), {})
    folder = generate(**vars(config))
    print("".join((folder / "test.csv").read_text().splitlines(keepends=True)[:13]))


if __name__ == "__main__":
    run(main)
