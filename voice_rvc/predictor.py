"""A tuned voice as an object of your own program; several adapters on one base, which is loaded once.

import sys
sys.path.insert(0, "path/to/voice_rvc")
from predictor import Predictor

predictor = Predictor("outputs/voice_rvc/lora/checkpoints/best")     # full or LoRA, or a .pth of RVC or Applio
wave, rate = predictor.predict("speech.wav")                         # float32 (n,), at the pitch of the voice
wave, rate = predictor.predict((wave, rate), pitch=-12, index_rate=0.0)
predictor.add("outputs/voice_rvc/lora_2/checkpoints/best", "ann")    # another adapter on the same base
wave, rate = predictor.predict("speech.wav", voice="ann")
"""

import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from audio import read_blocks  # noqa: E402
from common.adapters_on_base import AdaptersOnBase  # noqa: E402
from common.config import UserError  # noqa: E402
from content import load_content  # noqa: E402
from convert import READ_SECONDS, Conversion, Converted, convert_file, convert_original, cut_up  # noqa: E402
from model import answer, load_base, load_checkpoint  # noqa: E402
from original import read_original  # noqa: E402
from voice_index import index_of, read_index  # noqa: E402


class Predictor(AdaptersOnBase):
    """A checkpoint that converts speech: audio files of any format, or waves. Threads may share it; they take turns."""

    model_functions = load_base, load_checkpoint, answer

    def __init__(self, checkpoint, base: str = "", device: str = "auto", merge: bool = True, content: str = ""):
        """checkpoint: a folder that train.py or train_lora.py left (checkpoints/best), or a voice of RVC or Applio (.pth).

        base: where an adapter's base is, if not under its recorded name. device: auto, cpu, cuda, mps. merge: add the adapter
        into the weights. content: where the content model is, if not under its recorded name: hubert:<folder>. UserError, in
        one line, where checkpoint and base are damaged or do not belong together.
        """
        super().__init__(checkpoint, base, device, merge)
        self.content, self.contents, self.indexes = content, {}, {}

    def predict(self, source, voice: str = "", pitch="auto", model: str = "", **settings) -> tuple[np.ndarray, int]:
        """(wave (n,) float32 within -1..1, rate in Hz) of an audio file, or of (wave (n,) of floats, rate), as long to 10 ms.

        voice, or model as in the other tasks: a name given to `add`; empty: the first checkpoint. pitch: semitones up, or
        "auto". settings: of convert.Conversion; index: a file; empty: the checkpoint's own. BadFile for a file that cannot be
        read, UserError for what does not fit.
        """
        if isinstance(source, (tuple, list)) and len(source) == 2:
            blocks = cut_up(np.asarray(source[0]), source[1])
        else:
            blocks = ((sound.wave, sound.rate) for sound in read_blocks(source, READ_SECONDS))
        with self.speaking(voice or model, {"pitch": pitch, **settings}) as (synthesizer, options, content):
            own = self.find(voice or model).processor
            result, pieces = convert_original(synthesizer, own, read_original(blocks), options, content)
            return np.concatenate(list(pieces)), result.rate

    def convert(self, path: Path, to: Path, voice: str = "", **settings) -> Converted:
        """Converts a file into another, of any length in the same memory: see convert.convert_file, and `predict`."""
        with self.speaking(voice, settings) as (synthesizer, options, content):
            return convert_file(synthesizer, self.find(voice).processor, path, to, options, content)

    @contextmanager
    def speaking(self, name: str, settings: dict):
        """Yields (Synthesizer, Conversion, content model) for a voice; one thread at a time."""
        tuned = self.find(name)
        with self.using(name) as synthesizer:
            width, kind = synthesizer.config.content_width, self.content or tuned.processor.content
            if kind not in self.contents:
                download = bool(self.content) or tuned.processor.content_is_known
                self.contents[kind] = load_content(kind, self.device, width, download)
            if self.contents[kind].width != width:
                widths = f"{self.contents[kind].width} wide, and the voice expects {width}"
                raise UserError(f"--content {kind} is {widths}: they do not belong together")
            index = self.find_index(tuned.folder, width, settings.get("index", ""), settings.get("index_rate"))
            yield synthesizer, Conversion(**{**settings, "index": index}), self.contents[kind]

    def find_index(self, folder: Path, width: int, named, rate):
        """The index to ask: of the file that is named, else the checkpoint's own, else None; None for a rate of 0."""
        path = named or index_of(folder)
        if not path or rate == 0:
            return None
        if path not in self.indexes:
            self.indexes[path] = read_index(path, width)
        return self.indexes[path]
