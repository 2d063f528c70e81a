"""What an evaluation asks: a gallery with its captions, perhaps questions, and the protocol in
words.

A task is one function from the configuration of an evaluation to a `Task`. The embedded toy world
and one's own videos are tasks like the published data sets.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from cli import UserError
from datasets import toyworld
from datasets.published import DATASETS, Folder, load_msrvtt_mc, load_questions, load_split
from datasets.split import Question, Split, TrainedOn

TOY_PROTOCOL = (
    "Toy world: compositions that training never shows; one caption per video, all videos of the "
    "split as gallery. Multiple choice among captions that differ in one noun, one verb or the "
    "direction."
)


@dataclass
class Task:
    """A gallery, its questions, and what a complete result on it is."""

    protocol: str
    split: Split  # with the video of each question, too
    questions: list[Question] = field(default_factory=list)

    def count(
        self, usable: Split, trained_on: TrainedOn, num_questions: int = 0
    ) -> tuple[dict[str, int], str]:
        """({"videos": …, "captions": …, "questions": …} of a result on what is usable, why it would
        not be comparable: "N of M videos: not comparable (2 missing)").

        M is what the protocol has, or, where that is not fixed, what the files list.
        """
        listed = self.split.count() | dict(questions=len(self.questions))
        counts = usable.count() | dict(questions=num_questions)
        official = dict(videos=listed["videos"]) | self.split.official
        doubts = trained_on.doubts(usable.video_paths)

        # what there are more or fewer of than there should be, and why
        short = [name for name, count in official.items() if counts[name] != count]
        if short:
            reasons = [f"{count} {kind}" for kind, count in usable.count_broken().items() if count]
            for name, count in official.items():
                if listed[name] != count:
                    reasons.append(f"the files list {listed[name]:,} {name}")
            what = ", ".join(f"{counts[name]:,} of {official[name]:,} {name}" for name in short)
            doubts.insert(0, f"{what}: not comparable ({', '.join(reasons)})")

        return counts, "; ".join(doubts)


def load_toy(config) -> Task:
    """The toy world's gallery and its questions. Only its split is rendered, if it is missing."""
    if config.data:
        folder = Path(config.data)
    else:
        folder = toyworld.generate(Path(config.cache) / "toy", splits=[config.split])
    split = load_split("toy", folder, config.split)
    return Task(TOY_PROTOCOL, split, load_questions(folder / f"{config.split}_mc.jsonl"))


def load_csv(config) -> Task:
    """The videos and captions of one's own file."""
    if not config.data:
        raise UserError(
            "--task csv: needs --data FILE, a csv, jsonl or json file with video and caption"
        )
    protocol = (
        f"Own data ({Path(config.data).name}): every caption is a query against all videos of the "
        "file; a video takes the best rank of its captions."
    )
    root = config.videos_root or config.data_root
    return Task(protocol, load_split("csv", config.data, config.split, videos_root=root))


def load_published(config) -> Task:
    """A published data set: its questions if it asks any, else its gallery."""
    name, root, role = config.task, config.data_root, config.split
    if not root:
        raise UserError(f"--task {name}: needs --data-root FOLDER with annotations and videos")
    split = load_split(name, root, role, videos_root=config.videos_root)
    questions = []
    if name == "msrvtt-mc":  # its captions are the answers: no gallery
        questions = load_msrvtt_mc(Folder(root, config.videos_root))
        official = dict(questions=split.official["videos"])
        nothing = dict(captions=[], video_of_caption=split.video_of_caption[:0])
        split = replace(split, official=official, **nothing)
    return Task(DATASETS[name].protocol, split, questions)


PUBLISHED = ("msrvtt", "msrvtt-full", "msvd", "didemo", "lsmdc", "msrvtt-mc")
TASKS = {"toy": load_toy, "csv": load_csv, **dict.fromkeys(PUBLISHED, load_published)}
