"""videos/: a cache that survives what happens to disks, and files that hang or kill the decoder."""

import concurrent.futures
import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
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


# ---- the cache -----------------------------------------------------------------------------------


def the_entry(cache):
    (entry,) = cache.folder.glob("*/*.frames")
    return entry


def test_cache_decodes_once(tmp_path, clip, monkeypatch):
    cache = FrameCache(tmp_path / "cache", size=64, num_frames=10)
    first = cache.get(clip)
    assert numbers(first) == frame_indices(100, 10).tolist()
    monkeypatch.setattr(
        framecache, "read_frames", lambda *args, **kwargs: pytest.fail("decoded again")
    )
    np.testing.assert_array_equal(
        FrameCache(tmp_path / "cache", size=64, num_frames=10).get(clip), first
    )


def test_cache_entry_depends_on_all_that_the_pixels_do(tmp_path, clip):
    source = tmp_path / "copy.mp4"
    source.write_bytes(clip.read_bytes())
    cache = FrameCache(tmp_path / "cache", size=64, num_frames=10)
    entries = {
        cache.entry(source, 0.0, None),
        cache.entry(source, 1.0, None),
        cache.entry(source, 0.0, 2.0),
        cache.entry(clip, 0.0, None),
        FrameCache(cache.folder, size=32, num_frames=10).entry(source, 0.0, None),
        FrameCache(cache.folder, size=64, num_frames=12).entry(source, 0.0, None),
    }
    os.utime(source, ns=(1, 1))  # edited
    entries.add(cache.entry(source, 0.0, None))
    assert len(entries) == 7
    assert cache.entry(source, 0, None) == cache.entry(str(source), 0.0, None)
    write_video(source, numbered_frames(20))
    assert numbers(cache.get(source)) == frame_indices(20, 10).tolist()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data[:100],
        lambda data: b"",
        lambda data: b"XXXX" + data[4:],
        lambda data: data + b"0",
    ],
    ids=["bit", "cut", "empty", "magic", "longer"],
)
def test_damaged_entries_are_decoded_again_and_said_once(tmp_path, clip, capsys, damage):
    cache = FrameCache(tmp_path, size=64, num_frames=4)
    whole = cache.get(clip)
    for _ in range(2):
        entry = the_entry(cache)
        entry.write_bytes(damage(entry.read_bytes()))
        np.testing.assert_array_equal(cache.get(clip), whole)
    assert cache.damaged == 2 and capsys.readouterr().err.count(": damaged, so") == 1
    np.testing.assert_array_equal(cache.get(clip), whole)  # it was repaired
    assert cache.damaged == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_fill_reports_broken_videos_and_resumes(tmp_path, clip, capfd, monkeypatch, workers):
    good = []
    for i in range(20):
        good.append(str(tmp_path / f"{i}.mp4"))
        Path(good[-1]).write_bytes(clip.read_bytes())
    (tmp_path / "text.mp4").write_text("hello")
    bad = [str(tmp_path / "text.mp4"), str(tmp_path / "missing.mp4")]
    cache = FrameCache(tmp_path / "cache", size=16, num_frames=4)
    broken = cache.fill(good[:10] + bad + good[10:], workers=workers)
    assert list(broken) == bad and "no such video" in broken[bad[1]]
    assert "20 videos × 4 frames of 16 px (20 new, 2 broken)" in capfd.readouterr().out
    assert len(list(cache.folder.glob("*/*"))) == 20
    monkeypatch.setattr(
        framecache, "read_frames", lambda *args, **kwargs: pytest.fail("decoded again")
    )
    assert cache.fill(good, workers=workers, progress=False) == {}


def test_interrupted_writes_leave_nothing_half(tmp_path, clip, monkeypatch):
    cache = FrameCache(tmp_path, size=16, num_frames=4)
    disk_full = OSError(errno.ENOSPC, "No space left on device")
    for error, raised in [(KeyboardInterrupt(), KeyboardInterrupt), (disk_full, UserError)]:

        def write_half(path, data, error=error):
            with open(path, "wb") as file:
                file.write(data[:100])
            raise error

        monkeypatch.setattr(Path, "write_bytes", write_half)
        with pytest.raises(raised):
            cache.get(clip)
        if raised is UserError:
            with pytest.raises(UserError, match="cannot be written .No space left on device"):
                cache.fill([str(clip)], progress=False)  # from the process that decodes
        monkeypatch.undo()
        assert not list(tmp_path.glob("*/*"))
    assert cache.get(clip).shape == (4, 16, 16, 3)


