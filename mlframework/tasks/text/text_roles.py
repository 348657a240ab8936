"""Shakespeare's speakers: a task is a role, its texts are the role's speeches."""

from __future__ import annotations

from pathlib import Path

from mlframework.episode import Split
from mlframework.tasks.data_folder import data_folder
from mlframework.tasks.few_shot import split_by_hash
from mlframework.tasks.text.text_data import read_json
from mlframework.tasks.text.text_tasks import Source, TextTasks
from mlframework.tasks.text.tokens import Tokens

__all__ = ["TextRoles"]

FILE, FORM = "shakespeare_roles.json.gz", "gzipped JSON, {role: [speech, ...]}"


class TextRoles(TextTasks):
    """What a role of Shakespeare's says, as running text; roles are held out.

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
        roles = read_json(self.folder, FILE, FORM)
        return [Source(role, roles[role]) for role in split_by_hash(roles)[split]]
