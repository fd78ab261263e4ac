"""What of each task's model becomes an ONNX graph, and a graph in its model's place: it answers as the model, by onnxruntime.

So a task's own metrics (task_modules.py) apply to a file as they do to the model that it was made of.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from common.config import UserError
from task_modules import orders_queries

EXAMPLE_FRAMES = 10  # of the sound that a voice's graph is recorded with: so short that the decoder works in one piece
RANDOM = ("rnd", "noise", "phase")  # a voice's inputs that stand for what is drawn at random


@dataclass(frozen=True)
class Form:
    """A task's model as a function of tensors. inputs: (model, batch of the task's loader) -> {name: tensor (B, ...)}."""

    inputs: Callable
    call: Callable  # (model, *inputs) -> outputs
    outputs: tuple[str, ...]
    moving: dict[str, dict[int, str]]  # sizes that are not fixed in the graph, by tensor: {dimension: what it is called}
    hop: int = 0  # of a voice
    unordered: bool = False  # as of parity.check


def pictures(model, batch) -> dict:
    return {"pixel_values": batch["pixel_values"]}


def classify(model, pixel_values):
    return (model(pixel_values=pixel_values).logits,)


def embed(model, pixel_values):
    """Logits (B, K), and what the image tower says in the space that it shares with texts, as unit vectors (B, D)."""
    from model import image_features

    features = nn.functional.normalize(image_features(model.tower, pixel_values), dim=-1)
    return model.classifier(model.scale * features), features


def masked_pictures(model, batch) -> dict:
    return {"pixel_values": batch["pixel_values"], "pixel_mask": batch["pixel_mask"]}


def find(model, pixel_values, pixel_mask=None):
    found = model(pixel_values=pixel_values, pixel_mask=pixel_mask)
    return found.logits, found.pred_boxes


def place(model, pixel_values):
    """Keypoints (B, K, 2) as fractions, scores (B, K), and heatmaps (B, K, h, w) where the head makes them."""
    return [part for part in model(pixel_values) if part is not None]


def sounds(model, batch) -> dict:
    """What a conversion asks for, by the names of RVC's own ONNX files; RANDOM as the task's metrics draw it for a clip."""
    from metrics import noise_of

    frames, config = batch["phone"].shape[1], model.config
    drawn = [noise_of(int(index), frames, config, "cpu") for index in batch["index"]]
    latent, source, turns = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    pitch = {"pitch": batch["pitch"], "pitchf": batch["f0"]} if config.f0 else {}
    content = {"phone": batch["phone"], "phone_lengths": batch["lengths"], **pitch, "ds": batch["sid"], "rnd": latent}
    return content | ({"noise": source, "phase": turns} if config.f0 else {})


def speak(model, phone, lengths, *rest):
    """The wave (B, 1, T * hop)."""
    from synthesizer import Excitation

    pitch, f0, sid, latent, source, turns = rest if model.config.f0 else (None, None, *rest, None, None)
    return (model.infer(phone, lengths, pitch, f0, sid, excitation=Excitation(latent, source, turns)),)


def form_of(task: str, model, processor, origin: dict) -> Form:
    """How this task's model becomes a graph."""
    batch = {0: "batch"}
    if task == "voice_rvc":
        timed = {name: {0: "batch", 1: "frames"} for name in ("phone", "pitch", "pitchf")}
        timed |= {"rnd": {0: "batch", 2: "frames"}, "noise": {0: "batch", 2: "samples"}, "audio": {0: "batch", 2: "samples"}}
        names = ("phone", "phone_lengths", "pitch", "pitchf", "ds", *RANDOM, "audio")
        return Form(sounds, speak, ("audio",), {name: timed.get(name, batch) for name in names}, model.config.hop)
    moving = {"pixel_values": batch}
    if task == "detection":
        from data import Preprocess

        outputs, inputs = ("logits", "pred_boxes"), pictures
        if "height" not in Preprocess(processor, origin["image_size"]).size:
            inputs = masked_pictures
            moving = {"pixel_values": {0: "batch", 2: "height", 3: "width"}, "pixel_mask": {0: "batch", 1: "height", 2: "width"}}
        return Form(inputs, find, outputs, moving | dict.fromkeys(outputs, batch), unordered=orders_queries(task, model))
    call, outputs = {
        "classification": (classify, ("logits",)),
        "clip": (embed, ("logits", "image_embeds")),
        "pose": (place, ("keypoints", "scores", "heatmaps")),
    }[task]
    if task == "pose" and model.facts["head"] == "regression":
        outputs = outputs[:2]
    return Form(pictures, call, outputs, moving | dict.fromkeys(outputs, batch))


