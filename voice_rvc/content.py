"""What is said, without who says it: content features, 50 frames a second.

content = load_content("dsp")                                       # mel cepstra: for the demo and its small base
content = load_content("hubert:lengyue233/content-vec-best")        # ContentVec, which official RVC weights expect
features = content(wave)                                            # (n // 320, content.width), wave (n,) at 16 kHz
"""

import json
import math
from functools import cache
from pathlib import Path

import numpy as np

from common.bases import check_sizes, fetch, no_larger_than
from common.checkpoint import sha256_of
from common.config import UserError
from common.runtime import say
from common.samples import BadFile
from compiled import from_librosa

CONTENT_HOP = 320  # samples at 16 kHz: 20 ms
MEL_BANDS = 24  # of the dsp features
CEPSTRA = 13  # of which c0 to c12 are kept
SILENCE_FLOOR = 1e-3  # of a full-scale sine, -60 dB: what lies below is silence, and all silence is alike
REAL_CONTENT = "lengyue233/content-vec-best"


def load_content(name: str, device: str = "cpu", width: int = 0, download: bool = True):
    """The features of that name: an object with .name, .width, and a call wave (n,) at 16 kHz -> float32 (n // 320, width).

    name: "dsp", or "hubert:" and a folder or a hub name, which is fetched unless it is in the local cache. width: what the
    voice expects, 768 (RVC v2), 256 (v1) or 0 (the model's own). download: whether it may be fetched, which no file decides by
    naming it. UserError where there is no such model.
    """
    if name == "dsp":
        if width not in (0, CEPSTRA):
            raise UserError(f"--content dsp is {CEPSTRA} wide, and the base expects {width}: take hubert:{REAL_CONTENT}")
        return DspContent()
    kind, _, source = name.partition(":")
    if kind != "hubert" or not source:
        raise UserError(f"--content {name}: give dsp, or hubert:<hub name or folder>, as hubert:{REAL_CONTENT}")
    return HubertContent(name, source, device, width, download)


class DspContent:
    """Mel cepstra, their mean over the utterance removed: deterministic, no download; enough for the demo, not for real voices.

    24 mel bands (80 to 7600 Hz, amplitude) -> log -> orthonormal DCT, c0 to c12 -> minus the mean, divided by one number for
    all (a deviation for each coefficient would make the noisy ones loud). Frame t is centred at 10 + 20 t ms.
    """

    name, width = "dsp", CEPSTRA

    def __call__(self, wave, statistics=None):
        """statistics: of the whole utterance, where wave is a part of it; its own where not given."""
        cepstra = mel_cepstra(wave)
        mean, deviation = self.statistics([moments(cepstra)]) if statistics is None else statistics
        return ((cepstra - mean) / deviation).astype(np.float32)

    def statistics(self, parts):
        """(mean (13,), deviation) over all parts of an utterance, by what `describe` says of each."""
        count, *total, square = sum(parts, np.zeros(CEPSTRA + 2))
        mean = np.array(total) / max(count, 1)
        variance = square / max(count, 1) - np.square(mean).sum()
        return mean, max(math.sqrt(max(variance, 0) / CEPSTRA), 1e-3)  # silence has none

    def describe(self, wave):
        """What `statistics` takes of a part of an utterance; so much of a long one, too."""
        return moments(mel_cepstra(wave))


def moments(cepstra) -> np.ndarray:
    """(15,) of (n, 13): n, the sums over frames, and the sum of all squares."""
    return np.array([len(cepstra), *cepstra.sum(0), np.square(cepstra).sum()])


