"""search/: the right moment is first, the index follows the folder, faults cost one video."""

import collections
import io
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_report import Page

from captions.tokenizer import Tokenizer
from cli import UserError
from data import prepare_video
from eval import EvalConfig, evaluate
from knowledge import ConceptVocab, extract_many
from model import CLOP, build_config
from search import query as search
from search.index import File, Index, Record, find_videos
from search.query import Library, Match, clock, search_folder
from training.checkpoint import load_checkpoint, save_checkpoint
from videos import workers
from videos.decode import VideoError, read_windows, write_video

ROOT = Path(__file__).parent.parent
EVIL = "<img src=x onerror=alert(1)>\x1b[2J\u202eevil\nname.mp4"


def save_model(path: Path, seed: int) -> Path:
    """A checkpoint of a model that has learned nothing."""
    captions = ["a red ball falls", "two dogs run"]
    tokenizer, knowledge = Tokenizer.train(captions, 300), extract_many(captions, progress=False)
    torch.manual_seed(seed)
    model = CLOP(
        build_config(
            "toy", video_layers=1, text_layers=1, num_frames=4, vocab_size=tokenizer.vocab_size
        )
    )
    save_checkpoint(
        path, model, tokenizer, ConceptVocab.build(knowledge, min_count=1), config={}, step=7
    )
    return path


def noise(path: Path, seconds: float = 1.0, seed: int = 0):
    """A video of coarse coloured noise, 10 frames a second, another picture every 2 seconds."""
    rng = np.random.default_rng(seed)
    pictures = (
        rng.integers(0, 256, (int(np.ceil(seconds / 2)), 4, 4, 3), np.uint8)
        .repeat(12, 1)
        .repeat(12, 2)
    )
    write_video(path, pictures.repeat(20, axis=0)[: round(10 * seconds)], rate=10)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return load_checkpoint(
        save_model(tmp_path_factory.mktemp("model") / "step-000007.safetensors", 0)
    )


@pytest.fixture(scope="module")
def masters(tmp_path_factory):
    """Six videos that tests copy: a.mp4 … e.mp4 of 1 s, long.mp4 of 8 s."""
    folder = tmp_path_factory.mktemp("masters")
    for i, name in enumerate("abcde"):
        noise(folder / f"{name}.mp4", seed=i)
    noise(folder / "long.mp4", seconds=8, seed=9)
    return folder


@pytest.fixture
def clips(masters, tmp_path):
    return Path(shutil.copytree(masters, tmp_path / "clips"))


@pytest.fixture
def decoded(monkeypatch, tmp_path):
    """Which files were decoded, one name a line: the decoder runs in other processes."""
    log = tmp_path / "decoded"
    log.touch()

    def noting(path, *args, **kwargs):
        with open(log, "a") as file:
            file.write(os.path.basename(path) + "\n")
        return read_windows(path, *args, **kwargs)

    monkeypatch.setattr(search, "read_windows", noting)
    return log


def take(decoded: Path) -> dict[str, int]:
    """{name: how often it was decoded since the last look}."""
    counts = collections.Counter(decoded.read_text().splitlines())
    decoded.write_text("")
    return counts


def find(checkpoint, clips: Path, query="a red ball", **changes) -> dict:
    options = dict(
        top=10,
        window=2.0,
        index=str(clips.parent / "index"),
        cache="unused",
        out=clips.parent / "out",
    )
    return search_folder(checkpoint, str(clips), query, **options | changes)


def ranking(record: dict) -> list[tuple]:
    return [
        (match.path, round(match.score, 4), match.start, match.end)
        for match in record["answers"][0].matches
    ]


def index_file(clips: Path) -> Path:
    return clips.parent / "index" / "index.sqlite"


# ---- ranks and times -----------------------------------------------------------------------------


def test_ranking_is_what_brute_force_gives(checkpoint, clips):
    record = find(checkpoint, clips, "two dogs run")
    model, expected = checkpoint.model, []
    with torch.inference_mode():
        text_emb = model.encode_text(*checkpoint.tokenizer.encode_batch(["two dogs run"], 32))[
            0
        ].double()
        for path in clips.iterdir():
            scored = []
            for start, end, frames in read_windows(path, 4, size=32, window=2.0):
                emb = model.encode_video(prepare_video(torch.from_numpy(frames)[None]))[0].double()
                scored.append((float(emb @ text_emb), path.name, start, end))
            expected.append(max(scored))
    expected.sort(reverse=True)
    assert [(path, start, end) for path, _, start, end in ranking(record)] == [
        (path, start, end) for _, path, start, end in expected
    ]
    scores = [match.score for match in record["answers"][0].matches]
    assert scores == pytest.approx([score for score, *_ in expected], abs=1e-5)
    assert (record["videos"], record["windows"], record["new"], record["broken"]) == (6, 9, 6, {})
    assert ranking(find(checkpoint, clips, "two dogs run", top=2)) == ranking(record)[:2]


