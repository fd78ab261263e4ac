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
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from audio import read_blocks  # noqa: E402
from common.bases import open_checkpoint, with_saved_adapter  # noqa: E402
from common.config import UserError  # noqa: E402
from common.lora import merge_lora, remove_lora  # noqa: E402
from common.runtime import choose_device  # noqa: E402
from content import load_content  # noqa: E402
from convert import READ_SECONDS, Conversion, Converted, convert_file, convert_original, cut_up  # noqa: E402
from model import VOICE_ROWS, Voice, answer, load_checkpoint  # noqa: E402
from original import read_original  # noqa: E402
from voice_index import index_of, read_index  # noqa: E402


@dataclass
class Tuned:
    """A voice that a Predictor knows, and where it comes from."""

    folder: Path
    voice: Voice


class Predictor:
    """A checkpoint that converts speech: audio files of any format, or waves. Threads may share it; they take turns."""

    def __init__(self, checkpoint, base: str = "", device: str = "auto", merge: bool = True, content: str = ""):
        """checkpoint: a folder that train.py or train_lora.py left (checkpoints/best), or a voice of RVC or Applio (.pth).

        base: where an adapter's base is, if not under its recorded name. device: auto, cpu, cuda, mps. merge: add the adapter
        into the weights. content: where the content model is, if not under its recorded name: hubert:<folder>. UserError, in
        one line, where checkpoint and base are damaged or do not belong together.
        """
        self.device, self.merge, self.content, self.contents = choose_device(device), merge, content, {}
        self.model, voice, self.origin = load_checkpoint(checkpoint, base, False, self.device)
        if merge:
            merge_lora(self.model)
        self.lock, self.current, self.indexes = threading.Lock(), "", {}
        self.voices = {"": Tuned(Path(checkpoint).expanduser(), voice)}

    def add(self, checkpoint, name: str) -> None:
        """Takes another adapter on the same base, as voice `name` of predict. UserError where it is of another base, or whole."""
        folder, about = open_checkpoint(checkpoint, "voice_rvc")
        if "full" in (about["method"], self.origin["method"]):
            whole = self.voices[""].folder if self.origin["method"] == "full" else folder
            raise UserError(f"{whole} is a whole model: only adapters share a base; make a Predictor of its own")
        if about["base"]["sha256"] != self.origin["base"]["sha256"]:
            raise UserError(
                f"{folder} is an adapter for another base ({about['base']['name']}): make a Predictor of its own for it"
            )
        self.voices[name] = Tuned(folder, Voice.load(folder, self.model.config))

    def predict(self, source, voice: str = "", pitch="auto", **settings) -> tuple[np.ndarray, int]:
        """(wave (n,) float32 within -1..1, rate in Hz) of an audio file, or of (wave (n,) of floats, rate), as long to 10 ms.

        voice: a name given to `add`; empty: the first checkpoint. pitch: semitones up, or "auto". settings: of
        convert.Conversion; index: a file; empty: the checkpoint's own. BadFile for a file that cannot be read, UserError for
        what does not fit.
        """
        if isinstance(source, (tuple, list)) and len(source) == 2:
            blocks = cut_up(np.asarray(source[0]), source[1])
        else:
            blocks = ((sound.wave, sound.rate) for sound in read_blocks(source, READ_SECONDS))
        with self.using(voice, {"pitch": pitch, **settings}) as (tuned, options, content):
            result, pieces = convert_original(self.model, tuned.voice, read_original(blocks), options, content)
            return np.concatenate(list(pieces)), result.rate

    def convert(self, path: Path, to: Path, voice: str = "", **settings) -> Converted:
        """Converts a file into another, of any length in the same memory: see convert.convert_file, and `predict`."""
        with self.using(voice, settings) as (tuned, options, content):
            return convert_file(self.model, tuned.voice, path, to, options, content)

    @contextmanager
    def using(self, name: str, settings: dict):
        """Puts a voice's adapter on the base, and yields (Tuned, Conversion, content model) for it; one thread at a time."""
        if name not in self.voices:
            raise UserError(f"there is no voice {name!r}; added were: {', '.join(filter(None, self.voices)) or 'none'}")
        tuned = self.voices[name]
        with self.lock:
            if name != self.current:
                self.put_on(name)
            kind = self.content or tuned.voice.content
            if kind not in self.contents:
                download = bool(self.content) or tuned.voice.content_is_known
                self.contents[kind] = load_content(kind, self.device, self.model.config.content_width, download)
            if self.contents[kind].width != self.model.config.content_width:
                widths = f"{self.contents[kind].width} wide, and the voice expects {self.model.config.content_width}"
                raise UserError(f"--content {kind} is {widths}: they do not belong together")
            index = self.find_index(tuned, settings.get("index", ""), settings.get("index_rate"))
            yield tuned, Conversion(**{**settings, "index": index}), self.contents[kind]

    def put_on(self, name: str) -> None:
        """Exchanges the adapter on the base, which stays where it is."""
        self.current = None  # until it is done
        remove_lora(self.model)
        with_saved_adapter(self.model, self.voices[name].folder, (VOICE_ROWS,), False, answer, own_layers=True)
        if self.merge:
            merge_lora(self.model)
        self.current = name

    def find_index(self, tuned: Tuned, named, rate):
        """The index to ask: of the file that is named, else the checkpoint's own, else None; None for a rate of 0."""
        path = named or index_of(tuned.folder)
        if not path or rate == 0:
            return None
        if path not in self.indexes:
            self.indexes[path] = read_index(path, self.model.config.content_width)
        return self.indexes[path]
