"""How a base wants its pictures: sizes, crop and scaling from its image processor, done alike on tensors, and checked."""

import numpy as np
import torch

# needs: torchvision
from common.config import UserError

LONGEST = 100  # times its narrow side a picture may be long where its shortest edge becomes what the model sees


def mean_and_std(processor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, standard deviation), each (3, 1, 1), by which an image processor of transformers scales values of 0 to 1.

    UserError where they are no such numbers.
    """
    if not processor.do_normalize or processor.image_mean is None:
        return torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    try:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
        fits = bool(mean.isfinite().all() and std.isfinite().all() and (std > 0).all())
    except (RuntimeError, TypeError, ValueError):
        fits = False
    if not fits:
        raise UserError("--model: image_mean and image_std of its image processor are not three numbers each, std above 0")
    return mean, std


def example_picture(channels: int, height: int, width: int) -> torch.Tensor:
    """Noise (1, channels, height, width), always the same: what a model does with it shows what its outputs depend on."""
    return torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))


def trained_shape(config) -> tuple[int, int, int]:
    """(channels, height, width) of the pictures that a base with this configuration of transformers is built for.

    224 x 224 where the configuration names no size, as of networks of convolutions.
    """
    timm = getattr(config, "pretrained_cfg", None) or {}
    if timm.get("input_size"):
        return tuple(timm["input_size"])
    parts = (config, getattr(config, "backbone_config", None), getattr(config, "vision_config", None))
    sizes = [getattr(part, key, None) for part in parts for key in ("image_size", "eval_size", "anchor_image_size")]
    size = next((size for size in sizes if size), 224)
    size = size.values() if isinstance(size, dict) else [size] * 2 if isinstance(size, int) else size
    channels = next((part.num_channels for part in parts if getattr(part, "num_channels", None)), 3)
    return (channels, *size)


class ClassifierPreprocess:
    """How a classifier wants its pictures: resized (and cropped), scaled; read from its image processor and checked against it.

    size: [height, width], or [shortest edge]; crop: (height, width) of the middle that is seen, or None for all of it.
    UserError where the processor cannot prepare a picture, or does so in another way.
    """

    def __init__(self, processor):
        try:
            if hasattr(processor, "data_config"):
                self.read_timm(processor.data_config)
            else:
                self.read_transformers(processor)
            self.check(processor)
        except UserError:
            raise
        except Exception as error:  # sizes of -5 or "large", a resample of 99: whatever the libraries make of them
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(f"--model: its image processor cannot prepare a picture: {reason}") from None

    def read_transformers(self, processor) -> None:
        """Size, crop, interpolation, mean and standard deviation as an image processor of transformers has them."""
        from torchvision.transforms.v2 import InterpolationMode

        size, crop = dict(processor.size), dict(getattr(processor, "crop_size", None) or {})
        short = size.get("shortest_edge")
        self.size = [short] if short else [size.get("height"), size.get("width")]
        self.crop = (crop["height"], crop["width"]) if crop and getattr(processor, "do_center_crop", False) else None
        percent = getattr(processor, "crop_pct", None)
        if percent and short:  # ConvNeXt's way: below 384 pixels it crops from something larger, above it does not crop
            self.size, self.crop = ([int(short / percent)], (short, short)) if short < 384 else ([short, short], None)
        modes = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
        self.mode = InterpolationMode(modes[int(processor.resample)])
        self.mean, self.std = mean_and_std(processor)
        self.reverse, self.half = bool(getattr(processor, "do_flip_channel_order", False)), int

    def read_timm(self, config: dict) -> None:
        """Size, crop, interpolation, mean and standard deviation as timm's wrapper of an image processor has them."""
        from torchvision.transforms.v2 import InterpolationMode

        height, width = config["input_size"][1:]
        larger = [int(height / config["crop_pct"]), int(width / config["crop_pct"])]
        self.size = larger if config["crop_mode"] == "squash" else [min(larger)]
        self.crop, self.reverse, self.half = (height, width), False, round
        self.mode = InterpolationMode(config["interpolation"] if config["interpolation"] != "random" else "bicubic")
        self.mean, self.std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))

    def check(self, processor) -> None:
        """UserError unless this class prepares a picture as the processor itself does, to about two grey levels of 255."""
        from PIL import Image

        rows, columns = torch.meshgrid(torch.linspace(0, 255, 300), torch.linspace(0, 255, 400), indexing="ij")
        picture = torch.stack([rows, columns, (rows + columns) / 2], dim=2).to(torch.uint8).numpy()
        theirs = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"][0]
        ours = self.normalize(self.center(self.resize(picture)))
        fits = ours.shape == theirs.shape and tuple(ours.shape[1:]) == self.shape  # the last: all pictures get one shape
        if not fits or not float(((ours - theirs).abs() * self.std * 255).max()) <= 2.5:  # NaN is not
            raise UserError(
                f"--model: its image processor ({type(processor).__name__}) prepares pictures in a way that is not known here"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) that the model sees."""
        return self.crop or (self.size[0], self.size[-1])

    def resize(self, pixels: np.ndarray) -> torch.Tensor:
        """(H, W, 3) uint8 -> (3, h, w) uint8, of a fixed size or with a fixed shortest edge, as the base's processor does.

        ValueError as in resized_shape.
        """
        from torchvision.transforms.v2 import functional

        self.resized_shape(*pixels.shape[:2])
        return functional.resize(torch.from_numpy(pixels).permute(2, 0, 1), self.size, self.mode, antialias=True)

    def resized_shape(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of what `resize` makes of a picture of this size. ValueError where that would be far too long."""
        if len(self.size) == 2:
            return tuple(self.size)
        if max(height, width) > LONGEST * min(height, width):  # 1 x 10,000 pixels would become 1.5 GB
            raise ValueError(f"picture that is more than {LONGEST} times as long as it is narrow, {width} x {height} pixels")
        short, long = self.size[0], int(self.size[0] * max(height, width) / min(height, width))
        return (short, long) if height <= width else (long, short)

    def center(self, tensor: torch.Tensor) -> torch.Tensor:
        """The crop in the middle; where an odd number of pixels is cut off, transformers and timm cut differently."""
        from torchvision.transforms.v2 import functional

        if not self.crop:
            return tensor
        sides = zip(tensor.shape[1:], self.crop, strict=True)
        top, left = (max(0, self.half((have - want) / 2)) for have, want in sides)
        part = tensor[:, top : top + self.crop[0], left : left + self.crop[1]]
        return functional.center_crop(part, list(self.crop))  # pads where the picture is smaller

    def normalize(self, tensor: torch.Tensor) -> torch.Tensor:
        """uint8 (3, h, w) -> float32 with the base's mean, standard deviation and order of channels."""
        tensor = tensor.flip(0) if self.reverse else tensor
        return (tensor.float() / 255 - self.mean) / self.std
