"""One task's models for try_it.py, in a process of their own: a request in JSON a line, an answer a line.

python scripts/try_worker.py --task detection        # try_it.py starts it
"""

import json
import os
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import Count, UserError, cli, one_line, parse  # noqa: E402
from task_modules import enter_task, task_of  # noqa: E402

MOST_ORGANS = 3  # of a mask, the largest ones
MOST_ADAPTERS = 8  # on one base in memory


@dataclass
class WorkerConfig:
    task: str = ""  # whose models: classification, detection, pose, clip, voice_rvc or medical_sam3d
    models: Count = 4  # so many stay in memory; adapters on one base count as one
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: a GPU where there is one


class Models:
    """The Predictors of a task, those in memory that were asked last."""

    def __init__(self, task: str, most: int, device: str):
        self.task, self.most, self.device, self.kept = task, most, device, OrderedDict()

    def get(self, checkpoint: str, as_base: bool):
        """(Predictor, the name to ask it by) of a checkpoint, or of the base below it as it is."""
        folder, origin = task_of(checkpoint)
        mark, sha = f"{folder} {(folder / 'origin.json').stat().st_mtime_ns}", origin["base"]["sha256"]  # a run may be made anew
        key = ("base", sha, mark) if as_base else mark if origin["method"] == "full" else sha
        predictor = self.kept.pop(key, None)
        if predictor is None or len(predictor.known) > MOST_ADAPTERS:
            while len(self.kept) >= self.most:
                self.kept.popitem(last=False)
            predictor = self.load(folder, origin, as_base)
            predictor.mark = mark
        self.kept[key] = predictor
        name = "" if as_base or predictor.mark == mark else mark
        if name and name not in predictor.known:
            predictor.add(folder, name)
        return predictor, name

    def load(self, folder: Path, origin: dict, as_base: bool):
        import predictor as of_task

        if not as_base:
            return of_task.Predictor(folder, device=self.device)
        load_base, _, answer = of_task.Predictor.model_functions

        def load_as_base(_checkpoint, _base, _merge, device):
            model, processor, about = base_as_it_is(self.task, origin, load_base)
            return model.to(device), processor, about

        class AsItIs(of_task.Predictor):
            model_functions = load_base, load_as_base, answer

        return AsItIs(folder, device=self.device)


def base_as_it_is(task: str, origin: dict, load_base) -> tuple:
    """What load_checkpoint gives, of the base of a checkpoint alone. UserError where a base has no answer of its own."""
    import model as of_task

    name = origin["base"]["name"]
    model, processor, found = load_base(name, download=False)
    if found["sha256"] != origin["base"]["sha256"]:
        raise UserError(f"{name} is not the base of the training any more")
    classes = None
    if task == "classification":
        if not any(model.get_submodule(layer).weight.any() for layer in of_task.class_layers(model)):
            raise UserError("the base has no classifier of its own")
        classes = of_task.known_classes(model)
    elif task == "detection":
        classes = of_task.known_classes(model)
    elif task == "pose" and model.keypoint_head is None:
        raise UserError("the base has no keypoint head of its own")
    elif task == "clip":
        if reason := of_task.why_no_texts(name):
            raise UserError(f"without training there is no classifier: {reason}")
        rows = of_task.zero_shot_rows(name, origin["classes"], origin["prompts"])
        model = of_task.zero_shot_classifier(model, origin["classes"], *rows)
    elif task == "medical_sam3d" and model.new_layers:
        raise UserError("the base has no encoder of its own, so it makes no mesh of a mask")
    return model.eval(), processor, {**origin, **({"classes": classes} if classes else {})}


# ---- answers ---------------------------------------------------------------------------------------------------------


def answer_classes(predictor, name: str, file: Path, place: Path) -> dict:
    from common.vision.pages import draw_answer

    began = time.perf_counter()
    found = predictor.predict(file, top_k=5, model=name)
    took = time.perf_counter() - began
    draw_answer(file, [{"class": label, "probability": share} for label, share in found], place.with_suffix(".png"))
    return {"picture": f"{place}.png", "text": f"{found[0][0]} {found[0][1]:.3f}", "seconds": took}


def answer_boxes(predictor, name: str, file: Path, place: Path) -> dict:
    from common.vision.pictures import decode
    from pages import draw_boxes

    began = time.perf_counter()
    found = predictor.predict(file, model=name)
    took = time.perf_counter() - began
    classes = predictor.find(name).origin["classes"]
    labels, scores = [classes.index(item["class"]) for item in found], [item["score"] for item in found]
    draw_boxes(decode(file), [item["box"] for item in found], labels, classes, scores).save(f"{place}.png")
    text = f"{len(found)} {'object' if len(found) == 1 else 'objects'} with a score of 0.5 or more"
    return {"picture": f"{place}.png", "text": text, "seconds": took}


def answer_points(predictor, name: str, file: Path, place: Path) -> dict:
    import numpy as np

    from common.vision.pictures import decode
    from keypoints import KeypointSet
    from pages import draw_poses

    began = time.perf_counter()
    found = predictor.predict(file, model=name)
    took = time.perf_counter() - began
    with predictor.using(name) as model:
        points = KeypointSet.from_json(model.facts)
    places = np.array([point[:2] for point in found.values()])
    draw_poses(decode(file), [(places, np.ones(len(places), bool))], points).save(f"{place}.png")
    sure = np.mean([point[2] for point in found.values()])
    text = f"one figure that fills the picture, {len(found)} keypoints, mean score {sure:.2f}"
    return {"picture": f"{place}.png", "text": text, "seconds": took}


