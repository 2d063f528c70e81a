"""What many captions know together: the knowledge of each, a vocabulary of concepts, and how much two captions share.

A *concept* is a piece of knowledge with its granularity: "noun:dog", "verb:chase", "relation:chase cat" (knowledge.py).

A vocabulary keeps the K most frequent concepts of a corpus. With w_c the idf of concept c, the overlap of two captions
is the cosine of their weighted concept sets, a dot product of unit vectors (κ, in [0, 1]):

    κ_ij = Σ_{c in both} w_c² / (‖w_i‖ ‖w_j‖),    ‖w_i‖² = Σ_{c in i} w_c²

    a dog chases a cat      κ = 1.00   a cat is chased by a dog      the same knowledge: a false negative
                            κ = 0.58   a cat chases a dog            a hard negative: only the relation differs
                            κ = 0.18   a dog sleeps

(`python concepts.py` prints it.) SKP predicts these concepts; KCL weighs negatives by κ, makes its batches by the same
overlap of nouns and verbs alone (`word_idf`), and `meaning_ids` says which pairs are no negatives at all.

Millions of captions: the knowledge of each distinct caption is extracted once, by several processes, and kept in one
file for the next time; in memory it is ids into one table of names, 100 MB for 2.5 million captions.

    python concepts.py                        # four captions: vocabulary with counts, nearest captions
    python concepts.py captions.txt           # those of a file: txt, one a line, or csv with a column `caption`
"""

import csv
import hashlib
import importlib.metadata
import itertools
import multiprocessing
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tyro.conf import Positional

from cli import UserError, parse_config, run
from knowledge import GRANULARITIES, extract_knowledge
from datasets.strings import Strings
from captions.tagger import WEIGHTS_SHA256, load_tagger

DEMO = ["a dog chases a cat", "a cat is chased by a dog", "a cat chases a dog", "a dog sleeps"]


# ---------------------------------------------------------------------------------------------------------------------
# Knowledge of many captions, compactly