def test_threads_that_read_start_no_process(tmp_path, clip, monkeypatch):
    """A fork out of a thread of a training run may wait for ever for a lock of another thread."""
    monkeypatch.setattr(framecache, "run_guarded", lambda *args, **kwargs: pytest.fail("a process"))
    assert FrameCache(tmp_path, size=16, num_frames=4).get(clip).shape == (4, 16, 16, 3)


def test_a_path_that_no_disk_can_hold(tmp_path):
    for path in ("nul\0byte.mp4", "x" * 5000 + ".mp4", "half\ud800pair.mp4"):
        with pytest.raises(VideoError):
            FrameCache(tmp_path, size=8, num_frames=2).get(path)


def test_many_writers_at_once(tmp_path, clip):
    cache = FrameCache(tmp_path, size=64, num_frames=8)
    with concurrent.futures.ProcessPoolExecutor(4) as pool:
        results = list(pool.map(cache.get, [clip] * 16))
    assert (
        all((result == results[0]).all() for result in results)
        and len(list(tmp_path.glob("*/*"))) == 1
    )
    np.testing.assert_array_equal(cache.get(clip), results[0])
    assert cache.damaged == 0


def test_still_pictures_are_kept_once(tmp_path, capsys):
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "picture.png"), picture)
    (tmp_path / "4027").write_bytes(
        cv2.imencode(".jpg", picture)[1]
    )  # data sets of pictures name them by a hash
    write_video(tmp_path / "still.mp4", np.full((9, 20, 30, 3), 60, np.uint8))
    paths = [str(tmp_path / name) for name in ("picture.png", "4027", "still.mp4")]
    cache = FrameCache(tmp_path / "cache", size=16, num_frames=5)
    for new in (3, 0):
        assert cache.fill(paths) == {}
        assert f"3 videos × 5 frames of 16 px ({new} new, 0 broken)" in capsys.readouterr().out
    for path in paths:
        assert cache.entry(path, 0.0, None).stat().st_size == 20 + 16 * 16 * 3 == 788
        np.testing.assert_array_equal(cache.get(path), read_frames(path, 5, size=16))


def test_what_was_written_first_makes_room(tmp_path, clips):
    entry = 20 + 4 * 16 * 16 * 3
    cache = FrameCache(tmp_path / "cache", size=16, num_frames=4, gigabytes=3.5 * entry / 1e9)
    cache.fill(clips, workers=1, progress=False)
    assert [cache.has(path, 0.0, None) for path in clips] == [False] * 3 + [True] * 3


# ---- faults --------------------------------------------------------------------------------------


@pytest.fixture
def clips(tmp_path, clip):
    """Six videos; the third is called trouble.mp4."""
    paths = [str(tmp_path / f"{name}.mp4") for name in ("a", "b", "trouble", "d", "e", "f")]
    for path in paths:
        Path(path).write_bytes(clip.read_bytes())
    return paths


def make_trouble(monkeypatch, trouble):
    def read(path, *args, **kwargs):
        if path.endswith("trouble.mp4"):
            trouble()
        return real(path, *args, **kwargs)

    real = framecache.read_frames
    monkeypatch.setattr(framecache, "read_frames", read)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_video_that_hangs_the_decoder(clips, tmp_path, monkeypatch, workers):
    others = set(multiprocessing.active_children())  # of other tests
    monkeypatch.setattr(guarded, "PATIENCE", 2.0)
    make_trouble(monkeypatch, lambda: time.sleep(3600))
    cache = FrameCache(tmp_path / "cache", size=16, num_frames=4)
    broken = cache.fill(clips, workers=workers, progress=False)
    assert (
        list(broken) == [clips[2]]
        and "gave no frames within 2 s and was stopped" in broken[clips[2]]
    )
    assert (
        len(list(cache.folder.glob("*/*"))) == 5
        and set(multiprocessing.active_children()) <= others
    )
    assert cache.get(clips[3]).shape == (4, 16, 16, 3)


