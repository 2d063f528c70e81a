"""Caption → knowledge: nouns, verbs and verb-noun relations, a vocabulary of them, and how much two captions share.

"two dogs chase a ball" becomes

    {"noun": ["dog", "ball"], "verb": ["chase"], "relation": ["chase ball"]}

tagger.py says which words are nouns and verbs, and their dictionary forms; `GRANULARITIES` below says what is read off
such a sentence. A further granularity is one more entry there.

A *relation* is a verb with the noun it acts on, without the subject: "a dog chases a cat" is "chase cat" and "a cat
chases a dog" is "chase dog", although both hold the same nouns and verbs. This order is what makes the knowledge
structural. Exactly: the direct object; of a passive ("a cat is chased by a dog") the patient, "chase cat"; where there
is no object, the noun of the phrase right behind the verb ("jumps over a fence", "rides on a horse": "jump fence",
"ride horse"). Of a compound only the head counts ("hits a tennis ball": "hit ball"), coordinated objects give one
relation each.

A vocabulary keeps the K most frequent concepts of a corpus. With w_c the idf of concept c, the overlap of two captions
is the cosine of their weighted concept sets, a dot product of unit vectors (METHOD: κ, in [0, 1]):

    κ_ij = Σ_{c in both} w_c² / (‖w_i‖ ‖w_j‖),    ‖w_i‖² = Σ_{c in i} w_c²

Quality on 120 MSR-VTT captions that were labelled by hand after the code was frozen: F1 of nouns 97.6, verbs 95.4,
relations 91.7. Three fixes since (one, "leaves" is leaf, is an error seen there too) make it 97.8, 95.4, 92.6 (`python
bench/knowledge.py`; the guidelines of labelling are in tests/test_knowledge.py). What goes wrong: "a song plays" in a
clause behind another one (two nouns), -ing words that are parts of names ("baking powder" holds "bake"), misspelt
verbs, words that English runs together ("the womans head"), an object that two verbs share ("cuts and prepares the
vegetables": only the second), and verbs whose phrase does not follow them directly.

Simplified: English only, no parse tree, no synonyms, no coreference ("it" is nothing).

    python knowledge.py "two dogs chase a ball"     # words, tags, concepts
    python knowledge.py --captions captions.txt     # vocabulary with counts, nearest captions (txt, or csv: `caption`)
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

from cli import UserError, parse_config, run
from strings import Strings
from tagger import SUBORDINATORS, WEIGHTS_SHA256, Sentence, load_tagger, parse

# Words that say "this is a caption", only count, or stand for others: no concepts. Relations look through the nouns
# among them: "folds a piece of paper" is "fold paper".
STOP_NOUNS = frozenset("""video clip footage lot kind type sort bunch piece group pair way thing stuff something someone
    somebody anyone anything everyone everybody everything nothing nobody one other""".split())
STOP_VERBS = frozenset("be have do can will".split())


# ---------------------------------------------------------------------------------------------------------------------
# Sentence → concepts

def find_nouns(s: Sentence) -> list[str]:
    """Lemmas of all nouns, names and modifiers of compounds among them ("tennis ball": tennis, ball)."""
    nouns = (lemma for lemma, tag in zip(s.lemmas, s.tags) if tag[0] == "N")
    return [noun for noun in nouns if len(noun) > 1 and noun not in STOP_NOUNS]


def find_verbs(s: Sentence) -> list[str]:
    """Lemmas of all verbs that name an action or state, in any form; no auxiliaries."""
    return [s.lemmas[i] for i, tag in enumerate(s.tags) if tag[:2] == "VB" and not _is_auxiliary(s, i)]


def _is_auxiliary(s: Sentence, i: int) -> bool:
    lemma = s.lemmas[i]
    if lemma in STOP_VERBS or len(lemma) < 2:
        return True
    following = s.tags[i + 1] if i + 1 < len(s.tags) else ""
    if lemma == "get":  # "gets pinned"
        return following == "VBN"
    if s.words[i] == "going" and following == "TO":  # "is going to kiss"
        return i + 2 < len(s.tags) and s.tags[i + 2] == "VB"
    return False


def find_relations(s: Sentence) -> list[str]:
    """ "verb noun" pairs, as the module docstring defines them; both words are concepts of their own too."""
    chunks, pairs, patients = _chunk(s), [], []
    for c, (kind, i) in enumerate(chunks):
        if kind != "verb" or _is_auxiliary(s, i):
            continue
        if _is_passive(s, chunks, c, bool(patients)):
            patients = _subject_heads(s, chunks, c) or patients
            heads = patients
        else:
            patients, heads = [], _object_heads(s, chunks, c)
        nouns = [s.lemmas[head] for head in heads]
        pairs += [f"{s.lemmas[i]} {noun}" for noun in nouns if len(noun) > 1 and noun not in STOP_NOUNS]
    return pairs


# Every other tag is a "clause": it ends whatever it stands beside.
_KIND = {"PRP": "pronoun", "WP": "that", "EX": "pronoun", "IN": "prep", "TO": "prep", "RB": "adv", "RBR": "adv",
         "RBS": "adv", "RP": "adv", "CC": "and", ",": "and", "WDT": "that", "MD": "verb"}
_IN_NOUN_PHRASE = frozenset(["DT", "PDT", "PRP$", "CD", "JJ", "JJR", "JJS", "POS", "NN", "NNS", "NNP", "NNPS"])


def _chunk(s: Sentence) -> list[tuple[str, int]]:
    """(kind, index of its head word) of each chunk; noun phrases are one chunk, headed by their last noun.

    An "end" chunk pads the left, three pad the right, so that looking two or three chunks away needs no bounds check.
    """
    chunks, open_phrase = [("end", -1)], False
    for i, (word, tag) in enumerate(zip(s.words, s.tags)):
        if tag in _IN_NOUN_PHRASE:
            starts = tag in ("DT", "PDT", "PRP$", "CD") and chunks[-1][0] == "noun"  # "gives the dog | a bone"
            if not open_phrase or starts:
                chunks.append(("pronoun", i))  # until its noun comes: "this", "both"
            if tag[0] == "N":
                chunks[-1] = ("noun", i)
            open_phrase = True
            continue
        open_phrase = False
        kind = "verb" if tag[:2] == "VB" else _KIND.get(tag, "clause")
        kind = "that" if word == "that" else "clause" if word in SUBORDINATORS else kind
        chunks.append((kind, i))
    return chunks + [("end", -1)] * 3


def _is_passive(s: Sentence, chunks: list, c: int, after_passive: bool) -> bool:
    """Whether the verb at chunk c acts on what stands before it."""
    tag = s.tags[chunks[c][1]]
    if tag not in ("VBN", "VBD") or chunks[_skip(chunks, c + 1, "adv")][0] == "noun":
        return False
    left = c - 1
    while chunks[left][0] == "adv":
        left -= 1
    kind, i = chunks[left]
    if kind == "verb" and s.lemmas[i] in ("be", "get", "have"):
        return s.lemmas[i] != "have"  # "is chased" against "has chased"
    if kind == "and" and after_passive:  # "is sliced and put into a bowl"
        return True
    following = chunks[c + 1][1]
    return tag == "VBN" or (following >= 0 and s.words[following] == "by")  # "a tub filled with ice"


def _skip(chunks: list, c: int, *kinds: str) -> int:
    while chunks[c][0] in kinds:
        c += 1
    return c


def _coordinated(s: Sentence, chunks: list, c: int) -> tuple[list[int], int]:
    """Heads of the noun phrase at c and of those joined to it by "and" or commas, and the last of these chunks."""
    heads = []
    while True:
        while s.lemmas[chunks[c][1]] in STOP_NOUNS and s.words[chunks[c + 1][1]] == "of" and chunks[c + 2][0] == "noun":
            c += 2  # "a piece of paper" is paper
        heads.append(chunks[c][1])
        following = _skip(chunks, c + 1, "and")
        kind, verb = chunks[_skip(chunks, following + 1, "adv")]
        # "pets a dog and a cat runs away"; but in "wears a shirt and jeans is dancing" the jeans do not dance
        is_subject = kind == "verb" and (s.tags[chunks[following][1]], s.tags[verb]) != ("NNS", "VBZ")
        if following == c + 1 or chunks[following][0] != "noun" or is_subject:
            return heads, c
        c = following


def _object_heads(s: Sentence, chunks: list, c: int) -> list[int]:
    """Heads of what the active verb at chunk c acts on."""
    after = _skip(chunks, c + 1, "adv")
    if chunks[after][0] == "noun":
        heads, last = _coordinated(s, chunks, after)
        if chunks[last + 1][0] == "noun" and chunks[last + 2][0] != "verb":  # "gives the dog a bone"
            heads += _coordinated(s, chunks, last + 1)[0]
        return heads
    if chunks[after][0] == "pronoun":  # "shows you the ball"
        return _coordinated(s, chunks, after + 1)[0] if chunks[after + 1][0] == "noun" else []
    subject = c - 1
    while chunks[subject][0] == "adv" or (chunks[subject][0] == "verb" and _is_auxiliary(s, chunks[subject][1])):
        subject -= 1
    if chunks[subject][0] in ("noun", "pronoun"):  # "the ball that a dog chases", "the ball she throws"
        that = chunks[subject - 1][0] == "that"
        if chunks[subject - 1 - that][0] == "noun" and (that or chunks[subject][0] == "pronoun"):
            return [chunks[subject - 1 - that][1]]
    target = _skip(chunks, after, "prep", "adv")
    return _coordinated(s, chunks, target)[0] if target > after and chunks[target][0] == "noun" else []


def _subject_heads(s: Sentence, chunks: list, c: int) -> list[int]:
    """Heads of the subject of the passive verb at chunk c; of "a tub filled with ice": the tub."""
    j, finite = c - 1, False
    while chunks[j][0] in ("adv", "that") or (chunks[j][0] == "verb" and _is_auxiliary(s, chunks[j][1])):
        finite |= chunks[j][0] == "verb"
        j -= 1
    if chunks[j][0] != "noun":
        return []
    while chunks[j - 1][0] == "prep" and chunks[j - 2][0] == "noun":  # "a toy on a table is shown" is about the toy
        of = s.words[chunks[j - 1][1]] == "of"
        if not (finite or of) or (of and s.lemmas[chunks[j - 2][1]] in STOP_NOUNS):
            break
        j -= 2
    heads = [chunks[j][1]]
    while chunks[j - 1][0] == "and" and chunks[j - 2][0] == "noun" and chunks[j - 3][0] in ("end", "and", "clause"):
        j -= 2
        heads.insert(0, chunks[j][1])
    return heads


# Paper: "explicit structural representations … of several granularities" is all that the abstract says. Ours are these
# three; "adjective": lambda s: [w for w, tag in zip(s.words, s.tags) if tag[:2] == "JJ"] would make colours a fourth.
GRANULARITIES = {"noun": find_nouns, "verb": find_verbs, "relation": find_relations}


def extract_knowledge(caption: str) -> dict[str, list[str]]:
    """{"noun": [...], "verb": [...], "relation": ["verb noun", ...]}: distinct lemmas in order of appearance.

    A caption without letters has no concepts. Raises UserError where the tagger's weights are missing (`load_tagger`).
    """
    sentence = parse(caption)
    return {name: list(dict.fromkeys(find(sentence))) for name, find in GRANULARITIES.items()}


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
    digest = hashlib.sha256((here / "knowledge.py").read_bytes() + (here / "tagger.py").read_bytes())
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
    ln (p / (1 − p)) of the share p of captions that hold each, one caption with and one without added (never infinite).

    Paper: how concepts are weighted is not said. idf_c = ln((N + 1) / (counts_c + 1)) + 1: the smoothed inverse
    document frequency (Spärck Jones 1972, in the form of scikit-learn's TfidfTransformer): the rarer, the heavier, and
    no weight is zero. """

    def __init__(self, names: list[str], counts: np.ndarray, num_captions: int):
        assert len(names) == len(counts) == len(set(names)), (len(names), len(counts), len(set(names)))
        self.names, self.counts, self.num_captions = list(names), np.asarray(counts, np.int64), int(num_captions)
        self.idf = (np.log((self.num_captions + 1) / (self.counts + 1)) + 1).astype(np.float32)
        self.log_odds = np.log((self.counts + 1) / (self.num_captions - self.counts + 1)).astype(np.float32)
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
class KnowledgeConfig:
    """Show what knowledge a caption, or a file of captions, holds."""
    caption: str = "two dogs chase a ball"  # the caption to take apart
    captions: str | None = None             # file of captions instead: txt (one a line) or csv with a column `caption`
    top: int = 12                           # how many concepts of each granularity, and sample captions, to show


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


def show_caption(caption: str) -> None:
    sentence = parse(caption)
    print("  ".join(f"{word}/{tag}" for word, tag in zip(sentence.words, sentence.tags)))
    for granularity, lemmas in extract_knowledge(caption).items():
        print(f"{granularity:>9}: {', '.join(lemmas) or '-'}")


def show_file(path: str, top: int) -> None:
    captions = list(dict.fromkeys(read_captions(path)))
    knowledge = extract_many(captions)
    vocab = ConceptVocab.build(knowledge)
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
    config = parse_config(KnowledgeConfig, positional="caption")
    if config.captions:
        show_file(config.captions, config.top)
    else:
        show_caption(config.caption)


if __name__ == "__main__":
    run(main)
