"""As binary BERTs are fine-tuned: warm-up, clipped gradients, padded batches, and an evaluation between steps,
after which nothing calls model.train()."""

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cmim_plugin import CMIM
from models import BinaryTransformer


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup-steps", type=int, default=2)
    parser.add_argument("--eval-every", type=int, default=4)
    parser.add_argument("--max-grad-norm", type=float, default=1.0)
    parser.add_argument("--save", default="checkpoint.pt")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Random tokens in place of GLUE's; 0 is padding.
    lengths = torch.randint(4, 13, (32, 1))
    input_ids = torch.randint(1, 30, (32, 12)) * (torch.arange(12) < lengths)
    data = TensorDataset(input_ids, (input_ids > 0).long(), torch.randint(2, (32,)))
    train_loader, val_loader = DataLoader(data, 8, shuffle=True), DataLoader(data, 8)

    model = BinaryTransformer().to(device)
    cmim = CMIM(model, (input_ids[:2].to(device), data.tensors[1][:2].to(device)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def rate(step):
        if step < args.warmup_steps:
            return step / args.warmup_steps
        return (args.steps - step) / (args.steps - args.warmup_steps)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    step = 0
    while step < args.steps:
        for batch in train_loader:
            input_ids, attention_mask, labels = (t.to(device) for t in batch)
            logits = model(input_ids, attention_mask=attention_mask)
            loss = F.cross_entropy(logits, labels)
            loss += cmim(model)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            print(f"step {step}: loss {loss.item()!r} norm {norm.item()!r} rate {scheduler.get_last_lr()[0]!r}")
            if step % args.eval_every == 0:
                model.eval()
                with torch.no_grad():
                    val_loss = sum(F.cross_entropy(model(*batch[:2]), batch[2]).item() for batch in val_loader)
                print(f"step {step}: val loss {val_loss!r}")
    torch.save({"state_dict": model.state_dict()}, args.save)


if __name__ == "__main__":
    main()
