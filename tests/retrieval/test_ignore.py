"""Which files are left out: git is asked what it ignores, and every other rule has its case."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pathspec import GitIgnoreSpec

from modernbert.retrieval import index
from modernbert.retrieval.documents.find import find_files
from modernbert.retrieval.documents.ignore import _patterns, _spec
from modernbert.retrieval.store.request import IndexRequest, read_request, resume_command, write_request

NAMES = ["a.md", "b.md", "keep.md", "build/x.md", "build/keep.md", "sub/a.md", "sub/build/x.md", "sub/deep/b.md"]
NAMES += ["sub/deep/notes/a.md", "é.md", "two words.md", "#tag.md", "!odd.md", "[x].md", "sub/trailing .md"]
CASES = {
    "names": {".gitignore": "a.md\n# comment\n\nbuild/\n"},
    "anchored": {".gitignore": "/a.md\nsub/build\n"},
    "negation": {".gitignore": "*.md\n!keep.md\n!sub/\n!sub/a.md\n"},
    "a file in an ignored folder does not come back": {".gitignore": "build/\n!build/keep.md\n"},
    "a file in a folder whose content is ignored comes back": {".gitignore": "build/*\n!build/keep.md\n"},
    "nested": {
        ".gitignore": "*.md\n",
        "sub/.gitignore": "!a.md\n/deep/notes\n!b.md\n",
        "sub/deep/.gitignore": "b.md\n",
    },
    "stars": {".gitignore": "**/deep/**\nsub/**/x.md\n"},
    "only folders": {".gitignore": "a.md/\nbuild/\n"},
    "escapes": {".gitignore": "\\#tag.md\n\\!odd.md\n\\[x].md\ntwo\\ words.md\ntrailing\\ .md   \n"},
    "ranges": {".gitignore": "[ab].md\n[!a-zé].md\n[z-a].md\n[\n"},
    "line ends and a mark": {".gitignore": "\ufeffa.md\r\nb.md\r\n"},
    "unicode": {".gitignore": "é.md\n?eep.md"},
    "broken lines": {".gitignore": "a.md\\\nfoo\\\nb.md\n/\n!\n"},
    "of the repository": {".git/info/exclude": "a.md\n", "sub/.gitignore": "!a.md\n"},
    "everything": {".gitignore": "*\n"},
}


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """Files, and a home without rules of git."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    (tmp_path / "home").mkdir()
    for name in NAMES:
        write(tmp_path / "tree" / name, name)
    return tmp_path / "tree"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def git(folder: Path, *arguments: str) -> list[str]:
    run = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=True)
    return [os.fsdecode(name) for name in run.stdout.split(b"\0") if name]


def found(*paths: Path, **options) -> list[str]:
    """The files that are read, relative to the first path."""
    return sorted(
        os.path.relpath(file, paths[0]) for file in find_files(paths, **{"on_note": lambda _: None, **options})
    )


@pytest.mark.parametrize("name", CASES)
def test_git_ignores_the_same(tree, name):
    git(tree, "init", "-q")
    for file, rules in CASES[name].items():
        write(tree / file, rules)
    seen = [file for file in git(tree, "ls-files", "-z", "--others", "--exclude-standard") if file.endswith(".md")]
    assert found(tree) == sorted(seen)
    assert found(tree, gitignore=False) == sorted(NAMES)
    assert (name == "everything") == (seen == [])


@pytest.mark.parametrize("setting", ["default", "core.excludesFile"])
def test_rules_for_all_repositories_hold_in_one(tree, setting):
    place = Path.home() / (".config/git/ignore" if setting == "default" else "my rules")
    write(place, "a.md\n")
    if setting != "default":
        git(tree, "config", "--global", "core.excludesFile", "~/my rules")
    assert "a.md" in found(tree)
    git(tree, "init", "-q")
    assert not {"a.md", "sub/a.md"} & set(found(tree))
    write(tree / ".gitignore", "!a.md\n")
    assert "sub/a.md" in found(tree)


def test_rules_hold_without_a_repository_and_without_git(tree, monkeypatch):
    write(tree / ".gitignore", "build/\n")
    write(tree / "sub" / ".gitignore", "a.md\n")
    gone = {"build/keep.md", "build/x.md", "sub/build/x.md", "sub/a.md", "sub/deep/notes/a.md"}
    assert found(tree) == sorted(set(NAMES) - gone)
    (tree / ".git" / "info").mkdir(parents=True)
    write(tree / ".git" / "info" / "exclude", "keep.md\n")
    monkeypatch.setenv("PATH", "")
    assert "keep.md" not in found(tree)


