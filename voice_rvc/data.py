"""A voice as data: what lies in a folder, its split by recording, clips decoded into memory, batches of like lengths."""

import hashlib
from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from common.batches import LengthBatches, build_loader, eval_loader, seeded
from common.config import UserError
from common.exclude import Exclusions, exclude_for_eval
from common.folders import make_once
from common.runtime import counted, from_main, in_time, process_index, say
from common.sample_cache import CachedSamples, SampleCache, cache_limit, first_readable
from common.samples import Faults, attempt, chosen_split, data_folder
from common.scan import in_parts
from content import hubert_folder
from experiments import Unfit, is_experiment, read_experiment, slices_as_recordings
from f0 import choose_f0, coarse_pitch
from model import CONTENT_MODELS
from prepared import is_prepared, open_prepared, prepare, prepared_folder
from recordings import Recording, find_recordings
from spectrum import spectrogram
from splits import split_clips

HERE = Path(__file__).resolve().parent
# What of a batch the model gets in training, in the order of Synthesizer.forward.
MODEL_INPUTS = ("phone", "lengths", "pitch", "f0", "spec", "sid", "noise", "source", "start")

# ---- what a folder holds ---------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What a data folder is, before any of its sound is decoded: see find_voice. recordings, speakers: of a folder of sound."""

    name: str
    folder: Path
    kind: str  # "audio", "prepared" (by preprocess.py), or "experiment" (RVC's or Applio's)
    one_voice: bool
    seed: int
    recordings: list[Recording] = field(default_factory=list)
    speakers: list[str] = field(default_factory=list)
    faults: Faults = field(default_factory=Faults)
    excluded: Exclusions = field(default_factory=lambda: Exclusions("", Path()))


def demo_data() -> Path:
    """The folder of the synthetic target voice, made at the first call (about ten seconds)."""
    from synthetic import make_demo_data

    return make_once(HERE / "data" / "demo", make_demo_data) / "target"


def find_voice(data_dir: str, speakers: str, seed: int, exclude: str = "") -> Found:
    """What is in a folder of sound (or one file), or in the demo data where data_dir is empty; UserError where nothing is.

    speakers: all is "one" voice, the "folders" are voices, or "auto": see find_recordings. exclude: a list of recordings to
    leave out.
    """
    folder = Path(data_dir).expanduser() if data_dir else demo_data()
    excluded = Exclusions(exclude, folder)
    if folder.is_dir():
        folder = data_folder(folder, lambda inner: is_prepared(inner) or is_experiment(inner))
    kind = "prepared" if is_prepared(folder) else "experiment" if is_experiment(folder) else "audio"
    found = Found(data_dir or "demo", folder, kind, speakers == "one", seed, excluded=excluded)
    if kind == "audio":
        with found.faults:
            found.recordings, found.speakers = find_recordings(folder, found.faults, speakers, excluded)
    return found


def read_clips(found: Found, voice, named: bool = False) -> tuple[list, list[str], str]:
    """(clips, names of the speakers, format) of what was found for a voice; sound is prepared on the way: see prepared.Clip.

    named: whether the user named the content model, so that it may be fetched (check_content).
    """
    if found.kind == "prepared":
        clips, speakers = open_prepared(found.folder, voice)
        layout = "prepared"
    elif found.kind == "experiment":
        clips, speakers, layout = read_or_prepare(found, voice, named)
    else:
        clips, speakers, layout = prepare_once(found, found.recordings, found.speakers, voice, named), found.speakers, "audio"
    clips = leave_out_clips(clips, found)
    if found.one_voice and len(speakers) > 1:
        clips, speakers = [replace(clip, speaker=0) for clip in clips], [found.folder.name]
    least = voice.config.segment_frames  # a shorter clip teaches nothing that others do not, and breaks what sees a segment
    for clip in clips:
        if clip.frames < least:
            found.faults.add(f"clip shorter than a training segment of {least / 100:g} s", clip.name)
    return [clip for clip in clips if clip.frames >= least], speakers, layout


def leave_out_clips(clips: list, found: Found) -> list:
    """The clips without those that are excluded; prepared ones go by the names of their recordings."""
    if found.kind == "audio":  # no file that is excluded became a clip
        return clips
    path_of = {"prepared": lambda clip: found.folder / clip.recording, "experiment": lambda clip: clip.path}[found.kind]
    kept = found.excluded.leave_out(clips, found.faults, path_of)
    found.excluded.note_strangers(found.faults)
    return kept


