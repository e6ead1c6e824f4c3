"""Which files below a folder are left out: by the rules that git would read, and by patterns of the caller."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Container, Sequence
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from pathspec import GitIgnoreSpec

from .text import OnNote, file_name

if TYPE_CHECKING:
    from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern

REPOSITORY, RULES = ".git", ".gitignore"

# A star of a pattern in the regular expressions of pathspec; the characters and classes between two of them.
_STAR = "[^/]*"
_STARS = re.compile(rf"(?:{re.escape(_STAR)})+")
_BETWEEN_STARS = re.compile(
    rf"{re.escape(_STAR)}((?:\\.|\[\^?\]?(?:\\.|[^\]\\])*\](?!\*)|[^\\\[\]()/*])+)(?={re.escape(_STAR)})"
)


class Rules(NamedTuple):
    """The patterns of one file of rules. They are about the paths below `folder`."""

    folder: str
    spec: GitIgnoreSpec


def is_ignored(rules: Sequence[Rules], path: str, is_folder: bool) -> bool:
    """Whether `rules`, those of outer folders first, leave out `path`, which is below all their folders."""
    for folder, spec in reversed(rules):
        included = spec.check_file(_below(folder, path, is_folder)).include
        if included is not None:
            return included
    return False


def rules_above(root: str, on_note: OnNote) -> list[Rules]:
    """The rules about the folder `root` that are read above it, in the repository around it.

    None if they leave out `root` itself: it is named, so it is meant to be read.
    """
    between = [root]
    while not os.path.lexists(os.path.join(between[-1], REPOSITORY)):
        parent = os.path.dirname(between[-1])
        if parent == between[-1]:
            return []
        between.append(parent)
    rules: list[Rules] = []
    for folder in reversed(between):
        if is_ignored(rules, folder, True):
            return []
        if folder != root:
            names = [name for name in (REPOSITORY, RULES) if os.path.lexists(os.path.join(folder, name))]
            rules = rules_in(folder, names, rules, on_note)
    return rules


def rules_in(folder: str, names: Container[str], rules: Sequence[Rules], on_note: OnNote) -> list[Rules]:
    """The rules about what is in `folder`, which has files of these `names`, given the `rules` from above it.

    A repository inside another one has only rules of its own.
    """
    found = _rules_of_repository(folder, on_note) if REPOSITORY in names else list(rules)
    return found + _read(os.path.join(folder, RULES), folder, on_note) if RULES in names else found


class Excluded:
    """The patterns of the caller, in the syntax of a .gitignore in each folder that is named.

    A pattern may begin with the name of that folder: for `docs`, `old/*.md` and `docs/old/*.md` are the same.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        """Raises ValueError unless every pattern is one that could match something."""
        if isinstance(patterns, str):
            raise ValueError(f"exclude must be a list of patterns, got the text {patterns!r}; write [{patterns!r}]")
        for pattern in patterns:
            if not isinstance(pattern, str) or not _patterns(pattern):
                raise ValueError(f"exclude has {pattern!r}, which matches nothing: give a pattern as in .gitignore")
        self._patterns = list(patterns)
        self._spec = _spec([_patterns(pattern)[0] for pattern in patterns])
        self._used: set[int | None] = set()

    def decide(self, root: str, path: str, is_folder: bool) -> bool | None:
        """Whether to leave out `path`, which is below the folder `root`; None if no pattern is about it."""
        if not self._patterns:
            return None
        found = [self._spec.check_file(_below(above, path, is_folder)) for above in (root, os.path.dirname(root))]
        # As in one .gitignore, the last pattern that matches decides.
        decided = max(found, key=lambda result: -1 if result.index is None else result.index)
        self._used.add(decided.index)
        return decided.include

    def unused(self) -> list[str]:
        """The patterns that have decided nothing."""
        return [pattern for number, pattern in enumerate(self._patterns) if number not in self._used]


def _below(folder: str, path: str, is_folder: bool) -> str:
    """`path` relative to `folder`. The slash after a folder is for patterns that are only about folders."""
    return path[len(folder.rstrip(os.sep)) + 1 :] + "/" * is_folder


def _rules_of_repository(folder: str, on_note: OnNote) -> list[Rules]:
    """The rules that the user has for all repositories, and those of this one that are not in a .gitignore."""
    everywhere = _ask_git(folder, "config", "--get", "--type=path", "core.excludesFile")
    here = _ask_git(folder, "rev-parse", "--git-path", "info/exclude")
    files = (everywhere or os.path.expanduser("~/.config/git/ignore"), here or f"{REPOSITORY}/info/exclude")
    return [rules for file in files for rules in _read(os.path.join(folder, file), folder, on_note)]


def _ask_git(folder: str, *question: str) -> str | None:
    """What git prints; None if it is not installed, or does not know."""
    try:
        run = subprocess.run(["git", "-C", folder, *question], capture_output=True, stdin=subprocess.DEVNULL)
    except OSError:
        return None
    return None if run.returncode else os.fsdecode(run.stdout).rstrip("\n")


def _read(file: str, folder: str, on_note: OnNote) -> list[Rules]:
    """The rules for `folder` in `file`; none if the file is missing or empty."""
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            return []
        with open(file, "rb") as opened:
            lines = opened.read().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        on_note(f"skipped the rules in a file: {error}")
        return []
    patterns = []
    for number, line in enumerate(lines, start=1):
        try:
            patterns += _patterns(os.fsdecode(line.removesuffix(b"\r")))
        except ValueError as error:
            on_note(f"{file_name(file)}, line {number}: {error}; skipped")
    return [Rules(folder, _spec(patterns))] if patterns else []


def _spec(patterns: list[GitIgnoreSpecPattern]) -> GitIgnoreSpec:
    # The other backends of pathspec cannot match names that are not UTF-8.
    return GitIgnoreSpec(patterns, backend="simple")


def _patterns(line: str) -> list[GitIgnoreSpecPattern]:
    """The pattern in a line of a .gitignore; none in an empty line or a comment. ValueError if it is not a pattern."""
    try:
        found = GitIgnoreSpec.from_lines([line], backend="simple").patterns
    except (ValueError, re.error) as error:
        raise ValueError(f"{line!r} is not a pattern ({error})") from error
    patterns = [pattern for pattern in found if pattern.include is not None]
    for pattern in patterns:
        if pattern.regex is not None:
            pattern.regex = re.compile(_linear(pattern.regex.pattern))
    return patterns


def _linear(source: str) -> str:
    """A pattern as a regular expression, with the first match for what is between two stars of a name as the only one.

    That finds the same names: the second star takes whatever is left. Without it, the time grows with the length of a
    name to the power of the stars.
    """
    number = count()
    source = _STARS.sub(lambda stars: _STAR, source)
    return _BETWEEN_STARS.sub(lambda found: "(?=(?P<s{0}>[^/]*?{1}))(?P=s{0})".format(next(number), found[1]), source)
