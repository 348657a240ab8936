"""Overrides as the identity of a job: which settings they make, and a short name for them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from hydra.errors import HydraException

__all__ = ["CHANGEABLE", "DIGITS", "OF_THIS_PROCESS", "identity", "job_name", "key_of", "of_run", "override_values"]

#: Settings that may change when a run goes on: length, intervals, place and output; not the learning, nor the choice of
#: the best weights.
CHANGEABLE = (
    *("trainer.steps", "trainer.validate_every", "trainer.checkpoint_every", "trainer.checkpoint_minutes"),
    *("trainer.keep_checkpoints", "trainer.log_every"),
    *("outer.capture", "outer.engine", "outer.chunk", "outer.memory_limit", "outer.support_chunk"),
    *("evaluation", "logger", "display", "device", "threads", "allocator"),
)

#: Settings of this process; they are no part of the record.
OF_THIS_PROCESS = ("resume", "run_dir")

#: Settings that say how a sweep starts its jobs: the same job has the same results under each launcher.
OF_THE_SWEEP = ("launcher", "sweep")

#: Hexadecimal digits of an identity: two of a thousand jobs share one with a chance of 0.0001.
DIGITS = 8

#: Keys whose values stand first in a name, without the key.
FIRST = ("experiment", "algorithm", "task")

#: The most characters of a name, and of one value in it. Every file system takes the name as one part of a path.
LONGEST, LONGEST_VALUE = 80, 20


def key_of(override: str) -> str:
    """The key as the user typed it, as in `algorithm/update` or `trainer.steps`."""
    return override.split("=")[0].lstrip("+~")


def of_run(overrides: Iterable[str]) -> list[str]:
    """The overrides that belong to the run itself."""
    return [override for override in overrides if key_of(override) not in ("resume", *OF_THE_SWEEP)]


def override_values(overrides: Iterable[str]) -> dict[str, Any]:
    """The value of each key, as Hydra reads it: `optimizer.lr=1e-3` and `optimizer.lr=0.001` are one setting.

    >>> override_values(["seed=1", "+note='a b'", "~display", "launcher=joblib"])
    {'seed': 1, 'note': 'a b', '~display': None}
    """
    left_out = (*OF_THIS_PROCESS, *OF_THE_SWEEP)
    return dict(parsed(override) for override in overrides if key_of(override) not in left_out)


@lru_cache(maxsize=10_000)  # parsing takes a millisecond, and the jobs of a sweep share most overrides
def parsed(text: str) -> tuple[str, Any]:
    """The key and the value of an override; of a text that is none, as a damaged record holds, its two halves."""
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        key, _, value = text.partition("=")
        return key.lstrip("+"), value
    return override.get_key_element().lstrip("+"), plain(override.value())


def plain(value: Any) -> Any:
    """A value of Hydra's grammar without the marks of its quotes."""
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return value


def identity(overrides: Iterable[str]) -> str:
    """Eight hexadecimal digits that jobs with the same settings share, in whichever order these were typed."""
    text = json.dumps(override_values(overrides), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def job_name(overrides: Iterable[str]) -> str:
    """A name for the folder of a job: what it was asked for, in short, and its identity.

    Settings without influence on what is learned are left out; so are settings that a long name has no room for.

    >>> job_name(["task=sinusoid", "optimizer.lr=1e-3", "seed=2", "algorithm=maml", "threads=1"])
    'maml-sinusoid-lr0.001-seed2-22bc7e96'
    """
    overrides = list(overrides)
    settings = override_values(overrides)
    first = [safe(str(settings.pop(key))) for key in FIRST if key in settings]
    seed = [f"seed{safe(str(settings.pop('seed')))}"] if "seed" in settings else []
    others = [shown_setting(key, settings[key]) for key in sorted(settings) if not changeable(key)]
    while others and len("-".join([*first, *others, *seed])) > LONGEST - DIGITS - 1:
        others.pop()
    text = "-".join(part for part in (*first, *others, *seed) if part)[: LONGEST - DIGITS - 1]
    return f"{text.strip('._-') or 'job'}-{identity(overrides)}"


def changeable(key: str) -> bool:
    """Whether a setting leaves the learning as it is, but for its length."""
    dotted = key.lstrip("~").replace("/", ".")
    return key != "trainer.steps" and f"{dotted}.".startswith(tuple(f"{name}." for name in CHANGEABLE))


def shown_setting(key: str, value: Any) -> str:
    """`k_shot5`, `lr0.001`, `update_adam`: the last part of a key, and its value."""
    last = safe(re.split(r"[./]", key)[-1])
    if value is None:
        return f"no_{last}" if key.startswith("~") else f"{last}_null"
    text = f"{value:.4g}" if isinstance(value, float) else safe(str(value))
    between = "" if text[:1].isdigit() or text[:1] == "-" else "_"
    return f"{last}{between}{text}"


def safe(text: str) -> str:
    """Text with letters, digits, points and underscores alone: `[40, 40]` is `40x40`."""
    text = re.sub(r"[^A-Za-z0-9._-]+", "_", re.sub(r"\s*,\s*", "x", text)).strip("._-")
    return text[:LONGEST_VALUE].rstrip("._-")
