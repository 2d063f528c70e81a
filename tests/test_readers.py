"""Files are read whole or refused with their line; nothing in them runs or leaves the root."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from cli import UserError
from datasets.published import load_split
from datasets.readers import read_csv, read_pickle

# ---- files ---------------------------------------------------------------------------------------

ROWS = [("a.mp4", "a dog, running"), ("b/c.mp4", ""), ("a.mp4", 'a "dog"')]
ROWS += [("/abs/d.mp4", "犬 läuft"), ("a.mp4", "word " * 10_000)]


def table(header: str, delimiter: str) -> str:
    """With blank lines between the rows."""
    rows = [header]
    for video, caption in ROWS:
        quoted = caption.replace('"', '""')
        rows.append(f'{video}{delimiter}3{delimiter}"{quoted}"')
    return "\n\n".join(rows)


SAME = {
    "own.csv": table("video,length,caption", ","),
    "semicolons.csv": table("Video;Length; Caption", ";"),
    "tabs.csv": table("VIDEO\tlength\tcaption", "\t"),
    "own.jsonl": "\n".join(json.dumps(dict(video=v, caption=text, more=[1])) for v, text in ROWS),
    # as VindLU and UMT have it; a caption may be a list
    "own.json": json.dumps([dict(video=v, caption=[text]) for v, text in ROWS], indent=1),
}


@pytest.mark.parametrize("name, text", SAME.items(), ids=list(SAME))
def test_all_forms_say_the_same(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8-sig")  # with the mark of Windows
    split = load_split("csv", tmp_path / name)
    assert split.captions == [caption for _, caption in ROWS]
    assert split.video_paths == [f"{tmp_path}/a.mp4", f"{tmp_path}/b/c.mp4", "/abs/d.mp4"]
    assert split.video_of_caption.tolist() == [0, 1, 0, 2, 0]
    assert split.video_of_caption.dtype == np.int64


BAD_CSV = [  # content, what is said of it
    (b"", "the file is empty"),
    (b"video,caption\n", "no samples"),
    (b"path,text\na.mp4,b\n", "line 1: the header 'path,text' has no video or caption"),
    (
        b"video,caption\na.mp4,x\nb.mp4\n",
        "line 3: 1 columns, the header has 2; expected video, caption",
    ),
    (b"video,caption\na.mp4,a dog, running\n", "line 2: 3 columns"),
    (b'video,caption\na.mp4,x\na.mp4,"open\n' + b"b.mp4,y\n" * 9, "line 3: not valid csv"),
    (b"video,caption\na.mp4,x\nb.mp4,caf\xe9\n", "line 3: not UTF-8"),
    (b"video,caption\n ,x\n", "line 2: video is empty"),
    (b"video,caption\na.mp4," + b"x" * 200_000 + b"\n", "line 2: not valid csv"),
    (b"video,caption\na\x00.mp4,x\n", "line 2: the video 'a\\x00.mp4' has control characters"),
]
BAD_JSONL = [
    (b'{"video": "a", "caption": "b"}\nhello\n', "line 2: not valid JSON; expected an object"),
    (b"[1]\n", "line 1: the entry is not an object"),
    (b"[" * 100_000, "line 1: not valid JSON"),
    (b'{"video": "a"}\n', "line 1: the entry has no caption; expected video, caption"),
    (b'{"video": "a", "caption": "x\\ud800"}\n', "line 1: caption holds half of a character"),
    (
        b'{"video": "a\\n.mp4", "caption": "b"}\n',
        "line 1: the video 'a\\n.mp4' has control characters",
    ),
    (
        b'\n{"video": "a", "caption": 3}\n',
        "line 2: caption is 3, not a text or a list; expected video",
    ),
]
BAD_FILES = [("own.csv", *bad) for bad in BAD_CSV] + [("own.jsonl", *bad) for bad in BAD_JSONL]
BAD_FILES.append(("none.csv", None, "none.csv: cannot be read (No such file"))


@pytest.mark.parametrize("name, content, says", BAD_FILES, ids=range(len(BAD_FILES)))
def test_malformed_files_are_refused_with_their_line(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_split("csv", tmp_path / name)
    message = str(caught.value)
    assert says in message and name in message and "\n" not in message


def test_rows_are_read_one_at_a_time(tmp_path):
    """Those before a mistake have been handed out when it is found. A row may take two lines."""
    path = tmp_path / "long.csv"
    two_lines = b'a.mp4,"a dog\nruns"\n'
    path.write_bytes(b"video,caption\n" + two_lines + b"a.mp4,x\n" * 1000 + b"b.mp4,\xff\n")
    rows = read_csv(path, ["video", "caption"])
    assert next(rows) == (f"{path}, line 2", dict(video="a.mp4", caption="a dog\nruns"))
    assert [next(rows)[0] for _ in range(1000)][-1] == f"{path}, line 1003"
    with pytest.raises(UserError, match="line 1004: not UTF-8"):
        next(rows)


# ---- the data root -------------------------------------------------------------------------------


OUTSIDE = ["/etc/passwd", "../x.mp4", "a/../../x.mp4", "..", "a\\..\\x.mp4", "C:\\x.mp4"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_path_leaves_a_given_root(tmp_path, name):
    path = tmp_path / "own.jsonl"
    rows = [dict(video="a/..b.mp4", caption="x"), dict(video=name, caption="y")]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match="jsonl, line 2: the video .* lies outside of the data"):
        load_split("csv", path, videos_root=tmp_path / "videos")
    # without a root one's own file may point anywhere
    assert len(load_split("csv", path).video_paths) == 2
    path.write_text(json.dumps(rows[0]))
    assert load_split("csv", path, videos_root="x").video_paths == ["x/a/..b.mp4"]


# ---- pickles -------------------------------------------------------------------------------------


def test_texts_of_all_pickles(tmp_path):
    """Those of Python 2 are bytes, in UTF-8 or Latin-1."""
    path = tmp_path / "raw-captions.pkl"
    path.write_bytes(b"\x80\x02}(U\x01v](U\x05caf\xc3\xa9U\x04caf\xe9eu.")
    assert read_pickle(path, "") == {"v": ["café", "café"]}
    for protocol in range(6):
        path.write_bytes(pickle.dumps({"v": [["Ünï", "猫"]]}, protocol))
        assert read_pickle(path, "") == {"v": [["Ünï", "猫"]]}


def test_a_pickle_runs_no_code(tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "raw-captions.pkl"

    class Evil:
        def __reduce__(self):
            return Path.touch, (marker,)

    evil = [pickle.dumps({"v": [Evil()]}, protocol) for protocol in range(6)]
    pickle.loads(evil[0])
    assert marker.exists(), "the attack is real: the plain reader runs it"
    marker.unlink()

    evil += [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"\x80\x02\x82\x01.",
        b"Pid\n.",
    ]
    for payload in evil:
        path.write_bytes(payload)
        with pytest.raises(UserError, match="raw-captions.pkl: not a pickle of plain data"):
            read_pickle(path, "")
    assert not marker.exists()
