"""A saved pipeline -> the Hub: weights, configs, source, card, pictures and numbers, in one commit.

    python training/push.py runs/digits/pipeline --repo_id user/digits --license apache-2.0

Nothing else of the run is sent. The card is written anew for that name, unless it was changed by hand. Can be repeated: what
the repository has is not sent again.
"""

import argparse
from pathlib import Path

from ddpm_hf.hub.upload import push_folder


def main(argv: list[str]):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="of a saved pipeline; or of a run, whose pipeline/ is taken")
    parser.add_argument("--repo_id", required=True, help="user/name; made if it is not there")
    parser.add_argument(
        "--license", help="the Hub's name of one, as apache-2.0; if left out, that of the repository's card is kept"
    )
    parser.add_argument("--private", action="store_true", help="where the repository is made: for its owner only")
    parser.add_argument("--revision", help="branch; main if left out")
    parser.add_argument(
        "--create_pr", action="store_true", help="as a pull request; push to main once more when it is merged"
    )
    parser.add_argument("--commit_message")
    parser.add_argument("--token", help="better: `hf auth login`, or HF_TOKEN")
    options = vars(parser.parse_args(argv))
    folder = Path(options.pop("folder"))
    if not (folder / "model_index.json").is_file() and (folder / "pipeline").is_dir():
        folder = folder / "pipeline"
    options["private"] = options["private"] or None  # leave it to the owner's default
    info = push_folder(folder, options.pop("repo_id"), **options)
    print(f"published {info.pr_url or info.commit_url}")
