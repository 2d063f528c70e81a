"""datasets.py, check.py, train.py, eval.py on tiny sets in every published form, and on the real
files if there.
"""

import csv
import json
import pickle
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

import train
from cli import UserError
from data import keep_decodable, load_videos
from datasets.check import check_dataset
from datasets.published import DATASETS, VideoFinder, load_msrvtt_mc, load_questions, load_split
from datasets.readers import read_csv
from datasets.split import Question
from eval import TASKS, EvalConfig, evaluate
from training.checkpoint import load_checkpoint
from videos.cache import FrameCache
from videos.decode import write_video

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
WORDS = [
    "a dog runs",
    "two cats sleep",
    "a man plays the guitar",
    "a woman cooks rice",
    "a car turns",
    "a girl sings",
    "boys kick a ball",
    "a horse jumps",
]
SIZES = dict(train=6, val=2, test=3)  # videos of each tiny split
KEYS = {f"{d}_{m}" for d in ("t2v", "v2t") for m in ("R@1", "R@5", "R@10", "MdR", "MnR")}


def film(path: Path, number: int, frames: int = 8, rate: float = 25.0):
    """A video of noise, another for each number, under any name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = (
        np.random.default_rng(number)
        .integers(0, 256, (frames, 4, 4, 3), np.uint8)
        .repeat(8, 1)
        .repeat(8, 2)
    )
    write_video(path.with_name("new.mp4"), noise, rate)
    path.with_name("new.mp4").rename(path)


def lines(path: Path, *texts: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")


def numbers(role: str) -> range:
    """The videos of a split: train 0 … 5, val 6, 7, test 8 … 10."""
    first = dict(train=0, val=6, test=8)[role]
    return range(first, first + SIZES[role])


def captions_of(i: int) -> list[str]:
    return [f"{WORDS[i % 8]} at place {i}", f"{WORDS[(i + 3) % 8]}, take {i}"]


# ---- one builder a form: (folder); every one leaves what its authors publish ---------------------


def build_msrvtt(root: Path, files: str = "MSRVTT_data.json"):
    for i in range(11):
        film(root / "videos/all" / f"video{i}.mp4", i)
    lines(root / "MSRVTT_train.9k.csv", "video_id", *(f"video{i}" for i in range(8)))
    lines(root / "MSRVTT_train.7k.csv", "video_id", *(f"video{i}" for i in numbers("train")))
    lines(
        root / "MSRVTT_JSFUSION_test.csv",
        "key,vid_key,video_id,sentence",
        *(f'ret{i},msr{i},video{i},"{captions_of(i)[1]}"' for i in numbers("test")),
    )
    split_of = {
        i: name
        for role, name in (("train", "train"), ("val", "validate"), ("test", "test"))
        for i in numbers(role)
    }

    def document(chosen):
        return dict(
            info={"year": "2016"},
            videos=[
                dict(video_id=f"video{i}", category=3, split=split_of[i], url="http://example.org")
                for i in chosen
            ],
            sentences=[
                dict(video_id=f"video{i}", caption=text, sen_id=j)
                for i in chosen
                for j, text in enumerate(captions_of(i))
            ],
        )

    if files == "MSRVTT_data.json":
        lines(root / files, json.dumps(document(range(11))))
    else:
        lines(root / "train_val_videodatainfo.json", json.dumps(document(range(8))))
        lines(root / "test_videodatainfo.json", json.dumps(document(range(8, 11))))


def build_msrvtt_official(root: Path):
    build_msrvtt(root, "official")


def build_msvd(root: Path, pickled: bool = True):
    captions = {f"v{i}_1_{i}": captions_of(i) for i in range(11)}
    for role in SIZES:
        lines(root / f"{role}_list.txt", *(f"v{i}_1_{i}" for i in numbers(role)))
    if pickled:
        words = {video: [text.split() for text in texts] for video, texts in captions.items()}
        (root / "raw-captions.pkl").write_bytes(pickle.dumps(words, protocol=2))
    else:
        lines(root / "captions_msvd.json", json.dumps(captions))
    for i in range(11):
        film(root / "YouTubeClips" / f"v{i}_1_{i}.avi", i)


def build_msvd_json(root: Path):
    build_msvd(root, pickled=False)


def build_didemo(root: Path):
    for role in SIZES:
        entries = [
            dict(
                video=f"9@N0_{i}.m4v",
                description=text,
                times=[[0, 1]],
                num_segments=6,
                annotation_id=i,
                dl_link="http://example.org",
            )
            for text in (0, 1)
            for i in numbers(role)
        ]  # not video by video
        for entry in entries:
            entry["description"] = captions_of(entry["annotation_id"])[entry["description"]]
        lines(root / f"{role}_data.json", json.dumps(entries))
    for i in range(11):
        film(
            root / "videos" / f"9@N0_{i}{['.mp4', '.mov', '.m4v.mp4'][i % 3]}", i
        )  # as people have converted them


def build_lsmdc(root: Path):
    names = dict(
        train="LSMDC16_annos_training.csv",
        val="LSMDC16_annos_val.csv",
        test="LSMDC16_challenge_1000_publictect.csv",
    )
    for role, name in names.items():
        rows = [(i, captions_of(i)[0]) for i in numbers(role)] + [(0, "again on another line")] * (
            role == "train"
        )
        lines(
            root / name,
            *(
                "\t".join(
                    [
                        f"10{i:02d}_The_Film_00.0{i}.01.129-00.0{i}.05.000",
                        "00.00",
                        "00.01",
                        "00.00",
                        "00.01",
                        text,
                    ]
                )
                for i, text in rows
            ),
        )
    for i in range(11):
        film(
            root / f"10{i:02d}_The_Film" / f"10{i:02d}_The_Film_00.0{i}.01.129-00.0{i}.05.000.avi",
            i,
        )


def build_webvid(root: Path):
    for role in ("train", "val"):
        lines(
            root / f"results_2M_{role}.csv",
            "videoid,contentUrl,duration,page_dir,name",
            *(
                f'{1000 + i},https://example.org/{i}.mp4,PT00H00M10S,00{i}_0,"{captions_of(i)[0]}, up close"'
                for i in numbers(role)
            ),
        )
    for i in range(8):
        film(root / "videos" / f"00{i}_0" / f"{1000 + i}.mp4", i)


def build_cc3m(root: Path, tsv: bool = True):
    for role, name in (
        ("train", "Train_GCC-training.tsv"),
        ("val", "Validation_GCC-1.1.0-Validation.tsv"),
    ):
        rows = [(captions_of(i)[0], f"http://example.org/{i}.jpg?ü") for i in numbers(role)]
        if tsv:
            lines(root / name, *("\t".join(row) for row in rows))
        else:
            lines(
                root / f"cc3m_{role}.csv",
                "caption,thumbnailUrl",
                *(f'"{text}",{url}' for text, url in rows),
            )
        for i, (_, url) in zip(numbers(role), rows):
            image = np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8)
            path = (
                root
                / ("training" if role == "train" else "validation")
                / str(zlib.crc32(url.encode()) & 0xFFFFFFFF)
            )
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(
                cv2.imencode(".jpg", image)[1].tobytes()
            )  # no ending, as the downloader leaves them


def build_cc3m_csv(root: Path):
    build_cc3m(root, tsv=False)


def build_csv(root: Path):
    for role in SIZES:
        lines(
            root / f"{role}.csv",
            "video,caption",
            *(f'clips/{i}.mp4,"{text}"' for i in numbers(role) for text in captions_of(i)),
        )
    for i in range(11):
        film(root / "clips" / f"{i}.mp4", i)


def build_mc(root: Path, form: str):
    questions = [(i, [captions_of(j)[0] for j in range(i - 4, i + 1)], 4) for i in numbers("test")]
    questions += [(8, [captions_of(j)[1] for j in (8, 1, 2, 3, 4)], 0)]
    if form == "tsv":
        lines(
            root / "msrvtt_mc_test.tsv",
            "\t".join(["vid_key", "a1", "a2", "a3", "a4", "a5", "answer"]),
            *("\t".join([f"msr{i}", *options, str(answer)]) for i, options, answer in questions),
        )
    elif form == "jsonl":
        lines(
            root / "msrvtt_mc_test.jsonl",
            *(
                json.dumps(dict(qid=n, clip_name=f"video{i}", options=options, answer=a))
                for n, (i, options, a) in enumerate(questions)
            ),
        )
    else:
        lines(
            root / "msrvtt_mc_test.json",
            json.dumps(
                [
                    dict(video=f"video{i}.mp4", caption=options, answer=answer)
                    for i, options, answer in questions
                ],
                indent=1,
            ),
        )


BUILDERS = {  # form: (build, data set)
    "msrvtt": (build_msrvtt, "msrvtt"),
    "msrvtt official files": (build_msrvtt_official, "msrvtt"),
    "msrvtt-7k": (build_msrvtt, "msrvtt-7k"),
    "msrvtt-full": (build_msrvtt, "msrvtt-full"),
    "msrvtt-full official files": (build_msrvtt_official, "msrvtt-full"),
    "msvd": (build_msvd, "msvd"),
    "msvd json": (build_msvd_json, "msvd"),
    "didemo": (build_didemo, "didemo"),
    "lsmdc": (build_lsmdc, "lsmdc"),
    "webvid": (build_webvid, "webvid"),
    "cc3m": (build_cc3m, "cc3m"),
    "cc3m csv": (build_cc3m_csv, "cc3m"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{builder: a folder that it filled}, each made once."""
    made = {}

    def folder(build):
        if build not in made:
            made[build] = tmp_path_factory.mktemp(build.__name__)
            build(made[build])
        return made[build]

    return folder


