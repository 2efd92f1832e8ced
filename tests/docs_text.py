"""README and docs as the tests read them: pages, commands, blocks of TOML and Python, links.

Owns what counts as a command: a line of a fenced block without a language that begins with one, and a code span that
does. A span or line with "..." or NAME in it shows a form and is no command.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "hbp_titan" / "experiments").rglob("*.md")),
]

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_ASSIGNMENT = re.compile(r"[A-Z][A-Z_]*=\S*$")
_PROGRAMS = {
    "./scripts/trace_all_torch.sh",
    *("python", ".venv/bin/python", "torchrun", "hbp-titan", "pip", ".venv/bin/pip", "sbatch", "srun", "bash"),
    *("./run_train.sh", "./scripts/run_tests.sh", "scripts/run_tests.sh", "export", "source", "cd", "cp", "ls"),
    *("git", "hf", "vllm", "tensorboard", "tail", "curl", "uv", "conda", "wandb"),
}


@dataclass(frozen=True)
class Command:
    """A command of a page as it stands there, comment and line breaks taken out."""

    page: str
    text: str

    @property
    def words(self) -> list[str]:
        """Its words as a shell has them."""
        return shlex.split(self.text)

    @property
    def environment(self) -> dict[str, str]:
        """The variables that it sets for itself."""
        return dict(word.split("=", 1) for word in self.words[: self._begin])

    @property
    def argv(self) -> list[str]:
        """The program and its arguments."""
        return self.words[self._begin :]

    @property
    def _begin(self) -> int:
        return next((place for place, word in enumerate(self.words) if not _ASSIGNMENT.match(word)), 0)


def commands() -> list[Command]:
    """Every command of every page, each page's in its order."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for language, body in _blocks(text) if language in ("", "bash", "sh") for line in _lines(body)]
        spans = re.findall(r"`([^`\n]+)`", _FENCE.sub("", text))
        found += [Command(page.name, line) for line in [*lines, *spans] if _is_command(line)]
    return list(dict.fromkeys(found))


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of the fenced blocks of a language."""
    texts = [(page.name, page.read_text(encoding="utf-8")) for page in PAGES]
    return [(name, body) for name, text in texts for found, body in _blocks(text) if found == language]


def links() -> list[tuple[Path, str]]:
    """(page, target) of every link that is not to the outside."""
    found = []
    for page in PAGES:
        text = _FENCE.sub("", page.read_text(encoding="utf-8"))
        found += [(page, target) for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    return found


def anchors(page: Path) -> set[str]:
    """The names under which the headings of a page can be linked to."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    for indent, language, body in _FENCE.findall(text):
        yield language, "".join(line.removeprefix(indent) for line in body.splitlines(keepends=True))


def _lines(body: str) -> Iterator[str]:
    for line in body.replace("\\\n", " ").splitlines():
        bare = re.sub(r"\s+#\s.*$", "", line)
        yield " ".join(bare.split())


def _is_command(line: str) -> bool:
    words = line.split()
    while words and _ASSIGNMENT.match(words[0]):
        words.pop(0)
    is_form = "..." in line or re.search(r"\bNAME\b", line)
    return bool(words) and words[0] in _PROGRAMS and not is_form and (len(words) > 1 or words[0].startswith("./"))
