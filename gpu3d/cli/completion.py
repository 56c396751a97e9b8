# SPDX-License-Identifier: Apache-2.0
"""Print a script that makes Tab complete this command in a shell."""

from __future__ import annotations

import argparse

from gpu3d.cli import files

EXAMPLE = """gpu3d completion bash >> ~/.bashrc"""
NOTES = "It is read when the shell starts: by ~/.bashrc, ~/.zshrc, or ~/.config/fish/completions/gpu3d.fish."


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell, as gpu3d completion zsh")


def run(arguments: argparse.Namespace, stop: files.Stop) -> int:
    """Run the verb; returns the exit code."""
    from gpu3d.cli import parser  # which imports this module

    verbs = _verbs(parser())
    print(_fish(verbs) if arguments.shell == "fish" else _bash(verbs, arguments.shell == "zsh"))
    return 0


def _verbs(whole: argparse.ArgumentParser) -> dict[str, tuple[str, list[argparse.Action]]]:
    """The help and the options of every verb. argparse has no public names for them."""
    (commands,) = (action for action in whole._actions if isinstance(action, argparse._SubParsersAction))
    helps = {choice.dest: choice.help or "" for choice in commands._choices_actions}
    return {name: (helps[name], one._actions) for name, one in commands.choices.items()}


def _bash(verbs: dict[str, tuple[str, list[argparse.Action]]], for_zsh: bool) -> str:
    lines = ["autoload -U +X compinit && compinit", "autoload -U +X bashcompinit && bashcompinit"] if for_zsh else []
    lines += [
        "_gpu3d() {",
        '    local current="${COMP_WORDS[COMP_CWORD]}" words=""',
        '    case "$COMP_CWORD ${COMP_WORDS[1]} ${COMP_WORDS[COMP_CWORD-1]} $current" in',
        f'        "1 "*) words="{" ".join(verbs)}" ;;',
    ]
    for name, (_, actions) in verbs.items():
        for action in actions:
            if action.choices and action.option_strings:
                words = " ".join(map(str, action.choices))
                lines += [f'        *" {name} {option} "*) words="{words}" ;;' for option in action.option_strings]
    for name, (_, actions) in verbs.items():
        options = " ".join(option for action in actions for option in action.option_strings)
        lines.append(f'        *" {name} "*" -"*) words="{options}" ;;')
        for action in actions:
            if action.choices and not action.option_strings:
                lines.append(f'        *" {name} "*) words="{" ".join(map(str, action.choices))}" ;;')
    return "\n".join(
        [
            *lines,
            "    esac",
            '    COMPREPLY=($(compgen -W "$words" -- "$current"))',
            "}",
            "complete -o default -F _gpu3d gpu3d",  # default: names of files, where there are no words
        ]
    )


def _fish(verbs: dict[str, tuple[str, list[argparse.Action]]]) -> str:
    lines = []
    for name, (text, actions) in verbs.items():
        lines.append(f"complete -c gpu3d -n __fish_use_subcommand -f -a {name} -d {_quoted(text)}")
        for action in actions:
            line = f"complete -c gpu3d -n '__fish_seen_subcommand_from {name}'"
            words = f" -f -a {_quoted(' '.join(map(str, action.choices)))}" if action.choices else ""
            for option in action.option_strings:
                line += f" -l {option[2:]}" if option.startswith("--") else f" -s {option[1:]}"
            if action.option_strings and action.nargs != 0:
                line += " -r"
            if action.option_strings or words:
                lines.append(f"{line}{words} -d {_quoted((action.help or '').partition(' (')[0])}")
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
