"""videos/decode.py: the right frames of good files, one line for bad ones."""

import struct
from pathlib import Path

import cv2
import numpy as np
import pytest

from videos.decode import (
    VideoError,
    frame_indices,
    glimpse,
    read_frames,
    read_windows,
    square,
    write_video,
)

ROOT = Path(__file__).parent.parent
SHARED_CLIPS = ROOT.parent / "shared" / "msrvtt_full" / "videos"


def numbered_frames(count, height=64, width=64):
    """Frame n shows n in binary: eight vertical bars in the middle, black = 0, white = 1."""
    bits = (np.arange(count)[:, None] >> np.arange(8)) & 1  # [T, 8]
    bars = np.repeat(bits * 255, min(height, width) // 8, axis=1).astype(np.uint8)  # [T, side]
    frames = np.full((count, height, width, 3), 128, np.uint8)
    top, left = (height - bars.shape[1]) // 2, (width - bars.shape[1]) // 2
    frames[:, top : top + bars.shape[1], left : left + bars.shape[1]] = bars[:, None, :, None]
    return frames


def numbers(frames):
    """The number that each of these frames shows."""
    side = frames.shape[2]
    bars = frames[:, side // 2, side // 16 :: side // 8, 0] > 127  # [T, 8]
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


# ---- which frames --------------------------------------------------------------------------------


@pytest.mark.parametrize("count, num_frames", [(100, 8), (7, 7), (3, 8)])
def test_segments_cover_the_video(count, num_frames):
    """The centre of each segment, or at some time every frame of it."""
    rng = np.random.default_rng(0)
    edges = np.arange(num_frames + 1) * count / num_frames
    draws = [frame_indices(count, num_frames, "segment", rng) for _ in range(500)]
    for indices in [frame_indices(count, num_frames), *draws]:
        assert indices.shape == (num_frames,) and indices.dtype == np.int64
        assert (indices >= np.floor(edges[:-1])).all() and (indices <= edges[1:]).all()
        assert (np.diff(indices) >= 0).all() and indices[-1] < count
    assert set(np.concatenate(draws).tolist()) == set(range(count))


@pytest.mark.parametrize(
    "suffix, codec", [("mp4", "mp4v"), ("avi", "MJPG"), ("avi", "XVID"), ("mkv", "mp4v")]
)
def test_frame_n_is_frame_n(tmp_path, suffix, codec):
    path = tmp_path / f"numbered.{suffix}"
    write_avi(path, numbered_frames(100), codec)
    assert numbers(read_frames(path, 100, size=64)) == list(range(100))
    assert numbers(read_frames(path, 8, size=64, only=[1, 1, 6])) == [18, 18, 81]


def test_seconds_choose_the_window(clip):  # 100 frames, 25 a second
    assert numbers(read_frames(clip, 50, size=64, start=1.0, end=3.0)) == list(range(25, 75))
    assert numbers(read_frames(clip, 25, size=64, start=3.0, end=99.0)) == list(range(75, 100))
    # no time: the frame shown then
    assert numbers(read_frames(clip, 2, size=64, start=2.0, end=2.0)) == [50, 50]
    with pytest.raises(VideoError, match="lasts 4.0 s"):
        read_frames(clip, 4, size=64, start=4.5)


def test_short_videos_and_images_repeat_frames(tmp_path):
    write_video(tmp_path / "three.mp4", numbered_frames(3))
    assert numbers(read_frames(tmp_path / "three.mp4", 6, size=64)) == [0, 0, 1, 1, 2, 2]
    for name in ("a.png", "A.JPEG"):
        cv2.imwrite(str(tmp_path / name), numbered_frames(43)[42])
        assert numbers(read_frames(tmp_path / name, 3, size=64)) == [42, 42, 42]


@pytest.fixture
def cut_short(tmp_path):
    """cut_short(share) -> a video of which only this share is there; its header says 100 frames."""

    def cut_short(share):
        path = tmp_path / "cut.avi"
        write_avi(path, numbered_frames(100))
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        return path

    return cut_short


def test_a_count_that_lies_is_corrected(cut_short):
    path = cut_short(0.8)
    there = len(set(numbers(read_frames(path, 100, size=64))))
    assert 60 <= there < 90
    assert numbers(read_frames(path, 8, size=64)) == frame_indices(there, 8).tolist()
    with pytest.raises(VideoError, match="truncated or damaged: .* of 100 frames"):
        read_frames(cut_short(0.3), 8, size=64)


# ---- pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(48, 120), (47, 63), (200, 18)])
def test_colours_are_rgb_and_the_crop_is_central(tmp_path, height, width):
    frames, side = np.zeros((4, height, width, 3), np.uint8), min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    # the central square; what is outside is black
    frames[:, top : top + side, left : left + side] = (250, 30, 60)
    write_video(tmp_path / "red.mp4", frames)
    seen = read_frames(tmp_path / "red.mp4", 2, size=16)
    assert seen.shape == (2, 16, 16, 3) and seen.dtype == np.uint8
    assert np.abs(seen[:, 2:-2, 2:-2].astype(int) - (250, 30, 60)).max() < 30


def test_shrinking_averages():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::4] = 240  # at 16 px every pixel is the mean of one white and three black columns
    assert (square(stripes, 16) == 60).all()


@pytest.mark.skipif(
    not SHARED_CLIPS.is_dir(), reason="no real clips beside the repository (../shared/msrvtt_full)"
)
def test_real_clip_equals_reading_everything():
    # H.264 with B-frames: stored in another order than shown
    path = min(SHARED_CLIPS.glob("*.mp4"))
    capture, everything = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        everything.append(square(read[1], 32))
    wanted = frame_indices(len(everything), 12)
    np.testing.assert_array_equal(read_frames(path, 12, size=32), np.stack(everything)[wanted])


# ---- bad files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, keep, says",
    [
        ("missing.mp4", None, "no such video"),
        ("empty.mp4", slice(0), "0 bytes"),
        ("truncated.mp4", slice(4000), "not a video"),
        ("backwards.mp4", slice(None, None, -1), "not a video"),
        ("\udcff.mp4", slice(None), "only names in UTF-8"),
        ("video.png", slice(None), "not an image"),
    ],
)
def test_bad_files_give_one_line(tmp_path, clip, capfd, name, keep, says):
    path = tmp_path / name
    if keep:
        path.write_bytes(clip.read_bytes()[keep])
    reads = [lambda: read_frames(path, 4, size=32)]
    if "image" not in says:
        reads.append(lambda: list(read_windows(path, 4, size=32, window=1)))
        reads.append(lambda: glimpse(path, 4, size=32, start=0, end=1))
    for read in reads:
        with pytest.raises(VideoError, match=says) as caught:
            read()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # FFmpeg's own lines are not shown


