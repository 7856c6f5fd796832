"""A saved pipeline -> the Hub: weights, configs, source, card, pictures and numbers, in one commit.

    python training/push.py runs/digits/pipeline --repo_id user/digits --license apache-2.0

Nothing else of the run is sent. The card is written anew for that name, unless it was changed by hand. Can be repeated: what
the repository has is not sent again.
"""

import sys

from ddpm_hf.cli import main

if __name__ == "__main__":
    main(["push", *sys.argv[1:]], "push.py")
