"""bench/ablation.py and paired.py: variants differ only in what they say; resumption; tables."""

import math
import os
import statistics
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pytest

from bench import ablation, paired, real_features
from bench.ablation import BASE, VARIANTS, AblationConfig, plan_run, run_all, variant_fields
from cli import UserError
from losses import LossConfig
from train import TrainConfig

ROOT = Path(__file__).parent.parent

# ---- variants ------------------------------------------------------------------------------------


def test_base_is_plain_info_nce_and_all_is_train_py_without_a_flag():
    config = vars(plan_run("base", 0, [], "runs").config)
    assert not any(config[name] for name in [*vars(LossConfig()), "guided_share"])
    assert plan_run("all", 0, [], "runs").config == TrainConfig(out="runs/all-0", test=False)


def test_variants_differ_from_base_in_nothing_but_their_own_fields():
    base = asdict(plan_run("base", 3, ["--steps", "7"], "runs").config)
    assert base["steps"] == 7 and base["seed"] == 3
    for name, wanted in VARIANTS.items():
        made = asdict(plan_run(name, 3, ["--steps", "7"], "runs").config) | {"out": base["out"]}
        changed = {key: value for key, value in made.items() if value != base[key]}
        assert changed == {key: value for key, value in wanted.items() if value != BASE[key]}
    for field, names in (("skp_weight", "skp all"), ("guided_share", "sampling kcl all")):
        have = {name for name in VARIANTS if VARIANTS[name][field]}
        assert have == {*names.split(), "all+mining"}


@pytest.mark.parametrize(
    "name, message",
    [
        ("bass", "no such variant; take one of base"),
        ("all:lr=1", "'lr' is no field"),
        ("all:beta=much", "'much' is no value of beta"),
        ("all:hard_k=1.5", "'1.5' is no value of hard_k"),
        ("all:mask_false_negatives=1", "'1' is no value"),
    ],
)
def test_a_mistyped_variant_is_one_line(name, message):
    with pytest.raises(UserError, match=message):
        variant_fields(name)


@pytest.mark.parametrize("flag", ["--beta", "--no-mask-false-negatives", "--seed=3", "--out"])
def test_flags_that_the_variants_decide_are_refused(flag):
    with pytest.raises(UserError, match=f"{flag}: not after --"):
        run_all(AblationConfig(), ["--steps", "5", flag, "1"], None)


# ---- resuming ------------------------------------------------------------------------------------

EXTRA = ["--dataset", "csv", "--data", "x.csv"]  # not the toy world, which would be rendered


def make_config(folder, **other) -> AblationConfig:
    options = dict(variants="base skp", seeds=2, results=str(folder / "r.jsonl"), jobs=1)
    return AblationConfig(**options | other)


def runs_of(config, extra=EXTRA, at_most=9) -> list:
    """What a call does that is not recorded yet, until it is killed; train.py is not started."""
    seen = []

    def run_one(plan, config):
        if len(seen) == at_most:
            raise UserError("killed")
        seed = plan.config.seed
        seen.append((plan.variant, seed))
        facts = dict(split=config.split, eval=config.eval, metrics={"t2v_R@1": 1.0})
        return dict(variant=plan.variant, seed=seed, config=asdict(plan.config), **facts)

    with pytest.raises(UserError, match="killed") if at_most < 9 else nullcontext():
        run_all(config, extra, run_one)
    return seen


def test_what_is_recorded_is_not_run_again(tmp_path):
    killed = runs_of(make_config(tmp_path), at_most=3)
    assert killed == [("base", 0), ("skp", 0), ("base", 1)]  # whole pairs first
    assert runs_of(make_config(tmp_path)) == [("skp", 1)]
    assert runs_of(make_config(tmp_path)) == []
    assert len(paired.read_runs(tmp_path / "r.jsonl")) == 4


def test_other_settings_are_other_runs(tmp_path):
    one = make_config(tmp_path, seeds=1)
    assert len(runs_of(one)) == 2
    assert len(runs_of(one, [*EXTRA, "--steps", "9"])) == 2
    assert len(runs_of(make_config(tmp_path, seeds=1, split="test"))) == 2
    changed = make_config(tmp_path, seeds=1, variants="base:beta=1 skp:skp_weight=3")
    assert len(runs_of(changed)) == 2
    assert runs_of(one, [*EXTRA, "--workers", "1", "--eval-every", "5"]) == []  # change no result


def test_a_real_run_leaves_its_line(tiny_world, tmp_path):
    task = f"--task toy --data {tiny_world}"
    runs = dict(variants="all", seeds=1, runs=str(tmp_path), eval=task)
    flags = f"--dataset csv --data {tiny_world}/train.csv --val-data {tiny_world}/val.csv --steps 2"
    flags += f" --eval-every 1 --batch-size 16 --workers 1 --cache {tmp_path}/cache"
    run_all(make_config(tmp_path, **runs), flags.split())
    (record,) = paired.read_runs(tmp_path / "r.jsonl")
    assert record["videos"] == 12 and record["questions"] == 64 and record["split"] == "val"
    assert [step for step, _ in record["curve"]] == [1, 2] and record["seconds"] > 0
    assert {"t2v_R@1", "v2t_R@1", "mc_accuracy", "mc_accuracy_noun"} <= record["metrics"].keys()
    assert record["config"]["skp_weight"] == VARIANTS["all"]["skp_weight"]
    assert record["threads"] >= 1


