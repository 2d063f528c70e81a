"""bench/ablation.py, paired.py and latent.py: variants differ only in what they say; tables, resumption, geometry."""

import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bench import ablation, latent, paired, real_features  # noqa: E402
from bench.ablation import BASE, VARIANTS, AblationConfig, run_all, train_flags, variant_fields  # noqa: E402
from cli import UserError, parse_config  # noqa: E402
from losses import LossConfig  # noqa: E402
from train import TrainConfig  # noqa: E402

# ---- variants ----


def test_base_is_plain_info_nce_on_random_batches():
    config = parse_config(TrainConfig, train_flags("base", 0, [], Path("out")))
    losses = LossConfig(**{field.name: getattr(config, field.name) for field in fields(LossConfig)})
    assert losses == LossConfig() and not any(vars(LossConfig()).values())
    assert config.guided_share == 0


def test_all_is_train_py_without_a_flag():
    config = parse_config(TrainConfig, train_flags("all", 0, [], Path(TrainConfig.out)))
    assert config == TrainConfig(test=False)


def test_variants_differ_from_base_in_nothing_but_their_own_fields():
    assert set(BASE) <= {field.name for field in fields(TrainConfig)}
    base = vars(parse_config(TrainConfig, train_flags("base", 3, ["--steps", "7"], Path("out"))))
    assert base["steps"] == 7 and base["seed"] == 3
    for name, wanted in VARIANTS.items():
        made = vars(parse_config(TrainConfig, train_flags(name, 3, ["--steps", "7"], Path("out"))))
        assert {key: value for key, value in made.items() if value != base[key]} == \
            {key: value for key, value in wanted.items() if value != BASE[key]}
    assert {name for name in VARIANTS if VARIANTS[name]["skp_weight"]} == {"skp", "all", "all+mining"}
    assert {name for name in VARIANTS if VARIANTS[name]["guided_share"]} == {"sampling", "kcl", "all", "all+mining"}


def test_one_field_of_a_variant_can_be_changed():
    assert variant_fields("all:beta=2,mask_false_negatives=false") == VARIANTS["all"] | dict(
        beta=2.0, mask_false_negatives=False)
    assert isinstance(variant_fields("base:hard_k=4")["hard_k"], int)


@pytest.mark.parametrize("name, said", [
    ("bass", "no such variant; one of base"), ("all:lr=1", "'lr' is no field of a variant"),
    ("all:beta=much", "'much' is no value of beta"), ("all:mask_false_negatives=1", "'1' is no value")])
def test_a_mistyped_variant_is_one_line(name, said):
    with pytest.raises(UserError, match=said):
        variant_fields(name)


@pytest.mark.parametrize("flag", ["--beta", "--no-mask-false-negatives", "--seed=3", "--out"])
def test_flags_that_the_variants_decide_are_refused(flag):
    with pytest.raises(UserError, match="not behind --"):
        ablation.check_extra(["--steps", "5", flag, "1"])


# ---- resuming ----


def settings(folder, **other) -> AblationConfig:
    return AblationConfig(**dict(variants="base skp", seeds=2, results=str(folder / "r.jsonl"), jobs=1) | other)


class Runner:
    """Stands in for train.py and eval.py: takes note, and fails where told to."""

    def __init__(self, fail_at=None):
        self.seen, self.fail_at = [], fail_at

    def __call__(self, variant, train_config, flags, config):
        if len(self.seen) == self.fail_at:
            raise UserError("killed")
        self.seen.append((variant, train_config["seed"]))
        return dict(variant=variant, seed=train_config["seed"], split=config.split, eval=config.eval, seconds=1.0,
                    metrics={"t2v_R@1": 1.0}, config=train_config)


EXTRA = ["--dataset", "csv", "--data", "x.csv"]  # not the toy world, which would be rendered


def test_what_is_recorded_is_not_run_again(tmp_path):
    killed = Runner(fail_at=3)
    with pytest.raises(UserError, match="killed"):
        run_all(settings(tmp_path), EXTRA, killed)
    assert killed.seen == [("base", 0), ("skp", 0), ("base", 1)]          # whole pairs first
    again = Runner()
    run_all(settings(tmp_path), EXTRA, again)
    assert again.seen == [("skp", 1)]
    run_all(settings(tmp_path), EXTRA, again)
    assert len(again.seen) == 1 and len(paired.read_runs(tmp_path / "r.jsonl")) == 4


