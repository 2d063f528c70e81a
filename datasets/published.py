"""The data sets of the field, read as their authors publish them.

`load_split(name, root, role)` is the "train", "val" or "test" split. `root` is one folder with the
annotation files under their published names and the videos:

    name         captions     annotation files ("or": the first that is there)
    msrvtt       20, test 1   MSRVTT_train.9k.csv, MSRVTT_JSFUSION_test.csv (1k-A), and captions:
                              MSRVTT_data.json or
                              train_val_videodatainfo.json + test_videodatainfo.json
    msrvtt-7k    20, test 1   the same with MSRVTT_train.7k.csv
    msrvtt-full  20           the captions: the official splits
    msvd         about 40     {train,val,test}_list.txt, raw-captions.pkl or captions_msvd.json
    didemo       1 (joined)   {train,val,test}_data.json, perhaps {train,val,test}_list.txt
    lsmdc        mostly 1     LSMDC16_annos_training.csv, LSMDC16_annos_val.csv,
                              LSMDC16_challenge_1000_publictect.csv
    msrvtt-mc    questions    msrvtt_mc_test.jsonl, .json, .tsv or .csv, in any of three forms;
                              or msrvtt_retrieval_mc_test.jsonl
    webvid       1            results_2M_train.csv, results_2M_val.csv
    cc3m         1            Train_GCC-training.tsv, Validation_GCC-1.1.0-Validation.tsv; or
                              cc3m_train.csv, cc3m_val.csv
    webvid+cc3m  1            both, to pre-train on: the folders webvid/ and cc3m/ of `root`
    csv          any          one's own train.csv, val.csv, test.csv; or one csv or jsonl file

MSR-VTT is also read as Frozen in Time packs it: MSR_VTT.json and {train,val}_list_jsfusion.txt or
{train,val,test}_list_full.txt. And where the json of VindLU and UMT is there (VINDLU), it is read.

**Where a video is.** Annotations name a video, and people keep it where they like, often in another
container. The folders of VIDEO_FOLDERS are searched for the very name, then for the same name with
another ending: below the root, then below --videos-root. A video that is nowhere stays in the
split, under the path where it was expected: it is counted and listed as missing, never dropped in
silence.

**What a complete result is.** DATASETS says how many videos and captions each split has by
protocol (None: not fixed). eval.py writes "N of M: not comparable" beside a result on any other
number.

    python -m datasets.check msrvtt --root FOLDER          # what is missing, what does not decode
"""

import functools
import itertools
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from cli import UserError
from datasets.readers import (
    check_name,
    check_text,
    read_columns,
    read_csv,
    read_entries,
    read_json,
    read_jsonl,
    read_list,
    read_pickle,
    read_rows,
    shorten,
)
from datasets.split import Question, Split
from videos.decode import IMAGE_SUFFIXES, VIDEO_SUFFIXES

Pairs = Iterator[tuple[str, str]]  # (path of a video, caption)

# below the root ("."): those of MSR-VTT and MSVD as they and CLIP4Clip are packed, of Frozen in
# Time, of DiDeMo and CC3M
VIDEO_FOLDERS = """videos videos/all . video clips images
    TrainValVideo TrainValVideo/TrainValVideo TestVideo TestVideo/TestVideo YouTubeClips
    MSRVTT_Videos MSVD_Videos LSMDC_Videos DiDeMo_Videos MSRVTT/videos/all
    train val test training validation""".split()
ANNOTATION_FOLDERS = """. annotations annotation msrvtt_data msvd_data lsmdc_data
    anno_downstream high-quality/structured-symlinks
    MSRVTT/annotation MSRVTT/high-quality/structured-symlinks""".split()

# of a video in several containers the first one is taken
RANKS = {suffix: rank for rank, suffix in enumerate(VIDEO_SUFFIXES + IMAGE_SUFFIXES)}

# ---- finding files -------------------------------------------------------------------------------


