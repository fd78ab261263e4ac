"""Scores the newest LoRA-tuned classifier, as eval.py does the newest fully tuned one.

python eval_lora.py                                      # the newest outputs/classification/lora, on its validation data
python eval_lora.py --checkpoint ~/runs/lora/checkpoints/best --data_dir ~/pictures --split test
"""

from eval import cli, main

if __name__ == "__main__":
    cli(main, method="lora", doc=__doc__)
