"""videos/: a cache that survives what happens to disks, and files that hang or kill the decoder."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import cv2
import numpy as np
import pytest
from test_video import clip, numbered_frames, numbers  # noqa: F401 (clip: a fixture)

from cli import UserError
from videos import cache as framecache
from videos import workers as guarded
from videos.cache import FrameCache
from videos.decode import VideoError, frame_indices, read_frames, write_video

ROOT = Path(__file__).parent.parent


@pytest.fixture
def clips(tmp_path, clip):
    """Six videos; the third is called trouble.mp4."""
    paths = [str(tmp_path / f"{name}.mp4") for name in ("a", "b", "trouble", "d", "e", "f")]
    for path in paths:
        Path(path).write_bytes(clip.read_bytes())
    return paths


def make_cache(tmp_path, size=16, num_frames=4, **kwargs):
    return FrameCache(tmp_path / "cache", size=size, num_frames=num_frames, **kwargs)


def entries(cache):
    return list(cache.folder.glob("*/*"))


# ---- the cache -----------------------------------------------------------------------------------


def test_an_entry_depends_on_all_that_the_pixels_do(tmp_path, clips):
    path, cache = clips[0], make_cache(tmp_path, 64, 10)
    for window in ((0.0, None), (1.0, None), (0.0, 2.0), (0, None)):
        cache.get(Path(path), *window)
    for other in (make_cache(tmp_path, 32, 10), make_cache(tmp_path, 64, 12)):
        other.get(path)
    cache.get(clips[1])
    assert len(entries(cache)) == 6

    write_video(path, numbered_frames(20))  # edited
    assert numbers(cache.get(path)) == frame_indices(20, 10).tolist()


def test_damaged_entries_are_decoded_again_and_said_once(tmp_path, clip, capsys):
    cache = make_cache(tmp_path)
    whole = cache.get(clip)
    (entry,) = entries(cache)
    data = entry.read_bytes()
    for damaged in (data[:-1] + bytes([data[-1] ^ 1]), data[:100], b"", data + b"0"):
        entry.write_bytes(damaged)
        np.testing.assert_array_equal(cache.get(clip), whole)
        assert entry.read_bytes() == data
    assert cache.damaged == 4 and capsys.readouterr().err.count(": damaged, so") == 1


def test_fill_decodes_once_and_reports_broken_videos(tmp_path, clips, capfd, monkeypatch):
    (tmp_path / "text.mp4").write_text("hello")
    bad = [str(tmp_path / "text.mp4"), str(tmp_path / "missing.mp4")]
    cache = make_cache(tmp_path, 64, 10)
    broken = cache.fill(clips[:3] + bad + clips[3:], workers=2)
    assert list(broken) == bad and "no such video" in broken[bad[1]]
    assert "6 videos × 10 frames of 64 px (6 new, 2 broken)" in capfd.readouterr().out
    assert len(entries(cache)) == 6

    monkeypatch.setattr(framecache, "read_frames", None)
    assert make_cache(tmp_path, 64, 10).fill(clips, progress=False) == {}
    assert numbers(cache.get(clips[0])) == frame_indices(100, 10).tolist()


def test_a_full_disk_leaves_nothing_half(tmp_path, clip, monkeypatch):
    def write_half(path, data):
        with open(path, "wb") as file:
            file.write(data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = make_cache(tmp_path)
    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(UserError, match="cannot be written .No space left on device"):
        cache.fill([str(clip)], progress=False)  # from the process that decodes
    assert not entries(cache)


def test_a_path_that_no_disk_can_hold(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot hold the frame cache"):
        make_cache(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe.mp4")  # reading it would wait for ever
    for path in ("nul\0byte.mp4", "x" * 5000 + ".mp4", "half\ud800pair.mp4", tmp_path / "pipe.mp4"):
        with pytest.raises(VideoError):
            make_cache(tmp_path).get(path)


def test_many_writers_at_once(tmp_path, clip):
    cache = make_cache(tmp_path, 64, 8)
    with ProcessPoolExecutor(4) as pool:
        results = list(pool.map(cache.get, [clip] * 16))
    for result in (*results, cache.get(clip)):
        assert numbers(result) == frame_indices(100, 8).tolist()
    assert len(entries(cache)) == 1 and cache.damaged == 0


def test_still_pictures_are_kept_once(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "picture.png"), picture)
    # data sets of pictures name them by a hash
    (tmp_path / "4027").write_bytes(cv2.imencode(".jpg", picture)[1])
    write_video(tmp_path / "still.mp4", np.full((9, 20, 30, 3), 60, np.uint8))
    cache = make_cache(tmp_path)
    for name in ("picture.png", "4027", "still.mp4"):
        for _ in range(2):
            expected = read_frames(tmp_path / name, 4, size=16)
            np.testing.assert_array_equal(cache.get(tmp_path / name), expected)
    assert [entry.stat().st_size for entry in entries(cache)] == [20 + 16 * 16 * 3] * 3


def test_what_was_written_first_makes_room(tmp_path, clips):
    entry = 20 + 4 * 16 * 16 * 3
    cache = make_cache(tmp_path, gigabytes=3.5 * entry / 1e9)
    cache.fill(clips, workers=1, progress=False)
    assert [cache.has(path, 0.0, None) for path in clips] == [False] * 3 + [True] * 3


def test_what_cannot_fit_is_not_begun(tmp_path, clip, capsys):
    """Videos × frames × size against the free disk; a picture is one frame."""
    picture = tmp_path / "p.jpg"
    cv2.imwrite(str(picture), np.zeros((8, 8, 3), np.uint8))
    paths = [str(clip), str(picture), str(tmp_path / "gone.mp4")]
    make_cache(tmp_path, size=1000).fill(paths, workers=1)
    assert "2 new videos × 4 frames of 1000 px take about 15 MB, and " in capsys.readouterr().out
    with pytest.raises(UserError, match="MB are free; take a larger disk .--cache."):
        make_cache(tmp_path, size=1000, num_frames=10**9).fill(paths, workers=1)


# ---- files that hang or kill the decoder ---------------------------------------------------------


@pytest.fixture
def fill(tmp_path, clips, monkeypatch):
    """fill(trouble) -> the reasons why trouble.mp4 is broken, if trouble() comes before it."""

    def fill(trouble):
        def read(path, *args, **kwargs):
            if path.endswith("trouble.mp4"):
                trouble()
            return read_frames(path, *args, **kwargs)

        others = set(multiprocessing.active_children())  # of other tests
        monkeypatch.setattr(framecache, "read_frames", read)
        cache = make_cache(tmp_path)
        broken = cache.fill(clips, workers=2, progress=False)
        assert set(multiprocessing.active_children()) <= others
        assert len(entries(cache)) == 6 - len(broken) and set(broken) <= {clips[2]}
        return list(broken.values())

    return fill


def test_a_video_that_hangs_the_decoder(fill, clips, monkeypatch):
    """A larger file has a second more for each megabyte."""
    monkeypatch.setattr(guarded, "PATIENCE", 1.0)
    with open(clips[2], "ab") as file:
        file.truncate(1_000_000)
    (reason,) = fill(lambda: time.sleep(3600))
    assert "trouble.mp4: the decoder gave no frames within 2 s and was stopped" in reason


@pytest.mark.parametrize("deaths", [1, 3])
def test_a_worker_that_is_killed(fill, tmp_path, deaths):
    """Once, among others, may be bad luck, and nothing is lost; then twice alone is the video."""

    def die():
        died = len(list(tmp_path.glob("death-*")))
        if died < deaths:
            (tmp_path / f"death-{died}").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    reasons = fill(die)
    assert len(reasons) == deaths // 3
    assert all("trouble.mp4: the decoder died twice (exit code -9" in why for why in reasons)


def three_arrays(n: int) -> list[np.ndarray]:
    return [np.full(n, 1, np.uint8), np.arange(n)[::2], np.full((2, n), 2.0).T]


@pytest.mark.parametrize("start", ["fork", "spawn"])  # as on Linux, and elsewhere
def test_arrays_of_any_size_come_back_from_a_worker(start, monkeypatch):
    """Small ones, what the shared memory cannot hold, and views; the next answer changes none."""
    monkeypatch.setattr(guarded, "CONTEXT", multiprocessing.get_context(start))
    sizes = [5, 0, guarded.ROOM // 8, guarded.ROOM + 1, *range(7, 20)]
    with guarded.guard(three_arrays, 1) as work:
        answers = work(sizes)
    for n, answer in zip(sizes, answers):
        for found, expected in zip(answer, three_arrays(n), strict=True):
            np.testing.assert_array_equal(found, expected)


def die_while_sending(job: str) -> None:
    def half(pipe, data):
        os.write(pipe.fileno(), data[:2])
        os.kill(os.getpid(), signal.SIGKILL)

    Connection._send = half


def test_a_worker_that_dies_in_the_middle_of_its_answer_is_replaced():
    with guarded.guard(die_while_sending, 1) as work:
        (error,) = work(["a.mp4"])
    assert "a.mp4: the decoder died twice (exit code -9" in str(error)


SLOW = """
import os, sys, time
from videos import cache
def slow(*args, **kwargs):
    open(f"pid-{os.getpid()}", "w")
    time.sleep(1)
cache.read_frames = slow
cache.FrameCache("cache", size=16, num_frames=4).fill(sys.argv[1:], workers=3)
"""


def test_workers_end_with_a_killed_parent(clips, tmp_path):
    command, env = [sys.executable, "-c", SLOW, *clips], dict(os.environ, PYTHONPATH=str(ROOT))
    parent = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.DEVNULL)
    pids = []
    while len(pids) < 3 and parent.poll() is None:
        pids = [path.name[4:] for path in tmp_path.glob("pid-*")]
    parent.kill()
    parent.wait()

    def is_running(pid):
        command = Path(f"/proc/{pid}/cmdline")
        return command.is_file() and command.read_bytes()

    deadline = time.monotonic() + 30
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, f"of {pids} some still run"
        time.sleep(0.05)
    assert len(pids) == 3
