"""Every parser, fed with what nobody would write: the result is whole, or an error of one line, and
nothing else.

Valid files are damaged in places (spans cut out, doubled, replaced by what parsers stumble over),
so that the damage gets past the first check. "Nothing else" includes: no path in a data file leads
out of the data root.
"""

import copy
import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import test_datasets as builders
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from captions.tagger import load_plain_pickle
from captions.tokenizer import Tokenizer
from cli import UserError
from datasets.published import DATASETS, Folder, load_msrvtt_mc, load_questions, load_split
from datasets.split import Split
from knowledge import ConceptVocab, extract_many, read_captions
from model import CLOP, build_config
from report.page import shown
from training.checkpoint import hash_text, load_checkpoint, save_checkpoint
from training.log import Log, read_log

# the same examples every time: a test that fails now and then is fixed by nobody. Before a release:
# 1,000, at random
quick = settings(
    max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)

STUMBLES = [b"", b"\n", b"\r", b"\t", b",", b'"', b"'", b"\\", b"\x00", b"_", b"://"]
STUMBLES += [b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"\xe2\x80\xae"]
STUMBLES += [b"../../", b"/etc/passwd", b"C:\\x", b"null", b"NaN", b"1e999", b"-1", b"[]", b"{}"]
STUMBLES += [b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, "²٣".encode(), b"video", b"msr"]


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """`whole` with up to three spans replaced."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(whole)))
        end = min(len(whole), start + draw(st.integers(0, 1) | st.integers(0, 40)))
        twice = st.just(whole[start:end] * 2)
        middle = draw(st.sampled_from(STUMBLES) | st.binary(max_size=8) | twice)
        whole = whole[:start] + middle + whole[end:]
    return whole


def fuzz(files: dict[Path, bytes], read):
    """Call read() again and again, each time with damage in one of the files."""

    @quick
    @given(st.data())
    def check(data):
        path = data.draw(st.sampled_from(list(files)))
        path.write_bytes(data.draw(damaged(files[path])))
        try:
            read()
        except UserError as error:
            one_line(error)
        finally:
            path.write_bytes(files[path])

    check()


def one_line(error: UserError):
    text = str(error)
    assert text and "\n" not in text and "\r" not in text and len(text) < 2000, text


def assert_whole(split: Split, root: Path):
    """Every caption can be written, and every path lies in the root."""
    assert len(split.captions) == len(split.video_of_caption) and split.video_paths
    for caption in split.captions:
        caption.encode("utf-8")
    inside = os.path.realpath(root) + os.sep
    for path in split.video_paths:
        assert os.path.realpath(path.replace("\0", "")).startswith(inside), path


# ---- data sets -----------------------------------------------------------------------------------

FORMS = ["msrvtt", "msrvtt of Frozen", "msvd", "msvd json", "didemo", "lsmdc", "webvid", "cc3m"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """{form: folder}: tiny data sets in the layout of their authors; the videos are empty files."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builders, "film_bytes", lambda number: b"")
        for form in FORMS:
            folders[form] = tmp_path_factory.mktemp("published")
            builders.BUILDERS[form][0](folders[form])
    return folders


@pytest.mark.parametrize("form", FORMS)
def test_damaged_annotations_of_a_data_set(form, published):
    root, (_, dataset) = published[form], builders.BUILDERS[form]
    endings = (".csv", ".json", ".txt", ".tsv", ".pkl")
    whole = {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.suffix in endings}
    for role in DATASETS[dataset].videos:
        fuzz(whole, lambda role=role: assert_whole(load_split(dataset, root, role), root))


OWN = {
    "own.csv": b'video,caption\na.mp4,a dog runs\nsub/b.mp4,"two cats, asleep"\na.mp4,\n',
    "own.jsonl": (
        b'{"video": "a.mp4", "caption": "a dog runs"}\n'
        b'{"video": "sub/b.mp4", "caption": "two cats"}\n'
    ),
    "own.json": b'[{"video": "a.mp4", "caption": ["a dog", "it runs"]}]',
}


@pytest.mark.parametrize("name", OWN)
def test_damaged_lists_of_ones_own_videos(name, tmp_path):
    path, root = tmp_path / name, tmp_path / "root"
    whole = {path: OWN[name]}
    fuzz(whole, lambda: assert_whole(load_split("csv", path, videos_root=root), root))
    fuzz(whole, lambda: [caption.encode("utf-8") for caption in read_captions(path)])