class Folder:
    """The folder of a data set: finds its annotation files, and videos by the names in them.

    Videos that are not there are looked for in the folder `videos` too.
    """

    def __init__(self, root: str | Path, videos: str | Path | None = None):
        self.root, self.videos = Path(root), videos
        places = itertools.product(filter(None, (root, videos)), VIDEO_FOLDERS)
        folders = [str(Path(*place)) for place in places]
        self.places = [folder for folder in folders if os.path.isdir(folder)] or [str(root)]
        self.list_videos = functools.cache(list_videos)

    def file(self, *names: str, optional: bool = False) -> Path | None:
        """The first of these annotation files that is there.

        Raises UserError where none is; with `optional`, None is returned.
        """
        for name in names:
            for folder in ANNOTATION_FOLDERS:
                path = self.root / folder / name
                if path.is_file():
                    return path
        if optional:
            return None
        folders = ", ".join(f"{folder}/" for folder in ANNOTATION_FOLDERS[1:])
        raise UserError(
            f"{self.root}: no {' or '.join(names)} in it or in its {folders}; "
            "docs/benchmarks.md says where each is published"
        )

    def video(self, name: str, where: str) -> str:
        """The path of the video `name`, or where it should be.

        Raises UserError for a name that leaves the root.
        """
        check_name(name, where)
        paths = [os.path.join(folder, name) for folder in self.places]
        for path in paths:
            if os.path.isfile(path):
                return path

        for path in paths:
            folder, name = os.path.split(path)
            videos = self.list_videos(folder)
            for same in (name, without_ending(name)):
                if same in videos:
                    return os.path.join(folder, videos[same])
        return paths[0]


def list_videos(folder: str) -> dict[str, str]:
    """{name without its ending: name} of the videos and images in a folder."""
    if not os.path.isdir(folder):
        return {}
    ranked = []
    for name in os.listdir(folder):
        rank = RANKS.get(os.path.splitext(name)[1].lower())
        if rank is not None:
            ranked.append((rank, name))
    ranked.sort(reverse=True)
    return {without_ending(name): name for _, name in ranked}


def without_ending(name: str) -> str:
    """What stands before the last dot. DiDeMo has "X.", "X.3g2", "X.m2ts": all are the video X."""
    return os.path.splitext(name)[0]


# ---- one reader per data set: (folder, role) -> its pairs ----------------------------------------


def read_own(folder: Folder, role: str) -> Pairs:
    """A file for `read_pairs`; or a folder with a csv file per role.

    It is one's own file, so its paths may be absolute, or relative to it. With a --videos-root they
    are relative to that, and none may leave it.
    """
    path, root = folder.root, folder.videos
    if path.is_dir():
        path = path / f"{role}.csv"

    def find(name: str, where: str) -> str:
        check_name(name, where, inside=root is not None)
        return os.path.join(root or path.parent, name)

    return read_pairs(path, find)


def read_pairs(path: Path, find: Callable[[str, str], str], joins: bool = False) -> Pairs:
    """A file with `video` and `caption`.

    In JSON a caption may be a list: of captions, or (`joins`) of the sentences of one.
    find(name, where) is the path of a video.
    """
    for where, row in read_rows(path, {"video": str, "caption": str | list}):
        video, caption = find(row["video"], where), row["caption"]
        texts = join_words(caption, where) if isinstance(caption, list) else [caption]
        for text in [" ".join(texts)] if joins else texts:
            yield video, text


def read_captioned(
    folder: Folder,
    names: Iterable[tuple[str, str]],
    captions: dict[str, list[str]],
    file_of: Callable[[str], str] = "{}.mp4".format,
) -> Pairs:
    """The listed (where, video) with their captions. file_of(video) is the name of its file.

    Raises UserError where a video has none.
    """
    for where, name in names:
        if not captions.get(name):
            problem = "has no caption in the annotation file; fetch both again"
            raise UserError(f"{where}: {shorten(name)} {problem}")
        path = folder.video(file_of(name), where)
        for caption in captions[name]:
            yield path, caption