# ---- windows of a video --------------------------------------------------------------------------


def stretch(path: Path, first: int, factor: int):
    """Make a video of variable rate out of an mp4: frames from `first` on last `factor` times as
    long.
    """
    data = bytearray(path.read_bytes())

    def scale(tag, offset, change):
        place = data.index(tag) + offset
        (value,) = struct.unpack_from(">I", data, place)
        struct.pack_into(">I", data, place, round(change(value)))

    at = data.index(b"stts")
    entries, count, ticks = struct.unpack_from(">3I", data, at + 8)
    assert entries == 1
    longer = (first + (count - first) * factor) / count
    for tag, offset in ((b"mvhd", 20), (b"mdhd", 20), (b"tkhd", 24), (b"elst", 12)):
        scale(tag, offset, lambda duration: duration * longer)
    struct.pack_into(">3I", data, at + 8, 2, first, ticks)
    data[at + 20 : at + 20] = struct.pack(">2I", count - first, ticks * factor)
    # all boxes around it are 8 bytes longer
    for tag in (b"stts", b"stbl", b"minf", b"mdia", b"trak", b"moov"):
        scale(tag, -4, lambda size: size + 8)
    path.write_bytes(data)


@pytest.mark.parametrize("suffix, codec", [("mp4", "mp4v"), ("avi", "MJPG"), ("mkv", "mp4v")])
def test_windows_are_what_read_frames_gives(tmp_path, suffix, codec):
    path = tmp_path / f"numbered.{suffix}"
    write_avi(path, numbered_frames(250), codec)  # 25 a second
    for seconds, spans in (
        (2, [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]),
        (4, [(0, 5), (5, 10)]),
        (7, [(0, 10)]),
        (float("inf"), [(0, 10)]),
    ):
        parts = list(read_windows(path, 4, size=64, window=seconds))
        assert [(round(start, 6), round(end, 6)) for start, end, _ in parts] == spans
        for (start, end), (_, _, frames) in zip(spans, parts):
            assert np.array_equal(frames, read_frames(path, 4, size=64, start=start, end=end))
            seen = numbers(glimpse(path, 4, size=64, start=start, end=end))
            assert np.abs(np.array(seen) - numbers(frames)).max() <= 1
    every = list(read_windows(path, 3, size=64, window=0.001))  # no more windows than frames
    assert [numbers(frames) for *_, frames in every] == [[n] * 3 for n in range(250)]


