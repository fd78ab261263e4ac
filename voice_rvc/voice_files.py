"""Voices in files of other programs, read safely and told apart: RVC's and Applio's voices, pretrained weights, training states.

    file = read_voice(Path("voice.pth"))      # its configuration, its weights by the official names, what else it says of itself

Nothing in a file runs, and none of its numbers is believed before it was checked. Whatever is no voice is named in one line.
"""

import math
import re
import warnings
import zipfile
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import torch

from common.checkpoint import read_json
from common.config import UserError, shown
from common.runtime import say
from common.tensor_files import misfit
from layers import to_old_names
from synthesizer import Synthesizer, VoiceConfig

FILE_ENDINGS = (".pth", ".pt", ".safetensors")
NO_SIZE = 1 << 40  # more bytes than any file here has
PLAIN_KINDS = (str, int, float, bool, list, tuple)
OUR_KEY = "lora_workshop"  # in a voice that was exported here: {"config", "voice"}, what other programs do not ask about
# What a file that is no voice begins with -> what it is.
BEGINNINGS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file that it stands for: `git lfs pull` fetches that",
    b"Ix": "a faiss index, not a voice: it goes beside one, with --index",
    b"Iw": "a faiss index, not a voice: it goes beside one, with --index",
    b"RIFF": "a recording, not a voice",
    b"fLaC": "a recording, not a voice",
    b"OggS": "a recording, not a voice",
    b"ID3": "a recording, not a voice",
    b"\x89PNG": "a picture, not a voice",
    b"\xff\xd8": "a picture, not a voice",
    b"\x1f\x8b": "a packed file: unpack it, and give the .pth in it",
    b"7z\xbc\xaf": "a packed file: unpack it, and give the .pth in it",
    b"Rar!": "a packed file: unpack it, and give the .pth in it",
    b"\x93NUMPY": "an array of NumPy, not a voice",
    b"GGUF": "a language model, not a voice",
}
# Names of tensors that only these models have -> what they are.
OTHER_MODELS = {
    "emb_uv.weight": "a so-vits-svc model, which is built otherwise: RVC's and Applio's are taken",
    "f0_decoder.": "a so-vits-svc model, which is built otherwise: RVC's and Applio's are taken",
    "enc_p.emb.weight": "a VITS model that speaks text, not a voice of RVC",
    "hubert.": "a content model (HuBERT), not a voice: it goes with --content",
    "encoder.layers.": "a content model (HuBERT), not a voice: it goes with --content",
    "unet.": "a pitch model (RMVPE), not a voice",
}
VOICE_TENSORS = ("enc_p.emb_phone.weight", "emb_g.weight", "dec.conv_pre.weight", "dec.ups.0.weight_v")


@dataclass
class VoiceFile:
    """A voice as a file holds it. tensors: float32, by the official names. facts: what the file says of itself."""

    config: VoiceConfig
    tensors: dict[str, torch.Tensor]
    facts: dict

    @property
    def with_enc_q(self) -> bool:
        """Whether the posterior encoder is there: training needs it, conversion does not."""
        return "enc_q.pre.weight" in self.tensors


def read_voice(path: Path) -> VoiceFile:
    """The voice of a .pth, .pt or .safetensors file, in any of the forms that RVC and Applio write.

    UserError, in one line, for anything else; where the architecture cannot be told; and for the first tensor that is missing,
    left over, of another shape, or not finite.
    """
    tensors, facts = read_tensors(path)
    if any(name.startswith("discriminators.") for name in tensors):
        raise UserError(f"{path} is a discriminator, which judges voices and is none: take {generator_of(path)}")
    if not all(name in tensors for name in VOICE_TENSORS):
        raise UserError(f"{path} is {other_model(tensors, facts)}")
    config = read_config(path, tensors, facts)
    check_tensors(path, expected_shapes(config, "enc_q.pre.weight" in tensors), tensors)
    return VoiceFile(config, {name: tensor.float() for name, tensor in tensors.items()}, facts)