KILLED = """
import os, signal, sys, threading
from pathlib import Path
from bench import ablation

folder = Path(sys.argv[1])

def run_one(plan, config):
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    ablation.call([str(folder / "sleep.py")], 1, folder / "out.txt")

config = ablation.AblationConfig(results=str(folder / "r.jsonl"), jobs=1)
ablation.run_all(config, ["--dataset", "csv"], run_one)
"""


def test_a_killed_ablation_leaves_nothing_running(tmp_path):
    sleep = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n"
    (tmp_path / "sleep.py").write_text(sleep)
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 143, done.stderr
    sleeper = int((tmp_path / "out.txt").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(sleeper, 0)
    assert paired.read_runs(tmp_path / "r.jsonl") == []


# ---- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n, t, p", [(2, 12.706, 0.05), (3, 4.303, 0.05), (10, -2.262, 0.05)])
def test_t_test_agrees_with_the_printed_table(n, t, p):
    x = [float(i % 3) for i in range(n)]
    shift = t * statistics.stdev(x) / math.sqrt(n) - statistics.fmean(x)
    assert paired.t_test([value + shift for value in x]) == pytest.approx(p, abs=1e-4)
    assert paired.t_test([3.0]) == paired.t_test([0.0, 0.0]) == 1


def test_sign_flips_by_hand():
    assert paired.sign_flip_test([1, 2, 3, 4, 5]) == 2 / 32  # only all + and all −
    assert paired.sign_flip_test([1, 2, -1]) == 0.75  # |sum| 2: 4 of 2, 2 of 4, 2 of 0


# ---- tables --------------------------------------------------------------------------------------


def make_runs(**values_of_variant) -> list[dict]:
    """Runs with the seeds 0, 1, … and one metric."""
    runs = []
    for variant, values in values_of_variant.items():
        for seed, value in enumerate(values):
            runs.append(dict(variant=variant, seed=seed, metrics={"t2v_R@1": float(value)}))
    return runs


def test_tables_by_hand():
    runs = make_runs(base=(10, 12, 14), skp=(14, 15, 19, 99), all=(15, 18))
    text = paired.markdown_tables(runs, {"t2v_R@1": "R@1"}, ["base", "skp", "all"])
    assert "| base | 3 | 12.0 ± 2.0 |" in text
    assert "| skp | 4 | 36.8 ± 41.6 |" in text
    # differences 4, 3, 5: mean 4, standard error 1/√3, t = 6.93; seed 3 has no partner
    assert "| skp | 3 | **+4.0 ± 0.6** (p .020, .250) |" in text
    assert "| all − skp | 2 | +2.0 ± 1.0 (" in text


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"variant": "base"}\n{"vari')
    with pytest.raises(UserError, match=r"r.jsonl, line 2: not JSON"):
        paired.read_runs(tmp_path / "r.jsonl")


def test_page_and_plot_come_from_the_records_alone(tmp_path, monkeypatch):
    page, results = tmp_path / "page.md", tmp_path / "mine.jsonl"
    page.write_text("# x\n<!-- mine -->\nold\n<!-- end of mine -->\n")
    facts = dict(split="val", eval="--task toy", curve=[[5, 4.0], [10, 9.0]], seconds=60.0)
    facts |= dict(videos=500, questions=500, hardware="x86_64 CPU", jobs=2, commit="abc")
    for steps in (7, 9):
        for record in make_runs(base=(10, 11), all=(15.5, 16.5)):
            config = asdict(TrainConfig(steps=steps)) | variant_fields(record["variant"])
            paired.append_run(results, record | facts | dict(config=config))

    monkeypatch.setattr(ablation, "PAGE", page)
    ablation.refresh_page(str(results))
    text = page.read_text()
    assert "old" not in text and text.count("| base | 2 | 10.5 ± 0.7 |") == 2  # two groups
    assert "| all | 2 | **+5.5 ± 0.0** (p <.001, .500) |" in text
    said = "7 steps of 128 pairs, val split (500 videos, 500 questions), --steps 7; 60 s per run"
    assert said in text
    assert (tmp_path / "mine.png").stat().st_size > 5000


@pytest.mark.parametrize("bench", [ablation, real_features])
def test_the_page_says_what_the_records_say(bench):
    """No number in the tables of docs/ablation.md is typed by hand."""
    name = bench.__name__.removeprefix("bench.")
    tables = bench.make_tables(str(ROOT / "bench" / "results" / f"{name}.jsonl"))
    page = (ROOT / "docs" / "ablation.md").read_text(encoding="utf-8")
    title = name.replace("_", " ")
    section = page.partition(f"<!-- {title} -->")[2].partition(f"<!-- end of {title} -->")[0]
    assert tables in section


@pytest.mark.parametrize("bench", [ablation, real_features])
def test_a_file_without_runs_is_one_line(bench, tmp_path):
    with pytest.raises(UserError, match="holds no runs yet"):
        bench.make_tables(str(tmp_path / "none.jsonl"))
