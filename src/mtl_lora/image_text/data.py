"""Turn examples into rows and batches: prompts and answers as token ids, with the features of their pictures.

Prompt and answer are tokenised separately. An encoder-decoder encodes the prompt and decodes the answer; a causal
language model reads pictures, prompt and answer as one sequence.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import datasets
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from mtl_lora.errors import UserError
from mtl_lora.image_text.examples import Example, load_examples
from mtl_lora.image_text.features import FeatureStore
from mtl_lora.image_text.tasks import BY_TOKEN, Task, TaskSet
from mtl_lora.tokens import added_ids, control_ids, fixed_ends, refuse_control
from mtl_lora.training.rows import cached_rows, padded, tokenizer_hash

# Increase it when the encoding of examples changes, so that caches of an older version are not read.
_VERSION = 1
IGNORED = -100  # the label of a token without loss
LEAST_TEXT = 4  # minimum tokens that must remain of a truncated text
COLUMNS = datasets.Features(
    {
        "prompt_ids": datasets.Sequence(datasets.Value("int32")),
        "answers": datasets.Sequence(datasets.Sequence(datasets.Value("int32"))),  # each with EOS
        "scores": datasets.Sequence(datasets.Value("float64")),  # one per answer
        "images": datasets.Sequence(datasets.Value("string")),
        "image_count": datasets.Value("int32"),
        "example": datasets.Value("int64"),  # its index in the file
        "length": datasets.Value("int32"),  # of the prompt and the longest answer, without visual tokens
        "task_id": datasets.Value("int32"),
        "removed": datasets.Value("int32"),
    }
)


class Encoder:
    """Encodes prompts and answers as token ids for one tokenizer, kind of model and task set.

    cutoff_len: maximum tokens of a prompt and of an answer, unless the task sets a lower limit. In a longer prompt the
    example's text is cut at its end, never the task's words around it; a longer answer is cut at its end but keeps its
    EOS. config: the model's configuration. before, behind: ids around every prompt. answer_start: ids with which every
    answer of an encoder-decoder begins; empty for a causal model. Raises ``UserError`` for a tokenizer without EOS, and
    for labels that are too long or have the same tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, cutoff_len: int, tasks: TaskSet):
        self.tokenizer, self.cutoff_len, self.tasks = tokenizer, cutoff_len, tasks
        self.is_encoder_decoder = config.is_encoder_decoder
        self.decoder_start = getattr(config, "decoder_start_token_id", None)
        if self.is_encoder_decoder and self.decoder_start is None:
            raise UserError("the model's configuration has no decoder_start_token_id; set it in its config.json")
        self._control, (self.before, behind) = control_ids(tokenizer), added_ids(tokenizer)
        self.behind = behind if self.is_encoder_decoder else []  # the answer continues a causal model's prompt
        self._answers: dict[str, list[int]] = {}
        self.answer_start = self.before if self.is_encoder_decoder else []
        self.labels = {task.id: self._labels(task) for task in tasks}

    def _ids(self, texts: Iterable[str]) -> list[list[int]]:
        if not (texts := list(texts)):  # tokenizers raise for an empty list
            return []
        # Control tokens in a text are split into ordinary tokens: an EOS in a question would end it.
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _labels(self, task: Task) -> list[list[int]]:
        """Return the ids of a choice's labels, each with EOS."""
        found = [self.answer_ids(label, task) for label in task.labels]
        most = self._most(task.max_answer)
        for label, ids in zip(task.labels, found, strict=True):
            if len(ids) > most:
                raise UserError(
                    f"the label {label!r} of {task.name} has {len(ids)} tokens, more than the limit of {most}; raise "
                    "the task's max_answer, or --cutoff_len"
                )
        for first, last in itertools.combinations(range(len(found)), 2):
            if found[first] == found[last]:
                pair = f"{task.labels[first]!r} and {task.labels[last]!r} of the task {task.name}"
                raise UserError(f"the labels {pair} are the same tokens for this tokenizer; rename one of them")
        return found

    def _most(self, limit: int) -> int:
        """Return the lower of ``cutoff_len`` and a task's limit (0: none)."""
        return min(limit or self.cutoff_len, self.cutoff_len)

    def answer_ids(self, text: str, task: Task) -> list[int]:
        """Return an answer's ids with EOS; in an encoder-decoder after ``answer_start`` (BOS for BART)."""
        if text and not self.is_encoder_decoder and not task.prompt[-1:].isspace():
            text = f" {text}"
        if text not in self._answers:
            ids = self._ids([text])[0] if text else []
            self._answers[text] = [*self.answer_start, *ids, self.tokenizer.eos_token_id]
        return self._answers[text]

    def encode(self, examples: Sequence[Example], answered: bool = True) -> list[dict]:
        """Return each example's ``prompt_ids``, ``images``, ``task_id``, ``removed`` (the number of tokens cut) and, if
        ``answered``, its ``answers`` and ``scores``; an example without a right answer gets an empty one of score 0.

        Raises ``UserError`` naming an example whose prompt the limit leaves no room for, or that contains a control
        token.
        """
        tasks = [self.tasks[example.task_id] for example in examples]
        parts = [task.parts(example.text) for task, example in zip(tasks, examples, strict=True)]
        rows = []
        for example, task, texts, ids in zip(examples, tasks, parts, self._ids(map("".join, parts)), strict=True):
            prompt = [*self.before, *self._shortened(ids, texts, task, example), *self.behind]
            removed = len(ids) + len(self.before) + len(self.behind) - len(prompt)
            row = {"prompt_ids": prompt, "images": list(example.images), "task_id": example.task_id}
            if answered:
                whole = {text: self.answer_ids(text, task) for text in example.answers or [""]}
                most = self._most(task.max_answer)
                row["answers"] = [ids if len(ids) <= most else [*ids[: most - 1], ids[-1]] for ids in whole.values()]
                row["scores"] = list(example.answers.values()) or [0.0]
                removed += sum(max(len(ids) - most, 0) for ids in whole.values())
            used = itertools.chain(ids, *(each[len(self.answer_start) : -1] for each in row.get("answers", ())))
            refuse_control(self.tokenizer, self._control, used, example.index)
            rows.append(row | {"removed": removed})
        return rows

    def _shortened(self, ids: list[int], texts: tuple[str, str, str], task: Task, example: Example) -> list[int]:
        """Return a prompt's ids, with tokens removed from the end of its text until they fit."""
        most = self._most(task.max_text)
        room = most - len(self.before) - len(self.behind)
        if len(ids) <= room:
            return ids
        head, tail = fixed_ends(ids, texts[0], texts[2], self._ids)
        if room - head - tail < LEAST_TEXT:
            raise UserError(
                f"example {example.index}: {most} tokens leave no room for a text besides the {head + tail} of the "
                f"prompt of {task.name}; raise its max_text, or --cutoff_len"
            )
        return ids[: room - tail] + ids[len(ids) - tail :]


