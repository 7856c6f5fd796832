"""Publish a saved pipeline on the Hub in one commit: weights, configs, source, model card, pictures and results.

    python training/push.py runs/digits/pipeline --repo_id user/digits --license apache-2.0

Other files of the run are not uploaded. The model card is rewritten for the repository, unless it was edited by hand. The
command can be repeated; files that the repository already has are not uploaded again.
"""

import sys

from ddpm_hf.cli import main

if __name__ == "__main__":
    main(["push", *sys.argv[1:]], "push.py")