def read_msrvtt_captions(folder: Folder) -> tuple[dict[str, list[str]], dict[str, str]]:
    """({video: its captions}, {video: its official split}). Frozen's file names no splits."""
    official = ("train_val_videodatainfo.json", "test_videodatainfo.json")
    paths = [folder.file("MSRVTT_data.json", "MSR_VTT.json", official[0])]
    if paths[0].name == official[0]:
        paths.append(folder.file(official[1]))

    captions, split_of = {}, {}
    for path in paths:
        document = read_json(path, "an object with the lists videos and sentences")
        key, columns = "annotations", dict(image_id=str, caption=str)
        if path.name != "MSR_VTT.json":
            key, columns = "sentences", dict(video_id=str, caption=str)
            for _, row in read_entries(path, document, "videos", dict(video_id=str, split=str)):
                split_of[row["video_id"]] = row["split"]

        for _, row in read_entries(path, document, key, columns):
            video, caption = (row[column] for column in columns)
            captions.setdefault(video, []).append(caption)
    return captions, split_of


def read_1ka(folder: Folder, role: str, lists: Iterable[str]) -> Pairs:
    """MSR-VTT 1k-A, trained on the videos of the first of these lists that is there."""
    if role == "test":
        return read_1ka_test(folder)
    path = folder.file(*lists)
    if path.suffix == ".txt":
        names = read_list(path)
    else:
        names = [(where, row["video_id"]) for where, row in read_csv(path, ["video_id"])]
    captions, _ = read_msrvtt_captions(folder)
    return read_captioned(folder, names, captions)


def read_1ka_test(folder: Folder) -> Pairs:
    """The 1,000 pairs."""
    path = folder.file("MSRVTT_JSFUSION_test.csv", "val_list_jsfusion.txt")
    if path.suffix == ".csv":
        for where, row in read_csv(path, ["key", "vid_key", "video_id", "sentence"]):
            yield folder.video(row["video_id"] + ".mp4", where), row["sentence"]
        return

    # Frozen's files say which of a video's captions is asked
    captions, _ = read_msrvtt_captions(folder)
    chosen = read_pickle(
        folder.file("jsfusion_val_caption_idx.pkl"), "expected {video: number of its caption}"
    )
    names = read_list(path)
    for where, name in names:
        try:
            captions[name] = [captions[name][chosen[name]]]
        except (KeyError, IndexError, TypeError) as error:
            number = shorten(chosen.get(name))
            raise UserError(f"{where}: {shorten(name)} has no caption number {number}") from error
    yield from read_captioned(folder, names, captions)


def read_msrvtt_full(folder: Folder, role: str) -> Pairs:
    """MSR-VTT's official splits, as the annotation of each video says."""
    captions, split_of = read_msrvtt_captions(folder)
    if split_of:
        official = "validate" if role == "val" else role
        names = [(str(folder.root), name) for name in split_of if split_of[name] == official]
    else:
        names = read_list(folder.file(f"{role}_list_full.txt"))
    return read_captioned(folder, names, captions)


def read_msvd(folder: Folder, role: str) -> Pairs:
    """MSVD: each of a video's many sentences is a caption of its own."""
    path = folder.file("raw-captions.pkl", "captions_msvd.json")
    expected = "{video: [sentence, …]}"
    if path.suffix == ".pkl":
        found = read_pickle(path, f"expected {expected}")
    else:
        found = read_json(path, f"an object {expected}")
    if not isinstance(found, dict):
        raise UserError(f"{path}: not an object; expected {expected}")

    captions = {}
    names = read_list(folder.file(f"{role}_list.txt"))
    for _, name in names:
        captions[name] = join_words(found.get(name, []), f"{path}, entry {shorten(name)}")
    return read_captioned(folder, names, captions, "{}.avi".format)


