"""Organs as a model: where bases come from, encoder and decoder in one, where adapters go, saving and loading."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from common.bases import base_source, fetch_file
from common.checkpoint import check_holds, fingerprint, open_model_folder, read_json, write_json
from common.config import UserError
from common.folders import best_of
from common.lora import is_within
from common.own_adapters import add_own_adapter
from common.runtime import say
from common.saved_models import load_under, make_origin, open_checkpoint, take_over, with_saved_adapter
from common.tensor_files import load_tensors
from decoder import Cubes, DecoderConfig, SLatMeshDecoder, check_tensors, memory_needed, read_decoder
from latents import LatentEncoder
from processor import POINTS, OrganProcessor

DEMO_BASE = Path(__file__).resolve().parent / "demo_base"
EXAMPLE = "facebook/sam-3d-objects/checkpoints/slat_decoder_mesh.ckpt"
MODEL_FILE = "model.safetensors"
PROCESSOR_FILE = "processor.json"
DECODER_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth")
# By its exact name: "out_layer" alone would also name upsample.*.out_layers.*, which are 5.7 M weights of the official decoder.
OUT_LAYER = "decoder.out_layer"
ENCODER = "encoder"
LOSS_BYTES = (1_700, 2_500)  # that the loss takes for each of the finest voxels, without a mesh and with one: 764,000 measured
# What --lora_targets may say -> a regular expression for full names of layers. r 4 at official size: 221,184 weights in
# attention, 589,824 with the MLPs; the convolutions hold the local geometry.
ATTENTION = r"decoder\.blocks\.\d+\.attn\.to_(qkv|out)"
TORSO = rf"{ATTENTION}|decoder\.blocks\.\d+\.mlp\.mlp\.[02]"
LORA_PRESETS = {
    "attention": ATTENTION,
    "default": TORSO,
    "all": rf"{TORSO}|decoder\.upsample\.\d+\.(out_layers\.[03]|skip_connection)\.conv",
}


class OrganMesher(nn.Module):
    """Encoder and decoder: what is observed of an organ -> the values that its mesh is extracted from.

    encoder: latents.LatentEncoder, or None, where the latents themselves are the input. decoder: decoder.SLatMeshDecoder.
    new_layers: parts with new weights, which train whole beside adapters.
    """

    no_compile = "each batch has its own number of cells, which its convolutions look up one by one"

    def __init__(self, encoder: LatentEncoder | None, decoder: SLatMeshDecoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.new_layers: list[str] = []

    def forward(self, coords: torch.Tensor, inputs: torch.Tensor) -> Cubes:
        """coords (N, 4) int: sample, x, y, z of the active cells. inputs (N, C, 4, 4, 4) for the encoder, or latents (N, 8)."""
        return self.decoder(coords, inputs if self.encoder is None else self.encoder(coords, inputs))

    def save_pretrained(self, folder) -> None:
        """config.json and model.safetensors, float32."""
        from safetensors.torch import save_file

        encoder = None if self.encoder is None else self.encoder.to_json()
        write_json(Path(folder) / "config.json", {"decoder": self.decoder.config.to_json(), "encoder": encoder})
        state = {name: t.detach().float().cpu().contiguous() for name, t in self.state_dict().items()}
        save_file(state, Path(folder) / MODEL_FILE, metadata={"format": "pt"})

    def fingerprint(self) -> str:
        """sha256 of the weights of a base; an encoder that is new is no part of it."""
        return fingerprint({name: t for name, t in self.state_dict().items() if not is_within(name, self.new_layers)})


# ---- bases -----------------------------------------------------------------------------------------------------------


def load_base(name: str, download: bool = True):
    """(OrganMesher in eval mode, OrganProcessor, {"name", "sha256"}) of a base.

    name: demo; a folder of ours; the official decoder's file (.ckpt, .safetensors, .pt), on disk or on the hub as
    owner/repo/path/slat_decoder_mesh.ckpt. A decoder alone gets an encoder with new weights. UserError where it is none of
    these, or damaged.
    """
    place = Path(name).expanduser()
    if place.name == MODEL_FILE and (place.parent / PROCESSOR_FILE).is_file():
        name, place = str(place.parent), place.parent
    if place.is_file() or (name.endswith(DECODER_ENDINGS) and not place.is_dir()):
        config, tensors = read_decoder(locate(name, download))
        model = build(config, None, {f"decoder.{key}": tensor for key, tensor in tensors.items()}, name)
        processor = OrganProcessor(resolution=config.resolution)
        model.encoder = new_encoder(processor, config)
        model.new_layers = [ENCODER]
    else:
        model, processor = read_folder(Path(base_source(name, DEMO_BASE, EXAMPLE, download)))
    model.eval()
    size = sum(p.numel() for p in model.decoder.parameters()) / 1e6
    kind = "a new encoder" if model.new_layers else "latents of others" if model.encoder is None else "its encoder"
    cells = model.decoder.config.resolution
    say(f"base: {name}, SLAT mesh decoder, {size:.2f} M parameters, {cells} cells a side, with {kind}")
    name = str(place.resolve()) if name != "demo" and place.exists() else name  # an adapter finds its base from any folder
    return model, processor, {"name": name, "sha256": model.fingerprint()}


def locate(name: str, download: bool) -> Path:
    """The file of a decoder by its name; one on the hub, owner/repo/path/file, is fetched. UserError where there is none."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") < 2:
        raise UserError(f"--model {name}: there is no file of that name; give a decoder's file, or one on the hub ({EXAMPLE})")
    return fetch_file(name, download, "--model ")


