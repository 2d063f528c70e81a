"""Videos with captions -> batches of tensors, and which pairs share a batch.

A **sample** is one (video, caption) pair. A video with twenty captions is twenty samples: it is
seen twenty times an epoch, each time with other frames.

    load_split -> Split -> PairDataset -> read_batches(jobs):

    video      uint8   [B, T, H, W, 3]   prepare_video makes float32 [B, T, C, H, W] of it
    tokens     int64   [B, L]            text_mask: bool [B, L], True = real token
    concepts   float32 [B, K]            multi-hot
    signature  int64   [B, 2]            video and meaning: equal in one = not negatives

**Batch composition decides the negatives.** The contrastive loss shows each video its own caption
and B - 1 wrong ones, and these are what the other samples of the batch say. In a random batch "a
dog chases a cat" meets "a man plays the guitar": any single word tells them apart. Whether the
model knows who chases whom is asked only when "a cat chases a dog" is in the same batch. Among
thousands of captions chance almost never puts it there. `KnowledgeBatchSampler` does: part of each
batch are groups of samples that the model mixes up and knowledge calls different. The rest stays
random.

**Decoded once, or while training.** Where the frames of all videos fit into the cache,
`keep_decodable` decodes them before the first step, and `read_batches` finds them there. Where they
do not (2.5 million videos take 6 TB), it lets processes decode them. Both see the same pixels.

Everything random is a pure function of (seed, epoch, sample), and which samples meet, of the model
at the start of the plan. A resumed run, or one on another number of processes, sees the same
batches and the same frames. No picture is flipped or turned: captions say "left" and "upside down".

    python data.py FILE.csv     a random and a guided batch (without a file: of made-up captions)
"""

import contextlib
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from einops import rearrange
from scipy.sparse import csr_array

from captions.tokenizer import Tokenizer
from cli import UserError, run
from datasets.published import load_split
from datasets.split import Split
from knowledge import ConceptVocab, Knowledge, extract_many, meaning_ids, unit_rows
from videos.cache import FrameCache, Want
from videos.decode import VideoError, frame_indices
from videos.workers import guard, prefetch, try_all

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, R, G, B in 0 … 1
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

# of videos that are found broken while training
AT_LEAST = 100  # videos of which --max-broken is a share, so that the first one stops no run
ATTEMPTS = 100  # videos for one place in a batch

POOL = 2  # captions that are looked through, for each that is planned

# ---- frames --------------------------------------------------------------------------------------


def open_cache(
    folder: str | Path, model_config, *, gigabytes: float = math.inf, num_videos: int = 0
) -> FrameCache:
    """The cache for a model's frames. It keeps twice T: training draws other ones each epoch."""
    sizes = dict(size=model_config.image_size, num_frames=2 * model_config.num_frames)
    return FrameCache(folder, **sizes, gigabytes=gigabytes, num_videos=num_videos)


def keep_decodable(
    split: Split,
    cache: FrameCache,
    *,
    max_broken: float = 0.05,
    workers: int | None = None,
    progress: bool = True,
) -> Split:
    """Fill the cache with the split's videos; the split without those that cannot be used.

    What is missing or broken goes into its `broken`. Raises UserError, naming the first, if that is
    more than the share `max_broken` of all videos, or if none is left.
    """
    start, end = split.window
    window = dict(start=start, end=end)
    reasons = cache.fill(split.video_paths, **window, workers=workers, progress=progress)
    kept = split.without(reasons)
    check_broken(kept, max_broken)
    if progress and kept.broken:
        print(kept.describe_broken())
    return kept


def check_broken(split: Split, max_broken: float) -> None:
    """Raise UserError where too many of a split's videos, or all, are broken."""
    total = len(split.video_paths) + len(split.broken)
    if len(split.broken) > max_broken * total or not len(split.video_paths):
        first = next(iter(split.broken.values()))
        looked = f" (looked in {', '.join(split.places)}; elsewhere: --videos-root)"
        raise UserError(
            f"{split.summarize_broken()}, more than the {max_broken:.0%} of --max-broken; "
            f"`python -m datasets.check` lists all; the first: {first}"
            f"{looked if split.places else ''}"
        )


def load_videos(
    cache: FrameCache,
    paths: Sequence[str],
    num_frames: int,
    window: tuple[float, float | None] = (0.0, None),
) -> torch.Tensor:
    """T uniform ones of the cached frames of each video, uint8 [B, T, H, W, 3].

    window: the seconds of each video that count (see Split).
    """
    only = frame_indices(cache.num_frames, num_frames)
    return torch.from_numpy(np.stack([cache.get(path, *window, only=only) for path in paths]))


