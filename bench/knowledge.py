"""How fast and how well knowledge.py reads captions.

    python -m bench.knowledge                       # captions made up from labelled words
    python -m bench.knowledge --captions FILE       # your own: txt (one per line) or csv

Speed is per distinct caption: CPU time of one process (which other work on the machine disturbs
less), and wall time with all processes that `extract_many` starts.

Quality is precision, recall and F1 against labels that were written by hand,
tests/knowledge_labels.jsonl. Three sets of captions:

    own    written for this file; the text stands in it
    dev    275 captions of MSR-VTT, 45 of them chosen to be long, short or odd. The tagger's repairs
           were written on them; 180 only after they had been scored once as held-out captions.
    test   120 captions of MSR-VTT, drawn and labelled after the code was frozen

MSR-VTT's text carries no licence and is not copied. A line has a sentence's sen_id, the start of
its sha256 and our labels; the text is read from ../shared, where that is there. Rules of labelling:

noun      every noun, parts of compounds and names too, as its dictionary singular ("tennis ball":
          tennis, ball). Not pronouns ("someone"), colours, nor "front" of "in front of". "people"
          is person.
verb      every action or state in any form. Not be, have, do, modals, auxiliaries ("is going to",
          "gets hit"), nor participles before their noun ("a frying pan", "trained dogs").
relation  verb + the head of its object. Of a passive ("a tub filled with ice") the patient. Without
          an object, the head of the phrase right behind it. "a piece of paper" is paper. An object
          that several verbs share counts for each, a phrase only for the nearest.
optional  what two careful readers may see differently (titles, misspellings, -ing words that modify
          a noun). Not scored.

Labels hold what the text says. Words of the stop lists are taken out before scoring.
"""

import hashlib
import json
import os
import random
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from captions.relations import STOP_NOUNS, STOP_VERBS
from captions.tagger import load_tagger
from cli import parse_config, run
from eval import machine_facts
from knowledge import (
    ConceptVocab,
    Knowledge,
    extract_knowledge,
    extract_many,
    meaning_ids,
    read_captions,
)

ROOT = Path(__file__).parent.parent
LABELS = ROOT / "tests" / "knowledge_labels.jsonl"
MSRVTT = ROOT.parent / "shared" / "msrvtt_mini" / "MSRVTT_data.json"


@dataclass
class BenchConfig:
    """Speed and quality of the knowledge extraction."""

    captions: str | None = None  # file: txt (one per line), or csv with a column `caption`
    million: float = 2.5  # millions of captions for the steps after the tagger; 0 = skip


def main() -> None:
    config = parse_config(BenchConfig)
    print(f"{os.cpu_count()} cores, {machine_facts('cpu')['hardware']}")
    captions = read_captions(config.captions) if config.captions else made_up_captions(20_000)
    knowledge = measure_speed(captions)
    if config.million:
        measure_scale(knowledge, int(config.million * 1e6))

    for name in ("own", "dev", "test"):
        if name != "own" and not MSRVTT.exists():
            print(f"{name}: not scored, {MSRVTT.name} is not in ../shared")
            continue
        labelled = labelled_captions(name)
        print(f"{name}: {len(labelled)} captions")
        for granularity, (precision, recall, f1) in score(labelled).items():
            print(f"    {granularity:8} P {precision:.1%}  R {recall:.1%}  F1 {f1:.1%}")


# ---- quality -------------------------------------------------------------------------------------


def read_labels() -> list[dict]:
    return [json.loads(line) for line in LABELS.read_text(encoding="utf-8").splitlines()]


def labelled_captions(name: str) -> list[tuple[str, dict]]:
    """(caption, label) of the captions of a set. "dev" and "test" need MSR-VTT's text."""
    labels = [label for label in read_labels() if label["split"] == name]
    if name == "own":
        return [(label["caption"], label) for label in labels]

    sentences = json.loads(MSRVTT.read_text(encoding="utf-8"))["sentences"]
    text = {sentence["sen_id"]: sentence["caption"] for sentence in sentences}
    for label in labels:
        digest = hashlib.sha256(text[label["sen_id"]].encode()).hexdigest()
        assert digest.startswith(label["sha"]), f"{label['sen_id']}: not the labelled sentence"
    return [(text[label["sen_id"]], label) for label in labels]


