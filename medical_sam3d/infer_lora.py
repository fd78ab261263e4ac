"""Makes meshes with the newest model that was tuned with LoRA, as infer.py does with the newest fully tuned one.

python infer_lora.py --input segmentation.nii.gz         # or a folder, or a glob in quotes: "labels/*.nii.gz"
python infer_lora.py --input masks/ --no-merge           # adapter beside the weights: the same meshes, slower
"""

from infer import cli, main

if __name__ == "__main__":
    cli(main, method="lora", doc=__doc__)
