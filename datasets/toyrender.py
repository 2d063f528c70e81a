"""Toy world, the pixels: a scene (what acts, and how) becomes a video of 16 frames of 64×64 pixels.

    Scene ──▶ polygons of each thing's kind                                                      (1: what a kind is)
          ──▶ tracks: where the thing is, how large, how turned, how opaque, frame by frame      (2: what an action is)
          ──▶ drawn on a textured backdrop with drifting blobs, seen by a shaky, noisy camera    (3: what a video is)

Training reads these videos at 32×32 pixels and 8 of the 16 frames, so that is the resolution at
which kinds and actions have to be told apart: silhouettes differ, a thing is a quarter to a third
of the frame's side, a spin turns by about 45° from one sampled frame to the next (no symmetry of
any kind). Who does what to whom shows in the motion alone, never in the looks: the chaser is the
one behind, the puller is ahead on its rope, the passer is the faster one.

Realism is not the aim; that a person would find the right one of 1,000 videos is. What is random in
a video beyond its scene (place, speed, mirror image, backdrop, camera) is a pure function of a
seed. What is shown, and the words for it, are decided in toyworld.py.

    python toyrender.py chase         # writes chase.png: each kind of thing chasing the next, as a
                                      training run sees it
"""

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from tyro.conf import Positional

import cli
from cli import UserError

SIDE, FRAMES = 64, 16
COLOURS = {  # name: (body, mark), RGB
    "red": ((225, 30, 30), (90, 10, 10)),
    "green": ((30, 190, 50), (10, 75, 20)),
    "blue": ((40, 70, 240), (15, 25, 95)),
    "yellow": ((250, 225, 30), (100, 90, 10)),
    "white": ((250, 250, 250), (40, 40, 45)),
    "black": ((12, 12, 12), (200, 200, 200)),
}
SIZES = {"small": 0.115, "big": 0.18}  # radius in frame sides: 15 and 23 of 64 pixels across
SINGLE_ACTIONS = (
    "spin",
    "bounce",
    "grow",
    "shrink",
    "blink",
    "shake",
    "slide",
    "rise",
    "fall",
    "zigzag",
    "fade",
    "swing",
    "roll",
)
RELATIONS = ("chase", "push", "pull", "orbit", "pass", "hit", "eat", "raise", "drop")
SIDEWAYS = (
    "slide",
    "roll",
    "zigzag",
    "chase",
    "push",
    "pull",
    "hit",
    "eat",
)  # groups stand one above the other


class Thing(NamedTuple):
    """What one noun phrase speaks of; `size` is None for groups and for things that change their
    size.
    """

    count: int
    size: str | None
    colour: str
    kind: str


class Event(NamedTuple):
    action: str
    subject: Thing
    object: Thing | None = None


Scene = tuple[Event, ...]  # one event, or two of them in a double scene (left, right)

# --------------------------------------------------------------------------------------------------
# 1. Shapes: polygons in a box of about [-1, 1]², y down. A kind is a list of layers (contours, BODY
# or MARK: which of
# its two colours). Contours of a layer are filled even-odd: one within another is a hole. Marks
# show a ball's spin.

BODY, MARK = 0, 1


def _arc(
    x: float, y: float, rx: float, ry: float, start: float = 0, end: float = 360, n: int = 20
) -> list:
    angle = np.radians(np.linspace(start, end, n))
    return [(x + rx * np.cos(a), y + ry * np.sin(a)) for a in angle]


def _box(x0: float, y0: float, x1: float, y1: float) -> list:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def _petals(n: int, inner: float, outer: float) -> list:
    angle = np.linspace(-np.pi / 2, 1.5 * np.pi, 48, endpoint=False)
    radius = inner + (outer - inner) * np.abs(np.cos(n * (angle + np.pi / 2) / 2))
    return list(zip(radius * np.cos(angle), radius * np.sin(angle)))


