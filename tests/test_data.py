"""data.py: batches depend on their samples only; what the sampler promises."""

import itertools
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from captions.tokenizer import Tokenizer
from cli import UserError
from data import (
    PIXEL_MEAN,
    PIXEL_STD,
    Job,
    KnowledgeBatchSampler,
    PairDataset,
    keep_decodable,
    prepare_video,
    read_batches,
)
from datasets.published import load_split
from datasets.split import Split
from knowledge import ConceptVocab, extract_many, meaning_ids, unit_rows
from videos.cache import FrameCache
from videos.decode import write_video
from videos.workers import prefetch

ROOT = Path(__file__).parent.parent

# ---- samples -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six videos. Each frame is brighter than the one before: its mean tells which it is."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = ["video,caption"]
    grey = np.arange(10, 250, 8, dtype=np.uint8)[:, None, None, None]
    for i, animal in enumerate(["dog", "cat", "horse", "bird", "pig", "cow"]):
        write_video(folder / f"{i}.mp4", np.broadcast_to(grey, (30, 24, 24, 3)))
        lines += [f"{i}.mp4,a {animal} is running", f"{i}.mp4,the {animal} chases a ball"]
    (folder / "train.csv").write_text("\n".join(lines))
    return folder


def make_dataset(split, cache):
    split = keep_decodable(split, cache, workers=1, progress=False)
    knowledge = extract_many(split.captions, progress=False)
    vocab = ConceptVocab.build(knowledge, min_count=1)
    tokenizer = Tokenizer.train(split.captions, 300)
    return PairDataset(split, cache, tokenizer, vocab, knowledge, text_length=16)


@pytest.fixture(scope="module")
def dataset(folder):
    cache = FrameCache(folder / "cache", size=16, num_frames=12)
    return make_dataset(load_split("csv", folder), cache)


def read(dataset, samples, num_frames=4, seed=0, epoch=0):
    """The batch of these samples."""
    job = Job(np.array(samples), 0, epoch, num_frames)
    (batch,) = read_batches(dataset, [job], seed=seed, workers=1, max_broken=0)
    return batch


def test_a_batch_has_all_that_the_model_needs(dataset):
    batch = read(dataset, [3, 0, 11], num_frames=12)
    length, num_concepts = batch["tokens"].shape[1], dataset.held.shape[1]
    assert {name: (x.dtype, tuple(x.shape)) for name, x in batch.items()} == {
        "video": (torch.uint8, (3, 12, 16, 16, 3)),
        "tokens": (torch.int64, (3, length)),
        "text_mask": (torch.bool, (3, length)),
        "concepts": (torch.float32, (3, num_concepts)),
        "signature": (torch.int64, (3, 2)),
    }
    assert batch["signature"][:, 0].tolist() == [1, 0, 5]
    tokens = batch["tokens"][0][batch["text_mask"][0]]
    assert dataset.tokenizer.decode(tokens.tolist()) == "the cat chases a ball"
    assert (batch["concepts"].numpy() == dataset.held[[3, 0, 11]].toarray()).all()
    # all that the cache keeps
    cached = dataset.cache.get(dataset.split.video_paths[1])
    np.testing.assert_array_equal(batch["video"][0], cached)


def test_frames_depend_on_seed_epoch_and_sample_only(dataset):
    both = read(dataset, [2, 7], seed=1, epoch=3)["video"]
    assert torch.equal(both[1], read(dataset, [7, 5, 2], seed=1, epoch=3)["video"][0])
    assert torch.equal(both[0], read(dataset, [2], seed=1, epoch=3)["video"][0])

    ways = itertools.product((0, 1), (0, 1, 2))
    draws = [read(dataset, [2, 3], seed=seed, epoch=epoch)["video"] for seed, epoch in ways]
    assert len({draw.numpy().tobytes() for draw in draws}) == 6  # of another seed or epoch
    assert any(not torch.equal(draw[0], draw[1]) for draw in draws)  # for another caption
    brightness = both.float().mean(dim=(2, 3, 4)).numpy()
    assert (np.diff(brightness) >= 0).all()  # in the order of time


def test_prepare_video_normalises(dataset):
    video = read(dataset, [0, 1], num_frames=3)["video"]
    prepared = prepare_video(video)
    assert prepared.shape == (2, 3, 3, 16, 16) and prepared.dtype == torch.float32
    for c in range(3):
        expected = (video[1, 2, 5, 7, c].item() / 255 - PIXEL_MEAN[c]) / PIXEL_STD[c]
        assert prepared[1, 2, c, 5, 7].item() == pytest.approx(expected, abs=1e-5)


