"""Takes voices to RVC WebUI and Applio and back: exports a run as their small .pth, imports theirs, says what a file holds.

    python scripts/rvc_checkpoint.py export outputs/voice_rvc/lora voice.pth       # a run or a checkpoint, full or an adapter
    python scripts/rvc_checkpoint.py import voice.pth voice_folder                 # for --model and --checkpoint of the scripts
    python scripts/rvc_checkpoint.py info voice.pth

An adapter is merged into its base in float32. The file holds half-precision weights without the posterior encoder, which
conversion does not need (--full keeps it), and what either program asks for. It is read back, compared tensor by tensor and by
what it sounds like, and only then gets its name, which is the last line printed.
"""

import argparse
import math
import sys
from collections import OrderedDict
from datetime import UTC, datetime
from pathlib import Path

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import UserError, cli, shown  # noqa: E402

VOICE_TASK = ROOT / "voice_rvc"
LEAST_SNR = 40  # dB between a voice and its file in half precision; common ones reach 60
SEGMENT = 32  # frames; what RVC writes at any rate, and no conversion asks about


def export(checkpoint: str, out: Path, base: str = "", full: bool = False, overwrite: bool = False) -> Path:
    """Writes a checkpoint as a .pth of RVC and Applio; the file's path. UserError where it is none or cannot be written so.

    base: where an adapter's base is, if not under its recorded name. full: with the posterior encoder.
    """
    from common.checkpoint import atomic_file
    from common.folders import check_place
    from common.lora import adapted_layers
    from model import load_checkpoint

    out = Path(out).expanduser()
    if out.suffix != ".pth":
        raise UserError(f"{out} must end in .pth, for that is what RVC and Applio list")
    if out.is_dir():
        raise UserError(f"{out} is a folder; name a file that is not there yet")
    if out.exists() and not overwrite:
        raise UserError(f"{out} is there already; --overwrite replaces it")
    check_place(str(out), out.parent)
    model, voice, _ = load_checkpoint(checkpoint, base)
    if adapted_layers(model):
        raise UserError(f"the adapter in {checkpoint} cannot be merged into its base, and these files hold whole weights alone")
    if full and model.enc_q is None:
        raise UserError(f"{checkpoint} has no posterior encoder, so --full has nothing to keep")
    out.parent.mkdir(parents=True, exist_ok=True)
    facts = describe(model, voice, out.stem, checkpoint)
    with atomic_file(out) as aside:
        for half in (True, False):
            write(aside, content_of(model, facts, full, half))
            if fits(aside, model, full, half):
                break
    say_what_for(voice)
    return out


def content_of(model, facts: dict, full: bool, half: bool) -> OrderedDict:
    """What the .pth holds, in plain types, so that torch loads it without running anything."""
    tensors = OrderedDict()
    for name, tensor in even_rows(model).items():
        if full or not name.startswith("enc_q."):
            tensors[name] = (tensor.half() if half else tensor.float()).clone()
    return OrderedDict(weight=tensors, **facts)


def even_rows(model) -> dict:
    """The weights by the names that every file uses. Rows of weight_norm's v get a root mean square of 1.

    v counts by its direction alone (w = g v / |v|), and in half precision small numbers lose digits: below 6e-5 nearly all.
    """
    from layers import to_old_names

    state = {name: tensor.detach().cpu() for name, tensor in to_old_names(model.state_dict()).items()}
    for name, v in state.items():
        if name.endswith(".weight_v"):
            rms = v.square().mean(dim=tuple(range(1, v.ndim)), keepdim=True).sqrt()
            state[name] = v / rms.masked_fill(rms == 0, 1)
    return state


