"""One file that carries all: weights, sizes, vocabulary, concepts, and what a run needs to go on.

A checkpoint is a safetensors file (https://github.com/huggingface/safetensors): a JSON header, then
raw tensors. Reading it runs no code, while a pickle, as `torch.save` writes it, runs what is in it.

    model.*       the weights
    training.*    what only a resumed run wants: the optimizer's moments
    trained_on    hashes of the names of all videos that it has learned from
    header        JSON: sizes of the model, tokenizer, concept vocabulary, the run's configuration,
                  step and progress, how many videos of how many it has learned from; a SHA-256 over
                  all tensors, and one over this JSON

Both checksums are verified at every read. So evaluation never needs a second file, and never takes
a damaged one. There is no state of a random generator: all that a run draws is a pure function of
seed, epoch and sample.

The folder of a run holds step-*.safetensors, the last few, and best.safetensors, the best on
validation. A resumed run takes the newest whole one (`resume_checkpoint`): it names a damaged one,
sets it aside, and takes the one before. Evaluation does not: the number of another file than the
named one would be a wrong number.

    python -m training.checkpoint runs/toy          # what is in the newest checkpoint there
    python -m training.checkpoint runs/toy FILE     # export the weights alone, in half precision
"""

import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode
from tyro.conf import Positional

from captions.tokenizer import Tokenizer
from cli import UserError, parse_config, run, write_whole
from datasets.split import TrainedOn
from knowledge import ConceptVocab
from model import CLOP, ModelConfig


class DamagedCheckpoint(UserError):
    """The file is cut off, or its bytes are not those that were written."""


@dataclass
class Checkpoint:
    """What `load_checkpoint` returns."""

    model: CLOP
    tokenizer: Tokenizer
    concept_vocab: ConceptVocab
    config: dict  # the run's TrainConfig
    step: int  # optimizer steps done
    progress: dict  # what else the run wants back: best score, skipped steps
    sha256: str  # of the tensors
    path: Path
    training: dict[str, torch.Tensor]  # empty unless asked for
    trained_on: TrainedOn = field(default_factory=TrainedOn)


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
    trained_on: TrainedOn | None = None,
) -> str:
    """Write a checkpoint, whole or not at all; its SHA-256.

    Raises UserError where the folder cannot be written or the disk is full.
    """
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    tensors |= {f"training.{name}": t for name, t in (training or {}).items()}

    trained_on = trained_on or TrainedOn()
    if len(trained_on.names):
        tensors["trained_on"] = torch.from_numpy(trained_on.names)
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}

    sha256 = hash_tensors(tensors)
    contents = dict(
        model=asdict(model.config),
        tokenizer=tokenizer.to_dict(),
        concept_vocab=concept_vocab.to_dict(),
        config=config,
        step=step,
        progress=progress or {},
        trained_on=trained_on.counts,
        sha256=sha256,
    )
    header = json.dumps(contents)
    metadata = {"clop": header, "clop_sha256": hash_text(header)}

    with write_whole(path) as unfinished:
        try:
            save_file(tensors, unfinished, metadata)
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(error) from error
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())  # on the disk before it has the name
    return sha256


# settings that name files of the machine that trained
PLACES = {"out", "cache", "data", "val_data", "data_root", "videos_root", "init"}


def export_checkpoint(source: str | Path, path: str | Path) -> Checkpoint:
    """Write `source`, a checkpoint or the newest of a folder, without its training state and the
    places on its machine, and with weights in float16; what the new file holds.

    It has about a sixth of the size. float16 keeps 11 significant bits: an error of at most 2^-11
    of each weight. Models are read back into float32. Raises UserError where a weight is too large
    for float16, or as `load_checkpoint` and `save_checkpoint`.
    """
    found = load_checkpoint(source)
    model = found.model.half()
    if not all(t.isfinite().all() for t in model.state_dict().values()):
        raise UserError(
            f"{found.path}: has weights beyond 65,504 or NaN, which fp16 cannot hold: it has "
            "diverged; export an earlier checkpoint"
        )
    names = ("tokenizer", "concept_vocab", "step", "progress", "trained_on")
    kept = {name: getattr(found, name) for name in names}
    config = {name: value for name, value in found.config.items() if name not in PLACES}
    save_checkpoint(path, model, config=config, **kept)
    return load_checkpoint(path)


# ---- read ----------------------------------------------------------------------------------------


def load_checkpoint(path: str | Path, device: str = "cpu", *, training: bool = False) -> Checkpoint:
    """Read and verify a checkpoint, or the newest one in a folder.

    Raises UserError where it is missing, not ours or of another version, and DamagedCheckpoint.
    """
    path = newest_checkpoint(path) if Path(path).is_dir() else Path(path)
    contents, tensors = read_file(path)

    try:
        trained_on = TrainedOn()
        if "trained_on" in tensors:
            trained_on = TrainedOn(tensors["trained_on"].numpy(), dict(contents["trained_on"]))

        return Checkpoint(
            model=build_model(contents["model"], below("model.", tensors)).to(device).eval(),
            tokenizer=Tokenizer.from_dict(contents["tokenizer"]),
            concept_vocab=ConceptVocab.from_dict(contents["concept_vocab"]),
            config=dict(contents["config"]),
            step=int(contents["step"]),
            progress=dict(contents["progress"]),
            sha256=contents["sha256"],
            path=path,
            training=below("training.", tensors) if training else {},
            trained_on=trained_on,
        )
    except Exception as error:  # a header that is laid out in another way raises nearly any
        why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise UserError(
            f"{path}: written by another version of this code ({why}); use that version, or train "
            "again"
        ) from error