def test_the_time_is_that_of_the_half_that_fits(checkpoint, tmp_path, capsys):
    """Two halves, each also a clip of its own: the query that finds a clip first finds its half of
    the video.
    """
    (tmp_path / "clips").mkdir()
    black, white = np.zeros((40, 48, 48, 3), np.uint8), np.full((40, 48, 48, 3), 255, np.uint8)
    for name, frames in (
        ("black", black),
        ("white", white),
        ("both", np.concatenate([black, white])),
    ):
        write_video(tmp_path / "clips" / f"{name}.mp4", frames, rate=10)
    halves = set()
    for query in ("a red ball", "two dogs run", "dogs fall", "run run"):
        record = find(checkpoint, tmp_path / "clips", query, window=4.0)
        first, *_, last = record["answers"][0].matches
        both = next(match for match in record["answers"][0].matches if match.path == "both.mp4")
        best = next(m.path for m in record["answers"][0].matches if m.path != "both.mp4")
        assert (both.start, both.end) == ((0, 4) if best == "black.mp4" else (4, 8)), query
        assert first.score == pytest.approx(both.score, abs=1e-3) and last.score < first.score
        halves.add(best)
    shown = capsys.readouterr().out
    assert re.search(r"\d  +-?\d\.\d{3}  +0:0[04]–0:0[48]  both\.mp4\n", shown)
    negated = Library(
        {File("x", 0, 0): Record("", np.float32([[0, 4], [4, 8]]), np.float32([[1, 0], [0, 1]]))}
    )
    assert negated.search(np.float32([0.1, 0.2]), 3) == [Match(pytest.approx(0.2), "x", 4.0, 8.0)]
    assert negated.search(np.float32([-0.1, -0.2]), 3) == [
        Match(pytest.approx(-0.1), "x", 0.0, 4.0)
    ]


def test_search_agrees_with_sorting_whatever_the_windows():
    rng = np.random.default_rng(0)
    records, expected, previous = {}, [], None
    query = rng.standard_normal(16).astype(np.float32)
    for i in range(300):
        emb = np.round(rng.standard_normal((rng.integers(1, 6), 16)), 1).astype(np.float32)
        if i % 7 == 6:  # a copy of the one before: a tie, which the path decides
            emb = records[previous].emb.copy()
        previous = File(f"{i:03d}", 0, 0)
        records[previous] = Record(
            "", np.arange(2 * len(emb), dtype=np.float32).reshape(-1, 2), emb
        )
        expected.append((-max((emb.astype(float) @ query).tolist()), f"{i:03d}"))
    expected.sort()
    library = Library(records)
    for top in (1, 10, 300, 1000):
        found = library.search(query, top)
        assert [-match.score for match in found] == pytest.approx(
            [score for score, _ in expected[:top]], abs=1e-5
        )
        assert len({match.path for match in found}) == min(top, 300)
    same = Library(
        {
            File(name, 0, 0): Record("", np.float32([[0, 1]]), np.float32([[1, 0]]))
            for name in "abcd"
        }
    )
    assert [match.path for match in same.search(np.float32([1, 0]), 3)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "start, end, shown",
    [
        (0, 0.24, "0:00–0:01"),
        (8, 16, "0:08–0:16"),
        (59.6, 67.4, "1:00–1:07"),
        (3595, 3603, "0:59:55–1:00:03"),
        (36000, 36008, "10:00:00–10:00:08"),
    ],
)
def test_clock(start, end, shown):
    assert clock(start, end) == shown


# ---- the index follows the folder ----------------------------------------------------------------

ALL = dict.fromkeys(["a.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4", "long.mp4"], 1)