def test_a_part_of_a_repository_has_the_rules_of_the_whole(tree):
    git(tree, "init", "-q")
    write(tree / ".gitignore", "/sub/a.md\nnotes/\n")
    assert found(tree / "sub") == sorted(["build/x.md", "deep/b.md", "trailing .md"])


def test_what_is_named_is_read_in_spite_of_the_rules(tree):
    """A folder with all that only the rules above it leave out, a file, and both below a folder that is named too."""
    git(tree, "init", "-q")
    write(tree / ".gitignore", "build/\n*.md\n")
    assert found(tree / "sub", tree / "sub" / "a.md") == ["a.md"]
    write(tree / ".gitignore", "build/\n")
    assert found(tree / "build") == ["keep.md", "x.md"]
    assert "build/x.md" in found(tree, tree / "build")
    assert "sub/build/x.md" not in found(tree, tree / "build")


def test_a_repository_inside_another_has_its_own_rules(tree):
    git(tree, "init", "-q")
    git(tree / "sub", "init", "-q")
    write(tree / ".gitignore", "a.md\n")
    write(tree / "sub" / ".gitignore", "b.md\n")
    assert {"a.md", "sub/deep/b.md"}.isdisjoint(found(tree))
    assert {"b.md", "sub/a.md"} <= set(found(tree))


def test_rules_that_cannot_be_read_are_noted(tree, monkeypatch):
    notes: list[str] = []
    write(tree / ".gitignore", "a.md\n[z-a]\n")
    assert "a.md" not in found(tree, on_note=notes.append)
    assert any(note.startswith(f"{tree}/.gitignore, line 2: '[z-a]' is not a pattern") for note in notes)
    (tree / ".gitignore").unlink()
    os.mkfifo(tree / ".gitignore")
    assert "a.md" in found(tree)
    (tree / ".gitignore").unlink()
    (tree / ".gitignore").symlink_to(".gitignore")
    notes.clear()
    assert "a.md" in found(tree, on_note=notes.append)
    assert notes[0].startswith("skipped the rules in a file: ")


@pytest.mark.parametrize(
    ("patterns", "gone"),
    [
        (["a.md"], ["a.md", "sub/a.md", "sub/deep/notes/a.md"]),
        (["/a.md"], ["a.md"]),
        (["build"], ["build/keep.md", "build/x.md", "sub/build/x.md"]),
        (["build/*", "!keep.md"], ["build/x.md"]),
        (["sub/build/"], ["sub/build/x.md"]),
        (["tree/sub/build"], ["sub/build/x.md"]),
        (["tree/*.md", "!tree/[bk]*.md"], [name for name in NAMES if "/" not in name and name[0] not in "bk"]),
        (["é.md", "two words.md"], ["two words.md", "é.md"]),
        ([], []),
    ],
)
def test_patterns_of_the_caller_leave_out(tree, patterns, gone):
    """Relative to the folder that is named, or beginning with its name; the last one that matches decides."""
    assert found(tree, exclude=patterns) == sorted(set(NAMES) - set(gone))


def test_patterns_of_the_caller_come_before_those_of_git(tree):
    write(tree / ".gitignore", "a.md\n")
    assert {"a.md", "sub/a.md"} & set(found(tree, exclude=["!/a.md"])) == {"a.md"}
    assert {"a.md", "b.md"} & set(found(tree, exclude=["b.md"])) == set()
    assert {"a.md", "b.md"} & set(found(tree, exclude=["b.md"], gitignore=False)) == {"a.md"}


def test_a_named_file_or_folder_can_be_left_out(tree):
    """As after `*` in a shell."""
    paths = [tree / "a.md", tree / "b.md", tree / "sub"]
    assert [file.name for file in find_files(paths, exclude=["b.md", "sub"])] == ["a.md"]