def test_times_of_a_variable_rate_are_the_time_stamps(tmp_path):
    write_video(tmp_path / "x.mp4", numbered_frames(100), rate=25)
    stretch(tmp_path / "x.mp4", 50, 3)  # 2 s at 25 a second, 6 s at 8⅓
    parts = list(read_windows(tmp_path / "x.mp4", 5, size=64, window=2))
    assert [numbers(frames) for *_, frames in parts] == [
        [2, 7, 12, 17, 22],
        [27, 32, 37, 42, 47],
        [52, 57, 62, 67, 72],
        [77, 82, 87, 92, 97],
    ]
    # by the average rate they would be 0–2, 2–4, 4–6 and 6–8
    spans = np.array([(0, 1), (1, 2), (2, 5), (5, 8)])
    assert np.array([part[:2] for part in parts]) == pytest.approx(spans, abs=0.1)
    seen = numbers(glimpse(tmp_path / "x.mp4", 3, size=64, start=5, end=8))
    assert seen == pytest.approx([79, 87, 96], abs=2)


def test_a_glimpse_of_the_end_does_not_decode_the_beginning(tmp_path, monkeypatch):
    class Counting:
        def __init__(self, *args):
            self.capture = opened(*args)

        def __getattr__(self, name):
            asked.append(name)
            return getattr(self.capture, name)

    asked, opened = [], cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", Counting)
    write_video(tmp_path / "x.mp4", numbered_frames(250), rate=25)
    assert numbers(glimpse(tmp_path / "x.mp4", 4, size=64, start=9, end=10)) == [228, 234, 241, 247]
    assert 0 < asked.count("grab") < 100  # of 248


def test_windows_of_frames_that_end_early(cut_short):
    parts = list(read_windows(cut_short(0.8), 4, size=64, window=1))
    seen = [numbers(frames) for *_, frames in parts]
    assert seen[:3] == [[3, 9, 15, 21], [28, 34, 40, 46], [53, 59, 65, 71]]
    assert 3 <= len(parts) <= 4 and parts[-1][1] < 3.6 and seen[-1] == sorted(seen[-1])
    with pytest.raises(VideoError, match="truncated or damaged: .* of 100 frames"):
        list(read_windows(cut_short(0.3), 4, size=64, window=1))


def test_no_glimpse_behind_the_end(clip):
    with pytest.raises(VideoError, match="no frame of seconds 90.0 to 91.0"):
        glimpse(clip, 4, size=64, start=90, end=91)