def training_rows(
    path: str | Path, encoder: Encoder, cache_dir: str | Path, task: str | None = None, digest: str | None = None
) -> datasets.Dataset:
    """Return the encoded examples of a data file, one per row (``COLUMNS``), from the cache if they are in it.

    task: as in ``load_examples``. digest: the file's sha256, if known. Raises ``UserError`` as ``load_examples`` and
    ``Encoder.encode`` do, and if the cache folder cannot be written.
    """
    tasks = encoder.tasks
    shaping = [encoder.cutoff_len, encoder.is_encoder_decoder, tasks.answers_sha256]
    facts = ["image_text", _VERSION, *shaping, tokenizer_hash(encoder.tokenizer), task]

    def encode(examples: Sequence[Example]) -> dict[str, list]:
        rows = encoder.encode(examples)
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        return columns | {
            "image_count": [len(row["images"]) for row in rows],
            "example": [example.index for example in examples],
            "length": [len(row["prompt_ids"]) + max(map(len, row["answers"])) for row in rows],
        }

    return cached_rows(path, facts, COLUMNS, cache_dir, lambda: load_examples(path, tasks, task), encode, digest)


def mean_answer_tokens(rows: datasets.Dataset, tasks: TaskSet) -> dict[int, float]:
    """Return the mean number of tokens of a training answer by task id, for the tasks whose loss is by token."""
    sums = {task.id: [0, 0] for task in tasks if task.loss == BY_TOKEN}
    for task_id, answers in zip(rows["task_id"], rows["answers"], strict=True):
        if task_id in sums:
            sums[task_id][0] += sum(map(len, answers)) / len(answers)
            sums[task_id][1] += 1
    return {task_id: total / count for task_id, (total, count) in sums.items() if count}


