"""Experiment folders of RVC and Applio, used as their preprocessing left them: slices, content features, F0, by their names."""

import json
import re
import threading
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from common.config import UserError
from common.file_finder import name_parts
from common.runtime import counted
from common.samples import BadFile, Faults, attempt, read_text, readable, short_names, visible_entries
from common.scan import in_parts
from content import align
from recordings import Recording

LONGEST = 900  # frames (9 s) of a clip; a longer slice (Applio can leave recordings whole) becomes several
HEADERS = threading.Lock()  # numpy parses headers by ast, which fails now and then in several threads of Python 3.11
UNEQUAL = 4  # frames that sound, content and F0 of a slice may differ by: HuBERT alone gives up to 3 less than there is sound


# Program -> its folders of slices at the voice's rate, of content features and of F0 in Hz: the first of each that is there.
LAYOUTS = {
    "RVC": ("0_gt_wavs", ("3_feature768", "3_feature256"), ("2b-f0nsf", "2b_f0nsf")),
    "Applio": ("sliced_audios", ("extracted", "v2_extracted", "v1_extracted"), ("f0_voiced",)),
}


@dataclass(frozen=True)
class Layout:
    """A row of LAYOUTS."""

    program: str
    waves: str
    content: tuple[str, ...]
    f0: tuple[str, ...]


class Unfit(Exception):
    """Why the features of an experiment folder are not what a voice takes. Its slices can still be prepared anew."""


