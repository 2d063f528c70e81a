r"""README.md and docs/: every command that a reader may type is run here as it is written, on tiny
data.

A command is what stands after `python` in an indented line or between backquotes. `STORIES` holds
each of them; a command that is missing there, or that no page has any more, fails a test:

    $ a command              + words added here, which make it small
    = what it must leave or print            an indented line goes on with the one above

The commands of a story need each other. `ELSEWHERE` are the few that cannot run in seconds: where
they run instead (a file, and what stands there). Commands run in this process, one after the other:
thirty starts of Python with PyTorch would take minutes.
"""

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_clip import MERGES, openai_file
from test_datasets import build_msrvtt

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
SMALL = "--steps 2 --eval-every 1 --batch-size 8 --workers 1"

STORIES = f"""
# one minute
$ knowledge.py "two dogs chase a ball"
= chase ball
$ eval.py --task toy
+ --data . --out results/toy
= results/toy/report.html

# own videos
$ train.py --dataset csv --data train.csv --val-data val.csv --out runs/mine
+ {SMALL}
= runs/mine/curves.png
$ eval.py --task csv --data val.csv --checkpoint runs/mine
+ --out results/mine
= results/mine/metrics.json
$ eval.py --task search --videos FOLDER --query "a dog runs on the beach" --checkpoint runs/mine
= train

# benchmarks
$ -m datasets.check msrvtt --root MSRVTT --out problems.csv
= problems.csv
$ train.py --dataset msrvtt --data-root MSRVTT --preset small --out runs/9k
+ {SMALL} --num-frames 1
= runs/9k/curves.png
$ eval.py --task msrvtt --data-root MSRVTT --checkpoint runs/9k
+ --out results
= not comparable

# from CLIP
$ -m training.clip FOLDER
= OpenAI layout
$ eval.py --task msrvtt --data-root MSRVTT --checkpoint FOLDER
+ --out zero
= never trained on videos
$ train.py --dataset msrvtt --data-root MSRVTT --init FOLDER --encoder-lr 1e-6 --lr 1e-4
+ {SMALL} --num-frames 2 --out runs/clip
= runs/clip/curves.png

# benches
$ -m bench.knowledge
+ --million 0.001 --captions train.csv
= ms CPU
$ -m bench.toyworld --train 1500
+ --train 20
= videos/s
$ -m bench.data --repeats 3
+ --captions 0.004 --repeats 1 --clips 1
= cache
$ -m bench.search --toy cache/toy
+ --toy .
= 20 other scenes claim a match
$ -m bench.search --videos 20000 --presets toy --queries 10
+ --videos 200 --queries 2 --presets toy
= 256

# more benches
$ -m bench.gradcache --batch 256 --chunks 0,64,16 --rounds 1
+ --batch 8 --chunks 0,4 --frames 4
= 4
$ -m bench.eval --toy cache/toy
+ --toy .
= CPU s, of which embedding
$ -m bench.eval --sizes 100000 --matrix-up-to 0 --rounds 1
+ --sizes 300
= 300
$ -m bench.contrastive --device cpu --sizes 16384
+ --dim 32 --row '{{"batch": 256, "mode": "+ top-16", "version": "tiled"}}'
= cpu_s
$ -m bench.scaling
= GFLOP

# last benches
$ -m bench.text
+ --functions clean
= clean
$ -m bench.open_clip
= 50
$ -m bench.shards --batch 16 --run-steps 16
+ --samples 200 --shards 2 --links 2 --steps 10 --run-steps 4 --clips 10 --batch 8 --rounds 1
  --mine-batch 32 --out shards.jsonl
= share_of_waiting

# against transformers
$ -m bench.clip --layers L --batch 1
+ --frames 1 --rounds 1 --captions 50
= transformers
"""
ELSEWHERE = """
$ train.py
= .ci/run: train, shortened
$ -m pytest
= .ci/run: pytest
$ train.py --dataset shards --data "WEBVID/{00000..02480}.tar::CC3M/{00000..00331}.tar"
  --val-data "WEBVID-VAL/{00000..00004}.tar" --preset base --gpus 8 --workers 12 --cache-gb 500
= tests/test_shards.py: def test_ranks_share_the_index_and_the_batches(
$ -m bench.shards --videos ../shared/msrvtt_full/videos --size 224 --samples 192 --clips 6
  --shards 2 --batch 16
= docs/scaling.md: six of MSR-VTT
$ -m bench.knowledge_width --captions train.csv
= docs/kernel.md: one run, seed 0
$ -m bench.gpu
= tests/test_kernels_aot.py: def test_the_gpu_session_runs_what_a_cpu_can(
$ eval.py --compare A B
= tests/test_eval.py: def test_two_results_side_by_side(
$ eval.py --compare runs/skp runs/toy
= tests/test_eval.py: def test_two_results_side_by_side(
$ train.py --dataset msrvtt --data-root ROOT --init clip-vit-base-patch32 --num-frames 12
  --gpus 8 --batch-size 128 --steps 7030 --warmup 703 --lr 1e-4 --encoder-lr 1e-6
  --weight-decay 0.2 --precision bf16 --eval-every 1406 --out runs/msrvtt
= docs/finetune.md: **Not run**
$ -m datasets.toyworld --folder cache/toy-5000 --train 0 --val 0 --test 5000
= docs/ablation.md: test split (5,000 videos, 26,203 questions)
$ -m bench.ablation --variants "base skp all" --seeds 5 --split test
  --eval="--task toy --data cache/toy-5000"
= tests/test_ablation.py: def test_a_real_run_leaves_its_line(
$ -m bench.ablation --table
= tests/test_ablation.py: def test_the_page_says_what_the_records_say(
$ -m bench.real_features
= tests/test_real_features.py: def test_towers_learn_with_each_part(
$ -m bench.real_features --towers
  --variants "base skp all skp:text_negatives=1 all:text_negatives=0"
= docs/ablation.md: **Of commit 190e63d, before
$ -m bench.real_features --table
= tests/test_ablation.py: def test_the_page_says_what_the_records_say(
$ -m bench.scaling --measure
= docs/scaling.md: one run
$ -m bench.tile_walk
= docs/kernel.md: tile_walk.svg
$ -m bench.aot
= tests/test_kernels_aot.py: aot
"""


