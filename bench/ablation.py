"""What does each part of CLOP buy? Train every variant with every seed, compare them seed by seed.

    python -m bench.ablation                                   # toy world, validation split, 5 seeds
    python -m bench.ablation --seeds 3 -- --steps 400          # behind --: flags of train.py, for all variants
    python -m bench.ablation --variants "base all all:beta=2"  # tuning: a variant with single fields changed
    python -m bench.ablation --split test                      # the same runs on the test split: touch it once
    python -m bench.ablation --table                           # only tables and plot, from the file of results

All variants share data, steps, batch size, learning rate and seeds: they differ in `VARIANTS` and in nothing else.
"base" is plain InfoNCE on random batches without masks, what everybody trains. The same seed means the same batches
wherever the sampling is the same; the seconds of a run are recorded, since not every part is free.

Each run is `train.py`, then `eval.py` on its last checkpoint, as processes of their own, and ends as one line of JSON
in --results. A run that is already there (same settings of train.py, split and seed, whatever the commit) is not done
again, and one that was killed goes on from its newest checkpoint: the same command continues. Seeds come before
variants, so that an experiment that is stopped early holds whole pairs.

On a small CPU two runs side by side, one thread each, get more done than one after the other with two threads: a step
of the toy model has many small products, and threads that wait for each other are wasted (LOG.md). So --jobs divides
the cores.
"""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent

from datasets import toyworld  # noqa: E402
from bench.paired import (append_run, by_seed, group_runs, markdown_tables, paired_differences,  # noqa: E402
                          read_runs, replace_section)
from training.checkpoint import newest_checkpoint  # noqa: E402
from cli import UserError, parse_config, run  # noqa: E402
from train import TrainConfig  # noqa: E402

# Every field of train.py that belongs to CLOP, off (without a guided share group_size says nothing). A variant is what
# it switches on.
BASE = dict(skp_weight=0.0, beta=0.0, hard_k=0, hard_weight=0.0, guided_share=0.0, guided_from=0.0, group_size=4,
            mask_false_negatives=False)
SKP = dict(skp_weight=0.5)
SAMPLING = dict(guided_share=0.5, guided_from=0.6)
WEIGHTING = dict(beta=1.0, mask_false_negatives=True)
MINING = dict(hard_k=64, hard_weight=0.25, mask_false_negatives=True)
VARIANTS = {
    "base": BASE,
    "skp": BASE | SKP,
    "sampling": BASE | SAMPLING,
    "masks": BASE | dict(mask_false_negatives=True),
    "weighting": BASE | WEIGHTING,
    "mining": BASE | MINING,
    "kcl": BASE | SAMPLING | WEIGHTING,
    "all": BASE | SKP | SAMPLING | WEIGHTING,  # what train.py does without any flag
    "all+mining": BASE | SKP | SAMPLING | WEIGHTING | MINING,
}
OURS = ("out", "seed", "test")  # fields of train.py that this script sets itself
HEADINGS = {"t2v_R@1": "t2v R@1", "t2v_R@5": "R@5", "t2v_R@10": "R@10", "t2v_MdR": "MdR", "v2t_R@1": "v2t R@1",
            "v2t_R@5": "R@5", "v2t_R@10": "R@10", "mc_accuracy": "multiple choice", "mc_accuracy_noun": "noun",
            "mc_accuracy_verb": "verb", "mc_accuracy_direction": "direction"}


@dataclass
class AblationConfig:
    """Ablation of CLOP: every variant with every seed. What follows -- is handed to train.py."""

    variants: str = "base skp sampling weighting mining kcl all"  # of VARIANTS, or changed: NAME:field=value,…
    seeds: int = 5                              # seeds 0 … n − 1
    split: Literal["val", "test"] = "val"       # what the last checkpoint is evaluated on
    eval: str = "--task toy"                    # flags of eval.py that name the data
    jobs: int = 2                               # runs side by side; they share the cores
    runs: str = "runs/ablation"                 # a folder VARIANT-SEED for each run
    results: str = "bench/results/ablation.jsonl"     # a line for each run
    table: bool = False                         # train nothing: print the tables, refresh docs/