# ---- what the loaders say ------------------------------------------------------------------------

EXPECTED = {  # of video i in a role: its captions
    "msrvtt": lambda i, role: captions_of(i)[1:] if role == "test" else captions_of(i),
    "msrvtt-full": lambda i, role: captions_of(i),
    "msvd": lambda i, role: captions_of(i),
    "didemo": lambda i, role: [" ".join(captions_of(i))],
    "lsmdc": lambda i, role: captions_of(i)[:1] + ["again on another line"] * (i == 0),
    "webvid": lambda i, role: [captions_of(i)[0] + ", up close"],
    "cc3m": lambda i, role: captions_of(i)[:1],
}
EXPECTED["msrvtt-7k"] = EXPECTED["msrvtt"]


@pytest.mark.parametrize("form", BUILDERS)
def test_every_caption_meets_its_video(folders, form):
    build, dataset = BUILDERS[form]
    for role in DATASETS[dataset].videos:
        split = load_split(dataset, folders(build), role)
        ids = (
            range(8) if (dataset, role) == ("msrvtt", "train") else numbers(role)
        )  # the tiny 9k list has 8
        assert len(split.video_paths) == len(ids) and all(
            Path(path).is_file() for path in split.video_paths
        )
        found = {}
        for caption, j in zip(split.captions, split.video_of_caption):
            found.setdefault(split.video_paths[j], []).append(caption)
        assert list(found.values()) == [EXPECTED[dataset](i, role) for i in ids]
        if dataset != "cc3m":  # and the file is that video, not another one
            cache = FrameCache(folders(build) / "check", size=16, num_frames=2)
            for path, i in zip(split.video_paths, ids):
                noise = np.random.default_rng(i).integers(0, 256, (8, 4, 4, 3), np.uint8)[2]
                assert np.abs(cache.get(path)[0][2::4, 2::4].astype(int) - noise).mean() < 40
        assert split.window == ((0.0, 30.0) if dataset == "didemo" else (0.0, None))


