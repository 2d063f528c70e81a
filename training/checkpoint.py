"""One file that carries all: weights, sizes, vocabulary, concepts, and what a run needs to go on.

A checkpoint is a safetensors file (https://github.com/huggingface/safetensors): a JSON header, then
raw tensors. Reading it runs no code, where `torch.save` would write a program.

    model.*      the weights
    training.*   what only a resumed run wants (optimizer moments)
    header       JSON: model sizes, tokenizer, concept vocabulary, the run's configuration, step and
                 progress, and a SHA-256 over names and bytes of all tensors; beside it the SHA-256
                 of that JSON

Both hashes are verified at every read. So evaluation never needs a second file, and never takes a
damaged one. No state of a random generator is in it: all that a run draws is a pure function of
seed, epoch and sample.

A run's folder holds step-*.safetensors, the last few, and best.safetensors, the best on
validation, without training state. A resumed run takes the newest whole one (`resume_checkpoint`):
a damaged one is named, set aside, and the one before it taken. Evaluation does not: a number from
another file than the named one would be a wrong number.

    python -m training.checkpoint runs/toy          # what is in the newest checkpoint there
    python -m training.checkpoint runs/toy FILE     # its weights alone, in half precision
"""

import hashlib
import json
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tyro.conf import Positional

from captions.tokenizer import Tokenizer
from cli import UserError, parse_config, run, write_whole
from knowledge import ConceptVocab
from model import CLOP, ModelConfig

# what the parts of a header raise that another version of this code wrote
FOREIGN = (KeyError, TypeError, ValueError, AttributeError, AssertionError, ArithmeticError)


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


# ---- write ---------------------------------------------------------------------------------------


def save_checkpoint(
    path: str | Path,
    model: CLOP,
    tokenizer: Tokenizer,
    concept_vocab: ConceptVocab,
    *,
    config: dict,
    step: int,
    progress: dict | None = None,
    training: dict[str, torch.Tensor] | None = None,
) -> str:
    """Write the file, whole or not at all; returns the SHA-256.

    Raises UserError if the folder cannot be written or the disk is full.
    """
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    tensors |= {f"training.{name}": t for name, t in (training or {}).items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    sha256 = hash_tensors(tensors)

    header = json.dumps(
        dict(
            model=asdict(model.config),
            tokenizer=tokenizer.to_dict(),
            concept_vocab=concept_vocab.to_dict(),
            config=config,
            step=step,
            progress=progress or {},
            sha256=sha256,
        )
    )

    with write_whole(path) as unfinished:
        try:
            save_file(
                tensors, unfinished, metadata=dict(clop=header, clop_sha256=hash_text(header))
            )
        except SafetensorError as error:  # a full disk
            raise OSError(str(error)) from error
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())

    return sha256


