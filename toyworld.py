"""Toy world: the embedded data set, small videos of coloured things that act, with captions that say what happens.

A laptop has no video data set, and a method that is about *knowledge* needs one in which the knowledge is known. So
this file renders one: real mp4 files (64×64 pixels, 16 frames, 8 frames a second), five paraphrased captions a training
video, and the ground truth of each. A video shows one of three scenes, before a drifting background, by a shaky camera:

    single     "two red stars are spinning"                    one action of one to three equal things
    double     "a big red cup is shaking while a small green key is falling"
    relation   "a small blue fish chases a big black house"    who does it to whom is visible only in the motion

A *composition* is (action, kind) of a single scene and of each half of a double one, and (action, unordered pair of
kinds) of a relation. Compositions are dealt out to train, val and test once and for all: no test composition is ever
seen in training, though every kind and every action is. The pair is unordered so that training never shows "star chases
fish" where the test asks for "fish chases star": that would teach a prior against the truth instead of none.

Retrieval on val and test is well posed: the one caption of a video names every attribute, and it is true of no other
video of its split. Training captions come from the same grammar but may drop sizes and colours.

Multiple choice, one question for each val and test video: the true caption and four that differ from it by one edit
each, each of them false of the video by the ground truth. All five are written in one template.

    kind        the four distractors
    noun        four other nouns in the place of one of the caption's nouns
    verb        four other verbs in the place of one of the caption's verbs (none that could pass for true, see NEAR)
    direction   the two parties of the relation with their roles changed; and three other nouns or verbs, so that a
                model that is blind to word order gets at most half of these questions right

Files in `folder`: videos/*.mp4; {train,val,test}.csv (video,caption; paths relative to the file); {val,test}_mc.jsonl
({"video", "options", "answer", "kind"}); {train,val,test}_truth.jsonl ({"video", "events"}); and world.json, written
last: it marks a finished world. All is a pure function of (VERSION, counts, seed), whatever the number of processes.

    python toyworld.py --folder cache/toy --sheet sheet.png    # the default world, and a picture of some test videos
"""

import concurrent.futures
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

import cli
from cli import UserError

VERSION = 5  # of the world: a change of any pixel or word that `generate` writes raises it
SIDE, FRAMES, FPS = 64, 16, 8
SPLITS = ("train", "val", "test")

# ---------------------------------------------------------------------------------------------------------------------
# 1. Vocabulary. Words that a part-of-speech tagger gets right: no "orange", "pink" or "purple" (nouns, too), and
#    intransitive verbs only in the progressive ("a ball spins" is two nouns to a tagger trained on newspapers).

COLOURS = {  # name: (body, mark), RGB
    "red": ((225, 30, 30), (90, 10, 10)), "green": ((30, 190, 50), (10, 75, 20)), "blue": ((40, 70, 240), (15, 25, 95)),
    "yellow": ((250, 225, 30), (100, 90, 10)), "white": ((250, 250, 250), (40, 40, 45)),
    "black": ((12, 12, 12), (200, 200, 200)),
}
SIZES = {"small": 0.115, "big": 0.18}  # radius in frame sides: 15 and 23 of 64 pixels across
NUMBERS = {2: "two", 3: "three"}

# action: (progressive, synonym's progressive)
SINGLE = {"spin": ("spinning", "rotating"), "bounce": ("bouncing", "hopping"), "grow": ("growing", "expanding"),
          "shrink": ("shrinking", "contracting"), "blink": ("blinking", "flashing"), "shake": ("shaking", "trembling"),
          "slide": ("sliding", "gliding"), "rise": ("rising", "ascending"), "fall": ("falling", "descending"),
          "zigzag": ("zigzagging", "zigzagging"), "fade": ("fading", "vanishing"), "swing": ("swinging", "swaying"),
          "roll": ("rolling", "rolling")}
# action: (plural, third person, progressive, participle), and the same of a synonym
RELATION = {"chase": ("chase chases chasing chased", "pursue pursues pursuing pursued"),
            "push": ("push pushes pushing pushed", "shove shoves shoving shoved"),
            "pull": ("pull pulls pulling pulled", "drag drags dragging dragged"),
            "orbit": ("orbit orbits orbiting orbited", "circle circles circling circled"),
            "pass": ("pass passes passing passed", "overtake overtakes overtaking overtaken"),
            "hit": ("hit hits hitting hit", "strike strikes striking struck"),
            "eat": ("eat eats eating eaten", "swallow swallows swallowing swallowed"),
            "raise": ("raise raises raising raised", "lift lifts lifting lifted"),
            "drop": ("drop drops dropping dropped", "release releases releasing released")}
