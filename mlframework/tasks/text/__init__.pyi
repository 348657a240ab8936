from .text_folder import TextFolder as TextFolder
from .text_languages import TextLanguages as TextLanguages
from .text_lists import TextLists as TextLists
from .text_roles import TextRoles as TextRoles
from .text_tasks import Source as Source, TextTasks as TextTasks
from .tokens import Bytes as Bytes, PretrainedTokenizer as PretrainedTokenizer, Tokens as Tokens
