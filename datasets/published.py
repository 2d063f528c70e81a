"""The data sets of the field, read as their authors publish them, with the protocols that make
results comparable.

`load_split(name, root, role)` is the "train", "val" or "test" split. `root` is one folder that
holds the annotation files under their published names (there, or in `annotations/` or
`annotation/`) and the videos:

    name         captions   annotation files ("or": the first that is there)
    msrvtt       20, test 1 MSRVTT_train.9k.csv, MSRVTT_JSFUSION_test.csv (1k-A), and
                 MSRVTT_data.json or
                            train_val_videodatainfo.json + test_videodatainfo.json
    msrvtt-7k    20, test 1 the same with MSRVTT_train.7k.csv
    msrvtt-full  20         MSRVTT_data.json, or the two others: the official splits
    msvd         about 40   {train,val,test}_list.txt, and raw-captions.pkl or captions_msvd.json
    didemo       1 (joined) {train,val,test}_data.json, and if you like {train,val,test}_list.txt
    lsmdc        mostly 1   LSMDC16_annos_training.csv, LSMDC16_annos_val.csv,
                            LSMDC16_challenge_1000_publictect.csv
    msrvtt-mc    questions  msrvtt_mc_test.jsonl, .json, .tsv or .csv, in any of three forms
    webvid       1          results_2M_train.csv, results_2M_val.csv
    cc3m         1          Train_GCC-training.tsv, Validation_GCC-1.1.0-Validation.tsv; or
                            cc3m_train.csv, cc3m_val.csv
    webvid+cc3m  1          both, to pre-train on: the folders webvid/ and cc3m/ of `root`
    csv          any        one's own train.csv, val.csv, test.csv; or one csv or jsonl file: video,
                            caption

**Where a video is.** Annotations name a video, and people keep it where they like, perhaps in
another container. The folders of VIDEO_FOLDERS are tried in their order, each for the very name;
then again in that order for the same name with another ending (of several, the first of SUFFIXES).
A video that is nowhere stays in the split under the path where it was expected, so that it is
counted and listed as missing, never dropped in silence.

**What a complete result is.** Each entry of DATASETS states how many videos and captions its splits
hold by protocol (None: not fixed; links die), and eval.py writes "N of M: not comparable" beside a
result on any other number.

    python datasets.py                                 the sizes and protocols
    python data.py --check msrvtt --root FOLDER        what is there, what is missing, what does not
                                                       decode
"""

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
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

VIDEO_FOLDERS = (
    "videos",
    "videos/all",
    "",
    "video",
    "clips",
    "images",  # anybody's
    "TrainValVideo",
    "TestVideo",
    "YouTubeClips",  # as MSR-VTT and MSVD are packed
    "train",
    "val",
    "test",
    "training",
    "validation",
)  # DiDeMo, CC3M
SUFFIXES = (
    ".mp4",
    ".avi",
    ".mkv",
    ".webm",
    ".mov",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".3gp",
    ".wmv",
    ".flv",
    ".ogv",
    ".mts",
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
)


# ---- finding files -------------------------------------------------------------------------------


def find_file(root: Path, *names: str, optional: bool = False) -> Path | None:
    """The first of these annotation files that is in `root`, `root`/annotations or
    `root`/annotation.

    Raises UserError where none is; with `optional`, None is returned.
    """
    for name in names:
        for folder in ("", "annotations", "annotation"):
            if (path := root / folder / name).is_file():
                return path
    if optional:
        return None
    raise UserError(
        f"{root}: no {' or '.join(names)} in it or in its annotations/; fetch it from the set's authors"
    )


class VideoFinder:
    """Finds the videos below a folder by the names that annotations give them."""

    def __init__(self, root: Path):
        self.folders = [str(root / name) for name in VIDEO_FOLDERS if (root / name).is_dir()] or [
            str(root)
        ]
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
            listing = self._list(os.path.dirname(path))
            other = listing.get(_stem(os.path.basename(name))) or listing.get(
                os.path.basename(name)
            )
            if other:
                return os.path.join(os.path.dirname(path), other)
        return candidates[0]

    def _list(self, folder: str) -> dict[str, str]:
        """{name without ending: name} of a folder's files; of several endings the first of
        SUFFIXES.
        """
        if folder not in self.listings:
            names = (
                sorted(os.listdir(folder), key=lambda name: (_rank(name), name))
                if os.path.isdir(folder)
                else []
            )
            self.listings[folder] = {
                _stem(name): name for name in reversed(names) if _rank(name) < len(SUFFIXES)
            }
        return self.listings[folder]


