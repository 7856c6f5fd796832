"""Train a DDPM (Ho, Jain, Abbeel 2020, Algorithm 1) and save it as a pipeline that diffusers can load.

    accelerate launch training/train.py --data path/to/pictures        # settings chosen for the pictures
    accelerate launch training/train.py --config digits                # a preset, or a YAML file
    accelerate launch training/train.py --config cifar10 --data path/to/images --image_size 64 --output_dir runs/mine
    python training/train.py --config mnist --steps 100 --dry_run      # shows the settings without training

--help lists the options. Each is also a key of the YAML file.
"""

import sys

from ddpm_hf.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]], "train.py")
