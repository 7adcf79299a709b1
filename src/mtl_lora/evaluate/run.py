"""What commonsense_evaluate.py does: questions to predictions to ``results.json``."""

import contextlib
import os
import shutil
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import mtl_lora
from mtl_lora import files
from mtl_lora.adapter import checkpoint
from mtl_lora.data.encode import Encoder
from mtl_lora.errors import UserError
from mtl_lora.evaluate.answers import extract_answer
from mtl_lora.evaluate.generate import generate_answers
from mtl_lora.evaluate.predictions import Predictions
from mtl_lora.evaluate.questions import Question, load_questions
from mtl_lora.evaluate.results import RESULTS_NAME, collect
from mtl_lora.evaluate.score import best_option, option_tails, score_options
from mtl_lora.evaluate.settings import EvalConfig
from mtl_lora.model import choose_dtype, device_for_this_process, fingerprint, load_model, load_tokenizer
from mtl_lora.tasks import COMMONSENSE, TaskSet, load_tasks_file

SETTINGS_NAME = "settings.json"
_DEFAULT_TEMPLATE, _DEFAULT_CUTOFF = "alpaca", 256


class Evaluation:
    """One evaluation: who is asked (base model, adapter), in which words, by which protocol."""

    def __init__(self, config: EvalConfig):
        self.config = config
        self.adapter = checkpoint.read_config(config.checkpoint) if config.checkpoint else None
        origin = self.adapter.origin_config if self.adapter else checkpoint.Origin()
        base_model = config.base_model or origin.base_model
        if base_model is None:
            raise UserError(f"{config.checkpoint} does not say its base model; pass --base_model")
        self.base_model = base_model
        self.template = origin.prompt_template or config.template or _DEFAULT_TEMPLATE
        self.cutoff_len = origin.cutoff_len or config.cutoff_len or _DEFAULT_CUTOFF
        self.tasks = self._tasks(origin)
        self.base_fingerprint = fingerprint(base_model)
        if origin.base_fingerprint and origin.base_fingerprint != self.base_fingerprint:
            raise UserError(
                f"{config.checkpoint} was trained on another base model than {base_model!r}: its fingerprint is "
                f"{origin.base_fingerprint[:12]}..., not {self.base_fingerprint[:12]}...; pass --base_model"
            )
        self.tokenizer = load_tokenizer(base_model, config.trust_remote_code)
        self.encoder = Encoder(self.tokenizer, self.template, self.cutoff_len, self.tasks)
        self.questions, self.data_hashes = load_questions(
            config.data_dir, self.tasks, config.tasks, self.encoder, config.limit
        )
        if config.mode == "score":
            for question in self.questions:
                option_tails(question, self.encoder)

    def _tasks(self, origin: checkpoint.Origin) -> TaskSet:
        if origin.task_set:
            return TaskSet.from_json(origin.task_set, f"the task set of {self.config.checkpoint}")
        return load_tasks_file(self.config.tasks_file) if self.config.tasks_file else COMMONSENSE

    def settings(self) -> dict:
        """Everything that a prediction depends on; batch size and the number of processes are not part of it."""
        config = self.config
        settings = {
            "mode": config.mode,
            "base_fingerprint": self.base_fingerprint,
            "adapter_sha256": self.adapter.weights_sha256 if self.adapter else None,
            "template": self.template,
            "cutoff_len": self.cutoff_len,
            "dtype": str(choose_dtype(self.config.dtype)),
        }
        if config.mode == "generate":
            settings |= {"max_new_tokens": config.max_new_tokens, "num_beams": config.num_beams}
        return settings

    def load(self) -> None:
        """Build the model on this process's device."""
        self.model = load_model(self.base_model, self.config.dtype, self.config.trust_remote_code)
        if self.adapter:
            mtl_lora.load(self.model, self.config.checkpoint)
        self.model.eval().to(device_for_this_process())

    def answer(self, questions: list[Question]) -> list[dict]:
        """Prediction records of a batch of questions."""
        if self.config.mode == "score":
            scores = score_options(self.model, self.encoder, questions, self.tokenizer.pad_token_id)
            found = [
                {"parsed": best_option(question.options, values), "scores": values}
                for question, values in zip(questions, scores, strict=True)
            ]
        else:
            texts = generate_answers(
                self.model, self.tokenizer, questions, self.config.max_new_tokens, self.config.num_beams
            )
            found = [
                {"parsed": extract_answer(question.task, text), "text": text}
                for question, text in zip(questions, texts, strict=True)
            ]
        return [_record(question, values) for question, values in zip(questions, found, strict=True)]