def _rank(name: str) -> int:
    suffix = os.path.splitext(name)[1].lower()
    return SUFFIXES.index(suffix) if suffix in SUFFIXES else len(SUFFIXES)


def _stem(name: str) -> str:
    """Without the ending of a video; LSMDC's names end in ".129", which is none."""
    return os.path.splitext(name)[0] if _rank(name) < len(SUFFIXES) else name


# ---- one loader a data set: (root, role) -> Split ------------------------------------------------


def load_pairs(path: Path, role: str, root: Path | None = None) -> Split:
    """A csv (with header) or jsonl file with `video` and `caption`; or a folder with train.csv,
    val.csv, test.csv.

    It is one's own file, so its paths may be absolute, or relative to it; unless there is a `root`:
    then they are relative to that, and none may leave it.
    """
    path = path / f"{role}.csv" if path.is_dir() else path
    folder = str(path.parent if root is None else root)
    split = Split.from_pairs(
        (
            os.path.join(folder, check_name(row["video"], where, inside=root is not None)),
            row["caption"],
        )
        for where, row in read_pairs(path)
    )
    if not split.captions:
        raise UserError(
            f"{path}: no samples in it; expected a line with video and caption for each"
        )
    return split


def load_msrvtt_train(root: Path, size: str) -> Split:
    """The videos of a training list (size "7k" or "9k") with all their captions."""
    names = _listed(find_file(root, f"MSRVTT_train.{size}.csv"))
    captions, _ = _read_msrvtt(root, ("train", "test") if size == "9k" else ("train",))
    return _captioned(root, names, captions, lambda video: video + ".mp4")


def load_1ka(root: Path) -> Split:
    """The 1,000 pairs of MSR-VTT 1k-A."""
    finder, path = VideoFinder(root), find_file(root, "MSRVTT_JSFUSION_test.csv")
    return Split.from_pairs(
        (finder.find(row["video_id"] + ".mp4", where), row["sentence"])
        for where, row in read_csv(path, ["key", "vid_key", "video_id", "sentence"])
    )


def load_msrvtt_full(root: Path, role: str) -> Split:
    """The official splits, as the annotation of each video says."""
    captions, split_of = _read_msrvtt(root, ("test",) if role == "test" else ("train",))
    official = {"train": "train", "val": "validate", "test": "test"}[role]
    names = [(where, video) for video, (where, split) in split_of.items() if split == official]
    return _captioned(root, names, captions, lambda video: video + ".mp4")


def _listed(path: Path) -> list[tuple[str, str]]:
    return [(where, row["video_id"]) for where, row in read_csv(path, ["video_id"])]


def _read_msrvtt(
    root: Path, parts: Iterable[str]
) -> tuple[dict[str, list[str]], dict[str, tuple[str, str]]]:
    """({video: its captions}, {video: (where, split)}) of MSRVTT_data.json, or of the official
    files of these parts.
    """
    official = {"train": "train_val_videodatainfo.json", "test": "test_videodatainfo.json"}
    captions, split_of = {}, {}
    paths = dict.fromkeys(find_file(root, "MSRVTT_data.json", official[part]) for part in parts)
    for path in paths:
        document = read_json(path, "an object with the lists videos and sentences")
        for where, row in read_entries(path, document, "videos", {"video_id": str, "split": str}):
            if split_of.setdefault(row["video_id"], (where, row["split"]))[1] != row["split"]:
                raise UserError(
                    f"{where}: {row['video_id']} is in two splits; fetch the file again"
                )
        for where, row in read_entries(
            path, document, "sentences", {"video_id": str, "caption": str}
        ):
            if row["video_id"] not in split_of:
                raise UserError(
                    f"{where}: {row['video_id'][:40]!r} is not among the file's videos; fetch it again"
                )
            captions.setdefault(row["video_id"], []).append(row["caption"])
    return captions, split_of


