"""Video file → frames.

A model takes T frames of a video, whatever its length. The clip is cut into T equal segments, and
each gives one frame:

    frame of segment i = floor((i + u_i) · count / T)

    "uniform", for evaluation    u_i = ½, the centre
    "segment", for training      u_i ~ U[0, 1), so each epoch sees other frames

A clip shorter than T (an image has one frame) repeats frames. Frames leave as uint8 [T, H, W, 3],
RGB, H = W = size: the central square, resized. That is "resize the short side, then crop", without
ever resizing the part that is thrown away.

**Decoding.** A compressed frame is a difference to its neighbours. To seek means to jump to the key
frame before it, and to decode from there. One seek a frame decodes the same stretch again and
again, and is right only where the file's index is. So we open the file once, `grab()` every frame
in order, and `retrieve()` only the wanted ones, since colour conversion is half of the cost. The
n-th grabbed frame is frame n by construction.

The header's frame count is a claim, not a fact. Where the frames end early, the segments are cut
again for what is really there; below half of the claim the file is called truncated. Seconds become
frames by the average rate, which is approximate on videos of variable rate.

A video may also be a part of a tar file: "FOLDER/00000.tar@1536+23040/0042.mp4" is the one whose
23,040 bytes begin at byte 1,536. FFmpeg reads such a part in place, without a copy of it.

Some files are worse than broken: workers.py.
"""

import contextlib
import math
import os
import re
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

# read by OpenCV as it loads: our one line about a broken file, not FFmpeg's ten
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
import cv2  # noqa: E402
import numpy as np  # noqa: E402

from cli import UserError  # noqa: E402

# frames are small: processes decode in parallel, and a thread pool would not survive their fork
cv2.setNumThreads(1)
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

VIDEO_SUFFIXES = tuple(
    ".mp4 .avi .mkv .webm .mov .m4v .mpg .mpeg .3gp .3g2 .wmv .flv .ogv .mts .m2ts .ts".split()
)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TRUNCATED_BELOW = 0.5  # of the frames that the header claims
PART = re.compile(r"(?s)(.+)@(\d+)\+(\d+)/[^/]+")  # of a tar file


class VideoError(UserError):
    """A video that gives no frames: the path and why, in one line."""


# ---- which bytes ---------------------------------------------------------------------------------


class Source(NamedTuple):
    """Where the bytes of a video are: a file, or a part of a tar file (then `first` > 0)."""

    file: str
    first: int
    size: int
    mtime_ns: int


def locate(path: str | Path) -> Source:
    """Raises VideoError where there is no such file, or nothing in it."""
    part = PART.fullmatch(str(path))
    file = part[1] if part else str(path)
    try:
        status = os.stat(file)
    except (OSError, ValueError) as error:  # ValueError: no disk can hold such a name
        raise VideoError(f"{str(path)[:200]}: no such video file") from error
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(f"{path}: not a file")

    first, size = (int(part[2]), int(part[3])) if part else (0, status.st_size)
    if size == 0:
        raise VideoError(f"{path}: the file is empty (0 bytes); fetch it again")
    return Source(file, first, size, status.st_mtime_ns)


def is_there(path: str | Path) -> bool:
    """Is there such a file on the disk, broken or not?"""
    part = PART.fullmatch(str(path))
    return os.path.exists(part[1] if part else path)


# ---- which frames --------------------------------------------------------------------------------


def frame_indices(count: int, num_frames: int, sampling: str = "uniform", rng=None) -> np.ndarray:
    """Which of `count` frames to take: int64 [T], not decreasing, one of each of T equal segments.

    `sampling` "uniform" takes the centre of each segment, "segment" a random frame of each, drawn
    from the `np.random.Generator` `rng`. (Segment sampling: Temporal Segment Networks,
    https://arxiv.org/abs/1608.00859.)
    """
    assert count > 0 and num_frames > 0, f"{count=}, {num_frames=}: both must be positive"
    assert sampling in ("uniform", "segment"), f"{sampling=}: uniform or segment"
    assert sampling == "uniform" or rng is not None, "segment sampling draws: give an rng"
    within = 0.5 if sampling == "uniform" else rng.random(num_frames)
    return ((np.arange(num_frames) + within) * count / num_frames).astype(np.int64)  # [T]