class Function(nn.Module):
    """A model as the exporter wants it: tensors in, tensors out."""

    def __init__(self, model, call):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *tensors):
        return tuple(self.call(self.model, *tensors))


def rows(inputs: dict, count: int) -> dict:
    """The first rows of a batch; where it has fewer, some twice."""
    have = len(next(iter(inputs.values())))
    return {name: tensor[[i % have for i in range(count)]] for name, tensor in inputs.items()}


def shortened(inputs: dict, hop: int) -> dict:
    """A voice's inputs, cut to EXAMPLE_FRAMES."""
    cut = {"phone": 1, "pitch": 1, "pitchf": 1, "rnd": 2}
    inputs = {name: t.narrow(cut[name], 0, EXAMPLE_FRAMES) if name in cut else t for name, t in inputs.items()}
    inputs["phone_lengths"] = inputs["phone_lengths"].clamp(max=EXAMPLE_FRAMES)
    return inputs | ({"noise": inputs["noise"][..., : EXAMPLE_FRAMES * hop]} if "noise" in inputs else {})


def turned(inputs: dict) -> dict:
    """Pictures lying on their side: the same numbers in another shape."""
    return {name: tensor.transpose(-1, -2) for name, tensor in inputs.items()}


def answers_from(form: Form, model) -> Callable:
    """inputs -> {output: tensor} of a task's model or an OnnxModel, for parity.check.

    Scores of keypoints are left out: they jump where the edge of a heatmap's cell is crossed.
    """

    def answers(inputs: dict) -> dict:
        if isinstance(model, OnnxModel):
            found = model.run(**inputs)
        else:
            found = dict(zip(form.outputs, form.call(model, *inputs.values()), strict=True))
        return {name: t for name, t in found.items() if name != "scores"}

    return answers


def plain_weights(model):
    """The model, its computed weights (weight_norm: g v / |v|) put in place as numbers, lest the graph compute them each time."""
    from torch.nn.utils import parametrize

    for module in list(model.modules()):
        for name in list(module.parametrizations) if parametrize.is_parametrized(module) else ():
            parametrize.remove_parametrizations(module, name)
    return model


# ---- a graph in its model's place ------------------------------------------------------------------------------------


class Answer(dict):
    """Outputs by name, as keys and as attributes, as the libraries' models give them."""

    __getattr__ = dict.__getitem__


class OnnxModel(nn.Module):
    """An ONNX file as the model that it was made of: called alike, on the CPU. config: a voice's VoiceConfig."""

    def __init__(self, path: Path, task: str, threads: int = 0, config=None):
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.asks = {each.name: each.shape for each in self.session.get_inputs()}
        self.gives = {each.name: each.shape for each in self.session.get_outputs()}
        self.task, self.config = task, config
        self.place = nn.Parameter(torch.zeros(()))  # a model is asked where its parameters are

    def run(self, **inputs) -> Answer:
        """{output: tensor}; of the inputs those that the graph asks for. UserError where onnxruntime refuses them."""
        asked = {name: tensor.numpy() for name, tensor in inputs.items() if name in self.asks}
        try:
            found = self.session.run(list(self.gives), asked)
        except Exception as error:  # of a class of its own for each of many reasons
            shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in asked.items())
            raise UserError(f"onnxruntime cannot run the graph with {shapes}: {' '.join(str(error).split())[:200]}") from None
        return Answer(zip(self.gives, map(torch.from_numpy, found), strict=True))

    def forward(self, pixel_values, pixel_mask=None, labels=None):
        """What the task's model says of pictures; the loss is not in the graph, so a detector's is 0."""
        found = self.run(pixel_values=pixel_values, **({} if pixel_mask is None else {"pixel_mask": pixel_mask}))
        if self.task == "pose":
            return found.keypoints, found.scores, found.get("heatmaps")
        return Answer(found, loss=0.0)

    def infer(self, phone, lengths, pitch, f0, sid, excitation):
        """A voice's conversion: see Synthesizer.infer."""
        drawn = {name: t for name, t in zip(RANDOM, excitation, strict=True) if t is not None}
        pitch = {} if pitch is None else {"pitch": pitch, "pitchf": f0}
        return self.run(phone=phone, phone_lengths=lengths, ds=sid, **pitch, **drawn).audio