def describe(model, voice, name: str, checkpoint: str) -> dict:
    """What stands beside the weights: RVC's keys, Applio's, and under a key that neither asks about all that a Voice is."""
    from common.checkpoint import read_json
    from model import CONTENT_MODELS, voice_fingerprint
    from voice_files import OUR_KEY

    config = voice.config
    embedder = voice.content.removeprefix("hubert:")
    summary = Path(checkpoint).expanduser() / "summary.json"  # of a run folder
    best = read_json(summary).get("metrics", {}).get("best") or {} if summary.is_file() else {}
    epoch, step = best.get("epoch", 0), best.get("step", 0)
    listed = [
        *(config.n_fft // 2 + 1, SEGMENT, config.inter_channels, config.hidden_channels, config.filter_channels),
        *(config.n_heads, config.n_layers, config.kernel_size, 0, config.resblock, list(config.resblock_kernels)),
        *([list(row) for row in config.resblock_dilations], list(config.upsample_rates), config.upsample_initial),
        *(list(config.upsample_kernels), config.speakers, config.gin_channels, config.sample_rate),
    ]
    # Both take the rate from the list. Text of thousands is RVC's way, which Applio shows and programs after RVC read.
    rate = f"{config.sample_rate // 1000}k" if config.sample_rate % 1000 == 0 else config.sample_rate
    rvc = {"config": listed, "info": f"{epoch}epoch", "sr": rate, "f0": int(config.f0), "version": config.version}
    applio = {
        "epoch": epoch,
        "step": step,
        "model_name": name,
        "author": "",
        "embedder_model": {theirs: key for key, theirs in CONTENT_MODELS.items()}.get(embedder, embedder),
        "speakers_id": max(1, len(voice.speakers)),
        "vocoder": "HiFi-GAN",
        "model_hash": voice_fingerprint(model),
        "creation_date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return {**rvc, **applio, OUR_KEY: {"config": config.to_json(), "voice": voice.to_json()}}


def write(path: Path, content) -> None:
    """All of it in the file, or the disk's own error."""
    import torch

    with open(path, "wb") as file:  # Python's own, so that a full disk is an OSError
        torch.save(content, file)


def fits(path: Path, model, full: bool, half: bool) -> bool:
    """Whether a written file, read as any stranger's is, has each tensor and answers as the model does.

    False, and a line, where half precision is what changes it. UserError where it is anything else.
    """
    from common.runtime import say
    from synthesizer import Synthesizer
    from voice_files import read_voice

    try:
        found = read_voice(path)
        copy = Synthesizer(found.config, full)
        copy.load_state_dict(found.tensors, strict=True)
        snr = difference(model, copy.eval())
    except UserError as error:
        if not half:
            raise
        snr, reason = -math.inf, str(error).replace(f"{path} ", "")
    else:
        reason = f"{snr:.0f} dB beside the voice itself"
    if snr >= LEAST_SNR:
        say(f"verified: {len(found.tensors)} tensors, every one in its place; {min(snr, 999):.0f} dB beside the voice itself")
        return True
    if half:
        say(f"half precision would change this voice ({reason}): written in full precision, twice the bytes")
        return False
    raise UserError(f"the written file does not sound like the voice ({reason}): nothing was saved")


def difference(model, copy) -> float:
    """How far above the difference of what two voices convert the sound itself is, in dB."""
    import torch

    from model import answer

    waves = []
    for each in (model, copy):
        enc_q, each.enc_q = each.enc_q, None  # what converts, alone
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            waves.append(answer(each).double())
        each.enc_q = enc_q
    noise = (waves[0] - waves[1]).square().sum()
    return math.inf if noise == 0 else float(10 * torch.log10(waves[0].square().sum() / noise))


def say_what_for(voice) -> None:
    """What a user of the file has to know."""
    from common.runtime import say
    from model import CONTENT_MODELS

    if voice.content == "dsp":
        say("note: its content features are dsp, the demo's, which RVC and Applio do not compute: only infer.py converts with it")
    elif voice.content != f"hubert:{CONTENT_MODELS['contentvec']}":
        say(f"note: it was trained on content of {voice.content}: choose that embedder in Applio; RVC has ContentVec alone")
    if len(voice.speakers) > 1:
        say("speaker ids: " + ", ".join(f"{i} {name}" for i, name in enumerate(voice.speakers)))


def import_voice(file: str, folder: Path) -> Path:
    """Saves a voice of others as a folder of ours, for --checkpoint and --model. UserError where it is none."""
    from common.saved_models import save_model
    from model import load_base, origin_of_others

    folder = Path(folder).expanduser()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} is there already, and not empty; name a new folder")
    model, voice, base = load_base(file)
    card = f"# {Path(file).stem}\n\nA voice of RVC or Applio, imported from {Path(file).name}.\n"
    save_model(folder, model, voice, origin_of_others(base), card)
    return folder


def info(file: str) -> list[str]:
    """What a voice's file or folder says, a line each. UserError where it is no voice."""
    from model import load_base
    from voice_files import read_tensors

    model, voice, base = load_base(file)
    config, path = voice.config, Path(file).expanduser()
    _, facts = read_tensors(path) if path.is_file() else ({}, {})
    told = {
        "version": f"{config.version}, {config.content_width} content features from {voice.content}",
        "sample rate": f"{config.sample_rate} Hz",
        "F0": "yes" if config.f0 else "no: pitch settings have no effect",
        "speakers": f"{config.speakers} rows" + (f", the first of {', '.join(voice.speakers)}" if voice.speakers else ""),
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "trains": "yes" if model.enc_q is not None else "no: it lacks the posterior encoder (enc_q)",
        "sha256": base["sha256"],
    }
    facts = {key: value for key, value in facts.items() if isinstance(value, (str, int, float)) and key != "optimizer"}
    told |= {f"its {key}": shown(value) for key, value in facts.items()}
    return [f"{key}: {value}" for key, value in told.items()]


def main(argv=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="a run or checkpoint of ours as a .pth", allow_abbrev=False)
    out.add_argument("checkpoint", help="a run folder, its checkpoints/best, or a voice's file")
    out.add_argument("out", help="the .pth to write")
    out.add_argument("--model", default="", help="where an adapter's base is, if not under the name that it had in training")
    out.add_argument("--full", action="store_true", help="keep the posterior encoder: a base that training can go on from")
    out.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    into = commands.add_parser("import", help="a .pth of RVC or Applio as a folder of ours", allow_abbrev=False)
    into.add_argument("file", help="the .pth")
    into.add_argument("folder", help="the folder to make")
    about = commands.add_parser("info", help="what a voice's file or folder holds", allow_abbrev=False)
    about.add_argument("file", help="a .pth, a folder of ours, or a training folder of RVC or Applio")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(VOICE_TASK))
    if args.command == "export":
        print(export(args.checkpoint, args.out, args.model, args.full, args.overwrite))
    elif args.command == "import":
        print(import_voice(args.file, args.folder))
    else:
        print("\n".join(info(args.file)))


if __name__ == "__main__":
    cli(main)