def test_broken_videos_are_dropped_and_listed(folder, tmp_path, capsys):
    (tmp_path / "zero.mp4").write_bytes(b"")
    lines = (folder / "train.csv").read_text().replace("\n", f"\n{folder}/")
    lines += "\nzero.mp4,nothing\nabsent.mp4,gone\nzero.mp4,again"
    (tmp_path / "train.csv").write_text(lines)
    split, cache = load_split("csv", tmp_path), FrameCache(tmp_path / "c", size=16, num_frames=4)

    kept = keep_decodable(split, cache, max_broken=0.3, workers=1)
    whole = load_split("csv", folder)
    assert kept.captions == whole.captions and len(kept.video_paths) == 6
    assert (kept.video_of_caption == whole.video_of_caption).all()
    said = capsys.readouterr().out
    assert "2 of 8 videos cannot be used (1 missing, 1 broken)" in said
    assert "zero.mp4: the file is empty" in said and "absent.mp4" in said

    with pytest.raises(UserError, match="used .1 missing, 1 broken., more than the 5%.*zero.mp4"):
        keep_decodable(split, cache, workers=1, progress=False)
    (tmp_path / "lost.csv").write_text("video,caption\nabsent.mp4,gone")
    lost = load_split("csv", tmp_path / "lost.csv")
    with pytest.raises(UserError, match="1 of 1 videos"):
        keep_decodable(lost, cache, max_broken=1.0, workers=1, progress=False)


def test_pictures_are_videos_of_one_frame(folder, tmp_path):
    cv2.imwrite(str(tmp_path / "grey.jpg"), np.full((30, 40, 3), 180, np.uint8))
    pairs = [(str(folder / "0.mp4"), "a dog"), (str(tmp_path / "grey.jpg"), "a picture")]
    cache = FrameCache(tmp_path / "cache", size=16, num_frames=8)
    video = read(make_dataset(Split.from_pairs(pairs), cache), [0, 1])["video"]
    assert (video[1] == 180).all() and video[0].float().std() > 20


def test_prefetch_keeps_the_order_reads_ahead_and_stops_early():
    started = []

    def load(job):
        started.append(job)
        time.sleep(0.01 * (job % 3))  # later jobs may be done earlier
        if job == 20:
            raise UserError("job 20")
        return job * job

    results = prefetch(load, itertools.count(), workers=3)  # an endless source is not run through
    assert next(results) == 0 and len(started) > 1
    assert [next(results) for _ in range(19)] == [job * job for job in range(1, 20)]
    with pytest.raises(UserError, match="job 20"):
        next(results)

    results = prefetch(load, itertools.count(21))
    next(results)
    results.close()
    time.sleep(0.1)
    begun = len(started)
    time.sleep(0.1)
    assert len(started) == begun


# ---- the sampler ---------------------------------------------------------------------------------


def make_world(concepts_of_sample, weights, video=None, meaning=None):
    """What a sampler takes: held [N, K], weights [K], video_id [N], meaning_id [N]."""
    ends = np.cumsum([0, *map(len, concepts_of_sample)])
    columns = np.array([c for concepts in concepts_of_sample for c in concepts], np.int32)
    shape = (len(concepts_of_sample), len(weights))
    held = csr_array((np.ones(len(columns), np.float32), columns, ends), shape=shape)
    alone = np.arange(len(concepts_of_sample))
    video = alone if video is None else video
    meaning = alone if meaning is None else meaning
    return held, np.array(weights, np.float32), video, meaning


def zipf_world(size, num_concepts=300, longest=8):
    """One to five captions per video; popular and rare concepts; some captions know nothing."""
    rng = np.random.default_rng(0)
    popularity = 1 / np.arange(1, num_concepts + 1)
    popularity /= popularity.sum()
    known = []
    for _ in range(size):
        drawn = rng.choice(num_concepts, rng.integers(0, longest), p=popularity)
        known.append(tuple(np.unique(drawn).tolist()))

    counts = np.bincount(np.concatenate(known).astype(int), minlength=num_concepts)
    video = np.repeat(np.arange(size), rng.integers(1, 6, size))[:size]
    number = {}
    keys = [concepts or ("nothing", i) for i, concepts in enumerate(known)]
    meaning = np.array([number.setdefault(key, len(number)) for key in keys])
    return make_world(known, np.log((1 + size) / (1 + counts)), video, meaning)


WORLD = zipf_world(3000)


def make_sampler(world=WORLD, **kwargs):
    options = dict(batch_size=64, seed=0, guided_share=0.5, group_size=4)
    return KnowledgeBatchSampler(*world, **(options | kwargs))


def overlap(world, samples):
    """Overlap of all pairs of these samples, [n, n], by its definition in knowledge.py."""
    rows = unit_rows(world[0][samples], world[1]).toarray()
    return rows @ rows.T


