"""Prepares recordings for training and reports on them: how much speech, how clean, whose, and whether it is enough.

    python preprocess.py --data_dir ~/voice                                      # for the base that train takes
    python preprocess.py --data_dir ~/voice --sample_rate 48000                  # for a voice of 48 kHz, whatever base
    python preprocess.py --data_dir ~/voice --model demo                         # for the small base that comes along

Cuts the recordings at silence, brings them to one level and the voice's rate, and finds F0 and content features. train.py and
train_lora.py do the same on the way where it was not done, and take what is there: with the same --data_dir, or with the folder
that this leaves. It holds the clips, prepared.json, report.json, report.txt and report.png.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import Range, UserError, Workers, check_ranges, cli, parse, setting  # noqa: E402

Hertz = Annotated[float, Range(20, 4000)]


@dataclass
class Config:
    data_dir: str = ""  # folder with recordings, or one file, in any common format; empty: the synthetic demo data
    model: str = setting("lj1995/VoiceConversionWebUI/pretrained_v2/f0G40k.pth", demo="demo")  # base of the training to come
    sample_rate: Annotated[int, Range(32000, 48000, or_zero=True)] = 0  # 32000, 40000 or 48000 Hz, where no base is at hand
    content: str = setting("hubert:lengyue233/content-vec-best", demo="dsp")  # what is said: hubert:<name or folder>, or dsp
    f0_method: Literal["auto", "harvest", "dio", "pyin", "swift", "crepe"] = "auto"  # pitch tracker; auto: the best that is there
    f0_min: Hertz = 50  # Hz below which no pitch is looked for
    f0_max: Hertz = 1100  # Hz above which no pitch is looked for
    speakers: Literal["auto", "one", "folders"] = "auto"  # whose voices: all files are one, or each folder; auto: by its number
    output_dir: str = ""  # where the clips and the report go; empty: a folder of the user's cache, where train finds them
    num_workers: Workers = 0  # recordings that are prepared at a time, each by a process; 0: as many as there are cores
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where a HuBERT runs; auto: a GPU where there is one

    def __post_init__(self):
        check_ranges(self)
        if self.f0_min * 2 > self.f0_max:
            raise UserError(f"--f0_min {self.f0_min:g} and --f0_max {self.f0_max:g} leave less than an octave")


def main(argv=None):
    config = parse(Config, argv)
    # Heavy imports wait until the flags are read, so that --help answers at once.
    from common.runtime import counted, guard, say
    from data import find_voice
    from experiments import slices_as_recordings
    from prepared import prepare, prepared_folder
    from report import SHOWN, draw_report, report_of_clips, report_of_folder, report_text, write_report

    found = find_voice(config.data_dir, config.speakers, seed=0)
    if found.kind == "prepared":
        raise UserError(f"{found.folder} is what this script leaves: train takes it as it is; name the recordings themselves")
    voice = voice_of_run(config)
    folder = Path(config.output_dir).expanduser() if config.output_dir else prepared_folder(found.folder)
    if (folder.exists() and not folder.is_dir()) or folder.resolve() == found.folder.resolve():
        what = "the data's own folder" if folder.is_dir() else "no folder"
        raise UserError(f"--output_dir {folder} is {what}: name another, which may be new")
    with found.faults as faults:
        clips, speakers = as_it_is(found, voice)
        if clips:
            folder.mkdir(parents=True, exist_ok=True)
            report = report_of_clips(clips, speakers, voice, faults)
        else:
            recordings, speakers = found.recordings, found.speakers
            if found.kind == "experiment":
                recordings, speakers = slices_as_recordings(found.folder, faults)
            f0_range = (config.f0_min, config.f0_max)
            clips = prepare(recordings, voice, folder, config.num_workers, faults, f0_range, speakers, config.device)
            report = report_of_folder(folder, faults)
    faults.report()
    write_report(report, folder)
    with guard("the picture of the report"):
        draw_report(report, folder / "report.png")
    say(report_text(report, SHOWN))
    minutes = sum(clip.frames for clip in clips) / 6000
    place = found.folder if report["as_it_is"] else folder
    say(f"report.txt and report.png are in {folder}")
    say(f"{counted(len(clips), 'clip')}, {minutes:.1f} minutes, ready: python train_lora.py --data_dir {place}")


def voice_of_run(config: Config):
    """What the recordings are prepared for: rate, content and F0 method. UserError where the base is not there."""
    from dataclasses import replace

    from data import check_content, choose_content
    from f0 import choose_f0
    from model import Voice, load_base
    from synthesizer import VoiceConfig

    f0_method = choose_f0(config.f0_method)
    if config.sample_rate:
        architecture = VoiceConfig.of_rate(config.sample_rate)
        if config.content == "dsp":
            architecture = replace(architecture, content_width=13)
        return Voice(architecture, config.content, f0_method)
    _, voice, _ = load_base(config.model)
    voice = replace(voice, content=choose_content(config.content, voice), f0_method=f0_method)
    check_content(voice, bool(config.content))
    return voice


def as_it_is(found, voice):
    """(clips, names of the speakers) of an experiment folder of RVC or Applio that suits the voice; ([], []) of anything else."""
    from common.runtime import say
    from experiments import Unfit, read_experiment

    if found.kind != "experiment":
        return [], []
    try:
        clips, speakers, facts = read_experiment(found.folder, voice, found.faults)
    except Unfit as reason:
        say(f"{found.folder.name}: {reason}; its slices are prepared anew, as recordings are")
        return [], []
    say(f"{found.folder.name} is an experiment folder of {facts['program']}: train takes its clips and features as they are")
    return clips, speakers


if __name__ == "__main__":
    cli(main)