def main():
    split_at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    config = parse_config(AblationConfig, sys.argv[1:split_at])
    if not config.table:
        run_all(config, sys.argv[split_at + 1:])
    print_tables(config.results, refresh=config.table)


# ---- which runs ------------------------------------------------------------------------------------------------------


def variant_fields(name: str, variants: dict = VARIANTS) -> dict:
    """The fields of TrainConfig that make a variant: "all" or, with changes, "all:beta=2,guided_share=0.5"."""
    stem, _, changes = name.partition(":")
    if stem not in variants:
        raise UserError(f"--variants {name}: no such variant; one of {', '.join(variants)}")
    made = dict(variants[stem])
    for change in filter(None, changes.split(",")):
        field, _, value = change.partition("=")
        if field not in BASE:
            raise UserError(f"--variants {name}: {field!r} is no field of a variant; one of {', '.join(BASE)}")
        try:
            made[field] = {"true": True, "false": False}[value] if field == "mask_false_negatives" \
                else type(BASE[field])(value)
        except (ValueError, KeyError):
            raise UserError(f"--variants {name}: {value!r} is no value of {field}; such as {BASE[field]}") from None
    return made


def train_flags(variant: str, seed: int, extra: list[str], out: Path) -> list[str]:
    """The command line of train.py for one run."""
    flags = [*extra, f"--seed={seed}", f"--out={out}", "--no-test"]
    for name, value in variant_fields(variant).items():
        name = name.replace("_", "-")
        flags.append(f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}")
    return flags


def check_extra(extra: list[str]):
    """Refuse flags that the variants decide."""
    for word in extra:
        name = re.sub(r"^--(no-)?", "", word.partition("=")[0]).replace("-", "_")
        if word.startswith("--") and name in (*BASE, *OURS):
            raise UserError(f"{word}: not behind --: the variants, --seeds and --runs decide it "
                            "(a variant with one change: --variants \"all:beta=2\")")


def settings(train_config: dict) -> dict:
    """What must agree for two runs to be compared: all of TrainConfig but the variant, the seed and the machine.

    A field that an older run did not know counts as its default.
    """
    return {field.name: train_config.get(field.name, field.default) for field in fields(TrainConfig)
            if field.name not in (*BASE, *OURS, *TrainConfig.FREE)}


def is_same(record: dict, train_config: dict, config: AblationConfig) -> bool:
    """Whether a record is of the run that would be started with these settings."""
    theirs = record["config"]
    return (settings(theirs) == settings(train_config) and record["seed"] == train_config["seed"]
            and record["split"] == config.split and record["eval"] == config.eval
            and all(theirs.get(name, off) == train_config[name] for name, off in BASE.items()))


# ---- run them --------------------------------------------------------------------------------------------------------


def run_all(config: AblationConfig, extra: list[str], run_one=None):
    """Do every run that --results does not hold yet; `run_one` (default: `train_and_evaluate`) does one."""
    check_extra(extra)
    variants, done = config.variants.split(), read_runs(config.results)
    todo = []
    for seed in range(config.seeds):
        for variant in variants:
            out = Path(config.runs) / f"{re.sub('[^A-Za-z0-9.,=_+-]', '-', variant)}-{seed}"
            train_config = asdict(parse_config(TrainConfig, train_flags(variant, seed, extra, out)))
            if not any(is_same(record, train_config, config) for record in done):
                todo.append((variant, train_config, train_flags(variant, seed, extra, out)))
    print(f"{len(variants)} variants × {config.seeds} seeds: {len(variants) * config.seeds - len(todo)} runs are in "
          f"{config.results}, {len(todo)} to do, {config.jobs} at a time", flush=True)
    for cache in {train_config["cache"] for _, train_config, _ in todo if train_config["dataset"] == "toy"}:
        toyworld.generate(Path(cache) / "toy")  # once, before several runs want it
    started, signal_before = time.perf_counter(), signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    pool = ThreadPoolExecutor(config.jobs)
    try:
        jobs = [pool.submit(run_one or train_and_evaluate, variant, train_config, flags, config)
                for variant, train_config, flags in todo]
        for number, job in enumerate(as_completed(jobs), 1):
            record = job.result()
            append_run(config.results, record)
            left = (time.perf_counter() - started) / number * (len(todo) - number) / 60
            print(f"[{number}/{len(todo)}] {record['variant']} seed {record['seed']}: "
                  f"{describe(record['metrics'])}, {record['seconds']:.0f} s; about {left:.0f} min left", flush=True)
    finally:  # however it ends: nothing is left running, and what was done is in the file
        pool.shutdown(wait=False, cancel_futures=True)
        for process in LIVE:
            process.terminate()
        signal.signal(signal.SIGTERM, signal_before)


