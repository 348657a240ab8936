"""Tasks of text: what a source has said tells how it goes on."""

from mlframework.tasks.text.text_folder import TextFolder
from mlframework.tasks.text.text_languages import TextLanguages
from mlframework.tasks.text.text_roles import TextRoles
from mlframework.tasks.text.text_tasks import Source, TextTasks
from mlframework.tasks.text.tokens import Bytes, PretrainedTokenizer, Tokens

__all__ = [
    "Bytes",
    "PretrainedTokenizer",
    "Source",
    "TextFolder",
    "TextLanguages",
    "TextRoles",
    "TextTasks",
    "Tokens",
]
