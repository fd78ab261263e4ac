"""Makes the small base models that come with the tasks, from scratch, each on a synthetic source domain.

    python scripts/make_demo_base.py detection                             # writes image_tasks/detection/demo_base/
    python scripts/make_demo_base.py detection --steps 4 --output_dir /tmp/base      # a smoke run, seconds

You need this only to change a base: they are part of the project. A base is made in a fixed number of steps from a fixed seed,
so on one machine with one thread the same call gives the same weights.
"""

import sys
from pathlib import Path

# Runs without installing: the nearest parent folder that holds common/ goes on the path.
ROOT = next((p for p in Path(__file__).resolve().parents if (p / "common").is_dir()), Path.cwd())
sys.path.insert(0, str(ROOT))

from common.config import UserError, cli, parse  # noqa: E402

TASKS = ("classification", "clip", "detection", "medical", "pose", "voice")


def recipe(task):
    """(settings, function that makes the base) of a task; each recipe is a file beside this one."""
    if task == "classification":
        from base_classification import ClassificationConfig, make_classification

        return ClassificationConfig, make_classification
    if task == "clip":
        from base_clip import ClipConfig, make_clip

        return ClipConfig, make_clip
    if task == "detection":
        from base_detection import DetectionConfig, make_detection

        return DetectionConfig, make_detection
    if task == "medical":
        from base_medical import MedicalBaseConfig, make_medical

        return MedicalBaseConfig, make_medical
    if task == "pose":
        from base_pose import PoseConfig, make_pose

        return PoseConfig, make_pose
    from base_voice import VoiceBaseConfig, make_voice

    return VoiceBaseConfig, make_voice


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("-h", "--help"):
        print(f"{__doc__}\nTasks: {', '.join(TASKS)}. Their settings: python scripts/make_demo_base.py TASK --help")
        return
    if not argv or argv[0] not in TASKS:
        raise UserError(f"name a task first: {', '.join(TASKS)}")
    config, make = recipe(argv[0])
    make(parse(config, argv[1:]))


if __name__ == "__main__":
    cli(main)