def _captioned(
    root: Path,
    names: Iterable[tuple[str, str]],
    captions: dict[str, list[str]],
    file_of: Callable[[str], str],
) -> Split:
    """The listed (where, video) with their captions.

    Raises UserError where one has none, or is listed twice.
    """
    finder, seen = VideoFinder(root), set()

    def pairs() -> Iterator[tuple[str, str]]:
        for where, name in names:
            if not captions.get(name):
                raise UserError(
                    f"{where}: {name[:40]!r} has no caption in the annotation file; fetch both again"
                )
            if name in seen:
                raise UserError(f"{where}: {name[:40]!r} stands there twice; fetch the file again")
            seen.add(name)
            path = finder.find(file_of(name), where)
            yield from ((path, caption) for caption in captions[name])

    return Split.from_pairs(pairs())


def load_msvd(root: Path, role: str) -> Split:
    """MSVD: each of a video's many sentences is a caption of its own."""
    path = find_file(root, "raw-captions.pkl", "captions_msvd.json")
    found = (
        read_captions_pickle(path)
        if path.suffix == ".pkl"
        else read_json(path, "an object {video: [sentence, …]}")
    )
    if not isinstance(found, dict):
        raise UserError(f"{path}: not an object; expected {{video: [sentence, …]}}")
    names = read_list(find_file(root, f"{role}_list.txt"))
    captions = {
        name: _sentences(found.get(name, []), f"{path}, entry {name[:40]!r}") for _, name in names
    }
    return _captioned(root, names, captions, lambda video: video + ".avi")


def _sentences(sentences, where: str) -> list[str]:
    """The captions of a video: each a text, or the list of its words."""
    if not isinstance(sentences, list):
        raise UserError(f"{where}: not a list; expected a list of sentences, or of lists of words")
    texts = []
    for number, sentence in enumerate(sentences):
        words = sentence if isinstance(sentence, list) else [sentence]
        texts.append(
            " ".join(check_text(word, f"{where}[{number}]", "a word or sentence") for word in words)
        )
    return texts


DIDEMO_SECONDS = 30.0


def load_didemo(root: Path, role: str) -> Split:
    """DiDeMo: the sentences of a video, joined in the order of the file, are its one caption; of
    its first 30 s.

    An optional list says which videos are in the split. Names are compared without their endings.
    """
    path, sentences, file_of, where_of = find_file(root, f"{role}_data.json"), {}, {}, {}
    columns = {"video": str, "description": str}
    for where, row in read_entries(path, read_json(path, "a list of objects"), None, columns):
        name = _stem(row["video"])
        sentences.setdefault(name, []).append(row["description"].strip())
        file_of.setdefault(name, row["video"])
        where_of.setdefault(name, where)
    listed = find_file(root, f"{role}_list.txt", optional=True)
    names = (
        [(where, _stem(name)) for where, name in read_list(listed)]
        if listed
        else [(where, name) for name, where in where_of.items()]
    )
    paragraphs = {name: [" ".join(parts)] for name, parts in sentences.items()}
    return replace(
        _captioned(root, names, paragraphs, file_of.__getitem__), window=(0.0, DIDEMO_SECONDS)
    )


def load_lsmdc(root: Path, role: str) -> Split:
    """LSMDC 2016.

    Clip A_00.01-00.02 of the film A lies at A/A_00.01-00.02.avi; one on two lines has two captions.
    """
    path = find_file(
        root,
        {
            "train": "LSMDC16_annos_training.csv",
            "val": "LSMDC16_annos_val.csv",
            "test": "LSMDC16_challenge_1000_publictect.csv",
        }[role],
    )
    columns = (
        "CLIP_ID",
        "START_ALIGNED",
        "END_ALIGNED",
        "START_EXTRACTED",
        "END_EXTRACTED",
        "SENTENCE",
    )
    finder = VideoFinder(root)

    def pairs() -> Iterator[tuple[str, str]]:
        for where, row in read_columns(path, columns):
            clip = row["CLIP_ID"].strip()
            if not (film := clip.rpartition("_")[0]):
                raise UserError(
                    f"{where}: CLIP_ID is {clip[:40]!r}, not FILM_START-END; expected {', '.join(row)}"
                )
            yield finder.find(f"{film}/{clip}.avi", where), row["SENTENCE"].strip()

    return Split.from_pairs(pairs())


