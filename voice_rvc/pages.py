"""What a run leaves to look at and to listen to: pictures, WAV files, and both in TensorBoard."""

from pathlib import Path

import numpy as np
import soundfile

from common.batches import whole_batches
from common.record import parse_line
from data import collate
from metrics import heard_clips, measure, save_samples, save_sounds
from sound_plots import draw_f0, draw_spectrograms

# needs: tensorboard


def draw_results(model, dataset, folder: Path) -> None:
    """What a run leaves of its best model on the validation data, and of what `evaluate` kept before and at the end of it.

    samples.json; predictions/: recorded/, before/, best/, last/ with the same few clips as WAV, and validation.png with their
    mel spectrograms; plots/f0.png; the sounds and both pictures in TensorBoard.
    """
    found = list(measure(model, whole_batches(dataset, collate, 1)))
    save_samples(dataset, found, folder / "samples.json")
    heard, place = heard_clips(dataset), folder / "predictions"
    save_sounds(model, dataset, found, place / "best")
    clips = {index: dataset[0, index] for index in heard}
    recorded = [{"index": index, "wave": clips[index]["wave"].flatten().numpy()} for index in heard]
    save_sounds(model, dataset, recorded, place / "recorded")
    names, sounds = sounds_of(place, ("recorded", "before", "best", "last"))
    config = model.config
    draw_spectrograms(sounds, names, config, "Held-out recordings, and the voice's own saying of them", place / "validation.png")
    asked = [clips[index]["f0"].numpy() for index in heard]
    shown = [{stage: row[stage] for stage in ("before", "best") if stage in row} for row in sounds]
    draw_f0(shown, asked, names, config.sample_rate, folder / "plots" / "f0.png")
    pictures = {"spectrograms": place / "validation.png", "f0": folder / "plots" / "f0.png"}
    fill_board(folder, dict(zip(names, sounds, strict=True)), config.sample_rate, pictures)


def sounds_of(folder: Path, stages: tuple[str, ...]) -> tuple[list[str], list[dict[str, np.ndarray]]]:
    """(names of the clips, for each {stage: wave}) of the WAV files <stage>/<name>.wav, of the stages that are there."""
    names = sorted({path.stem for stage in stages for path in (folder / stage).glob("*.wav")})
    files = [{stage: folder / stage / f"{name}.wav" for stage in stages} for name in names]
    return names, [
        {stage: soundfile.read(path, dtype="float32")[0] for stage, path in row.items() if path.is_file()} for row in files
    ]


def fill_board(folder: Path, sounds: dict[str, dict[str, np.ndarray]], rate: int, pictures: dict[str, Path]) -> None:
    """Adds sounds, {clip: {stage: wave}}, and pictures to a run's TensorBoard files: each at the step that it is of.

    At the end of a run, for a resumed one writes these files anew.
    """
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    lines = [line for text in (folder / "metrics.jsonl").read_bytes().splitlines() if (line := parse_line(text))]
    epochs = [line for line in lines if "epoch" in line]
    best = min(epochs[1:], key=lambda line: np.inf if line.get("mcd") is None else line["mcd"])
    steps = {"before": 0, "best": best["step"], "last": epochs[-1]["step"]}
    with SummaryWriter(str(folder / "tb"), filename_suffix=".sounds") as board:
        for name, row in sounds.items():
            for stage, wave in row.items():
                board.add_audio(f"{name}/{stage}", wave[None], steps.get(stage, 0), sample_rate=rate)
        for name, path in pictures.items():
            board.add_image(name, imread(path)[..., :3], best["step"], dataformats="HWC")