def read_file(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """(our header, {name: tensor}), whose checksums hold."""
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
            f"{path}: not a CLOP checkpoint (its header has no 'clop' entry); use a file that "
            "train.py wrote (CLIP's weights are for --init, or eval.py's --checkpoint)"
        )

    header_is_whole = hash_text(metadata["clop"]) == metadata.get("clop_sha256")
    contents = json.loads(metadata["clop"]) if header_is_whole else {}
    if contents.get("sha256") != hash_tensors(tensors):
        raise DamagedCheckpoint(
            f"{path}: damaged, does not match its checksum; use an earlier checkpoint"
        )
    return contents, tensors


def below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those whose names start like this, by the rest of their names."""
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


def build_model(sizes: dict, weights: dict[str, torch.Tensor]) -> CLOP:
    """The model that these weights fill.

    Sizes that they do not fit fail before anything of that size is allocated.
    """
    config = ModelConfig(**sizes)
    layers = config.video_layers + config.text_layers
    if layers > len(weights):
        raise ValueError(f"{layers} layers in {len(weights)} tensors")
    with torch.device("meta"), NoDraws():  # shapes only
        model = CLOP(config)
    weights = {name: t.float() for name, t in weights.items()}
    model.load_state_dict(weights, assign=True)
    return model


class NoDraws(TorchFunctionMode):
    """No random first weights: on "meta" they would import torch._dynamo, which takes seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.init.normal_:
            return kwargs["tensor"]
        return func(*args, **kwargs or {})


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def hash_tensors(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over the names, types, shapes and bytes of all tensors, by name."""
    digest = hashlib.sha256()
    for name, t in sorted(tensors.items()):
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- the folder of a run -------------------------------------------------------------------------


def resume_checkpoint(folder: str | Path, *, repair: bool = True) -> Checkpoint | None:
    """The newest whole checkpoint of a run, with its training state; None where there is none.

    A damaged one is named on stderr, renamed to *.damaged, and the one before it taken (without
    `repair`: skipped in silence). Raises UserError where all are damaged: a run of days must not
    start anew by itself.
    """
    folder = Path(folder)
    if repair:
        for leftover in folder.glob(".*.unfinished.safetensors"):  # of a process that was killed
            leftover.unlink()

    any_damaged = any(folder.glob("step-*.damaged"))
    for path in reversed(list_checkpoints(folder)):
        try:
            return load_checkpoint(path, training=True)
        except DamagedCheckpoint as error:
            any_damaged = True
            if repair:
                aside = path.with_suffix(".damaged")
                os.replace(path, aside)
                line = f"{error}: set aside as {aside.name}, going back to the one before it"
                print(line, file=sys.stderr, flush=True)

    if any_damaged:
        raise UserError(
            f"{folder}: no checkpoint here is whole; delete the folder to start anew, or restore "
            "one"
        )
    return None


def list_checkpoints(folder: str | Path) -> list[Path]:
    """step-<number>.safetensors of a run, fewest steps first (so without best.safetensors)."""
    named = Path(folder).glob("step-*.safetensors")
    numbered = [path for path in named if path.stem[5:].isdecimal()]
    return sorted(numbered, key=lambda path: int(path.stem[5:]))


def newest_checkpoint(folder: str | Path) -> Path:
    """The checkpoint with the most steps. Raises UserError where there is none."""
    found = list_checkpoints(folder)
    if not found:
        raise UserError(
            f"{folder}: no step-*.safetensors in this folder; train first, or name the file itself "
            "(CLIP's weights are for --init, or eval.py's --checkpoint)"
        )
    return found[-1]


# ---- command line --------------------------------------------------------------------------------


@dataclass
class CheckpointConfig:
    """Say what is in a checkpoint, or export its weights in half precision."""

    source: Positional[str]  # a checkpoint, or a run's folder: its newest
    file: Positional[str | None] = None  # to export to


def main() -> None:
    config = parse_config(CheckpointConfig)
    source, file = config.source, config.file
    found = export_checkpoint(source, file) if file else load_checkpoint(source)

    megabytes = found.path.stat().st_size / 1e6
    print(f"{found.path}: step {found.step}, sha256 {found.sha256[:16]}…, {megabytes:.1f} MB")
    print("model:", asdict(found.model.config))
    names = ", ".join(found.concept_vocab.names[:8])
    print(f"{found.tokenizer.vocab_size} tokens; {len(found.concept_vocab)} concepts: {names}, …")


if __name__ == "__main__":
    run(main)
