"""Shakespeare's speakers: a task is a person, whose texts are the speeches of all of the person's roles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mlframework.episode import Split
from mlframework.tasks.data_folder import data_folder
from mlframework.tasks.few_shot import split_by_hash
from mlframework.tasks.text.text_files import read_json
from mlframework.tasks.text.text_tasks import Source, TextTasks
from mlframework.tasks.text.tokens import Tokens

__all__ = ["SPEAKERS", "TextRoles", "by_speaker"]

FILE, FORM = "shakespeare_roles.json.gz", "gzipped JSON, {role: [speech, ...]}"

#: The person behind a role, where the plays give one person several speech headings. Editors number citizens and
#: murderers scene by scene, and do not agree on the numbers: all of them count as one speaker.
SPEAKERS = {
    "RICHARD": "KING RICHARD III",
    "GLOUCESTER": "KING RICHARD III",
    "EDWARD": "KING EDWARD IV",
    "LADY GREY": "QUEEN ELIZABETH",
    "MARCIUS": "CORIOLANUS",
    "First Citizen": "Citizens",
    "Second Citizen": "Citizens",
    "Third Citizen": "Citizens",
    "First Murderer": "Murderers",
    "Second Murderer": "Murderers",
}


class TextRoles(TextTasks):
    """The speeches of a person of Shakespeare's plays, as running text; persons are held out.

    `SPEAKERS` joins the roles of one person (`GLOUCESTER` becomes `KING RICHARD III`), so that no person stands in two
    splits. The split hashes the person's name. One heading may also stand for several persons (`YORK` is a father in
    one play and a child in another): all of them stay in one source.

    Args:
        k_shot, k_query, length, tokens: see `TextTasks`.
        data_dir: see `data_folder`; the file is `text/shakespeare_roles.json.gz` there.
    """

    def __init__(
        self,
        *,
        k_shot: int,
        k_query: int,
        length: int,
        tokens: Tokens | None = None,
        data_dir: str | Path | None = None,
    ) -> None:
        super().__init__(k_shot=k_shot, k_query=k_query, length=length, running=True, tokens=tokens)
        self.folder = data_folder(data_dir)

    def load(self, split: Split) -> list[Source]:
        speakers = by_speaker(read_json(self.folder, FILE, FORM))
        return [Source(speaker, speakers[speaker]) for speaker in split_by_hash(speakers)[split]]


def by_speaker(roles: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The speeches of each person, role after role in the order of the file."""
    speakers: dict[str, list[str]] = {}
    for role, speeches in roles.items():
        speakers.setdefault(SPEAKERS.get(role, role), []).extend(speeches)
    return speakers
