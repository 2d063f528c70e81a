"""Other people's weights become ours: checkpoints of CLIP, in any of the usual layouts.

Nobody fine-tunes on a few thousand videos from scratch. One starts from CLIP (arXiv 2103.00020),
which has read 400 million captioned images, or from an earlier run. model.py has CLIP's two towers
exactly, so taking over its weights is a matter of names:

    Hugging Face   text_model.encoder.layers.3.mlp.fc1.weight     openai/clip-vit-base-patch32, …
    OpenAI         transformer.resblocks.3.mlp.c_fc.weight        OpenAI's own files, and all that
                                                                  open_clip writes
    ours           text.blocks.3.mlp.0.weight

The layout is recognised by its names; the sizes follow from the shapes. Shapes cannot tell two
things: the number of heads, and which GELU the weights were trained with (OpenAI's: QuickGELU; most
later ones: the exact one). A model with the wrong one runs, and is quietly bad. So both are read
from the `config.json` or `open_clip_config.json` beside the weights, or known because the file is
OpenAI's own. Where nothing tells them we stop and say so.

Every tensor is accounted for. It is taken over, or newly made because an image model has no such
part (`is_new`: attention along time, time embedding, SKP head). One too many, one missing or one of
another shape ends in a line with its name. The time path starts at zero (model.py), so the fresh
video model is CLIP applied to each frame:

    video(x) = mean over t of CLIP's image embedding of frame t, before it is scaled to unit length

Loading is safe: safetensors, or a torch file of nothing but tensors (`weights_only=True`). OpenAI's
.pt downloads are TorchScript, programs with weights inside: only the weights are read
(`ScriptTensors`).

    python -m training.clip FOLDER      # what is in a checkpoint of CLIP
"""

import json
import math
import pickle
import re
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from tyro.conf import Positional

from captions.tokenizer import Tokenizer
from cli import UserError, parse_config, run
from datasets.split import TrainedOn
from knowledge import ConceptVocab
from model import CLOP, MAX_LOGIT_SCALE, ModelConfig
from training.checkpoint import Checkpoint, hash_tensors, list_checkpoints, load_checkpoint

# Pieces of names, theirs → ours, replaced from top to bottom. Only this layout has the first one.
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
LAYOUTS = {"Hugging Face": HUGGING_FACE, "OpenAI": OPENAI}
KNOWN_BY = {name: next(iter(table)) for name, table in LAYOUTS.items()}
# numbers that only OpenAI's own files carry
OPENAI_SIZES = {"input_resolution", "context_length", "vocab_size"}
NO_WEIGHTS = re.compile(r".*attn_mask|.*position_ids|" + "|".join(OPENAI_SIZES))
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
    tokenizer: Tokenizer | None = None
    trained_on: TrainedOn = field(default_factory=TrainedOn)
    concepts: list[str] = field(default_factory=list)  # what SKP's heads among them predict

    def describe(self) -> str:
        """One line: what was found, and what told heads and GELU."""
        s = self.sizes
        gelu = "QuickGELU" if s.quick_gelu else "exact GELU"
        return (
            f"{self.path}: {self.layout} layout, {len(self.weights)} tensors; patches of "
            f"{s.patch_size} in {s.image_size} px, {s.video_layers} layers of {s.video_width} with "
            f"{s.video_heads} heads; text {s.text_layers} layers of {s.text_width} with "
            f"{s.text_heads} heads; {gelu} (from {self.known_from})"
        )

    def load_into(self, model: CLOP, concepts: list[str] = ()) -> list[str]:
        """Copy the weights; the names of the model's other tensors, which stay as they are.

        SKP's heads are copied where they predict the same concepts.
        """
        weights = self.weights
        if self.concepts != list(concepts) or model.video_concept_head is None:
            weights = {name: t for name, t in weights.items() if "concept_" not in name}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        is_complete = not unexpected and all(is_new(name) for name in missing)
        assert is_complete, f"not accounted for: {unexpected} {missing}"
        return missing


def is_new(name: str) -> bool:
    """Whether CLIP has no such tensor: attention along time, time embedding, SKP's heads."""
    return "time_" in name or "concept_head." in name


# ---- what --init and eval.py call for ------------------------------------------------------------


