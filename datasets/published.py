"""The data sets of the field, read as their authors publish them, with the protocols that make
results comparable.

`load_split(name, root, role)` is the "train", "val" or "test" split. `root` is one folder that
holds the annotation files under their published names, and the videos. docs/benchmarks.md lists the
files of each set.

**Where things are.** Annotation files are looked for in ANNOTATION_FOLDERS. Annotations name a
video, and people keep it where they like, perhaps in another container. The folders of
VIDEO_FOLDERS are tried in their order for the very name; then again for the same name with another
ending (of several, the first of ENDINGS). A video that is nowhere stays in the split under the path
where it was expected, so that it is counted and listed as missing, never dropped in silence.

**What a complete result is.** Each entry of DATASETS states how many videos and captions its splits
hold by protocol (None: not fixed; links die). eval.py writes "N of M: not comparable" beside a
result on any other number.

    python -m datasets.published                    # the sizes and protocols
    python -m datasets.check msrvtt --root FOLDER   # what is there, missing, or does not decode
"""

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from cli import UserError, run
from datasets.readers import (
    check_name,
    check_text,
    read_captions_pickle,
    read_columns,
    read_csv,
    read_entries,
    read_json,
    read_jsonl,
    read_list,
    read_pairs,
)
from datasets.split import Question, Split
from videos.decode import IMAGE_SUFFIXES, VIDEO_SUFFIXES

# the last two as CLIP4Clip and MSR-VTT's own archives unpack
ANNOTATION_FOLDERS = ("", "annotations", "annotation", "msrvtt_data", "MSRVTT")
VIDEO_FOLDERS = (
    *("videos", "videos/all", "", "video", "clips", "images"),  # anybody's
    *("TrainValVideo", "TestVideo", "TrainValVideo/TrainValVideo", "TestVideo/TestVideo"),
    *("MSRVTT_Videos", "MSRVTT/videos/all", "YouTubeClips"),  # MSR-VTT, MSVD
    *("train", "val", "test", "training", "validation"),  # DiDeMo, CC3M
)
# DiDeMo has files named "X.": no ending behind the dot
ENDINGS = (".mp4", *sorted(VIDEO_SUFFIXES - {".mp4"}), *sorted(IMAGE_SUFFIXES), ".")


# ---- finding files -------------------------------------------------------------------------------


def find_file(root: Path, *names: str, optional: bool = False) -> Path | None:
    """The first of these annotation files that is in one of ANNOTATION_FOLDERS.

    Raises UserError where none is; with `optional`, None is returned.
    """
    for name in names:
        for folder in ANNOTATION_FOLDERS:
            if (path := root / folder / name).is_file():
                return path
    if optional:
        return None
    below = ", ".join(f"{folder}/" for folder in ANNOTATION_FOLDERS if folder)
    raise UserError(
        f"{root}: no {' or '.join(names)} in it, nor in {below}; fetch it from the set's authors"
    )


class VideoFinder:
    """Finds the videos below a folder by the names that annotations give them."""

    def __init__(self, root: Path):
        there = [str(root / name) for name in VIDEO_FOLDERS if (root / name).is_dir()]
        self.folders = there or [str(root)]
        self.listings: dict[str, dict[str, str]] = {}

    def find(self, name: str, where: str) -> str:
        """The path of the video `name`, or where it should be.

        Raises UserError for a name that leaves the root.
        """
        check_name(name, where)
        candidates = [os.path.join(folder, name) for folder in self.folders]
        for path in candidates:
            if os.path.isfile(path):
                return path
        for path in candidates:
            folder, last = os.path.split(path)
            listing = self.list_folder(folder)
            if other := listing.get(stem(last)) or listing.get(last):
                return os.path.join(folder, other)
        return candidates[0]

    def list_folder(self, folder: str) -> dict[str, str]:
        """{name without ending: name} of a folder's videos and images."""
        if folder not in self.listings:
            names = os.listdir(folder) if os.path.isdir(folder) else []
            names = [name for name in names if ending(name) in ENDINGS]
            # of several endings the first counts: it comes last
            names.sort(key=lambda name: (ENDINGS.index(ending(name)), name), reverse=True)
            self.listings[folder] = {stem(name): name for name in names}
        return self.listings[folder]


def ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def stem(name: str) -> str:
    """Without the ending of a video; LSMDC's names end in ".129", which is none."""
    return os.path.splitext(name)[0] if ending(name) in ENDINGS else name