def join_words(sentences, where: str) -> list[str]:
    """The captions of a video: each is a text, or the list of its words."""
    if not isinstance(sentences, list):
        raise UserError(f"{where}: not a list; expected a list of sentences, or of lists of words")
    texts = []
    for sentence in sentences:
        words = sentence if isinstance(sentence, list) else [sentence]
        for word in words:
            check_text(word, where, "a word or sentence")
        texts.append(" ".join(words))
    return texts


def read_didemo(folder: Folder, role: str) -> Pairs:
    """DiDeMo: a video's sentences, joined in the order of the file, are its one caption.

    A list may say which videos are in the split. Names are compared without their endings.
    """
    path = folder.file(f"{role}_data.json")
    document = read_json(path, "a list of objects")
    sentences, files = {}, {}
    for _, row in read_entries(path, document, None, dict(video=str, description=str)):
        name = without_ending(row["video"])
        sentences.setdefault(name, []).append(row["description"].strip())
        files.setdefault(name, row["video"])

    names = [(str(path), file) for file in files.values()]
    if listed := folder.file(f"{role}_list.txt", optional=True):
        names = read_list(listed)
    names = [(where, without_ending(name)) for where, name in names]
    captions = {name: [" ".join(texts)] for name, texts in sentences.items()}
    return read_captioned(folder, names, captions, files.get)


LSMDC_FILES = dict(
    train="LSMDC16_annos_training.csv",
    val="LSMDC16_annos_val.csv",
    test="LSMDC16_challenge_1000_publictect.csv",
)
LSMDC_COLUMNS = "CLIP_ID START_ALIGNED END_ALIGNED START_EXTRACTED END_EXTRACTED SENTENCE".split()


def read_lsmdc(folder: Folder, role: str) -> Pairs:
    """LSMDC 2016. A clip on two lines has two captions.

    The clip A_00.01-00.02 of the film A lies at A/A_00.01-00.02.avi.
    """
    for where, row in read_columns(folder.file(LSMDC_FILES[role]), LSMDC_COLUMNS):
        clip = row["CLIP_ID"].strip()
        film, _, _ = clip.rpartition("_")
        yield folder.video(f"{film}/{clip}.avi", where), row["SENTENCE"].strip()


def read_webvid(folder: Folder, role: str) -> Pairs:
    """WebVid-2M."""
    path = folder.file(f"results_2M_{role}.csv")
    for where, row in read_csv(path, ["videoid", "page_dir", "name"]):
        yield folder.video(f"{row['page_dir']}/{row['videoid']}.mp4", where), row["name"]


CC3M_FILES = dict(
    train=("Train_GCC-training.tsv", "cc3m_train.csv"),
    val=("Validation_GCC-1.1.0-Validation.tsv", "cc3m_val.csv"),
)


def read_cc3m(folder: Folder, role: str) -> Pairs:
    """Conceptual Captions 3M. An image is a video of one frame.

    Its file is named after the checksum of its address.
    """
    path = folder.file(*CC3M_FILES[role])
    read = read_csv if path.suffix == ".csv" else read_columns
    for where, row in read(path, ["caption", "thumbnailUrl"]):
        name = str(zlib.crc32(row["thumbnailUrl"].encode()))
        yield folder.video(name, where), row["caption"]


def read_webvid_cc3m(folder: Folder, role: str) -> Pairs:
    """Both as one set: a batch mixes videos and images."""
    yield from read_webvid(Folder(folder.root / "webvid", folder.videos), role)
    yield from read_cc3m(Folder(folder.root / "cc3m", folder.videos), role)


# ---- questions -----------------------------------------------------------------------------------


def load_questions(path: str | Path) -> list[Question]:
    """Multiple choice from a jsonl file.

    A line: {"video", "options": [caption, …], "answer": index, "kind"}.
    """
    path = Path(path)
    questions = []
    for where, row in read_jsonl(path, dict(video=str, kind=str, options=list, answer=int)):
        video = os.path.join(path.parent, check_name(row["video"], where))
        question = Question(video, row["options"], row["answer"], row["kind"])
        questions.append(check_question(question, where))
    return questions


