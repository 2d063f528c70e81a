"""Other people's weights become ours: CLIP checkpoints, by whichever names their tensors go.

Nobody fine-tunes on a few thousand videos from scratch. One starts from CLIP (arXiv 2103.00020),
which has read 400 million captioned images, or from an earlier run. model.py holds CLIP's two
towers to the letter, so taking its weights over is a matter of names:

    Hugging Face   text_model.encoder.layers.3.mlp.fc1.weight     openai/clip-vit-base-patch32, …
    OpenAI         transformer.resblocks.3.mlp.c_fc.weight        their own files, and open_clip's
    ours           text.blocks.3.mlp.0.weight

The layout is recognised by its names; the sizes follow from the shapes. Shapes cannot tell two
things: the number of heads, and which GELU the weights were trained with (OpenAI's: QuickGELU; most
later ones: the exact one). The wrong one runs, and is quietly bad. So they are read from the
`config.json` or `open_clip_config.json` beside the weights, or known because the file is OpenAI's
own. Where nothing tells them we stop and say so.

Every tensor is accounted for: taken over, or newly made because an image model has no such part
(`is_new`: attention along time, time embedding, SKP head). One too many, one missing or of another
shape ends in a line with its name. The time path starts at zero (model.py), so the fresh video
model is CLIP applied to each frame:

    video(x) = mean over t of CLIP's image embedding of frame t, before it is scaled to unit length

Places of patches are learned for one image size. For another their grid is stretched by bicubic
interpolation (without antialiasing, as in `transformers`). Safe loading only: safetensors, or a
torch file of nothing but tensors. OpenAI's .pt downloads are TorchScript, programs with weights
inside: they are not run.

    python -m training.clip FOLDER      # what is in a checkpoint of CLIP
"""

import json
import math
import pickle
import re
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from tyro.conf import Positional

from captions.tokenizer import Tokenizer
from cli import UserError, parse_config, run
from knowledge import ConceptVocab
from model import CLOP, MAX_LOGIT_SCALE, ModelConfig
from training.checkpoint import Checkpoint, hash_tensors, list_checkpoints, load_checkpoint

# ---- names ---------------------------------------------------------------------------------------

# pieces of names, theirs → ours; what is still unknown after this is rejected
HUGGING_FACE = {
    "vision_model.embeddings.class_embedding": "video.class_embed",
    "vision_model.embeddings.patch_embedding": "video.patch_embed",
    "vision_model.embeddings.position_embedding.weight": "video.place_embed",
    "vision_model.pre_layrnorm": "video.norm_in",  # their spelling
    "vision_model.encoder.layers": "video.blocks",
    "vision_model.post_layernorm": "video.norm_out",
    "visual_projection": "video.project",
    "text_model.embeddings.token_embedding": "text.token_embed",
    "text_model.embeddings.position_embedding.weight": "text.position_embed",
    "text_model.encoder.layers": "text.blocks",
    "text_model.final_layer_norm": "text.norm_out",
    "text_projection": "text.project",
    ".layer_norm1.": ".norm1.",
    ".layer_norm2.": ".norm2.",
    ".self_attn.": ".attn.",
    "out_proj": "out",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}
OPENAI = {
    "visual.class_embedding": "video.class_embed",
    "visual.conv1": "video.patch_embed",
    "visual.positional_embedding": "video.place_embed",
    "visual.ln_pre": "video.norm_in",
    "visual.transformer.resblocks": "video.blocks",
    "visual.ln_post": "video.norm_out",
    "visual.proj": "video.project.weight",
    "token_embedding": "text.token_embed",
    "positional_embedding": "text.position_embed",
    "transformer.resblocks": "text.blocks",
    "ln_final": "text.norm_out",
    "text_projection": "text.project.weight",
    ".ln_1.": ".norm1.",
    ".ln_2.": ".norm2.",
    "in_proj_": "qkv.",
    "out_proj": "out",
    "mlp.c_fc": "mlp.0",
    "mlp.c_proj": "mlp.2",
}
KNOWN_BY = {  # a tensor that only this layout has: its name, and the table
    "vision_model.embeddings.patch_embedding.weight": ("Hugging Face", HUGGING_FACE),
    "visual.conv1.weight": ("OpenAI", OPENAI),
}
# numbers that only OpenAI's own files carry
OPENAI_SIZES = {"input_resolution", "context_length", "vocab_size"}
NO_WEIGHTS = re.compile(r"attn_mask|.*position_ids|" + "|".join(OPENAI_SIZES))
FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)


def rename(name: str, table: dict[str, str]) -> str:
    pieces = sorted(table, key=len, reverse=True)  # "visual.proj" begins other names, too
    return re.sub("|".join(map(re.escape, pieces)), lambda match: table[match[0]], name)


