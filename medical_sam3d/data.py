"""Organs as data: a folder and its split by patient, cubes at random places, thick slices at random phases, batches."""

import copy
import hashlib
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cases import Case, find_cases, plain_name
from common.batches import EpochBatches, build_loader, eval_loader, number_from
from common.config import UserError
from common.exclude import Exclusions, exclude_for_eval
from common.folders import make_once
from common.runtime import counted, from_main, process_index, say
from common.sample_cache import CachedSamples, SampleCache, cache_limit, first_readable
from common.samples import SPLIT_NAMES, Faults, attempt, chosen_split, data_folder, hold_out
from common.scan import in_parts
from latents import Latents, find_latents, latents_folder, read_latents
from observe import Observed, observe
from organs import Organ
from prepared import Item, is_prepared, open_prepared, prepare, prepared_folder
from preparing import Preparation, known_facts
from processor import OrganProcessor, Sample, augmented

HERE = Path(__file__).resolve().parent
LOOKED_AT = 32  # so many training organs are looked at before training; all are while it goes on
LEAST_COVERAGE = 0.98  # of the cells with true surface, in the median; what is not covered is never drawn

# ---- what a folder holds ---------------------------------------------------------------------------------------------


@dataclass
class FoundOrgans:
    """What a data folder is, before any volume is read: see find_organs. cases: of volumes; a prepared folder has none."""

    name: str
    folder: Path
    organs: list[str]  # asked for; none: all
    seed: int  # of the split
    format: str  # "prepared" (by preprocess.py), or the layout of the volumes
    cases: list[Case] = field(default_factory=list)
    faults: Faults = field(default_factory=Faults)
    excluded: Exclusions = field(default_factory=lambda: Exclusions("", Path()))


def demo_data() -> Path:
    """The folder of the synthetic patients, made at the first call (a few seconds)."""
    from synthetic import make_demo_data

    return make_once(HERE / "data" / "demo", make_demo_data) / "target"


def find_organs(data_dir: str, organs: str = "", seed: int = 0, exclude: str = "") -> FoundOrgans:
    """What is in a folder of volumes and masks (cases.find_cases), in one that preprocess.py wrote, or in the demo data ("").

    organs: names with commas between them; empty: all. exclude: a list of files or cases to leave out; of prepared organs, by
    case or case/organ. UserError where there is no organ.
    """
    root = Path(data_dir).expanduser() if data_dir else demo_data()
    folder, excluded = data_folder(root, is_prepared), Exclusions(exclude, root)
    names = [name.strip() for name in organs.split(",") if name.strip()]
    found = FoundOrgans(data_dir or "demo", folder, names, seed, "prepared", excluded=excluded)
    if not is_prepared(folder):
        with found.faults:
            found.cases, facts = find_cases(folder, found.faults, organs, excluded)
            found.format = facts["layout"]
    return found


def read_items(found: FoundOrgans, modality: str = "auto", workers: int = 0) -> list[Item]:
    """The organs of what was found; those of volumes are prepared on the way, on the main process."""
    if found.format == "prepared":
        items = chosen_items(open_prepared(found.folder)[0], found)
        items = found.excluded.leave_out(items, found.faults, lambda item: found.folder / item.name)
        found.excluded.note_strangers(found.faults)
        return items
    folder = prepared_folder(found.folder)

    def make():
        faults = Faults()
        with faults:
            return prepare(found.cases, folder, workers, faults, Preparation(modality))[0], faults

    items, faults = from_main(make)
    say(f"prepared organs are in {folder}")
    found.faults.take(faults)
    return items


def chosen_items(items: list[Item], found: FoundOrgans) -> list[Item]:
    """Those whose organ, by its name or label, was asked for; all where none was. UserError for one that is not there."""
    names = [{item.organ.casefold(), str(item.label)} for item in items]
    wanted = {plain_name(name).casefold() for name in found.organs}
    if strange := sorted(wanted.difference(*names)):
        known = ", ".join(sorted({item.organ for item in items}))
        raise UserError(f"--organs: there is no {strange[0]} in {found.name}; there are {known}")
    return [item for item, own in zip(items, names, strict=True) if not wanted or own & wanted]


def split_items(items: list[Item], seed: int, where, faults: Faults, wanted: str = "train") -> dict[str, list[Item]]:
    """Split -> organs: as the data set says, where it does; what is held out to validate on comes of its training patients.

    All organs and scans of a patient, and copies of them, stay together. wanted: the split that is asked for; for "test" none is
    held out. UserError where there is only one patient.
    """
    named = {split: [item for item in items if (item.split or "train") == split] for split in SPLIT_NAMES}
    splits = {split: members for split, members in named.items() if members}
    if "train" in splits and "val" not in splits and wanted != "test":
        patients = [item.patient for item in splits["train"]]
        splits["train"], splits["val"] = hold_out(splits["train"], patients, seed, where, "patients")
    trained = {item.patient for item in splits.get("train", [])}
    for split in ("val", "test"):
        for patient in dict.fromkeys(item.patient for item in splits.get(split, []) if item.patient in trained):
            faults.note(f"patient who is in the training and the {split} split, so that the metrics flatter", patient)
    return splits


