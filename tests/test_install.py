"""`pip install -e .`: one name is taken, and other people's `datasets` stay theirs."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = """
import datasets, sys
assert datasets.whose == "theirs"
import clop
assert datasets is sys.modules["datasets"] and "model" not in sys.modules
checkpoint = clop.load_checkpoint(clop.HERE / "weights" / "toy.safetensors")
text_emb = clop.embed_texts(checkpoint.model, checkpoint.tokenizer, ["a dog runs"])
print(clop.HERE, tuple(clop.similarity(text_emb, text_emb).shape))
from importlib.metadata import metadata
print(metadata("clop-video")["Version"], metadata("clop-video")["License-Expression"])
try:
    import training
except ImportError:
    print("only clop")
"""


def test_an_editable_install_takes_one_name(tmp_path):
    pytest.importorskip("setuptools", "77", reason="setuptools 77, which builds, is not installed")
    copy, other = tmp_path / "checkout", tmp_path / "other"
    ignored = shutil.ignore_patterns(".git", "runs", "cache", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, copy, ignore=ignored)
    venv.create(tmp_path / "venv", system_site_packages=True, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-e", copy]
    done = subprocess.run([*pip, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    other.mkdir()
    (other / "datasets.py").write_text('whose = "theirs"')
    script = [python, "-c", CODE]
    done = subprocess.run(script, cwd=other, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{copy} (1, 1)", "0.1.0 Apache-2.0", "only clop"]