def test_other_settings_are_other_runs(tmp_path):
    run_all(settings(tmp_path, seeds=1), EXTRA, Runner())
    for config, extra in ((settings(tmp_path, seeds=1), [*EXTRA, "--steps", "9"]),
                          (settings(tmp_path, seeds=1, split="test"), EXTRA),
                          (settings(tmp_path, seeds=1, variants="base:beta=1 skp:skp_weight=3"), EXTRA)):
        runner = Runner()
        run_all(config, extra, runner)
        assert len(runner.seen) == 2
    same = Runner()
    run_all(settings(tmp_path, seeds=1), [*EXTRA, "--workers", "1", "--eval-every", "5"], same)  # changes no result
    assert same.seen == []


def test_a_record_that_does_not_know_a_newer_field_counts_with_its_default(tmp_path):
    run_all(settings(tmp_path, seeds=1), EXTRA, Runner())
    lines = paired.read_runs(tmp_path / "r.jsonl")
    for line in lines:
        del line["config"]["accumulate"]
        line["config"]["deleted_option"] = 5
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runner = Runner()
    run_all(settings(tmp_path, seeds=1), EXTRA, runner)
    assert runner.seen == []
    run_all(settings(tmp_path, seeds=1), [*EXTRA, "--accumulate", "2"], runner)
    assert len(runner.seen) == 2


def test_a_real_run_leaves_its_line(tiny_world, tmp_path):
    config = settings(tmp_path, variants="all", seeds=1, runs=str(tmp_path), eval=f"--task toy --data {tiny_world}")
    run_all(config, ["--dataset", "csv", "--data", str(tiny_world / "train.csv"), "--val-data",
                     str(tiny_world / "val.csv"), "--steps", "2", "--eval-every", "1", "--batch-size", "16",
                     "--log-every", "1", "--cache", str(tmp_path / "cache"), "--workers", "1"])
    record, = paired.read_runs(tmp_path / "r.jsonl")
    assert record["videos"] == 12 and record["questions"] == 12 and record["split"] == "val"
    assert [step for step, _ in record["curve"]] == [1, 2] and record["seconds"] > 0
    assert {"t2v_R@1", "v2t_R@1", "mc_accuracy", "mc_accuracy_noun"} <= record["metrics"].keys()
    assert record["config"]["skp_weight"] == VARIANTS["all"]["skp_weight"] and record["threads"] >= 1


def test_a_failing_script_is_named_with_its_last_line(tmp_path):
    (tmp_path / "x.py").write_text("import os, sys\nprint(os.environ['OMP_NUM_THREADS'])\nsys.exit('error: no disk')\n")
    with pytest.raises(UserError, match=r"out.txt: x.py ended with status 1: error: no disk"):
        ablation.call([str(tmp_path / "x.py")], threads=3, log=tmp_path / "out.txt")
    assert (tmp_path / "out.txt").read_text().startswith("3\n") and not ablation.LIVE


