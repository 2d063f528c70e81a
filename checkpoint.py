"""One file that carries all: weights, sizes, vocabulary, concepts, and what a run needs to go on.

A checkpoint is a safetensors file (https://github.com/huggingface/safetensors): a JSON header, then raw tensors.
Reading it runs no code. `model.*` are the weights; `training.*` what only a resumed run wants (optimizer moments,
random states). The header's metadata holds JSON: model sizes, tokenizer, concept vocabulary, the run's configuration,
step, and a SHA-256 over names and bytes of all tensors, verified at every read. So evaluation never needs a second
file, and never takes a damaged one.

Written to a temporary file in the same folder, flushed to disk, then renamed over the target: whoever reads sees the
old file or the new one, never half of one. (`torch.save` would write a pickle: reading one runs what is in it.)

    python checkpoint.py runs/toy      # what is in the newest checkpoint there (without a path: in a fresh model's)
    python checkpoint.py --export runs/toy FILE     # weights alone, in half precision: to publish or to evaluate
"""

import hashlib
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cli import UserError, run
from knowledge import ConceptVocab, extract_knowledge
from model import CLOP, ModelConfig, build_config
from tokenizer import Tokenizer


@dataclass
class Checkpoint:
    """What `load_checkpoint` returns. `training` is empty unless asked for."""

    model: CLOP
    tokenizer: Tokenizer
    concept_vocab: ConceptVocab
    config: dict                       # the run's TrainConfig
    step: int                          # optimizer steps done
    progress: dict                     # what else the run wants back (best score, position, …)
    sha256: str                        # of the tensors
    path: Path
    training: dict[str, torch.Tensor]


def save_checkpoint(path, model, tokenizer, concept_vocab, *, config: dict, step: int, progress: dict | None = None,
                    training: dict[str, torch.Tensor] | None = None) -> str:
    """Write atomically; returns the SHA-256. Raises UserError if the folder cannot be written or the disk is full."""
    path = Path(path)
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    tensors |= {f"training.{name}": t for name, t in (training or {}).items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    sha256 = _hash(tensors)
    header = dict(model=asdict(model.config), tokenizer=tokenizer.to_dict(), concept_vocab=concept_vocab.to_dict(),
                  config=config, step=step, progress=progress or {}, sha256=sha256)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={"clop": json.dumps(header)})
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: checkpoint not written ({error}); free the disk or choose another --out") from error
    return sha256


def load_checkpoint(path, device="cpu", *, training: bool = False) -> Checkpoint:
    """Read and verify a checkpoint file, or the newest in a folder. Raises UserError: missing, damaged, or not ours."""
    path = newest_checkpoint(path) if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; "
                        "train one with `python train.py` or name another with --checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["clop"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except KeyError as error:
        raise UserError(f"{path}: not a CLOP checkpoint (its header has no 'clop' entry); "
                        "it was not written by train.py") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({error}); use an earlier checkpoint") from error
    if _hash(tensors) != header["sha256"]:
        raise UserError(f"{path}: damaged, its tensors do not match their checksum; use an earlier checkpoint")
    try:
        model = CLOP(ModelConfig(**header["model"]))
        model.load_state_dict({name.removeprefix("model."): t for name, t in tensors.items()
                               if name.startswith("model.")})
        return Checkpoint(
            model=model.to(device).eval(), tokenizer=Tokenizer.from_dict(header["tokenizer"]),
            concept_vocab=ConceptVocab.from_dict(header["concept_vocab"]), config=header["config"], step=header["step"],
            progress=header["progress"], sha256=header["sha256"], path=path,
            training={name.removeprefix("training."): t for name, t in tensors.items()
                      if training and name.startswith("training.")})
    except (KeyError, TypeError, RuntimeError) as error:  # whole, but the layout of another version of this code
        raise UserError(f"{path}: written by another version of this code ({str(error).splitlines()[0]}); "
                        "use that version, or train again") from error


def export_checkpoint(source, path) -> Checkpoint:
    """Write the checkpoint `source` (file, or newest of a folder) without its training state, weights in float16.

    About a sixth of the file. fp16 keeps 11 significant bits: a relative error of up to 2^-11 in each weight; models
    are read back into float32. Returns what the new file holds. Raises UserError: a weight too large for fp16, or any
    of `load_checkpoint` and `save_checkpoint`.
    """
    found = load_checkpoint(source)
    found.model.half()
    if not all(torch.isfinite(t).all() for t in found.model.state_dict().values()):
        raise UserError(f"{found.path}: has weights beyond 65,504 or NaN, which fp16 cannot hold; it has diverged")
    save_checkpoint(path, found.model, found.tokenizer, found.concept_vocab, config=found.config, step=found.step,
                    progress=found.progress)
    return load_checkpoint(path)


def list_checkpoints(folder) -> list[Path]:
    """step-*.safetensors of a run, oldest first."""
    return sorted(Path(folder).glob("step-*.safetensors"))


def newest_checkpoint(folder) -> Path:
    """The checkpoint with the most steps in a run's folder. Raises UserError where there is none."""
    found = list_checkpoints(folder)
    if not found:
        raise UserError(f"{folder}: no step-*.safetensors in this folder; train first, or name the file itself")
    return found[-1]


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
            raise UserError("--export: takes two paths, a checkpoint or a run's folder, and the new file")
        found = export_checkpoint(*sys.argv[2:])
        return print(f"{found.path}: step {found.step}, {found.path.stat().st_size / 1e6:.1f} MB, fp16")
    with tempfile.TemporaryDirectory() as folder:
        path = sys.argv[1] if len(sys.argv) > 1 else f"{folder}/fresh.safetensors"
        if len(sys.argv) == 1:
            captions = ["a dog chases a cat", "two red balls bounce"]
            tokenizer = Tokenizer.train(captions, 300)
            vocab = ConceptVocab.build(map(extract_knowledge, captions), min_count=1)
            model = CLOP(build_config("toy", vocab_size=tokenizer.vocab_size, num_concepts=len(vocab)))
            save_checkpoint(path, model, tokenizer, vocab, config={}, step=0)
        found = load_checkpoint(path)
        print(f"{found.path}: step {found.step}, sha256 {found.sha256[:16]}…, {found.path.stat().st_size / 1e6:.1f} MB")
        print("model:", asdict(found.model.config))
        print(f"{found.tokenizer.vocab_size} tokens; {len(found.concept_vocab)} concepts:",
              *found.concept_vocab.names[:8])


if __name__ == "__main__":
    run(main)
