"""What does each part of CLOP buy? Train every variant with every seed, compare them seed by seed.

    python -m bench.ablation                              # toy world, validation split, 5 seeds
    python -m bench.ablation --seeds 3 -- --steps 400     # after --: flags of train.py, for all
    python -m bench.ablation --variants "base all:beta=2" # with single fields changed: tuning
    python -m bench.ablation --split test                 # the same runs on the test split: once
    python -m bench.ablation --split test --eval="--task toy --data FOLDER"   # another toy world's
    python -m bench.ablation --table                      # only tables and plot, from the records

All variants share data, steps, batch size, learning rate and seeds. They differ in `VARIANTS` and
in nothing else. "base" is plain InfoNCE on random batches without masks, what everybody trains. The
same seed means the same batches wherever the sampling is the same. The seconds of a run are
recorded, since not every part is free.

Each run is `train.py`, then `eval.py` on its last checkpoint, as processes of their own. It ends as
one line of JSON in --results. A run that is already there (same settings of train.py, same split
and seed, any commit) is not done again. One that was killed goes on from its newest checkpoint. So
the same command continues. Seeds come before variants: an experiment that is stopped early holds
whole pairs.

On a small CPU two runs side by side, one thread each, get more done than one after the other with
two threads: a step of the toy model has many small products, and threads that wait for each other
are wasted (docs/LOG.md). So --jobs divides the cores.
"""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

from bench.paired import (
    append_run,
    by_seed,
    group_runs,
    markdown_tables,
    paired_differences,
    read_runs,
    replace_section,
)
from cli import UserError, parse_config, run
from datasets import toyworld
from train import TrainConfig
from training.checkpoint import list_checkpoints
from training.log import read_log

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "ablation.md"

# Every field of train.py that belongs to CLOP, off. A variant is what it switches on.
BASE = dict(
    skp_weight=0.0,
    beta=0.0,
    hard_k=0,
    hard_weight=0.0,
    guided_share=0.0,
    guided_from=0.0,
    group_size=4,  # says nothing without a guided share
    text_negatives=0.0,
    mask_false_negatives=False,
)
SKP = dict(skp_weight=0.5)
SAMPLING = dict(guided_share=1.0, guided_from=0.2, group_size=8)
TEXTS = dict(text_negatives=1.0)
MASKS = dict(mask_false_negatives=True)
WEIGHTING = dict(beta=1.0) | MASKS
MINING = dict(hard_k=64, hard_weight=0.25) | MASKS
VARIANTS = {
    "base": BASE,
    "skp": BASE | SKP,
    "sampling": BASE | SAMPLING,
    "texts": BASE | TEXTS,
    "masks": BASE | MASKS,
    "weighting": BASE | WEIGHTING,
    "mining": BASE | MINING,
    "kcl": BASE | SAMPLING | TEXTS | MASKS,
    "all": BASE | SKP | SAMPLING | TEXTS | MASKS,  # what train.py does without any flag
    "all+mining": BASE | SKP | SAMPLING | TEXTS | MINING,
}
OURS = {"out", "seed", "test"}  # fields of train.py that this script sets itself

HEADINGS = {
    "t2v_R@1": "t2v R@1",
    "t2v_R@5": "R@5",
    "t2v_R@10": "R@10",
    "t2v_MdR": "MdR",
    "v2t_R@1": "v2t R@1",
    "v2t_R@5": "R@5",
    "v2t_R@10": "R@10",
    "mc_accuracy": "multiple choice",
    "mc_accuracy_noun": "noun",
    "mc_accuracy_verb": "verb",
    "mc_accuracy_direction": "direction",
    "mc_accuracy_binding": "binding",
    "mc_accuracy_count": "count",
}


@dataclass
class AblationConfig:
    """Ablation of CLOP: every variant with every seed. What follows -- is handed to train.py."""

    variants: str = "base skp sampling weighting mining kcl all"  # or changed: NAME:field=value,…
    seeds: int = 5  # seeds 0 … n − 1
    split: Literal["val", "test"] = "val"  # what the last checkpoint is evaluated on
    eval: str = "--task toy"  # flags of eval.py that name the data
    jobs: int = 2  # runs side by side; they share the cores
    runs: str = "runs/ablation"  # gets a folder VARIANT-SEED for each run
    results: str = "bench/results/ablation.jsonl"  # a line for each run
    table: bool = False  # train nothing: print the tables, refresh docs/


