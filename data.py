"""Videos with captions → batches of tensors, and which pairs share a batch.

A split (splits.py) is a list of videos, a list of captions, and which video each caption belongs to. A **sample** is
one (video, caption) pair: a video with twenty captions is twenty samples, seen twenty times an epoch, each time with
other frames.

    load_split → Split → keep_decodable (fills the frame cache, drops broken videos) → PairDataset.batch(indices) → dict
        video       uint8   [B, T, H, W, 3]    prepare_video → float32 [B, T, C, H, W], on the model's device
        tokens      int64   [B, L]             text_mask bool [B, L], True = real token
        concepts    float32 [B, K]             multi-hot
        video_id, meaning_id int64 [B]         equal ids = false negatives of each other

**Batch composition decides the negatives.** The contrastive loss shows each video its own caption and B − 1 wrong
ones, and these are whatever the other samples of the batch say. In a batch drawn at random "a dog chases a cat" meets
"a man plays the guitar": told apart by any single word, a lesson that is soon learned. Whether the model can tell who
chases whom is asked only when "a cat chases a dog" is in the same batch, and among thousands of captions chance
almost never puts it there. `KnowledgeBatchSampler` does: part of each batch are groups of samples that share much
knowledge (Paper: "knowledge-guided sampling"; how the paper samples is not known, this is our own way), the rest
stays random, so that easy distinctions are not forgotten.

Everything random is a pure function of (seed, epoch, sample): a resumed run, or one on another number of processes,
sees the same batches and the same frames. Batches are read ahead by threads (`prefetch`): reading, checksums and
copies release the interpreter lock, so worker processes, with their start-up time, shared memory and ways to die,
would buy little here. No picture is flipped or turned: captions say "left" and "upside down".

    python data.py train.csv        a random and a guided batch of its captions (without a file: of some made-up ones)
    python data.py --check msrvtt --root FOLDER --out list.csv      is all of a data set there, and does it decode?
"""

import collections
import concurrent.futures
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from tyro.conf import Positional

from datasets.check import print_check
from cli import UserError, parse_config, run
from concepts import ConceptSets, ConceptVocab, extract_many, meaning_ids, multi_hot
from datasets.published import load_split
from videos.cache import FrameCache
from datasets.splits import Split
from captions.tokenizer import Tokenizer
from videos.decode import frame_indices

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, R, G, B in 0 … 1
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

# ---- samples: what the model sees ------------------------------------------------------------------------------------


def keep_decodable(split: Split, cache: FrameCache, *, max_broken: float = 0.05, workers: int | None = None,
                   progress: bool = True) -> Split:
    """Fill the cache with the split's videos; the split without those that are missing or broken (see its `broken`),
    its strings in files beside the frames that all processes share.

    Raises UserError, naming the first, if more than the share `max_broken` of all videos cannot be used, or none is
    left.
    """
    start, end = split.window
    kept = split.without(cache.fill(split.video_paths, start=start, end=end, workers=workers, progress=progress))
    total = len(kept.video_paths) + len(kept.broken)
    if len(kept.broken) > max_broken * total or not kept.video_paths:
        raise UserError(f"{len(kept.broken)} of {total} videos cannot be used, more than the {max_broken:.0%} that "
                        f"may be broken; the first: {next(iter(kept.broken.values()))}")
    if progress and kept.broken:
        print(kept.describe_broken())
    return kept.stored(cache.folder / "strings")


def open_cache(folder: str | Path, model_config) -> FrameCache:
    """The cache for a model's frames: twice the T that it takes, so that training draws other ones each epoch."""
    return FrameCache(folder, size=model_config.image_size, num_frames=2 * model_config.num_frames)


def load_videos(cache: FrameCache, paths: list[str], num_frames: int, rngs: list | None = None,
                window: tuple[float, float | None] = (0.0, None)) -> torch.Tensor:
    """T of the cached frames of each video, uint8 [B, T, H, W, 3]: uniform, or by segments with a Generator a video.

    window: the seconds of each video that count (see Split).
    """
    video = np.empty((len(paths), num_frames, cache.size, cache.size, 3), np.uint8)
    sampling = "segment" if rngs else "uniform"
    for i, path in enumerate(paths):
        wanted = frame_indices(cache.num_frames, num_frames, sampling, rngs[i] if rngs else None)
        video[i] = cache.get(path, *window)[wanted]
    return torch.from_numpy(video)


