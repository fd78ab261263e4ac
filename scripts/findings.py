"""What check_data.py found in a data folder: findings by severity, samples that are one, what to leave out; as text and JSON."""

import os
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

from common.runtime import counted
from common.samples import Faults, readable

SEVERITIES = ("error", "warning", "note")
HELD_OUT_FIRST = {"test": 0, "val": 1, "train": 2}  # of samples that are one the first is kept: what is scored stays
SHOWN = 5  # places of a finding that the terminal shows
# What training leaves out without a loss, since it is no sample, or is there in another place.
HARMLESS = (
    "CSV file of no split",
    "CSV file without labels",
    "XML that is no annotation",
    "annotation of a category without keypoints",
    "annotation that is given twice",
    "box that is given twice",
    "class folder without pictures",
    "crowd annotation",
    "figure without a keypoint that counts",
    "file that is no",
    "folder of pictures beside the splits",
    "hidden copy of a picture",
    "image without a mask",
    "label file without a picture",
    "line that is given twice",
    "no 0.5 s of voice between silences",
    "organ too small",
    "part of a box that lay outside its picture",
    "picture outside the class folders",
    "row that is given twice",
    "second file of one name",
    "too short",
    "volume that is neither image nor mask",
)
FLATTERS = "so that the metrics flatter"  # how the readers' notes on what is trained on and scored, too, end
CONTRADICTION = "the same sample with different labels"
LEAK = "the same sample in two splits, so that the metrics flatter"
DUPLICATE = "the same sample twice in a split"
MIRRORED = "the mirror image of a picture of another split, so that the metrics flatter"


@dataclass
class Finding:
    severity: str
    what: str
    where: list[str]
    advice: str = ""


@dataclass
class Copies:
    """Samples that are one. kept: what training goes on with; others: (file, its split, whether the files are the same)."""

    kept: Path
    split: str
    others: list[tuple[Path, str, bool]]
    agree: bool = True  # whether their labels are the same
    mirrored: bool = False  # whether the others are mirror images

    @property
    def what(self) -> str:
        if not self.agree:
            return CONTRADICTION
        if self.mirrored:
            return MIRRORED
        return LEAK if {split for _, split, _ in self.others} - {self.split} else DUPLICATE


