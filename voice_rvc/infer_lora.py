"""Converts recordings into the newest voice that was tuned with LoRA, as infer.py does into the newest fully tuned one.

python infer_lora.py --input speech.wav                  # or a folder, or a glob in quotes: "talks/*.mp3"
python infer_lora.py --input talks/ --no-merge           # adapter beside the weights: the same voice, slower
"""

from infer import cli, main

if __name__ == "__main__":
    cli(main, method="lora", doc=__doc__)