def test_more_time_for_larger_files(clips):
    assert guarded.seconds_allowed("missing") == guarded.PATIENCE == 60
    with open(clips[0], "ab") as file:
        file.truncate(5_000_000)
    assert guarded.seconds_allowed(clips[0]) == 65


def test_a_fifo_is_no_video(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")  # reading it would wait for ever
    with pytest.raises(VideoError, match="pipe.mp4: not a file"):
        FrameCache(tmp_path / "cache", size=16, num_frames=4).get(tmp_path / "pipe.mp4")


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_worker_that_is_killed(clips, tmp_path, monkeypatch, deaths):
    """Once may be bad luck, and nothing is lost; twice at the same video is the video."""
    others = set(multiprocessing.active_children())  # of other tests

    def die():
        died = len(list(tmp_path.glob("death-*")))
        if died < deaths:
            (tmp_path / f"death-{died}").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    make_trouble(monkeypatch, die)
    cache = FrameCache(tmp_path / "cache", size=16, num_frames=4)
    broken = cache.fill(clips, workers=2, progress=False)
    assert len(list(cache.folder.glob("*/*"))) == 7 - deaths
    assert set(multiprocessing.active_children()) <= others
    assert list(broken) == clips[2:3][: deaths - 1]
    assert all(
        "trouble.mp4: the decoder died twice (exit code -9" in reason for reason in broken.values()
    )


def test_workers_end_with_a_killed_parent(clips, tmp_path):
    code = (
        f"import os, time\nfrom videos import cache as framecache\n"
        f"def slow(*args, **kwargs):\n"
        f"    open({str(tmp_path)!r} + '/pid-%d' % os.getpid(), 'w')\n"
        f"    time.sleep(1)\n"
        f"framecache.read_frames = slow\n"
        f"cache = framecache.FrameCache({str(tmp_path / 'cache')!r}, size=16, num_frames=4)\n"
        f"cache.fill({clips!r}, workers=3)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    pids = []
    while len(pids) < 3 and parent.poll() is None:
        pids = [int(path.name[4:]) for path in tmp_path.glob("pid-*")]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while any(
        Path(f"/proc/{pid}/cmdline").is_file() and Path(f"/proc/{pid}/cmdline").read_bytes()
        for pid in pids
    ):
        assert time.monotonic() < deadline, f"of {pids} some still run"
        time.sleep(0.05)
    assert len(pids) == 3


def test_two_runs_fill_one_cache_at_once(clips, tmp_path):
    code = (
        f"from videos.cache import FrameCache\n"
        f"cache = FrameCache({str(tmp_path / 'cache')!r}, size=64, num_frames=8)\n"
        f"print(cache.fill({clips!r}, workers=2))"
    )
    command = [sys.executable, "-c", code]
    for one in [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]:
        said = one.communicate()[0]
        assert (
            one.returncode == 0 and "6 videos × 8 frames of 64 px" in said and said.endswith("{}\n")
        )
    cache = FrameCache(tmp_path / "cache", size=64, num_frames=8)
    assert (
        sorted(path.suffix for path in cache.folder.glob("*/*")) == [".frames"] * 6
    )  # whole ones, nothing temporary
    for path in clips:
        assert numbers(cache.get(path)) == frame_indices(100, 8).tolist()
    assert cache.damaged == 0


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="frame cache"):
        FrameCache(tmp_path / "file" / "cache", size=16, num_frames=4)


def test_what_cannot_fit_is_not_begun(tmp_path, clip, capsys):
    """Videos × frames × size against the free disk; a picture is one frame."""
    picture = tmp_path / "p.jpg"
    cv2.imwrite(str(picture), np.zeros((8, 8, 3), np.uint8))
    paths = [str(clip), str(picture), str(tmp_path / "gone.mp4")]
    FrameCache(tmp_path / "c", size=1000, num_frames=4).fill(paths, workers=1)
    assert "2 new videos × 4 frames of 1000 px take about 15 MB, and " in capsys.readouterr().out

    large = FrameCache(tmp_path / "d", size=1000, num_frames=10**9)
    with pytest.raises(UserError, match="MB are free; take a larger disk .--cache."):
        large.fill(paths, workers=1)
    assert not list((tmp_path / "d").iterdir())