def test_a_killed_ablation_leaves_nothing_running(tmp_path):
    """SIGTERM reaches the run in flight, and what is not recorded is done again by the next call."""
    (tmp_path / "kill.py").write_text(f"""
import os, signal, sys, threading
sys.path.insert(0, {str(ROOT)!r})
from bench import ablation
sleeper = {str(tmp_path / "sleep.py")!r}
def run_one(variant, train_config, flags, config):
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    ablation.call([sleeper], 1, ablation.Path({str(tmp_path / "out.txt")!r}))
ablation.run_all(ablation.AblationConfig(results={str(tmp_path / "r.jsonl")!r}, jobs=1), ["--dataset", "csv"], run_one)
""")
    (tmp_path / "sleep.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    done = subprocess.run([sys.executable, str(tmp_path / "kill.py")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 143, done.stderr
    sleeper = int((tmp_path / "out.txt").read_text() or 0)                # 0: killed before it began
    with pytest.raises(ProcessLookupError):
        os.kill(sleeper or 2**22 + 1, 0)
    assert paired.read_runs(tmp_path / "r.jsonl") == []


def test_seconds_and_curve_of_an_interrupted_log(tmp_path):
    lines = [dict(config={}, resumed_at=0), dict(step=10, step_s=1.0), dict(step=20, step_s=2.0),
             dict(config={}, resumed_at=10), dict(step=20, step_s=3.0), dict(step=20, validation={"t2v_R@1": 5.0})]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert ablation.read_log(tmp_path / "log.jsonl") == (10 * 1.0 + 10 * 3.0, [(20, 5.0)])


# ---- statistics and tables ----


def shifted(t: float, n: int) -> list[float]:
    """n differences whose t statistic is t."""
    x = [float(i % 3) for i in range(n)]
    return [value - statistics.fmean(x) + t * statistics.stdev(x) / math.sqrt(n) for value in x]


@pytest.mark.parametrize("n, t, p", [(2, 12.706, 0.05), (3, 4.303, 0.05), (4, 5.841, 0.01), (5, 2.776, 0.05),
                                     (6, 4.032, 0.01), (10, 2.262, 0.05), (11, 3.169, 0.01), (10, -2.262, 0.05)])
def test_t_test_agrees_with_the_printed_table(n, t, p):
    assert paired.t_test(shifted(t, n)) == pytest.approx(p, abs=1e-4)


def test_t_test_of_nothing_and_of_certainty():
    assert paired.t_test([3.0]) == paired.t_test([0.0, 0.0]) == 1 and paired.t_test([2.0, 2.0]) == 0


def test_sign_flips_by_hand():
    assert paired.sign_flip_test([1, 2, 3, 4, 5]) == 2 / 32               # only all + and all −
    assert paired.sign_flip_test([3, -1]) == 1.0                          # |2|: 2, 4, 4, 2
    assert paired.sign_flip_test([1, 2, -1]) == 0.75                      # 4 of |2|, 2 of |4|, 2 of |0|


def line(variant, seed, value):
    return dict(variant=variant, seed=seed, metrics={"t2v_R@1": value})


def test_tables_by_hand():
    runs = [line("base", 0, 10.0), line("base", 1, 12.0), line("base", 2, 14.0), line("skp", 0, 14.0),
            line("skp", 1, 15.0), line("skp", 2, 19.0), line("skp", 3, 99.0), line("base", 0, 10.0)]
    text = paired.markdown_tables(runs, {"t2v_R@1": "R@1"}, ["base", "skp"])
    assert "| base | 3 | 12.0 ± 2.0 |" in text
    assert "| skp | 4 | 36.8 ± 41.6 |" in text
    # differences 4, 3, 5: mean 4, standard error 1/√3, t = 6.93 with 2 degrees of freedom; seed 3 has no partner
    assert "| skp | 3 | **+4.0 ± 0.6** (p .020, .250) |" in text


def test_any_two_variants_can_be_compared():
    runs = [line(name, seed, value) for name, values in (("base", (1, 1)), ("skp", (2, 3)), ("all", (5, 8)))
            for seed, value in enumerate(values)]
    text = paired.markdown_tables(runs, {"t2v_R@1": "R@1"}, ["base", "skp", "all"],
                                  pairs=[("all", "skp"), ("all", "x")])
    assert text.splitlines()[-1].startswith("| all − skp | 2 | **+4.0 ± 1.0**") and "− x" not in text


def test_demo_tells_a_difference_from_noise(capsys):
    paired.main()
    assert capsys.readouterr().out == "clear: **+4.6 ± 0.5** (p <.001, .062)\nnoise: +0.7 ± 1.7 (p .708, .688)\n"


def test_one_run_has_no_spread_and_a_missing_metric_no_number():
    text = paired.markdown_tables([line("base", 0, 10.0)], {"t2v_R@1": "R@1", "mc_accuracy": "MC"}, ["base"])
    assert text.splitlines()[-1] == "| base | 1 | 10.0 | – |"
    assert paired.difference([2.0]) == "+2.0"


def test_groups_are_what_may_be_compared(tmp_path):
    for extra in (EXTRA, [*EXTRA, "--steps", "9"]):
        run_all(settings(tmp_path, seeds=1), extra, Runner())
    runs = paired.read_runs(tmp_path / "r.jsonl")
    groups = paired.group_runs(runs, lambda run: ablation.settings(run["config"]))
    assert [[run["variant"] for run in group] for group in groups] == [["base", "skp"]] * 2


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"variant": "base"}\n{"vari')
    with pytest.raises(UserError, match=r"r.jsonl, line 2: not JSON"):
        paired.read_runs(tmp_path / "r.jsonl")


def test_a_section_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- x -->\nold\n<!-- end of x -->\nafter\n")
    for text in ("one", "two"):
        paired.replace_section(page, "x", text)
    assert page.read_text() == "before\n<!-- x -->\n\ntwo\n\n<!-- end of x -->\nafter\n"
    with pytest.raises(UserError, match="has no place for the table; add the lines <!-- y -->"):
        paired.replace_section(page, "y", "text")


def test_page_and_plot_come_from_the_records_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "ablation.md").write_text("# x\n<!-- ablation -->\nold\n<!-- end of ablation -->\n")
    for steps in (7, 9):
        for name, value in (("base", 10.0), ("all", 15.5)):
            for seed in (0, 1):
                paired.append_run(tmp_path / "results" / "ablation.jsonl", dict(
                    line(name, seed, value + seed), split="val", eval="--task toy", curve=[[5, 4.0], [10, 9.0]],
                    seconds=60.0, videos=500, questions=500, hardware="x86_64 CPU", jobs=2, commit="abc",
                    config=vars(TrainConfig(steps=steps)) | variant_fields(name)))
    ablation.print_tables(str(tmp_path / "results" / "ablation.jsonl"))
    assert "old" in (tmp_path / "docs" / "ablation.md").read_text()       # only --table writes
    capsys.readouterr()
    ablation.print_tables(str(tmp_path / "results" / "ablation.jsonl"), refresh=True)
    said, page = capsys.readouterr().out, (tmp_path / "docs" / "ablation.md").read_text()
    for text in (said, page):
        assert "| all | 2 | **+5.5 ± 0.0** (p <.001, .500) |" in text and text.count("| base | 2 | 10.5 ± 0.7 |") == 2
        assert "7 steps of 128 pairs, val split (500 videos, 500 questions), --steps 7; 60 s a run" in text
    assert "old" not in page and 5000 < (tmp_path / "docs" / "ablation.png").stat().st_size < 300_000
    with pytest.raises(UserError, match="holds no runs yet"):
        ablation.print_tables(str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize("name", ["ablation", "msrvtt", "real_features"])
def test_the_page_says_what_the_records_say(name, capsys):
    """No number of docs/ablation.md is typed by hand."""
    told_by = real_features if name.startswith("real_features") else ablation
    told_by.print_tables(str(ROOT / "results" / f"{name}.jsonl"))
    page = (ROOT / "docs" / "ablation.md").read_text(encoding="utf-8")
    section = page.partition(f"<!-- {name.replace('_', ' ')} -->")[2].partition("<!-- end of")[0]
    assert capsys.readouterr().out.strip() in section


# ---- the latent space ----


def test_alignment_and_uniformity_of_known_points():
    cross = np.array([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    assert latent.alignment(cross, cross) == 0 and latent.alignment(cross, -cross) == 4
    assert latent.alignment(cross, np.roll(cross, 1, axis=0)) == pytest.approx(2)
    # of each point's three others two are at squared distance 2 and one at 4
    assert latent.uniformity(cross) == pytest.approx(math.log((2 * math.exp(-4) + math.exp(-8)) / 3))
    assert latent.uniformity(np.ones((5, 1))) == 0


def test_hard_negatives_are_negatives_that_share_knowledge():
    kappa = np.array([[1, 0.9, 0.9, 0.1], [0.9, 1, 0.5, 0], [0.9, 0.5, 1, 0.3], [0.1, 0, 0.3, 1]])
    negative, hard = latent.negative_masks(kappa, video=np.array([0, 0, 1, 2]), meaning=np.array([5, 6, 6, 7]))
    assert negative.tolist() == [[False, False, True, True], [False, False, False, True], [True, False, False, True],
                                 [True, True, True, False]]           # 0 and 1: a video, 1 and 2: a meaning
    assert np.argwhere(hard).tolist() == [[0, 2], [2, 0], [2, 3], [3, 2]]


def test_gradient_share_by_hand():
    negative = ~np.eye(3, dtype=bool)
    hard = np.zeros((3, 3), bool)
    hard[0, 1] = True
    assert latent.gradient_share(np.zeros((3, 3)), negative, hard) == pytest.approx(1 / 6)
    logits = np.zeros((3, 3))
    logits[0, 1] = math.log(4)            # row 0: 1, 4, 1 of 6; column 1: 4, 1, 1 of 6; all others a third each
    share = (4 / 6 + 4 / 6) / ((5 / 6 + 2 * 2 / 3) + (5 / 6 + 2 * 2 / 3))
    assert latent.gradient_share(logits, negative, hard) == pytest.approx(share)
    assert latent.gradient_share(logits, negative, np.zeros((3, 3), bool)) == 0


def test_gradient_share_is_the_gradient_of_the_loss():
    import torch

    from losses import info_nce
    generator = torch.Generator().manual_seed(0)
    text, video = (torch.nn.functional.normalize(torch.randn(6, 4, generator=generator, dtype=torch.float64), dim=1)
                   for _ in range(2))
    sim = (3.0 * text @ video.T).requires_grad_()
    target = torch.arange(6)
    loss = (torch.nn.functional.cross_entropy(sim, target) + torch.nn.functional.cross_entropy(sim.T, target)) / 2
    assert loss.item() == pytest.approx(info_nce(video, text, torch.tensor(3.0).log().double()).item())
    loss.backward()
    hard = np.zeros((6, 6), bool)
    hard[[0, 2, 5], [1, 4, 0]] = True
    negative = ~np.eye(6, dtype=bool)
    wanted = sim.grad.numpy()[hard].sum() / sim.grad.numpy()[negative].sum()
    assert latent.gradient_share(sim.detach().numpy(), negative, hard) == pytest.approx(wanted)


def test_violations_by_hand():
    sim = np.array([[0.5, 0.6, 0.4], [0.1, 0.2, 0.3], [0.0, 0.0, 0.9]])
    hard = np.array([[False, True, True], [False, False, True], [True, False, False]])
    assert latent.violations(sim, hard) == 0.5                            # (0, 1) and (1, 2) of four
    assert latent.violations(sim, np.zeros((3, 3), bool)) == 0


def test_the_plane_keeps_the_largest_variance():
    rng = np.random.default_rng(0)
    emb = rng.normal(size=(200, 5)) * [0.1, 5, 0.2, 2, 0.1] + 7
    plane = latent.principal_plane(emb)
    assert plane.shape == (200, 2) and abs(np.corrcoef(plane[:, 0], emb[:, 1])[0, 1]) > 0.99
    assert abs(np.corrcoef(plane[:, 1], emb[:, 3])[0, 1]) > 0.99
    assert np.allclose(plane, latent.principal_plane(emb[::-1])[::-1])


def test_pictures_come_from_checkpoints(tiny_world, tmp_path, monkeypatch):
    import train
    for name in ("base", "all"):
        config = vars(TrainConfig()) | variant_fields(name) | dict(
            dataset="csv", data=str(tiny_world / "train.csv"), out=str(tmp_path / name), cache=str(tmp_path / "cache"),
            steps=2, batch_size=16, workers=1)
        train.train(TrainConfig(**config))
    monkeypatch.setattr(sys, "argv", ["latent.py", f"base={tmp_path / 'base'}", f"all={tmp_path / 'all'}", "--data",
                                      str(tiny_world), "--out", str(tmp_path), "--cache", str(tmp_path / "cache"),
                                      "--batch-size", "16"])
    latent.main()
    for name in ("similarity", "geometry", "map", "batches"):
        assert 5000 < (tmp_path / f"latent-{name}.png").stat().st_size < 300_000
    monkeypatch.setattr(sys, "argv", ["latent.py", "runs/a"])
    with pytest.raises(UserError, match="expected NAME=CHECKPOINT"):
        latent.main()