# Verbs that a person might accept for one another: never a distractor of each other.
NEAR = [{"roll", "spin"}, {"roll", "slide"}, {"slide", "zigzag"}, {"push", "hit"}]
SIDEWAYS = ("slide", "roll", "zigzag", "chase", "push", "pull", "hit", "eat")  # groups stand one above the other
HALF_SCENE = [a for a in SINGLE if a not in SIDEWAYS]  # these fit into half of the frame, so into a double scene

TEMPLATES = {  # {s} subject, {o} object, {is_s} is/are, {ing} progressive, {verb} chases/chase, {done} participle
    "single": ["{s} {is_s} {ing}", "there {is_s} {s} that {is_s} {ing}", "in this video {s} {is_s} {ing}",
               "a video of {s} that {is_s} {ing}", "here {s} {is_s} {ing}"],
    "relation": ["{s} {verb} {o}", "{s} {is_s} {ing} {o}", "{o} {is_o} {done} by {s}", "{o} {is_o} being {done} by {s}",
                 "there {is_s} {s} that {is_s} {ing} {o}", "in this video {s} {verb} {o}",
                 "a video of {o} that {is_o} {done} by {s}"],
    "double": ["{0} while {1}", "{0} and {1}", "in this video {0} while {1}", "here {0} and {1}"],  # two single scenes
}


class Thing(NamedTuple):
    """What one noun phrase speaks of; `size` is None for groups and for things that change their size."""
    count: int
    size: str | None
    colour: str
    kind: str


class Event(NamedTuple):
    action: str
    subject: Thing
    object: Thing | None = None


Scene = tuple[Event, ...]  # one event, or two of them in a double scene (left, right)

# ---------------------------------------------------------------------------------------------------------------------
# 2. Shapes: polygons in a box of about [-1, 1]², y down. A kind is a list of layers (contours, BODY or MARK: which of
#    its two colours). Contours of a layer are filled even-odd: one within another is a hole. Marks show a ball's spin.

BODY, MARK = 0, 1


def _arc(x: float, y: float, rx: float, ry: float, start: float = 0, end: float = 360, n: int = 20) -> list:
    angle = np.radians(np.linspace(start, end, n))
    return [(x + rx * np.cos(a), y + ry * np.sin(a)) for a in angle]


def _box(x0: float, y0: float, x1: float, y1: float) -> list:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def _petals(n: int, inner: float, outer: float) -> list:
    angle = np.linspace(-np.pi / 2, 1.5 * np.pi, 48, endpoint=False)
    radius = inner + (outer - inner) * np.abs(np.cos(n * (angle + np.pi / 2) / 2))
    return list(zip(radius * np.cos(angle), radius * np.sin(angle)))


