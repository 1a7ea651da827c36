"""CMIM in a loop that is not yours: transformers' Trainer, here with a small binary BERT from random weights.

    python examples/transformers_trainer.py

The task, made up so that nothing is downloaded: does the sequence have the token 5 more often than the token 6?
`CMIMTrainer` is what you would copy. Padding is left out of the contrast by the model's own attention_mask.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from bireal import BinaryActivation
from cmim_plugin import CMIM


class CMIMTrainer(Trainer):
    """Adds the loss of `cmim` to the model's in training, logs it, and keeps its state with the checkpoints."""

    def __init__(self, *args: Any, cmim: CMIM, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cmim = cmim.to(self.args.device)
        self.add_callback(SaveCMIM(cmim))

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            # The Trainer divides the loss by the number of accumulated batches, unless the model has done that.
            divided = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            loss = loss + self.cmim(model) / (self.args.gradient_accumulation_steps if divided else 1)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs | self.cmim.scalars() if "loss" in logs else logs, *args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if folder:
            self.cmim.load_state_dict(torch.load(Path(folder, "cmim.pt"), weights_only=True))
        return super().train(folder, **kwargs)


class SaveCMIM(TrainerCallback):
    def __init__(self, cmim: CMIM) -> None:
        self.cmim = cmim

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        torch.save(self.cmim.state_dict(), Path(args.output_dir, f"checkpoint-{state.global_step}", "cmim.pt"))


class BinaryLinear(nn.Linear):
    """Binarizes its input and its weight."""

    def forward(self, x: Tensor) -> Tensor:
        binary = BinaryActivation()
        scale = self.weight.detach().abs().mean(1, keepdim=True)
        return F.linear(binary(x), scale * binary(self.weight), self.bias)


def binary_bert(**sizes: int) -> BertForSequenceClassification:
    """Every linear layer of the encoder is binary; embeddings, pooler and classifier are not."""
    model = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=2, **sizes))
    for module in model.bert.encoder.modules():
        if type(module) is nn.Linear:
            module.__class__ = BinaryLinear
    return model


def sequences(count: int, length: int, seed: int) -> list[dict[str, Tensor]]:
    """Token 0 is padding, 2 begins a sequence."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        size = int(torch.randint(length // 2, length + 1, (), generator=generator))
        ids = F.pad(torch.randint(5, 9, (size,), generator=generator), [0, length - size])
        ids[0] = 2
        more = (ids == 5).sum() > (ids == 6).sum()
        found.append({"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": more.long()})
    return found


def main(argv: list[str] | None = None) -> CMIMTrainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=100, help="steps from one evaluation and checkpoint to the next")
    parser.add_argument("--accumulation", type=int, default=1, help="backward passes a step")
    parser.add_argument("--cmim-weight", type=float, default=0.1, help="0: the baseline")
    parser.add_argument("--output", default="runs/transformers")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    model = binary_bert(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    # Any tokens will do; these draw no random number, so that the seed gives the same run without CMIM.
    example = {"input_ids": torch.arange(32).view(2, 16), "attention_mask": torch.ones(2, 16)}
    cmim = CMIM(model, example, weight=args.cmim_weight)
    print(cmim)
    options = TrainingArguments(
        output_dir=args.output,
        max_steps=args.steps,
        per_device_train_batch_size=32,
        use_cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=args.accumulation,
        learning_rate=1e-3,
        warmup_steps=20,
        max_grad_norm=1.0,
        logging_steps=min(20, args.every),
        eval_strategy="steps",
        eval_steps=args.every,
        save_steps=args.every,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = CMIMTrainer(
        model,
        options,
        train_dataset=sequences(2000, 16, seed=0),
        eval_dataset=sequences(500, 16, seed=1),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())},
        cmim=cmim,
    )
    trainer.train(resume_from_checkpoint=args.resume)
    return trainer


if __name__ == "__main__":
    main()
