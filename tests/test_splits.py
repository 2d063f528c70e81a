"""splits.py: files are read whole, or refused with their line; nothing in them runs or leaves the
data root.
"""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cli import UserError
from datasets.published import load_split
from datasets.readers import read_captions_pickle, read_csv

# ---- files ---------------------------------------------------------------------------------------


def test_csv_and_jsonl_say_the_same(tmp_path):
    rows = [
        ("a.mp4", "a dog, running"),
        ("b/c.mp4", ""),
        ("a.mp4", 'a "dog"'),
        ("/abs/d.mp4", "犬 läuft"),
        ("a.mp4", "word " * 10_000),
    ]
    lines = ["video,length,caption"]
    lines += [f'{video},3,"{caption.replace(chr(34), chr(34) * 2)}"' for video, caption in rows]
    (tmp_path / "pairs.csv").write_text(
        "\n\n".join(lines), encoding="utf-8-sig"
    )  # a byte order mark, empty lines
    objects = [json.dumps(dict(video=video, caption=caption, more=[1])) for video, caption in rows]
    (tmp_path / "pairs.jsonl").write_text("\n".join(objects) + "\n")
    for name in ("pairs.csv", "pairs.jsonl"):
        split = load_split("csv", tmp_path / name)
        assert split.captions == [caption for _, caption in rows]
        assert split.video_paths == [
            str(tmp_path / "a.mp4"),
            str(tmp_path / "b/c.mp4"),
            "/abs/d.mp4",
        ]
        assert (
            split.video_of_caption.tolist() == [0, 1, 0, 2, 0]
            and split.video_of_caption.dtype == np.int64
        )


def test_a_folder_holds_its_splits(tmp_path):
    for role in ("train", "val", "test"):
        (tmp_path / f"{role}.csv").write_text(f"video,caption\nv.mp4,{role}\n")
    for dataset in ("toy", "csv"):
        for role in ("train", "val", "test"):
            assert load_split(dataset, tmp_path, role).captions == [role]


BAD_FILES = {
    "empty.csv": (b"", "empty"),
    "blank.csv": (b" \n\n", "empty"),
    "header.csv": (b"video,caption\n", "no samples"),
    "columns.csv": (
        b"path,text\na.mp4,b\n",
        "line 1: the header 'path,text' has no video or caption",
    ),
    "few.csv": (
        b"video,caption\na.mp4,x\nb.mp4\n",
        "line 3: 1 columns, the header has 2; expected video, caption",
    ),
    "many.csv": (b"video,caption\na.mp4,a dog, running\n", "line 2: 3 columns"),
    "quote.csv": (b'video,caption\na.mp4,x\na.mp4,"open\n', "line 3: not valid csv"),
    "latin.csv": (b"video,caption\na.mp4,x\nb.mp4,caf\xe9\n", "line 3: not UTF-8"),
    "novideo.csv": (b"video,caption\n ,x\n", "line 2: video is empty"),
    "huge.csv": (b"video,caption\na.mp4," + b"x" * 200_000 + b"\n", "line 2: not valid csv"),
    "words.jsonl": (
        b'{"video": "a", "caption": "b"}\nhello\n',
        "line 2: not valid JSON; expected an object",
    ),
    "list.jsonl": (b"[1]\n", "line 1: the entry is not an object"),
    "deep.jsonl": (b"[" * 100_000, "line 1: not valid JSON"),
    "missing.jsonl": (
        b'{"video": "a"}\n',
        "line 1: the entry has no caption; expected video, caption",
    ),
    "half.jsonl": (
        b'{"video": "a", "caption": "x\\ud800"}\n',
        "line 1: caption holds half of a character",
    ),
    "twice.jsonl": (
        b'{"video": "a", "caption": "b", "video": "c"}\n',
        "line 1: 'video' stands there twice",
    ),
    "control.csv": (
        b"video,caption\na\x00.mp4,x\n",
        "line 2: the video 'a\\x00.mp4' has control characters",
    ),
    "escape.jsonl": (
        b'{"video": "a\\n.mp4", "caption": "b"}\n',
        "line 1: the video 'a\\n.mp4' has control characters",
    ),
    "open.csv": (
        b'video,caption\na.mp4,x\nb.mp4,"open\n' + b"c.mp4,y\n" * 9,
        "line 3: not valid csv",
    ),
    "number.jsonl": (
        b'\n{"video": "a", "caption": 3}\n',
        "line 2: caption is 3, not a text; expected video, caption",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_malformed_files_are_refused_with_their_line(tmp_path, name):
    content, says = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_split("csv", tmp_path / name)
    assert says in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_and_data_sets(tmp_path):
    with pytest.raises(UserError, match="none.csv: cannot be read .No such file"):
        load_split("csv", tmp_path / "none.csv")
    with pytest.raises(UserError, match="test.csv: cannot be read"):
        load_split("toy", tmp_path, "test")
    with pytest.raises(UserError, match="webvid-10m: no such data set; one of toy, csv"):
        load_split("webvid-10m", tmp_path)


csv_texts = st.text(max_size=80).map(
    lambda text: f"video,caption\n{text}".encode("utf-8", "replace")
)
json_rows = st.recursive(
    st.none() | st.text(max_size=5) | st.integers(),
    lambda inner: st.dictionaries(st.sampled_from(["video", "caption", "x"]), inner, max_size=3),
).map(lambda value: json.dumps(value).encode())


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=80) | csv_texts | json_rows)
def test_any_bytes_are_a_split_or_one_line(tmp_path, content):
    for name in ("fuzz.csv", "fuzz.jsonl"):
        (tmp_path / name).write_bytes(content)
        try:
            split = load_split("csv", tmp_path / name)
            assert len(split.captions) == len(split.video_of_caption) > 0
        except UserError as error:
            assert name in str(error)


