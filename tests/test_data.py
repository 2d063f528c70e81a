"""data.py: batches depend on their samples only, the sampler's promises."""

import itertools
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from cli import UserError
from concepts import ConceptSets, ConceptVocab, concept_vectors, extract_many, meaning_ids, multi_hot
from data import PIXEL_MEAN, PIXEL_STD, KnowledgeBatchSampler, PairDataset, keep_decodable, prefetch, prepare_video
from datasets.published import load_split
from videos.cache import FrameCache
from datasets.splits import Split
from datasets.strings import Strings
from captions.tokenizer import Tokenizer
from videos.decode import frame_indices, write_video

ROOT = Path(__file__).parent.parent
SHARED_CSV = ROOT.parent / "shared" / "msrvtt_mini" / "val.csv"

# ---- samples ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six videos; every frame of a video is brighter than the one before, so that its mean tells which it is."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = ["video,caption"]
    for i, animal in enumerate(["dog", "cat", "horse", "bird", "pig", "cow"]):
        grey = np.arange(10, 250, 8, dtype=np.uint8)[:, None, None, None]
        write_video(folder / f"{i}.mp4", np.broadcast_to(grey, (30, 24, 24, 3)))
        lines += [f"{i}.mp4,a {animal} is running", f"{i}.mp4,the {animal} chases a ball"]
    (folder / "train.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def dataset(folder):
    cache = FrameCache(folder / "cache", size=16, num_frames=12)
    split = keep_decodable(load_split("csv", folder), cache, workers=1, progress=False)
    knowledge = extract_many(split.captions, progress=False)
    tokenizer, vocab = Tokenizer.train(split.captions, 300), ConceptVocab.build(knowledge, min_count=1)
    return PairDataset(split, cache, tokenizer, vocab, knowledge, length=16)


def test_a_batch_has_all_that_the_model_needs(dataset):
    batch = dataset.batch([3, 0, 11], num_frames=4)
    length = batch["tokens"].shape[1]
    assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} == {
        "video": (torch.uint8, (3, 4, 16, 16, 3)), "tokens": (torch.int64, (3, length)),
        "text_mask": (torch.bool, (3, length)), "concepts": (torch.float32, (3, dataset.num_concepts)),
        "video_id": (torch.int64, (3,)), "meaning_id": (torch.int64, (3,))}
    assert batch["video_id"].tolist() == [1, 0, 5]
    assert dataset.tokenizer.decode(batch["tokens"][0][batch["text_mask"][0]].tolist()) == "the cat chases a ball"
    sets = [set(row.nonzero().ravel().tolist()) for row in batch["concepts"]]
    assert sets == [set(dataset.concept_sets[i].tolist()) for i in (3, 0, 11)] and all(sets)
    cached = dataset.cache.get(dataset.split.video_paths[1])
    np.testing.assert_array_equal(batch["video"][0], cached[frame_indices(12, 4)])  # no seed: uniform frames


