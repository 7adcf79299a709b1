"""The loss of a step on a mixed batch: that of all logits, whatever the system, and however the batch is split."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from reference.layers import assert_near
from reference.tiny import TASKS, VOCABULARY, adapted_llama, adapter_gradients
from torch import nn
from transformers import Trainer, TrainerState

from mtl_lora import AdapterConfig, Provenance, adapter_layers, files, inject, route
from mtl_lora.base_model import enable_checkpointing
from mtl_lora.language.batches import COLUMNS, IGNORED, Collator, token_losses
from mtl_lora.language.config import TrainConfig
from mtl_lora.training.sampler import LengthGroupedBatchSampler
from mtl_lora.training.trainer import LossSums, MultiTaskTrainer, Progress, training_arguments

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
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    with route.use(batch["task_ids"]):
        logits = model(input_ids=batch["input_ids"], attention_mask=mask.long(), use_cache=False).logits
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
        enable_checkpointing(model)
    losses, weights, tasks = token_losses(model, batch)
    losses.sum().backward()  # outside the route, where the Trainer's backward runs

    assert len(expected) == (sum(LENGTHS) - 8 if train_on_inputs else sum(LENGTHS) - sum(PROMPTS))
    assert tasks.tolist() == expected_tasks
    assert weights.tolist() == [1] * len(expected)
    assert batch["loss_weight"] == weights.sum()
    # The loss is taken in float32.
    assert_near(losses, expected, 1e-6, "losses")
    gradients, expected_gradients = adapter_gradients(model), adapter_gradients(reference)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert_near(gradient, expected_gradients[name], 2e-6, name)


def make_trainer(
    tmp_path, batch_size: int = 8, accumulation: int = 1, train_on_inputs: bool = False, **options
) -> MultiTaskTrainer:
    """The project's trainer, on the eight rows unless told otherwise."""
    config = TrainConfig(
        output_dir=str(tmp_path), batch_size=batch_size, gradient_accumulation_steps=accumulation, weight_decay=0.1
    )
    arguments = training_arguments(config)
    sampler = LengthGroupedBatchSampler(
        np.array(LENGTHS),
        np.array(TASK_IDS),
        config.batch_size,
        config.seed,
        accumulation=config.gradient_accumulation_steps,
    )
    language = {
        "model": adapted_llama().train(),
        "losses": token_losses,
        "collator": Collator(0, train_on_inputs),
        "tasks": TASKS,
        "train_dataset": encoded_rows(),
    }
    return MultiTaskTrainer(args=arguments, sampler=sampler, provenance=Provenance(), **(language | options))


def one_step(trainer: MultiTaskTrainer) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one optimiser step, taken as the Trainer's own loop does."""
    steps = trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    batches, num_items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), steps, torch.device("cpu"))
    assert len(batches) == steps
    loss = sum(trainer.training_step(trainer.model, batch, num_items).item() for batch in batches)
    return loss, adapter_gradients(trainer.model)


def test_layers_that_get_no_gradient_are_named(tmp_path, capsys):
    model = adapted_llama().train()
    names = [name for name in adapter_layers(model) if name.startswith("model.layers.1.")]
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda layer, arguments, output: output.detach())
    make_trainer(tmp_path, model=model).train()
    told = [line for line in capsys.readouterr().err.splitlines() if "no gradient in the first step" in line]
    assert len(told) == 1
    assert f"{names[0]} and {len(names) - 1} others of {len(adapter_layers(model))}" in told[0]


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


def test_the_trainer_gets_what_the_flags_say(tmp_path):
    flags = {"learning_rate": 0.5, "weight_decay": 0.25, "max_grad_norm": 3.0, "lr_scheduler_type": "cosine"}
    flags |= {"seed": 7, "max_steps": 9, "logging_steps": 4, "gradient_accumulation_steps": 2}
    renamed = {"num_epochs": 1.5, "batch_size": 3, "save_step": 5, "save_total_limit": 2, "warmup_ratio": 0.25}
    arguments = training_arguments(TrainConfig(output_dir=str(tmp_path), **flags, **renamed))
    assert {name: getattr(arguments, name) for name in flags} == flags
    assert (arguments.num_train_epochs, arguments.per_device_train_batch_size) == (1.5, 3)
    assert (arguments.save_steps, arguments.save_total_limit, arguments.get_warmup_steps(8)) == (5, 2, 2)


def test_the_trainer_leaves_no_mark_of_peft_on_the_model(tmp_path):
    assert not make_trainer(tmp_path).model._hf_peft_config_loaded


