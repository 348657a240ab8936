from .evaluation import Evaluation as Evaluation, Report as Report, Row as Row
from .task_set import Interval as Interval, TaskSet as TaskSet
from .text_quality import TextQuality as TextQuality