def prepare_video(video: torch.Tensor) -> torch.Tensor:
    """uint8 [B, T, H, W, 3] → float32 [B, T, C, H, W], normalised by CLIP's channel means and deviations.

    To be called where the model is: bytes travel to the device, not floats.
    """
    assert video.dtype == torch.uint8 and video.shape[-1] == 3, f"{video.dtype} {[*video.shape]}: not uint8 [..., 3]"
    mean, std = (torch.tensor(values, device=video.device)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    return rearrange(video, "b t h w c -> b t c h w").contiguous().float().mul_(1 / (255 * std)).sub_(mean / std)


class PairDataset:
    """The samples of a split, fetched a whole batch at a time."""

    def __init__(self, split: Split, cache: FrameCache, tokenizer: Tokenizer, concept_vocab: ConceptVocab,
                 knowledge: list[dict], *, length: int):
        """`knowledge[i]` is what `extract_knowledge` says of caption i; texts have at most `length` tokens."""
        assert len(knowledge) == len(split.captions), f"knowledge of {len(knowledge)} of {len(split.captions)} captions"
        self.split, self.cache, self.tokenizer, self.length = split, cache, tokenizer, length
        self.num_concepts = len(concept_vocab)
        self.concept_sets = concept_vocab.encode_many(knowledge)
        self.video_of_sample = split.video_of_caption                  # int64 [N]
        self.meaning_id = meaning_ids(split.captions, knowledge)       # int64 [N]

    def __len__(self) -> int:
        return len(self.split.captions)

    def batch(self, indices: Iterable[int], *, num_frames: int, seed: int | None = None, epoch: int = 0) -> dict:
        """The batch of these samples, as at the top of this file. Frames: random by (seed, epoch, sample); without
        seed, uniform."""
        indices = np.asarray(indices, np.int64)
        rngs = None if seed is None else [np.random.default_rng((seed, epoch, index)) for index in indices.tolist()]
        video_id = self.video_of_sample[indices]
        tokens, text_mask = self.tokenizer.encode_batch([self.split.captions[i] for i in indices], self.length)
        return dict(
            video=load_videos(self.cache, [self.split.video_paths[i] for i in video_id], num_frames, rngs,
                              self.split.window),
            tokens=tokens, text_mask=text_mask,
            concepts=multi_hot([self.concept_sets[i] for i in indices], self.num_concepts),
            video_id=torch.from_numpy(video_id), meaning_id=torch.from_numpy(self.meaning_id[indices]))


def prefetch(load: Callable, jobs: Iterable, workers: int = 2) -> Iterator:
    """load(job) for each job, in order, read ahead by `workers` threads. An error in a thread is raised where it was
    awaited."""
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        ahead = collections.deque()
        try:
            for job in jobs:
                ahead.append(pool.submit(load, job))
                if len(ahead) > workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:  # the consumer stopped early: what has not begun need not
            for future in ahead:
                future.cancel()


# ---- batches: which pairs meet ---------------------------------------------------------------------------------------


class KnowledgeBatchSampler:
    """Batches in which groups of samples share knowledge; every sample exactly once per epoch.

    An epoch is planned as a whole, by sorting; nothing of size N × N or concepts × samples is ever made:

    1. **A dictionary of captions.** Put the concepts into a random order, rare ones tending to the front: each draws
       a number from the exponential distribution of rate w_c and they line up by it. That order is this epoch's
       alphabet. Spell each caption as its concepts in the order of the alphabet and sort the captions as in a
       dictionary. Neighbours now share their first "letters". The first letter is concept c with probability w_c / Σ
       w over the caption's concepts, and two captions have the same one with probability Σ_common w / Σ_either w:
       this is weighted min-wise hashing (Broder 1997; Ioffe 2010), and the sorted list is an inverted index, concept
       → samples, in which each sample stands once an epoch, under one of its concepts. A new epoch has a new
       alphabet, so other neighbours.
    2. **Groups.** Cut the dictionary into windows of neighbours. In each window the first free sample is the anchor
       of a group, and the `group_size` − 1 free samples of the highest overlap with it join, one by one, each only
       if it is not of the same video or meaning as any member (a false negative). The group counts if every overlap is
       above a floor. Samples without a group go into a new dictionary, and the floor sinks from dictionary to
       dictionary, so that the closest captions meet first, until there are enough groups. (Captions like no other
       never are in one: they have no hard negatives.)
    3. **Batches.** The groups, shuffled, are dealt out evenly to the full batches; all other samples, shuffled, fill
       the rest.

    **Whose overlap?** That of nouns and verbs (w = ConceptVocab.word_idf). What shares every word with "a dog chases a
    cat" and says something else is "a cat chases a dog", its hardest negative. By κ "a cow chases a cat" is nearer,
    since it shares the relation; groups by κ hold even fewer such pairs than random batches do (LOG.md).
    Paper: "knowledge-guided sampling" of "hard negatives" is all that the abstract says.

    The first `guided_from` batches of training are those of a plain shuffle: groups are sought among the samples that
    are left then. An epoch's last batch holds what is left, fewer than `batch_size` samples without groups, unless
    `drop_last`. `batch_size` counts the whole batch of all ranks; it is planned first and then cut into `world_size`
    parts in order, equal to within one sample, so another number of ranks sees the same batches, and each rank the same
    number of them.
    """

    WINDOW = 64    # neighbours that a group is chosen from: more find higher overlaps, and cost in proportion
    LETTERS = 12   # concepts of a caption that planning looks at, the rarest first: longer captions are paragraphs
    FLOORS = (0.4,) * 4 + (0.3,) * 4 + (0.2,) * 3 + (0.1,) * 2 + (0.0,) * 2  # of the overlap, one for each dictionary

    def __init__(self, concept_sets: ConceptSets, weights: np.ndarray, video_of_sample: np.ndarray,
                 meaning_id: np.ndarray, *, batch_size: int, seed: int = 0, guided_share: float = 0.5,
                 guided_from: int = 0, group_size: int = 4, drop_last: bool = False, rank: int = 0,
                 world_size: int = 1):
        """Sets and ids of the N samples, weights [K] of the concepts; from batch `guided_from` on the share
        `guided_share` of a batch is groups.

        Raises UserError where batch_size is larger than N with drop_last, or a batch has fewer samples than there are
        ranks.
        """
        size = len(concept_sets)
        lengths = size, len(video_of_sample), len(meaning_id)
        assert len({*lengths}) == 1, f"sets, videos and meanings of {lengths} samples"
        assert 0 <= rank < world_size, f"{rank=} of {world_size=}"
        assert 0 <= guided_share <= 1, f"{guided_share=}: a share is 0 … 1"
        assert group_size >= 2, f"{group_size=}: a group is an anchor and at least one more"
        smallest = batch_size if drop_last or not size % max(1, batch_size) else size % batch_size
        if smallest < world_size:
            raise UserError(f"batch size {batch_size}: an epoch of {size} samples has a batch of {smallest} for "
                            f"{world_size} processes; choose another")
        if drop_last and size < batch_size:
            raise UserError(f"batch size {batch_size}: larger than the data set of {size} samples; lower it")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.guided_share, self.guided_from = guided_share, guided_from
        self.group_size, self.drop_last, self.rank, self.world_size = group_size, drop_last, rank, world_size
        self.video, self.meaning = np.asarray(video_of_sample), np.asarray(meaning_id)
        self.weights = np.append(weights, 0).astype(np.float32)  # one more, of weight 0, pads the rows of `ids`
        self.ids, self.inverse_norm = self._spell(concept_sets.offsets, concept_sets.ids)

    def _spell(self, offsets: np.ndarray, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """CSR → (ids int32 [N, P], each row its rarest concepts first, padded by K; 1 / norm of the full vector
        [N])."""
        K, counts = len(self.weights) - 1, np.diff(offsets)
        by_rarity = np.argsort(-self.weights[:K], kind="stable")
        rarity = np.empty(K, np.int64)
        rarity[by_rarity] = np.arange(K)
        sample = np.repeat(np.arange(self.size), counts)                              # [total]
        norm = np.sqrt(np.bincount(sample, self.weights[flat] ** 2, minlength=self.size)).astype(np.float32)
        sample *= K
        sample += rarity[flat]
        sample.sort()                                                                 # (sample, rarity) in one number
        flat = by_rarity[sample % K]
        sample //= K
        place = np.arange(len(flat)) - np.repeat(offsets[:-1], counts)                # 0, 1, … within each sample
        ids = np.full((self.size, min(self.LETTERS, max(1, counts.max(initial=0)))), K, np.int32)
        fits = place < ids.shape[1]
        ids[sample[fits], place[fits]] = flat[fits]
        return ids, np.divide(1, norm, out=np.zeros_like(norm), where=norm > 0)

    def __len__(self) -> int:
        """Batches of an epoch, the same on all ranks."""
        return self.size // self.batch_size if self.drop_last else -(-self.size // self.batch_size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[np.ndarray]:
        """This rank's part, int64 [b], of each batch of the epoch from number `start` on."""
        order = self.plan(epoch)
        for number in range(start, len(self)):
            batch = order[number * self.batch_size:(number + 1) * self.batch_size]
            yield np.array_split(batch, self.world_size)[self.rank]

    def plan(self, epoch: int) -> np.ndarray:
        """All samples in the order of the epoch, int64 [N]: the batches of all ranks are consecutive pieces of it."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.size)
        full, per_batch = self.size // self.batch_size, round(self.guided_share * self.batch_size) // self.group_size
        first = min(max(0, self.guided_from - epoch * len(self)), full)               # of this epoch, to have groups
        if (full - first) * per_batch == 0:
            return order
        before, order = np.split(order, [first * self.batch_size])                    # until then: as without groups
        groups = self._find_groups(order, (full - first) * per_batch, rng)            # [G, group_size]
        is_free = np.ones(self.size, bool)
        is_free[groups] = False
        guided = np.diff(-(-np.arange(full - first + 1) * len(groups) // (full - first))) * self.group_size  # a batch
        in_group = np.zeros(len(order), bool)
        in_group[:len(guided) * self.batch_size] = (np.arange(self.batch_size) < guided[:, None]).ravel()
        plan = np.empty_like(order)
        plan[in_group], plan[~in_group] = groups.ravel(), order[is_free[order]]
        return np.concatenate([before, plan])

    def _find_groups(self, order: np.ndarray, wanted: int, rng: np.random.Generator) -> np.ndarray:
        """At most `wanted` disjoint groups in random order, [G, group_size]; `order` holds the samples
        that may be in one."""
        pool, found, is_free = order[self.inverse_norm[order] > 0], [], np.ones(self.size, bool)
        for floor in self.FLOORS:
            missing = wanted - sum(map(len, found))
            if missing == 0 or len(pool) < self.group_size:
                break
            groups = self._group_neighbours(self._sort_as_dictionary(pool, rng), missing, floor)
            groups = rng.permutation(groups)[:missing]  # shuffled, or one batch would get all groups of a concept
            found.append(groups)
            is_free[groups] = False
            pool = pool[is_free[pool]]
        return np.concatenate(found) if found else np.empty((0, self.group_size), np.int64)

    def _sort_as_dictionary(self, pool: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The samples of `pool` in the order of their concepts in a new alphabet; equal ones stay as they were."""
        K = len(self.weights) - 1
        letter = np.full(K + 1, K, np.int32)
        letter[np.argsort(rng.exponential(size=K) / np.maximum(self.weights[:K], 1e-6))] = np.arange(K)
        spelling = np.sort(letter[self.ids[pool]], axis=1)                            # [n, P]
        key, bits = np.zeros(len(pool), np.int64), K.bit_length()
        for column in spelling.T[:63 // bits]:                                        # as many letters as 63 bits hold
            key = (key << bits) | column
        return pool[np.argsort(key, kind="stable")]

    def _group_neighbours(self, dictionary: np.ndarray, wanted: int, floor: float) -> np.ndarray:
        """Groups from windows of neighbours, [G, group_size]: about `wanted` or as many as there are."""
        width = min(self.WINDOW, len(dictionary))
        windows = dictionary[:len(dictionary) // width * width].reshape(-1, width)
        per_window = min(width // self.group_size, -(-wanted // len(windows)))
        at_once = max(1, 2**22 // len(self.weights))                                  # windows whose tables take 16 MB
        return np.concatenate([self._group_windows(windows[i:i + at_once], per_window, floor)
                               for i in range(0, len(windows), at_once)])

    def _group_windows(self, windows: np.ndarray, per_window: int, floor: float) -> np.ndarray:
        """Up to `per_window` groups of each window [M, W]: [G, group_size]. All windows move in step."""
        row = np.arange(len(windows))
        ids, video, meaning = self.ids[windows], self.video[windows], self.meaning[windows]  # [M, W, P], [M, W], [M, W]
        weight = self.weights[ids] * self.inverse_norm[windows][..., None]
        of_anchor = np.zeros((len(windows), len(self.weights)), np.float32)           # its concept vector, [M, K + 1]
        free, may_lead, groups = np.ones(windows.shape, bool), np.ones(windows.shape, bool), []
        for _ in range(per_window):
            pick = np.argmax(free & may_lead, axis=1)                                 # the first free one
            complete = free[row, pick]
            may_lead[row, pick] = False
            of_anchor[row[:, None], ids[row, pick]] = weight[row, pick]
            overlap = np.einsum("mwp,mwp->mw", of_anchor[row[:, None, None], ids], weight) * free  # with the anchor
            of_anchor[row[:, None], ids[row, pick]] = 0
            members = [pick]
            for _ in range(self.group_size - 1):
                overlap[(video == video[row, pick][:, None]) | (meaning == meaning[row, pick][:, None])] = 0
                pick = np.argmax(overlap, axis=1)
                complete &= overlap[row, pick] > floor
                members.append(pick)
            members = np.stack(members, axis=1)[complete]                             # [complete windows, group_size]
            free[row[complete][:, None], members] = False
            groups.append(windows[row[complete][:, None], members])
        return np.concatenate(groups)


# ---- the command line ------------------------------------------------------------------------------------------------


@dataclass
class DataConfig:
    """Show a random and a guided batch of a file's captions; or, with --check, say whether a data set is whole."""

    captions: Positional[str] = ""          # csv or jsonl file with video and caption; without it, made-up captions
    check: str | None = None    # name of a data set (msrvtt, msvd, … as in datasets.py) to check
    root: str | None = None     # check: its folder
    sample: int = 50            # check: videos of each split to decode, drawn at random
    seed: int = 0               # check: of that sample
    out: str | None = None      # check: csv file for the list of missing and broken videos


def main():
    config = parse_config(DataConfig)
    if config.check:
        if not config.root:
            raise UserError(f"--check {config.check}: needs --root FOLDER, where its annotation files and videos are")
        sys.exit(not print_check(config.check, config.root, sample=config.sample, seed=config.seed, out=config.out))
    if config.captions:
        split = load_split("csv", config.captions)
        captions, video_of_caption = split.captions, split.video_of_caption
        print(f"{len(captions)} captions of {len(split.video_paths)} videos")
    else:
        who, does = "dog cat girl boy robot horse".split(), "chases pushes follows lifts paints watches".split()
        captions = [f"a {a} {verb} a {b}" for a, verb, b in itertools.product(who, does, who) if a != b]
        video_of_caption = np.arange(len(captions))
    knowledge = extract_many(captions, progress=False)
    vocab = ConceptVocab.build(knowledge, min_count=1)
    facts = vocab.encode_many(knowledge), vocab.word_idf, video_of_caption, meaning_ids(captions, knowledge)
    for share in (0.0, 0.5):
        sampler = KnowledgeBatchSampler(*facts, batch_size=12, guided_share=share, group_size=6)
        batch = next(sampler.batches(epoch=0))
        print(f"a batch with guided share {share}:", *[captions[i] for i in batch], sep="\n    ")


if __name__ == "__main__":
    run(main)