def prepare_video(video: torch.Tensor) -> torch.Tensor:
    """uint8 [B, T, H, W, 3] -> float32 [B, T, C, H, W], normalised as CLIP's training images.

    To be called where the model is: bytes travel to the device, not floats.
    """
    assert video.dtype == torch.uint8, f"{video.dtype}: not uint8"
    mean = torch.tensor(PIXEL_MEAN, device=video.device)[:, None, None]
    std = torch.tensor(PIXEL_STD, device=video.device)[:, None, None]

    pixels = rearrange(video, "b t h w c -> b t c h w").contiguous().float()
    return pixels.mul_(1 / (255 * std)).sub_(mean / std)


# ---- samples: what the model sees ----------------------------------------------------------------


class PairDataset:
    """The samples of a split, fetched a whole batch at a time."""

    def __init__(
        self,
        split: Split,
        cache: FrameCache,
        tokenizer: Tokenizer,
        concept_vocab: ConceptVocab,
        knowledge: Knowledge,
        *,
        text_length: int,
    ):
        """knowledge: of the split's captions, in their order. text_length: tokens at most."""
        assert len(knowledge) == len(split.captions), (len(knowledge), len(split.captions))
        self.split, self.cache, self.tokenizer = split, cache, tokenizer
        self.text_length = text_length
        self.held = concept_vocab.encode(knowledge)  # sparse [N, K]
        self.video_id = split.video_of_caption  # int64 [N]
        # the captions of a video have equal shares in it: sparse [videos, N]
        self.shares = by_video(self.video_id, 1 / np.bincount(self.video_id)[self.video_id])
        self.meaning_id = meaning_ids(split.captions, knowledge)  # int64 [N]

    def __len__(self) -> int:
        return len(self.split.captions)

    def want(self, sample: int, num_frames: int, rng: np.random.Generator) -> Want:
        """The frames that the sample shows: T random ones, of those that the cache keeps."""
        path = self.split.video_paths[self.video_id[sample]]
        only = frame_indices(self.cache.num_frames, num_frames, "segment", rng)
        return Want(path, *self.split.window, only.tolist())

    def collate(self, samples: Sequence[int], video: np.ndarray) -> dict[str, torch.Tensor]:
        """The batch of the captions of these samples, and the frames of the first of them
        [B, T, H, W, 3].
        """
        captions = [self.split.captions[i] for i in samples]
        tokens, text_mask = self.tokenizer.encode_batch(captions, self.text_length)
        signature = np.stack([self.video_id[samples], self.meaning_id[samples]], axis=1)
        shown = self.video_id[samples[: len(video)]]
        video_concepts = self.shares[shown] @ self.held  # the share of its captions that hold one
        return dict(
            video=torch.from_numpy(video),
            tokens=tokens,
            text_mask=text_mask,
            concepts=torch.from_numpy(self.held[samples].toarray()),
            video_concepts=torch.from_numpy(video_concepts.toarray()),
            signature=torch.from_numpy(signature),
        )


def by_video(video_id: np.ndarray, weight: np.ndarray) -> csr_array:
    """Weights of captions [N], each in the row of its video: sparse [videos, N].

    Times what the captions hold, it is the weighted sum for each video.
    """
    return csr_array((weight.astype(np.float32), (video_id, np.arange(len(video_id)))))


class Job(NamedTuple):
    """A batch to load: these samples and captions, and what decides on the frames."""

    samples: np.ndarray
    captions: np.ndarray  # samples of which only the caption is shown
    first: int  # place of the first of them in the epoch
    epoch: int
    num_frames: int


def read_batches(
    dataset: PairDataset, jobs: Iterable[Job], *, seed: int, workers: int, max_broken: float
) -> Iterator[dict[str, torch.Tensor]]:
    """The batches of the jobs, in order, read ahead by `workers` threads.

    Where the cache does not keep all videos, each thread has a process that decodes for it. Raises
    UserError where more than about the share `max_broken` of the videos are broken.
    """
    cache = dataset.cache
    guarded = guard(cache.read, workers)
    if cache.share == 1:
        guarded = contextlib.nullcontext(functools.partial(try_all, cache.read))
    with guarded as read_all:
        reader = BatchReader(dataset, read_all, seed, max_broken)
        try:
            yield from prefetch(reader.load, jobs, workers)
        finally:
            dataset.split.broken |= reader.broken