def test_what_was_left_out_is_counted_and_a_useless_pattern_noted(tree):
    notes: list[str] = []
    write(tree / ".gitignore", "build/\n")
    found(tree, exclude=["a.md", "nothing/*.md"], on_note=notes.append)
    assert notes[0].startswith(f"skipped 6 files and folders in {tree} that are not read: ")
    assert {"3 excluded", "2 ignored by git"} <= set(notes[0].rsplit(": ", 1)[1].split(", "))
    assert notes[1:] == [
        "no file or folder was left out by the pattern 'nothing/*.md', which is relative to each folder named"
    ]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("*.md", r"exclude must be a list of patterns, got the text '\*.md'"),
        ([""], "exclude has '', which matches nothing"),
        (["a.md", "# x"], "exclude has '# x', which matches nothing"),
        ([3], "exclude has 3, which matches nothing"),
        (["a\\"], "is not a pattern"),
        (["[z-a]"], "is not a pattern"),
    ],
)
def test_what_is_not_a_pattern_is_refused_before_anything_is_written(tree, colbert, patterns, message):
    with pytest.raises(ValueError, match=message):
        index([tree], tree / "store", colbert, exclude=patterns)
    assert not (tree / "store").exists()


def test_an_update_follows_the_rules(tree, colbert):
    """What is left out now goes, what comes back is encoded; a request that is interrupted keeps its options."""
    options = {"note": lambda _: None}
    assert index([tree], tree / "store", colbert, **options).documents == len(NAMES)
    write(tree / ".gitignore", "a.md\n")
    assert index([tree], tree / "store", colbert, **options).removed == 3
    assert index([tree], tree / "store", colbert, gitignore=False, **options).added == 3
    assert index([tree], tree / "store", colbert, exclude=["/sub"], **options).removed == 5 + 1
    with pytest.raises(ValueError, match=f"held {len(NAMES) - 6} documents and has none now"):
        index([tree], tree / "store", colbert, exclude=["*"], **options)


def test_a_request_keeps_what_is_left_out(tmp_path):
    """Also one that an older version has written, without these fields."""
    request: IndexRequest = {"paths": ["/docs"], "model": None, "dtype": None, "prefilter": False}
    for more, options in (
        ({}, ""),
        ({"exclude": ["a b", "!x"]}, " --exclude 'a b' --exclude '!x'"),
        ({"gitignore": False}, " --no-gitignore"),
    ):
        write_request(tmp_path, {**request, **more})  # pyright: ignore[reportArgumentType]
        found = read_request(tmp_path)
        assert found == {**request, **more}
        assert resume_command(found, Path("store")) == f"modernbert index /docs --output store{options}"
    for wrong in ({"exclude": "a"}, {"exclude": [1]}, {"gitignore": None}, {"other": 1}):
        write_request(tmp_path, {**request, **wrong})  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match=r"unfinished\.json is damaged"):
            read_request(tmp_path)


@settings(deadline=None, max_examples=400)
@given(
    st.lists(
        st.sampled_from(["*", "a", "b", "?", "[ab]", "[!a]", "[]a]", "[a-]", "\\*", ".", "/", "é", "**/"]), min_size=1
    ),
    st.lists(st.text("ab.*é]-", min_size=1, max_size=8), min_size=1, max_size=3),
)
@example(["*", "a", "*", "b", "*", "a"], ["abba"])
@example(["*", "[]a]", "*", "[!a]", "*"], ["]b"])
def test_patterns_match_what_pathspec_matches(parts, names):
    """Their regular expressions are rewritten, so that their time is linear."""
    # For git, no class has a slash.
    pattern, path = "".join(parts), "/".join(names[:1] if "[!a]" in parts else names)
    try:
        expected = GitIgnoreSpec.from_lines([pattern], backend="simple")
        found = _patterns(pattern)
    except ValueError:
        return
    assert _spec(found).check_file(path).include == expected.check_file(path).include


@pytest.mark.parametrize("unit", ["*a", "*[a-z]", "*?", "x*/*a", "**a", "*aa*"])
def test_a_pattern_of_many_stars_takes_no_longer_than_others(tmp_path, unit):
    """It did not come to an end."""
    pattern = unit.replace("/*a", "/" + "*a" * 30) + unit * 30 * ("/" not in unit) + "*b"
    (tmp_path / "x").mkdir()
    for folder in (tmp_path, tmp_path / "x"):
        (folder / ("a" * 200 + ".md")).write_text("owl")
    (tmp_path / ".gitignore").write_text(pattern + "\n")
    assert len(list(find_files([tmp_path], on_note=lambda note: None))) == 2
    assert len(list(find_files([tmp_path], exclude=[pattern], on_note=lambda note: None))) == 2