def read_folder(folder: Path) -> tuple[OrganMesher, OrganProcessor]:
    """What was saved here: a run, its checkpoint, or the demo's base. UserError unless it is one, and whole."""
    folder = best_of(folder)
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds an adapter, which is no base: --start_from goes on with it")
    folder = open_model_folder(folder, MODEL_FILE) if (folder / "manifest.json").exists() else folder
    check_holds(folder, MODEL_FILE)
    about = read_json(folder / "config.json")
    if not isinstance(about, dict) or not isinstance(about.get("decoder"), dict):
        raise UserError(f"{folder / 'config.json'} does not say what the decoder is: this is no model of these scripts")
    tensors = load_tensors(folder / MODEL_FILE)
    model = build(DecoderConfig.from_json(about["decoder"]), about.get("encoder"), tensors, folder)
    processor = OrganProcessor.load(folder)
    processor.check_fits(model, folder)
    return model, processor


def build(config: DecoderConfig, encoder: dict | None, tensors: dict, where) -> OrganMesher:
    """A model with these weights, strictly. encoder: as of LatentEncoder.to_json. UserError for the first that does not fit.

    Built without memory of its own and compared before it takes any: the sizes in a file are a stranger's.
    """
    with torch.device("meta"):
        decoder = SLatMeshDecoder(config)
        model = OrganMesher(None if encoder is None else LatentEncoder.from_json(encoder), decoder)
    check_tensors(f"--model {where}", model, tensors)
    model.load_state_dict({name: t.float() for name, t in tensors.items()}, assign=True)
    return model.requires_grad_(True)


def new_encoder(processor: OrganProcessor, config: DecoderConfig) -> LatentEncoder:
    """An encoder whose latents start where those of the official pipeline lie."""
    return LatentEncoder(len(processor.channels), latent_channels=config.latent_channels, official=True)


def set_up(model: OrganMesher, processor: OrganProcessor, config) -> tuple[OrganMesher, OrganProcessor]:
    """The base as config asks for it: --every, and with --latents_dir without an encoder."""
    if config.every:
        processor = replace(processor, every=config.every)
    if config.latents_dir:
        model.encoder, model.new_layers, processor = None, [], replace(processor, latents="precomputed")
    elif model.encoder is None:
        raise UserError(
            f"--model {config.model} was trained on latents of others: --latents_dir says where those of this data are"
        )
    model.decoder.gradient_checkpointing = config.gradient_checkpointing
    return model, processor