@dataclass
class BatchReader:
    """Loads batches, for several threads at once. Another video takes the place of a broken one.

    Which one follows from the place in the epoch and the number of the attempt. So a run that is
    resumed, or runs on another number of processes, sees the same batches.
    """

    dataset: PairDataset
    read_all: Callable[[list[Want]], list]  # the frames of each, or VideoError
    seed: int
    max_broken: float
    broken: dict[str, str] = field(default_factory=dict)  # {path: reason}, so far
    num_read: int = 0  # about: threads may lose a count

    def load(self, job: Job) -> dict[str, torch.Tensor]:
        samples, video = job.samples.tolist(), {}  # {place in the batch: frames}
        for attempt in range(1, ATTEMPTS + 1):
            self.read_missing(job, samples, video)
            if len(video) == len(samples):
                frames = np.stack([video[i] for i in range(len(samples))])
                return self.dataset.collate([*samples, *job.captions], frames)

            for i in range(len(samples)):
                if i not in video:
                    rng = np.random.default_rng((self.seed, job.epoch, job.first + i, attempt))
                    samples[i] = int(rng.integers(len(self.dataset)))
        self.give_up()

    def read_missing(self, job: Job, samples: list[int], video: dict[int, np.ndarray]) -> None:
        """Add to `video` what of these samples is not there and can be read."""
        wants = {}
        for i, sample in enumerate(samples):
            if i not in video:
                rng = np.random.default_rng((self.seed, job.epoch, sample))
                want = self.dataset.want(sample, job.num_frames, rng)
                if want.path not in self.broken:
                    wants[i] = want

        results = self.read_all(list(wants.values()))
        for (i, want), result in zip(wants.items(), results):
            if isinstance(result, VideoError):
                self.note_broken(want.path, str(result))
            else:
                video[i] = result
                self.num_read += 1

    def note_broken(self, path: str, reason: str) -> None:
        if self.broken.setdefault(path, reason) is not reason:
            return  # another thread was faster
        if len(self.broken) <= 20:
            print(f"another video takes the place of {reason}", file=sys.stderr, flush=True)
        num_tried = self.num_read + len(self.broken)
        if len(self.broken) > self.max_broken * max(num_tried, AT_LEAST):
            self.give_up()

    def give_up(self) -> NoReturn:
        count = f"{len(self.broken)} of {self.num_read + len(self.broken)} videos read so far"
        raise UserError(
            f"{count} cannot be used, more than the {self.max_broken:.0%} of --max-broken; the "
            f"first: {next(iter(self.broken.values()))}"
        )


# ---- batches: which pairs meet -------------------------------------------------------------------