def read_or_prepare(found: Found, voice, named: bool) -> tuple[list, list[str], str]:
    """As read_clips, of an experiment folder. Where its features are for another kind of voice, its slices are prepared anew."""
    try:
        clips, speakers, facts = read_experiment(found.folder, voice, found.faults)
    except Unfit as reason:
        say(f"{found.folder.name}: {reason}; its slices are prepared anew, as recordings are")
        recordings, speakers = slices_as_recordings(found.folder, found.faults)
        recordings = found.excluded.leave_out(recordings, found.faults)
        return prepare_once(found, recordings, speakers, voice, named), speakers, "audio"
    content = facts["content"]
    if content and f"hubert:{CONTENT_MODELS.get(content, content)}" != voice.content:
        say(f"{found.folder.name} has content features of {content}, the voice takes those of {voice.content}: do they agree?")
    return clips, speakers, facts["program"]


def prepare_once(found: Found, recordings: list[Recording], speakers: list[str], voice, named: bool) -> list:
    """prepared.prepare on the main process, its clips and what it faults on all."""
    folder = prepared_folder(found.folder)

    def make():
        check_content(voice, named)
        faults = Faults()
        with faults:
            return prepare(recordings, voice, folder, 0, faults, speakers=speakers), faults

    clips, faults = from_main(make)
    say(f"prepared clips are in {folder}")
    found.faults.take(faults)
    return clips


# ---- what the model gets ---------------------------------------------------------------------------------------------


class VoiceData(CachedSamples):
    """Item (epoch, index) -> a whole clip, T frames of 10 ms: {"wave" (T, hop), "phone" (T, C), "f0" (T,) Hz, 0 unvoiced,
    "pitch" (T,) 1..255, "spec" (T, F), "noise" (T, inter), "source" (S, hop), "start" (), "sid", "index"}.

    clips: see prepared.Clip. cache: of load_rows. noise, source and start are all that is random in a training step: see
    Synthesizer.forward. They are functions of (seed, epoch, index), so that several processes draw what one would; so is which
    clip takes the place of a training clip that turns out to be bad.
    """

    def __init__(self, clips: list, cache: SampleCache, voice, seed: int = 0):
        self.clips, self.cache, self.voice, self.seed = clips, cache, voice, seed

    def __len__(self) -> int:
        return len(self.clips)

    def name(self, index: int) -> str:
        return self.clips[index].name

    @property
    def lengths(self) -> list[int]:
        """In frames. Clips of one length share a batch of evaluation, so that nothing is padded."""
        return [clip.frames for clip in self.clips]

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        chosen, rows = first_readable(self, self.cache.__getitem__, index, self.seed, epoch)
        config = self.voice.config
        wave, content, f0, spec = columns(rows, config)
        with seeded(self.seed, epoch, index):
            noise, source = torch.randn(len(f0), config.inter_channels), torch.randn(config.segment_frames, config.hop)
            start = torch.rand(())
        return {
            "phone": torch.tensor(content),
            "f0": torch.tensor(f0),
            "pitch": torch.from_numpy(coarse_pitch(f0)),
            "spec": torch.tensor(spec),
            "wave": torch.tensor(wave),
            "noise": noise,
            "source": source,
            "start": start,
            "sid": self.clips[chosen].speaker,
            "index": index,
        }


def load_rows(config, clip) -> np.ndarray:
    """A clip as the cache keeps it, a row for each frame, float32: its wave, content, F0, spectrogram: (T, hop + C + 1 + F)."""
    wave, content, f0 = clip.load(config.hop)
    spec = spectrogram(torch.from_numpy(wave)[None], config)[0].T.numpy()
    return np.concatenate([wave.reshape(-1, config.hop), content, f0[:, None], spec], axis=1, dtype=np.float32)


