"""Trains a DDPM (Ho, Jain, Abbeel 2020, Algorithm 1) and saves it as a pipeline that diffusers opens.

    accelerate launch training/train.py --data path/to/pictures        # the settings follow the pictures
    accelerate launch training/train.py --config digits                # a preset, or a YAML file
    accelerate launch training/train.py --config cifar10 --data path/to/images --image_size 64 --output_dir runs/mine
    python training/train.py --config mnist --steps 100 --dry_run      # shows what it would do

--help lists the keys: each is one of a YAML file too.
"""

import sys

from ddpm_hf.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]], "train.py")
