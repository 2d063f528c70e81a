"""Toy world, the pixels: a scene (who does what) becomes a video of 16 frames of 64 × 64 pixels.

    Scene -> outlines of each thing's kind                                          1. shapes
          -> a track of each thing: place, size, angle, opacity, frame by frame     2. motion
          -> drawn on a textured backdrop, seen by a shaky, noisy camera            3. pixels

Training reads these videos at 32 × 32 pixels and 8 of the 16 frames. So that is the resolution at
which kinds and actions have to be told apart. Outlines differ. A thing is 0.27 to 0.41 of
the frame's side. A spin turns by about 45° from one sampled frame to the next, which is no symmetry
of any kind. Who does what to whom shows in the motion alone, never in the looks: the chaser is the
one behind, the puller is ahead on its rope, the passer is the faster one.

What is random beyond the scene (place, speed, mirror image, backdrop, camera) is a pure function of
a seed. Which scenes there are, and the words for them, is in toyworld.py.
"""

from typing import NamedTuple

import cv2
import numpy as np

SIDE, FRAMES = 64, 16
COLOURS = {  # name: (body, mark), RGB
    "red": ((225, 30, 30), (90, 10, 10)),
    "green": ((30, 190, 50), (10, 75, 20)),
    "blue": ((40, 70, 240), (15, 25, 95)),
    "yellow": ((250, 225, 30), (100, 90, 10)),
    "white": ((250, 250, 250), (40, 40, 45)),
    "black": ((12, 12, 12), (200, 200, 200)),
}
SIZES = {"small": 0.135, "big": 0.205}  # radius in frame sides: 17 and 26 of 64 pixels across
# groups that do this stand one above the other
SIDEWAYS = tuple("slide roll zigzag chase push pull hit eat".split())


class Thing(NamedTuple):
    """What one noun phrase speaks of."""

    count: int
    size: str | None  # None for groups, and for things that change their size
    colour: str
    kind: str


class Event(NamedTuple):
    action: str
    subject: Thing
    object: Thing | None = None


Scene = tuple[Event, ...]  # one event, or two of them in a double scene (left, right)

# ---- 1. shapes -----------------------------------------------------------------------------------
# Outlines in a box of about [-1, 1]², y down. A kind is a list of layers with ";" between them. A
# layer is the body or the mark (which shows a ball's spin), and outlines with "|" between them. An
# outline within another of its layer is a hole. "+" joins two pieces of an outline.
#
#     line  x y x y …        box  x0 y0 x1 y1        arc  x y rx ry [from to, degrees]

LAYERS = {
    "ball": "body arc 0 0 1 1; mark arc 0 0 1 1 -50 50",
    "star": "body star",
    "heart": "body heart",
    "moon": "body arc 0 0 1 1 50 310 + arc .45 0 .8 .8 285 75",
    "ring": "body arc 0 .2 .85 .85 | arc 0 .2 .48 .48; mark box -.35 -1.1 .35 -.5",
    "cross": "body line -.3 -1 .3 -1 .3 -.3 1 -.3 1 .3 .3 .3 "
    ".3 1 -.3 1 -.3 .3 -1 .3 -1 -.3 -.3 -.3",
    "tree": "mark box -.18 .5 .18 1;"
    "body line 0 -1.1 .55 -.3 .3 -.3 .85 .55 -.85 .55 -.3 -.3 -.55 -.3",
    "house": "body line 0 -1 1 -.2 .75 -.2 .75 .9 -.75 .9 -.75 -.2 -1 -.2;mark box -.25 .2 .25 .9",
    "fish": "body arc .25 0 .85 .58; body line -.4 0 -1.1 -.65 -.9 0 -1.1 .65;"
    "mark arc .7 -.15 .14 .14",
    "car": "body line -1.1 .45 -1.1 -.05 -.65 -.15 -.4 -.65 .35 -.65 .65 -.15 1.1 0 1.1 .45;"
    "mark arc -.6 .5 .3 .3; mark arc .6 .5 .3 .3",
    "key": "body arc -.65 0 .55 .55 | arc -.65 0 .25 .25;"
    "body line -.15 -.15 1.2 -.15 1.2 .6 .92 .6 .92 .15 .7 .15 .7 .5 .45 .5 .45 .15 -.15 .15",
    "cup": "body line -.95 -.8 .5 -.8 .35 .85 -.8 .85;"
    "body arc .55 -.15 .52 .5 -90 90 + arc .5 -.15 .27 .25 90 -90; mark arc -.22 -.8 .72 .17",
    "flower": "body petals; mark arc 0 0 .34 .34",
    "umbrella": "body arc 0 .1 1.1 1.05 180 360;mark box -.09 .1 .09 .85 | box -.45 .78 .09 .95",
    "boat": "body line -1.1 .4 1.1 .4 .7 .95 -.7 .95; body line .05 -1.1 .95 .22 .05 .22;"
    "mark box -.13 -1.1 .05 .4",
    "crown": "body line -1 .75 -1.1 -.7 -.5 0 0 -.95 .5 0 1.1 -.7 1 .75;mark box -.98 .4 .98 .62",
}
KINDS = tuple(LAYERS)


