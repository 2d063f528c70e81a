"""Tests of concepts.py."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import concepts
from cli import UserError
from knowledge import (ConceptSets, ConceptVocab, concept_vectors, extract_many, meaning_ids, multi_hot,
                      nearest_by_overlap)
from knowledge import extract_knowledge

ROOT = Path(__file__).parent.parent
SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)

# Many captions -------------------------------------------------------------------------------------------------------

CAPTIONS = [f"a {colour} {animal} {verb} a {thing}" for colour in ("red", "blue") for animal in ("dog", "cat", "horse")
            for verb in ("chases", "pushes", "carries") for thing in ("ball", "car", "tree", "house")]
CAPTIONS += ["", "a dog", "", "a dog"]


def test_extract_many_is_extract_knowledge_of_each():
    many = extract_many(iter(CAPTIONS), progress=False)
    assert list(many) == [extract_knowledge(c) for c in CAPTIONS] and len(many) == len(CAPTIONS)
    assert many[-1] == many[-3] == {"noun": ["dog"], "verb": [], "relation": []}
    assert list(many[2:5]) == [many[i] for i in (2, 3, 4)]
    assert len(many.sets) == len(set(CAPTIONS))  # distinct ones are tagged once
    assert list(extract_many([], progress=False)) == []


@pytest.mark.parametrize("platform", ["linux", "darwin"])  # workers that are forked, and that start from nothing
def test_workers_give_the_same_knowledge(platform, monkeypatch):
    if platform == "linux" and sys.platform != "linux":
        pytest.skip("fork is used on Linux only")
    monkeypatch.setattr(sys, "platform", platform)
    captions = [f"{c} and thing number {i}" for i in range(10) for c in CAPTIONS]
    alone, shared = (extract_many(captions, workers=n, progress=False) for n in (1, 2))
    assert alone.names == shared.names
    assert (alone.sets.ids == shared.sets.ids).all() and (alone.sets.offsets == shared.sets.offsets).all()


def test_cache_is_used_and_checked(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "deep" / "knowledge"
    first = list(extract_many(CAPTIONS, cache=folder, progress=False))
    path, = folder.iterdir()

    def fail(caption):
        raise AssertionError("the cache was not used")
    with monkeypatch.context() as patch:
        patch.setattr(concepts, "extract_knowledge", fail)
        assert list(extract_many(CAPTIONS, cache=folder, progress=False)) == first
    assert capsys.readouterr().err == ""

    good = path.read_bytes()
    for damaged in (good[:len(good) // 2], good[:200] + bytes([good[200] ^ 1]) + good[201:], b"", b"not a zip file"):
        path.write_bytes(damaged)
        assert list(extract_many(CAPTIONS, cache=folder, progress=False)) == first
        assert "damaged" in capsys.readouterr().err
        assert path.read_bytes() == good  # rebuilt
    assert list(extract_many(CAPTIONS[:5], cache=folder, progress=False)) == first[:5]
    assert len(list(folder.iterdir())) == 2 and path.read_bytes() == good  # other captions: another file
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        extract_many(CAPTIONS, cache=tmp_path / "file" / "knowledge", progress=False)


# Vocabulary and overlap ----------------------------------------------------------------------------------------------

def test_vocabulary_counts_and_idf():
    found = extract_many(["a dog runs", "a dog", "a dog chases a cat", "a cat", "a bird", "a dog runs"], progress=False)
    vocab = ConceptVocab.build(found)
    assert vocab.names == ["noun:dog", "noun:cat", "verb:run"] and vocab.counts.tolist() == [4, 2, 2]
    assert vocab.idf.dtype == np.float32
    np.testing.assert_allclose(vocab.idf, np.log(7 / np.array([5, 3, 3])) + 1, rtol=1e-6)
    np.testing.assert_allclose(vocab.log_odds, np.log(np.array([5, 3, 3]) / np.array([3, 5, 5])), rtol=1e-6)
    assert ConceptVocab.build(found, max_size=2).names == ["noun:dog", "noun:cat"]
    assert ConceptVocab.build(found, min_count=1).names[:3] == ["noun:dog", "noun:cat", "noun:bird"]
    from_dicts = ConceptVocab.build(dict(one) for one in found)  # any iterable of dicts
    assert from_dicts.to_dict() == vocab.to_dict()
    assert len(ConceptVocab.build([])) == 0


def test_vocabulary_round_trips_through_json():
    vocab = ConceptVocab.build(extract_many(CAPTIONS, progress=False))
    again = ConceptVocab.from_dict(json.loads(json.dumps(vocab.to_dict())))
    assert again.names == vocab.names and (again.counts == vocab.counts).all() and (again.idf == vocab.idf).all()


def test_encode_many_is_encode_of_each():
    found = extract_many(CAPTIONS + ["a zebra dances"], progress=False)
    vocab = ConceptVocab.build(found)
    for knowledge in (found, list(found)):
        sets = vocab.encode_many(knowledge)
        assert len(sets) == len(found) and sets.ids.dtype == np.int32 and sets.offsets.dtype == np.int64
        for i, one in enumerate(found):
            assert sets[i].tolist() == vocab.encode(one).tolist() == sorted(sets[i].tolist())
    assert len(sets[-1]) == 0 and vocab.encode(found[0]).dtype == np.int32
    assert {vocab.names[c] for c in sets[0]} == {"noun:dog", "noun:ball", "verb:chase", "relation:chase ball"}
    with pytest.raises(IndexError):
        sets[len(sets)]


@SETTINGS
@given(st.lists(st.sets(st.integers(0, 11), max_size=6), max_size=20), st.data())
def test_concept_sets_match_python_sets(lists, data):
    sets = ConceptSets.from_lists([sorted(s) for s in lists])
    assert [set(s.tolist()) for s in sets] == lists and len(sets.rows()) == len(sets.ids)
    index = sets.transpose(12)
    assert [index[c].tolist() for c in range(12)] == [[i for i, s in enumerate(lists) if c in s] for c in range(12)]
    if lists:
        rows = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=10))
        assert [set(s.tolist()) for s in sets.take(np.array(rows, np.int64))] == [lists[r] for r in rows]


def _random_sets(seed: int, n: int = 60, size: int = 25):
    rng = np.random.default_rng(seed)
    sets = ConceptSets.from_lists([np.flatnonzero(rng.random(size) < 0.12) for _ in range(n)])
    return sets, rng.uniform(1, 9, size).astype(np.float32)


def test_concept_vectors_are_unit_or_zero():
    sets, idf = _random_sets(0)
    hot = multi_hot(list(sets), len(idf))
    assert hot.dtype == torch.float32 and hot.shape == (60, 25)
    assert all(set(torch.nonzero(row)[:, 0].tolist()) == set(ids.tolist()) for row, ids in zip(hot, sets))
    vectors = concept_vectors(hot, idf)
    lengths = torch.tensor([float(len(ids) > 0) for ids in sets])
    torch.testing.assert_close(vectors.norm(dim=1), lengths)
    assert lengths.min() == 0 and multi_hot([], 5).shape == (0, 5)
    kappa = vectors @ vectors.T
    assert kappa.min() >= 0 and kappa.max() <= 1 + 1e-5 and (kappa[lengths == 0] == 0).all()
    c = set(sets[1].tolist()) & set(sets[2].tolist())
    by_hand = sum(idf[k] ** 2 for k in c) / np.sqrt((idf[sets[1]] ** 2).sum() * (idf[sets[2]] ** 2).sum())
    assert abs(kappa[1, 2] - by_hand) < 1e-5


def test_nearest_by_overlap_agrees_with_all_pairs():
    sets, idf = _random_sets(1)
    vectors = concept_vectors(multi_hot(list(sets), len(idf)).double(), idf).numpy()
    kappa = vectors @ vectors.T
    np.fill_diagonal(kappa, 0)
    neighbours, overlaps = nearest_by_overlap(sets, idf, range(60), 7)
    assert neighbours.shape == overlaps.shape == (60, 7) and overlaps.min() >= 0 and overlaps.max() <= 1
    np.testing.assert_allclose(overlaps, -np.sort(-kappa, axis=1)[:, :7], atol=1e-6)
    for row in range(60):
        found = neighbours[row] >= 0
        assert row not in neighbours[row] and len(set(neighbours[row][found])) == found.sum()
        np.testing.assert_allclose(kappa[row, neighbours[row][found]], overlaps[row][found], atol=1e-6)
        assert (overlaps[row][~found] == 0).all()


def test_direction_tells_captions_apart():
    found = extract_many(["a dog chases a cat", "a cat chases a dog", "a cat is chased by a dog"], progress=False)
    vocab = ConceptVocab.build(found, min_count=1)
    vectors = concept_vectors(multi_hot(list(vocab.encode_many(found)), len(vocab)), vocab.idf)
    kappa = (vectors @ vectors.T).tolist()
    assert kappa[0][1] < 0.9 and kappa[0][2] > 0.999


def test_meaning_ids():
    captions = ["a dog chases a cat", "a cat is chased by the dog!", "a cat chases a dog", "", "?!", "it is red",
                "It is  RED.", "it is blue", "a dog chases a cat", ""]
    ids = meaning_ids(captions, extract_many(captions, progress=False))
    assert ids.dtype == np.int64 and ids.shape == (10,)
    assert ids[0] == ids[1] == ids[8] and ids[0] != ids[2]  # the same knowledge, direction included
    assert ids[5] == ids[6] and ids[5] != ids[7]            # no knowledge: the same text
    assert ids[3] == ids[9] and ids[3] != ids[4] and len(set(ids.tolist())) == 6
    assert (ids == meaning_ids(captions, [extract_knowledge(c) for c in captions])).all()
    # the same in every run and on every rank
    assert meaning_ids(["a dog"], [extract_knowledge("a dog")]).tolist() == [8439765600538290424]


# Command line --------------------------------------------------------------------------------------------------------

def run_script(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_docstring_shows_what_the_demo_prints(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["concepts.py"])
    concepts.main()
    printed = capsys.readouterr().out.partition("\na dog chases a cat\n")[2].partition("\n\n")[0]
    for line in printed.splitlines():
        kappa, _, caption = line.strip().partition("  ")
        assert any(f"κ = {kappa}" in shown and caption in shown for shown in concepts.__doc__.splitlines()), line


def test_captions_of_a_file(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a dog chases a cat\n\na dog chases a cow\na cat sleeps\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text('video,caption\n1.mp4,a dog chases a cat\n2.mp4,"a dog chases a cow"\n'
                                    '3.mp4,a cat sleeps\n')
    shown = []
    for name in ("a.txt", "b.csv"):
        concepts.show_captions(concepts.read_captions(tmp_path / name), 12, min_count=2)
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and "dog 2" in shown[0] and "a dog chases a cow" in shown[0]


@pytest.mark.parametrize("name, content, message", [
    ("missing.txt", None, "cannot be read"), ("empty.txt", b"", "no captions"), ("blank.txt", b" \n\n", "no captions"),
    ("header.csv", b"video,caption\n", "no captions"), ("column.csv", b"video,text\n1,a\n", "no column `caption`"),
    ("empty.csv", b"", "no column `caption`"), ("binary.txt", b"\xff\xfe\x00\x80", "UTF-8"),
    ("folder.txt", "folder", "cannot be read")])
def test_bad_caption_files_are_one_line(name, content, message, tmp_path):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        concepts.read_captions(path)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_bad_file_ends_the_script_in_one_line():
    done = run_script("concepts.py", "no such file.txt")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "no such file.txt" in done.stderr