def groups_of(batch, share=0.5, group_size=4):
    return batch[: int(share * len(batch)) // group_size * group_size].reshape(-1, group_size)


@pytest.mark.parametrize(
    "options", [dict(guided_share=1.0), dict(group_size=7), dict(batch_size=8, group_size=8)]
)
def test_every_sample_exactly_once(options):
    for size in (64, 300):
        sampler = make_sampler(zipf_world(size), **options)
        assert sorted(sampler.plan(2).tolist()) == list(range(size))
        batches = list(sampler.batches(epoch=2))
        assert len(batches) == len(sampler) == size // sampler.batch_size
        assert {len(batch) for batch in batches} == {sampler.batch_size}


def test_the_order_is_a_function_of_seed_and_epoch():
    plans = {}
    for seed, epoch in itertools.product((0, 1), (0, 1, 2)):
        plans[seed, epoch] = make_sampler(seed=seed).plan(epoch).tobytes()
    assert len(set(plans.values())) == 6

    # in any order, from any batch on
    sampler = make_sampler(seed=1)
    for epoch in (2, 0, 1):
        assert sampler.plan(epoch).tobytes() == plans[1, epoch]
    whole = list(sampler.batches(epoch=2))
    assert np.array_equal(list(sampler.batches(epoch=2, start=20)), whole[20:])


@pytest.mark.parametrize("world", [WORLD, zipf_world(3000, num_concepts=12, longest=4)])
def test_no_false_negatives_in_a_group(world):
    rng = np.random.default_rng(0)
    groups = make_sampler(world).find_groups(np.arange(3000), 300, rng)  # [G, 4]
    assert 20 < len(groups) <= 300
    assert len(np.unique(groups)) == groups.size
    assert all((overlap(world, group)[0] > 0).all() for group in groups)  # with the anchor
    for ids in (world[2][groups], world[3][groups]):
        assert (np.diff(np.sort(ids, axis=1), axis=1) != 0).all()


def test_groups_share_knowledge_and_the_rest_is_random():
    guided, loose = [], []
    for batch in make_sampler().batches(epoch=0):
        guided += [overlap(WORLD, group)[0, 1:].mean() for group in groups_of(batch)]
        loose.append(overlap(WORLD, batch[32:])[np.triu_indices(32, 1)].mean())
    assert np.mean(guided) > 0.4 and np.mean(loose) < 0.1


def test_the_same_words_in_other_roles_meet_first():
    who, does = "dog cat girl boy robot horse".split(), "chases pushes follows lifts".split()
    scenes = [scene for scene in itertools.product(who, does, who) if scene[0] != scene[2]]
    captions = ["a {} {} a {}".format(*scene) for scene in scenes]
    knowledge = extract_many(captions, progress=False)
    vocab = ConceptVocab.build(knowledge)
    held, meaning = vocab.encode(knowledge), meaning_ids(captions, knowledge)

    def share_of_swaps(weights):
        world = (held, weights, np.arange(120), meaning)
        (batch,) = make_sampler(world, batch_size=120, guided_share=1.0).batches(0)
        pairs = [(captions[a].split(), captions[b].split()) for a, b, *_ in batch.reshape(-1, 4)]
        return np.mean([sorted(a) == sorted(b) for a, b in pairs])

    assert share_of_swaps(vocab.word_idf) > 0.9
    assert share_of_swaps(vocab.idf) < 0.2


def test_a_batch_mixes_groups_of_different_knowledge():
    sampler = make_sampler(make_world([[i % 2] for i in range(3000)], [1, 1]))
    anchors = np.array([groups_of(batch)[:, 0] % 2 for batch in sampler.batches(0)])  # [46, 8]
    is_uniform = anchors.min(axis=1) == anchors.max(axis=1)
    assert is_uniform.sum() <= 3  # chance: 46 / 128


def test_without_guidance_it_is_a_plain_shuffle():
    expected = np.random.default_rng((4, 7)).permutation(3000)
    assert (make_sampler(seed=4, guided_share=0.0).plan(7) == expected).all()
    nothing_known = make_sampler(make_world([[]] * 500, [1, 1]), seed=4)
    assert (nothing_known.plan(7) == np.random.default_rng((4, 7)).permutation(500)).all()


def test_the_first_batches_have_no_groups():
    plain = make_sampler(guided_share=0.0)
    sampler = make_sampler(guided_from=46 + 10)  # 46 batches per epoch
    assert (sampler.plan(0) == plain.plan(0)).all()
    assert (sampler.plan(1)[:640] == plain.plan(1)[:640]).all()
    assert (sampler.plan(2) == make_sampler().plan(2)).all()
    near = []
    for batch in sampler.batches(1):
        near.append(np.mean([overlap(WORLD, group)[0, 1:].mean() for group in groups_of(batch)]))
    assert max(near[:10]) < min(near[10:])


def test_scarce_groups_are_dealt_out_evenly():
    world = make_world([[i // 40] if i < 80 else [] for i in range(3000)], [1, 1])
    plan = make_sampler(world).plan(0)
    counts = [(plan[i : i + 64] < 80).sum() for i in range(0, 3000, 64)]
    assert set(counts) == {0, 4} and sum(counts) == 80  # 20 groups of 4 in 46 full batches
    assert counts[-1] == 0  # the ragged tail has none
    assert max(np.diff(np.flatnonzero(counts))) <= 3


@pytest.mark.parametrize("batch_size", [0, 4000])
def test_a_batch_size_that_does_not_fit_is_one_line(batch_size):
    with pytest.raises(UserError, match=f"--batch-size {batch_size}"):
        make_sampler(batch_size=batch_size)


def test_demo_runs(folder):
    command = [sys.executable, "data.py", str(folder / "train.csv")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "a batch with guided share 0.5" in done.stdout and "chases a" in done.stdout