@dataclasses.dataclass
class Collator:
    """Collates rows into a batch: B rows, L tokens, at most I pictures per row with V visual tokens in all, G cells of
    D numbers per picture.

    input_ids (B, L); features (B, I, G, D), zero where a row has fewer pictures; attention_mask (B, L + V), with the
    prompt before the visual tokens in an encoder-decoder, and after them in a causal model; task_ids (B,). For training
    rows also:

    labels: ``IGNORED`` for tokens without loss; in an encoder-decoder (B, L'), the answers, with decoder_input_ids
    (B, L'); in a causal model (B, L), the answers after their prompts. weights (B,): the weight of each token of a row.
    scores (B,): the factor of a row's losses. loss_weight (): the sum of the weights of all tokens.

    Padding is on the right, except for a causal model's prompts without answers: on the left, for generation.

    store: None for texts without images. visual_tokens: per picture, after any pooling. mean_tokens: by id of the tasks
    whose loss is by token, the n of a token's weight 1 / n, see ``mean_answer_tokens``; in other tasks n is the length
    of the answer. If an example has several answers, the seed, the epoch and the example's index in its file alone
    decide which one is learned.
    """

    encoder: Encoder
    store: FeatureStore | None
    visual_tokens: int
    seed: int = 0
    mean_tokens: Mapping[int, float] = dataclasses.field(default_factory=dict)
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which decides the answers that are drawn."""
        self.epoch = epoch

    def drawn(self, row: Mapping) -> int:
        """Return the index of the answer that is learned, drawn in proportion to the scores of the row's answers."""
        if len(row["answers"]) == 1:
            return 0
        draw = random.Random(f"{self.seed} {self.epoch} {row['example']}")
        return draw.choices(range(len(row["answers"])), row["scores"])[0]

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        prompts, answers = [row["prompt_ids"] for row in rows], []
        answered, encoder, pad = "answers" in rows[0], self.encoder, self.encoder.tokenizer.pad_token_id
        if answered:
            drawn = [self.drawn(row) for row in rows]
            answers = [row["answers"][index] for row, index in zip(rows, drawn, strict=True)]
        joined = answered and not encoder.is_encoder_decoder
        texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)] if joined else prompts
        left = not answered and not encoder.is_encoder_decoder
        batch = {
            "input_ids": padded(texts, pad, left=left),
            "attention_mask": padded([[1] * len(text) for text in texts], 0, left=left),
            "task_ids": torch.tensor([int(row["task_id"]) for row in rows]),
        }
        if self.store is not None:
            batch["features"], seen = self._features([row["images"] for row in rows])
            masks = [batch["attention_mask"], seen]
            batch["attention_mask"] = torch.cat(masks if encoder.is_encoder_decoder else masks[::-1], dim=1)
        if not answered:
            return batch
        if encoder.is_encoder_decoder:
            batch["labels"] = padded(answers, IGNORED)
            shifted = [[encoder.decoder_start, *answer[:-1]] for answer in answers]
            batch["decoder_input_ids"] = padded(shifted, pad)
        else:
            hidden = [[IGNORED] * len(prompt) for prompt in prompts]
            batch["labels"] = padded([[*a, *b] for a, b in zip(hidden, answers, strict=True)], IGNORED)
        scores = [row["scores"][index] for row, index in zip(rows, drawn, strict=True)]
        counts = [len(answer) for answer in answers]
        tokens = [self.mean_tokens.get(int(row["task_id"]), n) for row, n in zip(rows, counts, strict=True)]
        batch["scores"] = torch.tensor(scores, dtype=torch.float64)
        batch["weights"] = 1 / torch.tensor(tokens, dtype=torch.float64)
        return batch | {"loss_weight": (batch["weights"] * torch.tensor(counts)).sum().float()}

    def _features(self, images: Sequence[Sequence[str]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the features (B, I, G, D), and the mask (B, V) of visual tokens that belong to a picture."""
        found = {image: self.store[image] for image in {*itertools.chain(*images)}}
        features = torch.zeros(len(images), max(map(len, images)), *found[images[0][0]].shape)
        for row, ids in enumerate(images):
            for place, image in enumerate(ids):
                features[row, place] = found[image]
        return features, padded([[1] * len(ids) * self.visual_tokens for ids in images], 0)
