"""bench/real_features.py and frozen_features.py: questions, training, kept features."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from bench import frozen_features, paired, real_features
from bench.real_features import FeatureConfig, Side, hard_questions
from captions.tokenizer import Tokenizer
from cli import UserError
from datasets import toyworld
from knowledge import ConceptVocab, Knowledge, extract_many, meaning_ids

WHO = "dog cat girl boy robot horse".split()
DOES = "chases pushes follows lifts paints watches".split()
SCENES = [(a, verb, b) for a in WHO for verb in DOES for b in WHO if a != b]
CAPTIONS = []  # two of each scene
for who, does, whom in SCENES:
    CAPTIONS += [f"a {who} {does} a {whom}", f"the old {who} {does} a {whom} in a garden"]


@pytest.fixture(scope="module")
def side() -> Side:
    """Two captions per video; its maps say who does what to whom."""
    rng = np.random.default_rng(0)
    vectors = {word: rng.normal(size=24) for word in WHO + DOES}
    roles = rng.normal(size=(3, 24, 24)) / 5
    video = []
    for scene in SCENES:
        features = sum(vectors[word] @ role for word, role in zip(scene, roles))
        video.append(features + 0.3 * rng.normal(size=(2, 2, 24)))  # 2 frames of 2 places

    knowledge = extract_many(CAPTIONS, progress=False)
    tokenizer = Tokenizer.train(CAPTIONS, real_features.VOCAB_SIZE)
    read = tokenizer.encode_batch(CAPTIONS, real_features.TEXT_LENGTH)
    meaning = meaning_ids(CAPTIONS, knowledge)
    maps = torch.tensor(np.array(video), dtype=torch.float32)
    return Side(maps, *read, np.arange(len(CAPTIONS)) // 2, knowledge, meaning)


@pytest.fixture(scope="module")
def vocab(side) -> ConceptVocab:
    return ConceptVocab.build(side.knowledge)


def make_config(**other) -> FeatureConfig:
    options = dict(batch_size=32, epochs=10, lr=3e-3, dropout=0.0, embed_dim=16)
    return FeatureConfig(**options | other)


# ---- variants and data ---------------------------------------------------------------------------


def numbered_side(num_videos: int, texts_per_video: int = 2) -> Side:
    """Feature 0 of a video, the tokens and the only concept of its captions are its number."""
    video_of_text = np.repeat(np.arange(num_videos), texts_per_video)
    video = torch.arange(num_videos, dtype=torch.float32)[:, None]
    tokens = torch.from_numpy(video_of_text)[:, None]
    names = [f"noun:{number}" for number in range(num_videos)]
    held = np.eye(num_videos, dtype=np.float32)[video_of_text]
    knowledge = Knowledge(names, csr_array(held))
    return Side(video, tokens, tokens >= 0, video_of_text, knowledge, video_of_text)


def test_the_tuning_gallery_takes_videos_with_all_their_captions():
    whole = numbered_side(100)
    train, gallery = real_features.hold_out(whole, 30)
    assert len(train.video) == 70 and len(gallery.video) == 30
    numbers = torch.cat([train.video[:, 0], gallery.video[:, 0]])
    assert sorted(numbers.tolist()) == list(range(100))
    for side in (train, gallery):
        number = side.video[side.video_of_text, 0].numpy()
        assert len(number) == 2 * len(side.video)
        assert (side.tokens[:, 0].numpy() == number).all() and (side.meaning == number).all()
        assert side.knowledge.concepts_of(5) == [f"noun:{number[5]:.0f}"]
    with pytest.raises(UserError, match="there are 100 training videos; to hold out 34 takes 102"):
        real_features.hold_out(whole, 34)


def test_questions_are_the_nearest_captions_that_say_something_else(side, vocab):
    questions = hard_questions(side, vocab)
    assert questions.shape[1] == 5 and len(questions) > 0.9 * len(side.tokens)
    held = vocab.encode(side.knowledge)
    for options in questions[::37]:
        assert len(set(side.video_of_text[options])) == len(set(side.meaning[options])) == 5
        shared = (held[options[1:]] @ held[options[:1]].T).toarray()
        assert shared.min() >= 2  # concepts: of "a dog chases a cat" two words at least


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "all", "mining"])
def test_towers_learn_with_each_part(side, vocab, name):
    questions = hard_questions(side, vocab)
    torch.manual_seed(0)
    untrained = real_features.build_model(side, len(vocab), make_config()).eval()
    trained = real_features.train(side, vocab, real_features.VARIANTS[name], make_config(), seed=0)
    before, after = (real_features.measure(x, side, questions) for x in (untrained, trained))
    assert after["t2v_R@10"] > before["t2v_R@10"] + 30 and after["mc_accuracy"] > 60


def test_what_is_recorded_is_not_run_again(side, tmp_path):
    results = str(tmp_path / "r.jsonl")
    options = dict(epochs=1, variants="base all:beta=2", results=results)
    asked = []

    def load(config):
        asked.append(config.seeds)
        return side, side

    for seeds in (2, 2, 3):
        real_features.run_all(make_config(seeds=seeds, **options), load)
    assert asked == [2, 3]
    records = paired.read_runs(results)
    done = [(record["seed"], record["variant"]) for record in records]
    assert done == [(seed, name) for seed in (0, 1, 2) for name in ("base", "all:beta=2")]
    assert records[1]["config"]["beta"] == 2
    tables = real_features.make_tables(results)
    assert "| base | 3 |" in tables and "| all:beta=2 | 3 |" in tables


# ---- frozen features -----------------------------------------------------------------------------


def test_a_video_is_encoded_once_and_a_repeated_frame_too(tmp_path):
    asked = []

    def encode(frames):
        asked.append(len(frames))
        return frames.mean(axis=(1, 2))[:, None].astype(np.float16)  # [N, 1, 3]

    rows = toyworld.generate(tmp_path / "toy", train=0, val=0, test=3)
    paths = sorted(str(path) for path in rows.rglob("*.mp4"))
    for _ in range(2):
        features = frozen_features.video_features(paths, tmp_path / "kept", lambda: encode)
        assert features.shape == (3, frozen_features.NUM_FRAMES, 1, 3)
    assert len(asked) == 3 and len(list((tmp_path / "kept").iterdir())) == 3