class ConceptSets(Sequence):
    """N sets of ids in two arrays (compressed sparse rows): `sets[i]` is a view of ids[offsets[i]:offsets[i + 1]].

    offsets int64 [N+1], ids int32 [total]. 2.5 million captions of 8 concepts take 100 MB, as Python lists 1 GB.
    """

    def __init__(self, offsets: np.ndarray, ids: np.ndarray):
        assert len(offsets) and offsets[0] == 0 and offsets[-1] == len(ids), (offsets[:1], offsets[-1:], len(ids))
        self.offsets, self.ids = offsets.astype(np.int64, copy=False), ids.astype(np.int32, copy=False)

    @classmethod
    def from_lists(cls, lists: Iterable[Sequence[int]]) -> "ConceptSets":
        lists = [np.asarray(ids, np.int32) for ids in lists]
        offsets = np.zeros(len(lists) + 1, np.int64)
        np.cumsum([len(ids) for ids in lists], out=offsets[1:])
        return cls(offsets, np.concatenate(lists) if lists else np.zeros(0, np.int32))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        if not -len(self) <= i < len(self):
            raise IndexError(f"set {i} of {len(self)}")
        i %= len(self)
        return self.ids[self.offsets[i]:self.offsets[i + 1]]

    def rows(self) -> np.ndarray:
        """The set that each entry of `ids` belongs to, int64 [total]."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def take(self, rows: np.ndarray) -> "ConceptSets":
        """The sets of these rows, in this order."""
        lengths = np.diff(self.offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        source = np.repeat(self.offsets[:-1][rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return ConceptSets(offsets, self.ids[source])

    def transpose(self, size: int) -> "ConceptSets":
        """The inverted index over ids 0 … size - 1: set c of the result holds the rows, ascending, that hold c."""
        order = np.argsort(self.ids, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(np.bincount(self.ids, minlength=size))])
        return ConceptSets(offsets, self.rows()[order])


class Knowledge(Sequence):
    """What `extract_knowledge` says of N captions: a sequence of its dicts, kept as ids into one table of names.

    names: "noun:dog", "relation:chase cat" … by order of appearance; sets: `ConceptSets` of the distinct captions;
    row_of int64 [N]: which of them caption i is.
    """

    def __init__(self, names: list[str], sets: ConceptSets, row_of: np.ndarray):
        self.names, self.sets, self.row_of = names, sets, row_of

    @classmethod
    def pack(cls, knowledge: Iterable[dict[str, list[str]]]) -> "Knowledge":
        """From an iterable of dicts; a `Knowledge` is returned as it is."""
        if isinstance(knowledge, cls):
            return knowledge
        table: dict[str, int] = {}
        sets = ConceptSets.from_lists([table.setdefault(name, len(table)) for name in concept_names(one)]
                                      for one in knowledge)
        return cls(list(table), sets, np.arange(len(sets)))

    @classmethod
    def concatenate(cls, parts: Iterable["Knowledge"]) -> "Knowledge":
        table: dict[str, int] = {}
        ids, lengths = [np.zeros(0, np.int32)], [np.zeros(1, np.int64)]
        for part in parts:
            to_table = np.array([table.setdefault(name, len(table)) for name in part.names], np.int32)
            sets = part.sets.take(part.row_of)
            ids.append(to_table[sets.ids] if len(sets.ids) else sets.ids)
            lengths.append(np.diff(sets.offsets))
        offsets = np.cumsum(np.concatenate(lengths))
        return cls(list(table), ConceptSets(offsets, np.concatenate(ids)), np.arange(len(offsets) - 1))

    def __len__(self) -> int:
        return len(self.row_of)

    def __getitem__(self, i: int | slice) -> dict[str, list[str]]:
        if isinstance(i, slice):
            return Knowledge(self.names, self.sets, self.row_of[i])
        knowledge = {granularity: [] for granularity in GRANULARITIES}
        for concept in self.sets[self.row_of[i]]:
            granularity, _, lemma = self.names[concept].partition(":")
            knowledge[granularity].append(lemma)
        return knowledge


def concept_names(knowledge: dict[str, list[str]]) -> list[str]:
    """["noun:dog", …, "verb:chase", …, "relation:chase cat", …] of one caption's knowledge."""
    return [f"{granularity}:{lemma}" for granularity, lemmas in knowledge.items() for lemma in lemmas]


def extract_many(captions: Iterable[str], *, workers: int | None = None, cache: str | Path | None = None,
                 progress: bool = True) -> Knowledge:
    """`extract_knowledge` of each caption, as a sequence of dicts; each distinct caption is tagged once.

    workers: processes (default: the cores this process may use; small jobs stay in this one). cache: a folder with one
    file for each set of captions and version of this code, written atomically; a damaged one is named and rebuilt.
    Raises UserError where the tagger's weights are missing or the cache cannot be written. """
    captions = Strings.pack(captions)
    first, row_of = captions.distinct()
    distinct = captions.take(first)
    path = Path(cache) / f"{_cache_key(distinct)}.npz" if cache else None
    found = _read_cache(path) if path else None
    if found is None:
        load_tagger()  # before the workers start: its errors come once, and forked workers share it
        found = _extract_distinct(distinct, workers, progress)
        if path:
            _write_cache(path, found)
    return Knowledge(found.names, found.sets, row_of)