def main():
    words, train_words = sys.argv[1:], []
    if "--" in words:
        place = words.index("--")
        words, train_words = words[:place], words[place + 1 :]
    config = parse_config(AblationConfig, words)
    if not config.table:
        run_all(config, train_words)
    print(make_tables(config.results))
    if config.table:
        refresh_page(config.results)


# ---- variants ------------------------------------------------------------------------------------


def variant_fields(name: str, variants: dict = VARIANTS) -> dict:
    """The fields of a variant: "all" or, with changes, "all:beta=2,guided_share=0.5"."""
    stem, _, changes = name.partition(":")
    if stem not in variants:
        choices = ", ".join(variants)
        raise UserError(f"--variants {name}: no such variant; take one of {choices}")
    changed = dict(variants[stem])
    for change in filter(None, changes.split(",")):
        field, _, text = change.partition("=")
        if field not in BASE:
            choices = ", ".join(BASE)
            raise UserError(f"--variants {name}: {field!r} is no field; take one of {choices}")
        changed[field] = read_value(text, like=BASE[field])
        if changed[field] is None:
            raise UserError(
                f"--variants {name}: {text!r} is no value of {field}; such as {BASE[field]}"
            )
    return changed


def read_value(text: str, like):
    """The number or truth value in `text`, of the type of `like`; None if it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if isinstance(like, float) and type(value) is int:
        return float(value)
    return value if type(value) is type(like) else None


class Plan(NamedTuple):
    """A run that is wanted."""

    variant: str
    config: TrainConfig
    flags: list[str]  # of train.py, that give this config


def plan_run(variant: str, seed: int, train_words: Sequence[str], runs: str) -> Plan:
    folder = re.sub(r"[^\w.,=+-]", "-", variant)
    flags = [*train_words, f"--seed={seed}", f"--out={runs}/{folder}-{seed}", "--no-test"]
    for name, value in variant_fields(variant).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags.append(f"--{flag}={value}")
    return Plan(variant, parse_config(TrainConfig, flags), flags)


def check_train_words(words: Sequence[str]) -> None:
    """Refuse flags that the variants or this script decide."""
    for word in words:
        flag = word.partition("=")[0]
        name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
        if flag.startswith("--") and name in BASE.keys() | OURS:
            raise UserError(
                f"{word}: not after --, since --variants, --seeds and --runs decide it "
                '(a variant with one change: --variants "all:beta=2")'
            )


def settings(train_config: dict) -> dict:
    """What must agree for two runs to be compared: all but the variant, the seed, the machine.

    A field that an older run did not know counts as its default.
    """
    ignored = BASE.keys() | OURS | TrainConfig.FREE
    compared = [field for field in fields(TrainConfig) if field.name not in ignored]
    return {field.name: train_config.get(field.name, field.default) for field in compared}


def is_recorded(plan: Plan, config: AblationConfig, records: list[dict]) -> bool:
    """Whether one of the records is of the planned run."""
    new = asdict(plan.config)
    wanted = [settings(new), plan.config.seed, config.split, config.eval]
    for record in records:
        old = BASE | record["config"]
        same_variant = all(old[name] == new[name] for name in BASE)
        run = [settings(old), record["seed"], record["split"], record["eval"]]
        if same_variant and run == wanted:
            return True
    return False


# ---- one run -------------------------------------------------------------------------------------

LIVE: set[subprocess.Popen] = set()  # what runs now


def call(command: Sequence[str], threads: int, log: Path) -> None:
    """Run a Python script to its end, its output in `log`. UserError with its last line."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, env=environment
        )
        LIVE.add(process)
        try:
            status = process.wait()
        finally:
            LIVE.discard(process)
    if status:
        last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
        raise UserError(f"{log}: {Path(command[0]).name} ended with status {status}: {last}")


