"""datasets.py and splits.py: files are read or refused with their line."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cli import UserError
from datasets import load_questions, load_split
from splits import Question

# ---- files -----------------------------------------------------------------------------------------------------------


def test_csv_and_jsonl_say_the_same(tmp_path):
    rows = [("a.mp4", "a dog, running"), ("b/c.mp4", ""), ("a.mp4", 'a "dog"'), ("/abs/d.mp4", "犬 läuft"),
            ("a.mp4", "word " * 10_000)]
    lines = ["video,length,caption"]
    lines += [f'{video},3,"{caption.replace(chr(34), chr(34) * 2)}"' for video, caption in rows]
    (tmp_path / "pairs.csv").write_text("\n\n".join(lines), encoding="utf-8-sig")  # a byte order mark, empty lines
    objects = [json.dumps(dict(video=video, caption=caption, more=[1])) for video, caption in rows]
    (tmp_path / "pairs.jsonl").write_text("\n".join(objects) + "\n")
    for name in ("pairs.csv", "pairs.jsonl"):
        split = load_split("csv", tmp_path / name)
        assert split.captions == [caption for _, caption in rows]
        assert split.video_paths == [str(tmp_path / "a.mp4"), str(tmp_path / "b/c.mp4"), "/abs/d.mp4"]
        assert split.video_of_caption.tolist() == [0, 1, 0, 2, 0] and split.video_of_caption.dtype == np.int64


def test_a_folder_holds_its_splits(tmp_path):
    for role in ("train", "val", "test"):
        (tmp_path / f"{role}.csv").write_text(f"video,caption\nv.mp4,{role}\n")
    for dataset in ("toy", "csv"):
        for role in ("train", "val", "test"):
            assert load_split(dataset, tmp_path, role).captions == [role]


BAD_FILES = {
    "empty.csv": (b"", "empty"), "blank.csv": (b" \n\n", "empty"), "header.csv": (b"video,caption\n", "no samples"),
    "columns.csv": (b"path,text\na.mp4,b\n", "line 1: the header 'path,text' has no video or caption"),
    "few.csv": (b"video,caption\na.mp4,x\nb.mp4\n", "line 3: 1 columns, the header has 2; expected video, caption"),
    "many.csv": (b"video,caption\na.mp4,a dog, running\n", "line 2: 3 columns"),
    "quote.csv": (b'video,caption\na.mp4,x\na.mp4,"open\n', "line 3: not valid csv"),
    "latin.csv": (b"video,caption\na.mp4,x\nb.mp4,caf\xe9\n", "line 3: not UTF-8"),
    "novideo.csv": (b"video,caption\n ,x\n", "line 2: video is empty"),
    "huge.csv": (b"video,caption\na.mp4," + b"x" * 200_000 + b"\n", "line 2: not valid csv"),
    "words.jsonl": (b'{"video": "a", "caption": "b"}\nhello\n', "line 2: not valid JSON; expected video, caption"),
    "list.jsonl": (b"[1]\n", "line 1: the row is not an object"),
    "deep.jsonl": (b"[" * 100_000, "line 1: not valid JSON"),
    "missing.jsonl": (b'{"video": "a"}\n', "line 1: the row has no caption"),
    "number.jsonl": (b'\n{"video": "a", "caption": 3}\n', "line 2: caption is 3, not a text"),
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
    with pytest.raises(UserError, match="webvid: no such data set; one of toy, csv"):
        load_split("webvid", tmp_path)


csv_texts = st.text(max_size=80).map(lambda text: f"video,caption\n{text}".encode("utf-8", "replace"))
json_rows = st.recursive(st.none() | st.text(max_size=5) | st.integers(), lambda inner: st.dictionaries(
    st.sampled_from(["video", "caption", "x"]), inner, max_size=3)).map(lambda value: json.dumps(value).encode())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=80) | csv_texts | json_rows)
def test_any_bytes_are_a_split_or_one_line(tmp_path, content):
    for name in ("fuzz.csv", "fuzz.jsonl"):
        (tmp_path / name).write_bytes(content)
        try:
            split = load_split("csv", tmp_path / name)
            assert len(split.captions) == len(split.video_of_caption) > 0
        except UserError as error:
            assert name in str(error)


def test_questions(tmp_path):
    path = tmp_path / "mc.jsonl"
    good = dict(video="videos/a.mp4", options=["a dog", "a cat"], answer=1, kind="noun")
    path.write_text(json.dumps(good) + "\n")
    (question,) = load_questions(path)
    assert question == Question(str(tmp_path / "videos/a.mp4"), ["a dog", "a cat"], 1, "noun")
    for wrong in (dict(answer=2), dict(answer=True), dict(answer="1"), dict(options=["a"]), dict(options="ab"),
                  dict(options=[1, 2]), dict(kind=0)):
        path.write_text(json.dumps(good) + "\n" + json.dumps(good | wrong))
        with pytest.raises(UserError, match=f"mc.jsonl, line 2: {next(iter(wrong))}"):
            load_questions(path)
    path.write_text(json.dumps({key: good[key] for key in ("video", "options", "kind")}))
    with pytest.raises(UserError, match="has no answer; expected video, kind, options, answer"):
        load_questions(path)