# ---- what the model gets ---------------------------------------------------------------------------------------------


class ThickView(NamedTuple):
    """An organ, its number, as thick slices at one phase show it."""

    number: int
    phase: int
    path: Path


class OrganData(CachedSamples):
    """Item (epoch, index) -> an organ as the model gets it, and the truth: see `draw`.

    In epoch 0, evaluation, an organ is seen at a phase of its own, in a cube that nothing moves. In others phase, cube and crop
    are functions of (seed, epoch, index), and so is which organ takes the place of one that turns out to be bad. limit: bytes
    of organs, and of what is seen of them, that stay in memory. training: it is for more than epoch 0.
    """

    def __init__(
        self,
        items: list[Item],
        processor: OrganProcessor,
        latents_dir: Path | None = None,
        limit: int = 0,
        training: bool = False,
        seed: int = 0,
        augment: bool = False,
        crop: int = 0,
    ):
        self.items, self.processor, self.latents_dir = items, processor, latents_dir
        self.seed, self.augment, self.crop = seed, augment, crop
        self.every = processor.every if latents_dir is None else 1  # their cube, where none is said, is that of the whole organ
        self.facts = [known_facts(item.path.parent, item.path.stem) for item in items]
        shapes = [tuple(facts["shape"]) for facts in self.facts]
        stacks = [(2 + (facts["modality"] is not None), *shape) for facts, shape in zip(self.facts, shapes, strict=True)]
        self.cache = SampleCache(items, load_stack, stacks, limit, "float16")
        phases = [range(self.every) if training else [self.phase(number, self.every)] for number in range(len(items))]
        views = [ThickView(number, phase, item.path) for number, item in enumerate(items) for phase in phases[number]]
        self.places = {view[:2]: place for place, view in enumerate(views)}
        self.views = SampleCache(views, self.load_view, [shapes[v.number] for v in views], limit - self.cache.bytes, "float16")

    def only(self, numbers: list[int]) -> "OrganData":
        """Some of the organs, with what is in memory of them."""
        part, new = copy.copy(self), {number: place for place, number in enumerate(numbers)}
        part.items, part.facts = ([values[number] for number in numbers] for values in (self.items, self.facts))
        views = [(place, view) for place, view in enumerate(self.views.items) if view.number in new]
        part.cache, part.views = self.cache.only(numbers), self.views.only([place for place, _ in views])
        part.places = {(new[view.number], view.phase): place for place, (_, view) in enumerate(views)}
        return part

    def __len__(self) -> int:
        return len(self.items)

    def name(self, index: int) -> str:
        return self.items[index].name

    @property
    def bytes(self) -> int:
        """Of memory that is set aside."""
        return self.cache.bytes + self.views.bytes

    def new_faults(self) -> list[tuple[str, str]]:
        names = {str(item.path): item.name for item in self.items}  # a file's own name is a hash
        return [(names[path], fault) for path, fault in dict.fromkeys(self.cache.new_faults() + self.views.new_faults())]

    def organ(self, index: int) -> Organ:
        """BadFile where its file is damaged or gone."""
        stack, facts = self.cache[index].astype(np.float32), self.facts[index]
        affine = np.array(facts["affine"], np.float64).reshape(4, 4)
        image = stack[2] if len(stack) > 2 else None
        return Organ(stack[0] > 0, stack[1], image, affine, facts["thick_axis"], facts["notes"])

    def load_view(self, view: ThickView) -> np.ndarray:
        return observe(self.organ(view.number), self.every, view.phase).sdf.astype(np.float16)

    def phase(self, index: int, every: int) -> int:
        """At which an organ is evaluated, whatever else is in the data."""
        return number_from(self.items[index].name, "phase") % every

    def observed(self, index: int) -> Observed:
        """What thick slices show of an organ when it is evaluated, also where the model gets latents of others instead."""
        return observe(self.organ(index), self.processor.every, self.phase(index, self.processor.every))

    def sample(self, index: int) -> Sample:
        """What the model gets of an organ when it is evaluated."""
        return self.draw(0, index)[0]

    def latents(self, index: int) -> Latents | None:
        if self.latents_dir is None:
            return None
        return read_latents(find_latents(self.latents_dir, self.items[index].name), self.processor.resolution)

    def draw(self, epoch: int, index: int, chosen: int | None = None) -> tuple[Sample, Organ]:
        """The sample of (epoch, index) and its organ; chosen: the organ that takes its place. ValueError where it has a fault."""
        chosen = index if chosen is None else chosen
        rng = np.random.default_rng(number_from(self.seed, epoch, index))
        organ, latents = self.organ(chosen), self.latents(chosen)
        phase = int(rng.integers(self.every)) if epoch else self.phase(chosen, self.every)
        sdf = self.views[self.places[chosen, phase]].astype(np.float32)
        seen = Observed(None, None, sdf, organ.thick_axis, None)  # the processor looks at nothing else
        frame = None
        if latents is None:  # those of others are in a cube that nobody can move
            frame = self.processor.frame_of(seen, organ.affine)
            frame = augmented(frame, rng) if epoch and self.augment else frame
        return self.processor.sample(organ, seen, frame, self.crop if epoch else 0, rng, latents), organ

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        _, (sample, organ) = first_readable(self, partial(self.draw, epoch, index), index, self.seed, epoch)
        return as_item(sample, organ, index)