def read_commands(story: str) -> list[dict[str, str]]:
    """One {"$": command, "+": words, "=": result} per command."""
    found = []
    for line in re.sub(r"\n  +", " ", story).splitlines():
        mark, _, rest = line.partition(" ")
        if mark == "$":
            found.append({"+": ""})
        if found and line:
            found[-1][mark] = rest
    return found


def commands_of(page: Path) -> set[str]:
    """What a page's code tells to run with python, without comments."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    code = re.findall(r"^    (\S.*)", text, re.MULTILINE) + re.findall(r"`([^`\n]+)`", text)
    parts = [part.partition(" #")[0] for line in code for part in re.split(r" && |; ?", line)]
    found = (re.search(r"\bpython ((?:-m \w|[\w/]+\.py).*)", part) for part in parts)
    return {" ".join(match[1].split()) for match in found if match}


def test_every_command_of_the_pages_is_known_here():
    pages = {ROOT / "README.md", *ROOT.glob("docs/*.md")} - {ROOT / "docs" / "LOG.md"}  # history
    told = set.union(*map(commands_of, pages))
    assert told == {command["$"] for command in read_commands(STORIES + ELSEWHERE)}


def test_what_cannot_run_here_runs_elsewhere():
    for command in read_commands(ELSEWHERE):
        file, _, word = command["="].partition(": ")
        assert word in (ROOT / file).read_text(encoding="utf-8"), command["$"]


@pytest.fixture(scope="module")
def place(tiny_world, tmp_path_factory):
    """A folder in which the names that the pages use exist: train.csv, val.csv, videos, MSRVTT,
    weights.
    """
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(tiny_world, folder, dirs_exist_ok=True)
    build_msrvtt(folder / "MSRVTT")
    (folder / "weights").mkdir()
    openai_file(folder / "weights" / "model.safetensors")
    (folder / "weights" / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    return folder


def run_command(words: list[str], monkeypatch) -> int:
    """What `python` would do with these words; the exit status."""
    if "bench.gradcache" in words:  # measures memory: the child of a large process looks large
        return subprocess.run([sys.executable, *words]).returncode
    monkeypatch.setattr(sys, "argv", [words[0], *words[2 if words[0] == "-m" else 1 :]])
    torch.set_grad_enabled(True)  # a bench may have turned it off
    try:
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.mark.parametrize("story", STORIES.split("\n# ")[1:], ids=lambda story: story.split("\n")[0])
def test_the_commands_do_what_the_page_says(story, place, monkeypatch, capfd):
    if story.startswith("against transformers"):
        pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.chdir(place)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for what a bench starts itself
    folder = place / ("weights" if story.startswith("from CLIP") else "videos")
    for command in read_commands(story):
        if command["$"] == "-m bench.knowledge" and not SHARED.is_dir():
            continue  # the captions that it scores are in ../shared
        words = shlex.split(f"{command['$']} {command['+']}")
        stands_for = {"FOLDER": str(folder), "L": "1"}
        status = run_command([stands_for.get(word, word) for word in words], monkeypatch)

        shown = capfd.readouterr().out
        # MSRVTT has 11 videos, and the status says so
        assert status == command["$"].startswith("-m datasets.check"), f"{command['$']}: {shown}"
        assert command["="] in shown or (place / command["="]).is_file(), f"{command['$']}: {shown}"


def test_the_lines_of_python_embed_a_video(place, tmp_path, monkeypatch, capsys):
    """The README's lines, with the shipped weights and a video that is there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text[text.index("    from data import open_cache") :]
    code = block[: block.index("\n\nElsewhere")].replace("\n    ", "\n").strip()
    code = code.replace("runs/mine", str(ROOT / "weights" / "toy.safetensors"))
    code = code.replace("clip.mp4", str(next((place / "videos").glob("test_*.mp4"))))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out.count("[") == 3