@dataclass(frozen=True)
class Slice:
    """The three files of a slice and what their headers say: rate in Hz, the numbers of samples, of content and of F0 frames."""

    path: Path
    rate: int
    samples: int
    content: Path | None
    content_shape: tuple[int, int]
    f0: Path | None
    f0_frames: int

    @property
    def frames(self) -> int:
        """Of 10 ms, as many as all three have. BadFile where one ends much earlier than another."""
        counts = [self.samples * 100 // self.rate, 2 * self.content_shape[0], *([self.f0_frames] if self.f0 else [])]
        if max(counts) - min(counts) > UNEQUAL:
            told = ", ".join(map(str, counts))
            raise BadFile(f"slice whose sound and features differ in length, {told} frames of 10 ms")
        return min(counts)


@dataclass(frozen=True)
class ExperimentClip:
    """A slice, or a part of a long one, as prepared.Clip has them. first: the frame of the slice that it begins with, even."""

    name: str
    recording: str
    speaker: int
    frames: int
    path: Path
    content: Path
    f0: Path | None
    first: int = 0
    split: str | None = None

    def load(self, hop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(wave (frames * hop,), content (frames, C), f0 (frames,) Hz), float32. BadFile where a value is no number."""
        import soundfile

        last = self.first + self.frames
        try:
            wave, _ = soundfile.read(self.path, self.frames * hop, self.first * hop, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise BadFile(f"sound that cannot be read, {error}") from None
        if len(wave) < self.frames * hop:
            raise BadFile("sound that ends before its header says")
        content = np.array(open_array(self.content, 2)[self.first // 2 : -(-last // 2)], np.float32)
        f0 = np.array(open_array(self.f0, 1)[self.first : last], np.float32) if self.f0 else np.zeros(self.frames, np.float32)
        for what, values in (("sound", wave), ("content features", content), ("F0", f0)):
            if not np.isfinite(values).all():
                raise BadFile(f"{what} with values that are no numbers")
        return wave.mean(axis=1), *align(content, f0, self.frames)


def layout_of(folder: Path) -> Layout | None:
    """The program whose experiment a folder is, by the folders in it; None where it is none."""
    there = {entry.name for entry in visible_entries(folder) if entry.is_dir()}
    layouts = [Layout(program, *folders) for program, folders in LAYOUTS.items()]
    return next((layout for layout in layouts if there & {layout.waves, *layout.content, *layout.f0}), None)


def is_experiment(folder: Path) -> bool:
    return layout_of(folder) is not None


def slices_of(folder: Path) -> list[Path]:
    """The slices of an experiment, in order of their names. UserError where its preprocessing left none."""
    layout = layout_of(folder)
    found = [folder / layout.waves / e.name for e in visible_entries(folder / layout.waves) if e.name.lower().endswith(".wav")]
    if not found:
        there = "is empty" if (folder / layout.waves).is_dir() else "is missing"
        raise UserError(f"{folder} is an experiment of {layout.program} whose {layout.waves} {there}: preprocess its data first")
    return found


def slices_as_recordings(folder: Path, faults: Faults) -> tuple[list[Recording], list[str]]:
    """(slices, names of the speakers) as find_recordings gives them: for a voice that the folder's features are not for."""
    paths = slices_of(folder)
    speakers, speaker_of = read_speakers(folder, layout_of(folder), paths, faults)
    names = short_names(paths)
    found = zip(paths, names, strict=True)
    return [Recording(path, name, speaker_of[path.name], group=recording_of(path.stem)) for path, name in found], speakers


def recording_of(slice_name: str) -> str:
    """The recording that a slice was cut from: both programs put its number behind the name, with a _."""
    return re.sub(r"_\d+$", "", slice_name)


def read_experiment(folder: Path, voice, faults: Faults) -> tuple[list[ExperimentClip], list[str], dict]:
    """(clips, names of the speakers, facts {"program", "content"}) of an experiment folder, for a voice (model.Voice).

    Logs, weights, indexes and whatever else lies beside are not read, and paths in filelist.txt count by their last part.
    Faults are told of slices without their features, and of those whose files are damaged. Unfit where the folder is one of
    another rate, content or kind of voice; UserError where no slice is left.
    """
    layout, paths = layout_of(folder), slices_of(folder)
    width = voice.config.content_width
    places = sorted(layout.content, key=lambda name: str(width) not in name)
    content = next((folder / name for name in places if (folder / name).is_dir()), None)
    f0 = next((folder / name for name in layout.f0 if (folder / name).is_dir()), None) if voice.config.f0 else None
    results = in_parts(paths, partial(attempt, look, content, f0), f"looking at the slices of {folder.name}")
    found = []
    for path, (slice_, fault, _) in zip(paths, results, strict=True):
        if fault:
            faults.add_error(fault, path.name)
        else:
            found.append(slice_)
    check_fit(found, voice)
    speakers, speaker_of = read_speakers(folder, layout, paths, faults)
    clips = []
    for slice_ in found:
        try:
            clips += parts_of(slice_, speaker_of[slice_.path.name], voice)
        except BadFile as error:
            faults.add_error(str(error), slice_.path.name)
    if not clips:
        raise UserError(f"{folder}: of its {counted(len(paths), 'slice')} none can be used")
    return clips, speakers, {"program": layout.program, "content": embedder(folder)}


def look(content: Path | None, f0: Path | None, path: Path) -> Slice:
    """What the headers of a slice's files say; content, f0: the folders of its features, if there are any."""
    import soundfile

    try:
        sound = soundfile.info(path)
    except soundfile.LibsndfileError as error:
        raise BadFile(f"sound that cannot be read, {error}") from None
    if not sound.frames:
        raise BadFile("recording without a sample")
    content = find_array(content, path)
    f0 = find_array(f0, path)
    shape = open_array(content, 2).shape if content else (0, 0)
    return Slice(path, sound.samplerate, sound.frames, content, shape, f0, len(open_array(f0, 1)) if f0 else 0)


def find_array(folder: Path | None, path: Path) -> Path | None:
    """The file of a slice's features in their folder: 0_1.wav.npy (RVC's F0) or 0_1.npy."""
    names = (f"{path.name}.npy", f"{path.stem}.npy")
    return next((folder / name for name in names if (folder / name).is_file()), None) if folder else None


def open_array(path: Path, dimensions: int) -> np.ndarray:
    """The array of a .npy file, on disk still; BadFile for anything else.

    Nothing is unpickled, and mapping the file compares the size that its header tells with what is there.
    """
    try:
        with HEADERS:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        if array.ndim != dimensions or array.dtype.kind not in "fiu":
            raise ValueError(f"{array.dtype} of shape {array.shape}")
    except OSError:
        raise
    except Exception as error:  # numpy's parser of headers raises what it likes on what is none
        raise BadFile(f"array that cannot be read, {path.parent.name}/{path.name}: {error or 'empty'}") from None
    return array


def check_fit(found: list[Slice], voice) -> None:
    """Unfit where most of the slices are not what the voice takes; what only some lack is a fault of theirs."""
    if not found:
        return
    config = voice.config
    rate = Counter(s.rate for s in found).most_common(1)[0][0]
    width = Counter(s.content_shape[1] for s in found if s.content).most_common(1)
    if rate != config.sample_rate:
        raise Unfit(f"the data is {in_k(rate)}, the voice {in_k(config.sample_rate)}")
    if not width:
        raise Unfit("the data has no content features: that step of its preprocessing is missing")
    if width[0][0] != config.content_width:
        raise Unfit(f"the data's content features have {width[0][0]} values a frame, the voice takes {config.content_width}")
    if config.f0 and not any(s.f0 for s in found):
        raise Unfit("the data has no F0, which the voice takes")


def in_k(rate: int) -> str:
    """A sample rate as these programs call it: 40k, 44.1k."""
    return f"{rate / 1000:g}k"


def parts_of(found: Slice, speaker: int, voice) -> list[ExperimentClip]:
    """The clips of a slice: itself, or parts of about equal length that are none longer than LONGEST. BadFile for its faults."""
    config, name = voice.config, found.path.stem
    if not found.content:
        raise BadFile("slice without content features")
    if config.f0 and not found.f0:
        raise BadFile("slice without F0")
    if found.rate != config.sample_rate:
        raise BadFile(f"slice of another rate than the others, {in_k(found.rate)}")
    if found.content_shape[1] != config.content_width:
        raise BadFile(f"content features of another width than the others, {found.content_shape[1]}")
    count = -(-found.frames // LONGEST)
    bounds = [*(found.frames * i // count // 2 * 2 for i in range(count)), found.frames]
    recording = recording_of(name)
    return [
        ExperimentClip(
            name if count == 1 else f"{name} at {first / 100:g} s",
            recording,
            speaker,
            stop - first,
            found.path,
            found.content,
            found.f0,
            first,
        )
        for first, stop in zip(bounds, bounds[1:], strict=False)
    ]


def read_speakers(folder: Path, layout: Layout, paths: list[Path], faults: Faults) -> tuple[list[str], dict[str, int]]:
    """(names of the speakers, slice -> its speaker's place among them), from filelist.txt or from the names of the slices.

    A slice that filelist.txt does not list, or lists unreadably, has the number that its name begins with in Applio's folders,
    else the commonest one. Lines of other files (both programs list silence of their own) are noted once.
    """
    listed = read_filelist(folder / "filelist.txt", faults)
    numbers, here = {}, {}
    for path in paths:
        here[name_parts(path.name)[-1]] = path.name
        prefix = re.match(r"(\d+)_\d+", path.stem) if layout.program == "Applio" else None
        if prefix:
            numbers[path.name] = int(prefix[1])
    for name, number in listed.items():
        if name in here:
            numbers[here[name]] = number
        else:
            faults.note("line of filelist.txt whose slice is not in the folder", name)
    common = Counter(numbers.values()).most_common(1)
    numbers = {path.name: numbers.get(path.name, common[0][0] if common else 0) for path in paths}
    every = sorted(set(numbers.values()))
    names = [readable(folder.name)] if len(every) == 1 else list(map(str, every))
    return names, {name: every.index(number) for name, number in numbers.items()}


def read_filelist(file: Path, faults: Faults) -> dict[str, int]:
    """Name of a slice, as name_parts gives it -> number of its speaker; {} where there is no list.

    A line is wave|content|coarse F0|F0|speaker, or wave|content|speaker for voices without F0.
    """
    try:
        lines = read_text(file, faults).splitlines()
    except OSError:
        return {}
    found = {}
    for number, line in enumerate(lines, 1):
        fields = line.strip().split("|")
        if len(fields) in (3, 5) and re.fullmatch(r"[0-9]{1,6}", fields[-1]) and name_parts(fields[0]):
            found[name_parts(fields[0])[-1]] = int(fields[-1])
        elif line.strip():
            faults.note("line of filelist.txt that is none of 3 or 5 fields and a speaker's number", number)
    return found


def embedder(folder: Path) -> str:
    """The content model that Applio has noted for an experiment; "" where nothing says."""
    try:
        content = json.loads((folder / "model_info.json").read_text(encoding="utf-8"))
        return str(content["embedder_model"])[:100]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ""