def test_a_set_without_a_split_says_why(folders):
    for dataset, role, says in (
        ("msrvtt", "val", "1k-A has none.*last checkpoint"),
        ("webvid", "test", "it has train"),
        ("msrvtt-mc", "train", "it has test"),
    ):
        with pytest.raises(UserError, match=f"{dataset}: has no {role} split; .*{says}"):
            load_split(dataset, "anywhere", role)


def test_missing_annotations_are_named(tmp_path):
    for dataset, role, says in (
        ("msrvtt", "train", "no MSRVTT_train.9k.csv in it, nor in annotations/"),
        ("msrvtt-full", "test", "no MSRVTT_data.json or test_videodatainfo.json"),
        ("msvd", "train", "no raw-captions.pkl or captions_msvd.json"),
        ("didemo", "val", "no val_data.json"),
        ("lsmdc", "val", "no LSMDC16_annos_val.csv"),
        ("webvid", "train", "no results_2M_train.csv"),
        ("cc3m", "val", "no Validation_GCC"),
        ("msrvtt-mc", "test", "no msrvtt_mc_test.jsonl or"),
    ):
        with pytest.raises(UserError, match=says):
            load_split(dataset, tmp_path, role)


def test_annotations_may_lie_in_a_folder_of_their_own(folders, tmp_path):
    whole = folders(build_webvid)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/results_2M_val.csv").write_bytes(
        (whole / "results_2M_val.csv").read_bytes()
    )
    (tmp_path / "videos").symlink_to(whole / "videos")
    assert (
        load_split("webvid", tmp_path, "val").captions
        == load_split("webvid", whole, "val").captions
    )


def test_where_videos_are_found(tmp_path):
    def find(name):
        return VideoFinder(tmp_path).find(name, "here")

    assert find("a.mp4") == f"{tmp_path}/a.mp4"  # nowhere: where it should be
    for name in (
        "clips/a.webm",
        "clips/a.txt",
        "clips/a.avi",
        "clips/a.MKV",
        "clips/a.b.mp4",
        "clips/a",
    ):
        lines(tmp_path / name, "x")
    assert find("a.mp4") == f"{tmp_path}/clips/a.avi"  # another ending: the first of SUFFIXES
    assert find("a") == f"{tmp_path}/clips/a" and find("b.mp4") == f"{tmp_path}/b.mp4"
    lines(tmp_path / "videos/all/a.m4v", "x")
    assert find("a.mp4") == f"{tmp_path}/videos/all/a.m4v"  # folders in their order
    lines(tmp_path / "clips/a.mp4", "x")
    assert find("a.mp4") == f"{tmp_path}/clips/a.mp4"  # the very name first, wherever it is


def test_didemo_takes_the_listed_videos_and_30_seconds(folders, tmp_path):
    whole = folders(build_didemo)
    (tmp_path / "val_data.json").write_bytes((whole / "val_data.json").read_bytes())
    lines(tmp_path / "val_list.txt", "9@N0_7.mp4")
    grey = np.arange(0, 240, 6, dtype=np.uint8)[:, None, None, None]  # 40 s at one frame a second
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos/9@N0_7.mp4", np.broadcast_to(grey, (40, 32, 32, 3)), rate=1.0)
    split = load_split("didemo", tmp_path, "val")
    assert split.captions == [" ".join(captions_of(7))]
    cache = FrameCache(tmp_path / "cache", size=16, num_frames=6)
    split = keep_decodable(split, cache, workers=1, progress=False)
    frames = (
        load_videos(cache, split.video_paths, 6, window=split.window).float().mean(dim=(0, 2, 3, 4))
    )
    assert frames.tolist() == pytest.approx([6 * (i + 0.5) * 30 / 6 - 3 for i in range(6)], abs=4)
    lines(tmp_path / "val_list.txt", "9@N0_7", "9@N0_99.mp4")
    with pytest.raises(UserError, match="val_list.txt, line 2: '9@N0_99' has no caption"):
        load_split("didemo", tmp_path, "val")


