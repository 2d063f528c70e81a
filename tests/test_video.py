"""video.py: the right frames of good files, one line for bad ones, and a cache that survives what happens to disks."""

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

import video
from cli import UserError
from video import FrameCache, VideoError, frame_indices, read_frames, write_video

ROOT = Path(__file__).parent.parent
SHARED_CLIPS = ROOT.parent / "shared" / "msrvtt_full" / "videos"


def numbered_frames(count, height=64, width=64):
    """Frame n shows n in binary: eight vertical bars in the central square, black = 0, white = 1."""
    bits = (np.arange(count)[:, None] >> np.arange(8)) & 1  # [T, 8]
    bars = np.repeat(bits * 255, min(height, width) // 8, axis=1).astype(np.uint8)  # [T, side]
    frames = np.full((count, height, width, 3), 128, np.uint8)
    top, left = (height - bars.shape[1]) // 2, (width - bars.shape[1]) // 2
    frames[:, top:top + bars.shape[1], left:left + bars.shape[1]] = bars[:, None, :, None]
    return frames


def numbers(frames):
    """The number that each of these frames shows."""
    side = frames.shape[2]
    bars = frames[:, side // 2, side // 16::side // 8, 0] > 127  # [T, 8]
    return (bars << np.arange(8)).sum(axis=1).tolist()


def write_avi(path, frames, codec="MJPG"):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 25, frames.shape[2:0:-1])
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "numbered.mp4"
    write_video(path, numbered_frames(100), rate=25)
    return path


# ---- which frames ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, num_frames", [(100, 8), (7, 7), (1, 4), (3, 8), (1000, 1)])
def test_segments_cover_the_video(count, num_frames):
    rng = np.random.default_rng(0)
    edges = np.arange(num_frames + 1) * count / num_frames
    draws = [frame_indices(count, num_frames, "segment", rng) for _ in range(20)]
    for indices in [frame_indices(count, num_frames), *draws]:
        assert indices.shape == (num_frames,) and indices.dtype == np.int64
        assert (indices >= np.floor(edges[:-1])).all() and (indices <= np.floor(edges[1:])).all()  # from its segment
        assert (np.diff(indices) >= 0).all() and indices[0] >= 0 and indices[-1] < count


def test_uniform_takes_centres_and_segment_takes_every_frame_at_some_time():
    assert frame_indices(100, 4).tolist() == [12, 37, 62, 87]
    rng = np.random.default_rng(0)
    assert {int(i) for _ in range(500) for i in frame_indices(20, 4, "segment", rng)} == set(range(20))


@pytest.mark.parametrize("suffix, codec", [("mp4", "mp4v"), ("avi", "MJPG"), ("avi", "XVID"), ("mkv", "mp4v")])
def test_frame_n_is_frame_n(tmp_path, suffix, codec):
    path = tmp_path / f"numbered.{suffix}"
    write_avi(path, numbered_frames(100), codec)
    assert numbers(read_frames(path, 100, size=64)) == list(range(100))
    assert numbers(read_frames(path, 8, size=64)) == frame_indices(100, 8).tolist()
    drawn = read_frames(path, 8, size=64, sampling="segment", rng=np.random.default_rng(5))
    again = read_frames(path, 8, size=64, sampling="segment", rng=np.random.default_rng(5))
    assert numbers(drawn) == numbers(again) != frame_indices(100, 8).tolist()


def test_seconds_choose_the_window(clip):  # 100 frames, 25 a second
    assert numbers(read_frames(clip, 50, size=64, start=1.0, end=3.0)) == list(range(25, 75))
    assert numbers(read_frames(clip, 25, size=64, start=3.0, end=99.0)) == list(range(75, 100))
    assert numbers(read_frames(clip, 2, size=64, start=2.0, end=2.0)) == [50, 50]  # no time: the frame shown then
    with pytest.raises(VideoError, match="lasts 4.0 s"):
        read_frames(clip, 4, size=64, start=4.5)


def test_short_videos_and_images_repeat_frames(tmp_path):
    write_video(tmp_path / "one.mp4", numbered_frames(1))
    assert numbers(read_frames(tmp_path / "one.mp4", 4, size=64)) == [0, 0, 0, 0]
    write_video(tmp_path / "three.mp4", numbered_frames(3))
    assert numbers(read_frames(tmp_path / "three.mp4", 6, size=64)) == [0, 0, 1, 1, 2, 2]
    for name in ("a.png", "a.jpg", "A.JPEG"):
        cv2.imwrite(str(tmp_path / name), numbered_frames(43)[42])
        assert numbers(read_frames(tmp_path / name, 3, size=64)) == [42, 42, 42]


def test_a_count_that_lies_is_corrected(tmp_path):
    write_avi(tmp_path / "whole.avi", numbered_frames(100))
    data = (tmp_path / "whole.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(data[:int(len(data) * 0.8)])  # the header still says 100
    there = len(set(numbers(read_frames(tmp_path / "cut.avi", 100, size=64))))
    assert 60 <= there < 90
    assert numbers(read_frames(tmp_path / "cut.avi", 8, size=64)) == frame_indices(there, 8).tolist()
    (tmp_path / "stub.avi").write_bytes(data[:int(len(data) * 0.3)])
    with pytest.raises(VideoError, match="truncated or damaged: .* of 100 frames"):
        read_frames(tmp_path / "stub.avi", 8, size=64)


# ---- pixels ----------------------------------------------------------------------------------------------------------


def test_colours_are_rgb_and_the_crop_is_central(tmp_path):
    frames = np.zeros((4, 48, 120, 3), np.uint8)
    frames[:, :, 36:84] = (250, 30, 60)  # the central square; what is outside is black
    write_video(tmp_path / "red.mp4", frames)
    seen = read_frames(tmp_path / "red.mp4", 2, size=16)
    assert seen.shape == (2, 16, 16, 3) and seen.dtype == np.uint8
    assert np.abs(seen[:, 2:-2, 2:-2].astype(int) - (250, 30, 60)).max() < 30


@pytest.mark.parametrize("height, width", [(47, 63), (33, 200), (200, 18), (16, 16)])
def test_odd_sizes(tmp_path, height, width):
    write_video(tmp_path / "odd.mp4", np.full((5, height, width, 3), 90, np.uint8))
    frames = read_frames(tmp_path / "odd.mp4", 3, size=32)
    assert frames.shape == (3, 32, 32, 3) and abs(int(frames.mean()) - 90) < 8


def test_shrinking_averages():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::4] = 240  # at 16 px every pixel is the mean of one white and three black columns
    assert (video._square(stripes, 16) == 60).all()


@pytest.mark.skipif(not SHARED_CLIPS.is_dir(), reason="no real clips beside the repository (../shared/msrvtt_full)")
def test_real_clip_equals_reading_everything():
    path = sorted(SHARED_CLIPS.glob("*.mp4"))[0]  # H.264 with B-frames: stored in another order than shown
    capture, everything = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        everything.append(video._square(read[1], 32))
    wanted = frame_indices(len(everything), 12)
    np.testing.assert_array_equal(read_frames(path, 12, size=32), np.stack(everything)[wanted])


# ---- bad files -------------------------------------------------------------------------------------------------------


def bad_file(folder, clip, kind):
    path = folder / "bad.mp4"
    if kind == "missing":
        return path
    content = {"empty": b"", "text": b"this is not a video\n" * 50, "truncated": clip.read_bytes()[:4000],
               "noise": np.random.default_rng(0).bytes(5000)}
    if kind == "image":
        path = folder / "bad.png"
    path.write_bytes(content.get(kind, b"\x89PNG nothing else"))
    return path


@pytest.mark.parametrize("kind, says", [
    ("missing", "no such video"), ("empty", "0 bytes"), ("text", "not a video"), ("truncated", "not a video"),
    ("noise", "not a video"), ("image", "not an image")])
def test_bad_files_give_one_line(tmp_path, clip, capfd, kind, says):
    path = bad_file(tmp_path, clip, kind)
    with pytest.raises(VideoError, match=says) as caught:
        read_frames(path, 4, size=32)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and issubclass(VideoError, UserError)
    assert capfd.readouterr().err == ""  # FFmpeg's own lines are not shown


def test_a_path_that_no_disk_can_hold(tmp_path):
    for path in ("nul\0byte.mp4", "x" * 5000 + ".mp4", "half\ud800pair.mp4"):
        with pytest.raises(VideoError):
            FrameCache(tmp_path, size=8, num_frames=2).get(path)


# ---- the cache -------------------------------------------------------------------------------------------------------


def the_entry(cache):
    (entry,) = cache.folder.glob("*/*.frames")
    return entry


def test_cache_decodes_once(tmp_path, clip, monkeypatch):
    cache = FrameCache(tmp_path / "cache", size=64, num_frames=10)
    first = cache.get(clip)
    assert numbers(first) == frame_indices(100, 10).tolist()
    monkeypatch.setattr(video, "read_frames", lambda *args, **kwargs: pytest.fail("decoded again"))
    np.testing.assert_array_equal(FrameCache(tmp_path / "cache", size=64, num_frames=10).get(clip), first)


def test_cache_entry_depends_on_all_that_the_pixels_do(tmp_path, clip):
    source = tmp_path / "copy.mp4"
    source.write_bytes(clip.read_bytes())
    cache = FrameCache(tmp_path / "cache", size=64, num_frames=10)
    entries = {cache._entry(source, 0.0, None), cache._entry(source, 1.0, None), cache._entry(source, 0.0, 2.0),
               cache._entry(clip, 0.0, None),
               FrameCache(cache.folder, size=32, num_frames=10)._entry(source, 0.0, None),
               FrameCache(cache.folder, size=64, num_frames=12)._entry(source, 0.0, None)}
    os.utime(source, ns=(1, 1))  # edited
    entries.add(cache._entry(source, 0.0, None))
    assert len(entries) == 7
    assert cache._entry(source, 0, None) == cache._entry(str(source), 0.0, None)
    write_video(source, numbered_frames(20))
    assert numbers(cache.get(source)) == frame_indices(20, 10).tolist()


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[:100], lambda data: b"",
    lambda data: b"XXXX" + data[4:], lambda data: data + b"0"], ids=["bit", "cut", "empty", "magic", "longer"])
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
    megabytes = 20 * (20 + 4 * 16 * 16 * 3) / 1e6
    assert f"20 videos × 4 frames of 16 px, {megabytes:.1f} MB (20 new), 2 broken" in capfd.readouterr().out
    assert len(list(cache.folder.glob("*/*"))) == 20
    monkeypatch.setattr(video, "read_frames", lambda *args, **kwargs: pytest.fail("decoded again"))
    assert cache.fill(good, workers=workers, progress=False) == {}


