"""As ReActNet is trained: binary activations first, then binary weights too, from the first step's weights; the logits
of a full-precision teacher are distilled, and the rate falls to zero by LambdaLR."""

import argparse

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from cmim_plugin import CMIM
from models import reactnet


def validate(model, loader, device):
    model.eval()
    right = count = 0
    with torch.no_grad():
        for images, target in loader:
            output = model(images.to(device))
            right += (output.argmax(1) == target.to(device)).sum().item()
            count += len(target)
    return right / count


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--step", type=int, choices=[1, 2], default=1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--pretrained", help="what the first step saved")
    parser.add_argument("--save", default="checkpoint.pt")
    args = parser.parse_args()

    torch.manual_seed(args.step)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Random images in place of ImageNet's.
    data = TensorDataset(torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))
    train_loader, val_loader = DataLoader(data, 8, shuffle=True), DataLoader(data, 8)

    teacher = reactnet(full_precision=True).to(device).eval().requires_grad_(False)
    model = reactnet(binary_weights=args.step == 2).to(device)
    if args.pretrained:
        model.load_state_dict(torch.load(args.pretrained)["state_dict"], strict=False)
    cmim = CMIM(model, torch.zeros(2, 3, 32, 32, device=device))
    decayed = [p for name, p in model.named_parameters() if p.ndim == 4]
    others = [p for name, p in model.named_parameters() if p.ndim != 4]
    groups = [{"params": decayed, "weight_decay": 1e-5 if args.step == 1 else 0}, {"params": others}]
    optimizer = torch.optim.Adam(groups, lr=args.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 - epoch / args.epochs)

    for epoch in range(args.epochs):
        model.train()
        total = 0
        for images, target in train_loader:
            images, target = images.to(device), target.to(device)
            logits = model(images)
            with torch.no_grad():
                soft = F.softmax(teacher(images), 1)
            loss = F.cross_entropy(logits, soft)
            loss += cmim(model)
            total += loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        print(f"step {args.step} epoch {epoch}: loss {total!r} accuracy {validate(model, val_loader, device)!r}")
    torch.save({"state_dict": model.state_dict()}, args.save)


if __name__ == "__main__":
    main()
