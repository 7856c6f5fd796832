"""What the --help and the messages of all commands have in common. Imports nothing slow."""

import difflib
import shutil

MOST_COLUMNS, FEWEST_COLUMNS = 120, 60


def help_width() -> int:
    """Columns of --help: those of the terminal, or of COLUMNS, within limits."""
    return min(MOST_COLUMNS, max(FEWEST_COLUMNS, shutil.get_terminal_size((MOST_COLUMNS, 24)).columns))


def command_words(program: str) -> list[str]:
    """The words with which a shell calls a program: a script of training/ is run by python."""
    return ["python", f"training/{program}"] if program.endswith(".py") else program.split()


def format_examples(command: str, examples: list[tuple[str, str]]) -> str:
    """Lines of commands, each given by its arguments and a comment.

    The comments stand in one column, or if that is too wide, above the commands.
    """
    lines = [(f"  {command} {arguments}", comment) for arguments, comment in examples]
    width = max((len(line) for line, comment in lines if comment), default=0) + 2
    if width + 2 + max(len(comment) for _, comment in lines) > help_width():
        return "\n".join(f"  # {comment}\n{line}" if comment else line for line, comment in lines)
    return "\n".join(f"{line:{width}}# {comment}" if comment else line for line, comment in lines)


def did_you_mean(name: str, valid_names: list[str]) -> str:
    """Return the end of a message about an unknown name: the nearest valid name, or nothing."""
    longer = [valid for valid in valid_names if valid.startswith(name)]
    close = longer if len(longer) == 1 else difflib.get_close_matches(name, valid_names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
