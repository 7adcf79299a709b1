"""Language models that are shown images: losses, gradients, scores, answers and files against one question alone."""

import copy

import torch
from image_text_cases import DIM, GRID, PICTURES, write_features
from sweeps.checks import NAMES, TOLERANCE, Checks, apart, largest
from sweeps.tiny import save_tokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

import mtl_lora
from mtl_lora import AdapterConfig, route
from mtl_lora.base_model import choose_attention
from mtl_lora.image_text import model as visual
from mtl_lora.image_text.config import ANSWER, EvalConfig
from mtl_lora.image_text.data import Collator
from mtl_lora.image_text.evaluate import Evaluator
from mtl_lora.image_text.examples import Example
from mtl_lora.image_text.model import VisualConfig
from mtl_lora.image_text.tasks import CAPTION, CHOICE, OPEN, Task, TaskSet
from mtl_lora.image_text.train import answer_losses

IMAGES = VisualConfig(dim=DIM, grid=GRID, pool=2)
BEAMS = 3
TASKS = TaskSet(
    (
        Task(NAMES[0], 0, "ask: {text} answer:", OPEN, max_answer=6),
        Task(NAMES[1], 1, "choose: {text}", CHOICE, labels=("sea", "hill road", "hill road town")),
        Task(NAMES[2], 2, "describe:", CAPTION, max_answer=6),
        Task(NAMES[3], 3, "{text}", OPEN, max_answer=6),
    )
)
# Of each training example the task, the words of its text, its images, its answer and the answer's score.
EXAMPLES = [
    (0, 5, 1, "w7 w8", 1.0),
    (3, 2, 2, "w9 w5 w30 w31", 0.3),
    (1, 17, 1, "hill road", 1.0),
    (0, 9, 2, "w1 w2 w3", 1.0),
    (2, 0, 2, "w40 w41 w42", 1.0),
]


def example(task: int, index: int, words: int, images: int, answer: str = "sea", score: float = 1.0) -> Example:
    draws = torch.Generator().manual_seed(97 * task + index)
    text = " ".join(f"w{number}" for number in torch.randint(0, 80, (words,), generator=draws).tolist())
    shown = tuple(PICTURES[(index + image) % len(PICTURES)] for image in range(images))
    return Example(shown, text, {answer: score}, task, index)