def test_interrupted_writes_leave_nothing_half(tmp_path, clip, monkeypatch):
    cache = FrameCache(tmp_path, size=16, num_frames=4)
    entry = cache._entry(clip, 0.0, None)
    disk_full = OSError(errno.ENOSPC, "No space left on device")
    for error, raised in [(KeyboardInterrupt(), KeyboardInterrupt), (disk_full, UserError)]:
        def write_half(path, data, error=error):
            with open(path, "wb") as file:
                file.write(data[:100])
            raise error
        monkeypatch.setattr(Path, "write_bytes", write_half)
        with pytest.raises(raised):
            cache._store(clip, entry, 0.0, None)
        if raised is UserError:
            with pytest.raises(UserError, match="cannot write the frame cache"):
                cache.get(clip)  # from the process that decodes
        monkeypatch.undo()
        assert not list(tmp_path.glob("*/*"))
    assert cache.get(clip).shape == (4, 16, 16, 3)


def test_many_writers_at_once(tmp_path, clip):
    cache = FrameCache(tmp_path, size=64, num_frames=8)
    with concurrent.futures.ProcessPoolExecutor(4) as pool:
        results = list(pool.map(cache.get, [clip] * 16))
    assert all((result == results[0]).all() for result in results) and len(list(tmp_path.glob("*/*"))) == 1
    np.testing.assert_array_equal(cache.get(clip), results[0])
    assert cache.damaged == 0


