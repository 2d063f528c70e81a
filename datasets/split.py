"""A split: videos, captions, and which is of which; and what a model has learned from."""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from videos.decode import is_there


@dataclass
class Split:
    """Videos, captions, and which video each caption is of."""

    video_paths: list[str]
    captions: list[str]
    video_of_caption: np.ndarray  # int64 [number of captions], index into video_paths
    # {path: why} of videos that belong here but cannot be used
    broken: dict[str, str] = field(default_factory=dict)
    # the seconds of each video that belong to it; None = to the end
    window: tuple[float, float | None] = (0.0, None)
    places: list[str] = field(default_factory=list)  # folders where its videos were looked for
    # how many "videos", "captions", "questions" there should be, where that is fixed
    official: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[str, str]]) -> "Split":
        """From (video path, caption) pairs. The same path is the same video."""
        number: dict[str, int] = {}
        captions, video_of_caption = [], []
        for path, caption in pairs:
            captions.append(caption)
            video_of_caption.append(number.setdefault(path, len(number)))
        return cls(list(number), captions, np.array(video_of_caption, np.int64))

    def without(self, broken: dict[str, str]) -> "Split":
        """This split without some videos, {path: why}, and their captions."""
        if not broken:
            return self
        kept = np.array([path not in broken for path in self.video_paths], bool)
        keeps = kept[self.video_of_caption]
        new_number = np.cumsum(kept) - 1
        return replace(
            self,
            video_paths=[path for path in self.video_paths if path not in broken],
            captions=[caption for caption, keep in zip(self.captions, keeps) if keep],
            video_of_caption=new_number[self.video_of_caption[keeps]],
            broken=self.broken | broken,
        )

    def count(self) -> dict[str, int]:
        return dict(videos=len(self.video_paths), captions=len(self.captions))

    def count_broken(self) -> dict[str, int]:
        """{"missing": videos that are not on the disk, "broken": those that do not decode}."""
        missing = sum(not is_there(path) for path in self.broken)
        return dict(missing=missing, broken=len(self.broken) - missing)

    def summarize_broken(self) -> str:
        """The same in words."""
        total = len(self.video_paths) + len(self.broken)
        kinds = "{missing} missing, {broken} broken".format(**self.count_broken())
        return f"{len(self.broken)} of {total} videos cannot be used ({kinds})"

    def describe_broken(self) -> str:
        """Lines for the user: which videos are not used, and why; "" if there are none."""
        if not self.broken:
            return ""
        reasons = list(self.broken.values())
        lines = [f"{self.summarize_broken()}:", *reasons[:20]]
        if reasons[20:]:
            lines.append(f"… and {len(reasons) - 20} more")
        return "\n    ".join(lines)

    def describe_captions(self) -> str:
        """What is odd about the captions, in words; "" if nothing is."""
        written = [caption for caption in self.captions if caption.strip()]
        rows = map(hash, zip(self.video_of_caption.tolist(), self.captions))
        different = len(np.unique(np.fromiter(rows, np.int64)))  # there may be millions
        counts = {
            "empty": len(self.captions) - len(written),
            "without a Latin letter": sum(not re.search("[A-Za-z]", text) for text in written),
            "repeated for the same video": len(self.captions) - different,
        }
        odd = [f"{count} {what}" for what, count in counts.items() if count]
        return f"{len(self.captions)} captions: {', '.join(odd)}" if odd else ""


@dataclass
class Question:
    """Which of these captions is the video's?"""

    video: str
    options: list[str]
    answer: int  # index of the right option
    kind: str = ""  # what the wrong ones differ in, where the data set says so


@dataclass
class TrainedOn:
    """Which videos a model has learned from.

    Their names tell, without folder and ending: the same video may lie in another data set.
    """

    names: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # hashes, sorted
    # {data set: [its videos that were used, its videos]}
    counts: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, dataset: str, split: Split) -> "TrainedOn":
        used = len(split.video_paths)
        total = split.official.get("videos", used + len(split.broken))
        return cls(np.unique(hash_names(split.video_paths)), {dataset: [used, total]})

    def __or__(self, later: "TrainedOn") -> "TrainedOn":
        return TrainedOn(np.union1d(self.names, later.names), self.counts | later.counts)

    def doubts(self, paths: list[str]) -> list[str]:
        """Why results on these videos would not be comparable."""
        found = []
        for dataset, (used, total) in self.counts.items():
            if used != total:
                found.append(f"trained on {used:,} of {total:,} videos of {dataset}")

        known = int(np.isin(hash_names(paths), self.names).sum())
        if known:
            what = f"{known:,} of these {len(paths):,} videos"
            found.append(f"{what} bear names that it was trained on: not comparable")
        return found


def hash_names(paths: list[str]) -> np.ndarray:
    """int64 [n], of the names of files without folders and endings."""
    digests = bytearray()
    for path in paths:
        name = os.path.splitext(os.path.basename(path))[0].encode("utf-8", "surrogateescape")
        digests += hashlib.blake2b(name, digest_size=8).digest()
    return np.frombuffer(digests, "<i8")
