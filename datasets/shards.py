"""Videos and images packed into tar files, as video2dataset and img2dataset write them.

A data set of millions of files is kept in shards of some thousand samples each. The files of a
sample follow each other, and share a key:

    00000.tar    000000012.mp4    the video (or .webm, .avi, …; an image: .jpg, .png, .webp)
                 000000012.txt    its caption; or "caption" in …
                 000000012.json   … the facts on it

    load_shards("WEBVID/{00000..02480}.tar::CC3M/{00000..00331}.tar", index=FOLDER) -> Split

Several patterns are joined by "::", as in webdataset and open_clip. "2*WEBVID/…" counts each sample
of a pattern twice per epoch, each time with other frames; a batch mixes all of them.

Others read shards as streams, and shuffle a window of some thousand samples. Here the knowledge
sampler decides who meets, so any sample must be found at once. Each shard is walked once, header by
header, and leaves a small file in the folder `index`: where each video's bytes lie, and its
caption. A video is then known by "SHARD.tar@FIRST BYTE+BYTES/KEY.mp4" (videos/decode.py).

A shard that ends early costs what it has lost. A sample without a caption, or with one that is not
UTF-8, and a key that comes twice cost that sample. All are in the split's `broken`.
"""

import glob
import hashlib
import itertools
import json
import os
import re
import tarfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cli import UserError, give_back_memory, write_whole
from datasets.split import Split
from videos.decode import IMAGE_SUFFIXES, VIDEO_SUFFIXES, VideoError, locate
from videos.workers import run_guarded

MEDIA = [suffix[1:] for suffix in VIDEO_SUFFIXES + IMAGE_SUFFIXES]
VERSION = 3  # of the index files
TEXT = np.dtypes.StringDType()  # half of the memory that Python's own texts take


def load_shards(patterns: str, *, index: Path, workers: int, progress: bool = True) -> Split:
    """All samples of the shards, in their order. `workers`: processes that index what is new.

    Raises UserError where a pattern matches no file, no sample is left, or the index cannot be
    written.
    """
    repeats: dict[str, int] = {}
    for pattern in patterns.split("::"):
        weight, name = re.fullmatch(r"(?:(\d+)\*)?(.*)", pattern, re.DOTALL).groups()
        for shard in find_shards(name):
            if shard in repeats:
                raise UserError(f"--data {patterns}: {shard} is in it twice; weigh it: 2*PATTERN")
            repeats[shard] = int(weight or 1)

    done = run_guarded(partial(index_shard, index=index), repeats, workers=workers)
    failures = dict(tqdm(done, "index shards", len(repeats), leave=False, disable=not progress))
    broken = {shard: failures[n] for n, shard in enumerate(repeats) if failures[n]}

    videos, captions, video_ids, count = [], [], [], 0
    for shard, weight in repeats.items():
        if shard in broken:
            continue
        found = read_index(index_file(shard, index))
        ids = np.arange(count, count + len(found["videos"]))
        videos.append(np.array([shard + video for video in found["videos"]], TEXT))
        captions += [np.array(found["captions"], TEXT)] * weight
        video_ids += [ids] * weight
        for key, why in found["broken"].items():
            name = f"{shard}/{key}" if key else shard
            broken[name] = f"{name}: {why}"
        count += len(ids)

    if not count:
        first = next(iter(broken.values()), f"{next(iter(repeats))}: nothing in it")
        raise UserError(f"--data {patterns}: not one video with a caption; the first: {first}")
    return Split(*map(join, (videos, captions, video_ids)), broken=broken)


def join(parts: list[np.ndarray]) -> np.ndarray:
    """`np.concatenate` that empties the list as it goes: millions of texts are held once."""
    joined = np.empty(sum(map(len, parts)), parts[0].dtype)
    end = 0
    while parts:
        part = parts.pop()
        joined[len(joined) - end - len(part) : len(joined) - end] = part
        end += len(part)
        if len(parts) % 256 == 0:
            give_back_memory()
    return joined