def mel_cepstra(wave) -> np.ndarray:
    """(n // 320, 13) of a wave (n,) at 16 kHz: frames of 1024 samples under a Hann window of 800, with reflected edges."""
    from scipy.fft import dct

    frames = len(wave) // CONTENT_HOP
    if not frames:
        return np.zeros((0, CEPSTRA))
    edge = (1024 - CONTENT_HOP) // 2
    wave = np.pad(np.asarray(wave, np.float32), (0, max(0, 1024 - len(wave))))  # reflecting needs more samples than the edge has
    wave = np.pad(wave, edge, mode="reflect")
    spectrum = np.abs(stft()(wave, n_fft=1024, hop_length=CONTENT_HOP, win_length=800, center=False))[:, :frames]
    mels = cepstral_filters() @ (spectrum / 200)  # 200: half the sum of the window, so that a full-scale sine is 1
    return dct(np.log(np.maximum(mels, SILENCE_FLOOR)), axis=0, norm="ortho")[:CEPSTRA].T


@cache
def stft():
    return from_librosa("stft")


@cache
def cepstral_filters() -> np.ndarray:
    return from_librosa("filters.mel")(sr=16000, n_fft=1024, n_mels=MEL_BANDS, fmin=80, fmax=7600, norm=None)


# ---- HuBERT ----------------------------------------------------------------------------------------------------------------