def line(*numbers: float) -> list:
    return list(zip(numbers[::2], numbers[1::2]))


def box(x0: float, y0: float, x1: float, y1: float) -> list:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def arc(x: float, y: float, rx: float, ry: float, start: float = 0, end: float = 360) -> list:
    angles = np.radians(np.linspace(start, end, 20))
    return list(zip(x + rx * np.cos(angles), y + ry * np.sin(angles)))


def star() -> list:
    radii = [1, 0.42] * 5
    return [(r * np.sin(i * np.pi / 5), -r * np.cos(i * np.pi / 5)) for i, r in enumerate(radii)]


def heart() -> list:
    t = np.linspace(0, 2 * np.pi, 32)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return list(zip(np.sin(t) ** 3, -y / 16))


def petals() -> list:
    angles = np.linspace(-np.pi / 2, 1.5 * np.pi, 48, endpoint=False)
    radius = 0.38 + (1.0 - 0.38) * np.abs(np.cos(6 * (angles + np.pi / 2) / 2))
    return list(zip(radius * np.cos(angles), radius * np.sin(angles)))


PIECES = {piece.__name__: piece for piece in (line, box, arc, star, heart, petals)}
PARTS = ("body", "mark")
Layer = tuple[list, int]  # outlines, and which of the kind's two colours they have


def read_layer(text: str) -> Layer:
    """A layer of the table above."""
    part, _, rest = text.strip().partition(" ")
    outlines = []
    for outline in rest.split("|"):
        points = []
        for piece in outline.split("+"):
            name, *numbers = piece.split()
            points += PIECES[name](*map(float, numbers))
        outlines.append(points)
    return outlines, PARTS.index(part)


def fit(layers: list[Layer]) -> list[Layer]:
    """Centre a kind, and scale it to the same area as all others: "big" means the same for each."""
    points = []
    for outlines, _ in layers:
        points += sum(outlines, [])
    low, high = np.min(points, axis=0), np.max(points, axis=0)
    width, height = high - low
    scale = min(2 / np.sqrt(width * height), 2.4 / max(width, height))

    fitted = []
    for outlines, part in layers:
        fitted.append(([(np.array(o) - (low + high) / 2) * scale for o in outlines], part))
    return fitted


SHAPES = {kind: fit(list(map(read_layer, text.split(";")))) for kind, text in LAYERS.items()}

# ---- 2. motion -----------------------------------------------------------------------------------
# Tracks [FRAMES, 5] = (x, y, scale, angle in radians, alpha); x, y in frame sides. All that moves
# sideways goes from left to right: `render` mirrors half of the scenes.


def make_track(x, y, scale=1.0, angle=0.0, alpha=1.0) -> np.ndarray:
    columns = [np.broadcast_to(column, FRAMES) for column in (x, y, scale, angle, alpha)]
    return np.stack(columns, axis=1)


