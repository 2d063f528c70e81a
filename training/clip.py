"""Other people's weights become ours: CLIP checkpoints, by whichever names their tensors go.

Nobody fine-tunes on a few thousand videos from scratch: one starts from CLIP (arXiv 2103.00020),
which has read 400 million captioned images. model.py holds its two towers to the letter, so taking
its weights over is a matter of names:

    Hugging Face   text_model.encoder.layers.3.mlp.fc1.weight     openai/clip-vit-base-patch32,
                                                                  -patch16, large-patch14
    OpenAI         transformer.resblocks.3.mlp.c_fc.weight        OpenAI's own files, and all that
                                                                  open_clip writes
    ours           text.blocks.3.mlp.0.weight

The layout is recognised by its names; the sizes follow from the shapes. Shapes cannot tell two
things: the number of heads, and which GELU the weights were trained with (OpenAI's: QuickGELU; most
later ones: the exact one). The wrong one runs, and is quietly bad. So they are read from the
`config.json` or `open_clip_config.json` beside the weights, or known because the file is OpenAI's
own; where nothing tells them we stop and say so.

Every tensor is accounted for: taken over, or newly made because an image model has no such part
(`is_new`: attention along time, time embedding, SKP head); one too many, one missing or of another
shape ends in a line with its name. The time path starts at zero (model.py), so the fresh video
model is CLIP applied to each frame:

    video(x) = mean over t of CLIP's image embedding of frame t, before it is scaled to unit length

Places of patches are learned for one image size; for another their grid is stretched by bicubic
interpolation (without antialiasing, as in `transformers`). Safe loading only: safetensors, or a
torch file of nothing but tensors (`weights_only=True`). OpenAI's .pt downloads are TorchScript,
programs with weights inside: they are not run.

    python -m training.clip PATH      # what is in a checkpoint of CLIP (without a path: in a small
                                      random one of its own)
"""

import json
import math
import pickle
import re
import sys
import tempfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cli import UserError, run
from model import CLOP, MAX_LOGIT_SCALE, ModelConfig, build_config

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
LAYOUTS = {
    "Hugging Face": (
        "vision_model.embeddings.patch_embedding.weight",
        HUGGING_FACE,
    ),  # known by this tensor
    "OpenAI": ("visual.conv1.weight", OPENAI),
}
OPENAI_SIZES = {
    "input_resolution",
    "context_length",
    "vocab_size",
}  # numbers that only OpenAI's own files carry
NO_WEIGHTS = re.compile(r"attn_mask|.*position_ids|" + "|".join(OPENAI_SIZES))
FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)


@dataclass
class Pretrained:
    """Weights under our names, and the sizes of the model that they fit."""

    path: Path
    sizes: ModelConfig
    weights: dict[str, torch.Tensor]  # float32
    layout: str  # whose names they had
    known_from: str  # what told heads and GELU

    def describe(self) -> str:
        """One line: what was found, and how the ambiguous was decided."""
        s = self.sizes
        return (
            f"{self.path}: {self.layout} layout, {len(self.weights)} tensors; patches of {s.patch_size} in "
            f"{s.image_size} px, {s.video_layers} layers of {s.video_width} with {s.video_heads} heads; text "
            f"{s.text_layers} layers of {s.text_width} with {s.text_heads} heads; "
            f"{'QuickGELU' if s.quick_gelu else 'exact GELU'} (from {self.known_from})"
        )

    def load_into(self, model: CLOP) -> list[str]:
        """Copy the weights; the names of the model's other tensors, which keep their fresh values."""
        missing, unexpected = model.load_state_dict(self.weights, strict=False)
        assert not unexpected and all(map(is_new, missing)), (
            f"not accounted for: {unexpected} {missing}"
        )
        return missing


def is_new(name: str) -> bool:
    """Is this tensor of ours one that CLIP does not have: attention along time, time embedding, SKP
    head?
    """
    return "time_" in name or name.startswith("concept_head.")