def _record(question: Question, values: dict) -> dict:
    """One line of the predictions file."""
    right = question.example.answer
    record = {"task": question.task.name, "index": question.example.index, "answer": right}
    record |= {"correct": values["parsed"] == right, **values, "prompt_sha256": question.prompt_sha256}
    if "kind" in question.example.extra:
        record["kind"] = question.example.extra["kind"]
    return record


def run(config: EvalConfig) -> dict:
    """Answer every question that has no answer yet and write ``results.json``; returns its content."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    evaluation = Evaluation(config)
    if config.check:
        print(f"every setting is fine; {len(evaluation.questions):,} questions", file=sys.stderr)
        return {}
    with _process_group(world_size) as barrier:
        if rank == 0:
            claim_output(evaluation)
        barrier()
        predictions = Predictions(config.output_folder, rank)
        done = known_predictions(evaluation, predictions)
        waiting = [question for question in evaluation.questions if question.key not in done]
        barrier()  # nobody appends before everybody has read
        answer_all(evaluation, waiting[rank::world_size] if world_size > 1 else waiting, predictions, rank)
        predictions.close()
        barrier()
        results = {}
        if rank == 0:
            results = collect(evaluation, predictions.gather())
            files.write_json(Path(config.output_folder) / RESULTS_NAME, results)
        barrier()
    return results


@contextlib.contextmanager
def _process_group(world_size: int):
    """The processes of a distributed launch, and a barrier between them; nothing for one process."""
    if world_size == 1:
        yield lambda: None
        return
    # Only barriers cross between processes, so gloo serves GPU runs too.
    torch.distributed.init_process_group("gloo")
    try:
        yield torch.distributed.barrier
    finally:
        torch.distributed.destroy_process_group()


def claim_output(evaluation: Evaluation) -> None:
    """Make the output folder this evaluation's; raises ``UserError`` naming what differs if it is another's."""
    folder, settings = Path(evaluation.config.output_folder), evaluation.settings()
    path = folder / SETTINGS_NAME
    if evaluation.config.overwrite:
        shutil.rmtree(folder / "predictions", ignore_errors=True)
        (folder / RESULTS_NAME).unlink(missing_ok=True)
    elif path.exists():
        earlier = files.read_json(path, "the settings of an earlier evaluation")
        different = sorted(key for key in earlier.keys() | settings.keys() if earlier.get(key) != settings.get(key))
        if different:
            raise UserError(
                f"{folder} holds results with another {', '.join(different)}; pass another --output_dir, "
                "or --overwrite True to delete them"
            )
    files.write_json(path, settings)


def known_predictions(evaluation: Evaluation, predictions: Predictions) -> set[tuple[str, int]]:
    """Keys of the questions already answered, each for the very prompt and right answer it has now."""
    found = predictions.read()
    return {
        question.key
        for question in evaluation.questions
        if (record := found.get(question.key))
        and record["prompt_sha256"] == question.prompt_sha256
        and record["answer"] == question.example.answer
    }


def answer_all(evaluation: Evaluation, waiting: list[Question], predictions: Predictions, rank: int) -> None:
    """Answer questions in batches of similar length, the longest first, appending as they come."""
    if not waiting:
        return
    evaluation.load()
    size = evaluation.config.batch_size
    waiting = sorted(waiting, key=lambda question: (-len(question.prompt_ids), question.key))
    with tqdm(total=len(waiting), desc=evaluation.config.mode, unit=" questions", disable=rank > 0) as bar:
        for start in range(0, len(waiting), size):
            batch = waiting[start : start + size]
            predictions.append(evaluation.answer(batch))
            bar.update(len(batch))
