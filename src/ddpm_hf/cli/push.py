"""`ddpm-hf push`: a saved pipeline -> the Hub."""

from pathlib import Path

from ddpm_hf.cli.parser import Parser, hide_progress_in_logs
from ddpm_hf.errors import UserError
from ddpm_hf.files.missing import did_you_mean_path, pipeline_of_run


def make_parser(program: str = "ddpm-hf push") -> Parser:
    """The options of the command."""
    parser = Parser(
        program,
        "FOLDER --repo_id USER/NAME [--OPTION VALUE ...]",
        "Publish a saved pipeline on the Hub: weights, configs, source, model card, pictures and numbers, in one commit.\n"
        "Nothing else of the run is sent. The card is written anew for that name, unless it was changed by hand.\n"
        "Can be repeated: files that the repository has are not sent again.",
        [
            ("runs/digits/pipeline --repo_id user/digits --license apache-2.0", ""),
            ("runs/digits/pipeline --repo_id user/digits --create_pr", ""),
        ],
    )
    add = parser.group("what to publish")
    add("folder", metavar="FOLDER", help="folder of a saved pipeline, or of a run, whose pipeline/ is taken")
    add("--repo_id", metavar="USER/NAME", required=True, help="repository; created if it does not exist")
    add("--license", metavar="NAME", help="the Hub's name of a license, as apache-2.0 (that of the repository's card)")
    add("--private", action="store_true", help="create the repository for its owner only")
    add = parser.group("how to publish")
    add("--revision", metavar="BRANCH", help="branch (main)")
    add("--create_pr", action="store_true", help="as a pull request; push to main again when it is merged")
    add("--commit_message", metavar="TEXT", help="message of the commit")
    add("--token", metavar="TOKEN", help="token of the Hub; `hf auth login` or HF_TOKEN is better")
    add("-h", "--help", action="help", help="show this and stop")
    return parser


def main(argv: list[str], program: str) -> None:
    options = vars(make_parser(program).parse_args(argv))
    folder = Path(options.pop("folder"))
    if not folder.exists():
        raise UserError(f"there is no folder {str(folder)!r} here{did_you_mean_path(folder)}")

    from ddpm_hf.hub.upload import push_folder

    hide_progress_in_logs()
    options["private"] = options["private"] or None  # leave it to the owner's default
    info = push_folder(pipeline_of_run(folder) or folder, options.pop("repo_id"), **options)
    print(f"published {info.pr_url or info.commit_url}")