# ---- one loader a data set: (root, role) -> Split ------------------------------------------------


def load_pairs(path: Path, role: str, root: Path | None = None) -> Split:
    """A csv (with header) or jsonl file with `video` and `caption`; or a folder with train.csv, ….

    It is one's own file, so its paths may be absolute, or relative to it. Where there is a `root`,
    they are relative to that, and none may leave it.
    """
    path = path / f"{role}.csv" if path.is_dir() else path
    folder = str(path.parent if root is None else root)
    pairs = []
    for where, row in read_pairs(path):
        name = check_name(row["video"], where, inside=root is not None)
        pairs.append((os.path.join(folder, name), row["caption"]))
    if not pairs:
        raise UserError(
            f"{path}: no samples in it; expected a line with video and caption for each"
        )
    return Split.from_pairs(pairs)


def load_1ka(size: str, root: Path, role: str) -> Split:
    """MSR-VTT 1k-A: a training list (size "7k" or "9k") with all captions, or the 1,000 pairs."""
    if role == "test":
        path = find_file(root, "MSRVTT_JSFUSION_test.csv")
        rows = read_csv(path, ["key", "vid_key", "video_id", "sentence"])
        return find_pairs(root, ((w, row["video_id"] + ".mp4", row["sentence"]) for w, row in rows))

    listed = read_csv(find_file(root, f"MSRVTT_train.{size}.csv"), ["video_id"])
    captions, _ = read_msrvtt(root, ("train", "test") if size == "9k" else ("train",))
    names = ((where, row["video_id"]) for where, row in listed)
    return with_captions(root, names, captions, "{}.mp4".format)


def find_pairs(root: Path, rows: Iterable[tuple[str, str, str]]) -> Split:
    """Of (where, name of a video, caption)."""
    finder = VideoFinder(root)
    return Split.from_pairs((finder.find(name, where), caption) for where, name, caption in rows)


def with_captions(
    root: Path,
    names: Iterable[tuple[str, str]],
    captions: dict[str, list[str]],
    file_of: Callable[[str], str],
) -> Split:
    """The listed (where, video) with their captions.

    Raises UserError where one has none, or is listed twice.
    """
    finder, seen, pairs = VideoFinder(root), set(), []
    for where, name in names:
        if not captions.get(name):
            raise UserError(
                f"{where}: {name[:40]!r} has no caption in the annotation file; fetch both again"
            )
        if name in seen:
            raise UserError(f"{where}: {name[:40]!r} stands there twice; fetch the file again")
        seen.add(name)
        path = finder.find(file_of(name), where)
        pairs += [(path, caption) for caption in captions[name]]
    return Split.from_pairs(pairs)


def load_msrvtt_full(root: Path, role: str) -> Split:
    """The official splits, as the annotation of each video says."""
    captions, split_of = read_msrvtt(root, ("test",) if role == "test" else ("train",))
    official = {"train": "train", "val": "validate", "test": "test"}[role]
    names = [(where, video) for video, (where, split) in split_of.items() if split == official]
    return with_captions(root, names, captions, "{}.mp4".format)


def read_msrvtt(root: Path, parts: Iterable[str]) -> tuple[dict, dict]:
    """({video: its captions}, {video: (where, split)}).

    Of MSRVTT_data.json, or of the official files of these parts.
    """
    official = {"train": "train_val_videodatainfo.json", "test": "test_videodatainfo.json"}
    captions, split_of = {}, {}
    paths = dict.fromkeys(find_file(root, "MSRVTT_data.json", official[part]) for part in parts)
    for path in paths:
        document = read_json(path, "an object with the lists videos and sentences")
        for where, row in read_entries(path, document, "videos", {"video_id": str, "split": str}):
            video, split = row["video_id"], row["split"]
            if split_of.setdefault(video, (where, split))[1] != split:
                raise UserError(f"{where}: {video} is in two splits; fetch the file again")

        columns = {"video_id": str, "caption": str}
        for where, row in read_entries(path, document, "sentences", columns):
            video = row["video_id"]
            if video not in split_of:
                raise UserError(
                    f"{where}: {video[:40]!r} is not among the file's videos; fetch it again"
                )
            captions.setdefault(video, []).append(row["caption"])
    return captions, split_of