def _shapes() -> dict[str, list[tuple[list[np.ndarray], int]]]:
    star = [
        (r * np.sin(i * np.pi / 5), -r * np.cos(i * np.pi / 5)) for i, r in enumerate([1, 0.42] * 5)
    ]
    heart = [
        (
            np.sin(t) ** 3,
            -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16,
        )
        for t in np.linspace(0, 2 * np.pi, 32)
    ]
    raw = {
        "ball": [([_arc(0, 0, 1, 1)], BODY), ([_arc(0, 0, 1, 1, -50, 50)], MARK)],
        "star": [([star], BODY)],
        "heart": [([heart], BODY)],
        "moon": [([_arc(0, 0, 1, 1, 50, 310) + _arc(0.45, 0, 0.8, 0.8, 285, 75)], BODY)],
        "ring": [
            ([_arc(0, 0.2, 0.85, 0.85), _arc(0, 0.2, 0.48, 0.48)], BODY),
            ([_box(-0.35, -1.1, 0.35, -0.5)], MARK),
        ],
        "cross": [
            (
                [
                    [
                        (-0.3, -1),
                        (0.3, -1),
                        (0.3, -0.3),
                        (1, -0.3),
                        (1, 0.3),
                        (0.3, 0.3),
                        (0.3, 1),
                        (-0.3, 1),
                        (-0.3, 0.3),
                        (-1, 0.3),
                        (-1, -0.3),
                        (-0.3, -0.3),
                    ]
                ],
                BODY,
            )
        ],
        "tree": [
            ([_box(-0.18, 0.5, 0.18, 1)], MARK),
            (
                [
                    [
                        (0, -1.1),
                        (0.55, -0.3),
                        (0.3, -0.3),
                        (0.85, 0.55),
                        (-0.85, 0.55),
                        (-0.3, -0.3),
                        (-0.55, -0.3),
                    ]
                ],
                BODY,
            ),
        ],
        "house": [
            (
                [
                    [
                        (0, -1),
                        (1, -0.2),
                        (0.75, -0.2),
                        (0.75, 0.9),
                        (-0.75, 0.9),
                        (-0.75, -0.2),
                        (-1, -0.2),
                    ]
                ],
                BODY,
            ),
            ([_box(-0.25, 0.2, 0.25, 0.9)], MARK),
        ],
        "fish": [
            ([_arc(0.25, 0, 0.85, 0.58)], BODY),
            ([[(-0.4, 0), (-1.1, -0.65), (-0.9, 0), (-1.1, 0.65)]], BODY),
            ([_arc(0.7, -0.15, 0.14, 0.14)], MARK),
        ],
        "car": [
            (
                [
                    [
                        (-1.1, 0.45),
                        (-1.1, -0.05),
                        (-0.65, -0.15),
                        (-0.4, -0.65),
                        (0.35, -0.65),
                        (0.65, -0.15),
                        (1.1, 0.0),
                        (1.1, 0.45),
                    ]
                ],
                BODY,
            ),
            ([_arc(-0.6, 0.5, 0.3, 0.3)], MARK),
            ([_arc(0.6, 0.5, 0.3, 0.3)], MARK),
        ],
        "key": [
            ([_arc(-0.65, 0, 0.55, 0.55), _arc(-0.65, 0, 0.25, 0.25)], BODY),
            (
                [
                    [
                        (-0.15, -0.15),
                        (1.2, -0.15),
                        (1.2, 0.6),
                        (0.92, 0.6),
                        (0.92, 0.15),
                        (0.7, 0.15),
                        (0.7, 0.5),
                        (0.45, 0.5),
                        (0.45, 0.15),
                        (-0.15, 0.15),
                    ]
                ],
                BODY,
            ),
        ],
        "cup": [
            ([[(-0.95, -0.8), (0.5, -0.8), (0.35, 0.85), (-0.8, 0.85)]], BODY),
            ([_arc(0.55, -0.15, 0.52, 0.5, -90, 90) + _arc(0.5, -0.15, 0.27, 0.25, 90, -90)], BODY),
            ([_arc(-0.22, -0.8, 0.72, 0.17)], MARK),
        ],
        "flower": [([_petals(6, 0.38, 1.0)], BODY), ([_arc(0, 0, 0.34, 0.34)], MARK)],
        "umbrella": [
            ([_arc(0, 0.1, 1.1, 1.05, 180, 360)], BODY),
            ([_box(-0.09, 0.1, 0.09, 0.85), _box(-0.45, 0.78, 0.09, 0.95)], MARK),
        ],
        "boat": [
            ([[(-1.1, 0.4), (1.1, 0.4), (0.7, 0.95), (-0.7, 0.95)]], BODY),
            ([[(0.05, -1.1), (0.95, 0.22), (0.05, 0.22)]], BODY),
            ([_box(-0.13, -1.1, 0.05, 0.4)], MARK),
        ],
        "crown": [
            (
                [
                    [
                        (-1, 0.75),
                        (-1.1, -0.7),
                        (-0.5, 0.0),
                        (0, -0.95),
                        (0.5, 0.0),
                        (1.1, -0.7),
                        (1, 0.75),
                    ]
                ],
                BODY,
            ),
            ([_box(-0.98, 0.4, 0.98, 0.62)], MARK),
        ],
    }
    shapes = {}
    for kind, layers in raw.items():
        points = np.concatenate([np.array(c) for contours, _ in layers for c in contours])
        low, high = points.min(0), points.max(0)
        width, height = (
            high - low
        )  # equal areas of the bounding box: "big" is the same for long and for round things
        scale = min(2 / np.sqrt(width * height), 2.4 / max(width, height))
        shapes[kind] = [
            ([(np.array(c) - (low + high) / 2) * scale for c in contours], part)
            for contours, part in layers
        ]
    return shapes


