"""Scores the newest LoRA-tuned CLIP, as eval.py does the newest fully tuned one.

python eval_lora.py                                      # the newest outputs/clip/lora, on its validation data
python eval_lora.py --checkpoint ~/runs/dora/checkpoints/best --data_dir ../data/dogs --split test
"""

from eval import cli, main

if __name__ == "__main__":
    cli(main, method="lora", doc=__doc__)
