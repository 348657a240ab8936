"""Lists of short texts, one kind in one country's language each, made by `faker` without any download."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import get_args

import faker
import numpy as np
from faker.config import AVAILABLE_LOCALES
from faker.factory import Factory
from faker.generator import Generator
from faker.providers import BaseProvider, address, color, company, currency, person

from mlframework.episode import Split
from mlframework.tasks.data_folder import Arrays, cached
from mlframework.tasks.few_shot import split_by_hash
from mlframework.tasks.text.text_tasks import Source, TextTasks
from mlframework.tasks.text.tokens import Tokens

__all__ = ["TextLists"]

#: Kinds of lists, and faker's provider of each.
KINDS = {
    **dict.fromkeys(("name", "first_name", "last_name"), "person"),
    **dict.fromkeys(("city", "street_name", "street_address"), "address"),
    **{"company": "company", "job": "job", "color_name": "color", "currency_name": "currency", "sentence": "lorem"},
}
#: The most texts of a list, the most draws to find them, and the fewest texts of a list that is kept.
MOST, DRAWS, LEAST = 200, 400, 30
#: English words that faker uses if a locale's provider has none of its own.
GENERIC: dict[str, Collection[str]] = {
    "name": (*person.Provider.first_names, *person.Provider.last_names),
    "city": address.Provider.city_suffixes,
    "street_name": address.Provider.street_suffixes,
    "street_address": address.Provider.street_suffixes,
    "company": company.Provider.company_suffixes,
    "color_name": tuple(color.Provider.all_colors),
    "currency_name": tuple(name for _, name in currency.Provider.currencies),
}
LEFT_OUT = {"fr_QC"}  # another's alias, and deprecated
SAME_LANGUAGE = {"tl": "fil"}  # one language under two codes


class TextLists(TextTasks):
    """Person names, cities, streets, companies, jobs, colours, sentences: a list is one kind in one locale.

    The locales of a language are in one split, and a text that several splits have stays in the first of them alone.
    Lists that `faker` has only in English for a locale are left out. Texts are drawn with a fixed seed per list;
    another version of `faker` may have others.

    Args:
        k_shot, k_query, length, tokens: see `TextTasks`.

    Reference: https://faker.readthedocs.io.
    """

    def __init__(self, *, k_shot: int, k_query: int, length: int, tokens: Tokens | None = None) -> None:
        super().__init__(k_shot=k_shot, k_query=k_query, length=length, running=False, tokens=tokens)

    def load(self, split: Split) -> list[Source]:
        settings = faker.VERSION, KINDS, MOST, DRAWS, LEAST, sorted(AVAILABLE_LOCALES)
        arrays = cached("text_lists", settings, all_lists, source=__file__)
        lists = {str(name): str(text).split("\n") for name, text in zip(arrays["names"], arrays["texts"], strict=True)}
        languages = split_by_hash(sorted({language_of(name) for name in lists}))
        order = get_args(Split)
        earlier = {language for other in order[: order.index(split)] for language in languages[other]}
        elsewhere = {text for name, texts in lists.items() if language_of(name) in earlier for text in texts}
        mine = {name: texts for name, texts in lists.items() if language_of(name) in languages[split]}
        return [Source(name, [text for text in texts if text not in elsewhere]) for name, texts in mine.items()]

    def source_of(self, name: str) -> str:
        return language_of(name)


def language_of(name: str) -> str:
    """The language of a list `locale/kind`."""
    code = name.partition("/")[0].partition("_")[0]
    return SAME_LANGUAGE.get(code, code)


def all_lists() -> Arrays:
    """`names` `[lists]`, as `locale/kind`, and their `texts` `[lists]`, one per line."""
    found = dict(pair for locale in sorted(set(AVAILABLE_LOCALES) - LEFT_OUT) for pair in lists_of(locale))
    return {"names": np.array(list(found)), "texts": np.array(["\n".join(texts) for texts in found.values()])}


def lists_of(locale: str) -> Iterator[tuple[str, list[str]]]:
    """The lists of a locale that are its own and long enough, by name."""
    makers = Factory.create(locale)
    own = {p.__provider__.rpartition(".")[2]: p for p in makers.providers if getattr(p, "__lang__", None) == locale}
    for kind, provider in KINDS.items():
        if provider in own and hasattr(makers, kind):
            sort_lists(own[provider])
            makers.seed_instance(f"{locale}/{kind}")
            texts = drawn(makers, getattr(makers, kind))
            if len(texts) >= LEAST and (language_of(locale) == "en" or not is_generic(kind, texts)):
                yield f"{locale}/{kind}", texts


def sort_lists(provider: BaseProvider) -> None:
    """Sorts a provider's lists: some were sets, whose order differs from process to process."""
    for name, value in vars(type(provider)).items():
        if isinstance(value, list) and all(isinstance(element, str) for element in value):
            setattr(provider, name, sorted(value))


def is_generic(kind: str, texts: Sequence[str]) -> bool:
    """Whether most texts have one of faker's English words: Bahnhof Street, John Müller."""
    words = re.compile("|".join(rf"\b{re.escape(word)}\b" for word in GENERIC.get(kind, ())) or "(?!)")
    return sum(words.search(text) is not None for text in texts) > len(texts) / 2


def drawn(makers: Generator, make: Callable[[], str]) -> list[str]:
    """Distinct texts on one line each, in the order in which they were drawn."""
    found: dict[str, None] = {}
    for _ in range(DRAWS):
        found[" ".join(make().split())] = None
        if len(found) == MOST:
            break
    return [text for text in found if text]