def load_webvid(root: Path, role: str) -> Split:
    """WebVid-2M."""
    finder, path = VideoFinder(root), find_file(root, f"results_2M_{role}.csv")
    return Split.from_pairs(
        (finder.find(f"{row['page_dir']}/{row['videoid']}.mp4", where), row["name"])
        for where, row in read_csv(path, ["videoid", "page_dir", "name"])
    )


def load_cc3m(root: Path, role: str) -> Split:
    """Conceptual Captions 3M.

    An image is a video of one frame; its file is named after the checksum of its address.
    """
    finder, path = (
        VideoFinder(root),
        find_file(
            root,
            *{
                "train": ("Train_GCC-training.tsv", "cc3m_train.csv"),
                "val": ("Validation_GCC-1.1.0-Validation.tsv", "cc3m_val.csv"),
            }[role],
        ),
    )
    rows = (
        read_csv(path, ["caption", "thumbnailUrl"])
        if path.suffix == ".csv"
        else read_columns(path, ["caption", "thumbnailUrl"])
    )

    def pairs() -> Iterator[tuple[str, str]]:
        for where, row in rows:
            if "://" not in row["thumbnailUrl"]:
                raise UserError(
                    f"{where}: {row['thumbnailUrl'][:40]!r} is no address; expected caption, url"
                )
            yield finder.find(str(zlib.crc32(row["thumbnailUrl"].encode())), where), row["caption"]

    return Split.from_pairs(pairs())


def load_webvid_cc3m(root: Path, role: str) -> Split:
    """Both as one set: a batch mixes videos and images."""
    return Split.join([load_webvid(root / "webvid", role), load_cc3m(root / "cc3m", role)])


# ---- questions -----------------------------------------------------------------------------------


def load_questions(path: str | Path) -> list[Question]:
    """Multiple choice from a jsonl file: {"video", "options": [caption, …], "answer": index,
    "kind"} a line.
    """
    path, columns = Path(path), {"video": str, "kind": str, "options": list, "answer": int}
    return [
        _question(
            str(path.parent / check_name(row["video"], where)),
            row["options"],
            row["answer"],
            where,
            row["kind"],
        )
        for where, row in read_jsonl(path, columns)
    ]


def load_msrvtt_mc(root: Path, path: str | Path | None = None) -> list[Question]:
    """MSRVTT-MC's questions, in any of its three published forms; `path`: where they are, if not
    under a usual name.

    Answers count from 0; from 1 if one of them is the number of options, and none is 0.
    """
    names = [f"msrvtt_mc_test.{ending}" for ending in ("jsonl", "json", "tsv", "csv")]
    path = Path(path) if path else find_file(root, *names)
    rows, finder = list(_read_mc(path)), VideoFinder(root)
    if not rows:
        raise UserError(f"{path}: no questions in it")
    from_one = any(answer == len(options) for _, _, options, answer in rows) and all(
        row[3] != 0 for row in rows
    )
    questions = []
    for where, name, options, answer in rows:
        name = _stem(
            "video" + name.removeprefix("msr") if name.startswith("msr") else name
        )  # msr9770 is video9770
        questions.append(
            _question(finder.find(name + ".mp4", where), options, answer - from_one, where)
        )
    return questions


def _read_mc(path: Path) -> Iterator[tuple[str, str, list, int]]:
    """(where, video, options, answer) of each question; the first character tells the form of the
    file.
    """
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
            if (
                not row["answer"].strip().isdecimal() or len(row["answer"]) > 9
            ):  # int() refuses 4,301 digits
                raise UserError(
                    f"{where}: answer is {row['answer'][:40]!r}, expected a whole number"
                )
            yield where, row["vid_key"], [row[name] for name in names], int(row["answer"])


def _question(video: str, options: list, answer: int, where: str, kind: str = "") -> Question:
    if len(options) < 2 or not all(isinstance(option, str) for option in options):
        raise UserError(f"{where}: options must be a list of two or more captions")
    if not 0 <= answer < len(options):
        raise UserError(f"{where}: answer is {answer}, expected 0 … {len(options) - 1}")
    return Question(
        video, [check_text(option, where, "an option") for option in options], answer, kind
    )


