"""Print a script that completes the commands of mpilm and their settings in bash, zsh or fish.

$ source <(mpilm completion bash)      # in zsh: source <(mpilm completion zsh)
$ mpilm completion bash > ~/.local/share/bash-completion/completions/mpilm
$ mpilm completion fish > ~/.config/fish/completions/mpilm.fish
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from mpilm.__main__ import COMMANDS
from mpilm.config.parse import parse
from mpilm.errors import ConfigError
from mpilm.launch.local import run_local

BASH = """_mpilm() {{
    local words="{commands} --help --version" word="${{COMP_WORDS[COMP_CWORD]}}"
    if [ "$COMP_CWORD" -gt 1 ]; then
        case "${{COMP_WORDS[1]}}:$word" in
{cases}
            *) words="" ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _mpilm mpilm
"""
SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class CompletionArguments:
    """The shell."""

    shell: Annotated[str, Positional, arg(metavar="SHELL")] = ""  # bash, zsh or fish.


def list_settings() -> dict[str, list[str]]:
    """Return the flags of every other command."""
    settings, arguments = dict[str, list[str]](), sys.argv
    for name in (name for name in COMMANDS if name != "completion"):
        module = importlib.import_module(f"mpilm.{name}")
        module = importlib.import_module(f"mpilm.{name}.__main__") if hasattr(module, "__path__") else module
        try:
            sys.argv = [name, "--list-settings"]
            module.main()
        except SystemExit as stop:
            settings[name] = stop.args[0].split()
    sys.argv = arguments
    return settings


def make_script(shell: str, settings: Mapping[str, Sequence[str]]) -> str:
    """Return the script for a shell; after a flag the shell completes names of files."""
    if shell == "fish":
        lines = [f"complete -c mpilm -n __fish_use_subcommand -f -a {name} -d '{text}'" for name, text in COMMANDS.items()]
        for name, flags in settings.items():
            lines += [f"complete -c mpilm -n '__fish_seen_subcommand_from {name}' -l {flag[2:]} -r" for flag in flags]
        return "\n".join(lines) + "\n"
    cases = "\n".join(f'            {name}:-*) words="{" ".join(flags)}" ;;' for name, flags in settings.items())
    script = BASH.format(commands=" ".join(COMMANDS), cases=cases)
    return script if shell == "bash" else f"autoload -Uz compinit bashcompinit && compinit && bashcompinit\n{script}"


def main() -> Callable[[], None]:
    shell = parse(sys.argv[1:], CompletionArguments(), "completion", __doc__ or "", positional="shell").shell
    if shell not in SHELLS:
        raise ConfigError(f"name a shell: {', '.join(SHELLS)}")
    return lambda: print(make_script(shell, list_settings()), end="")


if __name__ == "__main__":
    run_local(main)