class Regression(nn.Module):
    """A model of another system: numbers in, numbers out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(6, 5, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


def regression_losses(model, batch):
    """Squared errors of every output, weighted, some by zero."""
    with route.use(batch["task_ids"]):
        errors = (model(batch["x"]) - batch["y"]) ** 2
    return errors.flatten(), batch["weights"].flatten(), batch["task_ids"].repeat_interleave(5)


def regression_batch(rows: list[dict]) -> dict[str, torch.Tensor]:
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return {**batch, "loss_weight": batch["weights"].sum()}


@pytest.mark.parametrize("task_weights", [None, [1.0, 20, 0.3, 2.0]], ids=["equal tasks", "weighted tasks"])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (2, 4), (1, 8)])
def test_a_system_with_weights_trains_on_their_mean_however_it_is_split(
    tmp_path, batch_size, accumulation, task_weights
):
    generator = torch.Generator().manual_seed(3)
    rows = [
        {
            "x": torch.randn(6, generator=generator, dtype=torch.float64),
            "y": torch.randn(5, generator=generator, dtype=torch.float64),
            # One row weighs nothing at all.
            "weights": torch.rand(5, generator=generator, dtype=torch.float64) * (task != 3),
            "task_ids": torch.tensor(task),
        }
        for task in TASK_IDS
    ]
    model = inject(Regression(), AdapterConfig(target_modules=["head"], tasks=TASKS, rank=2, dropout=0.0)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_w" not in name:
                parameter.normal_(generator=generator)
    losses, weights, task_ids = regression_losses(model, regression_batch(rows))
    of_tasks = torch.tensor([(task_weights or [1] * 4)[task] for task in task_ids], dtype=torch.float64)
    expected = (losses * weights * of_tasks).sum() / weights.sum()
    expected.backward()
    reference = adapter_gradients(model)
    model.zero_grad()
    trainer = make_trainer(
        tmp_path,
        batch_size,
        accumulation,
        model=model,
        losses=regression_losses,
        collator=regression_batch,
        train_dataset=rows,
        task_weights=task_weights,
    )
    loss, gradients = one_step(trainer)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for name, gradient in gradients.items():
        assert_near(gradient, reference[name], 1e-9, name)
    sums, counted = trainer.task_losses.read()
    for task in range(len(TASKS)):
        own = task_ids == task
        assert counted[task].item() == pytest.approx(weights[own].sum().item())
        assert sums[task].item() == pytest.approx((losses * weights)[own].sum().item())


def test_a_step_without_any_weight_has_a_loss_of_zero(tmp_path):
    batch = batch_of() | {"labels": torch.full((8, max(LENGTHS)), IGNORED), "loss_weight": torch.tensor(0.0)}
    loss, gradients = one_step(make_trainer(tmp_path, collator=lambda rows: batch))
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())


def test_the_weights_of_tasks_leave_the_loss_its_dtype(tmp_path):
    model, batch = adapted_llama().float().train(), batch_of()
    trainer = make_trainer(tmp_path, model=model, task_weights=[1.0, 2.0, 0.5, 3.0])
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=batch["loss_weight"])
    assert loss.dtype == token_losses(trainer.model, batch)[0].dtype == torch.float32


def test_weight_decay_spares_what_a_method_declares(tmp_path):
    trainer = make_trainer(tmp_path)
    decayed, spared = trainer.create_optimizer().param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    assert {names[id(parameter)].rpartition(".")[2] for parameter in spared["params"]} == {"lora_lambda"}
    kinds = {names[id(parameter)].rpartition(".")[2] for parameter in decayed["params"]}
    assert kinds == {"lora_A", "lora_B", "lora_w"}


def test_loss_per_task_is_the_weighted_sum_since_the_last_reading():
    losses = LossSums(4)
    first = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    losses.add(first * 1, torch.tensor([1.0, 0.5, 1.0]), torch.tensor([2, 0, 2]))
    losses.add(torch.tensor([8.0]), torch.tensor([1.0]), torch.tensor([0]))
    losses.add(torch.tensor([]), torch.tensor([]), torch.tensor([], dtype=torch.long))
    assert not losses.sums.requires_grad
    sums, weights = losses.read()
    assert sums.tolist() == [9, 0, 5, 0]
    assert weights.tolist() == [1.5, 0, 2, 0]
    assert [part.tolist() for part in losses.read()] == [[0] * 4, [0] * 4]


def test_sums_of_losses_lose_nothing_over_many_tokens():
    losses = LossSums(1)
    for weight in (2.0**24, 1.0, 1.0):  # float32 has no 2^24 + 1
        losses.add(torch.tensor([1.0]), torch.tensor([weight]), torch.tensor([0]))
    assert [part.item() for part in losses.read()] == [2**24 + 2] * 2


def test_sums_of_losses_stay_in_their_memory_for_a_recorded_step():
    losses = LossSums(2)
    place = losses.sums.data_ptr()
    losses.add(torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([1]))
    sums, _ = losses.read()
    assert losses.sums.data_ptr() == place and sums.tolist() == [0, 3]


def test_trainer_counts_a_step_to_its_tasks(tmp_path):
    trainer = make_trainer(tmp_path, batch_size=2, accumulation=4)
    losses, tasks = full_losses(adapted_llama(), batch_of())
    one_step(trainer)
    sums, counts = trainer.task_losses.read()
    for task in range(4):
        own = torch.tensor([each == task for each in tasks])
        assert counts[task] == own.sum()
        assert sums[task].item() == pytest.approx(losses[own].sum().item(), rel=1e-6)


def test_the_validation_loss_is_the_mean_over_all_tokens(tmp_path):
    found = make_trainer(tmp_path, batch_size=3, eval_dataset=encoded_rows()).evaluate()
    losses, tasks = full_losses(adapted_llama(), batch_of())
    assert found["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
    for number, task in enumerate(TASKS):
        own = torch.tensor([each == number for each in tasks])
        assert found[f"eval_loss/{task}"] == pytest.approx(losses[own].mean().item(), rel=1e-6)


def test_the_validation_loss_is_without_dropout_and_the_training_goes_on_with_it(tmp_path):
    model = adapted_llama(dropout=0.5).train()
    found = make_trainer(tmp_path, model=model, eval_dataset=encoded_rows()).evaluate()
    losses, _ = full_losses(adapted_llama(), batch_of())
    assert found["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-6) and model.training


@pytest.mark.parametrize("mean_by_task", [False, True])
def test_the_validation_loss_of_weighted_tasks_is_their_weighted_sum(mean_by_task, tmp_path):
    weights = [1.0, 2.0, 0.0, 0.5]
    options = {"task_weights": weights, "mean_by_task": mean_by_task}
    found = make_trainer(tmp_path, eval_dataset=encoded_rows(), **options).evaluate()
    tokens = np.bincount(TASK_IDS, np.array(LENGTHS) - np.array(PROMPTS))
    shares = [1] * 4 if mean_by_task else tokens / tokens.sum()
    means = [found[f"eval_loss/{task}"] for task in TASKS]
    assert found["eval_loss"] == pytest.approx(
        sum(w * s * mean for w, s, mean in zip(weights, shares, means, strict=True))
    )


def test_a_collator_that_draws_takes_one_epoch_for_held_out_examples_and_then_goes_on_in_its_own(tmp_path):
    class Drawing(Collator):
        epochs = ()

        def set_epoch(self, epoch):
            self.epochs += (epoch,)

    trainer = make_trainer(tmp_path, collator=Drawing(0), eval_dataset=encoded_rows())
    trainer.sampler.set_epoch(2)
    trainer.evaluate()
    assert trainer.data_collator.epochs == (0, 2)


def test_losses_of_a_model_in_16_bits_are_taken_in_float32():
    losses, _, _ = token_losses(adapted_llama(dtype=torch.bfloat16), batch_of())
    assert losses.dtype == torch.float32


def test_every_process_draws_dropout_masks_of_its_own(tmp_path, monkeypatch):
    draws = []
    monkeypatch.setattr(Trainer, "_run_epoch", lambda *_, **__: draws.append(torch.rand(4).tolist()))
    with torch.random.fork_rng(devices=[]):
        for rank in (0, 1, 0):
            trainer = make_trainer(tmp_path)
            monkeypatch.setattr(type(trainer.args), "process_index", rank)
            trainer.state.max_steps = 2
            trainer._run_epoch(epoch=0)
            trainer._run_epoch(epoch=1)  # which goes on drawing
    first, second = draws[::2], draws[1::2]
    assert first[0] == first[2] != first[1] and second[0] not in first


# ---- saving ----


def test_room_is_kept_for_the_adapter_and_for_a_checkpoint_that_is_to_come(tmp_path, monkeypatch):
    trainer, asked = make_trainer(tmp_path), []
    monkeypatch.setattr(files, "reserved", lambda folder, size: asked.append(size))
    for to_come in (False, True):
        trainer._reserve_room(checkpoints=to_come)
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    own = sum(weight.numel() * weight.element_size() for weight in trained)
    assert asked == [own + 2**20, 4 * own + 2**20]


def test_room_is_given_back_for_a_save_and_when_a_training_fails(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    trainer._reserve_room(checkpoints=True)
    trainer.save_model()
    assert trainer.room is None

    def fail(self, *arguments, **options):
        assert trainer.room is not None
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Trainer, "train", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert trainer.room is None


def test_a_checkpoint_that_cannot_be_saved_leaves_nothing(tmp_path, monkeypatch):
    def fail(self, model, trial):
        (Path(self._get_output_dir(trial)) / "checkpoint-1").mkdir(parents=True)
        raise OSError("no space left")

    monkeypatch.setattr(Trainer, "_save_checkpoint", fail)
    trainer = make_trainer(tmp_path)
    with pytest.raises(OSError, match="no space left"):
        trainer._save_checkpoint(trainer.model, None)
    assert not [*tmp_path.iterdir()]


def test_a_resumed_training_says_since_when_its_mean_loss_is(capsys):
    for began, words in ((0, "mean training loss 1.5000"), (4, "mean training loss (since step 4) 1.5000")):
        progress, state = Progress(), TrainerState(global_step=began, max_steps=8)
        progress.on_train_begin(None, state, None)
        state.global_step = 8
        progress.on_log(None, state, None, logs={"train_loss": 1.5})
        assert f"step 8 of 8: {words}" in capsys.readouterr().err