def single_track(action: str, x: float, rng: np.random.Generator) -> np.ndarray:
    """The track of an intransitive action around the column `x` of the frame (0.5: the middle)."""
    u = np.linspace(0, 1, FRAMES)
    y = 0.5 + rng.uniform(-0.06, 0.06)
    turn = rng.uniform(0.8, 1.2)
    wave = 2 * np.pi * u
    across = x - 0.28 + 0.56 * u

    match action:
        case "spin":
            return make_track(x, y, angle=wave * turn)
        case "bounce":
            return make_track(x, 0.75 - 0.5 * np.abs(np.sin(wave * turn)))
        case "grow":
            return make_track(x, y, scale=0.3 + 0.9 * u)
        case "shrink":
            return make_track(x, y, scale=1.2 - 0.9 * u)
        case "blink":  # three frames on, three off: seen in 8 and in 4 sampled frames
            return make_track(x, y, alpha=(np.arange(FRAMES) + rng.integers(6)) // 3 % 2)
        case "shake":
            side = np.where(np.arange(FRAMES) % 2, 1, -1) * rng.choice([-1, 1], FRAMES)
            height = y + rng.uniform(-0.03, 0.03, FRAMES)
            return make_track(x + 0.06 * side, height, angle=0.35 * rng.choice([-1, 1], FRAMES))

        case "slide":
            return make_track(across, y)
        case "roll":
            return make_track(across, y, angle=wave * turn)
        case "zigzag":
            return make_track(across, y + 0.16 * (2 / np.pi) * np.arcsin(np.sin(2 * wave * turn)))

        case "rise":
            return make_track(x, 0.8 - 0.6 * u)
        case "fall":
            return make_track(x, 0.2 + 0.6 * u**1.5)
        case "fade":
            return make_track(x, y, alpha=np.clip(1.1 - 1.2 * u, 0, 1))
        case "swing":  # a pendulum below its pivot
            angle = 0.85 * np.sin(1.25 * wave * turn + rng.uniform(0, np.pi))
            return make_track(x - 0.3 * np.sin(angle), y - 0.25 + 0.3 * np.cos(angle), angle=angle)


def relation_tracks(action: str, r1: float, r2: float, rng: np.random.Generator) -> tuple:
    """The tracks of subject and object of a relation; r1, r2 are their radii."""
    u = np.linspace(0, 1, FRAMES)
    y = 0.5 + rng.uniform(-0.08, 0.08)
    touch = 0.9 * (r1 + r2)

    match action:
        case "chase":  # the same wavy path, the chaser behind and closing in
            x1, x2 = 0.08 + 0.55 * u, 0.50 + 0.42 * u
            first = make_track(x1, y + 0.13 * np.sin(9 * x1))
            return first, make_track(x2, y + 0.13 * np.sin(9 * x2))
        case "push":
            x1 = 0.05 + (0.93 - r2 - touch - 0.05) * u
            return make_track(x1, y), make_track(np.maximum(x1 + touch, 0.48), y)
        case "pull":  # a rope between them, drawn by `render`
            x1 = 0.55 + 0.37 * u
            return make_track(x1, y), make_track(x1 - touch - 0.14, y)

        case "orbit":
            angle = 2 * np.pi * (rng.uniform() + 1.1 * u)
            radius = min(0.9 * touch + 0.08, 0.47 - r1 / 2)
            first = make_track(0.5 + radius * np.cos(angle), 0.5 + radius * np.sin(angle))
            return first, make_track(0.5, 0.5)
        case "pass":
            lane = 0.19 * rng.choice([-1, 1])
            return make_track(0.1 + 0.8 * u, 0.5 + lane), make_track(0.4 + 0.2 * u, 0.5 - lane)

        case "hit":  # one stops dead, the other flies off
            at, meet = 0.58 - touch, 0.4
            after = np.clip((u - meet) / (1 - meet), 0, 1)
            first = make_track(np.minimum((at + 0.05) * u / meet - 0.05, at), y)
            height = y - rng.choice([-1, 1]) * 0.3 * after
            return first, make_track(0.58 + 0.38 * after, height, angle=4 * after)
        case "eat":
            x1 = 0.08 + 0.57 * np.minimum(u / 0.8, 1)
            return make_track(x1, y), make_track(0.65, y, scale=np.clip((0.65 - x1) / touch, 0, 1))

        case "raise":
            x = 0.5 + rng.uniform(-0.1, 0.1)
            y1 = 0.9 - (0.9 - 0.12 - r2 - touch) * u
            return make_track(x, y1), make_track(x, np.minimum(y1 - touch, 0.5))
        case "drop":
            x, y1 = 0.5 + rng.uniform(-0.1, 0.1), 0.05 + r1
            x1 = x - 0.1 + 0.2 * np.minimum(u / 0.35, 1)
            depth = (0.95 - r2 - y1 - touch) * np.clip((u - 0.35) / 0.5, 0, 1) ** 1.5
            return make_track(x1, y1), make_track(x1, y1 + touch + depth)


# ---- 3. pixels -----------------------------------------------------------------------------------


def render(scene: Scene, seed: tuple[int, ...]) -> np.ndarray:
    """The video of a scene, uint8 [FRAMES, SIDE, SIDE, 3] RGB.

    `seed` decides on all that the scene leaves open.
    """
    rng = np.random.default_rng(seed)
    actors = place_actors(scene, rng)
    backdrop, blobs, margin = make_backdrop(rng)
    drift, jitter = rng.uniform(-1, 1, 2), rng.uniform(-0.008, 0.008, (FRAMES, 2))
    light = 1 + 0.07 * np.cumsum(rng.normal(0, 0.4, FRAMES)).clip(-1, 1)
    noise = rng.normal(0, rng.uniform(2, 7), (FRAMES, SIDE, SIDE, 1)).astype(np.float32)

    video = np.empty((FRAMES, SIDE, SIDE, 3), np.uint8)
    for t in range(FRAMES):
        left, top = np.round(margin + drift * t - jitter[t] * SIDE).astype(int)
        frame = backdrop[top : top + SIDE, left : left + SIDE].copy()
        for centre, speed, axes, tilt, colour in blobs:
            at = fixed_point(centre + speed * t)
            axes = (axes * 16).tolist()
            cv2.ellipse(frame, at, axes, tilt, 0, 360, colour, -1, cv2.LINE_AA, 4)

        states = [track[t] + (*jitter[t], 0, 0, 0) for _, track in actors]
        if scene[0].action == "pull":  # the rope, from the subject (last) to the object (first)
            ends = [fixed_point(state[:2] * SIDE) for state in (states[0], states[-1])]
            cv2.line(frame, *ends, (215, 200, 170), 3, cv2.LINE_AA, 4)
        for (thing, _), state in zip(actors, states):
            draw(frame, thing, state)
        video[t] = np.clip(frame * light[t] + noise[t], 0, 255)

    return video[:, :, ::-1] if rng.integers(2) else video


def place_actors(scene: Scene, rng: np.random.Generator) -> list[tuple[Thing, np.ndarray]]:
    """Each thing of a scene, and its track [FRAMES, 5].

    The object of a relation comes first, so that the subject covers it.
    """
    actors = []
    for i, (action, subject, other) in enumerate(scene):
        if other is None:
            x = 0.5 + rng.uniform(-0.05, 0.05) if len(scene) == 1 else (0.26, 0.74)[i]
            parts = [(subject, single_track(action, x, rng))]
        else:
            first, second = relation_tracks(action, radius_of(subject), radius_of(other), rng)
            parts = [(other, second), (subject, first)]

        for thing, track in parts:
            for x, y in places(thing, action in SIDEWAYS):
                actors.append((thing, track + (x, y, 0, 0, 0)))
    return actors


def places(group: Thing, spread_down: bool) -> np.ndarray:
    """Offsets [count, 2] of the members of a group from its centre."""
    radius = radius_of(group)
    if group.count == 1:
        return np.zeros((1, 2))
    if group.count == 2:
        return np.array([(0, -1), (0, 1)] if spread_down else [(-1, 0), (1, 0)]) * 1.35 * radius
    return np.array([(-1.2, 1), (1.2, 1), (0, -1)]) * radius


def radius_of(thing: Thing) -> float:
    if thing.size:
        return SIZES[thing.size]
    return 0.17 if thing.count == 1 else 0.13


def make_backdrop(rng: np.random.Generator) -> tuple[np.ndarray, list, int]:
    """(a textured gradient with a margin; blobs that drift over it; the margin in pixels)."""
    margin = 24
    big = SIDE + 2 * margin
    base, end = muted_colour(rng), muted_colour(rng)
    ramp = base + np.linspace(0, 1, big)[:, None, None] * (end - base)
    if rng.integers(2):
        ramp = ramp.transpose(1, 0, 2)
    grain = rng.normal(0, 9, (10, 10, 3)).astype(np.float32)
    grain = cv2.resize(grain, (big, big), interpolation=cv2.INTER_CUBIC)

    blobs = []
    for _ in range(rng.integers(2, 5)):
        centre, speed = rng.uniform(0, SIDE, 2), rng.uniform(-1.5, 1.5, 2)
        axes, tilt = rng.integers(5, 12, 2), rng.uniform(0, 180)
        colour = np.clip(base + rng.uniform(-28, 28, 3), 50, 160).tolist()
        blobs.append((centre, speed, axes, tilt, colour))
    return np.clip(ramp + grain, 0, 255).astype(np.uint8), blobs, margin


def muted_colour(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(75, 130) + rng.uniform(-22, 22, 3)


def fixed_point(pixels: np.ndarray) -> list:
    """OpenCV's fixed point: 4 fractional bits."""
    return np.round(pixels * 16).astype(np.int32).tolist()


def draw(canvas: np.ndarray, thing: Thing, state: np.ndarray) -> None:
    """Draw a thing onto `canvas` [SIDE, SIDE, 3] uint8; state: (x, y, scale, angle, alpha)."""
    x, y, scale, angle, alpha = state
    radius = radius_of(thing)
    if alpha <= 0 or scale * radius < 0.01:
        return
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]]) * scale * radius

    target = canvas if alpha >= 1 else canvas.copy()
    for outlines, part in SHAPES[thing.kind]:
        points = []
        for outline in outlines:
            # [n, 2]; the centre of pixel 0 is at half a pixel
            corners = (outline @ turn + (x, y)) * SIDE - 0.5
            points.append(np.array(fixed_point(corners), np.int32))
        cv2.fillPoly(target, points, COLOURS[thing.colour][part], lineType=cv2.LINE_AA, shift=4)
    if alpha < 1:
        cv2.addWeighted(target, alpha, canvas, 1 - alpha, 0, dst=canvas)