MALFORMED = [  # data set, role, file, its text, what is said of it
    (
        "msrvtt",
        "train",
        "MSRVTT_train.9k.csv",
        "video\nvideo1\n",
        "line 1: the header 'video' has no video_id",
    ),
    (
        "msrvtt",
        "train",
        "MSRVTT_train.9k.csv",
        "video_id\nvideo1\nvideo77\n",
        "line 3: 'video77' has no caption",
    ),
    (
        "msrvtt",
        "train",
        "MSRVTT_train.9k.csv",
        "video_id\nvideo1\nvideo1\n",
        "line 3: 'video1' stands there twice",
    ),
    (
        "msrvtt",
        "test",
        "MSRVTT_JSFUSION_test.csv",
        "key,vid_key,video_id,sentence\nret0,msr8,video8\n",
        "line 2: 3 columns, the header has 4; expected key, vid_key, video_id, sentence",
    ),
    (
        "msrvtt-full",
        "val",
        "MSRVTT_data.json",
        '{"videos": [\n{]',
        "not valid JSON .line 2.; expected an object with",
    ),
    (
        "msrvtt-full",
        "val",
        "MSRVTT_data.json",
        '{"videos": []}',
        "no entries in it; expected .* video_id, split",
    ),
    (
        "msrvtt-full",
        "val",
        "MSRVTT_data.json",
        '{"videos": [{"video_id": "v", "split": "test"}, {"video_id": "w"}]}',
        "videos.1.: the entry has no split; expected video_id, split",
    ),
    (
        "msrvtt-full",
        "val",
        "MSRVTT_data.json",
        '{"videos": [{"video_id": "v", "split": "test"}], "sentences": '
        '[{"video_id": "v", "caption": 3}]}',
        "sentences.0.: caption is 3, not a text; expected video_id, caption",
    ),
    (
        "msrvtt-full",
        "val",
        "MSRVTT_data.json",
        '{"videos": [{"video_id": "v", "split": "test"}], "sentences": '
        '[{"video_id": "w", "caption": "x"}]}',
        "sentences.0.: 'w' is not among the file's videos",
    ),
    (
        "msrvtt-full",
        "val",
        "MSRVTT_data.json",
        '{"videos": [{"video_id": "v", "split": "test"}, {"video_id": "v", "split": "train"}]}',
        "videos.1.: v is in two splits",
    ),
    ("msvd", "test", "captions_msvd.json", '{"a": ["x"], "a": []}', "'a' stands there twice"),
    ("msvd", "test", "captions_msvd.json", "[]", "expected {video: .sentence"),
    (
        "msvd",
        "test",
        "captions_msvd.json",
        '{"v8_1_8": "x"}',
        "entry 'v8_1_8': not a list; expected a list of sent",
    ),
    (
        "msvd",
        "test",
        "captions_msvd.json",
        '{"v8_1_8": ["x", 5]}',
        r"entry 'v8_1_8'\[1\]: a word or sentence is 5",
    ),
    ("msvd", "test", "test_list.txt", "v8_1_8\n\nv9\n", "line 3: 'v9' has no caption"),
    ("msvd", "test", "test_list.txt", "\n", "the file is empty; expected one name a line"),
    (
        "didemo",
        "val",
        "val_data.json",
        '[{"video": "a"}]',
        r"entry \[0\]: the entry has no description; exp",
    ),
    (
        "didemo",
        "val",
        "val_data.json",
        "{}",
        "no entries in it; expected a list of objects with video, description",
    ),
    (
        "lsmdc",
        "test",
        "LSMDC16_challenge_1000_publictect.csv",
        "a_0-1\tb\tc\td\te\tf\na b\tc\n",
        "line 2: 2 columns; expected CLIP_ID, START_ALIGNED, .*, SENTENCE, separated by tabs",
    ),
    (
        "lsmdc",
        "test",
        "LSMDC16_challenge_1000_publictect.csv",
        "CLIP\tb\tc\td\te\tf\n",
        "line 1: CLIP_ID is 'CLIP'",
    ),
    (
        "webvid",
        "val",
        "results_2M_val.csv",
        "videoid,name\n1,x\n",
        "line 1: the header .* has no page_dir",
    ),
    (
        "cc3m",
        "val",
        "Validation_GCC-1.1.0-Validation.tsv",
        "a dog\thttp://x/1\na cat\n",
        "line 2: 1 columns; exp",
    ),
    (
        "cc3m",
        "val",
        "Validation_GCC-1.1.0-Validation.tsv",
        "a dog\tx\n",
        "line 1: 'x' is no address",
    ),
    (
        "msrvtt-mc",
        "test",
        "msrvtt_mc_test.tsv",
        "vid_key\ta1\ta2\ta3\ta4\nx\n",
        "line 1: the header .* has no a5",
    ),
    (
        "msrvtt-mc",
        "test",
        "msrvtt_mc_test.tsv",
        "vid_key\ta1\ta2\ta3\ta4\ta5\tanswer\nmsr1\ta\tb\tc\td\te\tx\n",
        "line 2: answer is 'x', expected a whole number",
    ),
    (
        "msrvtt-mc",
        "test",
        "msrvtt_mc_test.jsonl",
        '{"qid": 0, "clip_name": "video1", "options": ["a", "b"]}\n',
        "line 1: the entry has no answer; expected clip_name, options, answer",
    ),
    (
        "msrvtt-mc",
        "test",
        "msrvtt_mc_test.json",
        '[{"video": "video1", "caption": ["a", "b"], "answer": 7}]',
        r"entry \[0\]: answer is 7, expected 0 … 1",
    ),
]