def as_item(sample: Sample, organ: Organ, index: int) -> dict:
    """A sample as tensors, with the truth (see `collate`)."""
    return {
        "coords": torch.from_numpy(sample.coords),
        "inputs": torch.from_numpy(sample.inputs),
        "truth": torch.from_numpy(organ.sdf),
        "to_voxel": torch.from_numpy(sample.frame.to_voxel(organ.affine)).float(),
        "edge": sample.frame.edge,
        "index": index,
    }


def load_stack(item: Item) -> np.ndarray:
    """An organ as the cache keeps it, in the precision of its file: mask, distance in mm, image if any: (2 or 3, X, Y, Z)."""
    organ = item.load()
    return np.stack([part for part in (organ.mask, organ.sdf, organ.image) if part is not None], dtype=np.float16)


def collate(items: list[dict]) -> dict:
    """Items -> a batch of B organs with N active cells in all.

    coords (N, 4) int32: organ, x, y, z. inputs (N, C, 4, 4, 4), or latents (N, 8). truth: B signed distances (X, Y, Z) in mm,
    each on its own grid; to_voxel (B, 3, 4): from the cube to indices in it; edge (B,): of the cube, mm. index (B,).
    """
    coords = [torch.nn.functional.pad(item["coords"], (1, 0), value=row) for row, item in enumerate(items)]
    return {
        "coords": torch.cat(coords),
        "inputs": torch.cat([item["inputs"] for item in items]),
        "truth": [item["truth"] for item in items],
        "to_voxel": torch.stack([item["to_voxel"] for item in items]),
        "edge": torch.tensor([item["edge"] for item in items], dtype=torch.float32),
        "index": torch.tensor([item["index"] for item in items]),
    }


# ---- loaders ---------------------------------------------------------------------------------------------------------


