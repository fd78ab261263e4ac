"""Makes meshes of organ masks with a tuned model: in millimetres, and as a mask in the input's own space.

    python infer.py --input segmentation.nii.gz              # a mask; or several in quotes: "labels/*.nii.gz"
    python infer.py --input ~/Totalsegmentator_dataset/s0011 --organs liver,spleen      # or any folder that train.py reads
    python infer.py --input thick.nii.gz --formats ply,stl,glb,nii --checkpoint outputs/medical_sam3d/full

The mask is all that the model sees (and --image, if it was trained on images); there is no truth here. Thick slices, and masks
that are drawn in every n-th slice alone, are told by themselves. Leaves in a new folder each time,
outputs/medical_sam3d/predictions/<method>/<number>/: <case>/<organ>.ply (.stl, .glb) in RAS mm, <case>.nii.gz with all organs
on the input's voxels, <case>.png with both outlines in three planes, volumes.csv, and predictions.json.
"""

import csv
import io
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import LoadConfig, Range, UserError, cli, parse  # noqa: E402

FORMATS = ("ply", "stl", "glb", "nii")
NOTHING = "there is no organ in it of which a mesh could be made"
MOST_DRAWN = 12  # organs in the picture of a case
VOLUME_COLUMNS = ("case", "organ", "mask_label", "input_ml", "observed_ml", "mesh_ml", "remarks")


@dataclass(kw_only=True)
class InferConfig(LoadConfig):
    input: str  # a mask, masks as a glob in quotes, or a folder: of masks, of one case, or of a whole data set
    image: str = ""  # the scan of --input, where that is one mask; of a data set it is found
    organs: str = ""  # names or labels of organs, with commas between them; empty: all
    every: Annotated[int, Range(1, 100)] | Literal["auto"] = "auto"  # look at each n-th slice alone; auto: as the mask was drawn
    formats: str = "ply,nii"  # of ply, stl, glb (meshes) and nii (a mask), with commas between them
    space: Literal["ras", "lps"] = "ras"  # of the meshes; their headers say it
    latents_dir: str = ""  # latents of the official pipeline, for a model that was trained on these
    output_dir: str = ""  # where the results go; empty: a new outputs/medical_sam3d/predictions/<method>/<number>


@dataclass(eq=False)
class Made:
    """What was made of an organ: its row in predictions.json, its mesh, and what the mesh is drawn over."""

    row: dict
    mesh: object
    organ: object