LABELLED = ("noun", "verb", "relation")  # attributes are not


def score(labelled: list[tuple[str, dict]]) -> dict[str, tuple[float, float, float]]:
    """{granularity: (precision, recall, F1)}, each from 0 to 1."""
    scores = {}
    for granularity in LABELLED:
        num_right = num_found = num_wanted = 0
        for caption, label in labelled:
            optional = set(label.get("optional", []))
            wanted = {concept for concept in label[granularity] if is_kept(granularity, concept)}
            wanted -= optional
            found = set(extract_knowledge(caption)[granularity]) - optional
            num_right += len(wanted & found)
            num_found += len(found)
            num_wanted += len(wanted)
        f1 = 2 * num_right / (num_found + num_wanted)
        scores[granularity] = num_right / num_found, num_right / num_wanted, f1
    return scores


def is_kept(granularity: str, concept: str) -> bool:
    """Whether the stop lists let a labelled concept through."""
    words = concept.split(" ")
    has_stop_verb = granularity != "noun" and words[0] in STOP_VERBS
    has_stop_noun = granularity != "verb" and words[-1] in STOP_NOUNS
    return not has_stop_verb and not has_stop_noun


# ---- speed ---------------------------------------------------------------------------------------


def made_up_captions(count: int) -> list[str]:
    """Distinct captions from the words of our own labelled ones."""
    rng = random.Random(0)
    nouns = [word for label in read_labels() for word in label["noun"]]
    verbs = [word for label in read_labels() for word in label["verb"]]
    captions = []
    for _ in range(count):
        a, b, c, d = rng.choices(nouns, k=4)
        does, then = rng.choices(verbs, k=2)
        captions.append(f"a {a} with the {b} {does}s a {c} and {then}s in front of two {d}s")
    return list(dict.fromkeys(captions))


def measure_speed(captions: list[str]) -> Knowledge:
    """Print the time per caption; the knowledge of all."""
    started = time.perf_counter()
    load_tagger()
    print(f"loading the tagger: {time.perf_counter() - started:.2f} s")

    extract_knowledge("a dog chases a cat")  # loads the dictionary
    sample = random.Random(0).sample(captions, min(4000, len(captions)))
    started = time.process_time()
    for caption in sample:
        extract_knowledge(caption)
    milliseconds = 1000 * (time.process_time() - started) / len(sample)
    print(f"extract_knowledge: {milliseconds:.3f} ms CPU per caption")

    started, cpu = time.perf_counter(), cpu_seconds()
    knowledge = extract_many(captions, progress=False)
    wall = time.perf_counter() - started
    print(
        f"extract_many, {len(captions):,} distinct captions: {len(captions) / wall:,.0f} per "
        f"second of wall time, {len(captions) / (cpu_seconds() - cpu):,.0f} per CPU second"
    )
    return knowledge


def cpu_seconds() -> float:
    """CPU time of this process and of those that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measure_scale(knowledge: Knowledge, count: int) -> None:
    """Time what comes after the tagger on `count` captions: the given ones, repeated at random."""
    rows = np.random.default_rng(0).integers(0, len(knowledge), count)
    many = Knowledge(knowledge.names, knowledge.held[rows])
    ticks = [time.perf_counter()]
    vocab = ConceptVocab.build(many)
    ticks.append(time.perf_counter())
    held = vocab.encode(many)
    ticks.append(time.perf_counter())
    meaning_ids([""] * count, many)
    ticks.append(time.perf_counter())

    build, encode, meaning = np.diff(ticks)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    size = (held.data.nbytes + held.indices.nbytes + held.indptr.nbytes) / 2**20
    print(
        f"{count:,} captions: vocabulary {build:.1f} s, encode {encode:.1f} s ({size:.0f} MiB), "
        f"meaning_ids {meaning:.1f} s; peak memory of the process {peak:.0f} MiB"
    )


if __name__ == "__main__":
    run(main)