def look_through(data: OrganData, faults: Faults, most: int, text: str) -> tuple[OrganData, list[float]]:
    """(the organs that can be used, coverage of those that were looked at) of a data set.

    `most` of them are drawn as for evaluation. Latents of others, which may be missing, are looked for of all.
    """
    step = max(1, -(-len(data) // most))

    def check(index):
        if index % step == 0:
            return data.sample(index).coverage
        data.latents(index)

    results = in_parts(list(range(len(data))), partial(attempt, check), f"looking at {text} organs")
    for index, (_, fault, _) in enumerate(results):
        if fault:
            faults.add_error(fault, data.name(index))
    good = [index for index, (_, fault, _) in enumerate(results) if not fault]
    covered = [coverage for coverage, _, _ in results if coverage is not None]
    return data if len(good) == len(data) else data.only(good), covered


def build_loaders(config, processor: OrganProcessor, found: FoundOrgans):
    """(train loader, validation loader, the processor with the organs' names, facts for the summary).

    processor: as model.set_up gave it; found: what find_organs gave. A batch is what `collate` gives. Volumes are prepared
    first, if that was not done yet. UserError where nothing is left to train on.
    """
    rank, world = process_index()
    limit, faults = cache_limit(config.cache), found.faults
    with faults:
        splits = split_items(read_items(found, config.modality, config.num_workers), found.seed, found.folder, faults)
        train = chosen_split(splits, "train", found.name)
        learnt = sorted({item.organ for item in train})
        processor = replace(processor, organs=learnt)
        latents_dir = latents_folder(config.latents_dir, processor)
        val = OrganData(splits["val"], processor, latents_dir, limit // 4)
        draws = {"seed": config.seed, "augment": config.augment, "crop": config.crop}
        train = OrganData(train, processor, latents_dir, limit - val.bytes, training=True, **draws)
        val, val_covered = look_through(val, faults, len(val), "validation")
        train, covered = look_through(train, faults, LOOKED_AT, "training")
        if not len(train) or not len(val):
            raise UserError(f"{found.name}: no organ is left to {'validate' if len(train) else 'train'} on")
    facts = data_facts(found, train, val, covered + val_covered)
    batch_size = max(1, min(config.batch_size, len(train) // world))
    if rank == 0:
        faults.report()
        tell(facts, train, val)
        if batch_size < config.batch_size:
            say(f"batches of {batch_size}, not {config.batch_size}: there are no more training organs")
    batches = EpochBatches(len(train), batch_size, config.seed, rank, world)
    train_loader = build_loader(train, batches, collate, config.num_workers)
    return train_loader, eval_loader(val, collate, config.batch_size, config.num_workers), processor, facts


def data_facts(found: FoundOrgans, train: OrganData, val: OrganData, covered: list[float]) -> dict:
    """What the summary says of the data. covered: of the organs that were looked at."""
    facts = {"name": found.name, "format": found.format, "sha256": data_sha256(train, val)}
    for part, data in (("", train), ("val_", val)):
        facts[part.rstrip("_") or "train"] = len(data)
        facts[f"{part}patients"] = len({item.patient for item in data.items})
        facts[f"{part}cases"] = len({item.case for item in data.items})
    organs = Counter(item.organ for item in train.items)
    facts |= {"organs": dict(sorted(organs.items())), "every": train.every, "coverage": round(float(np.median(covered)), 4)}
    return facts | {"left_out": found.faults.counts()}


def tell(facts: dict, train: OrganData, val: OrganData) -> None:
    """Says what the data is."""
    parts = [
        f"{counted(facts[part], f'{word} organ')} of {counted(facts[f'{key}patients'], 'patient')}"
        f" ({counted(facts[f'{key}cases'], 'scan')})"
        for part, key, word in (("train", "", "training"), ("val", "val_", "validation"))
    ]
    say(f"data: {facts['name']} ({facts['format']}), {' and '.join(parts)}")
    organs = [f"{name} ({many})" for name, many in facts["organs"].items()]
    say(f"organs: {', '.join(organs[:8])}{f' and {len(organs) - 8} more' if len(organs) > 8 else ''}; seen: {seen_as(train)}")
    if strange := sorted({item.organ for item in val.items} - facts["organs"].keys()):
        say(f"validated on, but in no training patient: {', '.join(strange[:5])}")
    share = facts["coverage"]
    little = " which is little: latents in another cube, thicker slices than the model knows?" if share < LEAST_COVERAGE else ""
    kept = train.cache.kept + val.cache.kept
    say(f"active cells hold {share:.1%} of the true surface{little}; {kept} of {len(train) + len(val)} organs stay in memory")


def seen_as(data: OrganData) -> str:
    if data.latents_dir:
        return f"by the latents in {data.latents_dir}"
    return f"one slice in {data.every}, the rest interpolated" if data.every > 1 else "all slices"


def data_sha256(*parts: OrganData) -> str:
    """A hash of what was learnt from and scored on: whose organs, and their files, which are named by what is in them."""
    keys = [[(item.organ, item.patient, item.path.stem) for item in data.items] for data in parts]
    return hashlib.sha256(repr(keys).encode(errors="surrogateescape")).hexdigest()


def load_for_eval(config, processor: OrganProcessor, origin: dict):
    """(loader, name of the data) of config.split, of config.data_dir or of the data that the checkpoint was trained on.

    UserError where there is no such split.
    """
    organs = getattr(config, "organs", "") or origin.get("organs", "")
    found = find_organs(config.data_dir or origin["data_dir"], organs, origin["seed"], exclude_for_eval(config, origin))
    latents_dir = latents_folder(getattr(config, "latents_dir", "") or origin.get("latents_dir", ""), processor)
    with found.faults:
        items = read_items(found, origin.get("modality", "auto"), config.num_workers)
        splits = split_items(items, found.seed, found.folder, found.faults, config.split)
        data = OrganData(chosen_split(splits, config.split, found.name), processor, latents_dir, cache_limit("auto"))
        data, _ = look_through(data, found.faults, len(data), config.split)
        if not len(data):
            raise UserError(f"{found.name}: no organ of the {config.split} split can be used")
    if process_index()[0] == 0:
        found.faults.report()
        if strange := sorted({item.organ for item in data.items} - set(processor.organs)):
            say(f"the model has not learnt {', '.join(strange[:5])}{' and others' if len(strange) > 5 else ''}")
    return eval_loader(data, collate, config.batch_size or origin["batch_size"], config.num_workers), found.name
