"""What is read back from a disk: 200 flipped bits in each file, no wrong result in silence.

docs/trust.md is the table that these tests stand for. A log carries no checksums, since nothing is
computed from it; that damaged ones end no run is tests/test_fuzz.py's.
"""

import io
import tarfile

import numpy as np
import pytest
import torch
from test_checkpoint import make_parts, save

from cli import UserError
from datasets import toyworld
from datasets.shards import load_shards
from knowledge import extract_many, read_cache, write_cache
from search.index import File, Index, Record
from training.checkpoint import load_checkpoint
from videos.cache import FrameCache
from videos.decode import write_video

CAPTIONS = ["a dog chases a cat", "two red balls bounce", ""]


def flips(path, count=200):
    """The file with one bit flipped after the other, then whole again."""
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for place, bit in zip(rng.integers(0, len(whole), count), rng.integers(0, 8, count)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        yield place
    path.write_bytes(whole)


def test_checkpoint(tmp_path):
    """Refused: weights, sizes, tokenizer, concepts and progress are under two hashes."""
    path = tmp_path / "x.safetensors"
    save(path, make_parts(), training=dict(moment=torch.arange(3.0)))
    for place in flips(path):
        with pytest.raises(UserError):
            load_checkpoint(path, training=True)
            pytest.fail(f"byte {place}")
    assert load_checkpoint(path).step == 7


def test_frames(tmp_path):
    """Decoded again from the video."""
    video = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
    write_video(tmp_path / "x.mp4", video)
    cache = FrameCache(tmp_path / "cache", size=8, num_frames=4)
    expected = cache.get(tmp_path / "x.mp4")
    (entry,) = cache.folder.glob("*/*")
    for place in flips(entry):
        assert (cache.get(tmp_path / "x.mp4") == expected).all(), f"byte {place}"
    assert cache.damaged == 200


def test_knowledge(tmp_path):
    """Extracted again from the captions, or the same."""
    expected = extract_many(CAPTIONS, progress=False)
    write_cache(tmp_path / "x.npz", expected)
    remade = 0
    for place in flips(tmp_path / "x.npz"):
        found = read_cache(tmp_path / "x.npz")
        remade += found is None
        if found:
            assert found.names == expected.names, f"byte {place}"
            assert (found.held != expected.held).nnz == 0, f"byte {place}"
    assert remade > 100  # the others are bits of the archive that say nothing


def test_search_index(tmp_path):
    """A video's row is the one that was written, or is not there and is embedded again."""
    path, recipe = tmp_path / "index.sqlite", dict(checkpoint="x", window=8.0)
    rng = np.random.default_rng(0)
    expected, index = {}, Index(path, **recipe)
    for i in range(30):
        file = File(f"{i}.mp4", i, i)
        expected[file] = Record(rng.random((2, 2), np.float32), rng.random((2, 16), np.float32))
        index.add(file, expected[file])
    index.database.close()

    lost = 0
    for place in flips(path):
        try:
            found = Index(path, **recipe).known(list(expected))
        except UserError:
            found = {}
        lost += len(found) < 30
        for file, record in found.items():
            assert (record.spans == expected[file].spans).all(), f"byte {place}"
            assert (record.emb == expected[file].emb).all(), f"byte {place}"
    assert lost > 50
    assert len(Index(path, **recipe).known(list(expected))) == 30


def test_index_of_a_shard(tmp_path):
    """Refused, and says what to delete."""
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a.mp4", "a.txt", "b.mp4", "b.txt"):
            member = tarfile.TarInfo(name)
            member.size = 30
            tar.addfile(member, io.BytesIO(b"x" * 30))
    how = dict(index=tmp_path / "index", workers=1, progress=False)
    load_shards(str(tmp_path / "0.tar"), **how)
    (file,) = (tmp_path / "index").iterdir()

    for place in flips(file, count=50):
        with pytest.raises(UserError, match="damaged; delete it"):
            load_shards(str(tmp_path / "0.tar"), **how)
            pytest.fail(f"byte {place}")
    assert len(load_shards(str(tmp_path / "0.tar"), **how).captions) == 2


def test_toy_world(tmp_path):
    """Refused: it is written anew where its folder is deleted."""
    counts = dict(train=3, val=1, test=1, workers=1, progress=False)
    world = toyworld.generate(tmp_path / "toy", **counts)
    for path in (*world.glob("videos/*.mp4"), *world.glob("*.csv"), *world.glob("*.jsonl")):
        for place in flips(path, count=5):
            with pytest.raises(UserError, match="changed since"):
                toyworld.generate(world, **counts)
                pytest.fail(f"{path}, byte {place}")
    assert toyworld.generate(world, **counts) == world