def test_rows_are_read_one_at_a_time(tmp_path):
    """A mistake in the last line is found when it is reached: the rows before it have been handed
    out by then.
    """
    (tmp_path / "long.csv").write_bytes(b"video,caption\n" + b"a.mp4,x\n" * 1000 + b"b.mp4,\xff\n")
    rows = read_csv(tmp_path / "long.csv", ["video", "caption"])
    assert [next(rows)[0] for _ in range(1000)][-1].endswith("line 1001")
    with pytest.raises(UserError, match="line 1002: not UTF-8"):
        next(rows)


def test_a_caption_over_several_lines_is_one(tmp_path):
    (tmp_path / "two.csv").write_text('video,caption\na.mp4,"a dog\nruns"\nb.mp4,"x" y\n')
    rows = read_csv(tmp_path / "two.csv", ["video", "caption"])
    assert next(rows) == (
        f"{tmp_path}/two.csv, line 2",
        {"video": "a.mp4", "caption": "a dog\nruns"},
    )
    with pytest.raises(UserError, match="line 4: not valid csv"):
        next(rows)


# ---- the data root -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x.mp4", "a/../../x.mp4", "..", "a\\..\\x.mp4", "C:\\x.mp4"]
)
def test_no_path_leaves_a_given_root(tmp_path, name):
    (tmp_path / "own.jsonl").write_text(
        json.dumps(dict(video="in.mp4", caption="x"))
        + "\n"
        + json.dumps(dict(video=name, caption="y"))
    )
    with pytest.raises(
        UserError, match="own.jsonl, line 2: the video .* lies outside of the data root"
    ):
        load_split("csv", tmp_path / "own.jsonl", root=tmp_path / "videos")
    assert (
        len(load_split("csv", tmp_path / "own.jsonl").video_paths) == 2
    )  # one's own file may point anywhere


def test_with_a_root_paths_are_relative_to_it(tmp_path):
    (tmp_path / "own.csv").write_text("video,caption\na/..b.mp4,x\n")
    assert load_split("csv", tmp_path / "own.csv").video_paths == [f"{tmp_path}/a/..b.mp4"]
    assert load_split("csv", tmp_path / "own.csv", root="elsewhere").video_paths == [
        "elsewhere/a/..b.mp4"
    ]


# ---- pickles -------------------------------------------------------------------------------------


def python2_pickle(value) -> bytes:
    """What Python 2's pickle.dump(value, protocol=2) writes of dicts, lists and byte strings,
    without memo.
    """

    def body(value):
        if isinstance(value, dict):
            return b"}(" + b"".join(body(key) + body(part) for key, part in value.items()) + b"u"
        if isinstance(value, list):
            return b"](" + b"".join(map(body, value)) + b"e"
        return b"U" + bytes([len(value)]) + value

    return b"\x80\x02" + body(value) + b"."


def test_python_2_texts_become_text(tmp_path):
    words = {b"v_1_2": [[b"a", b"caf\xc3\xa9"], [b"caf\xe9"]], b"w": [[b"x"]]}
    (tmp_path / "old.pkl").write_bytes(python2_pickle(words))
    assert (
        pickle.loads(python2_pickle(words), encoding="bytes") == words
    )  # the helper above is right
    assert read_captions_pickle(tmp_path / "old.pkl") == {
        "v_1_2": [["a", "café"], ["café"]],
        "w": [["x"]],
    }
    for protocol in range(6):
        (tmp_path / "new.pkl").write_bytes(pickle.dumps({"v": [["Ünï", "猫"]]}, protocol))
        assert read_captions_pickle(tmp_path / "new.pkl") == {"v": [["Ünï", "猫"]]}


def test_a_pickle_runs_no_code(tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return Path.touch, (marker,)

    evil = [pickle.dumps({"v": [Evil()]}, protocol) for protocol in range(6)]
    evil += [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"\x80\x02\x82\x01.",
        b"Pid\n.",
    ]
    for payload in evil:
        (tmp_path / "raw-captions.pkl").write_bytes(payload)
        with pytest.raises(UserError, match="raw-captions.pkl: not a pickle of plain data"):
            read_captions_pickle(tmp_path / "raw-captions.pkl")
    pickle.loads(evil[0])
    assert marker.exists(), "the attack is real: the plain reader runs it"
    marker.unlink()
    for payload in evil:
        (tmp_path / "raw-captions.pkl").write_bytes(payload)
        with pytest.raises(UserError):
            read_captions_pickle(tmp_path / "raw-captions.pkl")
    assert not marker.exists()


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.binary(max_size=60) | st.binary(max_size=40).map(lambda noise: b"\x80\x02}(U\x01v" + noise)
)
def test_any_pickle_is_captions_or_one_line(tmp_path, content):
    (tmp_path / "raw-captions.pkl").write_bytes(content)
    (tmp_path / "test_list.txt").write_text("v\n")
    try:
        split = load_split("msvd", tmp_path, "test")
        assert split.video_paths and all(isinstance(caption, str) for caption in split.captions)
    except UserError as error:
        assert "raw-captions.pkl" in str(error) or "test_list.txt, line 1" in str(error)
