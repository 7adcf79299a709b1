"""Training on a mixed batch: the answer-only loss is the full one, and how a batch is split changes nothing."""

import datasets
import pytest
import torch
from reference.layers import assert_near
from reference.tiny import TASKS, VOCABULARY, adapted_llama, adapter_gradients
from transformers import Trainer

from mtl_lora import Origin, route
from mtl_lora.adapter import routing
from mtl_lora.language.collate import IGNORED, Collator
from mtl_lora.language.config import TrainConfig
from mtl_lora.language.loss import TaskLosses, token_losses
from mtl_lora.language.tasks import Task, TaskSet
from mtl_lora.language.token_cache import COLUMNS
from mtl_lora.language.train import training_arguments
from mtl_lora.training.trainer import TaskTrainer

TASK_SET = TaskSet(tuple(Task(name, index) for index, name in enumerate(TASKS)))
LENGTHS = [5, 12, 7, 9, 6, 11, 8, 10]  # tokens a row
PROMPTS = [4, 3, 5, 2, 5, 10, 1, 6]  # of which the prompt; the answers differ in length, as means over them would
TASK_IDS = [0, 2, 1, 2, 3, 0, 1, 2]


def encoded_rows() -> datasets.Dataset:
    """Eight rows of random tokens as training has them."""
    generator = torch.Generator().manual_seed(11)
    tokens = [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]
    columns = {
        "input_ids": tokens,
        "prompt_length": PROMPTS,
        "length": LENGTHS,
        "task_id": TASK_IDS,
        "removed": [0] * 8,
    }
    return datasets.Dataset.from_dict(columns, features=COLUMNS)


def batch_of(train_on_inputs: bool = False) -> dict[str, torch.Tensor]:
    """All eight rows, padded."""
    rows = encoded_rows()
    return Collator(0, train_on_inputs)([rows[index] for index in range(8)])


def full_losses(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    """The loss of every supervised token from the logits of all positions, one by one, and each token's task."""
    with route.use(batch["task_ids"]):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    losses, tasks = [], []
    for row, labels in enumerate(batch["labels"].tolist()):
        for position, label in enumerate(labels[1:]):
            if label != IGNORED:
                losses.append(-logits[row, position].log_softmax(dim=-1)[label])
                tasks.append(TASK_IDS[row])
    return torch.stack(losses), tasks


@pytest.mark.parametrize("train_on_inputs", [False, True], ids=["answers", "all tokens"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_answer_only_loss_and_gradients_equal_those_of_all_logits(train_on_inputs, checkpointing):
    batch = batch_of(train_on_inputs)
    reference = adapted_llama().train()
    expected, expected_tasks = full_losses(reference, batch)
    expected.sum().backward()

    model = adapted_llama().train()
    if checkpointing:
        routing.enable_gradient_checkpointing(model)
    losses, tasks = token_losses(model, batch)
    losses.sum().backward()  # outside the route, where the Trainer's backward runs

    assert len(expected) == (sum(LENGTHS) - 8 if train_on_inputs else sum(LENGTHS) - sum(PROMPTS))
    assert tasks.tolist() == expected_tasks
    # The loss is taken in float32.
    assert_near(losses, expected, 1e-6, "losses")
    gradients, expected_gradients = adapter_gradients(model), adapter_gradients(reference)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert_near(gradient, expected_gradients[name], 2e-6, name)


def make_trainer(tmp_path, batch_size: int = 8, accumulation: int = 1, train_on_inputs: bool = False) -> TaskTrainer:
    """The project's trainer on the eight rows."""
    config = TrainConfig(
        output_dir=str(tmp_path), batch_size=batch_size, gradient_accumulation_steps=accumulation, tasks_file=None
    )
    return TaskTrainer(
        model=adapted_llama().train(),
        args=training_arguments(config),
        tasks=TASK_SET,
        origin=Origin(),
        collator=Collator(0, train_on_inputs),
        train_dataset=encoded_rows(),
    )


def one_step(trainer: TaskTrainer) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one optimiser step, taken as the Trainer's own loop does."""
    steps = trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    batches, num_items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), steps, torch.device("cpu"))
    assert len(batches) == steps
    loss = sum(trainer.training_step(trainer.model, batch, num_items).item() for batch in batches)
    return loss, adapter_gradients(trainer.model)


@pytest.mark.parametrize("train_on_inputs", [False, True], ids=["answers", "all tokens"])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_a_step_is_the_mean_over_its_tokens_however_it_is_split(tmp_path, batch_size, accumulation, train_on_inputs):
    model = adapted_llama().train()
    losses, _ = full_losses(model, batch_of(train_on_inputs))
    expected = losses.mean()
    expected.backward()
    loss, gradients = one_step(make_trainer(tmp_path, batch_size, accumulation, train_on_inputs))
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for name, gradient in adapter_gradients(model).items():
        assert_near(gradients[name], gradient, 2e-6, name)


def test_trainer_keeps_task_ids_in_its_batches(tmp_path):
    trainer = make_trainer(tmp_path, batch_size=4)
    batches = list(trainer.get_train_dataloader())
    assert sorted(torch.cat([batch["task_ids"] for batch in batches]).tolist()) == sorted(TASK_IDS)


def test_training_arguments_keep_columns_the_model_does_not_know(tmp_path):
    # transformers' own loaders drop task_ids otherwise: LlamaForCausalLM.forward has no such argument.
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3, 4]], "task_ids": [1, 0]})
    arguments = training_arguments(TrainConfig(output_dir=str(tmp_path)))
    trainer = Trainer(model=adapted_llama(), args=arguments, train_dataset=rows)
    (batch,) = trainer.get_train_dataloader()
    assert sorted(batch["task_ids"].tolist()) == [0, 1]


def test_loss_per_task_is_the_sum_over_its_tokens():
    losses = TaskLosses(4)
    first = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    losses.add(first * 1, torch.tensor([2, 0, 2]))
    losses.add(torch.tensor([8.0]), torch.tensor([0]))
    losses.add(torch.tensor([]), torch.tensor([], dtype=torch.long))
    assert not losses.sums.requires_grad
    sums, counts = losses.read()
    assert sums.tolist() == [10, 0, 5, 0]
    assert counts.tolist() == [2, 0, 2, 0]


def test_reading_the_loss_per_task_starts_it_from_zero():
    losses = TaskLosses(2)
    losses.add(torch.tensor([1.0]), torch.tensor([1]))
    losses.read()
    assert [part.tolist() for part in losses.read()] == [[0, 0], [0, 0]]
    losses.add(torch.tensor([3.0]), torch.tensor([0]))
    assert [part.tolist() for part in losses.read()] == [[3, 0], [1, 0]]


def test_trainer_counts_a_step_to_its_tasks(tmp_path):
    trainer = make_trainer(tmp_path, batch_size=2, accumulation=4)
    losses, tasks = full_losses(adapted_llama(), batch_of())
    one_step(trainer)
    sums, counts = trainer.task_losses.read()
    for task in range(4):
        own = torch.tensor([each == task for each in tasks])
        assert counts[task] == own.sum()
        assert sums[task].item() == pytest.approx(losses[own].sum().item(), rel=1e-6)
