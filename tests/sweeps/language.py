"""Causal language models: losses, gradients, scores, answers, files and exports against one row alone."""

import copy

import datasets
import peft
import torch
from sweeps.checks import NAMES, TOLERANCE, Checks, apart, largest
from sweeps.tiny import VOCABULARY, save_tokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import mtl_lora
from mtl_lora import AdapterConfig, route
from mtl_lora.base_model import BaseModel, choose_attention
from mtl_lora.export.merge import export_merged
from mtl_lora.export.peft import export_peft
from mtl_lora.language.answering import OptionScorer, PrefixCaches, continuations
from mtl_lora.language.batches import COLUMNS, CheckedLosses, Collator, sharing_probe, token_losses
from mtl_lora.language.config import EvalConfig
from mtl_lora.language.encode import TEMPLATES
from mtl_lora.language.evaluate import Evaluator
from mtl_lora.language.examples import Example
from mtl_lora.language.prefix import Packer, longest_pair, prefixes_to_share
from mtl_lora.language.tasks import Task, TaskSet
from mtl_lora.language.train import in_language_model

OPTIONS = {"tides": ("high", "low", "very low"), "maps": ("a", "b c"), "birds": ("owl", "owl owl crow"), "rivers": ()}
TASKS = TaskSet(tuple(Task(name, index, OPTIONS[name], answer_prefix="it is ") for index, name in enumerate(NAMES)))

# ---- the slow reference ----


def logits_of(model: torch.nn.Module, ids: list[int], task_id: int) -> torch.Tensor:
    """The logits of a row alone, (L, V)."""
    with route.use(torch.tensor([task_id])):
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def slow_scores(model: torch.nn.Module, encoder, question) -> list[float]:
    """The log-probability of each option from where they differ."""
    (shared, options), scores = continuations(question, encoder), []
    for option in options:
        ids = question.prompt_ids + shared + option
        logp = logits_of(model, ids, question.task.id).log_softmax(-1)
        scores.append(sum(logp[place - 1, ids[place]].item() for place in range(len(ids) - len(option), len(ids))))
    return scores


def slow_greedy(model: torch.nn.Module, encoder, question, most: int) -> tuple[str, float]:
    """(the text, by how much the second best token was at least behind)."""
    ids, margin = list(question.prompt_ids), float("inf")
    while len(ids) < len(question.prompt_ids) + most and ids[-1] != encoder.end_id:
        (first, second), (best, _) = logits_of(model, ids, question.task.id)[-1].topk(2)
        margin = min(margin, (first - second).item())
        ids.append(best.item())
    return encoder.tokenizer.decode(ids[len(question.prompt_ids) :], skip_special_tokens=True), margin


def example(task: int, index: int, words: int) -> Example:
    """An example of random words, the first of which all examples of a task have."""
    own = torch.randint(0, 80, (words,), generator=torch.Generator().manual_seed(97 * task + index)).tolist()
    answers = OPTIONS[NAMES[task]] or ("w5 w6",)
    answer = answers[index % len(answers)]
    text = " ".join(f"w{number}" for number in [*range(10 * task, 10 * task + 9), *own])
    return Example(text, "", f"it is {answer}", answer, task, index)


# ---- the checks ----


