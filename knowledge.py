"""Knowledge: what a caption says, and how much two captions share.

"two dogs chase a red ball" becomes

    noun: dog, ball    verb: chase    relation: chase ball    attribute: two dog, red ball
    patient: ball

captions/tagger.py says which words are nouns and verbs, and captions/relations.py which noun a verb
acts on. Each such piece is a *concept*: "noun:dog", "verb:chase", "relation:chase ball". What many
captions know is a sparse matrix `held` [captions, concepts], 1 where a caption holds a concept. Its
most frequent columns are the vocabulary: the K concepts that SKP predicts.

Concept c weighs w_c, its idf: the rarer, the heavier. The overlap κ of two captions is the cosine
of their weighted concept vectors, from 0 to 1:

    κ_ij = Σ_{c in both} w_c² / (‖w_i‖ ‖w_j‖),    ‖w_i‖² = Σ_{c in i} w_c²

With the idf of these four captions:

    a dog chases a cat      κ = 1.00   a cat is chased by a dog      the same: a false negative
                            κ = 0.41   a cat chases a dog            a hard negative: other roles
                            κ = 0.16   a dog sleeps

KCL can weigh negatives by κ. `meaning_ids` says which pairs are no negatives at all.

Simplified: English only, no parse tree, no synonyms, no coreference ("it" is nothing). How well it
reads captions: docs/results.md.

    python knowledge.py "two dogs chase a ball"     # words, tags, knowledge
    python knowledge.py --captions FILE.csv         # vocabulary, captions that share most
"""

import csv
import hashlib
import importlib.metadata
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from tqdm import tqdm
from tyro.conf import Positional

from captions.relations import STOP_NOUNS, find_relations, is_auxiliary
from captions.tagger import WEIGHTS_SHA256, Sentence, load_tagger, normalize, parse
from cli import UserError, parse_config, run, write_whole

# ---- one caption ---------------------------------------------------------------------------------


def find_nouns(s: Sentence) -> list[str]:
    """Lemmas of all nouns; of compounds, each ("tennis ball": tennis, ball)."""
    nouns = [lemma for lemma, tag in zip(s.lemmas, s.tags) if tag[0] == "N"]
    return [noun for noun in nouns if len(noun) > 1 and noun not in STOP_NOUNS]


def find_verbs(s: Sentence) -> list[str]:
    """Lemmas of all verbs that name an action or state, in any form; no auxiliaries."""
    verbs = [i for i, tag in enumerate(s.tags) if tag[:2] == "VB"]
    return [s.lemmas[i] for i in verbs if not is_auxiliary(s, i)]


def find_attributes(s: Sentence) -> list[str]:
    """The adjectives and numbers of each noun: "two big red balls" -> two, big and red ball."""
    pairs, waiting = [], []
    for i, (lemma, tag) in enumerate(zip(s.lemmas, s.tags)):
        if tag[:2] == "JJ" or tag == "CD":
            waiting.append(lemma)
        elif tag[0] == "N" and s.tags[i + 1 : i + 2] != ["NN"] and s.tags[i + 1 : i + 2] != ["NNS"]:
            if len(lemma) > 1 and lemma not in STOP_NOUNS:
                pairs += [f"{word} {lemma}" for word in waiting]
            waiting = []
        elif tag[0] != "N" and tag not in ("CC", ","):
            waiting = []  # "is red": of no noun behind it
    return pairs


def find_patients(s: Sentence) -> list[str]:
    """The nouns of all relations: to whom it is done, whatever it is.

    "chase ball" is rare, and a model sees few videos of it. "Something is done to a ball" is
    frequent, and tells as well who does it to whom (docs/LOG.md).
    """
    return [relation.partition(" ")[2] for relation in find_relations(s)]


# Paper: "explicit structural representations … of several granularities" is all that the abstract
# says. Ours are these five. Another one is one more entry.
GRANULARITIES = {
    "noun": find_nouns,
    "verb": find_verbs,
    "relation": find_relations,
    "attribute": find_attributes,
    "patient": find_patients,
}