def read_frames(
    path: str | Path,
    num_frames: int,
    *,
    size: int,
    start: float = 0.0,
    end: float | None = None,
    only: list[int] | slice = slice(None),
) -> np.ndarray:
    """T uniform frames of a video or image file: uint8 [T, H, W, 3], RGB, H = W = `size`, by time.

    Only the seconds `start` … `end` (None: to the end) are sampled. `only`: which of the T frames
    are wanted; the others are not converted. Raises VideoError (one line) where the file is
    missing, empty, truncated, not a video, or ends before `start`.
    """
    path, source = str(path), locate(path)

    with explain(path):
        if Path(path).suffix.lower() not in IMAGE_SUFFIXES:
            frames, wanted = decode_video(path, num_frames, size, start, end, only)
        else:
            data = np.fromfile(source.file, np.uint8, source.size, offset=source.first)
            image = cv2.imdecode(data, cv2.IMREAD_COLOR)
            if image is None:
                raise VideoError(f"{path}: not an image that OpenCV can decode; fetch it again")
            frames, wanted = {0: square(image, size)}, frame_indices(1, num_frames)

    return np.stack([frames[index] for index in wanted[only]])  # [T, H, W, 3]


@contextlib.contextmanager
def explain(path: str) -> Iterator[None]:
    """Errors of OpenCV and of the disk become VideoError."""
    try:
        yield
    except OSError as error:
        raise VideoError(f"{path}: cannot be read ({error.strerror})") from error
    except cv2.error as error:
        raise VideoError(
            f"{path}: OpenCV cannot decode it ({error.err}); fetch it again or remove it"
        ) from error


def decode_video(path: str, num_frames: int, size: int, start: float, end, only) -> tuple:
    """({frame number: pixels}, T frame numbers).

    The pixels are of `only` some of the T. But all of them are looked for: what is drawn does not
    decide whether the file is too short.
    """
    capture, count, rate = open_counted(path, needs_rate=start > 0 or end is not None)

    def choose(count: int) -> np.ndarray:
        """The T wanted frame numbers, if there are `count` in all."""
        first = int(start * rate) if start > 0 else 0
        last = count if end is None else min(count, max(first + 1, round(end * rate)))
        if first >= last:
            lasts = f"lasts {count / rate:.1f} s"
            raise VideoError(f"{path}: {lasts}, so nothing is left from second {start} on")
        return first + frame_indices(last - first, num_frames)

    wanted = choose(count)
    frames, seen, _ = grab_frames(capture, size, wanted[only], last=wanted[-1] + 1)
    if seen <= wanted[-1]:  # the header's count was false: `seen` is the true one
        check_count(path, seen, count)
        wanted = choose(seen)
        frames, _, _ = grab_frames(open_video(path), size, wanted[only], last=wanted[-1] + 1)
    return frames, wanted


def open_video(path: str) -> cv2.VideoCapture:
    try:
        path.encode()
    except UnicodeEncodeError as error:  # OpenCV would crash: segmentation fault
        raise VideoError(f"{path}: OpenCV takes only names in UTF-8; rename the file") from error

    file, first, size, _ = locate(path)
    name = f"subfile,,start,{first},end,{first + size},,:{file}" if first else path
    # FFmpeg by name: other back ends read "video7010.mp4" as a pattern of numbered pictures
    capture = cv2.VideoCapture(name, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    if not capture.isOpened():
        raise VideoError(
            f"{path}: not a video that OpenCV can open (truncated, or no video at all); fetch it "
            "again"
        )
    return capture


def open_counted(path: str, needs_rate: bool) -> tuple[cv2.VideoCapture, int, float]:
    """(the video, its frames, frames a second), as the header says; no rate is 0."""
    capture = open_video(path)
    count, rate = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), capture.get(cv2.CAP_PROP_FPS)
    if needs_rate and not rate > 0:
        raise VideoError(f"{path}: its header has no frame rate, so no second can be found")
    if count <= 0:  # it does not say: count, then begin again
        _, count, _ = grab_frames(capture)
        check_count(path, count, count)
        capture = open_video(path)
    return capture, count, rate


def codec_of(path: str) -> str:
    """The four letters that name its codec: "avc1" is H.264, "av01" AV1. Raises VideoError."""
    code = int(open_video(path).get(cv2.CAP_PROP_FOURCC))
    return (code & 0xFFFFFFFF).to_bytes(4, "little").decode("latin-1").strip("\0 ")


def check_count(path: str, seen: int, claimed: int) -> None:
    if not seen:  # perhaps it is whole: OpenCV's wheels lack some decoders, AV1's among them
        raise VideoError(
            f"{path}: no frame decodes; OpenCV may lack its codec, {codec_of(path)}: encode it "
            "again (ffmpeg -i OLD -c:v libx264 NEW.mp4), or fetch it again if it is damaged"
        )
    if seen < TRUNCATED_BELOW * claimed:
        raise VideoError(
            f"{path}: truncated or damaged: {seen} of {claimed} frames decode; fetch it "
            "again or remove it"
        )


