"""The world's languages: a task is a language, its text the Universal Declaration of Human Rights."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from mlframework.episode import Split
from mlframework.errors import InvalidValue
from mlframework.tasks.data_folder import data_folder
from mlframework.tasks.few_shot import split_by_hash
from mlframework.tasks.text.text_files import read_json
from mlframework.tasks.text.text_tasks import Source, TextTasks
from mlframework.tasks.text.tokens import Tokens

__all__ = ["TextLanguages"]

FILE = "udhr_languages.json.gz"
FORM = 'gzipped JSON, {"text": {code: text}, "latin_script": [code, ...]}'

Script = Literal["latin", "all"]

#: Codes of one language: Huastec (three dialects), Norwegian (two written forms), Romani (two dialects).
SAME_LANGUAGE = {"hva": "hus", "hsf": "hus", "nno": "nob", "rmy": "rmn"}


class TextLanguages(TextTasks):
    """The declaration in one language, as running text; languages are held out, with all their variants.

    Args:
        k_shot, k_query, length, tokens: see `TextTasks`.
        script: `latin`, or `all` scripts.
        data_dir: see `data_folder`; the file is `text/udhr_languages.json.gz` there.
    """

    def __init__(
        self,
        *,
        k_shot: int,
        k_query: int,
        length: int,
        script: Script = "latin",
        tokens: Tokens | None = None,
        data_dir: str | Path | None = None,
    ) -> None:
        super().__init__(k_shot=k_shot, k_query=k_query, length=length, running=True, tokens=tokens)
        if script not in get_args(Script):
            raise InvalidValue("script", script, "must be latin or all")
        self.script, self.folder = script, data_folder(data_dir)

    def load(self, split: Split) -> list[Source]:
        data = read_json(self.folder, FILE, FORM)
        codes = data["latin_script"] if self.script == "latin" else list(data["text"])
        names = split_by_hash({code.partition("_")[0] for code in codes})
        splits = {name: found for found, chosen in names.items() for name in chosen}
        chosen = [code for code in sorted(codes) if splits[self.source_of(code)] == split]
        return [Source(code, [line for line in data["text"][code].splitlines() if line.strip()]) for code in chosen]

    def source_of(self, name: str) -> str:
        # Variants of a language, deu_1901 and deu_1996, share the part before the underscore.
        code = name.partition("_")[0]
        return SAME_LANGUAGE.get(code, code)