def read_clip(
    path: str | Path, *, num_frames: int = 8, image_size: int | None = None
) -> Pretrained:
    """CLIP's weights from a file, or from the folder of a Hugging Face repository, for videos of
    `num_frames` frames.

    `image_size` in pixels: None is the weights' own. Raises UserError: missing, damaged,
    TorchScript, another architecture (with names and shapes), heads and GELU unknown, an image size
    that the patches do not divide.
    """
    file, tensors = read_tensors(Path(path))
    layout = next((name for name, (known_by, _) in LAYOUTS.items() if known_by in tensors), None)
    if layout is None:
        raise UserError(
            f"{file}: not a CLIP with a vision transformer (it holds {_list(tensors)}); --init takes the "
            "layouts of Hugging Face's CLIPModel and of OpenAI or open_clip"
        )
    theirs = {
        _rename(name, LAYOUTS[layout][1]): name
        for name in tensors
        if not NO_WEIGHTS.fullmatch(name)
    }
    weights = {ours: tensors[name].float() for ours, name in theirs.items()}
    if layout == "OpenAI":
        for name in {"video.project.weight", "text.project.weight"} & weights.keys():
            weights[name] = weights[name].T  # theirs multiplies from the right
    else:
        _join_qkv(weights, theirs)
    known_from, told = _read_settings(file, tensors)
    try:
        sizes = ModelConfig(**_read_sizes(weights, told), num_frames=num_frames)
    except (KeyError, ValueError) as error:
        raise UserError(f"{file}: not the tensors of a CLIP ({error}); fetch it again") from error
    weights["video.patch_embed.weight"] = weights["video.patch_embed.weight"].flatten(
        1
    )  # [D, C, p, p] -> [D, Cpp]
    _check(
        file,
        sizes,
        weights,
        {ours: f"{name} {list(tensors[name].shape)}" for ours, name in theirs.items()},
    )
    weights["logit_scale"] = weights["logit_scale"].clamp(
        max=MAX_LOGIT_SCALE
    )  # fp16's ln 100 lies above the clamp
    if image_size not in (None, sizes.image_size):
        if image_size < 1 or image_size % sizes.patch_size:
            raise UserError(
                f"--image-size {image_size}: not a multiple of the weights' patches of "
                f"{sizes.patch_size} pixels; their own size is {sizes.image_size}"
            )
        weights["video.place_embed"] = interpolate_places(
            weights["video.place_embed"], image_size // sizes.patch_size
        )
        sizes = replace(sizes, image_size=image_size)
    return Pretrained(
        file, sizes, {name: t.contiguous() for name, t in weights.items()}, layout, known_from
    )


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
            f"{path}: no such file; --init wants the weights of a CLIP, or the folder that holds them"
        )
    try:
        if path.suffix == ".safetensors":
            return path, load_file(path)
        with zipfile.ZipFile(
            path
        ) as archive:  # what torch writes since 2020; before that, there was no CLIP
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise UserError(
                    f"{path}: TorchScript, which is a program, so it is not read; where you trust it, save "
                    "its weights: safetensors.torch.save_file(torch.jit.load(PATH).state_dict(), NEW)"
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
    found = found.get("state_dict", found) if isinstance(found, dict) else {"": found}
    tensors = {
        str(name).removeprefix("module."): value for name, value in found.items()
    }  # as open_clip's runs save it
    if not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise UserError(
            f"{path}: holds other things than tensors; save the model's state_dict() as safetensors"
        )
    return path, tensors


def interpolate_places(place_embed: torch.Tensor, grid: int) -> torch.Tensor:
    """The place embedding [1 + side², D] for another grid of patches: [1 + grid², D]; the class
    token keeps its own.
    """
    side = math.isqrt(len(place_embed) - 1)
    places = rearrange(place_embed[1:], "(h w) d -> 1 d h w", h=side)
    places = F.interpolate(places, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([place_embed[:1], rearrange(places, "1 d h w -> (h w) d")])


def _rename(name: str, table: dict[str, str]) -> str:
    pieces = sorted(
        table, key=len, reverse=True
    )  # the longest first: "visual.proj" begins other names, too
    return re.sub("|".join(map(re.escape, pieces)), lambda match: table[match[0]], name)


def _join_qkv(weights: dict, theirs: dict):
    """Three matrices of queries, keys and values become one: a larger product is a faster one."""
    for name in [name for name in weights if ".q_proj." in name]:
        parts = [name.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv"]
        if all(part in weights for part in parts):
            joined = name.replace(".q_proj.", ".qkv.")
            theirs[joined] = theirs[name]
            weights[joined] = torch.cat([weights.pop(part) for part in parts])


def _read_settings(file: Path, tensors: dict) -> tuple[str, dict]:
    """(what told it, {"video_head_width" or "video_heads", "text_heads", "quick_gelu"}): what no
    shape tells.
    """
    names = ("config.json", "open_clip_config.json")
    beside = next(
        (
            file.parent / name
            for name in (names if "visual.conv1.weight" not in tensors else names[::-1])
            if (file.parent / name).is_file()
        ),
        None,
    )
    if beside is None and OPENAI_SIZES <= tensors.keys():
        return "OpenAI's own file", dict(quick_gelu=True)
    if beside is None:
        raise UserError(
            f"{file}: nothing tells its heads and which GELU it was trained with; put its config.json or "
            'open_clip_config.json beside it (OpenAI\'s weights: {"model_cfg": {"quick_gelu": true}})'
        )
    try:
        found = json.loads(beside.read_text(encoding="utf-8"))
        if "model_cfg" in found:
            model = found["model_cfg"]
            return beside.name, dict(
                quick_gelu=model.get("quick_gelu", False),
                head_width=model.get("vision_cfg", {}).get("head_width", 64),
                text_heads=model.get("text_cfg", {}).get("heads"),
            )
        vision, text = found["vision_config"], found["text_config"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{beside}: not the configuration of a CLIP ({type(error).__name__}: {error}); "
            "take the one from the model's page"
        ) from error
    for side in (vision, text):  # what is not stated there has the value that transformers gives it
        if side.get("layer_norm_eps", 1e-5) != 1e-5:
            raise UserError(
                f"{beside}: layer_norm_eps {side['layer_norm_eps']}: the norms of CLIP's towers have 1e-05"
            )
    acts = {side.get("hidden_act", "quick_gelu") for side in (vision, text)}
    if acts not in ({"gelu"}, {"quick_gelu"}):
        raise UserError(
            f"{beside}: hidden_act {' and '.join(sorted(acts))}: both towers here have gelu, or quick_gelu"
        )
    return beside.name, dict(
        quick_gelu=acts == {"quick_gelu"},
        video_heads=vision.get("num_attention_heads", 12),
        text_heads=text.get("num_attention_heads", 8),
    )


def _read_sizes(weights: dict, told: dict) -> dict:
    """ModelConfig's fields, from shapes; heads are 64 wide where nothing else is told.

    KeyError: a tensor lacks.
    """

    def count_blocks(tower):
        return len(
            {
                match[1]
                for name in weights
                if (match := re.match(rf"{tower}\.blocks\.(\d+)\.", name))
            }
        )

    width, _, _, patch_size = weights["video.patch_embed.weight"].shape  # [D, C, p, p]
    vocab_size, text_width = weights["text.token_embed.weight"].shape
    return dict(
        image_size=patch_size * math.isqrt(len(weights["video.place_embed"]) - 1),
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


def _check(file: Path, sizes: ModelConfig, weights: dict, theirs: dict[str, str]):
    """Raise UserError unless the weights are exactly those of a model of these sizes, but for what
    is new in ours.
    """
    for width, heads in (
        (sizes.video_width, sizes.video_heads),
        (sizes.text_width, sizes.text_heads),
    ):
        if not heads or width % heads:
            raise UserError(
                f"{file}: a width of {width} cannot have {heads} heads; is the configuration its own?"
            )
    with torch.device("meta"):
        wanted = {name: t.shape for name, t in CLOP(sizes).state_dict().items() if not is_new(name)}
    problems = {
        "unknown tensors": [theirs[name] for name in weights if name not in wanted],
        "no tensor for": [
            f"{name} {list(shape)}" for name, shape in wanted.items() if name not in weights
        ],
        "shapes that do not fit": [
            f"{theirs[name]}, but {name} is {list(shape)}"
            for name, shape in wanted.items()
            if name in weights and weights[name].shape != shape
        ],
    }
    for problem, names in problems.items():
        if names:
            raise UserError(
                f"{file}: not a CLIP with a vision transformer: {problem} {_list(names)}"
            )


def _list(names, at_most: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:at_most]) + (
        f" and {len(names) - at_most} more" if len(names) > at_most else ""
    )


def main():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(sys.argv[1] if len(sys.argv) > 1 else f"{folder}/small.safetensors")
        if len(sys.argv) == 1:  # a random model of ours, under OpenAI's names
            model = CLOP(
                build_config(
                    "toy", conv_stem=False, frames_per_patch=1, video_heads=2, text_heads=2
                )
            )
            names = {ours: theirs for theirs, ours in OPENAI.items()}
            weights = {
                _rename(name, names): t
                for name, t in model.state_dict().items()
                if not is_new(name)
            }
            weights["visual.conv1.weight"] = weights["visual.conv1.weight"].view(-1, 3, 8, 8)
            for name in ("visual.proj", "text_projection"):
                weights[name] = weights[name].T.contiguous()
            save_file(weights | {name: torch.tensor(0) for name in OPENAI_SIZES}, path)
        found = read_clip(path)
        print(found.describe())
        new = found.load_into(model := CLOP(found.sizes))
        print(f"newly made: {len(new)} of {len(model.state_dict())} tensors:", _list(new))


if __name__ == "__main__":
    run(main)
