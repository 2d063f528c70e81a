"""Speed, memory and quality of the knowledge extraction.

    python -m bench.knowledge [--captions FILE]     # txt or csv; without one, captions are made up

Speed is given per distinct caption, as wall time with the processes that `extract_many` would start and as CPU time of
one process (which other work on the machine disturbs less). Quality is measured on the hand-labelled captions of
tests/knowledge_labels.jsonl: our own, and MSR-VTT's where its text lies in ../shared. """

import os
import platform
import random
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent

from tests import test_knowledge  # noqa: E402
from cli import parse_config, run  # noqa: E402
from knowledge import ConceptVocab, Knowledge, extract_many, meaning_ids, nearest_by_overlap, read_captions  # noqa: E402
from knowledge import extract_knowledge  # noqa: E402
from captions.tagger import load_tagger, tag_words, tokenize  # noqa: E402


@dataclass
class BenchConfig:
    """Benchmark of knowledge.py and concepts.py."""
    captions: str | None = None  # file of captions: txt (one a line) or csv with a column `caption`
    million: float = 2.5         # millions of captions on which the steps behind the tagger are timed; 0 = skip


def made_up_captions(count: int) -> list[str]:
    """Distinct captions from the words of our own labelled ones."""
    rng = random.Random(0)
    nouns, verbs = ([w for row in test_knowledge.LABELS for w in row[kind]] for kind in ("noun", "verb"))
    captions = {f"a {rng.choice(nouns)} with the {rng.choice(nouns)} {rng.choice(verbs)}s a {rng.choice(nouns)} "
                f"and {rng.choice(verbs)}s in front of two {rng.choice(nouns)}s": None for _ in range(count)}
    return list(captions)


def timed(function, *args, **options):
    """(result, wall seconds, CPU seconds of this process)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(*args, **options)
    return result, time.perf_counter() - wall, time.process_time() - cpu


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def speed(captions: list[str]) -> Knowledge:
    _, wall, _ = timed(load_tagger)
    print(f"loading the tagger                 {wall:8.2f} s")
    extract_knowledge("a dog chases a cat")  # loads the dictionary
    sample = random.Random(0).sample(captions, min(4000, len(captions)))
    words = [tokenize(caption) for caption in sample]
    nltk_tagger = load_tagger()
    _, _, cpu_nltk = timed(lambda: [nltk_tagger.tag(w) for w in words])
    _, _, cpu_ours = timed(lambda: [tag_words(nltk_tagger, w) for w in words])
    print(f"tags, NLTK's own loop              {1e3 * cpu_nltk / len(sample):8.3f} ms CPU a caption   1.00 x")
    print(f"tags, tag_words (the same tags)    {1e3 * cpu_ours / len(sample):8.3f} ms CPU a caption"
          f"   {cpu_ours / cpu_nltk:.2f} x")
    _, _, cpu = timed(lambda: [extract_knowledge(c) for c in sample])
    print(f"extract_knowledge, words unseen    {1e3 * cpu / len(sample):8.3f} ms CPU a caption")
    _, _, cpu = timed(lambda: [extract_knowledge(c) for c in sample])
    print(f"extract_knowledge, words seen      {1e3 * cpu / len(sample):8.3f} ms CPU a caption")
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)
    found, wall, cpu = timed(extract_many, captions, progress=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu += after.ru_utime + after.ru_stime - workers.ru_utime - workers.ru_stime
    print(f"extract_many, {len(captions):7,} distinct    {wall:8.2f} s wall = {len(captions) / wall:,.0f} captions/s; "
          f"CPU of all processes {cpu:.1f} s = {2 * len(captions) / cpu:,.0f} captions/s on 2 free cores")
    return found


def scale(found: Knowledge, count: int) -> None:
    """The steps behind the tagger on `count` captions, made by repeating the rows in random order."""
    before = peak_mib()
    rows = np.random.default_rng(0).integers(0, len(found.sets), count)
    many = Knowledge(found.names, found.sets.take(rows), np.arange(count))
    vocab, build, _ = timed(ConceptVocab.build, many)
    sets, encode, _ = timed(vocab.encode_many, many)
    _, meaning, _ = timed(meaning_ids, [""] * count, many)
    queries = range(100)
    _, nearest, _ = timed(nearest_by_overlap, sets, vocab.idf, queries, 10)
    print(f"{count:,} captions: vocabulary {build:.1f} s, encode_many {encode:.1f} s, meaning_ids {meaning:.1f} s, "
          f"nearest_by_overlap of 100 {nearest:.1f} s; {sets.ids.nbytes / 2**20:.0f} MiB of ids, "
          f"peak memory + {peak_mib() - before:.0f} MiB")


def quality() -> None:
    for split in ("own", "dev", "test"):
        try:
            items = test_knowledge.labelled(split)
        except test_knowledge.pytest.skip.Exception as skipped:
            print(f"{split:5} {skipped}")
            continue
        scores = test_knowledge.quality(items)
        print(f"{split:5} {len(items):4} captions   " + "   ".join(
            f"{name} P {100 * p:.1f} R {100 * r:.1f} F1 {100 * f1:.1f}" for name, (p, r, f1) in scores.items()))


def main() -> None:
    config = parse_config(BenchConfig)
    processor = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
                     platform.processor()) if Path("/proc/cpuinfo").exists() else platform.processor()
    print(f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores, {processor}, "
          f"Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}")
    captions = list(dict.fromkeys(read_captions(config.captions))) if config.captions else made_up_captions(20_000)
    found = speed(captions)
    if config.million:
        scale(found, int(config.million * 1e6))
    quality()


if __name__ == "__main__":
    run(main)