def is_new(name: str) -> bool:
    """Is this a tensor that CLIP does not have: attention along time, time embedding, SKP head?"""
    return "time_" in name or name.startswith("concept_head.")


def list_some(names, at_most: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


# ---- what others call for ------------------------------------------------------------------------


@dataclass
class Pretrained:
    """Weights under our names, and the sizes of the model that they fit."""

    path: Path
    sizes: ModelConfig
    weights: dict[str, torch.Tensor]  # float32
    layout: str  # whose names they had
    known_from: str  # what told heads and GELU
    tokenizer: Tokenizer | None = None

    def describe(self) -> str:
        """One line: what was found, and how the ambiguous was decided."""
        s = self.sizes
        gelu = "QuickGELU" if s.quick_gelu else "exact GELU"
        return (
            f"{self.path}: {self.layout} layout, {len(self.weights)} tensors; patches of "
            f"{s.patch_size} in {s.image_size} px, {s.video_layers} layers of {s.video_width} with "
            f"{s.video_heads} heads; text {s.text_layers} layers of {s.text_width} with "
            f"{s.text_heads} heads; {gelu} (from {self.known_from})"
        )

    def load_into(self, model: CLOP) -> list[str]:
        """Copy the weights; the names of the model's other tensors, which keep fresh values."""
        missing, unexpected = model.load_state_dict(self.weights, strict=False)
        assert not unexpected and all(map(is_new, missing)), f"{unexpected=} {missing=}"
        return missing


def read_pretrained(
    path: str | Path, *, num_frames: int = 8, image_size: int | None = None
) -> Pretrained:
    """What --init names: a run of ours, its checkpoint, or CLIP's weights.

    For videos of `num_frames` frames; image_size in pixels, None: the weights' own. The SKP head of
    a run of ours is left out: other captions have another vocabulary. Raises UserError, see
    `read_clip` and `load_checkpoint`.
    """
    path = Path(path)
    if not is_ours(path):
        found = resize(read_clip(path, num_frames=num_frames), image_size)
        found.tokenizer = Tokenizer.from_clip(found.path.parent, found.sizes.vocab_size)
        return found

    run = load_checkpoint(path)
    sizes = replace(run.model.config, num_frames=num_frames, num_concepts=0)
    weights = dict(run.model.state_dict())
    steps = math.ceil(num_frames / sizes.frames_per_patch)
    weights["video.time_embed"] = run.model.video.time_embedding(steps).detach()
    weights = {n: t for n, t in weights.items() if not n.startswith("concept_head.")}
    found = Pretrained(run.path, sizes, weights, "our", "the run itself", run.tokenizer)
    return resize(found, image_size)


def resize(found: Pretrained, image_size: int | None) -> Pretrained:
    """The same for images of another size in pixels; None: their own."""
    sizes = found.sizes
    if image_size in (None, sizes.image_size):
        return found
    if image_size < 1 or image_size % sizes.patch_size:
        raise UserError(
            f"--image-size {image_size}: not a multiple of the weights' patches of "
            f"{sizes.patch_size} pixels; their own size is {sizes.image_size}"
        )
    grid = image_size // sizes.patch_size
    places = interpolate_places(found.weights["video.place_embed"], grid)
    weights = found.weights | {"video.place_embed": places}
    return replace(found, weights=weights, sizes=replace(sizes, image_size=image_size))


def is_ours(path: Path) -> bool:
    """Is this a run's folder, or a checkpoint of train.py?"""
    if path.is_dir():
        return bool(list_checkpoints(path))
    return b'"clop"' in read_header(path)


def is_clip(path: Path) -> bool:
    """Is this the folder or the file of a CLIP? What is neither ours nor a CLIP is not."""
    if path.is_dir():
        return any((path / name).is_file() for name in FILES)
    return path.suffix == ".bin" or any(name.encode() in read_header(path) for name in KNOWN_BY)


def read_header(path: Path) -> bytes:
    """The JSON at the head of a safetensors file; of another file, whatever stands there."""
    if not path.is_file():
        return b""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return file.read(min(size, 100 << 20))


def zero_shot(path: str | Path) -> Checkpoint:
    """CLIP's weights as a checkpoint that was never trained on videos: the baseline of each table.

    The embedding of a video is the mean over its frames. Raises UserError, see `read_clip`.
    """
    found = read_pretrained(path, num_frames=12)
    model = CLOP(found.sizes).eval()
    found.load_into(model)
    vocab = ConceptVocab([], np.zeros(0), 0)
    sha256 = hash_tensors(found.weights)
    return Checkpoint(model, found.tokenizer, vocab, {}, 0, {}, sha256, found.path, {})


# ---- reading -------------------------------------------------------------------------------------


def read_clip(path: str | Path, *, num_frames: int = 8) -> Pretrained:
    """CLIP's weights from a file, or from the folder of a Hugging Face repository.

    For videos of `num_frames` frames. Raises UserError: missing, damaged, TorchScript, another
    architecture (with names and shapes), heads and GELU unknown.
    """
    file, tensors = read_tensors(Path(path))
    found = [KNOWN_BY[name] for name in KNOWN_BY if name in tensors]
    if not found:
        raise UserError(
            f"{file}: not a CLIP with a vision transformer (it holds {list_some(tensors)}); --init "
            "takes the layouts of Hugging Face's CLIPModel and of OpenAI or open_clip"
        )
    layout, table = found[0]
    theirs = {rename(name, table): name for name in tensors if not NO_WEIGHTS.fullmatch(name)}
    weights = {ours: tensors[name].float() for ours, name in theirs.items()}
    if layout == "OpenAI":
        for name in {"video.project.weight", "text.project.weight"} & weights.keys():
            weights[name] = weights[name].T  # theirs multiplies from the right
    else:
        join_qkv(weights, theirs)

    known_from, told = read_settings(file, tensors)
    try:
        sizes = ModelConfig(**read_sizes(weights, told), num_frames=num_frames)
    except (KeyError, ValueError) as error:
        raise UserError(f"{file}: not the tensors of a CLIP ({error}); fetch it again") from error

    # [D, C, p, p] -> [D, Cpp]
    weights["video.patch_embed.weight"] = weights["video.patch_embed.weight"].flatten(1)
    described = {ours: f"{name} {list(tensors[name].shape)}" for ours, name in theirs.items()}
    check_weights(file, sizes, weights, described)
    # fp16's ln 100 lies above the clamp
    weights["logit_scale"] = weights["logit_scale"].clamp(max=MAX_LOGIT_SCALE)
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    return Pretrained(file, sizes, weights, layout, known_from)


def read_tensors(path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """(the file, {name: tensor}) of a checkpoint file, or of the first of FILES in a folder.

    Runs no code of it.
    """
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise UserError(
                f"{path}: holds none of {', '.join(FILES)}; name the weights' file itself"
            )
        path = found[0]
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; --init wants a run, the weights of a CLIP, or the folder that "
            "holds them"
        )
    try:
        if path.suffix == ".safetensors":
            return path, load_file(path)
        with zipfile.ZipFile(path) as archive:  # what torch writes since 2020
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise UserError(
                    f"{path}: TorchScript, which is a program, so it is not read; where you trust "
                    "it, save its weights: "
                    "safetensors.torch.save_file(torch.jit.load(PATH).state_dict(), NEW)"
                )
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (
        SafetensorError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        OSError,
        RuntimeError,
        EOFError,
    ) as error:
        raise UserError(
            f"{path}: damaged, or a file of more than tensors ({str(error).splitlines()[0]}); "
            "fetch it again, or save the model's state_dict() as safetensors"
        ) from error

    # as open_clip's runs save it
    found = found.get("state_dict", found) if isinstance(found, dict) else {"": found}
    tensors = {str(name).removeprefix("module."): value for name, value in found.items()}
    if not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise UserError(
            f"{path}: holds other things than tensors; save the model's state_dict() as safetensors"
        )
    return path, tensors


def join_qkv(weights: dict, theirs: dict) -> None:
    """Three matrices of queries, keys and values become one: a larger product is a faster one."""
    for name in [name for name in weights if ".q_proj." in name]:
        parts = [name.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv"]
        if all(part in weights for part in parts):
            joined = name.replace(".q_proj.", ".qkv.")
            theirs[joined] = theirs[name]
            weights[joined] = torch.cat([weights.pop(part) for part in parts])


def interpolate_places(place_embed: torch.Tensor, grid: int) -> torch.Tensor:
    """Place embedding [1 + side², D] -> [1 + grid², D]; the class token keeps its own."""
    side = math.isqrt(len(place_embed) - 1)
    places = rearrange(place_embed[1:], "(h w) d -> 1 d h w", h=side)
    places = F.interpolate(places, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([place_embed[:1], rearrange(places, "1 d h w -> (h w) d")])


# ---- what no shape tells -------------------------------------------------------------------------


def read_settings(file: Path, tensors: dict) -> tuple[str, dict]:
    """(what told it, {"video_heads" or "head_width", "text_heads", "quick_gelu"})."""
    names = ["config.json", "open_clip_config.json"]
    if "visual.conv1.weight" in tensors:
        names.reverse()
    beside = [file.parent / name for name in names if (file.parent / name).is_file()]
    if not beside and OPENAI_SIZES <= tensors.keys():
        return "OpenAI's own file", dict(quick_gelu=True)
    if not beside:
        raise UserError(
            f"{file}: nothing tells its heads and which GELU it was trained with; put its "
            "config.json or open_clip_config.json beside it "
            '(OpenAI\'s weights: {"model_cfg": {"quick_gelu": true}})'
        )

    path = beside[0]
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if "model_cfg" in found:
            return path.name, settings_of_open_clip(found["model_cfg"])
        sides = found["vision_config"], found["text_config"]
        for side in sides:
            side.get("hidden_act")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path}: not the configuration of a CLIP ({type(error).__name__}: {error}); take the "
            "one from the model's page"
        ) from error

    return path.name, settings_of_hugging_face(path, *sides)


def settings_of_open_clip(model: dict) -> dict:
    return dict(
        quick_gelu=model.get("quick_gelu", False),
        head_width=model.get("vision_cfg", {}).get("head_width", 64),
        text_heads=model.get("text_cfg", {}).get("heads"),
    )


def settings_of_hugging_face(path: Path, vision: dict, text: dict) -> dict:
    """What is not stated there has the value that transformers gives it."""
    for side in (vision, text):
        epsilon = side.get("layer_norm_eps", 1e-5)
        if epsilon != 1e-5:
            raise UserError(
                f"{path}: layer_norm_eps {epsilon}: the norms of CLIP's towers have 1e-05"
            )
    acts = {side.get("hidden_act", "quick_gelu") for side in (vision, text)}
    if acts not in ({"gelu"}, {"quick_gelu"}):
        raise UserError(
            f"{path}: hidden_act {' and '.join(sorted(acts))}: both towers here have gelu, or "
            "quick_gelu"
        )
    return dict(
        quick_gelu=acts == {"quick_gelu"},
        video_heads=vision.get("num_attention_heads", 12),
        text_heads=text.get("num_attention_heads", 8),
    )


def read_sizes(weights: dict, told: dict) -> dict:
    """ModelConfig's fields from shapes; heads are 64 wide where nothing else is told.

    KeyError: a tensor lacks.
    """

    def count_blocks(tower: str) -> int:
        found = (re.match(rf"{tower}\.blocks\.(\d+)\.", name) for name in weights)
        return len({match[1] for match in found if match})

    width, _, _, patch_size = weights["video.patch_embed.weight"].shape  # [D, C, p, p]
    vocab_size, text_width = weights["text.token_embed.weight"].shape
    side = math.isqrt(len(weights["video.place_embed"]) - 1)  # patches
    return dict(
        image_size=patch_size * side,
        patch_size=patch_size,
        video_width=width,
        video_layers=count_blocks("video"),
        video_heads=told.get("video_heads") or width // told.get("head_width", 64),
        text_width=text_width,
        text_layers=count_blocks("text"),
        text_heads=told.get("text_heads") or text_width // 64,
        text_length=len(weights["text.position_embed"]),
        vocab_size=vocab_size,
        embed_dim=len(weights["text.project.weight"]),
        quick_gelu=told["quick_gelu"],
    )


def check_weights(file: Path, sizes: ModelConfig, weights: dict, described: dict) -> None:
    """Raise UserError unless the weights are exactly those of a CLIP of these sizes."""
    towers = ((sizes.video_width, sizes.video_heads), (sizes.text_width, sizes.text_heads))
    for width, heads in towers:
        if not heads or width % heads:
            raise UserError(
                f"{file}: a width of {width} cannot have {heads} heads; is the configuration its "
                "own?"
            )
    with torch.device("meta"):
        wanted = {name: t.shape for name, t in CLOP(sizes).state_dict().items() if not is_new(name)}

    unknown = [described[name] for name in weights if name not in wanted]
    missing, unfit = [], []
    for name, shape in wanted.items():
        if name not in weights:
            missing.append(f"{name} {list(shape)}")
        elif weights[name].shape != shape:
            unfit.append(f"{described[name]}, but {name} is {list(shape)}")

    for problem, names in (
        ("unknown tensors", unknown),
        ("no tensor for", missing),
        ("shapes that do not fit", unfit),
    ):
        if names:
            raise UserError(
                f"{file}: not a CLIP with a vision transformer: {problem} {list_some(names)}"
            )


# ---- command line --------------------------------------------------------------------------------


@dataclass
class ClipConfig:
    """Say what is in a checkpoint of CLIP."""

    path: Positional[str]  # its file or folder


def main() -> None:
    found = read_clip(parse_config(ClipConfig).path)
    print(found.describe())
    model = CLOP(found.sizes)
    new = found.load_into(model)
    print(f"newly made: {len(new)} of {len(model.state_dict())} tensors: {list_some(new)}")


if __name__ == "__main__":
    run(main)
