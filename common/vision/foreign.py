"""What people bring in the own format of a program that is not read here: it is called by its name."""

import contextlib
import os
from pathlib import Path

from common.samples import files_below

FOREIGN_ENDINGS = (".json", ".jsonl", ".xml", ".csv", ".parquet")
FILES_LOOKED_AT = 20
# What all stands in the first 64 kB of a file, in small letters -> whose it is.
PROGRAMS = {
    (b'"shapes"', b'"imagepath"'): "LabelMe's JSON",
    (b'"regions"', b'"shape_attributes"'): "VGG Image Annotator's own JSON",
    (b"region_shape_attributes",): "VGG Image Annotator's own CSV",
    (b'"classtitle"',): "Supervisely's JSON",
    (b'"annotations"', b'"result"', b'"data"'): "Label Studio's own JSON",
    (b"annotation_id", b"annotator"): "Label Studio's own CSV",
    (b'"categories"', b'"items"'): "Datumaro's JSON",
    (b'"annotations"', b'"coordinates"'): "CreateML's JSON",
    (b'"classes"', b'"labels"'): "FiftyOne's own JSON",
    (b"<annotations>", b"<version>"): "CVAT's own XML",
    (b"xmin", b"ymin"): "a table of boxes",
    (b"bbox",): "a table of boxes",
    (b"par1",): "Parquet, as the Hugging Face hub keeps data",
}


def program_hint(file, name: str = "it") -> str:
    """What an error about a file may end in: "; it looks like LabelMe's JSON ..."; empty where nothing in it tells."""
    with contextlib.suppress(OSError), open(file, "rb") as opened:
        head = opened.read(2**16).lower()
        for words, program in PROGRAMS.items():
            if all(word in head for word in words):
                return f"; {name} looks like {program}, which is not read here: export or convert it"
    return ""


def foreign_hint(data_dir: Path) -> str:
    """The same of the first file in a folder that tells."""
    files = [path for path in files_below(data_dir) if path.lower().endswith(FOREIGN_ENDINGS)][:FILES_LOOKED_AT]
    return next(filter(None, (program_hint(path, os.path.relpath(path, data_dir)) for path in files)), "")
