"""search/: the right moment is first, the index follows the folder, faults cost one video."""

import io
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_checkpoint import make_parts, save
from test_report import Page

from cli import UserError
from data import prepare_video
from eval import EvalConfig, evaluate
from eval import main as eval_main
from search import query as search
from search.index import File, Index, Record, find_videos
from search.query import Library, clock, search_folder
from training.checkpoint import load_checkpoint
from videos import workers
from videos.decode import read_windows, write_video

EVIL = "<img src=x onerror=alert(1)>\x1b[2J\u202eevil\nname.mp4"


def new_checkpoint(folder: Path, seed: int):
    save(folder / "step-000007.safetensors", make_parts(seed))
    return load_checkpoint(folder)


def noise(path: Path, seconds: float = 1.0, seed: int = 0):
    """A video of coarse coloured noise, 10 frames a second, another picture every 2 seconds."""
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (int(np.ceil(seconds / 2)), 4, 4, 3), np.uint8)
    frames = pictures.repeat(12, axis=1).repeat(12, axis=2).repeat(20, axis=0)
    write_video(path, frames[: round(10 * seconds)], rate=10)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return new_checkpoint(tmp_path_factory.mktemp("model"), 0)


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


def find(checkpoint, clips: Path, query="a red ball", **changes) -> dict:
    options = dict(task="search", window=2.0, index=str(clips.parent / "index"), cache="unused")
    config = EvalConfig(videos=str(clips), query=query, **options | changes)
    return search_folder(checkpoint, config, clips.parent / "out")


def ranking(record: dict) -> list[tuple]:
    found = []
    for match in record["answers"][0].matches:
        best = match.moments[0]
        found.append((match.path, round(best.score, 4), best.start, best.end))
    return found


def page_of(clips: Path) -> str:
    return (clips.parent / "out" / "report.html").read_text(encoding="utf-8")


# ---- ranks and times -----------------------------------------------------------------------------


def test_ranking_is_what_brute_force_gives(checkpoint, clips):
    record = find(checkpoint, clips, "two dogs run")
    model, expected = checkpoint.model, []
    with torch.inference_mode():
        tokens = checkpoint.tokenizer.encode_batch(["two dogs run"], 32)
        text_emb = model.encode_text(*tokens)[0].double()
        for path in clips.iterdir():
            scored = []
            for start, end, frames in read_windows(path, 4, size=32, window=2.0):
                emb = model.encode_video(prepare_video(torch.from_numpy(frames)[None]))[0].double()
                scored.append((float(emb @ text_emb), path.name, start, end))
            expected.append(max(scored))
    expected.sort(reverse=True)
    found = ranking(record)
    assert [(path, *when) for path, _, *when in found] == [(path, *w) for _, path, *w in expected]
    assert [row[1] for row in found] == pytest.approx([row[0] for row in expected], abs=1e-4)
    assert (record["videos"], record["windows"], record["new"], record["broken"]) == (6, 9, 6, {})
    assert ranking(find(checkpoint, clips, "two dogs run", top=2)) == found[:2]


def test_a_long_video_shows_its_best_moments_none_beside_a_better_one():
    scores = np.float32([0.1, 0.9, 0.8, 0.2, 0.7, 0.6, 0.5, 0.4])  # 1 and 4, then 6; not 2, 5
    spans = np.arange(8, dtype=np.float32)[:, None] * 10 + np.float32([0, 10])
    film = Record(spans, scores[:, None])
    library = Library({File(name, 0, 0): film for name in "abcd"})
    found = library.search(np.float32([1]), 3)
    assert [match.path for match in found] == ["a", "b", "c"]  # of equals the first
    assert [(m.start, m.end) for m in found[0].moments] == [(10, 20), (40, 50), (60, 70)]
    assert clock(0, 0.24) == "0:00–0:01" and clock(59.6, 67.4) == "1:00–1:07"


# ---- the index follows the folder ----------------------------------------------------------------