def _shapes() -> dict[str, list[tuple[list[np.ndarray], int]]]:
    star = [(r * np.sin(i * np.pi / 5), -r * np.cos(i * np.pi / 5)) for i, r in enumerate([1, 0.42] * 5)]
    heart = [(np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16)
             for t in np.linspace(0, 2 * np.pi, 32)]
    raw = {
        "ball": [([_arc(0, 0, 1, 1)], BODY), ([_arc(0, 0, 1, 1, -50, 50)], MARK)],
        "star": [([star], BODY)],
        "heart": [([heart], BODY)],
        "moon": [([_arc(0, 0, 1, 1, 50, 310) + _arc(0.45, 0, 0.8, 0.8, 285, 75)], BODY)],
        "ring": [([_arc(0, 0.2, 0.85, 0.85), _arc(0, 0.2, 0.48, 0.48)], BODY), ([_box(-0.35, -1.1, 0.35, -0.5)], MARK)],
        "cross": [([[(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3), (0.3, 1), (-0.3, 1),
                     (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)]], BODY)],
        "tree": [([_box(-0.18, 0.5, 0.18, 1)], MARK),
                 ([[(0, -1.1), (0.55, -0.3), (0.3, -0.3), (0.85, 0.55), (-0.85, 0.55), (-0.3, -0.3), (-0.55, -0.3)]],
                  BODY)],
        "house": [([[(0, -1), (1, -0.2), (0.75, -0.2), (0.75, 0.9), (-0.75, 0.9), (-0.75, -0.2), (-1, -0.2)]], BODY),
                  ([_box(-0.25, 0.2, 0.25, 0.9)], MARK)],
        "fish": [([_arc(0.25, 0, 0.85, 0.58)], BODY), ([[(-0.4, 0), (-1.1, -0.65), (-0.9, 0), (-1.1, 0.65)]], BODY),
                 ([_arc(0.7, -0.15, 0.14, 0.14)], MARK)],
        "car": [([[(-1.1, 0.45), (-1.1, -0.05), (-0.65, -0.15), (-0.4, -0.65), (0.35, -0.65), (0.65, -0.15), (1.1, 0.0),
                   (1.1, 0.45)]], BODY), ([_arc(-0.6, 0.5, 0.3, 0.3)], MARK), ([_arc(0.6, 0.5, 0.3, 0.3)], MARK)],
        "key": [([_arc(-0.65, 0, 0.55, 0.55), _arc(-0.65, 0, 0.25, 0.25)], BODY),
                ([[(-0.15, -0.15), (1.2, -0.15), (1.2, 0.6), (0.92, 0.6), (0.92, 0.15), (0.7, 0.15), (0.7, 0.5),
                   (0.45, 0.5), (0.45, 0.15), (-0.15, 0.15)]], BODY)],
        "cup": [([[(-0.95, -0.8), (0.5, -0.8), (0.35, 0.85), (-0.8, 0.85)]], BODY),
                ([_arc(0.55, -0.15, 0.52, 0.5, -90, 90) + _arc(0.5, -0.15, 0.27, 0.25, 90, -90)], BODY),
                ([_arc(-0.22, -0.8, 0.72, 0.17)], MARK)],
        "flower": [([_petals(6, 0.38, 1.0)], BODY), ([_arc(0, 0, 0.34, 0.34)], MARK)],
        "umbrella": [([_arc(0, 0.1, 1.1, 1.05, 180, 360)], BODY),
                     ([_box(-0.09, 0.1, 0.09, 0.85), _box(-0.45, 0.78, 0.09, 0.95)], MARK)],
        "boat": [([[(-1.1, 0.4), (1.1, 0.4), (0.7, 0.95), (-0.7, 0.95)]], BODY),
                 ([[(0.05, -1.1), (0.95, 0.22), (0.05, 0.22)]], BODY), ([_box(-0.13, -1.1, 0.05, 0.4)], MARK)],
        "crown": [([[(-1, 0.75), (-1.1, -0.7), (-0.5, 0.0), (0, -0.95), (0.5, 0.0), (1.1, -0.7), (1, 0.75)]], BODY),
                  ([_box(-0.98, 0.4, 0.98, 0.62)], MARK)],
    }
    shapes = {}
    for kind, layers in raw.items():
        points = np.concatenate([np.array(c) for contours, _ in layers for c in contours])
        low, high = points.min(0), points.max(0)
        width, height = high - low  # equal areas of the bounding box: "big" is the same for long and for round things
        scale = min(2 / np.sqrt(width * height), 2.4 / max(width, height))
        shapes[kind] = [([(np.array(c) - (low + high) / 2) * scale for c in contours], part)
                        for contours, part in layers]
    return shapes


SHAPES = _shapes()
KINDS = tuple(SHAPES)

# ---------------------------------------------------------------------------------------------------------------------
# 3. Motion: what each action looks like, as tracks [FRAMES, 5] = (x, y, scale, angle in radians, alpha); x, y in frame
#    sides. Everything goes from left to right; `render` mirrors half of the scenes.


def _track(x, y, scale=1.0, angle=0.0, alpha=1.0) -> np.ndarray:
    return np.stack([np.broadcast_to(column, FRAMES) for column in (x, y, scale, angle, alpha)], axis=1)