def load_msvd(root: Path, role: str) -> Split:
    """MSVD: each of a video's many sentences is a caption of its own."""
    path = find_file(root, "raw-captions.pkl", "captions_msvd.json")
    if path.suffix == ".pkl":
        found = read_captions_pickle(path)
    else:
        found = read_json(path, "an object {video: [sentence, …]}")
    if not isinstance(found, dict):
        raise UserError(f"{path}: not an object; expected {{video: [sentence, …]}}")

    names = read_list(find_file(root, f"{role}_list.txt"))
    captions = {}
    for _, name in names:
        captions[name] = join_words(found.get(name, []), f"{path}, entry {name[:40]!r}")
    return with_captions(root, names, captions, "{}.avi".format)


def join_words(sentences, where: str) -> list[str]:
    """The captions of a video: each a text, or the list of its words."""
    if not isinstance(sentences, list):
        raise UserError(f"{where}: not a list; expected a list of sentences, or of lists of words")
    texts = []
    for number, sentence in enumerate(sentences):
        words = sentence if isinstance(sentence, list) else [sentence]
        for word in words:
            check_text(word, f"{where}[{number}]", "a word or sentence")
        texts.append(" ".join(words))
    return texts


DIDEMO_SECONDS = 30.0


def load_didemo(root: Path, role: str) -> Split:
    """DiDeMo: the sentences of a video, in the order of the file, are its one caption; first 30 s.

    An optional list says which videos are in the split. Whatever stands after the last dot of a
    name is an ending: "X.", "X.3g2" and "X.mp4" are one video.
    """
    path = find_file(root, f"{role}_data.json")
    entries = read_json(path, "a list of objects")
    sentences, file_of, names = {}, {}, []
    for where, row in read_entries(path, entries, None, {"video": str, "description": str}):
        name = os.path.splitext(row["video"])[0]
        if name not in sentences:
            names.append((where, name))
            is_known = ending(row["video"]) in ENDINGS
            file_of[name] = row["video"] if is_known else f"{name}.mp4"
        sentences.setdefault(name, []).append(row["description"].strip())

    if listed := find_file(root, f"{role}_list.txt", optional=True):
        names = [(where, os.path.splitext(name)[0]) for where, name in read_list(listed)]
    paragraphs = {name: [" ".join(parts)] for name, parts in sentences.items()}
    split = with_captions(root, names, paragraphs, file_of.__getitem__)
    return replace(split, window=(0.0, DIDEMO_SECONDS))


LSMDC_FILES = {
    "train": "LSMDC16_annos_training.csv",
    "val": "LSMDC16_annos_val.csv",
    "test": "LSMDC16_challenge_1000_publictect.csv",
}
LSMDC_COLUMNS = "CLIP_ID START_ALIGNED END_ALIGNED START_EXTRACTED END_EXTRACTED SENTENCE".split()


def load_lsmdc(root: Path, role: str) -> Split:
    """LSMDC 2016.

    Clip A_00.01-00.02 of the film A lies at A/A_00.01-00.02.avi; one on two lines has two captions.
    """
    rows = []
    for where, row in read_columns(find_file(root, LSMDC_FILES[role]), LSMDC_COLUMNS):
        clip = row["CLIP_ID"].strip()
        film = clip.rpartition("_")[0]
        if not film:
            raise UserError(
                f"{where}: CLIP_ID is {clip[:40]!r}, not FILM_START-END; expected {', '.join(row)}"
            )
        rows.append((where, f"{film}/{clip}.avi", row["SENTENCE"].strip()))
    return find_pairs(root, rows)


def load_webvid(root: Path, role: str) -> Split:
    """WebVid-2M."""
    path = find_file(root, f"results_2M_{role}.csv")
    rows = read_csv(path, ["videoid", "page_dir", "name"])
    return find_pairs(
        root, ((w, f"{row['page_dir']}/{row['videoid']}.mp4", row["name"]) for w, row in rows)
    )


CC3M_FILES = {
    "train": ("Train_GCC-training.tsv", "cc3m_train.csv"),
    "val": ("Validation_GCC-1.1.0-Validation.tsv", "cc3m_val.csv"),
}


def load_cc3m(root: Path, role: str) -> Split:
    """Conceptual Captions 3M.

    An image is a video of one frame; its file is named after the checksum of its address.
    """
    path = find_file(root, *CC3M_FILES[role])
    read = read_csv if path.suffix == ".csv" else read_columns
    rows = []
    for where, row in read(path, ["caption", "thumbnailUrl"]):
        address = row["thumbnailUrl"]
        if "://" not in address:
            raise UserError(f"{where}: {address[:40]!r} is no address; expected caption, url")
        rows.append((where, str(zlib.crc32(address.encode())), row["caption"]))
    return find_pairs(root, rows)


