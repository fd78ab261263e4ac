"""How alike two voices are by a speaker encoder, such as WavLM's x-vectors: a network that was trained to tell people apart."""

import numpy as np
import torch

from audio import resample
from common.bases import check_sizes, fetch, no_larger_than
from common.config import UserError

ENCODER_RATE = 16000
ENCODER_SECONDS = 30  # of a sound, from its beginning


def load_encoder(name: str, device: str = "cpu"):
    """A function (wave (n,), rate) -> unit vector (D,) by an x-vector model: a hub name, or a folder. UserError for another."""
    from pathlib import Path

    from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

    source = Path(name).expanduser()
    source = source if source.is_dir() else fetch(name, flag="--speaker_encoder ", remedy="give a local folder, or leave it out")
    try:
        check_sizes(source)
        extractor = AutoFeatureExtractor.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        with no_larger_than(source):
            model, info = AutoModelForAudioXVector.from_pretrained(
                source, weights_only=True, local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:  # whatever a library makes of files that it did not write
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"--speaker_encoder {name} is no x-vector model of transformers: {reason}") from None
    # transformers draws what a file lacks at random: a plain WavLM would give cosines, and none that means anything.
    if lacking := sorted(str(key) for key in info["missing_keys"] if not str(key).startswith("objective")):
        raise UserError(f"--speaker_encoder {name} was not trained to tell speakers apart: it has no {lacking[0]}")
    model = model.eval().to(device)

    @torch.no_grad()
    def encode(wave: np.ndarray, rate: int) -> np.ndarray:
        wave = resample(wave[: ENCODER_SECONDS * rate], rate, ENCODER_RATE)
        wave = np.pad(wave, (0, max(0, ENCODER_RATE // 2 - len(wave))))
        inputs = extractor(wave, sampling_rate=ENCODER_RATE, return_tensors="pt").to(device)
        return torch.nn.functional.normalize(model(**inputs).embeddings[0], dim=0).cpu().numpy()

    return encode


def likeness_to(encode, waves: list[np.ndarray], rate: int):
    """A function (wave, rate) -> [1, cosine to the mean vector of `waves`], which add up."""
    mean = np.mean([encode(wave, rate) for wave in waves], axis=0)
    mean /= np.linalg.norm(mean)

    def likeness(wave: np.ndarray, rate: int) -> np.ndarray:
        return np.array([1.0, float(encode(wave, rate) @ mean)])

    return likeness