def test_only_new_and_changed_files_are_embedded(checkpoint, clips):
    whole = find(checkpoint, clips)
    again = find(checkpoint, clips)
    assert whole["new"] == 6 and again["new"] == 0 and ranking(again) == ranking(whole)

    (clips / "more").mkdir()
    noise(clips / "more" / "f.mp4", seed=20)  # new
    noise(clips / "b.mp4", seconds=4, seed=21)  # changed
    os.utime(clips / "a.mp4", ns=(0, 12345))  # of the same size, and another time
    (clips / "c.mp4").rename(clips.parent / "c.mp4")  # gone
    record = find(checkpoint, clips)
    assert record["new"] == 3 and record["windows"] == 10
    names = {path for path, *_ in ranking(record)}
    assert names == {"a.mp4", "b.mp4", "d.mp4", "e.mp4", "long.mp4", "more/f.mp4"}
    fresh = find(checkpoint, clips, index=str(clips.parent / "fresh"))
    assert ranking(record) == ranking(fresh)

    (clips.parent / "c.mp4").rename(clips / "c.mp4")  # back: time and size are as they were
    record = find(checkpoint, clips)
    assert "c.mp4" in {path for path, *_ in ranking(record)} and record["new"] == 0


def test_each_folder_checkpoint_and_window_has_vectors_of_its_own(checkpoint, clips, tmp_path):
    twin = Path(shutil.copytree(clips, clips.parent / "twin"))  # keeps the times
    own = dict(index=None, cache=str(clips.parent / "cache"))
    assert [find(checkpoint, x, **own)["new"] for x in (clips, twin) * 2] == [6, 6, 0, 0]

    first = find(checkpoint, clips)
    other = new_checkpoint(tmp_path, 1)
    assert ranking(find(other, clips)) != ranking(first)
    assert find(checkpoint, clips, window=float("inf"))["windows"] == 6
    again = find(checkpoint, clips)  # the first ones are still there
    assert ranking(again) == ranking(first) and again["new"] == 0


# ---- interruption and damage ---------------------------------------------------------------------


def test_what_ends_a_run_costs_the_video_at_work(checkpoint, clips, monkeypatch):
    embedded = []

    def interrupted(model, frames):
        embedded.append(frames)
        if len(embedded) == 4:
            raise KeyboardInterrupt
        return embed_windows(model, frames)

    embed_windows = search.embed_windows
    monkeypatch.setattr(search, "embed_windows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find(checkpoint, clips)
    monkeypatch.undo()
    record = find(checkpoint, clips)
    assert record["new"] == 3
    assert ranking(record) == ranking(find(checkpoint, clips, index=str(clips.parent / "fresh")))


def test_a_damaged_row_is_made_again_and_a_damaged_file_is_one_line(checkpoint, clips, capsys):
    whole = ranking(find(checkpoint, clips))
    path = clips.parent / "index" / "index.sqlite"
    data = bytearray(path.read_bytes())
    data[-2000] ^= 4  # of the vectors of a video
    path.write_bytes(data)
    record = find(checkpoint, clips)
    assert record["new"] == 1 and ranking(record) == whole
    assert "its row is damaged; it is embedded again" in capsys.readouterr().out
    for damage in (data[:5000], b"no database" * 500):
        path.write_bytes(damage)
        with pytest.raises(UserError, match="sqlite: cannot hold the index .*delete the file"):
            find(checkpoint, clips)


def test_a_full_disk_is_one_line(tmp_path):
    index = Index(tmp_path / "index.sqlite", checkpoint="x", window=1.0)
    index.database.execute("PRAGMA max_page_count = 3")
    record = Record(np.zeros((1, 2), np.float32), np.zeros((1, 9999), np.float32))
    with pytest.raises(UserError, match="cannot hold the index .database or disk is full.; make"):
        index.add(File("a.mp4", 1, 1), record)


def test_two_runs_at_once(tmp_path):
    recipe = dict(checkpoint="x", window=1.0)
    one, two = (Index(tmp_path / "index.sqlite", **recipe) for _ in range(2))
    files = [File(f"{i:02d}.mp4", i, 1) for i in range(12)]
    for i, file in enumerate(files):
        record = Record(np.zeros((1, 2), np.float32), np.full((1, 1), i, np.float32))
        for index in [(one,), (two,), (one, two)][i % 3]:
            index.add(file, record)
    known = Index(tmp_path / "index.sqlite", **recipe).known(files)
    assert [record.emb.item() for record in known.values()] == list(range(12))


# ---- folders as they are -------------------------------------------------------------------------


def test_broken_videos_are_listed_and_tried_again(checkpoint, clips, capsys):
    good = (clips / "a.mp4").read_bytes()
    (clips / "text.mp4").write_bytes(b"?" * len(good))
    (clips / "cut.mp4").write_bytes((clips / "long.mp4").read_bytes()[:2000])
    record = find(checkpoint, clips)
    assert set(record["broken"]) == {"text.mp4", "cut.mp4"} and record["videos"] == 6
    shown = capsys.readouterr().out
    assert "cannot be read: text.mp4: not a video that OpenCV can open" in shown
    assert "2 videos cannot be read" in page_of(clips)

    (clips / "text.mp4").write_bytes(good)
    assert set(find(checkpoint, clips)["broken"]) == {"cut.mp4"}


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
        (lambda path: open("/proc/self/mem", "rb").read(1), "Input/output error"),
        (lambda path: os.replace(path, f"{path}.gone"), ""),  # its disk vanishes meanwhile
    ],
    ids=["hangs", "crashes", "unreadable", "gone"],
)
def test_a_fault_costs_one_video_this_time(checkpoint, clips, monkeypatch, happens, said):
    monkeypatch.setattr(workers, "PATIENCE", 3.0)
    trouble(monkeypatch, happens)
    record = find(checkpoint, clips)
    assert list(record["broken"]) == (["d.mp4"] if said else []) and record["videos"] == 5
    assert said in record["broken"].get("d.mp4", "")
    monkeypatch.undo()
    if not said:
        os.replace(clips / "d.mp4.gone", clips / "d.mp4")
    assert find(checkpoint, clips)["videos"] == 6