@dataclass
class Findings:
    """All that is known of a data folder. unusable: files that training cannot use, or not as they are meant."""

    folder: Path
    task: str
    layout: str = ""
    splits: dict[str, int] = field(default_factory=dict)  # split -> samples
    classes: dict[str, dict[str, int]] = field(default_factory=dict)  # split -> class -> how many
    found: list[Finding] = field(default_factory=list)
    copies: list[Copies] = field(default_factory=list)
    unusable: dict[Path, None] = field(default_factory=dict)

    def add(self, severity: str, what: str, where: list, advice: str = "") -> None:
        """Nothing where `where` is empty."""
        if where:
            self.found.append(Finding(severity, what, [self.name(place) for place in where], advice))

    def name(self, place) -> str:
        """A file by its path in the folder; other places as they are called."""
        return readable(os.path.relpath(place, self.root)) if isinstance(place, Path) else str(place)

    @property
    def root(self) -> Path:
        return self.folder if self.folder.is_dir() else self.folder.parent

    def take(self, faults: Faults, passed_over: tuple[str, ...] = ()) -> None:
        """What the task's own reader told, as training will tell it; of faults that begin like these more is known."""
        for fault, places in sorted(faults.found.items()):
            if not fault.startswith(passed_over or ("\0",)):
                severity = "warning" if fault.startswith(HARMLESS) else "error"
                self.add(severity, fault, places, "training leaves it out")
        for note, places in sorted(faults.notes.items()):
            if not note.startswith(passed_over or ("\0",)):
                self.add("error" if FLATTERS in note else "note", note, places)

    def take_copies(self, files: list[tuple[Path, str, object]], firsts: list[tuple[int, bool]]) -> None:
        """files: (path, split, label) in order of in_order; firsts: for each (place of what it is the same as, same file)."""
        members = defaultdict(list)
        for place, (first, exact) in enumerate(firsts):
            if first != place:
                members[first].append((place, exact))
        for first, places in members.items():
            path, split, label = files[first]
            agree = all(files[place][2] == label for place, _ in places)
            others = [(*files[place][:2], exact) for place, exact in places]
            self.copies.append(Copies(path, split, others, agree))
        advice = {
            CONTRADICTION: "none of them can be right: look at them",
            LEAK: "leave out those that are trained on",
            DUPLICATE: "one is enough",
        }
        for what, severity in ((CONTRADICTION, "error"), (LEAK, "error"), (DUPLICATE, "warning")):
            self.add(severity, what, [self.pair(group) for group in self.copies if group.what == what], advice[what])

    def take_mirrored(self, pairs: list[tuple]) -> None:
        """Pairs of files, as of take_copies, of which the second mirrors the first.

        Within a split they do no harm: many augment so. Nor are they the same where labels differ, as those of arrows do.
        """
        leaks = [
            Copies(path, split, [(other, theirs, False)], mirrored=True)
            for (path, split, label), (other, theirs, its) in pairs
            if split != theirs and label == its
        ]
        self.copies += leaks
        self.add("error", MIRRORED, [self.pair(group) for group in leaks], "leave out those that are trained on")

    def pair(self, group: Copies) -> str:
        """A group in words: "train/b.jpg = val/a.jpg"."""
        names = [f"{self.name(path)} ({split})" for path, split, _ in group.others]
        return f"{' = '.join(names)} = {self.name(group.kept)} ({group.split})"

    def say_classes(self, counts: dict[str, Counter], names: list[str], what: str, must: bool) -> None:
        """Findings on how many each class has. counts: split -> class -> how many `what`; must: none to train on is an error."""
        self.classes = {split: {name: own[name] for name in names} for split, own in counts.items()}
        train = counts.get("train", Counter())
        empty = [name for name in names if not train[name]]
        self.add("error" if must else "warning", f"class without training {what}: it cannot be learnt", empty)
        if sum(counts.get("val", Counter()).values()):
            unseen = [name for name in names if train[name] and not counts["val"][name]]
            self.add("warning", f"class without validation {what}: nothing tells how well it is learnt", unseen)
        there = sorted((name for name in names if train[name]), key=lambda name: train[name])
        if len(there) > 1 and (ratio := train[there[-1]] / train[there[0]]) > 3:
            told = [f"{there[-1]} {train[there[-1]]}, {there[0]} {train[there[0]]}: {ratio:.1f} to 1"]
            self.add("warning" if ratio > 10 else "note", "classes of very different size", told)

    # ---- what comes of it --------------------------------------------------------------------------------------------

    def count(self, severity: str) -> int:
        return sum(len(finding.where) for finding in self.found if finding.severity == severity)

    def quarantine(self) -> dict[Path, str]:
        """File -> why it should be left out: what is of no use, all but one of samples that are one, all of a contradiction."""
        listed = dict.fromkeys(self.unusable, "cannot be used")
        for group in self.copies:
            for path, _, _ in group.others:
                listed[path] = f"{'mirror image of' if group.mirrored else 'same as'} {self.name(group.kept)}"
            if not group.agree:
                listed[group.kept] = "same as another with a different label"
        return listed

    def quarantine_text(self) -> tuple[str, list[str]]:
        """(the list for --exclude, names that no line of text can hold)."""
        lines, strange = [f"# {self.task}, {readable(self.folder.resolve().name)}: for --exclude"], []
        for path, why in self.quarantine().items():
            name = self.name(path)
            if not name.isprintable() or name != name.strip():
                strange.append(repr(name))
                continue
            lines += [f"# {readable(why)}", f"./{name}" if name.startswith(("#", "~")) else name]
        return "\n".join(lines) + "\n", strange

    def text(self) -> str:
        """The report for a terminal."""
        many = ", ".join(f"{count} {split}" for split, count in self.splits.items())
        lines = [f"{self.folder}: {self.task} ({self.layout}), samples: {many or 'none'}"]
        for finding in self.in_order():
            more = f" and {len(finding.where) - SHOWN} more" if len(finding.where) > SHOWN else ""
            advice = f"; {finding.advice}" if finding.advice else ""
            lines.append(
                f"{finding.severity}: {finding.what} ({len(finding.where)}){advice}: {', '.join(finding.where[:SHOWN])}{more}"
            )
        counts = ", ".join(counted(self.count(severity), severity) for severity in SEVERITIES)
        return "\n".join([*lines, counts])

    def in_order(self) -> list[Finding]:
        return sorted(self.found, key=lambda finding: SEVERITIES.index(finding.severity))

    def to_json(self) -> dict:
        """All of it, each place by its name."""
        groups = [
            {
                "what": group.what,
                "kept": {"file": self.name(group.kept), "split": group.split},
                "others": [{"file": self.name(p), "split": split, "same_file": exact} for p, split, exact in group.others],
            }
            for group in self.copies
        ]
        return {
            "format": "LoRA Workshop data check 1",
            "folder": readable(str(self.folder)),
            "task": self.task,
            "layout": self.layout,
            "splits": self.splits,
            "classes": self.classes,
            "counts": {severity: self.count(severity) for severity in SEVERITIES},
            "findings": [asdict(finding) for finding in self.in_order()],
            "copies": groups,
            "quarantine": [{"file": self.name(path), "why": readable(why)} for path, why in self.quarantine().items()],
        }


def in_order(files: list[tuple]) -> list[tuple]:
    """(path, split, ...) in the order in which one of several that are the same is kept: held-out ones first."""
    return sorted(files, key=lambda file: (HELD_OUT_FIRST.get(file[1], 3), str(file[0])))