class LanguageChecks(Checks):
    """The reference is one row alone: no padding, no cache, all logits."""

    system = "language"
    types = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    exports = "peft", "merged_export", "merge", "unload"

    def may_adapt(self, name: str) -> bool:
        """Whether the layer belongs to the language model: others run with placeholders when there is only text."""
        config, decoder = self.structure.config, self.structure.get_decoder()
        return config.get_text_config() is config or self.structure.get_submodule(name) in set(decoder.modules())

    def save_tokenizer(self, model: torch.nn.Module) -> None:
        plain, options = TEMPLATES["plain"], [option for each in OPTIONS.values() for option in each]
        save_tokenizer(self.base, " ".join([plain.opening, plain.closing, "it is", *options]))

    def read_structure(self) -> torch.nn.Module:
        return self.handle().structure()

    def fresh(self) -> torch.nn.Module:
        return self.handle().load(self.dtype).eval()

    def place(self, adapter: AdapterConfig) -> tuple[AdapterConfig, list[str]]:
        return in_language_model(adapter, self.structure)

    def forward(self, model: torch.nn.Module) -> None:
        logits_of(model, [5, 6, 7, 8], 0)

    def provenance(self) -> dict:
        return {"prompt_template": "plain", "cutoff_len": 128, "task_set": TASKS.to_json()}

    def prepare(self) -> None:
        self.encoder = Evaluator(EvalConfig(checkpoint=str(self.checkpoint), dtype=self.dtype)).encoder
        encoded = self.encoder.encode([example(task, task, 4 + task) for task in range(4)])
        self.rows = [(one.prompt_ids, one.task_id) for one in encoded]

    def outputs(self, model: torch.nn.Module, row: tuple[list[int], int]) -> torch.Tensor:
        return logits_of(model, *row)

    def compare(self) -> None:
        self.attempt("losses", self.losses, False)
        self.attempt("losses_eager", self.losses, True)
        self.model.eval()
        self.attempt("saved", self.saved)
        if self.attempt("evaluator", self.evaluator) is not None:
            return
        for reuse in (True, False):
            made = self.made
            made.caches = PrefixCaches(made.model, made.prefixes, not made.one_by_one) if reuse else None
            made.scorer = OptionScorer(made.model, made.encoder, made.caches)
            self.attempt(f"scores_{reuse}", self.scores, made)
            self.attempt(f"answers_{reuse}", self.answers, made)

    @torch.no_grad()
    def reference(self) -> dict:
        """How much logits depend on the task and the first token, which the other checks presuppose, and on later
        tokens, on which no causal model depends."""
        self.model.eval()
        ids = torch.randint(10, VOCABULARY, (12,), generator=torch.Generator().manual_seed(3)).tolist()
        one = logits_of(self.model, ids, 0)
        if not one.isfinite().all():
            raise ValueError("logits are not finite")
        other_first, other_last = [ids[0] ^ 1, *ids[1:]], [*ids[:-1], ids[-1] ^ 1]
        return {
            "task": apart(logits_of(self.model, ids, 1), one),
            "first_token": apart(logits_of(self.model, other_first, 0)[-1], one[-1]),
            "not_causal": apart(logits_of(self.model, other_last, 0)[:-1], one[:-1]),
        }

    def losses(self, eager: bool) -> dict:
        """Losses and gradients of a padded batch, with and without shared prefixes, against those of rows alone."""
        model, before, found = self.model.train(), self.model.config._attn_implementation, {}
        if eager:
            choose_attention(model, torch.device("cpu"), 128)
        asked = [
            example(*each) for each in ((0, 0, 3), (1, 0, 9), (2, 1, 1), (0, 1, 6), (3, 0, 12), (0, 2, 4), (1, 1, 2))
        ]
        rows = [{"input_ids": one.prompt_ids + one.answer_ids, **vars(one)} for one in self.encoder.encode(asked)]
        rows = [row | {"prompt_length": len(row["prompt_ids"]), "length": len(row["input_ids"])} for row in rows]
        rows = [{name: row[name] for name in COLUMNS} for row in rows]
        alone = []
        for row in rows:
            logp = logits_of(model, row["input_ids"], row["task_id"]).log_softmax(-1)
            places = range(row["prompt_length"], row["length"])
            alone += [-logp[place - 1, row["input_ids"][place]] for place in places]
        batches = {"padded": lambda: token_losses(model, Collator(0)(rows))[0]}
        table = datasets.Dataset.from_list(rows, features=COLUMNS)
        prefixes, found["sharing"] = prefixes_to_share("auto", table, self.structure, 0.0)
        if prefixes:
            packer = Packer(prefixes, True, 0)
            lengths, tasks = (table.with_format("numpy")[name][:] for name in ("length", "task_id"))
            pair = [rows[index] for index in longest_pair(lengths, tasks, prefixes)]
            checked, batch = CheckedLosses(sharing_probe(pair, packer), False), Collator(0, packer=packer)(rows)
            batches["shared"] = lambda: checked(model, batch)[0]
        found |= self.compare_losses(torch.stack(alone), batches)
        if prefixes:
            found["shares"] = checked.shares and "packed" in batch
        model.set_attn_implementation(before)
        return found

    @torch.no_grad()
    def evaluator(self) -> None:
        made = self.made = Evaluator(EvalConfig(checkpoint=str(self.checkpoint), dtype=self.dtype, max_new_tokens=6))
        asked = [[example(task, index, words) for index, words in enumerate((3, 9, 1, 6))] for task in (0, 1)]
        self.questions = [made.questions(examples, "here") for examples in asked]
        made.prepare(dict.fromkeys(("score", "generate"), self.questions[0] + self.questions[1]))
        made.load()
        self.record["one_by_one"] = made.one_by_one
        every = self.questions[0] + self.questions[1]
        self.slow = {each.prompt_sha256: slow_scores(self.model, made.encoder, each) for each in every}
        self.texts = {each.prompt_sha256: slow_greedy(self.model, made.encoder, each, 6) for each in every}

    def scores(self, made: Evaluator) -> dict:
        pairs = []
        for asked in self.questions:
            lines = made.answer(asked, "score")
            pairs += [(line["scores"], self.slow[each.prompt_sha256]) for each, line in zip(asked, lines, strict=True)]
        used = {"caches": bool(made.caches and made.caches.usable), "one_pass": made.scorer.one_pass}
        return {"scores": largest(apart(*pair) for pair in pairs), **used}

    def answers(self, made: Evaluator) -> dict:
        """How many answers are others, without those that a rounding may decide."""
        wrong = []
        for asked in self.questions:
            for question, line in zip(asked, made.answer(asked, "generate"), strict=True):
                text, margin = self.texts[question.prompt_sha256]
                if line["text"].split() != text.split() and margin > TOLERANCE[self.dtype]:
                    wrong.append((line["text"], text))
        return {"others": len(wrong)} | ({"example": wrong[0]} if wrong else {})

    @torch.no_grad()
    def from_routed(self, model: torch.nn.Module, task: int) -> float:
        """The difference of a model without routing from the routed one."""
        found = []
        for (ids, own), one in zip(self.rows, self.routed, strict=True):
            if own == task:
                found.append(apart(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0], one))
        return largest(found)

    def peft(self) -> float:
        folders = export_peft(self.checkpoint, self.checkpoint.parent / "peft", list(NAMES[:2]))
        adapted = [peft.PeftModel.from_pretrained(self.fresh(), folder).eval() for folder in folders]
        return largest(self.from_routed(model, task) for task, model in enumerate(adapted))

    def merged_export(self) -> float:
        folder = export_merged(self.checkpoint, self.checkpoint.parent / "merged", NAMES[1], dtype=self.dtype)
        return self.from_routed(BaseModel(str(folder)).load(self.dtype).eval(), 1)

    def merge(self) -> float:
        return self.from_routed(mtl_lora.merge(copy.deepcopy(self.model), NAMES[2]), 2)