def extract_knowledge(caption: str) -> dict[str, list[str]]:
    """{"noun": […], "verb": […], "relation": ["verb noun", …], …}: each lemma once, in order.

    A caption without letters has no concepts. Raises UserError where the tagger's weights are
    missing (`load_tagger`).
    """
    sentence = parse(caption)
    return {name: list(dict.fromkeys(find(sentence))) for name, find in GRANULARITIES.items()}


def concept_names(caption: str) -> list[str]:
    """["noun:dog", "verb:chase", "relation:chase cat"]"""
    names = []
    for kind, lemmas in extract_knowledge(caption).items():
        names += [f"{kind}:{lemma}" for lemma in lemmas]
    return names


# ---- many captions -------------------------------------------------------------------------------


@dataclass
class Knowledge:
    """What N captions know."""

    names: list[str]  # of all concepts: "noun:dog", …
    held: csr_array  # float32 [N, len(names)], 1 where a caption holds a concept

    def __len__(self) -> int:
        return self.held.shape[0]

    def concepts_of(self, i: int) -> list[str]:
        first, last = self.held.indptr[i : i + 2]
        return [self.names[c] for c in self.held.indices[first:last]]


def extract_many(
    captions: list[str],
    *,
    workers: int | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Knowledge:
    """The knowledge of all captions. Each distinct one is tagged once.

    workers: processes; default: one per core, and small jobs stay in this one. cache: a folder,
    which gets a file for each set of captions and version of this code. Raises UserError where the
    tagger's weights are missing, a process dies, or the cache cannot be written.
    """
    distinct = list(dict.fromkeys(captions))
    path = Path(cache) / f"{cache_key(distinct)}.npz" if cache else None
    found = read_cache(path) if path and path.exists() else None
    if found is None:
        found = pack(tag_all(distinct, workers, progress))
        if path:
            write_cache(path, found)

    row = {caption: i for i, caption in enumerate(distinct)}
    return Knowledge(found.names, found.held[[row[caption] for caption in captions]])


def pack(names_of_caption: Iterable[list[str]]) -> Knowledge:
    """From one list of concept names per caption."""
    number: dict[str, int] = {}
    columns, ends = [], [0]
    for names in names_of_caption:
        columns += [number.setdefault(name, len(number)) for name in names]
        ends.append(len(columns))
    return make_knowledge(list(number), columns, ends)


def make_knowledge(names: list[str], columns, ends) -> Knowledge:
    ones = np.ones(len(columns), np.float32)
    return Knowledge(names, csr_array((ones, columns, ends), shape=(len(ends) - 1, len(names))))


def tag_all(captions: list[str], workers: int | None, progress: bool) -> Iterable[list[str]]:
    """`concept_names` of each caption, by several processes."""
    load_tagger()  # before the workers start: its errors come once, and forked workers share it
    # a start costs as much as 2,000 captions
    workers = min(workers or os.cpu_count(), len(captions) // 2000)
    bar = dict(total=len(captions), desc="knowledge", disable=not progress or len(captions) < 500)
    if workers < 2:
        yield from tqdm(map(concept_names, captions), **bar)
        return

    # fork shares the loaded tagger; elsewhere it is unsafe (macOS) or missing (Windows)
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    try:
        with ProcessPoolExecutor(workers, context) as pool:
            yield from tqdm(pool.map(concept_names, captions, chunksize=500), **bar)
    except BrokenProcessPool as error:
        raise UserError(
            f"knowledge of {len(captions)} captions: a tagging process died (out of memory?); "
            "run the same command again, with fewer --workers"
        ) from error


def cache_key(captions: list[str]) -> str:
    """Hash of all that the result depends on: this code, the tagger, the captions."""
    here = Path(__file__).parent
    code = [here / "knowledge.py", here / "captions/tagger.py", here / "captions/relations.py"]
    versions = [importlib.metadata.version(name) for name in ("nltk", "lemminflect")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in code))
    for text in [WEIGHTS_SHA256, *versions, *GRANULARITIES, *captions]:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()[:40]


def write_cache(path: Path, knowledge: Knowledge) -> None:
    names = np.frombuffer("\n".join(knowledge.names).encode(), np.uint8)
    with write_whole(path) as unfinished, open(unfinished, "wb") as file:
        np.savez(file, names=names, columns=knowledge.held.indices, ends=knowledge.held.indptr)


def read_cache(path: Path) -> Knowledge | None:
    """What `write_cache` wrote. Where the file is damaged: a line that says so, and None."""
    try:
        with np.load(path) as saved:  # a zip file: every array carries a checksum
            names = saved["names"].tobytes().decode().split("\n")
            return make_knowledge(names, saved["columns"], saved["ends"])
    except Exception as error:  # a damaged zip file raises nearly anything
        what = type(error).__name__
        print(f"{path}: damaged knowledge cache ({what}); extracting again", file=sys.stderr)
        return None


# ---- vocabulary and overlap ----------------------------------------------------------------------


class ConceptVocab:
    """The K most frequent concepts of a corpus.

    names     ["noun:dog", …], by granularity, in each the most frequent first
    counts    int64 [K], how many of the num_captions captions hold each
    idf       float32 [K]
    word_idf  float32 [K], idf of nouns and verbs, 0 for the pairs that they are in
    log_odds  float32 [K], ln (p / (1 − p)), where the share p of captions hold a concept; with one
              more caption on either side, so that it is never infinite

    Paper: how concepts are weighted is not said. idf_c = ln((N + 1) / (counts_c + 1)) + 1, the
    smoothed inverse document frequency of scikit-learn: the rarer, the heavier; none is zero.
    """

    def __init__(self, names: list[str], counts: np.ndarray, num_captions: int):
        assert len(names) == len(counts) == len(set(names)), (len(names), len(counts))
        self.names, self.counts = list(names), np.asarray(counts, np.int64)
        self.num_captions = int(num_captions)
        without = self.num_captions - self.counts
        self.log_odds = np.log((self.counts + 1) / (without + 1)).astype(np.float32)
        self.idf = (np.log((self.num_captions + 1) / (self.counts + 1)) + 1).astype(np.float32)
        is_word = [name.startswith(("noun:", "verb:")) for name in names]
        self.word_idf = np.where(is_word, self.idf, np.float32(0))

    @classmethod
    def build(cls, knowledge: Knowledge, *, min_count=2, max_size=4096) -> "ConceptVocab":
        """The `max_size` most frequent concepts that at least `min_count` captions hold."""
        counts = np.bincount(knowledge.held.indices, minlength=len(knowledge.names))
        kept = np.flatnonzero(counts >= min_count).tolist()
        kept.sort(key=lambda c: (-counts[c], knowledge.names[c]))  # ties go to the alphabet
        kept = kept[:max_size]

        order = list(GRANULARITIES)
        kept.sort(key=lambda c: order.index(knowledge.names[c].partition(":")[0]))
        return cls([knowledge.names[c] for c in kept], counts[kept], len(knowledge))

    def __len__(self) -> int:
        return len(self.names)

    def encode(self, knowledge: Knowledge) -> csr_array:
        """[N, K] float32: 1 where a caption holds a concept of the vocabulary."""
        number = {name: k for k, name in enumerate(self.names)}
        known = [c for c, name in enumerate(knowledge.names) if name in number]
        column = np.array([number[knowledge.names[c]] for c in known], np.int32)
        held = knowledge.held[:, known]
        shape = (len(knowledge), len(self))
        encoded = csr_array((held.data, column[held.indices], held.indptr), shape=shape)
        encoded.sort_indices()
        return encoded

    def to_dict(self) -> dict:
        """JSON-able, for the checkpoint."""
        counts = self.counts.tolist()
        return {"names": self.names, "counts": counts, "num_captions": self.num_captions}

    @classmethod
    def from_dict(cls, saved: dict) -> "ConceptVocab":
        return cls(saved["names"], np.array(saved["counts"], np.int64), saved["num_captions"])


def concept_vectors(concepts: torch.Tensor, idf: torch.Tensor) -> torch.Tensor:
    """[B, K] multi-hot, [K] -> [B, K] unit rows whose dot products are κ; zero without concepts."""
    return F.normalize(concepts * idf, dim=1)  # x / max(‖x‖, eps): zero rows stay zero


def unit_rows(held: csr_array, idf: np.ndarray) -> csr_array:
    """The same for sparse [N, K]."""
    weighted = held.multiply(idf).tocsr()
    length = np.sqrt(weighted.multiply(weighted).sum(axis=1))
    return weighted.multiply(1 / np.maximum(length, 1e-9)[:, None]).tocsr()


def meaning_ids(captions: list[str], knowledge: Knowledge) -> np.ndarray:
    """int64 [N], equal exactly for captions that must not be each other's negatives.

    These are captions of the same knowledge (all of it, not only what the vocabulary keeps). Where
    there is none, of the same text up to case, blanks and punctuation. The id is a 64-bit hash, the
    same in every run and on every rank. That any two of 2.5 million captions collide has the
    probability 2e-7.
    """
    assert len(captions) == len(knowledge), (len(captions), len(knowledge))
    ids = np.empty(len(captions), np.int64)
    for i, caption in enumerate(captions):
        key = "\n".join(sorted(knowledge.concepts_of(i)))
        if not key:
            text = normalize(caption).lower()
            key = "text " + " ".join(re.findall(r"\w+", text) or text.split())
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        ids[i] = int.from_bytes(digest, "little", signed=True)
    return ids


# ---- command line --------------------------------------------------------------------------------


@dataclass
class KnowledgeConfig:
    """Show what a caption knows, or what a file of captions does."""

    caption: Positional[tuple[str, ...]] = ("two", "dogs", "chase", "a", "ball")  # to take apart
    captions: str | None = None  # file instead: txt (one per line), or csv with a column `caption`
    top: int = 12  # how many concepts of each granularity, and sample captions, to show


def read_captions(path: str | Path) -> list[str]:
    """The distinct captions of a txt file (one per line) or a csv file (column `caption`)."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            if Path(path).suffix.lower() == ".csv":
                captions = [row["caption"] or "" for row in csv.DictReader(file)]
            else:
                captions = file.read().splitlines()
        captions = list(dict.fromkeys(caption for caption in captions if caption.strip()))
        if not captions:
            raise ValueError("it is empty")
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise UserError(
            f"{path}: no captions found ({type(error).__name__}: {error}); expected is text in "
            "UTF-8 with one caption per line, or a csv file with a column `caption`"
        ) from error
    return captions


def show_captions(captions: list[str], top: int) -> None:
    """The vocabulary's most frequent concepts, and the nearest captions of some."""
    knowledge = extract_many(captions)
    vocab = ConceptVocab.build(knowledge)
    print(f"{len(captions)} captions, {len(knowledge.names)} concepts, {len(vocab)} in vocabulary")
    for kind in GRANULARITIES:
        of_kind = [k for k, name in enumerate(vocab.names) if name.startswith(f"{kind}:")]
        listed = [f"{vocab.names[k].partition(':')[2]} {vocab.counts[k]}" for k in of_kind[:top]]
        print(f"{kind:>9} ({len(of_kind)}): {', '.join(listed)}")

    unit = unit_rows(vocab.encode(knowledge), vocab.idf)
    for query in np.random.default_rng(0).permutation(len(captions))[:top]:
        overlap = (unit @ unit[[query]].T).toarray()[:, 0]  # κ to all, [N]
        overlap[query] = 0
        print(f"\n{captions[query]}")
        for other in np.argsort(-overlap, kind="stable")[:3]:
            print(f"    {overlap[other]:.2f}  {captions[other]}")


def main() -> None:
    config = parse_config(KnowledgeConfig)
    if config.captions:
        return show_captions(read_captions(config.captions), config.top)
    caption = " ".join(config.caption)
    sentence = parse(caption)
    print("  ".join(f"{word}/{tag}" for word, tag in zip(sentence.words, sentence.tags)))
    for granularity, lemmas in extract_knowledge(caption).items():
        print(f"{granularity:>9}: {', '.join(lemmas) or '-'}")


if __name__ == "__main__":
    run(main)
