"""Trains a classifier of noisy images for classifier guidance (Dhariwal & Nichol 2021, section 4: "ADM") and saves it.

    accelerate launch training/train_classifier.py --config digits --pipeline runs/digits-classes/pipeline
    python training/train_classifier.py --config mnist --steps 100 --dry_run

With --pipeline it is trained on that pipeline's process, and saved with it as <output_dir>/pipeline too. --help lists the keys:
each is one of a YAML file too.
"""

import sys

from ddpm_hf.cli import main

if __name__ == "__main__":
    main(["train-classifier", *sys.argv[1:]], "train_classifier.py")