SHAPES = _shapes()
KINDS = tuple(SHAPES)

# --------------------------------------------------------------------------------------------------
# 2. Motion: what each action looks like, as tracks [FRAMES, 5] = (x, y, scale, angle in radians,
# alpha); x, y in frame
#    sides. Everything goes from left to right; `render` mirrors half of the scenes.


def _track(x, y, scale=1.0, angle=0.0, alpha=1.0) -> np.ndarray:
    return np.stack(
        [np.broadcast_to(column, FRAMES) for column in (x, y, scale, angle, alpha)], axis=1
    )


def single_track(action: str, x: float, rng: np.random.Generator) -> np.ndarray:
    """The track [FRAMES, 5] of an intransitive action around the column `x` of the frame (0.5 = the
    middle).
    """
    u = np.linspace(0, 1, FRAMES)
    y = 0.5 + rng.uniform(-0.06, 0.06)
    turn = rng.uniform(0.8, 1.2)
    wave = 2 * np.pi * u
    if (
        action == "spin"
    ):  # one turn: 45° between two of 8 sampled frames, not a symmetry of any shape
        return _track(x, y, angle=wave * turn)
    if action == "bounce":
        return _track(x, 0.75 - 0.5 * np.abs(np.sin(wave * turn)))
    if action == "grow":
        return _track(x, y, scale=0.3 + 0.9 * u)
    if action == "shrink":
        return _track(x, y, scale=1.2 - 0.9 * u)
    if (
        action == "blink"
    ):  # three frames on, three off: visible to 8 and to 4 uniformly sampled frames
        return _track(x, y, alpha=(np.arange(FRAMES) + rng.integers(6)) // 3 % 2)
    if action == "shake":
        side = np.where(np.arange(FRAMES) % 2, 1, -1) * rng.choice([-1, 1], FRAMES)
        return _track(
            x + 0.06 * side,
            y + rng.uniform(-0.03, 0.03, FRAMES),
            angle=0.35 * rng.choice([-1, 1], FRAMES),
        )
    if action == "slide":
        return _track(x - 0.28 + 0.56 * u, y)
    if action == "roll":
        return _track(x - 0.28 + 0.56 * u, y, angle=wave * turn)
    if action == "zigzag":
        return _track(
            x - 0.28 + 0.56 * u, y + 0.16 * (2 / np.pi) * np.arcsin(np.sin(2 * wave * turn))
        )
    if action == "rise":
        return _track(x, 0.8 - 0.6 * u)
    if action == "fall":
        return _track(x, 0.2 + 0.6 * u**1.5)
    if action == "fade":
        return _track(x, y, alpha=np.clip(1.1 - 1.2 * u, 0, 1))
    assert action == "swing", action
    angle = 0.85 * np.sin(1.25 * wave * turn + rng.uniform(0, np.pi))  # a pendulum below its pivot
    return _track(x - 0.3 * np.sin(angle), y - 0.25 + 0.3 * np.cos(angle), angle=angle)


def relation_tracks(
    action: str, r1: float, r2: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The tracks ([FRAMES, 5], [FRAMES, 5]) of subject and object of a relation; r1, r2 are their
    radii.
    """
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
        return (
            _track(np.minimum((at + 0.05) * u / meet - 0.05, at), y),
            _track(0.58 + 0.38 * after, y - rng.choice([-1, 1]) * 0.3 * after, angle=4 * after),
        )
    if action == "eat":
        x1 = 0.08 + 0.57 * np.minimum(u / 0.8, 1)
        return _track(x1, y), _track(0.65, y, scale=np.clip((0.65 - x1) / touch, 0, 1))
    x = 0.5 + rng.uniform(-0.1, 0.1)
    if action == "raise":
        y1 = 0.9 - (0.9 - 0.12 - r2 - touch) * u
        return _track(x, y1), _track(x, np.minimum(y1 - touch, 0.5))
    assert action == "drop", action
    x1, y1 = x - 0.1 + 0.2 * np.minimum(u / 0.35, 1), 0.05 + r1
    return _track(x1, y1), _track(
        x1, y1 + touch + (0.95 - r2 - y1 - touch) * np.clip((u - 0.35) / 0.5, 0, 1) ** 1.5
    )


# --------------------------------------------------------------------------------------------------
# 3. Rendering


def _places(count: int, radius: float, spread_down: bool) -> np.ndarray:
    """Offsets [count, 2] of the members of a group from its centre."""
    if count == 2:
        return np.array([(0, -1), (0, 1)] if spread_down else [(-1, 0), (1, 0)]) * 1.35 * radius
    return np.array([(0, 0)] if count == 1 else [(-1.2, 1), (1.2, 1), (0, -1)]) * radius


def _radius(thing: Thing) -> float:
    return SIZES[thing.size] if thing.size else (0.15 if thing.count == 1 else 0.115)


def _draw(canvas: np.ndarray, thing: Thing, radius: float, state: np.ndarray) -> None:
    """Draws one thing onto `canvas` [SIDE, SIDE, 3] uint8, anti-aliased, at state (x, y, scale,
    angle, alpha).
    """
    x, y, scale, angle, alpha = state
    if alpha <= 0 or scale * radius < 0.01:
        return
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]]) * scale * radius
    target = canvas if alpha >= 1 else canvas.copy()
    for contours, part in SHAPES[thing.kind]:
        points = []
        for contour in contours:
            corners = (
                contour @ turn + (x, y)
            ) * SIDE - 0.5  # [n, 2]; the centre of pixel 0 is at half a pixel
            points.append(
                np.round(corners * 16).astype(np.int32)
            )  # OpenCV's fixed point: 4 fractional bits
        cv2.fillPoly(target, points, COLOURS[thing.colour][part], lineType=cv2.LINE_AA, shift=4)
    if alpha < 1:
        cv2.addWeighted(target, alpha, canvas, 1 - alpha, 0, dst=canvas)


def _muted(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(75, 130) + rng.uniform(-22, 22, 3)


def render(scene: Scene, seed: tuple[int, ...]) -> np.ndarray:
    """The video of a scene, uint8 [FRAMES, SIDE, SIDE, 3] RGB; `seed` decides on all that the scene
    leaves open.
    """
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
        actors += [
            (thing, r, place, track)
            for thing, r, track in parts
            for place in _places(thing.count, r, event.action in SIDEWAYS)
        ]

    # Background: a gradient with texture that drifts, and faint blobs that drift their own way
    margin = 24
    big = SIDE + 2 * margin
    base, end = _muted(rng), _muted(rng)
    ramp = base + np.linspace(0, 1, big)[:, None, None] * (end - base)
    if rng.integers(2):
        ramp = ramp.transpose(1, 0, 2)
    grain = cv2.resize(
        rng.normal(0, 9, (10, 10, 3)).astype(np.float32), (big, big), interpolation=cv2.INTER_CUBIC
    )
    backdrop = np.clip(ramp + grain, 0, 255).astype(np.uint8)
    blobs = [
        (
            rng.uniform(0, SIDE, 2),
            rng.uniform(-1.5, 1.5, 2),
            rng.integers(5, 12, 2),
            rng.uniform(0, 180),
            np.clip(base + rng.uniform(-28, 28, 3), 50, 160).tolist(),
        )
        for _ in range(rng.integers(2, 5))
    ]
    drift, jitter = rng.uniform(-1, 1, 2), rng.uniform(-0.008, 0.008, (FRAMES, 2))
    light = 1 + 0.07 * np.cumsum(rng.normal(0, 0.4, FRAMES)).clip(-1, 1)
    noise = rng.normal(0, rng.uniform(2, 7), (FRAMES, SIDE, SIDE, 1)).astype(np.float32)

    video = np.empty((FRAMES, SIDE, SIDE, 3), np.uint8)
    for t in range(FRAMES):
        left, top = np.round(margin + drift * t - jitter[t] * SIDE).astype(int)
        frame = backdrop[top : top + SIDE, left : left + SIDE].copy()
        for centre, speed, axes, tilt, colour in blobs:
            x, y = np.round((centre + speed * t) * 16).astype(int).tolist()
            cv2.ellipse(
                frame, (x, y), (axes * 16).tolist(), tilt, 0, 360, colour, -1, cv2.LINE_AA, 4
            )
        states = [
            np.concatenate([track[t, :2] + place + jitter[t], track[t, 2:]])
            for _, _, place, track in actors
        ]
        if (
            scene[0].action == "pull"
        ):  # the rope, from the last actor (the subject) to the first (the object)
            ends = [
                np.round(state[:2] * SIDE * 16).astype(int).tolist()
                for state in (states[0], states[-1])
            ]
            cv2.line(frame, *ends, (215, 200, 170), 3, cv2.LINE_AA, 4)
        for (thing, radius, _, _), state in zip(actors, states):
            _draw(frame, thing, radius, state)
        video[t] = np.clip(frame * light[t] + noise[t], 0, 255)
    return (
        video[:, :, ::-1] if rng.integers(2) else video
    )  # mirrored: everything above goes from left to right


# --------------------------------------------------------------------------------------------------
# 4. A picture of it


def contact_sheet(
    videos: list[np.ndarray], titles: list[str], path: str, *, frames: int = 8, size: int = 32
) -> None:
    """Writes a picture: a row a video [FRAMES, H, W, 3] RGB, its title above `frames` of its frames
    at `size` pixels.

    The frames are enlarged threefold without smoothing. Raises UserError where the picture cannot
    be written.
    """
    rows = []
    for video, title in zip(videos, titles, strict=True):
        picked = [video[(2 * i + 1) * len(video) // (2 * frames)] for i in range(frames)]
        small = [cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA) for frame in picked]
        strip = np.hstack(
            [np.pad(f.repeat(3, axis=0).repeat(3, axis=1), ((1, 1), (1, 1), (0, 0))) for f in small]
        )
        header = np.full((18, strip.shape[1], 3), 255, np.uint8)
        cv2.putText(
            header, title, (4, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA
        )
        rows += [header, strip]
    try:
        written = cv2.imwrite(path, cv2.cvtColor(np.vstack(rows), cv2.COLOR_RGB2BGR))
    except cv2.error:  # an extension that OpenCV does not know
        written = False
    if not written:
        raise UserError(
            f"{path}: cannot write a picture there; name a .png file in a writable folder"
        )
    print(f"wrote {path}")


@dataclass
class RenderConfig:
    """Draw every kind of thing doing one action."""

    action: Positional[str] = "chase"  # what they do
    sheet: str | None = None  # the picture; default: ACTION.png


def main() -> None:
    config = cli.parse_config(RenderConfig)
    if config.action not in SINGLE_ACTIONS + RELATIONS:
        raise UserError(
            f"{config.action}: no such action; choose one of {', '.join(SINGLE_ACTIONS + RELATIONS)}"
        )
    videos, colours = [], list(COLOURS)
    for i in range(len(KINDS)):
        things = [
            Thing(1, ("big", "small")[j % 2], colours[j % 6], KINDS[j % len(KINDS)])
            for j in (i, i + 1)
        ]
        scene = (
            Event(config.action, things[0], things[1] if config.action in RELATIONS else None),
        )
        videos.append(render(scene, (0, i)))
    contact_sheet(videos, list(KINDS), config.sheet or f"{config.action}.png")


if __name__ == "__main__":
    cli.run(main)
