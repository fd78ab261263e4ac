"""A ViT-family backbone with a keypoint head of ours: where bases come from, the heads, the loss, saving and loading."""

from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import nn

# needs: torchvision, scipy  (image processors; scipy: VitPose's)
from common.bases import base_source, load_pretrained
from common.checkpoint import check_holds, fingerprint, read_json, write_json
from common.config import Range, UserError
from common.lora import is_within
from common.lora_targets import choose_targets
from common.runtime import process_index, say
from common.saved_models import load_under, make_origin, open_checkpoint, take_over, with_saved_adapter
from common.schema import check_fields
from common.tensor_files import load_tensors, misfit, shapes_of
from common.vision.preprocess import example_picture
from keypoints import KEYPOINT_FILE, MOST_KEYPOINTS, KeypointSet

DEMO_BASE = Path(__file__).resolve().parent / "demo_base"
EXAMPLE = "google/vit-base-patch16-224"
HEAD = "keypoint_head"
HEAD_FILE = "keypoint_head.safetensors"
# What keypoints.json of a checkpoint holds.
KEYPOINT_FIELDS = {
    "names": Annotated[list[str], Range(1, MOST_KEYPOINTS)],
    "skeleton": list[list[int]],
    "flip_pairs": list[list[int]],
    "sigmas": list[Annotated[float, Range(1e-300, 1e300)]],  # any above 0
    "named": bool,
    "head": Literal["heatmap", "regression"],
    "input_size": Annotated[list[Annotated[int, Range(1, 4096)]], Range(2, 2)],  # height, width
    "beta": Annotated[float, Range(1e-6, 1e6)],
}

# model_type in config.json -> the library's class for the backbone, and how it is built without the parts that pose does not use.
BACKBONES = {
    "vit": ("ViTModel", {"add_pooling_layer": False}),
    "dinov2": ("Dinov2Model", {}),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", {}),
    "vitpose_backbone": ("VitPoseBackbone", {}),
}
# Weights of a checkpoint that belong to other heads (ImageNet classes, masked patches): not taken, and no fault.
OTHER_HEADS = ("classifier", "pooler", "decoder", "lm_head")

UPSAMPLING = 4  # of the heatmap head: with patches of 16 pixels a heatmap has a quarter of the input's sides
NEW_BETA = 10.0  # temperature of the soft-argmax under a head that starts anew
VITPOSE_BETA = 30.0  # VitPose's heatmaps peak near 1, near 0.4 where unsure: e^12 still outweighs the 3071 cells near 0
SCORE_RADIUS = 0.05  # a keypoint's score is the share of its heatmap within this fraction of the input around the answer
LOSS_BETA = 0.01  # smooth L1: below an error of a hundredth of the input squared, above it linear
# The loss on heatmaps: their softmax should be a spot of this radius (fraction of the input) at the keypoint. Coordinates alone
# teach a new head slowly, for any broad heatmap with the right mean will do: with it the demo's error is 1.19 instead of 1.66 px.
SPOT_RADIUS = 0.02
SPOT_WEIGHT = 0.3


class HeatmapHead(nn.Module):
    """ReLU, bilinear upsampling, 3 x 3 convolution: (B, D, h, w) -> heatmaps (B, K, 4 h, 4 w).

    The simple decoder of ViTPose (arXiv:2204.12484); parameters have the names of transformers' VitPoseSimpleDecoder.
    """

    def __init__(self, width: int, keypoints: int):
        super().__init__()
        self.conv = nn.Conv2d(width, keypoints, kernel_size=3, padding=1)

    def forward(self, features):
        features = nn.functional.interpolate(features.relu(), scale_factor=UPSAMPLING, mode="bilinear", align_corners=False)
        return self.conv(features)


class RegressionHead(nn.Module):
    """Mean over patches, then two linear layers: (B, D, h, w) -> coordinates (B, K, 2) in 0..1."""

    def __init__(self, width: int, keypoints: int):
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, 2 * keypoints)

    def forward(self, features):
        hidden = nn.functional.gelu(self.hidden(features.mean(dim=(2, 3))))
        return self.out(hidden).float().sigmoid().unflatten(1, (-1, 2))