def test_only_new_and_changed_files_are_decoded(checkpoint, clips, decoded):
    whole = find(checkpoint, clips)
    assert take(decoded) == ALL
    again = find(checkpoint, clips)
    assert not take(decoded) and ranking(again) == ranking(whole) and again["new"] == 0

    (clips / "more").mkdir()
    noise(clips / "more" / "f.mp4", seed=20)  # new
    noise(clips / "b.mp4", seconds=4, seed=21)  # changed
    os.utime(clips / "a.mp4", ns=(0, 12345))  # of the same size, and another time
    (clips / "c.mp4").rename(clips.parent / "c.mp4")  # gone
    record = find(checkpoint, clips)
    assert take(decoded) == {"a.mp4": 1, "f.mp4": 1, "b.mp4": 1}
    assert record["new"] == 3 and record["windows"] == 10
    names = {path for path, *_ in ranking(record)}
    assert names == {"a.mp4", "b.mp4", "d.mp4", "e.mp4", "long.mp4", "more/f.mp4"}
    fresh = find(checkpoint, clips, index=str(clips.parent / "fresh"))
    assert ranking(record) == ranking(fresh)

    take(decoded)
    (clips.parent / "c.mp4").rename(clips / "c.mp4")  # back: time and size are as they were
    assert "c.mp4" in {path for path, *_ in ranking(find(checkpoint, clips))}
    assert not take(decoded)


def test_an_index_may_move_with_its_folder_and_is_one_a_folder(checkpoint, clips, decoded):
    find(checkpoint, clips)
    clips.rename(clips.parent / "moved")
    take(decoded)
    find(checkpoint, clips.parent / "moved")
    assert not take(decoded)
    # copytree keeps the times: the same triples
    other = Path(shutil.copytree(clips.parent / "moved", clips.parent / "other"))
    cache = clips.parent / "cache"
    for folder in (clips.parent / "moved", other) * 2:
        find(checkpoint, folder, index=None, cache=str(cache))
    assert set(take(decoded).values()) == {2} and len(list((cache / "index").iterdir())) == 2


def test_another_checkpoint_or_window_has_other_vectors(checkpoint, clips, tmp_path, decoded):
    first = find(checkpoint, clips)
    other = load_checkpoint(save_model(tmp_path / "other.safetensors", 1))
    assert ranking(find(other, clips)) != ranking(first)
    assert find(checkpoint, clips, window=4.0)["windows"] == 7
    assert find(checkpoint, clips, window=float("inf"))["windows"] == 6
    assert take(decoded)["a.mp4"] == 4
    assert ranking(find(checkpoint, clips)) == ranking(first)  # the first ones are still there
    assert find(checkpoint, clips, window=float("inf"))["windows"] == 6 and not take(decoded)


# ---- interruption and damage ---------------------------------------------------------------------