def single_track(action: str, x: float, rng: np.random.Generator) -> np.ndarray:
    """The track [FRAMES, 5] of an intransitive action around the column `x` of the frame (0.5 = the middle)."""
    u = np.linspace(0, 1, FRAMES)
    y = 0.5 + rng.uniform(-0.06, 0.06)
    turn = rng.uniform(0.8, 1.2)
    wave = 2 * np.pi * u
    if action == "spin":  # one turn: 45° between two of 8 sampled frames, not a symmetry of any shape
        return _track(x, y, angle=wave * turn)
    if action == "bounce":
        return _track(x, 0.75 - 0.5 * np.abs(np.sin(wave * turn)))
    if action == "grow":
        return _track(x, y, scale=0.3 + 0.9 * u)
    if action == "shrink":
        return _track(x, y, scale=1.2 - 0.9 * u)
    if action == "blink":  # three frames on, three off: visible to 8 and to 4 uniformly sampled frames
        return _track(x, y, alpha=(np.arange(FRAMES) + rng.integers(6)) // 3 % 2)
    if action == "shake":
        side = np.where(np.arange(FRAMES) % 2, 1, -1) * rng.choice([-1, 1], FRAMES)
        return _track(x + 0.06 * side, y + rng.uniform(-0.03, 0.03, FRAMES), angle=0.35 * rng.choice([-1, 1], FRAMES))
    if action == "slide":
        return _track(x - 0.28 + 0.56 * u, y)
    if action == "roll":
        return _track(x - 0.28 + 0.56 * u, y, angle=wave * turn)
    if action == "zigzag":
        return _track(x - 0.28 + 0.56 * u, y + 0.16 * (2 / np.pi) * np.arcsin(np.sin(2 * wave * turn)))
    if action == "rise":
        return _track(x, 0.8 - 0.6 * u)
    if action == "fall":
        return _track(x, 0.2 + 0.6 * u ** 1.5)
    if action == "fade":
        return _track(x, y, alpha=np.clip(1.1 - 1.2 * u, 0, 1))
    assert action == "swing", action
    angle = 0.85 * np.sin(1.25 * wave * turn + rng.uniform(0, np.pi))  # a pendulum below its pivot
    return _track(x - 0.3 * np.sin(angle), y - 0.25 + 0.3 * np.cos(angle), angle=angle)


def relation_tracks(action: str, r1: float, r2: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The tracks ([FRAMES, 5], [FRAMES, 5]) of subject and object of a relation; r1, r2 are their radii."""
    u = np.linspace(0, 1, FRAMES)
    y = 0.5 + rng.uniform(-0.08, 0.08)
    touch = 0.9 * (r1 + r2)
    if action == "chase":  # the same wavy path, the chaser behind and closing in
        x1, x2 = 0.08 + 0.55 * u, 0.50 + 0.42 * u
        return (_track(x1, y + 0.13 * np.sin(9 * x1)), _track(x2, y + 0.13 * np.sin(9 * x2)))
    if action == "push":
        x1 = 0.05 + (0.93 - r2 - touch - 0.05) * u
        return _track(x1, y), _track(np.maximum(x1 + touch, 0.48), y)
    if action == "pull":  # a rope between them, drawn by `render`
        x1 = 0.55 + 0.37 * u
        return _track(x1, y), _track(x1 - touch - 0.14, y)
    if action == "orbit":
        angle = 2 * np.pi * (rng.uniform() + 1.1 * u)
        radius = min(0.9 * touch + 0.08, 0.47 - r1 / 2)
        return _track(0.5 + radius * np.cos(angle), 0.5 + radius * np.sin(angle)), _track(0.5, 0.5)
    if action == "pass":
        lane = 0.19 * rng.choice([-1, 1])
        return _track(0.1 + 0.8 * u, 0.5 + lane), _track(0.4 + 0.2 * u, 0.5 - lane)
    if action == "hit":  # one stops dead, the other flies off
        at, meet = 0.58 - touch, 0.4
        after = np.clip((u - meet) / (1 - meet), 0, 1)
        return (_track(np.minimum((at + 0.05) * u / meet - 0.05, at), y),
                _track(0.58 + 0.38 * after, y - rng.choice([-1, 1]) * 0.3 * after, angle=4 * after))
    if action == "eat":
        x1 = 0.08 + 0.57 * np.minimum(u / 0.8, 1)
        return _track(x1, y), _track(0.65, y, scale=np.clip((0.65 + 0.1 - x1) / (touch + 0.1), 0, 1))
    x = 0.5 + rng.uniform(-0.1, 0.1)
    if action == "raise":
        y1 = 0.9 - (0.9 - 0.12 - r2 - touch) * u
        return _track(x, y1), _track(x, np.minimum(y1 - touch, 0.5))
    assert action == "drop", action
    x1, y1 = x - 0.1 + 0.2 * np.minimum(u / 0.35, 1), 0.05 + r1
    return _track(x1, y1), _track(x1, y1 + touch + (0.95 - r2 - y1 - touch) * np.clip((u - 0.35) / 0.5, 0, 1) ** 1.5)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Rendering


def _places(count: int, radius: float, spread_down: bool) -> np.ndarray:
    """Offsets [count, 2] of the members of a group from its centre."""
    if count == 2:
        return np.array([(0, -1), (0, 1)] if spread_down else [(-1, 0), (1, 0)]) * 1.35 * radius
    return np.array([(0, 0)] if count == 1 else [(-1.2, 1), (1.2, 1), (0, -1)]) * radius


def _radius(thing: Thing) -> float:
    return SIZES[thing.size] if thing.size else (0.15 if thing.count == 1 else 0.115)


def _draw(canvas: np.ndarray, thing: Thing, radius: float, state: np.ndarray) -> None:
    """Draws one thing onto `canvas` [SIDE, SIDE, 3] uint8, anti-aliased, at state (x, y, scale, angle, alpha)."""
    x, y, scale, angle, alpha = state
    if alpha <= 0 or scale * radius < 0.01:
        return
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]]) * scale * radius
    target = canvas if alpha >= 1 else canvas.copy()
    for contours, part in SHAPES[thing.kind]:
        points = []
        for contour in contours:
            corners = (contour @ turn + (x, y)) * SIDE - 0.5  # [n, 2]; the centre of pixel 0 is at half a pixel
            points.append(np.round(corners * 16).astype(np.int32))  # OpenCV's fixed point: 4 fractional bits
        cv2.fillPoly(target, points, COLOURS[thing.colour][part], lineType=cv2.LINE_AA, shift=4)
    if alpha < 1:
        cv2.addWeighted(target, alpha, canvas, 1 - alpha, 0, dst=canvas)


def _muted(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(75, 130) + rng.uniform(-22, 22, 3)


def render(scene: Scene, seed: tuple[int, ...]) -> np.ndarray:
    """The video of a scene, uint8 [FRAMES, SIDE, SIDE, 3] RGB; `seed` decides on all that the scene leaves open."""
    rng = np.random.default_rng(seed)
    actors = []  # (thing, radius, offset, track), the object below the subject
    for i, event in enumerate(scene):
        r1 = _radius(event.subject)
        if event.object is None:
            x = 0.5 + rng.uniform(-0.05, 0.05) if len(scene) == 1 else (0.26, 0.74)[i]
            parts = [(event.subject, r1, single_track(event.action, x, rng))]
        else:
            r2 = _radius(event.object)
            tracks = relation_tracks(event.action, r1, r2, rng)
            parts = [(event.object, r2, tracks[1]), (event.subject, r1, tracks[0])]
        actors += [(thing, r, place, track) for thing, r, track in parts
                   for place in _places(thing.count, r, event.action in SIDEWAYS)]

    # Background: a gradient with texture that drifts, and faint blobs that drift their own way
    margin = 24
    big = SIDE + 2 * margin
    base, end = _muted(rng), _muted(rng)
    ramp = base + np.linspace(0, 1, big)[:, None, None] * (end - base)
    if rng.integers(2):
        ramp = ramp.transpose(1, 0, 2)
    grain = cv2.resize(rng.normal(0, 9, (10, 10, 3)).astype(np.float32), (big, big), interpolation=cv2.INTER_CUBIC)
    backdrop = np.clip(ramp + grain, 0, 255).astype(np.uint8)
    blobs = [(rng.uniform(0, SIDE, 2), rng.uniform(-1.5, 1.5, 2), rng.integers(5, 12, 2), rng.uniform(0, 180),
              np.clip(base + rng.uniform(-28, 28, 3), 50, 160).tolist()) for _ in range(rng.integers(2, 5))]
    drift, jitter = rng.uniform(-1, 1, 2), rng.uniform(-0.008, 0.008, (FRAMES, 2))
    light = 1 + 0.07 * np.cumsum(rng.normal(0, 0.4, FRAMES)).clip(-1, 1)
    noise = rng.normal(0, rng.uniform(2, 7), (FRAMES, SIDE, SIDE, 1)).astype(np.float32)

    video = np.empty((FRAMES, SIDE, SIDE, 3), np.uint8)
    for t in range(FRAMES):
        left, top = np.round(margin + drift * t - jitter[t] * SIDE).astype(int)
        frame = backdrop[top:top + SIDE, left:left + SIDE].copy()
        for centre, speed, axes, tilt, colour in blobs:
            x, y = np.round((centre + speed * t) * 16).astype(int).tolist()
            cv2.ellipse(frame, (x, y), (axes * 16).tolist(), tilt, 0, 360, colour, -1, cv2.LINE_AA, 4)
        states = [np.concatenate([track[t, :2] + place + jitter[t], track[t, 2:]]) for _, _, place, track in actors]
        if scene[0].action == "pull":  # the rope, from the last actor (the subject) to the first (the object)
            ends = [np.round(state[:2] * SIDE * 16).astype(int).tolist() for state in (states[0], states[-1])]
            cv2.line(frame, *ends, (215, 200, 170), 3, cv2.LINE_AA, 4)
        for (thing, radius, _, _), state in zip(actors, states):
            _draw(frame, thing, radius, state)
        video[t] = np.clip(frame * light[t] + noise[t], 0, 255)
    return video[:, :, ::-1] if rng.integers(2) else video  # mirrored: everything above goes from left to right


# ---------------------------------------------------------------------------------------------------------------------
# 5. Language


def _phrase(thing: Thing) -> str:
    noun = thing.kind
    if thing.count > 1:
        noun = {"fish": "fish", "cross": "crosses"}.get(noun, noun + "s")
    words = " ".join(w for w in (thing.size, thing.colour, noun) if w)
    return f"{NUMBERS[thing.count] if thing.count > 1 else 'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption_of(scene: Scene, template: int = 0, synonyms: tuple[int, ...] = (0, 0)) -> str:
    """The caption of a scene in a template of its sort; synonyms[i] = 1 takes the synonym for the verb of event i."""
    if len(scene) == 2:
        return TEMPLATES["double"][template].format(*(caption_of((e,), 0, (s,)) for e, s in zip(scene, synonyms)))
    (action, subject, other), form = scene[0], synonyms[0]
    words = {"s": _phrase(subject), "is_s": "is" if subject.count == 1 else "are"}
    if other is None:
        return TEMPLATES["single"][template].format(**words, ing=SINGLE[action][form])
    plural, third, ing, done = RELATION[action][form].split()
    return TEMPLATES["relation"][template].format(**words, o=_phrase(other), is_o="is" if other.count == 1 else "are",
                                                  verb=third if subject.count == 1 else plural, ing=ing, done=done)


def _sort(scene: Scene) -> str:
    return "double" if len(scene) == 2 else "single" if scene[0].object is None else "relation"


def paraphrase(scene: Scene, rng: np.random.Generator, *, full: bool = True) -> str:
    """A random caption of a scene; with full=False it may drop sizes and colours."""
    def thin(thing: Thing | None) -> Thing | None:
        if full or thing is None:
            return thing
        return thing._replace(size=None if rng.random() < 0.4 else thing.size,
                              colour="" if rng.random() < 0.2 else thing.colour)

    scene = tuple(event._replace(subject=thin(event.subject), object=thin(event.object)) for event in scene)
    if len(scene) == 2 and rng.integers(2):
        scene = scene[::-1]
    template = int(rng.integers(len(TEMPLATES[_sort(scene)])))
    return caption_of(scene, template, tuple(int(rng.random() < 0.2) for _ in scene))


# ---------------------------------------------------------------------------------------------------------------------
# 6. Scenes: compositions are dealt out to the splits, then scenes are drawn from a split's compositions


@functools.cache
def compositions(split: str) -> dict[str, list[tuple[str, ...]]]:
    """All that `split` shows: {action: [(kind,), …]} of single actions, {action: [(kind, kind), …]}, of relations.

    Fixed for ever, whatever the seed: test has 4 of the 16 kinds of each single action and 24 of the 120 pairs of each
    relation, val 2 and 12 others; the kinds are held out equally often (give or take one) over the single actions.
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
        counts = [1, 1] if action == "orbit" or rng.random() < 0.75 else [[1, 2], [2, 1]][int(rng.integers(2))]
        return (Event(action, *(_thing(str(k), c, True, rng) for k, c in zip(kinds, counts))),)

    def event(actions, count):
        action = _pick(rng, actions)
        return Event(action, _thing(_pick(rng, allowed[action])[0], count, action not in ("grow", "shrink"), rng))

    if roll < 0.85:
        return (event(list(SINGLE), _pick(rng, [1, 1, 2, 3])),)
    while True:
        left, right = event(HALF_SCENE, 1), event(HALF_SCENE, 1)
        if left.action != right.action and left.subject.kind != right.subject.kind:
            return left, right


def distinct_scenes(split: str, count: int, rng: np.random.Generator) -> list[Scene]:
    """Scenes of which none makes the full caption of another one true: no scene's events are a subset of another's."""
    scenes, whole, parts, tries = [], set(), set(), 0
    while len(scenes) < count:
        tries += 1
        if tries > 50 * count + 1000:
            raise UserError(f"{split}={count}: the toy world has not so many distinct {split} scenes; ask for fewer")
        scene = draw_scene(split, rng)
        key = frozenset(scene)
        if key in whole or key <= parts or (len(key) == 2 and any(frozenset([e]) in whole for e in key)):
            continue
        whole.add(key)
        parts |= key if len(key) == 2 else set()
        scenes.append(scene)
    return scenes


# ---------------------------------------------------------------------------------------------------------------------
# 7. Multiple choice


def _edits(scene: Scene, sort: str, rng: np.random.Generator) -> Iterator[Scene]:
    """Scenes that differ from `scene` in one noun, one verb, or its direction, and are false where it is true.

    All edit the same place: without the video, the options of a noun or verb question say nothing about the answer.
    """
    i = int(rng.integers(len(scene)))
    event = scene[i]
    if sort == "direction":
        edits = [event._replace(subject=event.object, object=event.subject)]
    elif sort == "verb":
        verbs = HALF_SCENE if len(scene) == 2 else RELATION if event.object else SINGLE
        actions = {e.action for e in scene}
        edits = [event._replace(action=v) for v in verbs if not any(v == a or {v, a} in NEAR for a in actions)]
    else:
        role = _pick(rng, ["subject", "object"] if event.object else ["subject"])
        kinds = {thing.kind for e in scene for thing in (e.subject, e.object) if thing}
        edits = [event._replace(**{role: getattr(event, role)._replace(kind=k)}) for k in KINDS if k not in kinds]
    for j in rng.permutation(len(edits)):
        yield scene[:i] + (edits[j],) + scene[i + 1:]


def question(scene: Scene, rng: np.random.Generator) -> dict:
    """The question on a video of `scene`: {"options": five captions, "answer": index of the true one, "kind": …}."""
    sort = str(rng.choice(["noun", "verb", "direction"], p=[0.3, 0.3, 0.4] if scene[0].object else [0.5, 0.5, 0]))
    if sort == "direction":
        sources = [_edits(scene, s, rng) for s in ("direction", *rng.choice(["noun", "verb"], 3))]
    else:
        sources = [_edits(scene, sort, rng)] * 4
    options = [scene]
    for source in sources:
        options.append(next(edit for edit in source if edit not in options))
    template = int(rng.integers(len(TEMPLATES[_sort(scene)])))
    order = rng.permutation(5)
    return {"options": [caption_of(options[j], template) for j in order], "answer": int(np.argmin(order)), "kind": sort}


# ---------------------------------------------------------------------------------------------------------------------
# 8. Files


def _write_atomically(path: Path, text: str) -> None:
    """Writes `text` so that `path` holds all of it or does not exist, whenever the process is killed."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, path)


def _write_video(job: tuple[Path, Scene, tuple[int, ...]]) -> None:
    """Renders one video to its path, unless it is there already: a path that exists is complete."""
    path, scene, seed = job
    if path.exists():
        return
    part = path.with_name(f"{path.stem}.{os.getpid()}.part.mp4")  # the writer picks the container by the extension
    writer = cv2.VideoWriter(str(part), cv2.VideoWriter_fourcc(*"mp4v"), FPS, (SIDE, SIDE))
    for frame in render(scene, seed):
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()
    if not part.exists() or b"moov" not in part.read_bytes():  # the index, written last; OpenCV reports no failure
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: the video could not be written; check the folder's permissions and free space")
    os.replace(part, path)


def _plan(split: str, count: int, seed: int) -> tuple[list[Scene], dict[str, str]]:
    """Everything of a split but the pixels: its scenes, and {file name: text}."""
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    scenes = [draw_scene(split, rng) for _ in range(count)] if split == "train" else distinct_scenes(split, count, rng)
    rows, truth, choice = [("video", "caption")], [], []
    for i, scene in enumerate(scenes):
        video = _video_name(split, i)
        captions = {paraphrase(scene, rng): None}  # a dict is a set that keeps the order
        while split == "train" and len(captions) < 5:
            captions[paraphrase(scene, rng, full=False)] = None
        rows += [(video, caption) for caption in captions]
        events = [{"action": e.action, "subject": e.subject._asdict(), "object": e.object and e.object._asdict()}
                  for e in scene]
        truth.append({"video": video, "events": events})
        if split != "train":
            choice.append({"video": video, **question(scene, rng)})
    files = {f"{split}.csv": "".join(",".join(row) + "\n" for row in rows)}  # no caption holds a comma or a quote
    for name, records in ((f"{split}_truth.jsonl", truth), (f"{split}_mc.jsonl", choice)):
        if name != "train_mc.jsonl":
            files[name] = "".join(json.dumps(record) + "\n" for record in records)
    return scenes, files


def _video_name(split: str, i: int) -> str:
    return f"videos/{split}_{i:05d}.mp4"


def generate(folder: str | Path, *, train: int = 4000, val: int = 500, test: int = 1000, seed: int = 0,
             workers: int | None = None, progress: bool = True) -> Path:
    """Writes the toy world with these numbers of videos into `folder`, and returns the folder as a Path.

    A finished world is recognised by its world.json and reused at once; an interrupted one is completed. `workers`
    processes render (default: one a core; 1 = this process). Raises UserError where the folder cannot be written, holds
    something else, or where val or test asks for more videos than there are distinct scenes.
    """
    folder, counts = Path(folder), {"train": train, "val": val, "test": test}
    assert min(counts.values()) >= 0 and (workers is None or workers >= 1), (counts, workers)
    try:
        return _generate(folder, counts, seed, workers or os.cpu_count() or 1, progress)
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{folder}: cannot hold the toy world ({error}); choose a writable folder") from error


def _generate(folder: Path, counts: dict[str, int], seed: int, workers: int, progress: bool) -> Path:
    finished, started = folder / "world.json", folder / "world.started.json"
    key = {"version": VERSION, "seed": seed, **counts}
    for mark in (finished, started):
        if mark.exists():
            found = json.loads(mark.read_text())
            found = {k: found.get(k) for k in key}
            if found != key:
                raise UserError(f"{mark}: {found} is not the toy world asked for, {key}; "
                                f"delete {folder} or choose another folder")
    names = {split: [_video_name(split, i) for i in range(count)] for split, count in counts.items()}
    if finished.exists():
        if any(_sha256(folder / name) != sha for name, sha in json.loads(finished.read_text())["sha256"].items()):
            raise UserError(f"{finished}: its files have been changed since; delete {folder} to write them anew")
        if all((folder / name).exists() for split in names.values() for name in split):
            return folder
    elif not started.exists() and any((folder / f"{split}.csv").exists() for split in SPLITS):
        raise UserError(f"{folder}: holds a data set that is not a toy world; choose another folder")

    (folder / "videos").mkdir(parents=True, exist_ok=True)
    _write_atomically(started, json.dumps(key))
    jobs, files = [], {}
    for split, count in counts.items():
        scenes, texts = _plan(split, count, seed)
        files |= texts
        jobs += [(folder / name, scene, (seed, SPLITS.index(split), i))
                 for i, (name, scene) in enumerate(zip(names[split], scenes, strict=True))]
    _write_videos(jobs, workers, progress)
    for name, text in files.items():
        _write_atomically(folder / name, text)
    for orphan in (folder / "videos").glob("*.part.mp4"):  # of killed processes: every video is complete by now
        orphan.unlink(missing_ok=True)
    hashes = {name: _sha256(folder / name) for name in files}
    _write_atomically(finished, json.dumps({**key, "sha256": hashes}, indent=1))
    started.unlink(missing_ok=True)
    return folder


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_videos(jobs: list, workers: int, progress: bool) -> None:
    with tqdm(total=len(jobs), desc="toy world", unit="video", disable=not progress) as bar:
        if workers == 1:
            for job in jobs:
                _write_video(job)
                bar.update()
            return
        # Spawned, not forked: the caller may hold threads (PyTorch's), whose locks a fork would copy in any state.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, context, cv2.setNumThreads, (1,)) as pool:
            try:
                for _ in pool.map(_write_video, jobs, chunksize=32):
                    bar.update()
            except BaseException:
                pool.shutdown(cancel_futures=True)  # else the pool would render the whole rest before it raised
                raise


# ---------------------------------------------------------------------------------------------------------------------
# 9. A picture of it


def contact_sheet(videos: list[Path], captions: list[str], *, frames: int = 8, size: int = 32,
                  zoom: int = 3) -> np.ndarray:
    """A picture, uint8 [H, W, 3] BGR: each video's caption above `frames` of its frames at `size` pixels, enlarged."""
    rows = []
    for path, caption in zip(videos, captions, strict=True):
        capture = cv2.VideoCapture(str(path))
        clip = [capture.read()[1] for _ in range(FRAMES)]
        capture.release()
        small = [cv2.resize(clip[(2 * i + 1) * FRAMES // (2 * frames)], (size, size), interpolation=cv2.INTER_AREA)
                 for i in range(frames)]
        row = np.hstack([np.pad(f.repeat(zoom, 0).repeat(zoom, 1), ((1, 1), (1, 1), (0, 0))) for f in small])
        title = np.full((18, row.shape[1], 3), 255, np.uint8)
        cv2.putText(title, caption, (4, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
        rows += [title, row]
    return np.vstack(rows)


@dataclass
class ToyConfig:
    """Write the toy world, and a picture of some of its test videos."""
    folder: str = "cache/toy"   # where the world is written
    train: int = 4000           # training videos
    val: int = 500              # validation videos
    test: int = 1000            # test videos
    seed: int = 0               # another seed draws other scenes from the same compositions
    workers: int | None = None  # processes; default: one a core
    sheet: str | None = None    # PNG file for a picture of the first 12 test videos


def main() -> None:
    config = cli.parse_config(ToyConfig)
    folder = generate(config.folder, train=config.train, val=config.val, test=config.test, seed=config.seed,
                      workers=config.workers)
    rows = [line.split(",") for line in (folder / "test.csv").read_text().splitlines()[1:13]]
    for video, caption in rows:
        print(folder / video, caption)
    if config.sheet and rows:
        videos, captions = zip(*rows)
        if not cv2.imwrite(config.sheet, contact_sheet([folder / video for video in videos], captions)):
            raise UserError(f"{config.sheet}: cannot write a picture there; name a .png file in a writable folder")


if __name__ == "__main__":
    cli.run(main)