# ---- adapters --------------------------------------------------------------------------------------------------------


def whole_parts(model: OrganMesher) -> tuple[str, ...]:
    """Names of the parts that train whole beside adapters, and are saved with them."""
    return (OUT_LAYER, *model.new_layers)


def setup_for_finetuning(model: OrganMesher, config) -> OrganMesher:
    """The model with adapters as config.lora_* ask for; the decoder's output layer trains whole, and an encoder that is new.

    config: of train_lora.py, or anything with its lora_* fields and frozen_dtype. All else is frozen.
    """
    return add_own_adapter(model, config, LORA_PRESETS, whole_parts(model), answer)


def freeze_encoder(model: OrganMesher) -> OrganMesher:
    """The model with all of its decoder to train, and its encoder only where that is new: as beside adapters."""
    if model.encoder is not None:
        model.encoder.requires_grad_(bool(model.new_layers))
    return model


def say_memory(model: OrganMesher, dataset, config) -> None:
    """A line, before the first step, with about what a step needs: by the cells of the first samples, beside the weights."""
    batch_size = config.batch_size
    cells = min(batch_size, len(dataset)) * max(len(dataset[1, index]["coords"]) for index in range(min(4, len(dataset))))
    needed = memory_needed(model.decoder.config, cells, True, model.decoder.gradient_checkpointing)
    needed += 64 * cells * LOSS_BYTES[config.mesh_loss > 0]
    say(f"a step takes about {needed / 1e9:.1f} GB beside the weights ({cells:,} active cells, {64 * cells:,} voxels)")


def answer(model: OrganMesher) -> torch.Tensor:
    """All that losses and meshes are made of, for 27 cells with noise in them."""
    torch.manual_seed(0)  # common/trial.py restores the generator
    device, config = next(model.parameters()).device, model.decoder.config
    edge = torch.arange(min(3, config.resolution))
    cells = torch.cartesian_prod(torch.zeros(1, dtype=edge.dtype), edge, edge, edge).int().to(device)
    shape = (config.latent_channels,) if model.encoder is None else (model.encoder.channels, *[POINTS] * 3)
    return model.eval()(cells, torch.randn(len(cells), *shape).to(device)).features


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def origin(method: str, base: dict, config) -> dict:
    """What origin.json says of a checkpoint; what an organ is to the model stands in processor.json."""
    latents_dir = str(Path(config.latents_dir).expanduser().resolve()) if config.latents_dir else ""
    data = {"organs": config.organs, "modality": config.modality, "latents_dir": latents_dir}
    return make_origin("medical_sam3d", method, base, config, **data)


def load_checkpoint(folder: Path | str, base: str | tuple = "", merge: bool = True, device="cpu"):
    """(OrganMesher in eval mode on the device, OrganProcessor, origin) of a checkpoint, full or an adapter.

    base: an adapter's base, if not under its recorded name; or what load_base gave. merge: add the adapter into its weights.
    """
    folder, about = open_checkpoint(folder, "medical_sam3d")
    model, processor = load_under(folder, about, load_base, base)
    if about["method"] != "full":
        processor = OrganProcessor.load(folder)
        if processor.latents == "precomputed":
            model.encoder, model.new_layers = None, []
        processor.check_fits(model, folder)
        model = with_saved_adapter(model, folder, whole_parts(model), merge, answer, own_layers=True)
    return model.eval().to(device), processor, about


def start_from(folder: str, model: OrganMesher) -> None:
    """The weights of a checkpoint for `model`, as it is about to train; "": none."""
    if folder:
        saved, _, about = load_checkpoint(folder, merge=False)
        take_over(model, saved, about, folder, ())


def card_code(about: dict) -> dict:
    """What a model card says of loading, for Run.card."""
    base = "" if about["method"] == "full" else " --model path/to/the/base"
    return {
        "use": f"""meshes = predictor.predict("mask.nii.gz")  # {{organ: mesh in mm}}

# The decoder in the official format: python scripts/sam3d_checkpoint.py export path/to/this/folder decoder.safetensors{base}"""
    }
