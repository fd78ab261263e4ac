"""A trained voice beside what it is to be measured by: no conversion, its base as it is, and the best that its decoder can do."""

from dataclasses import dataclass

import numpy as np

from common.config import UserError
from common.runtime import quiet, say
from common.samples import Faults
from content import load_content
from convert import check_speaker
from data import demo_data, find_voice
from metrics import predict, resynthesize
from model import load_base, with_voices
from recordings import Recording
from speaker_encoder import likeness_to, load_encoder
from trials import LABELS, RESYNTHESIS, UNTRAINED, Trial, find_trials, nearest_voices, run_trials, scores_of, system_scores


@dataclass
class HeldOut:
    """What systems make of the held-out clips of the voice itself: scores and, of the clips that are heard, waves by index."""

    scores: dict[str, dict]
    sounds: dict[str, dict[int, np.ndarray]]


def load_untrained(origin: dict, config, voice, device):
    """The base of a checkpoint as it was before training, with the speakers' rows; None, and a line, where it is missing."""
    try:
        with quiet():
            base, _, _ = load_base(config.model or origin["base"]["name"], download=False)
            return with_voices(base, voice).to(device)
    except UserError as error:
        say(f"{UNTRAINED}: left out, for {error}")
        return None


def score_held_out(model, base, loader, found: list[dict], method: str) -> HeldOut:
    """The scores of the base, of the trained model (which gave `found`) and of analysis and resynthesis on held-out clips.

    From a clip's own content and F0: what the voice adds to words that it says itself.
    """
    systems = {} if base is None else {UNTRAINED: predict(base, loader)}
    systems[LABELS[method]] = found
    if model.enc_q is not None:
        systems[RESYNTHESIS] = predict(model, loader, resynthesize)
    groups = [clip.recording for clip in loader.dataset.clips]
    return HeldOut(
        {name: scores_of([item["sums"] for item in items], groups) for name, items in systems.items()},
        {name: {item["index"]: item["wave"] for item in items if item["wave"] is not None} for name, items in systems.items()},
    )


def score_conversions(config, origin: dict, model, base, voice, dataset, found: list[dict]) -> tuple[list[Trial], dict | None]:
    """(recordings of other voices, converted; what eval.json says of them) by config.source_dir; ([], None) where none is named.

    dataset, found: the held-out clips, and what `predict` gave of them: the target's sound, and the sentences it said.
    """
    data_dir = config.data_dir or origin["data_dir"]
    source_dir = config.source_dir or ("" if data_dir else str(demo_data().parent / "source"))
    if not source_dir:
        say("no conversions are scored: name recordings of other voices with --source_dir")
        return [], None
    check_speaker(config.speaker_id, model, voice)
    own = [(clip, item) for clip, item in zip(dataset.clips, found, strict=True) if clip.speaker == config.speaker_id]
    if not own:
        raise UserError(f"--speaker_id {config.speaker_id}: no clip of the {config.split} split is of this speaker")
    target = np.sum([item["sums"]["truth"] for _, item in own], axis=0)
    truths = held_out_recordings(data_dir, origin, {clip.recording for clip, _ in own})
    faults, device = Faults(), model.emb_g.weight.device
    likeness = None
    if config.speaker_encoder:
        waves = [clip.load(voice.config.hop)[0] for clip, _ in own[:20]]
        likeness = likeness_to(load_encoder(config.speaker_encoder, device), waves, voice.config.sample_rate)
    with faults:
        trials = find_trials(source_dir, truths, config.split, config.sources, faults)
        systems = ({} if base is None else {UNTRAINED: base}) | {LABELS[origin["method"]]: model}
        content = load_content(voice.content, device, voice.config.content_width, voice.content_is_known)
        trials = run_trials(trials, systems, voice, config.speaker_id, config.pitch, content, likeness, faults)
        if not trials:
            raise UserError(f"--source_dir {source_dir}: no recording of it can be read")
    faults.report()
    known = [trial for trial in trials if trial.truth]
    return trials, {
        "source": source_dir,
        "recordings": len(trials),
        "voices": list(dict.fromkeys(trial.speaker for trial in trials)),
        "frame_by_frame": sum(not trial.aligned for trial in known),
        "time_warped": sum(trial.aligned for trial in known),
        "without_truth": len(trials) - len(known),
        "target_seconds": float(target[-1] / 100),
        "device": str(device),
        "systems": system_scores(trials, target),
        "nearest": nearest_voices(trials, LABELS[origin["method"]], target),
    }


def held_out_recordings(data_dir: str, origin: dict, names: set[str]) -> list[Recording]:
    """The recordings, as they are on disk, that the clips named so were cut from; none where the data holds clips alone."""
    with quiet():
        found = find_voice(data_dir, origin.get("speakers", "auto"), origin["seed"])
    return [recording for recording in found.recordings if {recording.name, recording.group} & names]