# a question in any of the three published forms
MC_FILES = [f"msrvtt_mc_test.{ending}" for ending in ("jsonl", "json", "tsv", "csv")]
MC_FILES.append("msrvtt_retrieval_mc_test.jsonl")
MC_COLUMNS = {
    ".jsonl": dict(clip_name=str, options=list, answer=int),
    ".json": dict(video=str, caption=list, answer=int),
}
MC_TABLE = dict.fromkeys(["vid_key", "a1", "a2", "a3", "a4", "a5", "answer"], str)


def load_msrvtt_mc(folder: Folder) -> list[Question]:
    """MSRVTT-MC's questions. The ending tells the form of the file."""
    path = folder.file(*MC_FILES)
    columns = MC_COLUMNS.get(path.suffix, MC_TABLE)
    questions = []
    for where, row in read_rows(path, columns):
        name, *options, answer = (row[column] for column in columns)
        if columns is MC_TABLE:
            if not answer.strip().isdecimal() or len(answer) > 9:  # int() refuses 4,301 digits
                raise UserError(f"{where}: answer is {shorten(answer)}, expected a whole number")
            answer = int(answer)
        else:
            (options,) = options

        if name.startswith("msr"):  # msr9770 is video9770
            name = "video" + name.removeprefix("msr")
        video = folder.video(without_ending(name) + ".mp4", where)
        questions.append(check_question(Question(video, options, answer), where))
    return questions


def check_question(question: Question, where: str) -> Question:
    options = question.options
    if len(options) < 2:
        raise UserError(f"{where}: options must be a list of two or more captions")
    if question.answer not in range(len(options)):
        expected = f"expected 0 … {len(options) - 1}"
        raise UserError(f"{where}: answer is {question.answer}, {expected}")
    for option in options:
        check_text(option, where, "an option")
    return question


def read_mc_videos(folder: Folder, role: str) -> Pairs:
    """The videos of MSRVTT-MC, each with the right answers to its questions."""
    for question in load_msrvtt_mc(folder):
        yield question.video, question.options[question.answer]


# ---- all of them ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSet:
    """How to read it, and what makes a result on it comparable."""

    read: Callable[[Folder, str], Pairs]
    videos: dict[str, int | None]  # of each split, by protocol; None: not fixed
    protocol: str = ""  # in words, of its test
    captions: dict[str, int] = field(default_factory=dict)  # of each split, where that is fixed
    no_val: str = ""  # why it has no validation split
    window: tuple[float, float | None] = (0.0, None)  # the seconds of each video that belong to it


ONE_KA = dict(
    protocol=(
        "MSR-VTT 1k-A: 1,000 test pairs, one caption each, every caption against all videos. It "
        "has no validation split: the checkpoint is the last, not the best on the test."
    ),
    no_val=(
        "1k-A has none, and its training lists hold the official one; the last checkpoint is the "
        "result"
    ),
)
OWN = DataSet(read_own, dict(train=None, val=None, test=None))