def load_webvid_cc3m(root: Path, role: str) -> Split:
    """Both as one set: a batch mixes videos and images."""
    return Split.join([load_webvid(root / "webvid", role), load_cc3m(root / "cc3m", role)])


# ---- questions -----------------------------------------------------------------------------------


def load_questions(path: str | Path) -> list[Question]:
    """Multiple choice from a jsonl file: {"video", "options", "answer": index, "kind"} a line."""
    path, questions = Path(path), []
    columns = {"video": str, "kind": str, "options": list, "answer": int}
    for where, row in read_jsonl(path, columns):
        video = str(path.parent / check_name(row["video"], where))
        check_question(row["options"], row["answer"], where)
        questions.append(Question(video, row["options"], row["answer"], row["kind"]))
    return questions


def load_msrvtt_mc(root: Path, path: str | Path | None = None) -> list[Question]:
    """MSRVTT-MC's questions, in any of its three published forms.

    `path`: where they are, if not under a usual name. Answers count from 0; from 1 if one of them
    is the number of options, and none is 0.
    """
    names = [f"msrvtt_mc_test.{ending}" for ending in ("jsonl", "json", "tsv", "csv")]
    path = Path(path) if path else find_file(root, *names)
    rows, finder = list(read_mc(path)), VideoFinder(root)
    if not rows:
        raise UserError(f"{path}: no questions in it")

    is_last = any(answer == len(options) for *_, options, answer in rows)
    first = int(is_last and all(answer != 0 for *_, answer in rows))
    questions = []
    for where, name, options, answer in rows:
        if name.startswith("msr"):  # msr9770 is video9770
            name = "video" + name.removeprefix("msr")
        check_question(options, answer - first, where)
        video = finder.find(stem(name) + ".mp4", where)
        questions.append(Question(video, options, answer - first))
    return questions


def read_mc(path: Path) -> Iterator[tuple[str, str, list, int]]:
    """(where, video, options, answer) of each question; the first character tells the form."""
    try:
        start = path.read_bytes()[:64].lstrip(b"\xef\xbb\xbf \r\n\t")[:1]
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); expected questions of MSRVTT-MC"
        ) from error

    if start == b"{":
        columns = {"clip_name": str, "options": list, "answer": int}
        for where, row in read_jsonl(path, columns):
            yield where, row["clip_name"], row["options"], row["answer"]
    elif start == b"[":
        columns = {"video": str, "caption": list, "answer": int}
        for where, row in read_entries(path, read_json(path, "a list of objects"), None, columns):
            yield where, row["video"], row["caption"], row["answer"]
    else:
        names = ["a1", "a2", "a3", "a4", "a5"]
        for where, row in read_csv(path, ["vid_key", *names, "answer"], delimiter="\t"):
            answer = row["answer"]
            if not answer.strip().isdecimal() or len(answer) > 9:  # int() refuses 4,301 digits
                raise UserError(f"{where}: answer is {answer[:40]!r}, expected a whole number")
            yield where, row["vid_key"], [row[name] for name in names], int(answer)


def check_question(options: list, answer: int, where: str) -> None:
    if len(options) < 2 or not all(isinstance(option, str) for option in options):
        raise UserError(f"{where}: options must be a list of two or more captions")
    if not 0 <= answer < len(options):
        raise UserError(f"{where}: answer is {answer}, expected 0 … {len(options) - 1}")
    for option in options:
        check_text(option, where, "an option")


def load_mc_videos(root: Path, role: str) -> Split:
    videos = dict.fromkeys(question.video for question in load_msrvtt_mc(root))
    return Split(list(videos), [], np.zeros(0, np.int64))


# ---- all of them ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSet:
    """How to load it, and what makes a result on it comparable."""

    load: Callable[[Path, str], Split]
    videos: dict[str, int | None]  # of each split, by protocol; None: not fixed
    protocol: str = ""  # in words, of its test
    # text queries of a split, where they are fixed
    captions: dict[str, int] = field(default_factory=dict)
    no_val: str = ""  # why it has no validation split


