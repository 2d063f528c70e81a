"""One file that carries all: weights, sizes, vocabulary, concepts, and what a run needs to go on.

A checkpoint is a safetensors file (https://github.com/huggingface/safetensors): a JSON header, then
raw tensors. Reading it runs no code. `model.*` are the weights; `training.*` what only a resumed
run wants (optimizer moments). The header's metadata holds JSON: model sizes, tokenizer, concept
vocabulary, the run's configuration, step and progress, a SHA-256 over names and bytes of all
tensors; and beside it the SHA-256 of that JSON. Both are verified at every read. So evaluation
never needs a second file, and never takes a damaged one. (No state of a random generator is in it:
all that a run draws is a pure function of seed, epoch and sample.)

Written to a temporary file in the same folder, flushed to disk, then renamed over the target:
whoever reads sees the old file or the new one, never half of one. (`torch.save` would write a
pickle: reading one runs what is in it.)

A run's folder holds step-*.safetensors, the last few, and best.safetensors, the best on validation,
which carries no training state. A resumed run takes the newest whole one (`resume_checkpoint`): a
damaged one is named, set aside, and the one before it taken. Evaluation does not: a number from
another file than the named one would be a wrong number.

    python checkpoint.py runs/toy      # what is in the newest checkpoint there (without a path: in
                                       a fresh model's)
    python checkpoint.py --export runs/toy FILE     # weights alone, in half precision: to publish
                                                    or to evaluate
"""

import hashlib
import json
import os
import re
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from captions.tokenizer import Tokenizer
from cli import UserError, run
from knowledge import ConceptVocab, extract_many
from model import CLOP, ModelConfig, build_config


class DamagedCheckpoint(UserError):
    """The file is cut off, or its bytes are not those that were written."""


@dataclass
class Checkpoint:
    """What `load_checkpoint` returns. `training` is empty unless asked for."""

    model: CLOP
    tokenizer: Tokenizer
    concept_vocab: ConceptVocab
    config: dict  # the run's TrainConfig
    step: int  # optimizer steps done
    progress: dict  # what else the run wants back (best score, position, …)
    sha256: str  # of the tensors
    path: Path
    training: dict[str, torch.Tensor]


def save_checkpoint(
    path,
    model,
    tokenizer,
    concept_vocab,
    *,
    config: dict,
    step: int,
    progress: dict | None = None,
    training: dict[str, torch.Tensor] | None = None,
) -> str:
    """Write atomically; returns the SHA-256.

    Raises UserError if the folder cannot be written or the disk is full.
    """
    path = Path(path)
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    tensors |= {f"training.{name}": t for name, t in (training or {}).items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    sha256 = _hash(tensors)
    header = dict(
        model=asdict(model.config),
        tokenizer=tokenizer.to_dict(),
        concept_vocab=concept_vocab.to_dict(),
        config=config,
        step=step,
        progress=progress or {},
        sha256=sha256,
    )
    header = json.dumps(header)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={"clop": header, "clop_sha256": _hash_text(header)})
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path}: checkpoint not written ({error}); those before it are kept: free the disk and run "
            "the same command again"
        ) from error
    return sha256


def load_checkpoint(path, device="cpu", *, training: bool = False) -> Checkpoint:
    """Read and verify a checkpoint file, or the newest in a folder.

    Raises UserError where it is missing, not ours, or of another version, and its subclass
    DamagedCheckpoint.
    """
    path = newest_checkpoint(path) if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: no such checkpoint; "
            "train one with `python train.py` or name another with --checkpoint"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, ValueError) as error:
        raise DamagedCheckpoint(
            f"{path}: damaged or not a safetensors file ({error}); use an earlier checkpoint"
        ) from error
    if "clop" not in metadata:
        raise UserError(
            f"{path}: not a CLOP checkpoint (its header has no 'clop' entry); "
            "it was not written by train.py"
        )
    if _hash_text(metadata["clop"]) != metadata.get("clop_sha256"):
        raise DamagedCheckpoint(
            f"{path}: damaged, its header does not match its checksum; use an earlier checkpoint"
        )
    try:
        header = json.loads(metadata["clop"])
        if _hash(tensors) != header["sha256"]:
            raise DamagedCheckpoint(
                f"{path}: damaged, its tensors do not match their checksum; "
                "use an earlier checkpoint"
            )
        return Checkpoint(
            model=_build_model(header["model"], tensors).to(device).eval(),
            tokenizer=Tokenizer.from_dict(header["tokenizer"]),
            concept_vocab=ConceptVocab.from_dict(header["concept_vocab"]),
            config=dict(header["config"]),
            step=int(header["step"]),
            progress=dict(header["progress"]),
            sha256=header["sha256"],
            path=path,
            training={
                name.removeprefix("training."): t
                for name, t in tensors.items()
                if training and name.startswith("training.")
            },
        )
    # whole, but the layout of another version of this code
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        AssertionError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        why = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"{path}: written by another version of this code ({type(error).__name__}: {why}); "
            "use that version, or train again"
        ) from error