def _extract_distinct(captions: Strings, workers: int | None, progress: bool) -> Knowledge:
    starts = range(0, len(captions), 500)
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = min(cores, len(starts) // 4)  # starting a process costs as much as 2,000 captions
    with tqdm(total=len(captions), desc="knowledge", unit=" captions", disable=not progress or len(starts) < 2) as bar:
        def counted(parts):
            for part in parts:
                bar.update(len(part))
                yield part
        if workers < 2:
            return Knowledge.concatenate(counted(_extract_chunk(captions[i:i + 500]) for i in starts))
        # fork shares the loaded tagger; elsewhere it is unsafe (macOS) or missing (Windows)
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        try:
            with ProcessPoolExecutor(workers, context) as pool:
                # in waves: one `map` would copy all captions at once
                waves = (starts[i:i + 64] for i in range(0, len(starts), 64))
                return Knowledge.concatenate(counted(itertools.chain.from_iterable(
                    pool.map(_extract_chunk, [captions[i:i + 500] for i in wave]) for wave in waves)))
        except BrokenProcessPool as error:
            raise UserError(f"knowledge of {len(captions)} captions: a tagging process died (out of memory?); run the "
                            "same command again, with fewer --workers") from error


def _extract_chunk(captions: Strings) -> Knowledge:
    return Knowledge.pack(map(extract_knowledge, captions))


def _cache_key(captions: Strings) -> str:
    """Hash of all that the result depends on: this code, the tagger's weights, the packages, the captions."""
    here = Path(__file__).parent
    code = ("concepts.py", "knowledge.py", "captions/tagger.py")
    digest = hashlib.sha256(b"".join((here / name).read_bytes() for name in code))
    versions = [f"{name}=={importlib.metadata.version(name)}" for name in ("nltk", "lemminflect")]
    for text in itertools.chain([WEIGHTS_SHA256, *versions, *GRANULARITIES], captions):
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()[:40]


def _read_cache(path: Path) -> Knowledge | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as saved:  # a zip file: every array carries a checksum
            names = saved["names"].tobytes().decode("utf-8").split("\n")
            return Knowledge(names, ConceptSets(saved["offsets"], saved["ids"]), np.arange(len(saved["offsets"]) - 1))
    except Exception as error:  # a damaged zip file raises nearly anything
        print(f"{path}: damaged knowledge cache ({type(error).__name__}); extracting again", file=sys.stderr)
        return None


def _write_cache(path: Path, knowledge: Knowledge) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.savez(file, names=np.frombuffer("\n".join(knowledge.names).encode(), np.uint8),
                     offsets=knowledge.sets.offsets, ids=knowledge.sets.ids)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cache cannot be written ({error.strerror}); name another folder") from None


# ---------------------------------------------------------------------------------------------------------------------
# Vocabulary and overlap

class ConceptVocab:
    """The K most frequent concepts of a corpus. `names` ["noun:dog", …] grouped by granularity, in each most frequent
    first; `counts` int64 [K], how many captions hold each; `num_captions` N; `idf` float32 [K]; `log_odds` float32 [K],
    ln (p / (1 − p)) of the share p of captions that hold each, one caption with and one without added (never infinite);
    `word_idf` float32 [K], idf, but 0 for relations: what captions have in common for one who reads their words only.

    Paper: how concepts are weighted is not said. idf_c = ln((N + 1) / (counts_c + 1)) + 1: the smoothed inverse
    document frequency (Spärck Jones 1972, in the form of scikit-learn's TfidfTransformer): the rarer, the heavier, and
    no weight is zero. """

    def __init__(self, names: list[str], counts: np.ndarray, num_captions: int):
        assert len(names) == len(counts) == len(set(names)), (len(names), len(counts), len(set(names)))
        self.names, self.counts, self.num_captions = list(names), np.asarray(counts, np.int64), int(num_captions)
        self.idf = (np.log((self.num_captions + 1) / (self.counts + 1)) + 1).astype(np.float32)
        self.log_odds = np.log((self.counts + 1) / (self.num_captions - self.counts + 1)).astype(np.float32)
        is_word = np.array([name.partition(":")[0] != "relation" for name in self.names], np.float32)
        self.word_idf = self.idf * is_word
        self.id_of = {name: i for i, name in enumerate(self.names)}

    @classmethod
    def build(cls, knowledge: Iterable[dict[str, list[str]]], *, min_count: int = 2,
              max_size: int = 4096) -> "ConceptVocab":
        """The `max_size` most frequent concepts that at least `min_count` captions hold; ties go to the alphabet."""
        packed = Knowledge.pack(knowledge)
        captions_of_row = np.bincount(packed.row_of, minlength=len(packed.sets))
        counts = np.bincount(packed.sets.ids, captions_of_row[packed.sets.rows()], len(packed.names)).astype(np.int64)
        kept = [i for i in np.flatnonzero(counts >= min_count)]
        kept = sorted(kept, key=lambda i: (-counts[i], packed.names[i]))[:max_size]
        order = list(GRANULARITIES)
        kept.sort(key=lambda i: order.index(packed.names[i].partition(":")[0]))  # stable: still by count within each
        return cls([packed.names[i] for i in kept], counts[kept], len(packed))

    def __len__(self) -> int:
        return len(self.names)

    def encode(self, knowledge: dict[str, list[str]]) -> np.ndarray:
        """Ascending ids of one caption's concepts, int32; concepts outside the vocabulary are left out."""
        return np.array(sorted(self.id_of[name] for name in concept_names(knowledge) if name in self.id_of), np.int32)

    def encode_many(self, knowledge: Iterable[dict[str, list[str]]]) -> ConceptSets:
        """`encode` of each caption, all at once."""
        packed = Knowledge.pack(knowledge)
        to_id = np.array([self.id_of.get(name, -1) for name in packed.names], np.int32)
        ids, rows = to_id[packed.sets.ids] if len(to_id) else packed.sets.ids, packed.sets.rows()
        rows, ids = rows[ids >= 0], ids[ids >= 0]
        order = np.lexsort((ids, rows))
        offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(packed.sets)))])
        return ConceptSets(offsets, ids[order]).take(packed.row_of)

    def to_dict(self) -> dict:
        """JSON-able, for the checkpoint."""
        return {"names": self.names, "counts": self.counts.tolist(), "num_captions": self.num_captions}

    @classmethod
    def from_dict(cls, saved: dict) -> "ConceptVocab":
        return cls(saved["names"], np.array(saved["counts"], np.int64), saved["num_captions"])


