"""Scores the newest LoRA-tuned voice, as eval.py does the newest fully tuned one.

python eval_lora.py                                      # the newest outputs/voice_rvc/lora, on its validation data
python eval_lora.py --checkpoint ~/runs/lora/checkpoints/best --source_dir ~/others --split test
"""

from eval import cli, main

if __name__ == "__main__":
    cli(main, method="lora", doc=__doc__)