@pytest.mark.parametrize(
    "dataset, role, name, text, says", MALFORMED, ids=lambda value: str(value)[:30]
)
def test_malformed_files_are_refused_with_their_line(
    folders, tmp_path, dataset, role, name, text, says
):
    builder = {"msvd": build_msvd_json, "msrvtt-mc": None}.get(
        dataset, globals().get(f"build_{dataset[:6]}")
    )
    for path in folders(builder).iterdir() if builder else ():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        load_split(dataset, tmp_path, role)
    assert name in str(caught.value) and "\n" not in str(caught.value)


OUTSIDE = [  # data set, role, file, its text with the name of a video in it
    (
        "msrvtt",
        "test",
        "MSRVTT_JSFUSION_test.csv",
        "key,vid_key,video_id,sentence\nret0,msr8,NAME,x\n",
    ),
    ("didemo", "test", "test_data.json", '[{"video": "NAME.mp4", "description": "x"}]'),
    ("lsmdc", "test", "LSMDC16_challenge_1000_publictect.csv", "NAME_0-1\t0\t0\t0\t0\tx\n"),
    ("webvid", "train", "results_2M_train.csv", "videoid,page_dir,name\n5,NAME,x\n"),
    (
        "msrvtt-mc",
        "test",
        "msrvtt_mc_test.json",
        '[{"video": "NAME", "caption": ["a", "b"], "answer": 0}]',
    ),
]


@pytest.mark.parametrize("name", ["/etc/passwd", "../../secret", "a/../../b"])
@pytest.mark.parametrize("dataset, role, file, text", OUTSIDE, ids=[row[0] for row in OUTSIDE])
def test_no_annotation_leaves_the_data_root(tmp_path, dataset, role, file, text, name):
    lines(tmp_path / file, text.replace("NAME", name))
    with pytest.raises(UserError, match=f"{file}, .*: the video .* lies outside of the data root"):
        load_split(dataset, tmp_path, role)


# ---- multiple choice -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tsv", "jsonl", "json"])
def test_the_three_forms_of_msrvtt_mc_ask_the_same(folders, tmp_path, form):
    build_mc(tmp_path, form)
    (tmp_path / "videos").symlink_to(folders(build_msrvtt) / "videos")
    questions = load_msrvtt_mc(tmp_path)
    assert questions[0] == Question(
        f"{tmp_path}/videos/all/video8.mp4", [captions_of(j)[0] for j in range(4, 9)], 4
    )
    assert [question.answer for question in questions] == [4, 4, 4, 0] and Path(
        questions[3].video
    ).is_file()


def test_answers_that_count_from_one(tmp_path):
    rows = [dict(qid=i, clip_name="video1", options=list("abcde"), answer=i + 1) for i in range(5)]
    lines(tmp_path / "other.jsonl", *map(json.dumps, rows))
    assert [question.answer for question in load_msrvtt_mc(tmp_path, tmp_path / "other.jsonl")] == [
        0,
        1,
        2,
        3,
        4,
    ]
    lines(tmp_path / "other.jsonl", *map(json.dumps, [*rows, rows[0] | dict(answer=0)]))
    with pytest.raises(
        UserError, match="other.jsonl, line 5: answer is 5"
    ):  # 0 and 5: neither way of counting
        load_msrvtt_mc(tmp_path, tmp_path / "other.jsonl")


def test_questions(tmp_path):
    path = tmp_path / "mc.jsonl"
    good = dict(video="videos/a.mp4", options=["a dog", "a cat"], answer=1, kind="noun")
    path.write_text(json.dumps(good) + "\n")
    (question,) = load_questions(path)
    assert question == Question(str(tmp_path / "videos/a.mp4"), ["a dog", "a cat"], 1, "noun")
    for wrong in (
        dict(answer=2),
        dict(answer=True),
        dict(answer="1"),
        dict(options=["a"]),
        dict(options="ab"),
        dict(options=[1, 2]),
        dict(kind=0),
    ):
        path.write_text(json.dumps(good) + "\n" + json.dumps(good | wrong))
        with pytest.raises(UserError, match=f"mc.jsonl, line 2: {next(iter(wrong))}"):
            load_questions(path)
    path.write_text(json.dumps({key: good[key] for key in ("video", "options", "kind")}))
    with pytest.raises(UserError, match="has no answer; expected video, kind, options, answer"):
        load_questions(path)


# ---- is it whole? --------------------------------------------------------------------------------


