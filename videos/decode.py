"""Video file → frames.

A model takes T frames of a video, whatever its length: the clip is cut into T equal segments, and
each gives one frame,

    frame of segment i = floor((i + u_i) · count / T)      u_i = ½: its centre ("uniform", for
                                                           evaluation)
                                                           u_i ~ U[0, 1): a random one ("segment",
                                                           for training)

so all of the clip is covered, training sees other frames in each epoch, and a clip shorter than T
(an image has one frame) repeats frames. Frames leave as uint8 [T, H, W, 3], RGB, H = W = size: the
central square, resized. That is "resize the short side, then crop", without ever resizing the part
that is thrown away.

**Decoding.** A compressed frame is a difference to its neighbours, so a seek means: jump to the key
frame before it and decode from there. One seek a frame decodes the same stretch again and again,
and is right only where the file's index is. We open the file once, `grab()` every frame in order
(decoding without colour conversion) and `retrieve()` only the wanted ones: the n-th grabbed frame
is frame n by construction. The header's frame count is a claim, not a fact: where the frames end
early, the segments are cut again for what is really there, or, below half of the claim, the file is
called truncated. Seconds become frames by the average rate, which is approximate on videos of
variable rate.

Decoding is dear, and some files are worse than broken: framecache.py.

    python video.py FILE        frames of FILE; without FILE, of a small video of its own
"""

import collections.abc
import os
from pathlib import Path

os.environ.setdefault(
    "OPENCV_FFMPEG_LOGLEVEL", "-8"
)  # read by OpenCV: our one line a broken file, not FFmpeg's ten
import cv2
import numpy as np

from cli import UserError

cv2.setNumThreads(
    1
)  # frames are small: processes decode in parallel, and a thread pool would not survive their fork
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
VIDEO_SUFFIXES = {
    ".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".3gp", ".3g2", ".wmv",
    ".flv", ".ogv", ".mts", ".m2ts", ".ts",
}  # fmt: skip
TRUNCATED_BELOW = 0.5  # of the frames that the header claims


class VideoError(UserError):
    """A video that gives no frames: the path and why, in one line."""


# ---- decoding ------------------------------------------------------------------------------------


def frame_indices(count: int, num_frames: int, sampling: str = "uniform", rng=None) -> np.ndarray:
    """Which of `count` frames to take: int64 [T], not decreasing, one from each of T equal
    segments.

    `sampling` "uniform" takes the centre of each segment, "segment" a random frame of each, drawn
    from the `np.random.Generator` `rng`. (Segment sampling: Temporal Segment Networks,
    https://arxiv.org/abs/1608.00859.)
    """
    assert count > 0 and num_frames > 0, f"{count=}, {num_frames=}: both must be positive"
    assert sampling in ("uniform", "segment"), f"{sampling=}: uniform or segment"
    assert sampling == "uniform" or rng is not None, (
        "segment sampling draws from a np.random.Generator: give rng"
    )
    within = 0.5 if sampling == "uniform" else rng.random(num_frames)
    return ((np.arange(num_frames) + within) * count / num_frames).astype(np.int64)  # [T]


def read_frames(
    path: str | Path,
    num_frames: int,
    *,
    size: int,
    sampling: str = "uniform",
    rng=None,
    start: float = 0.0,
    end: float | None = None,
) -> np.ndarray:
    """T frames of a video or image file: uint8 [T, H, W, 3], RGB, H = W = `size`, in the order of
    time.

    Only the seconds `start` … `end` (None: to the end) are sampled; `sampling` and `rng` as in
    `frame_indices`. Raises VideoError (one line) where the file is missing, empty, truncated, not a
    video, or ends before `start`.
    """
    path = str(path)
    if not os.path.isfile(path):
        raise VideoError(
            f"{path}: " + ("not a file" if os.path.exists(path) else "no such video file")
        )
    if os.path.getsize(path) == 0:
        raise VideoError(f"{path}: the file is empty (0 bytes); fetch it again")
    seed = (
        rng.integers(2**63) if sampling == "segment" else None
    )  # once: where the header lies, pick is called twice

    def pick(count):
        return frame_indices(count, num_frames, sampling, np.random.default_rng(seed))

    try:
        if Path(path).suffix.lower() in IMAGE_SUFFIXES:
            image = cv2.imread(path, cv2.IMREAD_COLOR)
            if image is None:
                raise VideoError(
                    f"{path}: not an image that OpenCV can decode; fetch it again or remove it"
                )
            frames, wanted = {0: _square(image, size)}, pick(1)
        else:
            frames, wanted = _decode(path, pick, size, start, end)
    except cv2.error as error:
        raise VideoError(
            f"{path}: OpenCV cannot decode it ({error.err}); fetch it again or remove it"
        ) from error
    return np.stack([frames[index] for index in wanted])  # [T, H, W, 3]