def export_checkpoint(source, path) -> Checkpoint:
    """Write the checkpoint `source` (file, or newest of a folder) without its training state,
    weights in float16.

    About a sixth of the file. fp16 keeps 11 significant bits: a relative error of up to 2^-11 in
    each weight; models are read back into float32. Returns what the new file holds. Raises
    UserError: a weight too large for fp16, or any of `load_checkpoint` and `save_checkpoint`.
    """
    found = load_checkpoint(source)
    found.model.half()
    if not all(torch.isfinite(t).all() for t in found.model.state_dict().values()):
        raise UserError(
            f"{found.path}: has weights beyond 65,504 or NaN, which fp16 cannot hold; it has diverged"
        )
    save_checkpoint(
        path,
        found.model,
        found.tokenizer,
        found.concept_vocab,
        config=found.config,
        step=found.step,
        progress=found.progress,
    )
    return load_checkpoint(path)


def _build_model(sizes: dict, tensors: dict[str, torch.Tensor]) -> CLOP:
    """The model that these tensors fill.

    Sizes that they do not fit fail before anything of that size is allocated.
    """
    weights = {
        name.removeprefix("model."): t.float()
        for name, t in tensors.items()
        if name.startswith("model.")
    }
    config = ModelConfig(**sizes)
    if config.video_layers + config.text_layers > len(weights):
        raise ValueError(
            f"{config.video_layers} + {config.text_layers} layers in {len(weights)} tensors"
        )
    with torch.device("meta"):  # shapes only
        model = CLOP(config)
    model.load_state_dict(weights, assign=True)
    return model


def resume_checkpoint(folder, *, repair: bool = True) -> Checkpoint | None:
    """What a run in this folder goes on from: its newest whole checkpoint, with training state;
    None if there is none.

    A damaged one is named on stderr and renamed to *.damaged (without `repair`: skipped), and the
    one before it taken. Raises UserError where all are damaged: a run of days is not started anew
    by itself.
    """
    folder = Path(folder)
    if repair:
        for leftover in folder.glob(
            ".*.safetensors.*.tmp"
        ):  # of a process that was killed while it wrote
            leftover.unlink()
    damaged = None
    for path in reversed(list_checkpoints(folder)):
        try:
            return load_checkpoint(path, training=True)
        except DamagedCheckpoint as error:
            damaged = error
            if repair:
                aside = path.with_suffix(".damaged")
                os.replace(path, aside)
                print(
                    f"{error}: set aside as {aside.name}, going back to the one before it",
                    file=sys.stderr,
                    flush=True,
                )
    if damaged or any(folder.glob("step-*.damaged")):
        raise UserError(
            f"{folder}: no checkpoint here is whole; delete the folder to start anew, or restore one"
        )
    return None


def list_checkpoints(folder) -> list[Path]:
    """step-<number>.safetensors of a run, fewest steps first; best.safetensors is none of them."""
    found = {
        path: re.fullmatch(r"step-(\d+)\.safetensors", path.name) for path in Path(folder).iterdir()
    }
    return sorted(
        (path for path, name in found.items() if name), key=lambda path: int(found[path][1])
    )


def newest_checkpoint(folder) -> Path:
    """The checkpoint with the most steps in a run's folder.

    Raises UserError where there is none.
    """
    found = list_checkpoints(folder)
    if not found:
        raise UserError(
            f"{folder}: no step-*.safetensors in this folder; train first, or name the file itself"
        )
    return found[-1]


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hash(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def main():
    if sys.argv[1:2] == ["--export"]:
        if len(sys.argv) != 4:
            raise UserError(
                "--export: takes two paths, a checkpoint or a run's folder, and the new file"
            )
        found = export_checkpoint(*sys.argv[2:])
        return print(
            f"{found.path}: step {found.step}, {found.path.stat().st_size / 1e6:.1f} MB, fp16"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = sys.argv[1] if len(sys.argv) > 1 else f"{folder}/fresh.safetensors"
        if len(sys.argv) == 1:
            captions = ["a dog chases a cat", "two red balls bounce"]
            tokenizer = Tokenizer.train(captions, 300)
            vocab = ConceptVocab.build(extract_many(captions), min_count=1)
            model = CLOP(
                build_config("toy", vocab_size=tokenizer.vocab_size, num_concepts=len(vocab))
            )
            save_checkpoint(path, model, tokenizer, vocab, config={}, step=0)
        found = load_checkpoint(path)
        print(
            f"{found.path}: step {found.step}, sha256 {found.sha256[:16]}…, {found.path.stat().st_size / 1e6:.1f} MB"
        )
        print("model:", asdict(found.model.config))
        print(
            f"{found.tokenizer.vocab_size} tokens; {len(found.concept_vocab)} concepts:",
            *found.concept_vocab.names[:8],
        )


if __name__ == "__main__":
    run(main)
