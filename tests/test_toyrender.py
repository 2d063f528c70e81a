"""The pixels of the toy world: kinds and actions that can be told apart at the resolution that
training sees.
"""

import itertools

import cv2
import numpy as np
import pytest

from datasets import toyrender
from datasets.toyrender import (
    FRAMES,
    KINDS,
    RELATIONS,
    SIDE,
    SINGLE_ACTIONS,
    Event,
    Thing,
    relation_tracks,
    render,
    single_track,
)

STAR, FISH = Thing(1, "big", "red", "star"), Thing(1, "small", "blue", "fish")


def _silhouette(kind: str) -> np.ndarray:
    canvas = np.zeros((SIDE, SIDE, 3), np.uint8)
    toyrender.draw(canvas, Thing(1, "big", "white", kind), 0.18, np.array([0.5, 0.5, 1, 0, 1]))
    small = cv2.resize(canvas, (32, 32), interpolation=cv2.INTER_AREA)
    return small.max(axis=2) > 127


def test_kinds_have_different_silhouettes_at_32_pixels():
    masks = {kind: _silhouette(kind) for kind in KINDS}
    assert len(KINDS) >= 12
    for kind, mask in masks.items():
        assert 30 <= mask.sum() <= 32 * 32 / 7, (kind, mask.sum())
    overlap = {
        (a, b): (masks[a] & masks[b]).sum() / (masks[a] | masks[b]).sum()
        for a, b in itertools.combinations(KINDS, 2)
    }
    worst = max(overlap, key=overlap.get)
    assert overlap[worst] < 0.7, (worst, overlap[worst])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_shows_its_spin(kind):
    """45° (one sampled frame of a spin) changes the picture by more than camera noise does."""
    pictures = []
    for angle in (0, np.pi / 4):
        canvas = np.full((SIDE, SIDE, 3), 100, np.uint8)
        toyrender.draw(
            canvas, Thing(1, "small", "red", kind), 0.115, np.array([0.5, 0.5, 1, angle, 1])
        )
        pictures.append(cv2.resize(canvas, (32, 32), interpolation=cv2.INTER_AREA).astype(int))
    changed = (np.abs(pictures[0] - pictures[1]).max(axis=2) > 40).sum()
    assert changed >= 6, changed


def test_render_is_a_function_of_scene_and_seed():
    scene = (Event("chase", STAR, FISH),)
    video = render(scene, (0, 1))
    assert video.shape == (FRAMES, SIDE, SIDE, 3) and video.dtype == np.uint8
    assert (video == render(scene, (0, 1))).all()
    assert (video != render(scene, (0, 2))).mean() > 0.5


@pytest.mark.parametrize("action", SINGLE_ACTIONS + RELATIONS)
def test_every_action_moves_and_stays_in_view(action):
    for seed in range(4):
        rng = np.random.default_rng(seed)
        tracks = (
            [single_track(action, 0.5, rng)]
            if action in SINGLE_ACTIONS
            else relation_tracks(action, 0.18, 0.115, rng)
        )
        for track in tracks:
            assert track.shape == (FRAMES, 5) and np.isfinite(track).all()
            inside = ((track[:, :2] > 0) & (track[:, :2] < 1)).all(axis=1)
            assert inside.mean() >= 0.8, (action, track[:, :2])
        assert max(np.ptp(track, axis=0).max() for track in tracks) > 0.1


def _relation(action: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return relation_tracks(action, 0.15, 0.15, np.random.default_rng(seed))


def test_roles_show_in_the_motion():
    """Each relation has a property of the two paths that is false when the roles are changed."""
    first, last = 0, FRAMES - 1
    X, Y, SCALE = 0, 1, 2

    s, o = _relation("chase")
    assert (s[:, X] < o[:, X]).all() and np.ptp(s[:, X]) > np.ptp(o[:, X])  # behind, and closing in
    s, o = _relation("push")
    assert (
        (s[:, X] < o[:, X]).all() and o[1, X] == o[0, X] and np.ptp(o[:, X]) > 0.1
    )  # waits until it is touched
    s, o = _relation("pull")
    assert (s[:, X] > o[:, X]).all() and np.allclose(np.diff(s[:, X]), np.diff(o[:, X]))
    s, o = _relation("orbit")
    turned = np.unwrap(np.arctan2(*(s - o)[:, [Y, X]].T))
    assert (
        np.ptp(turned) > 2 * np.pi and np.ptp(o) == 1
    )  # all columns of o are constant: 0.5, 0.5, 1, 0, 1
    s, o = _relation("pass")
    assert s[first, X] < o[first, X] and s[last, X] > o[last, X] and s[last, X] > s[first, X]
    s, o = _relation("hit")
    assert (
        np.ptp(o[:6, X]) == 0 and np.ptp(s[8:, X]) == 0 and o[last, X] > o[first, X] + 0.2
    )  # stops; flies off
    s, o = _relation("eat")
    assert o[first, SCALE] == 1 and np.isclose(o[last, SCALE], 0) and (s[:, SCALE] == 1).all()
    s, o = _relation("raise")
    assert (s[:, Y] > o[:, Y]).all() and o[last, Y] < o[first, Y] - 0.2
    s, o = _relation("drop")
    assert (s[:, Y] < o[:, Y]).all() and np.ptp(s[:, Y]) == 0 and o[last, Y] > o[first, Y] + 0.2


def test_scenes_are_mirrored_half_of_the_time():
    """The chaser is left of the chased in about half of the videos: a side says nothing about the
    roles.
    """
    left = []
    for seed in range(24):
        video = render(
            (Event("chase", STAR._replace(colour="white"), FISH._replace(colour="black")),), (seed,)
        )
        light = video[4].astype(int).min(axis=2)
        white, black = (
            np.argwhere(mask)[:, 1].mean() for mask in (light > 200, video[4].max(axis=2) < 35)
        )
        left.append(white < black)
    assert 5 <= sum(left) <= 19, left


def test_count_is_the_number_of_things_drawn():
    for count in (1, 2, 3):
        video = render((Event("spin", Thing(count, None, "white", "heart")),), (count,))
        bright = (video[0].min(axis=2) > 170).astype(np.uint8)
        _, _, stats, _ = cv2.connectedComponentsWithStats(bright)
        assert (stats[1:, cv2.CC_STAT_AREA] > 20).sum() == count