def read_pretrained(
    path: str | Path, *, num_frames: int = 8, image_size: int | None = None
) -> Pretrained:
    """What --init names: a run of ours, its checkpoint, or CLIP's weights; with their tokenizer.

    For videos of `num_frames` frames; `image_size` in pixels, None: the weights' own. Raises
    UserError where the patches do not divide it, or as `read_clip` and `load_checkpoint`.
    """
    path = Path(path)
    if is_ours(path):
        return resize(read_run(path, num_frames), image_size)
    found = resize(read_clip(path, num_frames=num_frames), image_size)
    found.tokenizer = Tokenizer.from_clip(found.path.parent, found.sizes.vocab_size)
    return found


def read_run(path: Path, num_frames: int) -> Pretrained:
    """The weights of a run."""
    found = load_checkpoint(path)
    sizes = replace(found.model.config, num_frames=num_frames, num_concepts=0)
    weights = found.model.state_dict()
    steps = math.ceil(num_frames / sizes.frames_per_patch)
    weights["video.time_embed"] = found.model.video.time_embedding(steps).detach()
    told = ("our", "the run itself", found.tokenizer, found.trained_on, found.concept_vocab.names)
    return Pretrained(found.path, sizes, weights, *told)


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


def is_ours(path: Path) -> bool:
    """Whether this is the folder of a run, or a checkpoint of train.py."""
    return bool(list_checkpoints(path)) or b'"clop"' in read_header(path)


def is_clip(path: Path) -> bool:
    """Whether this is the folder or the file of a CLIP."""
    if path.is_dir():
        return any((path / name).is_file() for name in FILES)
    return path.is_file() and not is_ours(path)


def read_header(path: Path) -> bytes:
    """The JSON at the head of a safetensors file; of another file, whatever stands there."""
    if not path.is_file():
        return b""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return file.read(min(size, 100 << 20))


def resize(found: Pretrained, image_size: int | None) -> Pretrained:
    """The same weights for images of another size in pixels; None: their own."""
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


