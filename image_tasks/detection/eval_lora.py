"""Scores the newest LoRA-tuned detector, as eval.py does the newest fully tuned one.

python eval_lora.py                                      # the newest outputs/detection/lora, on its validation data
python eval_lora.py --checkpoint ~/runs/lora/checkpoints/best --data_dir ~/boxes --split test
"""

from eval import cli, main

if __name__ == "__main__":
    cli(main, method="lora", doc=__doc__)
