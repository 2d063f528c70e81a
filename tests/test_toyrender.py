"""The pixels of the toy world: kinds and actions that can be told apart at the resolution that
training sees.
"""

import itertools

import cv2
import numpy as np
import pytest

from datasets import toyrender
from datasets.toyrender import FRAMES, KINDS, SIDE, Event, Thing, render
from datasets.toyworld import RELATION, SINGLE

STAR, FISH = Thing(1, "big", "white", "star"), Thing(1, "small", "black", "fish")


def picture(thing: Thing, backdrop: int, angle: float = 0) -> np.ndarray:
    """The thing in the middle, as training sees it: [32, 32, 3]."""
    canvas = np.full((SIDE, SIDE, 3), backdrop, np.uint8)
    toyrender.draw(canvas, thing, np.array([0.5, 0.5, 0.85, angle, 1]))
    return cv2.resize(canvas, (32, 32), interpolation=cv2.INTER_AREA).astype(int)


def test_kinds_have_different_silhouettes_at_32_pixels():
    masks = [picture(Thing(1, "big", "white", kind), 0).max(axis=2) > 127 for kind in KINDS]
    for kind, mask in zip(KINDS, masks):
        assert 30 <= mask.sum() <= 32 * 32 / 7, (kind, mask.sum())
    overlaps = [(a & b).sum() / (a | b).sum() for a, b in itertools.combinations(masks, 2)]
    assert len(KINDS) >= 12 and max(overlaps) < 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_shows_its_spin(kind):
    """45° (one sampled frame of a spin) changes the picture by more than camera noise does."""
    before, after = [picture(Thing(1, "small", "red", kind), 100, a) for a in (0, np.pi / 4)]
    assert (np.abs(before - after).max(axis=2) > 40).sum() >= 6


def tracks(action: str, seed: int = 0) -> list[np.ndarray]:
    """Of its one thing, or of subject and object: [FRAMES, 5] each."""
    rng = np.random.default_rng(seed)
    if action in SINGLE:
        return [toyrender.single_track(action, 0.5, rng)]
    return list(toyrender.relation_tracks(action, 0.15, 0.15, rng))


@pytest.mark.parametrize("action", [*SINGLE, *RELATION])
def test_every_action_moves_and_stays_in_view(action):
    for seed in range(4):
        found = np.stack(tracks(action, seed))
        assert found.shape[1:] == (FRAMES, 5) and np.isfinite(found).all()
        inside = ((found[..., :2] > 0) & (found[..., :2] < 1)).all(axis=2)
        assert inside.mean(axis=1).min() >= 0.8
        assert np.ptp(found, axis=1).max() > 0.1


def test_roles_show_in_the_motion():
    """Each relation has a property of the two paths that is false when the roles are changed."""
    first, last = 0, FRAMES - 1
    X, Y, SCALE = 0, 1, 2

    s, o = tracks("chase")  # behind, and closing in
    assert (s[:, X] < o[:, X]).all() and np.ptp(s[:, X]) > np.ptp(o[:, X])
    s, o = tracks("push")  # the pushed waits until it is touched
    assert (s[:, X] < o[:, X]).all() and o[1, X] == o[0, X] and np.ptp(o[:, X]) > 0.1
    s, o = tracks("pull")
    assert (s[:, X] > o[:, X]).all() and np.allclose(np.diff(s[:, X]), np.diff(o[:, X]))
    s, o = tracks("orbit")  # round what stands: its columns are 0.5, 0.5, 1, 0, 1
    turned = np.unwrap(np.arctan2(*(s - o)[:, [Y, X]].T))
    assert np.ptp(turned) > 2 * np.pi and np.ptp(o) == 1
    s, o = tracks("pass")
    assert s[first, X] < o[first, X] and s[last, X] > o[last, X] and s[last, X] > s[first, X]
    s, o = tracks("hit")  # one stops, the other flies off
    assert np.ptp(o[:6, X]) == 0 and np.ptp(s[8:, X]) == 0 and o[last, X] > o[first, X] + 0.2
    s, o = tracks("eat")
    assert o[first, SCALE] == 1 and np.isclose(o[last, SCALE], 0) and (s[:, SCALE] == 1).all()
    s, o = tracks("raise")
    assert (s[:, Y] > o[:, Y]).all() and o[last, Y] < o[first, Y] - 0.2
    s, o = tracks("drop")
    assert (s[:, Y] < o[:, Y]).all() and np.ptp(s[:, Y]) == 0 and o[last, Y] > o[first, Y] + 0.2


def test_scenes_are_mirrored_half_of_the_time():
    """The chaser is left of the chased in half of the videos: a side does not tell the roles."""
    on_left = 0
    for seed in range(24):
        frame = render((Event("chase", STAR, FISH),), (seed,))[4].astype(int)
        white, black = frame.min(axis=2) > 200, frame.max(axis=2) < 35
        on_left += np.argwhere(white)[:, 1].mean() < np.argwhere(black)[:, 1].mean()
    assert 5 <= on_left <= 19


def test_count_is_the_number_of_things_drawn():
    for count in (1, 2, 3):
        video = render((Event("spin", Thing(count, None, "white", "heart")),), (count,))
        bright = (video[0].min(axis=2) > 170).astype(np.uint8)
        _, _, stats, _ = cv2.connectedComponentsWithStats(bright)
        assert (stats[1:, cv2.CC_STAT_AREA] > 20).sum() == count