def _decode(path: str, pick, size: int, start: float, end: float | None) -> tuple[dict, np.ndarray]:
    """({frame number: pixels}, the T wanted frame numbers) of a video file; pick(count) chooses T
    of count frames.
    """
    capture = _open(path)
    claimed, rate = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), capture.get(cv2.CAP_PROP_FPS)
    if not rate > 0:
        if start > 0 or end is not None:
            raise VideoError(
                f"{path}: its header has no frame rate, so seconds {start} to {end} cannot be found"
            )
        rate = 1.0
    wanted = _window(path, claimed, rate, start, end, pick) if claimed > 0 else None
    frames, seen = _grab(capture, wanted, size)
    if wanted is None or seen <= wanted[-1]:  # no claim, or a false one: `seen` is the true count
        if seen < max(1, TRUNCATED_BELOW * claimed):
            raise VideoError(
                f"{path}: truncated or damaged: {seen} of {max(1, claimed)} frames decode; fetch it "
                "again or remove it"
            )
        wanted = _window(path, seen, rate, start, end, pick)
        frames, _ = _grab(_open(path), wanted, size)
    return frames, wanted


def _open(path: str) -> cv2.VideoCapture:
    _check_name(path)
    # FFmpeg by name: other back ends read "video7010.mp4" as a pattern of numbered pictures. One
    # thread: see the top.
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    if not capture.isOpened():
        raise VideoError(
            f"{path}: not a video that OpenCV can open (truncated, or no video at all); fetch it again"
        )
    return capture


def _window(
    path: str, count: int, rate: float, start: float, end: float | None, pick
) -> np.ndarray:
    """The T wanted frame numbers among those of seconds start … end."""
    first = int(start * rate)
    last = count if end is None else min(count, max(first + 1, round(end * rate)))
    if first >= last:
        raise VideoError(
            f"{path}: lasts {count / rate:.1f} s, so nothing is left from second {start} on"
        )
    return first + pick(last - first)


def _grab(capture: cv2.VideoCapture, wanted: np.ndarray | None, size: int) -> tuple[dict, int]:
    """({n: frame n [H, W, 3]} for n wanted, frames seen), up to the last wanted one; wanted None
    counts them all.
    """
    frames, keep, seen = {}, set() if wanted is None else set(wanted.tolist()), 0
    while (wanted is None or len(frames) < len(keep)) and capture.grab():
        if seen in keep:
            decoded, image = capture.retrieve()
            if not decoded:
                break
            frames[seen] = _square(image, size)
        seen += 1
    return frames, seen