def find_shards(pattern: str) -> list[str]:
    """The files of a pattern with ranges {00000..02480} and *; those of ranges need not be there.

    Raises UserError where it matches no file.
    """
    names = [pattern]
    while names and (match := re.search(r"\{(\d+)\.\.(\d+)\}", names[0])):
        first, last = match.groups()
        numbers = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        pairs = itertools.product(names, numbers)
        names = [name.replace(match[0], number, 1) for name, number in pairs]

    shards = []
    for name in names:
        shards += sorted(glob.glob(name)) if "*" in name else [name]
    if not any(map(os.path.isfile, shards)):
        raise UserError(
            f'--data {pattern}: matches no file; expected tar files, "FOLDER/{{00000..00099}}.tar"'
        )
    return shards


# ---- the index -----------------------------------------------------------------------------------


def index_file(shard: str, index: Path) -> Path:
    """Where the index of a shard lies. A shard that has changed gets another one."""
    file, *version = locate(shard)
    recipe = repr((os.path.realpath(file), *version, VERSION))
    return index / f"{hashlib.sha256(recipe.encode()).hexdigest()[:40]}.json"


def index_shard(shard: str, index: Path) -> None:
    """In a worker: write the index of a shard, unless it is there.

    Raises VideoError where the shard cannot be read.
    """
    file = index_file(shard, index)
    if file.exists():
        return

    try:
        samples, broken = read_shard(shard)
    except (OSError, tarfile.TarError) as error:
        raise VideoError(
            f"{shard}: not a tar file that can be read in place ({error}); fetch or pack it again"
        ) from error

    videos, captions = [], []
    for key, files in samples.items():
        media = [kind for kind in MEDIA if kind in files]
        caption = read_caption(files)
        if caption is None:
            broken[key] = f'no caption; expected {key}.txt (UTF-8), or "caption" in {key}.json'
        elif not media:
            broken[key] = "no video or image beside its caption"
        else:
            videos.append(files[media[0]])
            captions.append(caption)

    columns = dict(videos=videos, captions=captions, broken=broken)
    text = json.dumps(columns, ensure_ascii=False).encode()
    with write_whole(file) as unfinished:
        unfinished.write_bytes(b"%08x\n" % zlib.crc32(text) + text)


def read_index(file: Path) -> dict:
    """{"videos", "captions", "broken": {key: why}}. Raises UserError where a bit has changed."""
    checksum, _, text = file.read_bytes().partition(b"\n")
    if checksum != b"%08x" % zlib.crc32(text):
        raise UserError(f"{file}: damaged; delete it, and its shard is walked again")
    return json.loads(text)


def read_shard(shard: str) -> tuple[dict[str, dict], dict[str, str]]:
    """({key: {kind: bytes of a text, or "@FIRST+BYTES/NAME" of a video}}, {key: what is wrong}).

    What is wrong with the shard itself has the key "". Raises OSError or TarError where the file is
    no tar.
    """
    samples: dict[str, dict] = {}
    broken, size = {}, os.path.getsize(shard)
    with tarfile.open(shard, "r:") as tar:
        try:
            for member in tar:
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{member.name} is cut off")
                folder, slash, name = member.name.rpartition("/")
                stem, _, kind = name.partition(".")
                key, kind = folder + slash + stem, kind.lower()
                if not member.isfile() or kind not in ("txt", "json", *MEDIA):
                    continue

                files = samples.setdefault(key, {})
                if kind in files:
                    broken[key] = "its key comes twice in the shard; pack it again"
                if kind in MEDIA:
                    files[kind] = f"@{member.offset_data}+{member.size}/{name}"
                else:
                    files[kind] = tar.extractfile(member).read()

            # tarfile ends without a word at what is no header; a whole shard ends with zeros
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):
                raise tarfile.ReadError("it ends without an end mark")
        except tarfile.ReadError as error:
            broken[""] = (
                f"truncated or damaged: {error}; what stands before is used; fetch it again"
            )

    whole = {key: files for key, files in samples.items() if key not in broken}
    return whole, broken


def read_caption(files: dict[str, bytes]) -> str | None:
    """The caption of a sample; None where there is none."""
    try:
        if "txt" in files:
            return files["txt"].decode("utf-8-sig").strip()
        caption = json.loads(files["json"])["caption"]
        caption.encode()  # no half characters
        return caption.strip()
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