DATASETS = {
    "toy": OWN,
    "csv": OWN,
    "msrvtt": DataSet(
        partial(read_1ka, lists=["MSRVTT_train.9k.csv", "train_list_jsfusion.txt"]),
        videos=dict(train=9000, test=1000),
        captions=dict(train=180_000, test=1000),
        **ONE_KA,
    ),
    "msrvtt-7k": DataSet(
        partial(read_1ka, lists=["MSRVTT_train.7k.csv"]),
        videos=dict(train=7010, test=1000),
        captions=dict(train=140_200, test=1000),
        **ONE_KA,
    ),
    "msrvtt-full": DataSet(
        read_msrvtt_full,
        videos=dict(train=6513, val=497, test=2990),
        captions=dict(train=130_260, val=9940, test=59_800),
        protocol=(
            "MSR-VTT, official splits: each of a video's 20 captions is a query of its own against "
            "all videos; a video takes the best rank of its captions. Not 1k-A: their numbers must "
            "not be mixed."
        ),
    ),
    "msvd": DataSet(
        read_msvd,
        videos=dict(train=1200, val=100, test=670),
        captions=dict(test=27_763),
        protocol=(
            "MSVD: every caption is a query of its own against all videos (test: 27,763 against "
            "670); a video takes the best rank of its captions."
        ),
    ),
    "didemo": DataSet(
        read_didemo,
        videos=dict(train=8392, val=1065, test=1004),
        captions=dict(train=8392, val=1065, test=1004),
        protocol=(
            "DiDeMo, paragraph to video: a video's sentences, joined in the order of the file, are "
            "one query; the first 30 seconds of each video."
        ),
        window=(0.0, 30.0),
    ),
    "lsmdc": DataSet(
        read_lsmdc,
        videos=dict(train=None, val=None, test=1000),
        captions=dict(test=1000),
        protocol="LSMDC 2016: 1,000 test clips, one caption each, every caption against all clips.",
    ),
    "msrvtt-mc": DataSet(
        read_mc_videos,
        videos=dict(test=2990),
        protocol=(
            "MSRVTT-MC: which of 5 captions is the video's? Percent of questions whose right "
            "caption scores highest, over the full test split; to be fine-tuned on the 7k list "
            "(the 9k list holds 1,990 of its videos)."
        ),
    ),
    "webvid": DataSet(read_webvid, dict(train=None, val=None)),
    "cc3m": DataSet(read_cc3m, dict(train=None, val=None)),
    "webvid+cc3m": DataSet(read_webvid_cc3m, dict(train=None, val=None)),
}


# the json of VindLU and UMT, [{"video": …, "caption": …}]: SET_ret_PART.json, a part per split
VINDLU = {
    "msrvtt": "train9k test1k",
    "msrvtt-7k": "train7k test1k",
    "msvd": "train val test",
    "didemo": "train val test",
    "lsmdc": "train val test_1000",
}


def find_dataset(name: str) -> DataSet:
    if name not in DATASETS:
        raise UserError(f"{name}: no such data set; one of {', '.join(DATASETS)}")
    return DATASETS[name]


def load_split(
    dataset: str, data: str | Path, role: str = "train", *, videos_root: str | Path | None = None
) -> Split:
    """The "train", "val" or "test" split of a data set (a key of DATASETS) in the folder `data`.

    videos_root: where videos are looked for that are not in `data`. For "csv" `data` may be the
    file itself, and all its paths are relative to `videos_root`, and must not leave it. Raises
    UserError, with file, line and what was expected, where a file is missing, empty or malformed,
    or the data set has no such split. Videos are not looked at: `keep_decodable` finds the missing
    and the broken ones.
    """
    assert role in ("train", "val", "test"), f"{role=}: train, val or test"
    entry = find_dataset(dataset)
    if role not in entry.videos:
        why = entry.no_val or "it has " + ", ".join(entry.videos)
        raise UserError(f"{dataset}: has no {role} split; {why}")

    folder = Folder(data, videos_root)
    parts = [part for part in VINDLU.get(dataset, "").split() if part.startswith(role)]
    names = [f"{dataset.removesuffix('-7k')}_ret_{part}.json" for part in parts]
    path = folder.file(*names, optional=True)
    if path:
        pairs = read_pairs(path, folder.video, joins=dataset == "didemo")
    else:
        pairs = entry.read(folder, role)
    places = [] if entry is OWN else folder.places
    sizes = dict(videos=entry.videos[role], captions=entry.captions.get(role))
    official = {what: size for what, size in sizes.items() if size}
    split = Split.from_pairs(pairs)
    return replace(split, window=entry.window, places=places, official=official)
