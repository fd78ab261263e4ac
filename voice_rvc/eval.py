"""Scores a fine-tuned voice on held-out recordings, and on what it makes of other people's; leaves a page to listen to.

    python eval.py                                           # the newest outputs/voice_rvc/full, on its validation data
    python eval.py --source_dir ~/others --split test        # converts recordings of other voices, too
    python eval.py --checkpoint ~/runs/full/checkpoints/best --data_dir ~/voice

A source whose name ends with the name of a held-out recording (ben_hello.wav, hello.wav) says the same sentence: its conversion
is compared with what the target said. Leaves eval.json (for another split than val: eval_<split>.json) in the run folder, and
beside it in eval_<split>/ the page (page.html, all in one file), its sounds as WAV, spectrograms, F0 and scores as pictures.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import BatchSizeOrZero, Count, CountOrZero, LoadConfig, Range, Workers, cli, parse  # noqa: E402


@dataclass
class EvalConfig(LoadConfig):
    data_dir: str = ""  # folder of recordings of the voice; empty: the data that the checkpoint was trained on
    exclude: str = ""  # text file of samples to leave out; empty: on the data of the training, that of the training
    split: Literal["train", "val", "test"] = "val"  # which part of the data
    source_dir: str = ""  # recordings of other voices to convert; empty: the demo's with the demo's data, else none
    sources: Count = 24  # of those recordings at most so many, of each voice in turn
    speaker_id: CountOrZero = 0  # which of the voice's speakers they are converted to
    pitch: Annotated[float, Range(-48, 48)] | Literal["auto"] = "auto"  # semitones up; auto: to the speaker's median F0
    speaker_encoder: str = ""  # x-vector model to compare speakers by, a hub name (microsoft/wavlm-base-plus-sv) or folder
    batch_size: BatchSizeOrZero = 0  # clips at a time; 0: as in training. No metric depends on it
    num_workers: Workers = 0  # processes that prepare batches; 0: the main one does
    output_dir: str = ""  # where the results go; empty: the run folder


def main(argv=None, method="full", doc=None):
    config = parse(EvalConfig, argv, doc)
    # Heavy imports wait until the flags are read, so that --help answers at once.
    from common.checkpoint import write_json
    from common.folders import check_data_dir, eval_places
    from common.record import of_split
    from common.runtime import counted, guard, process_index, start_accelerator
    from common.saved_models import choose_checkpoint
    from data import load_for_eval
    from listening import leave_page, say_scores
    from metrics import predict, save_samples, voice_metrics
    from model import load_checkpoint
    from systems import load_untrained, score_conversions, score_held_out

    accelerator = start_accelerator(config)
    config.checkpoint, origin = choose_checkpoint(config.checkpoint, "voice_rvc", method)
    check_data_dir(config.data_dir, origin)
    model, voice, _ = load_checkpoint(config.checkpoint, config.model, config.merge, accelerator.device)
    loader, name = load_for_eval(config, voice, origin)
    file, folder = eval_places(config)
    found = predict(model, loader)
    metrics = of_split(voice_metrics(loader.dataset, found), config.split)
    base = load_untrained(origin, config, voice, accelerator.device)
    held_out = score_held_out(model, base, loader, found, origin["method"])
    if process_index()[0]:
        return
    trials, conversion = score_conversions(config, origin, model, base, voice, loader.dataset, found)

    about = {"data": name, "split": config.split, "clips": len(loader.dataset), "base": origin["base"]}
    scores = {"held_out": held_out.scores, "conversion": conversion}
    write_json(file, {**about, "config": asdict(config), "metrics": metrics, **scores})
    save_samples(loader.dataset, found, folder / "samples.json")
    with guard("the page and its pictures"):
        leave_page(folder, config, about, loader.dataset, held_out, trials, conversion)

    print(f"{name}, {config.split} split, {counted(len(loader.dataset), 'clip')}")
    for key, value in metrics.items():
        if not isinstance(value, dict):
            print(f"  {key:22} {'absent' if value is None else f'{value:.4f}'}")
    say_scores(held_out.scores, conversion)
    print(f"saved {file}, and a page to listen to, {folder / 'page.html'}")


if __name__ == "__main__":
    cli(main)
