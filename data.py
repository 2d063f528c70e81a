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
batch are groups of samples that share much knowledge. The rest stays random.

**Decoded once, or while training.** Where the frames of all videos fit into the cache,
`keep_decodable` decodes them before the first step, and `read_batches` finds them there. Where they
do not (2.5 million videos take 6 TB), it lets processes decode them. Both see the same pixels.

Everything random is a pure function of (seed, epoch, sample). A resumed run, or one on another
number of processes, sees the same batches and the same frames. No picture is flipped or turned:
captions say "left" and "upside down".

    python data.py FILE.csv     a random and a guided batch (without a file: of made-up captions)
"""

import contextlib
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
from knowledge import ConceptVocab, Knowledge, extract_many, meaning_ids
from videos.cache import FrameCache, Want
from videos.decode import VideoError, frame_indices
from videos.workers import guard, prefetch

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, R, G, B in 0 … 1
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

# of videos that are found broken while training
AT_LEAST = 100  # videos of which --max-broken is a share, so that the first one stops no run
ATTEMPTS = 100  # videos for one place in a batch

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
        self.meaning_id = meaning_ids(split.captions, knowledge)  # int64 [N]

    def __len__(self) -> int:
        return len(self.split.captions)

    def want(self, sample: int, num_frames: int, rng: np.random.Generator) -> Want:
        """The frames that the sample shows: T random ones, of those that the cache keeps."""
        path = self.split.video_paths[self.video_id[sample]]
        only = frame_indices(self.cache.num_frames, num_frames, "segment", rng)
        return Want(path, *self.split.window, only.tolist())

    def collate(self, samples: Sequence[int], video: np.ndarray) -> dict[str, torch.Tensor]:
        """The batch of these samples and their frames [B, T, H, W, 3]."""
        captions = [self.split.captions[i] for i in samples]
        tokens, text_mask = self.tokenizer.encode_batch(captions, self.text_length)
        signature = np.stack([self.video_id[samples], self.meaning_id[samples]], axis=1)
        return dict(
            video=torch.from_numpy(video),
            tokens=tokens,
            text_mask=text_mask,
            concepts=torch.from_numpy(self.held[samples].toarray()),
            signature=torch.from_numpy(signature),
        )


class Job(NamedTuple):
    """A batch to load: these samples, and what decides on their frames."""

    samples: np.ndarray
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
    is_cached = cache.share == 1
    guarded = contextlib.nullcontext(cache.read) if is_cached else guard(cache.read, workers)
    with guarded as read:
        reader = BatchReader(dataset, read, seed, max_broken)
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
    read: Callable[[Want], np.ndarray]
    seed: int
    max_broken: float
    broken: dict[str, str] = field(default_factory=dict)  # {path: reason}, so far
    num_read: int = 0  # about: threads may lose a count

    def load(self, job: Job) -> dict[str, torch.Tensor]:
        samples, video = [], []
        for place, sample in enumerate(job.samples, job.first):
            sample, frames = self.read_sample(job, place, int(sample))
            samples.append(sample)
            video.append(frames)
        return self.dataset.collate(samples, np.stack(video))

    def read_sample(self, job: Job, place: int, sample: int) -> tuple[int, np.ndarray]:
        """(sample, its frames) for this place in the epoch: of another one if it is broken."""
        for attempt in range(1, ATTEMPTS + 1):
            rng = np.random.default_rng((self.seed, job.epoch, sample))
            want = self.dataset.want(sample, job.num_frames, rng)
            if want.path not in self.broken:
                try:
                    frames = self.read(want)
                    self.num_read += 1
                    return sample, frames
                except VideoError as error:
                    self.note_broken(want.path, str(error))

            rng = np.random.default_rng((self.seed, job.epoch, place, attempt))
            sample = int(rng.integers(len(self.dataset)))
        self.give_up()

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
    """Batches in which groups of samples share knowledge; every sample at most once per epoch.

    An epoch is planned as a whole, by sorting. Nothing of size N × N is ever made. The steps, one
    method each:

    1. `plan`                a shuffle; from batch `guided_from` of the run on with groups
    2. `sort_as_dictionary`  sort the samples so that neighbours in the list share concepts
    3. `group_neighbours`    in each stretch of neighbours: an anchor, and what shares most with it
    4. `deal`                the groups go evenly to the batches, all other samples fill the rest

    Overlap here is that of nouns and verbs (weights = ConceptVocab.word_idf). What shares every
    word with "a dog chases a cat" and says something else is "a cat chases a dog", its hardest
    negative. By κ "a cow chases a cat" is nearer, since it shares the relation too; groups by κ
    hold even fewer such pairs than random batches do (docs/LOG.md). Paper: "knowledge-guided
    sampling" of "hard negatives" is all that the abstract says; the way is our own.
    """

    STRETCH = 64  # neighbours that a group is chosen from: more find higher overlaps, and cost more
    LETTERS = 12  # concepts of a sample that planning looks at, the rarest first
    # the smallest overlap with the anchor, by round: the closest captions meet first
    FLOORS = [0.4] * 4 + [0.3] * 4 + [0.2] * 3 + [0.1] * 2 + [0.0] * 2

    def __init__(
        self,
        held: csr_array,
        weights: np.ndarray,
        video_id: np.ndarray,
        meaning_id: np.ndarray,
        *,
        batch_size: int,
        seed: int = 0,
        guided_share: float = 0.5,
        guided_from: int = 0,
        group_size: int = 4,
    ):
        """held [N, K], sparse: the concepts of each sample. weights [K]. The ids are [N].

        batch_size: of the whole batch, which all processes share. Raises UserError where it is more
        than there are samples.
        """
        size = held.shape[0]
        assert size == len(video_id) == len(meaning_id), (size, len(video_id), len(meaning_id))
        if not 0 < batch_size <= size:
            raise UserError(
                f"--batch-size {batch_size}: must be from 1 to {size}, the samples of the data set"
            )

        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.groups_per_batch = round(guided_share * batch_size) // group_size
        self.guided_from, self.group_size = guided_from, group_size

        self.video_id, self.meaning_id = np.asarray(video_id), np.asarray(meaning_id)
        self.num_concepts = held.shape[1]
        # one more, of weight 0, for empty places
        self.weights = np.append(weights, 0).astype(np.float32)
        self.ids, self.inverse_norm = self.rarest_concepts(held)

    def rarest_concepts(self, held: csr_array) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [N, P], 1 / norm [N]): each sample's P rarest concepts, and its length.

        The length is that of the whole vector. Empty places hold the id K. A sample without
        concepts has 1 / norm = 0.
        """
        square_norm = held @ self.weights[:-1].astype(np.float64) ** 2
        norm = np.sqrt(square_norm).astype(np.float32)
        inverse_norm = np.divide(1, norm, out=np.zeros_like(norm), where=norm > 0)

        # number the concepts by rarity: then each row in ascending order begins with its rarest
        by_rarity = np.argsort(-self.weights[:-1], kind="stable")
        ranked = held[:, by_rarity].tocsr()
        ranked.sort_indices()

        row_length = np.diff(ranked.indptr)
        row = np.repeat(np.arange(self.size), row_length)
        place = np.arange(ranked.nnz) - ranked.indptr[row]  # 0, 1, 2, … within each row
        num_places = min(self.LETTERS, max(1, row_length.max(initial=0)))
        ids = np.full((self.size, num_places), self.num_concepts, np.int32)
        fits = place < num_places
        ids[row[fits], place[fits]] = by_rarity[ranked.indices[fits]]
        return ids, inverse_norm

    def __len__(self) -> int:
        """Batches per epoch. What does not fill one is left out: other samples each epoch."""
        return self.size // self.batch_size

    def batches(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """The samples, int64 [batch_size], of each batch of the epoch from number `start` on."""
        order = self.plan(epoch)
        for number in range(start, len(self)):
            yield order[number * self.batch_size : (number + 1) * self.batch_size]

    def plan(self, epoch: int) -> np.ndarray:
        """All samples in the order of the epoch, int64 [N]. Its pieces are the batches."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.size)

        num_plain = min(max(0, self.guided_from - epoch * len(self)), len(self))
        num_guided = len(self) - num_plain
        num_groups = num_guided * self.groups_per_batch
        if num_groups == 0:
            return order

        plain, rest = np.split(order, [num_plain * self.batch_size])
        groups = self.find_groups(rest, num_groups, rng)
        return np.concatenate([plain, self.deal(groups, rest, num_guided)])

    def find_groups(self, pool: np.ndarray, wanted: int, rng: np.random.Generator) -> np.ndarray:
        """At most `wanted` disjoint groups of the samples in `pool`, the closest first.

        Returns [G, group_size]. Each round sorts the samples that have no group yet into a new
        dictionary, and takes groups of less overlap. A caption like no other never gets a group: it
        has no hard negatives.
        """
        pool = pool[self.inverse_norm[pool] > 0]
        found = [np.empty((0, self.group_size), np.int64)]
        missing = wanted

        for floor in self.FLOORS:
            if missing == 0 or len(pool) < self.group_size:
                break
            dictionary = self.sort_as_dictionary(pool, rng)
            groups = self.group_neighbours(dictionary, missing, floor)

            # shuffled, or one batch would get all groups of a concept
            groups = rng.permutation(groups)[:missing]
            found.append(groups)
            missing -= len(groups)
            pool = pool[~np.isin(pool, groups)]

        return np.concatenate(found)

    def sort_as_dictionary(self, pool: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The pool in the order of a dictionary whose alphabet of concepts is new each time.

        Each concept draws a number from the exponential distribution of rate w_c, and the alphabet
        is their order. So the first letter of a caption is concept c with probability w_c / Σ w,
        and two captions share it with probability Σ_common w / Σ_either w: weighted min-wise
        hashing (Broder 1997; Ioffe 2010).
        """
        K = self.num_concepts
        draws = rng.exponential(size=K) / np.maximum(self.weights[:-1], 1e-6)
        letter = np.full(K + 1, K, np.int32)  # the empty place K comes last
        letter[np.argsort(draws)] = np.arange(K)
        spelling = np.sort(letter[self.ids[pool]], axis=1)  # [n, P]

        # as many first letters as 63 bits hold, in one number: it sorts faster than rows do
        bits = K.bit_length()
        key = np.zeros(len(pool), np.int64)
        for letters in spelling.T[: 63 // bits]:
            key = (key << bits) | letters
        return pool[np.argsort(key, kind="stable")]

    def group_neighbours(self, dictionary: np.ndarray, wanted: int, floor: float) -> np.ndarray:
        """About `wanted` groups from the dictionary's stretches, or fewer: [G, group_size]."""
        width = min(self.STRETCH, len(dictionary))
        stretches = dictionary[: len(dictionary) // width * width].reshape(-1, width)  # [M, width]
        enough = -(-wanted // len(stretches))  # groups per stretch, rounded up
        per_stretch = min(width // self.group_size, enough)

        at_once = max(1, 2**22 // len(self.weights))  # their anchors' vectors take 16 MB
        parts = np.split(stretches, range(at_once, len(stretches), at_once))
        return np.concatenate([self.group_stretches(part, per_stretch, floor) for part in parts])

    def group_stretches(self, stretches: np.ndarray, per_stretch: int, floor: float) -> np.ndarray:
        """Up to `per_stretch` groups of each stretch [M, W], all stretches in step.

        Returns [G, group_size].
        """
        stretch = np.arange(len(stretches))
        video, meaning = self.video_id[stretches], self.meaning_id[stretches]  # [M, W]
        is_free = np.ones(stretches.shape, bool)
        may_lead = np.ones(stretches.shape, bool)
        groups = []

        for _ in range(per_stretch):
            # the anchor: the first free sample that was no anchor yet
            place = np.argmax(is_free & may_lead, axis=1)  # [M]
            is_whole = is_free[stretch, place]
            may_lead[stretch, place] = False
            overlap = self.overlaps(stretches[stretch, place], stretches)
            overlap[~is_free] = 0

            # the others join one by one: most overlap, and no false negative of any member
            members = [place]
            for _ in range(self.group_size - 1):
                same_video = video == video[stretch, place][:, None]
                same_meaning = meaning == meaning[stretch, place][:, None]
                overlap[same_video | same_meaning] = 0
                place = np.argmax(overlap, axis=1)
                is_whole &= overlap[stretch, place] > floor
                members.append(place)

            places = np.stack(members, axis=1)[is_whole]  # [G, group_size]
            rows = stretch[is_whole][:, None]
            is_free[rows, places] = False
            groups.append(stretches[rows, places])

        return np.concatenate(groups)

    def overlaps(self, anchors: np.ndarray, stretches: np.ndarray) -> np.ndarray:
        """Overlap of each anchor [M] with the samples of its own stretch [M, W]: [M, W]."""
        row = np.arange(len(anchors))[:, None]
        anchor_vector = np.zeros((len(anchors), len(self.weights)), np.float32)  # [M, K + 1]
        anchor_vector[row, self.ids[anchors]] = self.shares(anchors)
        at_concepts = anchor_vector[row[:, :, None], self.ids[stretches]]  # [M, W, P]
        return np.einsum("mwp,mwp->mw", at_concepts, self.shares(stretches))

    def shares(self, samples: np.ndarray) -> np.ndarray:
        """The entries of the samples' unit vectors at their `ids`: [..., P]."""
        return self.weights[self.ids[samples]] * self.inverse_norm[samples][..., None]

    def deal(self, groups: np.ndarray, rest: np.ndarray, num_batches: int) -> np.ndarray:
        """All of `rest` in order: each batch begins with its share of the groups."""
        others = rest[~np.isin(rest, groups)]

        # batch i gets the groups from ends[i] to ends[i + 1]: as even as whole groups can be
        ends = (np.arange(num_batches + 1) * len(groups) + num_batches - 1) // num_batches
        order, used = [], 0
        for first, last in itertools.pairwise(ends):
            guided = groups[first:last].ravel()
            num_others = self.batch_size - len(guided)
            order += [guided, others[used : used + num_others]]
            used += num_others
        return np.concatenate([*order, others[used:]])


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
    held, meaning = vocab.encode(knowledge), meaning_ids(split.captions, knowledge)
    samples = (held, vocab.word_idf, split.video_of_caption, meaning)
    for share in (0.0, 0.5):
        sampler = KnowledgeBatchSampler(*samples, batch_size=12, guided_share=share, group_size=6)
        print(f"a batch with guided share {share}:")
        for sample in next(sampler.batches(epoch=0)):
            print(f"    {split.captions[sample]}")


if __name__ == "__main__":
    run(main)
