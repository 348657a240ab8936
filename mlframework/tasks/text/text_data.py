"""Texts in the data folder: the speeches of Shakespeare's persons, and the world's languages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from mlframework.episode import Split
from mlframework.errors import InvalidValue, UserError
from mlframework.reading import MOST_RECORD, parsed_json, read_gzip
from mlframework.screen import stage
from mlframework.tasks.data_folder import data_folder
from mlframework.tasks.few_shot import split_by_hash
from mlframework.tasks.text.text_tasks import Source, TextTasks
from mlframework.tasks.text.tokens import Tokens

__all__ = ["SPEAKERS", "TextLanguages", "TextRoles", "by_speaker"]

Script = Literal["latin", "all"]

#: How the two files must look.
ROLES_FORM = "gzipped JSON, {role: [speech, ...]}"
LANGUAGES_FORM = 'gzipped JSON, {"text": {code: text}, "latin_script": [code, ...]}'

#: Codes of one language: Huastec (three dialects), Norwegian (two written forms), Romani (two dialects).
SAME_LANGUAGE = {"hva": "hus", "hsf": "hus", "nno": "nob", "rmy": "rmn"}

#: The person behind a role, where the plays give one person several speech headings. Editors number citizens and
#: murderers scene by scene, and do not agree on the numbers: all of them count as one speaker.
SPEAKERS = {
    **dict.fromkeys(("RICHARD", "GLOUCESTER"), "KING RICHARD III"),
    **{"EDWARD": "KING EDWARD IV", "LADY GREY": "QUEEN ELIZABETH", "MARCIUS": "CORIOLANUS"},
    **dict.fromkeys(("First Citizen", "Second Citizen", "Third Citizen"), "Citizens"),
    **dict.fromkeys(("First Murderer", "Second Murderer"), "Murderers"),
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
        roles = read_packed_json(self.folder, "shakespeare_roles.json.gz", ROLES_FORM, are_roles)
        speakers = by_speaker(roles)
        return [Source(speaker, speakers[speaker]) for speaker in split_by_hash(speakers)[split]]


def by_speaker(roles: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The speeches of each person, role after role in the order of the file."""
    speakers: dict[str, list[str]] = {}
    for role, speeches in roles.items():
        speakers.setdefault(SPEAKERS.get(role, role), []).extend(speeches)
    return speakers


class TextLanguages(TextTasks):
    """The Universal Declaration of Human Rights in one language, as running text.

    Languages are held out, with all their variants.

    Args:
        k_shot, k_query, length, tokens: see `TextTasks`.
        script: `latin`, or `all` scripts.
        data_dir: see `data_folder`; the file is `text/udhr_languages.json.gz` there.
    """

    divided_by = ("script",)

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
        data = read_packed_json(self.folder, "udhr_languages.json.gz", LANGUAGES_FORM, are_languages)
        codes = data["latin_script"] if self.script == "latin" else list(data["text"])
        names = split_by_hash({code.partition("_")[0] for code in codes})
        chosen = [code for code in sorted(codes) if self.source_of(code) in names[split]]
        return [Source(code, [line for line in data["text"][code].splitlines() if line.strip()]) for code in chosen]

    def source_of(self, name: str) -> str:
        # Variants of a language, deu_1901 and deu_1996, share the part before the underscore.
        code = name.partition("_")[0]
        return SAME_LANGUAGE.get(code, code)


def are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def are_roles(found: Mapping[str, Any]) -> bool:
    return all(are_texts(speeches) for speeches in found.values())


def are_languages(found: Mapping[str, Any]) -> bool:
    texts, latin = found.get("text"), found.get("latin_script")
    if not (isinstance(texts, dict) and isinstance(latin, list) and are_texts(list(texts.values()))):
        return False
    return are_texts(latin) and texts.keys() >= {*latin}


def read_packed_json(
    folder: Path, name: str, form: str, holds: Callable[[Mapping[str, Any]], bool]
) -> Mapping[str, Any]:
    """The gzipped JSON object in `folder/text/name` or `folder/name`.

    `form` says in words how it must look, `holds` whether it does.
    """
    places = [folder / "text" / name, folder / name]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise UserError(f"{places[0]}: is not there: put it there ({form}), or name its folder by task.data_dir=...")
    with stage(f"reading {path}"):
        try:
            found = parsed_json(path, read_gzip(path, most=MOST_RECORD).decode("utf-8"), object)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is no UTF-8 once it is unpacked ({error})") from error
    if not (isinstance(found, dict) and holds(found)):
        raise UserError(f"{path}: must hold {form}")
    return found