def grab_frames(
    capture, size: int = 0, wanted: Collection[int] = (), first: int = 0, last: float = math.inf
) -> tuple[dict, int, tuple[float, float]]:
    """({n: frame n [H, W, 3]} for n wanted, frames seen, seconds of the first and last of them).

    The capture stands at frame `first`, and is read up to `last`, exclusive, or its end.
    """
    keep = set(map(int, wanted))
    frames, seen, start, end = {}, first, 0.0, 0.0
    while seen < last and capture.grab():
        end = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        if seen == first:
            start = end
        if seen in keep:
            decoded, image = capture.retrieve()
            if not decoded:
                break
            frames[seen] = square(image, size)
        seen += 1
    return frames, seen, (start, end)


def square(image: np.ndarray, size: int) -> np.ndarray:
    """[h, w, 3] BGR of any size → its central square as [size, size, 3] RGB."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = image[top : top + side, left : left + side]
    # INTER_AREA averages all the pixels that shrink into one: no aliasing, so no flicker
    how = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
    image = cv2.resize(image, (size, size), interpolation=how)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


# ---- parts of long videos ------------------------------------------------------------------------


def read_windows(
    path: str | Path, num_frames: int, *, size: int, window: float
) -> Iterator[tuple[float, float, np.ndarray]]:
    """(start, end, frames) of each window of a video, by time; the file is decoded once for all.

    The video is cut into stretches of equally many frames that last about `window` seconds (¾ to 1½
    times that; a shorter video is one window). start, end: seconds by the frames' own time stamps,
    so they hold at a variable rate too. frames: uint8 [T, H, W, 3], uniform, as of `read_frames`.
    One window is in memory at a time. Raises VideoError, for a truncated file only where its frames
    end: what was yielded before is then not worth keeping.
    """
    assert window > 0, f"{window=}: must be positive"
    path = str(path)
    with explain(path):
        capture, count, rate = open_counted(path, needs_rate=True)
        number = min(count, max(1, round(count / rate / window)))

        edges = np.linspace(0, count, number + 1).astype(int).tolist()
        for first, last in zip(edges, edges[1:]):
            wanted = (first + frame_indices(last - first, num_frames)).tolist()
            frames, seen, (start, end) = grab_frames(capture, size, wanted, first, last)
            if seen < last:
                check_count(path, seen, count)
            if frames:
                # where the frames end early, those that are there fill the window
                part = np.array([frames[index] for index in wanted if index in frames])
                part = part[frame_indices(len(part), num_frames)]
                yield start, end + 1 / rate, part
            if seen < last:
                return


def glimpse(
    path: str | Path, num_frames: int, *, size: int, start: float, end: float
) -> np.ndarray:
    """About the frames of seconds start … end, uint8 [T, H, W, 3], RGB, for a person to look at.

    Seeks once, so that the end of a long film costs no more than its beginning. Where the file's
    index is wrong, the frames may be late: never for a model. Raises VideoError.
    """
    path, frames, seen_at = str(path), [], -1.0
    capture = open_video(path)
    # a second early: at a variable rate it lands late
    capture.set(cv2.CAP_PROP_POS_MSEC, 1000 * max(0, start - 1))
    half = 0.5 / max(capture.get(cv2.CAP_PROP_FPS), 1.0)  # of a frame: stamps are rounded
    for moment in start + (np.arange(num_frames) + 0.5) / num_frames * (end - start):
        while seen_at < moment - half and capture.grab():
            seen_at = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        decoded, image = capture.retrieve()
        if decoded:
            frames.append(square(image, size))
    if not frames:
        raise VideoError(f"{path}: no frame of seconds {start:.1f} to {end:.1f} can be decoded")
    return np.stack([frames[i] for i in frame_indices(len(frames), num_frames)])


def write_video(path: str | Path, frames: np.ndarray, rate: float = 25.0) -> None:
    """Write uint8 [T, H, W, 3] RGB frames as an mp4 file (codec mp4v, lossy), by OpenCV.

    Raises UserError where it cannot be written.
    """
    path, (height, width) = Path(path), frames.shape[1:3]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), rate, (width, height))
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()

    # OpenCV reports no failure; the index, "moov", is written last
    if not path.exists() or b"moov" not in path.read_bytes():
        raise UserError(
            f"{path.parent}: a video could not be written there; check the folder's permissions "
            "and free space"
        )