def test_still_pictures_are_kept_once(tmp_path, capsys):
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "picture.png"), picture)
    (tmp_path / "4027").write_bytes(cv2.imencode(".jpg", picture)[1])  # data sets of pictures name them by a hash
    write_video(tmp_path / "still.mp4", np.full((9, 20, 30, 3), 60, np.uint8))
    paths = [str(tmp_path / name) for name in ("picture.png", "4027", "still.mp4")]
    cache = FrameCache(tmp_path / "cache", size=16, num_frames=5)
    for new in (3, 0):
        assert cache.fill(paths) == {}
        assert f"3 videos × 5 frames of 16 px, {3 * 788 / 1e6:.1f} MB ({new} new)" in capsys.readouterr().out
    for path in paths:
        assert cache._entry(path, 0.0, None).stat().st_size == 20 + 16 * 16 * 3 == 788
        np.testing.assert_array_equal(cache.get(path), read_frames(path, 5, size=16))


# ---- faults ----------------------------------------------------------------------------------------------------------


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

    real = video.read_frames
    monkeypatch.setattr(video, "read_frames", read)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_video_that_hangs_the_decoder(clips, tmp_path, monkeypatch, workers):
    others = set(multiprocessing.active_children())  # of other tests
    monkeypatch.setattr(video, "PATIENCE", 2.0)
    make_trouble(monkeypatch, lambda: time.sleep(3600))
    cache = FrameCache(tmp_path / "cache", size=16, num_frames=4)
    broken = cache.fill(clips, workers=workers, progress=False)
    assert list(broken) == [clips[2]] and "gave no frames within 2 s and was stopped" in broken[clips[2]]
    assert len(list(cache.folder.glob("*/*"))) == 5 and set(multiprocessing.active_children()) <= others
    with pytest.raises(VideoError, match="trouble.mp4: the decoder gave no frames"):
        cache.get(clips[2])
    assert cache.get(clips[3]).shape == (4, 16, 16, 3)