def describe(metrics: dict) -> str:
    return ", ".join(f"{HEADINGS[name]} {metrics[name]:.1f}" for name in ("t2v_R@1", "mc_accuracy") if name in metrics)


LIVE: set[subprocess.Popen] = set()


def call(command: list[str], threads: int, log: Path):
    """Run a Python script to its end, its output in `log`; UserError with its last line where it fails."""
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT,
                                   env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        LIVE.add(process)
        try:
            status = process.wait()
        finally:
            LIVE.discard(process)
    if status:
        last = [*log.read_text(encoding="utf-8", errors="replace").split("\n"), ""]
        raise UserError(f"{log}: {Path(command[0]).name} ended with status {status}: "
                        f"{next((line for line in reversed(last) if line.strip()), '')}")


def train_and_evaluate(variant: str, train_config: dict, flags: list[str], config: AblationConfig) -> dict:
    """One run as two processes; its line for the results."""
    out, threads = Path(train_config["out"]), max(1, (os.cpu_count() or 1) // config.jobs)
    out.mkdir(parents=True, exist_ok=True)
    call([str(ROOT / "train.py"), *flags], threads, out / "output.txt")
    folder = out / f"eval-{config.split}"
    call([str(ROOT / "eval.py"), f"--checkpoint={newest_checkpoint(out)}", f"--split={config.split}", f"--out={folder}",
          f"--cache={train_config['cache']}", *config.eval.split()], threads, out / "output.txt")
    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    seconds, curve = read_log(out / "log.jsonl")
    return dict(variant=variant, seed=train_config["seed"], split=config.split, eval=config.eval,
                metrics={name: round(value, 4) for name, value in found.items() if re.match("(t2v|v2t|mc)_", name)},
                curve=curve, seconds=round(seconds, 1), threads=threads, jobs=config.jobs, cores=os.cpu_count(),
                config=train_config, videos=found["videos"], questions=found["questions"],
                checkpoint_sha256=found["checkpoint_sha256"],
                **{name: found[name] for name in ("commit", "hardware", "versions", "date")})


def read_log(path: Path) -> tuple[float, list]:
    """(seconds of training, [[step, t2v R@1 on validation], …]) of a run, also of one that was interrupted."""
    seconds, curve, last = {}, {}, 0
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        if "config" in line:
            last = line["resumed_at"]
        if "step_s" in line:
            seconds[line["step"]] = (line["step"] - last) * line["step_s"]
            last = line["step"]
        if "validation" in line:
            curve[line["step"]] = line["validation"]["t2v_R@1"]
    return sum(seconds.values()), sorted(curve.items())


# ---- what they say ---------------------------------------------------------------------------------------------------


def order_variants(runs: list[dict], variants: dict = VARIANTS) -> list[str]:
    """The variants of these runs: those of `variants` in its order, then changed ones as they came."""
    names = dict.fromkeys(record["variant"] for record in runs)
    return [name for name in variants if name in names] + [name for name in names if name not in variants]


def describe_group(runs: list[dict]) -> str:
    """One line: what all of these runs share."""
    first, commits = runs[0], dict.fromkeys(record["commit"] for record in runs)
    shared = settings(first["config"])
    changed = [f"--{field.name.replace('_', '-')} {shared[field.name]}" for field in fields(TrainConfig)
               if field.name in shared and shared[field.name] != field.default]
    seconds = [record["seconds"] for record in runs]
    return (f"{first['config']['steps']:,} steps of {first['config']['batch_size']} pairs, {first['split']} split "
            f"({first['videos']:,} videos, {first['questions']:,} questions), {' '.join(changed) or 'defaults'}; "
            f"{statistics.fmean(seconds):.0f} s a run ({min(seconds):.0f}–{max(seconds):.0f}), {first['hardware']}, "
            f"{first['jobs']} runs at a time; commit {', '.join(commits)}")


def print_tables(results: str, refresh: bool = False):
    """Tables of all groups to stdout; refresh: also into docs/ablation.md, with a plot, in the section of this file."""
    groups = group_runs(read_runs(results), lambda run: [settings(run["config"]), run["split"], run["eval"]])
    if not groups:
        raise UserError(f"{results}: holds no runs yet; leave out --table to do them")
    texts = []
    for runs in groups:
        headings = {name: heading for name, heading in HEADINGS.items() if name in runs[0]["metrics"]}
        tables = markdown_tables(runs, headings, order_variants(runs), pairs=(("all", "skp"), ("all", "kcl")))
        texts.append(f"{describe_group(runs)}\n\n{tables}")
    print("\n" + "\n\n".join(texts))
    if refresh:
        page, picture = ROOT / "docs" / "ablation.md", ROOT / "docs" / f"{Path(results).stem}.png"
        replace_section(page, Path(results).stem.replace("_", " "),
                        "\n\n".join(texts) + f"\n\n![Each seed of each variant]({picture.name})")
        draw_groups(groups, picture)
        print(f"\n{page}, {picture}")


def draw_groups(groups: list[list[dict]], picture: Path):
    """A row for each group: two metrics, a dot a run and a bar at the mean, and how recall grew with the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(groups), 3, figsize=(13, 3.6 * len(groups)), layout="constrained", squeeze=False)
    for runs, row in zip(groups, axes):
        variants = order_variants(runs)
        shown = [name for name in ("t2v_R@1", "mc_accuracy", "t2v_R@10") if name in runs[0]["metrics"]]
        for axis, metric in zip(row, shown[:2]):
            draw_dots(axis, runs, variants, metric)
        if not any(record["curve"] for record in runs):  # no validation split
            row[2].set_axis_off()
            continue
        for number, variant in enumerate(variants):
            curves = [dict(record["curve"]) for record in runs if record["variant"] == variant]
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            row[2].plot(steps, [statistics.fmean(curve[step] for curve in curves) for step in steps],
                        color=f"C{number}", label=variant, marker="o", markersize=3, linewidth=1.2)
        row[2].set(title="t2v R@1 on validation, mean over seeds", xlabel="step")
        row[2].legend(frameon=False, fontsize=8)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=100)
    plt.close(figure)


def draw_dots(axis, runs: list[dict], variants: list[str], metric: str):
    """A dot for each seed, a bar at each variant's mean; the title says what `all` is against `base`."""
    for number, variant in enumerate(variants):
        values = list(by_seed(runs, variant, metric).values())
        if values:
            axis.plot([number] * len(values), values, "o", color=f"C{number}", markersize=4, alpha=0.6)
            axis.hlines(statistics.fmean(values), number - 0.3, number + 0.3, color=f"C{number}", linewidth=2)
    gained = paired_differences(runs, "all", "base", metric)
    said = f": all − base = {statistics.fmean(gained):+.1f}" if gained else ""
    axis.set(title=f"{'multiple choice' if metric == 'mc_accuracy' else metric.replace('_', ' ')}, %{said}")
    axis.set_xticks(range(len(variants)), variants, rotation=30, ha="right")


if __name__ == "__main__":
    run(main)
