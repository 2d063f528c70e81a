"""bench/real_features.py and frozen_features.py: questions, batches, heads, kept features."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from bench import frozen_features, paired, real_features
from bench.real_features import FeatureConfig, Side, hard_questions, train_heads
from captions.tokenizer import Tokenizer
from cli import UserError
from knowledge import ConceptVocab, Knowledge, extract_many, meaning_ids

WHO = "dog cat girl boy robot horse".split()
DOES = "chases pushes follows lifts paints watches".split()
SCENES = [(a, verb, b) for a in WHO for verb in DOES for b in WHO if a != b]
CAPTIONS = []  # two of each scene
for who, does, whom in SCENES:
    CAPTIONS += [f"a {who} {does} a {whom}", f"the old {who} {does} a {whom} in a garden"]


@pytest.fixture(scope="module")
def side() -> Side:
    """Two captions per video; its features say who does what to whom."""
    rng = np.random.default_rng(0)
    vectors = {word: rng.normal(size=24) for word in WHO + DOES}
    roles = rng.normal(size=(3, 24, 24)) / 5
    video, text = [], []
    for scene in SCENES:
        features = sum(vectors[word] @ role for word, role in zip(scene, roles))
        noisy = features + 0.3 * rng.normal(size=(3, 24))
        video.append(noisy[0])
        text += [noisy[1], noisy[2]]

    knowledge = extract_many(CAPTIONS, progress=False)
    video_of_text = np.arange(len(CAPTIONS)) // 2
    features = [torch.tensor(np.array(x), dtype=torch.float32) for x in (video, text)]
    return Side(*features, video_of_text, knowledge, meaning_ids(CAPTIONS, knowledge))


@pytest.fixture(scope="module")
def vocab(side) -> ConceptVocab:
    return ConceptVocab.build(side.knowledge)


def make_config(**other) -> FeatureConfig:
    options = dict(batch_size=32, epochs=5, lr=2e-2, dropout=0.0, embed_dim=16)
    return FeatureConfig(**options | other)


# ---- variants and data ---------------------------------------------------------------------------


def numbered_side(num_videos: int, texts_per_video: int = 2) -> Side:
    """Feature 0 of video and text, and the only concept of a caption, are its video's number."""
    rng = np.random.default_rng(0)
    video_of_text = np.repeat(np.arange(num_videos), texts_per_video)
    video, text = rng.normal(3, 2, (num_videos, 4)), rng.normal(size=(len(video_of_text), 4))
    video[:, 0], text[:, 0] = np.arange(num_videos), video_of_text
    names = [f"noun:{number}" for number in range(num_videos)]
    held = np.eye(num_videos, dtype=np.float32)[video_of_text]
    knowledge = Knowledge(names, csr_array(held))
    return Side(
        torch.from_numpy(video), torch.from_numpy(text), video_of_text, knowledge, video_of_text
    )


def test_the_tuning_gallery_takes_videos_with_all_their_captions():
    whole = numbered_side(100)
    train, gallery = real_features.hold_out(whole, 30)
    assert len(train.video) == 70 and len(gallery.video) == 30
    numbers = torch.cat([train.video[:, 0], gallery.video[:, 0]])
    assert sorted(numbers.tolist()) == list(range(100))
    for side in (train, gallery):
        number = side.video[side.video_of_text, 0].numpy()
        assert len(number) == 2 * len(side.video)
        assert (side.text[:, 0].numpy() == number).all() and (side.meaning == number).all()
        assert side.knowledge.concepts_of(5) == [f"noun:{number[5]:.0f}"]
    with pytest.raises(UserError, match="there are 100 training videos; to hold out 34 takes 102"):
        real_features.hold_out(whole, 34)


def test_questions_are_the_nearest_captions_that_say_something_else(side, vocab):
    questions = hard_questions(side, vocab)
    assert questions.shape[1] == 5 and len(questions) > 0.9 * len(side.text)
    held = vocab.encode(side.knowledge)
    for options in questions[::37]:
        assert len(set(side.video_of_text[options])) == len(set(side.meaning[options])) == 5
        shared = (held[options[1:]] @ held[options[:1]].T).toarray()
        assert shared.min() >= 2  # concepts: of "a dog chases a cat" two words at least


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "all", "mining"])
def test_heads_learn_with_each_part(side, vocab, name):
    questions = hard_questions(side, vocab)
    torch.manual_seed(0)
    untrained = real_features.Heads.build(side, len(vocab), make_config()).eval()
    trained = train_heads(side, vocab, real_features.VARIANTS[name], make_config(), seed=0)
    before, after = (real_features.measure(x, side, questions) for x in (untrained, trained))
    assert after["t2v_R@10"] > before["t2v_R@10"] + 30 and after["mc_accuracy"] > 60


def test_towers_from_scratch_learn(side, vocab):
    tokenizer = Tokenizer.train(CAPTIONS, real_features.VOCAB_SIZE)
    tokens, _ = tokenizer.encode_batch(CAPTIONS, real_features.TEXT_LENGTH)
    read = replace(side, video=side.video[:, None].expand(-1, 4, -1), text=tokens)
    questions = hard_questions(read, vocab)
    config = make_config(towers=True, lr=3e-3, epochs=10)
    heads = train_heads(read, vocab, real_features.VARIANTS["all"], config, seed=0)
    after = real_features.measure(heads, read, questions)
    assert after["t2v_R@10"] > 50


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


def test_bert_is_that_of_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = dict(vocab_size=11, hidden_size=16, intermediate_size=32, max_position_embeddings=9)
    layers, heads = 2, 4
    depth = dict(num_hidden_layers=layers, num_attention_heads=heads, initializer_range=0.5)
    theirs = transformers.BertModel(transformers.BertConfig(**sizes, **depth)).eval()
    weights = theirs.state_dict()
    for value in weights.values():
        value += 0.1 * torch.randn_like(value)  # biases and norms, too

    tokens, mask = torch.randint(11, (3, 7)), torch.arange(7) < torch.tensor([[7], [4], [2]])
    with torch.no_grad():
        wanted = theirs(tokens, attention_mask=mask).last_hidden_state
        got = frozen_features.encode_bert(weights, tokens, mask, layers, heads)
    torch.testing.assert_close(got[mask], wanted[mask], atol=1e-5, rtol=1e-5)


def test_captions_are_encoded_once_and_an_interruption_loses_nothing(tmp_path):
    asked = []

    def encode(captions):
        asked.extend(captions)
        return np.array([[len(caption)] * 3 for caption in captions], np.float16)

    def load_encoder():
        return encode

    captions = [f"{'x' * (i % 70)}{i % 10}" for i in range(1200)] * 2
    captions += [f"{i}" for i in range(2000)]
    features = frozen_features.text_features(captions, tmp_path, load_encoder)
    assert features[:, 0].tolist() == [len(caption) for caption in captions]
    assert features.dtype == np.float16
    assert sorted(asked) == sorted(set(captions))  # each distinct one once

    next(tmp_path.glob("*.npy")).unlink()
    asked.clear()
    again = frozen_features.text_features(captions, tmp_path, load_encoder)
    assert np.array_equal(again, features) and 0 < len(asked) <= frozen_features.CHUNK