class ImageTextChecks(Checks):
    """The reference is one question alone: no padding, no cache, all logits."""

    system = "image_text"
    types = tuple(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES | MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    exports = "merge", "unload"  # `mtl-lora export` refuses all of them

    def save_tokenizer(self, model: torch.nn.Module) -> None:
        words = " ".join([task.prompt.replace("{text}", "") for task in TASKS] + [*TASKS[1].labels])
        # As of BART; causal models put nothing around a text.
        around = "<begin> $A <end>" if model.config.is_encoder_decoder else "$A"
        save_tokenizer(self.base, words, {"bos_token": "<begin>"}, rows=(around, "$A $B:1"))

    def read_structure(self) -> torch.nn.Module:
        return visual.with_images(self.handle().structure(), IMAGES)

    def fresh(self) -> torch.nn.Module:
        torch.manual_seed(2)  # of the visual embedding
        return visual.with_images(self.handle().load(self.dtype), IMAGES).eval()

    def place(self, adapter: AdapterConfig) -> tuple[AdapterConfig, list[str]]:
        return visual.in_language_model(adapter, self.structure), []

    def may_adapt(self, name: str) -> bool:
        return not name.startswith(f"{visual.NAME}.")

    def forward(self, model: torch.nn.Module) -> None:
        inputs = {"decoder_input_ids": torch.tensor([[0, 5, 6]])} if visual.text_first(model) else {}
        with route.use(torch.tensor([0])):
            features = torch.ones(1, 1, GRID**2, DIM)
            model(input_ids=torch.tensor([[5, 6, 7, 8]]), features=features, use_cache=False, **inputs)

    def provenance(self) -> dict:
        return {"cutoff_len": 64, "task_set": TASKS.to_json(), "model_settings": IMAGES.to_json()}

    def prepare(self) -> None:
        features = self.base.parent / "features.h5"
        if not features.exists():  # in another dtype
            write_features(features)
        flags = {"checkpoint": str(self.checkpoint), "features": [str(features)], "data_dir": str(self.base.parent)}
        self.made = Evaluator(EvalConfig(**flags, dtype=self.dtype, num_beams=BEAMS, caption_tokenizer="simple"))
        self.encoder, self.store = self.made.encoder, self.made.store
        examples = [example(task, index, *more) for index, (task, *more) in enumerate(EXAMPLES)]
        self.rows = [row | {"example": index} for index, row in enumerate(self.encoder.encode(examples))]

    def outputs(self, model: torch.nn.Module, row: dict, answer: list[int] | None = None) -> torch.Tensor:
        """The logits (L, V) that predict the L tokens of an answer, by default of the row's own."""
        answer = row["answers"][0] if answer is None else answer
        inputs = {"input_ids": row["prompt_ids"] + answer}
        if visual.text_first(model):
            inputs = {"input_ids": row["prompt_ids"], "decoder_input_ids": [self.encoder.decoder_start, *answer[:-1]]}
        inputs = {name: torch.tensor([ids]) for name, ids in inputs.items()}
        features = torch.stack([self.store[image] for image in row["images"]])[None]
        with route.use(torch.tensor([row["task_id"]])):
            logits = model(**inputs, features=features, use_cache=False).logits[0]
        return logits if visual.text_first(model) else logits[-len(answer) - 1 : -1]

    def compare(self) -> None:
        self.attempt("losses", self.losses, False)
        self.attempt("losses_eager", self.losses, True)
        self.model.eval()
        self.attempt("saved", self.saved)
        if self.attempt("evaluator", self.evaluator) is None:
            for check in (self.scores, self.answers, self.beams):
                self.attempt(check.__name__, check)

    @torch.no_grad()
    def reference(self) -> dict:
        """How much logits depend on the task, the first token and the images, which the other checks presuppose, and on
        later tokens of the answer, on which no decoder depends."""
        self.model.eval()
        row = self.rows[1]
        answer, (first, *others) = row["answers"][0], row["prompt_ids"]
        one = self.outputs(self.model, row)
        if not one.isfinite().all():
            raise ValueError("logits are not finite")
        other_last = [*answer[:-2], answer[-2] ^ 1, answer[-1]]
        return {
            "task": apart(self.outputs(self.model, row | {"task_id": 1}), one),
            "first_token": apart(self.outputs(self.model, row | {"prompt_ids": [first ^ 1, *others]}), one),
            "images": apart(self.outputs(self.model, row | {"images": row["images"][::-1]}), one),
            "not_causal": apart(self.outputs(self.model, row, other_last)[:-1], one[:-1]),
        }

    def losses(self, eager: bool) -> dict:
        """Losses and gradients of a padded batch of all tasks against those of rows alone."""
        model, before, alone = self.model.train(), self.model.config._attn_implementation, []
        if eager:
            choose_attention(model, torch.device("cpu"), 128)
        collate = Collator(self.encoder, self.store, IMAGES.tokens)
        for row in self.rows:
            logp = self.outputs(model, row).log_softmax(-1)
            (answer,), (score,) = row["answers"], row["scores"]
            alone += [-score * logp[place, token] for place, token in enumerate(answer)]
        batches = {"padded": lambda: answer_losses(model, collate(self.rows))[0]}
        # The box of a grid's cell is zero, and so is the gradient of its weight.
        found = self.compare_losses(torch.stack(alone), batches, [f"{visual.NAME}.box.weight"])
        model.set_attn_implementation(before)
        return found

    def evaluator(self) -> None:
        self.made.load()
        sizes = (3, 1), (9, 2), (1, 1), (6, 2)  # words, images
        asked = [[example(task, 10 + index, *size) for index, size in enumerate(sizes)] for task in range(3)]
        self.open, self.choices, self.captions = (self.made.questions(examples, "here") for examples in asked)

    @torch.no_grad()
    def scores(self) -> float:
        """How far the scores of labels are from those of rows alone."""
        found, start = [], len(self.encoder.answer_start)
        for question, line in zip(self.choices, self.made.answer(self.choices, ANSWER), strict=True):
            for score, label in zip(line["scores"], self.encoder.labels[question.task.id], strict=True):
                logp = self.outputs(self.model, question.row, label).log_softmax(-1)
                slow = sum(logp[place, label[place]].item() for place in range(start, len(label)))
                found.append(apart(score, slow))
        return largest(found)

    @torch.no_grad()
    def slow_greedy(self, question) -> tuple[str, float]:
        """(the text, by how much the second best token was at least behind)."""
        ids, margin = list(self.encoder.answer_start), float("inf")
        end = self.encoder.tokenizer.eos_token_id
        while len(ids) < question.task.generated_tokens and ids[-1:] != [end]:
            (first, second), (best, _) = self.outputs(self.model, question.row, [*ids, 0])[-1].topk(2)
            margin = min(margin, (first - second).item())
            ids.append(best.item())
        return self.encoder.tokenizer.decode(ids, skip_special_tokens=True), margin

    def answers(self) -> dict:
        """How many open answers are others than without a cache, without those that a rounding may decide."""
        wrong = []
        for question, line in zip(self.open, self.made.answer(self.open, ANSWER), strict=True):
            text, margin = self.slow_greedy(question)
            if line["text"].split() != text.split() and margin > TOLERANCE[self.dtype]:
                wrong.append((line["text"], text))
        return {"others": len(wrong)} | ({"example": wrong[0]} if wrong else {})

    def beams(self) -> dict:
        """How many captions of a batch, found with beams, are others than those of questions alone."""
        wrong = []
        for question, line in zip(self.captions, self.made.answer(self.captions, ANSWER), strict=True):
            (alone,) = self.made.answer([question], ANSWER)
            if line["text"] != alone["text"]:
                wrong.append((line["text"], alone["text"]))
        return {"others": len(wrong)} | ({"example": wrong[0]} if wrong else {})

    @torch.no_grad()
    def merge(self) -> float:
        merged, found = mtl_lora.merge(copy.deepcopy(self.model), NAMES[0]), []
        for row, one in zip(self.rows, self.routed, strict=True):
            if row["task_id"] == 0:
                found.append(apart(self.outputs(merged, row), one))
        return largest(found)
