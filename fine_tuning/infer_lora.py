"""Classifies your pictures with the newest LoRA-tuned CLIP, as infer.py does with the newest fully tuned one.

python infer_lora.py --input photo.jpg                   # or a folder, or a glob in quotes: "shots/*.png"
python infer_lora.py --input shots/ --no-merge           # adapter beside the weights: the same answers, slower
"""

from infer import cli, main

if __name__ == "__main__":
    cli(main, method="lora", doc=__doc__)