def multi_hot(sets: Sequence[np.ndarray], size: int) -> torch.Tensor:
    """float32 [B, K]: 1 where caption b holds concept k. `sets`: B arrays of ids; `size`: K."""
    concepts = np.zeros((len(sets), size), np.float32)
    for row, ids in enumerate(sets):
        concepts[row, ids] = 1
    return torch.from_numpy(concepts)


def concept_vectors(concepts: torch.Tensor, idf: torch.Tensor | np.ndarray) -> torch.Tensor:
    """[B, K] unit rows weighted by idf, whose dot products are κ; a zero row where a caption has no concept.

    concepts [B, K] multi-hot, idf [K].
    """
    weighted = concepts * torch.as_tensor(idf, dtype=concepts.dtype, device=concepts.device)  # [B, K]
    return torch.nn.functional.normalize(weighted, dim=1)  # x / max(‖x‖, eps): zero rows stay zero


def nearest_by_overlap(sets: ConceptSets, idf: np.ndarray, queries: Iterable[int],
                       k: int) -> tuple[np.ndarray, np.ndarray]:
    """(neighbours int64 [Q, k], κ float32 [Q, k]): for each query row the k other rows of largest overlap, largest
    first.

    Works on the inverted index (concept → rows), so only rows that share a concept are touched. Where fewer than k rows
    share one, the rest is −1 with κ 0.
    """
    weights = np.asarray(idf, np.float64)[sets.ids] ** 2
    norms = np.sqrt(np.bincount(sets.rows(), weights, len(sets)))
    index = sets.transpose(len(idf))
    queries = list(queries)
    neighbours, overlaps = np.full((len(queries), k), -1, np.int64), np.zeros((len(queries), k), np.float32)
    for n, query in enumerate(queries):
        touched = [index[c] for c in sets[query]]
        if not touched:
            continue
        shared = np.repeat(np.asarray(idf, np.float64)[sets[query]] ** 2, [len(rows) for rows in touched])
        rows, inverse = np.unique(np.concatenate(touched), return_inverse=True)
        kappa = np.bincount(inverse, shared) / (norms[query] * norms[rows])
        rows, kappa = rows[rows != query], kappa[rows != query]
        best = np.lexsort((rows, -kappa))[:k]
        neighbours[n, :len(best)], overlaps[n, :len(best)] = rows[best], kappa[best].clip(0, 1)
    return neighbours, overlaps


