"""Tar shards as video2dataset and img2dataset write them, and frames decoded while training."""

import csv
import errno
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from test_faults import flags
from test_video import clip, numbered_frames, numbers  # noqa: F401 (clip: a fixture)

import train
from cli import UserError
from data import Job, read_batches
from datasets.shards import load_shards
from datasets.split import Split
from train import TrainConfig
from videos import workers as guarded
from videos.cache import FrameCache, Want
from videos.decode import frame_indices, read_frames

ROOT = Path(__file__).parent.parent


def pack(path, files):
    """A tar file of {name: bytes}, or of pairs; returns its path."""
    with tarfile.open(path, "w") as tar:
        for name, data in files.items() if isinstance(files, dict) else files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def sample(key, video, caption):
    facts = json.dumps(dict(caption=caption, status="success")).encode()
    return {f"{key}.mp4": video, f"{key}.txt": caption.encode(), f"{key}.json": facts}


def load(patterns, folder):
    return load_shards(str(patterns), index=folder / "index", workers=1, progress=False)


# ---- shards --------------------------------------------------------------------------------------


def test_samples_are_read_in_place(tmp_path, clip):
    image = cv2.imencode(".jpg", numbered_frames(43)[42])[1].tobytes()
    facts = json.dumps(dict(caption=" a still \n")).encode()
    pack(tmp_path / "00008.tar", sample("000080", clip.read_bytes(), "a dog runs – schnell"))
    pack(tmp_path / "00010.tar", {"x/a.json": facts, "x/a.JPG": image, "x/a.npy": b"no"})
    split = load(tmp_path / "{00008..00010}.tar", tmp_path)
    video, still = split.video_paths
    assert list(split.captions) == ["a dog runs – schnell", "a still"]
    for window in (dict(), dict(start=1.0, end=2.0)):
        whole = read_frames(clip, 8, size=64, **window)
        np.testing.assert_array_equal(read_frames(video, 8, size=64, **window), whole)
    assert numbers(read_frames(still, 2, size=64)) == [42, 42]
    assert video.endswith("/000080.mp4") and still.endswith("/a.JPG")
    assert list(split.broken.values()) == [f"{tmp_path}/00009.tar: no such video file"]


def test_a_pattern_may_weigh_more(tmp_path):
    for name in "ab":
        pack(tmp_path / f"{name}.tar", sample("0", b"x", name) | sample("1", b"x", name))
    split = load(f"2*{tmp_path}/a.tar::{tmp_path}/[b]*.tar", tmp_path)
    assert sorted(split.captions) == ["a"] * 4 + ["b"] * 2
    assert sorted(split.video_of_caption) == [0, 0, 1, 1, 2, 3]
    assert set(split.captions[split.video_of_caption >= 2]) == {"b"}


def test_a_truncated_shard_costs_what_it_has_lost(tmp_path, clip):
    files = {}
    for i in range(4):
        files |= sample(f"{i}", clip.read_bytes(), f"caption {i}")
    data = pack(tmp_path / "0.tar", files).read_bytes()
    header = data.index(b"3.mp4")
    for end in (header, header + 100, header + 600, data.index(b"caption 3") + 1):
        (tmp_path / "0.tar").write_bytes(data[:end])
        split = load(tmp_path / "{0..0}.tar", tmp_path)
        assert list(split.captions) == ["caption 0", "caption 1", "caption 2"]
        assert "0.tar: truncated or damaged" in split.broken[str(tmp_path / "0.tar")]
        assert read_frames(split.video_paths[-1], 2, size=8).shape == (2, 8, 8, 3)


FAULTS = {
    'or "caption" in 1.json': {"1.mp4": b"x", "1.json": b'{"text": "hi"}'},
    "no caption; expected 1.txt (UTF-8)": {"1.mp4": b"x", "1.txt": "ein Mädchen".encode("latin-1")},
    "no video or image": {"1.txt": b"alone"},
    "its key comes twice": [("1.mp4", b"x"), ("1.txt", b"a"), ("1.mp4", b"y")],
}


def test_a_sample_that_cannot_be_used_is_listed(tmp_path):
    for says, faulty in FAULTS.items():
        pairs = list(faulty.items()) if isinstance(faulty, dict) else faulty
        shard = pack(tmp_path / f"{len(says)}.tar", [*sample("0", b"x", "good").items(), *pairs])
        split = load(shard, tmp_path)
        assert list(split.captions) == ["good"]
        assert list(split.broken) == [f"{shard}/1"]
        assert says in split.broken[f"{shard}/1"]


def test_what_cannot_be_read_at_all_is_one_line(tmp_path):
    with pytest.raises(UserError, match="nowhere.*matches no file; expected tar files"):
        load(tmp_path / "nowhere{0..9}.tar", tmp_path)
    (tmp_path / "text.tar").write_text("no tar" * 200)
    with pytest.raises(UserError, match="not one video.*text.tar: not a tar file that can"):
        load(tmp_path / "text.tar", tmp_path)
    pack(tmp_path / "bare.tar", {"1.mp4": b"x"})
    with pytest.raises(UserError, match="not one video with a caption.*bare.tar/1: no caption"):
        load(tmp_path / "bare.tar", tmp_path)
    with pytest.raises(UserError, match="bare.tar is in it twice"):
        load(f"{tmp_path}/bare.tar::{tmp_path}/*.tar", tmp_path)
    (tmp_path / "index").rename(tmp_path / "moved")
    (tmp_path / "index").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        load(tmp_path / "bare.tar", tmp_path)