QUESTIONS = {
    "q.jsonl": b'{"video": "a.mp4", "options": ["x", "y"], "answer": 1, "kind": "noun"}\n' * 2,
    "msrvtt_mc_test.jsonl": b'{"clip_name": "video7", "options": ["x", "y"], "answer": 1}\n' * 2,
    "msrvtt_mc_test.json": b'[{"video": "video7.mp4", "caption": ["x", "y"], "answer": 1}]',
    "msrvtt_mc_test.tsv": b"\tvid_key\ta1\ta2\ta3\ta4\ta5\tanswer\n0\tmsr7\tv\tw\tx\ty\tz\t3\n",
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_damaged_questions(name, tmp_path):
    def read():
        is_own = name == "q.jsonl"
        questions = load_questions(tmp_path / name) if is_own else load_msrvtt_mc(Folder(tmp_path))
        pairs = []
        for question in questions:
            assert 0 <= question.answer < len(question.options)
            pairs += [(question.video, option) for option in question.options]
        assert_whole(Split.from_pairs(pairs), tmp_path)

    fuzz({tmp_path / name: QUESTIONS[name]}, read)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("the trap was sprung",)


@quick
@given(
    damaged(pickle.dumps({"v": [["a", "dog"], "runs"], "n": 1.5}, protocol=2))
    | damaged(pickle.dumps(Trap()))
)
def test_damaged_pickles_call_nothing(content):
    try:
        plain(load_plain_pickle(content))
    except Exception as error:  # nearly any: its callers turn all of them into one line
        assert not isinstance(error, AssertionError), error
    assert not os.path.exists("the trap was sprung")


def plain(value):
    texts, numbers = (str, bytes, bytearray), (int, float, bool)
    boxes = (dict, list, tuple, set, frozenset)
    assert isinstance(value, (*texts, *numbers, *boxes, type(None), type)), value


@pytest.mark.parametrize("data", [{("a", "b"): ["x"]}, [1], {"v": [[["deep"]]]}], ids=str)
def test_pickles_of_plain_data_in_odd_shapes(data, tmp_path):
    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps(data))
    (tmp_path / "test_list.txt").write_text("v\n")
    with pytest.raises(UserError) as error:
        load_split("msvd", tmp_path, "test")
    one_line(error.value)


# ---- what this code wrote itself, and a disk or a stranger changed -------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(path, its bytes) of a tiny one."""
    captions = ["a dog chases a cat", "two red balls bounce"]
    tokenizer = Tokenizer.train(captions, 280)
    vocab = ConceptVocab.build(extract_many(captions), min_count=1)
    towers = dict(video_layers=1, text_layers=1, vocab_size=tokenizer.vocab_size)
    model = CLOP(build_config("toy", **towers, num_concepts=len(vocab)))
    path = tmp_path_factory.mktemp("checkpoint") / "x.safetensors"
    contents = dict(config=dict(lr=0.1), step=7, training=dict(moment=torch.arange(3.0)))
    save_checkpoint(path, model, tokenizer, vocab, **contents)
    return path, path.read_bytes()


ODD_VALUES = [None, True, -1, 0, 3, 2**31, 10**30, 1.5, 1e308]
ODD_VALUES += ["", "x", [], {}, [[]], [None], {"a": 1}]


def places(value, path=()) -> list[tuple]:
    """The paths of all values inside a JSON value."""
    found = [path] if path else []
    keys = value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    for key in keys:
        found += places(value[key], (*path, key))
    return found


def with_value(document, path, value):
    document = copy.deepcopy(document)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return document


def test_a_checkpoint_made_to_harm_is_refused_or_loads(checkpoint):
    """Its checksums are right; what they cover is not."""
    path, whole = checkpoint
    (size,) = struct.unpack("<Q", whole[:8])
    outer = json.loads(whole[8 : 8 + size])
    header = json.loads(outer["__metadata__"]["clop"])
    top = [place for place in places(header) if len(place) < 3]

    @quick
    @given(st.sampled_from(top) | st.sampled_from(places(header)), st.sampled_from(ODD_VALUES))
    def check(place, value):
        changed = json.dumps(with_value(header, place, value))
        outer["__metadata__"] = dict(clop=changed, clop_sha256=hash_text(changed))
        text = json.dumps(outer).encode()
        text += b" " * (-len(text) % 8)
        path.with_name("made").write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + size :])
        try:
            found = load_checkpoint(path.with_name("made"), training=True)
            assert isinstance(found.step, int) and isinstance(found.config, dict)
        except UserError as error:
            one_line(error)

    check()


def test_damaged_logs_are_cut_back(tmp_path):
    lines = [dict(config={}), dict(step=1, loss=2.5), dict(step=2, loss=None)]
    lines.append(dict(step=2, validation={}))
    path = tmp_path / "log.jsonl"

    def read():
        log = Log(path, step=1)
        log.write(dict(step=2, loss=1.0))
        log.file.close()
        *before, last = read_log(path)
        assert last == dict(step=2, loss=1.0)
        assert all(line.get("step", 0) <= 1 for line in before)

    fuzz({path: "".join(json.dumps(line) + "\n" for line in lines).encode()}, read)


# ---- pages ---------------------------------------------------------------------------------------


@quick
@given(
    st.text(st.characters(codec=None), max_size=60)
    | st.text("<>&\"'\x00\x07\x1b\x7f\x9b\u202e\u2028/script b=", max_size=40)
)
def test_no_caption_hides_characters(caption):
    """Markup is jinja's to escape: tests/test_report.py."""
    seen = shown(caption)
    assert all(c.isprintable() or c in "\u200c\u200d" for c in seen)
    seen.encode("utf-8")