def answer_sound(predictor, name: str, file: Path, place: Path) -> dict:
    from audio import write_wave

    began = time.perf_counter()
    wave, rate = predictor.predict(file, model=name)
    took = time.perf_counter() - began
    write_wave(Path(f"{place}.wav"), wave, rate)
    text = f"{len(wave) / rate:.1f} s at {rate} Hz, real-time factor {took * rate / len(wave):.2f}"
    return {"sound": f"{place}.wav", "text": text, "seconds": took}


def answer_meshes(predictor, name: str, file: Path, place: Path) -> dict:
    from meshes import mesh_to_mask
    from pages import Shown, draw_planes
    from predictor import labels_of, organ_of, read_volume

    volume, shown, took, meshes = read_volume(file), [], 0.0, {}
    labels = sorted(labels_of(volume.labels), key=lambda label: -int((volume.labels == label).sum()))
    if not labels:
        raise ValueError("mask that is empty, no voxel of an organ")
    for label in labels[:MOST_ORGANS]:
        organ, kept, _ = organ_of(volume, label)
        began = time.perf_counter()
        mesh, organ, observed = predictor.mesh(organ, kept, None, name, volume=volume.geometry)
        took += time.perf_counter() - began
        if len(mesh.faces):
            seen = mesh_to_mask(mesh, organ.mask.shape, organ.affine)
            shown.append(Shown(f"label {label}", organ._replace(mask=observed.filled), {"mesh": seen}))
            meshes[f"label {label}"] = mesh
    if not shown:
        raise ValueError("no organ in it of which this model makes a surface")
    draw_planes(shown, Path(f"{place}.png"), "as seen")
    left = f" of {len(labels)}, the largest" if len(labels) > len(shown) else ""
    text = f"{len(shown)} {'organ' if len(shown) == 1 else 'organs'}{left}"
    return {"picture": f"{place}.png", "text": text, "seconds": took, "meshes": meshes}


def write_mesh_page(answers: list[dict], names: list[str], file: Path) -> str:
    """The page on which the meshes of all columns are turned together, a case for each label; "" where there is no mesh."""
    from mesh_page import CaseViews, View, write_page

    made = {name: answer.pop("meshes") for name, answer in zip(names, answers, strict=True) if "meshes" in answer}
    cases = []
    for label in dict.fromkeys(label for meshes in made.values() for label in meshes):
        of_label = {name: meshes[label] for name, meshes in made.items() if label in meshes}
        views = [
            View(name, f"{mesh.volume / 1000:.1f} ml, {len(mesh.faces)} faces", mesh, None) for name, mesh in of_label.items()
        ]
        cases.append(CaseViews(label, views))
    if not cases:
        return ""
    write_page(file, "Meshes", [], cases, {}, {})
    return str(file)


ANSWERS = {
    "classification": answer_classes,
    "clip": answer_classes,
    "detection": answer_boxes,
    "pose": answer_points,
    "voice_rvc": answer_sound,
    "medical_sam3d": answer_meshes,
}


def answer_all(models: Models, request: dict) -> list[dict]:
    """An answer, or {"error": one line}, for each of request["columns"].

    request: {"file", "folder": for what is made, "columns": [{"name", "checkpoint", "base": whether its base alone}]}. An answer:
    text, milliseconds (with decoding), loading (seconds, 0 where the model was in memory), and the file of its picture or
    sound; of meshes the first has a page for all, "page".
    """
    found = []
    for number, column in enumerate(request["columns"]):
        place = Path(request["folder"]) / f"{number}"
        try:
            began = time.perf_counter()
            known = {id(t) for p in models.kept.values() for t in p.known.values()}
            predictor, name = models.get(column["checkpoint"], column["base"])
            new = id(predictor.known[name]) not in known
            if new:  # the first answer of a model takes what it needs once
                ANSWERS[models.task](predictor, name, Path(request["file"]), place)
                for left in place.parent.glob(f"{number}.*"):
                    left.unlink()
            loading = time.perf_counter() - began if new else 0.0
            made = ANSWERS[models.task](predictor, name, Path(request["file"]), place)
            found.append({"milliseconds": 1000 * made.pop("seconds"), "loading": loading, **made})
        except (UserError, OSError, ValueError, RuntimeError, MemoryError) as error:
            found.append({"error": one_line(str(error).replace(str(request["file"]), "the file")) or type(error).__name__})
    if models.task == "medical_sam3d":
        names = [column["name"] for column in request["columns"]]
        found[0]["page"] = write_mesh_page(found, names, Path(request["folder"]) / "meshes.html")
    return found


def main(argv=None):
    config = parse(WorkerConfig, argv)
    enter_task(config.task)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    import_module("predictor")  # takes seconds, which are not those of loading a model
    models = Models(config.task, config.models, config.device)
    for line in sys.stdin:
        print(json.dumps(answer_all(models, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    cli(main)