class KeypointModel(nn.Module):
    """pixel_values (B, 3, H, W) -> (coords (B, K, 2), scores (B, K), heatmaps (B, K, h, w) or None with a regression head).

    coords: x, y as fractions; 0 is the centre of the first pixel, 1 that of the last. heatmaps: logits.
    facts: what keypoints.json says (names, skeleton, flip_pairs, sigmas, head, input_size, beta); a base without a head has
    input_size alone and cannot run.
    """

    def __init__(self, backbone, head: nn.Module | None, facts: dict):
        super().__init__()
        self.backbone, self.keypoint_head, self.facts = backbone, head, facts
        self.new_layers = []  # those with new weights, for build_optimizer

    def forward(self, pixel_values):
        raw = self.keypoint_head(feature_map(self.backbone, pixel_values))
        if self.facts["head"] == "regression":
            return raw, torch.ones_like(raw[..., 0]), None  # this head does not know how sure it is
        heatmaps = raw.float() * self.facts["beta"]
        return *soft_argmax(heatmaps), heatmaps

    def save_pretrained(self, folder: Path) -> None:
        """config.json and model.safetensors are the backbone in the library's own format; the head lies beside it."""
        from safetensors.torch import save_file

        self.backbone.save_pretrained(folder)
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in self.keypoint_head.state_dict().items()}, folder / HEAD_FILE
        )
        self.save_extra(folder)

    def save_extra(self, folder: Path) -> None:
        """What an adapter's folder needs, too: the keypoints, and the settings of the head."""
        write_json(folder / KEYPOINT_FILE, self.facts)


def feature_map(backbone, pixel_values) -> torch.Tensor:
    """The patch tokens of a backbone in their places: (B, D, H / patch, W / patch)."""
    patch = sides(backbone.config.patch_size)
    h, w = pixel_values.shape[2] // patch[0], pixel_values.shape[3] // patch[1]
    if backbone.config.model_type == "vitpose_backbone":
        tokens = backbone(pixel_values).feature_maps[-1]
    elif backbone.config.model_type == "vit":  # takes another size only where it is asked to; DINOv2 always does
        tokens = backbone(pixel_values, interpolate_pos_encoding=True).last_hidden_state
    else:
        tokens = backbone(pixel_values).last_hidden_state
    return tokens[:, -h * w :].transpose(1, 2).unflatten(2, (h, w))  # in front of the patches: class and register tokens


def soft_argmax(logits) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, K, h, w) -> (the mean place under their softmax (B, K, 2) as x, y in 0..1, scores (B, K)).

    Cell i of n lies at i / (n - 1), the unbiased mapping of UDP (arXiv:1911.07524) with which ViTPose was trained: corner cells
    on corner pixels, nothing is rounded, and a mirrored picture gives the mirrored answer. Differentiable, unlike the argmax.
    """
    h, w = logits.shape[2:]
    share = logits.flatten(2).softmax(dim=2).unflatten(2, (h, w))
    xs, ys = (torch.linspace(0, 1, n, device=logits.device) for n in (w, h))
    x, y = share.sum(dim=2) @ xs, share.sum(dim=3) @ ys
    with torch.no_grad():
        near_x, near_y = ((at - place[..., None]).abs() <= SCORE_RADIUS for at, place in ((xs, x), (ys, y)))
        scores = torch.einsum("bkh,bkhw,bkw->bk", near_y.float(), share, near_x.float())
    return torch.stack([x, y], dim=2), scores


def keypoint_errors(coords, target, heatmaps=None) -> torch.Tensor:
    """The loss of every keypoint (B, K): smooth L1 between coords and target (B, K, 2), fractions of the input.

    heatmaps (B, K, h, w), logits: plus SPOT_WEIGHT times their softmax's cross-entropy against a Gaussian spot at the target.
    """
    errors = nn.functional.smooth_l1_loss(coords, target, beta=LOSS_BETA, reduction="none").sum(dim=2)
    if heatmaps is None:
        return errors
    ys, xs = (torch.linspace(0, 1, n, device=coords.device) for n in heatmaps.shape[2:])
    x, y = ((at - place[..., None]) ** 2 for at, place in ((xs, target[..., 0]), (ys, target[..., 1])))  # (B, K, w), (B, K, h)
    spot = (-(y[..., :, None] + x[..., None, :]) / (2 * SPOT_RADIUS**2)).flatten(2).softmax(dim=2)
    return errors - SPOT_WEIGHT * (spot * heatmaps.flatten(2).log_softmax(dim=2)).sum(dim=2)


def keypoint_loss(coords, target, visible, heatmaps=None) -> torch.Tensor:
    """The mean of keypoint_errors over the visible (B, K) keypoints.

    Zero where none is visible. With several processes each weighs by its visible keypoints, so that the mean over processes
    is what one would get for all their pictures.
    """
    count = visible.sum().float()
    world = process_index()[1]
    if world > 1 and torch.is_grad_enabled():
        torch.distributed.all_reduce(count)
        count = count / world
    return (keypoint_errors(coords, target, heatmaps) * visible).sum() / count.clamp(min=1 / world)


def sides(value) -> tuple[int, int]:
    """A size in a config, one number or two, as (height, width)."""
    return (value, value) if isinstance(value, int) else tuple(value)


# ---- bases -----------------------------------------------------------------------------------------------------------


class AnyBackbone:
    """Stands in for a library class in `load_pretrained`: the class that config.json names, other heads' weights left aside."""

    @staticmethod
    def from_pretrained(source, **options):
        import transformers

        kind = transformers.AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False).model_type
        if kind == "vitpose":
            model, info = transformers.VitPoseForPoseEstimation.from_pretrained(source, **options)
            if model.config.backbone_config.num_experts > 1:
                raise ValueError("a ViTPose+ model with experts for several data sets; take one of the plain ViTPose models")
            return model, info
        if kind not in BACKBONES:
            raise ValueError(f"a {kind} model; keypoints need one of {', '.join([*BACKBONES, 'vitpose'])}")
        name, extra = BACKBONES[kind]
        model, info = getattr(transformers, name).from_pretrained(source, **options, **extra)
        strays = [key for key in info["unexpected_keys"] if not is_within(key, OTHER_HEADS)]
        return model, {**info, "unexpected_keys": strays}