def read_discriminator(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a D_*.pth or f0D*.pth, float32, by the official names. UserError where the file is none, or damaged."""
    tensors, _ = read_tensors(path)
    if not all(name.startswith("discriminators.") for name in tensors):
        raise UserError(f"{path} is no discriminator: it holds {next(iter(tensors))}")
    return {name: tensor.float() for name, tensor in tensors.items()}


def generator_of(path: Path) -> str:
    """What the file beside a discriminator is called that holds the voice: G_400.pth of D_400.pth."""
    name = re.sub(r"D(?=_?\d)", "G", path.name)
    return name if name != path.name else "G_*.pth of the same training"


def discriminator_of(path: str) -> str:
    """What the discriminator beside a voice's training file is called, f0D40k.pth of f0G40k.pth; "" where there can be none."""
    folder, slash, name = path.rpartition("/")
    other = re.sub(r"^(f0)?G(?=_?\d)", r"\1D", name)
    return folder + slash + other if other != name else ""


def other_model(tensors: dict, facts: dict) -> str:
    """What a file of tensors is that is no voice."""
    for start, what in OTHER_MODELS.items():
        if any(name.startswith(start) for name in tensors):
            return what
    if "enc_p.emb_phone.weight" in tensors and facts.get("vocoder", "HiFi-GAN") != "HiFi-GAN":
        return f"a voice with the vocoder {shown(facts['vocoder'])}: only HiFi-GAN's are taken"
    missing = next(name for name in VOICE_TENSORS if name not in tensors)
    return f"no voice of RVC or Applio: it has no {missing}, but {len(tensors)} tensors such as {shown(next(iter(tensors)))}"


# ---- files -----------------------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors by their old official names, all else that stands beside them) of any file of tensors, checked for size."""
    try:
        kind = look_at(path)
        content = read_safetensors(path) if kind == "safetensors" else unpickle(path, kind)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no weights by their names, but a {type(content).__name__}")
    places = (content.get("weight"), content.get("model"), content.get("state_dict"), content)
    state = next((place for place in places if holds_tensors(place)), None)
    if state is None:
        raise UserError(f"{path} holds no weights, but {', '.join(shown(key) for key in list(content)[:5]) or 'nothing'}")
    if odd := next((name for name, value in state.items() if not is_plain(name, value)), None):
        raise UserError(f"{path} holds {shown(odd)} among its weights, which is no plain tensor of numbers")
    if sum(tensor.numel() * tensor.element_size() for tensor in state.values()) > path.stat().st_size:
        raise UserError(f"{path} claims more numbers than it has bytes")
    facts = {key: value for key, value in content.items() if isinstance(value, PLAIN_KINDS) or key == OUR_KEY}
    facts["optimizer"] = "optimizer" in content
    # Of a model that was compiled, or trained by several processes.
    plain = to_old_names({re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor for name, tensor in state.items()})
    if len(plain) < len(state):
        raise UserError(f"{path} holds some weights twice, by an old and a new name ({len(state) - len(plain)} of them)")
    return plain, facts


def look_at(path: Path) -> str:
    """What a file is by its bytes, whatever its name says: "safetensors", "zip" or "pickle" of torch. UserError for all else."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the .pth file in it")
    if not path.is_file():
        raise UserError(f"{path} is no file, or not there")
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(4096)
    if not head.strip(b"\0"):
        raise UserError(f"{path} is {'empty' if not size else 'nothing but zeros'}: copy or download it again")
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length < NO_SIZE:
        if 8 + length > size:
            raise UserError(f"{path} is cut off: copy or download it again")
        return "safetensors"
    if head[:4] == b"PK\x03\x04":
        check_zip(path)
        return "zip"
    if head[:1] == b"\x80":
        return "pickle"
    raise UserError(f"{path} is {foreign_file(path, head)}")


def foreign_file(path: Path, head: bytes) -> str:
    """What a file is that torch never wrote, by its first bytes."""
    for beginning, what in BEGINNINGS.items():
        if head.startswith(beginning):
            return what
    if head[257:262] == b"ustar":
        return "a packed file: unpack it, and give the .pth in it"
    if head[:1] == b"\x08" and (path.suffix == ".onnx" or b"pytorch" in head[:64]):
        return "an ONNX model, which holds no weights to go on from: take the .pth that it was made of"
    text = head.decode("utf-8", errors="replace")
    if re.search(r"<(!doctype|html|head|\?xml)", text, re.IGNORECASE):
        return "a web page, not the file that it should lead to: download it again, by its direct link"
    if "�" not in text[:-4] and all(c.isprintable() or c.isspace() for c in text[:-4]):
        return "a text file, not a voice"
    return f"no file of weights (it begins with {head[:4].hex(' ')})"


def check_zip(path: Path) -> None:
    """UserError unless a zip is one of torch's, whole, and not packed to grow."""
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is cut off: its end is missing; copy or download it again")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise UserError(f"{path} is damaged ({error}): copy or download it again") from None
    names = [entry.filename for entry in entries]
    if not any(name.endswith("data.pkl") for name in names):
        inside = next((name for name in names if name.endswith(FILE_ENDINGS)), None)
        hint = f"unpack it, and give {Path(inside).name}" if inside else "and no voice is in it"
        raise UserError(f"{path} is a packed file (zip): {hint}")
    if any(name.endswith("constants.pkl") for name in names):
        raise UserError(f"{path} is a TorchScript program, not weights alone: take the .pth that it was made of")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise UserError(f"{path} would unpack to more bytes than it has: refused")


def read_safetensors(path: Path) -> dict:
    """The tensors of a safetensors file, and its metadata beside them."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {**(file.metadata() or {}), "model": {name: file.get_tensor(name) for name in file.keys()}}
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): copy or download it again") from None


def unpickle(path: Path, kind: str):
    """What a file of torch holds, tensors and plain values alone. UserError for code in it, and for damage.

    torch answers odd files with errors of many kinds, some without a text, some with the advice to run what is in the file.
    """
    try:
        code = torch.serialization.get_unsafe_globals_in_checkpoint(path) if kind == "zip" else []
        if not code:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip")
    except Exception as error:
        found = re.search(r"(?:GLOBAL|class) ([\w.]+\.\w+)", str(error))
        code = [found[1]] if found else []
    if code:
        names = ", ".join(shown(name).strip("'") for name in code[:3])
        raise UserError(f"{path} holds more than weights: {names}, which would run code as it is loaded; refused")
    raise UserError(f"{path} is damaged or cut off: copy or download it again")


def holds_tensors(place) -> bool:
    return isinstance(place, dict) and any(isinstance(value, torch.Tensor) for value in place.values())


def is_plain(name, value) -> bool:
    """Whether it is a tensor of floating-point numbers that lie in memory, under a name."""
    plain = isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
    return plain and value.device.type == "cpu" and value.is_floating_point()


def check_tensors(path: Path, expected: dict, tensors: dict) -> None:
    """UserError for the first tensor that is missing, left over, of another shape than expected, or not finite."""
    if wrong := misfit(expected, tensors):
        raise UserError(f"{path} does not fit the architecture that it seems to have: {wrong}")


# ---- architecture ----------------------------------------------------------------------------------------------------


@cache
def expected_shapes(config: VoiceConfig, with_enc_q: bool) -> dict[str, tuple]:
    """Old official name -> shape of each tensor of a voice. No memory is taken, whatever the sizes are."""
    with torch.device("meta"):
        model = Synthesizer(config, with_enc_q)
    return {name: tuple(tensor.shape) for name, tensor in to_old_names(model.state_dict()).items()}


def read_config(path: Path, tensors: dict, facts: dict) -> VoiceConfig:
    """The architecture: sizes by the shapes of the weights; what these do not tell by the file, by config.json beside it, or by
    the official architectures, of which one alone must fit."""
    try:
        sizes = sizes_of(tensors)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path} lacks weights of a voice, or has them in other shapes ({shown(error)})") from None
    ours, listed, beside = facts.get(OUR_KEY), facts.get("config"), path.parent / "config.json"
    try:
        if isinstance(ours, dict):
            return VoiceConfig.from_json(ours.get("config"))
        if isinstance(listed, (list, tuple)) and len(listed) == 18:
            if listed[15] != sizes["speakers"]:
                say(f"note: {path.name} says {shown(listed[15])} speakers and has weights of {sizes['speakers']}: those count")
            return full_config(sizes, listed[17], 2 * (listed[0] - 1), listed[12], listed[11])
        beside = read_json(beside) if beside.is_file() else None
        if isinstance(beside, dict) and beside.keys() == vars(VoiceConfig()).keys():  # of a checkpoint of ours
            return VoiceConfig.from_json(beside)
        if rest := from_run_config(beside):
            return full_config(sizes, *rest)
        return official_config(path, sizes, tensors)
    except UserError as error:
        raise UserError(f"{path}: its architecture cannot be told: {error}") from None
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{path}: its architecture cannot be told: a list, text or number is missing where it belongs") from None


def full_config(sizes: dict, rate, n_fft, rates, dilations, win=None, mels=None) -> VoiceConfig:
    """The configuration of the shapes' sizes and of what they do not tell. Errors of any kind where that cannot be."""
    win, mels = win or n_fft, mels or {40000: 125, 48000: 128}.get(rate, 80)  # the official ones
    spectrum = {"sample_rate": rate, "n_fft": n_fft, "hop": math.prod(rates), "win": win, "mels": mels}
    return VoiceConfig(**{**spectrum, **sizes, "upsample_rates": rates, "resblock_dilations": dilations})


def sizes_of(tensors: dict) -> dict:
    """Settings of VoiceConfig that the shapes of the weights tell. Errors of any kind where they are no voice's."""
    shape = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    hidden, content = shape["enc_p.emb_phone.weight"]
    filters, _, kernel = shape["enc_p.encoder.ffn_layers.0.conv_1.weight"]
    first = shape["dec.conv_pre.weight"]
    speakers, gin = shape["emb_g.weight"]
    stages = count_numbered(shape, r"dec\.ups\.(\d+)\.weight_v")
    per_stage = count_numbered(shape, r"dec\.resblocks\.(\d+)\.convs\d?\.0\.weight_v") // stages
    convs = "convs1" if "dec.resblocks.0.convs1.0.weight_v" in shape else "convs"
    sizes = {
        "content_width": content,
        "f0": "enc_p.emb_pitch.weight" in shape,
        "inter_channels": first[1],
        "hidden_channels": hidden,
        "filter_channels": filters,
        "n_heads": hidden // shape["enc_p.encoder.attn_layers.0.emb_rel_k"][2],
        "n_layers": count_numbered(shape, r"enc_p\.encoder\.ffn_layers\.(\d+)\.conv_1\.weight"),
        "kernel_size": kernel,
        "resblock": "1" if convs == "convs1" else "2",
        "resblock_kernels": tuple(shape[f"dec.resblocks.{i}.{convs}.0.weight_v"][2] for i in range(per_stage)),
        "upsample_initial": first[0],
        "upsample_kernels": tuple(shape[f"dec.ups.{i}.weight_v"][2] for i in range(stages)),
        "speakers": speakers,
        "gin_channels": gin,
    }
    if "enc_q.pre.weight" in shape:
        sizes["n_fft"] = 2 * (shape["enc_q.pre.weight"][1] - 1)
    return sizes


def count_numbered(names, pattern: str) -> int:
    """How many numbers the layers of a list go by."""
    return len({found[1] for name in names if (found := re.fullmatch(pattern, name))})


def official_config(path: Path, sizes: dict, tensors: dict) -> VoiceConfig:
    """The official architecture that fits weights without a configuration. UserError where none does, or several do."""
    fits = {}
    for rate, version in product((32000, 40000, 48000), ("v1", "v2")):
        known = VoiceConfig.of_rate(rate, version, sizes["f0"])
        same = known.upsample_kernels == sizes["upsample_kernels"] and sizes.get("n_fft", known.n_fft) == known.n_fft
        if sizes["f0"] and same:  # the source is brought to each stage's rate by a kernel of twice the samples that are left
            later = known.upsample_rates[1:]
            first = tensors.get("dec.noise_convs.0.weight")
            same = first is not None and first.shape[-1] == 2 * math.prod(later)
        if same:
            fits.setdefault((rate, known.upsample_rates), known)
    named = re.search(r"(32|40|48)k", path.name)
    if len(fits) > 1 and named:
        fits = {key: known for key, known in fits.items() if key[0] == int(named[1]) * 1000}
    if len(fits) != 1:
        rates = " or ".join(f"{rate // 1000}k" for rate, _ in fits) or "none of 32k, 40k, 48k"
        raise UserError(
            f"its layers are those of {rates}, and it does not say which; put the config.json of its training beside it, or its "
            "rate in its name, as in G_48k.pth"
        )
    (known,) = fits.values()
    parts = count_numbered(tensors, r"dec\.resblocks\.0\.convs\d?\.(\d+)\.weight_v")
    dilations = (known.resblock_dilations[0][:parts],) * len(sizes["resblock_kernels"])
    return VoiceConfig(**{**vars(known), **sizes, "resblock_dilations": dilations})


def from_run_config(content) -> tuple | None:
    """What the config.json in a training folder of RVC or Applio says that shapes do not, as `full_config` takes it.

    None for a config.json of anything else.
    """
    parts = [content.get(key) if isinstance(content, dict) else None for key in ("data", "model")]
    data, model = (part if isinstance(part, dict) else {} for part in parts)
    rate = data.get("sampling_rate", data.get("sample_rate"))
    needed = (rate, data.get("filter_length"), model.get("upsample_rates"), model.get("resblock_dilation_sizes"))
    return None if None in needed else (*needed, data.get("win_length"), data.get("n_mel_channels"))


# ---- training folders of RVC and Applio ------------------------------------------------------------------------------


def is_run_folder(folder: Path) -> bool:
    return any(folder.glob("[GD]_*.pth"))


def newest_pair(folder: Path) -> tuple[Path, VoiceFile]:
    """(file, voice) of the newest G_*.pth in a training folder that is whole and has its whole D_*.pth; said in a line.

    Newer ones that are damaged, or without the other half, are named. UserError where no pair is whole.
    """
    number = re.compile(r"G_(\d{1,18})\.pth")
    files = [(int(found[1]), path) for path in folder.glob("G_*.pth") if (found := number.fullmatch(path.name))]
    passed = []
    for _, path in sorted(files, reverse=True):
        other = path.with_name(discriminator_of(path.name))
        try:
            if not other.is_file():
                raise UserError(f"{path.name} has no {other.name}")
            read_discriminator(other)
            voice = read_voice(path)
        except UserError as error:
            passed.append(str(error).replace(f"{folder}/", ""))
            continue
        if passed:
            say(f"passed over in {folder}: {'; '.join(passed)}")
        say(f"{folder} is a training folder: its newest whole pair is {path.name} and {other.name}, taken from here")
        return path, voice
    raise UserError(f"{folder} has no whole pair of G_*.pth and D_*.pth: {'; '.join(passed) or 'no file is numbered'}")