def test_check_counts_and_lists_what_is_missing_or_broken(folders, tmp_path):
    whole = folders(build_msvd)
    for path in whole.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "videos").mkdir()
    for path in (whole / "YouTubeClips").iterdir():
        (tmp_path / "videos" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "videos/v1_1_1.avi").unlink()
    (tmp_path / "videos/v8_1_8.avi").write_bytes(b"")
    (tmp_path / "videos/v9_1_9.avi").write_bytes(
        (tmp_path / "videos/v9_1_9.avi").read_bytes()[:300]
    )
    (tmp_path / "val_list.txt").unlink()
    counts, problems = check_dataset("msvd", tmp_path)
    assert counts == [
        dict(
            split="train",
            expected=1200,
            listed=6,
            captions=12,
            found=5,
            missing=1,
            broken=0,
            decoded=5,
        ),
        dict(
            split="val", expected=100, listed=0, captions=0, found=0, missing=0, broken=0, decoded=0
        ),
        dict(
            split="test",
            expected=670,
            listed=3,
            captions=6,
            found=3,
            missing=0,
            broken=2,
            decoded=1,
        ),
    ]
    assert [(row["split"], row["status"], Path(row["video"]).name) for row in problems] == [
        ("train", "count", ""),
        ("train", "missing", "v1_1_1.avi"),
        ("val", "no split", ""),
        ("test", "count", ""),
        ("test", "count", ""),
        ("test", "broken", "v8_1_8.avi"),
        ("test", "broken", "v9_1_9.avi"),
    ]
    assert problems[4]["reason"] == "its files list 6 captions, the protocol has 27,763"
    drawn = {
        check_dataset("msvd", tmp_path, sample=1, seed=seed)[0][2]["broken"] for seed in range(8)
    }
    assert drawn == {1, 2}  # empty files are always found, others if the sample holds them
    assert check_dataset("msvd", tmp_path, sample=0)[0][0]["decoded"] == 0