def test_only_shards_that_are_new_or_have_changed_are_walked(tmp_path):
    for i in range(3):
        pack(tmp_path / f"{i}.tar", sample("0", b"x", f"first {i}"))
    load(tmp_path / "{0..1}.tar", tmp_path)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").iterdir()}
    pack(tmp_path / "1.tar", sample("0", b"longer", "second 1"))
    os.utime(tmp_path / "1.tar", ns=(1, 1))
    split = load(tmp_path / "{0..2}.tar", tmp_path)
    assert list(split.captions) == ["first 0", "second 1", "first 2"]
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    assert len(list((tmp_path / "index").iterdir())) == 4


def test_a_full_disk_while_indexing_keeps_what_was_done(tmp_path, monkeypatch):
    for i in range(3):
        pack(tmp_path / f"{i}.tar", sample("0", b"x", f"take {i}"))
    write = Path.write_bytes

    def fill_up(path, data):
        write(path, data[:9])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    load(tmp_path / "0.tar", tmp_path)
    monkeypatch.setattr(Path, "write_bytes", fill_up)  # the workers are forks of this process
    with pytest.raises(UserError, match="cannot be written .No space left on device.; make room"):
        load(tmp_path / "{0..2}.tar", tmp_path)
    monkeypatch.undo()
    (done,) = (tmp_path / "index").iterdir()
    before = done.stat().st_mtime_ns
    assert list(load(tmp_path / "{0..2}.tar", tmp_path).captions) == ["take 0", "take 1", "take 2"]
    assert done.stat().st_mtime_ns == before


def test_killed_while_indexing_it_goes_on(tmp_path):
    index, pattern = tmp_path / "index", f"{tmp_path}/{{00..39}}.tar"
    for i in range(40):
        samples = [file for n in range(50) for file in sample(str(n), b"x", f"{i} {n}").items()]
        pack(tmp_path / f"{i:02d}.tar", samples)
    code = "import sys; from pathlib import Path; from datasets.shards import load_shards;"
    code += "load_shards(sys.argv[1], index=Path(sys.argv[2]), workers=1, progress=False)"
    process = subprocess.Popen([sys.executable, "-c", code, pattern, str(index)], cwd=ROOT)
    while not list(index.glob("[!.]*")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    process.kill()
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in index.glob("[!.]*")}
    assert len(done) < 40, "it was killed too late"
    captions = load(pattern, tmp_path).captions
    assert list(captions) == [f"{i} {n}" for i in range(40) for n in range(50)]
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())


# ---- batches of frames ---------------------------------------------------------------------------


class Troubled(FrameCache):
    """A cache some of whose videos hang or kill the process that reads them."""

    def get(self, path, *window):
        if "hangs" in path:
            time.sleep(3600)
        if "kills" in path:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().get(path, *window)


class Names:
    """A data set of names: sample n shows frame n of the clip, if its name begins with "good"."""

    def __init__(self, folder, clip, names):
        self.folder, self.clip, self.names = folder, clip, names
        self.cache = Troubled(folder / "cache", size=64, num_frames=20, gigabytes=0)
        self.split = Split([], [], np.zeros(0, np.int64))

    def __len__(self):
        return len(self.names)

    def want(self, sample, num_frames, rng):
        name = self.names[sample]
        path = self.clip if name.startswith("good") else self.folder / name
        return Want(str(path), only=[sample % 20] * num_frames)

    def collate(self, samples, video):
        assert numbers(video[:, 0]) == [frame_indices(100, 20)[n % 20] for n in samples]
        return samples

    def batches(self, size=4, start=0, workers=2, max_broken=1.0):
        places = np.arange(len(self))
        starts = range(start, len(self), size)
        jobs = [Job(places[i : i + size], places[:0], i, 0, 1) for i in starts]
        return read_batches(self, jobs, seed=0, workers=workers, max_broken=max_broken)


def test_another_video_takes_the_place_of_a_broken_one(tmp_path, clip, monkeypatch, capfd):
    """Which one depends on the place alone: not on what was read before, or by how many."""
    monkeypatch.setattr(guarded, "PATIENCE", 2.0)
    names = ["good"] * 20
    names[3], names[6], names[7], names[16] = "hangs", "kills", "gone", "gone"
    dataset = Names(tmp_path, clip, names)
    found = list(dataset.batches())
    assert capfd.readouterr().err.count("another video takes the place of") == 3

    in_order = list(itertools.chain(*found))
    assert [n for n in range(20) if in_order[n] != n] == [3, 6, 7, 16]
    assert {names[n] for n in in_order} == {"good"}
    reasons = {Path(path).name: why.split(": ")[1] for path, why in dataset.split.broken.items()}
    assert reasons["gone"] == "no such video file"
    assert reasons["hangs"].startswith("the decoder gave no frames within 2 s")
    assert reasons["kills"].startswith("the decoder died twice (exit code -9")

    assert list(dataset.batches(start=4, workers=1)) == found[1:]


