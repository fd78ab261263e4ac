"""How disagreements.py shows a sample: the truth beside what two models make of it, drawn by the pages of their task.

Imported in a process that has entered the task: `from pages import ...` is that task's.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

PAUSE = 0.5  # seconds between two sounds
LONGEST = 6.0  # seconds of each sound that are heard
MOST_CLIPS = 8  # of a recording that are compared to find the one that is heard
TOP = 5  # classes whose probabilities are drawn


@dataclass
class View:
    """Two models and what their origin.json says, by name, over one split of their data; and where views go."""

    task: str
    models: dict[str, object]
    origins: dict[str, dict]
    processor: object
    data: object  # task_modules.EvalData
    folder: Path

    @property
    def dataset(self):
        return self.data.loader.dataset

    def batch(self, index: int):
        """The batch that holds this sample alone, as the models want it."""
        return self.data.loader.collate_fn([self.dataset[0, index]])


def indices_by_name(task: str, dataset) -> dict[str, list[int]]:
    """What a sample is called in samples.json -> its indices in the data: a picture's figures, a recording's clips, a patient's
    organs."""
    from common.samples import short_names

    if task in ("classification", "clip"):
        names = [sample.name for sample in dataset.samples]
    elif task == "voice_rvc":
        names = [clip.recording for clip in dataset.clips]
    elif task == "medical_sam3d":
        names = [item.patient for item in dataset.items]
    else:
        paths = [sample.path for sample in dataset.samples]
        short = dict(zip(dict.fromkeys(paths), short_names(list(dict.fromkeys(paths))), strict=True))
        names = [short[path] for path in paths]
    places = {}
    for index, name in enumerate(names):
        places.setdefault(name, []).append(index)
    return places


def view_of(view: View, one: dict, indices: list[int], name: str) -> dict:
    """{"picture" | "audio" | "mesh": name of the file in view.folder} of one disagreement."""
    show = {"detection": show_boxes, "pose": show_figure, "voice_rvc": play_clip, "medical_sam3d": show_organ}
    return show.get(view.task, show_classes)(view, one, indices, name)


def save_row(pictures: list[tuple], path: Path) -> dict:
    """Pictures (PIL) side by side, each under its title."""
    from common.plots import figure, plot_text, save_figure

    shape = max(picture.height / picture.width for picture, _ in pictures)
    page, axes = figure(1, len(pictures), width=4.2, height=min(8.0, 4.2 * shape) + 0.6)
    for axis, (picture, title) in zip(axes.flat, pictures, strict=True):
        axis.axis("off")
        axis.imshow(picture)
        axis.set_title("\n".join(plot_text(line, 56) for line in title.splitlines()), fontsize=9)
    save_figure(page, path)
    return {"picture": path.name}


# ---- pictures --------------------------------------------------------------------------------------------------------


def show_classes(view: View, one: dict, indices: list[int], name: str) -> dict:
    """The picture, and of each model its most probable classes as bars, the true one in blue."""
    from common.class_metrics import softmax
    from common.plots import RIGHT, WRONG, figure, plot_text, save_figure
    from common.vision.pages import GREY, thumbnail
    from common.vision.scoring import classify

    index, path = indices[0], view.folder / f"{name}.jpg"
    sample, classes = view.dataset.samples[index], view.dataset.classes
    page, axes = figure(1, 1 + len(view.models), 3.2, 3.3)
    axes[0, 0].axis("off")
    axes[0, 0].imshow(thumbnail(sample.path))
    axes[0, 0].set_title(plot_text(f"truth: {classes[sample.label]}", 40), fontsize=9)
    for axis, (label, model) in zip(axes[0, 1:], view.models.items(), strict=True):
        shares = softmax(classify(model, [view.batch(index)])[0][1].astype(float))
        top = np.argsort(-shares)[:TOP]
        colors = [RIGHT if k == sample.label else WRONG if k == top[0] else GREY for k in top]
        bars = axis.barh(range(len(top)), shares[top], color=colors)
        axis.bar_label(bars, [f"{shares[k]:.2f}" for k in top], fontsize=8, padding=2)
        axis.set_yticks(range(len(top)), [plot_text(classes[k], 22) for k in top], fontsize=8)
        axis.set(xlim=(0, 1.2), ylim=(len(top) - 0.4, -0.6), title=label, xlabel="probability")
    save_figure(page, path)
    return {"picture": path.name}


def show_boxes(view: View, one: dict, indices: list[int], name: str) -> dict:
    """The true boxes, and those that each model shows above its best threshold, with mistakes marked."""
    from common.vision.pictures import decode
    from metrics import detect
    from pages import draw_pair, judge

    sample, (classes,) = view.dataset.samples[indices[0]], view.data.facts
    pixels, answers = decode(sample.path, sample.size), []
    for label, model in view.models.items():
        ((found,),) = detect(model, view.processor, [view.batch(indices[0])], with_loss=False)
        threshold = view.origins[label].get("threshold") or 0.5
        verdict = judge([sample], [found | {"index": 0}], classes, threshold)[0]
        truth, answer = draw_pair(pixels, sample, verdict, classes)
        answers.append((answer, f"{label}: {verdict.in_words()}"))
    return save_row([(truth, f"truth: {one['what']}"), *answers], view.folder / f"{name}.jpg")


def show_figure(view: View, one: dict, indices: list[int], name: str) -> dict:
    """The keypoints of a figure, and those that each model finds with a line to each from its truth.

    Of several figures in the picture the one on which the models differ most.
    """
    from common.vision.pictures import decode
    from metrics import detect, point_errors
    from pages import around, draw_pair

    (points,), dataset, found, errors = view.data.facts, view.dataset, {}, {}
    for label, model in view.models.items():
        found[label] = [item for index in indices for item in next(iter(detect(model, [view.batch(index)])))]
        errors[label] = np.nanmean(np.linalg.norm(point_errors(dataset, found[label])[0], axis=2), axis=1)
    first, second = errors.values()
    row = int(np.nanargmax(np.abs(first - second)))
    sample = dataset.samples[indices[row]]
    pixels, low = around(decode(sample.path, dataset.pictures[sample.path].size), dataset.box(indices[row])[0])
    answers = []
    for label, items in found.items():
        truth, answer = draw_pair(pixels, sample.points - low, sample.labelled, items[row]["points"] - low, points)
        answers.append((answer, f"{label}: mean error {errors[label][row]:.1f} px"))
    many = f"truth: {int(sample.labelled.sum())} of {len(points.names)} keypoints"
    return save_row([(truth, many), *answers], view.folder / f"{name}.jpg")


# ---- sounds and organs -----------------------------------------------------------------------------------------------


def play_clip(view: View, one: dict, indices: list[int], name: str) -> dict:
    """One WAV: what was recorded, then what each model makes of it, with pauses between.

    Of a recording's clips the one on which the models differ most.
    """
    from audio import write_wave
    from metrics import mean_of, measure

    batches = [view.batch(index) for index in indices[:MOST_CLIPS]]
    found = {label: list(measure(model, batches)) for label, model in view.models.items()}
    distortions = np.array([[mean_of(item["sums"]["mcd"], 1) or 0.0 for item in items] for items in found.values()])
    row, rate = int(np.abs(distortions[0] - distortions[1]).argmax()), view.processor.config.sample_rate
    waves = [batches[row]["wave"].flatten().numpy(), *(items[row]["wave"] for items in found.values())]
    parts = []
    for wave in waves:
        parts += [np.nan_to_num(wave[: int(LONGEST * rate)]), np.zeros(int(PAUSE * rate), np.float32)]
    write_wave(view.folder / f"{name}.wav", np.concatenate(parts[:-1]), rate)
    said = ", then ".join(["the recording", *found])
    return {"audio": f"{name}.wav", "what": f"{one['what']}; heard: {said}"}


def show_organ(view: View, one: dict, indices: list[int], name: str) -> dict:
    """The outlines of both models' meshes over the truth, in three planes: of a patient's organs where they differ most."""
    from meshes import mesh_to_mask
    from metrics import measure
    from pages import Shown, draw_planes

    batches = [view.batch(index) for index in indices]
    found = {label: list(measure(model, batches, view.dataset)) for label, model in view.models.items()}
    dices = np.array([[item["dice"] or 0.0 for item in items] for items in found.values()])
    row = int(np.abs(dices[0] - dices[1]).argmax())
    organ, item = view.dataset.organ(indices[row]), view.dataset.items[indices[row]]
    masks = {label: mesh_to_mask(items[row]["mesh"], organ.mask.shape, organ.affine) for label, items in found.items()}
    said = ", ".join(f"{label} {dice:.3f}" for label, dice in zip(found, dices[:, row], strict=True))
    draw_planes([Shown(f"{item.name}: Dice {said}", organ, masks)], view.folder / f"{name}.png")
    return {"mesh": f"{name}.png"}