def train_and_evaluate(plan: Plan, config: AblationConfig) -> dict:
    """One run as two processes; its line for the results."""
    out = Path(plan.config.out)
    out.mkdir(parents=True, exist_ok=True)
    threads = max(1, os.cpu_count() // config.jobs)
    log, folder = out / "output.txt", out / f"eval-{config.split}"
    call([str(ROOT / "train.py"), *plan.flags], threads, log)
    flags = dict(
        checkpoint=list_checkpoints(out)[-1],
        split=config.split,
        out=folder,
        cache=plan.config.cache,
    )
    words = [f"--{name}={value}" for name, value in flags.items()]
    call([str(ROOT / "eval.py"), *words, *config.eval.split()], threads, log)

    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    seconds, curve = read_curve(out / "log.jsonl")
    metrics = {name: x for name, x in found.items() if re.match("(t2v|v2t|mc)_", name)}
    facts = "videos questions checkpoint_sha256 commit hardware versions date".split()
    return dict(
        variant=plan.variant,
        seed=plan.config.seed,
        split=config.split,
        eval=config.eval,
        metrics={name: round(value, 4) for name, value in metrics.items()},
        curve=curve,
        seconds=round(seconds, 1),
        threads=threads,
        jobs=config.jobs,
        cores=os.cpu_count(),
        config={name: x for name, x in asdict(plan.config).items() if name not in ("out", "cache")},
        **{name: found[name] for name in facts},
    )


def read_curve(path: Path) -> tuple[float, list]:
    """(seconds of training, [[step, t2v R@1 on validation], …]), of an interrupted run too."""
    seconds, curve, last = 0.0, [], 0
    for line in read_log(path):
        if "config" in line:  # a start
            last = line["resumed_at"]
        elif "step_s" in line:
            seconds += (line["step"] - last) * line["step_s"]
            last = line["step"]
        elif "validation" in line:
            curve.append([line["step"], line["validation"]["t2v_R@1"]])
    return seconds, curve


# ---- all runs ------------------------------------------------------------------------------------


def run_all(config: AblationConfig, train_words: Sequence[str], run_one=train_and_evaluate) -> None:
    """Do every run that --results does not hold yet."""
    check_train_words(train_words)
    plans = []
    for seed in range(config.seeds):
        for variant in config.variants.split():
            plans.append(plan_run(variant, seed, train_words, config.runs))
    done = read_runs(config.results)
    todo = [plan for plan in plans if not is_recorded(plan, config, done)]
    print(f"{len(plans) - len(todo)} runs are in {config.results}, {len(todo)} to do", flush=True)

    # once, before several runs want it
    for cache in {plan.config.cache for plan in todo if plan.config.dataset == "toy"}:
        toyworld.generate(Path(cache) / "toy")

    started = time.perf_counter()
    signal_before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    pool = ThreadPoolExecutor(config.jobs)
    try:
        jobs = [pool.submit(run_one, plan, config) for plan in todo]
        for number, job in enumerate(as_completed(jobs), 1):
            record = job.result()
            append_run(config.results, record)
            left = (time.perf_counter() - started) / number * (len(todo) - number) / 60
            print(
                f"[{number}/{len(todo)}] {record['variant']} seed {record['seed']}: "
                f"t2v R@1 {record['metrics']['t2v_R@1']:.1f}; about {left:.0f} min left",
                flush=True,
            )
    finally:  # at any end: nothing is left running, and what was done is in the file
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(LIVE):
            process.terminate()
        signal.signal(signal.SIGTERM, signal_before)


# ---- what they say -------------------------------------------------------------------------------


def read_groups(results: str) -> list[list[dict]]:
    """The recorded runs, in groups of those that may be compared."""

    def what_agrees(record):
        return settings(record["config"]), record["split"], record["eval"]

    groups = group_runs(read_runs(results), what_agrees)
    if not groups:
        raise UserError(f"{results}: holds no runs yet; leave out --table to do them")
    return groups


def make_tables(results: str) -> str:
    """Markdown: what the runs of each group share, and its two tables."""
    texts = []
    for runs in read_groups(results):
        shown = {name: title for name, title in HEADINGS.items() if name in runs[0]["metrics"]}
        tables = markdown_tables(runs, shown, order_variants(runs))
        texts.append(f"{describe_group(runs)}\n\n{tables}")
    return "\n\n".join(texts)


def describe_group(runs: list[dict]) -> str:
    """One line: what all of these runs share."""
    first = runs[0]
    default = settings({})
    flags = []
    for name, value in sorted(settings(first["config"]).items()):
        if value != default[name]:
            flags.append(f"--{name.replace('_', '-')} {value}")
    seconds = [record["seconds"] for record in runs]
    commits = dict.fromkeys(record["commit"] for record in runs)
    return (
        f"{first['config']['steps']:,} steps of {first['config']['batch_size']} pairs, "
        f"{first['split']} split ({first['videos']:,} videos, {first['questions']:,} questions), "
        f"{' '.join(flags) or 'defaults'}; {statistics.fmean(seconds):.0f} s per run "
        f"({min(seconds):.0f}–{max(seconds):.0f}), {first['hardware']}, {first['jobs']} runs at a "
        f"time; commit {', '.join(commits)}"
    )


def order_variants(runs: list[dict], variants: dict = VARIANTS) -> list[str]:
    """The variants of these runs: those of `variants` in its order, then changed ones."""
    names = dict.fromkeys(record["variant"] for record in runs)
    changed = [name for name in names if name not in variants]
    return [name for name in variants if name in names] + changed


def refresh_page(results: str) -> None:
    """Put tables and plot into the section of docs/ablation.md that has the name of the file."""
    name = Path(results).stem
    picture = PAGE.with_name(f"{name}.png")
    draw_groups(read_groups(results), picture)
    text = f"{make_tables(results)}\n\n![Each seed of each variant]({picture.name})"
    replace_section(PAGE, name, text)
    print(f"\n{PAGE}, {picture}")


def draw_groups(groups: list[list[dict]], picture: Path) -> None:
    """A row for each group: two metrics of every run, and how recall grew with the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (13, 3.6 * len(groups))
    figure, axes = plt.subplots(len(groups), 3, figsize=size, layout="constrained", squeeze=False)
    for runs, (left, middle, right) in zip(groups, axes):
        wanted = ("t2v_R@1", "mc_accuracy", "t2v_R@10")
        metrics = [name for name in wanted if name in runs[0]["metrics"]]
        for axis, metric in zip((left, middle), metrics):
            draw_dots(axis, runs, metric)
        draw_curves(right, runs)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=100)
    plt.close(figure)


def draw_dots(axis, runs: list[dict], metric: str) -> None:
    """A dot for each seed, a bar at each variant's mean; the title says what `all` adds."""
    variants = order_variants(runs)
    for i, variant in enumerate(variants):
        values = list(by_seed(runs, variant, metric).values())
        axis.plot([i] * len(values), values, "o", color=f"C{i}", markersize=4, alpha=0.6)
        axis.hlines(statistics.fmean(values), i - 0.3, i + 0.3, color=f"C{i}", linewidth=2)

    title = f"{HEADINGS[metric]}, %"
    gained = paired_differences(runs, "all", "base", metric)
    if gained:
        title += f": all − base = {statistics.fmean(gained):+.1f}"
    axis.set(title=title)
    axis.set_xticks(range(len(variants)), variants, rotation=30, ha="right")


def draw_curves(axis, runs: list[dict]) -> None:
    """Recall on validation over the steps, each variant's mean over its seeds."""
    for i, variant in enumerate(order_variants(runs)):
        curves = [dict(record["curve"]) for record in runs if record["variant"] == variant]
        means = {}
        for step in sorted(set(curves[0]).intersection(*curves)):
            means[step] = statistics.fmean(curve[step] for curve in curves)
        steps, recall = list(means), list(means.values())
        axis.plot(steps, recall, ".-", color=f"C{i}", label=variant, linewidth=1.2)
    axis.set(title="t2v R@1 on validation, mean over seeds", xlabel="step")
    axis.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    run(main)
