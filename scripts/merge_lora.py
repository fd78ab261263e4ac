"""Merges an adapter into its base: a plain model in the base's own format, which needs neither adapter nor base.

    python scripts/merge_lora.py outputs/detection/lora                      # outputs/detection/lora_merged
    python scripts/merge_lora.py outputs/clip/lora --output_dir ~/dogs

Merged in float32, whatever it was trained in. The folder is one that train.py might have left: from_pretrained loads it (a
voice and a mesh decoder: this project, rvc_checkpoint.py and sam3d_checkpoint.py), --model takes it as a base, eval.py and
infer.py as a checkpoint. A head that trained alone merges, too. Before the folder gets its name, the adapter beside its base,
the merged model and the one read back from disk must answer alike on real samples.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import Range, UserError, cli, parse  # noqa: E402
from parity import TOLERANCE, check  # noqa: E402
from task_modules import (  # noqa: E402
    answers_of,
    card_of,
    checkpoint_first,
    is_adapter_beside,
    load,
    orders_queries,
    place_for,
    real_batches,
    task_of,
)


@dataclass
class MergeConfig:
    checkpoint: str = ""  # a LoRA run's folder, or its checkpoints/best; may be the first word, without the flag
    model: str = ""  # where the base is, if not under the name that it had in training
    tolerance: Annotated[float, Range(0, 1)] = TOLERANCE  # by which forms may differ, as a share of an output's largest number
    data_dir: str = ""  # data to compare on; empty: the validation data of the run
    output_dir: str = ""  # the folder to make; empty: beside the run, <run>_merged
    overwrite: bool = False  # replace a folder that is there


def copy_index(folder: Path, aside: Path) -> None:
    """A voice's index, which lies beside its run, goes along."""
    from voice_index import INDEX_FILE, index_of

    if index := index_of(folder):
        shutil.copyfile(index, aside / INDEX_FILE)


def main(argv=None):
    config = parse(MergeConfig, checkpoint_first(argv))
    if not config.checkpoint:
        raise UserError("name a LoRA run: python scripts/merge_lora.py outputs/<task>/lora")
    # Heavy imports wait until the flags are read, so that --help answers at once.
    from common.checkpoint import atomic_folder, folder_bytes
    from common.folders import check_data_dir
    from common.runtime import say
    from common.saved_models import save_model

    folder, origin = task_of(config.checkpoint)
    if origin["method"] == "full":
        raise UserError(f"{folder} is a full fine-tune: it is a plain model already, with nothing to merge")
    out, task = place_for(config.output_dir, folder, "merged", config.overwrite), origin["task"]
    check_data_dir(config.data_dir, origin)
    adapter, processor, origin = load(folder, config.model, merge=False)
    merged, _, _ = load(folder, config.model, merge=True)
    if is_adapter_beside(merged):
        raise UserError(f"the adapter in {folder} cannot be merged: added into its base's weights it would change the answers")
    about = {key: value for key, value in origin.items() if key not in ("quantize", "whole")}
    about |= {"method": "full", "merged": origin["method"]}
    facts = {"made by": f"merge_lora.py from a checkpoint of the method {origin['method']}, merged in float32"}
    batches = real_batches(folder, processor, origin, config.data_dir)
    with atomic_folder(out) as aside:
        save_model(aside, merged, processor, about, card_of(about, f"{task}, merged", facts))
        if task == "voice_rvc":
            copy_index(folder, aside)
        forms = {"adapter": adapter, "merged": merged, "merged from disk": load(aside)[0]}
        check(answers_of(task, forms), batches, config.tolerance, orders_queries(task, merged))
    say(f"{folder_bytes(out):,} bytes, where the adapter has {folder_bytes(folder):,}")
    print(out)


if __name__ == "__main__":
    cli(main)