SLOW = """
import os, sys, time
from pathlib import Path
from search import query as search
from training.checkpoint import load_checkpoint
read = search.read_windows
def slow(path, *args, **kwargs):
    print("decoding", os.path.basename(path), flush=True)
    if path.endswith("e.mp4"):
        time.sleep(600)
    return read(path, *args, **kwargs)
search.read_windows, os.cpu_count = slow, lambda: 1
options = dict(top=3, window=2.0, index=sys.argv[3], cache="", out=Path(sys.argv[4]))
search.search_folder(load_checkpoint(sys.argv[1]), sys.argv[2], "x", **options)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_what_ends_a_run_costs_the_video_at_work(checkpoint, clips, decoded, end):
    words = [checkpoint.path, clips, clips.parent / "index", clips.parent]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert any(line == "decoding e.mp4\n" for line in process.stdout)
        time.sleep(0.5)  # until d.mp4, which came just before, is embedded
    finally:
        process.send_signal(end)
        process.wait()
        process.stdout.close()
    record = find(checkpoint, clips)
    assert {"e.mp4", "long.mp4"} <= set(take(decoded)) <= {"d.mp4", "e.mp4", "long.mp4"}
    assert ranking(record) == ranking(find(checkpoint, clips, index=str(clips.parent / "fresh")))


@pytest.mark.parametrize("damage", ["head", "middle", "cut", "empty", "text"])
def test_a_damaged_index_is_made_again(checkpoint, clips, decoded, capsys, damage):
    whole = ranking(find(checkpoint, clips))
    take(decoded)
    data = bytearray(index_file(clips).read_bytes())
    if damage == "head":
        data[20:40] = b"?" * 20
    if damage == "middle":  # of the vectors of a video
        data[-2000] ^= 4
    kept = {"cut": data[:5000], "empty": b"", "text": b"no database" * 500}.get(damage, data)
    index_file(clips).write_bytes(kept)
    capsys.readouterr()
    assert ranking(find(checkpoint, clips)) == whole
    again = take(decoded)
    assert len(again) == (1 if damage == "middle" else 6)
    assert damage == "empty" or "embedded again" in capsys.readouterr().out
    assert ranking(find(checkpoint, clips)) == whole and not take(decoded)


def test_two_runs_at_once(tmp_path):
    files = [File(f"{i:02d}.mp4", i, 1) for i in range(40)]
    recipe = dict(checkpoint="x", window=1.0, embed_dim=1)
    one, two = (Index(tmp_path / "index.sqlite", **recipe) for _ in range(2))
    for i, file in enumerate(files):
        for index in (one, two) if i % 4 == 0 else (one,) if i % 2 else (two,):
            emb = np.full((1, 1), i, np.float32)
            index.add(file, Record("", np.zeros((1, 2), np.float32), emb))
    known = Index(tmp_path / "index.sqlite", **recipe).known(files)
    assert list(known) == files
    assert [record.emb.item() for record in known.values()] == list(range(40))


def test_a_full_disk_is_one_line(checkpoint, clips, monkeypatch):
    real = Index.open

    def open_small(index):
        real(index)
        index.database.execute("PRAGMA max_page_count = 3")

    monkeypatch.setattr(Index, "open", open_small)
    with pytest.raises(UserError, match="cannot hold the index .database or disk is full.; make"):
        find(checkpoint, clips)


# ---- folders as they are -------------------------------------------------------------------------


def test_broken_videos_are_listed_and_not_tried_again(checkpoint, clips, decoded, capsys):
    (clips / "text.mp4").write_text("no video")
    (clips / "empty.mov").write_bytes(b"")
    (clips / "cut.mp4").write_bytes((clips / "long.mp4").read_bytes()[:2000])
    record = find(checkpoint, clips)
    shown = capsys.readouterr().out
    assert set(record["broken"]) == {"text.mp4", "empty.mov", "cut.mp4"} and record["videos"] == 6
    assert shown.count("    broken: ") == 3
    assert "broken: text.mp4: not a video that OpenCV can open" in shown
    assert "3 broken videos are left out until they change" in shown
    page = (clips.parent / "out" / "report.html").read_text(encoding="utf-8")
    assert "3 videos, left out" in page
    take(decoded)
    assert set(find(checkpoint, clips)["broken"]) == set(record["broken"]) and not take(decoded)
    shown = capsys.readouterr().out
    assert "    broken: " not in shown and "3 broken videos are left out until they change" in shown
    noise(clips / "text.mp4", seed=50)
    record = find(checkpoint, clips)
    assert take(decoded) == {"text.mp4": 1} and record["videos"] == 7
    assert "text.mp4" not in record["broken"]


def trouble(monkeypatch, happens):
    """`happens(path)` before d.mp4 is decoded, in the process that decodes it."""

    def read(path, *args, **kwargs):
        if path.endswith("d.mp4"):
            happens(path)
        return read_windows(path, *args, **kwargs)

    monkeypatch.setattr(search, "read_windows", read)


@pytest.mark.parametrize(
    "happens, said",
    [
        (lambda path: time.sleep(3600), "gave no frames within 3 s"),
        (lambda path: os.kill(os.getpid(), signal.SIGKILL), "died twice"),
    ],
    ids=["hangs", "crashes"],
)
def test_a_file_can_neither_hang_nor_kill_the_search(checkpoint, clips, monkeypatch, happens, said):
    monkeypatch.setattr(workers, "PATIENCE", 3.0)
    trouble(monkeypatch, happens)
    record = find(checkpoint, clips)
    assert list(record["broken"]) == ["d.mp4"] and said in record["broken"]["d.mp4"]
    assert record["videos"] == 5


def test_a_disk_that_vanishes_meanwhile_breaks_no_video(checkpoint, clips, monkeypatch):
    with monkeypatch.context() as patch:
        trouble(patch, lambda path: shutil.move(path, clips.parent / "d.mp4"))
        assert find(checkpoint, clips)["broken"] == {}
    shutil.move(clips.parent / "d.mp4", clips)
    assert find(checkpoint, clips)["videos"] == 6


def test_a_video_that_breaks_late_gives_no_window(checkpoint, clips, monkeypatch):
    def breaks(path, *args, **kwargs):
        yield from read_windows(path, *args, **kwargs)
        if path.endswith("long.mp4"):
            raise VideoError(f"{path}: truncated or damaged")

    monkeypatch.setattr(search, "read_windows", breaks)
    record = find(checkpoint, clips)
    assert record["broken"] == {"long.mp4": "truncated or damaged"} and record["windows"] == 5


def test_folders_links_and_other_files(tmp_path, masters):
    for name in ("a", "b/c", ".hidden", "b/café 猫  x"):
        (tmp_path / name).mkdir(parents=True)
        shutil.copy(masters / "a.mp4", tmp_path / name / "A.MP4")
    shutil.copy(masters / "a.mp4", tmp_path / "._a.mp4")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "README").write_text("x")
    os.mkfifo(tmp_path / "pipe.mp4")  # opening it would wait for ever
    outside = tmp_path.parent / "outside"
    outside.mkdir(exist_ok=True)
    shutil.copy(masters / "b.mp4", outside / "b.mp4")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "self").symlink_to(tmp_path / "a" / "self")
    (tmp_path / "A link").symlink_to(tmp_path / "b")  # sorts before b, but b itself is what counts
    (tmp_path / "link.mp4").symlink_to(tmp_path / "a" / "A.MP4")
    (tmp_path / "far").symlink_to(outside)
    (tmp_path / "far.mp4").symlink_to(outside / "b.mp4")
    (tmp_path / "lost.mp4").symlink_to(tmp_path / "nowhere.mp4")
    files, notes = find_videos(tmp_path)
    assert {"a/A.MP4", "b/c/A.MP4", "b/café 猫  x/A.MP4"} < {file.path for file in files}
    assert len(files) == 4 and len({file.path for file in files} & {"far/b.mp4", "far.mp4"}) == 1
    assert files == sorted(files) and all(
        file.size == (tmp_path / file.path).stat().st_size for file in files
    )
    assert sorted(notes[:3]) == [
        "skipped 2 hidden names",
        "skipped 3 other files",
        "skipped 4 links to what is there already",
    ]
    assert [note.split(" (")[0] for note in sorted(notes[3:])] == [
        "a/self: cannot be read",
        "lost.mp4: cannot be read",
    ]


def test_a_folder_that_cannot_be_read_is_named(clips, monkeypatch):
    (clips / "private").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith(refused):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    refused = "private"
    files, notes = find_videos(clips)
    assert len(files) == 6 and notes == ["private: cannot be read (Permission denied)"]
    refused = "clips"
    with pytest.raises(UserError, match="clips: cannot be read .Permission denied"):
        find_videos(clips)


def test_hostile_names_and_queries_stay_text(checkpoint, clips, capsys):
    try:
        (clips / "a.mp4").rename(clips / EVIL)
        (clips / "b.mp4").rename(
            clips / os.fsdecode(b"latin-\xe9.mp4")
        )  # OpenCV takes no such name
    except OSError:
        pytest.skip("this file system refuses the names")
    (clips / "<u>.mp4").write_text("no video")
    record = find(checkpoint, clips, EVIL)
    shown = capsys.readouterr().out
    assert EVIL in {match.path for match in record["answers"][0].matches}
    assert set(record["broken"]) == {"latin-\udce9.mp4", "<u>.mp4"}
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\ud800-\udfff]", shown)
    assert r"alert(1)>\u001b[2J\u202eevil\u000aname.mp4" in shown and r"latin-\udce9.mp4" in shown
    page = (clips.parent / "out" / "report.html").read_text(encoding="utf-8")
    parsed = Page(page)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\ud800-\udfff]", page)
    assert (
        not {tag for tag, _ in parsed.elements} & {"script", "u"}
        and "onerror=alert(1)" in parsed.text
    )
    assert all(
        not name.startswith("on") for _, attributes in parsed.elements for name in attributes
    )
    assert all(
        attributes["src"].startswith("data:") for tag, attributes in parsed.elements if tag == "img"
    )


# ---- queries, page, command line -----------------------------------------------------------------


def test_a_query_of_ten_thousand_words_is_cut_and_says_so(checkpoint, clips, capsys):
    record = find(checkpoint, clips, "ball " * 10_000)
    shown = capsys.readouterr().out
    assert len(record["answers"][0].matches) == 6 and max(map(len, shown.splitlines())) < 300
    assert "the query is long: the model reads its first 30 tokens, up to “" in shown
    find(checkpoint, clips, "a ball")
    assert "the query is long" not in capsys.readouterr().out


def test_queries_from_a_pipe(checkpoint, clips, monkeypatch, decoded):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a red ball\n\n   \ntwo dogs run\n"))
    record = find(checkpoint, clips, None)
    assert [given.query for given in record["answers"]] == ["a red ball", "two dogs run"]
    for given in record["answers"]:
        alone = find(checkpoint, clips, given.query)["answers"][0]
        assert [match.path for match in given.matches] == [match.path for match in alone.matches]
    assert set(take(decoded).values()) == {1}


def test_the_page_shows_the_best_window(checkpoint, clips, monkeypatch):
    looked_at, glimpse = {}, search.picture.__wrapped__.__globals__["glimpse"]

    def spy(path, *args, start, end, **kwargs):
        looked_at[os.path.basename(path)] = start, end
        return glimpse(path, *args, start=start, end=end, **kwargs)

    monkeypatch.setitem(search.picture.__wrapped__.__globals__, "glimpse", spy)
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"query {i}\n" for i in range(22))))
    record = find(checkpoint, clips, None, top=3)
    assert (
        looked_at
        == {m.path: (m.start, m.end) for given in record["answers"] for m in given.matches}
        | looked_at
    )
    page = (clips.parent / "out" / "report.html").read_text(encoding="utf-8")
    parsed = Page(page)
    assert page.count("<article>") == search.ANSWERS_SHOWN and page.index("query 21<") < page.index(
        "query 20<"
    )
    assert "query 2<" in page and "query 1<" not in page  # the last 20
    assert parsed.text.count("not readable") == 0 and page.count("<img") == 60
    last = record["answers"][-1].matches[0]
    first = page[page.index("query 21<") :]
    assert clock(last.start, last.end) in first and f"{last.score:.3f}" in first
    assert f"{(clips / last.path).as_uri()}#t={last.start:.1f},{last.end:.1f}" in first
    assert "default-src 'none'" in page and "http:" not in page and "https:" not in page


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(videos=None), "--videos : not a folder"),
        (dict(videos="nowhere"), "--videos nowhere: not a folder"),
        (dict(query=" \n"), "--query: empty"),
        (dict(top=0), "--top 0"),
        (dict(window=0.0), "--window 0"),
        (dict(window=float("nan")), "--window nan"),
        (dict(out="FILE"), "choose another folder"),
        (dict(index="FILE"), "or choose --index"),
        (dict(videos="EMPTY"), "nothing to search in; it holds 0 video"),
        (dict(videos="BROKEN"), "it holds 2 video files, and 2 of them cannot be read"),
    ],
)
def test_mistakes_end_in_one_line(checkpoint, clips, tmp_path, changes, message):
    (tmp_path / "FILE").write_text("")
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BROKEN").mkdir()
    for name in ("x.mp4", "y.avi"):
        (tmp_path / "BROKEN" / name).write_text("no video")
    changes = {
        name: str(tmp_path / value) if str(value).isupper() else value
        for name, value in changes.items()
    }
    options = (
        dict(
            checkpoint=str(checkpoint.path),
            task="search",
            videos=str(clips),
            query="x",
            window=8.0,
            index=str(tmp_path / "index"),
            out=str(tmp_path / "out"),
            device="cpu",
        )
        | changes
    )
    with pytest.raises(UserError, match=re.escape(message)) as error:
        evaluate(EvalConfig(**options))
    assert "\n" not in str(error.value)


def test_a_model_that_diverged_fills_no_index(clips, tmp_path):
    bad = load_checkpoint(save_model(tmp_path / "bad.safetensors", 0))
    bad.model.video.project.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="video embeddings: NaN"):
        find(bad, clips)
    rows = sqlite3.connect(index_file(clips)).execute("SELECT count(*) FROM video").fetchone()
    assert rows == (0,)
    half = load_checkpoint(save_model(tmp_path / "half.safetensors", 0))
    half.model.text.project.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="query embedding: NaN"):
        find(half, clips)


def test_command_line(checkpoint, clips, tmp_path):
    command = [
        sys.executable,
        "eval.py",
        "--task",
        "search",
        "--videos",
        str(clips),
        "--query",
        "a red ball",
        "--top",
        "3",
        "--window",
        "2",
        "--checkpoint",
        str(checkpoint.path),
        "--cache",
        str(tmp_path / "cache"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (
        "6 videos (6 new), 9 windows" in done.stdout
        and len(re.findall(r"^ {3}[123]  ", done.stdout, re.M)) == 3
    )
    assert (
        checkpoint.path.parent / "search" / "report.html"
    ).exists() and "embed videos: 100%" in done.stderr