class KnowledgeBatchSampler:
    """Batches in which groups of samples are hard to tell apart; each at most once per plan.

    A batch may also have captions without their videos, drawn at random, which are negatives alone:
    nearly free, where a video costs many times as much as a caption. Some hundred batches are
    planned at once, one method a step:

    1. `plan`          a shuffle. Some samples become anchors. Among twice as many captions as are
                       planned, the caller names the hardest for each anchor: those that the model
                       mixes up with its own
    2. `make_groups`   an anchor and the hardest of them that are negatives of each other
    3. `find_true`     knowledge says which are not: a caption may be true of another's video, too
    4. `deal`          the groups go evenly to the batches, other samples fill the rest

    Paper: "knowledge-guided sampling" of "hard negatives" is all that the abstract says; the way is
    our own. Groups of captions that share most words, without a model, teach less (docs/LOG.md).
    """

    def __init__(
        self,
        held: csr_array,
        video_id: np.ndarray,
        *,
        batch_size: int,
        seed: int = 0,
        guided_share: float = 0.5,
        group_size: int = 4,
        text_negatives: float = 0.0,
    ):
        """held [N, K], sparse: the concepts of each sample; video_id [N].

        batch_size: of the whole batch, which all processes share. text_negatives: captions without
        their video, for each sample of it. Raises UserError where batch_size is more than there are
        samples.
        """
        size = held.shape[0]
        if not 0 < batch_size <= size:
            raise UserError(
                f"--batch-size {batch_size}: must be from 1 to {size}, the samples of the data set"
            )
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.groups_per_batch = round(guided_share * batch_size) // group_size
        self.group_size = group_size
        self.num_captions = round(text_negatives * batch_size)  # without their videos

        self.held, self.video_id = held, np.asarray(video_id)
        self.num_said = held.sum(axis=1)  # [N], concepts of each caption
        # what all captions of a video say of it, [videos, K]
        self.known = by_video(self.video_id, np.ones(size)) @ held
        self.known.data[:] = 1

    def __len__(self) -> int:
        """Batches per epoch. What does not fill one is left out: other samples each epoch."""
        return self.size // self.batch_size

    def plan(
        self, epoch: int, num_batches: int | None = None, find_hardest: Callable | None = None
    ) -> np.ndarray:
        """The batches of an epoch, int64 [num_batches, batch_size + x]: samples, x captions alone.

        find_hardest(anchors [A], pool [P]) -> [A, k] samples of the pool, the hardest first.
        Without it, or without a guided share, all are drawn at random.
        """
        num_batches = len(self) if num_batches is None else num_batches
        rng = np.random.default_rng((self.seed, epoch))
        shuffled = rng.permutation(self.size)
        planned = shuffled[: num_batches * self.batch_size]
        wanted = num_batches * self.groups_per_batch
        groups = []
        if find_hardest and wanted:
            # some get into the group of another one before their turn; 256: a share for each rank
            anchors = planned[: max(wanted * 3 // 2, 256)]
            pool = shuffled[: POOL * len(planned)]
            groups = self.make_groups(anchors, find_hardest(anchors, pool), wanted)
        captions = rng.integers(self.size, size=(num_batches, self.num_captions))
        groups = [groups[i] for i in rng.permutation(len(groups))]
        return np.concatenate([self.deal(groups, planned, num_batches), captions], axis=1)

    def make_groups(
        self, anchors: np.ndarray, hardest: np.ndarray, wanted: int
    ) -> list[np.ndarray]:
        """At most `wanted` disjoint groups: an anchor and its hardest free ones, [group_size]."""
        is_free = np.ones(self.size, bool)
        groups = []
        for anchor, others in zip(anchors, hardest):
            if len(groups) == wanted:
                break
            if not is_free[anchor]:
                continue
            candidates = np.concatenate([[anchor], others[is_free[others] & (others != anchor)]])

            clash = self.find_true(candidates, candidates)
            clash |= clash.T
            places = [0]  # among the candidates: the anchor
            for place in range(1, len(candidates)):
                if len(places) < self.group_size and not clash[place, places].any():
                    places.append(place)
            if len(places) == self.group_size:
                group = candidates[places]
                is_free[group] = False
                groups.append(group)
        return groups

    def find_true(self, samples: np.ndarray, captions: np.ndarray) -> np.ndarray:
        """Which of these captions may be true of the videos of these samples: [samples, captions].

        It is true if it says nothing but what the captions of that video say, too: "a dog runs" is
        no negative of "a black dog runs".
        """
        video = self.video_id[samples]
        num_true = (self.known[video] @ self.held[captions].T).toarray()
        is_its_own = video[:, None] == self.video_id[captions]
        return (num_true == self.num_said[captions]) | is_its_own

    def deal(self, groups: list, planned: np.ndarray, num_batches: int) -> np.ndarray:
        """Each batch begins with its share of the groups; the rest of `planned` fills it."""
        is_free = np.ones(self.size, bool)
        for group in groups:
            is_free[group] = False
        others, used = planned[is_free[planned]], 0

        batches = []
        for n in range(num_batches):
            guided = groups[n::num_batches]
            num_others = self.batch_size - self.group_size * len(guided)
            batches.append(np.concatenate([*guided, others[used : used + num_others]]))
            used += num_others
        return np.stack(batches)


def find_overlapping(words: csr_array, anchors: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """Where there is no model: the 64 captions of the pool that share most with each anchor.

    words: unit rows of the concepts that count (knowledge.unit_rows). For small sets: [A, P].
    """
    overlap = (words[anchors] @ words[pool].T).toarray()
    return pool[np.argsort(-overlap, axis=1, kind="stable")[:, :64]]


# ---- demo ----------------------------------------------------------------------------------------


def main():
    if len(sys.argv) > 1:
        split = load_split("csv", sys.argv[1])
    else:
        who = "dog cat girl boy robot horse".split()
        does = "chases pushes follows lifts paints watches".split()
        scenes = [scene for scene in itertools.product(who, does, who) if scene[0] != scene[2]]
        split = Split.from_pairs((f"{scene}", "a {} {} a {}".format(*scene)) for scene in scenes)
    print(f"{len(split.captions)} captions of {len(split.video_paths)} videos")

    knowledge = extract_many(split.captions, progress=False)
    vocab = ConceptVocab.build(knowledge, min_count=1)
    held = vocab.encode(knowledge)
    find_hardest = functools.partial(find_overlapping, unit_rows(held, vocab.word_idf))
    how = dict(batch_size=12, guided_share=0.5, group_size=6)
    sampler = KnowledgeBatchSampler(held, split.video_of_caption, **how)

    for name, find in (("random", None), ("guided", find_hardest)):
        print(f"a {name} batch:")
        for sample in sampler.plan(epoch=0, find_hardest=find)[0]:
            print(f"    {split.captions[sample]}")


if __name__ == "__main__":
    run(main)