def find_inputs(config, faults) -> list:
    """The cases (cases.Case) that --input names, with the organs that --organs names. UserError where there is none."""
    import glob
    from dataclasses import replace

    from cases import choose_organs, find_cases

    path = Path(config.input).expanduser()
    if path.is_dir():
        try:
            found, _ = find_cases(path, faults, config.organs)
        except UserError as error:
            raise UserError(str(error).replace("--data_dir", "--input", 1)) from None
    else:
        paths = [path] if path.is_file() else [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
        if not paths:
            what = "no file fits it" if glob.has_magic(str(path)) else "there is no such file or folder"
            raise UserError(f"--input {config.input}: {what}")
        found = cases_of_files(paths, faults)
        if not found:
            raise UserError(f"--input {config.input}: {NOTHING}")
        found = choose_organs(found, config.organs)
    if config.image:
        if len(found) != 1:
            raise UserError(f"--image is one scan, and --input {config.input} has {len(found)} cases")
        found = [replace(found[0], image=Path(config.image).expanduser())]
    return found


def cases_of_files(paths: list[Path], faults) -> list:
    """A case for each mask, with an organ for each of its labels. What is no mask goes to `faults`."""
    from cases import GEOMETRY_FIELDS, Case, look_at_mask
    from common.samples import attempt, short_names
    from volumes import volume_stem

    found = []
    for path, shown in zip(paths, short_names(paths), strict=True):
        facts, fault, _ = attempt(look_at_mask, path)
        labels = [] if fault else facts[len(GEOMETRY_FIELDS) :]
        if labels:
            name = volume_stem(shown)
            found.append(Case(name, name, None, tuple((str(label), path, label) for label in labels), None, None))
        else:
            faults.add_error(fault or "mask that is empty", shown)
    return found


def make_organs(case, predictor, config, faults) -> list[Made]:
    """The meshes of a case's organs; what is wrong with one goes to `faults` and costs the others nothing."""
    from preparing import read_labels, read_picture

    tuned, picture, made = predictor.known[""], None, []
    needs_image, every = "image" in tuned.processor.channels, tuned.processor.every
    try:
        picture = read_picture(case, tuned.details)
    except (OSError, ValueError, MemoryError) as error:
        if needs_image:
            faults.add_error(str(error) or type(error).__name__, case.name)
            return []
        faults.note(f"image that is not used, {error}", case.name)
    for path in dict.fromkeys(mask for _, mask, _ in case.masks):
        organs = [(organ, label) for organ, mask, label in case.masks if mask == path]
        try:
            volume = read_labels(path, picture, not all(label for _, label in organs))
        except (OSError, ValueError, MemoryError) as error:
            faults.add_error(str(error) or type(error).__name__, f"{case.name}/{organs[0][0]}" if len(organs) == 1 else case.name)
            continue
        for organ, label in organs:
            began = time.perf_counter()
            try:
                item = make_one(case, organ, label or 1, volume, predictor, config)
            except (OSError, ValueError, RuntimeError, MemoryError) as error:
                faults.add_error(str(error) or type(error).__name__, f"{case.name}/{organ}")
                continue
            item.row |= {"file_name": str(path), "seconds": time.perf_counter() - began}
            if item.row["complete"] and every > 1:
                faults.note(
                    f"mask of all slices, and the model has learnt to see one in {every} (for such masks: train with --every 1)",
                    f"{case.name}/{organ}",
                )
            for remark in item.row["remarks"]:
                fault, _, detail = remark.partition(", ")
                faults.note(fault, f"{case.name}/{organ} ({detail})" if detail else f"{case.name}/{organ}")
            made.append(item)
    return made


def make_one(case, name: str, label: int, volume, predictor, config) -> Made:
    """The mesh of one organ. ValueError where there is none."""
    from latents import find_latents, read_latents
    from meshes import open_edges
    from predictor import organ_of

    organ, kept, remark = organ_of(volume, label)
    processor, latents = predictor.known[""].processor, None
    if processor.latents == "precomputed":
        latents = read_latents(find_latents(Path(config.latents_dir).expanduser(), f"{case.name}/{name}"), processor.resolution)
    every = None if config.every == "auto" else config.every
    mesh, organ, observed = predictor.mesh(organ, kept, every, latents=latents, volume=volume.geometry)
    if not len(mesh.faces):
        raise ValueError("organ of which the model makes no surface")
    remarks = [*organ.notes, *volume.notes, *([remark] if remark else [])]
    if count := open_edges(mesh):
        remarks.append(f"mesh that is not closed, {count} edges have not two faces")
    row = {
        "case": case.name,
        "organ": name,
        "label": label,
        "slices_seen": len(observed.kept),
        "complete": len(observed.kept) == observed.filled.shape[observed.axis],
        "input_ml": float((volume.labels == label).sum() * volume.geometry.voxel_mm3 / 1000),
        "observed_ml": float(observed.filled.sum() * organ.spacing.prod() / 1000),
        "mesh_ml": mesh.volume / 1000,
        "vertices": len(mesh.vertices),
        "faces": len(mesh.faces),
        "remarks": remarks,
    }
    return Made(row, mesh, organ._replace(mask=observed.filled))


# ---- what is written -------------------------------------------------------------------------------------------------


def write_case(case, made: list[Made], root: Path, name: str, formats: list[str], config, faults) -> None:
    """The files of a case: meshes, mask, picture; their names go into the rows."""
    from common.runtime import guard
    from meshes import write_mesh
    from pages import draw_planes

    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    files = names_for_files([item.row["organ"] for item in made])
    for item, file in zip(made, files, strict=True):
        item.row["outputs"] = {}
        for ending in formats:
            if ending != "nii":
                path = folder / f"{file}.{ending}"
                write_mesh(path, item.mesh, f"{case.name}, {item.row['organ']}", config.space.upper())
                item.row["outputs"][ending] = path.relative_to(root).as_posix()
    if "nii" in formats:
        path = root / f"{name}.nii.gz"
        write_labels(case, made, path, faults)
        for item in made:
            item.row["outputs"]["nii"] = path.relative_to(root).as_posix()
    with guard(f"the picture of {case.name}"):
        draw_planes([shown_over_input(item) for item in most_changed(made)], root / f"{name}.png", "as seen")


def most_changed(made: list[Made]) -> list[Made]:
    """The organs that a case's picture has room for: those whose volume changed most, in their own order."""
    rank = sorted(made, key=lambda item: -abs(item.row["mesh_ml"] / max(item.row["observed_ml"], 1e-6) - 1))
    return [item for item in made if item in rank[:MOST_DRAWN]]


def shown_over_input(item: Made):
    from meshes import mesh_to_mask
    from pages import Shown

    title = f"{item.row['organ']}: {item.row['observed_ml']:.1f} ml seen, {item.row['mesh_ml']:.1f} ml as mesh"
    return Shown(title, item.organ, {"mesh": mesh_to_mask(item.mesh, item.organ.mask.shape, item.organ.affine)})


def write_labels(case, made: list[Made], path: Path, faults) -> None:
    """All organs of a case as one mask on the input's own voxels, axes and forms.

    Labels are those of the input, or 1, 2 ... in order where each organ has a file of its own. Where organs overlap the voxels
    are those of the smaller one, which else could vanish in the larger.
    """
    import numpy as np

    from meshes import mesh_to_mask
    from volumes import look, write_mask

    own = len({item.row["file_name"] for item in made}) == 1
    for number, item in enumerate(made, start=1):
        item.row["mask_label"] = item.row["label"] if own else number
    geometry = look(Path(made[0].row["file_name"])).geometry
    greatest = max(item.row["mask_label"] for item in made)
    labels, shared = np.zeros(geometry.shape, np.min_scalar_type(greatest)), 0
    for item in sorted(made, key=lambda item: -item.mesh.volume):
        inside = mesh_to_mask(item.mesh, geometry.shape, geometry.affine)
        if not inside.any():
            faults.note("organ between the voxels' centres, which the mask lacks", f"{case.name}/{item.row['organ']}")
        shared += int((labels[inside] > 0).sum())
        labels[inside] = item.row["mask_label"]
    if shared:
        faults.note("voxels in two organs, which the mask gives to the smaller one", f"{case.name} ({shared})")
    write_mask(path, labels, geometry)


def names_for_files(names: list[str]) -> list[str]:
    """Names of files or folders for these, in order: without what a file system refuses, and no two alike in any case."""
    import re

    taken, found = set(), []
    for name in names:
        parts = [re.sub(r'[\x00-\x1f<>:"\\|?*]', "_", part).strip(". ") or "_" for part in name.split("/")]
        plain, number = "/".join(part[:80] for part in parts), 2
        while plain.casefold() in taken:
            plain = f"{'/'.join(part[:80] for part in parts)}_{number}"
            number += 1
        taken.add(plain.casefold())
        found.append(plain)
    return found


def write_tables(root: Path, rows: list[dict]) -> None:
    """predictions.json, and volumes.csv for spreadsheets."""
    from common.checkpoint import write_json, write_text

    write_json(root / "predictions.json", rows)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(VOLUME_COLUMNS)
    for row in rows:
        values = [row.get(key, "") for key in VOLUME_COLUMNS[:-1]]
        writer.writerow([*(f"{v:.4f}" if isinstance(v, float) else v for v in values), "; ".join(row["remarks"])])
    write_text(root / "volumes.csv", table.getvalue())


def chosen_formats(text: str) -> list[str]:
    """The formats that --formats names. UserError for one that is not written."""
    found = [part.strip().lower().lstrip(".") for part in text.split(",") if part.strip()]
    wrong = [part for part in found if part not in FORMATS]
    if wrong or not found:
        raise UserError(f"--formats {text}: {wrong[0] if wrong else 'nothing'} is none of {', '.join(FORMATS)}")
    return list(dict.fromkeys(found))


def main(argv=None, method="full", doc=None):
    config = parse(InferConfig, argv, doc)
    formats = chosen_formats(config.formats)
    # Heavy imports wait until the flags are read, so that --help answers at once.
    from common.folders import predictions_folder
    from common.runtime import counted, progress_bar, start_accelerator
    from common.samples import Faults
    from common.saved_models import choose_checkpoint
    from predictor import Predictor

    with Faults() as faults:
        cases = find_inputs(config, faults)
        accelerator = start_accelerator(config)
        folder, _ = choose_checkpoint(config.checkpoint, "medical_sam3d", method)
        predictor = Predictor(folder, config.model, accelerator.device, config.merge)
        if predictor.known[""].processor.latents == "precomputed" and not config.latents_dir:
            raise UserError("--latents_dir is needed: this model was trained on latents of the official pipeline")
        root = predictions_folder(config, predictor.origin)
        rows, names = [], names_for_files([case.name for case in cases])
        try:
            for case, name in progress_bar(list(zip(cases, names, strict=True)), "making meshes"):
                with accelerator.autocast():
                    made = make_organs(case, predictor, config, faults)
                if made:
                    write_case(case, made, root, name, formats, config, faults)
                    rows += [item.row | {"checkpoint": folder} for item in made]
        finally:
            if rows:  # also of what was done before Ctrl-C
                write_tables(root, rows)
            elif not config.output_dir and not any(root.iterdir()):
                root.rmdir()
        if not rows:
            raise UserError(f"--input {config.input}: {NOTHING}")
    faults.report()
    left = sum(faults.counts().values())
    organs, made_of = counted(len(rows), "organ"), counted(len({row["case"] for row in rows}), "case")
    print(f"meshes of {organs} of {made_of}; {left} left out")
    print(f"saved {', '.join(formats)}, pictures, volumes.csv and predictions.json in {root}")


if __name__ == "__main__":
    cli(main)
