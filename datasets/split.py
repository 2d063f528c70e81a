"""A split: videos, captions, and which video each caption is of."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np


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

    def describe_broken(self, at_most: int = 20) -> str:
        """Lines for the user: which videos are not used, and why; "" if there are none."""
        if not self.broken:
            return ""
        lines = [f"{len(self.broken)} videos cannot be used:"]
        lines += list(self.broken.values())[:at_most]
        if len(self.broken) > at_most:
            lines.append(f"… and {len(self.broken) - at_most} more")
        return "\n    ".join(lines)


@dataclass
class Question:
    """Which of these captions is the video's?"""

    video: str
    options: list[str]
    answer: int  # index of the right option
    kind: str = ""  # what the wrong ones differ in, where the data set says so