NO_VAL_1KA = (
    "1k-A has none, and its training lists hold the official one; the last checkpoint is the result"
)
PROTOCOLS = {
    "msrvtt": "MSR-VTT 1k-A: 1,000 test pairs, one caption each, every caption against all videos. "
    "It has no validation split: the checkpoint is the last, not the best on the test.",
    "msrvtt-full": "MSR-VTT, official splits: each of a video's 20 captions is a query of its own "
    "against all videos; a video takes the best rank of its captions. Not 1k-A: their numbers must "
    "not be mixed.",
    "msvd": "MSVD: every caption is a query of its own against all videos (test: 27,763 against "
    "670); a video takes the best rank of its captions.",
    "didemo": "DiDeMo, paragraph to video: a video's sentences, joined in the order of the file, "
    "are one query; the first 30 seconds of each video.",
    "lsmdc": "LSMDC 2016: 1,000 test clips, one caption each, every caption against all clips.",
    "msrvtt-mc": "MSRVTT-MC: which of 5 captions is the video's? Percent of questions whose right "
    "caption scores highest, over the full test split; to be fine-tuned on the 7k list (the 9k "
    "list holds 1,990 of its videos).",
}
ANY = dict(train=None, val=None)
DATASETS = {
    "toy": DataSet(load_pairs, ANY | dict(test=None)),
    "csv": DataSet(load_pairs, ANY | dict(test=None)),
    "msrvtt": DataSet(
        partial(load_1ka, "9k"),
        videos=dict(train=9000, test=1000),
        protocol=PROTOCOLS["msrvtt"],
        captions=dict(train=180_000, test=1000),
        no_val=NO_VAL_1KA,
    ),
    "msrvtt-7k": DataSet(
        partial(load_1ka, "7k"),
        videos=dict(train=7010, test=1000),
        protocol=PROTOCOLS["msrvtt"],
        captions=dict(train=140_200, test=1000),
        no_val=NO_VAL_1KA,
    ),
    "msrvtt-full": DataSet(
        load_msrvtt_full,
        videos=dict(train=6513, val=497, test=2990),
        protocol=PROTOCOLS["msrvtt-full"],
        captions=dict(train=130_260, val=9940, test=59_800),
    ),
    "msvd": DataSet(
        load_msvd,
        videos=dict(train=1200, val=100, test=670),
        protocol=PROTOCOLS["msvd"],
        captions=dict(test=27_763),
    ),
    "didemo": DataSet(
        load_didemo,
        videos=dict(train=8392, val=1065, test=1004),
        protocol=PROTOCOLS["didemo"],
        captions=dict(train=8392, val=1065, test=1004),
    ),
    "lsmdc": DataSet(
        load_lsmdc,
        videos=ANY | dict(test=1000),
        protocol=PROTOCOLS["lsmdc"],
        captions=dict(test=1000),
    ),
    "msrvtt-mc": DataSet(load_mc_videos, videos=dict(test=2990), protocol=PROTOCOLS["msrvtt-mc"]),
    "webvid": DataSet(load_webvid, ANY),
    "cc3m": DataSet(load_cc3m, ANY),
    "webvid+cc3m": DataSet(load_webvid_cc3m, ANY),
}


def load_split(
    dataset: str, data: str | Path, role: str = "train", *, root: str | Path | None = None
) -> Split:
    """The "train", "val" or "test" split of a data set (a key of DATASETS) in the folder `data`.

    For "csv" `data` may be the file itself, and `root` the folder that its paths are relative to
    and must not leave. Raises UserError, with file, line and what was expected, where a file is
    missing, empty or malformed, or the data set has no such split. Videos are not looked at:
    `keep_decodable` finds the missing and the broken ones.
    """
    assert role in ("train", "val", "test"), f"{role=}: train, val or test"
    assert root is None or dataset == "csv", f"{root=}: {dataset} takes its folder as `data`"
    if dataset not in DATASETS:
        raise UserError(f"{dataset}: no such data set; one of {', '.join(DATASETS)}")
    entry = DATASETS[dataset]
    if role not in entry.videos:
        why = entry.no_val or f"it has {', '.join(entry.videos)}"
        raise UserError(f"{dataset}: has no {role} split; {why}")
    if root is not None:
        return load_pairs(Path(data), role, Path(root))
    return entry.load(Path(data), role)


def main() -> None:
    """The protocols."""
    for name, entry in DATASETS.items():
        sizes = [f"{role} {count or 'any'}" for role, count in entry.videos.items()]
        print(f"{name:12s} {', '.join(sizes)}")
        if entry.protocol:
            print(f"             {entry.protocol}")


if __name__ == "__main__":
    run(main)