def load_base(name: str, download: bool = True):
    """(KeypointModel with the base's head or none, image processor, {"name", "sha256"}) of "demo", a local folder, or a hub name.

    float32 and safetensors only; UserError where a weight is missing or left over.
    """
    from transformers import AutoImageProcessor

    source = base_source(name, DEMO_BASE, EXAMPLE, download)
    model, processor = load_pretrained(name, source, AnyBackbone, AutoImageProcessor)
    folder = Path(source)
    if (folder / HEAD_FILE).is_file():
        facts = read_facts(folder, model.config)
        base = KeypointModel(model, read_head(folder, facts, model.config.hidden_size), facts)
    elif model.config.model_type == "vitpose":
        base = from_vitpose(model, name)
    else:
        base = KeypointModel(model, None, {"input_size": trained_size(processor, model.config)})
    head = f"with a head for {len(base.facts['names'])} keypoints" if base.keypoint_head else "without a keypoint head"
    millions = sum(p.numel() for p in base.parameters()) / 1e6
    say(f"base: {name}, {type(base.backbone).__name__} {head}, {millions:.2f} M parameters")
    return base, processor, {"name": name, "sha256": fingerprint(base.state_dict())}


def from_vitpose(model, name: str) -> KeypointModel:
    """The backbone of a VitPoseForPoseEstimation, and its head where that is the simple one."""
    size, config = list(sides(model.backbone.config.image_size)), model.config
    if not config.use_simple_decoder or config.scale_factor != UPSAMPLING:
        say(f"note: {name} has another head than ViTPose's simple one, such as deconvolutions: only its backbone is used")
        return KeypointModel(model.backbone, None, {"input_size": size})
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    head = HeatmapHead(config.backbone_config.hidden_size, len(names))
    head.load_state_dict(model.head.state_dict())
    facts = {"names": names, "head": "heatmap", "beta": VITPOSE_BETA, "input_size": size}
    return KeypointModel(model.backbone, head, facts)


def trained_size(processor, config) -> list[int]:
    """[height, width] that a base was trained at, by its image processor (DINOv2 crops), else by its config."""
    size = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = dict(size or processor.size or {})
    return [size["height"], size["width"]] if "height" in size else list(sides(config.image_size))


def input_size(base: KeypointModel, image_size: int) -> tuple[int, int]:
    """(height, width) of what the model sees: image_size squared, or the base's own where that is 0. UserError if it cannot."""
    size = (image_size, image_size) if image_size else tuple(base.facts["input_size"])
    config = base.backbone.config
    patch, own = sides(config.patch_size), sides(config.image_size)
    if takes(config, size):
        return size
    if config.model_type == "vitpose_backbone":
        raise UserError(f"--image_size {image_size}: ViTPose takes pictures of {own[0]} x {own[1]} only; leave the setting out")
    raise UserError(f"--image_size {image_size} must be a multiple of {patch[0]}, the side of this base's patches")


def takes(config, size) -> bool:
    """Whether a backbone takes pictures of this (height, width): of whole patches, and ViTPose of its own size alone."""
    own = config.model_type != "vitpose_backbone" or tuple(size) == sides(config.image_size)
    return own and all(side > 0 and side % patch == 0 for side, patch in zip(size, sides(config.patch_size), strict=True))