def check_command(*words):
    return subprocess.run(
        [sys.executable, "-m", "datasets.check", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_check_command(folders, tmp_path):
    done = check_command("csv", "--root", folders(build_csv), "--out", tmp_path / "list.csv")
    assert done.returncode == 0 and "csv: whole" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "list.csv").read_text().split() == ["split,status,video,reason"]
    done = check_command(
        "lsmdc", "--root", folders(build_lsmdc), "--sample", 2, "--out", tmp_path / "l.csv"
    )
    assert (
        done.returncode == 1 and "lsmdc: not whole; results on it are not comparable" in done.stdout
    )
    assert "random sample of 2 videos a split (seed 0)" in done.stdout
    assert [row["reason"] for row in csv.DictReader(open(tmp_path / "l.csv"))] == [
        f"its files list 3 {what}, the protocol has 1,000" for what in ("videos", "captions")
    ]
    for words, says in (
        (["msrvtt"], "--root"),
        (["nothing", "--root", "."], "nothing: no such data set"),
    ):
        done = check_command(*words)
        assert done.returncode == 2 and says in done.stderr, done.stderr


def test_didemo_whatever_the_ending(tmp_path):
    """As in its real files: "X.", "X.3g2" and "X.mp4" are one video, in lists and on disk too."""
    said = [
        ("a@N0_1.", "one"),
        ("b@N0_2.3g2", "two"),
        ("a@N0_1.mp4", "more"),
        ("c@N0_3.dv", "three"),
    ]
    entries = [dict(video=video, description=text) for video, text in said]
    (tmp_path / "test_data.json").write_text(json.dumps(entries))
    (tmp_path / "test_list.txt").write_text("a@N0_1.m4v\nb@N0_2.\nc@N0_3\n")
    (tmp_path / "videos").mkdir()
    there = ["a@N0_1.m2ts", "b@N0_2.", "c@N0_3.mov"]
    for name in there:
        (tmp_path / "videos" / name).touch()
    split = load_split("didemo", tmp_path, "test")
    assert [Path(path).name for path in split.video_paths] == there
    assert split.captions == ["one more", "two", "three"]


@pytest.mark.parametrize(
    "annotations, videos",
    [
        ("msrvtt_data", "MSRVTT_Videos"),  # CLIP4Clip's
        ("annotation", "videos/all"),  # Frozen's
        ("", "TestVideo/TestVideo"),  # MSR-VTT's own archives, unpacked with their folders
    ],
)
def test_msrvtt_where_its_users_have_it(tmp_path, annotations, videos):
    for folder in (annotations, videos):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    text = "key,vid_key,video_id,sentence\nret0,msr7,video7,a dog runs\n"
    (tmp_path / annotations / "MSRVTT_JSFUSION_test.csv").write_text(text)
    (tmp_path / videos / "video7.mp4").touch()
    assert load_split("msrvtt", tmp_path, "test").video_paths == [
        str(tmp_path / videos / "video7.mp4")
    ]


# ---- train and evaluate on each ------------------------------------------------------------------


def train_tiny(out: Path, **config):
    """Two steps of the smallest model."""
    train.train(
        train.TrainConfig(
            **dict(
                out=str(out),
                steps=2,
                batch_size=4,
                num_frames="2",
                warmup=1,
                log_every=1,
                eval_every=2,
                workers=1,
                guided_from=0.0,
            )
            | config
        )
    )
    return load_checkpoint(out)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("form", BUILDERS)
def test_train_and_evaluate(folders, tmp_path, cache, form):
    build, dataset = BUILDERS[form]
    root = folders(build)
    checkpoint = train_tiny(tmp_path / "run", dataset=dataset, data_root=str(root), cache=cache)
    assert checkpoint.step == 2 and checkpoint.config["dataset"] == dataset
    validated = any(
        "validation" in line for line in (tmp_path / "run/log.jsonl").read_text().splitlines()
    )
    assert validated == ("val" in DATASETS[dataset].videos)
    task = "msrvtt" if dataset == "msrvtt-7k" else dataset
    if task not in TASKS:
        assert task in ("webvid", "cc3m")  # for training only
        return
    record = evaluate(
        EvalConfig(
            checkpoint=str(tmp_path / "run"),
            task=task,
            data_root=str(root),
            device="cpu",
            out=str(tmp_path / "eval"),
            cache=cache,
            sim_out=str(tmp_path / "sim.npz"),
        )
    )
    assert json.loads(
        (tmp_path / "eval/metrics.json").read_text(encoding="utf-8")
    ) == record and KEYS <= set(record)
    captions = sum(len(EXPECTED[dataset](i, "test")) for i in numbers("test"))
    assert (record["videos"], record["captions"], record["missing"], record["broken"]) == (
        3,
        captions,
        0,
        0,
    )
    assert (
        record["protocol"].startswith(DATASETS[task].protocol)
        and record["checkpoint_sha256"] == checkpoint.sha256
    )
    official = DATASETS[task].videos["test"]
    assert (
        record["note"].startswith(f"3 of {official:,} videos")
        and "comparable (the files list 3" in record["note"]
    )
    assert ("trained on MSR-VTT's 9k list" in record["note"]) == (
        dataset == "msrvtt" and task == "msrvtt-full"
    )
    page = (tmp_path / "eval/report.html").read_text(encoding="utf-8")
    assert f"3 of {official:,} videos" in page
    saved = np.load(tmp_path / "sim.npz")
    assert (
        saved["sim"].shape == (captions, 3) and len(json.loads(str(saved["captions"]))) == captions
    )


def test_the_official_number_is_comparable(folders, tmp_path, cache, monkeypatch):
    """The same tiny set with a protocol of its size: no note. With a video less: N of M."""
    root = folders(build_lsmdc)
    monkeypatch.setitem(DATASETS["lsmdc"].videos, "test", 3)
    monkeypatch.setitem(DATASETS["lsmdc"].captions, "test", 3)
    train_tiny(tmp_path / "run", dataset="lsmdc", data_root=str(root), cache=cache)
    config = EvalConfig(
        checkpoint=str(tmp_path / "run"),
        task="lsmdc",
        data_root=str(root),
        device="cpu",
        cache=cache,
    )
    assert (
        evaluate(config)["note"] == "" and (tmp_path / "run/eval-lsmdc-test/metrics.json").is_file()
    )
    for path in root.glob("LSMDC16*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for i in (8, 9):
        (tmp_path / f"10{i:02d}_The_Film").symlink_to(root / f"10{i:02d}_The_Film")
    config.data_root, config.max_broken = str(tmp_path), 0.5
    assert evaluate(config)["note"] == "2 of 3 videos, 2 of 3 captions: not comparable (1 missing)"


@pytest.mark.parametrize("form", ["tsv", "jsonl", "json"])
def test_msrvtt_mc_is_accuracy_only(folders, tmp_path, cache, form):
    build_mc(tmp_path, form)
    (tmp_path / "videos").symlink_to(folders(build_msrvtt) / "videos")
    run = Path(cache) / "mc-run"
    if not run.exists():
        train_tiny(run, dataset="msrvtt", data_root=str(folders(build_msrvtt)), cache=cache)
    record = evaluate(
        EvalConfig(
            checkpoint=str(run),
            task="msrvtt-mc",
            data_root=str(tmp_path),
            device="cpu",
            out=str(tmp_path / "eval"),
            cache=cache,
            sim_out=str(tmp_path / "sim.npz"),
        )
    )
    assert (
        not {name for name in record if name[:3] in ("t2v", "v2t")}
        and 0 <= record["mc_accuracy"] <= 100
    )
    assert not {name for name in record if name.startswith("mc_accuracy_")}
    assert (record["videos"], record["captions"], record["questions"]) == (3, 0, 4)
    assert "4 of 2,990 questions: not comparable (the files list 4 questions)" in record["note"]
    assert "9k list, which holds 1,990 of these videos: not comparable" in record["note"]
    page = (tmp_path / "eval/report.html").read_text(encoding="utf-8")
    assert (
        "Multiple choice" in page
        and "Text to video" not in page
        and "holds 1,990 of these videos" in page
    )
    saved = np.load(tmp_path / "sim.npz")
    assert saved["option_scores"].shape == (4, 5) and saved["answers"].tolist() == [4, 4, 4, 0]
    with pytest.raises(UserError, match="--dsl: 0 captions"):
        evaluate(
            EvalConfig(
                checkpoint=str(run),
                task="msrvtt-mc",
                data_root=str(tmp_path),
                device="cpu",
                dsl=True,
                out=str(tmp_path / "eval"),
                cache=cache,
            )
        )


def test_command_lines_name_what_they_need(folders, tmp_path):
    for command, says in (
        (["train.py", "--dataset", "msvd"], "--dataset msvd: needs --data-root"),
        (["train.py", "--dataset", "csv"], "--dataset csv: needs --data FILE"),
    ):
        done = subprocess.run(
            [sys.executable, *command, "--out", tmp_path / "run"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1


# ---- the real files, where they lie beside the repository ----------------------------------------

LISTS = SHARED / "annotations" / "msrvtt"
needs_lists = pytest.mark.skipif(
    not LISTS.is_dir(), reason="no real MSR-VTT lists in ../shared/annotations/msrvtt"
)
needs_clips = pytest.mark.skipif(
    not (SHARED / "msrvtt_mini").is_dir(), reason="no real clips in ../shared/msrvtt_mini"
)


def listed(name: str) -> set[str]:
    return {row["video_id"] for _, row in read_csv(LISTS / name, ["video_id"])}


@needs_lists
def test_the_real_1ka():
    split = load_split("msrvtt", LISTS, "test")
    assert len(split.video_paths) == len(split.captions) == 1000 and len({*split.captions}) == 995
    assert split.video_of_caption.tolist() == list(range(1000))
    tested = listed("MSRVTT_JSFUSION_test.csv")
    train7k, train9k = listed("MSRVTT_train.7k.csv"), listed("MSRVTT_train.9k.csv")
    official = [listed(f"MSRVTT_{role}.full.csv") for role in ("train", "val", "test")]
    assert [len(part) for part in (train7k, train9k, *official)] == [7010, 9000, 6513, 497, 2990]
    assert not tested & train7k and not tested & train9k and tested <= official[2]
    assert len(train9k & official[2]) == 1990 and not train7k & official[2]
    assert official[1] <= train7k, (
        "the official validation split is part of the 7k list: it validates nothing there"
    )
    for name, entry in (("msrvtt", train9k), ("msrvtt-7k", train7k)):
        assert DATASETS[name].videos == dict(train=len(entry), test=1000)
    assert DATASETS["msrvtt-full"].videos == dict(train=6513, val=497, test=2990)


@needs_clips
def test_the_real_captions_by_both_loaders():
    for role, name, count in (("train", "train.csv", 3151), ("val", "val.csv", 244)):
        split = load_split("msrvtt-full", SHARED / "msrvtt_mini", role)
        own = load_split("csv", SHARED / "msrvtt_mini" / name)
        assert len(split.video_paths) == count and len(split.captions) == 20 * count
        by_video = [
            {
                (Path(s.video_paths[j]).name, caption)
                for caption, j in zip(s.captions, s.video_of_caption)
            }
            for s in (split, own)
        ]
        assert by_video[0] == by_video[1]


@needs_clips
def test_the_real_clips_are_checked_and_evaluated(tmp_path, cache):
    counts, problems = check_dataset("msrvtt-full", SHARED / "msrvtt_mini", sample=20)
    assert [(row["listed"], row["missing"], row["broken"], row["decoded"]) for row in counts] == [
        (3151, 0, 0, 20),
        (244, 0, 0, 20),
        (0, 0, 0, 0),
    ]
    assert {row["status"] for row in problems} == {"count"}
    document = json.loads((SHARED / "msrvtt_mini/MSRVTT_data.json").read_text())
    chosen = [v for v in document["videos"] if v["split"] == "train"][:12]
    chosen += [v for v in document["videos"] if v["split"] == "validate"][:12]
    names = {video["video_id"] for video in chosen}
    sentences = [sentence for sentence in document["sentences"] if sentence["video_id"] in names]
    (tmp_path / "MSRVTT_data.json").write_text(json.dumps(dict(videos=chosen, sentences=sentences)))
    (tmp_path / "videos").symlink_to((SHARED / "msrvtt_mini/videos").resolve())
    train_tiny(tmp_path / "run", dataset="msrvtt-full", data_root=str(tmp_path), cache=cache)
    record = evaluate(
        EvalConfig(
            checkpoint=str(tmp_path / "run"),
            task="msrvtt-full",
            split="val",
            device="cpu",
            data_root=str(tmp_path),
            cache=cache,
            out=str(tmp_path / "eval"),
        )
    )
    assert (record["videos"], record["captions"], record["missing"]) == (12, 240, 0)
    assert record["note"].startswith("12 of 497 videos, 240 of 9,940 captions: not comparable")


# ---- pre-training --------------------------------------------------------------------------------


def test_videos_and_images_train_together_from_one_frame_on(tmp_path, cache):
    build_webvid(tmp_path / "webvid")
    build_cc3m(tmp_path / "cc3m")
    split = load_split("webvid+cc3m", tmp_path)
    parts = [load_split(name, tmp_path / name) for name in ("webvid", "cc3m")]
    assert split.captions == [*parts[0].captions, *parts[1].captions]
    assert (
        split.video_paths == [*parts[0].video_paths, *parts[1].video_paths]
        and len(split.video_paths) == 12
    )
    checkpoint = train_tiny(
        tmp_path / "run",
        dataset="webvid+cc3m",
        data_root=str(tmp_path),
        cache=cache,
        steps=3,
        batch_size=12,
        num_frames="1,2,4",
    )
    assert checkpoint.step == 3 and checkpoint.model.config.num_frames == 4
