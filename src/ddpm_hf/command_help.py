"""What the --help of all commands has in common. Imports nothing slow."""


def command_words(program: str) -> list[str]:
    """The words with which a shell calls a program: a script of training/ is run by python."""
    return ["python", f"training/{program}"] if program.endswith(".py") else program.split()


def format_examples(command: str, examples: list[tuple[str, str]]) -> str:
    """Lines of commands, each given by its arguments and a comment; the comments stand in one column."""
    lines = [(f"  {command} {arguments}", comment) for arguments, comment in examples]
    width = max((len(line) for line, comment in lines if comment), default=0) + 2
    return "\n".join(f"{line:{width}}# {comment}" if comment else line for line, comment in lines)
