"""Train a classifier of noisy images for classifier guidance (ADM: Dhariwal & Nichol 2021, section 4) and save it.

    accelerate launch training/train_classifier.py --config digits --pipeline runs/digits-classes/pipeline
    python training/train_classifier.py --config mnist --steps 100 --dry_run

With --pipeline the classifier is trained on that pipeline's diffusion process, and both are also saved together as
<output_dir>/pipeline. --help lists the options. Each is also a key of the YAML file.
"""

import sys

from ddpm_hf.cli import main

if __name__ == "__main__":
    main(["train-classifier", *sys.argv[1:]], "train_classifier.py")