def with_head(base: KeypointModel, points: KeypointSet, head: str, size: tuple[int, int]) -> KeypointModel:
    """The base with a head for these keypoints: its own where kind and number fit, else a new one."""
    count, own = len(points.names), base.facts.get("head")
    module, beta = base.keypoint_head, base.facts.get("beta", NEW_BETA)
    if own != head or len(base.facts["names"]) != count:
        why = "the base has none" if own is None else f"the base's is a {own} head for {len(base.facts['names'])}"
        module, beta = new_head(head, base.backbone.config.hidden_size, count), NEW_BETA
        say(f"head for {count} keypoints: a new {head} head, since {why}")
    elif points.named and base.facts["names"] != points.names and own == head:
        theirs = ", ".join(base.facts["names"][:5])
        say(f"note: the base's head is used, since it has {count} keypoints, too; it calls them {theirs} ...")
    facts = {**points.to_json(), "head": head, "input_size": list(size), "beta": beta}
    model = KeypointModel(base.backbone, module, facts)
    model.new_layers = [] if module is base.keypoint_head else [HEAD]
    return model


def new_head(kind: str, width: int, keypoints: int) -> nn.Module:
    return RegressionHead(width, keypoints) if kind == "regression" else HeatmapHead(width, keypoints)


def lora_targets(model, which: str, last_k: int = 0, r: int = 1) -> list[str]:
    """Names of the layers that get adapters of rank r, none with 0, and never in the head; see choose_targets."""
    return choose_targets(model, which, (HEAD,), last_k, answer, r)


def answer(model) -> torch.Tensor:
    """Coordinates and heatmaps for one picture of noise, in one row, to find out what they depend on; see common/trial.py."""
    device = next(model.parameters()).device
    coords, _, heatmaps = model.eval()(example_picture(3, *model.facts["input_size"]).to(device))
    return torch.cat([part.flatten() for part in (coords, heatmaps) if part is not None])


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def read_facts(folder: Path, config=None) -> dict:
    """keypoints.json of a checkpoint, checked; config: of its backbone, where it is at hand."""
    file = folder / KEYPOINT_FILE
    facts = read_json(file)
    check_fields(facts, KEYPOINT_FIELDS, file)
    KeypointSet.from_json(facts)
    if len(facts["sigmas"]) != len(facts["names"]):
        raise UserError(f"{file} is damaged: it has {len(facts['sigmas'])} sigmas for {len(facts['names'])} keypoints")
    if config is not None and not takes(config, facts["input_size"]):
        raise UserError(f"{file} is damaged: its input_size is {facts['input_size']}, which this base cannot take")
    return facts


def read_head(folder: Path, facts: dict, width: int) -> nn.Module:
    """The head of a checkpoint folder; UserError unless all of it fits."""
    head, tensors = new_head(facts["head"], width, len(facts["names"])), load_tensors(folder / HEAD_FILE)
    if wrong := misfit(shapes_of(head.state_dict()), tensors):
        raise UserError(f"{folder / HEAD_FILE} does not fit {KEYPOINT_FILE}: {wrong}")
    head.load_state_dict(tensors)
    return head


def origin(method: str, model: KeypointModel, base: dict, config) -> dict:
    """What origin.json says of a checkpoint. What the model itself knows is in its keypoints.json."""
    return make_origin("pose", method, base, config, data_format=config.data_format)


def load_checkpoint(folder: Path | str, base: str | tuple = "", merge: bool = True, device="cpu"):
    """(model in eval mode on the device, image processor, origin) of a checkpoint, fully trained or an adapter.

    base: an adapter's base, if not under its recorded name; or what load_base gave. merge: add the adapter into its weights.
    """
    folder, about = open_checkpoint(folder, "pose")
    if about["method"] == "full":
        check_holds(folder, HEAD_FILE)  # without it the folder would be a base whose head is still to come
    model, processor = load_under(folder, about, load_base, base)
    if about["method"] != "full":
        keypoints = read_facts(folder, model.backbone.config)
        head = new_head(keypoints["head"], model.backbone.config.hidden_size, len(keypoints["names"]))
        model = with_saved_adapter(KeypointModel(model.backbone, head, keypoints), folder, (HEAD,), merge, answer)
    return model.eval().to(device), processor, about


def start_from(folder: str, model) -> None:
    """The weights of a checkpoint for `model`, as it is about to train; "": none. The head, if it has these keypoints."""
    if folder:
        saved, _, about = load_checkpoint(folder, merge=False)
        same = saved.facts["names"] == model.facts["names"]
        take_over(model, saved, about, folder, () if same else (HEAD,))


def card_code(about: dict) -> dict:
    """What a model card says of loading, for Run.card: the libraries alone do not, as the head is this project's own."""
    return {}