def test_frames_depend_on_seed_epoch_and_sample_only(dataset):
    def frames(indices, **kwargs):
        return dataset.batch(indices, num_frames=4, **kwargs)["video"]

    both = frames([2, 7], seed=1, epoch=3)
    assert torch.equal(both[1], frames([7, 5, 2], seed=1, epoch=3)[0])
    assert torch.equal(both[0], frames([2], seed=1, epoch=3)[0])
    draws = [frames([2, 3], seed=seed, epoch=epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({draw.numpy().tobytes() for draw in draws}) == 6          # another seed or epoch: other frames
    assert any(not torch.equal(draw[0], draw[1]) for draw in draws)      # another caption of the video: other frames
    assert (np.diff(both.float().mean(dim=(2, 3, 4)).numpy()) >= 0).all()  # in the order of time


def test_prepare_video_normalises(dataset):
    video = dataset.batch([0, 1], num_frames=3)["video"]
    prepared = prepare_video(video)
    assert prepared.shape == (2, 3, 3, 16, 16) and prepared.dtype == torch.float32 and prepared.is_contiguous()
    for c in range(3):
        expected = (video[1, 2, 5, 7, c].item() / 255 - PIXEL_MEAN[c]) / PIXEL_STD[c]
        assert prepared[1, 2, c, 5, 7].item() == pytest.approx(expected, abs=1e-5)


def test_broken_videos_are_dropped_and_listed(folder, tmp_path, capsys):
    (tmp_path / "zero.mp4").write_bytes(b"")
    (tmp_path / "train.csv").write_text((folder / "train.csv").read_text().replace("\n", f"\n{folder}/") +
                                        "\nzero.mp4,nothing\nabsent.mp4,gone\nzero.mp4,again")
    split, cache = load_split("csv", tmp_path), FrameCache(tmp_path / "cache", size=16, num_frames=4)
    kept = keep_decodable(split, cache, max_broken=0.3, workers=1)
    assert len(kept.video_paths) == 6 and len(kept.captions) == 12 and len(kept.broken) == 2
    whole = load_split("csv", folder)
    assert kept.captions == whole.captions and (kept.video_of_caption == whole.video_of_caption).all()
    said = capsys.readouterr().out
    assert "2 of 8 videos cannot be used" in said and "zero.mp4: the file is empty" in said and "absent.mp4" in said
    with pytest.raises(UserError, match="2 of 8 videos cannot be used, more than the 5%.*zero.mp4"):
        keep_decodable(split, cache, workers=1, progress=False)
    (tmp_path / "lost.csv").write_text("video,caption\nabsent.mp4,gone")
    with pytest.raises(UserError, match="1 of 1 videos"):
        keep_decodable(load_split("csv", tmp_path / "lost.csv"), cache, max_broken=1.0, workers=1, progress=False)


def test_joined_data_sets_are_one(folder):
    a = Split.from_pairs([("x", "x1"), ("y", "y1"), ("x", "x2")])
    b = Split.from_pairs([("z", "z1"), ("y", "y2")]).without({"z": "why z"})
    joined = Split.join([a, b, a])
    assert joined.video_paths == ["x", "y"] and joined.captions == ["x1", "y1", "x2", "y2", "x1", "y1", "x2"]
    assert joined.video_of_caption.tolist() == [0, 1, 0, 1, 0, 1, 0] and joined.broken == {"z": "why z"}


def test_pictures_are_videos_of_one_frame(folder, tmp_path):
    for i in range(4):
        cv2.imwrite(str(tmp_path / f"{i}.jpg"), np.full((30, 40, 3), 60 * i, np.uint8))
    pictures = Split.from_pairs((str(tmp_path / f"{i}.jpg"), f"picture {i}") for i in range(4))
    cache = FrameCache(tmp_path / "cache", size=16, num_frames=8)
    split = keep_decodable(Split.join([load_split("csv", folder), pictures]), cache, workers=1, progress=False)
    knowledge = extract_many(split.captions, progress=False)
    tokenizer, vocab = Tokenizer.train(split.captions, 300), ConceptVocab.build(knowledge, min_count=1)
    mixed = PairDataset(split, cache, tokenizer, vocab, knowledge, length=16)
    for num_frames in (1, 4, 8):  # the stages of a curriculum
        video = mixed.batch([0, 12, 15], num_frames=num_frames, seed=0)["video"]
        assert video.shape == (3, num_frames, 16, 16, 3)
        assert video[1].max() == 0 and abs(video[2].float().mean() - 180) < 2 and (video[2] == video[2, 0]).all()
    assert sum(path.stat().st_size for path in cache.folder.glob("*/*.frames")) == 6 * 6164 + 4 * 788


def test_captions_and_paths_are_mapped_files(dataset):
    for strings in (dataset.split.captions, dataset.split.video_paths):
        assert not strings.blob.flags.writeable and isinstance(strings, Strings)
    names = {path.name for path in (dataset.cache.folder / "strings").iterdir()}
    assert len(names) == 2 and all(name in Path("/proc/self/maps").read_text() for name in names)


def test_dropping_keeps_captions_with_their_videos():
    split = Split.from_pairs([("a", "a1"), ("b", "b1"), ("c", "c1"), ("a", "a2"), ("c", "c2")])
    kept = split.without({"b": "why b"}).without({"a": "why a"})
    assert kept.video_paths == ["c"] and kept.captions == ["c1", "c2"] and kept.video_of_caption.tolist() == [0, 0]
    assert kept.broken == {"b": "why b", "a": "why a"} and "2 of 3" in kept.describe_broken()
    assert split.describe_broken() == ""


def test_prefetch_keeps_the_order_and_reads_ahead():
    started = []

    def load(job):
        started.append(job)
        time.sleep(0.01 * (job % 3))  # later jobs may be done earlier
        return job * job

    results = prefetch(load, range(20), workers=3)
    assert next(results) == 0 and len(started) > 1
    assert list(results) == [job * job for job in range(1, 20)]


def test_prefetch_passes_errors_on_and_stops_early():
    def load(job):
        if job == 3:
            raise UserError("job 3")
        return job

    results = prefetch(load, iter(range(10**9)), workers=2)  # an endless source is not run through
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="job 3"):
        next(results)
    before = threading.active_count()
    results = prefetch(abs, iter(range(10**9)), workers=2)
    next(results)
    results.close()
    assert threading.active_count() == before


# ---- the sampler -----------------------------------------------------------------------------------------------------


def zipf_sets(size, num_concepts=300, seed=0, longest=8):
    """(ConceptSets, idf, video_of_sample, meaning_id): one to five captions a video, some know nothing."""
    rng = np.random.default_rng(seed)
    popularity = 1 / np.arange(1, num_concepts + 1)
    popularity /= popularity.sum()
    sets = [np.unique(rng.choice(num_concepts, rng.integers(0, longest), p=popularity)).astype(np.int32)
            for _ in range(size)]
    counts = np.bincount(np.concatenate(sets), minlength=num_concepts)
    idf = np.log((1 + size) / (1 + counts)).astype(np.float32)
    video = np.repeat(np.arange(size), rng.integers(1, 6, size))[:size]
    same = {}
    known = (tuple(s) if len(s) else ("no knowledge", i) for i, s in enumerate(sets))
    meaning = np.array([same.setdefault(knowledge, len(same)) for knowledge in known])
    return ConceptSets.from_lists(sets), idf, video, meaning


WORLD = zipf_sets(3000)


def world_of(sets, idf):
    """The same of these sets, each of a video and a meaning of its own."""
    return ConceptSets.from_lists(sets), np.array(idf, np.float32), np.arange(len(sets)), np.arange(len(sets))


def make_sampler(world=WORLD, **kwargs):
    return KnowledgeBatchSampler(*world, **dict(dict(batch_size=64, seed=0, guided_share=0.5, group_size=4), **kwargs))


def overlap(world, indices):
    """κ of all pairs of these samples, [n, n], by the definition in concepts.py."""
    vectors = concept_vectors(multi_hot([world[0][i] for i in indices], len(world[1])), torch.from_numpy(world[1]))
    return (vectors @ vectors.T).numpy()


@pytest.mark.parametrize("size", [1, 5, 63, 64, 65, 300, 3000])
@pytest.mark.parametrize("kwargs", [dict(), dict(guided_share=0.0), dict(guided_share=1.0), dict(group_size=7),
                                    dict(batch_size=8, group_size=8)], ids=str)
def test_every_sample_exactly_once(size, kwargs):
    sampler = make_sampler(zipf_sets(size), **kwargs)
    batches = list(sampler.batches(epoch=2))
    assert sorted(np.concatenate(batches).tolist()) == list(range(size))
    assert len(batches) == len(sampler) and {len(batch) for batch in batches[:-1]} <= {sampler.batch_size}
    assert len(batches[-1]) == (size - 1) % sampler.batch_size + 1  # the ragged tail is kept


def test_drop_last_leaves_out_the_ragged_tail_only():
    whole, dropped = make_sampler(), make_sampler(drop_last=True)
    assert len(whole) == 47 and len(dropped) == 46  # 3000 = 46 · 64 + 56
    for a, b in zip(whole.batches(0), dropped.batches(0)):
        assert (a == b).all()
    assert sum(map(len, dropped.batches(0))) == 46 * 64


def test_the_order_is_a_function_of_seed_and_epoch():
    plans = {(seed, epoch): make_sampler(seed=seed).plan(epoch).tobytes() for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(set(plans.values())) == 6
    sampler = make_sampler(seed=1)
    np.random.seed(3)
    for epoch in (2, 0, 1, 2):  # in any order, whatever else was drawn
        assert sampler.plan(epoch).tobytes() == plans[1, epoch]


@pytest.mark.parametrize("world_size", [1, 2, 7, 8])
def test_ranks_cut_the_same_batches(world_size):
    whole = list(make_sampler().batches(epoch=1))
    parts = [list(make_sampler(rank=rank, world_size=world_size).batches(epoch=1)) for rank in range(world_size)]
    assert {len(part) for part in parts} == {len(whole)}
    for i, batch in enumerate(whole):
        assert (np.concatenate([part[i] for part in parts]) == batch).all()
        sizes = [len(part[i]) for part in parts]
        assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("start", [0, 1, 20, 46, 47])
def test_resuming_sees_what_it_would_have_seen(start):
    whole = list(make_sampler().batches(epoch=5))
    resumed = list(make_sampler().batches(epoch=5, start=start))
    assert len(resumed) == len(whole) - start and all((a == b).all() for a, b in zip(whole[start:], resumed))


@pytest.mark.parametrize("world", [WORLD, zipf_sets(3000, num_concepts=12, longest=4)], ids=["many", "few"])  # meanings
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_no_false_negatives_in_a_group(world, share):
    sampler = make_sampler(world, guided_share=share)
    groups = sampler._find_groups(np.random.default_rng(0).permutation(3000), 3000 // 4, np.random.default_rng(1))
    assert len(groups) > 20 and len(np.unique(groups)) == groups.size
    for ids in (world[2][groups], world[3][groups]):  # [G, group_size]
        assert (np.diff(np.sort(ids, axis=1), axis=1) != 0).all()
    for group in groups[:100]:
        assert (overlap(world, group)[0] > 0).all()   # all know something that the anchor knows


def test_groups_share_knowledge_and_the_rest_is_random():
    sampler = make_sampler()
    guided, loose = [], []
    for batch in list(sampler.batches(epoch=0))[:-1]:
        kappa = overlap(WORLD, batch)
        guided += [kappa[a, a + 1:a + 4].mean() for a in range(0, 32, 4)]  # the first half: groups, anchor first
        loose.append(kappa[32:, 32:][np.triu_indices(32, 1)].mean())
    assert np.mean(guided) > 0.4 and np.mean(loose) < 0.1 and np.mean(guided) > 6 * np.mean(loose)


def test_the_same_words_in_other_roles_meet_first():
    who, does = "dog cat girl boy robot horse".split(), "chases pushes follows lifts".split()
    captions = [f"a {a} {verb} a {b}" for a, verb, b in itertools.product(who, does, who) if a != b]
    knowledge = extract_many(captions, progress=False)
    vocab = ConceptVocab.build(knowledge)
    sets, meaning = vocab.encode_many(knowledge), meaning_ids(captions, knowledge)

    def swapped(weights):  # share of the first pairs of groups that hold the same words
        groups = KnowledgeBatchSampler(sets, weights, np.arange(120), meaning, batch_size=120, guided_share=1.0,
                                       group_size=4)._find_groups(np.arange(120), 30, np.random.default_rng(0))
        return np.mean([sorted(captions[a].split()) == sorted(captions[b].split()) for a, b, *_ in groups])
    assert swapped(vocab.word_idf) == 1 and swapped(vocab.idf) < 0.2


def test_a_batch_mixes_groups_of_different_knowledge():
    sampler = make_sampler(world_of([[i % 2] for i in range(3000)], [1, 1]))
    anchors = np.array([batch[0:32:4] % 2 for batch in list(sampler.batches(0))[:-1]])  # each group's concept, [46, 8]
    assert (anchors.min(axis=1) == anchors.max(axis=1)).sum() <= 3                      # chance: 46 / 128


def test_rare_concepts_come_first_in_the_alphabet():
    """The first letter of "ab" is a with probability w_a / (w_a + w_b): then b comes last in the dictionary, else a."""
    sampler = make_sampler(world_of([[0, 1], [0], [1]], [3, 1]))
    rng = np.random.default_rng(0)
    last = [int(sampler._sort_as_dictionary(np.arange(3), rng)[-1]) for _ in range(2000)]
    assert set(last) == {1, 2} and abs(np.mean(np.array(last) == 2) - 0.75) < 0.03


def test_planning_knows_the_overlap():
    """κ by the planner, which cuts long rows to their rarest concepts, is never too high, and exact on short rows."""
    world = zipf_sets(400, longest=30)
    sampler = make_sampler(world)
    dense = np.zeros((400, len(world[1]) + 1), np.float32)
    weight = sampler.weights[sampler.ids] * sampler.inverse_norm[:, None]
    np.put_along_axis(dense, sampler.ids.astype(np.int64), weight, axis=1)
    planned, true = dense @ dense.T, overlap(world, range(400))
    short = np.array([len(world[0][i]) <= sampler.LETTERS for i in range(400)])
    assert 50 < short.sum() < 350
    assert (planned <= true + 1e-5).all()
    np.testing.assert_allclose(planned[np.ix_(short, short)], true[np.ix_(short, short)], atol=1e-5)


def test_without_guidance_it_is_a_plain_shuffle():
    expected = np.random.default_rng((4, 7)).permutation(3000)
    assert (make_sampler(seed=4, guided_share=0.0).plan(7) == expected).all()
    nothing_known = make_sampler(world_of([[]] * 500, [1, 1]), seed=4)
    assert (nothing_known.plan(7) == np.random.default_rng((4, 7)).permutation(500)).all()


def test_the_first_batches_have_no_groups():
    sampler = make_sampler(guided_from=47 + 10)                                  # 47 batches an epoch, the last of 56
    assert len(sampler) == 47
    assert (sampler.plan(0) == make_sampler(guided_share=0.0).plan(0)).all()
    assert (sampler.plan(2) == make_sampler().plan(2)).all()
    plan = sampler.plan(1)
    assert sorted(plan) == list(range(3000))
    assert (plan[:640] == make_sampler(guided_share=0.0).plan(1)[:640]).all()
    near = [overlap(WORLD, batch[:32])[np.arange(1, 32), np.arange(31)].mean() for batch in sampler.batches(1)]
    assert max(near[:10]) < min(near[10:46])


def test_scarce_groups_are_dealt_out_evenly():
    world = world_of([[i // 40] if i < 80 else [] for i in range(3000)], [1, 1])
    counts = [sum(i < 80 for i in batch) for batch in make_sampler(world).batches(0)]
    assert set(counts) == {0, 4} and sum(counts) == 80 and counts[-1] == 0  # 20 groups of 4 in 46 full batches
    assert max(np.diff(np.flatnonzero(counts))) <= 3


def test_wrong_settings():
    for wrong in (dict(batch_size=0), dict(batch_size=3, world_size=4), dict(batch_size=4000, drop_last=True)):
        with pytest.raises(UserError, match="batch size"):
            make_sampler(**wrong)
    for wrong in (dict(rank=2, world_size=2), dict(group_size=1), dict(guided_share=1.5)):
        with pytest.raises(AssertionError):
            make_sampler(**wrong)


# ---- together --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED_CSV.is_file(), reason="no real clips beside the repository (../shared/msrvtt_mini)")
def test_real_captions_meet_their_hard_negatives():
    split = load_split("csv", SHARED_CSV)
    knowledge = extract_many(split.captions, progress=False)
    vocab = ConceptVocab.build(knowledge)
    world = (vocab.encode_many(knowledge), vocab.idf, split.video_of_caption, meaning_ids(split.captions, knowledge))
    sampler = make_sampler(world, batch_size=128, group_size=4)
    batches = list(sampler.batches(0))[:-1]
    guided = np.mean([overlap(world, batch[a:a + 4])[0, 1:].mean() for batch in batches[:15] for a in range(0, 64, 4)])
    chance = np.mean([overlap(world, batch[64:])[np.triu_indices(64, 1)].mean() for batch in batches[:15]])
    assert guided > 0.3 and chance < 0.05


def test_demo_runs(folder):
    for words, says in (([], "a batch with guided share 0.5"), ([f"{folder}/train.csv"], "12 captions of 6 videos")):
        done = subprocess.run([sys.executable, "data.py", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        assert says in done.stdout and "chases a" in done.stdout