def export_checkpoint(source: str | Path, path: str | Path) -> Checkpoint:
    """Write the checkpoint `source` (file, or newest of a folder) as weights in float16 alone.

    About a sixth of the file. fp16 keeps 11 significant bits: a relative error of up to 2^-11 in
    each weight; models are read back into float32. Returns what the new file holds. Raises
    UserError: a weight too large for fp16, or any of `load_checkpoint` and `save_checkpoint`.
    """
    found = load_checkpoint(source)
    found.model.half()
    if not all(torch.isfinite(t).all() for t in found.model.state_dict().values()):
        raise UserError(
            f"{found.path}: has weights beyond 65,504 or NaN, which fp16 cannot hold; it has "
            "diverged"
        )
    state = dict(config=found.config, step=found.step, progress=found.progress)
    save_checkpoint(path, found.model, found.tokenizer, found.concept_vocab, **state)
    return load_checkpoint(path)


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def hash_tensors(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- read ----------------------------------------------------------------------------------------


def load_checkpoint(path: str | Path, device: str = "cpu", *, training: bool = False) -> Checkpoint:
    """Read and verify a checkpoint file, or the newest in a folder.

    Raises UserError where it is missing, not ours, or of another version, and its subclass
    DamagedCheckpoint.
    """
    path = newest_checkpoint(path) if Path(path).is_dir() else Path(path)
    header, tensors = read_verified(path)

    try:
        return Checkpoint(
            model=build_model(header["model"], take(tensors, "model.")).to(device).eval(),
            tokenizer=Tokenizer.from_dict(header["tokenizer"]),
            concept_vocab=ConceptVocab.from_dict(header["concept_vocab"]),
            config=dict(header["config"]),
            step=int(header["step"]),
            progress=dict(header["progress"]),
            sha256=header["sha256"],
            path=path,
            training=take(tensors, "training.") if training else {},
        )
    except (*FOREIGN, RuntimeError) as error:
        why = (str(error).splitlines() or [""])[0][:200]
        raise UserError(
            f"{path}: written by another version of this code ({type(error).__name__}: {why}); use "
            "that version, or train again"
        ) from error


def read_verified(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """(header, tensors) of a file whose hashes are right. Errors as of `load_checkpoint`."""
    if not path.is_file():
        raise UserError(
            f"{path}: no such checkpoint; train one with `python train.py` or name another with "
            "--checkpoint"
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
            f"{path}: not a CLOP checkpoint (its header has no 'clop' entry); it was not written "
            "by train.py"
        )
    header = metadata["clop"]
    if hash_text(header) != metadata.get("clop_sha256"):
        raise DamagedCheckpoint(
            f"{path}: damaged, its header does not match its checksum; use an earlier checkpoint"
        )
    header = json.loads(header)
    if not isinstance(header, dict) or hash_tensors(tensors) != header.get("sha256"):
        raise DamagedCheckpoint(
            f"{path}: damaged, its tensors do not match their checksum; use an earlier checkpoint"
        )
    return header, tensors


def take(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Those whose names begin so, under the rest of their names."""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            found[name.removeprefix(prefix)] = tensor
    return found


def build_model(sizes: dict, weights: dict[str, torch.Tensor]) -> CLOP:
    """The model that these weights fill.

    Sizes that they do not fit fail before anything of that size is allocated.
    """
    config = ModelConfig(**sizes)
    if config.video_layers + config.text_layers > len(weights):
        raise ValueError(
            f"{config.video_layers} + {config.text_layers} layers in {len(weights)} tensors"
        )
    with torch.device("meta"):  # shapes only
        model = CLOP(config)
    model.load_state_dict({name: t.float() for name, t in weights.items()}, assign=True)
    return model


# ---- a run's folder ------------------------------------------------------------------------------


def resume_checkpoint(folder: str | Path, *, repair: bool = True) -> Checkpoint | None:
    """What a run in this folder goes on from: its newest whole checkpoint; None if there is none.

    With training state. A damaged one is named on stderr and renamed to *.damaged (without
    `repair`: skipped), and the one before it taken. Raises UserError where all are damaged: a run
    of days is not started anew by itself.
    """
    folder, damaged = Path(folder), None
    if repair:
        for leftover in folder.glob(".*.unfinished.safetensors"):  # of a killed process
            leftover.unlink()
    for path in reversed(list_checkpoints(folder)):
        try:
            return load_checkpoint(path, training=True)
        except DamagedCheckpoint as error:
            damaged = error
            if repair:
                aside = path.with_suffix(".damaged")
                os.replace(path, aside)
                what = f"set aside as {aside.name}, going back to the one before it"
                print(f"{error}: {what}", file=sys.stderr, flush=True)

    if damaged or any(folder.glob("step-*.damaged")):
        raise UserError(
            f"{folder}: no checkpoint here is whole; delete the folder to start anew, or restore "
            "one"
        )
    return None


def list_checkpoints(folder: str | Path) -> list[Path]:
    """step-<number>.safetensors of a run, fewest steps first; best.safetensors is none of them."""
    found = []
    for path in Path(folder).iterdir():
        if name := re.fullmatch(r"step-(\d+)\.safetensors", path.name):
            found.append((int(name[1]), path))
    return [path for _, path in sorted(found)]


def newest_checkpoint(folder: str | Path) -> Path:
    """The checkpoint with the most steps in a run's folder. Raises UserError if there is none."""
    found = list_checkpoints(folder)
    if not found:
        raise UserError(
            f"{folder}: no step-*.safetensors in this folder; train first, or name the file itself"
        )
    return found[-1]


# ---- command line --------------------------------------------------------------------------------


@dataclass
class CheckpointConfig:
    """Say what is in a checkpoint, or export it."""

    source: Positional[str]  # a checkpoint, or a run's folder: its newest
    export: Positional[str | None] = None  # file for its weights alone, in half precision


def main() -> None:
    config = parse_config(CheckpointConfig)
    if config.export:
        found = export_checkpoint(config.source, config.export)
    else:
        found = load_checkpoint(config.source)
    megabytes = found.path.stat().st_size / 1e6
    print(f"{found.path}: step {found.step}, sha256 {found.sha256[:16]}…, {megabytes:.1f} MB")
    print("model:", asdict(found.model.config))
    names = ", ".join(found.concept_vocab.names[:8])
    print(f"{found.tokenizer.vocab_size} tokens; {len(found.concept_vocab)} concepts: {names}, …")


if __name__ == "__main__":
    run(main)
