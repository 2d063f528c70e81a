"""videos/decode.py: the right frames of good files, one line for bad ones."""

import struct
from pathlib import Path

import cv2
import numpy as np
import pytest

from cli import UserError
from videos import decode as video
from videos.decode import (
    VideoError,
    frame_indices,
    glimpse,
    read_frames,
    read_windows,
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


@pytest.mark.parametrize("count, num_frames", [(100, 8), (7, 7), (1, 4), (3, 8), (1000, 1)])
def test_segments_cover_the_video(count, num_frames):
    rng = np.random.default_rng(0)
    edges = np.arange(num_frames + 1) * count / num_frames
    draws = [frame_indices(count, num_frames, "segment", rng) for _ in range(20)]
    for indices in [frame_indices(count, num_frames), *draws]:
        assert indices.shape == (num_frames,) and indices.dtype == np.int64
        assert (indices >= np.floor(edges[:-1])).all() and (
            indices <= np.floor(edges[1:])
        ).all()  # from its segment
        assert (np.diff(indices) >= 0).all() and indices[0] >= 0 and indices[-1] < count


def test_uniform_takes_centres_and_segment_takes_every_frame_at_some_time():
    assert frame_indices(100, 4).tolist() == [12, 37, 62, 87]
    rng = np.random.default_rng(0)
    assert {int(i) for _ in range(500) for i in frame_indices(20, 4, "segment", rng)} == set(
        range(20)
    )


@pytest.mark.parametrize(
    "suffix, codec", [("mp4", "mp4v"), ("avi", "MJPG"), ("avi", "XVID"), ("mkv", "mp4v")]
)
def test_frame_n_is_frame_n(tmp_path, suffix, codec):
    path = tmp_path / f"numbered.{suffix}"
    write_avi(path, numbered_frames(100), codec)
    assert numbers(read_frames(path, 100, size=64)) == list(range(100))
    assert numbers(read_frames(path, 8, size=64)) == frame_indices(100, 8).tolist()
    some = np.array([1, 1, 6])
    drawn = read_frames(path, 8, size=64, only=some)
    assert numbers(drawn) == frame_indices(100, 8)[some].tolist()


def test_seconds_choose_the_window(clip):  # 100 frames, 25 a second
    assert numbers(read_frames(clip, 50, size=64, start=1.0, end=3.0)) == list(range(25, 75))
    assert numbers(read_frames(clip, 25, size=64, start=3.0, end=99.0)) == list(range(75, 100))
    assert numbers(read_frames(clip, 2, size=64, start=2.0, end=2.0)) == [
        50,
        50,
    ]  # no time: the frame shown then
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
    (tmp_path / "cut.avi").write_bytes(data[: int(len(data) * 0.8)])  # the header still says 100
    there = len(set(numbers(read_frames(tmp_path / "cut.avi", 100, size=64))))
    assert 60 <= there < 90
    assert (
        numbers(read_frames(tmp_path / "cut.avi", 8, size=64)) == frame_indices(there, 8).tolist()
    )
    (tmp_path / "stub.avi").write_bytes(data[: int(len(data) * 0.3)])
    with pytest.raises(VideoError, match="truncated or damaged: .* of 100 frames"):
        read_frames(tmp_path / "stub.avi", 8, size=64)


# ---- pixels --------------------------------------------------------------------------------------


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
    assert (video.square(stripes, 16) == 60).all()


@pytest.mark.skipif(
    not SHARED_CLIPS.is_dir(), reason="no real clips beside the repository (../shared/msrvtt_full)"
)
def test_real_clip_equals_reading_everything():
    path = sorted(SHARED_CLIPS.glob("*.mp4"))[
        0
    ]  # H.264 with B-frames: stored in another order than shown
    capture, everything = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        everything.append(video.square(read[1], 32))
    wanted = frame_indices(len(everything), 12)
    np.testing.assert_array_equal(read_frames(path, 12, size=32), np.stack(everything)[wanted])


# ---- bad files -----------------------------------------------------------------------------------


def bad_file(folder, clip, kind):
    path = folder / "bad.mp4"
    if kind == "missing":
        return path
    content = {
        "empty": b"",
        "text": b"this is not a video\n" * 50,
        "truncated": clip.read_bytes()[:4000],
        "noise": np.random.default_rng(0).bytes(5000),
    }
    if kind == "image":
        path = folder / "bad.png"
    path.write_bytes(content.get(kind, b"\x89PNG nothing else"))
    return path


@pytest.mark.parametrize(
    "kind, says",
    [
        ("missing", "no such video"),
        ("empty", "0 bytes"),
        ("text", "not a video"),
        ("truncated", "not a video"),
        ("noise", "not a video"),
        ("image", "not an image"),
    ],
)
def test_bad_files_give_one_line(tmp_path, clip, capfd, kind, says):
    path = bad_file(tmp_path, clip, kind)
    with pytest.raises(VideoError, match=says) as caught:
        read_frames(path, 4, size=32)
    assert (
        str(path) in str(caught.value)
        and "\n" not in str(caught.value)
        and issubclass(VideoError, UserError)
    )
    assert capfd.readouterr().err == ""  # FFmpeg's own lines are not shown


# ---- windows of a video --------------------------------------------------------------------------


def stretch(path: Path, first: int, factor: int):
    """Make a video of variable rate out of an mp4: frames from number `first` on last `factor`
    times as long.
    """
    data = bytearray(path.read_bytes())
    at = data.index(b"stts")
    entries, count, ticks = struct.unpack_from(">3I", data, at + 8)
    assert entries == 1
    longer = (first + (count - first) * factor) / count
    for tag, offset in ((b"mvhd", 20), (b"mdhd", 20), (b"tkhd", 24), (b"elst", 12)):
        place = data.index(tag) + offset
        struct.pack_into(
            ">I", data, place, round(struct.unpack_from(">I", data, place)[0] * longer)
        )
    struct.pack_into(">3I", data, at + 8, 2, first, ticks)
    data[at + 20 : at + 20] = struct.pack(">2I", count - first, ticks * factor)
    for tag in (
        b"stts",
        b"stbl",
        b"minf",
        b"mdia",
        b"trak",
        b"moov",
    ):  # all that hold it are 8 bytes longer
        place = data.index(tag) - 4
        struct.pack_into(">I", data, place, struct.unpack_from(">I", data, place)[0] + 8)
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
    assert np.array([part[:2] for part in parts]) == pytest.approx(
        np.array([(0, 1), (1, 2), (2, 5), (5, 8)]), abs=0.1
    )  # by the average rate: 0–2, 2–4, 4–6, 6–8
    seen = numbers(glimpse(tmp_path / "x.mp4", 3, size=64, start=5, end=8))
    assert seen == pytest.approx([79, 87, 96], abs=2)


def test_a_glimpse_of_the_end_does_not_decode_the_beginning(tmp_path, monkeypatch):
    write_video(tmp_path / "x.mp4", numbered_frames(250), rate=25)
    grabbed, opened = [], video.open_video

    class Counting:
        def __init__(self, path):
            self.capture = opened(path)

        def __getattr__(self, name):
            grabbed.extend([name] * (name == "grab"))
            return getattr(self.capture, name)

    monkeypatch.setattr(video, "open_video", Counting)
    assert numbers(glimpse(tmp_path / "x.mp4", 4, size=64, start=9, end=10)) == [228, 234, 241, 247]
    assert len(grabbed) < 100  # of 248


def test_frames_that_end_early(tmp_path):
    write_avi(tmp_path / "whole.avi", numbered_frames(100))
    data = (tmp_path / "whole.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(data[: int(len(data) * 0.8)])
    parts = list(read_windows(tmp_path / "cut.avi", 4, size=64, window=1))
    there = numbers(parts[-1][2])
    assert (
        3 <= len(parts) <= 4 and parts[-1][1] < 3.6 and max(there) < 90 and there == sorted(there)
    )
    assert [numbers(frames) for *_, frames in parts[:3]] == [
        [3, 9, 15, 21],
        [28, 34, 40, 46],
        [53, 59, 65, 71],
    ]
    (tmp_path / "stub.avi").write_bytes(data[: int(len(data) * 0.3)])
    with pytest.raises(VideoError, match="truncated or damaged: .* of 100 frames"):
        list(read_windows(tmp_path / "stub.avi", 4, size=64, window=1))
    for read in (
        lambda path: list(read_windows(path, 4, size=64, window=1)),
        lambda path: glimpse(path, 4, size=64, start=0, end=1),
    ):
        for name, reason in (
            ("none.mp4", "no such video file"),
            ("\udcff.mp4", "only names in UTF-8"),
        ):
            with pytest.raises(VideoError, match=reason):
                read(str(tmp_path / name))
    with pytest.raises(VideoError, match="no frame of seconds 90.0 to 91.0"):
        glimpse(tmp_path / "whole.avi", 4, size=64, start=90, end=91)