def test_folders_links_and_other_files(tmp_path, masters):
    for name in ("a", "b/c", ".hidden", "b/café 猫  x"):
        (tmp_path / name).mkdir(parents=True)
        shutil.copy(masters / "a.mp4", tmp_path / name / "A.MP4")
    shutil.copy(masters / "a.mp4", tmp_path / "._a.mp4")
    (tmp_path / "notes.txt").write_text("x")
    os.mkfifo(tmp_path / "pipe.mp4")  # opening it would wait for ever
    outside = tmp_path.parent / "outside"
    outside.mkdir(exist_ok=True)
    shutil.copy(masters / "b.mp4", outside / "b.mp4")
    (tmp_path / "far").symlink_to(outside)
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "self.mp4").symlink_to(tmp_path / "a" / "self.mp4")
    (tmp_path / "lost.mp4").symlink_to(tmp_path / "nowhere.mp4")

    files, notes = find_videos(tmp_path)
    expected = ["a/A.MP4", "b/c/A.MP4", "b/café 猫  x/A.MP4", "far/b.mp4"]
    assert [file.path for file in files] == expected
    assert all(file.size == (tmp_path / file.path).stat().st_size for file in files)
    expected = ["a/self.mp4: cannot be read", "lost.mp4: cannot be read"]
    assert sorted(note.split(" (")[0] for note in notes) == expected


def test_hostile_names_and_queries_stay_text(checkpoint, clips, capsys):
    try:
        (clips / "a.mp4").rename(clips / EVIL)
        # OpenCV takes no such name
        (clips / "b.mp4").rename(clips / os.fsdecode(b"latin-\xe9.mp4"))
    except OSError:
        pytest.skip("this file system refuses the names")
    (clips / "<u>.mp4").write_text("no video")
    record = find(checkpoint, clips, EVIL)
    shown, page = capsys.readouterr().out, page_of(clips)
    assert EVIL in {match.path for match in record["answers"][0].matches}
    assert set(record["broken"]) == {"latin-\udce9.mp4", "<u>.mp4"}
    for text in (shown, page):
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\ud800-\udfff]", text)
    assert r"alert(1)>\u001b[2J\u202eevil\u000aname.mp4" in shown and r"latin-\udce9.mp4" in shown
    parsed = Page(page)
    assert "onerror=alert(1)" in parsed.text
    for tag, attributes in parsed.elements:
        assert tag not in ("script", "u")
        assert not any(name.startswith("on") for name in attributes)
        assert tag != "img" or attributes["src"].startswith("data:")


# ---- queries, page, command line -----------------------------------------------------------------


def test_what_the_model_does_not_read_or_know_is_named(checkpoint, clips, capsys):
    record = find(checkpoint, clips, "ball " * 10_000)
    shown = capsys.readouterr().out
    assert len(record["answers"][0].matches) == 6 and max(map(len, shown.splitlines())) < 300
    assert "the query is long: the model reads its first 30 tokens" in shown

    note, *_ = find(checkpoint, clips, "Zebras run, a giraffe falls")["answers"][0].notes
    assert note.endswith("zebras, giraffe") and note in capsys.readouterr().out
    assert note in page_of(clips)
    notes = find(checkpoint, clips, "two red dogs run")["answers"][0].notes
    assert not any(note.startswith("rare") for note in notes)


