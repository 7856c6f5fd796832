"""Measure the bits/dim of a saved pipeline on a data set: the bound of Ho, Jain, Abbeel 2020, or the ODE's likelihood.

    python training/evaluate.py runs/digits/pipeline --data digits --split test
    python training/evaluate.py google/ddpm-cifar10-32 --data uoft-cs/cifar10 --split test --estimate 50 --out measured
    python training/evaluate.py runs/digits-vp/pipeline --data digits --ode      # Score-SDE, section 4.3

Accepts any DDPM folder or Hub id, also those saved by diffusers. Continuous-time pipelines need --ode. Images and
labels are read as in training: background, crop, columns and class names come from the pipeline's config. Prints a
table and writes evaluation.json into --out. If every term of the bound was computed, also writes evaluation.csv and the
plot evaluation.png. Without --out, the files of a pipeline trained by train.py go beside its weights, and its model
card is updated, unless it was edited by hand.
"""

import sys

from ddpm_hf.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]], "evaluate.py")