class HubertContent:
    """Hidden states of a HuBERT, float32: the last of them (768 wide: RVC v2), or the ninth through final_proj (256: RVC v1).

    Long waves go through it in parts. A wave is padded by 40 samples on either side, so that frame t is centred at 10 + 20 t ms.
    """

    part, context = 1500 * CONTENT_HOP, 100 * CONTENT_HOP  # samples: 30 s, and 2 s on either side

    def __init__(self, name: str, source: str, device: str, width: int, download: bool = True):
        folder = hubert_folder(source, download)
        self.name, self.device, self.model = name, device, load_hubert(name, folder).to(device)
        config = self.model.config
        self.projected = width != config.hidden_size and width == config.classifier_proj_size
        self.width = width if self.projected else config.hidden_size
        if width not in (0, self.width):
            raise UserError(f"--content {name} is {self.width} wide, and the base expects {width}: they do not belong together")
        if self.projected and (not self.model.projects or config.num_hidden_layers < 9):
            raise UserError(f"--content {name} has no final_proj, which a v1 voice ({width} wide) needs")
        self.normalizes = read_settings(folder, "preprocessor_config.json").get("do_normalize", False) is True
        if "hubert-base-ls960" in f"{source} {read_settings(folder, 'config.json').get('_name_or_path', '')}":
            say(f"note: {name} is not ContentVec, for which RVC's weights are made; with them it babbles (hubert:{REAL_CONTENT})")

    def __call__(self, wave, statistics=None):
        """statistics: of the whole utterance, where wave is a part of it; its own where not given."""
        wave, frames = np.asarray(wave, np.float32), len(wave) // CONTENT_HOP
        if self.normalizes:
            mean, deviation = self.statistics([self.describe(wave)]) if statistics is None else statistics
            wave = (wave - mean) / deviation
        found = [np.zeros((0, self.width), np.float32)]
        for start in range(0, frames * CONTENT_HOP, self.part):
            left = max(0, start - self.context)
            part = wave[left : start + self.part + self.context]
            first = (start - left) // CONTENT_HOP
            found.append(self.hidden(part)[first : first + self.part // CONTENT_HOP])
        return np.concatenate(found)[:frames]

    def hidden(self, wave) -> np.ndarray:
        """(n // 320, width) of a wave that fits into memory."""
        import torch

        sound = np.pad(wave, (40, 40 + max(0, 320 - len(wave))))
        with torch.inference_mode(), torch.autocast(torch.device(self.device).type, enabled=False):
            found = self.model(torch.from_numpy(sound)[None].to(self.device), output_hidden_states=self.projected)
            states = self.model.final_proj(found.hidden_states[9]) if self.projected else found.last_hidden_state
        return states[0].float().cpu().numpy()

    def statistics(self, parts):
        """(mean, deviation) of the samples of all parts, by what `describe` says of each; None where none is needed."""
        if not self.normalizes:
            return None
        count, total, square = np.sum([*parts, np.zeros(3)], axis=0)
        mean = total / max(count, 1)
        return np.float32(mean), np.float32(np.sqrt(max(square / max(count, 1) - mean**2, 0) + 1e-7))

    def describe(self, wave):
        """What `statistics` takes of a part of an utterance."""
        wave = np.asarray(wave, np.float64)
        return np.array([len(wave), wave.sum(), np.square(wave).sum()])


def hubert_folder(source: str, download: bool = True) -> Path:
    """Where a HuBERT lies: a folder, or the hub's local cache (fetched, if it may be). UserError in one line."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise UserError(f"--content: there is no folder {folder}; give a folder, a hub name (hubert:{REAL_CONTENT}) or dsp")
    from huggingface_hub import snapshot_download

    fetch(source, download, flag="--content hubert:", remedy="give it a local folder, or take --content dsp with the demo's base")
    return Path(snapshot_download(source, local_files_only=True))


def content_version(name: str) -> str:
    """What tells the features of that name apart from all others, for the cache: the hash of its weights, wherever they lie."""
    if name == "dsp":
        return "dsp 1"
    folder = hubert_folder(name.partition(":")[2])
    files = [path for pattern in ("*config.json", "*.safetensors", "*.bin") for path in sorted(folder.glob(pattern))]
    return " ".join(sha256_of(path)[:16] for path in files)


def read_settings(folder: Path, name: str) -> dict:
    """A JSON file of a model's folder; {} where there is none that can be read."""
    try:
        settings = json.loads((folder / name).read_text(encoding="utf-8"))
        return settings if isinstance(settings, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def load_hubert(name: str, folder: Path):
    """transformers' HubertModel with RVC's final_proj, in eval mode: nothing that runs code, offline, every weight in its place.

    .projects says whether its file has final_proj. UserError where the folder holds no such model.
    """
    import torch
    from transformers import HubertModel
    from transformers.utils import logging

    class ProjectedHubert(HubertModel):
        """HuBERT with the linear layer that ContentVec's files have beside it."""

        def __init__(self, config):
            super().__init__(config)
            self.final_proj = torch.nn.Linear(config.hidden_size, config.classifier_proj_size)

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        check_sizes(folder)
        with no_larger_than(folder):
            model, info = ProjectedHubert.from_pretrained(
                folder,
                dtype=torch.float32,
                weights_only=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # whatever a library makes of files that it did not write
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--content {name} is no HuBERT that can be loaded safely: {reason or type(error).__name__}") from None
    wrong = {str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]}
    model.projects = not any("final_proj" in key for key in wrong)
    strays = sorted(key for key in wrong if not key.startswith(("final_proj", "masked_spec_embed")))  # the latter: of training
    if strays:
        raise UserError(f"--content {name}: its weights and its config.json do not fit: {strays[0]} ({len(strays)} in all)")
    return model.eval()


# ---- one clock -------------------------------------------------------------------------------------------------------------


def align(content: np.ndarray, f0: np.ndarray, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """(content (frames, C), f0 (frames,)) at the spectrogram's 100 frames a second, from content (T50, C) and f0 (T100,).

    A content frame counts twice. Up to four frames, two of content, are trimmed or filled with the last; of F0 up to two.
    BadFile where more is missing or left over: the two then belong to different sounds.
    """
    doubled = np.repeat(content, 2, axis=0)
    for what, found, slack in (("content", len(doubled), 4), ("F0", len(f0), 2)):
        if not found or abs(found - frames) > slack:
            raise BadFile(f"{what} of another length than the sound, {found} frames for {frames}")
    doubled = np.pad(doubled, ((0, max(0, frames - len(doubled))), (0, 0)), mode="edge")[:frames]
    return doubled, np.pad(f0, (0, max(0, frames - len(f0))), mode="edge")[:frames]
