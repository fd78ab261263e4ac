"""Takes tuned mesh decoders to SAM 3D Objects and TRELLIS: exports a run in the official format, says what a file holds.

    python scripts/sam3d_checkpoint.py export outputs/medical_sam3d/lora slat_decoder_mesh.ckpt      # a run, full or an adapter
    python scripts/sam3d_checkpoint.py info slat_decoder_mesh.ckpt                                   # or a run or its checkpoint

An adapter is merged into its base. The file, .safetensors or .ckpt (.pt), holds the decoder alone under the official names:
float16 in its blocks and convolutions, float32 elsewhere, with a .json of its architecture beside. It is read back, compared
tensor by tensor and by what it says of the same latents, and only then gets its name, which is the last line printed.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import UserError, cli  # noqa: E402

MEDICAL_TASK = ROOT / "medical_sam3d"
ENDINGS = (".safetensors", ".ckpt", ".pt")
MOST_OFF = 0.02  # root mean square of how far features may be off in half precision, in those of the features


def export(checkpoint: str, out: Path, base: str = "", overwrite: bool = False) -> Path:
    """Writes a checkpoint's decoder as the official files are; the file's path. UserError where it cannot be written so.

    base: where an adapter's base is, if not under its recorded name.
    """
    from common.folders import check_place
    from common.lora import adapted_layers
    from decoder import write_decoder
    from model import load_checkpoint

    out = Path(out).expanduser()
    if out.suffix not in ENDINGS:
        raise UserError(f"{out} must end in {', '.join(ENDINGS)}")
    if out.is_dir():
        raise UserError(f"{out} is a folder; name a file that is not there yet")
    files = [out.with_suffix(".json"), out]
    if there := [file for file in files if file.exists() and not overwrite]:
        raise UserError(f"{there[0]} is there already; --overwrite replaces it")
    check_place(str(out), out.parent)
    model, _, _ = load_checkpoint(checkpoint, base)
    if adapted_layers(model):
        raise UserError(f"the adapter in {checkpoint} cannot be merged into its base, and these files hold whole weights alone")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as aside:
        write_decoder(Path(aside) / out.name, model.decoder.config, model.decoder.state_dict())
        check_same(Path(aside) / out.name, model.decoder)
        for file in files:
            os.replace(Path(aside) / file.name, file)
    say_what_for(model)
    return out


def check_same(path: Path, decoder) -> None:
    """UserError unless a written file, read as any stranger's is, has each tensor and says of latents what the decoder does."""
    import torch

    from common.runtime import say
    from decoder import SLatMeshDecoder, read_decoder

    config, tensors = read_decoder(path)
    if config != decoder.config:
        raise UserError(f"the written file reads as another architecture, {config}: nothing was saved")
    for name, tensor in decoder.state_dict().items():
        if not torch.allclose(tensors[name], tensor.float(), rtol=2**-10, atol=1e-7):
            raise UserError(f"{name} of the written file is not the decoder's: nothing was saved")
    copy = SLatMeshDecoder(config)
    copy.load_state_dict(tensors, strict=True)
    cells = torch.cartesian_prod(torch.arange(1), *[torch.arange(min(4, config.resolution))] * 3).int()
    latents = torch.randn(len(cells), config.latent_channels, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own, read = (each.eval()(cells, latents).features.double() for each in (decoder, copy))
    off = float((own - read).square().mean().sqrt() / own.square().mean().sqrt().clamp(min=1e-30))
    if not off <= MOST_OFF:
        raise UserError(f"in half precision this decoder says something else, by {off:.1%} of its features: nothing was saved")
    say(f"verified: {len(tensors)} tensors, every one in its place; features off by {off:.1e} of their size")


def say_what_for(model) -> None:
    """What a user of the file has to know."""
    from common.runtime import say

    if model.encoder is not None:
        many = sum(p.numel() for p in model.encoder.parameters())
        say(f"note: the encoder that made its latents ({many:,} weights) is no part of the official format")
        say("note: latents of the official pipeline fit a decoder that was trained on them (--latents_dir), and few others")
    if model.decoder.config.resolution != 64:
        say(f"note: {model.decoder.config.resolution} cells along an edge, where the official decoder has 64")


def info(name: str, base: str = "") -> list[str]:
    """What a decoder's file, or a checkpoint of ours, says: a line each. UserError where it is neither. base: as of export."""
    from collections import Counter

    from common.checkpoint import sha256_of
    from common.saved_models import open_checkpoint
    from decoder import read_decoder, read_tensors
    from model import load_checkpoint

    path = Path(name).expanduser()
    if path.is_file():
        config, tensors = read_decoder(path)
        stored = read_tensors(path)[0].values()
        kinds = Counter()
        for tensor in stored:
            kinds[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
        told = {"stored as": ", ".join(f"{kind} {count:,}" for kind, count in kinds.items()), "sha256": sha256_of(path)}
    else:
        folder, about = open_checkpoint(path, "medical_sam3d")
        model, processor, _ = load_checkpoint(folder, base)
        config, tensors = model.decoder.config, model.decoder.state_dict()
        told = {
            "method": about["method"],
            "base": f"{about['base']['name']} (sha256 {about['base']['sha256'][:12]})",
            "latents": processor.latents,
            "organs": ", ".join(processor.organs) or "not said",
            "sees": f"one of {processor.every} slices; {', '.join(processor.channels)}",
        }
    lines = {"architecture": ", ".join(f"{key} {value}" for key, value in config.to_json().items())}
    lines |= {"parameters": f"{sum(t.numel() for t in tensors.values()):,} in {len(tensors)} tensors"} | told
    return [f"{key}: {value}" for key, value in lines.items()]


def main(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="a run's decoder in the official format", allow_abbrev=False)
    out.add_argument("checkpoint", help="a run folder, or its checkpoints/best")
    out.add_argument("out", help="the file to write: .safetensors, .ckpt or .pt")
    out.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    about = commands.add_parser("info", help="what a decoder's file or a checkpoint holds", allow_abbrev=False)
    about.add_argument("file", help="a .safetensors, .ckpt or .pt, a run folder, or its checkpoints/best")
    for command in (out, about):
        command.add_argument(
            "--model", default="", help="where an adapter's base is, if not under the name that it had in training"
        )
    args = parser.parse_args(argv)
    sys.path.insert(0, str(MEDICAL_TASK))
    if args.command == "export":
        print(export(args.checkpoint, args.out, args.model, args.overwrite))
    else:
        print("\n".join(info(args.file, args.model)))


if __name__ == "__main__":
    cli(main)