def columns(rows: np.ndarray, config) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(wave (T, hop), content (T, C), f0 (T,), spec (T, F)) of load_rows."""
    end = config.hop + config.content_width
    return rows[:, : config.hop], rows[:, config.hop : end], rows[:, end], rows[:, end + 1 :]


def collate(items: list[dict]) -> dict:
    """Items -> a batch, padded with zeros at the end: wave (B, T * hop), phone (B, T, C), f0, pitch (B, T), spec (B, F, T);
    noise (B, inter, T), source (B, 1, S * hop), start (B,); lengths (B,) in frames, sid, index (B,)."""
    padded = ("phone", "f0", "pitch", "spec", "wave", "noise")
    batch = {key: pad_sequence([item[key] for item in items], batch_first=True) for key in padded}
    return batch | {
        "wave": batch["wave"].flatten(1),
        "spec": batch["spec"].transpose(1, 2),
        "noise": batch["noise"].transpose(1, 2),
        "source": torch.stack([item["source"].reshape(1, -1) for item in items]),
        "start": torch.stack([item["start"] for item in items]),
        "lengths": torch.tensor([len(item["f0"]) for item in items]),
        "sid": torch.tensor([item["sid"] for item in items]),
        "index": torch.tensor([item["index"] for item in items]),
    }


def check_clips(clips: list, voice, faults: Faults, limit: int, text: str) -> tuple[list, SampleCache, list]:
    """(clips that are good, the cache of their rows, [(sha256, F0 of the voiced frames)]) after each was read once."""
    config = voice.config
    seen = config.hop + config.content_width + 1  # columns that come from the files; the spectrogram is made of them
    shapes = [(clip.frames, seen + config.n_fft // 2 + 1) for clip in clips]
    cache = SampleCache(clips, partial(load_rows, config), shapes, limit, "float32")

    def look_through(place):
        rows = cache[place][:, :seen]
        f0 = rows[:, -1]
        return hashlib.sha256(rows.tobytes()).hexdigest(), f0[f0 > 0]

    results = in_parts(list(range(len(clips))), partial(attempt, look_through), f"reading {text} clips")
    for clip, (_, fault, _) in zip(clips, results, strict=True):
        if fault:
            faults.add_error(fault, clip.name)
    good = [place for place, (_, fault, _) in enumerate(results) if not fault]
    return [clips[place] for place in good], cache.only(good), [results[place][0] for place in good]


# ---- loaders ---------------------------------------------------------------------------------------------------------


def build_loaders(config, voice, found: Found):
    """(train loader, validation loader, the voice with the data's speakers and their median F0, facts for the summary).

    voice: the base's (model.Voice); found: what find_voice gave. A batch is what `collate` gives. Sound is prepared first, if
    that was not done yet. UserError where nothing is left to train on.
    """
    rank, world = process_index()
    voice = replace(voice, content=choose_content(config.content, voice), f0_method=config.f0_method)
    limit, faults = cache_limit(config.cache), found.faults
    with faults:
        clips, speakers, layout = read_clips(found, voice, bool(config.content))
        splits = split_clips(clips, config.seed, found.folder, faults)
        train = chosen_split(splits, "train", found.name)
        train, train_cache, train_facts = check_clips(train, voice, faults, limit, "training")
        val, val_cache, val_facts = check_clips(splits["val"], voice, faults, limit - train_cache.bytes, "validation")
        if not train or not val:
            raise UserError(f"{found.name}: no clip is left to {'validate' if train else 'train'} on")
    medians = f0_medians(train, train_facts, speakers)
    voice = replace(voice, f0_method=choose_f0(config.f0_method), speakers=speakers, f0_medians=medians)
    facts = {
        "name": found.name,
        "format": layout,
        "sha256": data_sha256(speakers, (train, train_facts), (val, val_facts)),
        "train": len(train),
        "val": len(val),
        "minutes": minutes_of(train),
        "val_minutes": minutes_of(val),
        "speakers": len(speakers),
        "left_out": faults.counts(),
    }
    batch_size = max(1, min(config.batch_size, len(train) // world))
    if rank == 0:
        faults.report()
        tell(facts, voice, train_cache.kept + val_cache.kept)
        if batch_size < config.batch_size:
            say(f"batches of {batch_size}, not {config.batch_size}: there are no more training clips")
    train_data = VoiceData(train, train_cache, voice, config.seed)
    batches = LengthBatches(train_data.lengths, batch_size, config.seed, rank, world)
    train_loader = build_loader(train_data, batches, collate, config.num_workers)
    val_data = VoiceData(val, val_cache, voice)
    val_loader = eval_loader(val_data, collate, config.batch_size, config.num_workers, val_data.lengths)
    return train_loader, val_loader, voice, facts


def tell(facts: dict, voice, kept: int) -> None:
    """Says what the data is. kept: how many clips stay in memory."""
    train, val = facts["train"], facts["val"]
    long = " and ".join(in_time(60 * facts[key]) for key in ("minutes", "val_minutes"))
    say(f"data: {facts['name']} ({facts['format']}), {train} training and {counted(val, 'validation clip')}, {long}")
    medians = ", ".join(f"{speaker} {hertz:.0f} Hz" for speaker, hertz in voice.f0_medians.items())
    say(f"median F0: {medians or 'none, for no frame is voiced'}; {kept} of {train + val} clips stay in memory")


def choose_content(named: str, voice) -> str:
    """The content model to train with: `named`, or the base's own where nothing is named, or features of another kind are.

    A base knows no other content than that which it was trained on.
    """
    if not named or named == voice.content:
        return voice.content
    if "dsp" in (named, voice.content):
        say(f"content: {voice.content}, on which the base was trained, instead of {named}")
        return voice.content
    say(f"content: {named}; the base was trained on {voice.content}, and knows no other unless these are the same model")
    return named


def check_content(voice, named: bool) -> None:
    """UserError where the voice's content model would have to be fetched on a file's word alone. named: the user named it."""
    if voice.content != "dsp":
        hubert_folder(voice.content.removeprefix("hubert:"), named or voice.content_is_known)


def f0_medians(clips: list, facts: list, speakers: list[str]) -> dict[str, float]:
    """Speaker -> median F0 in Hz of the voiced frames; facts: see check_clips. Who has none is missing."""
    found = defaultdict(list)
    for clip, (_, f0) in zip(clips, facts, strict=True):
        found[clip.speaker].append(f0)
    joined = {speakers[place]: np.concatenate(parts) for place, parts in sorted(found.items())}
    return {speaker: round(float(np.median(f0)), 2) for speaker, f0 in joined.items() if len(f0)}


def minutes_of(clips: list) -> float:
    return round(sum(clip.frames for clip in clips) / 6000, 3)


def data_sha256(speakers: list[str], *splits: tuple[list, list]) -> str:
    """A hash of what was learnt from and scored on, split by split: the clips' sound, content, F0 and speakers.

    splits: (clips, their facts from check_clips).
    """
    digest = hashlib.sha256(repr(speakers).encode(errors="surrogateescape"))
    for clips, facts in splits:
        for clip, (content, _) in zip(clips, facts, strict=True):
            digest.update(f"{clip.speaker} {content}|".encode())
        digest.update(b"||")
    return digest.hexdigest()


def load_for_eval(config, voice, origin: dict):
    """(loader, name of the data) of config.split, of config.data_dir or of the data that the checkpoint was trained on.

    UserError where there is no such split, and where the data has speakers whom the voice does not know.
    """
    data_dir = config.data_dir or origin["data_dir"]
    found = find_voice(data_dir, origin.get("speakers", "auto"), origin["seed"], exclude_for_eval(config, origin))
    with found.faults:
        clips, speakers, _ = read_clips(found, voice)
        places = speaker_places(speakers, voice, found.name)
        clips = [replace(clip, speaker=places[clip.speaker]) for clip in clips]
        splits = split_clips(clips, origin["seed"], found.folder, found.faults)
        clips = chosen_split(splits, config.split, found.name)
        clips, cache, _ = check_clips(clips, voice, found.faults, cache_limit("auto"), config.split)
        if not clips:
            raise UserError(f"{found.name}: no clip of the {config.split} split can be used")
    if process_index()[0] == 0:
        found.faults.report()
    data = VoiceData(clips, cache, voice)
    loader = eval_loader(data, collate, config.batch_size or origin["batch_size"], config.num_workers, data.lengths)
    return loader, found.name


def speaker_places(speakers: list[str], voice, where: str) -> list[int]:
    """The rows of the voice that are the data's speakers: by name; of two sides with one speaker each they are the same."""
    known = voice.speakers or speakers
    if len(speakers) == len(known) == 1:
        return [0]
    if strange := [name for name in speakers if name not in known]:
        told, there = (", ".join(names[:5]) for names in (strange, known))
        raise UserError(f"{where} has speakers whom the voice does not know, {told}; it knows {there}")
    return [known.index(name) for name in speakers]