def test_below_what_unrelated_sentences_reach_nothing_is_claimed(checkpoint, clips, capsys):
    own = find(checkpoint, clips, search.UNRELATED.splitlines()[1].strip())["answers"][0]
    marked = capsys.readouterr().out
    assert own.matches[0].moments[0].score <= own.floor
    assert own.notes[-1].startswith("?: claims nothing, unrelated sentences score up to")
    assert marked.count("? ") == sum(len(match.moments) for match in own.matches)
    assert page_of(clips).count('class="card faint"') == 6

    perfect = Record(
        np.zeros((1, 2), np.float32), search.embed_query(checkpoint, "a red ball")[None]
    )
    library = Library({File("a.mp4", 0, 0): perfect})
    floor = search.find_floor(checkpoint, library)
    assert search.answer(checkpoint, library, "a red ball", 1, floor).notes == []


def test_queries_from_a_pipe_and_their_page(checkpoint, clips, monkeypatch):
    queries = "\n  \n".join(f"query {i}" for i in range(22))  # blank lines ask nothing
    monkeypatch.setattr(sys, "stdin", io.StringIO(queries))
    record = find(checkpoint, clips, None, top=3)
    page = page_of(clips)
    assert [given.query for given in record["answers"]] == [f"query {i}" for i in range(22)]
    assert page.count("<article>") == search.ANSWERS_SHOWN == 20
    assert page.index("query 21<") < page.index("query 20<") and "query 2<" in page
    assert "query 1<" not in page and "not readable" not in page and page.count("<img") == 60
    first = page[page.index("query 21<") : page.index("query 20<")]
    for match in record["answers"][-1].matches:
        for moment in match.moments:
            seconds = f"{moment.start:.1f},{moment.end:.1f}"
            assert f"{(clips / match.path).as_uri()}#t={seconds}" in first
            assert clock(moment.start, moment.end) in first and f"{moment.score:.3f}" in first
    assert "default-src 'none'" in page and "http:" not in page and "https:" not in page


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(videos=None), "--videos : not a folder"),
        (dict(videos="nowhere"), "--videos nowhere: not a folder"),
        (dict(query=" \n"), "--query: empty"),
        (dict(top=0), "--top 0"),
        (dict(window=float("nan")), "--window nan"),
        (dict(out="FILE"), "choose another folder"),
        (dict(index="FILE"), "or choose --index"),
        (dict(videos="EMPTY"), "nothing to search in; it holds 0 video"),
        (dict(videos="BROKEN"), "it holds 1 video files, and 1 of them cannot be read"),
    ],
)
def test_mistakes_end_in_one_line(checkpoint, clips, tmp_path, changes, message):
    (tmp_path / "FILE").write_text("")
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BROKEN").mkdir()
    (tmp_path / "BROKEN" / "x.avi").write_text("no video")
    for name, value in changes.items():
        if str(value).isupper():
            changes = changes | {name: str(tmp_path / value)}
    paths = dict(checkpoint=checkpoint.path, videos=clips, index=tmp_path / "index", out=tmp_path)
    options = {name: str(path) for name, path in paths.items()}
    options |= dict(task="search", query="x", device="cpu")
    with pytest.raises(UserError, match=re.escape(message)) as error:
        evaluate(EvalConfig(**options | changes))
    assert "\n" not in str(error.value)


def test_a_model_that_diverged_fills_no_index(clips, tmp_path):
    bad = new_checkpoint(tmp_path, 0)
    bad.model.video.project.weight.data.fill_(torch.nan)
    for _ in range(2):  # the second time, too, they are embedded
        with pytest.raises(UserError, match="video embeddings: NaN"):
            find(bad, clips)
    bad = load_checkpoint(tmp_path)
    bad.model.text.project.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="query embedding: NaN"):
        find(bad, clips)


def test_command_line_gives_json_and_nothing_else(checkpoint, clips, tmp_path, monkeypatch, capsys):
    words = ["--task", "search", "--videos", clips, "--query", "a red ball", "--top", "3"]
    words += ["--window", "2", "--checkpoint", checkpoint.path, "--cache", tmp_path, "--json"]
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, words)])
    eval_main()
    shown = capsys.readouterr()
    record = json.loads(shown.out)
    assert (record["videos"], record["windows"]) == (6, 9)
    matches = record["answers"][0]["matches"]
    assert len(matches) == 3 and set(matches[0]["moments"][0]) == {"score", "start", "end"}
    assert "videos 6, windows 9, new 6" in shown.err and "embed videos: 100%" in shown.err
    assert (checkpoint.path.parent / "search" / "report.html").exists()
