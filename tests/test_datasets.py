"""The published data sets: tiny ones in every form, and the real files where they lie beside us."""

import csv
import functools
import json
import pickle
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

import train
from cli import UserError
from data import keep_decodable, load_videos
from datasets.check import check_dataset
from datasets.published import DATASETS, Folder, load_msrvtt_mc, load_questions, load_split
from datasets.readers import read_csv
from datasets.split import Question
from eval import EvalConfig, evaluate
from training.checkpoint import export_checkpoint, load_checkpoint
from videos.cache import FrameCache
from videos.decode import write_video

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
WORDS = ["a dog runs", "two cats sleep", "a man plays the guitar", "a woman cooks rice"]
WORDS += ["a car turns", "a girl sings", "boys kick a ball", "a horse jumps"]
# the videos of the tiny splits
NUMBERS = dict(train=range(6), val=range(6, 8), test=range(8, 11))


@functools.cache
def film_bytes(number: int) -> bytes:
    """A video of noise, another one for each number."""
    noise = np.random.default_rng(number).integers(0, 256, (8, 4, 4, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        write_video(Path(folder, "new.mp4"), noise.repeat(8, 1).repeat(8, 2))
        return Path(folder, "new.mp4").read_bytes()


def image_bytes(number: int) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (40, 48, 3), np.uint8)
    return cv2.imencode(".jpg", noise)[1].tobytes()


def film(path: Path, number: int):
    """A video under any name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(film_bytes(number))


def films(pattern: Path):
    """All eleven; "#" in the path is the number."""
    for i in range(11):
        film(Path(str(pattern).replace("#", str(i))), i)


def lines(path: Path, *texts: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")


def copy_files(source: Path, target: Path):
    target.mkdir(exist_ok=True)
    for path in source.glob("*.*"):
        (target / path.name).write_bytes(path.read_bytes())


def captions_of(i: int) -> list[str]:
    return [f"{WORDS[i % 8]} at place {i}", f"{WORDS[(i + 3) % 8]}, take {i}"]


# ---- one builder per form: it leaves in a folder what the authors publish ------------------------


def build_msrvtt(root: Path):
    films(root / "videos/all/video#.mp4")
    write_msrvtt_lists(root)
    lines(root / "MSRVTT_data.json", msrvtt_document(range(11)))


def build_msrvtt_official(root: Path):
    build_msrvtt(root)
    (root / "MSRVTT_data.json").unlink()
    lines(root / "train_val_videodatainfo.json", msrvtt_document(range(8)))
    lines(root / "test_videodatainfo.json", msrvtt_document(range(8, 11)))


def build_msrvtt_clip4clip(root: Path):
    """CLIP4Clip's msrvtt_data.zip and MSRVTT.zip."""
    build_msrvtt(root / "msrvtt_data")
    (root / "msrvtt_data/videos/all").rename(root / "MSRVTT_Videos")


def build_msrvtt_frozen(root: Path):
    """Frozen in Time's MSRVTT.zip, unpacked in the root."""
    films(root / "MSRVTT/videos/all/video#.mp4")
    sentences = []
    for i in range(11):
        sentences += [dict(image_id=f"video{i}", caption=text) for text in captions_of(i)]
    lines(root / "MSRVTT/annotation/MSR_VTT.json", json.dumps(dict(annotations=sentences)))

    parts = {f"{role}_list_full": numbers for role, numbers in NUMBERS.items()}
    parts |= dict(train_list_jsfusion=range(8), val_list_jsfusion=NUMBERS["test"])
    folder = root / "MSRVTT/high-quality/structured-symlinks"
    for name, numbers in parts.items():
        lines(folder / f"{name}.txt", *(f"video{i}" for i in numbers))
    chosen = {f"video{i}": 1 for i in NUMBERS["test"]}
    (folder / "jsfusion_val_caption_idx.pkl").write_bytes(pickle.dumps(chosen))


def write_msrvtt_lists(root: Path):
    lines(root / "MSRVTT_train.9k.csv", "video_id", *(f"video{i}" for i in range(8)))
    lines(root / "MSRVTT_train.7k.csv", "video_id", *(f"video{i}" for i in NUMBERS["train"]))
    rows = [f'ret{i},msr{i},video{i},"{captions_of(i)[1]}"' for i in NUMBERS["test"]]
    lines(root / "MSRVTT_JSFUSION_test.csv", "key,vid_key,video_id,sentence", *rows)


def msrvtt_document(numbers: range) -> str:
    videos, sentences = [], []
    for i in numbers:
        split = "train" if i < 6 else "validate" if i < 8 else "test"
        videos.append(dict(video_id=f"video{i}", category=3, split=split, url="http://a.org"))
        for j, text in enumerate(captions_of(i)):
            sentences.append(dict(video_id=f"video{i}", caption=text, sen_id=j))
    return json.dumps(dict(info=dict(year="2016"), videos=videos, sentences=sentences))


def build_msrvtt_vindlu(root: Path):
    """VindLU's and UMT's json, below a folder of its own; the videos are in another container."""
    films(root / "MSRVTT_Videos/video#.avi")
    for name, numbers, first in (("train9k", range(8), 0), ("test1k", NUMBERS["test"], 1)):
        rows = [dict(video=f"video{i}.mp4", caption=captions_of(i)[first:]) for i in numbers]
        lines(root / f"anno_downstream/msrvtt_ret_{name}.json", json.dumps(rows))


def build_didemo_vindlu(root: Path):
    films(root / "DiDeMo_Videos/9@N0_#.mp4")
    for role, numbers in NUMBERS.items():
        entries = [dict(video=f"9@N0_{i}.mp4", caption=captions_of(i)) for i in numbers]
        lines(root / f"didemo_ret_{role}.json", json.dumps(entries))


def build_msvd(root: Path):
    films(root / "YouTubeClips/v#_1_#.avi")
    for role, numbers in NUMBERS.items():
        lines(root / f"{role}_list.txt", *(f"v{i}_1_{i}" for i in numbers))
    captions = {}
    for i in range(11):
        captions[f"v{i}_1_{i}"] = [text.split() for text in captions_of(i)]
    (root / "raw-captions.pkl").write_bytes(pickle.dumps(captions, protocol=2))


def build_msvd_json(root: Path):
    build_msvd(root)
    (root / "raw-captions.pkl").unlink()
    captions = {f"v{i}_1_{i}": captions_of(i) for i in range(11)}
    lines(root / "captions_msvd.json", json.dumps(captions))


def build_didemo(root: Path):
    for role, numbers in NUMBERS.items():
        entries = []
        for n in (0, 1):  # not video by video
            for i in numbers:
                entries.append(dict(video=f"9@N0_{i}.m4v", description=captions_of(i)[n]))
        lines(root / f"{role}_data.json", json.dumps(entries))
    for i in range(11):  # as people have converted them
        film(root / "videos" / f"9@N0_{i}{['.mp4', '.mov', '.m4v.mp4'][i % 3]}", i)


LSMDC_FILES = dict(
    train="LSMDC16_annos_training.csv",
    val="LSMDC16_annos_val.csv",
    test="LSMDC16_challenge_1000_publictect.csv",
)


def build_lsmdc(root: Path):
    for i in range(11):
        film(root / lsmdc_clip(i)[:13] / f"{lsmdc_clip(i)}.avi", i)
    for role, numbers in NUMBERS.items():
        rows = [(lsmdc_clip(i), captions_of(i)[0]) for i in numbers]
        if role == "train":
            rows.append((lsmdc_clip(0), "again on another line"))
        times = ["00.00", "00.01", "00.00", "00.01"]
        lines(root / LSMDC_FILES[role], *("\t".join([clip, *times, text]) for clip, text in rows))


def lsmdc_clip(i: int) -> str:
    return f"10{i:02d}_The_Film_00.0{i}.01.129-00.0{i}.05.000"


def build_webvid(root: Path):
    for role in ("train", "val"):
        rows = []
        for i in NUMBERS[role]:
            film(root / "videos" / f"00{i}_0" / f"{1000 + i}.mp4", i)
            url = f"https://example.org/{i}.mp4"
            rows.append(f'{1000 + i},{url},PT00H00M10S,00{i}_0,"{captions_of(i)[0]}, up close"')
        lines(root / f"results_2M_{role}.csv", "videoid,contentUrl,duration,page_dir,name", *rows)


CC3M_FILES = dict(train="Train_GCC-training.tsv", val="Validation_GCC-1.1.0-Validation.tsv")


def build_cc3m(root: Path):
    """The images are without ending, as the downloader leaves them."""
    for role, folder in dict(train="training", val="validation").items():
        (root / folder).mkdir(parents=True)
        rows = []
        for i in NUMBERS[role]:
            url = f"http://example.org/{i}.jpg?ü"
            rows.append(f"{captions_of(i)[0]}\t{url}")
            (root / folder / str(zlib.crc32(url.encode()))).write_bytes(image_bytes(i))
        lines(root / CC3M_FILES[role], *rows)


def build_cc3m_csv(root: Path):
    build_cc3m(root)
    for role, name in CC3M_FILES.items():
        rows = (root / name).read_text(encoding="utf-8").replace("\t", ",")
        (root / name).unlink()
        lines(root / f"cc3m_{role}.csv", "caption,thumbnailUrl", rows)


def build_csv(root: Path):
    films(root / "clips/#.mp4")
    for role, numbers in NUMBERS.items():
        rows = []
        for i in numbers:
            rows += [f'clips/{i}.mp4,"{text}"' for text in captions_of(i)]
        lines(root / f"{role}.csv", "video,caption", *rows)


def build_mc(root: Path, form: str):
    rows = []
    for i, answer in ((8, 4), (9, 4), (10, 4), (8, 0)):
        options = [captions_of(j)[0] for j in range(i - answer, i - answer + 5)]
        forms = {
            "tsv": "\t".join([f"msr{i}", *options, str(answer)]),
            "jsonl": json.dumps(dict(qid=i, clip_name=f"video{i}", options=options, answer=answer)),
            "json": json.dumps(dict(video=f"video{i}.mp4", caption=options, answer=answer)),
        }
        rows.append(forms[form])
    if form == "tsv":
        rows.insert(0, "\t".join("vid_key a1 a2 a3 a4 a5 answer".split()))
    if form == "json":
        rows = ["[", ",\n".join(rows), "]"]
    lines(root / f"msrvtt_mc_test.{form}", *rows)


def build_nothing(root: Path):
    pass


BUILDERS = {  # form: (build, data set)
    "msrvtt": (build_msrvtt, "msrvtt"),
    "msrvtt official files": (build_msrvtt_official, "msrvtt"),
    "msrvtt of CLIP4Clip": (build_msrvtt_clip4clip, "msrvtt"),
    "msrvtt of Frozen": (build_msrvtt_frozen, "msrvtt"),
    "msrvtt of VindLU": (build_msrvtt_vindlu, "msrvtt"),
    "msrvtt-7k": (build_msrvtt, "msrvtt-7k"),
    "msrvtt-full": (build_msrvtt, "msrvtt-full"),
    "msrvtt-full official files": (build_msrvtt_official, "msrvtt-full"),
    "msrvtt-full of Frozen": (build_msrvtt_frozen, "msrvtt-full"),
    "msvd": (build_msvd, "msvd"),
    "msvd json": (build_msvd_json, "msvd"),
    "didemo": (build_didemo, "didemo"),
    "didemo of VindLU": (build_didemo_vindlu, "didemo"),
    "lsmdc": (build_lsmdc, "lsmdc"),
    "webvid": (build_webvid, "webvid"),
    "cc3m": (build_cc3m, "cc3m"),
    "cc3m csv": (build_cc3m_csv, "cc3m"),
    "csv": (build_csv, "csv"),
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


# ---- what the readers say ------------------------------------------------------------------------

EXPECTED = {  # the captions of video i in a role
    "msrvtt": lambda i, role: captions_of(i)[1:] if role == "test" else captions_of(i),
    "msrvtt-full": lambda i, role: captions_of(i),
    "msvd": lambda i, role: captions_of(i),
    "didemo": lambda i, role: [" ".join(captions_of(i))],
    "lsmdc": lambda i, role: captions_of(i)[:1] + ["again on another line"] * (i == 0),
    "webvid": lambda i, role: [captions_of(i)[0] + ", up close"],
    "cc3m": lambda i, role: captions_of(i)[:1],
}
EXPECTED |= {"msrvtt-7k": EXPECTED["msrvtt"], "csv": EXPECTED["msvd"]}


def captions_by_video(split) -> list[list[str]]:
    found = [[] for _ in split.video_paths]
    for caption, j in zip(split.captions, split.video_of_caption):
        found[j].append(caption)
    return found


@pytest.mark.parametrize("form", BUILDERS)
def test_every_caption_meets_its_video(folders, form):
    build, dataset = BUILDERS[form]
    for role in DATASETS[dataset].videos:
        split = load_split(dataset, folders(build), role)
        # the tiny 9k list has 8
        ids = range(8) if (dataset, role) == ("msrvtt", "train") else NUMBERS[role]
        assert captions_by_video(split) == [EXPECTED[dataset](i, role) for i in ids]
        assert split.window == ((0.0, 30.0) if dataset == "didemo" else (0.0, None))

        # and the file is that video, not another one
        content = image_bytes if dataset == "cc3m" else film_bytes
        assert [Path(path).read_bytes() for path in split.video_paths] == [*map(content, ids)]


NOT_THERE = [  # data set, role, what is said of it in an empty folder
    ("webvid-10m", "train", "webvid-10m: no such data set; one of toy, csv"),
    ("msrvtt", "val", "msrvtt: has no val split; 1k-A has none.*last checkpoint"),
    ("webvid", "test", "webvid: has no test split; it has train"),
    ("msrvtt", "train", "no MSRVTT_train.9k.csv or .*jsfusion.txt in it or in its annotations/"),
    ("msrvtt-full", "test", "no MSRVTT_data.json or MSR_VTT.json or train_val.*msrvtt_data/"),
    ("msvd", "train", "no raw-captions.pkl or captions_msvd.json"),
    ("msrvtt-mc", "test", "no msrvtt_mc_test.jsonl or"),
]


@pytest.mark.parametrize("dataset, role, says", NOT_THERE)
def test_what_is_not_there_is_named(tmp_path, dataset, role, says):
    with pytest.raises(UserError, match=says):
        load_split(dataset, tmp_path, role)


def test_where_videos_are_found(tmp_path):
    def find(name):
        path = Folder(tmp_path).video(name, "here")
        return str(Path(path).relative_to(tmp_path))

    assert find("a.mp4") == "a.mp4"  # nowhere: where it should be
    for name in ("a.webm", "a.txt", "a.avi", "a.MKV", "a.b.mp4", "a"):
        lines(tmp_path / "clips" / name, "x")
    assert find("a.mp4") == "clips/a.avi"  # another ending: the first in the list of suffixes
    assert find("a") == "clips/a" and find("b.mp4") == "b.mp4"
    lines(tmp_path / "videos/all/a.m4v", "x")
    assert find("a.mp4") == "videos/all/a.m4v"  # folders in their order
    lines(tmp_path / "clips/a.mp4", "x")
    assert find("a.mp4") == "clips/a.mp4"  # the very name first, wherever it is
    lines(tmp_path / "TestVideo/TestVideo/c.mp4", "x")
    assert find("c.mp4") == "TestVideo/TestVideo/c.mp4"  # as it unpacks


def test_videos_elsewhere(folders, tmp_path):
    """--videos-root is where the data set's own places fail; what was searched is said."""
    whole, elsewhere = folders(build_msrvtt), tmp_path / "disk"
    copy_files(whole, tmp_path)
    copy_files(whole / "videos/all", elsewhere)
    cache = FrameCache(tmp_path / "cache", size=16, num_frames=2)
    with pytest.raises(UserError, match=f"looked in {tmp_path}; elsewhere: --videos-root"):
        keep_decodable(load_split("msrvtt", tmp_path, "test"), cache)

    film(tmp_path / "videos/video8.mp4", 0)
    split = load_split("msrvtt", tmp_path, "test", videos_root=elsewhere)
    found = [str(Path(path).relative_to(tmp_path)) for path in split.video_paths]
    assert found == ["videos/video8.mp4", "disk/video9.mp4", "disk/video10.mp4"]
    rows, _ = check_dataset("msrvtt", tmp_path, videos_root=elsewhere)
    assert [row["missing"] for row in rows] == [0, 0]


def test_didemo_names_end_in_anything(tmp_path):
    """Real names end in ".", ".3g2", ".m2ts"; two spellings of one name are one video."""
    names = ["1@N1_a.", "1@N1_a.mp4", "2@N2_b.3g2", "3@N3_c.m2ts", "3@N3_c.", "4@N4_d.weird"]
    entries = [dict(video=name, description=f"of {name[:6]} {n}.") for n, name in enumerate(names)]
    lines(tmp_path / "test_data.json", json.dumps(entries))
    for name in ("1@N1_a.mov", "2@N2_b.3g2", "3@N3_c.m2ts.mp4", "4@N4_d.mkv", "4@N4_d.txt"):
        lines(tmp_path / "videos" / name, "x")

    split = load_split("didemo", tmp_path, "test")
    found = [Path(path).name for path in split.video_paths]
    assert found == ["1@N1_a.mov", "2@N2_b.3g2", "3@N3_c.m2ts.mp4", "4@N4_d.mkv"]
    assert split.captions[0] == "of 1@N1_a 0. of 1@N1_a 1." and len(split.captions) == 4

    lines(tmp_path / "test_list.txt", "3@N3_c.mp4", "1@N1_a")
    split = load_split("didemo", tmp_path, "test")
    assert split.captions == ["of 3@N3_c 3. of 3@N3_c 4.", "of 1@N1_a 0. of 1@N1_a 1."]
    lines(tmp_path / "test_list.txt", "3@N3_c.mp4", "9@N0_99.mp4")
    with pytest.raises(UserError, match="test_list.txt, line 2: '9@N0_99' has no caption"):
        load_split("didemo", tmp_path, "test")


def test_didemo_takes_30_seconds(tmp_path):
    lines(tmp_path / "val_data.json", json.dumps([dict(video="a.mp4", description="x")]))
    grey = np.arange(0, 240, 6, dtype=np.uint8)[:, None, None, None]  # 40 s at one frame a second
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos/a.mp4", np.broadcast_to(grey, (40, 32, 32, 3)), rate=1.0)

    cache = FrameCache(tmp_path / "cache", size=16, num_frames=6)
    split = load_split("didemo", tmp_path, "val")
    split = keep_decodable(split, cache, workers=1, progress=False)
    frames = load_videos(cache, split.video_paths, 6, window=split.window).float()
    expected = [6 * (i + 0.5) * 30 / 6 - 3 for i in range(6)]
    assert frames.mean(dim=(0, 2, 3, 4)).tolist() == pytest.approx(expected, abs=4)


def test_frozens_caption_numbers_are_checked(folders, tmp_path):
    (tmp_path / "MSRVTT").symlink_to(folders(build_msrvtt_frozen) / "MSRVTT")
    lines(tmp_path / "val_list_jsfusion.txt", "video8")
    for chosen in ({"video8": 2}, {"video8": "x"}, {}):
        (tmp_path / "jsfusion_val_caption_idx.pkl").write_bytes(pickle.dumps(chosen))
        with pytest.raises(UserError, match="jsfusion.txt, line 1: 'video8' has no caption number"):
            load_split("msrvtt", tmp_path, "test")


BAD_CAPTION = dict(
    videos=[dict(video_id="v", split="test")], sentences=[dict(video_id="v", caption=3)]
)
MALFORMED = {  # (builder, data set, role, file): (its text, what is said of it), …
    (build_msrvtt, "msrvtt", "train", "MSRVTT_train.9k.csv"): [
        ("video_id\nvideo1\nvideo77\n", "line 3: 'video77' has no caption"),
    ],
    (build_msrvtt, "msrvtt-full", "val", "MSRVTT_data.json"): [
        ('{"videos": [\n{]', "not valid JSON .line 2.; expected an object with"),
        ('{"videos": []}', "no entries in it; expected .* video_id, split"),
        (json.dumps(BAD_CAPTION), "sentences.0.: caption is 3, not a text; expected video_id"),
    ],
    (build_msvd_json, "msvd", "test", "captions_msvd.json"): [
        ("[]", "expected {video: .sentence"),
        ('{"v8_1_8": "x"}', "entry 'v8_1_8': not a list; expected a list of sentences"),
        ('{"v8_1_8": ["x", 5]}', "entry 'v8_1_8': a word or sentence is 5"),
    ],
    (build_msvd_json, "msvd", "test", "test_list.txt"): [
        ("v8_1_8\n\nv9\n", "line 3: 'v9' has no caption"),
        ("\n", "the file is empty; expected one name a line"),
    ],
    (build_didemo, "didemo", "val", "val_data.json"): [
        ('[{"video": "a"}]', r"entry \[0\]: the entry has no description; expected"),
    ],
    (build_lsmdc, "lsmdc", "test", "LSMDC16_challenge_1000_publictect.csv"): [
        (
            "a_0-1\tb\tc\td\te\tf\na b\tc\n",
            "line 2: 2 columns; expected CLIP_ID, .*, SENTENCE, sep",
        ),
    ],
    (build_nothing, "msrvtt-mc", "test", "msrvtt_mc_test.tsv"): [
        (
            "vid_key\ta1\ta2\ta3\ta4\ta5\tanswer\nmsr1\ta\tb\tc\td\te\tx\n",
            "line 2: answer is 'x', expected a whole number",
        ),
    ],
}


@pytest.mark.parametrize("place", MALFORMED, ids=lambda place: " ".join(place[1:]))
def test_malformed_files_are_refused_with_their_line(folders, tmp_path, place):
    build, dataset, role, name = place
    copy_files(folders(build), tmp_path)
    for text, says in MALFORMED[place]:
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=says) as caught:
            load_split(dataset, tmp_path, role)
        assert name in str(caught.value) and "\n" not in str(caught.value)


OUTSIDE = {  # (data set, role, file): its text with the name of a video in it
    ("msrvtt", "test", "MSRVTT_JSFUSION_test.csv"): "key,vid_key,video_id,sentence\n0,0,NAME,x\n",
    ("didemo", "test", "test_data.json"): '[{"video": "NAME.mp4", "description": "x"}]',
    ("lsmdc", "test", "LSMDC16_challenge_1000_publictect.csv"): "NAME_0-1\t0\t0\t0\t0\tx\n",
    ("webvid", "train", "results_2M_train.csv"): "videoid,page_dir,name\n5,NAME,x\n",
    ("msrvtt-mc", "test", "msrvtt_mc_test.json"): (
        '[{"video": "NAME", "caption": ["a", "b"], "answer": 0}]'
    ),
}


@pytest.mark.parametrize("place", OUTSIDE, ids=" ".join)
def test_no_annotation_leaves_the_data_root(tmp_path, place):
    dataset, role, file = place
    lines(tmp_path / file, OUTSIDE[place].replace("NAME", "../../secret"))
    with pytest.raises(UserError, match=f"{file}.*: the video .* lies outside of the data"):
        load_split(dataset, tmp_path, role)


# ---- multiple choice -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tsv", "jsonl", "json"])
def test_the_three_forms_of_msrvtt_mc_ask_the_same(folders, tmp_path, form):
    build_mc(tmp_path, form)
    (tmp_path / "videos").symlink_to(folders(build_msrvtt) / "videos")
    questions = load_msrvtt_mc(Folder(tmp_path))
    video = f"{tmp_path}/videos/all/video8.mp4"
    assert questions[0] == Question(video, [captions_of(j)[0] for j in range(4, 9)], 4)
    assert [question.answer for question in questions] == [4, 4, 4, 0]
    assert questions[3].video == video


BAD_QUESTIONS = [(dict(answer=2), "answer is 2"), (dict(answer=True), "answer is True")]
BAD_QUESTIONS += [(dict(kind=0), "kind is 0"), (dict(options="ab"), "options is 'ab'")]
BAD_QUESTIONS += [(dict(options=["a"]), "options must be a list of two or more")]
BAD_QUESTIONS += [(dict(options=[1, 2]), "an option is 1")]


def test_questions(tmp_path):
    path = tmp_path / "mc.jsonl"
    good = dict(video="videos/a.mp4", options=["a dog", "a cat"], answer=1, kind="noun")
    lines(path, json.dumps(good))
    expected = Question(str(tmp_path / "videos/a.mp4"), ["a dog", "a cat"], 1, "noun")
    assert load_questions(path) == [expected]

    for wrong, says in BAD_QUESTIONS:
        lines(path, json.dumps(good), json.dumps(good | wrong))
        with pytest.raises(UserError, match=f"mc.jsonl, line 2: {says}"):
            load_questions(path)


# ---- is it whole? --------------------------------------------------------------------------------


def test_check_counts_and_lists_what_is_missing_or_broken(folders, tmp_path):
    whole, videos = folders(build_msvd), tmp_path / "videos"
    copy_files(whole, tmp_path)
    copy_files(whole / "YouTubeClips", videos)
    (videos / "v1_1_1.avi").unlink()
    (videos / "v8_1_8.avi").write_bytes(b"")
    (videos / "v9_1_9.avi").write_bytes((videos / "v9_1_9.avi").read_bytes()[:300])
    (tmp_path / "val_list.txt").unlink()

    rows, problems = check_dataset("msvd", tmp_path)
    assert list(rows[0]) == "split expected listed captions found missing broken decoded".split()
    assert [list(row.values()) for row in rows] == [
        ["train", 1200, 6, 12, 5, 1, 0, 5],
        ["val", 100, 0, 0, 0, 0, 0, 0],
        ["test", 670, 3, 6, 3, 0, 2, 1],
    ]
    found = [" ".join([role, status, Path(video).name]) for role, status, video, _ in problems]
    assert found[:3] == ["train count ", "train missing v1_1_1.avi", "val no split "]
    assert found[3:5] == ["test count ", "test count "]
    assert found[5:] == ["test broken v8_1_8.avi", "test broken v9_1_9.avi"]
    assert problems[4][-1] == "its files list 6 captions, the protocol has 27,763"

    # empty files are always found, others if the sample holds them
    rows, _ = check_dataset("msvd", tmp_path, sample=0)
    assert (rows[0]["decoded"], rows[2]["broken"]) == (0, 1)


def test_check_command(folders, tmp_path):
    def check(*words) -> tuple[int, str, list[str]]:
        """(status, what is printed, reasons in the file)."""
        command = [sys.executable, "-m", "datasets.check", *words, "--out", tmp_path / "list.csv"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        with open(tmp_path / "list.csv") as file:
            return done.returncode, done.stdout, [row["reason"] for row in csv.DictReader(file)]

    status, printed, reasons = check("csv", "--root", folders(build_csv))
    assert status == 0 and "csv: whole" in printed and reasons == []

    status, printed, reasons = check("lsmdc", "--root", folders(build_lsmdc), "--sample", "2")
    assert status == 1 and "lsmdc: not whole; results on it are not comparable" in printed
    expected = "its files list 3 {}, the protocol has 1,000"
    assert reasons == [expected.format(what) for what in ("videos", "captions")]


# ---- train and evaluate --------------------------------------------------------------------------


def train_tiny(out: Path, **config):
    """Two steps of the smallest model."""
    tiny = dict(steps=2, batch_size=4, num_frames="2", warmup=1, log_every=1, eval_every=2)
    tiny |= dict(out=str(out), workers=1, guided_from=0.0)
    train.train(train.TrainConfig(**tiny | config))
    return load_checkpoint(out)


def evaluate_tiny(run: Path, task: str, root: Path, cache: str, **config) -> dict:
    paths = dict(checkpoint=str(run), data_root=str(root), cache=cache)
    return evaluate(EvalConfig(task=task, device="cpu", **paths, **config))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory, cache):
    """The folder of a run on MSR-VTT's 9k list."""
    folder = tmp_path_factory.mktemp("run")
    train_tiny(folder, dataset="msrvtt", data_root=str(folders(build_msrvtt)), cache=cache)
    assert "validation" not in (folder / "log.jsonl").read_text()  # 1k-A has none
    return folder


@pytest.mark.parametrize("task", ["msrvtt", "msrvtt-full", "msvd", "didemo", "lsmdc"])
def test_evaluate(folders, tmp_path, cache, run, task):
    build, _ = BUILDERS[task]
    record = evaluate_tiny(run, task, folders(build), cache, out=str(tmp_path))
    captions = sum(len(EXPECTED[task](i, "test")) for i in NUMBERS["test"])
    counts = [record[name] for name in ("videos", "captions", "missing", "broken")]
    assert counts == [3, captions, 0, 0] and "t2v_R@1" in record
    assert record["protocol"].startswith(DATASETS[task].protocol)

    official = f"3 of {DATASETS[task].videos['test']:,} videos"
    assert record["note"].startswith(official)
    assert "comparable (the files list 3" in record["note"]
    assert official in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_result_on_trained_on_videos_is_named(folders, tmp_path, cache, run):
    """By the names of the videos, from whichever data set and container they come."""
    checkpoint = load_checkpoint(run)
    assert len(checkpoint.trained_on.names) == 8
    assert checkpoint.trained_on.counts == {"msrvtt": [8, 9000]}
    lines(tmp_path / "own.csv", "video,caption", *(f"video{i}.avi,a dog" for i in range(6, 9)))
    for i in range(6, 9):
        film(tmp_path / f"video{i}.avi", i)

    # what a run starts from counts too, and fewer weights do not forget
    own = dict(dataset="csv", data=str(folders(build_csv) / "train.csv"))
    train_tiny(tmp_path / "then", init=str(run), cache=cache, **own)
    export_checkpoint(tmp_path / "then", tmp_path / "small.safetensors")
    # nor do they name folders of the machine that trained
    assert str(tmp_path).encode() in (tmp_path / "then/step-000002.safetensors").read_bytes()
    assert str(tmp_path).encode() not in (tmp_path / "small.safetensors").read_bytes()
    config = EvalConfig(task="csv", data=str(tmp_path / "own.csv"), device="cpu", cache=cache)
    config.checkpoint = str(tmp_path / "small.safetensors")
    note = evaluate(config)["note"]
    assert "2 of these 3 videos bear names that it was trained on: not comparable" in note
    assert "trained on 8 of 9,000 videos of msrvtt" in note
    record = evaluate_tiny(tmp_path / "then", "msrvtt", folders(build_msrvtt), cache)
    assert record["trained_videos"] == {"msrvtt": [8, 9000], "csv": [6, 6]}
    assert "bear names" not in record["note"]


def test_the_official_number_is_comparable(folders, tmp_path, cache, run, monkeypatch):
    """The same tiny set with a protocol of its size: no note. With a video less: N of M."""
    root = folders(build_lsmdc)
    monkeypatch.setitem(DATASETS["lsmdc"].videos, "test", 3)
    monkeypatch.setitem(DATASETS["lsmdc"].captions, "test", 3)
    note = "trained on 8 of 9,000 videos of msrvtt"
    assert evaluate_tiny(run, "lsmdc", root, cache)["note"] == note
    assert (run / "eval-lsmdc-test/metrics.json").is_file()

    copy_files(root, tmp_path)
    for i in (8, 9):
        film_folder = lsmdc_clip(i)[:13]
        (tmp_path / film_folder).symlink_to(root / film_folder)
    record = evaluate_tiny(run, "lsmdc", tmp_path, cache, max_broken=0.5)
    assert record["note"] == f"2 of 3 videos, 2 of 3 captions: not comparable (1 missing); {note}"


def test_msrvtt_mc_is_accuracy_only(folders, tmp_path, cache, run):
    build_mc(tmp_path, "tsv")
    (tmp_path / "videos").symlink_to(folders(build_msrvtt) / "videos")
    out = tmp_path / "eval"
    record = evaluate_tiny(run, "msrvtt-mc", tmp_path, cache, out=str(out))
    assert 0 <= record["mc_accuracy"] <= 100
    assert not [name for name in record if name.startswith(("t2v", "v2t", "mc_accuracy_"))]
    assert [record[name] for name in ("videos", "captions", "questions")] == [3, 0, 4]
    assert "4 of 2,990 questions: not comparable (the files list 4 questions)" in record["note"]

    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Multiple choice" in page and "Text to video" not in page
    with pytest.raises(UserError, match="--dsl: 0 captions"):
        evaluate_tiny(run, "msrvtt-mc", tmp_path, cache, out=str(out), dsl=True)


@pytest.mark.parametrize("dataset, needs", [("msvd", "--data-root"), ("csv", "--data FILE")])
def test_a_data_set_says_what_it_needs(tmp_path, dataset, needs):
    with pytest.raises(UserError, match=f"--dataset {dataset}: needs {needs}"):
        train_tiny(tmp_path / "run", dataset=dataset)


def test_videos_and_images_train_together_from_one_frame_on(tmp_path, cache):
    build_webvid(tmp_path / "webvid")
    build_cc3m(tmp_path / "cc3m")
    split = load_split("webvid+cc3m", tmp_path)
    parts = [load_split(name, tmp_path / name) for name in ("webvid", "cc3m")]
    assert split.captions == [*parts[0].captions, *parts[1].captions]
    assert split.video_paths == [*parts[0].video_paths, *parts[1].video_paths]

    config = dict(dataset="webvid+cc3m", data_root=str(tmp_path), cache=cache)
    config |= dict(steps=3, batch_size=12, num_frames="1,2,4")
    checkpoint = train_tiny(tmp_path / "run", **config)
    assert checkpoint.step == 3 and checkpoint.model.config.num_frames == 4


# ---- the real files, where they lie beside the repository ----------------------------------------

LISTS = SHARED / "annotations/msrvtt"
CLIPS = SHARED / "msrvtt_mini"
needs_lists = pytest.mark.skipif(
    not LISTS.is_dir(), reason="no real MSR-VTT lists in ../shared/annotations/msrvtt"
)
needs_clips = pytest.mark.skipif(not CLIPS.is_dir(), reason="no clips in ../shared/msrvtt_mini")


def listed(name: str) -> set[str]:
    return {row["video_id"] for _, row in read_csv(LISTS / f"MSRVTT_{name}.csv", ["video_id"])}


@needs_lists
def test_the_real_1ka():
    split = load_split("msrvtt", LISTS, "test")
    assert len(split.video_paths) == len(split.captions) == 1000 and len({*split.captions}) == 995
    assert split.video_of_caption.tolist() == list(range(1000))

    tested, train7k, train9k = listed("JSFUSION_test"), listed("train.7k"), listed("train.9k")
    official = dict(train=listed("train.full"), val=listed("val.full"), test=listed("test.full"))
    assert not tested & train7k and not tested & train9k and tested <= official["test"]
    assert len(train9k & official["test"]) == 1990 and not train7k & official["test"]
    # the official validation split is part of the 7k list: it validates nothing there
    assert official["val"] <= train7k

    assert DATASETS["msrvtt"].videos == dict(train=len(train9k), test=1000)
    assert DATASETS["msrvtt-7k"].videos == dict(train=len(train7k), test=1000)
    sizes = {role: len(videos) for role, videos in official.items()}
    assert DATASETS["msrvtt-full"].videos == sizes


@needs_clips
@pytest.mark.parametrize("role, count", [("train", 3151), ("val", 244)])
def test_the_real_captions_by_both_readers(role, count):
    found = []
    for dataset, data in (("msrvtt-full", CLIPS), ("csv", CLIPS / f"{role}.csv")):
        split = load_split(dataset, data, role)
        assert len(split.video_paths) == count and len(split.captions) == 20 * count
        names = [Path(path).name for path in split.video_paths]
        found.append(dict(zip(names, map(set, captions_by_video(split)))))
    assert found[0] == found[1]


@needs_clips
def test_the_real_clips_are_checked():
    rows, problems = check_dataset("msrvtt-full", CLIPS, sample=20)
    names = ("listed", "missing", "broken", "decoded")
    found = [[row[name] for name in names] for row in rows]
    assert found == [[3151, 0, 0, 20], [244, 0, 0, 20], [0, 0, 0, 0]]
    assert {status for _, status, _, _ in problems} == {"count"}