def test_more_time_for_larger_files(clips):
    assert video._seconds_allowed("missing") == video.PATIENCE == 60
    with open(clips[0], "ab") as file:
        file.truncate(5_000_000)
    assert video._seconds_allowed(clips[0]) == 65


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
    assert list(broken) == clips[2:3][:deaths - 1]
    assert all("trouble.mp4: the decoder died twice (exit code -9" in reason for reason in broken.values())


def test_workers_end_with_a_killed_parent(clips, tmp_path):
    code = (f"import os, time, video\n"
            f"def slow(*args, **kwargs):\n"
            f"    open({str(tmp_path)!r} + '/pid-%d' % os.getpid(), 'w')\n"
            f"    time.sleep(1)\n"
            f"video.read_frames = slow\n"
            f"video.FrameCache({str(tmp_path / 'cache')!r}, size=16, num_frames=4).fill({clips!r}, workers=3)")
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    pids = []
    while len(pids) < 3 and parent.poll() is None:
        pids = [int(path.name[4:]) for path in tmp_path.glob("pid-*")]
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/cmdline").is_file() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids):
        assert time.monotonic() < deadline, f"of {pids} some still run"
        time.sleep(0.05)
    assert len(pids) == 3


def test_two_runs_fill_one_cache_at_once(clips, tmp_path):
    code = (f"from video import FrameCache\n"
            f"print(FrameCache({str(tmp_path / 'cache')!r}, size=64, num_frames=8).fill({clips!r}, workers=2))")
    command = [sys.executable, "-c", code]
    for one in [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]:
        said = one.communicate()[0]
        assert one.returncode == 0 and "6 videos × 8 frames of 64 px" in said and said.endswith("{}\n")
    cache = FrameCache(tmp_path / "cache", size=64, num_frames=8)
    assert sorted(path.suffix for path in cache.folder.glob("*/*")) == [".frames"] * 6  # whole ones, nothing temporary
    for path in clips:
        assert numbers(cache.get(path)) == frame_indices(100, 8).tolist()
    assert cache.damaged == 0


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="frame cache"):
        FrameCache(tmp_path / "file" / "cache", size=16, num_frames=4)


def test_demo_runs():
    done = subprocess.run([sys.executable, "video.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "(8, 32, 32, 3) uint8" in done.stdout
    bad = subprocess.run([sys.executable, "video.py", "cli.py"], cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.splitlines()[-1].startswith("error: cli.py: not a video")
