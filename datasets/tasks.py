"""What an evaluation asks: a gallery with its captions, perhaps questions, and the protocol in
words.

A task is one function from the configuration of an evaluation to a `Task`. The embedded toy world
and one's own videos are tasks like the published data sets.
"""

from dataclasses import dataclass, field
from pathlib import Path

from cli import UserError
from datasets import toyworld
from datasets.published import DATASETS, load_msrvtt_mc, load_questions, load_split
from datasets.split import Question, Split

TOY_PROTOCOL = (
    "Toy world: compositions that training never shows; one caption per video, all videos of the "
    "split as gallery. Multiple choice among captions that differ in one noun, one verb or the "
    "direction."
)


@dataclass
class Task:
    """A gallery, its questions, and what a complete result on it is."""

    protocol: str
    split: Split
    questions: list[Question] = field(default_factory=list)
    # how many "videos", "captions", "questions" there should be, where that is fixed
    official: dict[str, int] = field(default_factory=dict)
    doubt: str = ""  # why its numbers would not be comparable


def load_toy(config, trained_on: str | None) -> Task:
    """The toy world's gallery and its questions. Only its split is rendered, if it is missing."""
    if config.data:
        folder = Path(config.data)
    else:
        folder = toyworld.generate(Path(config.cache) / "toy", splits=[config.split])
    split = load_split("toy", folder, config.split)
    return Task(TOY_PROTOCOL, split, load_questions(folder / f"{config.split}_mc.jsonl"))


def load_csv(config, trained_on: str | None) -> Task:
    """The videos and captions of one's own file."""
    if not config.data:
        raise UserError(
            "--task csv: needs --data FILE, a csv or jsonl file with the columns video and caption"
        )
    protocol = (
        f"Own data ({Path(config.data).name}): every caption is a query against all videos of the "
        "file; a video takes the best rank of its captions."
    )
    split = load_split("csv", config.data, config.split, root=config.data_root)
    return Task(protocol, split)


def load_published(config, trained_on: str | None) -> Task:
    """A published data set: its questions if it asks any, else its gallery."""
    name, root, role = config.task, config.data_root, config.split
    if not root:
        raise UserError(f"--task {name}: needs --data-root FOLDER with annotations and videos")
    known = DATASETS[name]
    if role not in known.videos:
        load_split(name, root, role)  # raises, and says why there is none

    if name == "msrvtt-mc":
        task = Task(known.protocol, Split.from_pairs([]), load_msrvtt_mc(Path(root), config.data))
        task.official["questions"] = known.videos[role]
    else:
        task = Task(known.protocol, load_split(name, root, role))
        sizes = dict(videos=known.videos[role], captions=known.captions.get(role))
        task.official = {what: count for what, count in sizes.items() if count}

    if trained_on == "msrvtt" and name in ("msrvtt-full", "msrvtt-mc"):
        task.doubt = (
            "the checkpoint was trained on MSR-VTT's 9k list, which holds 1,990 of these videos: "
            "not comparable"
        )
    return task


PUBLISHED = ("msrvtt", "msrvtt-full", "msvd", "didemo", "lsmdc", "msrvtt-mc")
TASKS = {"toy": load_toy, "csv": load_csv, **dict.fromkeys(PUBLISHED, load_published)}