def test_too_many_broken_videos_end_it(tmp_path, clip):
    dataset = Names(tmp_path, clip, ["good" if i % 10 else f"gone{i}" for i in range(200)])
    assert len(list(dataset.batches(max_broken=0.2))) == 50 and len(dataset.split.broken) == 20
    with pytest.raises(UserError, match="6 of .. videos read so far.*5% of --max-broken"):
        list(dataset.batches(max_broken=0.05, workers=1))  # two may each meet one at once
    with pytest.raises(UserError, match="1 of 1 videos read so far cannot be used"):
        list(Names(tmp_path, clip, ["gone"]).batches())


def test_a_loop_that_ends_early_leaves_no_process(tmp_path, clip):
    others = set(multiprocessing.active_children())
    batches = Names(tmp_path, clip, ["good"] * 8 + ["hangs"] * 1000).batches()
    next(batches)
    started = time.monotonic()
    assert len(set(multiprocessing.active_children()) - others) == 2
    batches.close()
    assert set(multiprocessing.active_children()) <= others
    assert time.monotonic() < started + 30


# ---- decoded while training ----------------------------------------------------------------------


def pack_world(world, folder, is_broken=lambda shard, place: False):
    """The tiny world's 240 training samples in four shards, and 12 for validation in one."""
    for role, count in (("train", 4), ("val", 1)):
        with open(world / f"{role}.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for shard, part in enumerate(np.array_split(rows, count)):
            files = {}
            for place, row in enumerate(part):
                video = (world / row["video"]).read_bytes()
                if role == "train" and is_broken(shard, place):
                    video = b"no video" * 99
                files |= sample(f"{place:03d}", video, row["caption"])
            pack(folder / f"{role}-{shard}.tar", files)
    return folder


def settings(shards, out, **other):
    files = dict(dataset="shards", data=str(shards / "train-{0..3}.tar"), out=str(out))
    files |= dict(val_data=str(shards / "val-{0..0}.tar"), cache=str(shards / "cache"), workers=2)
    run = dict(steps=4, batch_size=40, num_frames="1,2", warmup=2, log_every=1, eval_every=2)
    return TrainConfig(**(files | run | dict(guided_share=0.0) | other))


def numbers_of(out) -> list[tuple]:
    """The losses and the scores on validation of a run, by step."""
    lines = [json.loads(line) for line in open(Path(out) / "log.jsonl", encoding="utf-8")]
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    return losses + [(line["step"], line["validation"]) for line in lines if "validation" in line]


def test_a_streamed_run_is_the_cached_one_bit_by_bit(tiny_world, tmp_path, capsys):
    """Half of the frames fit into the cache: validation and training read both kinds."""
    shards = pack_world(tiny_world, tmp_path)
    train.train(settings(shards, tmp_path / "cached"))
    num_videos, entry = 240 + 12, 20 + 4 * 32 * 32 * 3
    small = dict(cache=str(tmp_path / "small"), cache_gb=0.5 * num_videos * entry / 1e9)
    train.train(settings(shards, tmp_path / "streamed", **small))
    assert numbers_of(tmp_path / "streamed") == numbers_of(tmp_path / "cached")
    assert "50% of 252 videos fit into --cache-gb" in capsys.readouterr().out
    assert 60 < len(list((tmp_path / "small" / "frames").glob("*/*"))) < 160


@pytest.fixture(scope="module")
def broken_run(tiny_world, tmp_path_factory):
    """Each twentieth video of three shards is none."""
    folder = tmp_path_factory.mktemp("broken")
    pack_world(tiny_world, folder, lambda shard, place: shard and place % 20 == 0)
    config = settings(folder, folder / "run", cache_gb=0, max_broken=0.2)
    train.train(config)
    return config


def test_a_run_on_broken_videos_resumes_bit_by_bit(broken_run, tmp_path, capfd):
    shutil.copy(Path(broken_run.out) / "step-000002.safetensors", tmp_path)
    train.train(replace(broken_run, out=str(tmp_path)))
    whole = numbers_of(broken_run.out)
    assert numbers_of(tmp_path) == [found for found in whole if found[0] > 2]
    said = capfd.readouterr()
    count = said.err.count("another video takes the place of")
    assert 2 < count == said.out.count("0.mp4: not a video")
    assert f"{count} videos cannot be used" in said.out


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_index_and_the_batches(broken_run, tmp_path, ranks):
    """The same run on several processes, by torchrun, with one index."""
    several = replace(broken_run, out=str(tmp_path / "run"), cache=str(tmp_path / "cache"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, f"--nproc-per-node={ranks}", str(ROOT / "train.py"), *flags(several)],
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "cache" / "shards").iterdir())) == 5
    losses = [dict(numbers_of(out)[:4]) for out in (broken_run.out, several.out)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
