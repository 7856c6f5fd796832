"""A saved pipeline and a data set -> bits/dim: the variational bound of Ho, Jain, Abbeel 2020, term by term, or the ODE's.

    python training/evaluate.py runs/digits/pipeline --data digits --split test
    python training/evaluate.py google/ddpm-cifar10-32 --data uoft-cs/cifar10 --split test --estimate 50 --out measured
    python training/evaluate.py runs/digits-vp/pipeline --data digits --ode      # Score-SDE, section 4.3

Takes any DDPM folder or Hub id, diffusers' own included; networks of continuous time have --ode alone. Background, crop,
columns and names of the labels are those of the training, as the pipeline's config has them. Prints a table; writes
evaluation.json and, where every term was computed, each of them as evaluation.csv and the plot evaluation.png: into --out, or
beside the weights of a run of train.py, whose model card is brought up to date unless it was changed by hand.
"""

import sys

from ddpm_hf.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]], "evaluate.py")