def _square(image: np.ndarray, size: int) -> np.ndarray:
    """[h, w, 3] BGR of any size → its central square as [size, size, 3] RGB."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = image[top : top + side, left : left + side]
    # INTER_AREA averages all the pixels that shrink into one: no aliasing, so no flicker from frame
    # to frame
    image = cv2.resize(
        image, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
    )
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


# ---- parts of long videos ------------------------------------------------------------------------


def read_windows(
    path: str | Path, num_frames: int, *, size: int, window: float
) -> collections.abc.Iterator[tuple[float, float, np.ndarray]]:
    """(start, end, frames) of each window of a video, in the order of time: the file is decoded
    once for all of them.

    The video is cut into stretches of equally many frames that last about `window` seconds (¾ to 1½
    times that; a shorter video is one window). start, end: seconds by the frames' own time stamps,
    so they hold at a variable rate too. frames: uint8 [T, H, W, 3], uniform, as of `read_frames`.
    One window is in memory at a time. Raises VideoError, for a truncated file only where its frames
    end: what was yielded before is then not worth keeping.
    """
    assert window > 0, f"{window=}: must be positive"
    path, position = str(path), 0
    _check_name(path)
    try:
        capture = _open(path)
        count, rate = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), capture.get(cv2.CAP_PROP_FPS)
        if not rate > 0:
            raise VideoError(
                f"{path}: its header has no frame rate, so no second of it can be found"
            )
        if count <= 0:  # no claim: count first
            count, capture = max(1, _grab(capture, None, size)[1]), _open(path)
        edges = np.linspace(0, count, min(count, max(1, round(count / rate / window))) + 1).astype(
            np.int64
        )
        for first, last in zip(edges.tolist(), edges[1:].tolist()):
            wanted, frames, start, end = (
                (first + frame_indices(last - first, num_frames)).tolist(),
                {},
                0.0,
                0.0,
            )
            while position < last and capture.grab():
                end = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
                if position == first:
                    start = end
                if position in wanted:
                    decoded, image = capture.retrieve()
                    if not decoded:
                        break
                    frames[position] = _square(image, size)
                position += 1
            if position < last and position < max(1, TRUNCATED_BELOW * count):
                raise VideoError(
                    f"{path}: truncated or damaged: {position} of {count} frames decode; fetch it again "
                    "or remove it"
                )
            if frames:
                there = [
                    frames[index] for index in wanted if index in frames
                ]  # not all T where the frames end early
                yield (
                    start,
                    end + 1 / rate,
                    np.stack([there[i] for i in frame_indices(len(there), num_frames)]),
                )
            if position < last:
                return
    except cv2.error as error:
        raise VideoError(
            f"{path}: OpenCV cannot decode it ({error.err}); fetch it again or remove it"
        ) from error


def glimpse(
    path: str | Path, num_frames: int, *, size: int, start: float, end: float
) -> np.ndarray:
    """About the frames of seconds start … end, uint8 [T, H, W, 3], RGB, for a person to look at.

    Seeks once, so that the end of a long film costs no more than its beginning; where the file's
    index is wrong, the frames may be late: never for a model. Raises VideoError.
    """
    path, frames, shown = str(path), [], -1.0
    capture = _open(path)
    capture.set(
        cv2.CAP_PROP_POS_MSEC, 1000 * max(0, start - 1)
    )  # a second early: at a variable rate it lands late
    half = 0.5 / max(capture.get(cv2.CAP_PROP_FPS), 1.0)  # of a frame: time stamps are rounded
    for moment in start + (np.arange(num_frames) + 0.5) / num_frames * (end - start):
        while shown < moment - half and capture.grab():
            shown = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        decoded, image = capture.retrieve()
        if decoded:
            frames.append(_square(image, size))
    if not frames:
        raise VideoError(f"{path}: no frame of seconds {start:.1f} to {end:.1f} decodes")
    return np.stack([frames[i] for i in frame_indices(len(frames), num_frames)])  # [T, H, W, 3]


def _check_name(path: str) -> None:
    """OpenCV crashes (segmentation fault) on a name that is not UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise VideoError(f"{path}: OpenCV takes only names in UTF-8; rename the file") from error


def write_video(path: str | Path, frames: np.ndarray, rate: float = 25.0) -> None:
    """Write uint8 [T, H, W, 3] RGB frames as an mp4 file (codec mp4v, lossy), by OpenCV."""
    height, width = frames.shape[1:3]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), rate, (width, height))
    assert writer.isOpened(), f"{path}: OpenCV cannot write mp4 here"
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()
