"""Which clips are trained on and which are held out: whole recordings, of every speaker, and not too much of few."""

from collections import Counter, defaultdict
from pathlib import Path

from common.runtime import counted, say
from common.samples import SPLIT_NAMES, Faults, split_off

HELD_OUT = 5  # one in so many clips, where recordings do not decide
MOST_HELD_OUT = 1 / 3  # of a speaker's sound; where it would be more, the shortest recordings are held out


def split_clips(clips: list, seed: int, where: Path, faults: Faults) -> dict[str, list]:
    """Split -> clips: as folders say, where some are in train/; what is held out to validate on comes of these, if nowhere else.

    Clips of one recording, and of copies of it, stay together.
    """
    named = {split: [clip for clip in clips if (clip.split or "train") == split] for split in SPLIT_NAMES}
    splits = {split: members for split, members in named.items() if members}
    if "train" in splits and "val" not in splits:
        splits["train"], splits["val"] = hold_out_clips(splits["train"], seed, where)
    elif "train" in splits:
        trained = {clip.recording for clip in splits["train"]}
        for recording in dict.fromkeys(clip.recording for clip in splits["val"] if clip.recording in trained):
            faults.note("recording that is trained on and validated on, so that the metrics flatter", recording)
    return splits


def hold_out_clips(clips: list, seed: int, where: Path) -> tuple[list, list]:
    """(training, validation) clips: about a fifth of each speaker's recordings, said aloud.

    Of one long recording its end; a single clip is trained on and validated on.
    """
    chosen, said = set(), Counter()  # indices of clips; of how many speakers something is said
    for speaker in sorted({clip.speaker for clip in clips}):
        own = [index for index, clip in enumerate(clips) if clip.speaker == speaker]
        names = hold_out_recordings([clips[index] for index in own], seed)
        if names:
            chosen |= {index for index in own if clips[index].recording in names}
            every = len({clips[index].recording for index in own})
            said[f"{len(names)} of {counted(every, 'recording')}, chosen by seed {seed}"] += 1
        elif len(own) > 1:
            last = own[-max(1, len(own) // HELD_OUT) :]
            chosen |= set(last)
            said[f"the last {len(last)} of {len(own)} clips of the only recording, so that the metrics flatter"] += 1
    if not chosen:
        many = "one clip" if len(clips) == 1 else "one clip of each voice"
        say(f"{where} is {many}: what is trained on is validated on, and the metrics tell of nothing else")
        return clips, clips
    parts = [f"{text} (of each of {voices} voices)" if voices > 1 else text for text, voices in said.items()]
    say(f"no validation split in {where}; it becomes {'; '.join(parts)}")
    return tuple([clip for index, clip in enumerate(clips) if (index in chosen) is side] for side in (False, True))


def hold_out_recordings(clips: list, seed: int) -> set[str]:
    """Names of the recordings of one speaker to hold out; none where there is only one.

    Those that split_off says, unless that is too much of the sound: of a few recordings one may be most of it.
    """
    frames = defaultdict(int)
    for clip in clips:
        frames[clip.recording] += clip.frames
    if len(frames) < 2:
        return set()
    names, total = list(frames), sum(frames.values())
    chosen = [name for name, held in zip(names, split_off(names, seed), strict=True) if held]
    if sum(frames[name] for name in chosen) > MOST_HELD_OUT * total:
        chosen, room = [], total / HELD_OUT
        for name in sorted(names, key=frames.get):
            room -= frames[name]
            if room < 0 and chosen:
                break
            chosen.append(name)
    return set(chosen)