def interpolate_places(place_embed: torch.Tensor, grid: int) -> torch.Tensor:
    """The place embedding [1 + side², D] for another grid of patches: [1 + grid², D].

    Bicubic, without antialiasing, as in `transformers`. The class token keeps its own.
    """
    side = math.isqrt(len(place_embed) - 1)
    places = rearrange(place_embed[1:], "(h w) d -> 1 d h w", h=side)
    places = F.interpolate(places, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([place_embed[:1], rearrange(places, "1 d h w -> (h w) d")])


# ---- CLIP's files --------------------------------------------------------------------------------


def read_clip(path: str | Path, *, num_frames: int = 8) -> Pretrained:
    """CLIP's weights, from a file or a folder, for videos of `num_frames` frames.

    Raises UserError: missing, damaged, another architecture (with names and shapes), heads and GELU
    unknown.
    """
    file, tensors = read_tensors(Path(path))
    layout = find_layout(file, tensors)
    settings = read_settings(file, tensors)
    try:
        weights = take_over(tensors, layout)
        sizes = read_sizes(weights, settings, num_frames)
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{file}: not the tensors of a CLIP ({error}); fetch it again") from error

    # [D, C, p, p] -> [D, Cpp]
    weights["video.patch_embed.weight"] = weights["video.patch_embed.weight"].flatten(1)
    check_weights(file, sizes, weights)
    # fp16's ln 100 lies above the clamp, where the gradient is zero
    weights["logit_scale"] = weights["logit_scale"].clamp(max=MAX_LOGIT_SCALE)
    return Pretrained(file, sizes, weights, layout, settings.source)


def read_tensors(path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """(the file, {name: tensor}) of a checkpoint, or of the first of FILES in a folder.

    Runs no code of it.
    """
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise UserError(
                f"{path}: holds no step-*.safetensors of a run, and none of {', '.join(FILES)}; "
                "name the weights' file itself"
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
        with zipfile.ZipFile(path) as archive:  # what torch has written since 2020, before CLIP
            script = [name for name in archive.namelist() if name.endswith("/constants.pkl")]
            if script:
                return path, ScriptTensors(archive, script[0].removesuffix("constants.pkl")).read()

        found = torch.load(path, map_location="cpu", weights_only=True)
        found = found.get("state_dict", found)
        # "module." begins the names that a run of open_clip saves
        return path, {name.removeprefix("module."): t.float() for name, t in found.items()}
    except Exception as error:  # a damaged pickle raises nearly any
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{path}: damaged, or a file of more than tensors ({why}); fetch it again, or save the "
            "model's state_dict() as safetensors"
        ) from error


STORAGES = "FloatStorage HalfStorage DoubleStorage LongStorage IntStorage BoolStorage".split()


class ScriptTensors(pickle.Unpickler):
    """The tensors of a TorchScript archive, without its program.

    `torch.jit.load` would compile that program, and run its `__setstate__`, which can write files
    (tests/test_clip.py). What we need is in two other members: data.pkl, a pickle of the modules
    with their tensors' shapes, and data/0, data/1, …, their bytes. Its modules become plain
    objects. Nothing can be called but what `find_class` returns.
    """

    def __init__(self, archive: zipfile.ZipFile, folder: str):
        super().__init__(archive.open(f"{folder}data.pkl"))
        self.archive, self.folder = archive, folder

    def find_class(self, module: str, name: str):
        if module.startswith("__torch__"):
            return SimpleNamespace
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: storage.as_strided(
                shape, strides, offset
            )
        if module == "torch.jit._pickle":  # types of lists
            return lambda value, *_: value
        if module == "torch" and name in STORAGES:  # "HalfStorage": torch.half
            return getattr(torch, name.removesuffix("Storage").lower())
        raise pickle.UnpicklingError(f"names {module}.{name}")

    def persistent_load(self, found: tuple) -> torch.Tensor:
        """The bytes of a tensor, in one dimension."""
        _, dtype, key, *_ = found
        content = self.archive.read(f"{self.folder}data/{key}")
        return torch.frombuffer(bytearray(content), dtype=dtype)

    def read(self) -> dict[str, torch.Tensor]:
        """{name: tensor}, as the module's state_dict() names them."""
        tensors, todo, seen = {}, [("", self.load())], set()
        while todo:
            prefix, module = todo.pop()
            if id(module) in seen:  # a circle would have no end
                continue
            seen.add(id(module))
            for name, value in vars(module).items():
                if isinstance(value, SimpleNamespace):
                    todo.append((f"{prefix}{name}.", value))
                elif isinstance(value, torch.Tensor):
                    tensors[prefix + name] = value
        return tensors


def find_layout(file: Path, tensors: dict) -> str:
    """A name of LAYOUTS."""
    for layout, name in KNOWN_BY.items():
        if name in tensors:
            return layout
    raise UserError(
        f"{file}: not a CLIP with a vision transformer (it holds {shorten(list(tensors))}); --init "
        "takes the layouts of Hugging Face's CLIPModel and of OpenAI or open_clip"
    )


def take_over(tensors: dict[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    """The weights in float32, under our names, in our shapes. Raises KeyError where one lacks."""
    weights = {}
    for name, tensor in tensors.items():
        if not NO_WEIGHTS.fullmatch(name):
            weights[rename(name, LAYOUTS[layout])] = tensor.float().contiguous()

    if layout == "OpenAI":  # which multiplies from the right
        for name in {"video.project.weight", "text.project.weight"} & weights.keys():
            weights[name] = weights[name].T.contiguous()

    # of three matrices of queries, keys and values one: a larger product is a faster one
    for name in [name for name in weights if ".q_proj." in name]:
        parts = [weights.pop(name.replace(".q_proj.", f".{letter}_proj.")) for letter in "qkv"]
        weights[name.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
    return weights


def rename(name: str, table: dict[str, str]) -> str:
    for theirs, ours in table.items():
        name = name.replace(theirs, ours)
    return name


# ---- sizes ---------------------------------------------------------------------------------------


class Settings(NamedTuple):
    """What no shape tells."""

    source: str  # what told it
    quick_gelu: bool
    video_heads: int | None = None  # None: as many as are 64 wide
    text_heads: int | None = None
    video_head_width: int = 64


def read_settings(file: Path, tensors: dict) -> Settings:
    """From the configuration beside the weights. OpenAI's own files need none."""
    path = file.with_name("open_clip_config.json")
    if not path.is_file():
        path = file.with_name("config.json")
    if not path.is_file():
        if OPENAI_SIZES <= tensors.keys():
            return Settings("OpenAI's own file", quick_gelu=True)
        raise UserError(
            f"{file}: nothing tells its heads and which GELU it was trained with; put its "
            "config.json or open_clip_config.json beside it (OpenAI's weights: "
            '{"model_cfg": {"quick_gelu": true}})'
        )

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if "model_cfg" in found:
            model = found["model_cfg"]
            return Settings(
                path.name,
                quick_gelu=model.get("quick_gelu", False),
                text_heads=model.get("text_cfg", {}).get("heads"),
                video_head_width=model.get("vision_cfg", {}).get("head_width", 64),
            )

        # what is not stated has the value that transformers gives it
        towers = [found["vision_config"], found["text_config"]]
        acts = [tower.get("hidden_act", "quick_gelu") for tower in towers]
        epsilons = {tower.get("layer_norm_eps", 1e-5) for tower in towers}
        video_heads = towers[0].get("num_attention_heads", 12)
        text_heads = towers[1].get("num_attention_heads", 8)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path}: not the configuration of a CLIP ({type(error).__name__}: {error}); take the "
            "one from the model's page"
        ) from error

    if epsilons != {1e-5}:
        raise UserError(f"{path}: layer_norm_eps {max(epsilons - {1e-5})}: CLIP's norms have 1e-05")

    if acts not in (["gelu"] * 2, ["quick_gelu"] * 2):
        raise UserError(
            f"{path}: hidden_act {' and '.join(acts)}: both towers here have gelu, or quick_gelu"
        )
    return Settings(path.name, acts[0] == "quick_gelu", video_heads, text_heads)


def read_sizes(weights: dict, settings: Settings, num_frames: int) -> ModelConfig:
    """Sizes, from the shapes of the weights. Raises KeyError where one lacks."""
    width, _, _, patch_size = weights["video.patch_embed.weight"].shape  # [D, C, p, p]
    vocab_size, text_width = weights["text.token_embed.weight"].shape
    return ModelConfig(
        image_size=patch_size * math.isqrt(len(weights["video.place_embed"]) - 1),
        patch_size=patch_size,
        num_frames=num_frames,
        video_width=width,
        video_layers=count_blocks(weights, "video"),
        video_heads=settings.video_heads or width // settings.video_head_width,
        text_width=text_width,
        text_layers=count_blocks(weights, "text"),
        text_heads=settings.text_heads or text_width // 64,
        text_length=len(weights["text.position_embed"]),
        vocab_size=vocab_size,
        embed_dim=len(weights["text.project.weight"]),
        quick_gelu=settings.quick_gelu,
    )


def count_blocks(weights: dict, tower: str) -> int:
    start = f"{tower}.blocks."
    return len({name.split(".")[2] for name in weights if name.startswith(start)})


def check_weights(file: Path, sizes: ModelConfig, weights: dict[str, torch.Tensor]) -> None:
    """Raise UserError unless a model of these sizes has exactly these weights and what `is_new`."""
    s = sizes
    for width, heads in ((s.video_width, s.video_heads), (s.text_width, s.text_heads)):
        if not heads or width % heads:
            raise UserError(
                f"{file}: a width of {width} cannot have {heads} heads; is the configuration its "
                "own?"
            )

    with torch.device("meta"):  # shapes only
        model = CLOP(sizes)
    wanted = [shape_of(name, t) for name, t in model.state_dict().items() if not is_new(name)]
    found = [shape_of(name, t) for name, t in weights.items()]
    too_many = [tensor for tensor in found if tensor not in wanted]
    missing = [tensor for tensor in wanted if tensor not in found]
    if too_many or missing:
        raise UserError(
            f"{file}: not a CLIP with a vision transformer; in the names of model.py, it has "
            f"{shorten(too_many)} where it should have {shorten(missing)}"
        )


def shape_of(name: str, tensor: torch.Tensor) -> str:
    return f"{name} {list(tensor.shape)}"


def shorten(names: list[str], at_most: int = 4) -> str:
    """The first names, and how many more there are."""
    more = len(names) - at_most
    listed = ", ".join(names[:at_most]) or "nothing"
    return f"{listed} and {more} more" if more > 0 else listed


# ---- command line --------------------------------------------------------------------------------


@dataclass
class ClipConfig:
    """Say what is in a checkpoint of CLIP."""

    path: Positional[str]  # the file of weights, or the folder that holds it


def main() -> None:
    print(read_clip(parse_config(ClipConfig).path).describe())


if __name__ == "__main__":
    run(main)
