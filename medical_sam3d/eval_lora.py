"""Scores the meshes of the newest LoRA-tuned model, as eval.py does those of the newest fully tuned one.

python eval_lora.py                                      # the newest outputs/medical_sam3d/lora, on its validation data
python eval_lora.py --checkpoint ~/runs/lora/checkpoints/best --data_dir ~/Task04_Hippocampus --split test
"""

from eval import cli, main

if __name__ == "__main__":
    cli(main, method="lora", doc=__doc__)