def meaning_ids(captions: Sequence[str], knowledge: Sequence[dict[str, list[str]]]) -> np.ndarray:
    """int64 [N], equal exactly for captions that must not be each other's negatives: the same non-empty knowledge (all
    of it, not only what the vocabulary keeps), or, where there is none, the same text up to case, blanks and
    punctuation.

    A 64-bit hash (blake2b), the same in every run and on every rank; among 2.5 million captions two unequal ones
    collide with probability 2e-7. """
    packed = Knowledge.pack(knowledge)
    assert len(captions) == len(packed), (len(captions), len(packed))
    names = np.array(packed.names, object)
    of_row = np.fromiter((_hash64("\n".join(sorted(names[ids]))) for ids in packed.sets), np.int64, len(packed.sets))
    ids = of_row[packed.row_of]
    for i in np.flatnonzero(np.diff(packed.sets.offsets)[packed.row_of] == 0).tolist():
        text = unicodedata.normalize("NFKC", captions[i]).lower()
        ids[i] = _hash64("text " + (" ".join(re.findall(r"\w+", text)) or " ".join(text.split())))
    return ids


def _hash64(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


# ---------------------------------------------------------------------------------------------------------------------
# Command line

@dataclass
class ConceptsConfig:
    """Show the concepts of a file of captions, and which captions share most."""
    captions: Positional[str | None] = None  # txt (one a line) or csv with a column `caption`; None: four made-up ones
    top: int = 12                # how many concepts of each granularity, and sample captions, to show


def read_captions(path: str | Path) -> list[str]:
    """The non-empty captions of a txt file (one a line) or a csv file (column `caption`). Raises UserError."""
    path = Path(path)
    try:
        with open(path, encoding="utf-8", newline="") as file:
            if path.suffix.lower() == ".csv":
                reader = csv.DictReader(file)
                if "caption" not in (reader.fieldnames or []):
                    raise UserError(f"{path}: no column `caption`; the first line must be such as `video,caption`")
                captions = [row["caption"] or "" for row in reader]
            else:
                captions = file.read().splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a txt or csv file of captions") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error}); convert it first") from None
    captions = [caption for caption in captions if caption.strip()]
    if not captions:
        raise UserError(f"{path}: holds no captions; give a txt file with one a line, or a csv with a column `caption`")
    return captions


def show_captions(captions: list[str], top: int, min_count: int) -> None:
    captions = list(dict.fromkeys(captions))
    knowledge = extract_many(captions)
    vocab = ConceptVocab.build(knowledge, min_count=min_count)
    print(f"{len(captions)} distinct captions, {len(knowledge.names)} concepts, {len(vocab)} in the vocabulary")
    for granularity in GRANULARITIES:
        of_kind = [i for i, name in enumerate(vocab.names) if name.startswith(granularity + ":")]
        listed = ", ".join(f"{vocab.names[i].partition(':')[2]} {vocab.counts[i]}" for i in of_kind[:top])
        print(f"{granularity:>9} ({len(of_kind)}): {listed}")
    sets = vocab.encode_many(knowledge)
    samples = np.random.default_rng(0).permutation(len(captions))[:top]
    for query, rows, overlaps in zip(samples, *nearest_by_overlap(sets, vocab.idf, samples, 3)):
        print(f"\n{captions[query]}")
        for row, kappa in zip(rows[rows >= 0], overlaps):
            print(f"    {kappa:.2f}  {captions[row]}")


def main() -> None:
    config = parse_config(ConceptsConfig)
    if config.captions:
        show_captions(read_captions(config.captions), config.top, min_count=2)
    else:
        show_captions(DEMO, config.top, min_count=1)


if __name__ == "__main__":
    run(main)
