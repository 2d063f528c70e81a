"""data.py: batches depend on their samples only; what the sampler promises."""

import functools
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
    find_overlapping,
    keep_decodable,
    prepare_video,
    read_batches,
)
from datasets.published import load_split
from datasets.split import Split
from knowledge import ConceptVocab, extract_many, unit_rows
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


def read(dataset, samples, num_frames=4, seed=0, epoch=0, captions=()):
    """The batch of these samples, and captions alone."""
    job = Job(np.array(samples), np.array(captions, int), 0, epoch, num_frames)
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
        "video_concepts": (torch.float32, (3, num_concepts)),
        "signature": (torch.int64, (3, 2)),
    }
    assert batch["signature"][:, 0].tolist() == [1, 0, 5]
    more = read(dataset, [3, 0, 11], num_frames=12, captions=[5, 0])
    assert torch.equal(more["video"], batch["video"])
    assert torch.equal(more["concepts"][:3], batch["concepts"])
    assert (more["concepts"][3:].numpy() == dataset.held[[5, 0]].toarray()).all()
    tokens = batch["tokens"][0][batch["text_mask"][0]]
    assert dataset.tokenizer.decode(tokens.tolist()) == "the cat chases a ball"
    assert (batch["concepts"].numpy() == dataset.held[[3, 0, 11]].toarray()).all()
    both = dataset.held[[2, 3]].toarray()  # the captions of the first one's video
    np.testing.assert_allclose(batch["video_concepts"][0], both.mean(axis=0))
    assert batch["video_concepts"].shape == more["video_concepts"].shape
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


@pytest.fixture(scope="module")
def scenes():
    """(captions, held, words): 120 scenes of six animals and four verbs, each alone in a video."""
    who, does = "dog cat girl boy robot horse".split(), "chases pushes follows lifts".split()
    found = [scene for scene in itertools.product(who, does, who) if scene[0] != scene[2]]
    captions = ["a {} {} a {}".format(*scene) for scene in found]
    knowledge = extract_many(captions, progress=False)
    vocab = ConceptVocab.build(knowledge)
    held = vocab.encode(knowledge)
    return captions, held, functools.partial(find_overlapping, unit_rows(held, vocab.word_idf))


def make_sampler(held, video=None, **other):
    options = dict(batch_size=24, seed=0, guided_share=0.5, group_size=4)
    video = np.arange(held.shape[0]) if video is None else video
    return KnowledgeBatchSampler(held, video, **options | other)


@pytest.mark.parametrize("options", [dict(guided_share=1.0), dict(group_size=7), dict(seed=5)])
def test_every_sample_exactly_once(scenes, options):
    _, held, find = scenes
    sampler = make_sampler(held, **options)
    assert len(sampler) == 5
    assert sorted(sampler.plan(2, find_hardest=find).ravel().tolist()) == list(range(120))
    part = sampler.plan(2, 3, find)
    assert part.shape == (3, 24) and len(set(part.ravel().tolist())) == 3 * 24


def test_the_order_is_a_function_of_seed_and_epoch(scenes):
    _, held, find = scenes
    plans = set()
    for seed, epoch in itertools.product((0, 1), (0, 1, 2)):
        plan = make_sampler(held, seed=seed).plan(epoch, find_hardest=find).tobytes()
        assert plan == make_sampler(held, seed=seed).plan(epoch, find_hardest=find).tobytes()
        plans.add(plan)
    assert len(plans) == 6


def test_a_group_is_an_anchor_with_the_hardest_that_are_left(scenes):
    captions, held, find = scenes
    plan = make_sampler(held).plan(0, find_hardest=find)
    same_words = 0
    for batch in plan:
        for group in batch[:12].reshape(3, 4):
            first, *others = [sorted(captions[i].split()) for i in group]
            assert all(len(set(first) & set(other)) >= 3 for other in others)  # "a" and two words
            same_words += first == others[0]
    assert same_words >= 10  # of 15: the same words in other roles are the hardest


def test_groups_are_made_out_of_twice_as_many_captions(scenes):
    _, held, find = scenes
    pools = []

    def find_and_note(anchors, pool):
        pools.append(len(pool))
        return find(anchors, pool)

    for num_batches in (1, 3):
        make_sampler(held).plan(2, num_batches, find_and_note)
    assert pools == [2 * 24, 120]  # and never more than there are


def test_what_may_be_true_of_the_video_joins_no_group():
    captions = ["a red dog runs", "a dog runs", "a black dog runs", "a red cat runs", "123 !"]
    captions += ["a big red dog is running", "a dog sleeps"]
    video = np.array([0, 1, 2, 3, 4, 0, 5])
    knowledge = extract_many(captions, progress=False)
    held = ConceptVocab.build(knowledge, min_count=1).encode(knowledge)
    sampler = make_sampler(held, video, batch_size=2)
    is_true = sampler.find_true(np.arange(7), np.arange(7))
    assert set(np.flatnonzero(~is_true[0])) == {2, 3, 6}  # 1 says less, 5 is its own, 4 nothing
    assert set(np.flatnonzero(~is_true[1])) == {0, 2, 3, 5, 6}  # "red" is not known of the second

    def groups_of(anchor, hardest):
        found = sampler.make_groups(np.array([anchor]), np.array([hardest]), 1)
        return [group.tolist() for group in found]

    sampler.group_size = 4
    assert groups_of(0, [1, 4, 5, 2, 3, 6]) == [[0, 2, 3, 6]]
    # 1 may be true of the videos of 0 and of 2, so neither is in a group with it
    assert groups_of(1, [0, 2, 3, 6]) == []


def test_captions_alone_are_drawn_from_all(scenes):
    _, held, find = scenes
    batches = make_sampler(held, text_negatives=2.0).plan(0, find_hardest=find)
    assert sorted(batches[:, :24].ravel().tolist()) == list(range(120))
    alone = batches[:, 24:]
    assert alone.shape == (5, 48) and len(set(alone.ravel().tolist())) > 90


def test_captions_of_one_video_do_not_meet_in_a_group(scenes):
    _, held, find = scenes
    video = np.arange(120) // 2
    plan = make_sampler(held, video, guided_share=1.0).plan(0, find_hardest=find)
    groups = [batch[:20].reshape(5, 4) for batch in plan]
    whole = [group for group in np.concatenate(groups) if len(set(video[group])) == 4]
    assert len(whole) >= 20


def test_without_guidance_it_is_a_plain_shuffle(scenes):
    _, held, find = scenes
    expected = np.random.default_rng((4, 7)).permutation(120).reshape(5, 24)
    assert (make_sampler(held, seed=4).plan(7) == expected).all()
    assert (make_sampler(held, seed=4, guided_share=0).plan(7, find_hardest=find) == expected).all()
    nothing = csr_array((120, 3), dtype=np.float32)  # captions that say nothing are all dropped
    plan = make_sampler(nothing, seed=4).plan(7, find_hardest=find)
    assert (plan == expected).all()


@pytest.mark.parametrize("batch_size", [0, 4000])
def test_a_batch_size_that_does_not_fit_is_one_line(scenes, batch_size):
    with pytest.raises(UserError, match=f"--batch-size {batch_size}"):
        make_sampler(scenes[1], batch_size=batch_size)


def test_demo_runs(folder):
    command = [sys.executable, "data.py", str(folder / "train.csv")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "a guided batch" in done.stdout and "chases a" in done.stdout