# ---- all of them ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSet:
    """How to load it, and what makes a result on it comparable."""

    load: Callable[[Path, str], Split]
    videos: dict[str, int | None]  # of each split, by protocol; None: not fixed
    protocol: str = ""  # in words, of its test
    captions: dict[str, int] = field(
        default_factory=dict
    )  # text queries of a split, where they are fixed
    no_val: str = ""  # why it has no validation split


_1KA = (
    "MSR-VTT 1k-A: 1,000 test pairs, one caption each, every caption against all videos. It has no validation "
    "split: the checkpoint is the last, not the best on the test."
)
_NO_VAL = (
    "1k-A has none, and its training lists hold the official one; the last checkpoint is the result"
)


def _load_1ka(size: str) -> Callable[[Path, str], Split]:
    return lambda root, role: load_1ka(root) if role == "test" else load_msrvtt_train(root, size)


def _load_mc_videos(root: Path, role: str) -> Split:
    return Split(
        list(dict.fromkeys(question.video for question in load_msrvtt_mc(root))),
        [],
        np.zeros(0, np.int64),
    )


DATASETS = {
    "toy": DataSet(load_pairs, dict(train=None, val=None, test=None)),
    "csv": DataSet(load_pairs, dict(train=None, val=None, test=None)),
    "msrvtt": DataSet(
        _load_1ka("9k"), dict(train=9000, test=1000), _1KA, dict(train=180_000, test=1000), _NO_VAL
    ),
    "msrvtt-7k": DataSet(
        _load_1ka("7k"), dict(train=7010, test=1000), _1KA, dict(train=140_200, test=1000), _NO_VAL
    ),
    "msrvtt-full": DataSet(
        load_msrvtt_full,
        dict(train=6513, val=497, test=2990),
        "MSR-VTT, official splits: each of a video's 20 captions is a query of its own against all videos; a video "
        "takes the best rank of its captions. Not 1k-A: their numbers must not be mixed.",
        dict(train=130_260, val=9940, test=59_800),
    ),
    "msvd": DataSet(
        load_msvd,
        dict(train=1200, val=100, test=670),
        "MSVD: every caption is a query of its own against all videos (test: 27,763 against 670); a video takes the "
        "best rank of its captions.",
        dict(test=27_763),
    ),
    "didemo": DataSet(
        load_didemo,
        dict(train=8392, val=1065, test=1004),
        "DiDeMo, paragraph to video: a video's sentences, joined in the order of the file, are one query; the first "
        "30 seconds of each video.",
        dict(train=8392, val=1065, test=1004),
    ),
    "lsmdc": DataSet(
        load_lsmdc,
        dict(train=None, val=None, test=1000),
        "LSMDC 2016: 1,000 test clips, one caption each, every caption against all clips.",
        dict(test=1000),
    ),
    "msrvtt-mc": DataSet(
        _load_mc_videos,
        dict(test=2990),
        "MSRVTT-MC: which of 5 captions is the video's? Percent of questions whose right caption scores highest, over "
        "the full test split; to be fine-tuned on the 7k list (the 9k list holds 1,990 of its videos).",
    ),
    "webvid": DataSet(load_webvid, dict(train=None, val=None)),
    "cc3m": DataSet(load_cc3m, dict(train=None, val=None)),
    "webvid+cc3m": DataSet(load_webvid_cc3m, dict(train=None, val=None)),
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
    entry, data = DATASETS[dataset], Path(data)
    if role not in entry.videos:
        raise UserError(
            f"{dataset}: has no {role} split; {entry.no_val or 'it has ' + ', '.join(entry.videos)}"
        )
    if dataset == "csv":
        return load_pairs(data, role, None if root is None else Path(root))
    return entry.load(data, role)


def main():
    """The protocols."""
    for name, entry in DATASETS.items():
        sizes = ", ".join(
            f"{role} {'any' if count is None else f'{count:,}'}"
            for role, count in entry.videos.items()
        )
        print(
            f"{name:12s} {sizes}" + (f"\n             {entry.protocol}" if entry.protocol else "")
        )


if __name__ == "__main__":
    run(main)
